//! Every order up to a configurable largest one: aligned, contiguous, and merged again \[P1\].

use super::AssertMerged;
use kmem::{AllocError, BringUpError, Config, Gfp, Pfn, gfp::GfpError};
use kmem_hosted::{Machine, MachineError, Shape};
use kmem_test_support::{MIB, Rig};

fn with_max_order(max_order: u32) -> Result<Machine, MachineError> {
    // Four blocks of the largest order there is.
    let shape = Shape::no_dma(512 * MIB).without_contents();
    Machine::without_kswapd(shape, Config { max_order, ..Config::default() })
}

#[test]
fn every_order_is_naturally_aligned() {
    for max_order in 9..=15 {
        let rig = Rig::of(with_max_order(max_order).unwrap());
        assert_eq!(rig.max_order(), max_order);
        rig.run(|_| {
            let mut held = Vec::new();
            for order in 0..=max_order {
                let (pfn, order) = rig.take(Gfp::KERNEL, order).unwrap();
                assert!(pfn.is_aligned(order));
                let end = pfn.0 + (1 << order);
                let apart = |&(p, o): &(Pfn, u32)| p.0 + (1 << o) <= pfn.0 || end <= p.0;
                assert!(held.iter().all(apart));
                held.push((pfn, order));
            }
            let mark = rig.mark();
            let too_large = Some(AllocError::Invalid(GfpError::OrderTooLarge));
            assert_eq!(rig.alloc_pages(Gfp::KERNEL, max_order + 1).err(), too_large);
            assert!(rig.one_report(mark).contains("order above MAX_ORDER"));
            rig.release(held);
            rig.assert_merged();
        });
    }
}

#[test]
fn largest_orders_outside_of_nine_to_fifteen_are_refused() {
    for max_order in [0, 8, 16, u32::MAX] {
        let refused = with_max_order(max_order).err();
        assert!(
            matches!(refused, Some(MachineError::BringUp(BringUpError::MaxOrder(n))) if n == max_order)
        );
    }
}

#[test]
fn memory_is_handed_out_to_the_last_frame_in_any_order() {
    for max_order in [9, 10, 13, 15] {
        let rig = Rig::of(with_max_order(max_order).unwrap());
        rig.run(|_| {
            for order in [max_order, 9, 4] {
                let held = rig.exhaust(Gfp::KERNEL | Gfp::MEMALLOC | Gfp::NOWARN, order);
                assert_eq!(held.len(), (512 << 8) >> order);
                rig.release(held);
                rig.assert_merged();
            }
        });
    }
}

#[test]
fn a_block_at_a_chosen_place() {
    let rig = Rig::flat();
    rig.run(|_| {
        for (pfn, order) in [(0, 0), (1, 0), (512, 9), (8192, 10), (16_383, 0), (5000, 3)] {
            let page = rig.alloc_pages_at(Pfn(pfn), order, Gfp::KERNEL).unwrap();
            assert_eq!(rig.page_to_pfn(page), Some(Pfn(pfn)));
            assert_eq!(rig.compound_order(page), Some(order));
            let again = rig.alloc_pages_at(Pfn(pfn), order, Gfp::KERNEL).err();
            assert_eq!(again, Some(AllocError::NoMemory), "somebody has it");
            rig.__free_pages(page, order).unwrap();
        }
        let crooked = Some(AllocError::Invalid(GfpError::OrderTooLarge));
        assert_eq!(rig.alloc_pages_at(Pfn(1), 1, Gfp::KERNEL).err(), crooked);
        assert_eq!(rig.alloc_pages_at(Pfn(0), 11, Gfp::KERNEL).err(), crooked);
        let nowhere = Some(AllocError::NoMemory);
        assert_eq!(rig.alloc_pages_at(Pfn(16_384), 0, Gfp::KERNEL).err(), nowhere);
        assert_eq!(rig.alloc_pages_at(Pfn(u32::MAX), 0, Gfp::KERNEL).err(), nowhere);
    });
}
