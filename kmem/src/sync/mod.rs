//! Locks of the core: spin locks that mask interrupts.
//!
//! # Concepts
//! Everything below the per-CPU lists is reached from interrupts too, so a lock that an interrupt
//! could find held on its own CPU must mask interrupts while it is held. That is the kind of lock
//! the allocator uses inside (`IrqLock`, and `ShardedLock` where many look and few change). [`SpinLock`] is the same for users of the typed API: inside
//! its closure there is no way to sleep.
//!
//! # Implementation
//! Test-and-test-and-set on one word; a waiter spins on a plain load and calls `Platform::relax`,
//! which on a host gives the time slice away when the holder may have lost its own.
//!
//! # Locking
//! The lock order is in `docs/ARCHITECTURE.md`; `IrqLock`s of the buddy are leaves.

mod sharded;

pub(crate) use sharded::{LookGuard, ShardedLock};

use crate::{
    context::{Atomic, Process, Section},
    platform::{IrqState, Platform},
};
use core::{
    cell::UnsafeCell,
    ops::{Deref, DerefMut},
    sync::atomic::{AtomicBool, Ordering},
};

/// The bare spinning word.
struct RawSpin(AtomicBool);

impl RawSpin {
    const fn new() -> Self {
        RawSpin(AtomicBool::new(false))
    }

    #[inline(always)]
    fn lock<P: Platform>(&self, p: &P) {
        // Acquire pairs with the Release in `unlock`: what the last holder wrote is seen.
        if self.0.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_err() {
            self.lock_contended(p);
        }
    }

    #[inline(always)]
    fn try_lock(&self) -> bool {
        // Acquire pairs with the Release in `unlock`.
        self.0.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_ok()
    }

    #[cold]
    fn lock_contended<P: Platform>(&self, p: &P) {
        loop {
            while self.0.load(Ordering::Relaxed) {
                p.relax();
            }
            // Acquire pairs with the Release in `unlock`.
            if !self.0.swap(true, Ordering::Acquire) {
                return;
            }
        }
    }

    #[inline(always)]
    fn unlock(&self) {
        // Release pairs with the Acquire in `lock` and `lock_contended`.
        self.0.store(false, Ordering::Release);
    }
}

/// Turns after which who may not wait for a lock gives it up: more than a holder needs that runs.
const PATIENCE: u32 = 1 << 16;

/// A spin lock held with interrupts masked.
pub(crate) struct IrqLock<T> {
    raw: RawSpin,
    data: UnsafeCell<T>,
}

// SAFETY: the data is reached only through the guard, which holds the lock, so sending the lock's
// reference between threads moves at most the T.
unsafe impl<T: Send> Sync for IrqLock<T> {}
// SAFETY: owning the lock is owning the T.
unsafe impl<T: Send> Send for IrqLock<T> {}

impl<T> IrqLock<T> {
    /// An unlocked lock around `data`.
    pub const fn new(data: T) -> Self {
        IrqLock { raw: RawSpin::new(), data: UnsafeCell::new(data) }
    }

    /// Masks interrupts and takes the lock, spinning while another CPU holds it. Any context.
    #[inline(always)]
    pub fn lock<'a, P: Platform>(&'a self, p: &'a P) -> IrqGuard<'a, T, P> {
        let irq = p.local_irq_save();
        self.raw.lock(p);
        IrqGuard { lock: self, p, irq }
    }

    /// As [`lock`](Self::lock); calls `crowded` if another CPU holds it.
    #[inline(always)]
    pub fn lock_noting<'a, P: Platform>(
        &'a self,
        p: &'a P,
        crowded: impl FnOnce(),
    ) -> IrqGuard<'a, T, P> {
        let irq = p.local_irq_save();
        if !self.raw.try_lock() {
            crowded();
            self.raw.lock_contended(p);
        }
        IrqGuard { lock: self, p, irq }
    }

    /// As [`lock`](Self::lock), but gives up after a while: for a fault's handler, which may have interrupted the holder.
    pub fn lock_patiently<'a, P: Platform>(&'a self, p: &'a P) -> Option<IrqGuard<'a, T, P>> {
        for _ in 0..PATIENCE {
            if let Some(guard) = self.try_lock(p) {
                return Some(guard);
            }
            p.relax();
        }
        None
    }

    /// As [`lock`](Self::lock), but `None` instead of waiting.
    fn try_lock<'a, P: Platform>(&'a self, p: &'a P) -> Option<IrqGuard<'a, T, P>> {
        let irq = p.local_irq_save();
        if self.raw.try_lock() {
            return Some(IrqGuard { lock: self, p, irq });
        }
        p.local_irq_restore(irq);
        None
    }
}

