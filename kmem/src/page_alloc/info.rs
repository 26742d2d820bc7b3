//! What reports ask the page allocator: sums over zones, mobilities and uses \[T1, R5\].
//!
//! # Concepts
//! Counters that the allocator keeps anyway are read as they are. What it does not keep, because nothing
//! but a report needs it, is counted on demand: free blocks by mobility, frames set aside for CMA.
//!
//! # Implementation
//! A broken pageblock's descriptor counts its free blocks; a run of whole pageblocks counts under the
//! mobility of its first one. The cost is a few loads per pageblock of the zone.
//!
//! # Locking
//! An area's lock for one region at a time (up to 64 pageblocks), so that each region is counted as it was at
//! some moment. Single atomics otherwise.

use super::{PageAllocator, pcp::ListId, slow::Reclaim};
use crate::{
    context::Cpu,
    page::Page,
    page_state::{NodeStat, StatRow, SystemStat, ZoneStat},
    platform::Platform,
    types::{MIGRATE_TYPES, MigrateType, PAGEBLOCK_FRAMES, PAGEBLOCK_ORDER, ZoneType},
    vmstat::VmEvent,
    zone::Zone,
};
use core::array;

/// An item's sum over rows; one that is below zero for a moment counts as zero.
fn sum<'a, const N: usize>(rows: impl IntoIterator<Item = &'a StatRow<N>>, item: usize) -> u64 {
    rows.into_iter().map(|row| row.value(item)).sum::<i64>().max(0) as u64
}

impl<P: Platform, R: Reclaim> PageAllocator<P, R> {
    /// The running CPU's row, of one for each CPU and one for callers on none.
    #[inline]
    fn row_here(&self) -> usize {
        self.p.this_cpu().map_or(self.counters.len(), Cpu::id)
    }

    /// Counts `delta` frames more, or less, for an item of a node, on the caller's CPU. `false` if there is no such
    /// node.
    #[inline]
    pub fn mod_node_page_state(&self, node: usize, item: NodeStat, delta: i64) -> bool {
        let row = (node < self.nr_stat_nodes)
            .then(|| self.node_stats.get(self.row_here() * self.nr_stat_nodes + node))
            .flatten();
        row.map(|row| row.add(item as usize, delta)).is_some()
    }

    /// An item of a node; 0 if there is no such node. What CPUs change meanwhile may be in it or not.
    pub fn node_page_state(&self, node: usize, item: NodeStat) -> u64 {
        if node >= self.nr_stat_nodes {
            return 0;
        }
        sum(self.node_stats.iter().skip(node).step_by(self.nr_stat_nodes), item as usize)
    }

    /// An item summed over all nodes.
    pub fn global_node_page_state(&self, item: NodeStat) -> u64 {
        (0..self.nr_stat_nodes).map(|node| self.node_page_state(node, item)).sum()
    }

    /// Counts `delta` frames more, or less, for an item of a zone. `false` for a zone of another machine.
    pub fn mod_zone_page_state(&self, zone: &Zone, item: ZoneStat, delta: i64) -> bool {
        let row = self.zone_stats.get(zone.slot);
        row.map(|row| row.add(item as usize, delta)).is_some()
    }

    /// An item of a zone.
    pub fn zone_page_state(&self, zone: &Zone, item: ZoneStat) -> u64 {
        self.zone_stats.get(zone.slot).map_or(0, |row| row.get(item as usize))
    }

    /// An item summed over all zones.
    pub fn global_zone_page_state(&self, item: ZoneStat) -> u64 {
        self.zone_stats.iter().map(|row| row.get(item as usize)).sum()
    }

    /// Counts `delta` frames more, or less, for an item of the machine, on the caller's CPU.
    #[inline]
    pub fn mod_system_state(&self, item: SystemStat, delta: i64) {
        if let Some(row) = self.system_stats.get(self.row_here()) {
            row.add(item as usize, delta);
        }
    }

    /// An item of the machine.
    pub fn system_state(&self, item: SystemStat) -> u64 {
        sum(self.system_stats, item as usize)
    }

