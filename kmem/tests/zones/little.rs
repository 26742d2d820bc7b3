//! What per-CPU lists do while a zone has little left, which no watermark has noticed yet \[P3\].

use super::{MOVABLE, QUIET, burst, on_lists, without_marks};
use kmem::{Config, Gfp, Pfn, ZoneType, vmstat::VmEvent, zone::Zone};
use kmem_hosted::Shape;
use kmem_test_support::{Held, MIB, Rig};

fn machine() -> Rig {
    Rig::new(Shape::no_dma(64 * MIB).cpus(1), Config::default())
}

/// Takes blocks that no list has until this much is free above the high watermark.
fn leave(rig: &Rig, zone: &Zone, above: u64) -> Held {
    let mut held = Vec::new();
    for order in [10, 5] {
        while zone.free_frames() >= zone.watermarks().high + above + (1 << order) {
            held.push(rig.take(MOVABLE, order).unwrap());
        }
    }
    held
}

/// Lists grow, then little is left, and `others` comes by a list of another mobility, given pages that it may free.
fn put_back_when(others: impl Fn(&Rig, &mut Held)) {
    let rig = machine();
    let zone = rig.zone(ZoneType::Normal);
    rig.run(|_| {
        let high = || rig.pcp_limits(zone, 0).1;
        let first = high();
        (0..=4).for_each(|order| burst(&rig, MOVABLE, order, 800 >> order));
        assert!(high() > first);
        let grown = on_lists(&rig);
        // Half of what all lists could hold is the limit, and that is an eighth of the zone.
        let eighth = zone.managed_frames() / 8;
        let held = leave(&rig, zone, eighth * 3 / 4);
        let mut pages: Held = (0..64).map(|_| rig.take(Gfp::KERNEL, 0).unwrap()).collect();
        assert!(on_lists(&rig) >= grown, "there is plenty");
        let more = leave(&rig, zone, eighth / 4);
        assert!(on_lists(&rig) >= grown, "nobody came by a list");
        others(&rig, &mut pages);
        assert!(on_lists(&rig) < grown / 2, "{} of {grown}", on_lists(&rig));
        assert_eq!(high(), first);
        [pages, more, held].into_iter().for_each(|blocks| rig.release(blocks));
    });
    rig.assert_conserved();
}

#[test]
fn lists_that_nobody_uses_are_put_back_when_another_runs_empty() {
    put_back_when(|rig, pages| pages.extend((0..64).map(|_| rig.take(Gfp::KERNEL, 0).unwrap())));
}

#[test]
fn lists_that_nobody_uses_are_put_back_when_another_runs_over() {
    put_back_when(|rig, pages| rig.release(pages.drain(..)));
}

#[test]
fn a_refill_that_finds_nothing_is_none() {
    let rig = machine();
    without_marks(&rig);
    let gfp = MOVABLE | QUIET;
    rig.run(|_| {
        let (odd, even): (Held, Held) =
            rig.exhaust(gfp, 0).into_iter().partition(|(pfn, _)| pfn.0 % 2 == 1);
        rig.release(odd);
        let before = rig.vm_event(VmEvent::PcpRefill);
        assert!(rig.take(gfp, 1).is_err());
        assert_eq!(rig.vm_event(VmEvent::PcpRefill), before);
        rig.release(even);
    });
    rig.assert_conserved();
}

#[test]
fn a_refill_breaks_less_up_for_blocks_that_nobody_asked_for() {
    let rig = machine();
    let zone = rig.zone(ZoneType::Normal);
    rig.run(|_| {
        let mut taken = Held::new();
        // What a refill that finds no single pages leaves on the list.
        let mut kept = || {
            rig.drain_this_cpu();
            taken.push(rig.take(Gfp::KERNEL, 0).unwrap());
            on_lists(&rig)
        };
        let plenty = kept();
        let held = leave(&rig, zone, 512);
        let little = kept();
        assert!(little > 0 && little < plenty * 2 / 3, "{little}, {plenty} with plenty");
        // What lies there by itself is taken at once.
        let some = (0..4 * plenty).map(|_| rig.take(Gfp::KERNEL, 0).unwrap());
        let (odd, even): (Held, Held) = some.partition(|(pfn, _)| pfn.0 % 2 == 1);
        rig.release(odd);
        assert_eq!(kept(), plenty);
        [taken, even, held].into_iter().for_each(|blocks| rig.release(blocks));
    });
    rig.assert_conserved();
}

/// A mobility whose pageblocks have one block left is given that, and no pageblock for more.
#[test]
fn a_refill_claims_no_pageblock_for_blocks_that_nobody_asked_for() {
    let rig = machine();
    let zone = rig.zone(ZoneType::Normal);
    rig.run(|_| {
        let first = rig.take(Gfp::KERNEL, 0).unwrap();
        rig.drain_this_cpu();
        let mut held = leave(&rig, zone, 1024 + 512);
        // All that its pageblock has left.
        let block = |pfn: Pfn| pfn.0 >> 9;
        let mut own = vec![first];
        while own.len() < 512 {
            let next = rig.take(Gfp::KERNEL, 0).unwrap();
            assert_eq!(block(next.0), block(first.0));
            own.push(next);
        }
        rig.drain_this_cpu();
        held.extend(leave(&rig, zone, 512));
        rig.release(own.pop());
        rig.drain_this_cpu();
        let looks = || (rig.nr_free(zone)[9..].to_vec(), rig.pageblocks_by_migratetype(zone));
        let before = looks();
        own.push(rig.take(Gfp::KERNEL, 0).unwrap());
        assert_eq!(looks(), before);
        [own, held].into_iter().for_each(|blocks| rig.release(blocks));
    });
    rig.assert_conserved();
}
