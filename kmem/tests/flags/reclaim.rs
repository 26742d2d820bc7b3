//! IO and FS are kept, by flag and by scope \[G4\]; kswapd is woken, or not.

use kmem::{Config, Gfp, Kmem, context::Task, memblock::Memblock, vmstat::VmEvent, zone::Layout};
use kmem_test_support::{MIB, Plain, Rig, TestShrinker};
use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    thread,
    time::{Duration, Instant},
};

/// Calls that reclaim for a request makes to a source that needs nothing, block I/O, the file system, and
/// both.
fn calls(gfp: Gfp, scope: impl FnOnce(&Task)) -> [bool; 4] {
    let rig = Rig::flat();
    let task = Task::new();
    let needs = [Gfp::empty(), Gfp::IO, Gfp::FS, Gfp::IO | Gfp::FS];
    let sources = needs.map(|n| TestShrinker::needing(&rig, n, 10_000, |_, _, _| Some(0)).0);
    scope(&task);
    rig.run_as(&task, |_| {
        let held = rig.exhaust(gfp | Gfp::NOWARN | Gfp::NORETRY, 0);
        rig.release(held);
    });
    for source in sources {
        assert!(source.seen().iter().all(|sc| gfp.contains(sc.gfp & (Gfp::IO | Gfp::FS))));
    }
    sources.map(|source| source.scans() > 0)
}

#[test]
fn io_and_fs_say_what_reclaim_may_do() {
    assert_eq!(calls(Gfp::KERNEL, |_| ()), [true, true, true, true]);
    assert_eq!(calls(Gfp::USER, |_| ()), [true, true, true, true]);
    assert_eq!(calls(Gfp::NOFS, |_| ()), [true, true, false, false]);
    assert_eq!(calls(Gfp::NOIO, |_| ()), [true, false, false, false]);
    assert_eq!(calls(Gfp::KERNEL - Gfp::IO, |_| ()), [true, false, true, false]);
    assert_eq!(calls(Gfp::ATOMIC, |_| ()), [false; 4]);
}

#[test]
fn scopes_apply_to_every_request_inside() {
    let noio = |task: &Task| {
        let _open = task.memalloc_noio_save();
    };
    let nofs = |task: &Task| {
        let _open = task.memalloc_nofs_save();
    };
    let noreclaim = |task: &Task| {
        let _open = task.memalloc_noreclaim_save();
    };
    assert_eq!(calls(Gfp::KERNEL, noio), [true, false, false, false]);
    assert_eq!(calls(Gfp::NOFS, noio), [true, false, false, false]);
    assert_eq!(calls(Gfp::KERNEL, nofs), [true, true, false, false]);
    assert_eq!(calls(Gfp::KERNEL, noreclaim), [false; 4]);
}

#[test]
fn scopes_nest_and_end() {
    let ended = |task: &Task| {
        let outer = task.memalloc_noio_save();
        let inner = task.memalloc_noio_save();
        task.memalloc_restore(inner);
        task.memalloc_restore(outer);
    };
    assert_eq!(calls(Gfp::KERNEL, ended), [true; 4]);
    let inner_only = |task: &Task| {
        let _outer = task.memalloc_noio_save();
        let inner = task.memalloc_noio_save();
        let other = task.memalloc_nofs_save();
        task.memalloc_restore(other);
        task.memalloc_restore(inner);
    };
    assert_eq!(calls(Gfp::KERNEL, inner_only), [true, false, false, false]);
}

#[test]
fn what_a_request_may_not_scan_is_owed() {
    let rig = Rig::flat();
    let (source, _) =
        TestShrinker::needing(&rig, Gfp::IO, 1_000_000, |_, sc, _| Some(sc.nr_to_scan));
    rig.run(|_| {
        let held = rig.exhaust(Gfp::KERNEL | Gfp::NOWARN | Gfp::NORETRY, 0);
        let pass = |gfp: Gfp| {
            let before = source.scanned();
            assert!(rig.alloc_page(gfp | Gfp::NOWARN | Gfp::NORETRY).is_err());
            source.scanned() - before
        };
        let ordinary = pass(Gfp::KERNEL);
        assert_eq!(pass(Gfp::NOIO), 0);
        let with_debt = pass(Gfp::KERNEL);
        assert!(ordinary > 0 && with_debt > ordinary, "{ordinary} then {with_debt}");
        rig.release(held);
    });
}

