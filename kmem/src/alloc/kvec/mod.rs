//! `KVec`: values in a row in kmalloc memory \[O1, O3\].
//!
//! # Concepts
//! As in Rust for Linux: whatever may need memory takes flags and may fail, and fails with the vector as it was.
//! Nothing else asks for memory, and nothing panics for want of it.
//!
//! # Implementation
//! `Buf` has the memory, grown by krealloc: in place while it fits, which it often does, as sizes are
//! rounded up. The vector knows which values there are. Where doubling is refused, the exact size is tried.
//!
//! # Locking
//! None.

mod buf;
mod into_iter;

pub use into_iter::IntoIter;

use super::{Allocator, Flags};
use crate::{
    error::AllocError,
    gfp::typed::{Capability, HasAddress, TypedGfp},
    kmem::Kmem,
    platform::Platform,
};
use buf::Buf;
use core::{
    fmt,
    mem::{ManuallyDrop, MaybeUninit},
    ops::{Deref, DerefMut},
    ptr::{self, NonNull},
    slice,
};

/// Values in a row, and the only owner of them. At most [`isize::MAX`] bytes, and at most what kmalloc gives:
/// a block of the machine's MAX_ORDER.
///
/// ```
/// # use kmem_hosted::{Machine, Shape};
/// use kmem::alloc::{KVec, flags::*};
/// # let machine = Machine::new(Shape::x86_64(64 << 20)).unwrap();
/// # let kmem = &*machine;
/// let mut v = KVec::with_capacity_on(kmem, 2, GFP_KERNEL)?;
/// v.push('a', GFP_KERNEL)?;
/// v.extend_from_slice(&['b', 'c'], GFP_KERNEL)?;
/// assert_eq!(v.pop(), Some('c'));
/// assert_eq!(v[..], ['a', 'b']);
/// # Ok::<(), kmem::AllocError>(())
/// ```
pub struct KVec<T, A: Allocator> {
    buf: Buf<T, A>,
    /// The first so many values are there.
    len: usize,
}

// SAFETY: a vector is its values and an allocator.
unsafe impl<T: Send, A: Allocator + Send> Send for KVec<T, A> {}
// SAFETY: as above.
unsafe impl<T: Sync, A: Allocator + Sync> Sync for KVec<T, A> {}

impl<T, A: Allocator + Default> KVec<T, A> {
    /// An empty vector; takes no memory.
    pub fn new() -> Self {
        Self::on(A::default())
    }

    /// An empty vector with memory for `capacity` values.
    ///
    /// Context: may sleep if `flags` have `__GFP_DIRECT_RECLAIM`; never from an NMI.
    ///
    /// # Errors
    /// [`AllocError`].
    #[track_caller]
    pub fn with_capacity(capacity: usize, flags: Flags) -> Result<Self, AllocError> {
        let mut v = Self::new();
        v.buf.set_capacity(capacity, flags)?;
        Ok(v)
    }

    /// `n` copies of a value.
    ///
    /// # Errors
    /// [`AllocError`].
    #[track_caller]
    pub fn from_elem(value: T, n: usize, flags: Flags) -> Result<Self, AllocError>
    where
        T: Clone,
    {
        let mut v = Self::with_capacity(n, flags)?;
        v.extend_with(n, value, flags)?;
        Ok(v)
    }

    /// The owner of values at an address.
    ///
    /// # Safety
    /// All three are from [`into_raw_parts`](Self::into_raw_parts), and nobody else's.
    pub unsafe fn from_raw_parts(at: NonNull<T>, len: usize, capacity: usize) -> Self {
        // SAFETY: the caller's.
        KVec { buf: unsafe { Buf::from_parts(at, capacity, A::default()) }, len }
    }
}

impl<T, A: Allocator + Default> Default for KVec<T, A> {
    fn default() -> Self {
        KVec::new()
    }
}

impl<'k, P: Platform, T> KVec<T, &'k Kmem<P>> {
    /// As [`new`](KVec::new), on a machine.
    pub const fn new_on(kmem: &'k Kmem<P>) -> Self {
        KVec { buf: Buf::new(kmem), len: 0 }
    }

    /// As [`with_capacity`](KVec::with_capacity), on a machine.
    ///
    /// # Errors
    /// As [`with_capacity`](KVec::with_capacity).
    #[track_caller]
    pub fn with_capacity_on(
        kmem: &'k Kmem<P>,
        capacity: usize,
        flags: Flags,
    ) -> Result<Self, AllocError> {
        let mut v = Self::new_on(kmem);
        v.buf.set_capacity(capacity, flags)?;
        Ok(v)
    }

