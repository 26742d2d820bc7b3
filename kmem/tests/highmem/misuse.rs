//! Mistakes are reported, and nothing else happens.

use super::{free, high, kunmap, low, read, readable, rig, write};
use kmem::{
    AllocError, Misuse,
    context::{Atomic, KM_MAX_IDX, Section, Task},
    highmem::KmType,
    platform::Platform,
};
use kmem_test_support::Rig;
use std::ptr::NonNull;

fn local(rig: &Rig, at: NonNull<u8>) -> Result<(), Misuse> {
    // SAFETY: the tests use the address after only where it was refused.
    unsafe { rig.kunmap_local(at.as_ptr()) }
}

fn atomic(rig: &Rig, at: NonNull<u8>) -> Result<(), Misuse> {
    // SAFETY: as above.
    unsafe { rig.kunmap_atomic(at.as_ptr()) }
}

#[test]
fn kunmap_of_what_is_not_mapped() {
    let rig = rig(4);
    rig.run(|_| {
        let page = high(&rig);
        let pfn = rig.page_to_pfn(page).unwrap();
        let mark = rig.mark();
        // SAFETY: nothing is mapped.
        let never = unsafe { rig.kunmap(page) };
        assert_eq!(never, Err(Misuse::NotKmapped { pfn }));
        let report = rig.one_report(mark);
        assert!(report.contains("Bad kmap") && report.contains(file!()), "{report}");
        rig.kmap(page).unwrap();
        kunmap(&rig, page);
        // SAFETY: as above.
        let twice = unsafe { rig.kunmap(page) };
        assert_eq!(twice, Err(Misuse::NotKmapped { pfn }));
        rig.kmap(page).unwrap();
        kunmap(&rig, page);
        free(&rig, [page]);
    });
}

#[test]
fn kmap_in_atomic_context() {
    let rig = rig(4);
    rig.run(|process| {
        let (page, own) = (high(&rig), low(&rig));
        for page in [page, own] {
            let mark = rig.mark();
            let refused =
                kmem::sync::preempt_disabled(rig.hosted(), process, |_| rig.kmap(page).err());
            assert_eq!(refused, Some(AllocError::Context));
            let report = rig.one_report(mark);
            assert!(report.contains("invalid context") && report.contains(file!()), "{report}");
        }
        free(&rig, [page, own]);
    });
    let audit = rig.audit_highmem().unwrap();
    assert_eq!((audit.mapped, audit.stale), (0, 0));
}

#[test]
fn kunmap_in_an_nmi() {
    let rig = rig(4);
    rig.run(|_| {
        let page = high(&rig);
        let at = rig.kmap(page).unwrap();
        let cpu = rig.platform().this_cpu().unwrap();
        cpu.enter(Section::Nmi);
        // SAFETY: refused.
        let refused = unsafe { rig.kunmap(page) };
        assert_eq!(rig.page_address(page), Some(at));
        cpu.leave(Section::Nmi);
        assert_eq!(refused, Err(Misuse::InNmi));
        kunmap(&rig, page);
        free(&rig, [page]);
    });
}

#[test]
fn the_wrong_order() {
    let rig = rig(4);
    rig.run(|_| {
        let pages = [high(&rig), high(&rig)];
        let at = pages.map(|page| rig.kmap_local_page(page).unwrap());
        write(at[0], 5);
        let mark = rig.mark();
        let (addr, last) = (at[0].addr().get(), at[1].addr().get());
        assert_eq!(local(&rig, at[0]), Err(Misuse::LocalOrder { addr, last }));
        assert!(rig.one_report(mark).contains(file!()));
        // As it was.
        assert_eq!(read(at[0]), 5);
        local(&rig, at[1]).unwrap();
        local(&rig, at[0]).unwrap();
        // Twice.
        assert_eq!(local(&rig, at[0]), Err(Misuse::NotLocalMap { addr }));
        free(&rig, pages);
    });
}

#[test]
fn the_wrong_call() {
    let rig = rig(4);
    rig.run(|_| {
        let page = high(&rig);
        let at = rig.kmap_local_page(page).unwrap();
        assert!(matches!(
            atomic(&rig, at),
            Err(Misuse::WrongUnmap { given: "kmap_local_page", right: "kunmap_local", .. })
        ));
        local(&rig, at).unwrap();
        let at = rig.kmap_atomic(page).unwrap();
        assert!(matches!(local(&rig, at), Err(Misuse::WrongUnmap { right: "kunmap_atomic", .. })));
        atomic(&rig, at).unwrap();
        let at = rig.kmap_atomic_type(page, KmType::KM_USER1).unwrap();
        assert!(matches!(atomic(&rig, at), Err(Misuse::WrongUnmap { given: "KM_USER1", .. })));
        // SAFETY: refused: another purpose.
        let other = unsafe { rig.kunmap_atomic_type(at.as_ptr(), KmType::KM_USER0) };
        assert_eq!(other, Err(Misuse::NotLocalMap { addr: at.addr().get() }));
        // SAFETY: not used after.
        unsafe { rig.kunmap_atomic_type(at.as_ptr(), KmType::KM_USER1).unwrap() };
        assert!(rig.platform().this_cpu().unwrap().context().may_sleep());
        // A permanent one is none of them.
        let at = rig.kmap(page).unwrap();
        assert_eq!(local(&rig, at), Err(Misuse::NotLocalMap { addr: at.addr().get() }));
        assert!(readable(at));
        kunmap(&rig, page);
        free(&rig, [page]);
    });
}

