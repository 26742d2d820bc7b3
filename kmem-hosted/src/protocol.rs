//! Who is on a CPU slot, and what is pending for it: one word.
//!
//! # Concepts
//! A slot is *free*, *held* by a thread (which runs on that CPU until it gives the slot up), or *posed*:
//! claimed for a moment by somebody who kicked an idle CPU and serves its interrupt in its place.
//! Interrupts for the CPU are *pending* bits. The promise kept here: **a pending bit that is set is seen
//! by somebody who will serve it**, whatever the order of kicks, arrivals and departures, and only one
//! thread at a time acts as the CPU.
//!
//! # Implementation
//! State and pending bits share one word, so every step is one read-modify-write and all parties agree
//! on one order of steps; no store-load ordering between two words is needed.
//!
//! ```text
//!   31            10   9..6     5        4        3..0
//!  +----------------+--------+--------+--------+---------+
//!  | thread id      |   0    | WAITER | POSING | pending |
//!  +----------------+--------+--------+--------+---------+
//!
//!             acquire                            kick, thread id 0
//!   FREE  ---------------->  HELD       FREE  ---------------->  POSING
//!         <----------------                   <----------------
//!    release, pending = 0                  pending = 0, wakes WAITER
//! ```
//!
//! Four rules make the promise:
//! 1. *kick* sets the bit first and looks at the state in the same step. Held: it signals the holder.
//!    Free: it claims the slot and serves. Posed: it does nothing, by rule 4. Claim lost to somebody:
//!    nothing, by rules 2 and 4.
//! 2. *acquire* looks at the pending bits **after** it has made the slot the thread's own
//!    ([`Env::publish`]): a signal that landed between taking the word and publishing found no slot and
//!    did nothing.
//! 3. *release* goes from held to free only in a step that finds no pending bit. It retracts the slot
//!    before that step, so no signal acts for a CPU that others may be on already; when the step finds
//!    a bit, it publishes again and serves.
//! 4. a *poser* leaves under the same rule as a holder.
//!
//! A kick that finds its bits set already leaves them to the kicker that set them; its step and the
//! server's are on the same word, so the server sees all that this kicker wrote before.
//!
//! An acquirer that finds the slot posed sets WAITER and sleeps on the word. The slot queue lets one
//! thread at a time acquire a given slot, so one bit is enough.
//!
//! # Locking
//! None; any step may be interrupted at any place by a handler that kicks.

use core::sync::atomic::Ordering::{self, AcqRel, Acquire, Relaxed, Release};

/// Pending: the inter-processor interrupt.
pub(crate) const IPI: u32 = 1 << 0;
/// Pending: a timer tick.
pub(crate) const TIMER: u32 = 1 << 1;
/// Pending: a non-maskable interrupt.
pub(crate) const NMI: u32 = 1 << 2;
/// Pending: the CPU's timer is to be set again.
pub(crate) const REARM: u32 = 1 << 3;
const PENDING: u32 = 0xf;

const POSING: u32 = 1 << 4;
const WAITER: u32 = 1 << 5;
const TID_SHIFT: u32 = 10;

/// Highest thread id that the word holds: the kernel's own limit (`PID_MAX_LIMIT`) less one.
pub(crate) const TID_MAX: u32 = (1 << (32 - TID_SHIFT)) - 1;

/// The atomic word that the protocol runs on; a model checker brings its own.
pub(crate) trait Word {
    fn load(&self, order: Ordering) -> u32;
    fn compare_exchange(
        &self,
        old: u32,
        new: u32,
        success: Ordering,
        failure: Ordering,
    ) -> Result<u32, u32>;
    fn fetch_or(&self, bits: u32, order: Ordering) -> u32;
    fn fetch_and(&self, bits: u32, order: Ordering) -> u32;
}

/// What the protocol asks of the thread that runs it.
pub(crate) trait Env<W> {
    /// From here on, interrupts that land on this thread serve the slot.
    fn publish(&self);
    /// From here on they do not.
    fn retract(&self);
    /// Serves what is pending: takes the bits with [`SlotWord::take_pending`] and acts.
    fn serve(&self);
    /// Interrupts the thread that holds the slot.
    fn signal(&self, tid: u32);
    /// Sleeps while `word` holds `seen`; may return early.
    fn wait(&self, word: &W, seen: u32);
    /// Wakes who sleeps on `word`.
    fn wake(&self, word: &W);
}

