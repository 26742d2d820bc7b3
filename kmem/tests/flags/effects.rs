//! Flags that change what is handed out: COLD, ZERO, COMP, the mobility flags, the boot mask; and those
//! that only travel with the request.

use kmem::{
    Config, Gfp, MigrateType, PageFlags, Pfn,
    platform::Platform,
    trace::{Event, TraceSink},
};
use kmem_hosted::Shape;
use kmem_test_support::{MIB, Rig, TestShrinker};
use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
};

#[test]
fn cold_takes_from_the_cold_end() {
    // Large enough for one CPU to have lists of every small order.
    let rig = Rig::new(Shape::no_dma(512 * MIB).cpus(1), Config::default());
    rig.run(|_| {
        for order in [0, 1, 3] {
            let held: Vec<_> = (0..4).map(|_| rig.take(Gfp::KERNEL, order).unwrap()).collect();
            rig.drain_this_cpu();
            let list = [held[2], held[0], held[3]];
            rig.release(list);
            // Last in, first out from the hot end; COLD takes the first in.
            let hot = rig.take(Gfp::KERNEL, order).unwrap();
            let cold = rig.take(Gfp::KERNEL | Gfp::COLD, order).unwrap();
            assert_eq!((hot, cold), (list[2], list[0]), "order {order}");
            assert_eq!(rig.take(Gfp::KERNEL, order), Ok(list[1]));
            rig.release(held);
        }
    });
}

/// Fills a block with a pattern.
fn scribble(rig: &Rig, (pfn, order): (Pfn, u32)) {
    for n in 0..1 << order {
        let at = rig.hosted().direct_map(Pfn(pfn.0 + n)).unwrap();
        // SAFETY: a whole frame of a block that the test holds.
        unsafe { at.write_bytes(0xa5, 4096) };
    }
}

/// Whether all frames of a block are filled with a byte.
fn filled_with(rig: &Rig, (pfn, order): (Pfn, u32), byte: u8) -> bool {
    (0..1 << order).all(|n| {
        let at = rig.hosted().direct_map(Pfn(pfn.0 + n)).unwrap();
        // SAFETY: a whole frame of a block that the test holds.
        unsafe { core::slice::from_raw_parts(at.as_ptr(), 4096) }.iter().all(|b| *b == byte)
    })
}

#[test]
fn zero_zeroes_and_others_leave_what_is_there() {
    let rig = Rig::flat();
    rig.run(|_| {
        for order in [0, 3, 5, 10] {
            let block = rig.take(Gfp::KERNEL, order).unwrap();
            scribble(&rig, block);
            rig.release([block]);
            let again = rig.take(Gfp::KERNEL, order).unwrap();
            assert_eq!(again, block, "the hot block comes back");
            assert!(filled_with(&rig, again, 0xa5), "nobody asked for zeroes");
            rig.release([again]);
            let zeroed = rig.take(Gfp::KERNEL | Gfp::ZERO, order).unwrap();
            assert_eq!(zeroed, block);
            assert!(filled_with(&rig, zeroed, 0), "order {order}");
            rig.release([zeroed]);
        }
    });
}

#[test]
fn bulk_zero_zeroes_the_new_pages_and_no_others() {
    let rig = Rig::flat();
    rig.run(|_| {
        let dirty: Vec<_> = (0..6).map(|_| rig.take(Gfp::KERNEL, 0).unwrap()).collect();
        dirty.iter().for_each(|block| scribble(&rig, *block));
        let mine = rig.pfn_to_page(dirty[0].0);
        rig.release(dirty[1..].iter().copied());
        let mut pages = [None, mine, None, None];
        assert_eq!(rig.alloc_pages_bulk(Gfp::KERNEL | Gfp::ZERO, &mut pages), Ok(4));
        for (i, page) in pages.iter().enumerate() {
            let block = (rig.page_to_pfn(page.unwrap()).unwrap(), 0);
            let expected = if i == 1 { 0xa5 } else { 0 };
            assert!(filled_with(&rig, block, expected), "place {i}");
        }
        rig.free_pages_bulk(&mut pages).unwrap();
    });
}

#[test]
fn comp_builds_a_compound_page() {
    let rig = Rig::flat();
    rig.run(|_| {
        for order in [1, 3, 4, 9, 10] {
            // COLD goes the general path.
            let cold = rig.alloc_pages(Gfp::KERNEL | Gfp::COMP | Gfp::COLD, order).unwrap();
            assert!(cold.flags().contains(PageFlags::HEAD));
            rig.__free_pages(cold, order).unwrap();
            let page = rig.alloc_pages(Gfp::KERNEL | Gfp::COMP, order).unwrap();
            let pfn = rig.page_to_pfn(page).unwrap();
            assert!(page.flags().contains(PageFlags::HEAD));
            let tail = rig.pfn_to_page(Pfn(pfn.0 + (1 << order) - 1)).unwrap();
            assert!(std::ptr::eq(rig.compound_head(tail), page));
            assert_eq!(rig.compound_order(tail), Some(order));
            // The tail stands for the head.
            rig.get_page(tail).unwrap();
            assert_eq!(page.page_count(), 2);
            rig.put_page(tail).unwrap();
            rig.put_page(tail).unwrap();
            assert_eq!(page.page_count(), 0);

            let plain = rig.alloc_pages(Gfp::KERNEL, order).unwrap();
            assert!(!plain.flags().contains(PageFlags::HEAD));
            let tail = Pfn(rig.page_to_pfn(plain).unwrap().0 + 1);
            let tail = rig.pfn_to_page(tail).unwrap();
            assert!(std::ptr::eq(rig.compound_head(tail), tail));
            assert!(rig.get_page(tail).is_err());
            rig.__free_pages(plain, order).unwrap();
        }
        let single = rig.alloc_page(Gfp::KERNEL | Gfp::COMP).unwrap();
        assert!(!single.flags().contains(PageFlags::HEAD), "one frame is no compound page");
        rig.__free_page(single).unwrap();
    });
}

