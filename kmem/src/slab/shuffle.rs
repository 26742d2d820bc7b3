//! The order in which the objects of a slab are given out, where it is not to be foreseen \[D2\].
//!
//! # Concepts
//! Whoever overruns an object may want to know which one lies behind it. With a seed that others do not know, the
//! objects of a slab are taken in an order of its own.
//!
//! # Implementation
//! A permutation that is computed, not kept: a Feistel network over the next power of four, of
//! which what lies beyond the slab's number of objects is mapped again until it does not. At most three of four
//! numbers lie beyond, so that takes four steps on average at most, and it ends, since a permutation returns to
//! where it began.
//!
//! # Locking
//! None.

/// A permutation of the indices of a slab's objects.
pub(super) struct Shuffle {
    key: u64,
    nr: u32,
    /// Bits of half an index.
    half: u32,
}

/// Rounds. Halves are few bits, so that rounds often map two of them to the same: with four, many neighbours stay
/// neighbours.
const ROUNDS: u64 = 8;

/// Mixes the bits of a word (the finaliser of splitmix64).
const fn mix(mut x: u64) -> u64 {
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

impl Shuffle {
    /// That of the slab of `nr` objects at frame `head` of a cache.
    pub(super) fn new(seed: u64, cache: u16, head: u32, nr: u32) -> Shuffle {
        let key = mix(seed ^ mix(u64::from(cache) << 32 | u64::from(head)));
        Shuffle { key, nr, half: nr.next_power_of_two().ilog2().div_ceil(2) }
    }

    fn step(&self, i: u32) -> u32 {
        let mask = (1 << self.half) - 1;
        let (mut left, mut right) = (i >> self.half, i & mask);
        for round in 0..ROUNDS {
            let f = mix(self.key.wrapping_add(round << 32 | u64::from(right))) as u32;
            (left, right) = (right, left ^ f & mask);
        }
        left << self.half | right
    }

    /// Which object is the `i`-th, below the number of objects.
    pub(super) fn at(&self, i: u32) -> u32 {
        let mut i = self.step(i);
        while i >= self.nr {
            i = self.step(i);
        }
        i
    }
}

#[cfg(test)]
mod tests {
    use super::Shuffle;

    #[test]
    fn every_index_comes_once_whatever_the_number() {
        for nr in 1..=700u32 {
            let order = Shuffle::new(0x1234_5678_9abc_def0, 7, 0x100, nr);
            let mut seen = [false; 700];
            for i in 0..nr {
                let place = &mut seen[order.at(i) as usize];
                assert!(!*place, "{nr}");
                *place = true;
            }
            assert!(seen[..nr as usize].iter().all(|s| *s));
        }
    }

    #[test]
    fn slabs_caches_and_seeds_have_orders_of_their_own() {
        let of = |seed, cache, head| {
            let order = Shuffle::new(seed, cache, head, 64);
            core::array::from_fn::<u32, 64, _>(|i| order.at(i as u32))
        };
        let one = of(1, 2, 3);
        assert!(one.windows(2).filter(|w| w[1] == w[0] + 1).count() < 8);
        assert!(one != of(2, 2, 3) && one != of(1, 3, 3) && one != of(1, 2, 4));
        assert_eq!(one, of(1, 2, 3));
    }
}
