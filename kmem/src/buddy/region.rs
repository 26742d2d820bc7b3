//! Regions: up to 64 pageblocks whose wholly free ones are bits of one word.
//!
//! # Concepts
//! A block of order 9 + k is a run of 2^k aligned set bits; what `FreeBits` does for the frames of a
//! pageblock, one word does here for the pageblocks of a region. Orders above 15 do not exist.
//!
//! # Implementation
//! A region belongs to one zone; where two zones meet inside one, each has a region of its own with
//! only its own bits. Bring-up sets a word per region and touches no pageblock: a terabyte is eight
//! thousand words. Blocks are counted a region at a time, when somebody asks.
//!
//! # Locking
//! As for the area.

use super::{AlreadyFree, Area, NIL};
use crate::{
    runs::{low, maximal, pairs, starts},
    types::{MigrateType, PAGEBLOCK_ORDER},
};
use core::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed};

/// Orders a region can hold: 9 to 15.
pub(super) const REGION_ORDERS: usize = 7;

/// Pageblocks of the largest region as a power of two. A zone has smaller ones where it would have too few to deal
/// out over its areas; a block of the largest order fits in one.
pub(crate) const MAX_REGION_SHIFT: u32 = 6;

/// Pageblocks of one zone, 2^`region_shift` of them.
pub(crate) struct Region {
    whole: AtomicU64,
    next: AtomicU32,
    prev: AtomicU32,
    /// Bin (largest order − 9) plus one; 0 for none.
    bin: AtomicU8,
}

impl Region {
    pub(crate) fn whole(&self) -> u64 {
        self.whole.load(Relaxed)
    }

    /// Runs of each order that are not part of a larger one, up to `max_k`.
    pub(crate) fn histogram(&self, max_k: u32) -> [u32; REGION_ORDERS] {
        let mut h = [0; REGION_ORDERS];
        let word = self.whole();
        for k in 0..=max_k {
            h[k as usize] = maximal(word, k, max_k).count_ones();
        }
        h
    }
}

