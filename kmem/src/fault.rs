//! Fault injection: making allocations fail on purpose \[D1\].
//!
//! # Concepts
//! Every place where the allocator itself needs memory that may not be there is an *inner
//! allocation*: taking a block off the free lists, filling a table at bring-up. A plan says which of them fail; a test
//! that lets the first, the second, the third… fail, until nothing is left to fail, has driven every
//! error path there is.
//!
//! # Implementation
//! Setting a plan closes the machine's gate, so that an unset plan costs the fast path nothing.
//!
//! # Locking
//! Single atomics.
//!
//! See [fault injection](https://docs.kernel.org/fault-injection/fault-injection.html).

use core::{
    panic::Location,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

/// Which inner allocations fail.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum FaultPlan {
    /// None.
    #[default]
    Off,
    /// The one after `n` more; the plan is off after that.
    Nth(u64),
    /// Every one from the `n`-th on.
    From(u64),
    /// One in `n`, pseudo-randomly from `seed`. `n` of 0 fails none.
    OneIn {
        /// One in this many.
        n: u32,
        /// Start of the pseudo-random sequence.
        seed: u32,
    },
}

/// Whose allocations a plan is about: those of callers in some lines of a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FaultSite {
    /// End of the file's path, as `Location::file` shows it.
    pub file: &'static str,
    /// First and last line.
    pub lines: (u32, u32),
}

impl FaultSite {
    /// Whether a call from `at` is meant.
    pub(crate) fn is(&self, at: &Location<'_>) -> bool {
        let (first, last) = self.lines;
        at.file().ends_with(self.file) && (first..=last).contains(&at.line())
    }
}

/// The plan's state.
pub(crate) struct Fault {
    /// 0 off, 1 nth, 2 from, 3 one-in.
    mode: AtomicU64,
    left: AtomicU64,
    rng: AtomicU64,
    failed: AtomicU64,
}

impl Fault {
    pub(crate) const fn new() -> Fault {
        Fault {
            mode: AtomicU64::new(0),
            left: AtomicU64::new(0),
            rng: AtomicU64::new(0),
            failed: AtomicU64::new(0),
        }
    }

    pub(crate) fn set(&self, plan: FaultPlan) {
        let (mode, left, rng) = match plan {
            FaultPlan::Off => (0, 0, 0),
            FaultPlan::Nth(n) => (1, n, 0),
            FaultPlan::From(n) => (2, n, 0),
            FaultPlan::OneIn { n, seed } => (3, u64::from(n), u64::from(seed) | 1),
        };
        self.mode.store(0, Relaxed);
        self.left.store(left, Relaxed);
        self.rng.store(rng, Relaxed);
        self.mode.store(mode, Relaxed);
    }

    /// How many inner allocations were made to fail so far.
    pub(crate) fn failed(&self) -> u64 {
        self.failed.load(Relaxed)
    }

    /// Whether this inner allocation is to fail.
    #[inline]
    pub(crate) fn strikes(&self) -> bool {
        let mode = self.mode.load(Relaxed);
        mode != 0 && self.decide(mode)
    }

    #[cold]
    fn decide(&self, mode: u64) -> bool {
        let hit = match mode {
            1 | 2 => {
                let before = self
                    .left
                    .fetch_update(Relaxed, Relaxed, |n| Some(n.saturating_sub(1)))
                    .unwrap_or(0);
                let hit = before == 0;
                if hit && mode == 1 && self.mode.swap(0, Relaxed) == 0 {
                    return false;
                }
                hit
            }
            _ => {
                let n = self.left.load(Relaxed);
                let x = self
                    .rng
                    .fetch_update(Relaxed, Relaxed, |x| {
                        let mut x = x;
                        x ^= x << 13;
                        x ^= x >> 7;
                        x ^= x << 17;
                        Some(x)
                    })
                    .unwrap_or(1);
                n != 0 && (x >> 16).is_multiple_of(n)
            }
        };
        if hit {
            self.failed.fetch_add(1, Relaxed);
        }
        hit
    }
}
