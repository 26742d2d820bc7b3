//! The memory map: one [`Page`] per frame, and the tables per pageblock.
//!
//! # Concepts
//! The map is one virtually contiguous array over the machine's span of frame numbers, so that a page's
//! frame number is a subtraction and a shift. Holes in physical memory are holes in the map: the
//! platform backs only what [`Platform::sparse_metadata`](crate::platform::Platform::sparse_metadata) names \[F5\].
//!
//! # Implementation
//! Parallel tables: per frame its `Page` and its *owner* (which of the slab layer's caches it belongs to,
//! dense, so that freeing an object touches no `Page`), per KiB a byte for the states of large
//! objects, and per pageblock its free bits, descriptor and links. All are zero at the start, and zero means: frame not allocated, not free, of no zone, nobody's.
//! Bring-up therefore touches a word per pageblock and nothing per frame \[F4\]. What lies in holes is
//! read, as zeros, and never written.
//!
//! # Locking
//! The tables are made of atomics; who may write what is told in `page` and `pageblock`.

use crate::{
    page::Page,
    pageblock::{FreeBits, Links, Pageblock, PbFlags},
    prefetch::prefetch,
    types::{PAGEBLOCK_FRAMES, PAGEBLOCK_ORDER, Pfn},
};
use core::{
    ptr,
    sync::atomic::{AtomicU8, AtomicU16, Ordering::Relaxed},
};

/// Bytes of memory, as a power of two, that one byte of the table of large objects' states is for.
pub(crate) const STATE_SHIFT: u32 = 10;

/// Bits of a frame's owner below the number of the cache that it says.
pub(crate) const OWNER_SHIFT: u32 = 7;
/// A cache's number that no cache gets: frames whose owners say it are not the slab layer's.
pub(crate) const NO_CACHE: u16 = 511;
/// Another one: frames of slabs that leave their cache, with the slab's colour. An owner of 0 would say that a marked
/// block is a large object.
pub(crate) const LEAVING: u16 = 510;
/// Shards of per-CPU data that owners can tell apart.
pub(crate) const PERCPU_SHARDS: usize = 8;

/// The owner that is nobody of the slab layer's, with one of `1 << OWNER_SHIFT` values.
const fn nobody(value: u16) -> u16 {
    NO_CACHE << OWNER_SHIFT | value
}

/// Owner of the frames of a kernel stack in the direct map; their pages' `private` tells the place in it and its size.
pub(crate) const OWNER_STACK: u16 = nobody(3);
/// The same of one that interrupts run on.
pub(crate) const OWNER_IRQ_STACK: u16 = nobody(4);
/// Owner of frames whose readers may not be done: freed slabs and blocks that wait (see `slab::rcu`).
pub(crate) const OWNER_RCU: u16 = nobody(5);
/// Owner of the frames of a chunk of per-CPU data of the first shard, those of the others follow; their pages' `private`
/// names the frame of its description.
const OWNER_PERCPU: u16 = nobody(8);
/// Owner of a frame that describes a chunk of the first shard; likewise.
const OWNER_PERCPU_CHUNK: u16 = nobody(16);

/// Owner of the frames of a chunk of a shard.
pub(crate) const fn percpu_owner(shard: usize) -> u16 {
    OWNER_PERCPU + (shard % PERCPU_SHARDS) as u16
}

/// Owner of the frame that describes a chunk of a shard.
pub(crate) const fn percpu_chunk_owner(shard: usize) -> u16 {
    OWNER_PERCPU_CHUNK + (shard % PERCPU_SHARDS) as u16
}

/// The shard that an owner says, if it is one of a chunk's frames.
#[inline(always)]
pub(crate) const fn percpu_shard(owner: u16) -> Option<usize> {
    let shard = owner.wrapping_sub(OWNER_PERCPU);
    if shard < PERCPU_SHARDS as u16 { Some(shard as usize) } else { None }
}

// No two are one.
const _: () = {
    assert!(
        OWNER_STACK < OWNER_IRQ_STACK && OWNER_IRQ_STACK < OWNER_RCU && OWNER_RCU < OWNER_PERCPU
    );
    assert!(percpu_owner(PERCPU_SHARDS - 1) < OWNER_PERCPU_CHUNK);
    assert!(percpu_chunk_owner(PERCPU_SHARDS - 1) >> OWNER_SHIFT == NO_CACHE);
    assert!(matches!(percpu_shard(percpu_owner(PERCPU_SHARDS - 1)), Some(7)));
    assert!(percpu_shard(percpu_chunk_owner(0)).is_none() && percpu_shard(OWNER_RCU).is_none());
};

