//! Interrupts \[C1, C3\]: signals on the CPU's thread, a software mask, softirqs, IPIs, NMIs.

#[path = "../common/mod.rs"]
mod common;
mod race;
mod storm;

use common::until;
use kmem::platform::Platform;
use kmem_hosted::{CpuStats, Hosted, Shape};
use std::{
    hint,
    sync::{
        Arc, Weak,
        atomic::{
            AtomicBool, AtomicU32, AtomicU64, AtomicUsize,
            Ordering::{Relaxed, SeqCst},
        },
    },
    thread,
    time::{Duration, Instant},
};

fn machine(cpus: usize) -> Hosted {
    Hosted::new(Shape::x86_64(16 << 20).cpus(cpus)).unwrap()
}

fn stats(machine: &Hosted, cpu: usize) -> CpuStats {
    machine.stats(cpu).unwrap()
}

/// What a handler saw; handlers record, tests assert.
#[derive(Default)]
struct Seen {
    runs: AtomicU32,
    wrong: AtomicU32,
}

impl Seen {
    fn note(&self, right: bool) {
        self.runs.fetch_add(1, Relaxed);
        self.wrong.fetch_add(u32::from(!right), Relaxed);
    }

    fn runs(&self) -> u32 {
        self.runs.load(SeqCst)
    }

    fn check(&self) -> u32 {
        assert_eq!(self.wrong.load(SeqCst), 0, "handlers that saw a wrong context");
        self.runs()
    }
}

/// A handler's way to its machine, which must not own itself.
#[derive(Clone)]
struct MachineRef(Weak<Hosted>);

impl MachineRef {
    fn with(&self, f: impl FnOnce(&Hosted) -> bool) -> bool {
        // The tests keep their machine until no handler runs, so this is never the last reference.
        self.0.upgrade().is_some_and(|machine| f(&machine))
    }
}

fn shared(cpus: usize) -> (Arc<Hosted>, MachineRef) {
    let machine = Arc::new(machine(cpus));
    let weak = MachineRef(Arc::downgrade(&machine));
    (machine, weak)
}

/// Sets an IPI hook that checks its context.
fn watch_ipis(machine: &Hosted, to: MachineRef) -> Arc<Seen> {
    let seen = Arc::new(Seen::default());
    let noted = Arc::clone(&seen);
    assert!(machine.set_ipi_hook(Arc::new(move |_atomic, cpu| {
        noted.note(to.with(|m| {
            m.this_cpu().is_some_and(|c| {
                c.id() == cpu && c.context().in_hardirq() && c.context().irqs_off()
            })
        }));
    })));
    seen
}

#[test]
fn masked_interrupts_wait_for_the_restore() {
    let (machine, to) = shared(2);
    let seen = watch_ipis(&machine, to);
    machine
        .run_on(Some(0), None, |_process| {
            let outer = machine.local_irq_save();
            let inner = machine.local_irq_save();
            for other in [false, true] {
                if other {
                    thread::scope(|s| s.spawn(|| machine.kick(0)).join()).unwrap();
                } else {
                    machine.kick(0);
                }
            }
            until("the interrupt lands", || stats(&machine, 0).deferred > 0);
            assert_eq!(seen.runs(), 0, "interrupts are masked");
            machine.local_irq_restore(inner);
            assert_eq!(seen.runs(), 0, "they still are");
            machine.local_irq_restore(outer);
            assert_eq!(seen.check(), 1, "both kicks, served by the restore");
            assert!(machine.this_cpu().unwrap().context().may_sleep());
        })
        .unwrap();
}

#[test]
fn ipis_reach_idle_and_busy_cpus() {
    let (machine, to) = shared(3);
    let seen = watch_ipis(&machine, to);
    // Idle, by a thread on no CPU: done when kick returns.
    machine.kick(2);
    assert_eq!(seen.check(), 1);
    assert_eq!((stats(&machine, 2).ipis, stats(&machine, 2).posed), (1, 1));
    assert!(machine.this_cpu().is_none(), "posing is over");

    let there = AtomicBool::new(false);
    machine
        .run_on(Some(0), None, |_process| {
            // Idle, by a thread on another CPU, masked or not.
            machine.kick(2);
            let state = machine.local_irq_save();
            machine.kick(2);
            machine.local_irq_restore(state);
            assert_eq!(seen.check(), 3);
            assert_eq!(machine.this_cpu().unwrap().id(), 0);
            // The own CPU.
            machine.kick(0);
            assert_eq!(seen.check(), 4);
            assert_eq!(stats(&machine, 0).posed, 0);
            // Busy: the thread on it is interrupted in its loop.
            thread::scope(|s| {
                s.spawn(|| {
                    machine
                        .run_on(Some(1), None, |_process| {
                            there.store(true, SeqCst);
                            until("the IPI", || stats(&machine, 1).ipis == 1);
                        })
                        .unwrap();
                });
                until("the other CPU is busy", || there.load(SeqCst));
                machine.kick(1);
            });
        })
        .unwrap();
    assert_eq!(seen.check(), 5);
    assert_eq!((stats(&machine, 1).ipis, stats(&machine, 1).posed), (1, 0));
    // An offline CPU is an idle one.
    assert_eq!(machine.set_online(1, false), Ok(true));
    machine.kick(1);
    assert_eq!((seen.check(), stats(&machine, 1).posed), (6, 1));
}

