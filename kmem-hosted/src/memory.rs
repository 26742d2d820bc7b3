//! Physical memory: one memfd, its direct map, further mappings of its frames.
//!
//! # Concepts
//! Physical address `a` is offset `a` of a memfd \[X1\]. The file is sparse: a frame takes host memory
//! from its first touch until its contents are given back by punching a hole. The *direct map* is one
//! reservation of address space, as long as low memory reaches; banks of low memory are mapped into it,
//! holes and high memory are not, so touching them faults as it does on the machine \[H3\].
//!
//! Any frame can be mapped any number of times elsewhere ([`FrameMapping`]); all mappings alias.
//!
//! # Implementation
//! The reservation is aligned to a gigabyte, so that a block's virtual alignment is its physical one.
//! Frames of high memory are zeroed by punching a hole: that needs no address, leaves no page to
//! flush, and gives the host its memory back until the frame is touched.
//!
//! # Locking
//! The list of metadata mappings has a mutex, taken at bring-up only. All else is constant.

use crate::{
    highmem::KmapRange,
    shape::{PAGE_SHIFT, PAGE_SIZE, Shape},
    vmalloc::VmallocRange,
};
use kmem::{
    platform::{MapFailed, PageProt},
    types::{Pfn, PfnRange},
};
use rustix::{
    fd::OwnedFd,
    fs::{self, FallocateFlags, MemfdFlags},
    io::{self, Errno},
    mm::{self, MapFlags, MprotectFlags, ProtFlags},
};
use std::{
    ffi::c_void,
    ops::{Range, RangeInclusive},
    ptr::{self, NonNull},
    sync::{Mutex, PoisonError},
};

/// Alignment of the direct map, and of the vmalloc range.
const DIRECT_ALIGN: usize = 1 << 30;

/// A range of address space of this process, unmapped on drop.
pub(crate) struct Area {
    ptr: NonNull<u8>,
    len: usize,
}

// SAFETY: an Area is an address range that this value owns; which thread unmaps it does not matter.
unsafe impl Send for Area {}
// SAFETY: a shared Area offers its address and length only.
unsafe impl Sync for Area {}

impl Area {
    /// Anonymous memory that takes host memory when touched, or address space alone when `prot` is
    /// empty.
    pub(crate) fn anonymous(len: usize, prot: ProtFlags) -> io::Result<Area> {
        // SAFETY: a fresh private mapping at an address of the kernel's choice.
        let ptr = unsafe {
            mm::mmap_anonymous(ptr::null_mut(), len, prot, MapFlags::PRIVATE | MapFlags::NORESERVE)?
        };
        NonNull::new(ptr.cast()).map(|ptr| Area { ptr, len }).ok_or(Errno::NOMEM)
    }

    /// Maps `len` bytes of `fd` from `from` at `offset` into the area.
    fn map(&self, offset: usize, len: usize, fd: &OwnedFd, from: u64) -> io::Result<()> {
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(Errno::INVAL);
        }
        // SAFETY: the target range is inside this area, which owns it and has given out no reference
        // into it yet.
        unsafe {
            mm::mmap(
                self.ptr.as_ptr().add(offset).cast::<c_void>(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::NORESERVE | MapFlags::FIXED,
                fd,
                from,
            )?;
        }
        Ok(())
    }

    /// As [`anonymous`](Self::anonymous) without access, and the first address in it with the alignment.
    pub(crate) fn reserved(len: usize) -> io::Result<(Area, NonNull<u8>)> {
        let area = Area::anonymous(len + DIRECT_ALIGN, ProtFlags::empty())?;
        let skip = area.ptr.as_ptr().align_offset(DIRECT_ALIGN);
        // SAFETY: `skip` is below DIRECT_ALIGN, so the pointer stays in the area.
        let first = unsafe { area.ptr.add(skip) };
        Ok((area, first))
    }

    /// Asks for huge pages in `range`, if that is long enough not to be wasted on them, and not so long that a machine of
    /// which little is used would take much more of the host. A host that has none, or will not, leaves it at small ones.
    fn prefer_huge(&self, range: Range<usize>) {
        /// From two huge pages of most hosts to the map of 32 GiB.
        const WORTH: RangeInclusive<usize> = 4 << 20..=256 << 20;
        if range.end > self.len || !WORTH.contains(&range.len()) {
            return;
        }
        // SAFETY: the range is inside this area, which owns it; its contents do not change.
        unsafe {
            let at = self.ptr.as_ptr().add(range.start).cast::<c_void>();
            let _ = mm::madvise(at, range.len(), mm::Advice::LinuxHugepage);
        }
    }

