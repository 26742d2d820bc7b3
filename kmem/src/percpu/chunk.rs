//! What is free in a chunk: two bitmaps and two hints.
//!
//! # Implementation
//! A bit stands for [`GRANULE`] bytes of each CPU's unit. `taken` says which are given out, `bounds` where
//! what was given out begins (and, one past the last, ends), so that a free needs no size and a wrong
//! address is found out.
//!
//! `first` is a place before which nothing is free; `largest` is at least the longest free run, and exactly
//! that after a search that failed. A search ends after at most one step for each run of the unit.

use core::cell::Cell;

/// The unit of allocation, in bytes.
pub(super) const GRANULE: usize = 8;
/// Largest unit of a CPU, in bytes.
pub(super) const MAX_UNIT: usize = 64 << 10;

const WORDS: usize = MAX_UNIT / GRANULE / 64;

/// A bit for each granule of a unit, and one for its end.
struct Bits([Cell<u64>; WORDS + 1]);

impl Bits {
    const fn clear() -> Bits {
        Bits([const { Cell::new(0) }; WORDS + 1])
    }

    #[inline(always)]
    fn get(&self, i: u32) -> bool {
        self.0[i as usize / 64].get() >> (i % 64) & 1 != 0
    }

    #[inline(always)]
    fn set(&self, i: u32, on: bool) {
        let word = &self.0[i as usize / 64];
        let bit = 1 << (i % 64);
        word.set(if on { word.get() | bit } else { word.get() & !bit });
    }

    #[inline(always)]
    fn set_range(&self, from: u32, to: u32, on: bool) {
        let mut at = from;
        while at < to {
            let n = (64 - at % 64).min(to - at);
            let mask = (u64::MAX >> (64 - n)) << (at % 64);
            let word = &self.0[at as usize / 64];
            word.set(if on { word.get() | mask } else { word.get() & !mask });
            at += n;
        }
    }

    /// The first bit from `from` on that is `what`; `end` if there is none before.
    #[inline(always)]
    fn next(&self, from: u32, end: u32, what: bool) -> u32 {
        let mut at = from;
        while at < end {
            let word = self.0[at as usize / 64].get();
            let wanted = (if what { word } else { !word }) >> (at % 64);
            if wanted != 0 {
                return end.min(at + wanted.trailing_zeros());
            }
            at = (at / 64 + 1) * 64;
        }
        end
    }

    /// The bit after the last one before `before` that is set; 0 if none is.
    fn after_last(&self, before: u32) -> u32 {
        let mut at = before;
        while at > 0 {
            let low = (at - 1) / 64 * 64;
            let word = self.0[low as usize / 64].get() << (64 - (at - low));
            if word != 0 {
                return at - word.leading_zeros();
            }
            at = low;
        }
        0
    }
}

/// Multiples of 1, 2, 4, … in a word.
const MULTIPLES: [u64; 7] = [
    u64::MAX,
    0x5555_5555_5555_5555,
    0x1111_1111_1111_1111,
    0x0101_0101_0101_0101,
    0x0001_0001_0001_0001,
    0x0000_0001_0000_0001,
    1,
];

/// Where in a word of free bits the first `n` neighbours are, at a multiple of 2^`align`.
#[inline(always)]
fn fit(free: u64, n: u32, align: u32) -> Option<u32> {
    let mut starts = free;
    let mut have = 1;
    while have < n {
        let more = have.min(n - have);
        starts &= starts >> more;
        have += more;
    }
    starts &= MULTIPLES[align as usize];
    (starts != 0).then(|| starts.trailing_zeros())
}

/// Why a place cannot be freed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Bad {
    /// Nothing is allocated there.
    Free,
    /// It is inside of what begins elsewhere.
    Inside,
}

/// What is free in a chunk; counted in granules.
pub(super) struct Room {
    len: u32,
    free: Cell<u32>,
    first: Cell<u32>,
    largest: Cell<u32>,
    taken: Bits,
    bounds: Bits,
}

impl Room {
    /// Room for `len` granules, all of them free.
    pub(super) const fn new(len: u32) -> Room {
        assert!(len as usize <= MAX_UNIT / GRANULE);
        Room {
            len,
            free: Cell::new(len),
            first: Cell::new(0),
            largest: Cell::new(len),
            taken: Bits::clear(),
            bounds: Bits::clear(),
        }
    }

    pub(super) fn free_granules(&self) -> u32 {
        self.free.get()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.free.get() == self.len
    }

    /// At least the longest run that is free.
    pub(super) fn largest(&self) -> u32 {
        self.largest.get()
    }

    /// Takes `n` neighbours, the first a multiple of 2^`align`.
    #[inline(always)]
    pub(super) fn alloc(&self, n: u32, align: u32) -> Option<u32> {
        if n == 0 || n > self.largest.get() {
            return None;
        }
        let first = self.first.get();
        let word = &self.taken.0[first as usize / 64];
        // Nearly always in the word where free ones begin.
        if n <= 64
            && align <= 6
            && let Some(bit) = fit(!word.get(), n, align)
            && first - first % 64 + bit + n <= self.len
        {
            let start = first - first % 64 + bit;
            word.set(word.get() | u64::MAX >> (64 - n) << bit);
            self.bounded(start, n);
            if start == first {
                self.first.set(start + n);
            }
            return Some(start);
        }
        self.search(n, align)
    }