#[test]
fn shrinkers_give_frames_back_and_the_request_succeeds() {
    let rig = Rig::flat();
    let hoard = rig.run(|_| rig.exhaust(Gfp::KERNEL | Gfp::NOWARN | Gfp::NORETRY, 0));
    let left = AtomicU64::new(hoard.len() as u64);
    let (source, id) = TestShrinker::register(&rig, hoard.len() as u64, move |m, sc, _| {
        let mut freed = 0;
        while freed < sc.nr_to_scan {
            let Ok(n) = left.fetch_update(SeqCst, SeqCst, |n| n.checked_sub(1)) else { break };
            m.__free_page(m.pfn_to_page(hoard[n as usize - 1].0)?).unwrap();
            freed += 1;
        }
        Some(freed)
    });
    rig.run(|_| {
        let got: Vec<_> = (0..200).map(|_| rig.take(Gfp::KERNEL, 0).unwrap()).collect();
        assert!(source.scans() > 0);
        // Nothing of the hoard is anybody's but the hoard's.
        rig.release(got);
        let held = rig.exhaust(Gfp::KERNEL | Gfp::NOWARN, 0);
        assert!(held.len() > 10_000);
        rig.release(held);
    });
    rig.unregister_shrinker(id).unwrap();
    assert!(rig.unregister_shrinker(id).is_err());
}

#[test]
fn shrinkers_are_asked_for_the_nodes_that_the_request_may_use() {
    let shape = kmem_hosted::Shape::no_dma(16 * MIB).bank(16 * MIB, 16 * MIB, 1).cpus(2);
    let rig = Rig::new(shape, Config::default());
    let (by_node, _) = TestShrinker::by_node(&rig, 1000, |_, _, _| Some(0));
    let (plain, _) = TestShrinker::register(&rig, 1000, |_, _, _| Some(0));
    let mut before = (0, 0);
    let mut asked = |gfp: Gfp, nid: i32| {
        let asked = rig.alloc_pages_node(nid, gfp | Gfp::NOWARN | Gfp::NORETRY, 0).err();
        assert_eq!(asked, Some(kmem::AllocError::NoMemory));
        let nodes = |s: &TestShrinker, from| {
            let mut nodes: Vec<_> = s.seen().iter().skip(from).map(|sc| sc.node).collect();
            nodes.sort_unstable();
            nodes.dedup();
            nodes
        };
        let seen = (nodes(by_node, before.0), nodes(plain, before.1));
        before = (by_node.seen().len(), plain.seen().len());
        seen
    };
    rig.run(|_| {
        let held = rig.exhaust(Gfp::KERNEL | Gfp::NOWARN | Gfp::NORETRY, 0);
        asked(Gfp::KERNEL, 0);
        assert_eq!(asked(Gfp::KERNEL, 0), (vec![0, 1], vec![0]));
        assert_eq!(asked(Gfp::KERNEL | Gfp::THISNODE, 1), (vec![1], vec![]));
        assert_eq!(asked(Gfp::KERNEL | Gfp::THISNODE, 0), (vec![0], vec![0]));
        rig.release(held);
    });
}

