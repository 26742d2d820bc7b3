//! `/proc/zoneinfo`: everything about each zone, and per-CPU lists.
//!
//! # Concepts
//! Each node's zones, lowest first, the empty ones with their head only. The node's own items come with
//! its first populated zone.
//!
//! # Implementation
//! `count` and `high` of a CPU are sums over all its lists in the zone, in frames; `batch` is that
//! of single frames. The `vm stats threshold`, in Linux how far a CPU's share of a counter may be behind the sum, is
//! zero: free frames are counted in one place.
//!
//! # Locking
//! None: single atomics.

use super::NUMA_EVENTS;
use crate::{
    context::Cpu,
    page_alloc::{PageAllocator, Reclaim},
    platform::Platform,
    zone::Zone,
};
use core::fmt::{self, Write};

/// Head of a zone's lines, as far as the marks.
struct Head {
    free: u64,
    min: u64,
    low: u64,
    high: u64,
    promo: u64,
    spanned: u64,
    present: u64,
    managed: u64,
    cma: u64,
}

impl<P: Platform, R: Reclaim> PageAllocator<P, R> {
    /// Writes the text of `/proc/zoneinfo` \[T1, Z2\].
    ///
    /// # Errors
    /// The writer's.
    pub fn write_zoneinfo(&self, w: &mut dyn Write) -> fmt::Result {
        for node in 0..self.nr_nodes() {
            let mut first = true;
            for kind in self.zone_types() {
                let zone = self.zone_of(node, kind);
                write!(w, "Node {node}, zone {:>8}", kind.name())?;
                if zone.is_some() && first {
                    first = false;
                    self.write_node_items(w, node)?;
                }
                self.write_zone_head(w, zone)?;
                if let Some(zone) = zone {
                    self.write_zone_body(w, zone)?;
                }
                writeln!(w)?;
            }
        }
        Ok(())
    }

    fn write_node_items(&self, w: &mut dyn Write, node: usize) -> fmt::Result {
        write!(w, "\n  per-node stats")?;
        for (name, n) in Self::node_items(|stat| self.node_page_state(node, stat)) {
            write!(w, "\n      {name:<12} {n}")?;
        }
        Ok(())
    }

    fn head(&self, zone: &Zone) -> Head {
        let marks = zone.watermarks();
        Head {
            free: zone.free_frames(),
            min: marks.min,
            low: marks.low,
            high: marks.high,
            promo: marks.promo,
            spanned: zone.spanned().len().into(),
            present: zone.present_frames(),
            managed: zone.managed_frames(),
            cma: self.cma_frames(zone).0,
        }
    }

    fn write_zone_head(&self, w: &mut dyn Write, zone: Option<&Zone>) -> fmt::Result {
        let h = zone.map_or(Head::EMPTY, |zone| self.head(zone));
        write!(w, "\n  pages free     {}", h.free)?;
        // Marks are never boosted.
        write!(w, "\n        boost    0")?;
        write!(w, "\n        min      {}", h.min)?;
        write!(w, "\n        low      {}", h.low)?;
        write!(w, "\n        high     {}", h.high)?;
        write!(w, "\n        promo    {}", h.promo)?;
        write!(w, "\n        spanned  {}", h.spanned)?;
        write!(w, "\n        present  {}", h.present)?;
        write!(w, "\n        managed  {}", h.managed)?;
        write!(w, "\n        cma      {}", h.cma)?;
        write!(w, "\n        protection: (")?;
        for (i, kind) in self.zone_types().enumerate() {
            let reserve = zone.map_or(0, |zone| zone.lowmem_reserve(kind));
            write!(w, "{}{reserve}", if i == 0 { "" } else { ", " })?;
        }
        write!(w, ")")
    }

    fn write_zone_body(&self, w: &mut dyn Write, zone: &Zone) -> fmt::Result {
        for (name, n) in self.zone_items(zone) {
            write!(w, "\n      {name:<12} {n}")?;
        }
        for event in NUMA_EVENTS {
            write!(w, "\n      {:<12} {}", event.name(), self.zone_numa_event(zone, event))?;
        }
        write!(w, "\n  pagesets")?;
        for (cpu, count) in self.pcp_frames(zone).enumerate() {
            if !self.platform().cpu(cpu).is_some_and(Cpu::online) {
                continue;
            }
            write!(w, "\n    cpu: {cpu}")?;
            write!(w, "\n              count: {count}")?;
            write!(w, "\n              high:  {}", self.pcp_high(zone, cpu))?;
            write!(w, "\n              batch: {}", self.pcp_limits(zone, cpu).0)?;
            write!(w, "\n  vm stats threshold: 0")?;
        }
        let unreclaimable = u8::from(self.reclaim().unreclaimable(zone.node()));
        write!(w, "\n  node_unreclaimable:  {unreclaimable}")?;
        write!(w, "\n  start_pfn:           {}", zone.start_pfn())
    }
}

impl Head {
    /// Of a zone that no memory fell into.
    const EMPTY: Head = Head {
        free: 0,
        min: 0,
        low: 0,
        high: 0,
        promo: 0,
        spanned: 0,
        present: 0,
        managed: 0,
        cma: 0,
    };
}
