//! Purging: one flush for many areas, and their addresses are free again \[V3\].
//!
//! # Locking
//! A shard's lock while a list is taken; nothing during the flush. Purges run side by side, each with lists of its
//! own. Who finds no room waits for those under way.

use super::{
    Vmap,
    area::{Area, List, State},
    pool::{Lazy, SHARDS},
};
use crate::{context::Path, page_alloc::Reclaim, platform::Platform};
use core::{
    mem, ptr,
    sync::atomic::Ordering::{AcqRel, Acquire},
};

/// How long to wait for a purge before looking again.
const PATIENCE_NS: u64 = 1_000_000;
/// How often.
const MOST_WAITS: u32 = 1000;

impl<P: Platform, R: Reclaim> Vmap<'_, P, R> {
    /// Puts an area that was just unmapped on a lazy list, and purges if that makes too many.
    #[inline]
    pub(super) fn retire(&self, area: &'static Area) {
        area.set_state(State::Lazy);
        let lazy = {
            let _mark = self.objects.pages.mark(Path::VmFree);
            let mut lists = self.state.shards[self.shard()].lists.lock(self.p());
            lists.lazy.push(area);
            lists.lazy.bytes
        };
        if lazy > self.lazy_share() {
            self.purge();
        }
    }

    /// Flushes and frees all lazy areas; returns how many left the tree. Process context.
    #[cold]
    pub(super) fn purge(&self) -> u64 {
        // Who finds nothing since another purge took it sees that purge: it was begun before the list was had.
        if self.state.shards.iter().all(|shard| shard.lists.lock(self.p()).lazy.bytes == 0) {
            // Nothing to flush, and nobody to wake.
            return 0;
        }
        // Before the lists are taken.
        self.begin_purge();
        let mut taken = [const { Lazy::NONE }; SHARDS];
        let (mut low, mut high, mut nr) = (usize::MAX, 0, 0);
        for (taken, shard) in taken.iter_mut().zip(&self.state.shards) {
            *taken = mem::replace(&mut shard.lists.lock(self.p()).lazy, Lazy::NONE);
            (low, high) = (low.min(taken.low), high.max(taken.high));
        }
        if low < high {
            self.p().flush_tlb_kernel_range(low..high);
            for (shard, taken) in taken.into_iter().enumerate() {
                nr += self.give_purged(shard, taken.list);
            }
            nr += self.sort_purged(self.shard());
        }
        self.end_purge();
        nr
    }

    /// Areas are about to be on no list and in the tree: who does not see this finds them on a list.
    pub(super) fn begin_purge(&self) {
        self.state.purging.fetch_add(1, AcqRel);
    }

    /// They are free, or on a list again.
    pub(super) fn end_purge(&self) {
        // Pairs with the Acquire in `await_purges`: who sees it gone finds the addresses free.
        self.state.purging.fetch_sub(1, AcqRel);
        self.p().wake(&self.state.purging);
    }

    /// Gives areas that no CPU knows any more to a shard; returns how many others left the tree for it.
    fn give_purged(&self, at: usize, list: List) -> u64 {
        let mut nr = 0;
        while !list.is_empty() {
            let mut lists = self.state.shards[at].lists.lock(self.p());
            if lists.purged.is_empty() {
                lists.purged = list;
                break;
            }
            // Its CPUs did not come since the last purge.
            drop(lists);
            nr += self.sort_purged(at);
        }
        nr
    }

    /// Waits until no purge is under way, for a second at the most.
    fn await_purges(&self) {
        for _ in 0..MOST_WAITS {
            // Acquire pairs with the AcqRel at a purge's end.
            match self.state.purging.load(Acquire) {
                0 => return,
                seen => self.p().wait(&self.state.purging, seen, PATIENCE_NS),
            }
        }
    }

    /// Makes every address free that can be; returns how many areas went. Process context.
    pub(super) fn reclaim_addresses(&self) -> u64 {
        let deferred = self.run_deferred_frees();
        let nr = self.purge();
        self.await_purges();
        deferred + nr + self.empty_pools()
    }

    /// Takes an area out of the tree, and gives its descriptor back.
    pub(super) fn forget(&self, area: &'static Area) {
        let mut tree = self.state.tree.change(self.p());
        tree.remove(area);
        self.state.shards.iter().for_each(|shard| shard.hint.forget(area));
        drop(tree);
        if let Some(cache) = self.state.cache.get() {
            let at = ptr::NonNull::from(area).cast();
            // It is from that cache, and nothing leads to it any more.
            let _ = self.objects.free_to(&cache, at);
        }
    }

    /// `vm_unmap_aliases`.
    pub(crate) fn unmap_aliases(&self) -> u64 {
        if self.may_sleep() { self.reclaim_addresses() } else { 0 }
    }

    /// What reclaim asks for: frames that wait for process context, and descriptors.
    pub(crate) fn shrink(&self, priority: u32) -> u64 {
        if !self.may_sleep() {
            return 0;
        }
        let freed = self.run_deferred_frees();
        // Descriptors are small: they go last.
        if priority == 0 { freed + self.purge() + self.empty_pools() } else { freed }
    }
}
