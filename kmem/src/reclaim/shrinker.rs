//! Shrinkers: caches that give objects up when asked \[R1\].
//!
//! # Concepts
//! A shrinker says how many objects it could free on a node (`count_objects`) and frees some
//! (`scan_objects`). How many it is asked for grows with the pressure and shrinks with the cost of making an object
//! again (`seeks`).
//!
//! # Implementation
//! What was due but could not be scanned (the request lacked a flag, the shrinker stopped) is kept per
//! node and added to the next demand.
//!
//! # Locking
//! The registry's lock guards the table only; shrinkers run without it, counted so that unregistering
//! waits for them.

use crate::{
    gfp::Gfp, page_alloc::PageAllocator, platform::Platform, sync::IrqLock, types::MAX_NODES,
    vmstat::VmEvent,
};
use core::{
    fmt,
    sync::atomic::{
        AtomicU32,
        Ordering::{AcqRel, Acquire, Relaxed},
    },
};

/// Shrinkers a machine may have.
pub const MAX_SHRINKERS: usize = 32;

/// What a shrinker is asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ShrinkControl {
    /// What may be done: block I/O only with `__GFP_IO`, file-system calls only with `__GFP_FS`.
    pub gfp: Gfp,
    /// The node.
    pub node: usize,
    /// Objects to look at.
    pub nr_to_scan: u64,
}

/// A cache that can give objects up.
pub trait Shrinker: Sync {
    /// Objects that could be freed on the node. Must not sleep long and must not allocate.
    fn count_objects(&self, sc: &ShrinkControl) -> u64;

    /// Frees up to `sc.nr_to_scan` objects and returns how many; `None` to stop being asked in this round
    /// (`SHRINK_STOP`). Runs in process context, in a `memalloc_noreclaim` scope.
    fn scan_objects(&self, sc: &ShrinkControl) -> Option<u64>;

    /// Flags without which the shrinker is not to be called: `__GFP_IO`, `__GFP_FS` or both.
    fn needs(&self) -> Gfp {
        Gfp::empty()
    }

    /// Cost of making an object again, in disk seeks; 0 for objects that cost nothing.
    fn seeks(&self) -> u32 {
        2
    }

    /// Objects scanned per call.
    fn batch(&self) -> u64 {
        128
    }

    /// Whether it keeps its objects by node; if not, it is asked on node 0 only.
    fn numa_aware(&self) -> bool {
        false
    }
}

/// Names a registered shrinker.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ShrinkerId(usize);

/// Why a shrinker was not registered or unregistered.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ShrinkerError {
    /// 32 are registered.
    Full,
    /// No such shrinker.
    Unknown,
}

impl fmt::Display for ShrinkerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ShrinkerError::Full => "too many shrinkers",
            ShrinkerError::Unknown => "no such shrinker",
        })
    }
}

impl core::error::Error for ShrinkerError {}

struct Entry {
    users: AtomicU32,
    deferred: [AtomicU32; MAX_NODES],
}

pub(super) struct Registry {
    table: IrqLock<[Option<&'static dyn Shrinker>; MAX_SHRINKERS]>,
    entries: [Entry; MAX_SHRINKERS],
}

impl Registry {
    pub(super) const fn new() -> Registry {
        Registry {
            table: IrqLock::new([None; MAX_SHRINKERS]),
            entries: [const {
                Entry {
                    users: AtomicU32::new(0),
                    deferred: [const { AtomicU32::new(0) }; MAX_NODES],
                }
            }; MAX_SHRINKERS],
        }
    }

    pub(super) fn register<P: Platform>(
        &self,
        p: &P,
        s: &'static dyn Shrinker,
    ) -> Result<ShrinkerId, ShrinkerError> {
        let mut table = self.table.lock(p);
        let free = (0..MAX_SHRINKERS)
            .find(|i| table[*i].is_none() && self.entries[*i].users.load(Acquire) == 0)
            .ok_or(ShrinkerError::Full)?;
        self.entries[free].deferred.iter().for_each(|d| d.store(0, Relaxed));
        table[free] = Some(s);
        Ok(ShrinkerId(free))
    }

