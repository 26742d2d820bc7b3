//! Timer storms: rate, context, mask, and threads that come and go \[C3\].

use super::*;

#[test]
fn a_storm_ticks_at_its_rate_in_the_right_context() {
    const HZ: u32 = 10_000;
    const LENGTH: Duration = Duration::from_millis(200);
    let (machine, to) = shared(2);
    let seen = Arc::new(Seen::default());
    let noted = Arc::clone(&seen);
    assert!(machine.set_timer_handler(Arc::new(move |_atomic, cpu| {
        noted.note(to.with(|m| {
            m.this_cpu().is_some_and(|c| {
                let context = c.context();
                c.id() == cpu
                    && context.in_hardirq()
                    && context.irqs_off()
                    && context.in_interrupt()
                    && !context.in_softirq()
                    && !context.in_nmi()
                    && !context.may_sleep()
            })
        }));
    })));
    assert!(!machine.set_timer_handler(Arc::new(|_, _| ())), "one handler only");
    thread::scope(|s| {
        for cpu in 0..2 {
            let machine = &machine;
            s.spawn(move || {
                assert!(machine.start_storm(cpu, HZ));
                machine
                    .run_on(Some(cpu), None, |_process| {
                        let start = Instant::now();
                        let mut work = 0u64;
                        while start.elapsed() < LENGTH {
                            work = hint::black_box(work.wrapping_mul(31).wrapping_add(7));
                            assert!(machine.this_cpu().unwrap().context().may_sleep());
                        }
                        assert!(machine.stop_storm(cpu));
                        let late = start.elapsed();
                        let s = stats(machine, cpu);
                        let due = late.as_secs_f64() * f64::from(HZ);
                        let came = (s.ticks + s.overruns) as f64;
                        assert!(came > due * 0.5 && came < due * 1.1 + 10.0, "{due} due, {s:?}");
                        let idle = s.landed.iter().sum::<u64>() + s.deferred;
                        assert!(idle >= s.ticks, "each was counted where it landed: {s:?}");
                        thread::sleep(Duration::from_millis(3));
                        assert!(
                            stats(machine, cpu).ticks <= s.ticks + 1,
                            "it goes on after its end"
                        );
                    })
                    .unwrap();
            });
        }
    });
    assert!(seen.check() > 100);
    assert_eq!(u64::from(seen.runs()), stats(&machine, 0).ticks + stats(&machine, 1).ticks);
}

#[test]
fn a_storm_follows_the_cpu_from_thread_to_thread() {
    let machine = machine(1);
    assert!(machine.start_storm(0, 20_000));
    assert!(!machine.start_storm(5, 1));
    assert!(!machine.start_storm(0, 2_000_000));
    for _ in 0..3 {
        let ticks = || stats(&machine, 0).ticks;
        let before = ticks();
        thread::scope(|s| {
            s.spawn(|| {
                machine.run(|_process| until("ticks", || ticks() >= before + 20)).unwrap();
            });
        });
        // Nobody on the CPU: no ticks.
        let after = ticks();
        thread::sleep(Duration::from_millis(2));
        assert_eq!(ticks(), after);
    }
    // Started while somebody is on the CPU, and going on after a sleep.
    assert!(machine.stop_storm(0));
    machine
        .run(|_process| {
            let ticks = || stats(&machine, 0).ticks;
            let before = ticks();
            assert!(machine.start_storm(0, 20_000));
            until("ticks at once", || ticks() > before + 5);
            machine.wait(&AtomicU32::new(0), 0, 1_000_000);
            let before = ticks();
            until("ticks after sleep", || ticks() > before + 5);
        })
        .unwrap();
}

#[test]
fn a_storm_never_gets_through_the_mask() {
    let machine = machine(1);
    let (masked, ticks_inside) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let (flag, bad) = (Arc::clone(&masked), Arc::clone(&ticks_inside));
    machine.set_timer_handler(Arc::new(move |_atomic, _cpu| {
        if flag.load(SeqCst) {
            bad.fetch_add(1, SeqCst);
        }
    }));
    machine.start_storm(0, 50_000);
    machine
        .run(|_process| {
            until("interrupts both ways", || {
                for _ in 0..200 {
                    let state = machine.local_irq_save();
                    masked.store(true, SeqCst);
                    (0..50).for_each(|i| {
                        hint::black_box(i);
                    });
                    masked.store(false, SeqCst);
                    machine.local_irq_restore(state);
                }
                let s = stats(&machine, 0);
                s.deferred >= 20 && s.ticks > s.deferred
            });
        })
        .unwrap();
    assert_eq!(ticks_inside.load(SeqCst), 0);
}

#[test]
fn errno_and_system_calls_survive_a_storm() {
    let machine = machine(1);
    machine.set_timer_handler(Arc::new(|_atomic, _cpu| {
        // SAFETY: close(2) of a bad descriptor fails and sets errno, which is the point.
        unsafe { libc::close(-1) };
    }));
    machine.start_storm(0, 20_000);
    machine
        .run(|_process| {
            // SAFETY: the location is valid for this thread.
            let errno = || unsafe { &mut *libc::__errno_location() };
            *errno() = 12345;
            let before = stats(&machine, 0).ticks;
            let start = Instant::now();
            while stats(&machine, 0).ticks < before + 50 && start.elapsed() < common::PATIENCE {
                hint::spin_loop();
            }
            assert_eq!(*errno(), 12345);
            assert!(stats(&machine, 0).ticks >= before + 50);
        })
        .unwrap();
}

/// A timer that expires faster than its signal can be delivered must not pile signal frames up: it takes
/// the CPU's whole time, no more, and all is well when it ends.
#[test]
fn a_storm_faster_than_its_delivery_takes_time_only() {
    let machine = machine(1);
    let (there, over) = (AtomicBool::new(false), AtomicBool::new(false));
    thread::scope(|s| {
        s.spawn(|| {
            machine
                .run(|_process| {
                    there.store(true, SeqCst);
                    until("the storm ends", || over.load(SeqCst));
                    assert!(machine.this_cpu().unwrap().context().may_sleep());
                })
                .unwrap();
        });
        until("the task runs", || there.load(SeqCst));
        assert!(machine.start_storm(0, 1_000_000));
        until("it storms", || stats(&machine, 0).ticks > 2000);
        assert!(machine.stop_storm(0));
        over.store(true, SeqCst);
    });
    let s = stats(&machine, 0);
    assert!(s.ticks > 2000, "{s:?}");
}
