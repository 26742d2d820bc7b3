//! How far down each flag lets a request go: HIGH, ATOMIC, NOWAIT, MEMALLOC, NOMEMALLOC, the scopes, the
//! OOM victim.

use kmem::{AllocError, Config, Gfp, ZoneType, context::Task};
use kmem_hosted::Shape;
use kmem_test_support::{Held, MIB, Rig};
use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering::SeqCst},
};

const QUIET: Gfp = Gfp::NOWARN.union(Gfp::NORETRY);

/// Free frames of the one zone that requests of this kind, by this task, leave.
fn floor_as(task: &Task, gfp: Gfp, order: u32) -> (u64, u64) {
    let rig = Rig::flat();
    let zone = rig.zone(ZoneType::Normal);
    let min = zone.watermarks().min;
    let mut held = Held::new();
    rig.run_as(task, |_| held = rig.exhaust(gfp | QUIET, order));
    let left = zone.free_frames();
    let listed: u64 = rig.pcp_frames(zone).sum();
    assert_eq!(listed, 0, "what lies on lists was given back before the request failed");
    rig.release(held);
    (left, min)
}

fn floor(gfp: Gfp) -> (u64, u64) {
    floor_as(&Task::new(), gfp, 0)
}

#[test]
fn an_ordinary_request_leaves_min() {
    for gfp in [Gfp::KERNEL, Gfp::NOFS, Gfp::NOIO, Gfp::USER, Gfp::HIGHUSER_MOVABLE] {
        let (left, min) = floor(gfp);
        assert_eq!(left, min, "{gfp}");
    }
}

#[test]
fn nowait_is_an_ordinary_request_that_does_not_wait() {
    let (left, min) = floor(Gfp::NOWAIT);
    assert_eq!(left, min);
}

#[test]
fn high_takes_half_of_the_reserve() {
    let (left, min) = floor(Gfp::KERNEL | Gfp::HIGH);
    assert_eq!(left, min - min / 2);
}

#[test]
fn atomic_takes_five_eighths_of_the_reserve() {
    let (left, min) = floor(Gfp::ATOMIC);
    let half = min - min / 2;
    assert_eq!(left, half - half / 4);
}

#[test]
fn atomic_with_nomemalloc_takes_half_of_the_reserve() {
    let (left, min) = floor(Gfp::ATOMIC | Gfp::NOMEMALLOC);
    assert_eq!(left, min - min / 2);
}

#[test]
fn memalloc_takes_all() {
    let (left, _) = floor(Gfp::KERNEL | Gfp::MEMALLOC);
    assert_eq!(left, 0);
    let (left, _) = floor(Gfp::NOWAIT | Gfp::MEMALLOC);
    assert_eq!(left, 0);
}

#[test]
fn nomemalloc_beats_memalloc() {
    let (left, min) = floor(Gfp::KERNEL | Gfp::MEMALLOC | Gfp::NOMEMALLOC);
    assert_eq!(left, min);
}

#[test]
fn a_noreclaim_scope_takes_all_unless_nomemalloc() {
    for (flag, expected) in [(Gfp::empty(), Some(0)), (Gfp::NOMEMALLOC, None)] {
        let task = Task::new();
        let saved = task.memalloc_noreclaim_save();
        let (left, min) = floor_as(&task, Gfp::KERNEL | flag, 0);
        assert_eq!(left, expected.unwrap_or(min));
        task.memalloc_restore(saved);
        let (left, min) = floor_as(&task, Gfp::KERNEL | flag, 0);
        assert_eq!(left, min, "the scope is over");
    }
}

#[test]
fn an_oom_victim_takes_half() {
    let task = Task::new();
    task.set_oom_victim(true);
    assert!(task.is_oom_victim());
    let (left, min) = floor_as(&task, Gfp::KERNEL, 0);
    assert_eq!(left, min - min / 2);
    let (left, min) = floor_as(&task, Gfp::KERNEL | Gfp::NOMEMALLOC, 0);
    assert_eq!(left, min);
    // Both of a victim's ways down together.
    let (left, min) = floor_as(&task, Gfp::KERNEL | Gfp::HIGH, 0);
    let half = min - min / 2;
    assert_eq!(left, half - half / 2);
    task.set_oom_victim(false);
    let (left, min) = floor_as(&task, Gfp::KERNEL, 0);
    assert_eq!(left, min);
}

