//! The loops that are measured.
//!
//! # Concepts
//! All randomness is drawn beforehand, from a fixed seed, the same for every contender; a measured loop
//! reads it from an array. Set-up that is not measured says so.
//!
//! # Locking
//! None.

use crate::frames::{BULK, Frames};
use std::hint::black_box;

const SEED: u64 = 0x006b_6d65_6d00_0001;

/// Largest order of the mixed workload.
pub const MIXED_MAX_ORDER: u32 = 4;

/// Frames to take of `frames`, for workloads that fill the memory: nine tenths, so that no contender is
/// measured at its own reserves or tables.
pub const fn nearly_all(frames: usize) -> usize {
    frames / 10 * 9
}

/// `n` times: a block of `order`, and back.
#[inline(never)]
pub fn pairs<F: Frames>(f: &mut F, order: u32, n: u64) {
    for _ in 0..n {
        if let Some(block) = f.alloc(order) {
            f.free(black_box(block), order);
        }
    }
}

/// `n` times: `BULK` single frames at once, and all back at once.
#[inline(never)]
pub fn bulk<F: Frames>(f: &mut F, blocks: &mut [Option<F::Block>; BULK], n: u64) {
    for _ in 0..n {
        f.alloc_bulk(blocks);
        f.free_bulk(black_box(&mut *blocks));
    }
}

/// `n` times: `BULK` single frames at once, and back one by one.
#[inline(never)]
pub fn bulk_then_frees<F: Frames>(f: &mut F, blocks: &mut [Option<F::Block>; BULK], n: u64) {
    for _ in 0..n {
        f.alloc_bulk(blocks);
        for place in black_box(&mut *blocks) {
            if let Some(block) = place.take() {
                f.free(block, 0);
            }
        }
    }
}

/// Takes `count` single frames, or as many as there are.
#[inline(never)]
pub fn take<F: Frames>(f: &mut F, blocks: &mut Vec<F::Block>, count: usize) {
    for _ in 0..count {
        match f.alloc(0) {
            Some(block) => blocks.push(block),
            None => return,
        }
    }
}

/// Gives single frames back in the order of the slice.
#[inline(never)]
pub fn give<F: Frames>(f: &mut F, blocks: &[F::Block]) {
    for &block in blocks {
        f.free(block, 0);
    }
}

/// Puts blocks in a random order. Not measured.
pub fn shuffle<T>(blocks: &mut [T]) {
    fastrand::Rng::with_seed(SEED).shuffle(blocks);
}

/// How far [`Mixed`] fills the memory, in frames.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fill {
    /// At first.
    pub peak: usize,
    /// While it is measured.
    pub keep: usize,
}

impl Fill {
    /// To 95 % of `frames` at first, then four fifths, shared by `threads` alike.
    pub const fn four_fifths(frames: usize, threads: usize) -> Fill {
        Fill { peak: frames / 100 * 95 / threads, keep: frames / 5 * 4 / threads }
    }
}

/// Blocks of mixed orders, replaced at random: order 0 with
/// probability 1/2, 1 with 1/4, and so on to [`MIXED_MAX_ORDER`].
pub struct Mixed<B> {
    slots: Vec<(Option<B>, u32)>,
    /// A slot and the order that replaces it, as `slot | order << 28`.
    script: Vec<u32>,
    at: usize,
}

fn draw_order(rng: &mut fastrand::Rng) -> u32 {
    rng.u32(..).trailing_ones().min(MIXED_MAX_ORDER)
}

impl<B: Copy> Mixed<B> {
    /// Takes blocks of `fill.peak` frames in all, gives some back at random until `fill.keep` remain,
    /// and replaces a quarter of them, so that what is free is in pieces from the start. `script`
    /// replacements are drawn for [`run`](Self::run). `None` once `give_up` says that it takes too
    /// long. Not measured.
    pub fn set_up<F: Frames<Block = B>>(
        f: &mut F,
        fill: Fill,
        script: usize,
        mut give_up: impl FnMut() -> bool,
    ) -> Option<Mixed<B>> {
        let mut rng = fastrand::Rng::with_seed(SEED);
        let mut m = Mixed { slots: Vec::new(), script: Vec::new(), at: 0 };
        let mut used = 0;
        while used < fill.peak {
            let order = draw_order(&mut rng);
            let Some(block) = f.alloc(order) else { break };
            m.slots.push((Some(block), order));
            used += 1 << order;
            if m.slots.len().is_multiple_of(256) && give_up() {
                return None;
            }
        }
        while used > fill.keep {
            let (block, order) = m.slots.swap_remove(rng.usize(..m.slots.len()));
            if let Some(block) = block {
                f.free(block, order);
            }
            used -= 1 << order;
        }
        m.draw(m.slots.len() / 4, &mut rng);
        for _ in 0..m.script.len() / 256 {
            if give_up() {
                return None;
            }
            m.run(f, 256);
        }
        m.draw(script, &mut rng);
        Some(m)
    }

    fn draw(&mut self, count: usize, rng: &mut fastrand::Rng) {
        let slots = self.slots.len().clamp(1, 1 << 28) as u32;
        self.script = (0..count.max(1)).map(|_| rng.u32(..slots) | draw_order(rng) << 28).collect();
        self.at = 0;
    }

    /// Makes the next `n` replacements of the script, over and over.
    #[inline(never)]
    pub fn run<F: Frames<Block = B>>(&mut self, f: &mut F, n: usize) {
        for _ in 0..n {
            let step = self.script[self.at];
            self.at = if self.at + 1 == self.script.len() { 0 } else { self.at + 1 };
            let slot = &mut self.slots[(step & 0x0fff_ffff) as usize];
            let order = step >> 28;
            if let Some(block) = slot.0 {
                f.free(block, slot.1);
            }
            *slot = (f.alloc(order), order);
        }
    }

    /// Slots that are empty because no block was to be had.
    pub fn empty(&self) -> usize {
        self.slots.iter().filter(|s| s.0.is_none()).count()
    }

    /// Gives everything back. Not measured.
    pub fn tear_down<F: Frames<Block = B>>(self, f: &mut F) {
        for (block, order) in self.slots {
            if let Some(block) = block {
                f.free(block, order);
            }
        }
    }
}
