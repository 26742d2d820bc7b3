//! `Cache<T>` and `Slot<T>`: values of one type in a cache of their own.

use crate::{
    error::AllocError,
    gfp::{
        Gfp,
        typed::{Capability, HasAddress, TypedGfp},
    },
    kmem::Kmem,
    platform::Platform,
    slab::{CacheError, CacheInfo, KmemCache, Object, SlabFlags},
};
use core::{
    fmt,
    marker::PhantomData,
    mem::ManuallyDrop,
    ops::{Deref, DerefMut},
    ptr,
};

/// A cache of values of one type.
///
/// ```
/// # use kmem_hosted::{Machine, Shape};
/// use kmem::{Gfp, alloc::Cache, slab::SlabFlags};
/// # let machine = Machine::new(Shape::x86_64(64 << 20)).unwrap();
/// # let kmem = &*machine;
/// struct Inode {
///     number: u64,
///     links: u32,
/// }
///
/// let inodes = Cache::new(kmem, "inode", SlabFlags::empty())?;
/// let mut inode = inodes.alloc(Inode { number: 7, links: 1 }, Gfp::KERNEL)?;
/// inode.links += 1;
/// assert_eq!((inode.number, inode.links), (7, 2));
/// drop(inode); // back to its cache, and to no other
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// A slot cannot outlive its cache:
///
/// ```compile_fail,E0505
/// # use kmem_hosted::{Machine, Shape};
/// # use kmem::{Gfp, alloc::Cache, slab::SlabFlags};
/// # let machine = Machine::new(Shape::x86_64(64 << 20)).unwrap();
/// let cache = Cache::<_, u64>::new(&machine, "early", SlabFlags::empty()).unwrap();
/// let slot = cache.alloc(1, Gfp::KERNEL).unwrap();
/// drop(cache);
/// drop(slot);
/// ```
pub struct Cache<'k, P: Platform, T> {
    kmem: &'k Kmem<P>,
    /// Taken out when the cache goes.
    cache: ManuallyDrop<KmemCache>,
    _of: PhantomData<fn() -> T>,
}

impl<'k, P: Platform, T> Cache<'k, P, T> {
    /// A cache for values of the type.
    ///
    /// Context: process context; may sleep.
    ///
    /// # Errors
    /// [`CacheError`].
    pub fn new(kmem: &'k Kmem<P>, name: &str, flags: SlabFlags) -> Result<Self, CacheError> {
        const { assert!(size_of::<T>() > 0, "values without a size need no cache") };
        let cache = kmem.kmem_cache_create(name, size_of::<T>(), align_of::<T>(), flags, None)?;
        Ok(Cache { kmem, cache: ManuallyDrop::new(cache), _of: PhantomData })
    }

    /// Moves a value into an object of the cache.
    ///
    /// Context: may sleep if `gfp` has `__GFP_DIRECT_RECLAIM`; never from an NMI.
    ///
    /// # Errors
    /// [`AllocError`]; the value is dropped.
    #[inline]
    #[track_caller]
    pub fn alloc(&self, value: T, gfp: Gfp) -> Result<Slot<'_, P, T>, AllocError> {
        let object = self.kmem.objects().alloc_owned(&self.cache, gfp)?;
        // SAFETY: an object of T's size and alignment, just given to us.
        unsafe { object.at.cast::<T>().write(value) };
        Ok(Slot { cache: self, object, _owns: PhantomData })
    }

    /// As [`alloc`](Self::alloc), with a capability \[C2\].
    ///
    /// # Errors
    /// As [`alloc`](Self::alloc).
    #[track_caller]
    pub fn alloc_in<const BLOCK: bool, const ZONE: u8>(
        &self,
        _capability: impl Capability<BLOCK>,
        gfp: TypedGfp<BLOCK, ZONE>,
        value: T,
    ) -> Result<Slot<'_, P, T>, AllocError>
    where
        TypedGfp<BLOCK, ZONE>: HasAddress,
    {
        self.alloc(value, gfp.gfp())
    }

    /// What the cache holds.
    pub fn info(&self) -> CacheInfo {
        self.kmem.kmem_cache_info(&self.cache)
    }

    /// Returns the frames that the cache's empty slabs gave back.
    pub fn shrink(&self) -> u64 {
        self.kmem.kmem_cache_shrink(&self.cache)
    }
}

impl<P: Platform, T> Drop for Cache<'_, P, T> {
    /// Destroys the cache. Where that is not possible (atomic context, objects whose slots were forgotten) it
    /// stays, after a report.
    fn drop(&mut self) {
        // SAFETY: nobody uses the field after this.
        let cache = unsafe { ManuallyDrop::take(&mut self.cache) };
        if let Err(e) = self.kmem.kmem_cache_destroy(cache) {
            self.kmem.platform().report(crate::platform::Level::Warning, format_args!("{e}"));
        }
    }
}

/// A value in an object of a [`Cache`], and the only owner of it.
pub struct Slot<'c, P: Platform, T> {
    cache: &'c Cache<'c, P, T>,
    object: Object,
    _owns: PhantomData<T>,
}

// SAFETY: a slot is its value and a reference to a cache of a machine, which may be used from any thread.
unsafe impl<P: Platform, T: Send> Send for Slot<'_, P, T> where Kmem<P>: Sync {}
// SAFETY: as above.
unsafe impl<P: Platform, T: Sync> Sync for Slot<'_, P, T> where Kmem<P>: Sync {}

impl<P: Platform, T> Slot<'_, P, T> {
    /// Takes the value out and gives the object back.
    pub fn into_inner(this: Self) -> T {
        let this = ManuallyDrop::new(this);
        // SAFETY: the value is ours; the object is given back next, without dropping it again.
        let value = unsafe { this.object.at.cast::<T>().read() };
        this.free();
        value
    }

    #[inline]
    fn free(&self) {
        // A misuse (somebody freed it under us) is reported by the callee.
        let _ = self.cache.kmem.objects().free_owned(&self.cache.cache, self.object);
    }
}

impl<P: Platform, T> Drop for Slot<'_, P, T> {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: the value is ours, and not used after.
        unsafe { ptr::drop_in_place(self.object.at.cast::<T>().as_ptr()) };
        self.free();
    }
}

impl<P: Platform, T> Deref for Slot<'_, P, T> {
    type Target = T;

    #[inline(always)]
    fn deref(&self) -> &T {
        // SAFETY: a T, ours.
        unsafe { self.object.at.cast::<T>().as_ref() }
    }
}

impl<P: Platform, T> DerefMut for Slot<'_, P, T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: a T, ours, borrowed mutably.
        unsafe { self.object.at.cast::<T>().as_mut() }
    }
}

impl<P: Platform, T: fmt::Debug> fmt::Debug for Slot<'_, P, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}