#[test]
fn the_posers_own_interrupts_wait() {
    // While a thread on CPU 0 poses as CPU 1, an interrupt for CPU 0 must not run: the hook may hold
    // a lock that masks interrupts on CPU 1 only.
    let (machine, to) = shared(2);
    let (in_hook, overlap, order) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicU32::new(0)),
        Arc::new(AtomicU32::new(0)),
    );
    let (flag, bad, served) = (Arc::clone(&in_hook), Arc::clone(&overlap), Arc::clone(&order));
    machine.set_ipi_hook(Arc::new(move |_atomic, cpu| {
        if cpu == 1 {
            flag.store(true, SeqCst);
            // An interrupt for the poser's own CPU lands right here.
            to.with(|m| {
                m.kick(0);
                true
            });
            bad.fetch_add(served.load(SeqCst), SeqCst);
            flag.store(false, SeqCst);
        } else {
            bad.fetch_add(u32::from(flag.load(SeqCst)), SeqCst);
            served.fetch_add(1, SeqCst);
        }
    }));
    machine
        .run_on(Some(0), None, |_process| {
            machine.kick(1);
            assert_eq!(order.load(SeqCst), 1, "served when the posing ended");
        })
        .unwrap();
    assert_eq!(overlap.load(SeqCst), 0);
    assert_eq!(stats(&machine, 0).deferred, 1);
}

#[test]
fn softirqs_run_after_interrupts_and_interrupts_nest_in_them() {
    const NESTING: Duration = Duration::from_secs(5);
    let (machine, to) = shared(1);
    let soft = Arc::new(Seen::default());
    let inside = Arc::new(AtomicU32::new(0));
    let (in_soft, noted, back) = (Arc::clone(&inside), Arc::clone(&soft), to.clone());
    let storming = Arc::new(AtomicBool::new(true));
    let ticking = Arc::clone(&storming);
    machine.set_softirq_handler(Arc::new(move |_atomic, cpu, raised| {
        let nested = in_soft.fetch_add(1, SeqCst) != 0;
        noted.note(to.with(|m| {
            let context = m.this_cpu().unwrap().context();
            let mut right = context.in_softirq() && !context.in_hardirq() && !context.irqs_off();
            if raised & 2 != 0 {
                // Wait for an interrupt to land in the softirq, as long as there are any.
                let before = stats(m, cpu).nested;
                let start = Instant::now();
                let failed = noted.wrong.load(SeqCst) != 0;
                let due = || !failed && ticking.load(SeqCst) && start.elapsed() < NESTING;
                while stats(m, cpu).nested == before && due() {
                    hint::spin_loop();
                }
                right &= stats(m, cpu).nested > before || !ticking.load(SeqCst);
            }
            right && !nested
        }));
        in_soft.fetch_sub(1, SeqCst);
    }));
    let hard = Arc::new(Seen::default());
    let (noted, soft_runs) = (Arc::clone(&hard), Arc::clone(&soft));
    // What the interrupts raise.
    let bits = Arc::new(AtomicU32::new(1));
    let wanted = Arc::clone(&bits);
    machine.set_timer_handler(Arc::new(move |_atomic, _cpu| {
        let before = soft_runs.runs();
        let bits = wanted.load(SeqCst);
        noted.note(back.with(|m| m.raise_softirq(bits) && soft_runs.runs() == before));
    }));
    machine
        .run(|_process| {
            // Raised in process context: at once. Masked: on restore.
            assert!(machine.raise_softirq(1));
            assert_eq!(soft.check(), 1);
            let state = machine.local_irq_save();
            assert!(machine.raise_softirq(1));
            assert_eq!(soft.check(), 1);
            machine.local_irq_restore(state);
            assert_eq!(soft.check(), 2);

            assert!(machine.start_storm(0, 10_000));
            until("softirqs out of interrupts", || soft.runs() >= 12);
            // Interrupts nest in a softirq of process context, and in one of an interrupt.
            assert!(machine.raise_softirq(2));
            let nested = stats(&machine, 0).nested;
            assert!(nested >= 1);
            bits.store(2, SeqCst);
            until("nesting in an interrupt's softirq", || stats(&machine, 0).nested > nested + 3);
            // What is still raised must not wait for ticks that do not come.
            storming.store(false, SeqCst);
            machine.stop_storm(0);
        })
        .unwrap();
    let s = stats(&machine, 0);
    assert!(hard.check() >= 10);
    assert_eq!(u64::from(soft.check()), s.softirqs);
}

