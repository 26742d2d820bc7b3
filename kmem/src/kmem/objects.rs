//! The classic calls of the slab layer \[S1, S8\].

use super::Kmem;
use crate::{
    error::{AllocError, Misuse},
    gfp::Gfp,
    platform::Platform,
    reclaim::Vmscan,
    slab::{
        CacheError, CacheInfo, Ctor, DestroyError, KMALLOC_MAX_CACHE_SIZE, KmemCache, MoveError,
        MoveFn, ObjectAudit, ObjectAuditError, Objects, SlabFlags,
    },
};
use core::{alloc::Layout, ptr::NonNull};

impl<P: Platform> Kmem<P> {
    #[inline(always)]
    pub(crate) fn objects(&self) -> Objects<'_, P, Vmscan> {
        self.pages.reclaim().objects(&self.pages)
    }

    /// `kmem_cache_create`: a cache of objects of `size` bytes (1 to 8192), aligned to `align` (a power of
    /// two up to a frame; 0 for a word). `ctor` is given each object once, when its pages join the cache
    /// \[S6\]; freed objects keep what it made of them, if their users do. A cache that differs in nothing
    /// that matters from an existing one shares that one's slabs, unless
    /// [`SlabFlags::NO_MERGE`] or one of [`SlabFlags::DEBUG`] is set on either. The machine's
    /// [`slab_debug`](crate::Config::slab_debug) may add flags. With [`SlabFlags::POISON`] constructors run at each
    /// allocation.
    ///
    /// Context: process context; may sleep.
    ///
    /// # Errors
    /// [`CacheError`], after a report.
    ///
    /// # Panics
    /// Instead of an error, with [`SlabFlags::PANIC`].
    ///
    /// See [`kmem_cache_create`](https://docs.kernel.org/core-api/mm-api.html#c.kmem_cache_create).
    pub fn kmem_cache_create(
        &self,
        name: &str,
        size: usize,
        align: usize,
        flags: SlabFlags,
        ctor: Option<Ctor>,
    ) -> Result<KmemCache, CacheError> {
        self.objects().create(name, size, align, flags, ctor)
    }

    /// `kmem_cache_alloc`: an object of a cache \[S1\]. Its contents are what its last user or the constructor
    /// left, or zeros with `__GFP_ZERO`.
    ///
    /// Context: may sleep if `gfp` has `__GFP_DIRECT_RECLAIM`; never from an NMI.
    ///
    /// # Errors
    /// [`AllocError`].
    ///
    /// See [`kmem_cache_alloc`](https://docs.kernel.org/core-api/mm-api.html#c.kmem_cache_alloc).
    #[inline]
    #[track_caller]
    pub fn kmem_cache_alloc(&self, cache: &KmemCache, gfp: Gfp) -> Result<NonNull<u8>, AllocError> {
        self.objects().alloc_from(cache, gfp)
    }

    /// `kmem_cache_zalloc`: as [`kmem_cache_alloc`](Self::kmem_cache_alloc), zeroed.
    ///
    /// # Errors
    /// As [`kmem_cache_alloc`](Self::kmem_cache_alloc).
    #[inline]
    #[track_caller]
    pub fn kmem_cache_zalloc(
        &self,
        cache: &KmemCache,
        gfp: Gfp,
    ) -> Result<NonNull<u8>, AllocError> {
        self.objects().alloc_from(cache, gfp | Gfp::ZERO)
    }

    /// `kmem_cache_alloc_node`: as [`kmem_cache_alloc`](Self::kmem_cache_alloc), from node `node` if that has
    /// memory; −1 is the caller's.
    ///
    /// # Errors
    /// As [`kmem_cache_alloc`](Self::kmem_cache_alloc).
    #[track_caller]
    pub fn kmem_cache_alloc_node(
        &self,
        cache: &KmemCache,
        gfp: Gfp,
        node: i32,
    ) -> Result<NonNull<u8>, AllocError> {
        self.objects().alloc_from_node(cache, gfp, node)
    }

    /// `kmem_cache_alloc_bulk`: fills `objects` or nothing.
    ///
    /// # Errors
    /// As [`kmem_cache_alloc`](Self::kmem_cache_alloc); nothing is allocated then.
    #[track_caller]
    pub fn kmem_cache_alloc_bulk(
        &self,
        cache: &KmemCache,
        gfp: Gfp,
        objects: &mut [NonNull<u8>],
    ) -> Result<(), AllocError> {
        self.objects().alloc_bulk(cache, gfp, objects)
    }

    /// `kmem_cache_free`: gives an object back to its cache.
    ///
    /// Context: any but NMI.
    ///
    /// # Safety
    /// Nobody uses the object any more. An address that is not a live object of the cache does no harm:
    /// it is found out \[S9\].
    ///
    /// # Errors
    /// [`Misuse`], reported as well, and nothing changed; save that an object with an overwritten red zone is
    /// freed, and kept from use.
    ///
    /// See [`kmem_cache_free`](https://docs.kernel.org/core-api/mm-api.html#c.kmem_cache_free).
    #[inline]
    #[track_caller]
    pub unsafe fn kmem_cache_free(&self, cache: &KmemCache, at: NonNull<u8>) -> Result<(), Misuse> {
        self.objects().free_to(cache, at)
    }

    /// `kmem_cache_free_bulk`: gives several objects back.
    ///
    /// # Safety
    /// As [`kmem_cache_free`](Self::kmem_cache_free), for each.
    ///
    /// # Errors
    /// The first [`Misuse`], after all the others were freed.
    #[track_caller]
    pub unsafe fn kmem_cache_free_bulk(
        &self,
        cache: &KmemCache,
        objects: &[NonNull<u8>],
    ) -> Result<(), Misuse> {
        let mut result = Ok(());
        for at in objects {
            result = result.and(self.objects().free_to(cache, *at));
        }
        result
    }

    /// `kmem_cache_shrink`: has every CPU give the magazines up and returns the frames that the cache's empty
    /// slabs gave back. Objects that [can be moved](Self::kmem_cache_set_move) are pulled together before.
    ///
    /// Context: process context; elsewhere it does not wait for other CPUs.
    pub fn kmem_cache_shrink(&self, cache: &KmemCache) -> u64 {
        self.objects().shrink_cache(cache)
    }

    /// Says how objects of a cache are moved (illumos' `kmem_cache_set_move`), or with `None` that they are not
    /// any more: [`kmem_cache_shrink`](Self::kmem_cache_shrink), called in process context, then empties sparsely
    /// used slabs into fuller ones \[S10\]. Caches that look for mistakes are left as they are.
    ///
    /// A shrink that is under way goes on with what it found.
    ///
    /// # Safety
    /// `f` is given an object of the cache that was in use a moment ago, and a free one. If it says
    /// [`Moved`](crate::slab::MoveResult::Moved), then nobody uses the first any more, and it is as the cache's constructor
    /// leaves an object. Otherwise nobody uses the second. It may find the first freed by somebody else meanwhile;
    /// the memory of both stays what it was until it returns.
    ///
    /// # Errors
    /// [`MoveError`] if the cache is another machine's or may be shared with others.
    pub unsafe fn kmem_cache_set_move(
        &self,
        cache: &KmemCache,
        f: Option<MoveFn>,
        private: usize,
    ) -> Result<(), MoveError> {
        self.objects().set_move(cache, f, private)
    }

    /// Has every CPU give its magazines up and returns the frames that the empty slabs of all caches gave back
    /// (`echo 2 >drop_caches`).
    ///
    /// Context: as [`kmem_cache_shrink`](Self::kmem_cache_shrink).
    pub fn drop_slab(&self) -> u64 {
        self.objects().drop_slab()
    }

    /// `kmem_cache_destroy`: ends a cache. One that was merged lives on for its other users.
    ///
    /// Context: process context; may sleep.
    ///
    /// # Errors
    /// [`DestroyError`] with the cache, if objects are in use (they are listed in a report), another CPU did
    /// not give its magazines up in time, or the context may not sleep \[S7\].
    pub fn kmem_cache_destroy(&self, cache: KmemCache) -> Result<(), DestroyError> {
        self.objects().destroy(cache)
    }

    /// What a cache holds.
    pub fn kmem_cache_info(&self, cache: &KmemCache) -> CacheInfo {
        self.objects().cache_info(cache)
    }

    /// Calls `f` with what each cache holds, the layer's own included \[T1\].
    pub fn for_each_cache(&self, f: impl FnMut(&CacheInfo)) {
        self.objects().info(f);
    }

    /// Checks that every object is where it should be. For a quiet machine.
    ///
    /// # Errors
    /// [`ObjectAuditError`].
    pub fn audit_objects(&self) -> Result<ObjectAudit, ObjectAuditError> {
        self.objects().audit()
    }

    /// `kmalloc`: at least `size` bytes, physically contiguous; aligned to `size` if that is a power of two
    /// up to a frame, else for any type \[S8\]. Sizes beyond 8 KiB are blocks of pages, up to the machine's
    /// MAX_ORDER. Size 0 gives [`ZERO_SIZE_PTR`](crate::slab::ZERO_SIZE_PTR).
    ///
    /// Context: may sleep if `gfp` has `__GFP_DIRECT_RECLAIM`; never from an NMI.
    ///
    /// # Errors
    /// [`AllocError`].
    ///
    /// See [`kmalloc`](https://docs.kernel.org/core-api/mm-api.html#c.kmalloc).
    #[inline]
    #[track_caller]
    pub fn kmalloc(&self, size: usize, gfp: Gfp) -> Result<NonNull<u8>, AllocError> {
        self.objects().kmalloc(size, gfp)
    }

    /// As [`kmalloc`](Self::kmalloc), for a layout: aligned as it says, beyond a frame as far as the direct map
    /// is. A layout without a size gives an address that is aligned and nothing else.
    ///
    /// # Errors
    /// As [`kmalloc`](Self::kmalloc); `NoMemory` for an alignment that the direct map does not have.
    #[inline]
    #[track_caller]
    pub fn kmalloc_layout(&self, layout: Layout, gfp: Gfp) -> Result<NonNull<u8>, AllocError> {
        if layout.size() == 0 {
            return Ok(layout.dangling_ptr());
        }
        let at = self.kmalloc(Self::size_for(layout).ok_or(AllocError::NoMemory)?, gfp)?;
        if layout.align() > self.page_size() && !at.addr().get().is_multiple_of(layout.align()) {
            // SAFETY: just given to us, and nobody else has it.
            let _ = unsafe { self.kfree(at.as_ptr()) };
            return Err(AllocError::NoMemory);
        }
        Ok(at)
    }

    /// The size to ask of kmalloc so that the result is aligned: powers of two are aligned to themselves,
    /// as objects up to a frame, as blocks of frames beyond; 96 and 192 bytes to 32 and 64.
    #[inline(always)]
    fn size_for(layout: Layout) -> Option<usize> {
        let (size, align) = (layout.size(), layout.align());
        let odd =
            size > 64 && size <= 96 && align <= 32 || size > 128 && size <= 192 && align <= 64;
        let block = size > KMALLOC_MAX_CACHE_SIZE && align <= 1 << P::PAGE_SHIFT;
        if align <= 8 || odd || block {
            return Some(size);
        }
        let least = if align > 1 << P::PAGE_SHIFT { KMALLOC_MAX_CACHE_SIZE + 1 } else { 1 };
        size.max(align).max(least).checked_next_power_of_two()
    }

    /// As [`krealloc`](Self::krealloc), for layouts.
    ///
    /// # Safety
    /// `at` is from [`kmalloc_layout`](Self::kmalloc_layout) or this for `old`, and nobody uses it any more if
    /// this succeeds.
    ///
    /// # Errors
    /// As [`kmalloc_layout`](Self::kmalloc_layout), and `at` is unharmed.
    #[track_caller]
    pub unsafe fn krealloc_layout(
        &self,
        at: NonNull<u8>,
        old: Layout,
        layout: Layout,
        gfp: Gfp,
    ) -> Result<NonNull<u8>, AllocError> {
        if old.size() == 0 || layout.size() == 0 || layout.align() > old.align() {
            let new = self.kmalloc_layout(layout, gfp)?;
            // SAFETY: there are so many bytes at both, and the new memory is nobody else's.
            unsafe { new.copy_from_nonoverlapping(at, old.size().min(layout.size())) };
            if old.size() != 0 {
                // SAFETY: the caller's.
                let _ = unsafe { self.kfree(at.as_ptr()) };
            }
            return Ok(new);
        }
        // What is aligned now stays so in place; elsewhere the size sees to it, and the direct map has the
        // alignment, since it had it for `at`.
        let size = Self::size_for(layout).ok_or(AllocError::NoMemory)?;
        // SAFETY: the caller's.
        unsafe { self.objects().krealloc(at.as_ptr(), size, gfp) }
    }

    /// `kzalloc`: as [`kmalloc`](Self::kmalloc), zeroed.
    ///
    /// # Errors
    /// As [`kmalloc`](Self::kmalloc).
    #[inline]
    #[track_caller]
    pub fn kzalloc(&self, size: usize, gfp: Gfp) -> Result<NonNull<u8>, AllocError> {
        self.objects().kmalloc(size, gfp | Gfp::ZERO)
    }

    /// `kmalloc_node`: as [`kmalloc`](Self::kmalloc), from node `node` if that has memory; −1 is the caller's.
    ///
    /// # Errors
    /// As [`kmalloc`](Self::kmalloc).
    #[track_caller]
    pub fn kmalloc_node(
        &self,
        size: usize,
        gfp: Gfp,
        node: i32,
    ) -> Result<NonNull<u8>, AllocError> {
        self.objects().kmalloc_node(size, gfp, node)
    }

    /// `kmalloc_array`: `n` times `size` bytes.
    ///
    /// # Errors
    /// As [`kmalloc`](Self::kmalloc); `NoMemory` if the product overflows.
    #[track_caller]
    pub fn kmalloc_array(
        &self,
        n: usize,
        size: usize,
        gfp: Gfp,
    ) -> Result<NonNull<u8>, AllocError> {
        self.kmalloc(n.checked_mul(size).ok_or(AllocError::NoMemory)?, gfp)
    }

    /// `kcalloc`: as [`kmalloc_array`](Self::kmalloc_array), zeroed.
    ///
    /// # Errors
    /// As [`kmalloc_array`](Self::kmalloc_array).
    #[track_caller]
    pub fn kcalloc(&self, n: usize, size: usize, gfp: Gfp) -> Result<NonNull<u8>, AllocError> {
        self.kmalloc_array(n, size, gfp | Gfp::ZERO)
    }

    /// `krealloc`: as many bytes of what is at `at` as fit, in at least `size` bytes: in place where they
    /// fit there, else elsewhere, and `at` is freed. Null allocates; size 0 frees. With `__GFP_ZERO` here and
    /// wherever `at` came from, further bytes are zeros.
    ///
    /// # Safety
    /// `at` is null or from kmalloc, and nobody uses it any more if this succeeds.
    ///
    /// # Errors
    /// As [`kmalloc`](Self::kmalloc), and `at` is unharmed; `NoMemory` if `at` is not from kmalloc, after a
    /// report.
    #[track_caller]
    pub unsafe fn krealloc(
        &self,
        at: *mut u8,
        size: usize,
        gfp: Gfp,
    ) -> Result<NonNull<u8>, AllocError> {
        // SAFETY: the caller's.
        unsafe { self.objects().krealloc(at, size, gfp) }
    }

    /// `ksize`: the bytes that may be used at an address from kmalloc: those that it was rounded up to, or, where
    /// the cache has red zones, those that were asked for. `None` for other addresses.
    pub fn ksize(&self, at: *const u8) -> Option<usize> {
        self.objects().ksize(at)
    }

    /// `kfree`: frees what kmalloc or a cache returned. Null is left alone.
    ///
    /// Context: any but NMI.
    ///
    /// # Safety
    /// Nobody uses the memory any more. An address that is not that of a live object does no harm: it is
    /// found out \[S9\].
    ///
    /// # Errors
    /// As [`kmem_cache_free`](Self::kmem_cache_free).
    ///
    /// See [`kfree`](https://docs.kernel.org/core-api/mm-api.html#c.kfree).
    #[inline]
    #[track_caller]
    pub unsafe fn kfree(&self, at: *mut u8) -> Result<(), Misuse> {
        self.objects().kfree(at)
    }

    /// `kfree_sensitive`: zeroes what is at `at`, as far as it may be used, and frees it.
    ///
    /// # Safety
    /// As [`kfree`](Self::kfree).
    ///
    /// # Errors
    /// As [`kfree`](Self::kfree).
    #[track_caller]
    pub unsafe fn kfree_sensitive(&self, at: *mut u8) -> Result<(), Misuse> {
        if let Some(bytes) = self.ksize(at).filter(|n| *n > 0) {
            // SAFETY: a live object of that size, which by the contract nobody uses. Volatile, so that
            // zeroing what is about to be freed is not left out.
            (0..bytes).for_each(|i| unsafe { at.add(i).write_volatile(0) });
        }
        self.objects().kfree(at)
    }

    /// `kmemdup`: a copy of some bytes.
    ///
    /// # Errors
    /// As [`kmalloc`](Self::kmalloc).
    #[track_caller]
    pub fn kmemdup(&self, bytes: &[u8], gfp: Gfp) -> Result<NonNull<u8>, AllocError> {
        let at = self.kmalloc(bytes.len(), gfp)?;
        // SAFETY: at least as many bytes, just given to us.
        unsafe { at.as_ptr().copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        Ok(at)
    }

    /// `kstrdup`: a copy of a text, with a zero byte behind it.
    ///
    /// # Errors
    /// As [`kmalloc`](Self::kmalloc).
    #[track_caller]
    pub fn kstrdup(&self, text: &str, gfp: Gfp) -> Result<NonNull<u8>, AllocError> {
        let at = self.kmalloc(text.len() + 1, gfp)?;
        // SAFETY: at least one byte more than the text, just given to us.
        unsafe {
            at.as_ptr().copy_from_nonoverlapping(text.as_ptr(), text.len());
            at.as_ptr().add(text.len()).write(0);
        }
        Ok(at)
    }
}