    /// As [`from_raw_parts`](KVec::from_raw_parts), on a machine.
    ///
    /// # Safety
    /// As [`from_raw_parts`](KVec::from_raw_parts).
    pub const unsafe fn from_raw_parts_on(
        kmem: &'k Kmem<P>,
        at: NonNull<T>,
        len: usize,
        capacity: usize,
    ) -> Self {
        // SAFETY: the caller's.
        KVec { buf: unsafe { Buf::from_parts(at, capacity, kmem) }, len }
    }
}

impl<T, A: Allocator> KVec<T, A> {
    const fn on(alloc: A) -> Self {
        KVec { buf: Buf::new(alloc), len: 0 }
    }

    /// As [`new`](KVec::new), with an allocator at hand, such as [`VmallocOn`](super::VmallocOn).
    pub const fn new_with(alloc: A) -> Self {
        Self::on(alloc)
    }

    /// Values there are.
    #[inline(always)]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    #[inline(always)]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Values there is memory for; [`usize::MAX`] for values without a size.
    #[inline(always)]
    pub const fn capacity(&self) -> usize {
        self.buf.capacity()
    }

    /// The allocator.
    pub fn allocator(&self) -> A {
        self.buf.allocator()
    }

    /// Sees to memory for `additional` further values.
    ///
    /// Context: may sleep if `flags` have `__GFP_DIRECT_RECLAIM`; never from an NMI.
    ///
    /// # Errors
    /// [`AllocError`]; the vector is as it was.
    #[inline]
    #[track_caller]
    pub fn reserve(&mut self, additional: usize, flags: Flags) -> Result<(), AllocError> {
        self.buf.reserve(self.len, additional, flags)
    }

    /// As [`reserve`](Self::reserve), with a capability \[C2\].
    ///
    /// # Errors
    /// As [`reserve`](Self::reserve).
    #[track_caller]
    pub fn reserve_in<const BLOCK: bool, const ZONE: u8>(
        &mut self,
        _capability: impl Capability<BLOCK>,
        gfp: TypedGfp<BLOCK, ZONE>,
        additional: usize,
    ) -> Result<(), AllocError>
    where
        TypedGfp<BLOCK, ZONE>: HasAddress,
    {
        self.reserve(additional, gfp.gfp())
    }

    /// Appends a value.
    ///
    /// Context: as [`reserve`](Self::reserve).
    ///
    /// # Errors
    /// [`AllocError`]; the value is dropped.
    #[inline]
    #[track_caller]
    pub fn push(&mut self, value: T, flags: Flags) -> Result<(), AllocError> {
        self.reserve(1, flags)?;
        // SAFETY: there is memory for one more.
        unsafe { self.push_unchecked(value) };
        Ok(())
    }

    /// As [`push`](Self::push), with a capability \[C2\].
    ///
    /// # Errors
    /// As [`push`](Self::push).
    #[track_caller]
    pub fn push_in<const BLOCK: bool, const ZONE: u8>(
        &mut self,
        _capability: impl Capability<BLOCK>,
        gfp: TypedGfp<BLOCK, ZONE>,
        value: T,
    ) -> Result<(), AllocError>
    where
        TypedGfp<BLOCK, ZONE>: HasAddress,
    {
        self.push(value, gfp.gfp())
    }

    /// Appends a value if there is memory for it already; in any context.
    ///
    /// # Errors
    /// The value.
    #[inline]
    pub fn push_within_capacity(&mut self, value: T) -> Result<(), T> {
        if self.len == self.capacity() {
            return Err(value);
        }
        // SAFETY: there is memory for one more.
        unsafe { self.push_unchecked(value) };
        Ok(())
    }

    /// # Safety
    /// There is memory for one more value.
    #[inline(always)]
    unsafe fn push_unchecked(&mut self, value: T) {
        // SAFETY: the place is within the memory, and has no value.
        unsafe { self.buf.at().add(self.len).write(value) };
        self.len += 1;
    }

    /// Appends copies of values.
    ///
    /// # Errors
    /// As [`reserve`](Self::reserve).
    #[track_caller]
    pub fn extend_from_slice(&mut self, values: &[T], flags: Flags) -> Result<(), AllocError>
    where
        T: Clone,
    {
        self.reserve(values.len(), flags)?;
        for value in values {
            // SAFETY: there is memory for all of them.
            unsafe { self.push_unchecked(value.clone()) };
        }
        Ok(())
    }

    /// Appends `n` copies of a value.
    ///
    /// # Errors
    /// As [`reserve`](Self::reserve).
    #[track_caller]
    pub fn extend_with(&mut self, n: usize, value: T, flags: Flags) -> Result<(), AllocError>
    where
        T: Clone,
    {
        self.reserve(n, flags)?;
        let Some(copies) = n.checked_sub(1) else { return Ok(()) };
        for _ in 0..copies {
            // SAFETY: there is memory for `n`.
            unsafe { self.push_unchecked(value.clone()) };
        }
        // SAFETY: as above.
        unsafe { self.push_unchecked(value) };
        Ok(())
    }

