//! Many single pages at once, by the numbers of their frames: for layers that keep those.
//!
//! # Concepts
//! As `bulk`, which deals in pages; what is not plain goes there.
//!
//! # Locking
//! As for the fast path.

use super::{
    PageAllocator,
    fast::Plain,
    pcp::{ListId, Pcp},
    slow::Reclaim,
};
use crate::{
    context::{Cpu, Path},
    error::{AllocError, Misuse},
    gfp::Gfp,
    memmap::MemMap,
    page::{Page, PageState},
    pageblock::PbFlags,
    platform::Platform,
    trace::Event,
    types::{PAGEBLOCK_FRAMES, PAGEBLOCK_ORDER, Pfn},
};
use core::sync::atomic::{AtomicU32, Ordering::Relaxed};

/// Pages that the general way is asked for at once.
const BATCH: usize = 32;

impl<P: Platform, R: Reclaim> PageAllocator<P, R> {
    /// Fills a table from the front; `filled` says how many places, whatever comes of the rest.
    ///
    /// # Errors
    /// As [`alloc_pages_bulk`](Self::alloc_pages_bulk), and `NoMemory` if some are missing.
    #[track_caller]
    pub(crate) fn alloc_frames_bulk(
        &self,
        gfp: Gfp,
        frames: &[AtomicU32],
        filled: &mut usize,
    ) -> Result<(), AllocError> {
        *filled = self.fill_frames(gfp, frames);
        while *filled < frames.len() {
            let mut batch: [Option<&Page>; BATCH] = [None; BATCH];
            let batch = &mut batch[..(frames.len() - *filled).min(BATCH)];
            if self.alloc_pages_bulk(gfp, batch)? == 0 {
                return Err(AllocError::NoMemory);
            }
            for pfn in batch.iter().filter_map(|page| self.map.pfn((*page)?)) {
                frames[*filled].store(pfn, Relaxed);
                *filled += 1;
            }
        }
        Ok(())
    }

    /// Fills a table from the CPU's list as far as there is nothing unusual about it; returns how many places.
    fn fill_frames(&self, gfp: Gfp, frames: &[AtomicU32]) -> usize {
        let Some(cpu) = self.p.get_cpu_fast() else { return 0 };
        let mut at = 0;
        if let Some(Plain { to, mt, .. }) = self.plain(cpu, gfp, 0)
            && let Some(list) = ListId::small(0, mt)
            && let Some(highest) = gfp.zone_index()
            && let Some(owned) = self.own(cpu, Path::Bulk)
        {
            let state = Self::plain_state(gfp, 0);
            loop {
                let (n, bad) = take_frames(&self.map, to.pcp, list, state, &frames[at..]);
                at += n;
                if let Some(page) = bad {
                    self.bad_page(page);
                    continue;
                }
                let room = to.zone.room_above_low(self.lists.served_by(highest));
                if at == frames.len() || room <= 0 || to.pcp.high(list) == 0 {
                    break;
                }
                let need = frames.len() - at;
                let refilled = self.refill(cpu, to.zone, to.pcp, list, room - 1, need);
                let _ = cpu.set_path(Path::Bulk);
                let Some(page) = refilled else { break };
                to.pcp.count_allocs(list, 1);
                if self.dress(page, state).is_some() {
                    frames[at].store(self.map.frame_of(page), Relaxed);
                    at += 1;
                }
            }
            self.disown(owned);
        }
        self.p.put_cpu(cpu);
        at
    }

    /// Frees every frame in a table, the last one first. Each is checked as by [`__free_pages`](Self::__free_pages) with order 0.
    ///
    /// # Errors
    /// The first [`Misuse`], after all the others were freed.
    #[track_caller]
    pub(crate) fn free_frames_bulk(&self, frames: &[AtomicU32]) -> Result<(), Misuse> {
        let mut result = Ok(());
        let mut left = frames.len();
        while left > 0 {
            left -= self.free_frames_run(&frames[..left]);
            // What the run stopped at is not plain; the general path says what it is.
            if let Some(pfn) = frames[..left].last().map(|pfn| Pfn(pfn.load(Relaxed))) {
                let freed = match self.pfn_to_page(pfn) {
                    Some(page) => self.free_checked(page, 0),
                    None => Err(self.misuse(Misuse::NeverAllocated { pfn })),
                };
                match freed {
                    Ok(true) => self.trace(&Event::PageFreeBatched { pfn }),
                    Ok(false) => {}
                    Err(e) => result = result.and(Err(e)),
                }
            }
            left = left.saturating_sub(1);
        }
        result
    }

