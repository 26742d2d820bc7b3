//! A machine's thread that gives back what rests on per-CPU lists \[P3\].

mod common;

use common::until;
use kmem::Gfp;
use kmem_hosted::{Machine, Shape};
use std::{thread, time::Duration};

const MILLISECOND: u64 = 1_000_000;

fn on_lists(m: &Machine) -> u64 {
    m.zones().iter().flat_map(|zone| m.pcp_frames(zone)).sum()
}

/// Takes single pages and gives them back.
fn burst(m: &Machine) {
    m.run(|_| {
        let pages: Vec<_> = (0..16).map(|_| m.alloc_page(Gfp::KERNEL).unwrap()).collect();
        pages.into_iter().for_each(|page| m.__free_page(page).unwrap());
    })
    .unwrap();
}

#[test]
fn what_rests_goes_back_at_intervals() {
    let m = Machine::new(Shape::no_dma(64 << 20)).unwrap();
    let free = || m.zones().iter().map(|zone| zone.free_frames()).sum::<u64>();
    let before = free() + on_lists(&m);
    m.set_stat_interval(MILLISECOND);
    burst(&m);
    until("empty lists", || on_lists(&m) == 0);
    // Off, and the round that went on is over.
    m.set_stat_interval(0);
    thread::sleep(Duration::from_millis(5));
    burst(&m);
    thread::sleep(Duration::from_millis(20));
    assert!(on_lists(&m) > 0);
    m.set_stat_interval(MILLISECOND);
    // What is on its way is in neither place for a moment.
    until("empty lists, and all free", || on_lists(&m) == 0 && free() == before);
}

/// A CPU that somebody runs on is not interrupted; it keeps house when it comes by a slower path.
#[test]
fn busy_cpus_keep_house_by_the_way() {
    let m = Machine::new(Shape::no_dma(64 << 20).cpus(1)).unwrap();
    let interrupts = || m.hosted().stats(0).unwrap().ipis;
    m.run(|_| {
        let before = interrupts();
        m.set_stat_interval(MILLISECOND);
        let pages: Vec<_> = (0..16).map(|_| m.alloc_page(Gfp::KERNEL).unwrap()).collect();
        pages.into_iter().for_each(|page| m.__free_page(page).unwrap());
        // It does not sleep, and there is no other CPU.
        until("short lists", || {
            let page = m.alloc_page(Gfp::KERNEL | Gfp::COLD).unwrap();
            m.__free_page(page).unwrap();
            on_lists(&m) < 16
        });
        assert_eq!(interrupts(), before);
    })
    .unwrap();
}
