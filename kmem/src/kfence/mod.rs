//! KFENCE: a sample of the objects, each on a page of its own between guard pages \[D2\].
//!
//! # Concepts
//! 1. A *pool* of pages is set aside at bring-up. Every other page of it is a *guard*: nobody can read or write
//!    it. Those between are for one object each. Now and then an allocation of the slab layer is served from there.
//! 2. The object lies at the beginning or at the end of its page, whichever chance says, so that what is read
//!    or written just before or behind it faults at once. What an alignment leaves between an object and the end of its
//!    page holds *canaries*, which are looked at when it is freed.
//! 3. A freed object's page is taken away until its turn comes again, last of all: a use after free faults.
//! 4. A fault is reported with who allocated and who freed the object; then the page is opened and the access goes
//!    on, as without KFENCE.
//!
//! # Implementation
//! *Sampling.* An allocation looks whether a sample is due on the slab layer's slow path only. A cache whose
//! traffic stays within a magazine never comes there by itself. So when a sample is due, whoever keeps the time
//! ([`kfence_toggle`](crate::Kmem::kfence_toggle), which [`kfence_run`](crate::Kmem::kfence_run) calls) has each CPU
//! *forget its machine*: a fast path begins by comparing the CPU's word with the one that names the machine, and a
//! word that does not name it sends the CPU's operations to the slower paths, as on its first day. The next
//! allocation of an object is the sample, and the CPU knows its machine again. The fast paths have no instruction
//! for this, magazines stay as they are, and what is sampled is what is allocated most. A CPU that allocates no
//! object until the next time is left alone for one round.
//!
//! *Finding an object.* The owner of each of the pool's frames is a number that no cache has (see
//! `slab::sampled`), so a free finds out beyond the fast path.
//!
//! *States.* A slot's word holds its state, the cache's number, and where on its page the object lies. Of two
//! CPUs that free an object one changes the word from ALLOCATED to FREEING; who comes later is refused.
//! One that `kfree_rcu` was called for is DYING until its readers are done.
//!
//! # Locking
//! The list of free slots has a lock, a leaf. All else are atomics: a fault may land anywhere, and its handler
//! takes no lock.
//!
//! See [KFENCE](https://docs.kernel.org/dev-tools/kfence.html).

mod pool;
mod report;
mod slot;

pub(crate) use pool::{Ask, Fault, FreeError, Pool};
pub(crate) use report::{FaultReport, FreeReport};
pub(crate) use slot::Info;

use core::{
    fmt,
    sync::atomic::{
        AtomicPtr, AtomicU32, AtomicU64,
        Ordering::{Acquire, Relaxed, Release},
    },
};

/// The pool of a machine, and how often an allocation is served from it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KfenceConfig {
    /// Objects that the pool has room for at least, from 1 on: two pages each, and two more, rounded up to a block
    /// of pages (`CONFIG_KFENCE_NUM_OBJECTS`).
    pub objects: u32,
    /// Nanoseconds from one sample to the next at least; 0 for none until
    /// [`set_kfence`](crate::Kmem::set_kfence) (`kfence.sample_interval`).
    pub sample_interval_ns: u64,
}

impl Default for KfenceConfig {
    /// 255 objects, 2 MiB with frames of 4 KiB; a sample every tenth of a second.
    fn default() -> Self {
        KfenceConfig { objects: 255, sample_interval_ns: 100_000_000 }
    }
}

/// Why there is no pool.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum KfenceError {
    /// No pool was asked for at bring-up.
    NoPool,
    /// No objects, or more than the largest block has room for.
    Objects(u32),
    /// No block of pages for it.
    NoMemory,
    /// The platform cannot take frames out of the direct map.
    Unsupported,
}

impl fmt::Display for KfenceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            KfenceError::NoPool => f.write_str("no pool was set aside at bring-up"),
            KfenceError::Objects(n) => write!(f, "no block of pages has room for {n} objects"),
            KfenceError::NoMemory => f.write_str("no memory for the pool"),
            KfenceError::Unsupported => {
                f.write_str("the platform cannot take frames out of the direct map")
            }
        }
    }
}

impl core::error::Error for KfenceError {}

/// What became of a machine's samples. Its text is that of Linux's `/sys/kernel/debug/kfence/stats`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct KfenceStats {
    /// Nanoseconds between samples; 0 if there are none.
    pub sample_interval_ns: u64,
    /// Objects that the pool has room for.
    pub objects: u64,
    /// Objects in use.
    pub live: u64,
    /// Allocations ever served.
    pub allocations: u64,
    /// Objects ever freed.
    pub frees: u64,
    /// Mistakes found.
    pub bugs: u64,
    /// Samples not taken since the request cannot be served from the pool.
    pub skipped_incompatible: u64,
    /// Samples not taken for want of a free page, or since most are in use and some by the same caller.
    pub skipped_capacity: u64,
}

impl fmt::Display for KfenceStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "enabled: {}", u8::from(self.sample_interval_ns != 0))?;
        writeln!(f, "currently allocated: {}", self.live)?;
        writeln!(f, "total allocations: {}", self.allocations)?;
        writeln!(f, "total frees: {}", self.frees)?;
        writeln!(f, "total bugs: {}", self.bugs)?;
        writeln!(f, "skipped allocations (incompatible): {}", self.skipped_incompatible)?;
        writeln!(f, "skipped allocations (capacity): {}", self.skipped_capacity)
    }
}

/// The pool of one machine, if it has one, and when the next sample is due.
pub(crate) struct Kfence {
    pool: AtomicPtr<Pool>,
    /// 0 while there are no samples.
    interval_ns: AtomicU64,
    next_ns: AtomicU64,
    pub(crate) incompatible: AtomicU64,
    /// Rung when the interval changes, or a machine goes.
    pub(crate) bell: AtomicU32,
}

impl Kfence {
    pub(crate) const fn new() -> Kfence {
        Kfence {
            pool: AtomicPtr::new(core::ptr::null_mut()),
            interval_ns: AtomicU64::new(0),
            next_ns: AtomicU64::new(0),
            incompatible: AtomicU64::new(0),
            bell: AtomicU32::new(0),
        }
    }

    /// The pool; it stays for as long as the machine does.
    #[inline]
    pub(crate) fn pool(&self) -> Option<&'static Pool> {
        // SAFETY: null or what `set_pool` put there. Acquire pairs with its Release.
        unsafe { self.pool.load(Acquire).as_ref() }
    }

    /// At bring-up, once.
    pub(crate) fn set_pool(&self, pool: &'static Pool) {
        // Release pairs with the Acquire in `pool`.
        self.pool.store(core::ptr::from_ref(pool).cast_mut(), Release);
    }

    #[inline]
    pub(crate) fn interval_ns(&self) -> u64 {
        self.interval_ns.load(Relaxed)
    }

    pub(crate) fn set_interval_ns(&self, ns: u64) {
        self.interval_ns.store(ns, Relaxed);
        self.next_ns.store(0, Relaxed);
    }

    /// Whether samples are taken, and one is due.
    pub(crate) fn due(&self, now: u64) -> bool {
        self.interval_ns() != 0 && now >= self.next_ns.load(Relaxed)
    }

    /// Whether the caller is to take the sample that is due. Of several one is.
    pub(crate) fn take_turn(&self, now: u64) -> bool {
        let interval = self.interval_ns();
        let due = self.next_ns.load(Relaxed);
        interval != 0
            && now >= due
            && self
                .next_ns
                .compare_exchange(due, now.saturating_add(interval), Relaxed, Relaxed)
                .is_ok()
    }
}
