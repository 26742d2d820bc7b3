//! The family of calls and what they hand out \[F2, F3, P1, P6, M2\]: references, addresses, exact sizes, bulk,
//! splitting, the high-order reserve, configurable largest orders.

mod exact;
mod highatomic;
mod orders;

use kmem::{Gfp, PageFlags, Pfn, platform::Platform};
use kmem_test_support::Rig;

#[test]
fn a_count_of_zero_is_a_free_frame() {
    let rig = Rig::flat();
    rig.run(|_| {
        let page = rig.alloc_pages(Gfp::KERNEL, 4).unwrap();
        let pfn = rig.page_to_pfn(page).unwrap();
        assert_eq!(page.page_count(), 1);
        assert!(rig.buddy_order(pfn).is_none());
        rig.__free_pages(page, 4).unwrap();
        assert_eq!(page.page_count(), 0);
        rig.drain_this_cpu();
        assert!(rig.buddy_order(pfn).is_some_and(|order| order >= 4));
        let free = rig.pfn_to_page(Pfn(12_345)).unwrap();
        assert_eq!((free.page_count(), free.flags()), (0, PageFlags::empty()));
    });
}

#[test]
fn the_last_put_frees_compound_or_not() {
    let rig = Rig::flat();
    rig.run(|_| {
        for gfp in [Gfp::KERNEL, Gfp::KERNEL | Gfp::COMP] {
            for order in [0, 1, 4, 9, 10] {
                let page = rig.alloc_pages(gfp, order).unwrap();
                for n in 2..5 {
                    rig.get_page(page).unwrap();
                    assert_eq!(page.page_count(), n);
                }
                assert!(rig.get_page_unless_zero(page));
                for n in (0..5).rev() {
                    rig.put_page(page).unwrap();
                    assert_eq!(page.page_count(), n);
                }
                assert!(!rig.get_page_unless_zero(page));
            }
        }
    });
}

#[test]
fn pages_frames_and_addresses_lead_to_each_other() {
    let rig = Rig::flat();
    rig.run(|_| {
        let addr = rig.__get_free_pages(Gfp::KERNEL, 3).unwrap();
        let page = rig.virt_to_page(addr.as_ptr()).unwrap();
        let pfn = rig.page_to_pfn(page).unwrap();
        assert!(pfn.is_aligned(3));
        assert_eq!(rig.page_address(page), Some(addr));
        assert!(std::ptr::eq(rig.pfn_to_page(pfn).unwrap(), page));
        for n in 0..8 {
            let inside = addr.as_ptr().wrapping_add(n * 4096 + 123);
            let page = rig.virt_to_page(inside).unwrap();
            assert_eq!(rig.page_to_pfn(page), Some(Pfn(pfn.0 + n as u32)));
        }
        assert!(rig.pfn_to_page(Pfn(16_384)).is_none());
        assert!(rig.pfn_to_page(Pfn(u32::MAX)).is_none());
        rig.free_pages(addr.as_ptr(), 3).unwrap();
    });
}

#[test]
fn high_frames_have_no_address() {
    let shape = kmem_hosted::Shape::x86_32(64 << 20)
        .zones(&[(kmem::ZoneType::Normal, 16 << 20), (kmem::ZoneType::HighMem, 64 << 20)]);
    let rig = Rig::new(shape, kmem::Config::default());
    rig.run(|_| {
        let page = rig.alloc_page(Gfp::HIGHUSER | Gfp::ZERO).unwrap();
        let (pfn, zone) = rig.place(page);
        assert_eq!(zone, kmem::ZoneType::HighMem);
        assert_eq!(rig.page_address(page), None);
        assert!(rig.hosted().direct_map(pfn).is_none());
        rig.__free_page(page).unwrap();
    });
}

#[test]
fn the_single_page_calls() {
    let rig = Rig::flat();
    let bytes = |addr: std::ptr::NonNull<u8>| {
        // SAFETY: a whole frame that the test holds.
        unsafe { core::slice::from_raw_parts_mut(addr.as_ptr(), 4096) }
    };
    rig.run(|_| {
        let page = rig.alloc_page(Gfp::KERNEL).unwrap();
        rig.__free_page(page).unwrap();
        let dirty = rig.__get_free_page(Gfp::KERNEL).unwrap();
        bytes(dirty).fill(0x5a);
        rig.free_page(dirty.as_ptr()).unwrap();
        for zeroed in [rig.get_zeroed_page(Gfp::KERNEL), rig.get_free_page(Gfp::KERNEL)] {
            let addr = zeroed.unwrap();
            assert!(bytes(addr).iter().all(|b| *b == 0));
            bytes(addr).fill(0x5a);
            rig.free_page(addr.as_ptr()).unwrap();
        }
        let again = rig.__get_free_page(Gfp::KERNEL).unwrap();
        assert!(bytes(again).iter().all(|b| *b == 0x5a), "nobody asked for zeroes");
        rig.free_page(again.as_ptr()).unwrap();
    });
}

#[test]
fn split_makes_single_pages_to_be_freed_in_any_order() {
    let rig = Rig::flat();
    rig.run(|_| {
        for order in [1, 3, 9, 10] {
            let page = rig.alloc_pages(Gfp::KERNEL, order).unwrap();
            let pfn = rig.page_to_pfn(page).unwrap();
            rig.split_page(page, order).unwrap();
            let frames: Vec<_> = (pfn.0..pfn.0 + (1 << order)).collect();
            for frame in &frames {
                let page = rig.pfn_to_page(Pfn(*frame)).unwrap();
                assert_eq!((page.page_count(), rig.compound_order(page)), (1, Some(0)));
            }
            // The odd ones first, then the even ones.
            let (even, odd): (Vec<u32>, Vec<u32>) = frames.iter().partition(|f| **f % 2 == 0);
            for frame in odd.into_iter().chain(even) {
                rig.__free_page(rig.pfn_to_page(Pfn(frame)).unwrap()).unwrap();
            }
            rig.assert_merged();
        }
    });
}

#[test]
fn split_to_pieces_of_any_order() {
    let rig = Rig::flat();
    rig.run(|_| {
        for (order, to) in [(3, 3), (3, 1), (10, 4), (10, 9), (5, 0)] {
            let page = rig.alloc_pages(Gfp::KERNEL, order).unwrap();
            let pfn = rig.page_to_pfn(page).unwrap();
            rig.split_page_to(page, order, to).unwrap();
            for n in 0..1 << (order - to) {
                let piece = rig.pfn_to_page(Pfn(pfn.0 + (n << to))).unwrap();
                assert_eq!(rig.compound_order(piece), Some(to));
                rig.__free_pages(piece, to).unwrap();
            }
        }
    });
}

/// Checks that nothing but whole free memory is left.
trait AssertMerged {
    fn assert_merged(&self);
}

impl AssertMerged for Rig {
    #[track_caller]
    fn assert_merged(&self) {
        self.drain_this_cpu();
        let audit = self.audit().unwrap();
        assert_eq!(audit.free, audit.managed);
        let zone = &self.zones()[0];
        let largest = self.max_order() as usize;
        let blocks = self.nr_free(zone);
        assert_eq!(blocks[largest], zone.managed_frames() >> largest, "{blocks:?}");
    }
}
