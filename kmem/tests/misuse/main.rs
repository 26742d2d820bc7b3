//! Every wrong free is refused and reported, and leaves memory as it was \[P5\].

mod races;
mod random;

use kmem::{
    Gfp, Misuse, Page, PageFlags, Pfn,
    platform::{Level, Platform},
    vmstat::VmEvent,
};
use kmem_hosted::{Machine, Shape};
use kmem_test_support::{MIB, Rig};
use std::{
    ptr,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

/// Runs a wrong operation and checks that it is refused with `why`, reported with its place, counted, and
/// that not one frame has moved.
#[track_caller]
fn refused(rig: &Rig, why: Misuse, wrong: impl FnOnce() -> Result<(), Misuse>) {
    let (mark, before) = (rig.mark(), rig.audit().unwrap());
    let counted = rig.vm_event(VmEvent::Misuse);
    assert_eq!(wrong(), Err(why));
    assert_eq!(rig.audit().unwrap(), before, "memory as it was");
    assert_eq!(rig.vm_event(VmEvent::Misuse), counted + 1);
    let reports = rig.since(mark);
    assert_eq!(reports.len(), 1, "{reports:?}");
    let (level, report) = &reports[0];
    assert_eq!(*level, Level::Bug);
    assert!(report.starts_with("BUG: Bad page state: "), "{report}");
    assert!(report.contains(&why.to_string()), "{report}");
    assert!(report.contains("kmem/tests/misuse/"), "names the caller: {report}");
}

fn block(rig: &Rig, gfp: Gfp, order: u32) -> (&Page, Pfn) {
    let page = rig.alloc_pages(gfp, order).unwrap();
    (page, rig.page_to_pfn(page).unwrap())
}

#[test]
fn the_wrong_order() {
    let rig = Rig::flat();
    rig.run(|_| {
        for actual in [0, 1, 3, 5, 9, 10] {
            let (page, pfn) = block(&rig, Gfp::KERNEL, actual);
            for given in (0..=10).filter(|given| *given != actual) {
                let why = Misuse::WrongOrder { pfn, given, actual };
                refused(&rig, why, || rig.__free_pages(page, given));
                if let Some(addr) = rig.page_address(page) {
                    refused(&rig, why, || rig.free_pages(addr.as_ptr(), given));
                }
            }
            assert_eq!(page.page_count(), 1);
            rig.__free_pages(page, actual).unwrap();
        }
    });
}

#[test]
fn an_order_that_does_not_exist() {
    let rig = Rig::flat();
    rig.run(|_| {
        let (page, _) = block(&rig, Gfp::KERNEL, 10);
        for order in [11, 15, 16, 31, 32, u32::MAX] {
            refused(&rig, Misuse::BadOrder { order }, || rig.__free_pages(page, order));
        }
        rig.__free_pages(page, 10).unwrap();
    });
}

#[test]
fn a_tail_page() {
    let rig = Rig::flat();
    rig.run(|_| {
        for (gfp, order) in [(Gfp::KERNEL, 3), (Gfp::KERNEL | Gfp::COMP, 3), (Gfp::KERNEL, 10)] {
            let (page, head) = block(&rig, gfp, order);
            for n in [1, 2, (1 << order) / 2, (1 << order) - 1] {
                let pfn = Pfn(head.0 + n);
                let tail = rig.pfn_to_page(pfn).unwrap();
                let why = Misuse::TailPage { pfn, head, order };
                refused(&rig, why, || rig.__free_page(tail));
                refused(&rig, why, || rig.__free_pages(tail, 1));
            }
            rig.__free_pages(page, order).unwrap();
        }
    });
}

#[test]
fn a_block_that_is_free_already() {
    let rig = Rig::flat();
    rig.run(|_| {
        for order in [0, 2, 4, 9, 10] {
            let (page, pfn) = block(&rig, Gfp::KERNEL, order);
            rig.__free_pages(page, order).unwrap();
            let why = Misuse::DoubleFree { pfn };
            // On a per-CPU list, or in the buddy at once.
            refused(&rig, why, || rig.__free_pages(page, order));
            refused(&rig, why, || rig.put_page(page));
            rig.drain_this_cpu();
            refused(&rig, why, || rig.__free_pages(page, order));
            refused(&rig, Misuse::DoubleFree { pfn }, || rig.free_pages_bulk(&mut [Some(page)]));
        }
    });
}

#[test]
fn a_page_that_was_never_allocated() {
    let rig = Rig::flat();
    let pfn = Pfn(16_000);
    let page = rig.pfn_to_page(pfn).unwrap();
    rig.run(|_| {
        refused(&rig, Misuse::DoubleFree { pfn }, || rig.__free_page(page));
        refused(&rig, Misuse::DoubleFree { pfn }, || rig.put_page(page));
    });
    // Memory that was never the allocator's.
    let shape = Shape::no_dma(64 * MIB);
    let mut boot = shape.memblock().unwrap();
    boot.reserve(4 * MIB, 64 << 10).unwrap();
    let rig = Rig::of(Machine::from_boot(shape, kmem::Config::default(), boot).unwrap());
    rig.run(|_| {
        for pfn in [Pfn(1024), Pfn(1031), Pfn(1039)] {
            let page = rig.pfn_to_page(pfn).unwrap();
            assert!(page.flags().contains(PageFlags::RESERVED));
            refused(&rig, Misuse::NeverAllocated { pfn }, || rig.__free_page(page));
            refused(&rig, Misuse::NotAllocated { pfn }, || rig.get_page(page));
        }
        assert!(!rig.pfn_to_page(Pfn(1040)).unwrap().flags().contains(PageFlags::RESERVED));
    });
}

#[test]
fn a_page_that_is_still_mapped() {
    let rig = Rig::flat();
    rig.run(|_| {
        for order in [0, 3, 5] {
            let (page, pfn) = block(&rig, Gfp::KERNEL, order);
            assert_eq!((page.inc_mapcount(), page.inc_mapcount()), (1, 2));
            let why = Misuse::StillMapped { pfn, mapcount: 2 };
            refused(&rig, why, || rig.__free_pages(page, order));
            refused(&rig, why, || rig.put_page(page));
            assert_eq!(page.page_count(), 1);
            assert_eq!(page.dec_mapcount(), Some(1));
            refused(&rig, Misuse::StillMapped { pfn, mapcount: 1 }, || {
                rig.__free_pages(page, order)
            });
            assert_eq!((page.dec_mapcount(), page.dec_mapcount()), (Some(0), None));
            rig.__free_pages(page, order).unwrap();
        }
    });
}

#[test]
fn a_page_that_belongs_to_an_address_space() {
    let rig = Rig::flat();
    rig.run(|_| {
        for order in [0, 3, 5] {
            let (page, pfn) = block(&rig, Gfp::KERNEL, order);
            page.set_mapping(7);
            let why = Misuse::StillInMapping { pfn, mapping: 7 };
            refused(&rig, why, || rig.__free_pages(page, order));
            refused(&rig, why, || rig.put_page(page));
            page.set_mapping(0);
            rig.__free_pages(page, order).unwrap();
        }
    });
}

#[test]
fn a_page_whose_flags_say_that_it_is_in_use() {
    let rig = Rig::flat();
    rig.run(|_| {
        for flags in PageFlags::CHECK_AT_FREE.difference(PageFlags::ALLOCATORS_OWN).iter() {
            let (page, pfn) = block(&rig, Gfp::KERNEL, 1);
            page.set_flags(flags);
            let why = Misuse::StillInUse { pfn, flags };
            refused(&rig, why, || rig.__free_pages(page, 1));
            refused(&rig, why, || rig.put_page(page));
            page.clear_flags(flags);
            rig.__free_pages(page, 1).unwrap();
        }
        // Others tell of the contents, and go with them.
        let harmless = PageFlags::DIRTY | PageFlags::REFERENCED | PageFlags::UPTODATE;
        let (page, _) = block(&rig, Gfp::KERNEL, 0);
        page.set_flags(harmless);
        rig.__free_page(page).unwrap();
        assert_eq!(page.flags(), PageFlags::empty());
    });
}

#[test]
fn the_allocators_own_flags_cannot_be_changed() {
    let rig = Rig::flat();
    rig.run(|_| {
        let (page, _) = block(&rig, Gfp::KERNEL | Gfp::COMP, 2);
        let flags = page.flags();
        page.clear_flags(PageFlags::all());
        assert_eq!(page.flags(), flags);
        page.set_flags(PageFlags::ALLOCATORS_OWN);
        assert_eq!(page.flags(), flags);
        rig.__free_pages(page, 2).unwrap();
        page.set_flags(PageFlags::ALLOCATORS_OWN);
        assert_eq!(page.flags(), PageFlags::empty());
    });
}

#[test]
fn an_address_that_is_no_pages() {
    let rig = Rig::flat();
    rig.run(|_| {
        let addr = rig.__get_free_pages(Gfp::KERNEL, 1).unwrap().as_ptr();
        let local = 0u64;
        let crooked = addr.wrapping_add(8);
        let elsewhere = (&raw const local).cast::<u8>();
        let end = rig.hosted().direct_map(Pfn(0)).unwrap().as_ptr().wrapping_add(64 << 20);
        for wrong in [crooked.cast_const(), elsewhere, end, std::ptr::dangling()] {
            let why = Misuse::BadAddress { addr: wrong as usize };
            refused(&rig, why, || rig.free_pages(wrong, 1));
            refused(&rig, why, || rig.free_page(wrong));
            refused(&rig, why, || rig.free_pages_exact(wrong, 8192));
        }
        assert!(rig.virt_to_page(end).is_none());
        rig.free_pages(std::ptr::null(), 1).unwrap();
        rig.free_pages(addr, 1).unwrap();
    });
}

#[test]
fn a_page_of_another_machine() {
    let (rig, other) = (Rig::flat(), Rig::flat());
    let foreign = other.pfn_to_page(Pfn(100)).unwrap();
    assert!(rig.page_to_pfn(foreign).is_none());
    rig.run(|_| {
        refused(&rig, Misuse::NotAPage, || rig.__free_page(foreign));
        refused(&rig, Misuse::NotAPage, || rig.__free_pages(foreign, 5));
        refused(&rig, Misuse::NotAPage, || rig.put_page(foreign));
        refused(&rig, Misuse::NotAPage, || rig.get_page(foreign));
        refused(&rig, Misuse::NotAPage, || rig.split_page(foreign, 0));
    });
}

#[test]
fn freeing_under_somebody_elses_reference_is_legal() {
    let rig = Rig::flat();
    rig.run(|_| {
        let mark = rig.mark();
        for (gfp, order) in [(Gfp::KERNEL, 0), (Gfp::KERNEL, 3), (Gfp::KERNEL | Gfp::COMP, 9)] {
            let (page, pfn) = block(&rig, gfp, order);
            rig.get_page(page).unwrap();
            rig.__free_pages(page, order).unwrap();
            assert_eq!(page.page_count(), 1, "one reference less, and still in use");
            assert!(rig.buddy_order(pfn).is_none());
            rig.put_page(page).unwrap();
            assert_eq!(page.page_count(), 0);
        }
        assert_eq!(rig.since(mark), []);
        // A wrong order stays wrong, whoever holds references.
        let (page, pfn) = block(&rig, Gfp::KERNEL, 3);
        rig.get_page(page).unwrap();
        let why = Misuse::WrongOrder { pfn, given: 2, actual: 3 };
        refused(&rig, why, || rig.__free_pages(page, 2));
        assert_eq!(page.page_count(), 2);
        rig.put_page(page).unwrap();
        rig.__free_pages(page, 3).unwrap();
    });
}

#[test]
fn misuse_panics_where_asked_to() {
    let rig = Rig::flat();
    rig.run(|_| {
        let (page, _) = block(&rig, Gfp::KERNEL, 0);
        rig.__free_page(page).unwrap();
        rig.set_panic_on_misuse(true);
        let mark = rig.mark();
        let wrong = std::panic::AssertUnwindSafe(|| rig.__free_page(page));
        let panic = std::panic::catch_unwind(wrong).unwrap_err();
        assert!(panic.downcast_ref::<String>().is_some_and(|text| text.contains("double free")));
        assert!(rig.one_report(mark).contains("double free"), "the report comes first");
        rig.set_panic_on_misuse(false);
        assert!(rig.__free_page(page).is_err());
    });
}

#[test]
fn splitting_what_cannot_be_split() {
    let rig = Rig::flat();
    rig.run(|_| {
        let (page, pfn) = block(&rig, Gfp::KERNEL, 3);
        let why = Misuse::WrongOrder { pfn, given: 2, actual: 3 };
        refused(&rig, why, || rig.split_page(page, 2));
        refused(&rig, Misuse::BadOrder { order: 4 }, || rig.split_page_to(page, 3, 4));
        rig.get_page(page).unwrap();
        refused(&rig, Misuse::Shared { pfn, count: 2 }, || rig.split_page(page, 3));
        rig.put_page(page).unwrap();
        rig.__free_pages(page, 3).unwrap();
        refused(&rig, Misuse::NotAllocated { pfn }, || rig.split_page(page, 3));
        let (page, pfn) = block(&rig, Gfp::KERNEL | Gfp::COMP, 3);
        let why = Misuse::StillInUse { pfn, flags: PageFlags::HEAD };
        refused(&rig, why, || rig.split_page(page, 3));
        rig.__free_pages(page, 3).unwrap();
    });
}

#[test]
fn bulk_frees_all_but_the_wrong_one() {
    let rig = Rig::flat();
    rig.run(|_| {
        let mut pages = [None; 8];
        rig.alloc_pages_bulk(Gfp::KERNEL, &mut pages).unwrap();
        let wrong = pages[3].unwrap();
        let pfn = rig.page_to_pfn(wrong).unwrap();
        wrong.inc_mapcount();
        let refused = rig.free_pages_bulk(&mut pages);
        assert_eq!(refused, Err(Misuse::StillMapped { pfn, mapcount: 1 }));
        let kept: Vec<_> = (0..8).filter(|i| pages[*i].is_some()).collect();
        assert_eq!(kept, [3], "its place keeps it");
        assert_eq!(wrong.dec_mapcount(), Some(0));
        rig.free_pages_bulk(&mut pages).unwrap();
    });
}

#[test]
fn reference_underflow() {
    let rig = Rig::flat();
    rig.run(|_| {
        let (page, pfn) = block(&rig, Gfp::KERNEL, 2);
        rig.put_page(page).unwrap();
        refused(&rig, Misuse::DoubleFree { pfn }, || rig.put_page(page));
        refused(&rig, Misuse::NotAllocated { pfn }, || rig.get_page(page));
        assert!(!rig.get_page_unless_zero(page));
        assert_eq!(page.page_count(), 0);
    });
}

/// Somebody wrote to the memory map: a free block looks like one in use. The free that believes it is found out by the free
/// lists, which know the block, and no frame is there twice.
#[test]
fn a_free_block_whose_state_was_overwritten() {
    let rig = Rig::flat();
    rig.run(|_| {
        for order in [0, 1, 3, 4, 6, 8, 9, 10] {
            let (live, _) = block(&rig, Gfp::KERNEL, order);
            let (free, pfn) = block(&rig, Gfp::KERNEL, order);
            rig.__free_pages(free, order).unwrap();
            rig.drain_all_pages();
            let (mark, before) = (rig.mark(), rig.audit().unwrap());
            let counted = rig.vm_event(VmEvent::Misuse);

            let state = |page: &Page| ptr::from_ref(page).cast::<AtomicU64>();
            // SAFETY: a `Page` begins with its state, one atomic word \[F4\].
            unsafe { (*state(free)).store((*state(live)).load(Relaxed), Relaxed) };
            rig.__free_pages(free, order).unwrap();
            rig.drain_all_pages();

            assert_eq!(rig.audit().unwrap(), before, "order {order}: memory as it was");
            assert_eq!(rig.vm_event(VmEvent::Misuse), counted + 1, "order {order}");
            let reports = rig.since(mark);
            assert!(reports[0].1.contains(&Misuse::DoubleFree { pfn }.to_string()), "{reports:?}");
            rig.__free_pages(live, order).unwrap();
        }
    });
}
