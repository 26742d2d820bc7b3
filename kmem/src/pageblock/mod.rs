//! Pageblocks: what the allocator knows of 512 frames as a whole.
//!
//! # Concepts
//! A pageblock has a zone and a mobility (its *flags*), and while it is *broken*, free blocks inside it:
//! which frames are free is in its [`FreeBits`], how many maximal blocks of which order in its
//! descriptor.
//!
//! # Implementation
//! A descriptor is one word with everything that is asked often. Eight share a cache line, and a free
//! finds the zone, the mobility and the buddy's counts in the same one. The links of a pageblock that is
//! in a bin, needed only when it moves to another, are a table of their own.
//! ```text
//!   63     55 54   53 52  50 49 48 47 46  45 43 42   39 38   34 33   28 27   21 20   13 12    4 3    0
//!   +--------+-------+------+--+-----+------+------+-------+-------+-------+-------+------+-----+-----+
//!   | zone+1 | empty |  mt  |9 |  8  |  7   |  6   |   5   |   4   |   3   |   2   |  1   |  0  | bin |
//!   +--------+-------+------+--+-----+------+------+-------+-------+-------+-------+------+-----+-----+
//!                           |<----------- maximal free blocks of each order ------------------->|
//! ```
//! Zone and mobility with the empty bits between, which make room for the lists of several orders, are the number of a
//! per-CPU list of order 0 (see `page_alloc::pcp`).
//!
//! Of two buddies that are both free neither is maximal, so there are at most 2^(8-k) maximal blocks of
//! order k, and the ten counts fit 46 bits. The position of the highest bit set tells the largest free
//! order, and merging and splitting are additions of one constant.
//!
//! Zero is a descriptor of a hole: no zone, nothing free.
//!
//! # Locking
//! All three are written under the lock of the area that owns the pageblock, with plain stores. The flags are read
//! without it; a stale mobility sends a frame to a list it could have been on a moment ago.

mod bits;

pub(crate) use bits::FreeBits;

use crate::types::{MIGRATE_TYPES, MigrateType, PAGEBLOCK_ORDER};
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

/// Orders a broken pageblock can hold: 0 to a pageblock's own.
pub(crate) const BLOCK_ORDERS: usize = PAGEBLOCK_ORDER as usize + 1;

/// Link of no pageblock.
pub(crate) const NIL: u32 = u32::MAX;

/// A pageblock's zone and mobility: the word without the rest.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct PbFlags(u64);

impl PbFlags {
    /// Zone slots that flags can name.
    pub(crate) const MAX_SLOTS: usize = (1 << (64 - SLOT_SHIFT)) - 1;

    /// Lists of a zone as [`list`](Self::list) numbers them, as a power of two.
    pub(crate) const ROW_SHIFT: u32 = SLOT_SHIFT - MT_SHIFT;

    /// Those of a hole.
    pub(crate) const HOLE: PbFlags = PbFlags(0);

    pub(crate) const fn new(zone_slot: usize, mt: MigrateType) -> PbFlags {
        assert!(zone_slot < Self::MAX_SLOTS);
        PbFlags((zone_slot as u64 + 1) << SLOT_SHIFT | (mt as u64) << MT_SHIFT)
    }

    /// The zone's slot; `None` for a hole.
    #[inline(always)]
    pub(crate) const fn zone_slot(self) -> Option<usize> {
        ((self.0 >> SLOT_SHIFT) as usize).checked_sub(1)
    }

    /// A number for zone and mobility: the zone's slot plus one, times the lists of a zone, plus the mobility's. Below that
    /// of the first slot's for holes. What is added to it and keeps it in the zone's row is up to the caller.
    #[inline(always)]
    pub(crate) const fn list(self) -> usize {
        (self.0 >> MT_SHIFT) as usize
    }

    #[inline(always)]
    pub(crate) const fn mt_index(self) -> usize {
        (self.0 >> MT_SHIFT) as usize & (MOST_MOBILITIES - 1)
    }

    pub(crate) const fn migratetype(self) -> MigrateType {
        match MigrateType::from_index(self.mt_index()) {
            Some(mt) => mt,
            None => MigrateType::Unmovable,
        }
    }
}

/// The bin: the lowest bits.
const BIN: u64 = 0xf;
/// Where each order's count starts, and the last one ends.
const AT: [u32; BLOCK_ORDERS + 1] = {
    let mut at = [BIN.count_ones(); BLOCK_ORDERS + 1];
    let mut k = 0;
    while k < BLOCK_ORDERS {
        // 0 to 2^(8-k) blocks, or one of the pageblock's own order.
        let bits = if k + 1 < BLOCK_ORDERS { PAGEBLOCK_ORDER - k as u32 } else { 1 };
        at[k + 1] = at[k] + bits;
        k += 1;
    }
    at
};
const COUNTS: u64 = (1 << AT[BLOCK_ORDERS]) - (1 << AT[0]);
/// Where the mobility is, the empty bits, and the zone's slot.
const MT_SHIFT: u32 = AT[BLOCK_ORDERS];
const EMPTY_SHIFT: u32 = MT_SHIFT + 3;
const SLOT_SHIFT: u32 = EMPTY_SHIFT + 2;
const FLAGS: u64 = !(COUNTS | BIN);
const _: () = assert!(BLOCK_ORDERS < 16 && SLOT_SHIFT == 55, "the fields fit");
/// Mobilities that flags can name.
const MOST_MOBILITIES: usize = 1 << (EMPTY_SHIFT - MT_SHIFT);
const _: () = assert!(MIGRATE_TYPES <= MOST_MOBILITIES);

