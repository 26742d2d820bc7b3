//! Many single pages at once \[P1\].
//!
//! # Concepts
//! One check, one ownership, then a pop and a state word per page. What the CPU's list cannot give comes from
//! the general path, one page at a time.
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
    types::Pfn,
    zone::{AllocFlags, Zone},
};
use core::sync::atomic::Ordering::Relaxed;

impl<P: Platform, R: Reclaim> PageAllocator<P, R> {
    /// `alloc_pages_bulk`: fills the empty places of `pages` with single pages and returns how many
    /// places are filled then, from the front; places that were filled count and are left alone.
    ///
    /// Stops at the first page it cannot get. The first missing page is asked for with all that `gfp`
    /// allows, so 0 for an empty array means that there is no memory.
    ///
    /// Context: as [`alloc_pages`](Self::alloc_pages).
    ///
    /// # Errors
    /// [`AllocError`] for requests that are wrong; running out of memory is a smaller number.
    ///
    /// See [`alloc_pages_bulk`](https://docs.kernel.org/core-api/mm-api.html).
    #[track_caller]
    pub fn alloc_pages_bulk<'a>(
        &'a self,
        gfp: Gfp,
        pages: &mut [Option<&'a Page>],
    ) -> Result<usize, AllocError> {
        let full = self.fill_plain(gfp, pages);
        if full {
            return Ok(pages.len());
        }
        let r = self.decide(gfp, 0, None)?;
        let mut at = pages.iter().position(Option::is_none).unwrap_or(pages.len());
        // Pages of an interleave policy take turns one by one.
        if self.gate.load(Relaxed) == 0 && !r.gfp.intersects(Gfp::COLD) && !r.interleave {
            let flags = AllocFlags { cpuset: true, ..AllocFlags::LOW };
            // What is zeroed afterwards is one run of new pages; others' pages are not touched.
            let filled = |p: &Option<&Page>| r.gfp.contains(Gfp::ZERO) && p.is_some();
            let end = pages[at..].iter().position(filled).map_or(pages.len(), |n| at + n);
            if let Some(zone) = self.zones_for(&r, flags).next()
                && let Some(list) = ListId::small(0, r.mt as usize)
                && let Some(cpu) = self.p.get_cpu()
            {
                if let Some(pcp) = self.pcp_of(cpu.id(), zone.slot)
                    && let Some(owned) = self.own(cpu, Path::Bulk)
                {
                    let state = Self::initial_state(&r);
                    let room = || zone.room(r.highest, flags);
                    self.fill(cpu, (zone, pcp), list, state, room, &mut pages[at..end]);
                    self.disown(owned);
                }
                self.p.put_cpu(cpu);
            }
            if r.gfp.contains(Gfp::ZERO) {
                for page in pages[at..end].iter().map_while(|p| *p) {
                    if let Some(pfn) = self.map.pfn(page) {
                        self.p.zero_frames(Pfn(pfn), 1);
                    }
                }
            }
        }
        while at < pages.len() {
            if pages[at].is_none() {
                match self.alloc_general(gfp, 0, None) {
                    Ok(page) => pages[at] = Some(page),
                    Err(AllocError::NoMemory) => break,
                    Err(e) => return Err(e),
                }
            }
            at += 1;
        }
        Ok(at)
    }

    /// Fills the empty places from the CPU's list if there is nothing unusual about the request; says
    /// whether that filled all of them.
    fn fill_plain<'a>(&'a self, gfp: Gfp, pages: &mut [Option<&'a Page>]) -> bool {
        let Some(cpu) = self.p.get_cpu_fast() else { return false };
        let mut full = false;
        if let Some(Plain { to, mt, .. }) = self.plain(cpu, gfp, 0)
            && let Some(list) = ListId::small(0, mt)
            && let Some(highest) = gfp.zone_index()
            && let Some(owned) = self.own(cpu, Path::Bulk)
        {
            let room = || to.zone.room_above_low(self.lists.served_by(highest));
            full = self.fill(cpu, (to.zone, to.pcp), list, Self::plain_state(gfp, 0), room, pages);
            self.disown(owned);
        }
        self.p.put_cpu(cpu);
        full
    }

    /// Fills the empty places from a list, refilling it as long as there is room; says whether that
    /// filled all of them. The caller owns the lists.
    #[inline(always)]
    fn fill<'a>(
        &'a self,
        cpu: &Cpu,
        (zone, pcp): (&Zone, &Pcp),
        list: ListId,
        state: PageState,
        room: impl Fn() -> i64,
        places: &mut [Option<&'a Page>],
    ) -> bool {
        let mut at = 0;
        let mut damaged = false;
        loop {
            let (n, bad) = take_alike(pcp, list, state, &mut places[at..]);
            at += n;
            if let Some(page) = bad {
                // A frame found damaged leaves its place to the general path.
                self.bad_page(page);
                damaged = true;
                at += 1;
                continue;
            }
            if at == places.len() {
                return !damaged;
            }
            let room = room();
            if room <= 0 || pcp.high(list) == 0 {
                return false;
            }
            let need = places.len() - at;
            let refilled = self.refill(cpu, zone, pcp, list, room - 1, need);
            let _ = cpu.set_path(Path::Bulk);
            let Some(page) = refilled else { return false };
            pcp.count_allocs(list, 1);
            places[at] = self.dress(page, state);
            damaged |= places[at].is_none();
            at += 1;
        }
    }

