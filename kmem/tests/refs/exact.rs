//! `alloc_pages_exact` and the bulk calls.

use super::AssertMerged;
use kmem::{AllocError, Config, Gfp, Misuse, Page, Pfn, gfp::GfpError};
use kmem_hosted::Shape;
use kmem_test_support::{MIB, Rig};
use proptest::prelude::*;
use std::collections::BTreeSet;

#[test]
fn exact_sizes_take_no_frame_too_many() {
    let rig = Rig::flat();
    rig.run(|_| {
        for (size, frames) in [
            (1, 1),
            (4096, 1),
            (4097, 2),
            (3 * 4096, 3),
            (3 * 4096 + 1, 4),
            (17 * 4096, 17),
            (4 << 20, 1024),
            ((4 << 20) - 4096, 1023),
        ] {
            let before = rig.audit().unwrap().allocated;
            let addr = rig.alloc_pages_exact(size, Gfp::KERNEL).unwrap();
            assert_eq!(rig.audit().unwrap().allocated - before, frames, "{size} bytes");
            for n in 0..frames as usize {
                let page = rig.virt_to_page(addr.as_ptr().wrapping_add(n * 4096)).unwrap();
                assert_eq!(page.page_count(), 1);
            }
            rig.free_pages_exact(addr.as_ptr(), size).unwrap();
            assert_eq!(rig.audit().unwrap().allocated, before);
        }
        rig.assert_merged();
    });
}

#[test]
fn exact_sizes_come_from_the_node_that_is_asked() {
    let rig = Rig::new(Shape::numa(3, 32 * MIB), Config::default());
    rig.run(|_| {
        for nid in [-1, 0, 1, 2] {
            let size = 5 * 4096;
            let addr = rig.alloc_pages_exact_nid(nid, size, Gfp::KERNEL).unwrap();
            assert!((addr.addr().get()).is_multiple_of(8 * 4096), "aligned");
            for n in 0..5 {
                let page = rig.virt_to_page(addr.as_ptr().wrapping_add(n * 4096)).unwrap();
                let pfn = rig.page_to_pfn(page).unwrap();
                let node = rig.page_zone(pfn).unwrap().node();
                assert_eq!(node as i32, nid.max(0), "{pfn}");
            }
            rig.free_pages_exact(addr.as_ptr(), size).unwrap();
        }
        let nowhere = Err(AllocError::Invalid(GfpError::NoSuchNode));
        for nid in [3, -2, i32::MAX] {
            assert_eq!(rig.alloc_pages_exact_nid(nid, 4096, Gfp::KERNEL), nowhere);
        }
    });
}

#[test]
fn exact_sizes_are_zeroed_and_dma_able_on_request() {
    let rig = Rig::pc();
    rig.run(|_| {
        let size = 5 * 4096;
        let dirty = rig.alloc_pages_exact(size, Gfp::KERNEL | Gfp::DMA).unwrap();
        // SAFETY: five frames that the test holds.
        unsafe { dirty.as_ptr().write_bytes(0xff, size) };
        rig.free_pages_exact(dirty.as_ptr(), size).unwrap();
        rig.drain_this_cpu();
        let addr = rig.alloc_pages_exact(size, Gfp::KERNEL | Gfp::DMA | Gfp::ZERO).unwrap();
        assert_eq!(addr, dirty);
        // SAFETY: as above.
        let bytes = unsafe { core::slice::from_raw_parts(addr.as_ptr(), size) };
        assert!(bytes.iter().all(|b| *b == 0));
        rig.free_pages_exact(addr.as_ptr(), size).unwrap();
    });
}

#[test]
fn sizes_that_no_order_holds_are_refused() {
    let rig = Rig::flat();
    rig.run(|_| {
        let too_large = Err(AllocError::Invalid(GfpError::OrderTooLarge));
        for size in [0, (4 << 20) + 1, usize::MAX, usize::MAX - 4095, 1 << 45] {
            let mark = rig.mark();
            assert_eq!(rig.alloc_pages_exact(size, Gfp::KERNEL), too_large, "{size:#x}");
            assert_eq!(rig.since(mark).len(), 1);
        }
        let addr = rig.alloc_pages_exact(4096, Gfp::KERNEL).unwrap();
        for size in [0, usize::MAX] {
            let why = Misuse::BadAddress { addr: addr.as_ptr() as usize };
            assert_eq!(rig.free_pages_exact(addr.as_ptr(), size), Err(why));
        }
        rig.free_pages_exact(addr.as_ptr(), 4096).unwrap();
    });
}

