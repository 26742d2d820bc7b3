//! `KBox`: one value of its own in kmalloc memory.

use super::{Allocator, Flags};
use crate::{
    error::AllocError,
    gfp::typed::{Capability, HasAddress, TypedGfp},
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

/// A value in memory of an allocator, and the only owner of it.
///
/// With an allocator whose type names its machine (see [`global!`](crate::global)) it is made by
/// [`new`](KBox::new); on a machine that is at hand, by [`new_on`](KBox::new_on):
///
/// ```
/// # use kmem_hosted::{Machine, Shape};
/// use kmem::alloc::{KBox, flags::*};
/// # let machine = Machine::new(Shape::x86_64(64 << 20)).unwrap();
/// # let kmem = &*machine;
/// let mut counter = KBox::new_on(kmem, 41u64, GFP_KERNEL)?;
/// *counter += 1;
/// assert_eq!(*counter, 42);
/// # Ok::<(), kmem::AllocError>(())
/// ```
pub struct KBox<T, A: Allocator> {
    at: NonNull<T>,
    alloc: A,
    _owns: PhantomData<T>,
}

// SAFETY: a box is its value and an allocator.
unsafe impl<T: Send, A: Allocator + Send> Send for KBox<T, A> {}
// SAFETY: as above.
unsafe impl<T: Sync, A: Allocator + Sync> Sync for KBox<T, A> {}

impl<T, A: Allocator + Default> KBox<T, A> {
    /// Moves a value into memory of its own.
    ///
    /// Context: may sleep if `flags` have `__GFP_DIRECT_RECLAIM`; never from an NMI.
    ///
    /// # Errors
    /// [`AllocError`]; the value is dropped. [`try_new`](Self::try_new) gives it back.
    #[inline]
    #[track_caller]
    pub fn new(value: T, flags: Flags) -> Result<Self, AllocError> {
        Self::make(A::default(), value, flags).map_err(|(e, _)| e)
    }

    /// As [`new`](Self::new), but gives the value back if there is no memory for it.
    ///
    /// # Errors
    /// [`AllocError`] and the value.
    #[inline]
    #[track_caller]
    pub fn try_new(value: T, flags: Flags) -> Result<Self, (AllocError, T)> {
        Self::make(A::default(), value, flags)
    }

    /// As [`new`](Self::new), pinned.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    #[track_caller]
    pub fn pin(value: T, flags: Flags) -> Result<Pin<Self>, AllocError> {
        Self::new(value, flags).map(Self::into_pin)
    }

    /// The owner of a value at an address.
    ///
    /// # Safety
    /// The address is from [`into_raw`](Self::into_raw) or, with a T in it, from the allocator with T's layout,
    /// and nobody else's.
    pub unsafe fn from_raw(at: NonNull<T>) -> Self {
        KBox { at, alloc: A::default(), _owns: PhantomData }
    }
}

impl<'k, P: Platform, T> KBox<T, &'k Kmem<P>> {
    /// As [`new`](KBox::new), on a machine.
    ///
    /// # Errors
    /// As [`new`](KBox::new).
    #[inline]
    #[track_caller]
    pub fn new_on(kmem: &'k Kmem<P>, value: T, flags: Flags) -> Result<Self, AllocError> {
        Self::make(kmem, value, flags).map_err(|(e, _)| e)
    }

    /// As [`try_new`](KBox::try_new), on a machine.
    ///
    /// # Errors
    /// As [`try_new`](KBox::try_new).
    #[inline]
    #[track_caller]
    pub fn try_new_on(kmem: &'k Kmem<P>, value: T, flags: Flags) -> Result<Self, (AllocError, T)> {
        Self::make(kmem, value, flags)
    }

    /// As [`new_on`](Self::new_on), with a capability \[C2\].
    ///
    /// # Errors
    /// As [`new`](KBox::new).
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
        Self::new_on(kmem, value, gfp.gfp())
    }

    /// As [`from_raw`](KBox::from_raw), on a machine.
    ///
    /// # Safety
    /// As [`from_raw`](KBox::from_raw).
    pub const unsafe fn from_raw_on(kmem: &'k Kmem<P>, at: NonNull<T>) -> Self {
        KBox { at, alloc: kmem, _owns: PhantomData }
    }
}

impl<T, A: Allocator> KBox<T, A> {
    /// As [`new`](KBox::new), with an allocator at hand, such as [`VmallocOn`](super::VmallocOn).
    ///
    /// # Errors
    /// As [`new`](KBox::new).
    #[track_caller]
    pub fn new_with(alloc: A, value: T, flags: Flags) -> Result<Self, AllocError> {
        Self::make(alloc, value, flags).map_err(|(e, _)| e)
    }

    #[inline]
    #[track_caller]
    fn make(alloc: A, value: T, flags: Flags) -> Result<Self, (AllocError, T)> {
        match alloc.alloc(Layout::new::<T>(), flags) {
            Ok(at) => {
                let at = at.cast::<T>();
                // SAFETY: memory for a T, just given to us.
                unsafe { at.write(value) };
                Ok(KBox { at, alloc, _owns: PhantomData })
            }
            Err(e) => Err((e, value)),
        }
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

    /// Gives the ownership up: the address is the allocator's, for C code or for [`from_raw`](Self::from_raw).
    pub fn into_raw(this: Self) -> NonNull<T> {
        ManuallyDrop::new(this).at
    }

    fn free(&self) {
        // SAFETY: the memory is ours, and this the last use of it.
        unsafe { self.alloc.free(self.at.cast(), Layout::new::<T>()) };
    }
}

impl<T, A: Allocator> Drop for KBox<T, A> {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: the value is ours, and not used after.
        unsafe { ptr::drop_in_place(self.at.as_ptr()) };
        self.free();
    }
}

impl<T, A: Allocator> Deref for KBox<T, A> {
    type Target = T;

    #[inline(always)]
    fn deref(&self) -> &T {
        // SAFETY: a T, ours.
        unsafe { self.at.as_ref() }
    }
}

impl<T, A: Allocator> DerefMut for KBox<T, A> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: a T, ours, borrowed mutably.
        unsafe { self.at.as_mut() }
    }
}

impl<T: fmt::Debug, A: Allocator> fmt::Debug for KBox<T, A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}
