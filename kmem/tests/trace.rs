//! The tracepoints of the page allocator \[T2\]: each fires with its fields, in the kernel's words, and none
//! while nobody listens.

use kmem::{
    Config, Gfp, MigrateType, Page, Pfn,
    context::Path,
    fault::FaultPlan,
    platform::Platform,
    trace::{Event, TraceSink},
    types::ZoneType,
};
use kmem_hosted::{Machine, Shape};
use kmem_test_support::Rig;
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    },
};

/// Keeps what it is told.
#[derive(Default)]
struct Log(Mutex<Vec<(Option<usize>, Event)>>);

impl TraceSink for Log {
    fn event(&self, cpu: Option<usize>, event: &Event) {
        self.0.lock().unwrap().push((cpu, *event));
    }
}

impl Log {
    fn take(&self) -> Vec<Event> {
        self.0.lock().unwrap().drain(..).map(|(_, event)| event).collect()
    }
}

const MIB: u64 = 1 << 20;

/// A machine with one zone, traced.
fn traced() -> (Machine, &'static Log) {
    let m = Machine::without_kswapd(Shape::no_dma(64 * MIB), Config::default()).unwrap();
    let log: &Log = Box::leak(Box::default());
    m.set_tracer(Some(log));
    (m, log)
}

fn pfn(m: &Machine, page: &Page) -> Pfn {
    m.page_to_pfn(page).unwrap()
}

fn named(events: &[Event], name: &str) -> Vec<Event> {
    events.iter().filter(|event| event.name() == name).copied().collect()
}

#[test]
fn a_request_and_a_free() {
    let (m, log) = traced();
    m.run_on(Some(1), None, |_| {
        let gfp = Gfp::KERNEL | Gfp::RECLAIMABLE;
        let page = m.alloc_pages(gfp, 2).unwrap();
        let pfn = pfn(&m, page);
        let alloc = Event::PageAlloc {
            pfn: Some(pfn),
            order: 2,
            gfp,
            migratetype: MigrateType::Reclaimable,
        };
        assert_eq!(log.0.lock().unwrap().last(), Some(&(Some(1), alloc)));
        log.take();
        m.__free_pages(page, 2).unwrap();
        assert_eq!(log.take(), [Event::PageFree { pfn, order: 2 }]);
    })
    .unwrap();
    // Off any CPU.
    let page = m.alloc_page(Gfp::KERNEL).unwrap();
    let (cpu, event) = *log.0.lock().unwrap().last().unwrap();
    assert_eq!((cpu, event.name()), (None, "mm_page_alloc"));
    log.take();
    m.put_page(page).unwrap();
    assert_eq!(log.take(), [Event::PageFree { pfn: pfn(&m, page), order: 0 }]);
}

#[test]
fn every_way_to_ask_and_to_free() {
    let (m, log) = traced();
    let allocs = || named(&log.take(), "mm_page_alloc").len();
    m.run(|_| {
        let zeroed = m.get_zeroed_page(Gfp::KERNEL).unwrap();
        assert_eq!(allocs(), 1);
        let node = m.alloc_pages_node(0, Gfp::KERNEL, 1).unwrap();
        assert_eq!(allocs(), 1);
        let mut pages = [None; 9];
        assert_eq!(m.alloc_pages_bulk(Gfp::KERNEL, &mut pages).unwrap(), 9);
        assert_eq!(allocs(), 9);
        m.free_page(zeroed.as_ptr()).unwrap();
        m.split_page(node, 1).unwrap();
        let first = pfn(&m, node);
        let tail = m.pfn_to_page(Pfn(first.0 + 1)).unwrap();
        log.take();
        m.__free_page(tail).unwrap();
        m.__free_page(node).unwrap();
        let freed = [Pfn(first.0 + 1), first].map(|pfn| Event::PageFree { pfn, order: 0 });
        assert_eq!(log.take(), freed);
    })
    .unwrap();
}

#[test]
fn a_request_that_fails_has_no_frame() {
    let (m, log) = traced();
    m.set_fault_plan(FaultPlan::Nth(0));
    let gfp = Gfp::NOWAIT | Gfp::NORETRY;
    m.run(|_| m.alloc_pages(gfp, 3).map(|_| ())).unwrap().unwrap_err();
    let fail = Event::PageAlloc { pfn: None, order: 3, gfp, migratetype: MigrateType::Unmovable };
    assert_eq!(log.take(), [fail]);
    assert_eq!(
        fail.to_string(),
        "page=0000000000000000 pfn=0x0 order=3 migratetype=0 gfp_flags=GFP_NOWAIT|__GFP_NORETRY"
    );
}