    /// As `alloc`, in all of the unit.
    #[inline(never)]
    fn search(&self, n: u32, align: u32) -> Option<u32> {
        let first = self.taken.next(self.first.get(), self.len, false);
        self.first.set(first);
        let (mut at, mut longest) = (first, 0);
        while at < self.len {
            let start = at.next_multiple_of(1 << align);
            // No further than it takes: a long free run is not measured.
            let end = self.taken.next(at, self.len.min(start.saturating_add(n)), true);
            if end.checked_sub(start).is_some_and(|run| run >= n) {
                self.taken.set_range(start, start + n, true);
                self.bounded(start, n);
                if at == first {
                    self.first.set(if start == first { start + n } else { first });
                }
                return Some(start);
            }
            longest = longest.max(end - at);
            at = self.taken.next(end, self.len, false);
        }
        self.largest.set(longest);
        None
    }

    /// Notes the bounds of what was taken.
    #[inline(always)]
    fn bounded(&self, start: u32, n: u32) {
        self.bounds.set(start, true);
        self.bounds.set(start + n, true);
        self.free.set(self.free.get() - n);
    }

    /// Gives back what begins at a granule; returns its length.
    #[inline(always)]
    pub(super) fn free(&self, start: u32) -> Result<u32, Bad> {
        let (i, at) = (start as usize / 64, start % 64);
        // Nearly always all of it, and what is before it, lies in one word.
        if start < self.len && at != 0 {
            let (taken, bounds) = (&self.taken.0[i], &self.bounds.0[i]);
            let later = bounds.get() >> at >> 1;
            if taken.get() >> at & bounds.get() >> at & 1 != 0 && later != 0 {
                let n = later.trailing_zeros() + 1;
                let left = taken.get() & !(u64::MAX >> (64 - n) << at);
                // A boundary that a neighbour shares stays.
                let before = u64::from(left >> (at - 1) & 1 == 0) << at;
                let after = u64::from(left >> (at + n) & 1 == 0) << (at + n);
                taken.set(left);
                bounds.set(bounds.get() & !(before | after));
                self.freed(start, n);
                return Ok(n);
            }
        }
        self.free_far(start)
    }

    /// As `free`, wherever it lies.
    #[inline(never)]
    fn free_far(&self, start: u32) -> Result<u32, Bad> {
        if start >= self.len || !self.taken.get(start) {
            return Err(Bad::Free);
        }
        if !self.bounds.get(start) {
            return Err(Bad::Inside);
        }
        let end = self.bounds.next(start + 1, self.len, true);
        self.taken.set_range(start, end, false);
        if start == 0 || !self.taken.get(start - 1) {
            self.bounds.set(start, false);
        }
        if end >= self.len || !self.taken.get(end) {
            self.bounds.set(end, false);
        }
        self.freed(start, end - start);
        Ok(end - start)
    }

    /// Counts what was given back.
    #[inline(always)]
    fn freed(&self, start: u32, n: u32) {
        self.free.set(self.free.get() + n);
        self.first.set(self.first.get().min(start));
        // A run cannot be longer than all that is free.
        if self.largest.get() < self.free.get() {
            let from = self.taken.after_last(start);
            let to = self.taken.next(start + n, self.len, true);
            self.largest.set(self.largest.get().max(to - from));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    extern crate std;
    use proptest::prelude::*;
    use std::{collections::BTreeMap, vec::Vec};

    const LEN: u32 = 1000;

    /// The longest free run, and whether `n` neighbours are free at a multiple of `align`.
    fn look(live: &BTreeMap<u32, u32>, n: u32, align: u32) -> (u32, bool) {
        let (mut at, mut longest, mut fits) = (0, 0, false);
        for (start, len) in live.iter().map(|(s, l)| (*s, *l)).chain([(LEN, 0)]) {
            longest = longest.max(start - at);
            fits |= at.next_multiple_of(align) + n <= start;
            at = start + len;
        }
        (longest, fits)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]
        #[test]
        fn room_is_what_a_map_of_blocks_says(
            ops in prop::collection::vec((0u32..3, 1u32..90, 0u32..8, any::<prop::sample::Index>()), 1..200)
        ) {
            let room = Room::new(LEN);
            let mut live = BTreeMap::new();
            for (what, n, align, pick) in ops {
                let shift = align;
                let align = 1 << shift;
                if what < 2 {
                    let (longest, fits) = look(&live, n, align);
                    match room.alloc(n, shift) {
                        Some(at) => {
                            prop_assert!(at.is_multiple_of(align) && at + n <= LEN);
                            let before = live.range(..at + n).next_back();
                            prop_assert!(before.is_none_or(|(s, l)| s + l <= at));
                            live.insert(at, n);
                        }
                        None => prop_assert!(!fits),
                    }
                    prop_assert!(room.largest() >= look(&live, 1, 1).0 || longest == 0);
                } else if !live.is_empty() {
                    let starts: Vec<u32> = live.keys().copied().collect();
                    let at = *pick.get(&starts);
                    if live[&at] > 1 {
                        prop_assert_eq!(room.free(at + live[&at] - 1), Err(Bad::Inside));
                    }
                    prop_assert_eq!(room.free(at), Ok(live[&at]));
                    prop_assert_eq!(room.free(at), Err(Bad::Free));
                    live.remove(&at);
                }
                prop_assert_eq!(room.free_granules(), LEN - live.values().sum::<u32>());
                prop_assert!(room.largest() >= look(&live, 1, 1).0);
            }
            for at in live.into_keys() {
                room.free(at).unwrap();
            }
            prop_assert!(room.is_empty());
            prop_assert_eq!(room.alloc(LEN, 0), Some(0));
        }
    }
}
