//! How hard each flag makes a request try: NORETRY, REPEAT, NOFAIL, costly orders, the OOM handler.

use kmem::{
    AllocError, Gfp, context::Task, fault::FaultPlan, gfp::GfpError, page_alloc::ReclaimRequest,
    vmstat::VmEvent,
};
use kmem_test_support::{Held, OomScript, Rig, TestShrinker};
use std::{
    sync::{Arc, Barrier, Mutex},
    thread,
    time::Duration,
};

/// Passes after which a request gives up that gets nowhere.
const PATIENCE: u64 = 16;

/// A machine without free memory; what is taken, and the passes of reclaim it took so far.
fn full() -> (Rig, Held) {
    let rig = Rig::flat();
    let held = rig.run(|_| rig.exhaust(Gfp::KERNEL | Gfp::NOWARN | Gfp::NORETRY, 0));
    (rig, held)
}

/// Passes of direct reclaim that a request of `order` makes in vain, with `objects` that cannot be freed.
fn passes(gfp: Gfp, order: u32, objects: u64) -> u64 {
    let (rig, held) = full();
    TestShrinker::register(&rig, objects, |_, _, _| Some(0));
    rig.run(|_| {
        let before = rig.stalls();
        assert_eq!(rig.alloc_pages(gfp | Gfp::NOWARN, order).err(), Some(AllocError::NoMemory));
        let passes = rig.stalls() - before;
        rig.release(held);
        passes
    })
}

#[test]
fn noretry_makes_one_pass() {
    assert_eq!(passes(Gfp::KERNEL | Gfp::NORETRY, 0, 100_000), 1);
}

#[test]
fn an_ordinary_request_is_patient_while_there_is_hope() {
    assert_eq!(passes(Gfp::KERNEL, 0, 100_000), PATIENCE);
    assert_eq!(passes(Gfp::KERNEL, 3, 100_000), PATIENCE);
}

#[test]
fn without_hope_it_gives_up_at_once() {
    assert_eq!(passes(Gfp::KERNEL, 0, 0), 1);
    // Less than the request needs.
    assert_eq!(passes(Gfp::KERNEL, 3, 5), 1);
}

#[test]
fn a_costly_order_is_not_worth_a_second_pass_unless_repeat_says_so() {
    assert_eq!(passes(Gfp::KERNEL, 4, 100_000), 1);
    assert_eq!(passes(Gfp::KERNEL | Gfp::REPEAT, 4, 100_000), PATIENCE);
}

#[test]
fn progress_that_leads_nowhere_does_not_hold_a_costly_order_for_ever() {
    let (rig, held) = full();
    TestShrinker::register(&rig, 100_000, |_, sc, _| Some(sc.nr_to_scan));
    rig.run(|_| {
        let before = rig.stalls();
        assert!(rig.alloc_pages(Gfp::KERNEL | Gfp::REPEAT | Gfp::NOWARN, 4).is_err());
        assert_eq!(rig.stalls() - before, PATIENCE);
        rig.release(held);
    });
}

#[test]
fn requests_that_cannot_sleep_do_not_reclaim() {
    for gfp in [Gfp::ATOMIC, Gfp::NOWAIT, Gfp::HIGH, Gfp::empty()] {
        let (rig, mut held) = full();
        let (shrinker, _) = TestShrinker::register(&rig, 100_000, |_, _, _| Some(0));
        rig.run(|_| {
            let before = rig.stalls();
            held.extend(rig.exhaust(gfp | Gfp::NOWARN, 0));
            assert_eq!((rig.stalls() - before, shrinker.scans()), (0, 0), "{gfp}");
            rig.release(held);
        });
    }
}

#[test]
fn progress_keeps_an_ordinary_request_going() {
    let (rig, held) = full();
    let (last, rest) = held.split_last().unwrap();
    let last = *last;
    // Each pass frees something elsewhere, as it says; after a hundred scans it frees a frame.
    let (shrinker, _) = TestShrinker::register(&rig, 100_000, move |m, sc, n| {
        if n == 2000 {
            m.__free_page(m.pfn_to_page(last.0)?).unwrap();
        }
        Some(sc.nr_to_scan)
    });
    rig.run(|_| {
        let got = rig.take(Gfp::KERNEL, 0).unwrap();
        assert!(shrinker.scans() >= 2000);
        assert!(rig.stalls() > PATIENCE);
        rig.release(rest.iter().copied().chain([got]));
    });
}

