//! Memory exhausted in every zone and from every context \[P4, O3, C1\]: errors and reports, no panic,
//! and everything works once it is freed again.

use kmem::{
    AllocError, Config, Gfp, Kmem, Page, Pfn, ZoneType,
    context::Section,
    fault::FaultPlan,
    platform::{Level, Platform},
    types::PfnRange,
};
use kmem_hosted::{Hosted, Machine, ReportLog, Shape};
use std::{
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

const MIB: u64 = 1 << 20;

fn shapes() -> [(&'static str, Shape); 5] {
    [
        (
            "64-bit PC",
            Shape::x86_64(48 * MIB).zones(&[
                (ZoneType::Dma, 16 * MIB),
                (ZoneType::Dma32, 32 * MIB),
                (ZoneType::Normal, u64::MAX),
            ]),
        ),
        ("64-bit PC with lists", Shape::x86_64(600 * MIB).without_contents()),
        ("32-bit PC with high memory", Shape::x86_32(1200 * MIB).without_contents()),
        ("no DMA zone", Shape::no_dma(8 * MIB)),
        ("two nodes", Shape::numa(2, 24 * MIB).without_contents()),
    ]
}

fn machine(shape: Shape) -> (Arc<Machine>, Arc<ReportLog>) {
    let machine = Machine::without_kswapd(shape, Config::default()).unwrap();
    let log = Arc::new(ReportLog::new());
    let kept = Arc::clone(&log);
    machine.hosted().set_report_sink(Arc::new(move |level, text| kept.push(level, text)));
    (Arc::new(machine), log)
}

/// Live blocks of one order, linked through their pages: nothing else is needed to remember them.
#[derive(Default)]
struct Chain {
    head: AtomicU32,
    blocks: AtomicU64,
}

impl Chain {
    fn push(&self, kmem: &Kmem<Hosted>, page: &Page) {
        let pfn = kmem.page_to_pfn(page).unwrap().0;
        // Frame numbers are stored plus one; zero ends the chain.
        page.set_private(self.head.swap(pfn + 1, SeqCst));
        self.blocks.fetch_add(1, SeqCst);
    }

    fn free(&self, kmem: &Kmem<Hosted>, order: u32) {
        while let Some(pfn) = self.head.load(SeqCst).checked_sub(1) {
            let page = kmem.pfn_to_page(Pfn(pfn)).unwrap();
            self.head.store(page.private(), SeqCst);
            kmem.__free_pages(page, order).unwrap();
            self.blocks.fetch_sub(1, SeqCst);
        }
    }

    /// Allocates until that fails; returns the error.
    fn fill(&self, kmem: &Kmem<Hosted>, gfp: Gfp, order: u32) -> AllocError {
        loop {
            match kmem.alloc_pages(gfp, order) {
                Ok(page) => self.push(kmem, page),
                Err(e) => return e,
            }
        }
    }
}

/// The machine is whole again: every frame free, and blocks of every order can be had.
fn check_usable(name: &str, machine: &Machine) {
    machine.run(|_process| machine.drain_all_pages()).unwrap();
    let audit = machine.audit().unwrap();
    assert_eq!((audit.allocated, audit.free), (0, audit.managed), "{name}: {audit:?}");
    machine
        .run(|_process| {
            for order in 0..=machine.max_order() {
                let page = machine.alloc_pages(Gfp::KERNEL, order);
                let page = page.unwrap_or_else(|e| panic!("{name}: order {order} afterwards: {e}"));
                machine.__free_pages(page, order).unwrap();
            }
        })
        .unwrap();
}

fn failures(log: &ReportLog) -> usize {
    let is_failure = |(_, text): &&(Level, String)| text.starts_with("page allocation failure");
    log.all().iter().filter(is_failure).count()
}

#[test]
fn every_zone_from_process_context() {
    let gfps = [
        Gfp::KERNEL | Gfp::DMA,
        Gfp::KERNEL | Gfp::DMA32,
        Gfp::KERNEL,
        Gfp::HIGHUSER,
        Gfp::HIGHUSER_MOVABLE,
        Gfp::ATOMIC,
        Gfp::NOWAIT,
        Gfp::KERNEL | Gfp::RECLAIMABLE,
        Gfp::KERNEL | Gfp::RETRY_MAYFAIL,
    ];
    for (name, shape) in shapes() {
        let (machine, log) = machine(shape);
        for gfp in gfps {
            for order in [0, 3, 10] {
                let chain = Chain::default();
                let e = machine.run(|_process| chain.fill(&machine, gfp, order)).unwrap();
                assert_eq!(e, AllocError::NoMemory, "{name}: {gfp} order {order}");
                machine.run(|_process| chain.free(&machine, order)).unwrap();
            }
        }
        assert!(failures(&log) > 0, "{name}: failures are reported");
        assert!(log.all().iter().all(|(level, _)| *level != Level::Bug), "{:?}", log.all());
        check_usable(name, &machine);
    }
}

/// Ordinary requests leave each zone its min watermark and its reserve, to the frame, with per-CPU lists
/// or without; what may use all of the reserves leaves nothing.
#[test]
fn ordinary_requests_stop_at_min_and_memalloc_at_nothing() {
    for (name, shape) in shapes() {
        let (machine, _log) = machine(shape);
        for order in [0, 1, 2, 3] {
            let (chain, last) = (Chain::default(), Chain::default());
            machine
                .run_on(Some(0), None, |_process| {
                    while let Ok(page) =
                        machine.alloc_pages(Gfp::HIGHUSER_MOVABLE | Gfp::NOWARN, order)
                    {
                        chain.push(&machine, page);
                        for zone in machine.zones() {
                            let keep =
                                zone.watermarks().min + zone.lowmem_reserve(ZoneType::Movable);
                            let free = zone.free_frames();
                            let all = zone.managed_frames() <= keep;
                            assert!(
                                all || free >= keep,
                                "{name}: {} has {free} of {keep}",
                                zone.name()
                            );
                        }
                    }
                    last.fill(&machine, Gfp::HIGHUSER_MOVABLE | Gfp::MEMALLOC | Gfp::NOWARN, 0);
                    assert_eq!(machine.nr_free_pages(), 0, "{name}");
                    assert_eq!(machine.alloc_page(Gfp::ATOMIC).err(), Some(AllocError::NoMemory));
                    chain.free(&machine, order);
                    last.free(&machine, 0);
                })
                .unwrap();
        }
        check_usable(name, &machine);
    }
}

#[test]
fn every_atomic_section() {
    for (name, shape) in shapes() {
        let (machine, log) = machine(shape);
        for section in [Section::Preempt, Section::Softirq, Section::Hardirq] {
            for gfp in
                [Gfp::ATOMIC, Gfp::ATOMIC | Gfp::DMA, Gfp::ATOMIC | Gfp::HIGHMEM, Gfp::NOWAIT]
            {
                let chain = Chain::default();
                machine
                    .run(|_process| {
                        let cpu = machine.hosted().this_cpu().unwrap();
                        cpu.enter(section);
                        let e = chain.fill(&machine, gfp, 0);
                        let refused = machine.alloc_page(Gfp::KERNEL).err();
                        chain.free(&machine, 0);
                        cpu.leave(section);
                        assert_eq!(e, AllocError::NoMemory, "{name}: {gfp} in {section:?}");
                        assert_eq!(refused, Some(AllocError::Context));
                    })
                    .unwrap();
            }
        }
        assert!(failures(&log) > 0);
        check_usable(name, &machine);
    }
}

#[test]
fn a_thread_on_no_cpu() {
    for (name, shape) in shapes() {
        let (machine, log) = machine(shape);
        assert!(machine.hosted().this_cpu().is_none());
        for gfp in [Gfp::KERNEL, Gfp::ATOMIC, Gfp::KERNEL | Gfp::DMA, Gfp::HIGHUSER_MOVABLE] {
            let chain = Chain::default();
            assert_eq!(chain.fill(&machine, gfp, 0), AllocError::NoMemory, "{name}: {gfp}");
            chain.free(&machine, 0);
        }
        assert!(failures(&log) > 0);
        check_usable(name, &machine);
    }
}

/// A handler's chain, and whether it met the end of memory.
#[derive(Default)]
struct Eater {
    chain: Chain,
    met_the_end: AtomicBool,
    wrong: AtomicBool,
}

impl Eater {
    /// Some allocations; in a signal handler, so nothing here panics.
    fn eat(&self, to: &Weak<Machine>) {
        let Some(machine) = to.upgrade() else { return };
        for _ in 0..200 {
            if self.met_the_end.load(SeqCst) {
                return;
            }
            match machine.alloc_page(Gfp::ATOMIC) {
                Ok(page) => self.chain.push(&machine, page),
                Err(AllocError::NoMemory) => self.met_the_end.store(true, SeqCst),
                Err(_) => self.wrong.store(true, SeqCst),
            }
        }
    }
}

#[test]
fn real_interrupts_and_softirqs() {
    for softirq in [false, true] {
        for (name, shape) in shapes() {
            let (machine, log) = machine(shape);
            let eater = Arc::new(Eater::default());
            let (to, it) = (Arc::downgrade(&machine), Arc::clone(&eater));
            machine.hosted().set_timer_handler(Arc::new(move |_atomic, _cpu| {
                if !softirq {
                    it.eat(&to);
                } else if let Some(machine) = to.upgrade() {
                    machine.hosted().raise_softirq(1);
                }
            }));
            let (to, it) = (Arc::downgrade(&machine), Arc::clone(&eater));
            machine
                .hosted()
                .set_softirq_handler(Arc::new(move |_atomic, _cpu, _raised| it.eat(&to)));
            machine
                .run_on(Some(0), None, |_process| {
                    machine.hosted().start_storm(0, 20_000);
                    let start = Instant::now();
                    // The task allocates too, and fails too.
                    while !eater.met_the_end.load(SeqCst) {
                        assert!(
                            start.elapsed() < Duration::from_secs(30),
                            "{name}: no end of memory"
                        );
                        if let Ok(page) = machine.alloc_page(Gfp::NOWAIT) {
                            machine.__free_page(page).unwrap();
                        }
                    }
                    machine.hosted().stop_storm(0);
                    eater.chain.free(&machine, 0);
                })
                .unwrap();
            assert!(!eater.wrong.load(SeqCst));
            assert!(failures(&log) > 0, "{name}: failures in interrupts are reported");
            check_usable(name, &machine);
        }
    }
}

/// A machine whose every inner allocation fails is as good as one without memory, and recovers.
#[test]
fn every_inner_allocation_fails() {
    let (machine, _log) = machine(Shape::x86_64(64 * MIB));
    machine.set_fault_plan(FaultPlan::From(0));
    machine
        .run(|_process| {
            for gfp in [Gfp::KERNEL, Gfp::ATOMIC, Gfp::HIGHUSER_MOVABLE] {
                for order in 0..=10 {
                    assert_eq!(machine.alloc_pages(gfp, order).err(), Some(AllocError::NoMemory));
                }
                assert!(machine.alloc_pages_exact(10_000, gfp - Gfp::HIGHMEM).is_err());
                let mut pages = [None; 8];
                assert_eq!(machine.alloc_pages_bulk(gfp, &mut pages), Ok(0));
            }
        })
        .unwrap();
    machine.set_fault_plan(FaultPlan::Off);
    check_usable("all faults", &machine);
}

/// Frames of every zone are met on the way to the end of memory, the highest first.
#[test]
fn the_last_frames_come_from_the_lowest_zone() {
    let (machine, _log) = machine(shapes()[0].1.clone());
    let chain = Chain::default();
    let seen = machine
        .run(|_process| {
            let mut seen: Vec<ZoneType> = Vec::new();
            while let Ok(page) = machine.alloc_page(Gfp::NOWAIT) {
                chain.push(&machine, page);
                let zone = machine.page_zone(machine.page_to_pfn(page).unwrap()).unwrap();
                let span: PfnRange = zone.spanned();
                assert!(span.contains(machine.page_to_pfn(page).unwrap().0));
                if seen.last() != Some(&zone.zone_type()) {
                    seen.push(zone.zone_type());
                }
            }
            chain.free(&machine, 0);
            seen
        })
        .unwrap();
    assert_eq!(seen[..3], [ZoneType::Normal, ZoneType::Dma32, ZoneType::Dma], "{seen:?}");
    check_usable("by zone", &machine);
}