#[test]
fn larger_orders_respect_the_same_floor() {
    for order in [1, 3, 4, 8, 9, 10] {
        let (left, min) = floor_as(&Task::new(), Gfp::KERNEL, order);
        assert!(left >= min, "order {order}: {left} of {min}");
        assert!(left < min + (1 << order), "order {order}: one more block would have fitted");
    }
}

#[test]
fn flags_that_only_the_general_path_knows_keep_the_floor() {
    for gfp in [Gfp::COLD, Gfp::ZERO, Gfp::THISNODE] {
        for order in [0, 2] {
            let (left, min) = floor_as(&Task::new(), Gfp::KERNEL | gfp, order);
            assert!(left >= min, "{gfp} order {order}: {left} of {min}");
            assert!(left < min + (1 << order), "{gfp} order {order}: {left} of {min}");
        }
    }
}

#[test]
fn bulk_requests_keep_the_floor() {
    let rig = Rig::flat();
    let zone = rig.zone(ZoneType::Normal);
    rig.run(|_| {
        let mut pages = vec![None; 20_000];
        let got = rig.alloc_pages_bulk(Gfp::KERNEL | QUIET, &mut pages).unwrap();
        assert!(got < pages.len());
        assert_eq!(zone.free_frames(), zone.watermarks().min);
        rig.free_pages_bulk(&mut pages).unwrap();
        assert!(pages.iter().all(Option::is_none));
    });
}

#[test]
fn an_interrupt_does_not_inherit_the_tasks_scope() {
    let rig = Rig::flat();
    let zone = rig.zone(ZoneType::Normal);
    let task = Task::new();
    let left = Arc::new(AtomicU64::new(u64::MAX));
    let (seen, machine) = (Arc::clone(&left), Arc::downgrade(rig.machine()));
    rig.hosted().set_softirq_handler(Arc::new(move |_atomic, _cpu, _bits| {
        let Some(m) = machine.upgrade() else { return };
        let mut held = [None; 4096];
        let got = m.alloc_pages_bulk(Gfp::ATOMIC | QUIET, &mut held).unwrap_or(0);
        seen.store(m.nr_free_pages(), SeqCst);
        assert!(got > 0 && m.free_pages_bulk(&mut held).is_ok());
    }));
    rig.run_as(&task, |_| {
        let held = rig.exhaust(Gfp::KERNEL | QUIET, 0);
        let saved = task.memalloc_noreclaim_save();
        assert!(rig.hosted().raise_softirq(1));
        task.memalloc_restore(saved);
        let half = zone.watermarks().min - zone.watermarks().min / 2;
        assert_eq!(left.load(SeqCst), half - half / 4, "as far as ATOMIC goes, and no further");
        rig.release(held);
    });
}

#[test]
fn lowmem_reserve_counts_on_top_of_the_watermark() {
    let rig = Rig::new(Shape::x86_64(256 * MIB), Config::default());
    let (dma, dma32) = (rig.zone(ZoneType::Dma), rig.zone(ZoneType::Dma32));
    rig.run(|_| {
        let held = rig.exhaust(Gfp::KERNEL | QUIET, 0);
        let reserve = dma.lowmem_reserve(ZoneType::Normal);
        assert_eq!(reserve, dma32.managed_frames() / 256);
        assert_eq!(dma32.free_frames(), dma32.watermarks().min);
        assert_eq!(dma.free_frames(), dma.watermarks().min + reserve);
        // What is reserved is for those who cannot go elsewhere.
        let low = rig.exhaust(Gfp::KERNEL | Gfp::DMA | QUIET, 0);
        assert_eq!(low.len() as u64, reserve);
        assert_eq!(rig.alloc_page(Gfp::KERNEL | QUIET).err(), Some(AllocError::NoMemory));
        rig.release(held.into_iter().chain(low));
    });
}

#[test]
fn no_single_request_takes_the_zone_below_its_floor() {
    let rig = Rig::flat();
    let zone = rig.zone(ZoneType::Normal);
    let min = zone.watermarks().min;
    let half = min - min / 2;
    rig.run(|_| {
        let mut held = Held::new();
        // A list that is refilled in batches must not take more than the request may.
        for (gfp, floor) in [
            (Gfp::KERNEL, min),
            (Gfp::KERNEL | Gfp::COLD, min),
            (Gfp::KERNEL | Gfp::HIGH, half),
            (Gfp::ATOMIC, half - half / 4),
        ] {
            while let Ok(block) = rig.take(gfp | QUIET, 0) {
                assert!(zone.free_frames() >= floor, "{gfp}: {} of {floor}", zone.free_frames());
                held.push(block);
            }
        }
        rig.release(held);
    });
}
