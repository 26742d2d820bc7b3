//! Context \[C1, C4\]: who may sleep is known, asking to where one may not is refused and reported, and reclaim
//! that allocates does not reclaim.

mod recursion;

use kmem::{
    AllocError, Gfp, Misuse,
    context::{Context, Section, Task},
    platform::Platform,
    sync::{SpinLock, irqs_disabled, preempt_disabled},
};
use kmem_hosted::Machine;
use kmem_test_support::Rig;
use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

/// Every call that may sleep, with masks that say so.
fn every_blocking_call(m: &Machine) -> Vec<Option<AllocError>> {
    let mut results = Vec::new();
    for gfp in [Gfp::KERNEL, Gfp::NOFS, Gfp::NOIO, Gfp::USER, Gfp::KERNEL | Gfp::NOFAIL] {
        results.push(m.alloc_pages(gfp, 0).err());
        results.push(m.alloc_page(gfp).err());
        results.push(m.alloc_pages_node(0, gfp, 1).err());
        results.push(m.__get_free_pages(gfp, 1).err());
        results.push(m.__get_dma_pages(gfp, 0).err());
        results.push(m.get_zeroed_page(gfp).err());
        results.push(m.alloc_pages_exact(4096, gfp).err());
        results.push(m.alloc_pages_bulk(gfp, &mut [None]).err());
    }
    results
}

/// Checks that one may not sleep here, and what is still allowed.
#[track_caller]
fn assert_atomic(rig: &Rig, what: &str) {
    let mark = rig.mark();
    let results = every_blocking_call(rig);
    assert!(results.iter().all(|r| *r == Some(AllocError::Context)), "{what}: {results:?}");
    let reports = rig.since(mark);
    assert_eq!(reports.len(), results.len());
    for (_, report) in reports {
        let text = "BUG: sleeping function called from invalid context at ";
        assert!(report.starts_with(text), "{report}");
        assert!(report.contains("kmem/tests/context/main.rs:"), "{report}");
        assert!(report.contains(what), "{report}");
        assert!(report.contains("mode:0x"), "{report}");
    }
    for gfp in [Gfp::ATOMIC, Gfp::NOWAIT, Gfp::ATOMIC | Gfp::ZERO, Gfp::empty()] {
        for order in [0, 1, 4, 10] {
            rig.release([rig.take(gfp, order).unwrap()]);
        }
    }
    let mut pages = [None; 4];
    assert_eq!(rig.alloc_pages_bulk(Gfp::ATOMIC, &mut pages), Ok(4));
    rig.free_pages_bulk(&mut pages).unwrap();
}

#[test]
fn process_context_may_sleep() {
    let rig = Rig::flat();
    rig.run(|_| {
        let context = rig.hosted().this_cpu().unwrap().context();
        assert!(context.may_sleep() && !context.in_interrupt() && !context.irqs_off());
        assert_eq!(context, Context::PROCESS);
        rig.release([rig.take(Gfp::KERNEL, 0).unwrap()]);
    });
    // A thread on no CPU is served too.
    rig.release([rig.take(Gfp::KERNEL, 3).unwrap()]);
}

#[test]
fn no_sleeping_with_preemption_off() {
    let rig = Rig::flat();
    rig.run(|process| {
        preempt_disabled(rig.hosted(), process, |_| assert_atomic(&rig, "preempt_count: 1"));
        rig.release([rig.take(Gfp::KERNEL, 0).unwrap()]);
    });
}

#[test]
fn no_sleeping_with_interrupts_masked() {
    let rig = Rig::flat();
    rig.run(|process| {
        irqs_disabled(rig.hosted(), process, |_| assert_atomic(&rig, "irqs_disabled(): 1"));
        rig.release([rig.take(Gfp::KERNEL, 0).unwrap()]);
    });
}