/// A machine whose shrinker frees a block of `order` in the given pass of the next request, and no other.
fn relief_in_pass(pass: u64, order: u32) -> (Rig, Held) {
    let rig = Rig::flat();
    let (block, held) = rig.run(|_| {
        let block = rig.take(Gfp::KERNEL, order).unwrap();
        (block, rig.exhaust(Gfp::KERNEL | Gfp::NOWARN | Gfp::NORETRY, 0))
    });
    let before = rig.stalls();
    let stalls = |m: &kmem_hosted::Machine| {
        kmem::types::ZoneType::ALL
            .into_iter()
            .map(|z| m.vm_event(VmEvent::allocstall(z)))
            .sum::<u64>()
    };
    let waiting = Mutex::new(Some(block));
    TestShrinker::register(&rig, 100_000, move |m, _, _| {
        if stalls(m) - before < pass {
            return Some(0);
        }
        let (pfn, order) = waiting.lock().unwrap().take()?;
        m.__free_pages(m.pfn_to_page(pfn)?, order).unwrap();
        Some(1 << order)
    });
    (rig, held)
}

/// Whether a request gets the block that is freed in this pass.
fn outlasts(gfp: Gfp, order: u32, pass: u64) -> bool {
    let (rig, held) = relief_in_pass(pass, 5);
    rig.run(|_| {
        let got = rig.take(gfp | Gfp::NOWARN, order).ok();
        let late = if got.is_none() {
            // Nobody waited for it; a patient request brings the shrinker to free it now.
            rig.take(Gfp::KERNEL | Gfp::REPEAT | Gfp::NOWARN, order).ok()
        } else {
            None
        };
        rig.release(held.into_iter().chain(got).chain(late));
        got.is_some()
    })
}

#[test]
fn repeat_gets_what_comes_late_and_noretry_does_not() {
    assert!(outlasts(Gfp::KERNEL | Gfp::NORETRY, 0, 1));
    assert!(!outlasts(Gfp::KERNEL | Gfp::NORETRY, 0, 2));
    assert!(outlasts(Gfp::KERNEL, 0, 9));
    assert!(outlasts(Gfp::KERNEL, 5, 1));
    assert!(!outlasts(Gfp::KERNEL, 5, 3));
    assert!(outlasts(Gfp::KERNEL | Gfp::REPEAT, 5, 3));
}

#[test]
fn nofail_goes_on_where_all_others_give_up() {
    assert!(outlasts(Gfp::KERNEL | Gfp::NOFAIL, 0, PATIENCE + 5));
    assert!(outlasts(Gfp::KERNEL | Gfp::NOFAIL, 1, PATIENCE + 5));
    assert!(outlasts(Gfp::NOIO | Gfp::NOFAIL, 0, PATIENCE + 5));
    assert!(!outlasts(Gfp::KERNEL, 0, PATIENCE + 5));
    assert!(!outlasts(Gfp::KERNEL | Gfp::REPEAT, 0, PATIENCE + 5));
}

#[test]
fn nofail_waits_for_somebody_elses_free() {
    let (rig, mut held) = full();
    let task = Task::new();
    for scope in [false, true] {
        let mine = held.pop().unwrap();
        // The waiter has used up what it may, and nothing is left for it.
        let ready = Barrier::new(2);
        let got = thread::scope(|s| {
            let waiter = s.spawn(|| {
                rig.on(1, &task, |_| {
                    let saved = scope.then(|| task.memalloc_noreclaim_save());
                    // In the scope the reserve is open: use it up, so that NOFAIL has to wait.
                    let reserve =
                        if scope { rig.exhaust(Gfp::KERNEL | Gfp::NOWARN, 0) } else { Held::new() };
                    ready.wait();
                    let got = rig.take(Gfp::KERNEL | Gfp::NOFAIL, 0);
                    rig.release(reserve);
                    if let Some(saved) = saved {
                        task.memalloc_restore(saved);
                    }
                    got
                })
            });
            ready.wait();
            thread::sleep(Duration::from_millis(5));
            assert!(!waiter.is_finished(), "nothing is free yet");
            // It goes on a list of this CPU; the waiter has to have it drained.
            rig.run(|_| rig.release([mine]));
            waiter.join().unwrap()
        });
        held.push(got.unwrap());
    }
    rig.run(|_| rig.release(held));
}

#[test]
fn nofail_is_refused_where_it_could_not_wait() {
    let rig = Rig::flat();
    rig.run(|_| {
        for (gfp, order, why) in [
            (Gfp::ATOMIC | Gfp::NOFAIL, 0, GfpError::NofailCannotWait),
            (Gfp::NOWAIT | Gfp::NOFAIL, 0, GfpError::NofailCannotWait),
            (Gfp::KERNEL | Gfp::NOFAIL, 2, GfpError::NofailOrder),
            (Gfp::KERNEL | Gfp::NOFAIL, 10, GfpError::NofailOrder),
        ] {
            let mark = rig.mark();
            assert_eq!(rig.alloc_pages(gfp, order).err(), Some(AllocError::Invalid(why)));
            let report = rig.one_report(mark);
            assert!(report.contains(&why.to_string()) && report.contains(file!()), "{report}");
        }
    });
}

