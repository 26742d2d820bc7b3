//! Kernel stacks.

use super::Recorder;
use anyhow::Result;
use kmem::Config;
use kmem_hosted::{Machine, Shape};
use std::hint::black_box;

/// Frames of the stack, as x86-64 has them.
const FRAMES: usize = 4;

/// A stack that the CPU keeps, given out, zeroed, and freed.
pub fn run(r: &Recorder, who: &str) -> Result<()> {
    let m = Machine::without_kswapd(Shape::x86_64(64 << 20), Config::default())?;
    m.run_on(Some(0), None, |_process| {
        r.twice("stack-pair", who, 1, |n| {
            for _ in 0..n {
                if let Ok(low) = m.alloc_thread_stack(black_box(FRAMES)) {
                    // SAFETY: ours, and nobody was on it.
                    let _ = unsafe { m.free_thread_stack(black_box(low.as_ptr())) };
                }
            }
        })
    })?
}

/// What the loop costs.
pub fn harness(r: &Recorder) -> Result<()> {
    r.twice("stack-pair", "harness", 1, |n| {
        for _ in 0..n {
            black_box(FRAMES);
            black_box(FRAMES);
        }
    })
}
