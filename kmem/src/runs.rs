//! Runs of set bits: blocks of 2^k neighbours, naturally aligned, in one word.
//!
//! # Concepts
//! What the free bits of 64 frames are to orders 0 to 5, the whole pageblocks of a region are to orders 9 to
//! 15. A run of order k is *maximal* when it is not half of one of order k + 1.
//!
//! # Locking
//! None: it is arithmetic.

/// Largest order of a run: all of a word.
pub(crate) const MAX: u32 = 6;

/// `STARTS[k]`: where a run of order k can start.
const STARTS: [u64; MAX as usize + 1] = [
    u64::MAX,
    0x5555_5555_5555_5555,
    0x1111_1111_1111_1111,
    0x0101_0101_0101_0101,
    0x0001_0001_0001_0001,
    0x0000_0001_0000_0001,
    1,
];

/// The low 2^`k` bits.
#[inline(always)]
pub(crate) const fn low(k: u32) -> u64 {
    if k >= MAX { u64::MAX } else { (1 << (1u32 << k)) - 1 }
}

/// Where runs of order `k` + 1 start, of which `at` has those of order `k`.
#[inline(always)]
pub(crate) const fn pairs(at: u64, k: u32) -> u64 {
    at & at >> (1u32 << k) & STARTS[k as usize + 1]
}

/// Where runs of order `k` start in `word`.
#[inline(always)]
pub(crate) const fn starts(word: u64, k: u32) -> u64 {
    let mut at = word;
    let mut i = 0;
    while i < k {
        at = pairs(at, i);
        i += 1;
    }
    at
}

/// Where maximal runs of order `k` start in `word`, if there are none above order `max`.
#[inline(always)]
pub(crate) const fn maximal(word: u64, k: u32, max: u32) -> u64 {
    let at = starts(word, k);
    if k >= max {
        return at;
    }
    let pairs = pairs(at, k);
    at & !(pairs | pairs << (1u32 << k))
}

/// The order of the maximal run around a set bit.
///
/// Without a loop over orders: how often that turned would be foreseen by nobody. A run of order k around `bit` takes in
/// all bits whose number differs from its own in the low k binary digits only, so what limits it is the nearest clear
/// bit on either side, and the highest digit in which that differs.
#[inline(always)]
pub(crate) fn around(word: u64, bit: u32) -> u32 {
    let clear = !word;
    let below = clear & ((1 << bit) - 1);
    let above = clear ^ below;
    // Where there is no clear bit: a number that differs in a digit that no bit of the word has.
    let below = below.checked_ilog2().unwrap_or(127) ^ bit;
    let above = above.trailing_zeros() ^ bit;
    let nearer = if above < below { above } else { below };
    // Both are at most 127.
    LOG[nearer as usize % LOG.len()] as u32
}

/// The logarithm of each number, rounded down, and no more than `MAX`; of 0, too, that of 1. To look for the highest bit
/// takes some processors as long as ten other instructions.
const LOG: [u8; 128] = {
    let mut log = [0; 128];
    let mut n = 1;
    while n < log.len() {
        let k = n.ilog2();
        log[n] = if k < MAX { k as u8 } else { MAX as u8 };
        n += 1;
    }
    log
};

#[cfg(test)]
mod tests {
    use super::{MAX, around, low};

    /// Order by order, as the definition says.
    fn searched(word: u64, bit: u32) -> u32 {
        let whole = |k: &u32| {
            let run = low(*k) << (bit & !((1u32 << *k) - 1));
            word & run == run
        };
        (0..=MAX).rev().find(whole).unwrap_or_default()
    }

    #[test]
    fn the_run_around_a_bit_is_the_largest_that_is_all_set() {
        let same = |word: u64| {
            for bit in (0..u64::BITS).filter(|bit| word >> bit & 1 == 1) {
                assert_eq!(around(word, bit), searched(word, bit), "bit {bit} of {word:#018x}");
            }
        };
        // Every stretch of set bits, alone and as all that is clear, with and without a hole.
        for from in 0..u64::BITS {
            for to in from..u64::BITS {
                let stretch = (u64::MAX >> (63 - (to - from))) << from;
                same(stretch);
                same(!stretch);
                (0..u64::BITS).for_each(|hole| same(stretch ^ 1 << hole));
            }
        }
        // And what is neither.
        let mut word = 0x9e37_79b9_7f4a_7c15_u64;
        for _ in 0..10_000 {
            word = word.wrapping_mul(0xd129_0bd3_9a2b_6f35).rotate_left(23);
            same(word);
            same(word | word.rotate_left(1) | word.rotate_left(2));
        }
    }
}
