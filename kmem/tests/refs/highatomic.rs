//! Pageblocks set aside for high-order atomic requests \[M2\].

use kmem::{AllocError, Gfp, MigrateType, ZoneType, vmstat::VmEvent};
use kmem_test_support::{Held, Rig};

const QUIET: Gfp = Gfp::NOWARN.union(Gfp::NORETRY);

/// A machine short enough of memory for a high-order atomic request to have a pageblock set aside; what is
/// taken, that request's block last.
fn reserved() -> (Rig, Held) {
    let rig = Rig::flat();
    let held = rig.run(|_| {
        let mut held = rig.exhaust(Gfp::KERNEL | QUIET, 0);
        // Half a pageblock comes free again, so that there is something to set aside.
        let back: Held = held.drain(1000..1400).collect();
        rig.release(back);
        rig.drain_this_cpu();
        rig.set_min_free_kbytes(rig.min_free_kbytes() + 1600);
        held.push(rig.take(Gfp::ATOMIC | Gfp::NOWARN, 2).unwrap());
        held
    });
    (rig, held)
}

#[test]
fn an_atomic_request_in_need_sets_its_pageblock_aside() {
    let (rig, held) = reserved();
    let zone = rig.zone(ZoneType::Normal);
    assert_eq!(zone.highatomic_frames(), 512);
    assert_eq!(rig.vm_event(VmEvent::ReservedHighatomic), 1);
    let (pfn, _) = *held.last().unwrap();
    assert_eq!(rig.pageblock_migratetype(pfn), Some(MigrateType::HighAtomic));
    rig.run(|_| rig.release(held));
}

#[test]
fn requests_with_time_or_room_set_nothing_aside() {
    let rig = Rig::flat();
    let zone = rig.zone(ZoneType::Normal);
    rig.run(|_| {
        let easy = rig.take(Gfp::ATOMIC, 2).unwrap();
        let mut held = rig.exhaust(Gfp::KERNEL | QUIET, 2);
        for (gfp, order) in [
            (Gfp::KERNEL | Gfp::HIGH | QUIET, 2),
            (Gfp::ATOMIC | Gfp::NOMEMALLOC | QUIET, 2),
            (Gfp::NOWAIT | Gfp::MEMALLOC, 2),
            (Gfp::ATOMIC | QUIET, 0),
        ] {
            held.push(rig.take(gfp, order).unwrap());
            assert_eq!(zone.highatomic_frames(), 0, "{gfp} order {order}");
        }
        held.push(rig.take(Gfp::ATOMIC | QUIET, 2).unwrap());
        assert_eq!(zone.highatomic_frames(), 512);
        rig.release(held.into_iter().chain([easy]));
    });
}

#[test]
fn others_do_not_get_at_the_reserve_and_atomic_requests_do() {
    let (rig, mut held) = reserved();
    let zone = rig.zone(ZoneType::Normal);
    let (pfn, _) = *held.last().unwrap();
    let reserved = |pfn: kmem::Pfn| rig.pageblock_migratetype(pfn) == Some(MigrateType::HighAtomic);
    rig.run(|_| {
        rig.set_min_free_kbytes(0);
        for (gfp, order) in [(Gfp::NOWAIT, 0), (Gfp::NOWAIT | Gfp::MOVABLE, 3)] {
            let ordinary = rig.exhaust(gfp, order);
            assert!(ordinary.iter().all(|(pfn, _)| !reserved(*pfn)), "{gfp}");
            held.extend(ordinary);
        }
        assert!(zone.free_frames() > 0, "the reserve is left");
        let atomic = rig.take(Gfp::ATOMIC | QUIET, 2).unwrap();
        assert!(reserved(atomic.0));
        assert_eq!(atomic.0.0 >> 9, pfn.0 >> 9);
        held.push(atomic);
        // In the last resort a single atomic page as well.
        let single = rig.take(Gfp::ATOMIC | QUIET, 0).unwrap();
        assert!(reserved(single.0));
        held.push(single);
        rig.release(held);
    });
}

#[test]
fn direct_reclaim_in_vain_gives_the_reserve_back() {
    let (rig, mut held) = reserved();
    let zone = rig.zone(ZoneType::Normal);
    rig.run(|_| {
        rig.set_min_free_kbytes(0);
        held.extend(rig.exhaust(Gfp::NOWAIT, 0));
        assert_eq!(zone.highatomic_frames(), 512);
        // NORETRY leaves each zone its last one.
        assert_eq!(rig.take(Gfp::KERNEL | QUIET, 0), Err(AllocError::NoMemory));
        assert_eq!(zone.highatomic_frames(), 512);
        held.push(rig.take(Gfp::KERNEL | Gfp::NOWARN, 0).unwrap());
        assert_eq!(zone.highatomic_frames(), 0);
        let (pfn, _) = *held.last().unwrap();
        assert_eq!(rig.pageblock_migratetype(pfn), Some(MigrateType::Unmovable));
        rig.release(held);
    });
}

#[test]
fn at_most_a_hundredth_of_a_zone_is_set_aside() {
    // 16384 frames: a hundredth is less than a pageblock, and one pageblock is allowed.
    let (rig, mut held) = reserved();
    let zone = rig.zone(ZoneType::Normal);
    rig.run(|_| {
        let more = rig.exhaust(Gfp::ATOMIC | QUIET, 3);
        assert!(!more.is_empty());
        held.extend(more);
        assert_eq!(zone.highatomic_frames(), 512);
        rig.release(held);
    });
}