#[test]
fn kswapd_works_up_to_the_high_watermark() {
    let rig = Rig::with_kswapd(kmem_hosted::Shape::no_dma(64 * MIB));
    let zone = rig.zone(kmem::ZoneType::Normal);
    let hoard = rig.run(|_| rig.exhaust(Gfp::NOWAIT - Gfp::KSWAPD_RECLAIM, 0));
    let left = AtomicU64::new(hoard.len() as u64);
    let pages = hoard.clone();
    let (source, id) = TestShrinker::register(&rig, hoard.len() as u64, move |m, sc, _| {
        let mut freed = 0;
        while freed < sc.nr_to_scan {
            let Ok(n) = left.fetch_update(SeqCst, SeqCst, |n| n.checked_sub(1)) else { break };
            m.__free_page(m.pfn_to_page(pages[n as usize - 1].0)?).unwrap();
            freed += 1;
        }
        Some(freed)
    });
    assert_eq!(rig.vm_event(VmEvent::PageOutRun), 0, "nobody has woken it yet");
    let got = rig.run(|_| rig.take(Gfp::ATOMIC, 0)).unwrap();
    let start = Instant::now();
    while zone.free_frames() <= zone.watermarks().high {
        assert!(start.elapsed() < Duration::from_secs(20), "kswapd does not get there");
        thread::yield_now();
    }
    assert!(rig.vm_event(VmEvent::PageOutRun) > 0);
    rig.unregister_shrinker(id).unwrap();
    let freed = source.seen().len();
    assert!(freed > 0);
    assert_eq!(rig.stalls(), 0, "no request had to reclaim for itself");
    let live = hoard
        .into_iter()
        .filter(|(pfn, _)| rig.pfn_to_page(*pfn).is_some_and(|page| page.page_count() > 0));
    rig.run(|_| rig.release(live.chain([got]).collect::<std::collections::BTreeSet<_>>()));
}

/// Ends kswapd however the test ends.
struct StopKswapd<'a>(&'a AtomicBool, &'a Kmem<Plain<12>>);

impl Drop for StopKswapd<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
        self.1.nudge_kswapd();
    }
}

#[test]
fn only_kswapd_reclaim_wakes_kswapd() {
    let mut boot = Memblock::new();
    boot.add(0, 16 << 20, 0).unwrap();
    let config = Config { layout: Layout::flat(), ..Config::default() };
    let kmem = Kmem::bring_up(Plain::<12>::new(4096, 2), boot, &config).unwrap();
    let start = kmem.audit().unwrap();
    let stop = AtomicBool::new(false);
    let wakes = || kmem.platform().wakes.load(SeqCst);
    thread::scope(|s| {
        s.spawn(|| {
            Plain::<12>::be_cpu(1);
            kmem.kswapd_run(0, &stop);
        });
        let asleep = || {
            while kmem.platform().waiting.load(SeqCst) == 0 {
                thread::yield_now();
            }
        };
        let _stop = StopKswapd(&stop, &kmem);
        Plain::<12>::be_cpu(0);
        asleep();
        let quiet = Gfp::NOWARN | Gfp::NORETRY;
        let mut held = Vec::new();
        for gfp in [Gfp::empty(), Gfp::HIGH, Gfp::DIRECT_RECLAIM, Gfp::KERNEL - Gfp::KSWAPD_RECLAIM]
        {
            while let Ok(page) = kmem.alloc_page(gfp | quiet) {
                held.push(page);
            }
            assert_eq!(wakes(), 0, "{gfp}");
        }
        for gfp in [Gfp::ATOMIC, Gfp::NOWAIT, Gfp::KERNEL, Gfp::NOIO] {
            asleep();
            let before = wakes();
            held.extend(kmem.alloc_page(gfp | quiet));
            assert!(wakes() > before, "{gfp}");
        }
        // What is above the low watermark wakes nobody.
        held.drain(..).for_each(|page| kmem.__free_page(page).unwrap());
        kmem.drain_this_cpu();
        thread::sleep(Duration::from_millis(2));
        asleep();
        let before = wakes();
        held.extend(kmem.alloc_page(Gfp::ATOMIC));
        assert_eq!(wakes(), before);
        held.drain(..).for_each(|page| kmem.__free_page(page).unwrap());
    });
    kmem.drain_this_cpu();
    assert_eq!(kmem.audit().unwrap(), start);
}
