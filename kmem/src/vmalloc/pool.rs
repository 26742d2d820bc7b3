//! Lazy lists and pools: areas that are free.
//!
//! # Concepts
//! Areas that were unmapped wait on a lazy list for the next purge. After it those of the smaller sizes go to a
//! pool of areas of the same size, where the next request takes them from.
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
};
use crate::{context::Cpu, page_alloc::Reclaim, platform::Platform};

/// Shards.
pub(super) const SHARDS: usize = 4;

/// Frames of the largest area that is pooled, the guard not counted.
const LARGEST: usize = 64;

/// A shard.
pub(super) struct Shard {
    pub(super) lazy: List,
    /// Bytes of addresses on it.
    pub(super) lazy_bytes: usize,
    /// By frames, less one.
    pools: [List; LARGEST],
    /// Bytes of addresses in the pools.
    pooled: usize,
}

impl Shard {
    pub(super) const fn new() -> Shard {
        Shard { lazy: List::EMPTY, lazy_bytes: 0, pools: [List::EMPTY; LARGEST], pooled: 0 }
    }

    /// All areas in it.
    pub(super) fn areas(&self) -> impl Iterator<Item = &'static Area> + '_ {
        self.lazy.iter().chain(self.pools.iter().flat_map(List::iter))
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

    /// Takes an area of `size` bytes out of the caller's pools.
    pub(super) fn take_pooled(&self, size: usize) -> Link {
        let class = class(size, Self::PAGE)?;
        let mut shard = self.state.shards[self.shard()].lock(self.p());
        let area = shard.pools[class].pop()?;
        shard.pooled -= size;
        drop(shard);
        area.set_state(State::Building);
        Some(area)
    }

    /// Puts an area that no CPU knows any more in a shard's pool; `false` if it is not one for that.
    pub(super) fn put_pooled(&self, shard: usize, area: &'static Area) -> bool {
        let Some(class) = class(area.size, Self::PAGE) else { return false };
        let mut shard = self.state.shards[shard].lock(self.p());
        if shard.pooled + area.size > self.lazy_max() {
            return false;
        }
        area.set_state(State::Pooled);
        shard.pooled += area.size;
        shard.pools[class].push(area);
        true
    }

    /// Takes the pools of all shards out of the tree; returns how many areas there were.
    pub(super) fn empty_pools(&self) -> u64 {
        let mut nr = 0;
        for shard in &self.state.shards {
            loop {
                let mut shard = shard.lock(self.p());
                if shard.pooled == 0 {
                    break;
                }
                let Some(area) = shard.pools.iter_mut().find_map(List::pop) else { break };
                shard.pooled -= area.size;
                drop(shard);
                self.forget(area);
                nr += 1;
            }
        }
        nr
    }
}
