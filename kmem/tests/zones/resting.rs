//! What rests on a CPU's lists goes back to the buddy \[P3\].

use super::{MOVABLE, on_lists};
use kmem::{Gfp, ZoneType, vmstat::VmEvent};
use kmem_test_support::Rig;

/// More than a list starts with, fewer than it may hold.
const BURST: usize = 24;

/// Takes that many single pages and gives them back.
fn burst(rig: &Rig, n: usize) {
    let pages: Vec<_> = (0..n).map(|_| rig.alloc_page(Gfp::KERNEL).unwrap()).collect();
    pages.into_iter().for_each(|page| rig.__free_page(page).unwrap());
}

#[test]
fn what_was_used_stays_and_what_rests_goes() {
    let rig = Rig::flat();
    rig.run(|_| {
        burst(&rig, BURST);
        let held = on_lists(&rig);
        assert!(held > 0, "the lists are in use");
        // As many were taken as lie there.
        assert_eq!((rig.vmstat_update(), on_lists(&rig)), (0, held));
        burst(&rig, 2);
        assert_eq!(on_lists(&rig), held);
        assert_eq!((rig.vmstat_update(), on_lists(&rig)), (held - 2, 2));
        assert_eq!((rig.vmstat_update(), on_lists(&rig)), (2, 0));
        assert_eq!(rig.vmstat_update(), 0);
        // The list is as good as before, and better: it grew, since it had run over.
        burst(&rig, BURST);
        assert!(on_lists(&rig) >= held);
        let spills = rig.vm_event(VmEvent::PcpSpill);
        burst(&rig, BURST);
        assert_eq!(rig.vm_event(VmEvent::PcpSpill), spills, "all that was given found room");
        // When it has rested for a while, it is as it was at first.
        (0..8).for_each(|_| _ = rig.vmstat_update());
        assert_eq!(on_lists(&rig), 0);
        burst(&rig, BURST);
        assert_eq!(on_lists(&rig), held);
    });
}

#[test]
fn the_hot_end_stays() {
    let rig = Rig::flat();
    rig.run(|_| {
        burst(&rig, BURST);
        rig.vmstat_update();
        let page = rig.alloc_page(Gfp::KERNEL).unwrap();
        let hot = rig.page_to_pfn(page);
        rig.__free_page(page).unwrap();
        rig.vmstat_update();
        assert_eq!(on_lists(&rig), 1);
        let page = rig.alloc_page(Gfp::KERNEL).unwrap();
        assert_eq!(rig.page_to_pfn(page), hot);
        rig.__free_page(page).unwrap();
    });
}

#[test]
fn each_list_is_looked_at_by_itself() {
    let rig = Rig::pc();
    rig.run(|_| {
        let take = |gfp, order| {
            let page = rig.alloc_pages(gfp, order).unwrap();
            rig.__free_pages(page, order).unwrap();
        };
        let all = [(Gfp::KERNEL, 0), (Gfp::HIGHUSER_MOVABLE, 0), (Gfp::KERNEL, 1), (Gfp::DMA, 0)];
        all.iter().for_each(|(gfp, order)| take(*gfp, *order));
        rig.vmstat_update();
        take(Gfp::KERNEL, 1);
        rig.vmstat_update();
        assert_eq!(on_lists(&rig), 2, "the block of order 1 that was in use");
    });
}

#[test]
fn the_other_cpus_lists_are_their_own() {
    let rig = Rig::flat();
    let on = |cpu, f: &dyn Fn() -> u64| rig.run_on(Some(cpu), None, |_| f()).unwrap();
    on(0, &|| {
        burst(&rig, BURST);
        rig.vmstat_update()
    });
    let held = on_lists(&rig);
    assert_eq!((on(1, &|| rig.vmstat_update()), on_lists(&rig)), (0, held));
    assert_eq!((on(0, &|| rig.vmstat_update()), on_lists(&rig)), (held, 0));
    // On no CPU there is nothing to look at.
    assert_eq!(rig.vmstat_update(), 0);
}

#[test]
fn one_task_keeps_house_for_all_cpus() {
    let rig = Rig::flat();
    let on = |cpu, f: &dyn Fn()| rig.run_on(Some(cpu), None, |_| f()).unwrap();
    (0..2).for_each(|cpu| on(cpu, &|| burst(&rig, BURST)));
    let held = on_lists(&rig);
    // As many were taken as lie there. Nobody is on any CPU.
    rig.vmstat_shepherd();
    assert_eq!(on_lists(&rig), held);
    on(0, &|| burst(&rig, 2));
    on(1, &|| rig.vmstat_shepherd());
    assert_eq!(on_lists(&rig), 2, "those of CPU 0 that were in use");
    rig.vmstat_shepherd();
    assert_eq!(on_lists(&rig), 0);
    rig.assert_conserved();
}

#[test]
fn who_was_asked_to_keep_house_does_it_once() {
    let rig = Rig::flat();
    let on = |f: &dyn Fn()| rig.run_on(Some(1), None, |_| f()).unwrap();
    on(&|| burst(&rig, BURST));
    rig.vmstat_shepherd();
    let held = on_lists(&rig);
    on(&|| {
        // Refills, after which requests of others are looked for.
        let others = [Gfp::KERNEL | Gfp::MOVABLE, Gfp::KERNEL | Gfp::RECLAIMABLE];
        let blocks = others.map(|gfp| rig.take(gfp, 0).unwrap());
        assert!(on_lists(&rig) > held, "{} of {held}", on_lists(&rig));
        rig.release(blocks);
    });
    rig.assert_conserved();
}

#[test]
fn who_has_nothing_is_not_asked_to_keep_house() {
    let rig = Rig::flat();
    let zone = rig.zone(ZoneType::Normal);
    let high = |cpu| rig.pcp_limits(zone, cpu).1;
    let first = high(1);
    let grow = |cpu| {
        rig.run_on(Some(cpu), None, |_| super::burst(&rig, MOVABLE, 0, 400)).unwrap();
        assert!(high(cpu) > first);
        rig.drain_all_pages();
    };
    grow(1);
    // An empty list is put back to what it was, and then nobody is asked any more.
    (0..64).for_each(|_| rig.vmstat_shepherd());
    assert_eq!(high(1), first);
    let asked = || (0..2).map(|cpu| rig.hosted().stats(cpu).unwrap().ipis).sum::<u64>();
    let before = asked();
    rig.vmstat_shepherd();
    assert_eq!(asked(), before);
    // Nor is who is out of service.
    grow(1);
    rig.machine().cpu_down(1).unwrap();
    let before = asked();
    rig.vmstat_shepherd();
    assert_eq!(asked(), before);
    rig.machine().cpu_up(1).unwrap();
    rig.assert_conserved();
}

#[test]
fn a_list_that_never_held_anything_takes_what_it_may() {
    let rig = Rig::flat();
    let page = rig.run(|_| rig.take(Gfp::KERNEL, 0).unwrap());
    rig.run_on(Some(1), None, |_| rig.release([page])).unwrap();
    assert_eq!(rig.vm_event(VmEvent::PcpSpill), 0);
}