    /// Frees every page in `pages` and empties their places (`release_pages`). Each is checked as by
    /// [`__free_pages`](Self::__free_pages) with order 0.
    ///
    /// # Errors
    /// The first [`Misuse`], after all the others were freed; the places of pages that could not be
    /// freed keep them.
    #[track_caller]
    pub fn free_pages_bulk(&self, pages: &mut [Option<&Page>]) -> Result<(), Misuse> {
        let mut result = Ok(());
        let mut from = 0;
        while from < pages.len() {
            from += self.free_run(&mut pages[from..]);
            // What the run stopped at is not plain; the general path says what it is.
            if let Some(Some(page)) = pages.get(from).copied() {
                match self.free_checked(page, 0) {
                    Ok(freed) => {
                        if let Some(pfn) = self.page_to_pfn(page).filter(|_| freed) {
                            self.trace(&Event::PageFreeBatched { pfn });
                        }
                        pages[from] = None;
                    }
                    Err(e) => result = result.and(Err(e)),
                }
            }
            from += 1;
        }
        result
    }

    /// Puts a freed page where its list has no place for it; `more` are to come. The caller owns the lists.
    #[cold]
    #[inline(never)]
    pub(super) fn spill_freed(&self, cpu: &Cpu, pb: PbFlags, page: &'static Page, more: usize) {
        if let (Some(slot), Some(list)) = (pb.zone_slot(), ListId::small(0, pb.mt_index()))
            && let (Some(zone), Some(pcp)) = (self.zones.get(slot), self.pcp_of(cpu.id(), slot))
        {
            self.spill(cpu, zone, pcp, list, page, more);
            pcp.count_frees(list, 1);
            let _ = cpu.set_path(Path::Bulk);
        }
    }

    /// Frees pages of one zone and mobility from the front of `pages`; returns how many places it
    /// dealt with, `None` for none. The caller owns the lists.
    fn free_alike(&self, cpu: &Cpu, pages: &mut [Option<&Page>]) -> Option<usize> {
        let first = pages.iter().position(Option::is_some).unwrap_or(pages.len());
        let Some(Some(page)) = pages.get(first) else { return (first > 0).then_some(first) };
        let (_, kind) = self.map.locate(page)?;
        let list = ListId::small(0, kind.mt_index())?;
        let pcp = self.pcp_of(cpu.id(), kind.zone_slot()?)?;
        let (n, over) = put_alike(&self.map, pcp, list, kind, &mut pages[first..]);
        let mut done = first + n;
        if let Some(page) = over {
            done += 1;
            self.spill_freed(cpu, kind, page, pages.len() - done);
        }
        (done > 0).then_some(done)
    }

    /// Frees plain single pages from the front of `pages` under one ownership; returns where it
    /// stopped.
    fn free_run(&self, pages: &mut [Option<&Page>]) -> usize {
        let Some(cpu) = self.p.get_cpu() else { return 0 };
        let mut done = 0;
        if self.gate.load(Relaxed) == 0
            && !cpu.context().in_nmi()
            && let Some(owned) = self.own(cpu, Path::Bulk)
        {
            while let Some(n) = self.free_alike(cpu, &mut pages[done..]) {
                done += n;
            }
            self.disown(owned);
        }
        self.p.put_cpu(cpu);
        done
    }
}

/// Fills empty places from the front with pages off the hot end of a list. Returns how many places it
/// dealt with: all, those before the one that the list has no page for, or those before the one whose page
/// is damaged, and that one.
///
/// On its own, so that what the loop uses stays in registers.
#[inline(never)]
fn take_alike(
    pcp: &Pcp,
    list: ListId,
    state: PageState,
    places: &mut [Option<&Page>],
) -> (usize, Option<&'static Page>) {
    let mut hot = pcp.hot_blocks(list);
    let mut done = 0;
    for place in places {
        if place.is_none() {
            let Some(page) = hot.next() else { break };
            if page.state() != PageState::FREE {
                return (done, Some(page));
            }
            page.set_allocated(state);
            *place = Some(page);
        }
        done += 1;
    }
    (done, None)
}

/// Frees pages of one zone and mobility from the front of `pages` to the hot end of their list. Returns
/// how many places it dealt with, and the frame of one more that it freed but found no place for.
///
/// On its own for the same reason.
#[inline(never)]
fn put_alike(
    map: &MemMap,
    pcp: &Pcp,
    list: ListId,
    kind: PbFlags,
    pages: &mut [Option<&Page>],
) -> (usize, Option<&'static Page>) {
    let map = *map;
    let mut end = pcp.hot_end(list);
    let mut done = 0;
    for place in pages {
        if let Some(page) = *place {
            let Some((page, pb)) = map.locate(page) else { break };
            if pb != kind || !page.try_free(0) {
                break;
            }
            *place = None;
            if !end.put(page) {
                return (done, Some(page));
            }
        }
        done += 1;
    }
    (done, None)
}
