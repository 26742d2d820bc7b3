//! Stacks of 16 KiB with a guard, beside those of a coroutine library.
//!
//! # Concepts
//! The kernel's are zeroed each time, which is what their high-water mark is read from, and most come from the CPU's
//! cache; the library's are mapped and unmapped.
//!
//! # Locking
//! None.

use crate::{Run, THREADS, each, failed, on_cpus, vmalloc::map_and_unmap};
use anyhow::Result;
use corosensei::stack::{DefaultStack, Stack};
use kmem::Config;
use kmem_bench::report::KMEM;
use kmem_hosted::{Machine, Shape};
use std::hint::black_box;

const SIZE: usize = 16 << 10;
const FRAMES: usize = SIZE / kmem_bench::PAGE_SIZE as usize;
const BYTES: u64 = 64 << 20;

/// On one thread and on two.
pub fn run(run: &mut Run) -> Result<()> {
    let rows = [("stack of 16 KiB", 1), ("stack of 16 KiB, 2 threads", 2)];
    if !run.wants(&rows) {
        return Ok(());
    }
    let machine = Machine::without_kswapd(Shape::x86_64(BYTES).cpus(THREADS), Config::default())?;
    on_cpus(&machine, THREADS, |crew| {
        let m = machine.kmem();
        let kmem = move || match m.alloc_thread_stack(black_box(FRAMES)) {
            Ok(low) => {
                // SAFETY: ours, and nobody was on it.
                if let Err(e) = unsafe { m.free_thread_stack(black_box(low.as_ptr())) } {
                    failed("free_thread_stack", &e);
                }
            }
            Err(e) => failed("alloc_thread_stack", &e),
        };
        let coroutine = || match DefaultStack::new(SIZE) {
            Ok(stack) => _ = black_box(stack.base()),
            Err(e) => failed("corosensei's stack", &e),
        };
        let all = vec![
            run.contender(crew, &rows, KMEM, |_| each(kmem)),
            run.contender(crew, &rows, "corosensei", |_| each(coroutine)),
            run.contender(crew, &rows, "mmap + munmap", |_| each(|| map_and_unmap(SIZE))),
        ];
        run.contest(&rows, BYTES, all)
    })
}