#[test]
fn pages_freed_together() {
    let (m, log) = traced();
    m.run(|_| {
        let pages = [m.alloc_page(Gfp::KERNEL).unwrap(), m.alloc_page(Gfp::KERNEL).unwrap()];
        let pfns = pages.map(|page| pfn(&m, page));
        log.take();
        m.free_pages_bulk(&mut pages.map(Some)).unwrap();
        let events = log.take();
        let batched = named(&events, "mm_page_free_batched");
        assert_eq!(batched, pfns.map(|pfn| Event::PageFreeBatched { pfn }));
        let freed = named(&events, "mm_page_free");
        assert_eq!(freed, pfns.map(|pfn| Event::PageFree { pfn, order: 0 }));
    })
    .unwrap();
}

#[test]
fn a_page_that_others_hold_is_not_freed() {
    let (m, log) = traced();
    m.run(|_| {
        let page = m.alloc_page(Gfp::KERNEL).unwrap();
        m.get_page(page).unwrap();
        m.get_page(page).unwrap();
        log.take();
        m.__free_page(page).unwrap();
        m.free_pages_bulk(&mut [Some(page)]).unwrap();
        assert_eq!(log.take(), []);
        m.put_page(page).unwrap();
        assert_eq!(log.take(), [Event::PageFree { pfn: pfn(&m, page), order: 0 }]);
    })
    .unwrap();
}

#[test]
fn a_refill_names_every_block_and_a_drain_too() {
    let (m, log) = traced();
    m.run_on(Some(0), None, |_| {
        let gfp = Gfp::HIGHUSER_MOVABLE;
        let page = m.alloc_page(gfp).unwrap();
        let events = log.take();
        let held: u64 = m.pcp_frames(&m.zones()[0]).sum();
        let refill = named(&events, "mm_page_alloc_zone_locked");
        assert_eq!(refill.len() as u64, held + 1);
        let mut pfns = Vec::new();
        for event in refill {
            let Event::PageAllocZoneLocked { pfn, order: 0, migratetype, percpu_refill: true } =
                event
            else {
                panic!("{event:?}")
            };
            assert_eq!(migratetype, MigrateType::Movable);
            pfns.push(pfn);
        }
        assert!(pfns.contains(&pfn(&m, page)));
        // The second request finds the list full.
        let second = m.alloc_page(gfp).unwrap();
        assert_eq!(log.take().len(), 1);
        m.__free_page(second).unwrap();
        m.__free_page(page).unwrap();
        log.take();

        assert_eq!(m.drain_this_cpu(), held + 1);
        let mut drained: Vec<Pfn> = Vec::new();
        for event in log.take() {
            let Event::PagePcpuDrain { pfn, order: 0, migratetype: MigrateType::Movable } = event
            else {
                panic!("{event:?}")
            };
            drained.push(pfn);
        }
        pfns.sort();
        drained.sort();
        assert_eq!(drained, pfns);
    })
    .unwrap();
}

#[test]
fn a_block_without_a_list_comes_straight_from_the_buddy() {
    let (m, log) = traced();
    m.run(|_| {
        let page = m.alloc_pages(Gfp::KERNEL, 6).unwrap();
        let pfn = pfn(&m, page);
        let migratetype = MigrateType::Unmovable;
        let direct =
            Event::PageAllocZoneLocked { pfn, order: 6, migratetype, percpu_refill: false };
        let alloc = Event::PageAlloc { pfn: Some(pfn), order: 6, gfp: Gfp::KERNEL, migratetype };
        assert_eq!(log.take(), [direct, alloc]);
    })
    .unwrap();
}

#[test]
fn a_stolen_block_says_from_whom() {
    let (m, log) = traced();
    // Every pageblock movable and in use, but for an eighth of one.
    let mut last = None;
    for block in (0..64 * MIB as u32 / 4096).step_by(512) {
        last = Some(m.alloc_pages_at(Pfn(block), 9, Gfp::HIGHUSER_MOVABLE).unwrap());
    }
    let last = last.unwrap();
    let first = pfn(&m, last);
    m.split_page(last, 9).unwrap();
    for n in 0..64 {
        m.__free_page(m.pfn_to_page(Pfn(first.0 + n)).unwrap()).unwrap();
    }
    m.drain_all_pages();
    for zone in m.zones() {
        m.set_watermarks(zone, Default::default());
    }
    log.take();
    m.run(|_| {
        let page = m.alloc_pages(Gfp::KERNEL, 5).unwrap();
        let events = log.take();
        let pfn = pfn(&m, page);
        let steal = Event::PageAllocExtfrag {
            pfn,
            alloc_order: 5,
            fallback_order: 6,
            alloc_migratetype: MigrateType::Unmovable,
            fallback_migratetype: MigrateType::Movable,
            change_ownership: false,
        };
        assert_eq!(named(&events, "mm_page_alloc_extfrag"), [steal]);
        assert_eq!(m.pageblock_migratetype(pfn), Some(MigrateType::Movable));
        assert_eq!(
            steal.to_string(),
            format!(
                "page={:016x} pfn={:#x} alloc_order=5 fallback_order=6 pageblock_order=9 \
                 alloc_migratetype=0 fallback_migratetype=1 fragmenting=1 change_ownership=0",
                (1u64 << 32) + u64::from(pfn.0),
                pfn.0
            )
        );
    })
    .unwrap();
}

