//! Blocks larger than the machine's largest: mappings of their own.
//!
//! # Locking
//! None: the host's.

use core::{
    alloc::Layout,
    ptr::{self, NonNull},
};
use rustix::mm::{self, MapFlags, MremapFlags, ProtFlags};

const PAGE: usize = 4096;

/// The bytes of a layout's mapping.
const fn len(size: usize) -> Option<usize> {
    size.checked_next_multiple_of(PAGE)
}

/// A mapping of `len` bytes, aligned to `align`, that the host need not have: zeros, taken from it as they are
/// touched.
pub(super) fn reserve(len: usize, align: usize) -> Option<NonNull<u8>> {
    mapping(len, align, MapFlags::PRIVATE | MapFlags::NORESERVE)
}

fn mapping(len: usize, align: usize, flags: MapFlags) -> Option<NonNull<u8>> {
    let spare = if align > PAGE { align } else { 0 };
    let whole = len.checked_add(spare)?;
    // SAFETY: a fresh private mapping at an address of the kernel's choice.
    let at = unsafe {
        mm::mmap_anonymous(ptr::null_mut(), whole, ProtFlags::READ | ProtFlags::WRITE, flags)
    };
    let at = at.ok()?.cast::<u8>();
    let skip = if spare == 0 { 0 } else { at.align_offset(align) };
    // SAFETY: both ends are inside the mapping just made, whole pages, and used by nobody.
    unsafe {
        if skip > 0 {
            let _ = mm::munmap(at.cast(), skip);
        }
        if spare > skip {
            let _ = mm::munmap(at.add(skip + len).cast(), spare - skip);
        }
        NonNull::new(at.add(skip))
    }
}

/// A block of zeros; null if the host refuses.
#[cold]
#[inline(never)]
pub(super) fn map(layout: Layout) -> *mut u8 {
    len(layout.size())
        .and_then(|len| mapping(len, layout.align(), MapFlags::PRIVATE))
        .map_or(ptr::null_mut(), NonNull::as_ptr)
}

/// Gives a block back.
///
/// # Safety
/// `at` is from [`map`] or [`remap`] for the layout, and nobody uses it any more.
pub(super) unsafe fn unmap(at: *mut u8, layout: Layout) {
    if let Some(len) = len(layout.size()) {
        // SAFETY: the mapping is the caller's, whole.
        let _ = unsafe { mm::munmap(at.cast(), len) };
    }
}

/// Changes a block's size, moving its pages if need be; null, and nothing changed, if the host refuses.
///
/// # Safety
/// As [`unmap`], if this succeeds.
#[cold]
pub(super) unsafe fn remap(at: *mut u8, old: Layout, size: usize) -> *mut u8 {
    let (Some(before), Some(after)) = (len(old.size()), len(size)) else { return ptr::null_mut() };
    if before == after {
        return at;
    }
    let flags = if old.align() > PAGE { MremapFlags::empty() } else { MremapFlags::MAYMOVE };
    // SAFETY: the mapping is the caller's, whole, and who moves it forgets the old address.
    if let Ok(new) = unsafe { mm::mremap(at.cast(), before, after, flags) } {
        return new.cast();
    }
    // It may have to be aligned more strictly than the host's mappings are.
    let Some(new) = mapping(after, old.align(), MapFlags::PRIVATE) else { return ptr::null_mut() };
    // SAFETY: so many bytes are at both, and the new ones are nobody else's; the old mapping is not used after.
    unsafe {
        new.as_ptr().copy_from_nonoverlapping(at, old.size().min(size));
        unmap(at, old);
    }
    new.as_ptr()
}
