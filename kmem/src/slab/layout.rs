//! Where the objects of a slab lie, and where their state is.
//!
//! # Concepts
//! A slab is a block of 2^order frames cut into equal *strides*. Beside the objects there is one state
//! byte for each. Those of small objects follow the last object. Those of objects of a KiB and more are in a table
//! of the machine's, which has a byte for each KiB of memory, from that on that the first object begins in.
//!
//! # Implementation
//! The index of the object at an offset is offset / stride, and the offset is right only if nothing is
//! left over. Both come of one multiplication by the reciprocal R = ⌈2^32 / stride⌉: the upper half of the
//! product is the quotient, the lower half less than R exactly where nothing is left over. (R · stride exceeds 2^32
//! by less than stride, so a quotient's worth of that is less than the offset, which is less than R as
//! long as stride · slab ≤ 2^32. Every byte more of a remainder adds R.)
//!
//! Behind the last object there may be room that looks like the beginning of another. It has state bytes as
//! well, so that nobody need ask how many objects there are: no object is ever live there.
//!
//! *Areas.* Caches that look for mistakes have a red zone before and behind each object, and behind that what
//! is known of its users:
//!
//! ```text
//!   lead       object     red zone  size asked for  allocated by, freed by          next object
//!   ....bbbbbbb|-----------|bbbbbbbb|--------------|----------------------|....bbbbbbb|---
//!        red zone                                                              red zone
//! ```
//! The zone before an object is the end of what lies behind the one before it; the first one's is in the slab's
//! *lead*, a power of two that keeps objects aligned. The fast paths know nothing of it: such caches have no
//! magazines.
//!
//! # Locking
//! Computed once.

use super::SlabFlags;
use crate::memmap::{MemMap, STATE_SHIFT};

/// Largest order of a slab that is had for a better fit, and for one that is good enough.
const MAX_ORDER: u32 = 3;
const LAST_RESORT: u32 = 4;

/// What `Layout::states_at` says when the state bytes are in the machine's table.
pub(super) const OUTSIDE: u32 = u32::MAX;

/// The layout of one cache's slabs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Layout {
    pub(super) order: u32,
    /// Objects.
    pub(super) nr: u32,
    /// From one object to the next, in bytes.
    pub(super) stride: u32,
    /// Bytes of the slab less one.
    pub(super) mask: u32,
    /// How far behind the first object the state bytes are, or `OUTSIDE`.
    pub(super) states_at: u32,
    /// The reciprocal of the stride; 0 where the product would not tell what is left over.
    pub(super) reciprocal: u32,
    /// The colours are the multiples of `colour_step` below this.
    pub(super) colours: u32,
    pub(super) colour_step: u32,
    /// Bytes of a slab before its colour.
    pub(super) lead: u32,
}

/// Bytes of a red zone at least.
pub(super) const ZONE: u32 = 8;

/// What is kept of one user of an object: see `debug::areas`.
pub(super) const TRACK: u32 = 16;

/// What a cache keeps around each object to find mistakes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Areas {
    /// Bytes of the object.
    pub(super) size: u32,
    /// Where the red zone behind it ends; `size` if there is none.
    pub(super) zone_end: u32,
    /// Where the size is that kmalloc was asked for; 0 if that is not kept.
    pub(super) asked_at: u32,
    /// Where its last allocation and its last free are noted; 0 if they are not.
    pub(super) tracks_at: u32,
    /// From one object to the next.
    pub(super) stride: u32,
    /// Bytes before a slab's first object.
    pub(super) lead: u32,
}

impl Areas {
    /// The areas that the flags ask for. `keeps_asked` says whether an object may be asked for with less than
    /// its size.
    pub(super) const fn new(size: u32, align: u32, flags: SlabFlags, keeps_asked: bool) -> Areas {
        let mut a = Areas { size, zone_end: size, asked_at: 0, tracks_at: 0, stride: 0, lead: 0 };
        let zones = flags.contains(SlabFlags::RED_ZONE);
        let mut end = size;
        if zones {
            end = (size + ZONE).next_multiple_of(8);
            a.zone_end = end;
            // A power of two, since that is what alignments are.
            a.lead = if align < ZONE { ZONE } else { align };
        }
        if zones && keeps_asked {
            a.asked_at = end;
            end += 8;
        }
        if flags.contains(SlabFlags::STORE_USER) {
            a.tracks_at = end.next_multiple_of(8);
            end = a.tracks_at + 2 * TRACK;
        }
        if zones {
            end += ZONE;
        }
        a.stride = end.next_multiple_of(align);
        a
    }

