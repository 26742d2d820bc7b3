//! A lock for what many look at and few change.
//!
//! # Concepts
//! One word for each *shard*. Who looks holds one of them, usually that of the CPU it runs on; who changes something
//! holds all. So two that look from different shards write to no cache line in common, and what they look at stays in
//! the caches of both.
//!
//! # Locking
//! Words are taken by number, so two that change do not wait for each other in a circle. Who looks takes no other
//! word meanwhile.

use super::{PATIENCE, RawSpin};
use crate::platform::{IrqState, Platform};
use core::{
    cell::UnsafeCell,
    ops::{Deref, DerefMut},
};
use crossbeam_utils::CachePadded;

/// A lock of `N` shards, held with interrupts masked.
pub(crate) struct ShardedLock<T, const N: usize> {
    shards: [CachePadded<RawSpin>; N],
    data: UnsafeCell<T>,
}

// SAFETY: the data is reached through guards only: a reference to it by those who hold one shard, of whom there may be
// several at once (`T: Sync`), the one mutable reference by who holds all (`T: Send`).
unsafe impl<T: Send + Sync, const N: usize> Sync for ShardedLock<T, N> {}
// SAFETY: owning the lock is owning the T.
unsafe impl<T: Send, const N: usize> Send for ShardedLock<T, N> {}

impl<T, const N: usize> ShardedLock<T, N> {
    /// An unlocked lock around `data`.
    pub(crate) const fn new(data: T) -> Self {
        let shards = [const { CachePadded::new(RawSpin::new()) }; N];
        ShardedLock { shards, data: UnsafeCell::new(data) }
    }

    /// Masks interrupts and takes a shard, of which only the remainder by their number counts. Any context.
    #[inline(always)]
    pub(crate) fn look<'a, P: Platform>(
        &'a self,
        p: &'a P,
        shard: usize,
    ) -> LookGuard<'a, T, P, N> {
        let irq = p.local_irq_save();
        let raw = &*self.shards[shard % N];
        raw.lock(p);
        LookGuard { lock: self, raw, p, irq }
    }

    /// As [`look`](Self::look), but gives up after a while: for a fault's handler, which may have interrupted a holder.
    pub(crate) fn look_patiently<'a, P: Platform>(
        &'a self,
        p: &'a P,
        shard: usize,
    ) -> Option<LookGuard<'a, T, P, N>> {
        let raw = &*self.shards[shard % N];
        for _ in 0..PATIENCE {
            let irq = p.local_irq_save();
            if raw.try_lock() {
                return Some(LookGuard { lock: self, raw, p, irq });
            }
            p.local_irq_restore(irq);
            p.relax();
        }
        None
    }

    /// Masks interrupts and takes all shards. Any context.
    pub(crate) fn change<'a, P: Platform>(&'a self, p: &'a P) -> ChangeGuard<'a, T, P, N> {
        let irq = p.local_irq_save();
        self.shards.iter().for_each(|raw| raw.lock(p));
        ChangeGuard { lock: self, p, irq }
    }
}

/// Holds a shard of a [`ShardedLock`]; interrupts are restored after it is released.
pub(crate) struct LookGuard<'a, T, P: Platform, const N: usize> {
    lock: &'a ShardedLock<T, N>,
    raw: &'a RawSpin,
    p: &'a P,
    irq: IrqState,
}

impl<T, P: Platform, const N: usize> Deref for LookGuard<'_, T, P, N> {
    type Target = T;
    #[inline(always)]
    fn deref(&self) -> &T {
        // SAFETY: the guard holds a shard, so nobody holds all of them, and there is no mutable reference.
        unsafe { &*self.lock.data.get() }
    }
}

impl<T, P: Platform, const N: usize> Drop for LookGuard<'_, T, P, N> {
    #[inline(always)]
    fn drop(&mut self) {
        self.raw.unlock();
        self.p.local_irq_restore(self.irq);
    }
}

/// Holds all of a [`ShardedLock`]; interrupts are restored after it is released.
pub(crate) struct ChangeGuard<'a, T, P: Platform, const N: usize> {
    lock: &'a ShardedLock<T, N>,
    p: &'a P,
    irq: IrqState,
}

impl<T, P: Platform, const N: usize> Deref for ChangeGuard<'_, T, P, N> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: the guard holds all shards, so nobody else has a reference to the data.
        unsafe { &*self.lock.data.get() }
    }
}

impl<T, P: Platform, const N: usize> DerefMut for ChangeGuard<'_, T, P, N> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: the guard holds all shards and is borrowed mutably, so this is the only reference.
        unsafe { &mut *self.lock.data.get() }
    }
}

impl<T, P: Platform, const N: usize> Drop for ChangeGuard<'_, T, P, N> {
    fn drop(&mut self) {
        self.lock.shards.iter().for_each(|raw| raw.unlock());
        self.p.local_irq_restore(self.irq);
    }
}
