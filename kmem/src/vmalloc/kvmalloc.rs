//! kvmalloc: from kmalloc where that is easy, else from vmalloc \[S8\].
//!
//! # Locking
//! None of its own.

use super::{Vmap, alloc::Wanted, free::By};
use crate::{
    error::{AllocError, Misuse},
    gfp::Gfp,
    page_alloc::Reclaim,
    platform::Platform,
};
use core::ptr::NonNull;

impl<P: Platform, R: Reclaim> Vmap<'_, P, R> {
    /// The flags for kmalloc, and whether vmalloc comes after it.
    #[inline]
    pub(crate) fn easily(size: usize, gfp: Gfp) -> (Gfp, bool) {
        // What fits a frame is not easier to get in another way.
        if size <= Self::PAGE || !gfp.may_block() {
            return (gfp, false);
        }
        let patience = if gfp.contains(Gfp::RETRY_MAYFAIL) { Gfp::empty() } else { Gfp::NORETRY };
        ((gfp | Gfp::NOWARN | patience) - Gfp::NOFAIL, true)
    }

    /// `kvmalloc_node`.
    #[inline]
    #[track_caller]
    pub(crate) fn kvmalloc(
        self,
        size: usize,
        gfp: Gfp,
        node: i32,
    ) -> Result<NonNull<u8>, AllocError> {
        let (first, may_map) = Self::easily(size, gfp);
        match self.objects.kmalloc_node(size, first, node) {
            Err(AllocError::NoMemory) if may_map => {
                self.vmalloc_mapped(Wanted { node, ..Wanted::new(size, gfp) })
            }
            got => got,
        }
    }

    /// `kvfree`.
    #[inline]
    #[track_caller]
    pub(crate) fn kvfree(self, at: *mut u8) -> Result<(), Misuse> {
        if self.objects.pages.is_vmalloc_addr(at) {
            self.free(at.addr(), By::Vfree)
        } else {
            self.objects.kfree(at)
        }
    }

    /// Bytes that may be used at an address from kvmalloc; `None` for other addresses.
    pub(crate) fn kvsize(self, at: *const u8) -> Option<usize> {
        if self.objects.pages.is_vmalloc_addr(at) {
            self.usable(at.addr())
        } else {
            self.objects.ksize(at)
        }
    }

    /// `kvrealloc`.
    ///
    /// # Safety
    /// `at` is null or from kvmalloc, and nobody uses it any more if this succeeds.
    #[track_caller]
    pub(crate) unsafe fn kvrealloc(
        self,
        at: *mut u8,
        size: usize,
        gfp: Gfp,
    ) -> Result<NonNull<u8>, AllocError> {
        let Some(old) = self.kvsize(at) else {
            self.objects.pages.misuse(Misuse::NotAnObject { addr: at.addr() });
            return Err(AllocError::NoMemory);
        };
        if size == 0 {
            let _ = self.kvfree(at);
            return Ok(crate::slab::ZERO_SIZE_PTR);
        }
        if size <= old
            && let Some(at) = NonNull::new(at)
        {
            if gfp.contains(Gfp::ZERO) {
                // What it does not hold now is zeros when it grows again.
                // SAFETY: `old` bytes may be used there.
                unsafe { at.add(size).write_bytes(0, old - size) };
            }
            return Ok(at);
        }
        let new = self.kvmalloc(size, gfp, -1)?;
        // SAFETY: `old` bytes may be used there, more than that here, and the new block is nobody's yet.
        unsafe { new.as_ptr().copy_from_nonoverlapping(at, old) };
        let _ = self.kvfree(at);
        Ok(new)
    }
}
