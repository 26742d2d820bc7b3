//! `page_owner`: who holds each block of pages.
//!
//! # Concepts
//! One paragraph for each block that is held and whose owner is known, by ascending frames, as the kernel's
//! `page_owner_sort` reads it: how and by whom it was allocated, what frame it is, where it was asked for. The compiler
//! tells a caller's file, line and column, which stand in the place of the kernel's stack; and there are no threads of a
//! process, so a task's `tgid` is its `pid`.
//!
//! Flags of a page are numbered as on a 64-bit machine. Linux 6.12 has none for slabs any more; the name is shown
//! here, since it is what `page_owner_sort` knows them by.
//!
//! # Locking
//! None.

use crate::{
    page::PageFlags,
    page_alloc::{PageAllocator, PageOwner, Reclaim},
    platform::Platform,
    types::PAGEBLOCK_ORDER,
};
use core::fmt::{self, Write};

/// Names of flags in the kernel's order, with their numbers there.
const FLAGS: &[(&str, PageFlags, Option<u32>)] = &[
    ("locked", PageFlags::LOCKED, Some(0)),
    ("waiters", PageFlags::WAITERS, Some(7)),
    ("referenced", PageFlags::REFERENCED, Some(2)),
    ("uptodate", PageFlags::UPTODATE, Some(3)),
    ("dirty", PageFlags::DIRTY, Some(4)),
    ("lru", PageFlags::LRU, Some(5)),
    ("active", PageFlags::ACTIVE, Some(8)),
    ("workingset", PageFlags::WORKINGSET, Some(9)),
    ("slab", PageFlags::SLAB, None),
    ("owner_priv_1", PageFlags::OWNER_PRIV_1.union(PageFlags::SWAPCACHE), Some(10)),
    ("owner_2", PageFlags::MAPPEDTODISK, Some(11)),
    ("reserved", PageFlags::RESERVED, Some(13)),
    ("private", PageFlags::PRIVATE, Some(14)),
    ("private_2", PageFlags::PRIVATE_2, Some(15)),
    ("writeback", PageFlags::WRITEBACK, Some(1)),
    ("head", PageFlags::HEAD, Some(6)),
    ("reclaim", PageFlags::RECLAIM, Some(16)),
    ("swapbacked", PageFlags::SWAPBACKED, Some(17)),
    ("unevictable", PageFlags::UNEVICTABLE, Some(18)),
    ("mlocked", PageFlags::MLOCKED, Some(19)),
    ("hwpoison", PageFlags::HWPOISON, Some(20)),
    ("idle", PageFlags::IDLE, Some(22)),
    ("young", PageFlags::YOUNG, Some(21)),
];

/// Where zone and node are in the kernel's word of flags.
const ZONE_AT: u32 = 51;
const NODE_AT: u32 = 54;

impl<P: Platform, R: Reclaim> PageAllocator<P, R> {
    /// Writes the text of `page_owner` \[T1, D2\]; nothing while owners are not noted.
    ///
    /// # Errors
    /// The writer's.
    ///
    /// See [page owner](https://docs.kernel.org/mm/page_owner.html).
    pub fn write_page_owner(&self, w: &mut dyn Write) -> fmt::Result {
        let mut result = Ok(());
        self.each_page_owner(|owner| {
            if result.is_ok() {
                result = self.write_owner(w, owner);
            }
        });
        result
    }

    fn write_owner(&self, w: &mut dyn Write, owner: &PageOwner) -> fmt::Result {
        let PageOwner { pfn, order, gfp, pid, comm, allocated_ns, .. } = *owner;
        write!(w, "Page allocated via order {order}, mask {:#x}({gfp}), ", gfp.to_linux())?;
        write!(w, "pid {pid}, tgid {pid} (")?;
        match (pid, owner.cpu) {
            // The kernel's task number 0 has a name.
            (0, Some(cpu)) if comm.as_str().is_empty() => write!(w, "swapper/{cpu}")?,
            _ => write!(w, "{comm}")?,
        }
        writeln!(w, "), ts {allocated_ns} ns")?;
        let of_block = self.pageblock_migratetype(pfn).map_or("?", |mt| mt.name());
        let (of_request, block) = (gfp.migratetype().name(), pfn.0 >> PAGEBLOCK_ORDER);
        write!(w, "PFN {:#x} type {of_request} Block {block} type {of_block} Flags ", pfn.0)?;
        let flags = self.pfn_to_page(pfn).map_or(PageFlags::empty(), |page| page.flags());
        let zone = self.page_zone(pfn);
        let (zone, node) = zone.map_or((0, 0), |zone| (zone.zone_type() as u64, zone.node()));
        let set = || FLAGS.iter().filter(|(_, flag, _)| flags.intersects(*flag));
        let bits = set().filter_map(|(.., bit)| *bit).fold(0, |bits, bit| bits | 1u64 << bit);
        write!(w, "{:#x}(", bits | zone << ZONE_AT | (node as u64) << NODE_AT)?;
        set().try_for_each(|(name, ..)| write!(w, "{name}|"))?;
        writeln!(w, "node={node}|zone={zone})")?;
        match owner.allocated_at {
            Some(at) => writeln!(w, " {}:{}:{}\n", at.file(), at.line(), at.column()),
            None => w.write_str(" ?\n\n"),
        }
    }
}
