//! The per-CPU space of a machine: its first chunk, further ones out of pages, and the calls that give places out.

use super::{
    PerCpuPtr, Statics,
    chunk::{Bad, GRANULE, MAX_UNIT},
    lists::{Chunk, ChunkRef, Lists},
    statics,
};
use crate::{
    context::Path,
    error::{AllocError, Misuse},
    gfp::{Gfp, GfpError},
    memblock::Memblock,
    memmap::{PERCPU_SHARDS, percpu_chunk_owner, percpu_owner, percpu_shard},
    page_alloc::{BringUpError, PageAllocator, Reclaim},
    page_state::SystemStat,
    platform::Platform,
    sync::IrqLock,
    types::Pfn,
};
use core::{
    ptr::NonNull,
    slice,
    sync::atomic::{AtomicU32, Ordering::Relaxed},
};
use crossbeam_utils::CachePadded;

/// How often a CPU may find its shard held before it moves to another.
const CROWDED: u32 = 64;

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

/// A machine's chunks, each in one of these.
type Shard = CachePadded<IrqLock<Lists>>;

/// A machine's per-CPU space.
#[derive(Clone, Copy)]
pub(crate) struct Space {
    /// Where the first chunk is; it begins with the static variables.
    first: NonNull<u8>,
    statics: usize,
    stride: usize,
    cpus: usize,
    shards: &'static [Shard],
    /// By CPU: the shard it takes from, times `CROWDED`, and how often it found the first one held.
    homes: &'static [AtomicU32],
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
        let nr = cpus.next_power_of_two().min(PERCPU_SHARDS);
        let shards = table(nr * size_of::<Shard>())?.cast::<Shard>();
        let homes = table(cpus * size_of::<AtomicU32>())?.cast::<AtomicU32>();
        let _ = first.as_ptr().expose_provenance();
        for cpu in 0..cpus {
            // SAFETY: the table has a unit of `wanted` bytes for each CPU, each longer than the section, which lies in
            // the program from `from` on; nobody writes there, and nobody else has the table.
            unsafe { first.as_ptr().add(cpu * wanted).copy_from_nonoverlapping(from, statics) };
        }
        let base = first.addr().get();
        // SAFETY: the table is large enough, aligned to a frame, nobody else's, and kept as long as the machine.
        let chunk = unsafe {
            chunk.write(Chunk::new(base, (wanted / GRANULE) as u32));
            ChunkRef::new(chunk)
        };
        // SAFETY: as above, for so many shards and CPUs.
        let (shards, homes) = unsafe {
            for i in 0..nr {
                shards.add(i).write(CachePadded::new(IrqLock::new(Lists::new())));
            }
            for cpu in 0..cpus {
                homes.add(cpu).write(AtomicU32::new(0));
            }
            (
                slice::from_raw_parts(shards.as_ptr(), nr),
                slice::from_raw_parts(homes.as_ptr(), cpus),
            )
        };
        {
            let mut lists = shards[0].lock(p);
            lists.add_first(chunk);
            // It is empty, so what is first asked for is at its beginning.
            let at = lists.alloc(statics.div_ceil(GRANULE) as u32, 0);
            debug_assert_eq!(at, Some(base));
        }
        Ok(Space { first, statics, stride: wanted, cpus, shards, homes })
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

    /// The shard that a CPU takes from.
    #[inline(always)]
    fn home<P: Platform>(&self, p: &P) -> usize {
        let home = p.this_cpu().and_then(|cpu| self.homes.get(cpu.id()));
        home.map_or(0, |home| (home.load(Relaxed) / CROWDED) as usize)
    }

    /// The CPU found its shard held. From the first one it moves to its own, which is the first for some.
    #[cold]
    #[inline(never)]
    fn note_crowd<P: Platform>(&self, p: &P) {
        let Some(cpu) = p.this_cpu() else { return };
        let Some(home) = self.homes.get(cpu.id()) else { return };
        // Interrupts are masked, so nobody else writes there.
        match home.load(Relaxed) + 1 {
            seen if seen < CROWDED => home.store(seen, Relaxed),
            CROWDED => home.store((cpu.id() % self.shards.len()) as u32 * CROWDED, Relaxed),
            _ => {}
        }
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
    /// Zeroed places for `size` bytes, one for each CPU. What is known of the request where this is called is worked
    /// out there.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn alloc(
        &self,
        size: usize,
        align: usize,
        gfp: Gfp,
    ) -> Result<PerCpuPtr<u8>, AllocError> {
        self.pages.check_context(gfp)?;
        // `is_power_of_two` counts bits.
        let power = align & align.wrapping_sub(1) == 0 && align != 0;
        if !power || align > 1 << P::PAGE_SHIFT || align > self.space.stride {
            return Err(self.pages.refuse(gfp, 0, GfpError::BadAlignment));
        }
        if size == 0 || size > self.space.stride {
            return Err(self.pages.refuse(gfp, 0, GfpError::BadSize));
        }
        // A power of two: its zeros are its logarithm.
        let granules = (align / GRANULE).max(1).trailing_zeros();
        match (size.div_ceil(GRANULE) as u32, granules) {
            (1, 0) => self.alloc_word(gfp),
            (n, granules) => self.alloc_words(n, granules, gfp),
        }
    }