#[test]
fn no_sleeping_under_a_spin_lock() {
    let rig = Rig::flat();
    let (outer, inner) = (SpinLock::new(1), SpinLock::new(2));
    rig.run(|process| {
        outer.with(rig.hosted(), process, |atomic, a| {
            assert_atomic(&rig, "preempt_count: 1");
            inner.with_atomic(rig.hosted(), atomic, |_, b| {
                *a += *b;
                assert_atomic(&rig, "preempt_count: 2");
            });
            assert_atomic(&rig, "preempt_count: 1");
        });
        assert_eq!(outer.with(rig.hosted(), process, |_, a| *a), 3);
        rig.release([rig.take(Gfp::KERNEL, 0).unwrap()]);
    });
}

#[test]
fn every_kind_of_section_is_atomic() {
    let rig = Rig::flat();
    rig.run(|_| {
        let cpu = rig.hosted().this_cpu().unwrap();
        for (section, what) in [
            (Section::Preempt, "preempt_count: 1"),
            (Section::Softirq, "softirq: 1"),
            (Section::Hardirq, "hardirq: 1"),
        ] {
            cpu.enter(section);
            assert!(!cpu.context().may_sleep());
            assert_eq!(cpu.context().in_interrupt(), section != Section::Preempt);
            assert_atomic(&rig, what);
            cpu.leave(section);
        }
        assert!(cpu.context().may_sleep());
    });
}

/// What an interrupt handler found, in counts.
#[derive(Default)]
struct Found {
    runs: AtomicU32,
    refused: AtomicU32,
    served: AtomicU32,
    wrong: AtomicU32,
}

impl Found {
    fn note(&self, m: &Machine, right: bool) {
        self.runs.fetch_add(1, SeqCst);
        self.wrong.fetch_add(u32::from(!right), SeqCst);
        let refused = m.alloc_page(Gfp::KERNEL).err() == Some(AllocError::Context);
        self.refused.fetch_add(u32::from(refused), SeqCst);
        if let Ok(page) = m.alloc_page(Gfp::ATOMIC) {
            self.served.fetch_add(u32::from(m.__free_page(page).is_ok()), SeqCst);
        }
    }

    fn check(&self) -> u32 {
        let [runs, refused, served, wrong] =
            [&self.runs, &self.refused, &self.served, &self.wrong].map(|n| n.load(SeqCst));
        assert_eq!((refused, served, wrong), (runs, runs, 0));
        runs
    }
}

fn until(what: &str, done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(20), "gave up waiting: {what}");
        std::hint::spin_loop();
    }
}

#[test]
fn interrupt_handlers_use_atomic() {
    let rig = Rig::flat();
    let found = Arc::new(Found::default());
    let (noted, machine) = (Arc::clone(&found), Arc::downgrade(rig.machine()));
    rig.hosted().set_timer_handler(Arc::new(move |_atomic, _cpu| {
        let Some(m) = machine.upgrade() else { return };
        let context = m.hosted().this_cpu().map(|cpu| cpu.context());
        noted.note(&m, context.is_some_and(|c| c.in_hardirq() && c.irqs_off()));
    }));
    rig.run(|_| {
        rig.hosted().start_storm(0, 2000);
        until("interrupts", || found.runs.load(SeqCst) >= 5);
        rig.hosted().stop_storm(0);
    });
    assert!(found.check() >= 5);
    assert!(rig.since(0).iter().all(|(_, r)| r.contains("hardirq: 1")));
}

#[test]
fn softirqs_and_what_runs_in_them_use_atomic() {
    let rig = Rig::flat();
    let found = Arc::new(Found::default());
    let (noted, machine) = (Arc::clone(&found), Arc::downgrade(rig.machine()));
    rig.hosted().set_softirq_handler(Arc::new(move |_atomic, _cpu, bits| {
        let Some(m) = machine.upgrade() else { return };
        let context = m.hosted().this_cpu().map(|cpu| cpu.context());
        let right = context.is_some_and(|c| c.in_softirq() && !c.in_hardirq() && !c.irqs_off());
        // Bit 6 is the tasklets', as in the kernel.
        noted.note(&m, right && bits & 0x41 != 0);
    }));
    rig.run(|_| {
        assert!(rig.hosted().raise_softirq(1));
        assert!(rig.hosted().raise_softirq(1 << 6));
    });
    assert_eq!(found.check(), 2);
    assert!(rig.since(0).iter().all(|(_, r)| r.contains("softirq: 1")));
}

