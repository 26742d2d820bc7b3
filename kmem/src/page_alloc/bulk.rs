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
    pcp::{HotEnd, ListId},
    slow::Reclaim,
};
use crate::{
    context::{Cpu, Path},
    error::{AllocError, Misuse},
    gfp::Gfp,
    memmap::PbFlags,
    page::Page,
    platform::Platform,
    trace::Event,
    types::Pfn,
    zone::AllocFlags,
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
                    let mut empty = pages[at..end].iter_mut().filter(|place| place.is_none());
                    let mut place = empty.next();
                    let mut taken = 0;
                    while place.is_some() {
                        pcp.pop_run(list, |pfn| {
                            if let Some(at) = &mut place
                                && let Some(page) = self.dress(pfn, state)
                            {
                                **at = Some(page);
                                taken += 1;
                                place = empty.next();
                            }
                            place.is_some()
                        });
                        let room = zone.room(r.highest, flags);
                        if place.is_none() || room <= 0 || pcp.high(list) == 0 {
                            break;
                        }
                        let refilled = self.refill(cpu, zone, pcp, list, room - 1);
                        cpu.set_path(Path::Bulk);
                        let Some(pfn) = refilled else { break };
                        if let Some(at) = &mut place
                            && let Some(page) = self.dress(pfn, state)
                        {
                            **at = Some(page);
                            taken += 1;
                            place = empty.next();
                        }
                    }
                    pcp.count_allocs(list, taken);
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

    /// Puts a freed page where its list has no place for it. The caller owns the lists.
    #[cold]
    #[inline(never)]
    fn spill_freed(&self, cpu: &Cpu, pb: PbFlags, pfn: u32) {
        if let (Some(slot), Some(list)) = (pb.zone_slot(), ListId::small(0, pb.mt_index()))
            && let Some(pcp) = self.pcp_of(cpu.id(), slot)
        {
            self.spill(cpu, slot, list, pfn);
            pcp.count_frees(list, 1);
            cpu.set_path(Path::Bulk);
        }
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
            let mut run: Option<(PbFlags, HotEnd<'_>)> = None;
            for place in pages.iter_mut() {
                if let Some(page) = *place {
                    let Some((pfn, pb)) = self.map.locate(page) else { break };
                    let open = matches!(&run, Some((of, _)) if *of == pb);
                    if !open {
                        let list = ListId::small(0, pb.mt_index());
                        let pcp = pb.zone_slot().and_then(|slot| self.pcp_of(cpu.id(), slot));
                        run = None;
                        match (pcp, list) {
                            (Some(pcp), Some(list)) => run = Some((pb, pcp.hot_end(list))),
                            _ => break,
                        }
                    }
                    if !page.try_free(0) {
                        break;
                    }
                    let put = run.as_mut().is_some_and(|(_, end)| end.put(pfn));
                    if !put {
                        run = None;
                        self.spill_freed(cpu, pb, pfn);
                    }
                    *place = None;
                }
                done += 1;
            }
            drop(run);
            self.disown(owned);
        }
        self.p.put_cpu(cpu);
        done
    }
}
