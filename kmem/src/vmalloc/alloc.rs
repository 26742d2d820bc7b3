//! vmalloc: an address, frames, mappings.
//!
//! # Implementation
//! The area has its address first, since that is what most often costs nothing; then its frames, in bulk; then they
//! are mapped run by run. Whatever fails, the area is taken apart the way vfree does it, and comes to the lazy
//! list: something may have been mapped.
//!
//! # Locking
//! A shard's lock, or all of the tree's, while the address is found.

use super::{
    VmFlags, Vmap,
    area::{Area, State},
};
use crate::{
    context::Path,
    error::AllocError,
    gfp::Gfp,
    page_alloc::Reclaim,
    page_state::SystemStat,
    platform::{Level, PageProt, Platform},
    slab::SlabFlags,
    types::Pfn,
};
use core::{panic::Location, ptr::NonNull, sync::atomic::AtomicU32};

/// How long a request that may not fail sleeps before it tries again.
const AGAIN_NS: u64 = 10_000_000;

/// What of a request's flags concerns descriptors and tables.
const FOR_METADATA: Gfp = Gfp::RECLAIM
    .union(Gfp::IO)
    .union(Gfp::FS)
    .union(Gfp::HIGH)
    .union(Gfp::MEMALLOC)
    .union(Gfp::NOMEMALLOC)
    .union(Gfp::NORETRY)
    .union(Gfp::RETRY_MAYFAIL);

/// What vmalloc's frames cannot be.
const NOT_FOR_FRAMES: Gfp = Gfp::COMP.union(Gfp::MOVABLE).union(Gfp::RECLAIMABLE);

/// A request.
#[derive(Clone, Copy)]
pub(crate) struct Wanted {
    /// Bytes.
    pub(crate) size: usize,
    /// Alignment of the address: a power of two; below a frame it is a frame's.
    pub(crate) align: usize,
    pub(crate) gfp: Gfp,
    pub(crate) prot: PageProt,
    pub(crate) flags: VmFlags,
    /// −1 for the caller's.
    pub(crate) node: i32,
}

impl Wanted {
    pub(crate) const fn new(size: usize, gfp: Gfp) -> Wanted {
        let (prot, flags) = (PageProt::KERNEL, VmFlags::ALLOC);
        Wanted { size, align: 1, gfp, prot, flags, node: -1 }
    }
}

