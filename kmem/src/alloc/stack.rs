//! `KernelStack`: a stack for a thread.

use crate::{error::AllocError, gfp::typed::Capability, kmem::Kmem, platform::Platform};
use core::{fmt, mem::ManuallyDrop, ops::Range, ptr::NonNull};

/// A stack, and the only owner of it \[O1, K1\]. It may be dropped in any context but NMI, when nobody runs on it.
///
/// What is on it belongs to whoever runs on it, so an owner shows where it is, and how much was used.
///
/// ```
/// # use kmem_hosted::{Machine, Shape};
/// use kmem::alloc::KernelStack;
/// # let machine = Machine::new(Shape::x86_64(64 << 20)).unwrap();
/// # let kmem = &*machine;
/// let stack = KernelStack::new(kmem, 2)?;
/// assert_eq!(stack.range().len(), 8192);
/// assert_eq!(stack.depth_used(), 0);
/// let guard = stack.range().start - 1; // an overflow's first byte
/// let found = kmem.stack_of(core::ptr::without_provenance(guard)).unwrap();
/// assert_eq!(found.low, stack.range().start);
/// # Ok::<(), kmem::AllocError>(())
/// ```
pub struct KernelStack<'k, P: Platform> {
    kmem: &'k Kmem<P>,
    low: NonNull<u8>,
    len: usize,
}

// SAFETY: a stack is its memory and a reference to its machine.
unsafe impl<P: Platform> Send for KernelStack<'_, P> where Kmem<P>: Sync {}
// SAFETY: shared, it tells addresses and numbers only.
unsafe impl<P: Platform> Sync for KernelStack<'_, P> where Kmem<P>: Sync {}

impl<'k, P: Platform> KernelStack<'k, P> {
    /// A stack of `frames` frames.
    ///
    /// Context: process context; may sleep.
    ///
    /// # Errors
    /// As [`alloc_thread_stack`](Kmem::alloc_thread_stack).
    #[inline]
    #[track_caller]
    pub fn new(kmem: &'k Kmem<P>, frames: usize) -> Result<Self, AllocError> {
        let low = kmem.alloc_thread_stack(frames)?;
        Ok(KernelStack { kmem, low, len: frames * kmem.page_size() })
    }

    /// As [`new`](Self::new), with a capability \[C2\].
    ///
    /// # Errors
    /// As [`new`](Self::new).
    #[track_caller]
    pub fn new_in(
        kmem: &'k Kmem<P>,
        _capability: impl Capability<true>,
        frames: usize,
    ) -> Result<Self, AllocError> {
        Self::new(kmem, frames)
    }

    /// Its lowest address, for the classic calls.
    pub fn as_ptr(&self) -> NonNull<u8> {
        self.low
    }

    /// Its machine.
    pub fn kmem(&self) -> &'k Kmem<P> {
        self.kmem
    }

    /// Its addresses. The stack pointer starts at the end, a multiple of a frame.
    pub fn range(&self) -> Range<usize> {
        let low = self.low.addr().get();
        low..low + self.len
    }

    /// Whether running off its end faults.
    pub fn is_guarded(&self) -> bool {
        self.kmem.stacks_are_guarded()
    }

    /// Bytes from the top to the lowest word that is not zero: how deep it was used at least \[K2\].
    pub fn depth_used(&self) -> usize {
        let words = 2 * size_of::<usize>();
        let room = self.len - words;
        // A misuse (somebody freed it under us) makes it unknown.
        room - self.kmem.stack_not_used(self.low.as_ptr()).unwrap_or(room)
    }

    /// Whether its low end was overwritten.
    pub fn end_corrupted(&self) -> bool {
        self.kmem.stack_end_corrupted(self.low.as_ptr()).unwrap_or(false)
    }

    /// Names who it belongs to, as [`set_stack_owner`](Kmem::set_stack_owner).
    pub fn set_owner(&self, owner: usize) {
        self.kmem.set_stack_owner(self.low.as_ptr(), owner);
    }

    /// Gives the ownership up: the stack is to be freed by [`free_thread_stack`](Kmem::free_thread_stack).
    pub fn into_raw(self) -> NonNull<u8> {
        ManuallyDrop::new(self).low
    }
}

impl<P: Platform> fmt::Debug for KernelStack<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KernelStack({:x?})", self.range())
    }
}

impl<P: Platform> Drop for KernelStack<'_, P> {
    fn drop(&mut self) {
        // A misuse (somebody freed it under us, or its end was overwritten) is reported by the callee.
        // SAFETY: the stack is ours; whoever ran on it had it borrowed, or promised to be done.
        let _ = unsafe { self.kmem.free_thread_stack(self.low.as_ptr()) };
    }
}