/// A slot's word.
pub(crate) struct SlotWord<W>(W);

impl<W: Word> SlotWord<W> {
    /// Makes `word`, which holds 0, a free slot's.
    pub(crate) const fn new(word: W) -> Self {
        SlotWord(word)
    }

    /// Takes the slot for thread `tid`, waiting while it is posed, and serves what is pending. One
    /// caller at a time.
    pub(crate) fn acquire(&self, tid: u32, env: &impl Env<W>) {
        let mut seen = self.0.load(Relaxed);
        loop {
            if seen & POSING == 0 {
                // Acquire pairs with the Release in `leave`: what was done as this CPU is seen.
                match self.0.compare_exchange(seen, seen | tid << TID_SHIFT, Acquire, Relaxed) {
                    Ok(_) => break,
                    Err(now) => seen = now,
                }
            } else if seen & WAITER == 0 {
                match self.0.compare_exchange(seen, seen | WAITER, Relaxed, Relaxed) {
                    Ok(_) => seen |= WAITER,
                    Err(now) => seen = now,
                }
            } else {
                env.wait(&self.0, seen);
                seen = self.0.load(Relaxed);
            }
        }
        env.publish();
        // Rule 2. A signal that found no slot was sent after its bit was set, and this load comes after
        // the signal on the same thread.
        if self.pending() {
            env.serve();
        }
    }

    /// Gives the slot up, serving first what is pending.
    pub(crate) fn release(&self, env: &impl Env<W>) {
        self.leave(env);
    }

    /// Sets pending `bits` and sees to it that they are served: now, by this thread, if nobody is on
    /// the CPU. `tid` is the calling thread's.
    pub(crate) fn kick(&self, bits: u32, tid: u32, env: &impl Env<W>) {
        // Release pairs with the Acquire in `take_pending`: the server sees why it was kicked. Acquire
        // matters only if this thread becomes the server.
        let old = self.0.fetch_or(bits, AcqRel);
        if old & bits == bits || old & POSING != 0 {
            return;
        }
        if old >> TID_SHIFT != 0 {
            env.signal(old >> TID_SHIFT);
            return;
        }
        let mut seen = old | bits;
        loop {
            if seen >> TID_SHIFT != 0 || seen & PENDING == 0 {
                return;
            }
            // Acquire pairs with the Release in `leave`.
            match self.0.compare_exchange(seen, seen | POSING | tid << TID_SHIFT, Acquire, Relaxed)
            {
                Ok(_) => break,
                Err(now) => seen = now,
            }
        }
        env.publish();
        env.serve();
        self.leave(env);
    }

    /// Rules 3 and 4.
    fn leave(&self, env: &impl Env<W>) {
        loop {
            env.retract();
            let mut seen = self.0.load(Relaxed);
            while seen & PENDING == 0 {
                // Release pairs with the Acquire in `acquire` and `kick`: the next on this CPU sees what
                // was done as it.
                match self.0.compare_exchange(seen, 0, Release, Relaxed) {
                    Ok(_) => {
                        if seen & WAITER != 0 {
                            env.wake(&self.0);
                        }
                        return;
                    }
                    Err(now) => seen = now,
                }
            }
            env.publish();
            env.serve();
        }
    }

    /// Takes all pending bits.
    pub(crate) fn take_pending(&self) -> u32 {
        // Acquire pairs with the Release in `kick`.
        self.0.fetch_and(!PENDING, AcqRel) & PENDING
    }

    /// Takes those of the given pending bits that are set.
    pub(crate) fn take(&self, bits: u32) -> u32 {
        // Acquire pairs with the Release in `kick`.
        self.0.fetch_and(!bits, AcqRel) & bits
    }

    /// Sets pending bits for the CPU that the caller is on; the caller serves them.
    pub(crate) fn raise(&self, bits: u32) {
        self.0.fetch_or(bits, Relaxed);
    }

    /// Whether a thread is on the slot, if only to pose.
    pub(crate) fn is_held(&self) -> bool {
        self.0.load(Relaxed) >> TID_SHIFT != 0
    }

    /// Whether anything is pending.
    pub(crate) fn pending(&self) -> bool {
        self.0.load(Relaxed) & PENDING != 0
    }
}
