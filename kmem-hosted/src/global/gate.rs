//! The gate: stopping all threads outside of the machine.
//!
//! # Concepts
//! A fork must not happen while another thread is inside a call: the child would have that thread's half-done
//! work and its locks, and never the thread. So before a fork the gate is closed, whoever is inside is waited for,
//! and whoever comes waits; after it the gate opens, in both processes. The same stops all for a moment when memory
//! has run out and what lies on other threads' seats is wanted.
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

/// Whether the caller closed the gate.
pub(super) fn is_mine() -> bool {
    CLOSER.load(Relaxed) == seats::thread()
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
    while CLOSER.compare_exchange(0, seats::thread(), Acquire, Relaxed).is_err() {
        // Whoever closed the gate may be waiting for this call to end.
        let _out = own.map(seats::Out::new);
        sys::relax();
    }
    GATE.fetch_or(CLOSED, SeqCst);
    fence(SeqCst);
    if GATE.load(Relaxed) & CAREFUL == 0 {
        // Registered at bring-up, so it does not fail.
        let _ = membarrier(MembarrierCommand::PrivateExpedited);
    }
    for seat in seats::all() {
        while seat.is_inside() && !own.is_some_and(|own| core::ptr::eq(own, seat)) {
            sys::relax();
        }
    }
    Closed(())
}

impl Drop for Closed {
    fn drop(&mut self) {
        open();
    }
}

fn open() {
    // Release pairs with the Acquire in `close`.
    CLOSER.store(0, Release);
    // Release pairs with the Acquire in `is_open` and `lets_in`.
    GATE.fetch_and(!CLOSED, Release);
    sys::futex_wake(&raw const GATE, u32::MAX);
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