    /// Makes `range` of the area readable and writable.
    pub(crate) fn open(&self, range: Range<usize>) -> io::Result<()> {
        if range.end > self.len || range.start > range.end {
            return Err(Errno::INVAL);
        }
        // SAFETY: the range is inside this area, which owns it.
        unsafe {
            mm::mprotect(
                self.ptr.as_ptr().add(range.start).cast::<c_void>(),
                range.len(),
                MprotectFlags::READ | MprotectFlags::WRITE,
            )
        }
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: the range is this value's own; whoever uses the memory keeps the value.
        let _ = unsafe { mm::munmap(self.ptr.as_ptr().cast(), self.len) };
    }
}

/// The file behind the frames, and the direct map of the low ones.
struct Backing {
    fd: OwnedFd,
    /// Holds the direct map's mappings.
    _area: Area,
    /// Where frame 0 would be.
    base: NonNull<u8>,
}

// SAFETY: the pointer is into the area, which this value owns.
unsafe impl Send for Backing {}
// SAFETY: as above; shared use computes addresses only.
unsafe impl Sync for Backing {}

/// One machine's memory.
pub(crate) struct PhysMemory {
    /// The first range of `low`, or an empty one: nearly all lookups end here.
    first: PfnRange,
    backing: Option<Backing>,
    /// Frames in the direct map: ascending, disjoint, neighbours merged. Empty without contents.
    low: Vec<PfnRange>,
    /// Frames that exist, likewise.
    all: Vec<PfnRange>,
    metadata: Mutex<Vec<Area>>,
    vmalloc: Option<VmallocRange>,
    kmap: Option<KmapRange>,
}

impl PhysMemory {
    /// The memory of a shape that has been checked.
    pub(crate) fn new(shape: &Shape) -> io::Result<PhysMemory> {
        let mut all: Vec<PfnRange> = shape.banks.iter().map(|b| b.frames()).collect();
        all.sort_unstable_by_key(|r| r.start);
        all.dedup_by(|next, kept| {
            let joins = kept.end == next.start;
            if joins {
                kept.end = next.end;
            }
            joins
        });
        let mut memory = PhysMemory {
            first: PfnRange::default(),
            backing: None,
            low: Vec::new(),
            all,
            metadata: Mutex::new(Vec::with_capacity(64)),
            vmalloc: None,
            kmap: None,
        };
        if !shape.contents {
            return Ok(memory);
        }
        let limit = shape.highmem_from().map_or(u32::MAX, |a| frame_of(a).unwrap_or(u32::MAX));
        let below = PfnRange::new(0, limit);
        memory.low =
            memory.all.iter().map(|r| r.intersect(&below)).filter(|r| !r.is_empty()).collect();

        let span = memory.all.last().map_or(0, |r| address(r.end));
        let fd = fs::memfd_create("kmem-physical", MemfdFlags::CLOEXEC)?;
        fs::ftruncate(&fd, span)?;

        let len = memory.low.last().map_or(0, |r| address(r.end) as usize);
        let (area, base) = Area::reserved(len)?;
        let skip = base.as_ptr().addr() - area.ptr.as_ptr().addr();
        for r in &memory.low {
            let bytes = address(r.len()) as usize;
            area.map(skip + address(r.start) as usize, bytes, &fd, address(r.start))?;
        }
        let bytes = usize::try_from(shape.vmalloc_bytes()).map_err(|_| Errno::NOMEM)?;
        if bytes > 0 {
            memory.vmalloc = Some(VmallocRange::new(bytes, shape.page_tables)?);
        }
        if memory.all.last().is_some_and(|r| r.end > limit) {
            memory.kmap = Some(KmapRange::new(shape)?);
        }
        memory.first = memory.low.first().copied().unwrap_or_default();
        memory.backing = Some(Backing { fd, _area: area, base });
        Ok(memory)
    }

    /// Where the direct map shows a frame.
    #[inline(always)]
    pub(crate) fn direct_map(&self, pfn: Pfn) -> Option<NonNull<u8>> {
        let backing = self.backing.as_ref()?;
        if !self.is_low(pfn.0) {
            return None;
        }
        // SAFETY: the frame is in `low`, so its offset is inside the direct map.
        Some(unsafe { backing.base.add(pfn.index() << PAGE_SHIFT) })
    }

    /// The frame that the direct map shows at an address.
    #[inline(always)]
    pub(crate) fn direct_unmap(&self, addr: *const u8) -> Option<Pfn> {
        let backing = self.backing.as_ref()?;
        let offset = (addr as usize).wrapping_sub(backing.base.as_ptr() as usize);
        let pfn = u32::try_from(offset >> PAGE_SHIFT).ok()?;
        self.is_low(pfn).then_some(Pfn(pfn))
    }

