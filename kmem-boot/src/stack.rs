//! Stacks, painted so that it can be told how deep they were used.
//!
//! The identity map has no guard pages. Instead every stack starts out filled with a pattern; the
//! lowest word that lost it is the high-water mark, and a stack whose very lowest word lost it
//! overflowed, which fails the run.

use core::{arch::asm, cell::UnsafeCell};

const PAINT: u64 = 0x5aa5_c33c_0ff0_9669;

/// `N` bytes of stack, growing down from the end.
#[repr(C, align(4096))]
pub struct Stack<const N: usize>(UnsafeCell<[u8; N]>);

// SAFETY: the processor and compiled code use the memory as a stack; this type only looks at words
// below the stack pointer, by volatile reads, from the CPU that uses the stack.
unsafe impl<const N: usize> Sync for Stack<N> {}

impl<const N: usize> Stack<N> {
    /// An unpainted stack.
    pub const fn new() -> Self {
        assert!(N.is_multiple_of(4096));
        Stack(UnsafeCell::new([0; N]))
    }

    /// The first address above the stack, where the stack pointer starts.
    pub fn top(&self) -> u64 {
        self.0.get().addr() as u64 + N as u64
    }

    /// Fills a stack that nobody is on with the pattern.
    pub fn paint(&self) {
        self.paint_below(self.top());
    }

    /// Fills the part of the caller's own stack that is not in use.
    #[inline(never)]
    pub fn paint_unused(&self) {
        let pointer: u64;
        // SAFETY: reads a register.
        unsafe { asm!("mov {}, rsp", out(reg) pointer, options(nomem, nostack, preserves_flags)) };
        // Room for what this call itself calls.
        self.paint_below(pointer - 1024);
    }

    fn paint_below(&self, limit: u64) {
        let base = self.0.get();
        let bytes = limit.saturating_sub(base.addr() as u64).min(N as u64);
        for i in 0..bytes as usize / 8 {
            // SAFETY: within the stack and below its pointer, so the words hold nothing.
            unsafe { base.cast::<u64>().add(i).write_volatile(PAINT) };
        }
    }

    /// Bytes used at the deepest; `N` means that the stack overflowed.
    pub fn high_water(&self) -> usize {
        let base = self.0.get().cast::<u64>();
        // SAFETY: the index stays within the stack; any bit pattern is a u64.
        let painted = |i: &usize| unsafe { base.add(*i).read_volatile() } == PAINT;
        N - (0..N / 8).take_while(painted).count() * 8
    }
}
