//! How much the per-CPU lists hold \[P3\].

use super::{MOVABLE, burst, on_lists, press};
use kmem::{Config, Gfp, ZoneType, vmstat::VmEvent, zone::Watermarks};
use kmem_hosted::Shape;
use kmem_test_support::{MIB, Rig};
use proptest::prelude::*;

const RECLAIMABLE: Gfp = Gfp::KERNEL.union(Gfp::RECLAIMABLE);

/// The orders below a pageblock's whose blocks lie on lists.
const LISTED: std::ops::RangeInclusive<u32> = 0..=4;

fn machine(mib: u64, cpus: usize) -> Rig {
    Rig::new(Shape::no_dma(mib * MIB).cpus(cpus), Config::default())
}

#[test]
fn orders_with_lists_keep_what_was_freed() {
    let rig = machine(512, 1);
    rig.run(|_| {
        for (gfp, whole) in [(Gfp::KERNEL, true), (MOVABLE, true), (RECLAIMABLE, false)] {
            for order in 0..=10 {
                rig.drain_this_cpu();
                rig.release([rig.take(gfp, order).unwrap()]);
                let kept = on_lists(&rig) >= 1 << order;
                let listed = LISTED.contains(&order) || order == 9 && whole;
                assert_eq!(kept, listed, "order {order}, {gfp:?}");
            }
        }
    });
    rig.assert_conserved();
}

/// Who only gives fills lists, and needs them longer.
#[test]
fn a_list_grows_with_plenty_and_is_put_back_when_little_is_left() {
    let rig = machine(64, 1);
    rig.run(|_| {
        let zone = rig.zone(ZoneType::Normal);
        let high = || rig.pcp_limits(zone, 0).1;
        let start = high();
        let grown = || {
            burst(&rig, MOVABLE, 0, 1000);
            high()
        };
        let longest = grown();
        assert!(longest > start, "{longest} of {start}");
        assert_eq!(grown(), longest, "for ever it does not");
        let mut held = Vec::new();
        while zone.free_frames() > zone.watermarks().high + 200 {
            held.push(rig.take(MOVABLE, 0).unwrap());
        }
        // One that runs empty and over while there is little.
        for _ in 0..8 {
            let some: Vec<_> = (0..longest).map(|_| rig.take(MOVABLE, 0).unwrap()).collect();
            rig.release(some);
            assert!(high() <= start, "{} of {start}", high());
        }
        rig.release(held);
        assert_eq!(high(), longest, "with plenty it grows again");
    });
    rig.assert_conserved();
}

/// Refills while CPU 0 takes blocks that CPU 1 gives back.
fn refills(rig: &Rig, order: u32) -> u64 {
    let on = |cpu, f: &mut dyn FnMut()| rig.run_on(Some(cpu), None, |_| f()).unwrap();
    let before = rig.vm_event(VmEvent::PcpRefill);
    let mut held = Vec::new();
    on(0, &mut || held.extend((0..256).map(|_| rig.take(Gfp::KERNEL, order).unwrap())));
    let after = rig.vm_event(VmEvent::PcpRefill);
    on(1, &mut || rig.release(held.drain(..)));
    rig.drain_all_pages();
    after - before
}

#[test]
fn pressure_shortens_lists_of_every_order_and_its_end_gives_it_back() {
    let rig = machine(512, 2);
    let zone = rig.zone(ZoneType::Normal);
    for order in LISTED {
        let before = refills(&rig, order);
        assert_eq!(refills(&rig, order), before, "order {order}");
        let marks = rig.run(|_| press(&rig, zone));
        rig.drain_all_pages();
        let pressed = refills(&rig, order);
        // By more than a half where blocks are large.
        let times = if order == 0 { 2 } else { 4 };
        assert!(pressed >= (times * before).min(256), "order {order}: {pressed}, before {before}");
        rig.set_watermarks(zone, marks);
        // A free that goes to the buddy ends it.
        rig.run(|_| burst(&rig, Gfp::KERNEL, 10, 1));
        assert_eq!(refills(&rig, order), before, "order {order}, afterwards");
    }
    rig.assert_conserved();
}

/// What a CPU frees after its lists were drained since memory was short does not fill them again.
#[test]
fn a_list_drained_under_pressure_stays_short() {
    let rig = machine(64, 1);
    let zone = rig.zone(ZoneType::Normal);
    rig.run(|_| {
        burst(&rig, MOVABLE, 0, 1000);
        let (_, grown) = rig.pcp_limits(zone, 0);
        let held: Vec<_> = (0..grown).map(|_| rig.take(MOVABLE, 0).unwrap()).collect();
        let marks = press(&rig, zone);
        rig.drain_this_cpu();
        rig.release(held);
        assert!(on_lists(&rig) < u64::from(grown) / 2, "{} of {grown}", on_lists(&rig));
        rig.set_watermarks(zone, marks);
    });
    rig.assert_conserved();
}

/// The last of a zone does not end on one CPU's list.
#[test]
fn a_refill_takes_a_part_of_what_is_above_the_watermark() {
    let rig = machine(64, 1);
    let zone = rig.zone(ZoneType::Normal);
    rig.run(|_| {
        let marks = zone.watermarks();
        let free = zone.free_frames();
        rig.set_watermarks(zone, Watermarks { min: 0, low: free - 40, high: free, promo: free });
        let page = rig.take(MOVABLE, 0).unwrap();
        assert!((1..=40 / 8).contains(&on_lists(&rig)), "{}", on_lists(&rig));
        rig.set_watermarks(zone, marks);
        rig.release([page]);
    });
    rig.assert_conserved();
}

