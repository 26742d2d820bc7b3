//! What a measured thread does.
//!
//! # Concepts
//! A [`Work`] is a loop that knows how long it took. Most are [`Each`]: a call per operation.
//!
//! # Locking
//! None.

use crate::contest::thread_time;
use std::time::Duration;

/// Something that a thread does operations of.
pub trait Work: Send {
    /// Does `n` operations and returns the processor time they took.
    fn run(&mut self, n: u64) -> Duration;

    /// Gives back what it still holds.
    fn end(self: Box<Self>);
}

/// The processor time that `f` takes.
pub fn timed(f: impl FnOnce()) -> Duration {
    let start = thread_time();
    f();
    thread_time() - start
}

/// An operation that is a call, and what is to be done at the end.
pub struct Each<F, E> {
    op: F,
    end: E,
}

impl<F: FnMut() + Send, E: FnOnce() + Send> Each<F, E> {
    /// A work of `op`, which `end` ends.
    pub fn new(op: F, end: E) -> Each<F, E> {
        Each { op, end }
    }
}

impl<F: FnMut() + Send, E: FnOnce() + Send> Work for Each<F, E> {
    #[inline(never)]
    fn run(&mut self, n: u64) -> Duration {
        timed(|| (0..n).for_each(|_| (self.op)()))
    }

    fn end(self: Box<Self>) {
        (self.end)();
    }
}