    /// Most are a word, for which there is less to compute.
    #[inline(never)]
    #[track_caller]
    fn alloc_word(&self, gfp: Gfp) -> Result<PerCpuPtr<u8>, AllocError> {
        self.alloc_granules(1, 0, gfp)
    }

    #[inline(never)]
    #[track_caller]
    fn alloc_words(&self, n: u32, granules: u32, gfp: Gfp) -> Result<PerCpuPtr<u8>, AllocError> {
        self.alloc_granules(n, granules, gfp)
    }

    #[inline(always)]
    #[track_caller]
    fn alloc_granules(&self, n: u32, granules: u32, gfp: Gfp) -> Result<PerCpuPtr<u8>, AllocError> {
        let at = loop {
            let p = self.pages.platform();
            let home = self.space.home(p);
            let (found, left) = {
                let _mark = self.pages.mark(Path::PercpuAlloc);
                let mut lists = self.space.shards[home].lock_noting(p, || self.space.note_crowd(p));
                (lists.alloc(n, granules), lists.free_granules())
            };
            let Some(at) = found else {
                match self.alloc_elsewhere(home, n, granules, left, gfp)? {
                    Some(at) => break at,
                    None => continue,
                }
            };
            if left < self.space.reserve() && self.pages.allowed(gfp).may_block() {
                // Nothing was asked for that this would fail.
                let _ = self.grow(home, gfp | Gfp::NOWARN);
            }
            break at;
        };
        Ok(self.zeroed(at, n as usize * GRANULE))
    }

    /// What a CPU does whose shard has no place, with so much free in it: takes one of another's, or adds a chunk to
    /// its own (`None`).
    #[cold]
    #[inline(never)]
    #[track_caller]
    fn alloc_elsewhere(
        &self,
        home: usize,
        n: u32,
        granules: u32,
        left: u64,
        gfp: Gfp,
    ) -> Result<Option<usize>, AllocError> {
        // Who was in the way of others gets a chunk of its own, once.
        if left == 0 && home != 0 && self.grow(home, gfp | Gfp::NOWARN).is_ok() {
            return Ok(None);
        }
        let p = self.pages.platform();
        let others = (0..self.space.shards.len()).filter(|shard| *shard != home);
        let found = others.map(|shard| self.space.shards[shard].lock(p).alloc(n, granules));
        if let Some(at) = found.into_iter().flatten().next() {
            return Ok(Some(at));
        }
        self.grow(home, gfp).map(|()| None)
    }

    fn zeroed(&self, at: usize, bytes: usize) -> PerCpuPtr<u8> {
        let first = core::ptr::with_exposed_provenance_mut::<u8>(at);
        let (stride, end) =
            (self.space.stride, first.wrapping_add(self.space.cpus * self.space.stride));
        let mut at = first;
        // Most are a word.
        while at != end {
            // SAFETY: a chunk has a unit for each CPU, and this part of each was just given to us; granules are
            // aligned words.
            unsafe { at.cast::<u64>().write(0) };
            if bytes != GRANULE {
                // SAFETY: as above.
                unsafe { at.write_bytes(0, bytes) };
            }
            at = at.wrapping_add(stride);
        }
        // SAFETY: a chunk's address is not null.
        PerCpuPtr(unsafe { NonNull::new_unchecked(first) })
    }

