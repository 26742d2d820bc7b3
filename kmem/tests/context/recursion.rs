//! Shrinkers that allocate \[C4\]: from the reserves, without reclaiming again, whoever reclaims.

use kmem::{Gfp, ZoneType, context::Task, platform::Platform};
use kmem_hosted::Machine;
use kmem_test_support::{Held, Rig, TestShrinker};
use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering::SeqCst},
};

/// How deep scans nest, and how their allocations went.
#[derive(Default)]
struct Depth {
    now: AtomicU32,
    most: AtomicU32,
    served: AtomicU32,
    failed: AtomicU32,
}

/// A full machine with a shrinker whose every scan allocates and frees a page with `gfp`.
fn allocating(gfp: Gfp) -> (Rig, Held, Arc<Depth>) {
    let rig = Rig::flat();
    let held = rig.run(|_| rig.exhaust(Gfp::KERNEL | Gfp::NOWARN | Gfp::NORETRY, 0));
    let depth = Arc::new(Depth::default());
    let d = Arc::clone(&depth);
    TestShrinker::register(&rig, 1000, move |m: &Machine, _, _| {
        let now = d.now.fetch_add(1, SeqCst) + 1;
        d.most.fetch_max(now, SeqCst);
        // One scan inside another shows it; more would only take longer.
        if now < 2 {
            match m.alloc_page(gfp) {
                Ok(page) => {
                    d.served.fetch_add(1, SeqCst);
                    m.__free_page(page).unwrap();
                }
                Err(_) => {
                    d.failed.fetch_add(1, SeqCst);
                }
            }
        }
        d.now.fetch_sub(1, SeqCst);
        Some(0)
    });
    (rig, held, depth)
}

fn check(depth: &Depth) {
    assert_eq!(depth.most.load(SeqCst), 1, "reclaim was entered again");
    assert!(depth.served.load(SeqCst) > 0);
    assert_eq!(depth.failed.load(SeqCst), 0, "the reserves are there for this");
}

#[test]
fn a_shrinker_that_allocates_uses_the_reserves_and_does_not_come_back() {
    for gfp in [Gfp::KERNEL, Gfp::NOFS, Gfp::ATOMIC, Gfp::KERNEL | Gfp::NOFAIL] {
        let (rig, held, depth) = allocating(gfp);
        let zone = rig.zone(ZoneType::Normal);
        rig.run(|_| {
            let free = zone.free_frames();
            assert!(rig.alloc_page(Gfp::KERNEL | Gfp::NOWARN).is_err());
            check(&depth);
            rig.drain_this_cpu();
            assert_eq!(zone.free_frames(), free, "the reserve is whole again");
            rig.release(held);
        });
    }
}

#[test]
fn a_caller_without_a_task_does_not_come_back_either() {
    let (rig, held, depth) = allocating(Gfp::KERNEL);
    rig.machine()
        .run_on(Some(0), None, |_| {
            let cpu = rig.hosted().this_cpu().unwrap();
            let own: *const Task = cpu.current().unwrap();
            // SAFETY: this is the CPU, and no task is always allowed.
            unsafe { cpu.set_current(std::ptr::null()) };
            assert!(rig.alloc_page(Gfp::KERNEL | Gfp::NOWARN).is_err());
            assert!(cpu.current().is_none(), "the task was lent, not given");
            // And with it went the way into the reserves.
            assert!(rig.alloc_page(Gfp::KERNEL | Gfp::NOWARN | Gfp::NORETRY).is_err());
            // SAFETY: this is the CPU, and its task lasts as long as this closure runs.
            unsafe { cpu.set_current(own) };
        })
        .unwrap();
    check(&depth);
    rig.run(|_| rig.release(held));
}

#[test]
fn a_caller_on_no_cpu_does_not_reclaim_at_all() {
    let (rig, held, depth) = allocating(Gfp::KERNEL);
    assert!(rig.alloc_page(Gfp::KERNEL | Gfp::NOWARN).is_err());
    assert_eq!(depth.most.load(SeqCst), 0, "it leaves reclaim to kswapd");
    rig.run(|_| rig.release(held));
}

#[test]
fn with_the_reserves_used_up_a_shrinkers_allocation_fails_and_reclaim_goes_on() {
    let (rig, mut held, depth) = allocating(Gfp::KERNEL | Gfp::NOWARN);
    rig.run(|_| {
        held.extend(rig.exhaust(Gfp::NOWAIT | Gfp::MEMALLOC, 0));
        assert!(rig.alloc_page(Gfp::KERNEL | Gfp::NOWARN).is_err());
        assert_eq!(depth.most.load(SeqCst), 1);
        assert_eq!(depth.served.load(SeqCst), 0);
        assert!(depth.failed.load(SeqCst) > 0);
        rig.release(held);
    });
}

#[test]
fn a_tasks_own_scope_outlasts_its_reclaim() {
    let (rig, held, _) = allocating(Gfp::KERNEL);
    let task = Task::new();
    rig.run_as(&task, |_| {
        let saved = task.memalloc_nofs_save();
        assert!(rig.alloc_page(Gfp::KERNEL | Gfp::NOWARN).is_err());
        // Reclaim's own scope is over: the reserves are closed again.
        assert!(rig.alloc_page(Gfp::KERNEL | Gfp::NOWARN).is_err());
        task.memalloc_restore(saved);
        rig.release(held);
    });
}
