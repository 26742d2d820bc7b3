//! Bring-up \[B1, F1, F4, F5\]: frames of every size, holes that cost nothing, a terabyte in a moment.

use kmem::{
    BringUpError, Config, Gfp, Kmem, Misuse, Page, PageFlags, Pfn, ZoneType,
    memblock::Memblock,
    zone::{Layout, ZoneLimit},
};
use kmem_hosted::{Machine, Shape};
use kmem_test_support::{MIB, Plain, Rig};
use std::time::{Duration, Instant};

const GIB: u64 = 1 << 30;

fn boot(ranges: &[(u64, u64, u32)]) -> Memblock {
    let mut boot = Memblock::new();
    for (base, size, node) in ranges {
        boot.add(*base, *size, *node).unwrap();
    }
    boot
}

/// Brings a machine of `frames` frames of 2^`SHIFT` bytes up and uses all of it.
fn works_with_frames_of<const SHIFT: u32>(frames: usize) {
    let bytes = (frames as u64) << SHIFT;
    // A border that is a multiple of a pageblock of these frames.
    let border = bytes / 4;
    let limits = [
        ZoneLimit { zone: ZoneType::Dma, end: border },
        ZoneLimit { zone: ZoneType::Normal, end: u64::MAX },
    ];
    let config = Config { layout: Layout::new(&limits).unwrap(), ..Config::default() };
    let platform = Plain::<SHIFT>::new(frames, 1);
    let kmem = Kmem::bring_up(platform, boot(&[(0, bytes, 0)]), &config).unwrap();
    assert_eq!(kmem.page_size(), 1 << SHIFT);
    assert_eq!(kmem.totalram_pages(), frames as u64);
    let start = kmem.audit().unwrap();
    let root = ((bytes * 3 / 4 + border) / 1024 * 16).isqrt().clamp(128, 262_144);
    assert_eq!(kmem.min_free_kbytes(), root);
    let min: u64 = kmem.zones().iter().map(|z| z.watermarks().min).sum();
    assert!(min.abs_diff((root << 10) >> SHIFT) <= 1, "{min} frames of {root} kB");

    let mut held = Vec::new();
    for order in [0, 3, 10] {
        let addr = kmem.__get_free_pages(Gfp::KERNEL | Gfp::ZERO, order).unwrap();
        let bytes = 1usize << SHIFT << order;
        assert_eq!((addr.as_ptr() as usize) % (1 << SHIFT), 0);
        // SAFETY: a block of 2^order frames that the test holds.
        let content = unsafe { core::slice::from_raw_parts_mut(addr.as_ptr(), bytes) };
        assert!(content.iter().all(|b| *b == 0));
        content.fill(order as u8 + 1);
        held.push((addr, order));
    }
    for (addr, order) in held {
        let bytes = 1usize << SHIFT << order;
        // SAFETY: as above.
        let content = unsafe { core::slice::from_raw_parts(addr.as_ptr(), bytes) };
        assert!(content.iter().all(|b| *b == order as u8 + 1), "nobody else wrote there");
        kmem.free_pages(addr.as_ptr(), order).unwrap();
    }
    let exact = kmem.alloc_pages_exact((5 << SHIFT) - 1, Gfp::KERNEL).unwrap();
    kmem.free_pages_exact(exact.as_ptr(), 5 << SHIFT).unwrap();
    let dma = kmem.alloc_page(Gfp::KERNEL | Gfp::DMA).unwrap();
    assert!(u64::from(kmem.page_to_pfn(dma).unwrap().0) << SHIFT < border);
    kmem.__free_page(dma).unwrap();
    let refused = kmem.__free_page(dma);
    assert!(matches!(refused, Err(Misuse::DoubleFree { .. })));

    let mut all = Vec::new();
    while let Ok(page) = kmem.alloc_page(Gfp::NOWAIT | Gfp::MEMALLOC) {
        all.push(page);
    }
    let dma = kmem.alloc_page(Gfp::NOWAIT | Gfp::MEMALLOC | Gfp::DMA);
    assert!(dma.is_err() && all.len() == frames);
    all.into_iter().for_each(|page| kmem.__free_page(page).unwrap());
    kmem.drain_this_cpu();
    assert_eq!(kmem.audit().unwrap(), start);
}

#[test]
fn frames_of_4_kib() {
    works_with_frames_of::<12>(8192);
}

#[test]
fn frames_of_8_kib() {
    works_with_frames_of::<13>(8192);
}

#[test]
fn frames_of_16_kib() {
    works_with_frames_of::<14>(4096);
}

#[test]
fn frames_of_64_kib() {
    works_with_frames_of::<16>(4096);
}