    /// Frees plain frames from the end of a table under one ownership; returns how many.
    fn free_frames_run(&self, frames: &[AtomicU32]) -> usize {
        let Some(cpu) = self.p.get_cpu() else { return 0 };
        let mut done = 0;
        if self.gate.load(Relaxed) == 0
            && !cpu.context().in_nmi()
            && let Some(owned) = self.own(cpu, Path::Bulk)
        {
            while let Some(n) = self.free_frames_alike(cpu, &frames[..frames.len() - done]) {
                done += n;
            }
            self.disown(owned);
        }
        self.p.put_cpu(cpu);
        done
    }

    /// Frees frames of one zone and mobility from the end of a table; returns how many, `None` for none. The
    /// caller owns the lists.
    fn free_frames_alike(&self, cpu: &Cpu, frames: &[AtomicU32]) -> Option<usize> {
        let kind = self.map.flags_of(frames.last()?.load(Relaxed));
        let list = ListId::small(0, kind.mt_index())?;
        let pcp = self.pcp_of(cpu.id(), kind.zone_slot()?)?;
        let (mut done, over) = put_frames(&self.map, pcp, list, kind, frames);
        if let Some(page) = over {
            done += 1;
            self.spill_freed(cpu, kind, page, frames.len() - done);
        }
        (done > 0).then_some(done)
    }
}

/// Fills places from the front with frames off the hot end of a list. Returns how many, and the frame that is damaged,
/// if one ended it.
///
/// On its own, so that what the loop uses stays in registers.
#[inline(never)]
fn take_frames(
    map: &MemMap,
    pcp: &Pcp,
    list: ListId,
    state: PageState,
    places: &[AtomicU32],
) -> (usize, Option<&'static Page>) {
    let map = *map;
    let mut hot = pcp.hot_blocks(list);
    let mut done = 0;
    for place in places {
        let Some(page) = hot.next() else { break };
        if page.state() != PageState::FREE {
            return (done, Some(page));
        }
        page.set_allocated(state);
        place.store(map.frame_of(page), Relaxed);
        done += 1;
    }
    (done, None)
}

/// Frees frames of one zone and mobility from the end of a table to the hot end of their list. Returns how many, and one more
/// that it freed but found no place for.
///
/// On its own for the same reason.
#[inline(never)]
fn put_frames(
    map: &MemMap,
    pcp: &Pcp,
    list: ListId,
    kind: PbFlags,
    frames: &[AtomicU32],
) -> (usize, Option<&'static Page>) {
    let map = *map;
    let mut end = pcp.hot_end(list);
    let mut left = frames;
    let mut over = None;
    'blocks: while let Some(last) = left.last() {
        // Neighbours are mostly of one pageblock, which is looked at once.
        let block = last.load(Relaxed) >> PAGEBLOCK_ORDER;
        let first = block << PAGEBLOCK_ORDER;
        let Some(pages) = map.block_pages(first).filter(|_| map.flags_of(first) == kind) else {
            break;
        };
        while let Some((frame, before)) = left.split_last() {
            let pfn = frame.load(Relaxed);
            if pfn >> PAGEBLOCK_ORDER != block {
                continue 'blocks;
            }
            let page = &pages[(pfn % PAGEBLOCK_FRAMES) as usize];
            if !page.try_free(0) {
                break 'blocks;
            }
            if !end.put(page) {
                over = Some(page);
                break 'blocks;
            }
            left = before;
        }
    }
    (frames.len() - left.len(), over)
}
