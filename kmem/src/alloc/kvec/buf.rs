//! The memory of a `KVec`: places for a number of values, initialised or not.

use crate::{
    alloc::{Allocator, Flags},
    error::AllocError,
};
use core::{alloc::Layout, marker::PhantomData, ptr::NonNull};

/// Places of the first memory that a growing vector takes.
const FIRST: usize = 4;

/// Memory for `cap` values. Knows nothing of which of them there are.
pub(super) struct Buf<T, A: Allocator> {
    at: NonNull<T>,
    /// Values that there is memory for; 0 for values without a size.
    cap: usize,
    alloc: A,
    _of: PhantomData<T>,
}

impl<T, A: Allocator> Buf<T, A> {
    pub(super) const fn new(alloc: A) -> Self {
        Buf { at: NonNull::dangling(), cap: 0, alloc, _of: PhantomData }
    }

    /// # Safety
    /// `at` is `alloc`'s, for `cap` values, and nobody else's.
    pub(super) const unsafe fn from_parts(at: NonNull<T>, cap: usize, alloc: A) -> Self {
        Buf { at, cap: if size_of::<T>() == 0 { 0 } else { cap }, alloc, _of: PhantomData }
    }

    #[inline(always)]
    pub(super) const fn at(&self) -> NonNull<T> {
        self.at
    }

    #[inline(always)]
    pub(super) const fn capacity(&self) -> usize {
        if size_of::<T>() == 0 { usize::MAX } else { self.cap }
    }

    pub(super) fn allocator(&self) -> A {
        self.alloc
    }

    fn layout(&self) -> Layout {
        // It was made with this layout, so it is one; without memory there is none to free.
        Layout::array::<T>(self.cap).unwrap_or(Layout::new::<()>())
    }

    /// Sees to places for `additional` values beyond the first `len`: twice as many as there were, or, where
    /// so much is not to be had, as many as are needed.
    #[inline]
    #[track_caller]
    pub(super) fn reserve(
        &mut self,
        len: usize,
        additional: usize,
        flags: Flags,
    ) -> Result<(), AllocError> {
        if self.capacity() - len >= additional {
            return Ok(());
        }
        self.grow(len, additional, flags)
    }

    #[cold]
    #[track_caller]
    fn grow(&mut self, len: usize, additional: usize, flags: Flags) -> Result<(), AllocError> {
        // Values without a size run out of numbers only.
        let needed = len.checked_add(additional).ok_or(AllocError::NoMemory)?;
        let generous = needed.max(self.cap.saturating_mul(2)).max(FIRST);
        if generous > needed && self.set_capacity(generous, flags | Flags::NOWARN).is_ok() {
            return Ok(());
        }
        self.set_capacity(needed, flags)
    }

    /// Gets memory for `cap` values, which are at least as many as before.
    #[track_caller]
    pub(super) fn set_capacity(&mut self, cap: usize, flags: Flags) -> Result<(), AllocError> {
        if size_of::<T>() == 0 || cap == self.cap {
            return Ok(());
        }
        let layout = Layout::array::<T>(cap).map_err(|_| AllocError::NoMemory)?;
        let at = if self.cap == 0 {
            self.alloc.alloc(layout, flags)?
        } else {
            // SAFETY: the memory is ours, with this layout; if it moves, the old address is forgotten.
            unsafe { self.alloc.realloc(self.at.cast(), layout, self.layout(), flags)? }
        };
        (self.at, self.cap) = (at.cast(), cap);
        Ok(())
    }
}

impl<T, A: Allocator> Drop for Buf<T, A> {
    fn drop(&mut self) {
        if self.cap != 0 {
            // SAFETY: the memory is ours, with this layout, and this the last use of it.
            unsafe { self.alloc.free(self.at.cast(), self.layout()) };
        }
    }
}
