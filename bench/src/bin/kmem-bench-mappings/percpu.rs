//! Eight bytes of each CPU, and a counter of the running one, beside thread-local data.
//!
//! # Locking
//! None.

use crate::{Run, THREADS, each, failed, on_cpus};
use anyhow::Result;
use kmem::{Config, Gfp, alloc::PerCpu};
use kmem_bench::report::{HARNESS, KMEM};
use kmem_hosted::{Machine, Shape};
use std::{
    cell::Cell,
    hint::black_box,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};
use thread_local::ThreadLocal;

const BYTES: u64 = 64 << 20;

thread_local! {
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

/// On one thread and on two.
pub fn run(run: &mut Run) -> Result<()> {
    let pairs = [("alloc_percpu(8) pair", 1), ("alloc_percpu(8) pair, 2 threads", 2)];
    let counts = [("this_cpu_inc", 1), ("this_cpu_inc, 2 threads", 2)];
    if !run.wants(&pairs) && !run.wants(&counts) {
        return Ok(());
    }
    let machine = Machine::without_kswapd(Shape::x86_64(BYTES).cpus(THREADS), Config::default())?;
    on_cpus(&machine, THREADS, |crew| {
        let m = machine.kmem();
        if run.wants(&pairs) {
            let kmem = move || match m.alloc_percpu::<u64>() {
                Ok(at) => {
                    // SAFETY: ours, and not used after.
                    if let Err(e) = unsafe { m.free_percpu(black_box(at)) } {
                        failed("free_percpu", &e);
                    }
                }
                Err(e) => failed("alloc_percpu", &e),
            };
            let locals = || {
                let all = ThreadLocal::new();
                black_box(all.get_or(|| AtomicU64::new(0)));
            };
            let all = vec![
                run.contender(crew, &pairs, KMEM, |_| each(kmem)),
                run.contender(crew, &pairs, "thread_local", |_| each(locals)),
            ];
            run.contest(&pairs, BYTES, all)?;
        }
        if run.wants(&counts) {
            let counter = crew.on(0, || PerCpu::new(m, Gfp::KERNEL, |_| AtomicU64::new(0)))??;
            let counter = Arc::new(counter);
            let kmem = |_| {
                let counter = Arc::clone(&counter);
                each(move || _ = black_box(m.this_cpu_inc(&*counter)))
            };
            let locals = Arc::new(ThreadLocal::new());
            let of_crate = |_| {
                let locals = Arc::clone(&locals);
                each(move || {
                    let count: &AtomicU64 = locals.get_or(|| AtomicU64::new(0));
                    count.store(black_box(count.load(Relaxed) + 1), Relaxed);
                })
            };
            let all = vec![
                run.contender(crew, &counts, KMEM, kmem),
                run.contender(crew, &counts, "thread_local", of_crate),
                run.contender(crew, &counts, "std's thread_local!", |_| {
                    each(|| COUNT.set(black_box(COUNT.get() + 1)))
                }),
                run.contender(crew, &counts, HARNESS, |_| each(|| _ = black_box(8_usize))),
            ];
            run.contest(&counts, BYTES, all)?;
        }
        Ok(())
    })
}
