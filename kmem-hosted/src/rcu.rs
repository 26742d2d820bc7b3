//! Readers that hold no lock, and grace periods \[S5, X1\].
//!
//! # Concepts
//! A task or an interrupt handler reads what others may free meanwhile inside of [`Hosted::rcu_read`]; what they free
//! with a grace period stays until it is done. It cannot sleep inside.
//!
//! # Implementation
//! Epochs. A reader notes the machine's epoch in its CPU's slot. The epoch goes on when no reader is of an older one;
//! twice, and all who were there at the start are gone: those who noted the epoch before it went on the first time
//! hold back the second.
//!
//! # Locking
//! None. The fence of a reader's beginning pairs with the one of who looks at the slots: either he sees the reader, or
//! the reader sees what was done before he looked.

use crate::{hosted::Hosted, slot};
use core::{
    ptr,
    sync::atomic::{
        AtomicU64,
        Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst},
        fence,
    },
};
use kmem::context::Section;

/// The machine's epoch. Even, so that a reader's note, one more, is never 0.
pub(crate) struct Epoch(AtomicU64);

/// What a CPU's reader noted: the epoch and one, or 0 for none.
pub(crate) struct Reader(AtomicU64);

const STEP: u64 = 2;

impl Reader {
    pub(crate) const fn new() -> Reader {
        Reader(AtomicU64::new(0))
    }

    /// No reader is left on the CPU. Its own thread's call.
    pub(crate) fn clear(&self) {
        // Release pairs with the Acquire in `advance`: what the reader read was before.
        self.0.store(0, Release);
    }
}

impl Epoch {
    pub(crate) const fn new() -> Epoch {
        Epoch(AtomicU64::new(0))
    }

    /// The epoch at whose beginning everybody is gone who reads now.
    pub(crate) fn end(&self) -> u64 {
        // What the caller made unreachable is so to readers that begin from here on.
        fence(SeqCst);
        self.0.load(Relaxed) + 2 * STEP
    }

    /// Whether the epoch is there; brings it nearer if readers let it.
    pub(crate) fn reached<'a>(
        &self,
        end: u64,
        readers: impl Iterator<Item = &'a Reader> + Clone,
    ) -> bool {
        for _ in 0..2 {
            let now = self.0.load(Acquire);
            if now >= end {
                return true;
            }
            // Pairs with the fence in `rcu_read`.
            fence(SeqCst);
            let old = |reader: &Reader| {
                let note = reader.0.load(Acquire);
                note != 0 && note != now + 1
            };
            if readers.clone().any(old) {
                return false;
            }
            let _ = self.0.compare_exchange(now, now + STEP, AcqRel, Relaxed);
        }
        self.0.load(Acquire) >= end
    }
}

impl Hosted {
    /// Runs `f` as a reader (`rcu_read_lock`, `rcu_read_unlock`): what was reachable when it began, and is freed with a
    /// grace period, stays as long. Nests. `f` cannot sleep. `None` for a thread that is not on the machine.
    pub fn rcu_read<R>(&self, f: impl FnOnce() -> R) -> Option<R> {
        struct Done<'a>(&'a Hosted, &'a slot::Slot, bool);
        impl Drop for Done<'_> {
            fn drop(&mut self) {
                // Who left the CPU inside was told so, and the section ended there.
                let here = slot::slot_of(self.0.id()).is_some_and(|slot| ptr::eq(slot, self.1));
                if !here || self.1.cpu.context().preempt_depth() == 0 {
                    return;
                }
                if self.2 {
                    self.1.reader.clear();
                }
                self.1.cpu.leave(Section::Preempt);
            }
        }
        let slot = slot::slot_of(self.id())?;
        slot.cpu.enter(Section::Preempt);
        // An interrupt that lands here may read too, and is done when we go on.
        let outermost = slot.reader.0.load(Relaxed) == 0;
        if outermost {
            slot.reader.0.store(self.inner.epoch.0.load(Relaxed) + 1, Relaxed);
            // Pairs with the fences in `end` and `reached`.
            fence(SeqCst);
        }
        let _done = Done(self, slot, outermost);
        Some(f())
    }

    pub(crate) fn rcu_reached(&self, end: u64) -> bool {
        self.inner.epoch.reached(end, self.inner.slots.iter().map(|slot| &slot.reader))
    }
}
