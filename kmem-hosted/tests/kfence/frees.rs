//! Frees that find something, or are refused.

use super::{assert_has, free, read, rig, sample, sample_at, write};
use kmem::{Gfp, Misuse, slab::SlabFlags};
use std::{
    ptr::NonNull,
    sync::{
        Barrier, Mutex,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread,
};

#[test]
fn what_is_written_beside_an_object_is_found_when_it_is_freed() {
    let rig = rig(7);
    rig.run(|_| {
        // kmalloc-64's alignment leaves four bytes behind 60.
        let at = sample_at(&rig, 60, true);
        write(at.as_ptr().wrapping_add(60), 0);
        write(at.as_ptr().wrapping_add(62), 1);
        let mark = rig.mark();
        let found = free(&rig, at);
        assert!(matches!(found, Err(Misuse::Overrun { offset: 60, found: 0, .. })), "{found:?}");
        let place = at.addr().get() + 60;
        assert_has(
            &rig.one_report(mark),
            &[
                "BUG: KFENCE: memory corruption in ",
                &format!("Corrupted memory at {place:#x} [ 0x00 . 0x01 . ] (in kfence-#"),
                "size=60, cache=kmalloc-64",
                "\n\nfreed on cpu 0",
            ],
        );
        let at = sample_at(&rig, 16, true);
        write(at.as_ptr().wrapping_sub(9), 0x5a);
        let mark = rig.mark();
        let found = free(&rig, at);
        let Err(Misuse::Underrun { offset, found, cache, .. }) = found else { panic!("{found:?}") };
        assert_eq!((offset, found, cache.as_str()), (-9, 0x5a, "kmalloc-16"));
        assert_has(&rig.one_report(mark), &["[ 0x5a . . . . . . . . ]"]);
        // It is free all the same.
        assert!(matches!(free(&rig, at), Err(Misuse::ObjectFree { .. })));
    });
}

#[test]
fn frees_of_what_is_no_object_are_refused() {
    let rig = rig(7);
    rig.run(|_| {
        let other = rig.kmem_cache_create("other", 40, 0, SlabFlags::NO_MERGE, None).unwrap();
        let at = sample(&rig, 40);
        let addr = at.addr().get();
        let refused = |what: Result<(), Misuse>, text: &str, mark: usize| {
            assert_has(
                &rig.one_report(mark),
                &["BUG: KFENCE: invalid free in ", text, "frees.rs:"],
            );
            what.unwrap_err()
        };
        let kfree = |at: usize| {
            let at = std::ptr::with_exposed_provenance_mut(at);
            // SAFETY: nobody uses it after; what is no object is refused.
            unsafe { rig.kfree(at) }
        };
        let mark = rig.mark();
        let e = refused(kfree(addr + 8), "(in kfence-#", mark);
        assert!(matches!(e, Misuse::InsideObject { .. }), "{e:?}");
        let mark = rig.mark();
        // SAFETY: refused.
        let e = refused(unsafe { rig.kmem_cache_free(&other, at) }, "cache=kmalloc-64", mark);
        let Misuse::WrongCache { given, actual, .. } = e else { panic!("{e:?}") };
        assert_eq!((given.as_str(), actual.as_str()), ("other", "kmalloc-64"));
        for beside in [addr - 4096, addr + 4096, addr / 4096 * 4096 + 2000] {
            let mark = rig.mark();
            let e = refused(kfree(beside), &format!("Invalid free of {beside:#x}:"), mark);
            assert_eq!(e, Misuse::NotAnObject { addr: beside });
        }
        kfree(addr).unwrap();
        let mark = rig.mark();
        let e = refused(kfree(addr), "\n\nfreed on cpu 0", mark);
        assert!(matches!(e, Misuse::ObjectFree { .. }), "{e:?}");
        rig.kmem_cache_destroy(other).unwrap();
        // Nor are the pages anybody's to free.
        let page = rig.virt_to_page(at.as_ptr()).unwrap();
        assert!(rig.__free_pages(page, 0).is_err());
    });
}

#[derive(Clone, Copy)]
struct Sent(NonNull<u8>);

// SAFETY: an address; who has it uses what is there.
unsafe impl Send for Sent {}

#[test]
fn of_two_cpus_that_free_one_object_one_succeeds() {
    const ROUNDS: usize = 300;
    let rig = rig(7);
    let (barrier, done) = (Barrier::new(2), AtomicUsize::new(0));
    let target = Mutex::new(None::<Sent>);
    thread::scope(|s| {
        for cpu in 0..2 {
            let (rig, barrier, done, target) = (&rig, &barrier, &done, &target);
            s.spawn(move || {
                for _ in 0..ROUNDS {
                    if cpu == 0 {
                        let at = rig.machine().run_on(Some(0), None, |_| sample(rig, 64));
                        *target.lock().unwrap() = Some(Sent(at.unwrap()));
                    }
                    barrier.wait();
                    let Sent(at) = target.lock().unwrap().unwrap();
                    match rig.machine().run_on(Some(cpu), None, |_| free(rig, at)).unwrap() {
                        Ok(()) => _ = done.fetch_add(1, Relaxed),
                        Err(e) => assert!(matches!(e, Misuse::ObjectFree { .. }), "{e:?}"),
                    }
                    barrier.wait();
                }
            });
        }
    });
    assert_eq!(done.load(Relaxed), ROUNDS);
    let stats = rig.kfence_stats().unwrap();
    assert_eq!((stats.live, stats.bugs), (0, ROUNDS as u64));
    assert_eq!((stats.allocations, stats.frees), (ROUNDS as u64, ROUNDS as u64));
}

#[test]
fn cpus_that_allocate_and_free_lose_nothing() {
    let rig = rig(15);
    thread::scope(|s| {
        for cpu in 0..2 {
            let rig = &rig;
            s.spawn(move || {
                let work = |_: &mut _| {
                    let mut held = Vec::new();
                    for n in 0..3000usize {
                        if n.is_multiple_of(3) {
                            rig.kfence_toggle();
                        }
                        let size = 1 + n * 37 % 500;
                        let at = rig.kmalloc(size, Gfp::KERNEL).unwrap();
                        // SAFETY: an object of so many bytes, ours.
                        unsafe { at.write_bytes(cpu as u8 + 1, size) };
                        held.push((at, size));
                        if held.len() > 10 {
                            let (at, size) = held.swap_remove(n % 10);
                            // SAFETY: as above.
                            let bytes = unsafe { NonNull::slice_from_raw_parts(at, size).as_ref() };
                            assert!(bytes.iter().all(|b| *b == cpu as u8 + 1));
                            free(rig, at).unwrap();
                        }
                    }
                    held.into_iter().for_each(|(at, _)| free(rig, at).unwrap());
                };
                rig.machine().run_on(Some(cpu), None, work).unwrap();
            });
        }
    });
    let stats = rig.kfence_stats().unwrap();
    assert!(stats.allocations > 100, "{stats:?}");
    assert_eq!((stats.live, stats.bugs), (0, 0));
}

#[test]
fn a_sample_waits_for_its_readers() {
    let rig = rig(3);
    let m = rig.machine();
    // Again and again, so that places come again with what the last one left in them.
    for _ in 0..8 {
        rig.run(|_| {
            let at = sample(&rig, 64);
            m.hosted()
                .rcu_read(|| {
                    // SAFETY: ours; readers look at its first bytes.
                    unsafe { rig.kfree_rcu(at.as_ptr(), 48) }.unwrap();
                    let mark = rig.mark();
                    assert!(free(&rig, at).is_err(), "freed before its readers are done");
                    // SAFETY: that it does no harm is what is tested.
                    let again = unsafe { rig.kfree_rcu(at.as_ptr(), 0) };
                    assert_eq!(again, Err(Misuse::FreedLater { addr: at.addr().get() }));
                    assert_eq!(rig.kfence_stats().unwrap().live, 1);
                    assert_eq!(rig.since(mark).len(), 2);
                    read(at.as_ptr());
                    assert_eq!(rig.since(mark).len(), 2, "a reader faulted");
                })
                .unwrap();
            assert!(m.rcu_barrier());
            let mark = rig.mark();
            read(at.as_ptr());
            assert!(rig.one_report(mark).contains("use-after-free"));
        });
    }
    assert_eq!(rig.kfence_stats().unwrap().live, 0);
}
