//! vfree, vunmap, iounmap, in any context.
//!
//! # Locking
//! A shard of the tree's lock while the area is looked up and taken from LIVE to DYING, by compare-and-exchange: of two
//! that free it one succeeds.

use super::{
    At, VmFlags, Vmap,
    area::{Area, List, Place, Stack, State, Word},
};
use crate::{error::Misuse, page_alloc::Reclaim, page_state::SystemStat, platform::Platform};
use core::panic::Location;

/// The call that frees an area.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum By {
    Vfree,
    Vunmap,
    Iounmap,
    FreeThreadStack,
    FreeIrqStacks,
}

impl By {
    fn name(self) -> &'static str {
        match self {
            By::Vfree => "vfree",
            By::Vunmap => "vunmap",
            By::Iounmap => "iounmap",
            By::FreeThreadStack => "free_thread_stack",
            By::FreeIrqStacks => "free_irq_stacks",
        }
    }

    /// Whether it is the one for an area.
    fn frees(self, flags: VmFlags) -> bool {
        let stack = flags & (VmFlags::STACK | VmFlags::IRQ_STACK);
        match self {
            By::FreeThreadStack => stack == VmFlags::STACK,
            By::FreeIrqStacks => stack.contains(VmFlags::IRQ_STACK),
            By::Vfree if !stack.is_empty() => false,
            By::Vfree => flags.intersects(VmFlags::ALLOC | VmFlags::MAP_PUT_PAGES),
            By::Vunmap => flags.contains(VmFlags::MAP),
            By::Iounmap => flags.contains(VmFlags::IOREMAP),
        }
    }

    fn right(flags: VmFlags) -> By {
        const OTHERS: [By; 4] = [By::Vfree, By::Vunmap, By::FreeThreadStack, By::FreeIrqStacks];
        OTHERS.into_iter().find(|by| by.frees(flags)).unwrap_or(By::Iounmap)
    }
}

/// What is done with an area that was given back, last and also if a misuse was fatal: its addresses are free.
struct Last<'a, 'v, P: Platform, R: Reclaim> {
    vmap: &'a Vmap<'v, P, R>,
    area: &'static Area,
}

impl<P: Platform, R: Reclaim> Drop for Last<'_, '_, P, R> {
    #[inline(always)]
    fn drop(&mut self) {
        self.area.frames.clear(&self.vmap.objects);
        self.vmap.retire(self.area);
    }
}

/// Deferred frees that are being done. If one panics, as a misuse may, the others go back to wait.
struct Rest<'a> {
    list: List,
    of: &'a Stack,
}

impl Drop for Rest<'_> {
    fn drop(&mut self) {
        while let Some(area) = self.list.pop() {
            self.of.push(area);
        }
    }
}

