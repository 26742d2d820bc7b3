//! The values of a `KVec`, one by one.

use super::{KVec, buf::Buf};
use crate::alloc::Allocator;
use core::{
    iter::FusedIterator,
    mem::ManuallyDrop,
    ops::Range,
    ptr::{self, NonNull},
};

/// The values of a [`KVec`], moved out in order. Those that are left when it goes are dropped.
pub struct IntoIter<T, A: Allocator> {
    buf: Buf<T, A>,
    /// The values that are still there.
    left: Range<usize>,
}

// SAFETY: it is values and an allocator.
unsafe impl<T: Send, A: Allocator + Send> Send for IntoIter<T, A> {}
// SAFETY: as above.
unsafe impl<T: Sync, A: Allocator + Sync> Sync for IntoIter<T, A> {}

impl<T, A: Allocator> IntoIter<T, A> {
    /// The values that are left.
    pub fn as_slice(&self) -> &[T] {
        // SAFETY: the values in `left` are there, and ours.
        unsafe {
            core::slice::from_raw_parts(
                self.buf.at().as_ptr().add(self.left.start),
                self.left.len(),
            )
        }
    }
}

impl<T, A: Allocator> Iterator for IntoIter<T, A> {
    type Item = T;

    #[inline]
    fn next(&mut self) -> Option<T> {
        let i = self.left.next()?;
        // SAFETY: the value was there, and is no longer counted as such.
        Some(unsafe { self.buf.at().add(i).read() })
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.left.size_hint()
    }
}

impl<T, A: Allocator> DoubleEndedIterator for IntoIter<T, A> {
    #[inline]
    fn next_back(&mut self) -> Option<T> {
        let i = self.left.next_back()?;
        // SAFETY: as in `next`.
        Some(unsafe { self.buf.at().add(i).read() })
    }
}

impl<T, A: Allocator> ExactSizeIterator for IntoIter<T, A> {}
impl<T, A: Allocator> FusedIterator for IntoIter<T, A> {}

impl<T, A: Allocator> Drop for IntoIter<T, A> {
    fn drop(&mut self) {
        let rest = NonNull::slice_from_raw_parts(
            // SAFETY: `left` is within the memory, or at its end.
            unsafe { self.buf.at().add(self.left.start) },
            self.left.len(),
        );
        // SAFETY: the values in `left` are there, ours, and not used after.
        unsafe { ptr::drop_in_place(rest.as_ptr()) };
    }
}

impl<T, A: Allocator> IntoIterator for KVec<T, A> {
    type Item = T;
    type IntoIter = IntoIter<T, A>;

    fn into_iter(self) -> IntoIter<T, A> {
        let this = ManuallyDrop::new(self);
        // SAFETY: the memory goes from the vector, which is forgotten, to the iterator.
        let buf = unsafe { ptr::read(&raw const this.buf) };
        IntoIter { buf, left: 0..this.len }
    }
}