#[test]
fn the_oom_handler_is_the_last_resort_of_those_who_may_not_just_fail() {
    let asks = |gfp: Gfp, order: u32, task: &Task| {
        let (rig, held) = full();
        let oom = OomScript::install(&rig, |_, _| false);
        rig.run_as(task, |_| {
            let got = rig.exhaust(gfp | Gfp::NOWARN, order);
            rig.release(held.into_iter().chain(got));
        });
        oom.calls()
    };
    let task = Task::new();
    assert_eq!(asks(Gfp::KERNEL, 0, &task), 1);
    assert_eq!(asks(Gfp::KERNEL, 3, &task), 1);
    assert_eq!(asks(Gfp::USER, 0, &task), 1);
    for gfp in [
        Gfp::KERNEL | Gfp::NORETRY,
        Gfp::KERNEL | Gfp::REPEAT,
        Gfp::KERNEL | Gfp::THISNODE,
        Gfp::NOFS,
        Gfp::NOIO,
        Gfp::ATOMIC,
        Gfp::NOWAIT,
    ] {
        assert_eq!(asks(gfp, 0, &task), 0, "{gfp}");
    }
    assert_eq!(asks(Gfp::KERNEL, 4, &task), 0, "a costly order kills nobody");
    task.set_oom_victim(true);
    assert_eq!(asks(Gfp::KERNEL, 0, &task), 0, "a victim kills nobody");
}

#[test]
fn the_oom_handler_frees_and_the_request_goes_on() {
    let (rig, mut held) = full();
    let mine = Mutex::new(held.pop());
    let requests: Arc<Mutex<Vec<ReclaimRequest>>> = Arc::default();
    let seen = Arc::clone(&requests);
    let oom = OomScript::install(&rig, move |m, r| {
        seen.lock().unwrap().push(*r);
        let Some((pfn, order)) = mine.lock().unwrap().take() else { return false };
        m.__free_pages(m.pfn_to_page(pfn).unwrap(), order).is_ok()
    });
    rig.run(|_| {
        let mark = rig.mark();
        held.push(rig.take(Gfp::KERNEL, 0).unwrap());
        assert_eq!(oom.calls(), 1);
        assert!(rig.one_report(mark).contains("invoked oom-killer: gfp_mask=0xcc0(GFP_KERNEL)"));
        assert_eq!(rig.vm_event(VmEvent::OomKill), 1);
        assert_eq!(rig.alloc_page(Gfp::KERNEL).err(), Some(AllocError::NoMemory));
        assert_eq!(oom.calls(), 2);
        rig.release(held);
    });
    let requests = requests.lock().unwrap();
    assert_eq!((requests[0].order, requests[0].gfp, requests[0].node), (0, Gfp::KERNEL, 0));
}

#[test]
fn nofail_calls_the_oom_handler_even_where_others_would_not() {
    for gfp in [Gfp::KERNEL, Gfp::NOFS, Gfp::NOIO] {
        let (rig, mut held) = full();
        let mine = Mutex::new(held.pop());
        let oom = OomScript::install(&rig, move |m, _| {
            let Some((pfn, order)) = mine.lock().unwrap().take() else { return false };
            m.__free_pages(m.pfn_to_page(pfn).unwrap(), order).is_ok()
        });
        rig.run(|_| {
            held.push(rig.take(gfp | Gfp::NOFAIL, 0).unwrap());
            assert_eq!(oom.calls(), 1, "{gfp}");
            rig.release(held);
        });
    }
}

#[test]
fn an_injected_failure_spares_nofail() {
    let rig = Rig::flat();
    rig.run(|_| {
        for (gfp, order, fails) in [
            (Gfp::KERNEL | Gfp::NOWARN, 0, true),
            (Gfp::KERNEL | Gfp::NOWARN, 4, true),
            (Gfp::KERNEL | Gfp::NOFAIL, 0, false),
            (Gfp::KERNEL | Gfp::NOFAIL, 1, false),
        ] {
            rig.set_fault_plan(FaultPlan::Nth(0));
            let got = rig.take(gfp, order);
            rig.set_fault_plan(FaultPlan::Off);
            assert_eq!(got.is_err(), fails, "{gfp}");
            rig.release(got);
        }
        assert_eq!(rig.faults_injected(), 4);
    });
}

/// Who is on no CPU has no lists of its own; what others have on theirs is free memory all the same.
#[test]
fn a_caller_on_no_cpu_has_all_lists_drained_once() {
    let (rig, mut held) = full();
    rig.run(|_| {
        rig.drain_all_pages();
        let (pfn, order) = held.pop().unwrap();
        rig.__free_pages(rig.pfn_to_page(pfn).unwrap(), order).unwrap();
        let on_lists: u64 = rig.zones().iter().flat_map(|z| rig.pcp_frames(z)).sum();
        assert_eq!((order, on_lists), (0, 1));
    });
    let gfp = Gfp::KERNEL | Gfp::NORETRY | Gfp::NOWARN;
    let page = rig.alloc_page(gfp).unwrap();
    assert_eq!(rig.alloc_page(gfp).err(), Some(AllocError::NoMemory));
    rig.run(|_| {
        rig.__free_page(page).unwrap();
        rig.release(held);
    });
}
