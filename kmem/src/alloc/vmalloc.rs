//! Allocators over vmalloc and kvmalloc \[O1\].
//!
//! # Concepts
//! As in Rust for Linux: [`Vmalloc`] for what is large and needs no contiguous frames, [`KVmalloc`] for what may be
//! large. Both are named by a machine's home and have no size; on a machine that is at hand they are
//! [`VmallocOn`] and [`KVmallocOn`].
//!
//! Memory of [`Vmalloc`] is asked for in process context only; everything may be dropped in any but an NMI. Where areas
//! [are not mapped](Platform::vmalloc_is_mapped) there is none.
//!
//! # Locking
//! None of its own.

use super::{Allocator, Flags, Home, KBox, KVec, home::homed};
use crate::{error::AllocError, kmem::Kmem, platform::Platform, vmalloc::Wanted};
use core::{alloc::Layout, fmt, marker::PhantomData, ptr::NonNull};

/// A value in vmalloc memory of the machine whose home is `H`.
pub type VBox<T, H> = KBox<T, Vmalloc<H>>;
/// A value in kvmalloc memory of the machine whose home is `H`.
pub type KVBox<T, H> = KBox<T, KVmalloc<H>>;
/// Values in a row in vmalloc memory of the machine whose home is `H`.
pub type VVec<T, H> = KVec<T, Vmalloc<H>>;
/// Values in a row in kvmalloc memory of the machine whose home is `H`.
pub type KVVec<T, H> = KVec<T, KVmalloc<H>>;

/// Memory for a layout, by a call that was given one.
fn memory<P: Platform>(
    kmem: &Kmem<P>,
    contiguous: bool,
    layout: Layout,
    flags: Flags,
) -> Result<NonNull<u8>, AllocError> {
    if layout.size() == 0 {
        return Ok(layout.dangling_ptr());
    }
    if contiguous {
        return kmem.kvmalloc_layout(layout, flags);
    }
    let wanted = Wanted { align: layout.align(), ..Wanted::new(layout.size(), flags) };
    kmem.vmap_layer().vmalloc_mapped(wanted)
}

/// Memory with as many bytes of what is at `at` as fit.
///
/// # Safety
/// `at` is from here, for `old`, and nobody uses it any more if this succeeds.
unsafe fn moved<P: Platform>(
    kmem: &Kmem<P>,
    contiguous: bool,
    at: NonNull<u8>,
    (old, layout): (Layout, Layout),
    flags: Flags,
) -> Result<NonNull<u8>, AllocError> {
    let (before, size) = (old.size(), layout.size());
    let fits = layout.align() <= old.align()
        && before > 0
        && size > 0
        && kmem.kvsize(at.as_ptr()).is_some_and(|usable| size <= usable);
    if fits {
        if size < before && flags.contains(Flags::ZERO) {
            // What it does not hold now is zeros when it grows again.
            // SAFETY: so many bytes are the caller's.
            unsafe { at.add(size).write_bytes(0, before - size) };
        }
        return Ok(at);
    }
    let new = memory(kmem, contiguous, layout, flags)?;
    // SAFETY: there are so many bytes at both, and the new memory is nobody else's.
    unsafe {
        new.copy_from_nonoverlapping(at, before.min(size));
        given_back(kmem, at, old);
    }
    Ok(new)
}

/// Frees memory.
///
/// # Safety
/// It is from here, for `layout`, and nobody uses it any more.
unsafe fn given_back<P: Platform>(kmem: &Kmem<P>, at: NonNull<u8>, layout: Layout) {
    if layout.size() != 0 {
        // A misuse (somebody freed it under the owner) is reported by the callee.
        // SAFETY: the caller's.
        let _ = unsafe { kmem.kvfree(at.as_ptr()) };
    }
}

macro_rules! allocators {
    ($contiguous:literal, $what:literal, $here:ident, $on:ident) => {
        homed! {
            #[doc = concat!($what, " of the machine whose home is `H`; in `global!`, of the one machine.")]
            $here, |kmem| $on(kmem)
        }

        #[doc = concat!($what, " of a machine that is at hand.")]
        pub struct $on<'k, P: Platform>(pub &'k Kmem<P>);

        impl<P: Platform> Clone for $on<'_, P> {
            fn clone(&self) -> Self {
                *self
            }
        }

        impl<P: Platform> Copy for $on<'_, P> {}

        impl<P: Platform> fmt::Debug for $on<'_, P> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(stringify!($on))
            }
        }

        // SAFETY: the memory is at least as large as asked, aligned as the layout says, and nobody else's until it
        // is freed; it belongs to the machine, which the references share.
        unsafe impl<P: Platform> Allocator for $on<'_, P> {
            #[track_caller]
            fn alloc(self, layout: Layout, flags: Flags) -> Result<NonNull<[u8]>, AllocError> {
                let at = memory(self.0, $contiguous, layout, flags)?;
                Ok(NonNull::slice_from_raw_parts(at, layout.size()))
            }

            #[track_caller]
            unsafe fn realloc(
                self,
                at: NonNull<u8>,
                layout: Layout,
                old: Layout,
                flags: Flags,
            ) -> Result<NonNull<[u8]>, AllocError> {
                // SAFETY: the caller's.
                let at = unsafe { moved(self.0, $contiguous, at, (old, layout), flags)? };
                Ok(NonNull::slice_from_raw_parts(at, layout.size()))
            }

            #[track_caller]
            unsafe fn free(self, at: NonNull<u8>, layout: Layout) {
                // SAFETY: the caller's.
                unsafe { given_back(self.0, at, layout) };
            }
        }
    };
}

allocators!(false, "vmalloc", Vmalloc, VmallocOn);
allocators!(true, "kvmalloc", KVmalloc, KVmallocOn);
