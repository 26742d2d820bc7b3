//! Interrupts that map pages, in the midst of tasks that do the same.

use super::{Rig, free, high, kunmap, read, rigs, sleepers::asleep, write};
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};
use kmem::{
    Kmem, Page,
    context::{Atomic, Path, Task},
    highmem::KmType,
};
use kmem_hosted::Hosted;
use std::{
    ptr,
    sync::{Arc, OnceLock, atomic::AtomicBool},
    thread,
    time::{Duration, Instant},
};

/// What the handlers work on: the machine, and for each CPU two pages of its own.
struct Place {
    kmem: usize,
    pages: [[usize; 2]; 2],
}

fn page<'a>(at: usize) -> &'a Page {
    // SAFETY: pages of the machine, which lives until after the storm.
    unsafe { &*ptr::with_exposed_provenance::<Page>(at) }
}

fn interrupt(m: &Kmem<Hosted>, atomic: Atomic<'_>, pages: [&Page; 2], n: u64) {
    m.with_kmap_atomic_in(atomic, pages[0], |atomic, outer| {
        write(outer.as_ptr(), n as u8);
        m.with_kmap_atomic_in(atomic, pages[1], |_, inner| write(inner.as_ptr(), !n as u8))
            .unwrap();
        let typed = m.kmap_atomic_type(pages[1], KmType::KM_IRQ0).unwrap();
        assert_eq!((read(outer.as_ptr()), read(typed)), (n as u8, !n as u8));
        // SAFETY: not used after.
        unsafe { m.kunmap_atomic_type(typed.as_ptr(), KmType::KM_IRQ0).unwrap() };
    })
    .unwrap();
}

/// The paths of high memory, and how long the storm lasts at most until an interrupt has landed in each and a task that
/// had run has slept.
const PATHS: [Path; 2] = [Path::Kmap, Path::KmapLocal];
const PATIENCE: Duration = Duration::from_secs(20);

fn landed(rig: &Rig, path: Path) -> u64 {
    let stats = [0, 1].map(|cpu| rig.hosted().stats(cpu).unwrap());
    stats.iter().map(|s| s.landed[path as usize] + s.landed_deferred[path as usize]).sum()
}

#[test]
fn handlers_and_tasks_do_not_disturb_each_other() {
    rigs(2).into_iter().for_each(storm);
}

fn storm(rig: Rig) {
    const TASKS: usize = 6;
    let served = Arc::new([const { AtomicU64::new(0) }; 2]);
    let place: Arc<OnceLock<Place>> = Arc::default();
    let stop = Arc::new(AtomicBool::new(false));
    let theirs: Vec<&Page> = (0..4).map(|_| high(&rig)).collect();
    let expose = |page: &Page| ptr::from_ref(page).expose_provenance();
    let pages = [[theirs[0], theirs[1]], [theirs[2], theirs[3]]];
    let kmem = ptr::from_ref(rig.kmem()).expose_provenance();
    assert!(place.set(Place { kmem, pages: pages.map(|two| two.map(expose)) }).is_ok());
    let (at, end, count) = (Arc::clone(&place), Arc::clone(&stop), Arc::clone(&served));
    assert!(rig.hosted().set_timer_handler(Arc::new(move |atomic, cpu| {
        if end.load(Relaxed) {
            return;
        }
        let place = at.get().unwrap();
        // SAFETY: the machine lives until after the storm, which `stop` ends.
        let m = unsafe { &*ptr::with_exposed_provenance::<Kmem<Hosted>>(place.kmem) };
        let n = count[cpu].fetch_add(1, Relaxed);
        interrupt(m, atomic, place.pages[cpu].map(page), n);
    })));
    let shared: Vec<_> = (0..5).map(|_| high(&rig)).collect();
    for cpu in 0..2 {
        assert!(rig.hosted().start_storm(cpu, 10_000));
    }
    // All begin asleep.
    let first = [high(&rig), high(&rig)];
    first.iter().for_each(|page| _ = rig.kmap(page).unwrap());
    thread::scope(|s| {
        for n in 0..TASKS {
            let (rig, shared) = (&rig, &shared);
            s.spawn(move || {
                let task = Task::new();
                let own = high(rig);
                let work = |process: &mut _| {
                    let begin = Instant::now();
                    let mut round = 0_usize;
                    let slept = || rig.audit_highmem().unwrap().slept > TASKS as u64;
                    let shown = || PATHS.iter().all(|path| landed(rig, *path) > 0) && slept();
                    while begin.elapsed() < Duration::from_millis(400)
                        || (!shown() && begin.elapsed() < PATIENCE)
                    {
                        rig.with_kmap_local(own, |local| {
                            write(local.as_ptr(), round as u8);
                            // Sleeps: there are more pages than places.
                            let page = shared[(n + round) % shared.len()];
                            let at = rig.kmap(page).unwrap().as_ptr();
                            // Does not, and so meets more interrupts.
                            for _ in 0..100 {
                                assert_eq!(rig.kmap(page).unwrap().as_ptr(), at);
                                kunmap(rig, page);
                            }
                            // SAFETY: mapped, and each task has a byte of its own.
                            unsafe { at.add(n).write_volatile(round as u8) };
                            // Others run meanwhile, and find no place.
                            rig.hosted().cond_resched(process);
                            assert_eq!(read(local.as_ptr()), round as u8);
                            // SAFETY: as above.
                            assert_eq!(unsafe { at.add(n).read_volatile() }, round as u8);
                            kunmap(rig, page);
                        })
                        .unwrap();
                        round += 1;
                    }
                };
                rig.machine().run_on(Some(n % 2), Some(&task), work).unwrap();
                free(rig, [own]);
            });
        }
        asleep(&rig, TASKS);
        first.iter().for_each(|page| kunmap(&rig, page));
    });
    for cpu in 0..2 {
        assert!(rig.hosted().stop_storm(cpu));
    }
    stop.store(true, Relaxed);
    for (cpu, two) in pages.iter().enumerate() {
        let n = served[cpu].load(Relaxed);
        assert!(n > 0, "no interrupt on CPU {cpu}");
        assert_eq!(super::peek(&rig, two[0]), (n - 1) as u8);
        assert_eq!(super::peek(&rig, two[1]), !(n - 1) as u8);
    }
    for path in PATHS {
        let landed = landed(&rig, path);
        println!("{path:?}: {landed} interrupts");
        assert!(landed > 0, "no interrupt landed in {path:?}");
    }
    assert!(rig.audit_highmem().unwrap().slept > TASKS as u64);
    free(&rig, shared.into_iter().chain(theirs).chain(first));
}
