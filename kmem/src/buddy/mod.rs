//! The buddy: free blocks of 2^order frames, grouped by mobility.
//!
//! # Concepts
//! 1. *Pageblocks* (512 frames) are the unit of mobility: frames of one mobility are taken from
//!    pageblocks of that mobility while any will do, so that what cannot move stays together and whole
//!    pageblocks come free again \[P2\].
//! 2. A pageblock is either *whole* (all free, of no one's mobility in particular), or *broken*: some
//!    of it is free, as maximal blocks of orders 0 to 8.
//! 3. Broken pageblocks are *binned* by mobility and by the order of their largest free block. A
//!    request looks in the smallest bin that can serve it, so the fullest, most fragmented pageblocks
//!    are used up first and the emptiest get the time to become whole.
//! 4. Whole pageblocks are one bit each in their *region* (64 pageblocks). Orders 9 and above are
//!    runs of such bits. Regions are binned by the largest order they hold, and used in the same way.
//! 5. When no pageblock of the right mobility has room, a whole one is claimed for it; when there is
//!    none, a block is stolen from another mobility's pageblock, and the pageblock with it if at
//!    least half of it is free.
//!
//! # Implementation
//! ```text
//!   Area (lock)                    pageblock descriptor        free bits (64 bytes)
//!   +---------------------+        +--------------------+      +------------------------+
//!   | bins[mobility][0..9]|------->| counts per order   |      | 512 bits, set = free   |
//!   | mask of used bins   |        | next/prev in bin   |      +------------------------+
//!   | region bins, mask   |---+    +--------------------+
//!   | nr_free[0..=15]     |   |    region
//!   +---------------------+   +--->+--------------------+
//!                                  | 64 bits, set =     |
//!                                  | whole pageblock    |
//!                                  +--------------------+
//! ```
//! Nothing is threaded through the frames or their `Page`s: a free touches the block's bits and its
//! descriptor, a merge is a test of the neighbouring bits, and every operation is bounded by constants
//! \[P8\]: at most 9 merge steps, 8 words searched, one scan of a 10-bit mask per mobility.
//! A zone's regions are dealt out over several areas, each with its own lock, so that CPUs working on
//! their own frames do not meet (`zone::Zone::areas`).
//!
//! `nr_free` counts maximal blocks by order, as `/proc/buddyinfo` shows them.
//!
//! Invariants, checked by `PageAllocator::audit`:
//! - a whole pageblock's free bits and descriptor are zero; its region bit is set;
//! - a broken pageblock's descriptor counts its maximal blocks exactly; it is in the bin of its largest;
//! - pageblocks of the mobilities that do not mix (high-atomic, CMA, isolated) never become whole: they
//!   stay in bin 9, so that nobody claims them.
//!
//! # Locking
//! Everything here runs under the area's lock, with interrupts masked. It is a leaf lock.
//!
//! See [`/proc/buddyinfo`](https://docs.kernel.org/filesystems/proc.html).

mod bits;
mod region;
mod steal;

pub(crate) use bits::FreeBits;
pub(crate) use region::{REGION_SHIFT, Region};

use crate::{
    memmap::MemMap,
    types::{MIGRATE_TYPES, MigrateType, PAGEBLOCK_FRAMES, PAGEBLOCK_ORDER},
};
use core::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, Ordering::Relaxed};
use region::REGION_ORDERS;

const NIL: u32 = u32::MAX;
const BLOCK_ORDERS: usize = PAGEBLOCK_ORDER as usize + 1;

/// Number of orders that `nr_free` counts.
pub(crate) const NR_ORDERS: usize = 16;

/// Descriptor of one pageblock. Meaningful while the pageblock is broken; zero otherwise.
#[repr(C, align(64))]
pub(crate) struct Pageblock {
    /// Maximal free blocks of each order.
    counts: [AtomicU16; BLOCK_ORDERS],
    /// Orders with a count above zero.
    mask: AtomicU16,
    /// Free frames.
    free: AtomicU16,
    /// Bin the pageblock is linked into, plus one; 0 for none.
    bin: AtomicU8,
    next: AtomicU32,
    prev: AtomicU32,
}

impl Pageblock {
    #[inline(always)]
    fn add(&self, order: u32) {
        let i = order as usize;
        self.counts[i].store(self.counts[i].load(Relaxed) + 1, Relaxed);
        self.mask.store(self.mask.load(Relaxed) | 1 << order, Relaxed);
    }

    #[inline(always)]
    fn sub(&self, order: u32) {
        let i = order as usize;
        let n = self.counts[i].load(Relaxed) - 1;
        self.counts[i].store(n, Relaxed);
        if n == 0 {
            self.mask.store(self.mask.load(Relaxed) & !(1 << order), Relaxed);
        }
    }

