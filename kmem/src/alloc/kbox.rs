//! `KBox`: one value of its own in kmalloc memory.

use crate::{
    error::AllocError,
    gfp::{
        Gfp,
        typed::{Capability, HasAddress, TypedGfp},
    },
    kmem::Kmem,
    platform::Platform,
};
use core::{
    alloc::Layout,
    fmt,
    marker::PhantomData,
    mem::ManuallyDrop,
    ops::{Deref, DerefMut},
    pin::Pin,
    ptr::{self, NonNull},
};

/// A value in kmalloc memory, and the only owner of it.
///
/// ```
/// # use kmem_hosted::{Machine, Shape};
/// use kmem::{Gfp, alloc::KBox};
/// # let machine = Machine::new(Shape::x86_64(64 << 20)).unwrap();
/// # let kmem = &*machine;
/// let mut counter = KBox::new(kmem, 41u64, Gfp::KERNEL)?;
/// *counter += 1;
/// assert_eq!(*counter, 42);
/// # Ok::<(), kmem::AllocError>(())
/// ```
pub struct KBox<'k, P: Platform, T> {
    kmem: &'k Kmem<P>,
    at: NonNull<T>,
    _owns: PhantomData<T>,
}

// SAFETY: a box is its value and a reference to a machine, which may be used from any thread.
unsafe impl<P: Platform, T: Send> Send for KBox<'_, P, T> where Kmem<P>: Sync {}
// SAFETY: as above.
unsafe impl<P: Platform, T: Sync> Sync for KBox<'_, P, T> where Kmem<P>: Sync {}

impl<'k, P: Platform, T> KBox<'k, P, T> {
    /// Moves a value into memory of its own.
    ///
    /// Context: may sleep if `gfp` has `__GFP_DIRECT_RECLAIM`; never from an NMI.
    ///
    /// # Errors
    /// [`AllocError`]; the value is dropped. [`try_new`](Self::try_new) gives it back.
    #[inline]
    #[track_caller]
    pub fn new(kmem: &'k Kmem<P>, value: T, gfp: Gfp) -> Result<Self, AllocError> {
        Self::try_new(kmem, value, gfp).map_err(|(e, _)| e)
    }

    /// As [`new`](Self::new), but gives the value back if there is no memory for it.
    ///
    /// # Errors
    /// [`AllocError`] and the value.
    #[inline]
    #[track_caller]
    pub fn try_new(kmem: &'k Kmem<P>, value: T, gfp: Gfp) -> Result<Self, (AllocError, T)> {
        match kmem.kmalloc_layout(Layout::new::<T>(), gfp) {
            Ok(at) => {
                let at = at.cast::<T>();
                // SAFETY: memory for a T, just given to us.
                unsafe { at.write(value) };
                Ok(KBox { kmem, at, _owns: PhantomData })
            }
            Err(e) => Err((e, value)),
        }
    }

    /// As [`new`](Self::new), with a capability \[C2\].
    ///
    /// # Errors
    /// As [`new`](Self::new).
    #[track_caller]
    pub fn new_in<const BLOCK: bool, const ZONE: u8>(
        kmem: &'k Kmem<P>,
        _capability: impl Capability<BLOCK>,
        gfp: TypedGfp<BLOCK, ZONE>,
        value: T,
    ) -> Result<Self, AllocError>
    where
        TypedGfp<BLOCK, ZONE>: HasAddress,
    {
        Self::new(kmem, value, gfp.gfp())
    }

    /// As [`new`](Self::new), pinned.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    #[track_caller]
    pub fn pin(kmem: &'k Kmem<P>, value: T, gfp: Gfp) -> Result<Pin<Self>, AllocError> {
        Self::new(kmem, value, gfp).map(Self::into_pin)
    }

    /// Pins the value: what is in a box stays where it is.
    pub fn into_pin(this: Self) -> Pin<Self> {
        // SAFETY: the value is not moved out of its memory until it is dropped: `Pin` lets nobody.
        unsafe { Pin::new_unchecked(this) }
    }

    /// Takes the value out and frees the memory.
    pub fn into_inner(this: Self) -> T {
        let this = ManuallyDrop::new(this);
        // SAFETY: the value is ours; the memory is freed next, without dropping it again.
        let value = unsafe { this.at.read() };
        this.free();
        value
    }

    /// Gives the ownership up: the address is kmalloc's, for C code or for [`from_raw`](Self::from_raw).
    pub fn into_raw(this: Self) -> NonNull<T> {
        ManuallyDrop::new(this).at
    }

    /// The owner of a value at an address.
    ///
    /// # Safety
    /// The address is from [`into_raw`](Self::into_raw) or, with a T in it, from kmalloc with T's size and
    /// alignment, on this machine, and nobody else's.
    pub const unsafe fn from_raw(kmem: &'k Kmem<P>, at: NonNull<T>) -> Self {
        KBox { kmem, at, _owns: PhantomData }
    }

    fn free(&self) {
        if size_of::<T>() != 0 {
            // A misuse (somebody freed it under us) is reported by the callee.
            // SAFETY: the memory is ours, and this the last use of it.
            let _ = unsafe { self.kmem.kfree(self.at.as_ptr().cast()) };
        }
    }
}

impl<P: Platform, T> Drop for KBox<'_, P, T> {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: the value is ours, and not used after.
        unsafe { ptr::drop_in_place(self.at.as_ptr()) };
        self.free();
    }
}

impl<P: Platform, T> Deref for KBox<'_, P, T> {
    type Target = T;

    #[inline(always)]
    fn deref(&self) -> &T {
        // SAFETY: a T, ours.
        unsafe { self.at.as_ref() }
    }
}

impl<P: Platform, T> DerefMut for KBox<'_, P, T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: a T, ours, borrowed mutably.
        unsafe { self.at.as_mut() }
    }
}

impl<P: Platform, T: fmt::Debug> fmt::Debug for KBox<'_, P, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}
