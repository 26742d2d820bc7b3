//! What is known of each frame of one zone.

use std::ops::Range;

use super::UsedBlock;
use crate::proc::{Iomem, Zone};

/// What a frame was when the recording began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Use {
    /// There is no such frame: a hole.
    Absent,
    /// No event touches it.
    Unknown,
    /// The kernel's image lies there, and no event touches it.
    Kernel,
    /// The first event on it frees it: it was in use.
    Prior,
    /// The first event on it takes it: it was free, or on a per-CPU list.
    Touched,
    /// Chosen to be free.
    Free,
    /// In a block that was in use and is freed.
    Released,
    /// The allocator never had it.
    Reserved,
}

/// More frames than this are not mapped one by one: 1 TiB of 4 KiB frames.
const MAX_SPANNED: u64 = 1 << 28;
/// Pfns above this are beyond any address bus.
const MAX_PFN: u64 = 1 << 52;
/// Below this address memory belongs to the firmware's habits; Linux reserves what it finds there.
const LOW_BYTES: u64 = 1 << 20;
/// Mobility types that evidence is counted for; Linux has at most 6.
pub(super) const MIGRATETYPES: usize = 6;

/// The frames of one zone.
pub(super) struct Frames {
    /// The zone's first pfn.
    pub start: u64,
    uses: Vec<Use>,
    /// The mobility type asked for by the first allocation of a touched frame, `NO_TYPE` if none.
    types: Vec<u8>,
    page_shift: u32,
    /// Blocks that were in use, in the order of the events that free them.
    pub in_use: Vec<UsedBlock>,
}

const NO_TYPE: u8 = u8::MAX;

impl Frames {
    /// The frames of `zone` that are RAM, with the kernel's image marked.
    pub(super) fn map(zone: &Zone, iomem: &Iomem, page_shift: u32) -> Result<Frames, String> {
        let end = zone
            .start_pfn
            .checked_add(zone.spanned)
            .filter(|end| zone.spanned <= MAX_SPANNED && *end <= MAX_PFN);
        let end = end.ok_or_else(|| {
            format!("zone {} spans {} frames from pfn {}", zone.name, zone.spanned, zone.start_pfn)
        })?;
        let mut frames = Frames {
            start: zone.start_pfn,
            uses: vec![Use::Absent; zone.spanned as usize],
            types: vec![NO_TYPE; zone.spanned as usize],
            page_shift,
            in_use: Vec::new(),
        };
        for (ranges, usage) in
            [(iomem.ram(page_shift), Use::Unknown), (iomem.kernel(page_shift), Use::Kernel)]
        {
            for range in ranges {
                let (first, last) = (range.start.max(zone.start_pfn), range.end.min(end));
                for frame in &mut frames.uses[index(first.min(end), zone.start_pfn)
                    ..index(last.max(first).min(end), zone.start_pfn)]
                {
                    if usage == Use::Unknown || *frame == Use::Unknown {
                        *frame = usage;
                    }
                }
            }
        }
        let present = frames.present();
        if zone.managed > present {
            return Err(format!(
                "zone {}: {} frames managed, iomem has {present} there",
                zone.name, zone.managed
            ));
        }
        Ok(frames)
    }

    /// Whether all frames of the block exist in this zone.
    pub(super) fn has_block(&self, pfn: u64, order: u8) -> bool {
        let Some(first) = pfn.checked_sub(self.start) else {
            return false;
        };
        let end = first.saturating_add(1 << order);
        end <= self.uses.len() as u64
            && self.uses[first as usize..end as usize].iter().all(|usage| *usage != Use::Absent)
    }

    fn block(&self, pfn: u64, order: u8) -> Range<usize> {
        let first = index(pfn, self.start);
        first..first + (1usize << order)
    }

