//! Mapping what is there already: pages of the caller's, and devices.
//!
//! # Locking
//! None: an area that is being mapped is its maker's; vm_map_pages holds it by its state.

use super::{
    VmFlags, Vmap,
    area::{Area, State},
};
use crate::{
    error::{AllocError, Misuse},
    gfp::Gfp,
    page::{Page, PageFlags},
    page_alloc::Reclaim,
    page_state::NodeStat,
    platform::{PageProt, Platform},
    types::{Pfn, ZoneType},
};
use core::{panic::Location, ptr::NonNull, sync::atomic::Ordering::Relaxed};

impl<P: Platform, R: Reclaim> Vmap<'_, P, R> {
    /// Maps the frames of an area from place `from` on.
    pub(super) fn map_from(
        &self,
        area: &Area,
        from: u32,
        prot: PageProt,
        gfp: Gfp,
    ) -> Result<(), AllocError> {
        area.frames.runs(from, |i, pfn, count| {
            let addr = area.shown(Self::PAGE) + i as usize * Self::PAGE;
            self.map_run(addr, pfn, count, prot, gfp)
        })
    }

    fn map_run(
        &self,
        addr: usize,
        pfn: Pfn,
        count: u32,
        prot: PageProt,
        gfp: Gfp,
    ) -> Result<(), AllocError> {
        let mut tables = || self.table(gfp);
        // SAFETY: the addresses are those of an area that is being made, in the range, where nothing is mapped.
        let mapped = unsafe { self.p().map_pages(addr, pfn, count, prot, &mut tables) };
        mapped.map_err(|_| AllocError::NoMemory)
    }

    /// A frame for a page table.
    fn table(&self, gfp: Gfp) -> Option<Pfn> {
        let pages = self.objects.pages;
        let gfp =
            (gfp & (Gfp::RECLAIM | Gfp::IO | Gfp::FS | Gfp::NORETRY)) | Gfp::ZERO | Gfp::NOWARN;
        let page = pages.alloc_pages(gfp, 0).ok()?;
        let pfn = pages.page_to_pfn(page)?;
        let node = pages.page_zone(pfn).map_or(0, |zone| zone.node());
        pages.mod_node_page_state(node, NodeStat::PageTable, 1);
        Some(pfn)
    }

    /// `vmap`.
    #[track_caller]
    pub(crate) fn vmap(
        self,
        given: &[&Page],
        flags: VmFlags,
        prot: PageProt,
    ) -> Result<NonNull<u8>, AllocError> {
        let gfp = Gfp::KERNEL;
        self.check_context(gfp)?;
        let nr =
            u32::try_from(given.len()).ok().filter(|nr| *nr > 0).ok_or(AllocError::NoMemory)?;
        self.check_pages(given)?;
        let flags = (flags & VmFlags::MAP_PUT_PAGES) | VmFlags::MAP;
        let area = self.reserve(nr, Self::PAGE, gfp, flags, Location::caller())?;
        let made = area
            .frames
            .make(&self.objects, nr, gfp | Gfp::NOWARN)
            .and_then(|()| self.show(area, given, prot));
        match made {
            Ok(()) => {
                area.set_state(State::Live);
                Ok(Self::address(area))
            }
            Err(e) => {
                // The pages are still the caller's.
                area.set_flags(VmFlags::MAP);
                self.take_apart(area);
                Err(e)
            }
        }
    }

    /// Refuses pages of another machine: before there is anything that a panic would leave behind.
    #[track_caller]
    fn check_pages(&self, given: &[&Page]) -> Result<(), AllocError> {
        let pages = self.objects.pages;
        if given.iter().all(|page| pages.page_to_pfn(page).is_some()) {
            return Ok(());
        }
        pages.misuse(Misuse::NotAPage);
        Err(AllocError::NoMemory)
    }

    /// Shows pages, which were checked, behind those that an area shows already.
    fn show(&self, area: &Area, given: &[&Page], prot: PageProt) -> Result<(), AllocError> {
        let from = area.frames.len();
        let pages = self.objects.pages;
        area.frames.push(given.len(), |i| pages.page_to_pfn(given[i]).unwrap_or_default());
        self.map_from(area, from, prot, Gfp::KERNEL)
    }

    /// `get_vm_area`.
    #[track_caller]
    pub(crate) fn get_vm_area(self, size: usize) -> Result<NonNull<u8>, AllocError> {
        let gfp = Gfp::KERNEL;
        self.check_context(gfp)?;
        // It may be longer than memory, but its table, which is made now, may not.
        let memory = self.objects.pages.totalram_pages() << P::PAGE_SHIFT;
        let nr = u32::try_from(size.div_ceil(Self::PAGE)).ok().filter(|nr| {
            let with_guard = (*nr as usize + 1).checked_mul(Self::PAGE);
            let fits = with_guard.is_some_and(|size| self.has_place(size, Self::PAGE));
            *nr > 0 && fits && u64::from(*nr) * size_of::<u32>() as u64 <= memory
        });
        let nr = nr.ok_or(AllocError::NoMemory)?;
        let flags = VmFlags::MAP | VmFlags::SPARSE;
        let area = self.reserve(nr, Self::PAGE, gfp, flags, Location::caller())?;
        match area.frames.make(&self.objects, nr, gfp | Gfp::NOWARN) {
            Ok(()) => {
                area.set_state(State::Live);
                Ok(Self::address(area))
            }
            Err(e) => {
                self.take_apart(area);
                Err(e)
            }
        }
    }

    /// `vm_map_pages`.
    #[track_caller]
    pub(crate) fn vm_map_pages(
        self,
        at: NonNull<u8>,
        given: &[&Page],
        prot: PageProt,
    ) -> Result<(), AllocError> {
        self.check_context(Gfp::KERNEL)?;
        self.check_pages(given)?;
        let addr = at.addr().get();
        // Taken out of use meanwhile, so that nobody frees it or looks at its frames.
        let area = {
            let tree = self.tree();
            tree.find(addr).filter(|area| {
                let sparse = |flags: VmFlags| flags.contains(VmFlags::SPARSE);
                area.start() == addr && self.take_live(area, State::Building, sparse).is_ok()
            })
        };
        let Some(area) = area else {
            self.objects.pages.misuse(Misuse::NoArea { addr });
            return Err(AllocError::NoMemory);
        };
        let (len, nr) = (area.frames.len() as usize, area.size / Self::PAGE - 1);
        let shown = if given.len() > nr - len {
            Err(AllocError::NoMemory)
        } else {
            self.show(area, given, prot)
        };
        if shown.is_err() && area.frames.len() as usize > len {
            // What was mapped of them goes; nobody was told of the addresses.
            let (from, to) = (area.start() + len * Self::PAGE, area.start() + nr * Self::PAGE);
            // SAFETY: the area's own addresses, which nobody uses yet.
            unsafe { self.p().unmap_pages(from..to) };
            self.p().flush_tlb_kernel_range(from..to);
            area.frames.truncate(len as u32);
        }
        area.set_state(State::Live);
        shown
    }

    /// Whether a frame is the allocator's. What is reserved is not; neither is a low frame that the direct map does
    /// not show: it is in a small hole.
    fn is_memory(&self, pfn: Pfn) -> bool {
        let pages = self.objects.pages;
        let low = |kind| kind < ZoneType::HighMem;
        let hole = pages.page_zone(pfn).is_some_and(|zone| low(zone.zone_type()))
            && self.p().direct_map(pfn).is_none();
        let reserved = |page: &Page| page.flags().contains(PageFlags::RESERVED);
        !hole && pages.pfn_to_page(pfn).is_some_and(|page| !reserved(page))
    }

    /// `ioremap`.
    #[track_caller]
    pub(crate) fn ioremap(
        self,
        phys: u64,
        size: usize,
        prot: PageProt,
    ) -> Result<NonNull<u8>, AllocError> {
        let gfp = Gfp::KERNEL;
        self.check_context(gfp)?;
        let offset = (phys % Self::PAGE as u64) as usize;
        let end = offset.checked_add(size).filter(|_| size > 0).ok_or(AllocError::NoMemory)?;
        let nr = u32::try_from(end.div_ceil(Self::PAGE)).map_err(|_| AllocError::NoMemory)?;
        let first = u32::try_from(phys >> P::PAGE_SHIFT).map_err(|_| AllocError::NoMemory)?;
        let last = first.checked_add(nr).ok_or(AllocError::NoMemory)?;
        // Else the search below would be in vain, and long.
        let size = (nr as usize + 1).checked_mul(Self::PAGE).ok_or(AllocError::NoMemory)?;
        if !self.has_place(size, Self::PAGE) {
            return Err(AllocError::NoMemory);
        }
        let pages = self.objects.pages;
        if let Some(pfn) = (first..last).map(Pfn).find(|pfn| self.is_memory(*pfn)) {
            pages.misuse(Misuse::IoremapOfMemory { pfn });
            return Err(AllocError::NoMemory);
        }
        let huge = if nr >> P::HUGE_ORDER != 0 { P::HUGE_ORDER } else { 0 };
        let (flags, at) = (VmFlags::IOREMAP, Location::caller());
        let (area, _) = self.reserve_large(nr, huge, Self::PAGE, gfp, flags, at)?;
        area.phys.store(phys - offset as u64, Relaxed);
        match self.map_run(area.start(), Pfn(first), nr, prot | PageProt::HUGE, gfp) {
            Ok(()) => {
                area.set_state(State::Live);
                // SAFETY: the offset is inside the area's first frame.
                Ok(unsafe { Self::address(area).add(offset) })
            }
            Err(e) => {
                self.take_apart(area);
                Err(e)
            }
        }
    }
}