    /// Adds a chunk to a shard.
    #[cold]
    #[inline(never)]
    #[track_caller]
    fn grow(&self, shard: usize, gfp: Gfp) -> Result<(), AllocError> {
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
            let mut lists = space.shards[shard].lock(pages.platform());
            for (pfn, page) in self.frames(base) {
                page.set_private(named);
                pages.map().set_owner(pfn, 1, percpu_owner(shard));
            }
            pages.map().set_owner(named, 1, percpu_chunk_owner(shard));
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
    fn take_out(&self, lists: &mut Lists, reserve: u64) -> Option<(ChunkRef, usize)> {
        let chunk = lists.take_empty(reserve)?;
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
    #[inline(never)]
    fn release(&self, (chunk, base): (ChunkRef, usize)) {
        let (space, pages) = (self.space, self.pages);
        let table = chunk.at().cast::<u8>();
        pages.map().set_owner(self.frame_of(table.addr().get()), 1, 0);
        let block = core::ptr::with_exposed_provenance::<u8>(base);
        let _ = pages.free_pages_exact(block, space.stride * space.cpus);
        let _ = pages.free_page(table.as_ptr());
        pages.mod_system_state(SystemStat::Percpu, -self.chunk_frames());
    }

    /// The chunk that an address of CPU 0's is in, if that is one of the shard whose lists the caller has, and how far
    /// into it.
    #[inline(always)]
    fn chunk_at(&self, lists: &mut Lists, shard: usize, addr: usize) -> Option<(ChunkRef, usize)> {
        // Nearly always where the last one was.
        if let Some((base, chunk)) = lists.recent()
            && addr.wrapping_sub(base) < self.space.stride
        {
            return Some((chunk, addr.wrapping_sub(base)));
        }
        self.look_up(lists, shard, addr)
    }

    /// As `chunk_at`, by what is noted of the frame.
    #[inline(never)]
    fn look_up(&self, lists: &mut Lists, shard: usize, addr: usize) -> Option<(ChunkRef, usize)> {
        let map = self.pages.map();
        let chunk = if self.in_first(addr) {
            lists.first()?
        } else {
            let frame = map.frame_at(map.direct_offset(addr), P::PAGE_SHIFT);
            let named = map.page(Pfn(frame))?.private();
            let at = self.pages.platform().direct_map(Pfn(named))?;
            let owner = map.owner_at(map.direct_offset(at.addr().get()), P::PAGE_SHIFT);
            if owner != percpu_chunk_owner(shard) {
                return None;
            }
            // SAFETY: the owner says that the description of a chunk of the shard is there, and as the caller has its
            // lists it stays.
            unsafe { ChunkRef::new(at.cast()) }
        };
        // That chunk's, or the frame's `private` was of something else.
        let offset = addr.wrapping_sub(lists.base(chunk));
        if offset >= self.space.stride {
            return None;
        }
        lists.note_recent(chunk);
        Some((chunk, offset))
    }

    /// Whether an address is in CPU 0's unit of the first chunk.
    #[inline(always)]
    fn in_first(&self, addr: usize) -> bool {
        addr.wrapping_sub(self.space.first.addr().get()) < self.space.stride
    }

    /// Frees the instances at a per-CPU address.
    #[track_caller]
    pub(crate) fn free(&self, at: PerCpuPtr<u8>) -> Result<(), Misuse> {
        let addr = at.0.addr().get();
        if self.pages.context().in_nmi() {
            return Err(self.pages.misuse(Misuse::InNmi));
        }
        let map = self.pages.map();
        let shard = if self.in_first(addr) {
            let from = addr.wrapping_sub(self.space.first.addr().get());
            (from >= self.space.statics).then_some(0)
        } else {
            percpu_shard(map.owner_at(map.direct_offset(addr), P::PAGE_SHIFT))
        };
        let Some((shard, lists)) = shard.and_then(|i| Some((i, self.space.shards.get(i)?))) else {
            return Err(self.pages.misuse(Misuse::NotPerCpu { addr }));
        };
        let (freed, gone) = {
            let _mark = self.pages.mark(Path::PercpuFree);
            let mut lists = lists.lock(self.pages.platform());
            let found = self.chunk_at(&mut lists, shard, addr);
            let freed = found.map(|(chunk, offset)| lists.free(chunk, offset));
            (freed, self.take_out(&mut lists, self.space.reserve()))
        };
        if let Some(chunk) = gone {
            self.release(chunk);
            self.trim(shard, self.space.reserve());
        }
        Err(self.pages.misuse(match freed {
            Some(Ok(_)) => return Ok(()),
            Some(Err(Bad::Free)) => Misuse::PerCpuFree { addr },
            Some(Err(Bad::Inside)) => Misuse::InsidePerCpu { addr },
            None => Misuse::NotPerCpu { addr },
        }))
    }

    /// Gives back a shard's chunks with nothing live, but for the reserve; returns how many frames.
    #[cold]
    #[inline(never)]
    fn trim(&self, shard: usize, reserve: u64) -> u64 {
        let p = self.pages.platform();
        let out = || self.take_out(&mut self.space.shards[shard].lock(p), reserve);
        let mut frames = 0;
        while let Some(chunk) = out() {
            self.release(chunk);
            frames += self.chunk_frames() as u64;
        }
        frames
    }

    /// Gives back what is only kept for CPUs that were in each other's way; returns how many frames.
    pub(crate) fn shrink(&self) -> u64 {
        (1..self.space.shards.len()).map(|shard| self.trim(shard, 0)).sum()
    }

    /// Bytes of one CPU that are free, and chunks.
    pub(crate) fn stats(&self) -> (u64, u32) {
        let p = self.pages.platform();
        let of = |shard: &Shard| {
            let lists = shard.lock(p);
            (lists.free_granules() * GRANULE as u64, lists.chunks())
        };
        self.space.shards.iter().map(of).fold((0, 0), |all, one| (all.0 + one.0, all.1 + one.1))
    }
}
