//! CPUs that allocate at once get chunks of their own, which go again.

use kmem::{Config, Gfp};
use kmem_hosted::{Machine, Shape};
use std::{
    sync::{
        Barrier,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

const CPUS: usize = 4;

#[test]
fn cpus_in_each_others_way_part_and_what_they_had_comes_back() {
    let shape = Shape::no_dma(64 << 20).cpus(CPUS);
    let machine = Machine::without_kswapd(shape, Config::default()).unwrap();
    let start = (machine.audit().unwrap().allocated, machine.per_cpu_free());
    let (together, parted) = (Barrier::new(CPUS), AtomicBool::new(false));
    thread::scope(|s| {
        for cpu in 0..CPUS {
            let (machine, together, parted) = (&machine, &together, &parted);
            s.spawn(move || {
                machine
                    .run_on(Some(cpu), None, |_| {
                        together.wait();
                        let (begin, free) = (Instant::now(), machine.per_cpu_free());
                        while !parted.load(SeqCst) && begin.elapsed() < Duration::from_secs(20) {
                            for size in [8, 8, 64, 400] {
                                let at = machine.__alloc_percpu_gfp(size, 8, Gfp::KERNEL).unwrap();
                                for of in 0..CPUS {
                                    let at = machine.per_cpu_ptr(at, of).unwrap().as_ptr();
                                    // SAFETY: ours, of that size, and zeroed.
                                    unsafe {
                                        assert_eq!(at.read(), 0);
                                        at.write_bytes(cpu as u8 + 1, size);
                                    }
                                }
                                // SAFETY: ours, and not used after.
                                unsafe { machine.free_percpu(at) }.unwrap();
                            }
                            if machine.per_cpu_free() > free + machine.per_cpu_stride() as u64 / 2 {
                                parted.store(true, SeqCst);
                            }
                        }
                    })
                    .unwrap()
            });
        }
    });
    assert!(parted.load(SeqCst), "nobody was ever in the way");
    // The last one's chunk, at least, stays until somebody wants the memory.
    assert!(machine.per_cpu_free() > start.1);
    assert!(machine.run(|_| machine.drop_kept_percpu()).unwrap() > 0);
    machine.run(|_| machine.drain_all_pages()).unwrap();
    assert_eq!((machine.audit().unwrap().allocated, machine.per_cpu_free()), start);
}

#[test]
fn reclaim_takes_what_is_kept() {
    let shape = Shape::no_dma(16 << 20).cpus(2);
    let machine = Machine::without_kswapd(shape, Config::default()).unwrap();
    let before = machine.per_cpu_free();
    let begin = Instant::now();
    while machine.per_cpu_free() == before && begin.elapsed() < Duration::from_secs(20) {
        thread::scope(|s| {
            for cpu in 0..2 {
                let machine = &machine;
                s.spawn(move || {
                    machine
                        .run_on(Some(cpu), None, |_| {
                            for _ in 0..10_000 {
                                let at = machine.alloc_percpu::<u64>().unwrap();
                                // SAFETY: ours, and not used after.
                                unsafe { machine.free_percpu(at) }.unwrap();
                            }
                        })
                        .unwrap();
                });
            }
        });
    }
    assert!(machine.per_cpu_free() > before);
    machine
        .run(|_| {
            let mut held = Vec::new();
            while let Ok(page) = machine.alloc_page(Gfp::KERNEL | Gfp::NOWARN | Gfp::NORETRY) {
                held.push(page);
            }
            assert_eq!(machine.per_cpu_free(), before);
            held.into_iter().for_each(|page| machine.__free_page(page).unwrap());
        })
        .unwrap();
}
