//! Presets, empty zones, memory above the layout; blocks keep to one zone and one node.

use kmem::{
    AllocError, BringUpError, Config, Gfp, Kmem, Pfn, ZoneType,
    memblock::Memblock,
    zone::{Layout, LayoutError, ZoneLimit},
};
use kmem_hosted::{Machine, Shape};
use kmem_test_support::{MIB, Plain, Rig};

const GIB: u64 = 1 << 30;

/// Name, first frame, spanned and present frames of each zone.
fn zones(shape: Shape) -> Vec<(&'static str, u32, u32, u64)> {
    let machine = Machine::without_kswapd(shape.without_contents(), Config::default()).unwrap();
    let zones = machine.zones().iter();
    zones.map(|z| (z.name(), z.start_pfn(), z.spanned().len(), z.present_frames())).collect()
}

#[test]
fn x86_32_is_as_in_table_12_1() {
    let expected = [
        ("DMA", 0, 4096, 4096),
        ("Normal", 4096, 225_280, 225_280),
        ("HighMem", 229_376, 294_912, 294_912),
    ];
    assert_eq!(zones(Shape::x86_32(2 * GIB)), expected);
}

#[test]
fn pae_has_high_memory_above_four_gigabytes() {
    let expected = [
        ("DMA", 0, 4096, 4096),
        ("Normal", 4096, 225_280, 225_280),
        // From 896 MiB to 9 GiB, without the gigabyte of devices below 4 GiB.
        ("HighMem", 229_376, 2_129_920, 1_867_776),
    ];
    assert_eq!(zones(Shape::x86_32_pae(8 * GIB)), expected);
}

#[test]
fn x86_64_has_two_dma_zones_and_no_high_memory() {
    let expected = [
        ("DMA", 0, 4096, 4096),
        ("DMA32", 4096, 782_336, 782_336),
        ("Normal", 1 << 20, 1_310_720, 1_310_720),
    ];
    assert_eq!(zones(Shape::x86_64(8 * GIB)), expected);
    assert_eq!(zones(Shape::x86_64(GIB)).len(), 2, "Normal is empty in a small machine");
    assert_eq!(zones(Shape::x86_64(8 * MIB)), [("DMA", 0, 2048, 2048)]);
}

#[test]
fn without_dma_all_is_normal() {
    assert_eq!(zones(Shape::no_dma(GIB)), [("Normal", 0, 1 << 18, 1 << 18)]);
}

#[test]
fn the_cores_presets_are_those_of_the_machines() {
    let ends = |layout: Layout| layout.ranges().map(|(z, _, e)| (z, e)).collect::<Vec<_>>();
    let (dma, normal, high) = (ZoneType::Dma, ZoneType::Normal, ZoneType::HighMem);
    assert_eq!(ends(Layout::x86_32())[..2], [(dma, 16 * MIB), (normal, 896 * MIB)]);
    assert_eq!(ends(Layout::x86_32())[2], (high, 4 * GIB));
    assert_eq!(ends(Layout::x86_32_pae())[2], (high, 64 * GIB));
    assert_eq!(ends(Layout::x86_64())[..2], [(dma, 16 * MIB), (ZoneType::Dma32, 4 * GIB)]);
    assert_eq!(ends(Layout::flat())[0], (normal, u64::MAX));
    assert!(!Layout::flat().has(dma) && Layout::x86_64().has(dma));
    let movable = Layout::x86_64().with_movable_from(2 * GIB);
    let ranges: Vec<_> = movable.ranges().collect();
    assert_eq!(ranges[1], (ZoneType::Dma32, 16 * MIB, 2 * GIB));
    assert_eq!(ranges[3], (ZoneType::Movable, 2 * GIB, u64::MAX));
}

#[test]
fn layouts_that_make_no_sense_are_refused() {
    let limit = |zone, end| ZoneLimit { zone, end };
    let (dma, normal) = (ZoneType::Dma, ZoneType::Normal);
    assert_eq!(Layout::new(&[]), Err(LayoutError::Empty));
    let falling = [limit(dma, 32 * MIB), limit(normal, 16 * MIB)];
    assert_eq!(Layout::new(&falling), Err(LayoutError::Unordered(normal)));
    let swapped = [limit(normal, 16 * MIB), limit(dma, 32 * MIB)];
    assert_eq!(Layout::new(&swapped), Err(LayoutError::Unordered(dma)));
    let crooked = limit(dma, 15 * MIB);
    let layout = Layout::new(&[crooked, limit(normal, u64::MAX)]).unwrap();
    let mut boot = Memblock::new();
    boot.add(0, 32 * MIB, 0).unwrap();
    let config = Config { layout, ..Config::default() };
    let refused = Kmem::bring_up(Plain::<12>::new(0, 1), boot, &config).err();
    assert_eq!(refused, Some(BringUpError::Layout(LayoutError::Unaligned(crooked))));
}

