//! Lazy lists and pools: areas that are free.
//!
//! # Concepts
//! Areas that were unmapped wait on a lazy list for the next purge. After it those of the smaller sizes go to a
//! pool of areas of the same size, where the next request takes them from. Who purges gives the areas of other
//! shards back to them as one list, and their own CPUs sort it when they next look for one: so a descriptor's lines
//! stay in the caches of the CPU that uses it.
//!
//! # Implementation
//! Four *shards*, by the remainder of the CPU's number, as the slab layer has its shelves. A request whose shard
//! has no area of its size goes to the tree; another shard's pools are emptied into the tree when there is no
//! room. What a shard keeps is bounded: descriptors are memory, too.
//!
//! # Locking
//! One lock for each shard.

use super::{
    Vmap,
    area::{Area, Link, List, State},
    find::Hint,
};
use crate::{
    context::{Cpu, Path},
    page_alloc::Reclaim,
    platform::Platform,
    sync::IrqLock,
};

/// Shards.
pub(super) const SHARDS: usize = 4;

/// Frames of the largest area that is pooled, the guard not counted.
const LARGEST: usize = 256;

/// Areas that wait for a purge.
pub(super) struct Lazy {
    pub(super) list: List,
    /// Bytes of addresses on it.
    pub(super) bytes: usize,
    /// Where the lowest begins and the highest ends.
    pub(super) low: usize,
    pub(super) high: usize,
}

impl Lazy {
    pub(super) const NONE: Lazy = Lazy { list: List::EMPTY, bytes: 0, low: usize::MAX, high: 0 };

    #[inline]
    pub(super) fn push(&mut self, area: &'static Area) {
        self.list.push(area);
        self.bytes += area.size;
        self.low = self.low.min(area.start());
        self.high = self.high.max(area.end());
    }
}

/// A shard.
pub(super) struct Shard {
    pub(super) hint: Hint,
    pub(super) lists: IrqLock<Lists>,
}

/// The free areas of a shard.
pub(super) struct Lists {
    pub(super) lazy: Lazy,
    /// Areas that a purge took off the lazy list and gave back when no CPU knew them any more, for this shard's CPUs to
    /// sort.
    pub(super) purged: List,
    /// By frames, less one.
    pools: [List; LARGEST],
    /// Bytes of addresses in the pools.
    pooled: usize,
}

impl Shard {
    pub(super) const fn new() -> Shard {
        Shard { hint: Hint::new(), lists: IrqLock::new(Lists::NONE) }
    }
}

impl Lists {
    const NONE: Lists =
        Lists { lazy: Lazy::NONE, purged: List::EMPTY, pools: [List::EMPTY; LARGEST], pooled: 0 };

    /// All areas on them.
    pub(super) fn areas(&self) -> impl Iterator<Item = &'static Area> + '_ {
        let waiting = self.lazy.list.iter().chain(self.purged.iter());
        waiting.chain(self.pools.iter().flat_map(List::iter))
    }
}

/// Where in the pools an area of a size is.
#[inline]
fn class(size: usize, page: usize) -> Option<usize> {
    (size / page).checked_sub(2).filter(|class| *class < LARGEST)
}

impl<P: Platform, R: Reclaim> Vmap<'_, P, R> {
    /// The caller's shard.
    pub(super) fn shard(&self) -> usize {
        self.p().this_cpu().map_or(0, Cpu::id) % SHARDS
    }

    /// Bytes of addresses that a shard may keep in its pools, and that all of them together may have on lazy lists.
    pub(super) fn lazy_max(&self) -> usize {
        (self.p().nr_cpu_ids().max(1).ilog2() as usize + 1) * (32 << 20)
    }

    /// What a shard may have on its own.
    pub(super) fn lazy_share(&self) -> usize {
        self.lazy_max() / self.p().nr_cpu_ids().clamp(1, SHARDS)
    }

    /// Takes an area of `size` bytes out of a shard's pools.
    pub(super) fn take_pooled(&self, at: usize, size: usize) -> Link {
        let class = class(size, Self::PAGE)?;
        loop {
            let mark = self.objects.pages.mark(Path::VmAlloc);
            let mut lists = self.state.shards[at].lists.lock(self.p());
            if let Some(area) = lists.pools[class].pop() {
                lists.pooled -= size;
                return Some(area);
            }
            if lists.purged.is_empty() {
                return None;
            }
            drop(lists);
            drop(mark);
            self.sort_purged(at);
        }
    }

    /// Puts what purges gave back to a shard in its pools, and takes out of the tree what is not for them; returns how
    /// many that were. Process context.
    #[cold]
    pub(super) fn sort_purged(&self, shard: usize) -> u64 {
        let mut nr = 0;
        loop {
            let mut lists = self.state.shards[shard].lists.lock(self.p());
            let Some(area) = lists.purged.pop() else { return nr };
            match class(area.size, Self::PAGE) {
                Some(class) if lists.pooled + area.size <= self.lazy_max() => {
                    area.set_state(State::Pooled);
                    lists.pooled += area.size;
                    lists.pools[class].push(area);
                }
                _ => {
                    // Who wants addresses meanwhile waits for these.
                    self.begin_purge();
                    drop(lists);
                    self.forget(area);
                    self.end_purge();
                    nr += 1;
                }
            }
        }
    }

    /// Takes the pools of all shards out of the tree; returns how many areas there were.
    pub(super) fn empty_pools(&self) -> u64 {
        let mut nr = 0;
        for (at, shard) in self.state.shards.iter().enumerate() {
            nr += self.sort_purged(at);
            loop {
                let mut lists = shard.lists.lock(self.p());
                if lists.pooled == 0 {
                    break;
                }
                let Some(area) = lists.pools.iter_mut().find_map(List::pop) else { break };
                lists.pooled -= area.size;
                drop(lists);
                self.forget(area);
                nr += 1;
            }
        }
        nr
    }
}
