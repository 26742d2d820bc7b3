//! Who finds no place sleeps, and is served in order.

use super::{free, high, kunmap, read, rig, rigs, write};
use kmem::{Kmem, Page, context::Task};
use kmem_hosted::Hosted;
use kmem_test_support::Rig;
use std::{
    ptr,
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

/// Waits until so many tasks sleep for a place.
#[track_caller]
pub(super) fn asleep(rig: &Rig, sleepers: usize) {
    let start = Instant::now();
    while rig.audit_highmem().unwrap().sleepers != sleepers {
        assert!(start.elapsed() < Duration::from_secs(20), "gave up waiting");
        thread::yield_now();
    }
}

#[test]
fn sleepers_are_served_in_order_and_nobody_gets_past() {
    const SLEEPERS: usize = 12;
    let rig = rig(1);
    let order = Mutex::new(Vec::new());
    let first = high(&rig);
    let pages: Vec<_> = (0..SLEEPERS + 1).map(|_| high(&rig)).collect();
    rig.run(|_| rig.kmap(first).unwrap());
    thread::scope(|s| {
        for (n, &page) in pages[..SLEEPERS].iter().enumerate() {
            let (rig, order) = (&rig, &order);
            s.spawn(move || {
                rig.machine().run(|_| {
                    let at = rig.kmap(page).unwrap();
                    order.lock().unwrap().push(n);
                    write(at, n as u8);
                    // Others are in line meanwhile.
                    assert_eq!(read(at), n as u8);
                    kunmap(rig, page);
                })
            });
            asleep(rig, n + 1);
        }
        rig.run(|_| {
            kunmap(&rig, first);
            // The place is the first sleeper's already, whoever runs first: this one comes last.
            let at = rig.kmap(pages[SLEEPERS]).unwrap();
            assert_eq!(order.lock().unwrap().len(), SLEEPERS);
            write(at, 0xff);
            kunmap(&rig, pages[SLEEPERS]);
        });
    });
    assert_eq!(order.into_inner().unwrap(), (0..SLEEPERS).collect::<Vec<_>>());
    assert!(rig.audit_highmem().unwrap().slept >= SLEEPERS as u64);
    free(&rig, pages.into_iter().chain([first]));
}

#[test]
fn sleepers_for_one_page_are_served_together() {
    let rig = rig(1);
    let (first, other, page) = (high(&rig), high(&rig), high(&rig));
    rig.run(|_| rig.kmap(first).unwrap());
    let together = std::sync::Barrier::new(4);
    thread::scope(|s| {
        for n in 0..4 {
            let (rig, together) = (&rig, &together);
            s.spawn(move || {
                // Not on a CPU: all four hold the mapping at once, on two CPUs.
                rig.kmap(page).unwrap();
                together.wait();
                kunmap(rig, page);
            });
            asleep(rig, n + 1);
        }
        let rig = &rig;
        s.spawn(move || {
            rig.kmap(other).unwrap();
            kunmap(rig, other);
        });
        asleep(rig, 5);
        kunmap(rig, first);
    });
    assert_eq!(rig.audit_highmem().unwrap().slept, 5);
    free(&rig, [first, other, page]);
}

#[test]
fn many_tasks_on_few_places_all_get_one() {
    rigs(3).into_iter().for_each(crowd);
}

fn crowd(rig: Rig) {
    const TASKS: usize = 16;
    const ROUNDS: usize = 100;
    let pages: Vec<_> = (0..TASKS / 2).map(|_| high(&rig)).collect();
    // All begin asleep.
    let first = [high(&rig), high(&rig), high(&rig)];
    first.iter().for_each(|page| _ = rig.kmap(page).unwrap());
    thread::scope(|s| {
        for n in 0..TASKS {
            let (rig, pages) = (&rig, &pages);
            s.spawn(move || {
                let task = Task::new();
                rig.machine()
                    .run_on(None, Some(&task), |process| {
                        for round in 0..ROUNDS {
                            let page = pages[(n * 7 + round * 5) % pages.len()];
                            let at = rig.kmap(page).unwrap().as_ptr();
                            // SAFETY: mapped, and each task has a byte of its own.
                            unsafe { at.add(n).write_volatile(round as u8) };
                            rig.hosted().cond_resched(process);
                            // SAFETY: as above.
                            assert_eq!(unsafe { at.add(n).read_volatile() }, round as u8);
                            kunmap(rig, page);
                        }
                    })
                    .unwrap();
            });
        }
        asleep(&rig, TASKS);
        first.iter().for_each(|page| kunmap(&rig, page));
    });
    free(&rig, pages.into_iter().chain(first));
}

#[test]
fn a_kunmap_in_an_interrupt_serves_a_sleeper() {
    let rig = rig(1);
    let (first, page) = (high(&rig), high(&rig));
    // A handler may not keep the machine alive: it finds it while there is something to do only.
    let work: Arc<Mutex<Option<[usize; 2]>>> = Arc::default();
    let todo = Arc::clone(&work);
    assert!(rig.hosted().set_timer_handler(Arc::new(move |_, _| {
        let Some([kmem, page]) = todo.try_lock().ok().and_then(|mut todo| todo.take()) else {
            return;
        };
        // SAFETY: the machine and its pages live until after the work is done.
        unsafe {
            let kmem = &*ptr::with_exposed_provenance::<Kmem<Hosted>>(kmem);
            kmem.kunmap(&*ptr::with_exposed_provenance::<Page>(page)).unwrap();
        }
    })));
    rig.run(|_| rig.kmap(first).unwrap());
    thread::scope(|s| {
        let rig = &rig;
        let sleeper = s.spawn(move || {
            rig.on(1, &Task::new(), |_| {
                rig.kmap(page).unwrap();
                kunmap(rig, page);
            })
        });
        asleep(rig, 1);
        let kmem = ptr::from_ref(rig.kmem()).expose_provenance();
        *work.lock().unwrap() = Some([kmem, ptr::from_ref(first).expose_provenance()]);
        rig.run(|_| {
            assert!(rig.hosted().start_storm(0, 1000));
            while !sleeper.is_finished() {
                thread::yield_now();
            }
            assert!(rig.hosted().stop_storm(0));
        });
    });
    assert!(work.lock().unwrap().is_none());
    free(&rig, [first, page]);
}