/// Holds an [`IrqLock`]; interrupts are restored after the lock is released.
pub(crate) struct IrqGuard<'a, T, P: Platform> {
    lock: &'a IrqLock<T>,
    p: &'a P,
    irq: IrqState,
}

impl<T, P: Platform> Deref for IrqGuard<'_, T, P> {
    type Target = T;
    #[inline(always)]
    fn deref(&self) -> &T {
        // SAFETY: the guard holds the lock, so nobody else has a reference to the data.
        unsafe { &*self.lock.data.get() }
    }
}

impl<T, P: Platform> DerefMut for IrqGuard<'_, T, P> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: the guard holds the lock and is borrowed mutably, so this is the only reference.
        unsafe { &mut *self.lock.data.get() }
    }
}

impl<T, P: Platform> Drop for IrqGuard<'_, T, P> {
    #[inline(always)]
    fn drop(&mut self) {
        self.lock.raw.unlock();
        self.p.local_irq_restore(self.irq);
    }
}

/// A spin lock for users of the typed API \[C2\]: what runs under it gets an [`Atomic`] and cannot
/// reach the [`Process`] that was given up for it.
///
/// Interrupts are masked while it is held, so interrupt handlers may take it too.
pub struct SpinLock<T>(IrqLock<T>);

impl<T> SpinLock<T> {
    /// An unlocked lock around `data`.
    pub const fn new(data: T) -> Self {
        SpinLock(IrqLock::new(data))
    }

    /// Runs `f` under the lock, from process context.
    pub fn with<P: Platform, R>(
        &self,
        p: &P,
        process: &mut Process,
        f: impl FnOnce(Atomic<'_>, &mut T) -> R,
    ) -> R {
        let _ = process;
        self.locked(p, f)
    }

    /// Runs `f` under the lock, from an atomic section.
    pub fn with_atomic<P: Platform, R>(
        &self,
        p: &P,
        _atomic: Atomic<'_>,
        f: impl FnOnce(Atomic<'_>, &mut T) -> R,
    ) -> R {
        self.locked(p, f)
    }

    fn locked<P: Platform, R>(&self, p: &P, f: impl FnOnce(Atomic<'_>, &mut T) -> R) -> R {
        let mut guard = self.0.lock(p);
        let _depth = PreemptGuard::new(p);
        f(Atomic::new(), &mut guard)
    }
}

/// Counts a preemption-off section on the CPU that it was made on.
pub(crate) struct PreemptGuard<'a, P: Platform>(&'a P);

impl<'a, P: Platform> PreemptGuard<'a, P> {
    pub(crate) fn new(p: &'a P) -> Self {
        if let Some(cpu) = p.this_cpu() {
            cpu.enter(Section::Preempt);
        }
        PreemptGuard(p)
    }
}

impl<P: Platform> Drop for PreemptGuard<'_, P> {
    fn drop(&mut self) {
        if let Some(cpu) = self.0.this_cpu() {
            cpu.leave(Section::Preempt);
        }
    }
}

/// Runs `f` with preemption off, and an [`Atomic`] in place of the [`Process`] \[C2\].
pub fn preempt_disabled<P: Platform, R>(
    p: &P,
    process: &mut Process,
    f: impl FnOnce(Atomic<'_>) -> R,
) -> R {
    let _ = process;
    let _guard = PreemptGuard::new(p);
    f(Atomic::new())
}

/// Runs `f` with interrupts masked on this CPU, and an [`Atomic`] in place of the [`Process`] \[C2\].
pub fn irqs_disabled<P: Platform, R>(
    p: &P,
    process: &mut Process,
    f: impl FnOnce(Atomic<'_>) -> R,
) -> R {
    struct Restore<'a, P: Platform>(&'a P, IrqState);
    impl<P: Platform> Drop for Restore<'_, P> {
        fn drop(&mut self) {
            self.0.local_irq_restore(self.1);
        }
    }
    let _ = process;
    let _restore = Restore(p, p.local_irq_save());
    f(Atomic::new())
}
