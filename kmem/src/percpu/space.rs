//! The per-CPU space of a machine: its first chunk, further ones out of pages, and the calls that give places out.

use super::{
    PerCpuPtr, Statics,
    chunk::{Bad, GRANULE, MAX_UNIT},
    lists::{Chunk, ChunkRef, Lists},
    statics,
};
use crate::{
    error::{AllocError, Misuse},
    gfp::{Gfp, GfpError},
    memblock::Memblock,
    memmap::{OWNER_PERCPU, OWNER_PERCPU_CHUNK},
    page_alloc::{BringUpError, PageAllocator, Reclaim},
    page_state::SystemStat,
    platform::Platform,
    sync::IrqLock,
    types::Pfn,
};
use core::ptr::NonNull;

/// Unit of a CPU where neither the number of CPUs nor the static variables say otherwise.
const UNIT: usize = 32 << 10;
/// What static variables leave at least of a unit.
const DYNAMIC: usize = 1 << 10;
/// What is left for those who cannot wait, of each unit: an eighth.
const RESERVE_SHIFT: u32 = 3;

/// What of a request's flags goes to the page allocator.
const PASSED: Gfp = Gfp::RECLAIM
    .union(Gfp::IO)
    .union(Gfp::FS)
    .union(Gfp::HIGH)
    .union(Gfp::NOWARN)
    .union(Gfp::NORETRY)
    .union(Gfp::RETRY_MAYFAIL)
    .union(Gfp::NOMEMALLOC)
    .union(Gfp::MEMALLOC);

const _: () = assert!(size_of::<Chunk>() <= 4096, "a chunk's description is a frame");

/// A machine's per-CPU space.
pub(crate) struct Space {
    /// Where the first chunk is; it begins with the static variables.
    first: NonNull<u8>,
    statics: usize,
    stride: usize,
    cpus: usize,
    lists: IrqLock<Lists>,
}

// SAFETY: the pointer is to memory of the machine that is kept as long as it; what is in it belongs to the users of
// per-CPU data, who say in their types whether it may be shared.
unsafe impl Send for Space {}
// SAFETY: as above.
unsafe impl Sync for Space {}

impl Space {
    /// Makes the first chunk and fills in the static variables. Called before the page allocator takes what
    /// `boot` has left.
    pub(crate) fn bring_up<P: Platform>(
        p: &P,
        boot: &mut Memblock,
        max_order: u32,
    ) -> Result<Space, BringUpError> {
        let cpus = p.nr_cpu_ids();
        let (from, statics) = statics::section();
        let page = 1usize << P::PAGE_SHIFT;
        // A chunk is one block.
        let most = (page << max_order.min(20)) / cpus.max(1).next_power_of_two();
        let wanted = (statics + DYNAMIC).next_power_of_two().max(UNIT.min(most));
        if wanted > most.min(MAX_UNIT) {
            return Err(BringUpError::PerCpu(statics));
        }
        let mut table = |bytes| p.metadata(boot, bytes).ok_or(BringUpError::NoMetadata(bytes));
        let first = table(cpus * wanted)?;
        let chunk = table(size_of::<Chunk>())?.cast::<Chunk>();
        let _ = first.as_ptr().expose_provenance();
        for cpu in 0..cpus {
            // SAFETY: the table has a unit of `wanted` bytes for each CPU, each longer than the section, which lies in
            // the program from `from` on; nobody writes there, and nobody else has the table.
            unsafe { first.as_ptr().add(cpu * wanted).copy_from_nonoverlapping(from, statics) };
        }
        let base = first.addr().get();
        let mut lists = Lists::new();
        // SAFETY: the table is large enough, aligned to a frame, nobody else's, and kept as long as the machine.
        let chunk = unsafe {
            chunk.write(Chunk::new(base, (wanted / GRANULE) as u32));
            ChunkRef::new(chunk)
        };
        lists.add(chunk);
        // It is empty, so what is first asked for is at its beginning.
        let at = lists.alloc(statics.div_ceil(GRANULE) as u32, 0);
        debug_assert_eq!(at, Some(base));
        let lists = IrqLock::new(lists);
        Ok(Space { first, statics, stride: wanted, cpus, lists })
    }

    /// Bytes between the instances of one CPU and the next.
    #[inline(always)]
    pub(crate) fn stride(&self) -> usize {
        self.stride
    }