#[test]
fn freeing_more_than_was_allocated_stops_at_what_is_free() {
    let rig = Rig::flat();
    rig.run(|_| {
        let addr = rig.alloc_pages_exact(3 * 4096, Gfp::KERNEL).unwrap();
        let pfn = rig.page_to_pfn(rig.virt_to_page(addr.as_ptr()).unwrap()).unwrap();
        let too_much = rig.free_pages_exact(addr.as_ptr(), 4 * 4096);
        assert_eq!(too_much, Err(Misuse::DoubleFree { pfn: Pfn(pfn.0 + 3) }));
        // At the end of memory too.
        let last = rig.alloc_pages_at(Pfn(16_383), 0, Gfp::KERNEL).unwrap();
        let addr = rig.page_address(last).unwrap();
        let beyond = rig.free_pages_exact(addr.as_ptr(), 2 * 4096);
        assert_eq!(beyond, Err(Misuse::NeverAllocated { pfn: Pfn(16_384) }));
    });
}

#[test]
fn comp_makes_no_sense_for_exact_sizes() {
    let rig = Rig::flat();
    rig.run(|_| {
        let addr = rig.alloc_pages_exact(3 * 4096, Gfp::KERNEL | Gfp::COMP).unwrap();
        let page = rig.virt_to_page(addr.as_ptr()).unwrap();
        assert_eq!(rig.compound_order(page), Some(0), "single pages all the same");
        rig.free_pages_exact(addr.as_ptr(), 3 * 4096).unwrap();
    });
}

#[test]
fn bulk_fills_the_empty_places_from_the_front() {
    let rig = Rig::flat();
    rig.run(|_| {
        let mine = rig.alloc_page(Gfp::KERNEL).unwrap();
        let mut pages: [Option<&Page>; 6] = [None, Some(mine), None, None, Some(mine), None];
        assert_eq!(rig.alloc_pages_bulk(Gfp::KERNEL, &mut pages), Ok(6));
        assert!(std::ptr::eq(pages[1].unwrap(), mine) && std::ptr::eq(pages[4].unwrap(), mine));
        let frames: BTreeSet<_> = pages.iter().map(|p| rig.page_to_pfn(p.unwrap())).collect();
        assert_eq!(frames.len(), 5, "four new ones and mine");
        assert_eq!(rig.alloc_pages_bulk(Gfp::KERNEL, &mut pages), Ok(6), "nothing to do");
        assert_eq!(rig.alloc_pages_bulk(Gfp::KERNEL, &mut []), Ok(0));
        pages[4] = None;
        rig.free_pages_bulk(&mut pages).unwrap();
        assert!(pages.iter().all(Option::is_none));
        assert_eq!(mine.page_count(), 0);
        rig.free_pages_bulk(&mut pages).unwrap();
    });
}

#[test]
fn bulk_gives_what_there_is() {
    let rig = Rig::flat();
    rig.run(|_| {
        let mut pages = vec![None; 20_000];
        let got = rig.alloc_pages_bulk(Gfp::KERNEL | Gfp::NOWARN, &mut pages).unwrap();
        assert!(got > 16_000 && got < 16_384);
        assert!(pages[..got].iter().all(Option::is_some));
        assert!(pages[got..].iter().all(Option::is_none));
        let mut none = [None; 3];
        assert_eq!(rig.alloc_pages_bulk(Gfp::KERNEL | Gfp::NOWARN, &mut none), Ok(0));
        rig.free_pages_bulk(&mut pages).unwrap();
        rig.assert_merged();
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn exact_sizes_of_any_size_come_back(sizes in prop::collection::vec(1usize..300_000, 1..20)) {
        let rig = Rig::flat();
        rig.run(|_| {
            let mut live = Vec::new();
            let mut frames = 0;
            for size in sizes {
                let addr = rig.alloc_pages_exact(size, Gfp::KERNEL).unwrap();
                frames += size.div_ceil(4096) as u64;
                live.push((addr, size));
            }
            prop_assert_eq!(rig.audit().unwrap().allocated, frames);
            for (addr, size) in live {
                prop_assert_eq!(rig.free_pages_exact(addr.as_ptr(), size), Ok(()));
            }
            rig.assert_merged();
            Ok(())
        })?;
    }
}
