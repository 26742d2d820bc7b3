//! What is memory and not reserved, in whole frames.

use super::table::Slot;
use core::iter::FusedIterator;

/// A run of frames on one node. Frame numbers are 64 bits wide here: the boot allocator describes what
/// there is, and bring-up refuses what lies beyond 32-bit frame numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrameRange {
    /// First frame's number.
    pub start: u64,
    /// One past the last frame's number.
    pub end: u64,
    /// The node all of them belong to.
    pub node: u32,
}

/// The free frames; see [`Memblock::free_ranges`](super::Memblock::free_ranges).
#[derive(Clone, Debug)]
pub struct FreeRanges<'a> {
    /// Regions that are not finished yet.
    memory: &'a [Slot<u32>],
    /// Reservations that may still matter.
    reserved: &'a [Slot<bool>],
    /// Every frame below has been dealt with.
    cursor: u64,
    shift: u32,
}

impl<'a> FreeRanges<'a> {
    pub(super) fn new(memory: &'a [Slot<u32>], reserved: &'a [Slot<bool>], shift: u32) -> Self {
        let memory = if shift < u64::BITS { memory } else { &[] };
        FreeRanges { memory, reserved, cursor: 0, shift }
    }
}

impl Iterator for FreeRanges<'_> {
    type Item = FrameRange;

    fn next(&mut self) -> Option<FrameRange> {
        while let Some((region, later)) = self.memory.split_first() {
            let frame = 1 << self.shift;
            let end = region.end >> self.shift;
            let start = self.cursor.max(region.base.div_ceil(frame));
            if start >= end {
                self.memory = later;
                continue;
            }
            self.cursor = start;
            let stop = match self.reserved.split_first() {
                Some((r, rest)) if r.end.div_ceil(frame) <= start => {
                    self.reserved = rest;
                    continue;
                }
                Some((r, _)) if r.base >> self.shift <= start => {
                    self.cursor = r.end.div_ceil(frame);
                    continue;
                }
                Some((r, _)) => end.min(r.base >> self.shift),
                None => end,
            };
            self.cursor = stop;
            return Some(FrameRange { start, end: stop, node: region.tag });
        }
        None
    }
}

impl FusedIterator for FreeRanges<'_> {}
