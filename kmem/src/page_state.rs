//! Page state: how many frames are used for what, by node, by zone, and in all \[R5, T1\].
//!
//! # Concepts
//! [`vmstat`](crate::vmstat) counts *events*, which only grow. Here is what *is*: frames on an LRU list, frames
//! that hold slabs, swap that is left. Whoever starts or ends such a use says so with
//! `mod_node_page_state` and its like; `meminfo`, `zoneinfo` and `vmstat` show the sums. What nobody uses
//! frames for is zero.
//!
//! # Implementation
//! One signed atomic per item, a row of them per node and per zone. Free frames are not here: the zones and
//! their free lists know them.
//!
//! # Locking
//! Single atomics. A report that races with an update sees one or the other; between two items it may see
//! a frame in both or in neither.

use core::sync::atomic::{AtomicI64, Ordering::Relaxed};

macro_rules! items {
    ($(#[$doc:meta])* $name:ident, $count:ident { $($variant:ident = $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[repr(usize)]
        pub enum $name {
            $(#[doc = concat!("`", $text, "`.")] $variant,)*
        }

        /// Number of items.
        pub const $count: usize = [$($text),*].len();

        impl $name {
            /// All of them, in the order in which the kernel shows them.
            pub const ALL: [$name; $count] = [$($name::$variant),*];

            /// The name in `/proc/vmstat`.
            pub const fn name(self) -> &'static str {
                match self { $($name::$variant => $text,)* }
            }
        }
    };
}

items! {
    /// A use that is counted by node, in frames; [`NodeStat::KernelStack`] in KiB.
    NodeStat, NR_NODE_STATS {
        InactiveAnon = "nr_inactive_anon",
        ActiveAnon = "nr_active_anon",
        InactiveFile = "nr_inactive_file",
        ActiveFile = "nr_active_file",
        Unevictable = "nr_unevictable",
        SlabReclaimable = "nr_slab_reclaimable",
        SlabUnreclaimable = "nr_slab_unreclaimable",
        IsolatedAnon = "nr_isolated_anon",
        IsolatedFile = "nr_isolated_file",
        WorkingsetNodes = "workingset_nodes",
        WorkingsetRefaultAnon = "workingset_refault_anon",
        WorkingsetRefaultFile = "workingset_refault_file",
        WorkingsetActivateAnon = "workingset_activate_anon",
        WorkingsetActivateFile = "workingset_activate_file",
        WorkingsetRestoreAnon = "workingset_restore_anon",
        WorkingsetRestoreFile = "workingset_restore_file",
        WorkingsetNodereclaim = "workingset_nodereclaim",
        AnonMapped = "nr_anon_pages",
        FileMapped = "nr_mapped",
        FilePages = "nr_file_pages",
        FileDirty = "nr_dirty",
        Writeback = "nr_writeback",
        WritebackTemp = "nr_writeback_temp",
        Shmem = "nr_shmem",
        ShmemThps = "nr_shmem_hugepages",
        ShmemPmdMapped = "nr_shmem_pmdmapped",
        FileThps = "nr_file_hugepages",
        FilePmdMapped = "nr_file_pmdmapped",
        AnonThps = "nr_anon_transparent_hugepages",
        VmscanWrite = "nr_vmscan_write",
        VmscanImmediate = "nr_vmscan_immediate_reclaim",
        Dirtied = "nr_dirtied",
        Written = "nr_written",
        ThrottledWritten = "nr_throttled_written",
        KernelMiscReclaimable = "nr_kernel_misc_reclaimable",
        FollPinAcquired = "nr_foll_pin_acquired",
        FollPinReleased = "nr_foll_pin_released",
        KernelStack = "nr_kernel_stack",
        PageTable = "nr_page_table_pages",
        SecondaryPageTable = "nr_sec_page_table_pages",
        Iommu = "nr_iommu_pages",
        Swapcache = "nr_swapcached",
        PromoteSuccess = "pgpromote_success",
        PromoteCandidate = "pgpromote_candidate",
        DemoteKswapd = "pgdemote_kswapd",
        DemoteDirect = "pgdemote_direct",
        DemoteKhugepaged = "pgdemote_khugepaged",
    }
}

items! {
    /// A use that is counted by zone, in frames.
    ZoneStat, NR_ZONE_STATS {
        InactiveAnon = "nr_zone_inactive_anon",
        ActiveAnon = "nr_zone_active_anon",
        InactiveFile = "nr_zone_inactive_file",
        ActiveFile = "nr_zone_active_file",
        Unevictable = "nr_zone_unevictable",
        WritePending = "nr_zone_write_pending",
        Mlock = "nr_mlock",
        Bounce = "nr_bounce",
        Zspages = "nr_zspages",
        Unaccepted = "nr_unaccepted",
    }
}

items! {
    /// What is counted for the machine as a whole, in frames. The names are those of `/proc/meminfo` where
    /// `/proc/vmstat` has none.
    SystemStat, NR_SYSTEM_STATS {
        Buffers = "Buffers",
        SwapTotal = "SwapTotal",
        SwapFree = "SwapFree",
        Zswap = "Zswap",
        Zswapped = "Zswapped",
        CommitLimit = "CommitLimit",
        Committed = "Committed_AS",
        VmallocTotal = "VmallocTotal",
        VmallocUsed = "VmallocUsed",
        Percpu = "Percpu",
        HardwareCorrupted = "HardwareCorrupted",
        DirtyThreshold = "nr_dirty_threshold",
        DirtyBackgroundThreshold = "nr_dirty_background_threshold",
        Memmap = "nr_memmap_pages",
    }
}

impl NodeStat {
    /// Whether `/proc/vmstat` shows the item in huge pages and not in frames.
    pub const fn in_huge_pages(self) -> bool {
        matches!(
            self,
            NodeStat::ShmemThps
                | NodeStat::ShmemPmdMapped
                | NodeStat::FileThps
                | NodeStat::FilePmdMapped
                | NodeStat::AnonThps
        )
    }
}

/// A row of counters. All-zero bytes are a row of zeros.
#[repr(C, align(64))]
pub(crate) struct StatRow<const N: usize>([AtomicI64; N]);

impl<const N: usize> StatRow<N> {
    #[inline]
    pub(crate) fn add(&self, item: usize, delta: i64) {
        self.0[item].fetch_add(delta, Relaxed);
    }

    /// The value, which another row may make up for if it is below zero.
    pub(crate) fn value(&self, item: usize) -> i64 {
        self.0[item].load(Relaxed)
    }

    /// The value; a sum that is below zero for a moment counts as zero.
    pub(crate) fn get(&self, item: usize) -> u64 {
        self.0[item].load(Relaxed).max(0) as u64
    }
}