#[test]
fn a_stolen_pageblock_changes_hands() {
    let (m, log) = traced();
    let mut last = None;
    for block in (0..64 * MIB as u32 / 4096).step_by(512) {
        last = Some(m.alloc_pages_at(Pfn(block), 9, Gfp::HIGHUSER_MOVABLE).unwrap());
    }
    let first = pfn(&m, last.unwrap());
    m.split_page(last.unwrap(), 9).unwrap();
    for n in 0..256 {
        m.__free_page(m.pfn_to_page(Pfn(first.0 + n)).unwrap()).unwrap();
    }
    m.drain_all_pages();
    for zone in m.zones() {
        m.set_watermarks(zone, Default::default());
    }
    log.take();
    m.run(|_| {
        let page = m.alloc_pages(Gfp::KERNEL | Gfp::RECLAIMABLE, 4).unwrap();
        let steal = Event::PageAllocExtfrag {
            pfn: pfn(&m, page),
            alloc_order: 4,
            fallback_order: 8,
            alloc_migratetype: MigrateType::Reclaimable,
            fallback_migratetype: MigrateType::Movable,
            change_ownership: true,
        };
        assert_eq!(named(&log.take(), "mm_page_alloc_extfrag"), [steal]);
        assert_eq!(m.pageblock_migratetype(first), Some(MigrateType::Reclaimable));
    })
    .unwrap();
}

#[test]
fn nobody_listens_nothing_is_said() {
    let (m, log) = traced();
    m.set_tracer(None);
    m.run(|_| {
        let pages: Vec<_> =
            (0..200).map(|i| (m.alloc_pages(Gfp::KERNEL, i % 8).unwrap(), i % 8)).collect();
        for (page, order) in pages {
            m.__free_pages(page, order).unwrap();
        }
        m.drain_all_pages();
        assert_eq!(log.take(), []);
        m.set_tracer(Some(log));
        let page = m.alloc_page(Gfp::KERNEL).unwrap();
        assert!(!log.take().is_empty());
        m.set_tracer(None);
        m.__free_page(page).unwrap();
        assert_eq!(log.take(), []);
    })
    .unwrap();
}

#[test]
fn events_read_as_the_kernel_prints_them() {
    let (pfn, order, migratetype) = (Pfn(0x1a2b), 3, MigrateType::Movable);
    let gfp = Gfp::KERNEL | Gfp::ZERO;
    for (event, name, text) in [
        (
            Event::PageAlloc { pfn: Some(pfn), order, gfp, migratetype },
            "mm_page_alloc",
            "page=0000000100001a2b pfn=0x1a2b order=3 migratetype=1 gfp_flags=GFP_KERNEL|__GFP_ZERO",
        ),
        (
            Event::PageAlloc { pfn: Some(Pfn(0)), order, gfp: Gfp::empty(), migratetype },
            "mm_page_alloc",
            "page=0000000100000000 pfn=0x0 order=3 migratetype=1 gfp_flags=none",
        ),
        (
            Event::PageFree { pfn, order },
            "mm_page_free",
            "page=0000000100001a2b pfn=0x1a2b order=3",
        ),
        (
            Event::PageFreeBatched { pfn },
            "mm_page_free_batched",
            "page=0000000100001a2b pfn=0x1a2b order=0",
        ),
        (
            Event::PageAllocZoneLocked { pfn, order, migratetype, percpu_refill: true },
            "mm_page_alloc_zone_locked",
            "page=0000000100001a2b pfn=0x1a2b order=3 migratetype=1 percpu_refill=1",
        ),
        (
            Event::PagePcpuDrain { pfn, order, migratetype },
            "mm_page_pcpu_drain",
            "page=0000000100001a2b pfn=0x1a2b order=3 migratetype=1",
        ),
        (
            Event::PageAllocExtfrag {
                pfn,
                alloc_order: 2,
                fallback_order: 9,
                alloc_migratetype: MigrateType::Unmovable,
                fallback_migratetype: MigrateType::Reclaimable,
                change_ownership: true,
            },
            "mm_page_alloc_extfrag",
            "page=0000000100001a2b pfn=0x1a2b alloc_order=2 fallback_order=9 pageblock_order=9 \
             alloc_migratetype=0 fallback_migratetype=2 fragmenting=0 change_ownership=1",
        ),
    ] {
        assert_eq!((event.name(), event.to_string().as_str()), (name, text));
    }
}