    /// Counts an event of a zone that is named `numa_*`, on the caller's CPU.
    pub(super) fn count_zone_numa(&self, zone: &Zone, event: VmEvent) {
        let row = self.numa.get(self.row_here() * self.zones.len() + zone.slot);
        if let (Some(row), Some(i)) = (row, event.numa_index()) {
            row.add(i, 1);
        }
    }

    /// A zone's count of an event that is counted by zone (`numa_*`); 0 for any other event.
    ///
    /// Requests that took the fast path are not counted one by one: they had the zone they preferred,
    /// and whether that is local follows from the CPU.
    pub fn zone_numa_event(&self, zone: &Zone, event: VmEvent) -> u64 {
        let rows = self.numa.iter().skip(zone.slot).step_by(self.zones.len());
        let counted: u64 = event.numa_index().map_or(0, |i| rows.map(|row| row.get(i)).sum());
        let plain = (0..self.p.nr_cpu_ids()).filter_map(|id| {
            let local = self.p.cpu(id)?.node() == zone.node();
            let wanted = match event {
                VmEvent::NumaHit => true,
                VmEvent::NumaLocal => local,
                VmEvent::NumaOther => !local,
                _ => false,
            };
            Some(self.pcp_of(id, zone.slot).filter(|_| wanted)?.plain_allocs())
        });
        counted + plain.sum::<u64>()
    }

