//! The page allocators of crates.io, as contenders.
//!
//! # Concepts
//! Each manages frame numbers or addresses of the given number of bytes. Two keep data in what they
//! manage: `buddy-slab-allocator` its table of frames in the first part, `buddy-alloc` its tables in the
//! first part and its lists in the free blocks themselves. They get address space that takes host memory
//! when touched.
//!
//! # Locking
//! None: one thread, or [`Locked`](crate::Locked).

use crate::{PAGE_SIZE, frames::Frames};
use anyhow::{Context, Result, anyhow};
use bitmap_allocator::BitAlloc;
use buddy_alloc::buddy_alloc::{BuddyAlloc, BuddyAllocParam};
use buddy_slab_allocator::BuddyAllocator;
use rustix::mm::{self, MapFlags, ProtFlags};
use std::{ffi::c_void, ptr, slice};

const PAGE: usize = PAGE_SIZE as usize;

/// Address space that takes host memory when touched.
pub(crate) struct Area {
    pub(crate) start: *mut c_void,
    pub(crate) bytes: usize,
}

// SAFETY: an Area is an address range that this value owns; which thread unmaps it does not matter.
unsafe impl Send for Area {}

impl Area {
    pub(crate) fn new(bytes: u64) -> Result<Area> {
        let bytes = usize::try_from(bytes)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh private mapping at an address of the kernel's choice.
        let start = unsafe { mm::mmap_anonymous(ptr::null_mut(), bytes, prot, flags) };
        let start = start.with_context(|| format!("no address space for {bytes} bytes"))?;
        // As kmem's tables have them. A host that has none leaves it at small pages.
        // SAFETY: the mapping just made, whose contents do not change.
        let _ = unsafe { mm::madvise(start, bytes, mm::Advice::LinuxHugepage) };
        Ok(Area { start, bytes })
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: the range is this value's own; the allocator over it goes with it.
        let _ = unsafe { mm::munmap(self.start, self.bytes) };
    }
}

/// `buddy-slab-allocator`: a table of frames out of line, intrusive lists in it.
pub struct BuddySlab {
    allocator: BuddyAllocator<PAGE>,
    _area: Area,
}

// SAFETY: the allocator's pointers lead into the area, which moves along with it.
unsafe impl Send for BuddySlab {}

impl BuddySlab {
    /// An allocator of `bytes`, less its table.
    pub fn new(bytes: u64) -> Result<BuddySlab> {
        let area = Area::new(bytes)?;
        let mut allocator = BuddyAllocator::new();
        // SAFETY: the range is mapped, zero-filled and used by nobody else while the value lives.
        let made =
            unsafe { allocator.init(slice::from_raw_parts_mut(area.start.cast(), area.bytes)) };
        made.map_err(|e| anyhow!("buddy-slab-allocator refuses {bytes} bytes: {e:?}"))?;
        Ok(BuddySlab { allocator, _area: area })
    }
}

impl Frames for BuddySlab {
    type Block = usize;

    #[inline]
    fn alloc(&mut self, order: u32) -> Option<usize> {
        self.allocator.alloc_pages(1 << order, PAGE).ok()
    }

    #[inline]
    fn free(&mut self, block: usize, order: u32) {
        self.allocator.dealloc_pages(block, 1 << order);
    }
}

/// `buddy-alloc`: a buddy whose lists are in the free memory.
pub struct BuddyAllocFrames {
    allocator: BuddyAlloc,
    _area: Area,
}

// SAFETY: the allocator's pointers lead into the area, which moves along with it.
unsafe impl Send for BuddyAllocFrames {}

impl BuddyAllocFrames {
    /// An allocator of `bytes`, less its tables.
    pub fn new(bytes: u64) -> Result<BuddyAllocFrames> {
        let area = Area::new(bytes)?;
        let param =
            BuddyAllocParam::new_with_zero_filled(area.start.cast::<u8>(), area.bytes, PAGE);
        // SAFETY: the range is mapped, zero-filled and used by nobody else while the value lives.
        let allocator = unsafe { BuddyAlloc::new(param) };
        Ok(BuddyAllocFrames { allocator, _area: area })
    }
}

impl Frames for BuddyAllocFrames {
    type Block = usize;

    #[inline]
    fn alloc(&mut self, order: u32) -> Option<usize> {
        let block = self.allocator.malloc(PAGE << order);
        if block.is_null() { None } else { Some(block.addr()) }
    }

    #[inline]
    fn free(&mut self, block: usize, _order: u32) {
        self.allocator.free(ptr::with_exposed_provenance_mut(block));
    }
}

/// `buddy_system_allocator`'s `FrameAllocator`: an ordered set per order.
pub struct BuddySystem(buddy_system_allocator::FrameAllocator<33>);

impl BuddySystem {
    /// An allocator of `bytes`.
    pub fn new(bytes: u64) -> Result<BuddySystem> {
        let mut allocator = buddy_system_allocator::FrameAllocator::new();
        allocator.add_frame(0, usize::try_from(bytes / PAGE_SIZE)?);
        Ok(BuddySystem(allocator))
    }
}

impl Frames for BuddySystem {
    type Block = usize;

    #[inline]
    fn alloc(&mut self, order: u32) -> Option<usize> {
        self.0.alloc(1 << order)
    }

    #[inline]
    fn free(&mut self, block: usize, order: u32) {
        self.0.dealloc(block, 1 << order);
    }
}

/// `bitmap-allocator`: a tree of 16-bit words, in the smallest size that holds the frames.
pub struct Bitmap<B>(Box<B>);

impl<B: BitAlloc> Bitmap<B> {
    /// An allocator of `bytes`.
    pub fn new(bytes: u64) -> Result<Bitmap<B>> {
        let frames = usize::try_from(bytes / PAGE_SIZE)?;
        if frames > B::CAP {
            return Err(anyhow!("bitmap of {} frames is too small for {frames}", B::CAP));
        }
        let mut bits = Box::new(B::DEFAULT);
        bits.insert(0..frames);
        Ok(Bitmap(bits))
    }
}

impl<B: BitAlloc> Frames for Bitmap<B> {
    type Block = usize;

    #[inline]
    fn alloc(&mut self, order: u32) -> Option<usize> {
        match order {
            0 => self.0.alloc(),
            _ => self.0.alloc_contiguous(None, 1 << order, order as usize),
        }
    }

    #[inline]
    fn free(&mut self, block: usize, order: u32) {
        match order {
            0 => self.0.dealloc(block),
            _ => self.0.dealloc_contiguous(block, 1 << order),
        };
    }
}
