//! References, splitting, and blocks at a chosen place \[F2, P5, P6\].
//!
//! # Concepts
//! The first frame of a block carries its references. A tail of a compound page stands for its head;
//! a tail of a plain block has no references to take. Splitting turns a block into single pages, each with
//! the references the block had, so that parts of it can be freed.
//!
//! # Locking
//! The state word alone.

use super::{PageAllocator, slow::Reclaim};
use crate::{
    error::{AllocError, Misuse},
    gfp::{Gfp, GfpError},
    page::{Page, PageFlags, PageState, Put},
    platform::Platform,
    trace::Event,
    types::Pfn,
    vmstat::VmEvent,
};
use core::panic::Location;

impl<P: Platform, R: Reclaim> PageAllocator<P, R> {
    /// The head of the compound page that the page belongs to, or the page itself (`compound_head`).
    pub fn compound_head<'a>(&'a self, page: &'a Page) -> &'a Page {
        if page.state().is_allocated() {
            return page;
        }
        let head = self.map.pfn(page).and_then(|pfn| self.head_of(pfn));
        match head.map(|(pfn, _)| self.map.page_in_map(pfn)) {
            Some(head) if head.flags().contains(PageFlags::HEAD) => head,
            _ => page,
        }
    }

    /// The order of the block that the page heads, or of the compound page it is in; `None` when it is
    /// not in use (`compound_order`).
    pub fn compound_order(&self, page: &Page) -> Option<u32> {
        let state = self.compound_head(page).state();
        state.is_allocated().then(|| state.order())
    }

    /// `get_page`: takes a reference on a page in use \[F2\].
    ///
    /// # Errors
    /// [`Misuse::NotAllocated`], reported, for a page that is not in use, and for the tail of a block
    /// that is no compound page.
    #[track_caller]
    pub fn get_page(&self, page: &Page) -> Result<(), Misuse> {
        let Some(pfn) = self.map.pfn(page) else { return Err(self.misuse(Misuse::NotAPage)) };
        if self.compound_head(page).get_unless_zero() {
            Ok(())
        } else {
            Err(self.misuse(Misuse::NotAllocated { pfn: Pfn(pfn) }))
        }
    }

    /// `get_page_unless_zero`: takes a reference if the page is in use, for those who know only its
    /// frame number. `false` if it is not.
    pub fn get_page_unless_zero(&self, page: &Page) -> bool {
        self.compound_head(page).get_unless_zero()
    }

    /// `put_page`: drops a reference; the last one frees the block, compound or not \[F2\].
    ///
    /// Context: any but NMI.
    ///
    /// # Errors
    /// [`Misuse`], reported as well, and nothing changed.
    #[track_caller]
    pub fn put_page(&self, page: &Page) -> Result<(), Misuse> {
        if self.context().in_nmi() {
            return Err(self.misuse(Misuse::InNmi));
        }
        let head = self.compound_head(page);
        let Some(pfn) = self.map.pfn(head) else { return Err(self.misuse(Misuse::NotAPage)) };
        match head.put(None) {
            Put::Remaining => Ok(()),
            Put::Last(order) => {
                self.trace(&Event::PageFree { pfn: Pfn(pfn), order });
                self.see_off(pfn, order);
                self.free_frames(pfn, order);
                Ok(())
            }
            Put::None => Err(self.misuse(self.not_live(pfn))),
            Put::Busy(state) => Err(self.misuse(Self::in_use(pfn, head, state))),
        }
    }

    /// `split_page`: turns a block of `order` into 2^`order` single pages, each to be freed by itself
    /// \[P6\].
    ///
    /// # Errors
    /// [`Misuse`], reported: a wrong order, a page that is not in use, shared, or compound.
    ///
    /// See [`split_page`](https://docs.kernel.org/core-api/mm-api.html).
    #[track_caller]
    pub fn split_page(&self, page: &Page, order: u32) -> Result<(), Misuse> {
        self.split_page_to(page, order, 0)
    }

