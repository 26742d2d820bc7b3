//! What a byte allocator is to a workload.
//!
//! # Concepts
//! A [`Bytes`] is a thread's handle of an allocator. Frees tell the size, which some allocators ask for
//! and others look up.
//!
//! # Locking
//! [`Locked`] is a spin lock around an allocator that has none.

mod peers;
pub mod workload;

pub use peers::{
    BuddyHeap, Glibc, GlobalSlab, Jemalloc, Mimalloc, Presence, Rlsf, Rpmalloc, SlabHeap, TalcHeap,
    global_slab,
};

use crate::{Locked, kmem_frames::refused};
use kmem::{GFP_KERNEL, Kmem};
use kmem_hosted::Hosted;
use std::{hint::black_box, ptr::NonNull};

/// A thread's handle of a byte allocator.
///
/// # Safety
/// What `alloc` returns is null, or the start of as many bytes as asked for, which may be written until they are
/// freed, by whatever thread and with whatever handle of the allocator.
pub unsafe trait Bytes {
    /// At least `size` bytes, aligned for any word; null when there are none.
    fn alloc(&mut self, size: usize) -> *mut u8;

    /// Gives bytes back.
    ///
    /// # Safety
    /// `at` is not null, is from `alloc(size)` of a handle of this allocator, and nobody uses the bytes any more.
    unsafe fn free(&mut self, at: *mut u8, size: usize);
}

/// Hands out the same bytes each time: a workload with it costs what the harness costs.
#[derive(Debug)]
pub struct Same(Box<[u64]>);

impl Same {
    /// For workloads that ask for at most `largest` bytes.
    pub fn new(largest: usize) -> Same {
        Same(vec![0; largest.div_ceil(8)].into())
    }
}

// SAFETY: the bytes are the handle's own; that they are handed out again and again breaks nothing, since they
// are written through raw pointers only.
unsafe impl Bytes for Same {
    #[inline(always)]
    fn alloc(&mut self, size: usize) -> *mut u8 {
        let bytes = size_of_val(&*self.0);
        if size <= bytes { black_box(self.0.as_mut_ptr().cast()) } else { std::ptr::null_mut() }
    }

    #[inline(always)]
    unsafe fn free(&mut self, at: *mut u8, _size: usize) {
        black_box(at);
    }
}

// SAFETY: the allocator's promise, kept under a lock.
unsafe impl<B: Bytes> Bytes for Locked<'_, B> {
    #[inline]
    fn alloc(&mut self, size: usize) -> *mut u8 {
        self.0.lock().alloc(size)
    }

    #[inline]
    unsafe fn free(&mut self, at: *mut u8, size: usize) {
        // SAFETY: the caller's.
        unsafe { self.0.lock().free(at, size) };
    }
}

/// kmem through its public calls, by a thread that is on a CPU of the machine.
#[derive(Clone, Copy)]
pub struct KmemBytes<'a>(pub &'a Kmem<Hosted>);

// SAFETY: kmalloc returns an object of at least the size, in the direct map of a machine with contents.
unsafe impl Bytes for KmemBytes<'_> {
    #[inline(always)]
    fn alloc(&mut self, size: usize) -> *mut u8 {
        self.0.kmalloc(size, GFP_KERNEL).map_or(std::ptr::null_mut(), NonNull::as_ptr)
    }

    #[inline(always)]
    unsafe fn free(&mut self, at: *mut u8, _size: usize) {
        // SAFETY: the caller's.
        if let Err(e) = unsafe { self.0.kfree(at) } {
            refused("kfree", &e);
        }
    }
}
