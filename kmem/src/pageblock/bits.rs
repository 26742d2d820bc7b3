//! Free bits of one pageblock: 512 of them, one cache line.
//!
//! # Concepts
//! Bit n is set while frame n of the pageblock is free. A block of order k is free when its 2^k
//! aligned bits are all set; it is *maximal* when the block of order k+1 around it is not. Merging two
//! buddies is therefore nothing but setting bits, and taking a free neighbour off a list is nothing at
//! all: no link lives in the frames or their `Page`s.
//!
//! # Locking
//! Written under the lock of the area that owns the pageblock; the loads are atomic so that reports may
//! look without it.

use crate::{
    runs::{self, low, maximal},
    types::PAGEBLOCK_ORDER,
};
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

const WORDS: usize = 8;

/// The free bits of one pageblock.
#[repr(C, align(64))]
pub(crate) struct FreeBits([AtomicU64; WORDS]);

impl FreeBits {
    #[inline(always)]
    fn word(&self, i: usize) -> u64 {
        self.0[i & (WORDS - 1)].load(Relaxed)
    }

    #[inline(always)]
    fn put(&self, i: usize, w: u64) {
        self.0[i & (WORDS - 1)].store(w, Relaxed);
    }

    /// Whether all frames of the aligned block are free.
    #[inline(always)]
    pub(crate) fn all(&self, pos: u32, order: u32) -> bool {
        let i = (pos >> 6) as usize;
        if order < 6 {
            let mask = low(order) << (pos & 63);
            return self.word(i) & mask == mask;
        }
        (i..i + (1 << (order - 6))).all(|i| self.word(i) == u64::MAX)
    }

    /// Whether any frame of the aligned block is free.
    #[inline(always)]
    pub(crate) fn any(&self, pos: u32, order: u32) -> bool {
        let i = (pos >> 6) as usize;
        if order < 6 {
            return self.word(i) & (low(order) << (pos & 63)) != 0;
        }
        (i..i + (1 << (order - 6))).any(|i| self.word(i) != 0)
    }

    /// Marks the frames of the aligned block free, whatever they were.
    #[inline(always)]
    pub(crate) fn set(&self, pos: u32, order: u32) {
        let i = (pos >> 6) as usize;
        if order < 6 {
            self.put(i, self.word(i) | low(order) << (pos & 63));
        } else {
            (i..i + (1 << (order - 6))).for_each(|i| self.put(i, u64::MAX));
        }
    }

    /// Marks the frames of the aligned block not free, whatever they were.
    #[inline(always)]
    pub(crate) fn clear(&self, pos: u32, order: u32) {
        let i = (pos >> 6) as usize;
        if order < 6 {
            self.put(i, self.word(i) & !(low(order) << (pos & 63)));
        } else {
            (i..i + (1 << (order - 6))).for_each(|i| self.put(i, 0));
        }
    }

    /// Marks the aligned block free and returns the order of the maximal free block it belongs to now;
    /// `None`, and nothing changes, when any of its frames is free already.
    #[inline(always)]
    pub(crate) fn give(&self, pos: u32, order: u32) -> Option<u32> {
        if order >= 6 {
            if self.any(pos, order) {
                return None;
            }
            self.set(pos, order);
            return Some(self.enclosing(pos, order));
        }
        let i = (pos >> 6) as usize;
        let bit = pos & 63;
        let block = low(order) << bit;
        let word = self.word(i);
        if word & block != 0 {
            return None;
        }
        let word = word | block;
        self.put(i, word);
        let k = runs::around(word, bit);
        Some(if k < runs::MAX { k } else { self.enclosing(pos, k) })
    }

    /// The order of the maximal free block that a free block of `order` at `pos` belongs to.
    #[inline]
    pub(crate) fn enclosing(&self, pos: u32, order: u32) -> u32 {
        let mut k = order;
        while k < PAGEBLOCK_ORDER && self.all(pos & !((2 << k) - 1), k + 1) {
            k += 1;
        }
        k
    }

    /// The first maximal block of `order` (at most 9).
    #[inline(always)]
    pub(crate) fn find(&self, order: u32) -> Option<u32> {
        match order {
            0 => self.find_in_words::<0>(),
            1 => self.find_in_words::<1>(),
            2 => self.find_in_words::<2>(),
            3 => self.find_in_words::<3>(),
            4 => self.find_in_words::<4>(),
            5 => self.find_in_words::<5>(),
            _ => (0..1 << PAGEBLOCK_ORDER)
                .step_by(1 << order)
                .find(|pos| self.all(*pos, order) && self.enclosing(*pos, order) == order),
        }
    }

    #[inline(always)]
    fn find_in_words<const K: u32>(&self) -> Option<u32> {
        (0..WORDS).find_map(|i| {
            let at = maximal(self.word(i), K, runs::MAX);
            (at != 0).then(|| (i as u32) << 6 | at.trailing_zeros())
        })
    }

    /// Free frames.
    pub(crate) fn count(&self) -> u32 {
        (0..WORDS).map(|i| self.word(i).count_ones()).sum()
    }

    /// Number of maximal blocks of each order up to a pageblock's. For reports and audits: it looks
    /// at every bit.
    pub(crate) fn histogram(&self) -> [u32; PAGEBLOCK_ORDER as usize + 1] {
        let mut h = [0; PAGEBLOCK_ORDER as usize + 1];
        let mut pos = 0;
        while pos < 1 << PAGEBLOCK_ORDER {
            if self.all(pos, 0) {
                let k = self.enclosing(pos, 0);
                h[k as usize] += 1;
                pos += 1 << k;
            } else {
                pos += 1;
            }
        }
        h
    }
}
