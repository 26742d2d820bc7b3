//! Stacks that were freed and are kept, two by each CPU.
//!
//! # Locking
//! A place is taken and filled by compare-and-exchange.

use super::{NR_CACHED_STACKS, Threads};
use crate::{
    page_alloc::Reclaim,
    percpu::{PerCpuPlace, Space},
    platform::Platform,
    vmalloc::{Guarded, Shelf},
};
use core::{
    ptr::{self, NonNull},
    sync::atomic::AtomicPtr,
};

/// What a CPU has of stacks.
pub(super) struct CpuStacks {
    /// Freed ones.
    kept: [Shelf; NR_CACHED_STACKS],
    /// Lowest address of the one that its interrupts run on; null for none.
    pub(super) irq: AtomicPtr<u8>,
}

crate::define_per_cpu! {
    static CPU_STACKS: CpuStacks = CpuStacks {
        kept: [const { Shelf::new() }; NR_CACHED_STACKS],
        irq: AtomicPtr::new(ptr::null_mut()),
    };
}

/// Where CPU 0's are.
pub(super) fn first(percpu: &Space) -> Option<NonNull<CpuStacks>> {
    (&CPU_STACKS).place(percpu.statics())
}

impl<'a, P: Platform, R: Reclaim> Threads<'a, P, R> {
    /// What a CPU has.
    pub(super) fn of_cpu(&self, cpu: usize) -> Option<&'a CpuStacks> {
        let first = self.state.cpus.filter(|_| cpu < self.state.nr_cpus)?;
        // SAFETY: each CPU's instance is a stride further; they stay as long as the machine, and are shared only.
        Some(unsafe { first.byte_add(cpu * self.state.stride).as_ref() })
    }

    /// What all CPUs have, by number.
    pub(super) fn by_cpu(&self) -> impl Iterator<Item = &'a CpuStacks> {
        let this = *self;
        (0..self.state.nr_cpus).filter_map(move |cpu| this.of_cpu(cpu))
    }

    /// Takes one of so many frames that the running CPU keeps.
    pub(super) fn take_kept(&self, frames: u32) -> Option<Guarded> {
        let cpu = self.of_cpu(self.p().this_cpu()?.id())?;
        cpu.kept.iter().find_map(|shelf| shelf.take(Some(frames)))
    }

    /// Lets the running CPU keep one, or gives it back if that has enough.
    pub(super) fn put_kept(&self, stack: Guarded) -> Result<(), Guarded> {
        let running = self.p().this_cpu().filter(|cpu| cpu.online());
        let Some(cpu) = running.and_then(|cpu| self.of_cpu(cpu.id())) else { return Err(stack) };
        cpu.kept
            .iter()
            .try_fold(stack, |stack, shelf| match shelf.put(stack) {
                Ok(()) => Err(()),
                Err(stack) => Ok(stack),
            })
            .map_or(Ok(()), Err)
    }

    /// How many are kept, and their frames.
    pub(super) fn kept(&self) -> (u64, u64) {
        let shelves = self.by_cpu().flat_map(|cpu| &cpu.kept).filter_map(Shelf::frames);
        shelves.fold((0, 0), |(nr, all), frames| (nr + 1, all + u64::from(frames)))
    }

    fn drop_of(&self, cpu: &CpuStacks) -> u64 {
        let mut frames = 0;
        for stack in cpu.kept.iter().filter_map(|shelf| shelf.take(None)) {
            frames += u64::from(stack.frames());
            // A misuse (somebody freed its frames) is reported by the callee.
            let _ = self.vmap.discard(stack);
        }
        frames
    }

    /// Gives back what a CPU keeps; returns how many frames.
    pub(crate) fn drop_cpu(&self, cpu: usize) -> u64 {
        self.of_cpu(cpu).map_or(0, |cpu| self.drop_of(cpu))
    }

    /// What reclaim asks for.
    pub(crate) fn shrink(&self) -> u64 {
        // Frames that wait for process context would help nobody now.
        if self.vmap.objects.pages.context().may_sleep() { self.drop_all() } else { 0 }
    }

    /// Gives back what all CPUs keep; returns how many frames.
    pub(crate) fn drop_all(&self) -> u64 {
        self.by_cpu().map(|cpu| self.drop_of(cpu)).sum()
    }
}
