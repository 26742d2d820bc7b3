//! `/proc/buddyinfo`: free blocks by zone and order.
//!
//! One line for each populated zone; the numbers count the blocks on the zone's free lists, order 0 first. Blocks
//! on the per-CPU lists are not among them. A block is counted at the largest order it could be merged to.

use super::{Line, empty};
use crate::error::TraceError;

/// The free blocks of one zone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ZoneBlocks {
    /// The zone's NUMA node.
    pub node: u32,
    /// The zone's name: `DMA`, `DMA32`, `Normal`...
    pub zone: String,
    /// Free blocks by order.
    pub blocks: Vec<u64>,
}

impl ZoneBlocks {
    /// Free frames in these blocks.
    pub fn frames(&self) -> u64 {
        let frames =
            self.blocks.iter().enumerate().map(|(order, blocks)| blocks.saturating_mul(1 << order));
        frames.fold(0, u64::saturating_add)
    }
}

/// A whole `/proc/buddyinfo`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Buddyinfo {
    /// The populated zones, in the text's order.
    pub zones: Vec<ZoneBlocks>,
}

/// More orders than any kernel has.
const MAX_ORDERS: usize = 32;

impl Buddyinfo {
    /// Parses `text`, which errors call `file`.
    ///
    /// # Errors
    /// A line that is not `Node N, zone NAME` and a number for each order, or an empty text.
    pub fn parse(text: &str, file: &str) -> Result<Self, TraceError> {
        let mut zones: Vec<ZoneBlocks> = Vec::new();
        for line in Line::all(text, file) {
            let (node, zone, rest) = line.node_and_zone()?;
            let blocks: Vec<u64> = line.numbers(rest)?;
            if blocks.is_empty() || blocks.len() > MAX_ORDERS {
                return Err(line.error(format!("{} orders", blocks.len())));
            }
            if zones.first().is_some_and(|first| first.blocks.len() != blocks.len()) {
                return Err(line.error("this zone has another number of orders than the one above"));
            }
            if zones.iter().any(|known| known.node == node && known.zone == zone) {
                return Err(line.error(format!("zone {zone} of node {node} a second time")));
            }
            zones.push(ZoneBlocks { node, zone: zone.to_owned(), blocks });
        }
        if zones.is_empty() { Err(empty(file)) } else { Ok(Buddyinfo { zones }) }
    }

    /// The free blocks of zone `zone` of `node`.
    pub fn zone(&self, node: u32, zone: &str) -> Option<&ZoneBlocks> {
        self.zones.iter().find(|known| known.node == node && known.zone == zone)
    }

    /// Free blocks by order, of all zones together.
    pub fn total(&self) -> Vec<u64> {
        let orders = self.zones.first().map_or(0, |zone| zone.blocks.len());
        (0..orders)
            .map(|order| {
                self.zones.iter().fold(0u64, |sum, zone| sum.saturating_add(zone.blocks[order]))
            })
            .collect()
    }
}
