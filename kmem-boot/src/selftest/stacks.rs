//! Kernel stacks: code runs on them, how deep is told, and nothing is mapped where they end. Interrupts run on the CPU's
//! own.

use super::{Bench, Verdict, check, fail};
use crate::{apic, println, vmalloc};
use core::{arch::asm, hint::black_box, ptr};

const FRAME: usize = 4096;

/// Uses a hundred bytes and more of stack for each level; returns the lowest address of them.
#[inline(never)]
extern "C" fn descend(levels: usize) -> usize {
    let room = black_box([levels + 1; 12]);
    let here = (&raw const room).addr();
    if levels == 0 { here } else { black_box(descend(levels - 1)).min(here) }
}

/// Calls `descend` with the stack pointer at `top`.
///
/// # Safety
/// Below is a stack with room for that, which nobody is on.
unsafe fn descend_on(top: usize, levels: usize) -> usize {
    let lowest: usize;
    // SAFETY: the caller's; the old stack pointer is in a register that calls keep.
    unsafe {
        asm!(
            "mov r12, rsp",
            "mov rsp, {top}",
            "call {f}",
            "mov rsp, r12",
            top = in(reg) top,
            f = sym descend,
            inlateout("rdi") levels => _,
            out("r12") _,
            lateout("rax") lowest,
            clobber_abi("C"),
        );
    }
    lowest
}

pub fn run(bench: &mut Bench) -> Verdict {
    let kmem = bench.kmem;
    for turn in 0..200 {
        let frames = bench.rng.usize(1..=4);
        let Ok(low) = kmem.alloc_thread_stack(frames) else { fail!("no stack of {frames} frames") };
        let (start, end) = (low.addr().get(), low.addr().get() + frames * FRAME);
        for guard in [start - FRAME, end] {
            check!(vmalloc::translate(guard).is_none(), "something is mapped at {guard:#x}");
        }
        let levels = bench.rng.usize(1..=frames * 10);
        // SAFETY: a stack of our own, which has some 200 bytes for each level.
        let lowest = unsafe { descend_on(end, levels) };
        check!((start..end).contains(&lowest), "turn {turn}: {lowest:#x} is not on the stack");
        let unused = kmem.stack_not_used(low.as_ptr());
        let depth = unused.map(|unused| frames * FRAME - 16 - unused);
        check!(
            depth.is_some_and(|depth| depth >= end - lowest && depth < end - lowest + 512),
            "turn {turn}: {depth:?} bytes used, {} at least",
            end - lowest
        );
        check!(kmem.stack_end_corrupted(low.as_ptr()) == Some(false), "the end is gone");
        // SAFETY: nobody is on it.
        let freed = unsafe { kmem.free_thread_stack(low.as_ptr()) };
        check!(freed.is_ok(), "free: {freed:?}");
    }
    let Some(irq) = kmem.irq_stack(0) else { fail!("the CPU has no stack for interrupts") };
    check!(vmalloc::translate(irq.start - FRAME).is_none(), "the interrupt stack has no guard");
    apic::interrupt_self();
    let used = || kmem.stack_not_used(ptr::without_provenance(irq.start)).unwrap_or(irq.len());
    let mut turns = 0;
    while used() == irq.len() - 16 && turns < 1_000_000 {
        core::hint::spin_loop();
        turns += 1;
    }
    let unused = used();
    check!(unused < irq.len() - 16, "no interrupt ran on its stack");
    println!(
        "  stacks: {} of {} bytes used by interrupts so far",
        irq.len() - 16 - unused,
        irq.len()
    );
    Ok(())
}
