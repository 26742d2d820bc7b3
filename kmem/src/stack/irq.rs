//! Stacks that interrupts run on, one for each possible CPU \[K2\].
//!
//! # Locking
//! None: a CPU's place is filled and emptied by compare-and-exchange.

use super::{STACK_END_MAGIC, StackUse, Threads};
use crate::{
    error::{AllocError, Misuse},
    gfp::Gfp,
    page_alloc::Reclaim,
    platform::Platform,
    vmalloc::By,
};
use core::{
    panic::Location,
    ptr::{self, NonNull},
    sync::atomic::Ordering::{AcqRel, Acquire, Relaxed},
};

impl<P: Platform, R: Reclaim> Threads<'_, P, R> {
    /// `alloc_irq_stacks`.
    #[track_caller]
    pub(crate) fn alloc_irq(self, frames: usize) -> Result<(), AllocError> {
        let nr = self.check(frames, -1)?;
        for cpu in self.by_cpu() {
            if !cpu.irq.load(Relaxed).is_null() {
                continue;
            }
            let low = if self.guarded() {
                let stack = self.vmap.make_guarded(nr, Gfp::KERNEL | Gfp::ZERO, -1, true)?;
                self.end(self.vmap.low(&stack)).magic.store(STACK_END_MAGIC, Relaxed);
                self.vmap.issue(stack, Location::caller())
            } else {
                self.alloc_direct(nr, -1, true)?
            };
            // Release pairs with the Acquire in `irq_low`.
            let put = cpu.irq.compare_exchange(ptr::null_mut(), low.as_ptr(), AcqRel, Relaxed);
            if put.is_err() {
                // Somebody else was first.
                let _ = self.free_irq_at(low.addr().get());
            }
        }
        Ok(())
    }

    #[track_caller]
    fn free_irq_at(&self, addr: usize) -> Result<(), Misuse> {
        if !self.guarded() {
            return self.free_direct(addr, true);
        }
        let stack = self.vmap.keep(addr, By::FreeIrqStacks)?;
        let found = self.end(self.vmap.low(&stack)).magic.load(Relaxed);
        self.vmap.discard(stack)?;
        if found == STACK_END_MAGIC {
            return Ok(());
        }
        Err(self.vmap.objects.pages.misuse(Misuse::StackOverrun { addr, found }))
    }

    /// `free_irq_stacks`.
    #[track_caller]
    pub(crate) fn free_irq(self) -> Result<(), Misuse> {
        let pages = self.vmap.objects.pages;
        if pages.context().in_nmi() {
            return Err(pages.misuse(Misuse::InNmi));
        }
        let mut result = Ok(());
        for cpu in self.by_cpu() {
            let low = cpu.irq.swap(ptr::null_mut(), AcqRel);
            if !low.is_null() {
                result = result.and(self.free_irq_at(low.addr()));
            }
        }
        result
    }

    /// Where a CPU's begins, and its bytes.
    pub(crate) fn irq_stack(self, cpu: usize) -> Option<(NonNull<u8>, usize)> {
        // Acquire pairs with the Release in `alloc_irq`.
        let low = NonNull::new(self.of_cpu(cpu)?.irq.load(Acquire))?;
        self.look(low.addr().get(), |low, size| (low, size))
    }

    /// Which CPU's interrupts run on the stack that begins at an address.
    pub(super) fn irq_use(&self, low: NonNull<u8>) -> StackUse {
        let cpu = self.by_cpu().position(|cpu| cpu.irq.load(Acquire) == low.as_ptr());
        cpu.map_or(StackUse::Thread, StackUse::Irq)
    }
}
