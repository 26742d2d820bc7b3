//! Temporary mappings: kmap_local, kmap_atomic, purposes.

use super::{free, high, low, peek, read, readable, rig, write};
use kmem::{
    Gfp, Misuse, Page,
    context::{KM_MAX_IDX, Task},
    highmem::KmType,
    platform::Platform,
};
use kmem_hosted::OfflineError;
use kmem_test_support::Rig;
use std::{
    ptr::NonNull,
    sync::atomic::{
        AtomicU32,
        Ordering::{Acquire, Release},
    },
    thread,
};

#[track_caller]
fn unmap(rig: &Rig, at: NonNull<u8>) {
    // SAFETY: not used after.
    unsafe { rig.kunmap_local(at.as_ptr()).unwrap() };
}

#[test]
fn mappings_nest_and_what_is_undone_faults() {
    let rig = rig(4);
    rig.run(|_| {
        let pages: Vec<_> = (0..KM_MAX_IDX).map(|_| high(&rig)).collect();
        let at: Vec<_> = pages.iter().map(|page| rig.kmap_local_page(page).unwrap()).collect();
        for (n, at) in at.iter().enumerate() {
            write(*at, n as u8);
        }
        // They are not seen as the page's address: that is one of all CPUs.
        assert_eq!(rig.page_address(pages[0]), None);
        assert_eq!(rig.audit_highmem().unwrap().local, KM_MAX_IDX);
        for (n, at) in at.iter().enumerate().rev() {
            assert_eq!(read(*at), n as u8);
            unmap(&rig, *at);
            assert!(!readable(*at));
        }
        for (n, page) in pages.iter().enumerate() {
            assert_eq!(peek(&rig, page), n as u8);
        }
        free(&rig, pages);
    });
}

#[test]
fn one_page_through_two_kinds_of_mappings() {
    let rig = rig(4);
    rig.run(|_| {
        let page = high(&rig);
        let (all, own) = (rig.kmap(page).unwrap(), rig.kmap_local_page(page).unwrap());
        let atomic = rig.kmap_atomic(page).unwrap();
        assert!(all != own && own != atomic);
        write(all, 1);
        assert_eq!((read(own), read(atomic)), (1, 1));
        write(atomic, 2);
        assert_eq!((read(own), read(all)), (2, 2));
        // SAFETY: not used after.
        unsafe { rig.kunmap_atomic(atomic.as_ptr()).unwrap() };
        unmap(&rig, own);
        super::kunmap(&rig, page);
        free(&rig, [page]);
    });
}

#[test]
fn kmap_atomic_turns_preemption_off_for_low_pages_too() {
    let rig = rig(4);
    rig.run(|_| {
        for page in [high(&rig), low(&rig)] {
            let at = rig.kmap_atomic(page).unwrap();
            let cpu = rig.platform().this_cpu().unwrap();
            assert_eq!(cpu.context().preempt_depth(), 1);
            let mark = rig.mark();
            assert!(rig.alloc_page(Gfp::KERNEL).is_err());
            assert!(rig.kmap(page).is_err());
            assert_eq!(rig.since(mark).len(), 2);
            free(&rig, [rig.alloc_page(Gfp::ATOMIC).unwrap()]);
            // SAFETY: not used after.
            unsafe { rig.kunmap_atomic(at.as_ptr()).unwrap() };
            assert!(cpu.context().may_sleep());
            free(&rig, [page]);
        }
    });
}

#[test]
fn each_purpose_has_a_place_of_its_own() {
    let rig = rig(4);
    rig.run(|_| {
        let pages: Vec<_> = KmType::ALL.iter().map(|_| high(&rig)).collect();
        let mut at = Vec::new();
        for (purpose, page) in KmType::ALL.into_iter().zip(&pages) {
            assert_eq!(KmType::ALL[purpose as usize], purpose);
            assert_eq!(format!("{purpose:?}"), purpose.name());
            at.push(rig.kmap_atomic_type(page, purpose).unwrap());
            write(*at.last().unwrap(), purpose as u8);
        }
        // In whatever order.
        for (purpose, at) in KmType::ALL.into_iter().zip(&at) {
            assert_eq!(read(*at), purpose as u8);
            // SAFETY: not used after.
            unsafe { rig.kunmap_atomic_type(at.as_ptr(), purpose).unwrap() };
            assert!(!readable(*at));
        }
        assert!(rig.platform().this_cpu().unwrap().context().may_sleep());
        free(&rig, pages);
    });
}

/// Sleeps until the word is not 0, giving the CPU up.
fn wait(rig: &Rig, word: &AtomicU32) {
    while word.load(Acquire) == 0 {
        rig.platform().wait(word, 0, 1_000_000_000);
    }
}

fn wake(rig: &Rig, word: &AtomicU32) {
    word.store(1, Release);
    rig.platform().wake(word);
}

