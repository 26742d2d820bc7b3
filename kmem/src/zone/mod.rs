//! Zones and nodes: which frames a request may have, and how far down \[Z1–Z5\].
//!
//! # Concepts
//! A zone is a stretch of a node's frames with the same addressing properties. A request names the
//! highest zone it can use and gets it, or a lower one if that is short; `lowmem_reserve` keeps part of the lower zones
//! from requests that could have gone higher. Three watermarks say how short a zone is: below *low* kswapd
//! is woken, below *min* ordinary requests fail or reclaim, at *high* kswapd stops.
//!
//! # Implementation
//! Zones are in a dense table of the populated ones (`Zone::slot` is the index; pageblock flags hold
//! it); a second table leads from node and zone type to the slot. The number of free frames is one
//! counter per zone, changed once per batch. `fast_mark` holds, per highest zone of the request, the low
//! watermark plus the reserve: the fast path makes one comparison.
//!
//! # Locking
//! Watermarks are atomics and take effect at once \[Z4\]; free lists are under their area's lock.
//!
//! See [physical memory](https://docs.kernel.org/mm/physical_memory.html).

pub mod layout;
mod watermark;
pub(crate) mod zonelist;

pub use layout::{Layout, LayoutError, ZoneLimit};
pub(crate) use watermark::{AllocFlags, distribute, min_free_kbytes_for, reserve};

use crate::{
    buddy::{Area, AreaLists, Region},
    memmap::MemMap,
    platform::Platform,
    sync::IrqLock,
    types::{MAX_NR_ZONES, PAGEBLOCK_ORDER, PfnRange, ZoneType},
};
use core::{
    mem::MaybeUninit,
    sync::atomic::{AtomicI64, AtomicU32, AtomicU64, Ordering::Relaxed},
};
use crossbeam_utils::CachePadded;

/// Watermarks of a zone, in frames \[Z2\].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Watermarks {
    /// Ordinary requests do not go below it.
    pub min: u64,
    /// kswapd is woken below it.
    pub low: u64,
    /// kswapd stops at it.
    pub high: u64,
    /// As Linux's promotion mark: shown, and otherwise unused.
    pub promo: u64,
}

/// Areas a zone may have.
pub(crate) const MAX_AREAS: usize = 32;

/// One zone \[Z2\].
pub struct Zone {
    zone_type: ZoneType,
    node: u32,
    pub(crate) slot: usize,
    /// Frames from the zone's first to its last, holes included.
    spanned: PfnRange,
    present: u64,
    managed: AtomicU64,
    free: CachePadded<AtomicI64>,
    /// Free frames in pageblocks kept for high-order atomic requests.
    pub(crate) free_highatomic: AtomicI64,
    /// Frames of such pageblocks, free or not.
    pub(crate) reserved_highatomic: AtomicU64,
    wmark: [AtomicU64; 4],
    lowmem_reserve: [AtomicU64; MAX_NR_ZONES],
    /// By highest zone of the request; a power of two of them.
    fast_mark: [AtomicI64; 8],
    /// A power of two of them.
    areas: &'static [CachePadded<IrqLock<AreaLists>>],
    regions: &'static [Region],
    region_base: u32,
    /// Pageblocks of a region as a power of two.
    region_shift: u32,
    /// Set from when a request finds the zone below its low watermark until it is above the high one: per-CPU lists stay small
    /// meanwhile.
    pub(crate) pressed: AtomicU32,
}