    #[inline(always)]
    fn mask(&self) -> u32 {
        u32::from(self.mask.load(Relaxed))
    }

    /// Free frames while broken.
    pub(crate) fn free(&self) -> u32 {
        u32::from(self.free.load(Relaxed))
    }

    fn add_free(&self, n: u32) {
        self.free.store(self.free.load(Relaxed).wrapping_add(n as u16), Relaxed);
    }

    /// Maximal free blocks of `order` while broken.
    pub(crate) fn count(&self, order: u32) -> u32 {
        u32::from(self.counts[order as usize].load(Relaxed))
    }

    pub(crate) fn bin(&self) -> Option<u32> {
        u32::from(self.bin.load(Relaxed)).checked_sub(1)
    }

    fn reset(&self) {
        self.counts.iter().for_each(|c| c.store(0, Relaxed));
        self.mask.store(0, Relaxed);
        self.free.store(0, Relaxed);
    }
}

/// What went wrong in giving a block back: some of it is free already.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct AlreadyFree;

/// The lists of one area.
pub(crate) struct AreaLists {
    heads: [[u32; BLOCK_ORDERS]; MIGRATE_TYPES],
    masks: [u16; MIGRATE_TYPES],
    region_heads: [u32; REGION_ORDERS],
    region_mask: u32,
    nr_free: [u32; NR_ORDERS],
    /// Free frames in pageblocks set aside for high-order atomic requests.
    free_highatomic: u32,
    max_order: u32,
}

/// One area at work: its lists, held under its lock, and the tables they index.
pub(crate) struct Area<'a> {
    pub(crate) lists: &'a mut AreaLists,
    pub(crate) map: &'a MemMap,
    /// The zone's regions, from `region_base` on.
    pub(crate) regions: &'a [Region],
    pub(crate) region_base: u32,
    pub(crate) slot: usize,
}

impl AreaLists {
    pub(crate) const fn new(max_order: u32) -> AreaLists {
        AreaLists {
            heads: [[NIL; BLOCK_ORDERS]; MIGRATE_TYPES],
            masks: [0; MIGRATE_TYPES],
            region_heads: [NIL; REGION_ORDERS],
            region_mask: 0,
            nr_free: [0; NR_ORDERS],
            free_highatomic: 0,
            max_order,
        }
    }

    /// Maximal free blocks by order.
    pub(crate) fn nr_free(&self) -> &[u32; NR_ORDERS] {
        &self.nr_free
    }

    pub(crate) fn free_highatomic(&self) -> u32 {
        self.free_highatomic
    }

    /// Whether a block of `order` can be had by a request of mobility `mt` without stealing from
    /// pageblocks that do not mix.
    pub(crate) fn has_block(&self, order: u32, mt: MigrateType, highatomic: bool) -> bool {
        if order < PAGEBLOCK_ORDER {
            let mixing = (self.masks[0] | self.masks[1] | self.masks[2]) >> order != 0;
            let own = self.masks[mt as usize] >> order != 0;
            let reserve = highatomic && self.masks[MigrateType::HighAtomic as usize] >> order != 0;
            mixing || own || reserve || self.region_mask != 0
        } else {
            self.region_mask >> (order - PAGEBLOCK_ORDER) != 0
        }
    }
}

/// Whether pageblocks of this mobility may become whole and be claimed by others.
const fn mixes(mt: MigrateType) -> bool {
    matches!(mt, MigrateType::Unmovable | MigrateType::Movable | MigrateType::Reclaimable)
}