    #[inline(always)]
    fn is_low(&self, pfn: u32) -> bool {
        pfn.wrapping_sub(self.first.start) < self.first.len() || contains(&self.low, pfn)
    }

    /// Takes frames out of the direct map or puts them back; `false` if they are not all of it, or the host refuses.
    /// Async-signal-safe.
    pub(crate) fn set_direct_map(&self, pfn: Pfn, count: u32, valid: bool) -> bool {
        let asked = PfnRange::new(pfn.0, pfn.0.saturating_add(count));
        let whole = self.low.iter().any(|r| r.intersect(&asked).len() == count);
        let Some(backing) = self.backing.as_ref().filter(|_| whole) else { return false };
        let flags = match valid {
            true => MprotectFlags::READ | MprotectFlags::WRITE,
            false => MprotectFlags::empty(),
        };
        // SAFETY: the range is in the direct map, which this owns; that it becomes unreadable is what the caller, the
        // core, wants, whose frames they are.
        unsafe {
            let first = backing.base.as_ptr().add(pfn.index() << PAGE_SHIFT).cast::<c_void>();
            mm::mprotect(first, address(count) as usize, flags).is_ok()
        }
    }

    /// Zero-fills frames; those that do not exist are left out. Async-signal-safe.
    pub(crate) fn zero(&self, pfn: Pfn, count: u32) {
        let Some(backing) = self.backing.as_ref() else { return };
        let asked = PfnRange::new(pfn.0, pfn.0.saturating_add(count));
        for r in self.low.iter().map(|r| r.intersect(&asked)).filter(|r| !r.is_empty()) {
            let len = address(r.len()) as usize;
            // SAFETY: the range is in the direct map, which is readable and writable; its frames are
            // the caller's to zero.
            unsafe { backing.base.add(address(r.start) as usize).write_bytes(0, len) };
        }
        let low_end = self.low.last().map_or(0, |r| r.end);
        let high = PfnRange::new(asked.start.max(low_end), asked.end);
        if !high.is_empty() {
            self.punch(high);
        }
    }

    /// Gives the contents of frames back to the host; they read as zero afterwards.
    pub(crate) fn punch(&self, frames: PfnRange) {
        let Some(backing) = self.backing.as_ref() else { return };
        for r in self.all.iter().map(|r| r.intersect(&frames)).filter(|r| !r.is_empty()) {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            // Interrupted by a signal, it did nothing or part: do all again.
            while fs::fallocate(&backing.fd, flags, address(r.start), address(r.len()))
                == Err(Errno::INTR)
            {}
        }
    }

    /// Zero-filled memory for tables, of which only the ranges in `used` (all, if `None`) may be written.
    /// The rest reads as zeros, all from one page of the host's. Larger tables have huge pages of the host's, as a
    /// kernel's map of its frames has: frames freed here and there each need another page of it.
    pub(crate) fn metadata(
        &self,
        bytes: usize,
        used: Option<&mut dyn Iterator<Item = Range<usize>>>,
    ) -> Option<NonNull<u8>> {
        let page = PAGE_SIZE as usize;
        let len = bytes.max(1).checked_next_multiple_of(page)?;
        let area = match used {
            None => {
                let area = Area::anonymous(len, ProtFlags::READ | ProtFlags::WRITE).ok()?;
                area.prefer_huge(0..len);
                area
            }
            Some(used) => {
                let area = Area::anonymous(len, ProtFlags::READ).ok()?;
                for range in used {
                    let end = range.end.checked_next_multiple_of(page)?;
                    let range = range.start / page * page..end;
                    area.open(range.clone()).ok()?;
                    area.prefer_huge(range);
                }
                area
            }
        };
        let ptr = area.ptr;
        self.metadata.lock().unwrap_or_else(PoisonError::into_inner).push(area);
        Some(ptr)
    }

    /// The addresses for vmalloc.
    #[inline]
    pub(crate) fn vmalloc_range(&self) -> Option<Range<usize>> {
        self.vmalloc.as_ref().map(VmallocRange::range)
    }

    /// Whether what is mapped there is there.
    pub(crate) fn vmalloc_is_mapped(&self) -> bool {
        self.vmalloc.as_ref().is_none_or(VmallocRange::is_mapped)
    }

