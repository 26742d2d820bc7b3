//! Tasks and CPUs \[X1\]: more tasks than CPUs, sleep and wake-up, migration, CPUs coming and going.

mod common;

use common::until;
use kmem::{
    context::Task,
    platform::{Level, Platform},
};
use kmem_hosted::{AttachError, Hosted, OfflineError, ReportLog, Shape};
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{
            AtomicBool, AtomicU32, AtomicUsize,
            Ordering::{Relaxed, SeqCst},
        },
    },
    thread,
    time::{Duration, Instant},
};

fn machine(cpus: usize) -> Hosted {
    Hosted::new(Shape::x86_64(16 << 20).cpus(cpus)).unwrap()
}

fn here(machine: &Hosted) -> usize {
    machine.this_cpu().expect("on a CPU").id()
}

#[test]
fn never_two_tasks_on_one_cpu() {
    let machine = machine(2);
    let on_cpu = [AtomicUsize::new(0), AtomicUsize::new(0)];
    let turns = AtomicUsize::new(0);
    thread::scope(|s| {
        for _ in 0..8 {
            s.spawn(|| {
                machine
                    .run(|process| {
                        for turn in 0..100 {
                            let cpu = here(&machine);
                            assert_eq!(on_cpu[cpu].fetch_add(1, SeqCst), 0);
                            if turn % 10 == 0 {
                                thread::yield_now();
                            }
                            assert_eq!(on_cpu[cpu].fetch_sub(1, SeqCst), 1);
                            turns.fetch_add(1, Relaxed);
                            machine.cond_resched(process);
                        }
                    })
                    .unwrap();
            });
        }
    });
    assert_eq!(turns.into_inner(), 800);
    assert!(machine.this_cpu().is_none());
}

#[test]
fn sleepers_leave_their_cpu_to_others() {
    // One CPU, a ring of tasks that pass a token: each sleeps until it is its turn.
    const TASKS: u32 = 6;
    const ROUNDS: u32 = 50;
    let machine = machine(1);
    let token = AtomicU32::new(0);
    thread::scope(|s| {
        for me in 0..TASKS {
            let (machine, token) = (&machine, &token);
            s.spawn(move || {
                machine
                    .run(|_process| {
                        loop {
                            let now = token.load(SeqCst);
                            if now >= TASKS * ROUNDS {
                                return;
                            }
                            if now % TASKS == me {
                                token.store(now + 1, SeqCst);
                                machine.wake(token);
                            } else {
                                machine.wait(token, now, u64::MAX);
                            }
                        }
                    })
                    .unwrap();
            });
        }
    });
    assert_eq!(token.into_inner(), TASKS * ROUNDS);
}

#[test]
fn waiting_ends_by_time_by_value_and_by_wake() {
    let machine = machine(1);
    let word = AtomicU32::new(5);
    let wait = |expected, ns| {
        let start = Instant::now();
        machine.wait(&word, expected, ns);
        start.elapsed()
    };
    for attached in [false, true] {
        let check = || {
            assert!(wait(4, u64::MAX) < Duration::from_secs(5), "the word holds another value");
            assert!(wait(5, 3_000_000) >= Duration::from_millis(2), "time-out");
        };
        if attached {
            machine.run(|_process| check()).unwrap();
        } else {
            check();
        }
    }
    // A waiter that is attached, a waker that is not.
    thread::scope(|s| {
        s.spawn(|| {
            machine
                .run(|_process| {
                    while word.load(SeqCst) == 5 {
                        machine.wait(&word, 5, u64::MAX);
                    }
                })
                .unwrap();
        });
        thread::sleep(Duration::from_millis(2));
        word.store(6, SeqCst);
        machine.wake(&word);
    });
}

#[test]
fn a_task_migrates_and_keeps_its_task() {
    let machine = machine(2);
    let task = Task::new();
    let word = AtomicU32::new(0);
    let (slept, hog) = (AtomicBool::new(false), AtomicBool::new(true));
    thread::scope(|s| {
        let (machine, task, word, slept, hog) = (&machine, &task, &word, &slept, &hog);
        s.spawn(move || {
            machine
                .run_on(None, Some(task), |_process| {
                    let first = here(machine);
                    word.store(1 + first as u32, SeqCst);
                    let current = || machine.this_cpu().and_then(|cpu| cpu.current());
                    assert!(std::ptr::eq(current().unwrap(), task));
                    while word.load(SeqCst) != 9 {
                        slept.store(true, SeqCst);
                        machine.wait(word, 1 + first as u32, u64::MAX);
                    }
                    assert_ne!(here(machine), first, "its CPU was taken meanwhile");
                    assert!(std::ptr::eq(current().unwrap(), task));
                    hog.store(false, SeqCst);
                })
                .unwrap();
        });
        until("the task sleeps", || slept.load(SeqCst));
        let first = word.load(SeqCst) as usize - 1;
        // Taking its CPU works only once it has given it up.
        machine
            .run_on(Some(first), None, |_process| {
                let here = machine.this_cpu().unwrap().current().unwrap();
                assert!(!std::ptr::eq(here, task), "it took its task along");
                word.store(9, SeqCst);
                machine.wake(word);
                until("the task runs elsewhere", || !hog.load(SeqCst));
            })
            .unwrap();
    });
}