    /// Turns a block of `order` into blocks of `to`, each to be freed by itself \[P6\].
    ///
    /// # Errors
    /// As [`split_page`](Self::split_page); `BadOrder` if `to` is above `order`.
    #[track_caller]
    pub fn split_page_to(&self, page: &Page, order: u32, to: u32) -> Result<(), Misuse> {
        let Some(pfn) = self.map.pfn(page) else { return Err(self.misuse(Misuse::NotAPage)) };
        if to > order {
            return Err(self.misuse(Misuse::BadOrder { order: to }));
        }
        let state = page.state();
        if !state.is_allocated() {
            return Err(self.misuse(Misuse::NotAllocated { pfn: Pfn(pfn) }));
        }
        if state.order() != order {
            return Err(self.misuse(Misuse::WrongOrder {
                pfn: Pfn(pfn),
                given: order,
                actual: state.order(),
            }));
        }
        if state.flags().contains(PageFlags::HEAD) {
            return Err(self.misuse(Misuse::StillInUse { pfn: Pfn(pfn), flags: PageFlags::HEAD }));
        }
        let piece = PageState::allocated(to, PageFlags::empty());
        if state.count() != 1 || !page.restate(state, piece) {
            return Err(self.misuse(Misuse::Shared { pfn: Pfn(pfn), count: page.page_count() }));
        }
        for n in 1..1 << (order - to) {
            self.map.page_in_map(pfn + (n << to)).set_allocated(piece);
        }
        self.note_split(pfn, order, to);
        Ok(())
    }

    /// Takes exactly the free block of `order` at `pfn`, off whatever list it is on: for machines
    /// that are to start in a known state, for firmware hand-over, for testing frames. Mobility of the
    /// pageblock stays as it is; watermarks do not apply.
    ///
    /// Frames on per-CPU lists are not found; drain first.
    ///
    /// # Errors
    /// `NoMemory` if any frame of the block is not in the free lists; `Invalid` for an order above
    /// [`max_order`](Self::max_order) or a frame that is not aligned to it.
    #[track_caller]
    pub fn alloc_pages_at(&self, pfn: Pfn, order: u32, gfp: Gfp) -> Result<&Page, AllocError> {
        if order > self.max_order || !pfn.is_aligned(order) {
            return Err(self.refuse(gfp, order, GfpError::OrderTooLarge));
        }
        let fails = || self.fails(gfp, Location::caller()) || self.fault.strikes();
        let Some(zone) = self.page_zone(pfn).filter(|_| !fails()) else {
            return Err(AllocError::NoMemory);
        };
        let last = pfn.0 + ((1 << order) - 1);
        if self.page_zone(Pfn(last)).is_none_or(|z| z.slot != zone.slot) {
            return Err(AllocError::NoMemory);
        }
        let area = zone.area_of(pfn.0);
        let claimed = zone.with_area(&self.p, &self.map, area, |a| a.claim_at(pfn.0, order));
        if !claimed {
            return Err(AllocError::NoMemory);
        }
        self.count(VmEvent::pgalloc(zone.zone_type()), 1 << order);
        let head = order > 0 && gfp.contains(Gfp::COMP);
        let flags = if head { PageFlags::HEAD } else { PageFlags::empty() };
        let page = self.dress(self.map.page_in_map(pfn.0), PageState::allocated(order, flags));
        if page.is_some() && gfp.contains(Gfp::ZERO) {
            self.p.zero_frames(pfn, 1 << order);
        }
        if let Some(page) = page {
            self.note_alloc(page, order, gfp, Location::caller());
            let migratetype = gfp.migratetype();
            self.trace(&Event::PageAlloc { pfn: Some(pfn), order, gfp, migratetype });
        }
        page.ok_or(AllocError::NoMemory)
    }

    /// The order of the maximal free block that the frame is in; `None` when it is not in the free
    /// lists (`PageBuddy`).
    pub fn buddy_order(&self, pfn: Pfn) -> Option<u32> {
        let zone = self.page_zone(pfn)?;
        zone.with_area(&self.p, &self.map, zone.area_of(pfn.0), |a| a.free_order(pfn.0))
    }
}
