//! The state of the page allocator when a recording begins.
//!
//! # Theory
//!
//! Nobody can list the free frames of a running kernel, but its texts and the recording together all but name them.
//! `buddyinfo` says how many free blocks of each order a zone has, `iomem` which frames exist, and the first event
//! on a frame says what it was before: a free means in use, an allocation means free (on a free list, or on one of
//! the per-CPU lists). Frames no event touches may be either.
//!
//! **Choosing the free blocks.** A buddy allocator merges a free block with its
//! buddy whenever that is free too, so free blocks are *maximal*: no two free blocks of one order below the largest
//! are buddies, and that is all maximality asks (were a block's buddy free in smaller pieces, the smallest of these
//! would have a free buddy of its own order). So the task is: choose, for every order, exactly as many aligned
//! blocks of frames that may be free as the text counts, disjoint, no two of one order buddies.
//!
//! This is done from the largest order down, taking the blocks with most evidence first, and needs no second
//! thoughts. Look at what is left when order *k* is reached, in blocks of order *k*: `S` single ones (whose buddy
//! cannot be free entirely) and `P` pairs of buddies (what a larger block not taken falls into). At most `S + P` can be
//! taken, one of each pair. Taking `n` of them leaves `S + 2P − n` blocks, which become that many pairs of order
//! *k* − 1: the number does not depend on *which* were taken, so no choice by evidence spoils a lower order, and if
//! an order comes up short then no choice at all would have matched the text.
//!
//! **Mobility.** `pagetypeinfo` counts the pageblocks of each mobility type. They are handed out by evidence as well:
//! large free blocks as the text counts them by type, the others by the types of the allocations seen in them. A free
//! block has the type of its pageblock, as in Linux.
//!
//! **The rest.** Blocks in use that the recording frees appear as [`UsedBlock`]s, in the order of their frees; frames
//! whose first event is an allocation, but which were not chosen, are [`ZoneStart::unaccounted`] (Linux had them on its
//! per-CPU lists, or they were freed between the first row and the text); present frames that are none of these are in
//! use for good: as many as `zoneinfo` says the allocator was never given are [`ZoneStart::reserved`], the kernel's
//! image, the lowest megabyte and the highest frames first (boot memory is handed out from the top), the others
//! [`ZoneStart::held`].

mod choose;
mod frames;
mod mobility;

use std::ops::Range;

use crate::error::TraceError;
use crate::meta::Meta;
use crate::pages::PageOp;
use crate::proc::{Buddyinfo, Iomem, PageSet, Pagetypeinfo, Zone, Zoneinfo};
use crate::recording::Recording;

use self::frames::{Frames, Use};

/// A block on the free lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FreeBlock {
    /// Its first frame.
    pub pfn: u64,
    /// log2 of its frames.
    pub order: u8,
    /// The mobility type of its pageblock.
    pub migratetype: u8,
}

/// A block in use when the recording begins, and freed in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UsedBlock {
    /// Its first frame.
    pub pfn: u64,
    /// log2 of its frames, as the row that frees it says.
    pub order: u8,
    /// The mobility type of its pageblock.
    pub migratetype: u8,
}

/// One populated zone when the recording begins. `free`, `in_use`, `unaccounted`, `reserved` and `held` are disjoint and
/// together cover the frames of `present`, all of them and no others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ZoneStart {
    /// The zone's NUMA node.
    pub node: u32,
    /// The zone's name: `DMA`, `DMA32`, `Normal`...
    pub name: String,
    /// Its first pfn.
    pub start_pfn: u64,
    /// Frames from its first to its last, holes included.
    pub spanned: u64,
    /// The frames that exist, as ascending pfn ranges.
    pub present: Vec<Range<u64>>,
    /// Frames the allocator was given, as recorded.
    pub managed: u64,
    /// Recorded watermark min, in frames.
    pub min: u64,
    /// Recorded watermark low, in frames.
    pub low: u64,
    /// Recorded watermark high, in frames.
    pub high: u64,
    /// Recorded watermark promo, in frames.
    pub promo: u64,
    /// Recorded watermark boost, in frames.
    pub boost: u64,
    /// Frames kept back from requests that could have used a higher zone, by that zone (`lowmem_reserve`).
    pub protection: Vec<u64>,
    /// The recorded per-CPU lists.
    pub pagesets: Vec<PageSet>,
    /// The free blocks, ascending by pfn. By order they number what `buddyinfo` says.
    pub free: Vec<FreeBlock>,
    /// The blocks in use that the recording frees, in the order of their frees.
    pub in_use: Vec<UsedBlock>,
    /// Frames first seen in an allocation and yet on no free list, ascending: per-CPU lists.
    pub unaccounted: Vec<u64>,
    /// Frames the allocator never had, as ascending pfn ranges; `present` less `managed` of them, unless the recording
    /// touches so many others that fewer are left.
    pub reserved: Vec<Range<u64>>,
    /// Frames in use throughout, as ascending pfn ranges.
    pub held: Vec<Range<u64>>,
    /// The mobility type of each pageblock with a frame in the zone, by the pageblock's first pfn (aligned, so that the
    /// first may lie below `start_pfn`), ascending.
    pub pageblock_types: Vec<(u64, u8)>,
}