#[test]
fn memory_above_the_layout_is_nobodys() {
    let limit = ZoneLimit { zone: ZoneType::Normal, end: 8 * MIB };
    let mut boot = Memblock::new();
    boot.add(0, 12 * MIB, 0).unwrap();
    let config = Config { layout: Layout::new(&[limit]).unwrap(), ..Config::default() };
    let kmem = Kmem::bring_up(Plain::<12>::new(3072, 1), boot, &config).unwrap();
    assert_eq!(kmem.totalram_pages(), 2048);
    assert!(kmem.pfn_to_page(Pfn(2047)).is_some());
    for above in [2048, 3071, u32::MAX] {
        assert!(kmem.pfn_to_page(Pfn(above)).is_none());
        assert!(kmem.page_zone(Pfn(above)).is_none());
        assert!(kmem.alloc_pages_at(Pfn(above), 0, Gfp::KERNEL).is_err());
    }
    let mut held = Vec::new();
    while let Ok(page) = kmem.alloc_page(Gfp::KERNEL | Gfp::MEMALLOC | Gfp::NOWARN) {
        assert!(kmem.page_to_pfn(page).unwrap() < Pfn(2048));
        held.push(page);
    }
    assert_eq!(held.len(), 2048);
    held.into_iter().for_each(|page| kmem.__free_page(page).unwrap());
    kmem.drain_this_cpu();
    assert_eq!(kmem.audit().unwrap().free, 2048);
}

#[test]
fn a_listed_zone_without_memory_serves_nobody() {
    // A PC whose memory begins at 16 MiB: there is no memory for ISA devices, and no other will do.
    let mut shape = Shape::x86_64(64 * MIB);
    shape.banks[0].base = 16 * MIB;
    let rig = Rig::new(shape, Config::default());
    rig.run(|_| {
        let dma = rig.take(Gfp::DMA | Gfp::KERNEL | Gfp::NOWARN, 0);
        assert_eq!(dma, Err(AllocError::NoMemory));
        assert_eq!(rig.__get_dma_pages(Gfp::KERNEL | Gfp::NOWARN, 1), Err(AllocError::NoMemory));
        rig.release([rig.take(Gfp::KERNEL, 0).unwrap()]);
    });
}

#[test]
fn no_block_spans_two_zones_or_nodes() {
    // Borders at odd pageblocks: a block of 4 MiB around each would fit if zones did not matter.
    let shape = Shape::x86_64(22 * MIB)
        .zones(&[
            (ZoneType::Dma, 6 * MIB),
            (ZoneType::Dma32, 14 * MIB),
            (ZoneType::Normal, 1 << 40),
        ])
        .bank(22 * MIB, 22 * MIB, 1)
        .cpus(2);
    let rig = Rig::new(shape, Config::default());
    rig.set_min_free_kbytes(0);
    rig.set_watermark_scale_factor(0);
    rig.run(|_| {
        // Aligned, all of it free, and across the border at 6 MiB; then across that of the nodes.
        for crossing in [Pfn(1024), Pfn(5120)] {
            assert_eq!(
                rig.alloc_pages_at(crossing, 10, Gfp::KERNEL).err(),
                Some(AllocError::NoMemory)
            );
        }
        for (order, blocks) in [(10, 8), (9, 22), (3, 1408), (0, 11_264)] {
            let held = rig.exhaust(Gfp::KERNEL | Gfp::MEMALLOC | Gfp::NOWARN, order);
            for (pfn, _) in &held {
                assert!(pfn.is_aligned(order));
                let slot = |pfn| {
                    let zone = rig.page_zone(pfn).unwrap();
                    (zone.node(), zone.zone_type())
                };
                let last = Pfn(pfn.0 + (1 << order) - 1);
                assert_eq!(slot(*pfn), slot(last), "order {order} at {pfn}");
            }
            // Of 22 MiB and 22 MiB: aligned 4 MiB blocks inside one zone of one node.
            assert_eq!(held.len(), blocks);
            rig.release(held);
            rig.drain_this_cpu();
        }
    });
}
