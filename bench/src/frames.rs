//! What a page allocator is to a workload.
//!
//! # Concepts
//! Blocks of 2^order frames, naturally aligned or not as the allocator has it. A block is whatever the
//! allocator's own calls return, so that no contender pays for a conversion.
//!
//! # Locking
//! [`Locked`] is a spin lock around an allocator that has none.

use std::hint::black_box;

/// Blocks in one bulk request.
pub const BULK: usize = 64;

/// A page allocator.
pub trait Frames {
    /// A block, as the allocator names it.
    type Block: Copy;

    /// 2^`order` contiguous frames; `None` when there are none.
    fn alloc(&mut self, order: u32) -> Option<Self::Block>;

    /// Gives a block back.
    fn free(&mut self, block: Self::Block, order: u32);

    /// Fills the array with single frames, all or fewer.
    #[inline]
    fn alloc_bulk(&mut self, blocks: &mut [Option<Self::Block>; BULK]) {
        for place in blocks.iter_mut() {
            *place = self.alloc(0);
        }
    }

    /// Gives the array's frames back and empties it.
    #[inline]
    fn free_bulk(&mut self, blocks: &mut [Option<Self::Block>; BULK]) {
        for place in blocks.iter_mut() {
            if let Some(block) = place.take() {
                self.free(block, 0);
            }
        }
    }
}

/// Does nothing: a workload with it costs what the harness costs.
#[derive(Clone, Copy, Default, Debug)]
pub struct Null;

impl Frames for Null {
    type Block = usize;

    #[inline(always)]
    fn alloc(&mut self, order: u32) -> Option<usize> {
        Some(black_box(order as usize))
    }

    #[inline(always)]
    fn free(&mut self, block: usize, _order: u32) {
        black_box(block);
    }
}

/// An allocator behind a spin lock, shared by threads.
#[derive(Debug)]
pub struct Locked<'a, F>(pub &'a spin::Mutex<F>);

impl<F: Frames> Frames for Locked<'_, F> {
    type Block = F::Block;

    #[inline]
    fn alloc(&mut self, order: u32) -> Option<F::Block> {
        self.0.lock().alloc(order)
    }

    #[inline]
    fn free(&mut self, block: F::Block, order: u32) {
        self.0.lock().free(block, order);
    }
}
