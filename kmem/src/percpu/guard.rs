//! Staying on a CPU while its instance is worked on \[U3\].

use crate::{
    context::{Cpu, MAX_PREEMPT_DEPTH, Section},
    error::Misuse,
    page_alloc::{PageAllocator, Reclaim},
    platform::{Level, Platform},
};
use core::{
    marker::PhantomData,
    ops::Deref,
    ptr::{self, NonNull},
};

/// Keeps its holder on the CPU: preemption is off until it goes (`get_cpu`, `put_cpu`). It cannot leave the thread.
#[must_use = "preemption is on again as soon as it goes"]
pub struct CpuGuard<'k, P: Platform> {
    p: &'k P,
    cpu: &'k Cpu,
    _stays: PhantomData<*mut ()>,
}

impl<'k, P: Platform> CpuGuard<'k, P> {
    #[inline]
    pub(crate) fn new(p: &'k P) -> Option<Self> {
        let cpu = p.get_cpu()?;
        if cpu.context().preempt_depth() == MAX_PREEMPT_DEPTH {
            p.put_cpu(cpu);
            return None;
        }
        cpu.enter(Section::Preempt);
        Some(CpuGuard { p, cpu, _stays: PhantomData })
    }

    /// The CPU's number.
    #[inline(always)]
    pub fn id(&self) -> usize {
        self.cpu.id()
    }
}

impl<P: Platform> CpuGuard<'_, P> {
    #[cold]
    fn outlived(&self) {
        let cpu = self.cpu.id();
        self.p.report(Level::Bug, format_args!("BUG: a guard of CPU {cpu} outlived its section"));
    }
}

impl<P: Platform> Drop for CpuGuard<'_, P> {
    #[inline]
    fn drop(&mut self) {
        // Who took it out of the section that it was made in has left the CPU with a report, and may be on another.
        let here = self.p.this_cpu().is_some_and(|cpu| ptr::eq(cpu, self.cpu));
        if here && self.cpu.context().preempt_depth() > 0 {
            self.cpu.leave(Section::Preempt);
            self.p.put_cpu(self.cpu);
        } else {
            self.outlived();
        }
    }
}

/// The CPU's instance of a variable (`get_cpu_var`); preemption is off until it goes. Interrupts on the CPU may use
/// the instance meanwhile, so it is shared.
#[must_use = "preemption is on again as soon as it goes"]
pub struct CpuVar<'k, P: Platform, T> {
    guard: CpuGuard<'k, P>,
    at: NonNull<T>,
}

impl<'k, P: Platform, T: Sync> CpuVar<'k, P, T> {
    /// # Safety
    /// `at` is valid, and shared only, as long as this value.
    pub(crate) unsafe fn new(guard: CpuGuard<'k, P>, at: NonNull<T>) -> Self {
        CpuVar { guard, at }
    }

    /// The CPU's number.
    pub fn cpu(&self) -> usize {
        self.guard.id()
    }
}

impl<P: Platform, T: Sync> Deref for CpuVar<'_, P, T> {
    type Target = T;

    #[inline(always)]
    fn deref(&self) -> &T {
        // SAFETY: `new`'s contract.
        unsafe { self.at.as_ref() }
    }
}

/// The address of the CPU's instance (`get_cpu_ptr`); preemption is off until it goes.
#[must_use = "preemption is on again as soon as it goes"]
pub struct CpuPtrGuard<'k, P: Platform, T> {
    guard: CpuGuard<'k, P>,
    at: NonNull<T>,
}

impl<'k, P: Platform, T> CpuPtrGuard<'k, P, T> {
    pub(crate) fn new(guard: CpuGuard<'k, P>, at: NonNull<T>) -> Self {
        CpuPtrGuard { guard, at }
    }

    /// The address.
    #[inline(always)]
    pub fn as_ptr(&self) -> *mut T {
        self.at.as_ptr()
    }

    /// The CPU's number.
    pub fn cpu(&self) -> usize {
        self.guard.id()
    }
}

/// The address of an instance of the CPU that it was made on (`this_cpu_ptr`), which finds out when it is used on
/// another one: the task slept in between, or never turned preemption off.
pub struct CpuPtr<'k, P: Platform, R, T> {
    pages: &'k PageAllocator<P, R>,
    at: NonNull<T>,
    cpu: usize,
}

impl<P: Platform, R, T> Clone for CpuPtr<'_, P, R, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<P: Platform, R, T> Copy for CpuPtr<'_, P, R, T> {}

impl<'k, P: Platform, R: Reclaim, T> CpuPtr<'k, P, R, T> {
    pub(crate) fn new(pages: &'k PageAllocator<P, R>, at: NonNull<T>, cpu: usize) -> Self {
        CpuPtr { pages, at, cpu }
    }

    /// The address, on the CPU whose instance it is.
    ///
    /// # Errors
    /// [`Misuse::Migrated`] on another one, reported as well.
    #[track_caller]
    pub fn get(self) -> Result<NonNull<T>, Misuse> {
        let to = self.pages.platform().this_cpu().map(Cpu::id);
        if to == Some(self.cpu) {
            return Ok(self.at);
        }
        Err(self.pages.misuse(Misuse::Migrated { from: self.cpu, to }))
    }
}
