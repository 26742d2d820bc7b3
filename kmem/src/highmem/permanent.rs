//! `kmap` and `kunmap`: mappings that all CPUs see and that are counted.

use super::{
    Locked, Maps, pointer,
    table::{Batch, Outcome, Place, Ring, Table, Waiter},
};
use crate::{
    context::Path,
    error::{AllocError, Misuse},
    gfp::Gfp,
    page::Page,
    page_alloc::Reclaim,
    platform::{Level, Platform},
    types::Pfn,
};
use core::{
    ptr::NonNull,
    sync::atomic::Ordering::{Acquire, Relaxed, Release},
};

/// How long a sleeper waits before it looks again by itself: it need not.
const FOREVER: u64 = u64::MAX;

impl<'a, P: Platform, R: Reclaim> Maps<'a, P, R> {
    /// Maps a page, or adds a user to its mapping.
    #[inline]
    #[track_caller]
    pub(crate) fn kmap(&self, page: &Page) -> Result<NonNull<u8>, AllocError> {
        self.pages.check_context(Gfp::KERNEL)?;
        let pfn = self.pfn_of(page).map_err(|_| AllocError::NoMemory)?;
        match self.p().direct_map(pfn) {
            Some(at) => Ok(at),
            None => self.kmap_high(pfn),
        }
    }

    #[inline]
    fn kmap_high(&self, pfn: Pfn) -> Result<NonNull<u8>, AllocError> {
        let held = {
            let _mark = self.pages.mark(Path::Kmap);
            self.glance(pfn).filter(|(_, place)| place.try_hold(pfn))
        };
        match held {
            Some((at, _)) => Ok(pointer(self.permanent_at(at))),
            None => self.kmap_new(pfn),
        }
    }

    /// Where a page is mapped, as far as that is seen without the lock, and where what is unmapped stays for a while.
    #[inline]
    fn glance(&self, pfn: Pfn) -> Option<(u16, &'static Place)> {
        if self.state.eager { None } else { self.state.places.glance(pfn) }
    }

    #[inline(never)]
    fn kmap_new(&self, pfn: Pfn) -> Result<NonNull<u8>, AllocError> {
        if self.state.base == self.state.local {
            return Err(AllocError::NoMemory);
        }
        let mut mine: Option<Batch> = None;
        loop {
            let mut ring = Ring::default();
            let mut table = self.lock();
            if let Some(mine) = mine.take() {
                mine.iter().for_each(|place| table.put_clean(place));
            }
            if table.is_crowded(pfn) {
                table.give_clean(&mut ring);
                drop(table);
                self.ring(&ring);
                self.p()
                    .report(Level::Bug, format_args!("BUG: pfn:{pfn} has too many users of kmap"));
                return Err(AllocError::NoMemory);
            }
            if let Some(place) = self.claim(&mut table, pfn, &mut ring) {
                table.give_clean(&mut ring);
                drop(table);
                self.ring(&ring);
                return Ok(pointer(self.permanent_at(place)));
            }
            let batch = match table.take_stale() {
                Some(batch) => {
                    table.flushes += 1;
                    drop(table);
                    batch
                }
                None => match self.sleep(table, pfn) {
                    Outcome::Mapped(place) => return Ok(pointer(self.permanent_at(place))),
                    Outcome::Given { place, stale } => Batch::one(place, stale),
                    Outcome::Waiting => continue,
                },
            };
            self.flush(&batch);
            mine = Some(batch);
        }
    }

    /// The page's place, or a clean one for it, with a user more.
    fn claim(&self, table: &mut Table, pfn: Pfn, ring: &mut Ring) -> Option<u16> {
        let (at, new) = match table.find(pfn) {
            Some(at) => (at, false),
            None => (table.take_clean(pfn)?, true),
        };
        let place = table.place(at);
        // Before the page has a user there.
        if !place.set.load(Relaxed) {
            // SAFETY: the place is one of the range's and shows this page, which is memory, from now on; what it showed
            // before, if that was another page, was flushed before it became clean.
            unsafe { self.p().kmap_set(self.permanent_at(at), pfn) };
            place.set.store(true, Relaxed);
        }
        if new {
            place.show(pfn);
            table.share(at, ring);
        } else {
            table.hold(at);
        }
        Some(at)
    }