/// Traffic that swings on a machine most of whose memory is in use finds lists as long as one that is empty has.
#[test]
fn a_machine_that_is_nearly_full_has_long_lists() {
    let rig = machine(512, 1);
    let zone = rig.zone(ZoneType::Normal);
    let swing = || {
        let before = [VmEvent::PcpRefill, VmEvent::PcpSpill].map(|e| rig.vm_event(e));
        rig.run(|_| {
            (0..20).for_each(|_| {
                burst(&rig, MOVABLE, 0, 200);
                // Less than a batch rests.
                rig.vmstat_update();
            });
        });
        let after = [VmEvent::PcpRefill, VmEvent::PcpSpill].map(|e| rig.vm_event(e));
        after.iter().zip(before).map(|(now, before)| now - before).sum::<u64>()
    };
    swing();
    assert_eq!(swing(), 0, "it is long enough");
    let held = rig.run(|_| {
        let full = || zone.free_frames() < zone.managed_frames() / 16;
        std::iter::from_fn(|| (!full()).then(|| rig.take(MOVABLE, 10).unwrap())).collect::<Vec<_>>()
    });
    assert_eq!(swing(), 0, "as it was");
    rig.run(|_| rig.drain_this_cpu());
    swing();
    assert_eq!(swing(), 0, "and grows as long again");
    rig.run(|_| rig.release(held));
    rig.assert_conserved();
}

/// Two CPUs' lists of all mobilities would hold more than an eighth of 64 MiB if each were as long as it may be.
#[test]
fn lists_that_nobody_uses_leave_room_to_those_in_use() {
    let rig = machine(64, 2);
    let (first, second) = rig
        .run_on(Some(0), None, |_| {
            // What the lists of a mobility hold after traffic that swings.
            let kept = |gfp| {
                for order in LISTED {
                    (0..16).for_each(|_| burst(&rig, gfp, order, 400 >> order));
                }
                rig.drain_this_cpu();
                LISTED.for_each(|order| burst(&rig, gfp, order, 400 >> order));
                on_lists(&rig)
            };
            let first = kept(Gfp::KERNEL);
            let crowded = kept(MOVABLE);
            assert!((first / 2..first).contains(&crowded), "{crowded} of {first}");
            // Housekeeping finds that the others are not used.
            (0..64).for_each(|_| _ = rig.vmstat_update());
            (first, kept(MOVABLE))
        })
        .unwrap();
    assert_eq!(first, second);
    rig.assert_conserved();
}

/// However little an eighth of a zone is for each CPU, some of it is left to grow by, and the only list in use gets that and
/// keeps it.
#[test]
fn lists_of_tiny_zones_grow_too() {
    for (cpus, least) in [(22, 64), (30, 40)] {
        let rig = machine(64, cpus);
        let zone = rig.zone(ZoneType::Normal);
        rig.run_on(Some(0), None, |_| {
            let high = || rig.pcp_limits(zone, 0).1;
            assert!(high() < 8);
            (0..8).for_each(|_| burst(&rig, MOVABLE, 0, 400));
            for _ in 0..8 {
                burst(&rig, MOVABLE, 0, 400);
                assert!(high() >= least, "{} with {cpus} CPUs", high());
            }
        })
        .unwrap();
        rig.assert_conserved();
    }
}

/// Blocks of two mobilities come and go alike, and there is not room for long lists of both: neither is served better because
/// it came first.
#[test]
fn mobilities_in_use_alike_have_lists_alike() {
    let rig = machine(64, 4);
    rig.run_on(Some(0), None, |_| {
        let events = |gfp| {
            let before = [VmEvent::PcpRefill, VmEvent::PcpSpill].map(|e| rig.vm_event(e));
            LISTED.for_each(|order| burst(&rig, gfp, order, 160 >> order));
            let after = [VmEvent::PcpRefill, VmEvent::PcpSpill].map(|e| rig.vm_event(e));
            after.iter().zip(before).map(|(now, before)| now - before).sum::<u64>()
        };
        (0..20).for_each(|_| _ = events(MOVABLE));
        let mut sums = [0; 2];
        for round in 0..60 {
            let now = [events(MOVABLE), events(Gfp::KERNEL)];
            rig.vmstat_update();
            // They have had the time to settle.
            if round >= 30 {
                sums = [sums[0] + now[0], sums[1] + now[1]];
            }
        }
        assert!(sums.iter().max() <= sums.iter().min().map(|n| 2 * n).as_ref(), "{sums:?}");
    })
    .unwrap();
    rig.assert_conserved();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Whatever goes on, an eighth of a zone is the most that lies on lists.
    #[test]
    fn lists_hold_an_eighth_of_a_zone_at_most(mib in 1..160_u64, cpus in 1..9_usize) {
        let rig = machine(mib, cpus);
        let zone = rig.zone(ZoneType::Normal);
        let managed = zone.managed_frames();
        let mut most = 0;
        for cpu in 0..cpus {
            rig.run_on(Some(cpu), None, |_| {
                for order in LISTED {
                    for gfp in [Gfp::KERNEL, MOVABLE, RECLAIMABLE] {
                        // Half of what is free, so that nobody is short of memory.
                        burst(&rig, gfp, order, 400.min(zone.free_frames() as usize / 2) >> order);
                    }
                }
                most = on_lists(&rig);
            })
            .unwrap();
        }
        prop_assert!(most <= managed / 8, "{most} of {managed}");
        // Where there is room for lists at all.
        prop_assert!(mib * 256 / cpus as u64 <= 2048 || most > 0);
        rig.drain_all_pages();
        rig.assert_conserved();
    }
}
