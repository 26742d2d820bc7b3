//! The classic calls of kvmalloc \[S8\].

use super::Kmem;
use crate::{
    error::{AllocError, Misuse},
    gfp::Gfp,
    platform::Platform,
    reclaim::Vmscan,
    vmalloc::{Vmap, Wanted},
};
use core::{alloc::Layout, ptr::NonNull};

impl<P: Platform> Kmem<P> {
    /// `kvmalloc`: at least `size` bytes, from kmalloc if that has them without effort, else, for more than a frame and
    /// flags that may sleep, from vmalloc. Free it with [`kvfree`](Self::kvfree).
    ///
    /// Context: may sleep if `gfp` has `__GFP_DIRECT_RECLAIM`; never from an NMI.
    ///
    /// # Errors
    /// As [`kmalloc`](Self::kmalloc) and [`vmalloc`](Self::vmalloc); `NoMemory` for what only vmalloc would have on a
    /// platform that [maps nothing](Platform::vmalloc_is_mapped).
    ///
    /// See [`kvmalloc`](https://docs.kernel.org/core-api/mm-api.html#c.kvmalloc_node).
    #[inline]
    #[track_caller]
    pub fn kvmalloc(&self, size: usize, gfp: Gfp) -> Result<NonNull<u8>, AllocError> {
        self.vmap_layer().kvmalloc(size, gfp, -1)
    }

    /// As [`kvmalloc`](Self::kvmalloc), for a layout: aligned as it says. One without a size gives an address that is
    /// aligned and nothing else.
    ///
    /// # Errors
    /// As [`kvmalloc`](Self::kvmalloc).
    #[track_caller]
    pub fn kvmalloc_layout(&self, layout: Layout, gfp: Gfp) -> Result<NonNull<u8>, AllocError> {
        let (first, may_map) = Vmap::<P, Vmscan>::easily(layout.size(), gfp);
        match self.kmalloc_layout(layout, first) {
            Err(AllocError::NoMemory) if may_map => {
                let wanted = Wanted { align: layout.align(), ..Wanted::new(layout.size(), gfp) };
                self.vmap_layer().vmalloc_mapped(wanted)
            }
            got => got,
        }
    }

    /// `kvzalloc`: as [`kvmalloc`](Self::kvmalloc), zeroed.
    ///
    /// # Errors
    /// As [`kvmalloc`](Self::kvmalloc).
    #[track_caller]
    pub fn kvzalloc(&self, size: usize, gfp: Gfp) -> Result<NonNull<u8>, AllocError> {
        self.kvmalloc(size, gfp | Gfp::ZERO)
    }

    /// `kvmalloc_node`: as [`kvmalloc`](Self::kvmalloc), from node `node` if that has memory; −1 is the caller's.
    ///
    /// # Errors
    /// As [`kvmalloc`](Self::kvmalloc).
    #[track_caller]
    pub fn kvmalloc_node(
        &self,
        size: usize,
        gfp: Gfp,
        node: i32,
    ) -> Result<NonNull<u8>, AllocError> {
        self.vmap_layer().kvmalloc(size, gfp, node)
    }

    /// `kvmalloc_array`: `n` times `size` bytes.
    ///
    /// # Errors
    /// As [`kvmalloc`](Self::kvmalloc); `NoMemory` if the product overflows.
    #[track_caller]
    pub fn kvmalloc_array(
        &self,
        n: usize,
        size: usize,
        gfp: Gfp,
    ) -> Result<NonNull<u8>, AllocError> {
        self.kvmalloc(n.checked_mul(size).ok_or(AllocError::NoMemory)?, gfp)
    }

    /// `kvcalloc`: as [`kvmalloc_array`](Self::kvmalloc_array), zeroed.
    ///
    /// # Errors
    /// As [`kvmalloc_array`](Self::kvmalloc_array).
    #[track_caller]
    pub fn kvcalloc(&self, n: usize, size: usize, gfp: Gfp) -> Result<NonNull<u8>, AllocError> {
        self.kvmalloc_array(n, size, gfp | Gfp::ZERO)
    }

    /// `kvrealloc`: as many bytes of what is at `at` as fit, in at least `size` bytes: in place where they fit there,
    /// else elsewhere, and `at` is freed. Null allocates; size 0 frees. With `__GFP_ZERO` here and wherever `at`
    /// came from, further bytes are zeros.
    ///
    /// # Safety
    /// `at` is null or from kvmalloc, and nobody uses it any more if this succeeds.
    ///
    /// # Errors
    /// As [`kvmalloc`](Self::kvmalloc), and `at` is unharmed; `NoMemory` if `at` is not from kvmalloc, after a
    /// report.
    #[track_caller]
    pub unsafe fn kvrealloc(
        &self,
        at: *mut u8,
        size: usize,
        gfp: Gfp,
    ) -> Result<NonNull<u8>, AllocError> {
        // SAFETY: the caller's.
        unsafe { self.vmap_layer().kvrealloc(at, size, gfp) }
    }

    /// `kvfree`: frees what [`kvmalloc`](Self::kvmalloc), kmalloc or vmalloc returned. Null is left alone.
    ///
    /// Context: any but NMI.
    ///
    /// # Safety
    /// Nobody uses the memory any more. A wrong address does no harm: it is found out.
    ///
    /// # Errors
    /// As [`kfree`](Self::kfree) and [`vfree`](Self::vfree).
    ///
    /// See [`kvfree`](https://docs.kernel.org/core-api/mm-api.html#c.kvfree).
    #[inline]
    #[track_caller]
    pub unsafe fn kvfree(&self, at: *mut u8) -> Result<(), Misuse> {
        self.vmap_layer().kvfree(at)
    }

    /// The bytes that may be used at an address from [`kvmalloc`](Self::kvmalloc); `None` for other addresses.
    pub fn kvsize(&self, at: *const u8) -> Option<usize> {
        self.vmap_layer().kvsize(at)
    }
}
