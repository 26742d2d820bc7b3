//! Where Linux ended: what a replay's end state is compared with.
//!
//! `buddyinfo` and `zoneinfo` taken at the end of the recorded window say how many blocks were free and how many frames
//! lay on the per-CPU lists. Fragmentation is measured by the *unusable index* of an order: the share of free memory
//! that a request of that order cannot use because it lies in smaller blocks. 0 is none of it, 1 all of it.

use crate::error::TraceError;
use crate::proc::{Buddyinfo, PageSet, ZoneBlocks, Zoneinfo};
use crate::recording::Recording;

/// Free memory at the end of the recorded window.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinuxEnd {
    /// Free blocks by zone and order.
    pub zones: Vec<ZoneBlocks>,
    /// Free blocks by order, of all zones together.
    pub total: Vec<u64>,
    /// Per-CPU lists by node and zone; empty if the recording has no `zoneinfo` of its end.
    pub pagesets: Vec<(u32, String, Vec<PageSet>)>,
}

impl LinuxEnd {
    /// Free frames on the free lists.
    pub fn free_frames(&self) -> u64 {
        self.zones.iter().map(ZoneBlocks::frames).fold(0, u64::saturating_add)
    }

    /// Frames on the per-CPU lists.
    pub fn pcp_frames(&self) -> u64 {
        self.pagesets
            .iter()
            .flat_map(|(_, _, sets)| sets)
            .fold(0, |sum, set| sum.saturating_add(set.count))
    }
}

impl Recording {
    /// Where Linux ended, from `buddyinfo.traced_end` and `zoneinfo.traced_end` (or `end/buddyinfo`, `end/zoneinfo`).
    /// `None` if the recording has no such `buddyinfo`.
    ///
    /// # Errors
    /// A text is there and cannot be parsed; the error names it and the line.
    pub fn linux_end(&self) -> Result<Option<LinuxEnd>, TraceError> {
        let Some((name, text)) = self.meta.first_file(&["buddyinfo.traced_end", "end/buddyinfo"])
        else {
            return Ok(None);
        };
        let buddyinfo = Buddyinfo::parse(text, name)?;
        let pagesets = match self.meta.first_file(&["zoneinfo.traced_end", "end/zoneinfo"]) {
            Some((name, text)) => Zoneinfo::parse(text, name)?.zones,
            None => Vec::new(),
        };
        let pagesets = pagesets.into_iter().filter(|zone| zone.present > 0);
        Ok(Some(LinuxEnd {
            total: buddyinfo.total(),
            zones: buddyinfo.zones,
            pagesets: pagesets.map(|zone| (zone.node, zone.name, zone.pagesets)).collect(),
        }))
    }
}

/// The unusable index of `order`: 1 − (free frames in blocks of at least that order) / (free frames on the lists), for
/// `free_blocks` free blocks by order. From 0 to 1; 0 when nothing is free, where no request could succeed anyway.
pub fn unusable_index(free_blocks: &[u64], order: usize) -> f64 {
    let frames = |(order, blocks): (usize, &u64)| *blocks as f64 * (1u128 << order.min(127)) as f64;
    let all: f64 = free_blocks.iter().enumerate().map(frames).sum();
    let usable: f64 = free_blocks.iter().enumerate().skip(order).map(frames).sum();
    if all == 0.0 { 0.0 } else { 1.0 - usable / all }
}
