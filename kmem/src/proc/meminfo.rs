//! `/proc/meminfo`: what memory is used for, in kB.
//!
//! # Concepts
//! Sums over all zones and nodes, related to each other as Linux relates them: `Cached` is the page cache without
//! buffers and swap cache, `Active` both kinds of active frames, `Slab` both kinds of slabs.
//!
//! # Implementation
//! `Hugepagesize` is a pageblock, the unit in which the allocator keeps memory whole; a pool of huge pages
//! does not exist, and Linux itself has nothing left to say about `NFS_Unstable` and `VmallocChunk`.
//!
//! # Locking
//! None: single atomics.

use crate::{
    page_alloc::{PageAllocator, Reclaim},
    page_state::{NodeStat, SystemStat, ZoneStat},
    platform::Platform,
    types::{PAGEBLOCK_FRAMES, ZoneType},
    zone::Zone,
};
use core::fmt::{self, Write};

/// Lines of frames, written in kB.
struct Lines<'w> {
    w: &'w mut dyn Write,
    page_shift: u32,
}

impl Lines<'_> {
    fn frames(&mut self, label: &str, frames: u64) -> fmt::Result {
        self.kbytes(label, frames << (self.page_shift - 10))
    }

    fn kbytes(&mut self, label: &str, kbytes: u64) -> fmt::Result {
        writeln!(self.w, "{label:<16}{kbytes:8} kB")
    }
}

impl<P: Platform, R: Reclaim> PageAllocator<P, R> {
    /// Writes the text of `/proc/meminfo` \[T1\].
    ///
    /// # Errors
    /// The writer's.
    pub fn write_meminfo(&self, w: &mut dyn Write) -> fmt::Result {
        let mut l = Lines { w, page_shift: P::PAGE_SHIFT };
        self.write_overview(&mut l)?;
        self.write_uses(&mut l)?;
        self.write_kernel_uses(&mut l)?;
        self.write_huge(&mut l)
    }

    fn write_overview(&self, l: &mut Lines<'_>) -> fmt::Result {
        let node = |item| self.global_node_page_state(item);
        let system = |item| self.system_state(item);
        let (buffers, swapcache) = (system(SystemStat::Buffers), node(NodeStat::Swapcache));
        l.frames("MemTotal:", self.totalram_pages())?;
        l.frames("MemFree:", self.nr_free_pages())?;
        l.frames("MemAvailable:", self.si_mem_available())?;
        l.frames("Buffers:", buffers)?;
        l.frames("Cached:", node(NodeStat::FilePages).saturating_sub(buffers + swapcache))?;
        l.frames("SwapCached:", swapcache)?;
        let [active_anon, active_file] = [NodeStat::ActiveAnon, NodeStat::ActiveFile].map(node);
        let [inactive_anon, inactive_file] =
            [NodeStat::InactiveAnon, NodeStat::InactiveFile].map(node);
        l.frames("Active:", active_anon + active_file)?;
        l.frames("Inactive:", inactive_anon + inactive_file)?;
        l.frames("Active(anon):", active_anon)?;
        l.frames("Inactive(anon):", inactive_anon)?;
        l.frames("Active(file):", active_file)?;
        l.frames("Inactive(file):", inactive_file)?;
        l.frames("Unevictable:", node(NodeStat::Unevictable))?;
        l.frames("Mlocked:", self.global_zone_page_state(ZoneStat::Mlock))?;
        if self.zone_types().any(|kind| kind == ZoneType::HighMem) {
            let high = || self.zones().iter().filter(|z| z.zone_type() == ZoneType::HighMem);
            let total: u64 = high().map(Zone::managed_frames).sum();
            let free: u64 = high().map(Zone::free_frames).sum();
            l.frames("HighTotal:", total)?;
            l.frames("HighFree:", free)?;
            l.frames("LowTotal:", self.totalram_pages() - total)?;
            l.frames("LowFree:", self.nr_free_pages().saturating_sub(free))?;
        }
        l.frames("SwapTotal:", system(SystemStat::SwapTotal))?;
        l.frames("SwapFree:", system(SystemStat::SwapFree))?;
        l.frames("Zswap:", system(SystemStat::Zswap))?;
        l.frames("Zswapped:", system(SystemStat::Zswapped))
    }