impl Area<'_> {
    #[inline(always)]
    fn block(&self, index: u32) -> &Pageblock {
        &self.map.blocks[index as usize]
    }

    #[inline(always)]
    fn bits(&self, index: u32) -> &FreeBits {
        &self.map.bits[index as usize]
    }

    /// First frame of the pageblock with the given table index.
    #[inline(always)]
    fn first_pfn(&self, index: u32) -> u32 {
        (self.map.base_block() + index) << PAGEBLOCK_ORDER
    }

    /// Table index of a frame's pageblock. Callers pass frames of the zone only.
    #[inline(always)]
    fn index(&self, pfn: u32) -> u32 {
        (pfn >> PAGEBLOCK_ORDER) - self.map.base_block()
    }

    #[inline(always)]
    fn migratetype(&self, index: u32) -> MigrateType {
        self.map.flags_of(self.first_pfn(index)).migratetype()
    }

    fn link(&mut self, index: u32, mt: MigrateType, bin: u32) {
        let head = self.lists.heads[mt as usize][bin as usize];
        let b = self.block(index);
        b.next.store(head, Relaxed);
        b.prev.store(NIL, Relaxed);
        b.bin.store(bin as u8 + 1, Relaxed);
        if head != NIL {
            self.block(head).prev.store(index, Relaxed);
        }
        self.lists.heads[mt as usize][bin as usize] = index;
        self.lists.masks[mt as usize] |= 1 << bin;
    }

    fn unlink(&mut self, index: u32, mt: MigrateType) {
        let b = self.block(index);
        let Some(bin) = b.bin() else { return };
        let (next, prev) = (b.next.load(Relaxed), b.prev.load(Relaxed));
        b.bin.store(0, Relaxed);
        if next != NIL {
            self.block(next).prev.store(prev, Relaxed);
        }
        if prev != NIL {
            self.block(prev).next.store(next, Relaxed);
        } else {
            self.lists.heads[mt as usize][bin as usize] = next;
            if next == NIL {
                self.lists.masks[mt as usize] &= !(1 << bin);
            }
        }
    }

    /// Moves a pageblock to the bin of its largest free block, if it is in another.
    #[inline(always)]
    fn rebin(&mut self, index: u32, mt: MigrateType) {
        let b = self.block(index);
        let mask = b.mask();
        let want = 32 - mask.leading_zeros();
        if want != u32::from(b.bin.load(Relaxed)) {
            self.unlink(index, mt);
            if let Some(bin) = want.checked_sub(1) {
                self.link(index, mt, bin);
            }
        }
    }

    fn note_taken(&mut self, index: u32, mt: MigrateType, frames: u32) {
        self.block(index).add_free(frames.wrapping_neg());
        if mt == MigrateType::HighAtomic {
            self.lists.free_highatomic -= frames;
        }
    }

    /// Takes a block of `order` from a broken pageblock that holds a maximal block of order `from`,
    /// splitting that. Returns the block's first frame.
    #[inline]
    fn carve(&mut self, index: u32, mt: MigrateType, from: u32, order: u32) -> Option<u32> {
        let pos = self.bits(index).find(from)?;
        self.carve_at(index, mt, from, order, pos);
        Some(self.first_pfn(index) + pos)
    }

    /// Takes the block of `order` at `pos` out of the maximal block of order `from` around it.
    #[inline]
    fn carve_at(&mut self, index: u32, mt: MigrateType, from: u32, order: u32, pos: u32) {
        self.bits(index).clear(pos, order);
        let b = self.block(index);
        b.sub(from);
        self.lists.nr_free[from as usize] -= 1;
        // What is left of the maximal block is one buddy of every order between.
        for k in order..from {
            self.block(index).add(k);
            self.lists.nr_free[k as usize] += 1;
        }
        self.note_taken(index, mt, 1 << order);
        self.rebin(index, mt);
    }

    /// The smallest bin of mobility `mt` with a block of `order`, and its first pageblock.
    #[inline(always)]
    fn smallest(&self, order: u32, mt: MigrateType) -> Option<u32> {
        let mask = u32::from(self.lists.masks[mt as usize]) >> order;
        if mask == 0 {
            return None;
        }
        let bin = order + mask.trailing_zeros();
        Some(self.lists.heads[mt as usize][bin as usize])
    }

    /// The order of the smallest maximal block in a pageblock that holds one of `order`.
    #[inline(always)]
    fn smallest_in(&self, index: u32, order: u32) -> u32 {
        let mask = self.block(index).mask() >> order;
        order + mask.trailing_zeros()
    }

    /// Takes one block of `order` (below a pageblock's) of mobility `mt`: from a pageblock of that
    /// mobility, or by claiming a whole one for it.
    pub(crate) fn take(&mut self, order: u32, mt: MigrateType) -> Option<u32> {
        let index = match self.smallest(order, mt) {
            Some(index) => index,
            None if mixes(mt) => self.claim_whole(mt)?,
            None => return None,
        };
        let from = self.smallest_in(index, order);
        self.carve(index, mt, from, order)
    }

    /// Takes up to `want` blocks of `order` (below a pageblock's) of mobility `mt` and hands each one's first frame
    /// to `out`, lowest of a run first. Returns how many. Runs are taken whole: one search for as many blocks as the
    /// free run holds.
    pub(crate) fn take_many(
        &mut self,
        order: u32,
        mt: MigrateType,
        want: u32,
        mut out: impl FnMut(u32),
    ) -> u32 {
        let mut got = 0;
        while got < want {
            let index = match self.smallest(order, mt) {
                Some(index) => index,
                None if mixes(mt) => match self.claim_whole(mt) {
                    Some(index) => index,
                    None => break,
                },
                None => break,
            };
            let from = self.smallest_in(index, order);
            let fits = order + (want - got).ilog2();
            let take = from.min(fits);
            let Some(pfn) = self.carve(index, mt, from, take) else { break };
            let n = 1 << (take - order);
            for i in 0..n {
                out(pfn + (i << order));
            }
            got += n;
        }
        got
    }

    /// Gives a block of `order` back.
    ///
    /// # Errors
    /// [`AlreadyFree`], and nothing changes, if any frame of it is free.
    pub(crate) fn give(&mut self, pfn: u32, order: u32) -> Result<(), AlreadyFree> {
        let index = self.index(pfn);
        if order >= PAGEBLOCK_ORDER {
            return self.give_whole(pfn, order);
        }
        let pos = pfn & (PAGEBLOCK_FRAMES - 1);
        // A pageblock with free bits is broken; only one without any can be whole.
        let whole = self.block(index).free() == 0 && self.is_whole(index);
        if whole || self.bits(index).any(pos, order) {
            return Err(AlreadyFree);
        }
        let mt = self.migratetype(index);
        let k = self.bits(index).set_and_climb(pos, order);
        for merged in order..k {
            // The buddy was free and ours was not: it was a maximal block of its own.
            self.block(index).sub(merged);
            self.lists.nr_free[merged as usize] -= 1;
        }
        if mt == MigrateType::HighAtomic {
            self.lists.free_highatomic += 1 << order;
        }
        if k == PAGEBLOCK_ORDER && mixes(mt) {
            self.unlink(index, mt);
            self.block(index).reset();
            self.bits(index).clear(0, PAGEBLOCK_ORDER);
            self.set_whole(index);
            return Ok(());
        }
        let b = self.block(index);
        b.add(k);
        b.add_free(1 << order);
        self.lists.nr_free[k as usize] += 1;
        self.rebin(index, mt);
        Ok(())
    }

    /// Whether any frame of the aligned block is free.
    pub(crate) fn any_free(&self, pfn: u32, order: u32) -> bool {
        if order >= PAGEBLOCK_ORDER {
            let first = self.index(pfn);
            return (first..first + (1 << (order - PAGEBLOCK_ORDER)))
                .any(|i| self.is_whole(i) || self.bits(i).any(0, PAGEBLOCK_ORDER));
        }
        let index = self.index(pfn);
        self.is_whole(index) || self.bits(index).any(pfn & (PAGEBLOCK_FRAMES - 1), order)
    }

    /// The order of the maximal free block that the frame is in; `None` when it is not free.
    pub(crate) fn free_order(&self, pfn: u32) -> Option<u32> {
        let index = self.index(pfn);
        if self.is_whole(index) {
            return Some(self.whole_order(index));
        }
        let pos = pfn & (PAGEBLOCK_FRAMES - 1);
        let bits = self.bits(index);
        bits.all(pos, 0).then(|| bits.enclosing(pos, 0))
    }

    /// Takes exactly the block of `order` at `pfn`, if all of it is free.
    pub(crate) fn claim_at(&mut self, pfn: u32, order: u32) -> bool {
        let index = self.index(pfn);
        // A pageblock that does not mix is never whole, even when all of it is free.
        if order > PAGEBLOCK_ORDER || (order == PAGEBLOCK_ORDER && self.is_whole(index)) {
            return self.claim_whole_at(pfn, order);
        }
        let pos = pfn & (PAGEBLOCK_FRAMES - 1);
        let mt = self.migratetype(index);
        if self.is_whole(index) {
            self.break_whole(index, mt);
        }
        if !self.bits(index).all(pos, order) {
            return false;
        }
        let from = self.bits(index).enclosing(pos, order);
        self.carve_at(index, mt, from, order, pos);
        true
    }

    /// Changes a pageblock's mobility; its free blocks go with it.
    pub(crate) fn set_migratetype(&mut self, pfn: u32, to: MigrateType) {
        let index = self.index(pfn);
        let from = self.migratetype(index);
        if from == to {
            return;
        }
        if self.is_whole(index) {
            if mixes(to) {
                self.map
                    .set_flags(self.first_pfn(index), crate::memmap::PbFlags::new(self.slot, to));
                return;
            }
            self.break_whole(index, from);
        }
        self.unlink(index, from);
        self.map.set_flags(self.first_pfn(index), crate::memmap::PbFlags::new(self.slot, to));
        let free = self.block(index).free();
        if from == MigrateType::HighAtomic {
            self.lists.free_highatomic -= free;
        }
        if to == MigrateType::HighAtomic {
            self.lists.free_highatomic += free;
        }
        if mixes(to) && free == PAGEBLOCK_FRAMES {
            self.lists.nr_free[PAGEBLOCK_ORDER as usize] -= 1;
            self.block(index).reset();
            self.bits(index).clear(0, PAGEBLOCK_ORDER);
            self.set_whole(index);
        } else {
            self.rebin(index, to);
        }
    }

    /// A pageblock of mobility `mt` with a free block of at least `order`.
    pub(crate) fn pageblock_with(&self, order: u32, mt: MigrateType) -> Option<u32> {
        self.smallest(order.min(PAGEBLOCK_ORDER), mt).map(|i| self.first_pfn(i))
    }
}