    /// Possible CPUs.
    pub(crate) fn cpus(&self) -> usize {
        self.cpus
    }

    #[inline(always)]
    pub(crate) fn statics(&self) -> Statics {
        Statics { at: self.first, len: self.statics }
    }

    fn reserve(&self) -> u64 {
        (self.stride >> RESERVE_SHIFT) as u64 / GRANULE as u64
    }
}

/// A machine's per-CPU space and where it gets pages.
pub(crate) struct Chunks<'a, P: Platform, R> {
    pub(crate) space: &'a Space,
    pub(crate) pages: &'a PageAllocator<P, R>,
}

impl<P: Platform, R: Reclaim> Chunks<'_, P, R> {
    /// Zeroed places for `size` bytes, one for each CPU.
    #[track_caller]
    pub(crate) fn alloc(
        &self,
        size: usize,
        align: usize,
        gfp: Gfp,
    ) -> Result<PerCpuPtr<u8>, AllocError> {
        self.pages.check_context(gfp)?;
        let stride = self.space.stride;
        if !align.is_power_of_two() || align > stride.min(1 << P::PAGE_SHIFT) {
            return Err(self.pages.refuse(gfp, 0, GfpError::BadAlignment));
        }
        if size == 0 || size > stride {
            return Err(self.pages.refuse(gfp, 0, GfpError::BadSize));
        }
        let n = size.div_ceil(GRANULE) as u32;
        // A power of two: its zeros are its logarithm.
        let granules = (align / GRANULE).max(1).trailing_zeros();
        loop {
            let (found, left) = {
                let mut lists = self.space.lists.lock(self.pages.platform());
                (lists.alloc(n, granules), lists.free_granules())
            };
            let Some(at) = found else {
                self.grow(gfp)?;
                continue;
            };
            if left < self.space.reserve() && self.pages.allowed(gfp).may_block() {
                // Nothing was asked for that this would fail.
                let _ = self.grow(gfp | Gfp::NOWARN);
            }
            return Ok(self.zeroed(at, n as usize * GRANULE));
        }
    }

    fn zeroed(&self, at: usize, bytes: usize) -> PerCpuPtr<u8> {
        let first = core::ptr::with_exposed_provenance_mut::<u8>(at);
        for cpu in 0..self.space.cpus {
            // SAFETY: a chunk has a unit for each CPU, and this part of each was just given to us; granules are
            // aligned words.
            unsafe {
                let at = first.add(cpu * self.space.stride);
                match bytes {
                    GRANULE => at.cast::<u64>().write(0),
                    _ => at.write_bytes(0, bytes),
                }
            }
        }
        // SAFETY: a chunk's address is not null.
        PerCpuPtr(unsafe { NonNull::new_unchecked(first) })
    }

    /// Adds a chunk.
    #[cold]
    #[track_caller]
    fn grow(&self, gfp: Gfp) -> Result<(), AllocError> {
        let (space, pages) = (self.space, self.pages);
        let gfp = gfp & PASSED;
        let table = pages.__get_free_page(gfp)?;
        let bytes = space.stride * space.cpus;
        let block = match pages.alloc_pages_exact(bytes, gfp) {
            Ok(block) => block,
            Err(e) => {
                let _ = pages.free_page(table.as_ptr());
                return Err(e);
            }
        };
        let base = block.as_ptr().expose_provenance();
        let chunk = table.cast::<Chunk>();
        let named = self.frame_of(table.addr().get());
        // SAFETY: a frame of our own, which a chunk's description fits; it stays until `take_out` took it out.
        let chunk = unsafe {
            chunk.write(Chunk::new(base, (space.stride / GRANULE) as u32));
            ChunkRef::new(chunk)
        };
        {
            // With the lists at hand: whoever looks an address up finds all of a chunk, or none.
            let mut lists = space.lists.lock(pages.platform());
            for (pfn, page) in self.frames(base) {
                page.set_private(named);
                pages.map().set_owner(pfn, 1, OWNER_PERCPU);
            }
            pages.map().set_owner(named, 1, OWNER_PERCPU_CHUNK);
            lists.add(chunk);
        }
        pages.mod_system_state(SystemStat::Percpu, self.chunk_frames());
        Ok(())
    }

    /// Frames of a chunk, its description included.
    fn chunk_frames(&self) -> i64 {
        (self.space.stride * self.space.cpus).div_ceil(1 << P::PAGE_SHIFT) as i64 + 1
    }

    fn frame_of(&self, addr: usize) -> u32 {
        let map = self.pages.map();
        map.frame_at(map.direct_offset(addr), P::PAGE_SHIFT)
    }

    /// The frames of the chunk that begins at an address.
    fn frames(&self, base: usize) -> impl Iterator<Item = (u32, &'static crate::page::Page)> {
        let first = self.frame_of(base);
        let map = *self.pages.map();
        (first..first + self.chunk_frames() as u32 - 1).map(move |pfn| (pfn, map.page_in_map(pfn)))
    }

    /// Takes a chunk with nothing live out, if the reserve is there without it.
    #[inline(always)]
    fn take_out(&self, lists: &mut Lists) -> Option<(ChunkRef, usize)> {
        let chunk = lists.take_empty(self.space.reserve())?;
        let base = lists.base(chunk);
        // With the lists at hand: whoever looks an address up finds a chunk that is there.
        for (pfn, page) in self.frames(base) {
            self.pages.map().set_owner(pfn, 1, 0);
            page.set_private(0);
        }
        Some((chunk, base))
    }

    /// Gives back a chunk that was taken out.
    #[cold]
    fn release(&self, (chunk, base): (ChunkRef, usize)) {
        let (space, pages) = (self.space, self.pages);
        let table = chunk.at().cast::<u8>();
        pages.map().set_owner(self.frame_of(table.addr().get()), 1, 0);
        let block = core::ptr::with_exposed_provenance::<u8>(base);
        let _ = pages.free_pages_exact(block, space.stride * space.cpus);
        let _ = pages.free_page(table.as_ptr());
        pages.mod_system_state(SystemStat::Percpu, -self.chunk_frames());
    }

    /// The chunk that an address of CPU 0's is in. The caller has the lists.
    fn chunk_at(&self, lists: &Lists, addr: usize) -> Option<(ChunkRef, usize)> {
        let (space, map) = (self.space, self.pages.map());
        let chunk = if addr.wrapping_sub(space.first.addr().get()) < space.stride {
            lists.first()?
        } else {
            let offset = map.direct_offset(addr);
            if map.owner_at(offset, P::PAGE_SHIFT) != OWNER_PERCPU {
                return None;
            }
            let named = map.page(Pfn(map.frame_at(offset, P::PAGE_SHIFT)))?.private();
            let at = self.pages.platform().direct_map(Pfn(named))?;
            if map.owner_at(map.direct_offset(at.addr().get()), P::PAGE_SHIFT) != OWNER_PERCPU_CHUNK
            {
                return None;
            }
            // SAFETY: the owner says that a chunk's description is there, and as the caller has the lists it stays.
            unsafe { ChunkRef::new(at.cast()) }
        };
        let offset = addr.wrapping_sub(lists.base(chunk));
        (offset < space.stride).then_some((chunk, offset))
    }

    /// Frees the instances at a per-CPU address.
    #[track_caller]
    pub(crate) fn free(&self, at: PerCpuPtr<u8>) -> Result<(), Misuse> {
        let addr = at.0.addr().get();
        if self.pages.context().in_nmi() {
            return Err(self.pages.misuse(Misuse::InNmi));
        }
        let static_area = addr.wrapping_sub(self.space.first.addr().get()) < self.space.statics;
        let (freed, mut gone) = {
            let mut lists = self.space.lists.lock(self.pages.platform());
            let found = self.chunk_at(&lists, addr).filter(|_| !static_area);
            let freed = found.map(|(chunk, offset)| lists.free(chunk, offset));
            (freed, self.take_out(&mut lists))
        };
        while let Some(chunk) = gone {
            self.release(chunk);
            gone = self.take_out(&mut self.space.lists.lock(self.pages.platform()));
        }
        Err(self.pages.misuse(match freed {
            Some(Ok(_)) => return Ok(()),
            Some(Err(Bad::Free)) => Misuse::PerCpuFree { addr },
            Some(Err(Bad::Inside)) => Misuse::InsidePerCpu { addr },
            None => Misuse::NotPerCpu { addr },
        }))
    }

    /// Bytes of one CPU that are free, and chunks.
    pub(crate) fn stats(&self) -> (u64, u32) {
        let lists = self.space.lists.lock(self.pages.platform());
        (lists.free_granules() * GRANULE as u64, lists.chunks())
    }
}
