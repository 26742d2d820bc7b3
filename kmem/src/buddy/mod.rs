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
//! 4. Whole pageblocks are one bit each in their *region* (64 pageblocks; fewer in a small zone). Orders 9 and above are
//!    runs of such bits. Regions are binned by the largest order they hold, and used in the same way.
//! 5. When no pageblock of the right mobility has room, a whole one is claimed for it; when there is
//!    none, a block is stolen from another mobility's pageblock, and the pageblock with it if at
//!    least half of it is free.
//!
//! # Implementation
//! ```text
//!   Area (lock)                    pageblock descriptor        free bits (64 bytes)
//!   +---------------------+        +--------------------+      +------------------------+
//!   | bins[mobility][0..9]|------->| counts, bin, flags |      | 512 bits, set = free   |
//!   | mask of used bins   |        | next/prev in bin   |      +------------------------+
//!   | region bins, mask   |---+    +--------------------+
//!   +---------------------+   |    region
//!                             +--->+--------------------+
//!                                  | 64 bits, set =     |
//!                                  | whole pageblock    |
//!                                  +--------------------+
//! ```
//! Nothing is threaded through the frames or their `Page`s: a free touches the block's bits and its
//! descriptor (see `pageblock`), a merge is a test of the neighbouring bits, and every operation is
//! bounded by constants \[P8\]: at most 3 steps of merging beyond a word, 8 words searched, one scan of a 10-bit mask per
//! mobility.
//! A zone's regions are dealt out over several areas, each with its own lock, so that CPUs working on
//! their own frames do not meet (`zone::Zone::areas`). While the zone is short all take from the first area, so that
//! what is free elsewhere stays whole.
//!
//! How many blocks of which order there are is nobody's to keep: `/proc/buddyinfo` sums the descriptors, a region at a
//! time.
//!
//! Invariants, checked by `PageAllocator::audit`:
//! - a whole pageblock's free bits and counts are zero and it is in no bin; its region bit is set;
//! - a broken pageblock's descriptor counts its maximal blocks exactly; it is in the bin of its largest;
//! - pageblocks of the mobilities that do not mix (high-atomic, CMA, isolated) never become whole: they
//!   stay in bin 9, so that nobody claims them.
//!
//! # Locking
//! Everything here runs under the area's lock, with interrupts masked. It is a leaf lock.
//!
//! See [`/proc/buddyinfo`](https://docs.kernel.org/filesystems/proc.html).

mod region;
mod steal;

pub(crate) use region::{MAX_REGION_SHIFT, Region};

use crate::{
    memmap::MemMap,
    pageblock::{BLOCK_ORDERS, FreeBits, Links, NIL, Pageblock, PbFlags, Word},
    types::{MIGRATE_TYPES, MigrateType, PAGEBLOCK_FRAMES, PAGEBLOCK_ORDER},
};
use core::sync::atomic::Ordering::Relaxed;
use region::REGION_ORDERS;

/// What went wrong in giving a block back: some of it is free already.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct AlreadyFree;

/// Frames on an area's lists.
#[derive(Clone, Copy)]
pub(crate) struct FreeFrames {
    pub(crate) all: u32,
    /// In pageblocks set aside for high-order atomic requests.
    pub(crate) highatomic: u32,
}

/// The lists of one area.
pub(crate) struct AreaLists {
    heads: [[u32; BLOCK_ORDERS]; MIGRATE_TYPES],
    masks: [u16; MIGRATE_TYPES],
    region_heads: [u32; REGION_ORDERS],
    region_mask: u32,
    free: FreeFrames,
    max_order: u32,
}

/// One area at work: its lists, held under its lock, and the tables they index.
pub(crate) struct Area<'a> {
    pub(crate) lists: &'a mut AreaLists,
    pub(crate) map: &'a MemMap,
    /// The zone's regions, from `region_base` on.
    pub(crate) regions: &'a [Region],
    pub(crate) region_base: u32,
    /// Pageblocks of a region as a power of two.
    pub(crate) region_shift: u32,
    pub(crate) slot: usize,
}

impl AreaLists {
    pub(crate) const fn new(max_order: u32) -> AreaLists {
        AreaLists {
            heads: [[NIL; BLOCK_ORDERS]; MIGRATE_TYPES],
            masks: [0; MIGRATE_TYPES],
            region_heads: [NIL; REGION_ORDERS],
            region_mask: 0,
            free: FreeFrames { all: 0, highatomic: 0 },
            max_order,
        }
    }

    #[inline(always)]
    pub(crate) fn free(&self) -> FreeFrames {
        self.free
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

impl<'a> Area<'a> {
    #[inline(always)]
    fn block(&self, index: u32) -> &'a Pageblock {
        &self.map.blocks[index as usize]
    }

    fn links(&self, index: u32) -> &'a Links {
        &self.map.links[index as usize]
    }