#[test]
fn one_frame_of_a_reserved_pageblock_goes_back_to_it() {
    let (rig, mut held) = reserved();
    rig.run(|_| {
        let block = held.pop().unwrap();
        rig.release([block]);
        rig.drain_this_cpu();
        assert!(rig.buddy_order(block.0).is_some());
        rig.set_min_free_kbytes(0);
        let ordinary = rig.exhaust(Gfp::NOWAIT, 0);
        assert!(ordinary.iter().all(|(pfn, _)| pfn.0 >> 9 != block.0.0 >> 9));
        rig.release(held.into_iter().chain(ordinary));
    });
}

#[test]
fn a_fragmented_machine_keeps_the_reserve_from_those_who_do_not_wait() {
    let (rig, mut held) = reserved();
    rig.run(|_| {
        rig.set_min_free_kbytes(0);
        held.extend(rig.exhaust(Gfp::NOWAIT, 0));
        // Plenty of single frames, and no two of them together outside of the reserve.
        let mut n = 0;
        let (odd, even): (Held, Held) = held.into_iter().partition(|(pfn, order)| {
            n += 1;
            *order == 0 && pfn.0 % 2 == 1 && n > 100 && n < 4000
        });
        rig.release(odd);
        rig.drain_this_cpu();
        assert_eq!(rig.take(Gfp::NOWAIT, 2), Err(AllocError::NoMemory));
        let atomic = rig.take(Gfp::ATOMIC | QUIET, 2).unwrap();
        rig.release(even.into_iter().chain([atomic]));
    });
}

#[test]
fn all_but_the_last_pageblock_are_given_back_before_anybody_fails() {
    // A hundredth of 512 MiB: more than one pageblock.
    let rig = Rig::new(kmem_hosted::Shape::no_dma(512 << 20), kmem::Config::default());
    let zone = rig.zone(ZoneType::Normal);
    rig.run(|_| {
        let mut held = rig.exhaust(Gfp::KERNEL | QUIET, 0);
        rig.release(held.drain(10_000..12_000));
        rig.drain_this_cpu();
        rig.set_min_free_kbytes(rig.min_free_kbytes() + 8000);
        held.extend(rig.exhaust(Gfp::ATOMIC | QUIET, 3));
        assert_eq!(zone.highatomic_frames(), 1024);
        rig.set_min_free_kbytes(0);
        held.extend(rig.exhaust(Gfp::NOWAIT, 0));
        let last = held.pop().unwrap();
        let inside = |(pfn, order): &(kmem::Pfn, u32)| {
            *order == 3 && rig.pageblock_migratetype(*pfn) == Some(MigrateType::HighAtomic)
        };
        rig.release(held.iter().copied().filter(inside).take(20));
        held.retain(|(pfn, _)| rig.pfn_to_page(*pfn).unwrap().page_count() > 0);
        held.extend(rig.exhaust(Gfp::NOWAIT, 0));
        assert_eq!(zone.highatomic_frames(), 1024);
        held.push(rig.take(Gfp::KERNEL | QUIET, 0).unwrap());
        assert_eq!(zone.highatomic_frames(), 512);
        rig.release(held.into_iter().chain([last]));
    });
}

/// Free frames in the pageblock of a frame.
fn free_beside(rig: &Rig, pfn: kmem::Pfn) -> u64 {
    let first = pfn.0 & !511;
    (first..first + 512).filter(|n| rig.buddy_order(kmem::Pfn(*n)).is_some()).count() as u64
}

#[test]
fn what_is_free_in_the_reserve_is_not_free_for_others() {
    let (rig, mut held) = reserved();
    let zone = rig.zone(ZoneType::Normal);
    let (pfn, _) = *held.last().unwrap();
    rig.run(|_| {
        rig.set_min_free_kbytes(64);
        held.extend(rig.exhaust(Gfp::NOWAIT, 0));
        let inside = free_beside(&rig, pfn);
        assert!(inside > 16);
        assert_eq!(zone.free_frames(), 16 + inside, "min, and the reserve on top");
        // Neither does the fast path count it.
        rig.release(held.drain(..1000));
        rig.drain_this_cpu();
        let (free, inside) = (zone.free_frames(), free_beside(&rig, pfn));
        let crossed = rig.vm_event(VmEvent::WmarkLow);
        for (low, slow) in [(free - inside - 1, 0), (free - inside, 1)] {
            let marks = kmem::zone::Watermarks { min: 16, low, high: free, promo: free };
            rig.set_watermarks(zone, marks);
            rig.release([rig.take(Gfp::KERNEL, 0).unwrap()]);
            rig.drain_this_cpu();
            assert_eq!(rig.vm_event(VmEvent::WmarkLow) - crossed, slow);
        }
        rig.release(held);
    });
}

#[test]
fn atomic_requests_look_into_their_reserve_first() {
    let (rig, mut held) = reserved();
    rig.run(|_| {
        // Elsewhere is room as well, and the machine as short of memory as before.
        let elsewhere: Held = held.drain(8000..8064).collect();
        rig.release(elsewhere);
        rig.drain_this_cpu();
        let min = rig.min_free_kbytes() + 4 * 64;
        rig.set_min_free_kbytes(min);
        assert!(rig.take(Gfp::KERNEL | QUIET, 2).is_err());
        let (pfn, order) = rig.take(Gfp::ATOMIC | QUIET, 2).unwrap();
        assert_eq!(rig.pageblock_migratetype(pfn), Some(MigrateType::HighAtomic));
        rig.release(held.into_iter().chain([(pfn, order)]));
    });
}