impl Zone {
    /// An empty zone in uninitialised memory.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn init(
        at: &mut MaybeUninit<Zone>,
        zone_type: ZoneType,
        node: u32,
        slot: usize,
        spanned: PfnRange,
        present: u64,
        areas: &'static [CachePadded<IrqLock<AreaLists>>],
        regions: &'static [Region],
        region_shift: u32,
    ) {
        at.write(Zone {
            zone_type,
            node,
            slot,
            spanned,
            present,
            managed: AtomicU64::new(0),
            free: CachePadded::new(AtomicI64::new(0)),
            free_highatomic: AtomicI64::new(0),
            reserved_highatomic: AtomicU64::new(0),
            wmark: [const { AtomicU64::new(0) }; 4],
            lowmem_reserve: [const { AtomicU64::new(0) }; MAX_NR_ZONES],
            fast_mark: [const { AtomicI64::new(i64::MAX) }; 8],
            areas,
            regions,
            region_base: spanned.start >> (PAGEBLOCK_ORDER + region_shift),
            region_shift,
            pressed: AtomicU32::new(0),
        });
    }

    /// The kind of zone.
    pub fn zone_type(&self) -> ZoneType {
        self.zone_type
    }

    /// The kernel's name for it.
    pub fn name(&self) -> &'static str {
        self.zone_type.name()
    }

    /// The node it belongs to.
    #[inline(always)]
    pub fn node(&self) -> usize {
        self.node as usize
    }

    /// First frame (`zone_start_pfn`).
    pub fn start_pfn(&self) -> u32 {
        self.spanned.start
    }

    /// Frames from first to last, holes included.
    pub fn spanned(&self) -> PfnRange {
        self.spanned
    }

    /// Frames that exist.
    pub fn present_frames(&self) -> u64 {
        self.present
    }

    /// Frames that the page allocator manages.
    pub fn managed_frames(&self) -> u64 {
        self.managed.load(Relaxed)
    }

    pub(crate) fn add_managed(&self, frames: u64) {
        self.managed.fetch_add(frames, Relaxed);
    }

    /// Frames in the free lists; those on per-CPU lists are not among them (`NR_FREE_PAGES`).
    #[inline(always)]
    pub fn free_frames(&self) -> u64 {
        self.free.load(Relaxed).max(0) as u64
    }

    /// The high watermark now.
    #[inline]
    pub(crate) fn high_mark(&self) -> u64 {
        self.wmark[2].load(Relaxed)
    }

    /// The watermarks now.
    pub fn watermarks(&self) -> Watermarks {
        let [min, low, high, promo] = [0, 1, 2, 3].map(|i: usize| self.wmark[i].load(Relaxed));
        Watermarks { min, low, high, promo }
    }

    /// Frames kept from requests whose highest zone is `highest` (`lowmem_reserve`).
    pub fn lowmem_reserve(&self, highest: ZoneType) -> u64 {
        self.lowmem_reserve[highest as usize].load(Relaxed)
    }

    /// Frames in pageblocks kept for high-order atomic requests \[M2\].
    pub fn highatomic_frames(&self) -> u64 {
        self.reserved_highatomic.load(Relaxed)
    }

    pub(crate) fn nr_areas(&self) -> usize {
        self.areas.len()
    }

    pub(crate) fn regions(&self) -> &'static [Region] {
        self.regions
    }

    /// The area that the frame belongs to.
    #[inline(always)]
    pub(crate) fn area_of(&self, pfn: u32) -> usize {
        self.region_of(pfn) as usize & (self.areas.len() - 1)
    }

    /// A bit that is the same for frames of the same area where there are two areas: nearer than the area's number, and it
    /// needs no comparison.
    #[inline(always)]
    pub(crate) fn parity_of(&self, pfn: u32) -> u32 {
        pfn >> (PAGEBLOCK_ORDER + self.region_shift) & 1
    }

    /// All areas, from one of them on.
    #[inline]
    pub(crate) fn areas_from(&self, home: usize) -> impl Iterator<Item = usize> + use<> {
        let nr = self.areas.len();
        (0..nr).map(move |i| (home + i) & (nr - 1))
    }

    /// The area that is a CPU's own.
    #[inline(always)]
    pub(crate) fn own_area(&self, cpu: usize) -> usize {
        cpu & (self.areas.len() - 1)
    }

    /// The number among the zone's regions of the one that the frame is in.
    #[inline(always)]
    pub(crate) fn region_of(&self, pfn: u32) -> u32 {
        (pfn >> (PAGEBLOCK_ORDER + self.region_shift)) - self.region_base
    }

    /// Pageblocks of a region as a power of two.
    pub(crate) fn region_shift(&self) -> u32 {
        self.region_shift
    }

    /// Locks area `n` and runs `f` on it. Frames that come free by that, or go, are counted before the lock is let go.
    #[inline(always)]
    pub(crate) fn with_area<P: Platform, R>(
        &self,
        p: &P,
        map: &MemMap,
        n: usize,
        f: impl FnOnce(&mut Area<'_>) -> R,
    ) -> R {
        self.locked(p, map, n, f, |frames| {
            // Who looked in vain leaves the line to others.
            if frames != 0 {
                self.free.fetch_add(frames, Relaxed);
            }
        })
    }

    /// As [`with_area`](Self::with_area), for who gives blocks to several areas and says how many frames they were with
    /// [`count_given`](Self::count_given) at the end.
    #[inline(always)]
    pub(crate) fn with_area_uncounted<P: Platform, R>(
        &self,
        p: &P,
        map: &MemMap,
        n: usize,
        f: impl FnOnce(&mut Area<'_>) -> R,
    ) -> R {
        self.locked(p, map, n, f, |_| ())
    }

    /// Counts frames that were given by [`with_area_uncounted`](Self::with_area_uncounted). Those of the only area were
    /// counted under its lock.
    #[inline]
    pub(crate) fn count_given(&self, frames: u64) {
        if self.areas.len() > 1 && frames != 0 {
            self.free.fetch_add(frames as i64, Relaxed);
        }
    }

    #[inline(always)]
    fn locked<P: Platform, R>(
        &self,
        p: &P,
        map: &MemMap,
        n: usize,
        f: impl FnOnce(&mut Area<'_>) -> R,
        count: impl FnOnce(i64),
    ) -> R {
        let mut guard = self.areas[n].lock(p);
        let before = guard.free();
        let mut area = Area {
            lists: &mut guard,
            map,
            regions: self.regions,
            region_base: self.region_base,
            region_shift: self.region_shift,
            slot: self.slot,
        };
        let r = f(&mut area);
        let after = guard.free();
        let frames = i64::from(after.all) - i64::from(before.all);
        if self.areas.len() > 1 {
            count(frames);
        } else if frames != 0 {
            // Nobody else counts while the only lock is held.
            self.free.store(self.free.load(Relaxed) + frames, Relaxed);
        }
        drop(guard);
        if before.highatomic != after.highatomic {
            self.add_free_highatomic(i64::from(after.highatomic) - i64::from(before.highatomic));
        }
        r
    }

    /// Whether some area can serve the order without stealing from pageblocks set aside.
    pub(crate) fn has_block<P: Platform>(
        &self,
        p: &P,
        order: u32,
        mt: crate::types::MigrateType,
        highatomic: bool,
    ) -> bool {
        self.areas.iter().any(|a| a.lock(p).has_block(order, mt, highatomic))
    }
}
