//! Failure reports: one per failure up to a limit, none with NOWARN, and NOWARN hides nothing else \[P4\].

use kmem::{AllocError, Config, Gfp, Kmem, gfp::GfpError, memblock::Memblock, zone::Layout};
use kmem_test_support::{Plain, Rig};
use std::sync::atomic::Ordering::SeqCst;

#[test]
fn a_failure_is_reported_with_order_mode_and_place() {
    let rig = Rig::flat();
    rig.run(|_| {
        let held = rig.exhaust(Gfp::KERNEL | Gfp::NOWARN, 0);
        let mark = rig.mark();
        let line = line!() + 1;
        assert_eq!(rig.alloc_pages(Gfp::KERNEL | Gfp::ZERO, 2).err(), Some(AllocError::NoMemory));
        let report = rig.one_report(mark);
        let text = "page allocation failure: order:2, mode:0xdc0(GFP_KERNEL|__GFP_ZERO)";
        assert!(report.contains(text), "{report}");
        assert!(report.contains(&format!("{}:{line}", file!())), "{report}");
        rig.release(held);
    });
}

#[test]
fn nowarn_silences_the_failure_report_and_only_that() {
    let rig = Rig::flat();
    rig.run(|_| {
        let held = rig.exhaust(Gfp::KERNEL | Gfp::NOWARN, 0);
        let mark = rig.mark();
        assert_eq!(rig.alloc_page(Gfp::KERNEL | Gfp::NOWARN).err(), Some(AllocError::NoMemory));
        assert_eq!(
            rig.alloc_page(Gfp::NOWAIT).err(),
            Some(AllocError::NoMemory),
            "NOWAIT implies it"
        );
        assert_eq!(rig.since(mark), []);
        rig.release(held);
        // A mistake is a mistake.
        let wrong = [
            (Gfp::KERNEL | Gfp::DMA | Gfp::DMA32, 0, GfpError::TwoZones),
            (Gfp::KERNEL, 11, GfpError::OrderTooLarge),
        ];
        for (gfp, order, why) in wrong {
            let mark = rig.mark();
            let refused = rig.alloc_pages(gfp | Gfp::NOWARN, order).err();
            assert_eq!(refused, Some(AllocError::Invalid(why)));
            assert!(rig.one_report(mark).contains(&why.to_string()));
        }
    });
}

#[test]
fn ten_reports_in_five_seconds_and_no_more() {
    let mut boot = Memblock::new();
    boot.add(0, 16 << 20, 0).unwrap();
    let config = Config { layout: Layout::flat(), ..Config::default() };
    let kmem = Kmem::bring_up(Plain::<12>::new(4096, 1), boot, &config).unwrap();
    let reports = || std::mem::take(&mut *kmem.platform().reports.lock().unwrap());
    let mut held = Vec::new();
    while let Ok(page) = kmem.alloc_page(Gfp::NOWAIT) {
        held.push(page);
    }
    assert_eq!(reports().len(), 0);
    for seconds in [0, 5, 1000] {
        kmem.platform().now_ns.store(seconds * 1_000_000_000, SeqCst);
        for _ in 0..25 {
            assert_eq!(
                kmem.alloc_page(Gfp::NOWAIT - Gfp::NOWARN).err(),
                Some(AllocError::NoMemory)
            );
        }
        let reports = reports();
        assert_eq!(reports.len(), 10, "at {seconds} s");
        assert!(reports.iter().all(|r| r.contains("page allocation failure: order:0, mode:0x800")));
    }
    held.into_iter().for_each(|page| kmem.__free_page(page).unwrap());
    kmem.drain_this_cpu();
    let audit = kmem.audit().unwrap();
    assert_eq!(audit.free, audit.managed);
}

#[test]
fn every_contradiction_is_refused_with_a_report() {
    let rig = Rig::flat();
    rig.run(|_| {
        let mark = rig.mark();
        let cases = [
            (Gfp::DMA | Gfp::HIGHMEM, 0, GfpError::TwoZones),
            (Gfp::DMA32 | Gfp::HIGHMEM | Gfp::KERNEL, 3, GfpError::TwoZones),
            (Gfp::MOVABLE | Gfp::RECLAIMABLE | Gfp::KERNEL, 0, GfpError::TwoMobilities),
            (Gfp::KERNEL, 11, GfpError::OrderTooLarge),
            (Gfp::ATOMIC, u32::MAX, GfpError::OrderTooLarge),
        ];
        for (gfp, order, why) in cases {
            assert_eq!(rig.alloc_pages(gfp, order).err(), Some(AllocError::Invalid(why)), "{gfp}");
            assert_eq!(rig.alloc_pages_node(0, gfp, order).err(), Some(AllocError::Invalid(why)));
            if order == 0 {
                assert_eq!(rig.alloc_pages_bulk(gfp, &mut [None]), Err(AllocError::Invalid(why)));
            }
        }
        for gfp in [Gfp::KERNEL | Gfp::HIGHMEM, Gfp::HIGHUSER_MOVABLE] {
            let refused = Err(AllocError::Invalid(GfpError::HighMemNeedsPage));
            assert_eq!(rig.__get_free_pages(gfp, 0), refused);
            assert_eq!(rig.__get_free_page(gfp), refused);
            assert_eq!(rig.get_zeroed_page(gfp), refused);
            assert_eq!(rig.alloc_pages_exact(8192, gfp), refused);
        }
        let reports = rig.since(mark);
        assert_eq!(reports.len(), cases.len() * 2 + 2 + 8);
        for (_, report) in reports {
            assert!(report.contains(file!()) && report.contains("mode:0x"), "{report}");
        }
    });
}