#[test]
fn a_task_sleeps_with_mappings_and_finds_them_again() {
    let rig = rig(4);
    let (go, there) = (AtomicU32::new(0), AtomicU32::new(0));
    thread::scope(|s| {
        let (rig, go, there) = (&rig, &go, &there);
        s.spawn(move || {
            let task = Task::new();
            // On any CPU; it stays with it from the first mapping on.
            let run = rig.machine().run_on(None, Some(&task), |_| {
                let cpu = rig.platform().this_cpu().unwrap().id();
                let (one, two) = (high(rig), high(rig));
                let at = [rig.kmap_local_page(one).unwrap(), rig.kmap_local_page(two).unwrap()];
                write(at[0], 1);
                write(at[1], 2);
                there.store(cpu as u32 + 1, Release);
                wait(rig, go);
                assert_eq!(rig.platform().this_cpu().unwrap().id(), cpu);
                assert_eq!((read(at[0]), read(at[1])), (1, 2));
                assert_eq!(task.local_maps(), 0);
                // A blocking request inside is fine.
                free(rig, [rig.alloc_page(Gfp::KERNEL).unwrap()]);
                unmap(rig, at[1]);
                unmap(rig, at[0]);
                free(rig, [one, two]);
            });
            run.unwrap();
        });
        while there.load(Acquire) == 0 {
            thread::yield_now();
        }
        let cpu = there.load(Acquire) as usize - 1;
        // Somebody else on that CPU meanwhile, in the same places.
        rig.on(cpu, &Task::new(), |_| {
            assert_eq!(rig.audit_highmem().unwrap().local, 0);
            let page = high(rig);
            let at = rig.kmap_local_page(page).unwrap();
            write(at, 77);
            unmap(rig, at);
            free(rig, [page]);
        });
        let refused = rig.hosted().set_online(cpu, false);
        assert_eq!(refused, Err(OfflineError::LocalMaps(cpu)));
        assert!(rig.hosted().is_online(cpu));
        wake(rig, go);
    });
    for cpu in 0..2 {
        assert_eq!(rig.hosted().set_online(cpu, false), Ok(true));
        assert_eq!(rig.hosted().set_online(cpu, true), Ok(true));
    }
}

#[test]
fn a_cpu_that_is_to_go_stays_when_its_task_sleeps_with_mappings() {
    let rig = rig(4);
    let (go, there) = (AtomicU32::new(0), AtomicU32::new(0));
    thread::scope(|s| {
        let (rig, go, there) = (&rig, &go, &there);
        let task = s.spawn(move || {
            rig.on(1, &Task::new(), |_| {
                let page = high(rig);
                let at = rig.kmap_local_page(page).unwrap();
                there.store(1, Release);
                // Until somebody waits for the CPU to go.
                while rig.hosted().is_online(1) {
                    thread::yield_now();
                }
                wait(rig, go);
                write(at, 9);
                unmap(rig, at);
                free(rig, [page]);
                rig.platform().this_cpu().unwrap().id()
            })
        });
        while there.load(Acquire) == 0 {
            thread::yield_now();
        }
        assert_eq!(rig.hosted().set_online(1, false), Err(OfflineError::LocalMaps(1)));
        assert!(rig.hosted().is_online(1));
        wake(rig, go);
        assert_eq!(task.join().unwrap(), 1);
    });
}

#[test]
fn code_without_a_task_loses_its_mappings_when_it_sleeps() {
    let rig = rig(4);
    let page = high(&rig);
    let mark = rig.mark();
    let word = AtomicU32::new(0);
    rig.machine()
        .run_on(Some(0), None, |_| {
            // SAFETY: null is always allowed. Tasks that are given none have one of their own.
            unsafe { rig.platform().this_cpu().unwrap().set_current(std::ptr::null()) };
            let at = rig.kmap_local_page(page).unwrap();
            rig.platform().wait(&word, 0, 1);
            assert!(
                rig.one_report(mark).contains("1 temporary mappings were left behind on CPU 0")
            );
            assert!(!readable(at));
            let lost = Err(Misuse::NotLocalMap { addr: at.addr().get() });
            // SAFETY: not used after.
            assert_eq!(unsafe { rig.kunmap_local(at.as_ptr()) }, lost);
        })
        .unwrap();
    free(&rig, [page]);
}

#[test]
fn mappings_that_a_task_leaves_are_reported() {
    let rig = rig(4);
    let page = high(&rig);
    let mark = rig.mark();
    let at = rig.run(|_| rig.kmap_local_page(page).unwrap());
    assert!(rig.one_report(mark).contains("left behind"));
    assert!(!readable(at));
    // Where a misuse panics too the task leaves its CPU.
    rig.set_panic_on_misuse(true);
    rig.run(|_| rig.kmap_local_page(page).unwrap());
    rig.set_panic_on_misuse(false);
    assert_eq!(rig.since(mark).len(), 2);
    rig.run(|_| ());
    free(&rig, [page]);
}

#[test]
fn contents_are_copied_and_zeroed_wherever_they_are() {
    let rig = rig(4);
    // SAFETY: the pages are the test's.
    let bytes = |page: &Page, at| unsafe {
        let mut to = [0; 4];
        rig.memcpy_from_page(&mut to, page, at).unwrap();
        to
    };
    let work = || {
        let pages = [high(&rig), low(&rig), high(&rig)];
        for (n, page) in pages.iter().enumerate() {
            // SAFETY: as above.
            unsafe {
                rig.clear_highpage(page).unwrap();
                rig.memcpy_to_page(page, 4092, b"last").unwrap();
                rig.memcpy_to_page(page, n, b"abcd").unwrap();
                rig.zero_user(page, n + 1, 2).unwrap();
            }
            assert_eq!(bytes(page, n), *b"a\0\0d");
            assert_eq!(bytes(page, 4092), *b"last");
        }
        // SAFETY: as above.
        unsafe {
            rig.copy_highpage(pages[1], pages[0]).unwrap();
            rig.copy_highpage(pages[2], pages[1]).unwrap();
        }
        assert_eq!(bytes(pages[2], 0), *b"a\0\0d");
        free(&rig, pages);
    };
    rig.run(|_| work());
    rig.run(|process| {
        kmem::sync::irqs_disabled(rig.hosted(), process, |_| {
            let page = rig.alloc_page(Gfp::ATOMIC | Gfp::HIGHMEM).unwrap();
            // SAFETY: as above.
            unsafe { rig.memcpy_to_page(page, 0, b"wxyz").unwrap() };
            assert_eq!(bytes(page, 0), *b"wxyz");
            free(&rig, [page]);
        })
    });
}
