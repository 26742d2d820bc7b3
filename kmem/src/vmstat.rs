//! Event counters, under the names of `/proc/vmstat` \[R5, T1\].
//!
//! # Concepts
//! Each CPU counts for itself; a report adds up.
//!
//! # Implementation
//! Two sets per CPU. The *owned* set is written while the CPU's lists are owned, when nothing can come
//! between a load and its store, so plain loads and stores do. The *shared* set is for everyone else:
//! nested interrupts, the slow path, callers on no CPU; it uses atomic additions.
//!
//! # Locking
//! None.

use crate::{page_state::StatRow, types::ZoneType};
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

macro_rules! items {
    ($($variant:ident = $name:literal,)*) => {
        /// A counted event.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[repr(usize)]
        #[allow(missing_docs)]
        pub enum VmEvent { $($variant,)* }

        /// Number of counted events.
        pub const NR_VM_EVENTS: usize = [$($name),*].len();

        impl VmEvent {
            /// All of them, in the order in which `/proc/vmstat` shows them.
            pub const ALL: [VmEvent; NR_VM_EVENTS] = [$(VmEvent::$variant),*];

            /// The name in `/proc/vmstat`.
            pub const fn name(self) -> &'static str {
                match self { $(VmEvent::$variant => $name,)* }
            }
        }
    };
}

items! {
    NumaHit = "numa_hit",
    NumaMiss = "numa_miss",
    NumaForeign = "numa_foreign",
    NumaInterleave = "numa_interleave",
    NumaLocal = "numa_local",
    NumaOther = "numa_other",
    PgAllocDma = "pgalloc_dma",
    PgAllocDma32 = "pgalloc_dma32",
    PgAllocNormal = "pgalloc_normal",
    PgAllocHigh = "pgalloc_high",
    PgAllocMovable = "pgalloc_movable",
    PgAllocDevice = "pgalloc_device",
    AllocStallDma = "allocstall_dma",
    AllocStallDma32 = "allocstall_dma32",
    AllocStallNormal = "allocstall_normal",
    AllocStallHigh = "allocstall_high",
    AllocStallMovable = "allocstall_movable",
    AllocStallDevice = "allocstall_device",
    PgFree = "pgfree",
    SlabsScanned = "slabs_scanned",
    KswapdInodesteal = "kswapd_inodesteal",
    KswapdLowWmarkHitQuickly = "kswapd_low_wmark_hit_quickly",
    KswapdHighWmarkHitQuickly = "kswapd_high_wmark_hit_quickly",
    PageOutRun = "pageoutrun",
    DropPagecache = "drop_pagecache",
    OomKill = "oom_kill",
    PcpHit = "pcp_hit",
    PcpRefill = "pcp_refill",
    PcpSpill = "pcp_spill",
    PcpBypass = "pcp_bypass",
    WmarkLow = "wmark_low_crossed",
    WmarkMin = "wmark_min_crossed",
    ExtfragSteal = "extfrag_steal",
    ExtfragConvert = "extfrag_convert",
    AllocFail = "alloc_fail",
    ReservedHighatomic = "highatomic_reserved",
    Misuse = "misuse_reported",
}

/// Number of events that are counted by zone: those named `numa_*`.
const NR_NUMA_EVENTS: usize = 6;

/// A CPU's counts of events by zone.
pub(crate) type NumaRow = StatRow<NR_NUMA_EVENTS>;

impl VmEvent {
    /// Index among the events that are counted by zone; `None` for all others.
    pub(crate) const fn numa_index(self) -> Option<usize> {
        if (self as usize) < NR_NUMA_EVENTS { Some(self as usize) } else { None }
    }

    /// `pgalloc_*` of a zone type.
    pub const fn pgalloc(zone: ZoneType) -> VmEvent {
        VmEvent::ALL[VmEvent::PgAllocDma as usize + zone as usize]
    }

    /// `allocstall_*` of a zone type.
    pub const fn allocstall(zone: ZoneType) -> VmEvent {
        VmEvent::ALL[VmEvent::AllocStallDma as usize + zone as usize]
    }
}

/// One CPU's counters.
#[repr(C, align(64))]
pub(crate) struct VmCounters {
    owned: [AtomicU64; NR_VM_EVENTS],
    shared: [AtomicU64; NR_VM_EVENTS],
}

impl VmCounters {
    /// Counts while the CPU's lists are owned by the caller.
    #[inline(always)]
    pub(crate) fn owned(&self, e: VmEvent, n: u64) {
        let c = &self.owned[e as usize];
        c.store(c.load(Relaxed).wrapping_add(n), Relaxed);
    }

    /// Counts from anywhere.
    pub(crate) fn shared(&self, e: VmEvent, n: u64) {
        self.shared[e as usize].fetch_add(n, Relaxed);
    }

    pub(crate) fn get(&self, e: VmEvent) -> u64 {
        self.owned[e as usize].load(Relaxed).wrapping_add(self.shared[e as usize].load(Relaxed))
    }
}