#[test]
fn a_softirq_that_raises_itself_does_not_take_the_cpu_for_ever() {
    let (machine, to) = shared(1);
    machine.set_softirq_handler(Arc::new(move |_atomic, _cpu, raised| {
        to.with(|m| m.raise_softirq(raised));
    }));
    machine.run(|_process| assert!(machine.raise_softirq(4))).unwrap();
    let rounds = stats(&machine, 0).softirqs;
    assert!((10..=30).contains(&rounds), "{rounds}");
}

#[test]
fn an_nmi_ignores_the_mask() {
    let (machine, to) = shared(2);
    let seen = Arc::new(Seen::default());
    let noted = Arc::clone(&seen);
    machine.set_nmi_handler(Arc::new(move |_atomic, cpu| {
        noted.note(to.with(|m| {
            let here = m.this_cpu().unwrap();
            here.id() == cpu && here.context().in_nmi() && !here.context().may_sleep()
        }));
    }));
    let ticked = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&ticked);
    machine.set_ipi_hook(Arc::new(move |_atomic, _cpu| {
        count.fetch_add(1, SeqCst);
    }));
    machine
        .run_on(Some(0), None, |_process| {
            let state = machine.local_irq_save();
            machine.kick(0);
            thread::scope(|s| s.spawn(|| machine.send_nmi(0)).join()).unwrap();
            until("the NMI", || seen.runs() == 1);
            assert_eq!(ticked.load(SeqCst), 0, "the NMI does not let interrupts in");
            machine.local_irq_restore(state);
            assert_eq!(ticked.load(SeqCst), 1);
            assert!(machine.this_cpu().unwrap().context().may_sleep());
        })
        .unwrap();
    machine.send_nmi(1);
    assert_eq!(seen.check(), 2, "an idle CPU takes it too");
    assert_eq!(stats(&machine, 0).nmis + stats(&machine, 1).nmis, 2);
}

/// An NMI that lands in one that was found before its signal came is taken after it, not with the next.
#[test]
fn an_nmi_that_lands_in_an_nmi_follows_it() {
    let (machine, to) = shared(1);
    let runs = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&runs);
    machine.set_nmi_handler(Arc::new(move |_atomic, cpu| {
        if count.fetch_add(1, SeqCst) == 0 {
            to.with(|m| {
                m.send_nmi(cpu);
                true
            });
        }
    }));
    machine
        .run(|_process| {
            // SAFETY: sets of signals, valid for the calls; the thread's mask is put back below.
            let before = unsafe {
                let (mut all, mut before) = (std::mem::zeroed(), std::mem::zeroed());
                libc::sigfillset(&raw mut all);
                libc::pthread_sigmask(libc::SIG_BLOCK, &raw const all, &raw mut before);
                before
            };
            let state = machine.local_irq_save();
            // So that the restore looks at what is pending.
            machine.raise_softirq(1);
            machine.send_nmi(0);
            let early = runs.load(SeqCst);
            machine.local_irq_restore(state);
            let after = runs.load(SeqCst);
            // SAFETY: as above.
            unsafe {
                libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut());
            }
            assert_eq!((early, after, runs.load(SeqCst)), (0, 2, 2));
        })
        .unwrap();
}

#[test]
fn interrupts_of_the_outer_machine_are_served_inside_the_inner() {
    let ((a, to_a), (b, to_b)) = (shared(1), shared(1));
    let (seen_a, seen_b) = (watch_ipis(&a, to_a), watch_ipis(&b, to_b));
    a.run(|process| {
        b.run_nested(process, None, None, |_process| {
            let state = b.local_irq_save();
            a.kick(0);
            b.kick(0);
            assert_eq!((seen_a.check(), seen_b.check()), (1, 0), "B is masked, A is not");
            b.local_irq_restore(state);
            assert_eq!((seen_a.check(), seen_b.check()), (1, 1));
        })
        .unwrap();
    })
    .unwrap();
}