impl ZoneStart {
    /// Free blocks by order.
    pub fn free_by_order(&self) -> Vec<u64> {
        let orders = self.free.iter().map(|block| usize::from(block.order) + 1).max().unwrap_or(0);
        let mut blocks = vec![0; orders];
        self.free.iter().for_each(|block| blocks[usize::from(block.order)] += 1);
        blocks
    }
}

/// The state of the page allocator when a recording begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StartState {
    /// log2 of a pageblock's frames.
    pub pageblock_order: u8,
    /// The largest order of a free block.
    pub max_order: u8,
    /// The names of the mobility types, by number.
    pub migratetypes: Vec<String>,
    /// The populated zones, by ascending first pfn.
    pub zones: Vec<ZoneStart>,
    /// Blocks the recording frees without having allocated them, at frames no zone has.
    pub strays: Vec<UsedBlock>,
}

impl StartState {
    /// Works out the start state from `buddyinfo`, `zoneinfo`, `pagetypeinfo` and `iomem` of the start
    /// (`X.traced_start` if there is one, else `start/X`) and the rows.
    ///
    /// # Errors
    /// One of the texts is missing or malformed, or they contradict each other or the rows so that no choice of free
    /// blocks matches `buddyinfo`; the error names the text and the zone and order.
    pub fn build(recording: &Recording) -> Result<StartState, TraceError> {
        let meta = &recording.meta;
        let (buddy_file, text) = start_file(meta, "buddyinfo")?;
        let buddyinfo = Buddyinfo::parse(text, &buddy_file)?;
        let (zone_file, text) = start_file(meta, "zoneinfo")?;
        let zoneinfo = Zoneinfo::parse(text, &zone_file)?;
        let (type_file, text) = start_file(meta, "pagetypeinfo")?;
        let pagetypeinfo = Pagetypeinfo::parse(text, &type_file)?;
        let (iomem_file, text) = start_file(meta, "iomem")?;
        let iomem = Iomem::parse(text, &iomem_file)?;

        let mut known: Vec<&Zone> = zoneinfo.zones.iter().filter(|zone| zone.spanned > 0).collect();
        known.sort_by_key(|zone| (zone.start_pfn, zone.node));
        let mut zones = Vec::new();
        for zone in &known {
            let frames = Frames::map(zone, &iomem, meta.page_shift)
                .map_err(|what| TraceError::file(&zone_file, what))?;
            zones.push(frames);
        }
        if let Some(lost) = buddyinfo
            .zones
            .iter()
            .find(|zone| !known.iter().any(|known| is(known, zone.node, &zone.zone)))
        {
            let what = format!(
                "zone {} of node {} is not among the zones of {zone_file}",
                lost.zone, lost.node
            );
            return Err(TraceError::file(&buddy_file, what));
        }

        let strays = touch(recording, &mut zones);
        let max_order = buddyinfo.zones.first().map_or(0, |zone| zone.blocks.len() - 1) as u8;
        let mut state = StartState {
            pageblock_order: pagetypeinfo.pageblock_order,
            max_order,
            migratetypes: pagetypeinfo.types.clone(),
            zones: Vec::new(),
            strays,
        };
        for (zone, mut frames) in known.into_iter().zip(zones) {
            let blocks = buddyinfo.zone(zone.node, &zone.name).map_or(&[][..], |zone| &zone.blocks);
            let chosen = choose::free_blocks(&mut frames, blocks).map_err(|short| {
                let what = format!("zone {} of node {}: {short}", zone.name, zone.node);
                TraceError::file(&buddy_file, what)
            })?;
            let types = mobility::pageblock_types(zone, &frames, &chosen, &pagetypeinfo);
            state.zones.push(finish(zone, frames, chosen, types, pagetypeinfo.pageblock_order));
        }
        Ok(state)
    }
}