/// The tables of one machine. A copy in a local is what a loop over many pages works with.
#[derive(Clone, Copy)]
pub(crate) struct MemMap {
    pages: &'static [Page],
    /// First frame of the map, a pageblock's first.
    base: u32,
    pub(crate) bits: &'static [FreeBits],
    pub(crate) blocks: &'static [Pageblock],
    pub(crate) links: &'static [Links],
    owners: &'static [AtomicU16],
    states: &'static [AtomicU8],
    /// Where the direct map shows frame `base`, if there is one.
    direct: usize,
}

/// What a map is made of.
pub(crate) struct Tables {
    pub(crate) pages: &'static [Page],
    pub(crate) bits: &'static [FreeBits],
    pub(crate) blocks: &'static [Pageblock],
    pub(crate) links: &'static [Links],
    pub(crate) owners: &'static [AtomicU16],
    pub(crate) states: &'static [AtomicU8],
}

impl MemMap {
    /// The map of the frames from `base`, a pageblock's first; the tables have an entry for each of the
    /// same pageblocks.
    pub(crate) fn new(base: u32, tables: Tables, direct: usize) -> MemMap {
        let Tables { pages, bits, blocks, links, owners, states } = tables;
        let per_block = PAGEBLOCK_FRAMES as usize;
        assert!(base.is_multiple_of(PAGEBLOCK_FRAMES) && pages.len() <= (u32::MAX - base) as usize);
        assert_eq!(pages.len(), blocks.len() * per_block);
        assert!(bits.len() == blocks.len() && links.len() == blocks.len());
        assert_eq!(owners.len(), pages.len());
        MemMap { pages, base, bits, blocks, links, owners, states, direct }
    }

    /// First pageblock number of the map.
    #[inline(always)]
    pub(crate) fn base_block(&self) -> u32 {
        self.base >> PAGEBLOCK_ORDER
    }

    /// The span of frame numbers.
    pub(crate) fn span(&self) -> (u32, u32) {
        (self.base, self.base + self.pages.len() as u32)
    }

    /// Index into the pageblock tables for a frame known to be of the map.
    #[inline(always)]
    pub(crate) fn index(&self, pfn: u32) -> u32 {
        (pfn >> PAGEBLOCK_ORDER) - self.base_block()
    }

    /// Index into the pageblock tables; `None` outside the map.
    #[inline(always)]
    pub(crate) fn block_index(&self, pfn: u32) -> Option<usize> {
        let block = (pfn.wrapping_sub(self.base) >> PAGEBLOCK_ORDER) as usize;
        if block < self.blocks.len() { Some(block) } else { None }
    }

    /// A pageblock and its free bits, by its number in the tables.
    #[inline(always)]
    pub(crate) fn pageblock(&self, index: u32) -> (&'static Pageblock, &'static FreeBits) {
        let block = &self.blocks[index as usize];
        // SAFETY: `new` checked that there are as many.
        (block, unsafe { self.bits.get_unchecked(index as usize) })
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

    /// The pages of a frame's pageblock, populated or not; `None` outside the map.
    #[inline(always)]
    pub(crate) fn block_pages(
        &self,
        pfn: u32,
    ) -> Option<&'static [Page; PAGEBLOCK_FRAMES as usize]> {
        self.pages.get(self.block_index(pfn)? << PAGEBLOCK_ORDER..)?.first_chunk()
    }