#[test]
fn a_purpose_in_use() {
    let rig = rig(4);
    rig.run(|_| {
        let pages = [high(&rig), high(&rig)];
        let at = rig.kmap_atomic_type(pages[0], KmType::KM_IRQ0).unwrap();
        write(at, 3);
        let mark = rig.mark();
        let used = Misuse::KmTypeInUse { purpose: "KM_IRQ0", cpu: 0 };
        assert_eq!(rig.kmap_atomic_type(pages[1], KmType::KM_IRQ0), Err(used));
        assert!(rig.one_report(mark).contains("KM_IRQ0 is in use on CPU 0"));
        let cpu = rig.platform().this_cpu().unwrap();
        assert_eq!((read(at), cpu.context().preempt_depth()), (3, 1));
        // SAFETY: not used after.
        unsafe { rig.kunmap_atomic_type(at.as_ptr(), KmType::KM_IRQ0).unwrap() };
        free(&rig, pages);
    });
}

#[test]
fn too_many() {
    let rig = rig(4);
    rig.run(|_| {
        let page = high(&rig);
        let at: Vec<_> = (0..KM_MAX_IDX).map(|_| rig.kmap_local_page(page).unwrap()).collect();
        assert_eq!(rig.kmap_local_page(page), Err(Misuse::LocalDepth { cpu: 0 }));
        assert_eq!(rig.kmap_atomic(page), Err(Misuse::LocalDepth { cpu: 0 }));
        assert!(rig.platform().this_cpu().unwrap().context().may_sleep());
        at.into_iter().rev().for_each(|at| local(&rig, at).unwrap());
        free(&rig, [page]);
    });
}

#[test]
fn on_another_cpu_and_on_none() {
    let rig = rig(4);
    let page = high(&rig);
    assert_eq!(rig.kmap_local_page(page), Err(Misuse::NoCpu));
    assert_eq!(rig.kmap_atomic(page), Err(Misuse::NoCpu));
    rig.run(|_| {
        let at = rig.kmap_local_page(page).unwrap();
        let there = std::thread::scope(|s| {
            let (rig, at) = (&rig, at.addr());
            s.spawn(move || {
                let at = NonNull::without_provenance(at);
                rig.on(1, &Task::new(), |_| local(rig, at))
            })
            .join()
            .unwrap()
        });
        assert_eq!(there, Err(Misuse::NotLocalMap { addr: at.addr().get() }));
        local(&rig, at).unwrap();
    });
    free(&rig, [page]);
}

#[test]
fn a_temporary_address_leads_to_no_page() {
    let rig = rig(4);
    rig.run(|_| {
        let page = high(&rig);
        let at = rig.kmap_local_page(page).unwrap();
        let mark = rig.mark();
        assert!(rig.virt_to_page(at.as_ptr()).is_none());
        assert!(rig.one_report(mark).contains("temporary mapping's"));
        local(&rig, at).unwrap();
        free(&rig, [page]);
    });
}

#[test]
fn a_page_of_another_machine() {
    let (rig, other) = (rig(4), rig(4));
    let page = high(&other);
    rig.run(|_| {
        let mark = rig.mark();
        assert_eq!(rig.kmap(page), Err(AllocError::NoMemory));
        assert_eq!(rig.kmap_local_page(page), Err(Misuse::NotAPage));
        assert_eq!(rig.kmap_atomic(page), Err(Misuse::NotAPage));
        assert_eq!(rig.since(mark).len(), 3);
    });
    free(&other, [page]);
}

#[test]
fn a_section_left_by_force() {
    let rig = rig(4);
    rig.run(|_| {
        let page = high(&rig);
        let at = rig.kmap_atomic(page).unwrap();
        rig.platform().this_cpu().unwrap().leave(Section::Preempt);
        let over = Err(Misuse::SectionOver { addr: at.addr().get() });
        assert_eq!(atomic(&rig, at), over);
        assert!(rig.platform().this_cpu().unwrap().context().may_sleep());
        assert!(!readable(at));
        free(&rig, [page]);
    });
}

#[test]
fn bytes_that_a_page_does_not_have() {
    let rig = rig(4);
    rig.run(|_| {
        let page = high(&rig);
        // SAFETY: the page is the test's, and all of it refused.
        unsafe {
            let refused = Err(Misuse::OutsidePage { offset: 4090, len: 7 });
            assert_eq!(rig.zero_user(page, 4090, 7), refused);
            assert_eq!(rig.memcpy_to_page(page, 4090, &[1; 7]), refused);
            assert_eq!(rig.memcpy_from_page(&mut [1; 7], page, 4090), refused);
            let wraps = Err(Misuse::OutsidePage { offset: usize::MAX, len: 2 });
            assert_eq!(rig.zero_user(page, usize::MAX, 2), wraps);
        }
        free(&rig, [page]);
    });
}

#[test]
fn a_machine_without_contents_maps_nothing() {
    let shape = super::shape().without_contents();
    let rig = Rig::new(shape, kmem::Config::default());
    rig.run(|_| {
        let page = rig.alloc_page(kmem::Gfp::HIGHUSER).unwrap();
        let pfn = rig.page_to_pfn(page).unwrap();
        assert_eq!(rig.kmap(page), Err(AllocError::NoMemory));
        assert_eq!(rig.kmap_local_page(page), Err(Misuse::NoAddress { pfn }));
        Atomic::interrupt(|a| {
            let none = rig.with_kmap_atomic_in(a, page, |_, _| ()).err();
            assert_eq!(none, Some(Misuse::NoAddress { pfn }));
        });
        rig.__free_page(page).unwrap();
    });
}