/// The order whose count the n-th bit belongs to, plus one; 0 for bits of no count.
const BIN_OF: [u8; 64] = {
    let mut of = [0; 64];
    let mut k = 0;
    while k < BLOCK_ORDERS {
        let mut bit = AT[k];
        while bit < AT[k + 1] {
            of[bit as usize] = k as u8 + 1;
            bit += 1;
        }
        k += 1;
    }
    of
};

/// `BELOW[k]`: one block of each order below k.
const BELOW: [u64; BLOCK_ORDERS] = {
    let mut below = [0; BLOCK_ORDERS];
    let mut k = 1;
    while k < BLOCK_ORDERS {
        below[k] = below[k - 1] + (1 << AT[k - 1]);
        k += 1;
    }
    below
};

/// What the counts gain when a block of `order` comes free and merges up to order `to`: one of `to`, and
/// one less of each order that it merged with.
#[inline(always)]
const fn merge(order: u32, to: u32) -> u64 {
    let (order, to) = (order as usize, to as usize);
    MERGED[to].wrapping_add(BELOW[order])
}

/// `MERGED[k]`: one block of order k, and one less of each below.
const MERGED: [u64; BLOCK_ORDERS] = {
    let mut merged = [0; BLOCK_ORDERS];
    let mut k = 0;
    while k < BLOCK_ORDERS {
        merged[k] = (1u64 << AT[k]).wrapping_sub(BELOW[k]);
        k += 1;
    }
    merged
};

/// A descriptor's word, taken out to work on.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Word(u64);

impl Word {
    /// Whether nothing is free, or the pageblock is whole: then it is in no bin.
    #[inline(always)]
    pub(crate) const fn is_empty(self) -> bool {
        self.bin() == 0
    }

    /// Maximal free blocks of `order`.
    pub(crate) const fn count(self, order: u32) -> u32 {
        let at = AT[order as usize];
        (self.0 >> at) as u32 & ((1 << (AT[order as usize + 1] - at)) - 1)
    }

    /// Free frames.
    pub(crate) fn frames(self) -> u32 {
        (0..=PAGEBLOCK_ORDER).map(|k| self.count(k) << k).sum()
    }

    /// The bin the pageblock belongs into: its largest free order plus one; 0 for none.
    #[inline(always)]
    pub(crate) const fn wanted_bin(self) -> u32 {
        // The lowest bit is in no count.
        BIN_OF[(self.0 & COUNTS | 1).ilog2() as usize] as u32
    }

    /// The bin it is linked into: an order plus one; 0 for none.
    #[inline(always)]
    pub(crate) const fn bin(self) -> u32 {
        (self.0 & BIN) as u32
    }

    /// The smallest order from `order` on of which there is a block; `None` when there is none.
    #[inline(always)]
    pub(crate) const fn smallest(self, order: u32) -> Option<u32> {
        // The highest bit is in no count.
        let above = self.0 & COUNTS & !((1 << AT[order as usize]) - 1) | 1 << 63;
        (BIN_OF[above.trailing_zeros() as usize] as u32).checked_sub(1)
    }

    #[inline(always)]
    pub(crate) const fn flags(self) -> PbFlags {
        PbFlags(self.0 & FLAGS)
    }

    #[inline(always)]
    pub(crate) const fn with_bin(self, bin: u32) -> Word {
        Word(self.0 & !BIN | bin as u64)
    }

    pub(crate) const fn with_flags(self, flags: PbFlags) -> Word {
        Word(self.0 & !FLAGS | flags.0)
    }

    /// Without free blocks, in no bin.
    #[inline(always)]
    pub(crate) const fn emptied(self) -> Word {
        Word(self.0 & FLAGS)
    }

    /// After a block of `order` came free and merged up to order `to`.
    #[inline(always)]
    pub(crate) const fn merged(self, order: u32, to: u32) -> Word {
        Word(self.0.wrapping_add(merge(order, to)))
    }

    /// After a block of `order` was split out of one of order `from`.
    #[inline(always)]
    pub(crate) const fn split(self, from: u32, order: u32) -> Word {
        Word(self.0.wrapping_sub(merge(order, from)))
    }
}

/// Descriptor of one pageblock.
#[repr(transparent)]
pub(crate) struct Pageblock(AtomicU64);

impl Pageblock {
    #[inline(always)]
    pub(crate) fn word(&self) -> Word {
        Word(self.0.load(Relaxed))
    }

    #[inline(always)]
    pub(crate) fn store(&self, word: Word) {
        self.0.store(word.0, Relaxed);
    }

    #[inline(always)]
    pub(crate) fn flags(&self) -> PbFlags {
        self.word().flags()
    }

    /// Changes the flags, under the area's lock.
    pub(crate) fn set_flags(&self, flags: PbFlags) {
        self.store(self.word().with_flags(flags));
    }
}

/// A pageblock's neighbours in its bin, if it is in one.
#[repr(C, align(8))]
pub(crate) struct Links {
    pub(crate) next: AtomicU32,
    pub(crate) prev: AtomicU32,
}