#[test]
fn frames_of_other_sizes_are_refused() {
    let bring_up = |refused: Option<BringUpError>, shift| {
        assert_eq!(refused, Some(BringUpError::PageShift(shift)));
    };
    let (config, memory) = (Config::default(), || boot(&[(0, 64 * MIB, 0)]));
    bring_up(Kmem::bring_up(Plain::<11>::new(0, 1), memory(), &config).err(), 11);
    bring_up(Kmem::bring_up(Plain::<15>::new(0, 1), memory(), &config).err(), 15);
    bring_up(Kmem::bring_up(Plain::<17>::new(0, 1), memory(), &config).err(), 17);
}

#[test]
fn a_page_is_32_bytes_and_describes_the_frame() {
    assert_eq!(size_of::<Page>(), 32);
    let rig = Rig::flat();
    rig.run(|_| {
        let page = rig.alloc_page(Gfp::KERNEL).unwrap();
        assert!(page.test_and_set(PageFlags::LOCKED));
        assert!(!page.test_and_set(PageFlags::LOCKED), "somebody has it");
        page.clear_flags(PageFlags::LOCKED);
        assert!(page.test_and_set(PageFlags::LOCKED));
        page.clear_flags(PageFlags::LOCKED);
        page.set_private(0xdead_beef);
        page.set_index(42);
        page.set_flags(PageFlags::DIRTY | PageFlags::SWAPBACKED);
        assert_eq!((page.private(), page.index()), (0xdead_beef, 42));
        assert_eq!(page.flags() - PageFlags::ALLOCATED, PageFlags::DIRTY | PageFlags::SWAPBACKED);
        assert_eq!(page.page_count(), 1, "and none of it is the count's");
        let text = format!("{page:?}");
        assert!(text.contains("count:1 order:0") && text.contains("private:0xdeadbeef"), "{text}");
        rig.__free_page(page).unwrap();
    });
}

/// Bytes of per-frame and per-pageblock tables that a machine backs.
fn backed(ranges: &[(u64, u64, u32)]) -> usize {
    let config = Config { layout: Layout::flat(), ..Config::default() };
    let kmem = Kmem::bring_up(Plain::<12>::new(0, 1), boot(ranges), &config).unwrap();
    let frames: u64 = ranges.iter().map(|(_, size, _)| size >> 12).sum();
    assert_eq!(kmem.totalram_pages(), frames);
    let asked = kmem.platform().sparse.lock().unwrap();
    assert_eq!(asked.len(), 6, "pages, owners, states, bits, descriptors and links");
    asked.iter().map(|(_, used)| used).sum()
}

#[test]
fn holes_cost_no_metadata() {
    let per_frame = size_of::<Page>();
    let compact = backed(&[(0, 32 * MIB, 0)]);
    // 32 bytes a frame, two for its owner, four for large objects' states, and less than one for the pageblocks.
    assert!((8192 * (per_frame + 6)..8192 * (per_frame + 7)).contains(&compact), "{compact}");
    // The same memory in four banks over a gigabyte, and over a fourth of a node's worth each.
    let banks = [0, 1, 2, 3].map(|n| (n * 256 * MIB, 8 * MIB, 0));
    assert_eq!(backed(&banks), compact);
    // A pageblock is the smallest unit: a bank of one frame backs 512.
    assert_eq!(backed(&[(0, 32 * MIB, 0), (512 * MIB, 4096, 0)]), compact + compact / 16);
}

#[test]
fn holes_are_nobodys_and_blocks_do_not_cross_them() {
    let shape = Shape::no_dma(64 * MIB).hole(10 * MIB, 4 * MIB + 4096).hole(33 * MIB, 8192);
    let rig = Rig::new(shape, Config::default());
    assert_eq!(rig.totalram_pages(), 16_384 - 1025 - 2);
    let hole = |pfn: u32| (2560..3585).contains(&pfn) || (8448..8450).contains(&pfn);
    let refused = rig.run(|_| {
        let mut held = Vec::new();
        for order in (0..=10).rev() {
            held.extend(rig.exhaust(Gfp::KERNEL | Gfp::MEMALLOC | Gfp::NOWARN, order));
        }
        let frames: u64 = held.iter().map(|(_, order)| 1u64 << order).sum();
        assert_eq!(frames, rig.totalram_pages());
        let crossing = held.iter().any(|(pfn, order)| (pfn.0..pfn.0 + (1 << order)).any(hole));
        rig.release(held);
        (crossing, rig.alloc_pages_at(Pfn(2560), 0, Gfp::KERNEL).err())
    });
    assert_eq!(refused, (false, Some(kmem::AllocError::NoMemory)));
    // A whole pageblock of the hole has no page; a part of one has a page that was never allocated.
    assert!(rig.pfn_to_page(Pfn(3072 - 512)).is_none());
    let inside = rig.pfn_to_page(Pfn(8448)).unwrap();
    rig.run(|_| assert!(rig.__free_page(inside).is_err()));
    assert!(!rig.get_page_unless_zero(inside));
}