    /// The kinds of zone that the machine knows, lowest first: those its layout lists, and Normal and
    /// Movable, which every machine has, if only empty.
    pub fn zone_types(&self) -> impl Iterator<Item = ZoneType> + '_ {
        ZoneType::ALL.into_iter().filter(|z| {
            matches!(z, ZoneType::Normal | ZoneType::Movable)
                || self.lists.served_by(*z as usize) == *z as usize
        })
    }

    /// A node's zone of a kind; `None` if no memory fell into it.
    pub fn zone_of(&self, node: usize, kind: ZoneType) -> Option<&Zone> {
        self.zones.iter().find(|z| z.node() == node && z.zone_type() == kind)
    }

    /// Frames that the lists of a CPU in a zone may hold now, all orders and mobilities together.
    pub fn pcp_high(&self, zone: &Zone, cpu: usize) -> u64 {
        self.pcp_of(cpu, zone.slot).map_or(0, |pcp| {
            ListId::all().map(|list| u64::from(pcp.high(list)) << list.order()).sum()
        })
    }

    /// First frames of the pageblocks that belong to a zone.
    fn pageblocks_of(&self, zone: &Zone) -> impl Iterator<Item = u32> + '_ {
        let (span, slot) = (zone.spanned(), zone.slot);
        (span.start & !(PAGEBLOCK_FRAMES - 1)..span.end)
            .step_by(PAGEBLOCK_FRAMES as usize)
            .filter(move |pfn| self.map.flags_of(*pfn).zone_slot() == Some(slot))
    }

    /// Pageblocks of a zone by mobility (`/proc/pagetypeinfo`).
    pub fn pageblocks_by_migratetype(&self, zone: &Zone) -> [u64; MIGRATE_TYPES] {
        let mut sum = [0; MIGRATE_TYPES];
        for pfn in self.pageblocks_of(zone) {
            sum[self.map.flags_of(pfn).migratetype() as usize] += 1;
        }
        sum
    }

    /// Maximal free blocks of a zone by order, from order 0 to [`max_order`](Self::max_order) (`/proc/buddyinfo`). Looks
    /// at every pageblock of the zone, as [`free_by_migratetype`](Self::free_by_migratetype) does: those of a TiB take
    /// a millisecond or two.
    pub fn nr_free(&self, zone: &Zone) -> [u64; 16] {
        let by_mobility = self.free_by_migratetype(zone);
        array::from_fn(|order| by_mobility.iter().map(|blocks| blocks[order]).sum())
    }

    /// Maximal free blocks of a zone by mobility and order (`/proc/pagetypeinfo`).
    pub fn free_by_migratetype(&self, zone: &Zone) -> [[u64; 16]; MIGRATE_TYPES] {
        let blocks = 1 << zone.region_shift();
        let shift = PAGEBLOCK_ORDER + zone.region_shift();
        let mut sum = [[0; 16]; MIGRATE_TYPES];
        let largest = 1 << (self.max_order - PAGEBLOCK_ORDER);
        let base = zone.start_pfn() >> shift;
        for (region, n) in zone.regions().iter().zip(base..) {
            let start = n << shift;
            zone.with_area(&self.p, &self.map, zone.area_of(start), |_| {
                let whole = region.whole();
                let mut at = 0;
                while at < blocks {
                    let flags = self.map.flags_of(start + (at << PAGEBLOCK_ORDER));
                    let run = whole_run(whole, at, largest);
                    let counts = &mut sum[flags.migratetype() as usize];
                    if run > 0 {
                        counts[(PAGEBLOCK_ORDER + run.ilog2()) as usize] += 1;
                    } else if flags.zone_slot() == Some(zone.slot)
                        && let Some(i) = self.map.block_index(start + (at << PAGEBLOCK_ORDER))
                    {
                        let block = self.map.blocks[i].word();
                        for order in 0..=PAGEBLOCK_ORDER {
                            counts[order as usize] += u64::from(block.count(order));
                        }
                    }
                    at += run.max(1);
                }
            });
        }
        sum
    }

    /// Frames of a zone in pageblocks lent to movable allocations (CMA), and how many of them are free.
    pub fn cma_frames(&self, zone: &Zone) -> (u64, u64) {
        let (mut frames, mut free) = (0, 0);
        for pfn in self.pageblocks_of(zone) {
            // Pageblocks that do not mix never become whole, so the descriptor has all that is free.
            if self.map.flags_of(pfn).migratetype() == MigrateType::Cma
                && let Some(i) = self.map.block_index(pfn)
            {
                frames += u64::from(PAGEBLOCK_FRAMES);
                free += u64::from(self.map.blocks[i].word().frames());
            }
        }
        (frames, free)
    }

    /// Frames' worth of memory map that the machine was brought up with.
    pub fn memmap_boot_pages(&self) -> u64 {
        let blocks: u64 = self.zones.iter().map(|z| self.pageblocks_of(z).count() as u64).sum();
        let bytes = blocks * u64::from(PAGEBLOCK_FRAMES) * size_of::<Page>() as u64;
        bytes.div_ceil(1 << P::PAGE_SHIFT)
    }

    /// Frames that requests from user space cannot count on (`totalreserve_pages`): of each zone the high
    /// watermark and the largest reserve against requests from above.
    pub fn totalreserve_pages(&self) -> u64 {
        self.zones
            .iter()
            .map(|zone| {
                let above = ZoneType::ALL.into_iter().filter(|kind| *kind >= zone.zone_type());
                let reserve = above.map(|kind| zone.lowmem_reserve(kind)).max().unwrap_or(0);
                (reserve + zone.high_mark()).min(zone.managed_frames())
            })
            .sum()
    }

    /// Frames that could be had without swapping (`si_mem_available`): what is free beyond the reserves,
    /// and of the page cache and of reclaimable kernel memory what does not hurt, at least half.
    pub fn si_mem_available(&self) -> u64 {
        let low: u64 = self.zones.iter().map(|zone| zone.watermarks().low).sum();
        let can_go = |items: [NodeStat; 2]| {
            let frames: u64 = items.into_iter().map(|i| self.global_node_page_state(i)).sum();
            frames - (frames / 2).min(low)
        };
        let caches = can_go([NodeStat::ActiveFile, NodeStat::InactiveFile])
            + can_go([NodeStat::SlabReclaimable, NodeStat::KernelMiscReclaimable]);
        (self.nr_free_pages() + caches).saturating_sub(self.totalreserve_pages())
    }
}

/// Pageblocks in the maximal aligned run of whole ones that starts at bit `at`, at most `largest`; 0 if
/// that one is not whole. `at` is not inside a run that starts before it.
fn whole_run(whole: u64, at: u32, largest: u32) -> u32 {
    let all = |n: u32| {
        let mask = if n >= u64::BITS { u64::MAX } else { (1 << n) - 1 };
        whole >> at & mask == mask
    };
    if !all(1) {
        return 0;
    }
    let mut n = 1;
    while n < largest && at.is_multiple_of(2 * n) && all(2 * n) {
        n *= 2;
    }
    n
}
