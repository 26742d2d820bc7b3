//! Per-CPU data.

use super::Recorder;
use anyhow::{Result, anyhow};
use kmem::{Config, Gfp, alloc::PerCpu};
use kmem_hosted::{Machine, Shape};
use std::{hint::black_box, sync::atomic::AtomicU64};

/// Eight bytes of each of four CPUs, allocated and freed; a counter of the running CPU.
pub fn run(r: &Recorder, who: &str) -> Result<()> {
    let m = Machine::without_kswapd(Shape::x86_64(64 << 20).cpus(4), Config::default())?;
    m.run_on(Some(0), None, |_process| {
        let kmem = m.kmem();
        // What others hold: the search does not begin in an empty chunk.
        let held: Vec<_> =
            (0..500).map(|_| kmem.alloc_percpu::<u64>()).collect::<Result<_, _>>()?;
        r.twice("percpu-8-pair", who, 1, |n| {
            for _ in 0..n {
                if let Ok(at) = kmem.alloc_percpu::<u64>() {
                    // SAFETY: ours, and not used after.
                    let _ = unsafe { kmem.free_percpu(black_box(at)) };
                }
            }
        })?;
        for at in held {
            // SAFETY: as above.
            unsafe { kmem.free_percpu(at) }.map_err(|e| anyhow!("{e}"))?;
        }
        let counter = PerCpu::new(kmem, Gfp::KERNEL, |_| AtomicU64::new(0))?;
        r.twice("this-cpu-inc", who, 1, |n| {
            for _ in 0..n {
                black_box(kmem.this_cpu_inc(&counter));
            }
        })
    })?
}

/// What the loops cost.
pub fn harness(r: &Recorder) -> Result<()> {
    for op in ["percpu-8-pair", "this-cpu-inc"] {
        r.twice(op, "harness", 1, |n| {
            for _ in 0..n {
                black_box(8_usize);
            }
        })?;
    }
    Ok(())
}