    fn write_uses(&self, l: &mut Lines<'_>) -> fmt::Result {
        let node = |item| self.global_node_page_state(item);
        l.frames("Dirty:", node(NodeStat::FileDirty))?;
        l.frames("Writeback:", node(NodeStat::Writeback))?;
        l.frames("AnonPages:", node(NodeStat::AnonMapped))?;
        l.frames("Mapped:", node(NodeStat::FileMapped))?;
        l.frames("Shmem:", node(NodeStat::Shmem))?;
        let (reclaimable, unreclaimable) =
            (node(NodeStat::SlabReclaimable), node(NodeStat::SlabUnreclaimable));
        l.frames("KReclaimable:", reclaimable + node(NodeStat::KernelMiscReclaimable))?;
        l.frames("Slab:", reclaimable + unreclaimable)?;
        l.frames("SReclaimable:", reclaimable)?;
        l.frames("SUnreclaim:", unreclaimable)?;
        l.kbytes("KernelStack:", node(NodeStat::KernelStack))?;
        l.frames("PageTables:", node(NodeStat::PageTable))?;
        l.frames("SecPageTables:", node(NodeStat::SecondaryPageTable))?;
        l.frames("NFS_Unstable:", 0)?;
        l.frames("Bounce:", self.global_zone_page_state(ZoneStat::Bounce))?;
        l.frames("WritebackTmp:", node(NodeStat::WritebackTemp))
    }

    fn write_kernel_uses(&self, l: &mut Lines<'_>) -> fmt::Result {
        let system = |item| self.system_state(item);
        l.frames("CommitLimit:", system(SystemStat::CommitLimit))?;
        l.frames("Committed_AS:", system(SystemStat::Committed))?;
        l.frames("VmallocTotal:", system(SystemStat::VmallocTotal))?;
        l.frames("VmallocUsed:", system(SystemStat::VmallocUsed))?;
        l.frames("VmallocChunk:", 0)?;
        l.frames("Percpu:", system(SystemStat::Percpu))?;
        let corrupted = system(SystemStat::HardwareCorrupted) << (P::PAGE_SHIFT - 10);
        writeln!(l.w, "HardwareCorrupted: {corrupted:5} kB")
    }

    fn write_huge(&self, l: &mut Lines<'_>) -> fmt::Result {
        let node = |item| self.global_node_page_state(item);
        l.frames("AnonHugePages:", node(NodeStat::AnonThps))?;
        l.frames("ShmemHugePages:", node(NodeStat::ShmemThps))?;
        l.frames("ShmemPmdMapped:", node(NodeStat::ShmemPmdMapped))?;
        l.frames("FileHugePages:", node(NodeStat::FileThps))?;
        l.frames("FilePmdMapped:", node(NodeStat::FilePmdMapped))?;
        let (mut total, mut free) = (0, 0);
        for zone in self.zones() {
            let (frames, left) = self.cma_frames(zone);
            total += frames;
            free += left;
        }
        l.frames("CmaTotal:", total)?;
        l.frames("CmaFree:", free)?;
        l.frames("Unaccepted:", self.global_zone_page_state(ZoneStat::Unaccepted))?;
        for label in ["HugePages_Total:", "HugePages_Free:", "HugePages_Rsvd:", "HugePages_Surp:"] {
            writeln!(l.w, "{label:<16}{:8}", 0)?;
        }
        l.frames("Hugepagesize:", PAGEBLOCK_FRAMES.into())?;
        l.frames("Hugetlb:", 0)
    }
}
