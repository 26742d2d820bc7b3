//! Areas of a zone \[P8\]: where CPUs take from, each in its own or all in the same.

use super::{MOVABLE, on_lists, press};
use kmem::{Config, Gfp, Pfn, ZoneType, context::Task};
use kmem_hosted::Shape;
use kmem_test_support::{MIB, Rig};
use proptest::prelude::*;
use std::collections::HashSet;

/// Frames of a line of pageblock descriptors, and of the smallest region.
const REGION: u32 = 8 << 9;

/// Regions of the frames that each CPU gets in turn, `n` single ones at a time.
fn regions(
    rig: &Rig,
    cpus: usize,
    rounds: usize,
    n: usize,
) -> (Vec<HashSet<u32>>, Vec<(Pfn, u32)>) {
    let mut seen = vec![HashSet::new(); cpus];
    let mut held = Vec::new();
    for _ in 0..rounds {
        for (cpu, regions) in seen.iter_mut().enumerate() {
            rig.on(cpu, &Task::new(), |_| {
                for _ in 0..n {
                    let (pfn, order) = rig.take(MOVABLE, 0).unwrap();
                    regions.insert(pfn.0 / REGION);
                    held.push((pfn, order));
                }
            });
        }
    }
    (seen, held)
}

#[test]
fn cpus_with_32_mib_each_take_from_regions_of_their_own() {
    for (mib, cpus) in [(64, 2), (128, 2), (128, 4)] {
        let rig = Rig::new(Shape::no_dma(mib * MIB).cpus(cpus), Config::default());
        // Half of what each has of its own.
        let n = (mib << 8) as usize / cpus / 2 / 16;
        let (seen, held) = regions(&rig, cpus, 16, n);
        for (i, one) in seen.iter().enumerate() {
            for other in &seen[i + 1..] {
                assert!(one.is_disjoint(other), "{mib} MiB, {cpus} CPUs: {one:?} {other:?}");
            }
        }
        rig.run(|_| rig.release(held));
        rig.assert_conserved();
    }
}

#[test]
fn cpus_with_less_share_an_area() {
    let rig = Rig::new(Shape::no_dma(32 * MIB).cpus(2), Config::default());
    let (seen, held) = regions(&rig, 2, 16, 40);
    assert!(!seen[0].is_disjoint(&seen[1]), "{seen:?}");
    rig.run(|_| rig.release(held));
    rig.assert_conserved();
}

/// A CPU whose area has nothing takes from the other's, and what is freed goes back to where it came from.
#[test]
fn what_one_area_has_not_another_has() {
    let rig = Rig::flat();
    let held = rig.on(1, &Task::new(), |_| {
        let held = rig.exhaust(Gfp::ATOMIC | Gfp::NOWARN, 9);
        assert!(held.len() > 24, "{} of 32 pageblocks", held.len());
        held
    });
    rig.on(0, &Task::new(), |_| rig.release(held));
    rig.assert_conserved();
}

#[test]
fn while_a_zone_is_short_all_take_from_the_same_area() {
    let rig = Rig::flat();
    let zone = rig.zone(ZoneType::Normal);
    let marks = rig.run(|_| press(&rig, zone));
    rig.drain_all_pages();
    let (seen, held) = regions(&rig, 2, 8, 16);
    // The areas have the regions in turn.
    assert!(seen.iter().flatten().all(|region| region % 2 == 0), "{seen:?}");
    rig.set_watermarks(zone, marks);
    rig.run(|_| rig.release(held));
    rig.drain_all_pages();
    // Then each is back to its own.
    let (seen, held) = regions(&rig, 2, 8, 64);
    assert!(seen[0].is_disjoint(&seen[1]), "{seen:?}");
    rig.run(|_| rig.release(held));
    rig.assert_conserved();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// What lies on one CPU's list may be of any area, in any order: all of it goes back where it came from.
    #[test]
    fn lists_of_frames_of_several_areas_are_drained(
        areas in prop_oneof![Just(2), Just(4), Just(8)],
        order in 0u32..=4,
        picks in prop::collection::vec(any::<prop::sample::Index>(), 1..200),
    ) {
        let shape = Shape::no_dma(areas as u64 * 32 * MIB).cpus(areas);
        let rig = Rig::new(shape, Config::default());
        let mut held = Vec::new();
        for cpu in 0..areas {
            rig.on(cpu, &Task::new(), |_| {
                held.extend((0..64).map(|_| rig.take(MOVABLE, order).unwrap()));
            });
        }
        let regions: HashSet<_> = held.iter().map(|(pfn, _)| pfn.0 / REGION).collect();
        prop_assert!(regions.len() >= areas, "{:?}", regions);
        rig.run(|_| {
            let mut picked = Vec::new();
            for pick in &picks {
                if !held.is_empty() {
                    picked.push(held.swap_remove(pick.index(held.len())));
                }
            }
            rig.release(picked);
            rig.release(held);
            prop_assert!(rig.drain_this_cpu() > 0);
            Ok(())
        })?;
        rig.drain_all_pages();
        prop_assert_eq!(on_lists(&rig), 0);
        rig.assert_conserved();
    }
}