#[test]
fn first_come_first_served() {
    let machine = machine(1);
    let order = AtomicUsize::new(0);
    let started = AtomicUsize::new(0);
    thread::scope(|s| {
        machine
            .run(|_process| {
                for me in 0..4 {
                    let (machine, order, started) = (&machine, &order, &started);
                    s.spawn(move || {
                        started.fetch_add(1, SeqCst);
                        machine.run(|_process| assert_eq!(order.fetch_add(1, SeqCst), me)).unwrap();
                    });
                    until("the thread starts", || started.load(SeqCst) == me + 1);
                    thread::sleep(Duration::from_millis(20));
                }
                assert_eq!(order.load(SeqCst), 0, "nobody ran while the CPU was taken");
            })
            .unwrap();
    });
    assert_eq!(order.into_inner(), 4);
}

#[test]
fn bound_tasks_stay() {
    let machine = machine(3);
    for cpu in [2, 0, 1] {
        let word = AtomicU32::new(0);
        machine
            .run_on(Some(cpu), None, |process| {
                assert_eq!(here(&machine), cpu);
                machine.wait(&word, 0, 100_000);
                assert_eq!(here(&machine), cpu);
                machine.cond_resched(process);
                assert_eq!(here(&machine), cpu);
            })
            .unwrap();
    }
    assert_eq!(machine.run_on(Some(3), None, |_| ()), Err(AttachError::NotOnline(3)));
}

#[test]
fn going_offline_waits_for_the_task() {
    let machine = machine(2);
    let (running, leave, left) =
        (AtomicBool::new(false), AtomicBool::new(false), AtomicBool::new(false));
    thread::scope(|s| {
        s.spawn(|| {
            machine
                .run_on(Some(1), None, |process| {
                    running.store(true, SeqCst);
                    until("the go-ahead", || leave.load(SeqCst));
                    left.store(true, SeqCst);
                    machine.cond_resched(process);
                    assert_eq!(here(&machine), 0, "its CPU is offline: it goes on on another");
                    machine.cond_resched(process);
                })
                .unwrap();
        });
        until("the task runs", || running.load(SeqCst));
        let offline = s.spawn(|| {
            assert_eq!(machine.set_online(1, false), Ok(true));
            assert!(left.load(SeqCst), "the task was still there");
        });
        thread::sleep(Duration::from_millis(5));
        assert!(!offline.is_finished());
        leave.store(true, SeqCst);
    });
    assert!(!machine.is_online(1) && machine.is_online(0));
    assert_eq!(machine.run_on(Some(1), None, |_| ()), Err(AttachError::NotOnline(1)));
    for _ in 0..4 {
        assert_eq!(machine.run(|_process| here(&machine)), Ok(0));
    }
    assert_eq!(machine.set_online(0, false), Err(OfflineError::LastCpu(0)));
    assert_eq!(machine.set_online(7, false), Err(OfflineError::NoSuchCpu(7)));
    assert_eq!(machine.set_online(1, true), Ok(true));
    machine
        .run_on(Some(1), None, |_process| {
            assert_eq!(machine.set_online(1, false), Err(OfflineError::OwnCpu(1)));
            assert_eq!(machine.set_online(0, false), Ok(true));
        })
        .unwrap();
}

#[test]
fn a_cpu_that_comes_online_takes_who_waits() {
    let machine = machine(2);
    assert_eq!(machine.set_online(1, false), Ok(true));
    let started = AtomicBool::new(false);
    let ran = AtomicBool::new(false);
    thread::scope(|s| {
        machine
            .run(|_process| {
                s.spawn(|| {
                    started.store(true, SeqCst);
                    machine.run(|_process| ran.store(here(&machine) == 1, SeqCst)).unwrap();
                });
                until("the thread starts", || started.load(SeqCst));
                assert_eq!(machine.set_online(1, true), Ok(true));
                until("the task runs on the new CPU", || ran.load(SeqCst));
            })
            .unwrap();
    });
}