    /// Maps frames in the vmalloc range; of the file, whether they are memory or a hole, which stands for a
    /// device.
    ///
    /// # Safety
    /// As for [`Platform::map_pages`](kmem::platform::Platform::map_pages).
    pub(crate) unsafe fn map_kernel(
        &self,
        addr: usize,
        pfn: Pfn,
        count: u32,
        prot: PageProt,
    ) -> Result<(), MapFailed> {
        let (Some(backing), Some(vmalloc)) = (&self.backing, &self.vmalloc) else {
            return Err(MapFailed);
        };
        let from = address(pfn.0);
        let len = address(count);
        if from + len > self.all.last().map_or(0, |r| address(r.end)) {
            return Err(MapFailed);
        }
        // SAFETY: the caller's.
        unsafe { vmalloc.map(addr, len as usize, prot, &backing.fd, from) }
    }

    /// Takes the mappings in a part of the vmalloc range away.
    ///
    /// # Safety
    /// As for [`Platform::unmap_pages`](kmem::platform::Platform::unmap_pages).
    pub(crate) unsafe fn unmap_kernel(&self, range: Range<usize>) {
        if let Some(vmalloc) = &self.vmalloc {
            // SAFETY: the caller's.
            unsafe { vmalloc.unmap(range) };
        }
    }

    /// The addresses for `kmap`, if there is high memory.
    pub(crate) fn kmap_range(&self) -> Option<Range<usize>> {
        self.kmap.as_ref().map(KmapRange::range)
    }

    /// Shows a frame at one of them; calls `refused` each time that the host refuses.
    ///
    /// # Safety
    /// As for [`Platform::kmap_set`](kmem::platform::Platform::kmap_set).
    pub(crate) unsafe fn kmap_set(&self, addr: usize, pfn: Pfn, refused: impl FnMut()) {
        if let (Some(backing), Some(kmap)) = (&self.backing, &self.kmap) {
            // SAFETY: the caller's.
            unsafe { kmap.set(addr, pfn, &backing.fd, refused) };
        }
    }

    /// Takes away what is shown there.
    ///
    /// # Safety
    /// As for [`Platform::kmap_clear`](kmem::platform::Platform::kmap_clear).
    pub(crate) unsafe fn kmap_clear(&self, addr: usize) {
        if let Some(kmap) = &self.kmap {
            // SAFETY: the caller's.
            unsafe { kmap.clear(addr) };
        }
    }

    /// Maps frames one after the other at a new address.
    pub(crate) fn map_frames(&self, frames: &[Pfn]) -> Result<FrameMapping, MapError> {
        let backing = self.backing.as_ref().ok_or(MapError::NoContents)?;
        if let Some(&bad) = frames.iter().find(|pfn| !contains(&self.all, pfn.0)) {
            return Err(MapError::NoFrame(bad));
        }
        if frames.is_empty() {
            return Err(MapError::NoFrames);
        }
        let area = Area::anonymous(frames.len() << PAGE_SHIFT, ProtFlags::empty())?;
        let mut at = 0;
        for run in frames.chunk_by(|a, b| a.0 + 1 == b.0) {
            let len = run.len() << PAGE_SHIFT;
            area.map(at, len, &backing.fd, address(run[0].0))?;
            at += len;
        }
        Ok(FrameMapping(area))
    }
}

/// Why frames could not be mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum MapError {
    /// The machine's frames have no contents.
    #[error("the machine's frames have no contents")]
    NoContents,
    /// No frames were named.
    #[error("no frames to map")]
    NoFrames,
    /// A frame does not exist.
    #[error("frame {0} does not exist")]
    NoFrame(Pfn),
    /// The host refused.
    #[error("the host cannot map the frames: {0}")]
    Host(#[from] Errno),
}

/// Frames of a machine mapped at an address of their own until this is dropped. The memory aliases
/// every other mapping of the same frames, so it is reached through raw pointers only. It outlives the
/// machine: the host keeps the frames that are still mapped.
pub struct FrameMapping(Area);

impl FrameMapping {
    /// The first frame's address.
    pub fn as_ptr(&self) -> NonNull<u8> {
        self.0.ptr
    }

    /// Bytes mapped.
    pub fn len(&self) -> usize {
        self.0.len
    }

    /// Whether nothing is mapped; never, as an empty mapping is refused.
    pub fn is_empty(&self) -> bool {
        self.0.len == 0
    }
}

/// Physical address of a frame, or bytes in so many frames.
const fn address(frames: u32) -> u64 {
    (frames as u64) << PAGE_SHIFT
}

/// Frame of a physical address; `None` beyond the frame space.
fn frame_of(address: u64) -> Option<u32> {
    u32::try_from(address >> PAGE_SHIFT).ok()
}

/// Whether a frame is in one of the ranges, which ascend.
#[inline(never)]
fn contains(ranges: &[PfnRange], pfn: u32) -> bool {
    let after = ranges.partition_point(|r| r.start <= pfn);
    after.checked_sub(1).is_some_and(|i| pfn < ranges[i].end)
}