    /// Removes a shrinker and waits until it no longer runs. Process context.
    pub(super) fn unregister<P: Platform>(
        &self,
        p: &P,
        id: ShrinkerId,
    ) -> Result<(), ShrinkerError> {
        let known = self.table.lock(p).get_mut(id.0).and_then(Option::take).is_some();
        if !known {
            return Err(ShrinkerError::Unknown);
        }
        // Acquire pairs with the AcqRel of the last user: its calls are over.
        while self.entries[id.0].users.load(Acquire) != 0 {
            p.wait(&self.entries[id.0].users, self.entries[id.0].users.load(Acquire), 1_000_000);
        }
        Ok(())
    }

    /// Calls `f` with every registered shrinker, the registry unlocked.
    fn each<P: Platform>(&self, p: &P, mut f: impl FnMut(&dyn Shrinker, &Entry)) {
        for (i, entry) in self.entries.iter().enumerate() {
            let shrinker = {
                let table = self.table.lock(p);
                if table[i].is_some() {
                    entry.users.fetch_add(1, AcqRel);
                }
                table[i]
            };
            if let Some(s) = shrinker {
                f(s, entry);
                if entry.users.fetch_sub(1, AcqRel) == 1 {
                    p.wake(&entry.users);
                }
            }
        }
    }

    /// Objects that could be freed on the node.
    pub(super) fn count<P: Platform>(
        &self,
        pages: &PageAllocator<P, super::Vmscan>,
        node: usize,
    ) -> u64 {
        let mut sum = 0;
        self.each(pages.platform(), |s, _| {
            if s.numa_aware() || node == 0 {
                let sc = ShrinkControl { gfp: Gfp::KERNEL, node, nr_to_scan: 0 };
                sum += s.count_objects(&sc);
            }
        });
        sum
    }

    /// Asks every shrinker of the node for its share.
    pub(super) fn shrink<P: Platform>(
        &self,
        pages: &PageAllocator<P, super::Vmscan>,
        node: usize,
        gfp: Gfp,
        priority: u32,
    ) -> u64 {
        let mut freed = 0;
        self.each(pages.platform(), |s, entry| {
            if s.numa_aware() || node == 0 {
                freed += one(pages, s, &entry.deferred[node % MAX_NODES], node, gfp, priority);
            }
        });
        freed
    }
}

/// One shrinker, one node (`do_shrink_slab`).
fn one<P: Platform>(
    pages: &PageAllocator<P, super::Vmscan>,
    s: &dyn Shrinker,
    deferred: &AtomicU32,
    node: usize,
    gfp: Gfp,
    priority: u32,
) -> u64 {
    let freeable = s.count_objects(&ShrinkControl { gfp, node, nr_to_scan: 0 });
    if freeable == 0 {
        return 0;
    }
    let owed = u64::from(deferred.swap(0, AcqRel));
    let share = match s.seeks() {
        0 => freeable / 2,
        seeks => (freeable >> priority) * 4 / u64::from(seeks),
    };
    let mut total = ((owed >> priority) + share).min(2 * freeable);
    let (mut scanned, mut freed) = (0, 0);
    let batch = s.batch().max(1);
    if gfp.contains(s.needs()) {
        // A cache smaller than its batch is scanned whole, or it would never be.
        while total >= batch || total >= freeable {
            let nr_to_scan = total.min(batch);
            if nr_to_scan == 0 {
                break;
            }
            let Some(n) = s.scan_objects(&ShrinkControl { gfp, node, nr_to_scan }) else { break };
            freed += n;
            scanned += nr_to_scan;
            total -= nr_to_scan;
        }
    }
    pages.count(VmEvent::SlabsScanned, scanned);
    let left = (owed + share).saturating_sub(scanned).min(2 * freeable);
    deferred.fetch_add(u32::try_from(left).unwrap_or(u32::MAX / 2), AcqRel);
    freed
}