#[test]
fn an_nmi_gets_no_memory_and_gives_none_back() {
    let rig = Rig::flat();
    let block = rig.run(|_| rig.take(Gfp::KERNEL, 0)).unwrap();
    let done = Arc::new(AtomicU32::new(0));
    let right = Arc::new(AtomicU32::new(0));
    let (d, r, machine) = (Arc::clone(&done), Arc::clone(&right), Arc::downgrade(rig.machine()));
    rig.hosted().set_nmi_handler(Arc::new(move |_atomic, _cpu| {
        let Some(m) = machine.upgrade() else { return };
        let page = m.pfn_to_page(block.0);
        let checks = [
            m.alloc_page(Gfp::ATOMIC).err() == Some(AllocError::Context),
            m.alloc_page(Gfp::empty()).err() == Some(AllocError::Context),
            m.alloc_pages(Gfp::KERNEL, 3).err() == Some(AllocError::Context),
            m.alloc_pages_bulk(Gfp::ATOMIC, &mut [None]) == Err(AllocError::Context),
            page.map(|p| m.__free_page(p)) == Some(Err(Misuse::InNmi)),
            page.map(|p| m.put_page(p)) == Some(Err(Misuse::InNmi)),
            m.free_pages_bulk(&mut [page]) == Err(Misuse::InNmi),
            m.drain_this_cpu() == 0,
        ];
        let bits = checks.iter().enumerate().fold(0, |sum, (i, ok)| sum | u32::from(*ok) << i);
        r.store(bits, SeqCst);
        d.fetch_add(1, SeqCst);
    }));
    rig.run(|_| {
        rig.hosted().send_nmi(0);
        until("the NMI", || done.load(SeqCst) == 1);
        assert_eq!(right.load(SeqCst), 0xff);
        let page = rig.pfn_to_page(block.0).unwrap();
        assert_eq!(page.page_count(), 1, "the block is as it was");
        rig.__free_page(page).unwrap();
    });
    let reports = rig.since(0);
    let refused = reports.iter().filter(|(_, r)| r.contains("BUG: allocation in NMI context"));
    assert_eq!(refused.count(), 4);
    assert_eq!(reports.iter().filter(|(_, r)| r.contains("NMI handler")).count(), 3);
}

#[test]
fn nofail_is_refused_where_it_could_not_wait() {
    let rig = Rig::flat();
    rig.run(|process| {
        preempt_disabled(rig.hosted(), process, |_| {
            let refused = rig.alloc_page(Gfp::KERNEL | Gfp::NOFAIL).err();
            assert_eq!(refused, Some(AllocError::Context));
        });
    });
}

#[test]
fn each_cpu_has_a_context_of_its_own() {
    let rig = Rig::flat();
    rig.run(|process| {
        preempt_disabled(rig.hosted(), process, |_| {
            thread::scope(|s| {
                s.spawn(|| {
                    rig.on(1, &Task::new(), |_| {
                        rig.release([rig.take(Gfp::KERNEL, 0).unwrap()]);
                        assert!(rig.hosted().this_cpu().unwrap().context().may_sleep());
                    })
                });
            });
        });
    });
}

#[test]
fn tasks_that_come_and_go_leave_no_trace() {
    let rig = Rig::flat();
    let task = Task::new();
    rig.run_as(&task, |_| {
        let saved = task.memalloc_noreclaim_save();
        let cpu = rig.hosted().this_cpu().unwrap();
        assert!(std::ptr::eq(cpu.current().unwrap(), &task));
        task.memalloc_restore(saved);
    });
    rig.machine()
        .run_on(Some(0), None, |_| {
            let next = rig.hosted().this_cpu().unwrap().current().expect("a task of its own");
            assert!(!std::ptr::eq(next, &task));
        })
        .unwrap();
}