    /// Whether there are red zones.
    pub(super) const fn zones(&self) -> bool {
        self.lead != 0
    }
}

impl Layout {
    /// The layout for objects of `stride` bytes (a multiple of `align`, a power of two): of the smallest
    /// order that leaves at most a sixteenth unused (a single frame no more than half of that), else of the one
    /// that leaves least; beyond order 3 only if that were more than an eighth \[S3\]. The first object is `lead`
    /// bytes into the slab, a power of two or 0.
    pub(super) fn new(
        stride: u32,
        align: u32,
        lead: u32,
        page_shift: u32,
        max_order: u32,
    ) -> Option<Layout> {
        let mut best: Option<(u64, Layout)> = None;
        for order in 0..=LAST_RESORT.min(max_order) {
            let bytes = 1u64 << (page_shift + order);
            if let Some((nr, lost)) = fit(bytes, lead.into(), stride.into())
                && best.as_ref().is_none_or(|(least, b)| lost << b.order < *least << order)
            {
                best = Some((lost, Layout::with(order, nr, stride, align, lead, bytes as u32)));
            }
            let share = match order {
                0 => 5,
                1..MAX_ORDER => 4,
                _ => 3,
            };
            if let Some((lost, found)) = &best
                && *lost <= 1u64 << (page_shift + found.order - share)
            {
                break;
            }
        }
        best.map(|(_, layout)| layout)
    }

    fn with(order: u32, nr: u32, stride: u32, align: u32, lead: u32, bytes: u32) -> Layout {
        let inside = states(bytes.into(), stride.into()) as u32;
        let exact = u64::from(stride) * u64::from(bytes) <= 1 << 32;
        let colour_step = (align / COLOUR_UNIT).max(1);
        let mut spare = bytes - lead - nr * stride - inside;
        // An address before the first object wraps around to the end of the slab. No colour goes so far that it comes
        // to where an object could begin there: its state byte would be looked for before the slab's.
        let last = (bytes - 1) / stride;
        let outside = inside == 0;
        if last > nr || (outside && last == nr) {
            spare = spare.min(bytes - 1 - last * stride);
        }
        let room = (spare / COLOUR_UNIT).min(MAX_COLOURS - 1);
        Layout {
            order,
            nr,
            stride,
            mask: bytes - 1,
            states_at: if outside { OUTSIDE } else { nr * stride },
            reciprocal: if exact { (1u64 << 32).div_ceil(stride.into()) as u32 } else { 0 },
            colours: (room / colour_step + 1) * colour_step,
            colour_step,
            lead,
        }
    }

    /// Where the first state byte is of a slab whose first object is at an offset in the direct map: at the offset
    /// shifted right by this, behind this address.
    pub(super) fn states_place(&self, map: &MemMap) -> (usize, u32) {
        if self.states_at == OUTSIDE {
            (map.states_base(), STATE_SHIFT)
        } else {
            (map.direct_base().wrapping_add(self.states_at as usize), 0)
        }
    }

    /// The index of the object that begins `offset` bytes behind a slab's first.
    #[inline(always)]
    pub(super) fn index(&self, offset: u32) -> Option<u32> {
        let i = offset / self.stride;
        (i < self.nr && offset.is_multiple_of(self.stride)).then_some(i)
    }
}

/// From one colour to the next, in bytes: a cache line.
pub(super) const COLOUR_UNIT: u32 = 64;

/// Colours that the table of owners can name.
pub(super) const MAX_COLOURS: u32 = 64;

/// State bytes in a slab: one wherever an object could begin, or none.
fn states(bytes: u64, stride: u64) -> u64 {
    if stride >= 1 << STATE_SHIFT { 0 } else { bytes.div_ceil(stride) }
}

/// Objects of `stride` that fit `bytes` behind `lead`, and the bytes that they leave unused or that their state takes.
fn fit(bytes: u64, lead: u64, stride: u64) -> Option<(u32, u64)> {
    let nr = bytes.saturating_sub(lead + states(bytes, stride)) / stride;
    (nr > 0).then_some((nr as u32, bytes - lead.min(bytes) - nr * stride))
}
