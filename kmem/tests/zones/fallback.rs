//! Which zones a request looks into, and in which order \[Z3\].

use super::{QUIET, order_of, pfn, without_marks};
use ZoneType::{Dma, Dma32, HighMem, Movable, Normal};
use kmem::{Config, Gfp, ZoneType, context::Task};
use kmem_hosted::Shape;
use kmem_test_support::{MIB, Rig};

/// A machine whose zones are a few megabytes each, without reserves.
fn machine(zones: &[(ZoneType, u64)]) -> Rig {
    let end = zones.last().unwrap().1;
    let config = Config { lowmem_reserve_ratio: [0; 6], ..Config::default() };
    let rig = Rig::new(Shape::x86_64(end).zones(zones), config);
    without_marks(&rig);
    rig
}

/// The zones that single pages come from, in order: asked for plainly, and in a way that only the general
/// path answers.
#[track_caller]
fn zones_of(rig: &Rig, gfp: Gfp) -> Vec<ZoneType> {
    let task = Task::new();
    let zone = |pfn| rig.page_zone(pfn).unwrap().zone_type();
    let zones = |gfp: Gfp| order_of(rig, &task, || pfn(rig, rig.alloc_page(gfp | QUIET)), zone);
    let plain = zones(gfp);
    assert_eq!(zones(gfp | Gfp::COLD), plain, "{gfp}");
    plain
}

#[test]
fn a_pc_with_64_bits() {
    let rig = machine(&[(Dma, 4 * MIB), (Dma32, 8 * MIB), (Normal, 16 * MIB)]);
    for gfp in [Gfp::KERNEL, Gfp::ATOMIC, Gfp::USER, Gfp::KERNEL | Gfp::MOVABLE] {
        assert_eq!(zones_of(&rig, gfp), [Normal, Dma32, Dma], "{gfp}");
    }
    assert_eq!(zones_of(&rig, Gfp::KERNEL | Gfp::DMA32), [Dma32, Dma]);
    for gfp in [Gfp::DMA, Gfp::DMA | Gfp::KERNEL, Gfp::DMA | Gfp::ATOMIC] {
        assert_eq!(zones_of(&rig, gfp), [Dma], "{gfp}");
    }
    // Without high memory, those who could use it use the rest.
    assert_eq!(zones_of(&rig, Gfp::HIGHUSER), [Normal, Dma32, Dma]);
    assert_eq!(zones_of(&rig, Gfp::HIGHUSER_MOVABLE), [Normal, Dma32, Dma]);
}

#[test]
fn a_pc_with_32_bits() {
    let rig = machine(&[(Dma, 4 * MIB), (Normal, 8 * MIB), (HighMem, 16 * MIB)]);
    assert_eq!(zones_of(&rig, Gfp::HIGHUSER), [HighMem, Normal, Dma]);
    assert_eq!(zones_of(&rig, Gfp::HIGHUSER_MOVABLE), [HighMem, Normal, Dma]);
    assert_eq!(zones_of(&rig, Gfp::KERNEL), [Normal, Dma]);
    assert_eq!(zones_of(&rig, Gfp::KERNEL | Gfp::DMA), [Dma]);
    // No zone for 32-bit devices: any low address will do.
    assert_eq!(zones_of(&rig, Gfp::KERNEL | Gfp::DMA32), [Normal, Dma]);
}

#[test]
fn an_architecture_whose_devices_reach_all() {
    let rig = machine(&[(Normal, 8 * MIB)]);
    for gfp in [Gfp::KERNEL, Gfp::DMA | Gfp::KERNEL, Gfp::DMA32 | Gfp::ATOMIC, Gfp::HIGHUSER] {
        assert_eq!(zones_of(&rig, gfp), [Normal], "{gfp}");
    }
}

#[test]
fn the_movable_zone_is_for_what_can_move() {
    let rig = machine(&[(Dma32, 4 * MIB), (Normal, 8 * MIB), (Movable, 16 * MIB)]);
    assert_eq!(zones_of(&rig, Gfp::HIGHUSER_MOVABLE), [Movable, Normal, Dma32]);
    for gfp in [
        Gfp::KERNEL,
        Gfp::HIGHUSER,
        Gfp::KERNEL | Gfp::MOVABLE,
        Gfp::KERNEL | Gfp::RECLAIMABLE,
        Gfp::HIGHUSER | Gfp::RECLAIMABLE,
        Gfp::ATOMIC | Gfp::MEMALLOC,
    ] {
        assert_eq!(zones_of(&rig, gfp), [Normal, Dma32], "{gfp}");
    }
}

#[test]
fn a_device_zone_is_handed_to_nobody() {
    let rig = machine(&[(Normal, 8 * MIB), (ZoneType::Device, 12 * MIB)]);
    let device = rig.zone_of(0, ZoneType::Device).unwrap();
    assert_eq!(device.present_frames(), 1024, "it is there");
    assert_eq!((device.managed_frames(), device.free_frames()), (0, 0), "and not the allocator's");
    for gfp in [Gfp::KERNEL, Gfp::HIGHUSER_MOVABLE, Gfp::DMA] {
        assert_eq!(zones_of(&rig, gfp), [Normal], "{gfp}");
    }
}

#[test]
fn larger_orders_fall_back_as_well() {
    let rig = machine(&[(Dma, 4 * MIB), (Dma32, 8 * MIB), (Normal, 16 * MIB)]);
    rig.run(|_| {
        let held = rig.exhaust(Gfp::KERNEL | QUIET, 9);
        let zones: Vec<_> =
            held.iter().map(|(pfn, _)| rig.page_zone(*pfn).unwrap().zone_type()).collect();
        assert_eq!(zones, [Normal, Normal, Normal, Normal, Dma32, Dma32, Dma, Dma]);
        rig.release(held);
    });
}

#[test]
fn addressed_pages_of_dma_come_from_dma() {
    let rig = Rig::pc();
    rig.run(|_| {
        for order in [0, 3] {
            let addr = rig.__get_dma_pages(Gfp::KERNEL, order).unwrap().as_ptr();
            let page = rig.virt_to_page(addr).unwrap();
            assert_eq!(rig.place(page).1, Dma);
            rig.free_pages(addr, order).unwrap();
        }
    });
}
