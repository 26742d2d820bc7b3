//! `Allocator`: what owners get their memory from \[O1\].
//!
//! # Concepts
//! As in Rust for Linux, an allocator is asked with a layout and flags and may refuse. There it is a type, since
//! a kernel is one machine; here it is a small value, so that one process can have several machines: a
//! reference to a [`Kmem`], or [`Kmalloc`](super::Kmalloc), which has no size and whose type names the
//! machine.
//!
//! # Locking
//! None of its own.

use crate::{alloc::Flags, error::AllocError, kmem::Kmem, platform::Platform};
use core::{alloc::Layout, ptr::NonNull};

/// A source of memory. A layout without a size takes none, and gives an address that is aligned and nothing
/// else.
///
/// # Safety
/// Memory given out is of the layout, nobody else's, and stays where it is until it is freed or
/// reallocated; copies of an allocator are the same one.
pub unsafe trait Allocator: Copy {
    /// Memory for a layout; zeroed with `__GFP_ZERO`.
    ///
    /// Context: as the flags say.
    ///
    /// # Errors
    /// [`AllocError`].
    fn alloc(self, layout: Layout, flags: Flags) -> Result<NonNull<[u8]>, AllocError>;

    /// Memory for `layout` with as many bytes of what is at `at` as fit, in place or elsewhere. With
    /// `__GFP_ZERO` here and wherever `at` came from, further bytes are zeros.
    ///
    /// # Safety
    /// `at` is this allocator's, for `old`, and nobody uses it any more if this succeeds.
    ///
    /// # Errors
    /// [`AllocError`], and what is at `at` is unharmed.
    unsafe fn realloc(
        self,
        at: NonNull<u8>,
        layout: Layout,
        old: Layout,
        flags: Flags,
    ) -> Result<NonNull<[u8]>, AllocError>;

    /// Frees memory. A misuse is found out and reported.
    ///
    /// # Safety
    /// `at` is this allocator's, for `layout`, and nobody uses it any more.
    unsafe fn free(self, at: NonNull<u8>, layout: Layout);
}

// SAFETY: kmalloc's memory is at least as large as asked, aligned as the layout says, and nobody else's until
// kfree; it belongs to the machine, which the references share.
unsafe impl<P: Platform> Allocator for &Kmem<P> {
    #[inline]
    #[track_caller]
    fn alloc(self, layout: Layout, flags: Flags) -> Result<NonNull<[u8]>, AllocError> {
        let at = self.kmalloc_layout(layout, flags)?;
        Ok(NonNull::slice_from_raw_parts(at, layout.size()))
    }

    #[inline]
    #[track_caller]
    unsafe fn realloc(
        self,
        at: NonNull<u8>,
        layout: Layout,
        old: Layout,
        flags: Flags,
    ) -> Result<NonNull<[u8]>, AllocError> {
        // SAFETY: the caller's.
        let at = unsafe { self.krealloc_layout(at, old, layout, flags)? };
        Ok(NonNull::slice_from_raw_parts(at, layout.size()))
    }

    #[inline]
    #[track_caller]
    unsafe fn free(self, at: NonNull<u8>, layout: Layout) {
        if layout.size() != 0 {
            // A misuse (somebody freed it under the owner) is reported by the callee.
            // SAFETY: the caller's.
            let _ = unsafe { self.kfree(at.as_ptr()) };
        }
    }
}