fn is(zone: &Zone, node: u32, name: &str) -> bool {
    zone.node == node && zone.name == name
}

/// The text `name` of the recording's start, and the name it goes by.
fn start_file<'a>(meta: &'a Meta, name: &str) -> Result<(String, &'a str), TraceError> {
    let names = [format!("{name}.traced_start"), format!("start/{name}"), name.to_owned()];
    let found = names.into_iter().find_map(|name| meta.file(&name).map(|text| (name, text)));
    found.ok_or_else(|| {
        TraceError::file(
            &meta.name,
            format!("the recording has no {name} of its start: its start state is unknown"),
        )
    })
}

/// Marks every frame by the first event on it, and collects the blocks that were in use and are freed. Returns those of
/// them that lie in no zone.
fn touch(recording: &Recording, zones: &mut [Frames]) -> Vec<UsedBlock> {
    let mut strays = Vec::new();
    for event in recording.page_events() {
        let block =
            UsedBlock { pfn: event.pfn, order: event.order, migratetype: event.migratetype };
        let frees_prior =
            matches!(event.op, PageOp::FreePrior | PageOp::Migrate { from: None, .. });
        let was = if frees_prior || matches!(event.op, PageOp::Nonsense(_)) {
            Use::Prior
        } else {
            Use::Touched
        };
        let home = zones.iter_mut().find(|zone| zone.has_block(event.pfn, event.order));
        let Some(zone) = home else {
            if frees_prior {
                strays.push(block);
            }
            continue;
        };
        if zone.touch(event.pfn, event.order, was, event.migratetype) && frees_prior {
            zone.in_use.push(block);
        }
    }
    strays
}

/// Sorts the frames left over and puts a zone's state together.
fn finish(
    zone: &Zone,
    mut frames: Frames,
    chosen: Vec<(u64, u8)>,
    types: Vec<(u64, u8)>,
    order: u8,
) -> ZoneStart {
    let type_at = |pfn: u64| {
        let pageblock = pfn >> order << order;
        types.binary_search_by_key(&pageblock, |(pfn, _)| *pfn).map_or(0, |index| types[index].1)
    };
    let mut free: Vec<FreeBlock> = chosen
        .iter()
        .map(|(pfn, order)| FreeBlock { pfn: *pfn, order: *order, migratetype: type_at(*pfn) })
        .collect();
    free.sort_by_key(|block| block.pfn);
    let mut in_use = std::mem::take(&mut frames.in_use);
    in_use.iter_mut().for_each(|block| block.migratetype = type_at(block.pfn));
    let used = in_use.iter().map(|block| (block.pfn, block.order));
    used.for_each(|(pfn, order)| frames.set(pfn, order, Use::Released));
    frames.reserve(frames.present().saturating_sub(zone.managed));
    ZoneStart {
        node: zone.node,
        name: zone.name.clone(),
        start_pfn: zone.start_pfn,
        spanned: zone.spanned,
        present: frames.ranges(|usage| usage != Use::Absent),
        managed: zone.managed,
        min: zone.min,
        low: zone.low,
        high: zone.high,
        promo: zone.promo,
        boost: zone.boost,
        protection: zone.protection.clone(),
        pagesets: zone.pagesets.clone(),
        free,
        in_use,
        unaccounted: frames.ranges(|usage| usage == Use::Touched).into_iter().flatten().collect(),
        reserved: frames.ranges(|usage| usage == Use::Reserved),
        held: frames.ranges(|usage| matches!(usage, Use::Unknown | Use::Kernel | Use::Prior)),
        pageblock_types: types,
    }
}