    /// Makes all CPUs forget what stale places showed. They are the caller's.
    fn flush(&self, batch: &Batch) {
        if !batch.stale {
            return;
        }
        if !self.state.eager {
            for place in batch.iter() {
                // SAFETY: a place of the range's that the caller has for itself; its last user is gone.
                unsafe { self.p().kmap_clear(self.permanent_at(place)) };
            }
        }
        if let (Some(first), Some(last)) = (batch.iter().next(), batch.iter().next_back()) {
            let end = self.permanent_at(last) + (1 << P::PAGE_SHIFT);
            self.p().flush_tlb_kernel_range(self.permanent_at(first)..end);
        }
    }

    /// Stands in line until there is something for the caller.
    fn sleep(&self, mut table: Locked<'a, P>, pfn: Pfn) -> Outcome {
        let mut waiter = Waiter::new(pfn);
        // One pointer for all uses from here on: the table's and this function's own.
        let waiter = &raw mut waiter;
        // SAFETY: it is this frame's, and stays in place until the outcome is there: `Platform::wait` does not unwind.
        let bell = unsafe { table.push(waiter) };
        drop(table);
        let bell = &self.state.bells[bell];
        loop {
            // Acquire pairs with the Release in `ring`. Read before the look: who serves this sleeper after the look
            // rings after it too, so the wait ends.
            let heard = bell.load(Acquire);
            // SAFETY: pushed above, to the table of the same machine.
            match unsafe { self.lock().outcome(waiter) } {
                Outcome::Waiting => self.p().wait(bell, heard, FOREVER),
                outcome => return outcome,
            }
        }
    }

    fn ring(&self, ring: &Ring) {
        for bell in ring.bells() {
            let bell = &self.state.bells[bell];
            // Release pairs with the Acquire in `sleep`.
            bell.fetch_add(1, Release);
            self.p().wake(bell);
        }
    }

    /// Takes a user from a page's mapping.
    #[inline]
    #[track_caller]
    pub(crate) fn kunmap(&self, page: &Page) -> Result<(), Misuse> {
        let pfn = self.pfn_of(page)?;
        match self.p().direct_map(pfn) {
            Some(_) => Ok(()),
            None => self.kunmap_high(pfn),
        }
    }

    #[track_caller]
    fn kunmap_high(&self, pfn: Pfn) -> Result<(), Misuse> {
        if self.pages.context().in_nmi() {
            return Err(self.pages.misuse(Misuse::InNmi));
        }
        let done = {
            let _mark = self.pages.mark(Path::Kmap);
            self.glance(pfn).is_some_and(|(_, place)| place.try_let_go(pfn))
        };
        if done { Ok(()) } else { self.kunmap_last(pfn) }
    }

    /// As `kunmap_high`, with the lock.
    #[inline(never)]
    #[track_caller]
    fn kunmap_last(&self, pfn: Pfn) -> Result<(), Misuse> {
        let mut ring = Ring::default();
        let mut table = self.lock();
        let Some((place, last)) = table.let_go(pfn) else {
            drop(table);
            return Err(self.pages.misuse(Misuse::NotKmapped { pfn }));
        };
        if last {
            if self.state.eager && table.place(place).set.swap(false, Relaxed) {
                // SAFETY: a place of the range's; nobody uses what it shows any more.
                unsafe { self.p().kmap_clear(self.permanent_at(place)) };
            }
            if !table.give(place, &mut ring) {
                table.leave(place);
            }
        }
        drop(table);
        self.ring(&ring);
        Ok(())
    }

    /// Where a high page is mapped; `None` if that takes the lock in an NMI, which may have landed in it.
    pub(super) fn mapped_at(&self, pfn: Pfn) -> Option<usize> {
        let at = match self.state.places.glance(pfn) {
            Some((at, place)) if place.used() == Some(pfn) => at,
            _ if self.pages.context().in_nmi() => return None,
            _ => self.lock().find_used(pfn)?,
        };
        Some(self.permanent_at(at))
    }

    /// The page that a place shows.
    pub(super) fn mapped_in(&self, at: u16) -> Option<Pfn> {
        self.state.places.get(at)?.used()
    }
}