impl<P: Platform, R: Reclaim> Vmap<'_, P, R> {
    /// Frees the area at an address.
    #[inline]
    #[track_caller]
    pub(crate) fn free(self, addr: usize, by: By) -> Result<(), Misuse> {
        if self.objects.pages.context().in_nmi() {
            return Err(self.objects.pages.misuse(Misuse::InNmi));
        }
        let addr = if by == By::Iounmap { addr & !(Self::PAGE - 1) } else { addr };
        let area = self.claim(addr, by, State::Dying)?;
        if by == By::Vunmap {
            area.set_flags(area.flags() - VmFlags::MAP_PUT_PAGES);
        }
        self.finish(area)
    }

    /// Gives back an area that is DYING, at once or when the context allows it.
    #[inline]
    #[track_caller]
    pub(super) fn finish(self, area: &'static Area) -> Result<(), Misuse> {
        if self.may_sleep() {
            if !self.state.deferred.is_empty() {
                self.run_deferred_frees();
            }
            self.give_back(area)
        } else {
            self.state.deferred.push(area);
            Ok(())
        }
    }

    /// Takes an area from LIVE to another state, DYING or KEPT: it is the caller's then.
    #[inline]
    #[track_caller]
    pub(super) fn claim(&self, addr: usize, by: By, to: State) -> Result<&'static Area, Misuse> {
        let tree = self.tree();
        let Some(area) = tree.find(addr) else {
            drop(tree);
            return Err(self.objects.pages.misuse(Misuse::NoArea { addr }));
        };
        let right = |flags| area.shown_as(flags, Self::PAGE) == addr && by.frees(flags);
        match self.take_live(area, to, right) {
            Ok(()) => {
                drop(tree);
                area.set_freed_by(Location::caller());
                Ok(area)
            }
            Err(found) => {
                let start = area.shown_as(found.flags(), Self::PAGE);
                let (caller, freed_by) = (area.caller(), area.freed_by());
                drop(tree);
                Err(self.not_claimed(addr, by, found, start, caller, freed_by))
            }
        }
    }

    /// Takes an area from LIVE to another state if its flags are `right`; else says what it is. The caller has a shard of
    /// the tree's lock.
    #[inline(always)]
    pub(super) fn take_live(
        &self,
        area: &Area,
        to: State,
        right: impl Fn(VmFlags) -> bool,
    ) -> Result<(), Word> {
        loop {
            let word = area.word();
            if word.state() != State::Live || !right(word.flags()) {
                return Err(word);
            }
            if area.take(word, to) {
                return Ok(());
            }
            // Somebody looks at it, or has taken it.
            self.p().relax();
        }
    }

    /// Reports that what was found at an address is not to be freed by the call.
    #[cold]
    #[track_caller]
    fn not_claimed(
        &self,
        addr: usize,
        by: By,
        found: Word,
        start: usize,
        caller: Place,
        freed_by: Place,
    ) -> Misuse {
        let (state, flags) = (found.state(), found.flags());
        let wrong = if start != addr {
            match state {
                State::Live | State::Building => Misuse::InsideArea { addr, start },
                _ => Misuse::NoArea { addr },
            }
        } else if state != State::Live {
            Misuse::AreaFree { addr }
        } else {
            Misuse::WrongArea { addr, given: by.name(), right: By::right(flags).name() }
        };
        let pages = self.objects.pages;
        match (caller, freed_by.filter(|_| state != State::Live)) {
            (Some(by), Some(freed)) => pages.misuse_with(
                wrong,
                format_args!("\n  allocated at {}\n  freed at {}", At(by), At(freed)),
            ),
            (Some(by), None) => {
                pages.misuse_with(wrong, format_args!("\n  allocated at {}", At(by)))
            }
            (None, _) => pages.misuse(wrong),
        }
    }

    /// Does what is left to do for an area that is DYING. Process context.
    #[inline]
    #[track_caller]
    fn give_back(&self, area: &'static Area) -> Result<(), Misuse> {
        self.unmap(area);
        let _last = Last { vmap: self, area };
        let flags = area.flags();
        let mut result = Ok(());
        if flags.contains(VmFlags::ALLOC) {
            let freed = -i64::from(area.frames.len());
            self.objects.pages.mod_system_state(SystemStat::VmallocUsed, freed);
            result = self.free_frames(area);
        } else if flags.contains(VmFlags::MAP_PUT_PAGES) {
            result = self.put_frames(area);
        }
        result
    }

    /// Takes an area apart that was not made to its end.
    #[cold]
    pub(super) fn take_apart(&self, area: &'static Area) {
        self.unmap(area);
        if area.flags().contains(VmFlags::ALLOC) {
            // They are its own since a moment ago.
            let _ = self.free_frames(area);
        }
        area.frames.clear(&self.objects);
        self.retire(area);
    }

    #[inline]
    fn unmap(&self, area: &Area) {
        let bytes = Self::mapped_bytes(area);
        if bytes > 0 {
            let start = area.shown(Self::PAGE);
            // SAFETY: the area's own addresses, which by the contract of whoever freed it nobody uses any more.
            unsafe { self.p().unmap_pages(start..start + bytes) };
        }
    }

    /// Frees the frames that an area has of its own.
    #[track_caller]
    fn free_frames(&self, area: &Area) -> Result<(), Misuse> {
        let mut result = Ok(());
        // From the end: what was freed last is given out first, and neighbours are mapped together.
        area.frames.pieces_from_the_end(|frames| {
            // One that somebody else freed is reported there.
            result = result.and(self.objects.pages.free_frames_bulk(frames));
        });
        result
    }

    /// Drops a reference to each page that an area shows.
    #[track_caller]
    fn put_frames(&self, area: &Area) -> Result<(), Misuse> {
        let pages = self.objects.pages;
        let mut result = Ok(());
        for page in (0..area.frames.len()).filter_map(|i| pages.pfn_to_page(area.frames.get(i)?)) {
            // All of them, whatever became of one.
            result = result.and(pages.put_page(page));
        }
        result
    }

    /// Frees what was freed in atomic context; returns how many areas there were. Process context.
    #[cold]
    pub(super) fn run_deferred_frees(&self) -> u64 {
        let mut rest = Rest { list: self.state.deferred.take(), of: &self.state.deferred };
        let mut nr = 0;
        while let Some(area) = rest.list.pop() {
            // A misuse (somebody freed its frames) is reported by the callee.
            let _ = self.give_back(area);
            nr += 1;
        }
        nr
    }
}
