//! Kicks against comings and goings.

use super::*;

/// Kicks race with threads that come to the CPUs, sleep and leave: none is lost, and never do two
/// threads act as one CPU.
#[test]
fn kicks_race_with_comings_and_goings() {
    const CPUS: usize = 2;
    const LENGTH: Duration = Duration::from_millis(700);
    struct Shared {
        /// The thread that runs as a task on each CPU; 0: none.
        holder: [AtomicUsize; CPUS],
        asked: [AtomicU64; CPUS],
        served: [AtomicU64; CPUS],
        wrong: AtomicU32,
    }
    thread_local! {
        static ME: std::cell::Cell<usize> = const { std::cell::Cell::new(0) };
    }
    let (machine, to) = shared(CPUS);
    let state = Arc::new(Shared {
        holder: Default::default(),
        asked: Default::default(),
        served: Default::default(),
        wrong: AtomicU32::new(0),
    });
    let hook = Arc::clone(&state);
    machine.set_ipi_hook(Arc::new(move |_atomic, cpu| {
        let holder = hook.holder[cpu].load(SeqCst);
        let mine = holder == 0 || holder == ME.get();
        let placed = to.with(|m| m.this_cpu().is_some_and(|c| c.id() == cpu));
        hook.wrong.fetch_add(u32::from(!(mine && placed)), SeqCst);
        hook.served[cpu].fetch_max(hook.asked[cpu].load(SeqCst), SeqCst);
    }));
    let (over, words) = (AtomicBool::new(false), [AtomicU32::new(0), AtomicU32::new(0)]);
    let (machine, state, over, words) = (&machine, &state, &over, &words);
    thread::scope(|s| {
        for me in 1..=3 {
            s.spawn(move || {
                ME.set(me);
                let mut turn = me;
                while !over.load(Relaxed) {
                    machine
                        .run(|_process| {
                            let enter = || {
                                let cpu = machine.this_cpu().unwrap().id();
                                if state.holder[cpu].swap(me, SeqCst) != 0 {
                                    state.wrong.fetch_add(1, SeqCst);
                                }
                                cpu
                            };
                            let cpu = enter();
                            turn += 1;
                            let mask = turn.is_multiple_of(3).then(|| machine.local_irq_save());
                            (0..turn % 64).for_each(|i| {
                                hint::black_box(i);
                            });
                            mask.into_iter().for_each(|m| machine.local_irq_restore(m));
                            state.holder[cpu].store(0, SeqCst);
                            if turn.is_multiple_of(5) {
                                machine.wait(&words[turn % 2], 0, 20_000);
                                let cpu = enter();
                                state.holder[cpu].store(0, SeqCst);
                            }
                        })
                        .unwrap();
                }
            });
        }
        let kickers: Vec<_> = (0..2)
            .map(|kicker| {
                s.spawn(move || {
                    ME.set(10 + kicker);
                    let start = Instant::now();
                    let mut kicks = 0u64;
                    while start.elapsed() < LENGTH {
                        let cpu = kicks as usize % CPUS;
                        let mine = state.asked[cpu].fetch_add(1, SeqCst) + 1;
                        machine.kick(cpu);
                        until("a kick is served", || state.served[cpu].load(SeqCst) >= mine);
                        kicks += 1;
                    }
                    kicks
                })
            })
            .collect();
        let kicks: u64 = kickers.into_iter().map(|k| k.join().unwrap()).sum();
        over.store(true, Relaxed);
        assert!(kicks > 100, "{kicks}");
    });
    assert_eq!(state.wrong.load(SeqCst), 0);
    let posed: u64 = (0..CPUS).map(|cpu| stats(machine, cpu).posed).sum();
    let ipis: u64 = (0..CPUS).map(|cpu| stats(machine, cpu).ipis).sum();
    assert!(posed > 0 && ipis > posed, "both kinds happened: {posed} of {ipis} posed");
}