#[test]
fn two_machines_and_a_thread_on_none() {
    let (a, b) = (machine(1), machine(1));
    assert!(a.this_cpu().is_none());
    a.run(|process| {
        assert!(a.this_cpu().is_some());
        assert!(b.this_cpu().is_none(), "on A, unattached on B");
        assert_eq!(b.run(|_| ()), Err(AttachError::AlreadyAttached));
        b.run_nested(process, None, None, |process| {
            let on = |m: &Hosted| std::ptr::from_ref(m.this_cpu().unwrap());
            assert_ne!(on(&a), on(&b));
            assert!(std::ptr::eq(on(&a), a.cpu(0).unwrap()));
            assert!(std::ptr::eq(on(&b), b.cpu(0).unwrap()));
            // Masks of one machine are not the other's.
            let state = b.local_irq_save();
            assert!(b.this_cpu().unwrap().context().irqs_off());
            assert!(a.this_cpu().unwrap().context().may_sleep());
            b.local_irq_restore(state);
            assert_eq!(
                a.run_nested(process, None, None, |_| ()),
                Err(AttachError::AlreadyAttached)
            );
            // B's CPU is given up for the sleep, A's is not.
            thread::scope(|s| {
                let word = AtomicU32::new(0);
                let other = s.spawn(|| b.run(|_process| ()));
                while !other.is_finished() {
                    b.wait(&word, 0, 1_000_000);
                }
            });
            a.wait(&AtomicU32::new(0), 0, 1000);
            assert!(std::ptr::eq(on(&a), a.cpu(0).unwrap()));
        })
        .unwrap();
        assert!(b.this_cpu().is_none());
        let other = thread::scope(|s| s.spawn(|| a.this_cpu().is_none()).join());
        assert_eq!(other.ok(), Some(true));
    })
    .unwrap();
    assert!(a.this_cpu().is_none());
}

#[test]
fn the_unattached_are_served() {
    let machine = machine(2);
    let state = machine.local_irq_save();
    machine.local_irq_restore(state);
    assert!(!machine.raise_softirq(1));
    machine.kick(99);
    machine.relax();
    let before = machine.now_ns();
    assert!(machine.now_ns() >= before);
}

#[test]
fn a_thread_may_run_a_task_while_it_is_torn_down() {
    struct AtExit(Hosted, Arc<AtomicUsize>);
    impl Drop for AtExit {
        fn drop(&mut self) {
            assert!(self.0.this_cpu().is_none());
            let cpus = self.0.run(|_process| usize::from(self.0.this_cpu().is_some())).unwrap();
            self.1.fetch_add(cpus, SeqCst);
        }
    }
    thread_local! {
        static EARLY: std::cell::OnceCell<AtExit> = const { std::cell::OnceCell::new() };
    }
    let (machine, ran) = (machine(1), Arc::new(AtomicUsize::new(0)));
    let (handle, count) = (machine.clone(), Arc::clone(&ran));
    thread::spawn(move || {
        // Set before the thread's signal stack is, so it is destroyed after it.
        EARLY.with(|early| early.set(AtExit(handle.clone(), count)).ok());
        handle.run(|_process| ()).unwrap();
    })
    .join()
    .unwrap();
    assert_eq!(ran.load(SeqCst), 1);
    machine.run(|_process| ()).unwrap();
}

#[test]
fn a_panic_gives_the_cpu_up() {
    let machine = machine(1);
    let result = catch_unwind(AssertUnwindSafe(|| {
        machine.run(|_process| std::panic::resume_unwind(Box::new("on purpose")))
    }));
    assert!(result.is_err());
    assert_eq!(machine.run(|_process| 3), Ok(3));
}

#[test]
fn sleeping_or_leaving_in_an_atomic_section_is_reported() {
    let machine = machine(1);
    let log = Arc::new(ReportLog::new());
    let sink = Arc::clone(&log);
    assert!(machine.set_report_sink(Arc::new(move |level, text: &str| sink.push(level, text))));
    machine
        .run(|_process| {
            let _masked = machine.local_irq_save();
            machine.wait(&AtomicU32::new(0), 0, u64::MAX);
        })
        .unwrap();
    let texts = log.all();
    assert_eq!(texts.len(), 2, "{texts:?}");
    assert_eq!(texts[0].0, Level::Bug);
    assert!(texts[0].1.starts_with("sleeping in atomic context"), "{texts:?}");
    assert!(texts[1].1.starts_with("scheduling while atomic: CPU 0"), "{texts:?}");
    // The CPU is usable again.
    machine.run(|_process| assert!(machine.this_cpu().unwrap().context().may_sleep())).unwrap();
    assert_eq!(log.count(), 2);
}