    /// Makes the vector `len` long: drops what is beyond, or appends copies of a value.
    ///
    /// # Errors
    /// As [`reserve`](Self::reserve).
    #[track_caller]
    pub fn resize(&mut self, len: usize, value: T, flags: Flags) -> Result<(), AllocError>
    where
        T: Clone,
    {
        match len.checked_sub(self.len) {
            Some(more) => self.extend_with(more, value, flags),
            None => {
                self.truncate(len);
                Ok(())
            }
        }
    }

    /// Takes the last value.
    #[inline]
    pub fn pop(&mut self) -> Option<T> {
        self.len = self.len.checked_sub(1)?;
        // SAFETY: the value was there, and is no longer counted as such.
        Some(unsafe { self.buf.at().add(self.len).read() })
    }

    /// Takes the value at `index`; what is behind it moves up. `None` if there is none.
    pub fn remove(&mut self, index: usize) -> Option<T> {
        if index >= self.len {
            return None;
        }
        // SAFETY: the value is there; those behind it move over its place, and it is counted off.
        unsafe {
            let at = self.buf.at().add(index);
            let value = at.read();
            ptr::copy(at.add(1).as_ptr(), at.as_ptr(), self.len - index - 1);
            self.len -= 1;
            Some(value)
        }
    }

    /// Drops all values but the first `len`. The memory stays.
    pub fn truncate(&mut self, len: usize) {
        let Some(beyond) = self.len.checked_sub(len) else { return };
        self.len = len;
        // SAFETY: these values were there, and are no longer counted as such.
        unsafe {
            let rest = slice::from_raw_parts_mut(self.buf.at().as_ptr().add(len), beyond);
            ptr::drop_in_place(rest);
        }
    }

    /// Drops all values. The memory stays.
    pub fn clear(&mut self) {
        self.truncate(0);
    }

    /// The values.
    #[inline(always)]
    pub const fn as_slice(&self) -> &[T] {
        // SAFETY: the first `len` values are there, and ours.
        unsafe { slice::from_raw_parts(self.buf.at().as_ptr(), self.len) }
    }

    /// The values, to be changed.
    #[inline(always)]
    pub const fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: as above, borrowed mutably.
        unsafe { slice::from_raw_parts_mut(self.buf.at().as_ptr(), self.len) }
    }

    /// The memory that holds no value yet.
    pub fn spare_capacity_mut(&mut self) -> &mut [MaybeUninit<T>] {
        let spare = self.capacity() - self.len;
        // SAFETY: the memory is ours, and whatever it holds is a MaybeUninit.
        unsafe {
            let at = self.buf.at().add(self.len).cast::<MaybeUninit<T>>();
            slice::from_raw_parts_mut(at.as_ptr(), spare)
        }
    }

    /// Counts `additional` further values as there.
    ///
    /// # Safety
    /// So many values were written to [`spare_capacity_mut`](Self::spare_capacity_mut), from its beginning.
    pub const unsafe fn inc_len(&mut self, additional: usize) {
        self.len += additional;
    }

    /// Gives the ownership up: address, length and capacity.
    pub fn into_raw_parts(self) -> (NonNull<T>, usize, usize) {
        let this = ManuallyDrop::new(self);
        (this.buf.at(), this.len, this.buf.capacity())
    }
}

impl<T, A: Allocator> Drop for KVec<T, A> {
    fn drop(&mut self) {
        // `buf` frees the memory after this, even if a value's own drop panics.
        self.clear();
    }
}

impl<T, A: Allocator> Deref for KVec<T, A> {
    type Target = [T];

    #[inline(always)]
    fn deref(&self) -> &[T] {
        self.as_slice()
    }
}

impl<T, A: Allocator> DerefMut for KVec<T, A> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [T] {
        self.as_mut_slice()
    }
}

impl<'v, T, A: Allocator> IntoIterator for &'v KVec<T, A> {
    type Item = &'v T;
    type IntoIter = slice::Iter<'v, T>;

    fn into_iter(self) -> slice::Iter<'v, T> {
        self.iter()
    }
}

impl<'v, T, A: Allocator> IntoIterator for &'v mut KVec<T, A> {
    type Item = &'v mut T;
    type IntoIter = slice::IterMut<'v, T>;

    fn into_iter(self) -> slice::IterMut<'v, T> {
        self.iter_mut()
    }
}

impl<T: PartialEq, A: Allocator, B: Allocator> PartialEq<KVec<T, B>> for KVec<T, A> {
    fn eq(&self, other: &KVec<T, B>) -> bool {
        **self == **other
    }
}

impl<T: Eq, A: Allocator> Eq for KVec<T, A> {}

impl<T: fmt::Debug, A: Allocator> fmt::Debug for KVec<T, A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}