#[test]
fn mobility_flags_keep_pageblocks_apart() {
    let rig = Rig::flat();
    let kinds = [
        (Gfp::KERNEL, MigrateType::Unmovable),
        (Gfp::KERNEL | Gfp::MOVABLE, MigrateType::Movable),
        (Gfp::KERNEL | Gfp::RECLAIMABLE, MigrateType::Reclaimable),
    ];
    rig.run(|_| {
        let mut held = Vec::new();
        let mut blocks: [BTreeSet<u32>; 3] = Default::default();
        for round in 0..300 {
            // COLD goes the general path.
            let way = if round % 3 == 0 { Gfp::COLD } else { Gfp::empty() };
            for (i, (gfp, mt)) in kinds.into_iter().enumerate() {
                let (pfn, order) = rig.take(gfp | way, round % 4).unwrap();
                assert_eq!(rig.pageblock_migratetype(pfn), Some(mt));
                blocks[i].insert(pfn.0 >> 9);
                held.push((pfn, order));
            }
        }
        assert!(blocks[0].is_disjoint(&blocks[1]) && blocks[1].is_disjoint(&blocks[2]));
        assert!(blocks[0].is_disjoint(&blocks[2]));
        rig.release(held);
    });
}

/// Keeps the flags of allocations.
#[derive(Default)]
struct Flags(Mutex<Vec<Gfp>>);

impl TraceSink for Flags {
    fn event(&self, _cpu: Option<usize>, event: &Event) {
        if let Event::PageAlloc { gfp, .. } = event {
            self.0.lock().unwrap().push(*gfp);
        }
    }
}

#[test]
fn write_account_and_zerotags_travel_with_the_request() {
    let rig = Rig::flat();
    let sink: &'static Flags = Box::leak(Box::default());
    let seen: Arc<Mutex<Vec<Gfp>>> = Arc::default();
    let log = Arc::clone(&seen);
    TestShrinker::register(&rig, 1000, move |_, sc, _| {
        log.lock().unwrap().push(sc.gfp);
        Some(0)
    });
    rig.run(|_| {
        rig.set_tracer(Some(sink));
        let flags = [Gfp::WRITE, Gfp::ACCOUNT, Gfp::ZEROTAGS];
        for flag in flags {
            let block = rig.take(Gfp::KERNEL | flag, 0).unwrap();
            rig.release([block]);
        }
        rig.set_tracer(None);
        let traced = std::mem::take(&mut *sink.0.lock().unwrap());
        assert_eq!(traced, flags.map(|flag| Gfp::KERNEL | flag));
        let held = rig.exhaust(Gfp::KERNEL | Gfp::WRITE | Gfp::NOWARN | Gfp::NORETRY, 0);
        assert!(!seen.lock().unwrap().is_empty());
        assert!(seen.lock().unwrap().iter().all(|gfp| gfp.contains(Gfp::WRITE)));
        rig.release(held);
    });
}

#[test]
fn the_boot_mask_strips_what_cannot_work_yet() {
    let early = Gfp::all() - (Gfp::RECLAIM | Gfp::IO | Gfp::FS);
    let config = Config { gfp_allowed_mask: early, ..Config::default() };
    let rig = Rig::new(Shape::no_dma(64 * MIB), config);
    let (source, _) = TestShrinker::register(&rig, 100_000, |_, _, _| Some(0));
    rig.run(|process| {
        // GFP_KERNEL does not sleep yet, so it is right even where one may not.
        let block =
            kmem::sync::preempt_disabled(rig.hosted(), process, |_| rig.take(Gfp::KERNEL, 0));
        rig.release(block);
        let held = rig.exhaust(Gfp::KERNEL | Gfp::NOWARN, 0);
        assert_eq!((rig.stalls(), source.scans()), (0, 0));
        rig.set_gfp_allowed_mask(Gfp::all());
        assert!(rig.alloc_page(Gfp::KERNEL | Gfp::NOWARN | Gfp::NORETRY).is_err());
        assert_eq!(rig.stalls(), 1);
        assert!(source.scans() > 0);
        rig.release(held);
        // Any flag can be taken away, at run time too.
        rig.set_gfp_allowed_mask(Gfp::all() - Gfp::ZERO);
        let block = rig.take(Gfp::KERNEL, 0).unwrap();
        scribble(&rig, block);
        rig.release([block]);
        assert_eq!(rig.take(Gfp::KERNEL | Gfp::ZERO, 0), Ok(block));
        assert!(filled_with(&rig, block, 0xa5));
        rig.release([block]);
        rig.set_gfp_allowed_mask(Gfp::all());
        assert!(rig.take(Gfp::KERNEL | Gfp::ZERO, 0).is_ok_and(|b| filled_with(&rig, b, 0)));
        rig.release([block]);
        let mark = rig.mark();
        let refused =
            kmem::sync::preempt_disabled(rig.hosted(), process, |_| rig.take(Gfp::KERNEL, 0));
        assert_eq!(refused, Err(kmem::AllocError::Context));
        assert!(rig.one_report(mark).contains("sleeping function"));
    });
}