    /// Takes note of an event on the block, which must exist. Returns whether it is the first on all its frames.
    pub(super) fn touch(&mut self, pfn: u64, order: u8, was: Use, migratetype: u8) -> bool {
        let mut first = true;
        for frame in self.block(pfn, order) {
            if matches!(self.uses[frame], Use::Unknown | Use::Kernel) {
                self.uses[frame] = was;
                self.types[frame] = if was == Use::Touched { migratetype } else { NO_TYPE };
            } else {
                first = false;
            }
        }
        first
    }

    /// Gives all frames of the block one use.
    pub(super) fn set(&mut self, pfn: u64, order: u8, usage: Use) {
        let block = self.block(pfn, order);
        self.uses[block].fill(usage);
    }

    /// The use of each frame, from [`Frames::start`] on.
    pub(super) fn uses(&self) -> &[Use] {
        &self.uses
    }

    /// Frames that exist.
    pub(super) fn present(&self) -> u64 {
        self.uses.iter().filter(|usage| **usage != Use::Absent).count() as u64
    }

    /// One past the last pfn.
    pub(super) fn end(&self) -> u64 {
        self.start + self.uses.len() as u64
    }

    /// The uses of those of the pfns `frames` that lie in this zone's span.
    fn within(&self, frames: Range<u64>) -> &[Use] {
        let (first, end) = (frames.start.max(self.start), frames.end.min(self.end()));
        self.uses.get(index(first, self.start)..index(end.max(first), self.start)).unwrap_or(&[])
    }

    /// Whether any of the pfns `frames` exists in this zone.
    pub(super) fn has_any(&self, frames: Range<u64>) -> bool {
        self.within(frames).iter().any(|usage| *usage != Use::Absent)
    }

    /// Whether the kernel's image and holes are all there is at the pfns `frames`.
    pub(super) fn only_kernel(&self, frames: Range<u64>) -> bool {
        self.within(frames).iter().all(|usage| matches!(usage, Use::Absent | Use::Kernel))
    }

    /// Touched frames of the pfns `frames` by the mobility type first asked for.
    pub(super) fn votes(&self, frames: Range<u64>) -> [u32; MIGRATETYPES] {
        let mut votes = [0; MIGRATETYPES];
        let (first, end) = (frames.start.max(self.start), frames.end.min(self.end()));
        for migratetype in &self.types[index(first, self.start)..index(end.max(first), self.start)]
        {
            if let Some(votes) = votes.get_mut(usize::from(*migratetype)) {
                *votes += 1;
            }
        }
        votes
    }

    /// Marks `wanted` untouched frames as never the allocator's, the likeliest first; fewer, if there are not as many.
    pub(super) fn reserve(&mut self, wanted: u64) {
        let low = (LOW_BYTES >> self.page_shift)
            .saturating_sub(self.start)
            .min(self.uses.len() as u64) as usize;
        let kernel = (0..self.uses.len()).filter(|frame| self.uses[*frame] == Use::Kernel);
        let low_frames = (0..low).filter(|frame| self.uses[*frame] == Use::Unknown);
        let from_top =
            (low..self.uses.len()).rev().filter(|frame| self.uses[*frame] == Use::Unknown);
        let likeliest: Vec<usize> =
            kernel.chain(low_frames).chain(from_top).take(wanted as usize).collect();
        likeliest.into_iter().for_each(|frame| self.uses[frame] = Use::Reserved);
    }

    /// The frames whose use `wanted` accepts, as ascending pfn ranges.
    pub(super) fn ranges(&self, wanted: impl Fn(Use) -> bool) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for (frame, usage) in self.uses.iter().enumerate() {
            let pfn = self.start + frame as u64;
            match ranges.last_mut() {
                _ if !wanted(*usage) => {}
                Some(last) if last.end == pfn => last.end += 1,
                _ => ranges.push(pfn..pfn + 1),
            }
        }
        ranges
    }
}

fn index(pfn: u64, start: u64) -> usize {
    (pfn - start) as usize
}