#[test]
fn every_event_of_a_high_memory_request_names_its_own_frame() {
    let m = Machine::without_kswapd(Shape::x86_32(1 << 30), Config::default()).unwrap();
    let log: &Log = Box::leak(Box::default());
    m.set_tracer(Some(log));
    let page = m.run(|_| m.alloc_pages(Gfp::HIGHUSER, 0)).unwrap().unwrap();
    let zone = m.page_zone(pfn(&m, page)).unwrap();
    assert_eq!(zone.zone_type(), ZoneType::HighMem);
    let frame = |event: &Event| match *event {
        Event::PageAlloc { pfn: Some(pfn), .. } | Event::PageAllocZoneLocked { pfn, .. } => pfn,
        _ => panic!("{event:?}"),
    };
    assert!(log.take().iter().all(|event| zone.spanned().contains(frame(event).0)));
}

/// A sink that does what it must not.
struct Sleeper {
    machine: Weak<Machine>,
    slept: AtomicU64,
}

impl TraceSink for Sleeper {
    fn event(&self, _cpu: Option<usize>, _event: &Event) {
        if let Some(m) = self.machine.upgrade() {
            m.platform().wait(&AtomicU32::new(0), 0, 1);
            self.slept.fetch_add(1, Relaxed);
        }
    }
}

#[test]
fn nobody_sleeps_inside_the_allocator() {
    let rig = Rig::flat();
    let sink: &Sleeper = Box::leak(Box::new(Sleeper {
        machine: Arc::downgrade(rig.machine()),
        slept: AtomicU64::new(0),
    }));
    rig.set_tracer(Some(sink));
    let mark = rig.mark();
    rig.run(|_| {
        let pages: Vec<_> = (0..200).map(|_| rig.alloc_page(Gfp::KERNEL).unwrap()).collect();
        pages.into_iter().for_each(|page| rig.__free_page(page).unwrap());
        assert_eq!(rig.platform().this_cpu().unwrap().path(), Path::Idle);
    });
    rig.set_tracer(None);
    let reports = rig.since(mark);
    assert!(sink.slept.load(Relaxed) > 400);
    assert!(
        reports.iter().any(|(_, text)| text.contains("sleeping inside the allocator")),
        "{reports:?}"
    );
    assert!(reports.iter().all(|(_, text)| text.contains("sleeping in")), "{reports:?}");
}

/// A sink that frees twice.
struct Misuser {
    machine: Weak<Machine>,
    free: Pfn,
    misuses: AtomicU64,
}

impl TraceSink for Misuser {
    fn event(&self, _cpu: Option<usize>, event: &Event) {
        if let (Event::PagePcpuDrain { .. }, Some(m)) = (event, self.machine.upgrade()) {
            assert_eq!(m.platform().this_cpu().unwrap().path(), Path::Drain);
            m.__free_page(m.pfn_to_page(self.free).unwrap()).unwrap_err();
            self.misuses.fetch_add(1, Relaxed);
        }
    }
}

#[test]
fn a_misuse_inside_the_allocator_panics_once_all_is_whole() {
    let rig = Rig::flat();
    rig.run(|_| {
        let pages: Vec<_> = (0..20).map(|_| rig.alloc_page(Gfp::KERNEL).unwrap()).collect();
        let sink: &Misuser = Box::leak(Box::new(Misuser {
            machine: Arc::downgrade(rig.machine()),
            free: rig.page_to_pfn(pages[0]).unwrap(),
            misuses: AtomicU64::new(0),
        }));
        pages.into_iter().for_each(|page| rig.__free_page(page).unwrap());
        rig.set_tracer(Some(sink));
        rig.set_panic_on_misuse(true);
        let drain = AssertUnwindSafe(|| rig.drain_this_cpu());
        catch_unwind(drain).unwrap_err();
        rig.set_panic_on_misuse(false);
        rig.set_tracer(None);
        assert!(sink.misuses.load(Relaxed) >= 20, "it went on to the end");
        assert_eq!(rig.platform().this_cpu().unwrap().path(), Path::Idle);
        assert_eq!(rig.drain_this_cpu(), 0);
        let page = rig.alloc_page(Gfp::KERNEL).unwrap();
        rig.__free_page(page).unwrap();
        assert!(rig.drain_this_cpu() > 0, "the lists are in use again");
    });
}
