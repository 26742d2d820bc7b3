//! `/proc/pagetypeinfo`: free blocks by mobility type, and the mobility types of the pageblocks.
//!
//! Linux gives every pageblock (here 512 frames) a mobility type, and keeps a free list for each type and order. The
//! text has a head with the pageblock's size, then free counts by zone, type and order, then pageblocks by zone and
//! type. A free count the kernel stopped counting at is written `>100000`.

use super::{Line, empty};
use crate::error::TraceError;

/// Free blocks of one mobility type in one zone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TypedFree {
    /// The zone's NUMA node.
    pub node: u32,
    /// The zone's name.
    pub zone: String,
    /// The type's name, as in [`Pagetypeinfo::types`].
    pub migratetype: String,
    /// Free blocks by order.
    pub blocks: Vec<u64>,
}

/// Pageblocks of one zone, by mobility type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TypeBlocks {
    /// The zone's NUMA node.
    pub node: u32,
    /// The zone's name.
    pub zone: String,
    /// Number of pageblocks, in the order of [`Pagetypeinfo::types`].
    pub pageblocks: Vec<u64>,
}

/// A whole `/proc/pagetypeinfo`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pagetypeinfo {
    /// log2 of a pageblock's frames.
    pub pageblock_order: u8,
    /// The mobility types, by Linux's numbers: `Unmovable`, `Movable`, `Reclaimable`...
    pub types: Vec<String>,
    /// Free blocks by zone and type.
    pub free: Vec<TypedFree>,
    /// Pageblocks by zone and type.
    pub pageblocks: Vec<TypeBlocks>,
}

impl Pagetypeinfo {
    /// Parses `text`, which errors call `file`.
    ///
    /// # Errors
    /// A line that fits no part of the form, or a text without pageblock order or pageblock counts.
    pub fn parse(text: &str, file: &str) -> Result<Self, TraceError> {
        let mut pageblock_order = None;
        let mut info = Pagetypeinfo {
            pageblock_order: 0,
            types: Vec::new(),
            free: Vec::new(),
            pageblocks: Vec::new(),
        };
        let mut last = None;
        for line in Line::all(text, file) {
            last = Some(line);
            let text = line.text.trim();
            if let Some(order) = text.strip_prefix("Page block order:") {
                let order: u8 = line.number(order.trim())?;
                if order > 31 {
                    return Err(line.error(format!("pageblocks of order {order}")));
                }
                pageblock_order = Some(order);
            } else if let Some(frames) = text.strip_prefix("Pages per block:") {
                let frames: u64 = line.number(frames.trim())?;
                if pageblock_order.is_none_or(|order| frames != 1u64 << order) {
                    return Err(
                        line.error(format!("{frames} frames do not fit the pageblock order above"))
                    );
                }
            } else if text.starts_with("Free pages count per migrate type at order") {
                // The column headings: the orders, which are counted by position.
            } else if let Some(types) = text.strip_prefix("Number of blocks type") {
                info.types = types.split_whitespace().map(str::to_owned).collect();
            } else if text.starts_with("Number of mixed blocks") {
                // Written by kernels that track page owners, to the end of the text.
                break;
            } else {
                info.counts(line)?;
            }
        }
        let last = last.ok_or_else(|| empty(file))?;
        info.pageblock_order = pageblock_order
            .ok_or_else(|| last.error("the text ends without a page block order"))?;
        if info.pageblocks.is_empty() {
            return Err(last.error("the text ends without the number of blocks of each type"));
        }
        Ok(info)
    }

    /// A line of counts: of free blocks before the types' headings, of pageblocks after them.
    fn counts(&mut self, line: Line) -> Result<(), TraceError> {
        let (node, zone, rest) = line.node_and_zone()?;
        let zone = zone.to_owned();
        if let Some(rest) = rest.strip_prefix(',') {
            let named = rest.trim_start().strip_prefix("type").map(str::trim_start);
            let (migratetype, counts) = named
                .and_then(|rest| rest.split_once(char::is_whitespace))
                .ok_or_else(|| line.error("a mobility type and its free blocks belong here"))?;
            let blocks =
                counts.split_whitespace().map(|count| line.number(count.trim_start_matches('>')));
            let blocks = blocks.collect::<Result<Vec<u64>, _>>()?;
            self.free.push(TypedFree { node, zone, migratetype: migratetype.to_owned(), blocks });
            return Ok(());
        }
        let pageblocks: Vec<u64> = line.numbers(rest)?;
        if pageblocks.len() != self.types.len() {
            let what =
                format!("{} counts for {} mobility types", pageblocks.len(), self.types.len());
            return Err(line.error(what));
        }
        self.pageblocks.push(TypeBlocks { node, zone, pageblocks });
        Ok(())
    }

    /// Pageblocks of zone `zone` of `node`, by mobility type.
    pub fn zone(&self, node: u32, zone: &str) -> Option<&[u64]> {
        let found =
            self.pageblocks.iter().find(|blocks| blocks.node == node && blocks.zone == zone);
        found.map(|blocks| blocks.pageblocks.as_slice())
    }

    /// Free blocks by order of mobility type number `migratetype` in zone `zone` of `node`.
    pub fn free_of(&self, node: u32, zone: &str, migratetype: u8) -> Option<&[u64]> {
        let name = self.types.get(usize::from(migratetype))?;
        let found = self
            .free
            .iter()
            .find(|free| free.node == node && free.zone == zone && free.migratetype == *name);
        found.map(|free| free.blocks.as_slice())
    }
}