    /// The page of a frame known to be in a populated pageblock.
    #[inline(always)]
    pub(crate) fn page_in_map(&self, pfn: u32) -> &'static Page {
        &self.pages[pfn.wrapping_sub(self.base) as usize]
    }

    /// A page as one of the map's, and the flags of its pageblock; `None` when it is not of this map.
    #[inline(always)]
    pub(crate) fn locate(&self, page: &Page) -> Option<(&'static Page, PbFlags)> {
        let pfn = self.pfn(page)?;
        let i = ((pfn - self.base) >> PAGEBLOCK_ORDER) as usize;
        // SAFETY: `pfn` returned a frame of the map, and by the check in `new` `blocks` has an entry for
        // the pageblock of every one.
        let block = unsafe { self.blocks.get_unchecked(i) };
        // SAFETY: it lies among `pages`, which are there as long as anything.
        let page = unsafe { &*ptr::from_ref(page) };
        Some((page, block.flags()))
    }

    /// The frame of a page; `None` when the page is not of this map.
    #[inline(always)]
    pub(crate) fn pfn(&self, page: &Page) -> Option<u32> {
        let off = (page as *const Page as usize).wrapping_sub(self.pages.as_ptr() as usize);
        let n = off / size_of::<Page>();
        if n < self.pages.len() { Some(self.base + n as u32) } else { None }
    }

    /// The frame of a page that is known to be of the map.
    #[inline(always)]
    pub(crate) fn frame_of(&self, page: *const Page) -> u32 {
        let off = page.addr().wrapping_sub(self.pages.as_ptr().addr());
        self.base.wrapping_add((off / size_of::<Page>()) as u32)
    }

    /// The pages of `n` frames from `pfn` on, all of the map.
    #[inline(always)]
    pub(crate) fn pages_from(&self, pfn: u32, n: u32) -> &'static [Page] {
        &self.pages[pfn.wrapping_sub(self.base) as usize..][..n as usize]
    }

    /// Bytes from frame `base` to an address, as the direct map shows them.
    #[inline(always)]
    pub(crate) fn direct_offset(&self, addr: usize) -> usize {
        addr.wrapping_sub(self.direct)
    }

    /// Where the direct map shows a frame that has contents.
    #[inline(always)]
    pub(crate) fn direct_address(&self, pfn: u32, page_shift: u32) -> usize {
        self.direct.wrapping_add((pfn.wrapping_sub(self.base) as usize) << page_shift)
    }

    /// The owner of the frame that an offset in the direct map is in; 0 for none.
    #[inline(always)]
    pub(crate) fn owner_at(&self, offset: usize, page_shift: u32) -> u16 {
        self.owner_cell(offset, page_shift).map_or(0, |owner| owner.load(Relaxed))
    }

    /// Where the owner of the frame is noted that an offset in the direct map is in.
    #[inline(always)]
    pub(crate) fn owner_cell(&self, offset: usize, page_shift: u32) -> Option<&'static AtomicU16> {
        self.owners.get(offset >> page_shift)
    }

    /// Where the direct map shows frame `base`.
    pub(crate) fn direct_base(&self) -> usize {
        self.direct
    }

    /// The table of large objects' states: for each KiB of the direct map a byte.
    pub(crate) fn states_base(&self) -> usize {
        self.states.as_ptr().expose_provenance()
    }

    /// The frame that an offset in the direct map is in.
    #[inline(always)]
    pub(crate) fn frame_at(&self, offset: usize, page_shift: u32) -> u32 {
        self.base.wrapping_add((offset >> page_shift) as u32)
    }

    /// The frame that an offset in the direct map is in, if it has an owner.
    #[inline]
    pub(crate) fn owned_frame(&self, offset: usize, page_shift: u32) -> Option<u32> {
        (self.owner_at(offset, page_shift) != 0).then(|| self.frame_at(offset, page_shift))
    }

    /// Names the owner of a block of frames.
    pub(crate) fn set_owner(&self, pfn: u32, frames: u32, owner: u16) {
        let first = pfn.wrapping_sub(self.base) as usize;
        if let Some(owners) = self.owners.get(first..first + frames as usize) {
            owners.iter().for_each(|at| at.store(owner, Relaxed));
        }
    }

    /// Sends for the free bits of frames, where there are more than a first-level cache keeps.
    #[inline(always)]
    pub(crate) fn prefetch_bits(&self, pfns: &[u32]) {
        const KEPT: usize = (16 << 10) / size_of::<FreeBits>();
        if self.bits.len() <= KEPT {
            return;
        }
        // The byte that a frame's bit is in: eight to a frame number, as the map begins with a pageblock.
        let first = self.bits.as_ptr().cast::<u8>().wrapping_sub((self.base >> 3) as usize);
        let send = |pfn: &u32| prefetch(first.wrapping_add((pfn >> 3) as usize));
        let (eights, rest) = pfns.as_chunks::<8>();
        eights.iter().for_each(|eight| eight.iter().for_each(send));
        rest.iter().for_each(send);
    }

    /// First frames of all pageblocks in the map.
    pub(crate) fn pageblocks(&self) -> impl Iterator<Item = u32> + use<> {
        let (start, end) = self.span();
        (start..end).step_by(PAGEBLOCK_FRAMES as usize)
    }
}
