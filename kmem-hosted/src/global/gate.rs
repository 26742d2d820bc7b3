//! The gate: stopping all threads outside of the machine.
//!
//! # Concepts
//! A fork must not happen while another thread is inside a call: the child would have that thread's half-done
//! work and its locks, and never the thread. So before a fork the gate is closed, whoever is inside is waited for,
//! and whoever comes waits; after it the gate opens, in both processes. The same stops all for a moment when memory
//! has run out and what lies on other threads' seats is wanted. To serve a request as one seat, only that seat's thread
//! has to be outside: it is waited for a little, with the gate closed, so that it does not come again at once.
//!
//! # Implementation
//! A caller counts itself in, then looks at the gate; the closer closes the gate, then looks at the counts. Each
//! must see the other's store, which takes a fence on both sides. The callers' is left to the closer:
//! `membarrier` has every running thread of the process pass one. Where the host has no `membarrier`, the gate is
//! never quite open, and each call takes the slow way in, which has a fence of its own.
//!
//! ```text
//!   caller                        closer
//!   inside += 1                   gate = CLOSED
//!   (compiler fence)              membarrier
//!   gate open?  no: out, wait     every seat: wait for inside = 0
//! ```
//!
//! The closer may enter: a fork's other handlers, which run on the same thread, may allocate.
//!
//! # Locking
//! `CLOSER`: one closer at a time, waited for outside of the machine or, when memory has run out, inside it with
//! the count taken back meanwhile.

use super::{bringup, seats};
use crate::sys;
use core::sync::atomic::{
    AtomicU32, AtomicUsize,
    Ordering::{Acquire, Relaxed, Release, SeqCst},
    fence,
};
use rustix::thread::{MembarrierCommand, membarrier};

/// Somebody wants all stopped.
const CLOSED: u32 = 1;
/// Callers must take the slow way: the host has no `membarrier`.
const CAREFUL: u32 = 2;
/// With `CLOSED`: everybody is waited for, or was.
const ALL: u32 = 4;

/// Turns for which a call that is on a seat is waited for. It may be one that waits for the caller.
const PATIENCE: u32 = 256;

static GATE: AtomicU32 = AtomicU32::new(0);
/// The thread that closed the gate; 0 for nobody.
static CLOSER: AtomicUsize = AtomicUsize::new(0);

/// Whether callers may come in without a fence.
#[inline(always)]
pub(super) fn is_open() -> bool {
    // Acquire pairs with the Release in `open`: what was done meanwhile is seen.
    GATE.load(Acquire) == 0
}

/// Whether the caller, who has passed a fence since it counted itself in, may come in.
pub(super) fn lets_in() -> bool {
    GATE.load(Acquire) & CLOSED == 0 || is_mine()
}

/// Whether the caller is the closer.
fn is_mine() -> bool {
    CLOSER.load(Relaxed) == seats::thread()
}

/// Whether the caller has all others stopped.
fn has_all_stopped() -> bool {
    is_mine() && GATE.load(Relaxed) & ALL != 0
}

/// Waits outside of a closed gate.
pub(super) fn wait() {
    let seen = GATE.load(Relaxed);
    if seen & CLOSED != 0 {
        sys::futex_wait(&GATE, seen, None);
    }
}

/// At bring-up.
pub(super) fn prepare() {
    if membarrier(MembarrierCommand::RegisterPrivateExpedited).is_err() {
        GATE.fetch_or(CAREFUL, Relaxed);
    }
    // SAFETY: the handlers are functions for the whole of the program. Without memory for them the C library
    // refuses; then a fork is as it would be without this.
    unsafe { libc::pthread_atfork(Some(before_fork), Some(in_parent), Some(in_child)) };
}

/// Keeps the gate closed; opens it when dropped.
pub(super) struct Closed(());

/// Closes the gate and waits until no other thread is inside. The caller may be inside itself.
pub(super) fn close() -> Closed {
    let own = seats::current();
    let closed = become_closer();
    shut(CLOSED | ALL);
    for seat in seats::all() {
        while seat.is_inside() && !own.is_some_and(|own| core::ptr::eq(own, seat)) {
            sys::relax();
        }
    }
    closed
}

fn become_closer() -> Closed {
    let own = seats::current();
    while CLOSER.compare_exchange(0, seats::thread(), Acquire, Relaxed).is_err() {
        // Whoever closed the gate may be waiting for this call to end.
        let _out = own.map(seats::Out::new);
        sys::relax();
    }
    Closed(())
}

fn shut(bits: u32) {
    GATE.fetch_or(bits, SeqCst);
    fence(SeqCst);
    if GATE.load(Relaxed) & CAREFUL == 0 {
        // Registered at bring-up, so it does not fail.
        let _ = membarrier(MembarrierCommand::PrivateExpedited);
    }
}

/// Runs `f` while no thread is on a seat of another: at once if the seat is nobody's or the caller has all
/// stopped, else if its thread is outside of calls or gets there soon. One caller at a time does this.
pub(super) fn beside(seat: &seats::Seat, f: impl FnOnce()) {
    if has_all_stopped() {
        return f();
    }
    if is_mine() {
        // Asked for by what is done as one seat: whoever waits for it asks again.
        return;
    }
    let _closed = become_closer();
    if seat.take() {
        f();
        seat.free();
        return;
    }
    shut(CLOSED);
    for _ in 0..PATIENCE {
        if !seat.is_inside() {
            return f();
        }
        sys::relax();
    }
}

impl Drop for Closed {
    fn drop(&mut self) {
        open();
    }
}

fn open() {
    // Release pairs with the Acquire in `is_open` and `lets_in`.
    let before = GATE.fetch_and(!(CLOSED | ALL), Release);
    // Release pairs with the Acquire in `become_closer`. Last: the next closer's bits are not to be cleared.
    CLOSER.store(0, Release);
    if before & CLOSED != 0 {
        sys::futex_wake(&raw const GATE, u32::MAX);
    }
}

extern "C" fn before_fork() {
    bringup::settle();
    core::mem::forget(close());
}

extern "C" fn in_parent() {
    open();
}

extern "C" fn in_child() {
    seats::forget_other_threads();
    open();
}
