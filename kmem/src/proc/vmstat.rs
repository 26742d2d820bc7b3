//! `/proc/vmstat`: every counter, one per line.
//!
//! # Concepts
//! First what is, summed over zones and nodes; then what happened since bring-up, in Linux's order; last, after
//! Linux's last line, the events that only this allocator counts.
//!
//! # Implementation
//! An event is found by its name. So an event that is counted under a name of Linux's has its place without
//! further ado, one that nobody counts has not happened, and one that Linux does not know goes to the end.
//!
//! # Locking
//! None: single atomics.

use super::NUMA_EVENTS;
use crate::{
    page_alloc::{PageAllocator, Reclaim},
    page_state::SystemStat,
    platform::Platform,
    types::ZoneType,
    vmstat::VmEvent,
};
use core::fmt::{self, Write};

/// Lines about events.
enum Line {
    /// One line of this name.
    Event(&'static str),
    /// A line for each kind of zone: this name, an underscore, and the kind.
    Zones(&'static str),
}
use Line::{Event, Zones};

/// Linux's events in their order.
const EVENTS: &[Line] = &[
    Event("pgpgin"),
    Event("pgpgout"),
    Event("pswpin"),
    Event("pswpout"),
    Zones("pgalloc"),
    Zones("allocstall"),
    Zones("pgskip"),
    Event("pgfree"),
    Event("pgactivate"),
    Event("pgdeactivate"),
    Event("pglazyfree"),
    Event("pgfault"),
    Event("pgmajfault"),
    Event("pglazyfreed"),
    Event("pgrefill"),
    Event("pgreuse"),
    Event("pgsteal_kswapd"),
    Event("pgsteal_direct"),
    Event("pgsteal_khugepaged"),
    Event("pgscan_kswapd"),
    Event("pgscan_direct"),
    Event("pgscan_khugepaged"),
    Event("pgscan_direct_throttle"),
    Event("pgscan_anon"),
    Event("pgscan_file"),
    Event("pgsteal_anon"),
    Event("pgsteal_file"),
    Event("zone_reclaim_success"),
    Event("zone_reclaim_failed"),
    Event("pginodesteal"),
    Event("slabs_scanned"),
    Event("kswapd_inodesteal"),
    Event("kswapd_low_wmark_hit_quickly"),
    Event("kswapd_high_wmark_hit_quickly"),
    Event("pageoutrun"),
    Event("pgrotated"),
    Event("drop_pagecache"),
    Event("drop_slab"),
    Event("oom_kill"),
    Event("numa_pte_updates"),
    Event("numa_huge_pte_updates"),
    Event("numa_hint_faults"),
    Event("numa_hint_faults_local"),
    Event("numa_pages_migrated"),
    Event("pgmigrate_success"),
    Event("pgmigrate_fail"),
    Event("thp_migration_success"),
    Event("thp_migration_fail"),
    Event("thp_migration_split"),
    Event("compact_migrate_scanned"),
    Event("compact_free_scanned"),
    Event("compact_isolated"),
    Event("compact_stall"),
    Event("compact_fail"),
    Event("compact_success"),
    Event("compact_daemon_wake"),
    Event("compact_daemon_migrate_scanned"),
    Event("compact_daemon_free_scanned"),
    Event("htlb_buddy_alloc_success"),
    Event("htlb_buddy_alloc_fail"),
    Event("cma_alloc_success"),
    Event("cma_alloc_fail"),
    Event("unevictable_pgs_culled"),
    Event("unevictable_pgs_scanned"),
    Event("unevictable_pgs_rescued"),
    Event("unevictable_pgs_mlocked"),
    Event("unevictable_pgs_munlocked"),
    Event("unevictable_pgs_cleared"),
    Event("unevictable_pgs_stranded"),
    Event("thp_fault_alloc"),
    Event("thp_fault_fallback"),
    Event("thp_fault_fallback_charge"),
    Event("thp_collapse_alloc"),
    Event("thp_collapse_alloc_failed"),
    Event("thp_file_alloc"),
    Event("thp_file_fallback"),
    Event("thp_file_fallback_charge"),
    Event("thp_file_mapped"),
    Event("thp_split_page"),
    Event("thp_split_page_failed"),
    Event("thp_deferred_split_page"),
    Event("thp_underused_split_page"),
    Event("thp_split_pmd"),
    Event("thp_scan_exceed_none_pte"),
    Event("thp_scan_exceed_swap_pte"),
    Event("thp_scan_exceed_share_pte"),
    Event("thp_split_pud"),
    Event("thp_zero_page_alloc"),
    Event("thp_zero_page_alloc_failed"),
    Event("thp_swpout"),
    Event("thp_swpout_fallback"),
    Event("balloon_inflate"),
    Event("balloon_deflate"),
    Event("balloon_migrate"),
    Event("swap_ra"),
    Event("swap_ra_hit"),
    Event("swpin_zero"),
    Event("swpout_zero"),
    Event("ksm_swpin_copy"),
    Event("cow_ksm"),
    Event("zswpin"),
    Event("zswpout"),
    Event("zswpwb"),
    Event("direct_map_level2_splits"),
    Event("direct_map_level3_splits"),
];

/// A kind of zone in the names of events.
const fn suffix(kind: ZoneType) -> &'static str {
    match kind {
        ZoneType::Dma => "dma",
        ZoneType::Dma32 => "dma32",
        ZoneType::Normal => "normal",
        ZoneType::HighMem => "high",
        ZoneType::Movable => "movable",
        ZoneType::Device => "device",
    }
}

/// Whether `name` is `prefix` and a kind of zone.
fn is_of_zone(name: &str, prefix: &str, kind: ZoneType) -> bool {
    name.strip_prefix(prefix).and_then(|rest| rest.strip_prefix('_')) == Some(suffix(kind))
}

/// Whether Linux has a line of this name, on this machine or another.
fn is_linux(name: &str) -> bool {
    NUMA_EVENTS.iter().any(|event| event.name() == name)
        || EVENTS.iter().any(|line| match line {
            Event(event) => *event == name,
            Zones(prefix) => ZoneType::ALL.iter().any(|kind| is_of_zone(name, prefix, *kind)),
        })
}

impl<P: Platform, R: Reclaim> PageAllocator<P, R> {
    /// Writes the text of `/proc/vmstat` \[T1, R5\].
    ///
    /// # Errors
    /// The writer's.
    pub fn write_vmstat(&self, w: &mut dyn Write) -> fmt::Result {
        let mut sum = [("", 0); super::NR_ZONE_ITEMS];
        for zone in self.zones() {
            for (total, (name, n)) in sum.iter_mut().zip(self.zone_items(zone)) {
                *total = (name, total.1 + n);
            }
        }
        let numa = NUMA_EVENTS.map(|event| (event.name(), self.vm_event(event)));
        let nodes = Self::node_items(|stat| self.global_node_page_state(stat));
        for (name, n) in sum.into_iter().chain(numa).chain(nodes) {
            writeln!(w, "{name} {n}")?;
        }
        for item in
            [SystemStat::DirtyThreshold, SystemStat::DirtyBackgroundThreshold, SystemStat::Memmap]
        {
            writeln!(w, "{} {}", item.name(), self.system_state(item))?;
        }
        writeln!(w, "nr_memmap_boot_pages {}", self.memmap_boot_pages())?;
        for line in EVENTS {
            match line {
                Event(name) => {
                    writeln!(w, "{name} {}", self.count_of(|event| event == *name))?;
                }
                Zones(prefix) => {
                    for kind in self.zone_types() {
                        let n = self.count_of(|event| is_of_zone(event, prefix, kind));
                        writeln!(w, "{prefix}_{} {n}", suffix(kind))?;
                    }
                }
            }
        }
        writeln!(w, "nr_unstable 0")?;
        for event in VmEvent::ALL.into_iter().filter(|event| !is_linux(event.name())) {
            writeln!(w, "{} {}", event.name(), self.vm_event(event))?;
        }
        Ok(())
    }

    /// The machine's count of the event of a name; 0 if there is none.
    fn count_of(&self, is_name: impl Fn(&str) -> bool) -> u64 {
        let event = VmEvent::ALL.into_iter().find(|event| is_name(event.name()));
        event.map_or(0, |event| self.vm_event(event))
    }
}
