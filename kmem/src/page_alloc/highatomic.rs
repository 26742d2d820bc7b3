//! Pageblocks set aside for high-order atomic requests \[M2, P2\].
//!
//! # Concepts
//! A caller that cannot wait and needs several contiguous frames has nowhere to turn when memory is
//! fragmented. After such a request was answered from the slow path, the pageblock it was answered from
//! is set aside: only requests like it may take more of it. At most one hundredth of a zone is. When
//! direct reclaim gets nowhere the reserve is given back.
//!
//! # Locking
//! An area's lock, one at a time.

use super::{PageAllocator, general::Request, slow::Reclaim};
use crate::{
    page::Page,
    platform::Platform,
    types::{MigrateType, PAGEBLOCK_FRAMES, PAGEBLOCK_ORDER},
    vmstat::VmEvent,
    zone::AllocFlags,
};
use core::sync::atomic::Ordering::Relaxed;

impl<P: Platform, R: Reclaim> PageAllocator<P, R> {
    /// Sets the page's pageblock aside if the request was of the kind the reserve is for.
    pub(super) fn note_highatomic(&self, r: &Request, flags: AllocFlags, page: &Page) {
        if !flags.highatomic || r.order >= PAGEBLOCK_ORDER {
            return;
        }
        let Some(pfn) = self.map.pfn(page) else { return };
        let pb = self.map.flags_of(pfn);
        let Some(zone) = pb.zone_slot().and_then(|s| self.zones.get(s)) else { return };
        let frames = u64::from(PAGEBLOCK_FRAMES);
        let limit = (zone.managed_frames() / 100).max(frames);
        let reserved = zone
            .reserved_highatomic
            .fetch_update(Relaxed, Relaxed, |n| (n + frames <= limit).then_some(n + frames));
        if reserved.is_err() {
            return;
        }
        let set = zone.with_area(&self.p, &self.map, zone.area_of(pfn), |area| {
            let mt = self.map.flags_of(pfn).migratetype();
            let ordinary = matches!(
                mt,
                MigrateType::Unmovable | MigrateType::Movable | MigrateType::Reclaimable
            );
            if ordinary {
                area.set_migratetype(pfn, MigrateType::HighAtomic);
            }
            ordinary
        });
        if set {
            self.count(VmEvent::ReservedHighatomic, 1);
        } else {
            zone.reserved_highatomic.fetch_sub(frames, Relaxed);
        }
    }

    /// Gives one reserved pageblock with free frames back to the request's mobility. Unless `force`d,
    /// leaves each zone its last one.
    pub(super) fn unreserve_highatomic(&self, r: &Request, force: bool) -> bool {
        let frames = u64::from(PAGEBLOCK_FRAMES);
        self.zones_for(r, AllocFlags::default()).any(|zone| {
            let reserved = zone.reserved_highatomic.load(Relaxed);
            if reserved == 0 || (!force && reserved <= frames) {
                return false;
            }
            let given = zone.areas_from(0).any(|n| {
                zone.with_area(&self.p, &self.map, n, |area| {
                    match area.pageblock_with(0, MigrateType::HighAtomic) {
                        Some(pfn) => {
                            area.set_migratetype(pfn, r.mt);
                            true
                        }
                        None => false,
                    }
                })
            });
            if given {
                let _ = zone
                    .reserved_highatomic
                    .fetch_update(Relaxed, Relaxed, |n| Some(n.saturating_sub(frames)));
            }
            given
        })
    }
}