#[test]
fn every_frame_of_a_large_hole_can_be_asked_about() {
    // The tables of the hole are larger than a page of the host's.
    let shape = Shape::no_dma(8 * GIB + 64 * MIB).hole(32 * MIB, 8 * GIB).without_contents();
    let rig = Rig::new(shape, Config::default());
    let frames = ((8 * GIB + 64 * MIB) >> 12) as u32;
    let populated = (0..frames).filter(|pfn| rig.pfn_to_page(Pfn(*pfn)).is_some()).count();
    assert_eq!(populated as u64, rig.totalram_pages());
    rig.run(|_| {
        for pfn in (0..frames).step_by(512).map(Pfn) {
            let Ok(page) = rig.alloc_pages_at(pfn, 0, Gfp::KERNEL) else { continue };
            rig.__free_page(page).unwrap();
        }
    });
}

#[test]
fn a_terabyte_comes_up_within_a_second() {
    let terabyte = || {
        let start = Instant::now();
        let shape = Shape::x86_64(1024 * GIB).without_contents().cpus(8);
        let machine = Machine::without_kswapd(shape, Config::default()).unwrap();
        (machine, start.elapsed())
    };
    // The best of a few, as others may have the processor.
    let (machine, took) = (0..5).map(|_| terabyte()).min_by_key(|(_, took)| *took).unwrap();
    assert!(took < Duration::from_secs(1), "{took:?}");
    assert_eq!(machine.totalram_pages(), 1 << 28);
    for zone in machine.zones() {
        let span = zone.spanned();
        let middle = span.start + span.len() / 2;
        for (pfn, order) in [(span.start, 0), (middle & !1023, 10), (span.end - 1, 0)] {
            let page = machine.alloc_pages_at(Pfn(pfn), order, Gfp::KERNEL).unwrap();
            assert_eq!(machine.page_to_pfn(page), Some(Pfn(pfn)), "{} {pfn:#x}", zone.name());
            assert_eq!(page.page_count(), 1);
            machine.__free_pages(page, order).unwrap();
        }
    }
    assert_eq!(machine.nr_free_pages(), 1 << 28);
}

#[test]
fn what_boot_memory_kept_is_not_handed_out() {
    let shape = Shape::no_dma(16 * MIB);
    let mut early = shape.memblock().unwrap();
    early.reserve(MIB, MIB).unwrap();
    early.reserve(5 * MIB + 100, 50).unwrap();
    let rig = Rig::of(Machine::from_boot(shape, Config::default(), early).unwrap());
    assert_eq!(rig.totalram_pages(), 4096 - 256 - 1);
    rig.run(|_| {
        let held = rig.exhaust(Gfp::KERNEL | Gfp::MEMALLOC | Gfp::NOWARN, 0);
        assert_eq!(held.len(), 4096 - 256 - 1);
        assert!(held.iter().all(|(pfn, _)| !(256..512).contains(&pfn.0) && pfn.0 != 1280));
        rig.release(held);
    });
}

#[test]
fn machines_that_make_no_sense_are_refused() {
    let config = Config { layout: Layout::flat(), ..Config::default() };
    let try_with = |memory: Memblock, config: &Config, cpus| {
        Kmem::bring_up(Plain::<12>::new(0, cpus), memory, config).err()
    };
    let ok = || boot(&[(0, 64 * MIB, 0)]);
    assert_eq!(try_with(Memblock::new(), &config, 1), Some(BringUpError::NoMemory));
    assert_eq!(try_with(ok(), &config, 0), Some(BringUpError::Cpus(0)));
    assert_eq!(try_with(ok(), &config, 1025), Some(BringUpError::Cpus(1025)));
    let shared = boot(&[(0, MIB, 0), (MIB, 3 * MIB, 1)]);
    assert_eq!(try_with(shared, &config, 1), Some(BringUpError::NodesShareAPageblock(256)));
    let too_high = boot(&[((1 << 44) - 4096, 4096, 0)]);
    assert_eq!(try_with(too_high, &config, 1), Some(BringUpError::TooHigh(1 << 44)));
    let only_above = Layout::new(&[ZoneLimit { zone: ZoneType::Normal, end: 2 * MIB }]).unwrap();
    let above = boot(&[(4 * MIB, MIB, 0)]);
    let config = Config { layout: only_above, ..Config::default() };
    assert_eq!(try_with(above, &config, 1), Some(BringUpError::NoMemory));
}
