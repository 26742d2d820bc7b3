//! The machine as the texts of Linux's `/proc` \[T1, R5\].
//!
//! # Concepts
//! `allocinfo`, `buddyinfo`, `zoneinfo`, `page_owner`, `pagetypeinfo`, `slabinfo`, `vmallocinfo`, `meminfo` and
//! `vmstat`, each to any [`core::fmt::Write`], in the form
//! of Linux 6.12 on a 64-bit machine with NUMA, CMA and huge pages: the same lines in the same order with the
//! same white space, so that what reads Linux's files reads these. Zones that the machine's layout does not
//! know have no lines, as in a kernel built without them.
//!
//! Every number is the machine's at that moment. Lines about things that nobody has counted on this
//! machine (see [`page_state`](crate::page_state)) show zero. Two kinds of lines are missing: those that
//! an architecture adds about its page tables (`DirectMap4k`), since page tables are the platform's; and
//! those of subsystems that Linux leaves out too when they are not configured.
//!
//! # Implementation
//! One file per text. Items of zones and nodes are lists of name and number, since `zoneinfo` shows them
//! one by one and `vmstat` summed up. Nothing is allocated; a text is made line by line.
//!
//! # Locking
//! None held across a line: lines are each right for some moment, not all for the same.
//!
//! See [`/proc`](https://docs.kernel.org/filesystems/proc.html).

mod allocinfo;
mod buddyinfo;
mod meminfo;
mod page_owner;
mod pagetypeinfo;
mod slabinfo;
mod vmallocinfo;
mod vmstat;
mod zoneinfo;

use crate::{
    page_alloc::{PageAllocator, Reclaim},
    page_state::{NR_NODE_STATS, NR_ZONE_STATS, NodeStat, ZoneStat},
    platform::Platform,
    types::PAGEBLOCK_FRAMES,
    vmstat::VmEvent,
    zone::Zone,
};

/// A line's name and number.
type Item = (&'static str, u64);

/// Items of a zone: those that are counted, free frames, and free CMA frames.
const NR_ZONE_ITEMS: usize = NR_ZONE_STATS + 2;

/// Events that are counted by zone, in the kernel's order.
const NUMA_EVENTS: [VmEvent; 6] = [
    VmEvent::NumaHit,
    VmEvent::NumaMiss,
    VmEvent::NumaForeign,
    VmEvent::NumaInterleave,
    VmEvent::NumaLocal,
    VmEvent::NumaOther,
];

impl<P: Platform, R: Reclaim> PageAllocator<P, R> {
    /// Items of one zone, in the kernel's order.
    fn zone_items(&self, zone: &Zone) -> [Item; NR_ZONE_ITEMS] {
        let mut items = [("nr_free_pages", zone.free_frames()); NR_ZONE_ITEMS];
        let mut at = 1;
        for stat in ZoneStat::ALL {
            if stat == ZoneStat::Unaccepted {
                items[at] = ("nr_free_cma", self.cma_frames(zone).1);
                at += 1;
            }
            items[at] = (stat.name(), self.zone_page_state(zone, stat));
            at += 1;
        }
        items
    }

    /// Items of nodes, in the kernel's order; `count` gives each one's frames.
    fn node_items(count: impl Fn(NodeStat) -> u64) -> [Item; NR_NODE_STATS] {
        NodeStat::ALL.map(|stat| {
            let frames = count(stat);
            let huge = u64::from(PAGEBLOCK_FRAMES);
            (stat.name(), if stat.in_huge_pages() { frames / huge } else { frames })
        })
    }
}