impl Area<'_> {
    fn region_of(&self, index: u32) -> (u32, u32) {
        let pb = self.map.base_block() + index;
        ((pb >> self.region_shift) - self.region_base, pb & ((1 << self.region_shift) - 1))
    }

    fn region(&self, r: u32) -> &Region {
        &self.regions[r as usize]
    }

    fn max_k(&self) -> u32 {
        self.lists.max_order.saturating_sub(PAGEBLOCK_ORDER)
    }

    fn rebin_region(&mut self, r: u32) {
        let word = self.region(r).whole();
        let max_k = self.max_k();
        let mut want = 0u32;
        if word != 0 {
            let mut at = word;
            while want < max_k {
                at = pairs(at, want);
                if at == 0 {
                    break;
                }
                want += 1;
            }
            want += 1;
        }
        let have = u32::from(self.region(r).bin.load(Relaxed));
        if have == want {
            return;
        }
        if have != 0 {
            let bin = have as usize - 1;
            let (next, prev) =
                (self.region(r).next.load(Relaxed), self.region(r).prev.load(Relaxed));
            if next != NIL {
                self.region(next).prev.store(prev, Relaxed);
            }
            if prev != NIL {
                self.region(prev).next.store(next, Relaxed);
            } else {
                self.lists.region_heads[bin] = next;
                if next == NIL {
                    self.lists.region_mask &= !(1 << bin);
                }
            }
        }
        self.region(r).bin.store(want as u8, Relaxed);
        if want != 0 {
            let bin = want as usize - 1;
            let head = self.lists.region_heads[bin];
            self.region(r).next.store(head, Relaxed);
            self.region(r).prev.store(NIL, Relaxed);
            if head != NIL {
                self.region(head).prev.store(r, Relaxed);
            }
            self.lists.region_heads[bin] = r;
            self.lists.region_mask |= 1 << bin;
        }
    }

    pub(super) fn is_whole(&self, index: u32) -> bool {
        let (r, bit) = self.region_of(index);
        self.region(r).whole() >> bit & 1 == 1
    }

    /// The order of the maximal run around a whole pageblock.
    pub(super) fn whole_order(&self, index: u32) -> u32 {
        let (r, bit) = self.region_of(index);
        let word = self.region(r).whole();
        let mut k = 0;
        while k < self.max_k() && starts(word, k + 1) >> (bit & !((2 << k) - 1)) & 1 == 1 {
            k += 1;
        }
        PAGEBLOCK_ORDER + k
    }

    /// Sets the bits of the run of 2^`k` at `bit`.
    fn set_run(&mut self, r: u32, bit: u32, k: u32) {
        let region = self.region(r);
        region.whole.store(region.whole() | low(k) << bit, Relaxed);
        self.rebin_region(r);
    }

    /// Clears the bits of the run of 2^`k` at `bit`.
    fn clear_run(&mut self, r: u32, bit: u32, k: u32) {
        let region = self.region(r);
        region.whole.store(region.whole() & !(low(k) << bit), Relaxed);
        self.rebin_region(r);
    }

    /// Marks a broken pageblock, now all free and zeroed, as whole.
    pub(super) fn set_whole(&mut self, index: u32) {
        let (r, bit) = self.region_of(index);
        self.set_run(r, bit, 0);
    }

    /// Finds the best run of 2^`k` pageblocks: the smallest maximal one in the region whose largest
    /// is smallest.
    fn find_run(&self, k: u32) -> Option<(u32, u32)> {
        let mask = self.lists.region_mask >> k;
        if mask == 0 {
            return None;
        }
        let bin = k + mask.trailing_zeros();
        let r = self.lists.region_heads[bin as usize];
        let word = self.region(r).whole();
        let max_k = self.max_k();
        for from in k..=bin {
            let at = maximal(word, from, max_k);
            if at != 0 {
                return Some((r, at.trailing_zeros()));
            }
        }
        None
    }

    fn run_index(&self, r: u32, bit: u32) -> u32 {
        ((self.region_base + r) << self.region_shift) + bit - self.map.base_block()
    }

    /// Takes a block of `order` (a pageblock's or larger); its pageblocks become `mt`.
    pub(crate) fn take_whole(&mut self, order: u32, mt: MigrateType) -> Option<u32> {
        let k = order - PAGEBLOCK_ORDER;
        let (r, bit) = self.find_run(k)?;
        self.clear_run(r, bit, k);
        self.lists.free.all -= 1 << order;
        let index = self.run_index(r, bit);
        self.own_run(index, k, mt);
        Some(self.first_pfn(index))
    }

    fn own_run(&mut self, index: u32, k: u32, mt: MigrateType) {
        for i in index..index + (1 << k) {
            if self.migratetype(i) != mt {
                self.set_owner(i, mt);
            }
        }
    }

    /// Takes exactly the block of `order` at `pfn`, if all of it is whole.
    pub(super) fn claim_whole_at(&mut self, pfn: u32, order: u32) -> bool {
        let k = order - PAGEBLOCK_ORDER;
        let index = self.index(pfn);
        let (r, bit) = self.region_of(index);
        let mask = low(k) << bit;
        if self.region(r).whole() & mask != mask {
            return false;
        }
        self.clear_run(r, bit, k);
        self.lists.free.all -= 1 << order;
        true
    }

    /// Turns a whole pageblock into a broken one, all of it one free block.
    pub(super) fn break_whole(&mut self, index: u32) {
        let (r, bit) = self.region_of(index);
        self.clear_run(r, bit, 0);
        self.bits(index).set(0, PAGEBLOCK_ORDER);
        let block = self.block(index);
        self.update(index, block, block.word().merged(PAGEBLOCK_ORDER, PAGEBLOCK_ORDER));
    }

    /// Claims a whole pageblock for `mt` and breaks it.
    pub(super) fn claim_whole(&mut self, mt: MigrateType) -> Option<u32> {
        let (r, bit) = self.find_run(0)?;
        let index = self.run_index(r, bit);
        self.own_run(index, 0, mt);
        self.break_whole(index);
        Some(index)
    }

    /// Gives a block of a pageblock's order or larger back.
    pub(super) fn give_whole(&mut self, pfn: u32, order: u32) -> Result<(), AlreadyFree> {
        let k = order - PAGEBLOCK_ORDER;
        let index = self.index(pfn);
        let run = index..index + (1 << k);
        let (r, bit) = self.region_of(index);
        let whole = self.region(r).whole() & low(k) << bit != 0;
        if whole || run.clone().any(|i| !self.block(i).word().is_empty()) {
            return Err(AlreadyFree);
        }
        self.lists.free.all += 1 << order;
        if run.clone().all(|i| super::mixes(self.migratetype(i))) {
            self.set_run(r, bit, k);
            return Ok(());
        }
        for i in run {
            self.set_whole(i);
            let mt = self.migratetype(i);
            if !super::mixes(mt) {
                self.break_whole(i);
                if mt == MigrateType::HighAtomic {
                    self.lists.free.highatomic += 1 << PAGEBLOCK_ORDER;
                }
            }
        }
        Ok(())
    }

    /// Adds wholly free pageblocks of a region at bring-up.
    pub(crate) fn seed(&mut self, r: u32, word: u64) {
        let region = self.region(r);
        region.whole.store(region.whole() | word, Relaxed);
        self.lists.free.all += word.count_ones() << PAGEBLOCK_ORDER;
        self.rebin_region(r);
    }
}
