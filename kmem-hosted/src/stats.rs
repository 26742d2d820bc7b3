//! What happened to a CPU: interrupts taken and deferred, and where they landed \[C3\].
//!
//! # Concepts
//! A claim that interrupts are safe anywhere in the allocator is worth as much as the number of
//! interrupts that landed there. Each that lands is counted by the allocator path that it interrupted,
//! apart for those served at once and those that found interrupts masked.
//!
//! # Locking
//! Counters are atomic: an interrupt counts in the middle of another's counting.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};
use kmem::context::NR_PATHS;

/// One CPU's counters at some moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuStats {
    /// Timer interrupts served.
    pub ticks: u64,
    /// Timer expirations that had no interrupt of their own, because the one before was still queued.
    pub overruns: u64,
    /// Inter-processor interrupts served.
    pub ipis: u64,
    /// Of these and other interrupts, rounds served by somebody else while nobody was on the CPU.
    pub posed: u64,
    /// Non-maskable interrupts served.
    pub nmis: u64,
    /// Softirq rounds run.
    pub softirqs: u64,
    /// Interrupts that landed in a softirq.
    pub nested: u64,
    /// Interrupts that found interrupts masked and were served later.
    pub deferred: u64,
    /// Interrupts served at once, by the allocator path they landed in ([`kmem::context::Path`]).
    pub landed: [u64; NR_PATHS],
    /// Interrupts deferred, by the allocator path they landed in.
    pub landed_deferred: [u64; NR_PATHS],
}

/// A CPU's counters.
pub(crate) struct Stats {
    pub(crate) ticks: Counter,
    pub(crate) overruns: Counter,
    pub(crate) ipis: Counter,
    pub(crate) posed: Counter,
    pub(crate) nmis: Counter,
    pub(crate) softirqs: Counter,
    pub(crate) nested: Counter,
    pub(crate) landed: [Counter; NR_PATHS],
    pub(crate) landed_deferred: [Counter; NR_PATHS],
}

impl Stats {
    pub(crate) const fn new() -> Stats {
        Stats {
            ticks: Counter::new(),
            overruns: Counter::new(),
            ipis: Counter::new(),
            posed: Counter::new(),
            nmis: Counter::new(),
            softirqs: Counter::new(),
            nested: Counter::new(),
            landed: [const { Counter::new() }; NR_PATHS],
            landed_deferred: [const { Counter::new() }; NR_PATHS],
        }
    }

    pub(crate) fn read(&self) -> CpuStats {
        let read = |counters: &[Counter; NR_PATHS]| core::array::from_fn(|i| counters[i].get());
        let landed_deferred: [u64; NR_PATHS] = read(&self.landed_deferred);
        CpuStats {
            ticks: self.ticks.get(),
            overruns: self.overruns.get(),
            ipis: self.ipis.get(),
            posed: self.posed.get(),
            nmis: self.nmis.get(),
            softirqs: self.softirqs.get(),
            nested: self.nested.get(),
            deferred: landed_deferred.iter().sum(),
            landed: read(&self.landed),
            landed_deferred,
        }
    }
}

/// An event counter.
pub(crate) struct Counter(AtomicU64);

impl Counter {
    const fn new() -> Counter {
        Counter(AtomicU64::new(0))
    }

    pub(crate) fn add(&self, n: u64) {
        self.0.fetch_add(n, Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}
