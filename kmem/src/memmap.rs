//! The memory map: one [`Page`] per frame, and the tables per pageblock.
//!
//! # Concepts
//! The map is one virtually contiguous array over the machine's span of frame numbers, so that a page's
//! frame number is a subtraction and a shift. Holes in physical memory are holes in the map: the
//! platform backs only what [`Platform::sparse_metadata`] names \[F5\].
//!
//! # Implementation
//! Three parallel tables: `Page` per frame, and per pageblock its free bits and its descriptor. All are
//! zero at the start, and zero means: frame not allocated, not free, of no zone. Bring-up therefore
//! touches a word per pageblock and nothing per frame \[F4\]. What lies in holes is read, as zeros, and
//! never written.
//!
//! # Locking
//! The tables are made of atomics; who may write what is told in `page` and `pageblock`.

use crate::{
    page::Page,
    pageblock::{FreeBits, Pageblock, PbFlags},
    types::{PAGEBLOCK_FRAMES, PAGEBLOCK_ORDER, Pfn},
};
use core::ptr::NonNull;

/// The tables of one machine.
pub(crate) struct MemMap {
    /// Address of the `Page` of frame `base`.
    pages: NonNull<Page>,
    /// First frame of the map, a pageblock's first.
    base: u32,
    /// Frames in the map, a multiple of a pageblock's.
    frames: u32,
    pub(crate) bits: &'static [FreeBits],
    pub(crate) blocks: &'static [Pageblock],
}

// SAFETY: every table is made of atomics; the pointer is to `frames` Pages that live as long as the
// platform, which the map's owner keeps.
unsafe impl Send for MemMap {}
// SAFETY: as above.
unsafe impl Sync for MemMap {}

impl MemMap {
    /// A map of `frames` frames from `base`.
    ///
    /// # Safety
    /// `pages` points to `frames` zero-initialised `Page`s, used for nothing else and valid for as long
    /// as the map is used; `base` and `frames` are multiples of a pageblock's frames; the slices have one entry
    /// per pageblock.
    pub(crate) unsafe fn new(
        pages: NonNull<Page>,
        base: u32,
        frames: u32,
        bits: &'static [FreeBits],
        blocks: &'static [Pageblock],
    ) -> MemMap {
        MemMap { pages, base, frames, bits, blocks }
    }

    /// First pageblock number of the map.
    #[inline(always)]
    pub(crate) fn base_block(&self) -> u32 {
        self.base >> PAGEBLOCK_ORDER
    }

    /// The span of frame numbers.
    pub(crate) fn span(&self) -> (u32, u32) {
        (self.base, self.base + self.frames)
    }

    /// Index into the pageblock tables; `None` outside the map.
    #[inline(always)]
    pub(crate) fn block_index(&self, pfn: u32) -> Option<usize> {
        let off = pfn.wrapping_sub(self.base);
        if off < self.frames { Some((off >> PAGEBLOCK_ORDER) as usize) } else { None }
    }

    /// Zone and mobility of the frame's pageblock.
    #[inline(always)]
    pub(crate) fn flags_of(&self, pfn: u32) -> PbFlags {
        let block = self.block_index(pfn).and_then(|i| self.blocks.get(i));
        block.map_or(PbFlags::HOLE, Pageblock::flags)
    }

    /// The page of a frame in the map; `None` outside it and in holes.
    #[inline]
    pub(crate) fn page(&self, pfn: Pfn) -> Option<&Page> {
        self.flags_of(pfn.0).zone_slot()?;
        Some(self.page_in_map(pfn.0))
    }

    /// The page of a frame known to be in a populated pageblock.
    #[inline(always)]
    pub(crate) fn page_in_map(&self, pfn: u32) -> &Page {
        let off = pfn.wrapping_sub(self.base);
        assert!(off < self.frames);
        // SAFETY: `off` is below `frames`, so by `new`'s contract the Page is within the table, zero
        // or since written only through atomics.
        unsafe { self.pages.add(off as usize).as_ref() }
    }

    /// The frame of a page and the flags of its pageblock; `None` when the page is not of this map.
    #[inline(always)]
    pub(crate) fn locate(&self, page: &Page) -> Option<(u32, PbFlags)> {
        let pfn = self.pfn(page)?;
        let i = ((pfn - self.base) >> PAGEBLOCK_ORDER) as usize;
        // SAFETY: `pfn` returned a frame of the map, and by `new`'s contract `blocks` has an entry for
        // every pageblock of it.
        let block = unsafe { self.blocks.get_unchecked(i) };
        Some((pfn, block.flags()))
    }

    /// The frame of a page; `None` when the page is not of this map.
    #[inline(always)]
    pub(crate) fn pfn(&self, page: &Page) -> Option<u32> {
        let off = (page as *const Page as usize).wrapping_sub(self.pages.as_ptr() as usize);
        let n = off / size_of::<Page>();
        if n < self.frames as usize { Some(self.base + n as u32) } else { None }
    }

    /// First frames of all pageblocks in the map.
    pub(crate) fn pageblocks(&self) -> impl Iterator<Item = u32> + use<> {
        let (start, end) = self.span();
        (start..end).step_by(PAGEBLOCK_FRAMES as usize)
    }
}
