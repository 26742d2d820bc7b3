//! The typed capability form \[C2\]: each row of the textbook's table 12.7 as it must be written compiles, and
//! as it must not be written does not. What compiles also works.

use kmem::{
    Gfp, ZoneType,
    context::Atomic,
    gfp::typed::{ATOMIC, HIGHUSER, HIGHUSER_MOVABLE, KERNEL, NOFS, NOIO, NOWAIT, USER},
    sync::{SpinLock, irqs_disabled, preempt_disabled},
};
use kmem_test_support::Rig;

#[test]
fn table_12_7() {
    let cases = trybuild::TestCases::new();
    cases.pass("tests/ui/pass/*.rs");
    cases.compile_fail("tests/ui/fail/*.rs");
}

#[test]
fn typed_masks_are_the_classic_ones() {
    assert_eq!(KERNEL.gfp(), Gfp::KERNEL);
    assert_eq!(NOFS.gfp(), Gfp::NOFS);
    assert_eq!(NOIO.gfp(), Gfp::NOIO);
    assert_eq!(USER.gfp(), Gfp::USER);
    assert_eq!(HIGHUSER.gfp(), Gfp::HIGHUSER);
    assert_eq!(HIGHUSER_MOVABLE.gfp(), Gfp::HIGHUSER_MOVABLE);
    assert_eq!(ATOMIC.gfp(), Gfp::ATOMIC);
    assert_eq!(NOWAIT.gfp(), Gfp::NOWAIT);
    let all = KERNEL.zero().comp().cold().nowarn().thisnode().nomemalloc();
    let flags = Gfp::ZERO | Gfp::COMP | Gfp::COLD | Gfp::NOWARN | Gfp::THISNODE | Gfp::NOMEMALLOC;
    assert_eq!(all.gfp(), Gfp::KERNEL | flags);
    assert_eq!(KERNEL.dma().gfp(), Gfp::KERNEL | Gfp::DMA);
    assert_eq!(ATOMIC.dma32().gfp(), Gfp::ATOMIC | Gfp::DMA32);
    assert_eq!(NOFS.highmem().gfp(), Gfp::NOFS | Gfp::HIGHMEM);
    assert_eq!(KERNEL.noretry().gfp(), Gfp::KERNEL | Gfp::NORETRY);
    assert_eq!(KERNEL.retry_mayfail().gfp(), Gfp::KERNEL | Gfp::RETRY_MAYFAIL);
    assert_eq!(KERNEL.nofail().gfp(), Gfp::KERNEL | Gfp::NOFAIL);
    // One mobility at a time.
    assert_eq!(KERNEL.movable().reclaimable().gfp(), Gfp::KERNEL | Gfp::RECLAIMABLE);
    assert_eq!(KERNEL.reclaimable().movable().gfp(), Gfp::KERNEL | Gfp::MOVABLE);
    assert_eq!(HIGHUSER_MOVABLE.reclaimable().gfp(), Gfp::HIGHUSER | Gfp::RECLAIMABLE);
}

#[test]
fn typed_requests_are_served() {
    let rig = Rig::pc();
    let atomically = |atomic: Atomic<'_>| {
        let page = rig.alloc_pages_in(atomic, ATOMIC.dma(), 2).unwrap();
        assert_eq!(rig.place(page).1, ZoneType::Dma);
        rig.__free_pages(page, 2).unwrap();
        let addr = rig.get_free_pages_in(atomic, NOWAIT, 1).unwrap();
        rig.free_pages(addr.as_ptr(), 1).unwrap();
        let mut pages = [None; 3];
        assert_eq!(rig.alloc_pages_bulk_in(atomic, ATOMIC, &mut pages), Ok(3));
        rig.free_pages_bulk(&mut pages).unwrap();
    };
    rig.run(|process| {
        let page = rig.alloc_pages_in(&*process, KERNEL.comp(), 3).unwrap();
        assert_eq!(rig.compound_order(page), Some(3));
        rig.__free_pages(page, 3).unwrap();
        let page = rig.alloc_pages_in(&*process, HIGHUSER_MOVABLE, 0).unwrap();
        rig.__free_page(page).unwrap();
        let addr = rig.get_free_pages_in(&*process, KERNEL.dma32().zero(), 1).unwrap();
        rig.free_pages(addr.as_ptr(), 1).unwrap();
        let mut pages = [None; 5];
        assert_eq!(rig.alloc_pages_bulk_in(&*process, NOIO, &mut pages), Ok(5));
        rig.free_pages_bulk(&mut pages).unwrap();

        preempt_disabled(rig.hosted(), process, atomically);
        irqs_disabled(rig.hosted(), process, atomically);
        SpinLock::new(()).with(rig.hosted(), process, |atomic, ()| atomically(atomic));
        Atomic::interrupt(atomically);
    });
}