    #[inline(always)]
    fn bits(&self, index: u32) -> &'a FreeBits {
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
        self.map.index(pfn)
    }

    #[inline(always)]
    fn migratetype(&self, index: u32) -> MigrateType {
        self.block(index).flags().migratetype()
    }

    /// Gives a pageblock to a mobility; its free blocks stay where they are.
    fn set_owner(&self, index: u32, mt: MigrateType) {
        self.block(index).set_flags(PbFlags::new(self.slot, mt));
    }

    fn link(&mut self, index: u32, mt: usize, bin: u32) {
        let order = bin as usize - 1;
        let head = core::mem::replace(&mut self.lists.heads[mt][order], index);
        let at = self.links(index);
        at.next.store(head, Relaxed);
        at.prev.store(NIL, Relaxed);
        if head == NIL {
            self.lists.masks[mt] |= 1 << order;
        } else {
            self.links(head).prev.store(index, Relaxed);
        }
    }

    fn unlink(&mut self, index: u32, mt: usize, bin: u32) {
        let order = bin as usize - 1;
        let at = self.links(index);
        let (next, prev) = (at.next.load(Relaxed), at.prev.load(Relaxed));
        if next != NIL {
            self.links(next).prev.store(prev, Relaxed);
        }
        if prev != NIL {
            self.links(prev).next.store(next, Relaxed);
        } else {
            self.lists.heads[mt][order] = next;
            if next == NIL {
                self.lists.masks[mt] &= !(1 << order);
            }
        }
    }

    /// Writes a pageblock's word back, and moves the pageblock to the bin of its largest free block if
    /// it is in another.
    #[inline(always)]
    fn update(&mut self, index: u32, block: &Pageblock, word: Word) {
        self.update_to(index, block, word, word.wanted_bin());
    }

    /// As [`update`](Self::update), by who knows the bin.
    #[inline(always)]
    fn update_to(&mut self, index: u32, block: &Pageblock, word: Word, want: u32) {
        debug_assert_eq!(want, word.wanted_bin());
        let have = word.bin();
        if have == want {
            block.store(word);
        } else {
            self.rebin(index, word, have, want);
        }
    }

    #[inline(never)]
    fn rebin(&mut self, index: u32, word: Word, have: u32, want: u32) {
        let mt = word.flags().migratetype() as usize;
        self.block(index).store(word.with_bin(want));
        if have != 0 {
            self.unlink(index, mt, have);
        }
        if want != 0 {
            self.link(index, mt, want);
        }
    }

    /// Takes a block of `order` from a broken pageblock that has a free one of `order` or more: from the
    /// smallest that will do, splitting that. Returns the block's first frame and the order it was split
    /// out of.
    #[inline(always)]
    fn carve(&mut self, index: u32, order: u32) -> Option<(u32, u32)> {
        let (block, bits) = self.map.pageblock(index);
        let from = block.word().smallest(order)?;
        let pos = bits.find(from)?;
        self.carve_at(index, block, bits, from, order, pos);
        Some((self.first_pfn(index) + pos, from))
    }

    /// Takes the block of `order` at `pos` out of the maximal block of order `from` around it, in a
    /// pageblock with the given descriptor and bits.
    #[inline(always)]
    fn carve_at(
        &mut self,
        index: u32,
        block: &Pageblock,
        bits: &FreeBits,
        from: u32,
        order: u32,
        pos: u32,
    ) {
        let word = block.word();
        bits.clear(pos, order);
        self.lists.free.all -= 1 << order;
        if word.flags().mt_index() == MigrateType::HighAtomic as usize {
            self.lists.free.highatomic -= 1 << order;
        }
        self.update(index, block, word.split(from, order));
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

    /// Takes one block of `order` (below a pageblock's) of mobility `mt`: from a pageblock of that
    /// mobility, or by claiming a whole one for it.
    pub(crate) fn take(&mut self, order: u32, mt: MigrateType) -> Option<u32> {
        let index = match self.smallest(order, mt) {
            Some(index) => index,
            None if mixes(mt) => self.claim_whole(mt)?,
            None => return None,
        };
        self.carve(index, order).map(|(pfn, _)| pfn)
    }

    /// Takes up to `want` blocks of `order` (below a pageblock's) of mobility `mt` and hands them to `out` in runs: the
    /// first frame, and how many. Returns how many in all. Runs are taken whole: one search for as many blocks as the
    /// free run holds. Beyond `need` blocks it takes only those that lie there by themselves, and a whole pageblock is
    /// claimed for the first only.
    pub(crate) fn take_many(
        &mut self,
        order: u32,
        mt: MigrateType,
        need: u32,
        want: u32,
        mut out: impl FnMut(u32, u32),
    ) -> u32 {
        let mut got = 0;
        while got < want {
            let index = match self.smallest(order, mt) {
                Some(index) => index,
                None if mixes(mt) && got == 0 => match self.claim_whole(mt) {
                    Some(index) => index,
                    None => break,
                },
                None => break,
            };
            let (block, bits) = self.map.pageblock(index);
            let Some(from) = block.word().smallest(order) else { break };
            let left = if from == order { want } else { need }.saturating_sub(got);
            if left == 0 {
                break;
            }
            let take = from.min(order + left.ilog2());
            let Some(pos) = bits.find(from) else { break };
            self.carve_at(index, block, bits, from, take, pos);
            let n = 1 << (take - order);
            out(self.first_pfn(index) + pos, n);
            got += n;
        }
        got
    }

    /// Gives a block of `order` back.
    ///
    /// # Errors
    /// [`AlreadyFree`], and nothing changes, if any frame of it is free.
    #[inline(always)]
    pub(crate) fn give(&mut self, pfn: u32, order: u32) -> Result<(), AlreadyFree> {
        match order {
            // All that depends on the order is a constant then.
            0 => self.give_broken(pfn, 0),
            1..PAGEBLOCK_ORDER => self.give_part(pfn, order),
            _ => self.give_whole(pfn, order),
        }
    }

    #[inline(never)]
    fn give_part(&mut self, pfn: u32, order: u32) -> Result<(), AlreadyFree> {
        self.give_broken(pfn, order)
    }

    /// Gives single frames back; `refused` has those that are free already.
    #[inline(always)]
    pub(crate) fn give_frames(
        &mut self,
        pfns: impl Iterator<Item = u32>,
        mut refused: impl FnMut(u32),
    ) {
        // What the loop uses of it stays in registers.
        let map = *self.map;
        let mut frames = 0;
        for pfn in pfns {
            match self.give_uncounted(&map, pfn, 0) {
                Ok(()) => frames += 1,
                Err(AlreadyFree) => refused(pfn),
            }
        }
        self.lists.free.all += frames;
    }

    /// Gives back a block of less than a pageblock.
    #[inline(always)]
    fn give_broken(&mut self, pfn: u32, order: u32) -> Result<(), AlreadyFree> {
        self.give_uncounted(self.map, pfn, order)?;
        self.lists.free.all += 1 << order;
        Ok(())
    }

    /// As [`give_broken`](Self::give_broken), in the map given; the frames are still to be counted.
    #[inline(always)]
    fn give_uncounted(&mut self, map: &MemMap, pfn: u32, order: u32) -> Result<(), AlreadyFree> {
        let index = map.index(pfn);
        let (block, bits) = map.pageblock(index);
        let word = block.word();
        // A pageblock with free bits is broken; only one without any can be whole.
        if word.is_empty() && self.is_whole(index) {
            return Err(AlreadyFree);
        }
        let pos = pfn & (PAGEBLOCK_FRAMES - 1);
        let k = bits.give(pos, order).ok_or(AlreadyFree)?;
        if word.flags().mt_index() == MigrateType::HighAtomic as usize {
            self.lists.free.highatomic += 1 << order;
        }
        if k == PAGEBLOCK_ORDER && mixes(word.flags().migratetype()) {
            self.make_whole(index);
            return Ok(());
        }
        let word = word.merged(order, k);
        // What was the largest block still is, if it is larger than this one: that took up smaller ones only.
        self.update_to(index, block, word, word.bin().max(k + 1));
        Ok(())
    }

    /// Turns a broken pageblock, all of it free, into a whole one.
    fn make_whole(&mut self, index: u32) {
        let word = self.block(index).word();
        if word.bin() != 0 {
            self.unlink(index, word.flags().migratetype() as usize, word.bin());
        }
        self.block(index).store(word.emptied());
        self.bits(index).clear(0, PAGEBLOCK_ORDER);
        self.set_whole(index);
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
        if self.is_whole(index) {
            self.break_whole(index);
        }
        let (block, bits) = self.map.pageblock(index);
        if !bits.all(pos, order) {
            return false;
        }
        self.carve_at(index, block, bits, bits.enclosing(pos, order), order, pos);
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
                self.set_owner(index, to);
                return;
            }
            self.break_whole(index);
        }
        let word = self.block(index).word();
        let free = word.frames();
        if from == MigrateType::HighAtomic {
            self.lists.free.highatomic -= free;
        }
        if to == MigrateType::HighAtomic {
            self.lists.free.highatomic += free;
        }
        if word.bin() != 0 {
            self.unlink(index, from as usize, word.bin());
        }
        let word = word.with_bin(0).with_flags(PbFlags::new(self.slot, to));
        self.block(index).store(word);
        if mixes(to) && free == PAGEBLOCK_FRAMES {
            self.make_whole(index);
        } else {
            self.update(index, self.block(index), word);
        }
    }

    /// A pageblock of mobility `mt` with a free block of at least `order`.
    pub(crate) fn pageblock_with(&self, order: u32, mt: MigrateType) -> Option<u32> {
        self.smallest(order.min(PAGEBLOCK_ORDER), mt).map(|i| self.first_pfn(i))
    }
}
