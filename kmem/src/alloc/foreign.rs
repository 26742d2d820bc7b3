//! kmalloc for collections that know nothing of flags \[O2\].
//!
//! # Concepts
//! `GlobalAlloc` and `allocator_api2::alloc::Allocator` have no flags, so what a request may do is told from
//! where it is made: `GFP_KERNEL` in process context, `GFP_ATOMIC` elsewhere. What a kernel's `alloc` crate
//! allocates under a spin lock is thereby served, from the reserves. Where there is no memory the answer is null
//! or an error; what the collection makes of that is its own (those of `alloc` abort unless their `try_` forms
//! are used).
//!
//! ```
//! kmem::global! {
//!     /// The kernel's memory.
//!     pub mod mem: kmem_hosted::Hosted
//! }
//!
//! // A kernel writes `#[global_allocator]` above this. Until `mem::init` every request is refused.
//! static HEAP: mem::Kmalloc = mem::Kmalloc::new();
//! # use std::alloc::{GlobalAlloc, Layout};
//! # // SAFETY: the layout has a size.
//! # assert!(unsafe { GlobalAlloc::alloc(&HEAP, Layout::new::<u64>()) }.is_null());
//! ```
//!
//! # Locking
//! None of its own.

use super::{Flags, Home, Kmalloc};
use crate::{kmem::Kmem, platform::Platform};
use core::{
    alloc::{GlobalAlloc, Layout},
    ptr::{self, NonNull},
};

impl<P: Platform> Kmem<P> {
    /// Flags for a request that has none of its own: `GFP_KERNEL` where the caller may sleep, else
    /// `GFP_ATOMIC`.
    #[inline]
    pub fn flags_here(&self) -> Flags {
        if self.context().may_sleep() { Flags::KERNEL } else { Flags::ATOMIC }
    }
}

// SAFETY: kmalloc's memory is as large as asked and aligned as the layout says, and nobody else's until it is
// freed; nothing here unwinds.
unsafe impl<H: Home> GlobalAlloc for Kmalloc<H> {
    #[inline]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let Some(kmem) = H::kmem() else { return ptr::null_mut() };
        kmem.kmalloc_layout(layout, kmem.flags_here()).map_or(ptr::null_mut(), NonNull::as_ptr)
    }

    #[inline]
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        if let Some(at) = NonNull::new(at) {
            // SAFETY: the caller's.
            unsafe { super::Allocator::free(*self, at, layout) };
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        let Some(kmem) = H::kmem() else { return ptr::null_mut() };
        let flags = kmem.flags_here() | Flags::ZERO;
        kmem.kmalloc_layout(layout, flags).map_or(ptr::null_mut(), NonNull::as_ptr)
    }

    unsafe fn realloc(&self, at: *mut u8, old: Layout, size: usize) -> *mut u8 {
        let (Some(kmem), Some(at)) = (H::kmem(), NonNull::new(at)) else { return ptr::null_mut() };
        let Ok(layout) = Layout::from_size_align(size, old.align()) else { return ptr::null_mut() };
        // SAFETY: the caller's.
        let new = unsafe { kmem.krealloc_layout(at, old, layout, kmem.flags_here()) };
        new.map_or(ptr::null_mut(), NonNull::as_ptr)
    }
}

/// The same for each version of the crate that collections are written for.
#[cfg(any(feature = "allocator-api2", feature = "allocator-api2-02"))]
macro_rules! api2 {
    ($name:ident, $api2:ident) => {
        mod $name {
            use crate::{
                alloc::{Allocator as _, Flags, Home, Kmalloc},
                kmem::Kmem,
                platform::Platform,
            };
            use core::{alloc::Layout, ptr::NonNull};
            use $api2::alloc::{AllocError, Allocator};

            // SAFETY: kmalloc's memory is as large as asked and aligned as the layout says, nobody else's until it is
            // freed, and belongs to the machine, which all references share; moving the value moves no memory.
            unsafe impl<P: Platform> Allocator for Kmem<P> {
                #[inline]
                fn allocate(&self, layout: Layout) -> Result<NonNull<[u8]>, AllocError> {
                    self.alloc(layout, self.flags_here()).map_err(|_| AllocError)
                }

                fn allocate_zeroed(&self, layout: Layout) -> Result<NonNull<[u8]>, AllocError> {
                    self.alloc(layout, self.flags_here() | Flags::ZERO).map_err(|_| AllocError)
                }

                #[inline]
                unsafe fn deallocate(&self, at: NonNull<u8>, layout: Layout) {
                    // SAFETY: the caller's.
                    unsafe { self.free(at, layout) };
                }

                unsafe fn grow(
                    &self,
                    at: NonNull<u8>,
                    old: Layout,
                    layout: Layout,
                ) -> Result<NonNull<[u8]>, AllocError> {
                    // SAFETY: the caller's.
                    unsafe {
                        self.realloc(at, layout, old, self.flags_here()).map_err(|_| AllocError)
                    }
                }

                unsafe fn shrink(
                    &self,
                    at: NonNull<u8>,
                    old: Layout,
                    layout: Layout,
                ) -> Result<NonNull<[u8]>, AllocError> {
                    // SAFETY: the caller's.
                    unsafe {
                        self.realloc(at, layout, old, self.flags_here()).map_err(|_| AllocError)
                    }
                }
            }

            // SAFETY: as for the machine; where the home names another one, memory is refused, or a free found out.
            unsafe impl<H: Home> Allocator for Kmalloc<H> {
                #[inline]
                fn allocate(&self, layout: Layout) -> Result<NonNull<[u8]>, AllocError> {
                    H::kmem().ok_or(AllocError)?.allocate(layout)
                }

                fn allocate_zeroed(&self, layout: Layout) -> Result<NonNull<[u8]>, AllocError> {
                    H::kmem().ok_or(AllocError)?.allocate_zeroed(layout)
                }

                #[inline]
                unsafe fn deallocate(&self, at: NonNull<u8>, layout: Layout) {
                    // SAFETY: the caller's.
                    unsafe { self.free(at, layout) };
                }

                unsafe fn grow(
                    &self,
                    at: NonNull<u8>,
                    old: Layout,
                    layout: Layout,
                ) -> Result<NonNull<[u8]>, AllocError> {
                    // SAFETY: the caller's.
                    unsafe { H::kmem().ok_or(AllocError)?.grow(at, old, layout) }
                }

                unsafe fn shrink(
                    &self,
                    at: NonNull<u8>,
                    old: Layout,
                    layout: Layout,
                ) -> Result<NonNull<[u8]>, AllocError> {
                    // SAFETY: the caller's.
                    unsafe { H::kmem().ok_or(AllocError)?.shrink(at, old, layout) }
                }
            }
        }
    };
}

#[cfg(feature = "allocator-api2")]
api2!(v04, allocator_api2);
#[cfg(feature = "allocator-api2-02")]
api2!(v02, allocator_api2_02);