impl<P: Platform, R: Reclaim> Vmap<'_, P, R> {
    /// Refuses what its context does not allow: anything but process context.
    #[inline]
    #[track_caller]
    pub(super) fn check_context(&self, gfp: Gfp) -> Result<(), AllocError> {
        let pages = self.objects.pages;
        let context = pages.context();
        // Before interrupts are on nothing sleeps.
        if !context.may_sleep() && (context.in_nmi() || pages.allowed(Gfp::KERNEL).may_block()) {
            return Err(pages.refuse_context(gfp | Gfp::DIRECT_RECLAIM, 0));
        }
        Ok(())
    }

    /// vmalloc and all its variants.
    #[inline]
    #[track_caller]
    pub(crate) fn vmalloc(self, wanted: Wanted) -> Result<NonNull<u8>, AllocError> {
        self.make(wanted).map(Self::address)
    }

    /// [`vmalloc`](Self::vmalloc) for who touches what is there, or has others touch it: refused where nothing is.
    #[track_caller]
    pub(crate) fn vmalloc_mapped(self, wanted: Wanted) -> Result<NonNull<u8>, AllocError> {
        self.check_mapped(&wanted)?;
        self.vmalloc(wanted)
    }

    /// Refuses where areas have addresses only.
    #[track_caller]
    pub(super) fn check_mapped(&self, wanted: &Wanted) -> Result<(), AllocError> {
        if self.p().vmalloc_is_mapped() {
            return Ok(());
        }
        self.failed(wanted, "areas are not mapped here", Location::caller())
    }

    /// An area with frames of its own.
    #[inline]
    #[track_caller]
    pub(super) fn make(self, wanted: Wanted) -> Result<&'static Area, AllocError> {
        self.check_context(wanted.gfp)?;
        let at = Location::caller();
        let frames = wanted.size.div_ceil(Self::PAGE);
        let possible = frames as u64 <= self.objects.pages.totalram_pages();
        let Some(nr) = u32::try_from(frames).ok().filter(|n| *n > 0 && possible) else {
            return self.failed(&wanted, "size does not fit", at);
        };
        loop {
            match self.build(&wanted, nr, at) {
                Ok(area) => {
                    let used = i64::from(nr);
                    self.objects.pages.mod_system_state(SystemStat::VmallocUsed, used);
                    return Ok(area);
                }
                Err(AllocError::NoMemory) if self.may_retry(&wanted, nr) => {}
                Err(AllocError::NoMemory) => {
                    return self.failed(&wanted, "no memory or no addresses", at);
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// Whether an area of `size` bytes, the guards included, has a place among no others.
    pub(super) fn has_place(&self, size: usize, align: usize) -> bool {
        let range = self.p().vmalloc_range().map_or(0, |range| range.len());
        // What the tree looks for: wherever it is, an aligned place is in it.
        align.is_power_of_two() && size.checked_add(align - Self::PAGE).is_some_and(|n| n <= range)
    }

    /// Sleeps, if the request may not fail and could be served.
    #[cold]
    fn may_retry(&self, wanted: &Wanted, nr: u32) -> bool {
        let guards = 1 + usize::from(wanted.flags.contains(VmFlags::STACK));
        let size = (nr as usize + guards) * Self::PAGE;
        let fits = self.has_place(size, wanted.align.max(Self::PAGE));
        let again = fits && wanted.gfp.contains(Gfp::NOFAIL) && wanted.gfp.may_block();
        if again {
            self.p().wait(&AtomicU32::new(0), 0, AGAIN_NS);
        }
        again
    }

    /// Where the first of an area's frames is shown, as a pointer.
    pub(super) fn address(area: &Area) -> NonNull<u8> {
        let at = core::ptr::with_exposed_provenance_mut(area.shown(Self::PAGE));
        // The range does not contain null.
        NonNull::new(at).unwrap_or(NonNull::dangling())
    }

    #[cold]
    fn failed<T>(
        &self,
        wanted: &Wanted,
        why: &str,
        at: &'static Location<'static>,
    ) -> Result<T, AllocError> {
        let Wanted { size, gfp, .. } = *wanted;
        let pages = self.objects.pages;
        if !gfp.contains(Gfp::NOWARN) && pages.may_report_failure() {
            let (file, line) = (at.file(), at.line());
            self.p().report(
                Level::Warning,
                format_args!(
                    "vmalloc error: size {size}, {why}, mode:{:#x}({gfp}), at {file}:{line}",
                    gfp.bits()
                ),
            );
        }
        Err(AllocError::NoMemory)
    }

    /// An area with all that belongs to it.
    fn build(
        &self,
        wanted: &Wanted,
        nr: u32,
        at: &'static Location<'static>,
    ) -> Result<&'static Area, AllocError> {
        let huge = self.huge_order(wanted, nr);
        let guard = u32::from(wanted.flags.contains(VmFlags::STACK));
        let Wanted { align, gfp, flags, .. } = *wanted;
        let (area, huge) = self.reserve_large(nr + guard, huge, align, gfp, flags, at)?;
        let prot = if huge > 0 { wanted.prot | PageProt::HUGE } else { wanted.prot };
        let built = self
            .frames_for(area, wanted, nr, huge)
            .and_then(|()| self.map_from(area, 0, prot, wanted.gfp));
        match built {
            Ok(()) => {
                // A stack is LIVE once `issue` has given it to somebody: the word of a LIVE area is not its owner's.
                let guarded = flags.contains(VmFlags::STACK);
                area.set_state(if guarded { State::Kept } else { State::Live });
                Ok(area)
            }
            Err(e) => {
                self.take_apart(area);
                Err(e)
            }
        }
    }

    /// Order of the blocks that a request is served with where there are any: 0 unless it asks for large ones.
    fn huge_order(&self, wanted: &Wanted, nr: u32) -> u32 {
        let order = P::HUGE_ORDER;
        let asked = wanted.flags.contains(VmFlags::ALLOW_HUGE_VMAP);
        if asked && order <= self.objects.pages.max_order() && nr >> order != 0 { order } else { 0 }
    }

    /// An area aligned for blocks of order `huge` if there is room for that, else for order 0; with the order.
    #[inline(always)]
    pub(super) fn reserve_large(
        &self,
        nr: u32,
        mut huge: u32,
        align: usize,
        gfp: Gfp,
        flags: VmFlags,
        at: &'static Location<'static>,
    ) -> Result<(&'static Area, u32), AllocError> {
        loop {
            match self.reserve(nr, align.max(Self::PAGE << huge), gfp, flags, at) {
                Err(AllocError::NoMemory) if huge > 0 => huge = 0,
                got => return Ok((got?, huge)),
            }
        }
    }

    /// An area of `nr` frames' worth of addresses, with nothing in it. Process context.
    #[inline]
    pub(super) fn reserve(
        &self,
        nr: u32,
        align: usize,
        gfp: Gfp,
        flags: VmFlags,
        at: &'static Location<'static>,
    ) -> Result<&'static Area, AllocError> {
        if !self.state.deferred.is_empty() {
            self.run_deferred_frees();
        }
        let size = (nr as usize + 1).checked_mul(Self::PAGE).ok_or(AllocError::NoMemory)?;
        let shard = self.shard();
        let pooled = if align == Self::PAGE { self.take_pooled(shard, size) } else { None };
        let area = match pooled {
            Some(area) => area,
            None => self.place(size, align, gfp)?,
        };
        area.begin(flags);
        self.state.shards[shard].hint.set(area);
        area.set_caller(at);
        Ok(area)
    }

    /// A new area in the tree.
    #[cold]
    fn place(&self, size: usize, align: usize, gfp: Gfp) -> Result<&'static Area, AllocError> {
        let range = self.p().vmalloc_range().ok_or(AllocError::NoMemory)?;
        if !self.has_place(size, align) {
            return Err(AllocError::NoMemory);
        }
        let objects = &self.objects;
        let cache = match self.state.cache.get() {
            Some(cache) => cache,
            None => {
                let made = objects.create(
                    "vmap_area",
                    size_of::<Area>(),
                    align_of::<Area>(),
                    SlabFlags::HWCACHE_ALIGN | SlabFlags::NO_MERGE,
                    None,
                );
                self.state.cache.set(objects, made.map_err(|_| AllocError::NoMemory)?)
            }
        };
        let at = objects.alloc_from(&cache, (gfp & FOR_METADATA) | Gfp::NOWARN)?.cast::<Area>();
        // SAFETY: an object of the size of an area, ours; objects stay where they are until they are freed, and
        // this one is only when nothing leads to it any more.
        let area: &'static Area = unsafe {
            at.write(Area::new(size));
            at.as_ref()
        };
        for last in [false, true] {
            let mark = self.objects.pages.mark(Path::VmAlloc);
            let mut tree = self.state.tree.change(self.p());
            tree.open(range.start, range.end);
            if tree.insert(area, align, Self::PAGE) {
                return Ok(area);
            }
            drop(tree);
            drop(mark);
            if !last {
                self.reclaim_addresses();
            }
        }
        let _ = objects.free_to(&cache, at.cast());
        Err(AllocError::NoMemory)
    }

    /// Fills an area with frames of its own.
    fn frames_for(
        &self,
        area: &Area,
        wanted: &Wanted,
        nr: u32,
        huge: u32,
    ) -> Result<(), AllocError> {
        let metadata = (wanted.gfp & FOR_METADATA) | Gfp::NOWARN;
        area.frames.make(&self.objects, nr, metadata)?;
        let mut gfp = (wanted.gfp - NOT_FOR_FRAMES) | Gfp::NOWARN;
        if !gfp.intersects(Gfp::DMA_ZONE | Gfp::DMA32) {
            gfp |= Gfp::HIGHMEM;
        }
        // Who may not fail tries all of it again.
        gfp -= Gfp::NOFAIL;
        if huge > 0 {
            self.take_huge(area, wanted.node, gfp, nr, huge);
        }
        while area.frames.len() < nr {
            let left = (nr - area.frames.len()) as usize;
            if wanted.node >= 0 {
                let page = self.objects.pages.alloc_pages_node(wanted.node, gfp, 0)?;
                let pfn = self.objects.pages.page_to_pfn(page).unwrap_or_default();
                area.frames.push(1, |_| pfn);
                continue;
            }
            area.frames.fill(left, |places| {
                let mut filled = 0;
                let done = self.objects.pages.alloc_frames_bulk(gfp, places, &mut filled);
                (filled, done)
            })?;
        }
        Ok(())
    }

    /// Fills an area with frames of large blocks, as far as they are to be had without effort.
    fn take_huge(&self, area: &Area, node: i32, gfp: Gfp, nr: u32, order: u32) {
        let pages = self.objects.pages;
        while nr - area.frames.len() >= 1 << order {
            let Ok(page) = pages.alloc_pages_node(node, gfp | Gfp::NORETRY, order) else { return };
            let Some(pfn) =
                pages.page_to_pfn(page).filter(|_| pages.split_page(page, order).is_ok())
            else {
                return;
            };
            area.frames.push(1 << order, |i| Pfn(pfn.0 + i as u32));
        }
    }

    /// What an area shows, in bytes; 0 while nothing is mapped.
    pub(super) fn mapped_bytes(area: &Area) -> usize {
        if area.flags().contains(VmFlags::IOREMAP) {
            area.size - Self::PAGE
        } else {
            area.frames.len() as usize * Self::PAGE
        }
    }
}
