//! Interrupts that count, allocate and free, in the midst of tasks that do the same.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use kmem::{Config, Gfp, Kmem, percpu::PerCpuPtr};
use kmem_hosted::{Hosted, Machine, Shape};
use std::{
    sync::{Arc, OnceLock},
    thread,
    time::{Duration, Instant},
};

kmem::define_per_cpu! {
    static COUNTED: AtomicU64 = AtomicU64::new(0);
    static SWAPPED: AtomicU64 = AtomicU64::new(0);
}

/// Two allocations of a few sizes, and their frees.
fn turn(m: &Kmem<Hosted>, gfp: Gfp, n: u64) -> bool {
    let sizes = [8, 24, 200, 4000];
    let pick = |n: u64| m.__alloc_percpu_gfp(sizes[n as usize % 4], 8, gfp).ok();
    let both: [Option<PerCpuPtr<u8>>; 2] = [pick(n), pick(n / 4)];
    let all = both.iter().all(Option::is_some);
    for at in both.into_iter().flatten() {
        // SAFETY: ours, and not used after.
        unsafe { m.free_percpu(at) }.unwrap();
    }
    all
}

#[test]
fn no_count_is_lost_and_no_place_given_twice() {
    static SERVED: AtomicU64 = AtomicU64::new(0);
    let machine =
        Machine::without_kswapd(Shape::no_dma(64 << 20).cpus(2), Config::default()).unwrap();
    let machine = Arc::new(machine);
    let start = machine.audit().unwrap();
    let free = machine.per_cpu_free();
    // A handler may not keep the machine alive: it is found through a place that outlives the storm only.
    let place: Arc<OnceLock<usize>> = Arc::new(OnceLock::new());
    place.set(core::ptr::from_ref(machine.kmem()).expose_provenance()).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let (at, end) = (Arc::clone(&place), Arc::clone(&stop));
    assert!(machine.hosted().set_timer_handler(Arc::new(move |_atomic, cpu| {
        if end.load(Relaxed) {
            return;
        }
        let at = core::ptr::with_exposed_provenance::<Kmem<Hosted>>(*at.get().unwrap());
        // SAFETY: the machine lives until after the storm, which `stop` ends.
        let m = unsafe { &*at };
        m.this_cpu_inc(&COUNTED).unwrap();
        m.this_cpu_xchg(&SWAPPED, cpu as u64).unwrap();
        let n = SERVED.fetch_add(1, Relaxed);
        assert!(turn(m, Gfp::ATOMIC, n));
    })));
    let inner: u64 = thread::scope(|s| {
        let threads: Vec<_> = (0..2)
            .map(|cpu| {
                let machine = &machine;
                s.spawn(move || {
                    machine
                        .run_on(Some(cpu), None, |_| {
                            assert!(machine.hosted().start_storm(cpu, 20_000));
                            let (begin, mut n) = (Instant::now(), 0u64);
                            while begin.elapsed() < Duration::from_millis(300) {
                                for _ in 0..100 {
                                    machine.this_cpu_inc(&COUNTED).unwrap();
                                    machine.this_cpu_add_return(&COUNTED, 2).unwrap();
                                    assert!(
                                        machine.this_cpu_xchg(&SWAPPED, cpu as u64).unwrap() < 2
                                    );
                                }
                                assert!(turn(machine, Gfp::KERNEL, n));
                                n += 1;
                            }
                            assert!(machine.hosted().stop_storm(cpu));
                            n * 300
                        })
                        .unwrap()
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).sum()
    });
    stop.store(true, Relaxed);
    let counted: u64 =
        (0..2).map(|cpu| machine.per_cpu(&COUNTED, cpu).unwrap().load(Relaxed)).sum();
    let served = SERVED.load(Relaxed);
    assert!(served > 1000, "{served} interrupts");
    assert_eq!(counted, inner + served);
    // Chunks of their own, if they were in each other's way.
    machine.drop_kept_percpu();
    machine.run(|_| machine.drain_all_pages()).unwrap();
    assert_eq!(machine.per_cpu_free(), free);
    assert_eq!(
        machine.audit().unwrap().free + machine.audit().unwrap().pcp,
        start.free + start.pcp
    );
}
