//! Allocators without a size: the machine is named by a type \[O1\].
//!
//! # Concepts
//! A kernel has one machine, and its owners should not each carry a reference to it. A [`Home`] is a type that
//! knows where a machine lives; [`Kmalloc<H>`](Kmalloc) is the allocator of that machine and takes no place.
//! Two machines in one process are two types, so that what is one's cannot be given to the other. The
//! ordinary case, one machine in a static, is written by [`global!`](crate::global): it makes a module with
//! the home, the short names `KBox<T>` and `KVec<T>`, and the classic free functions.
//!
//! # Implementation
//! A home is asked at each call and may have no machine yet: requests fail then, and frees cannot be, since
//! nothing was allocated. A home that names another machine later breaks nothing: the machine asked to
//! free finds out that the object is not its own.
//!
//! # Locking
//! [`Seat`] is one atomic pointer.

use super::Allocator;
use crate::{alloc::Flags, error::AllocError, kmem::Kmem, platform::Platform};
use core::{
    alloc::Layout,
    cell::UnsafeCell,
    fmt,
    marker::PhantomData,
    mem::MaybeUninit,
    ptr::NonNull,
    sync::atomic::{
        AtomicU8,
        Ordering::{Acquire, Relaxed, Release},
    },
};

/// A type that knows where a machine lives.
pub trait Home: 'static {
    /// The machine's platform.
    type Platform: Platform + 'static;

    /// The machine; `None` before it is up.
    fn kmem() -> Option<&'static Kmem<Self::Platform>>;
}

/// An allocator without a size, of the machine whose home is its parameter; the expression makes of the machine what
/// serves it.
macro_rules! homed {
    ($(#[$doc:meta])* $name:ident, |$kmem:ident| $serves:expr) => {
        $(#[$doc])*
        pub struct $name<H>(PhantomData<fn() -> H>);

        impl<H: Home> $name<H> {
            /// The allocator.
            pub const fn new() -> Self {
                $name(PhantomData)
            }
        }

        impl<H: Home> Default for $name<H> {
            fn default() -> Self {
                $name::new()
            }
        }

        impl<H> Clone for $name<H> {
            fn clone(&self) -> Self {
                *self
            }
        }

        impl<H> Copy for $name<H> {}

        impl<H> fmt::Debug for $name<H> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(stringify!($name))
            }
        }

        // SAFETY: as for what serves it; where the home names another machine, memory is refused, or a free found out.
        unsafe impl<H: Home> Allocator for $name<H> {
            #[inline]
            #[track_caller]
            fn alloc(self, layout: Layout, flags: Flags) -> Result<NonNull<[u8]>, AllocError> {
                let $kmem = H::kmem().ok_or(AllocError::NoMemory)?;
                $serves.alloc(layout, flags)
            }

            #[inline]
            #[track_caller]
            unsafe fn realloc(
                self,
                at: NonNull<u8>,
                layout: Layout,
                old: Layout,
                flags: Flags,
            ) -> Result<NonNull<[u8]>, AllocError> {
                let $kmem = H::kmem().ok_or(AllocError::NoMemory)?;
                let serves = $serves;
                // SAFETY: the caller's.
                unsafe { serves.realloc(at, layout, old, flags) }
            }

            #[inline]
            #[track_caller]
            unsafe fn free(self, at: NonNull<u8>, layout: Layout) {
                if let Some($kmem) = H::kmem() {
                    let serves = $serves;
                    // SAFETY: the caller's.
                    unsafe { serves.free(at, layout) };
                }
            }
        }
    };
}

pub(super) use homed;

homed! {
    /// kmalloc of the machine whose home is `H`.
    ///
    /// ```
    /// # use kmem_hosted::{Hosted, Machine, Shape};
    /// # use std::sync::OnceLock;
    /// use kmem::{Kmem, alloc::{Home, KBox, KVec, Kmalloc, flags::*}};
    ///
    /// static MACHINE: OnceLock<Machine> = OnceLock::new();
    /// struct Here;
    /// impl Home for Here {
    ///     type Platform = Hosted;
    ///     fn kmem() -> Option<&'static Kmem<Hosted>> {
    ///         MACHINE.get().map(|machine| machine.kmem())
    ///     }
    /// }
    ///
    /// // Before the machine is up there is no memory.
    /// assert!(KBox::<_, Kmalloc<Here>>::new(1u64, GFP_KERNEL).is_err());
    /// MACHINE.get_or_init(|| Machine::new(Shape::x86_64(64 << 20)).unwrap());
    ///
    /// let one = KBox::<_, Kmalloc<Here>>::new(1u64, GFP_KERNEL)?;
    /// assert_eq!(size_of_val(&one), size_of::<usize>());
    /// let mut primes = KVec::<_, Kmalloc<Here>>::with_capacity(2, GFP_KERNEL)?;
    /// primes.push(2u64, GFP_KERNEL)?;
    /// primes.extend_from_slice(&[3, 5], GFP_KERNEL)?;
    /// assert_eq!(primes[..], [2, 3, 5]);
    /// # Ok::<(), kmem::AllocError>(())
    /// ```
    Kmalloc, |kmem| kmem
}

const EMPTY: u8 = 0;
const FILLING: u8 = 1;
const TAKEN: u8 = 2;

/// A static's place for one machine, filled once.
pub struct Seat<P: Platform> {
    state: AtomicU8,
    kmem: UnsafeCell<MaybeUninit<Kmem<P>>>,
}

// SAFETY: the machine is written once, by whoever changed the state from EMPTY, and shared only after that; it
// may be shared and was moved in from another thread.
unsafe impl<P: Platform> Sync for Seat<P> where Kmem<P>: Send + Sync {}

impl<P: Platform> Seat<P> {
    /// An empty place.
    pub const fn new() -> Self {
        Seat { state: AtomicU8::new(EMPTY), kmem: UnsafeCell::new(MaybeUninit::uninit()) }
    }

    /// The machine, once there is one.
    #[inline(always)]
    pub fn get(&self) -> Option<&Kmem<P>> {
        // Acquire pairs with the Release in `set`.
        if self.state.load(Acquire) != TAKEN {
            return None;
        }
        // SAFETY: written before the state said so, and not written again.
        Some(unsafe { (*self.kmem.get()).assume_init_ref() })
    }

    /// Puts a machine in.
    ///
    /// # Errors
    /// The machine, if there is one already.
    #[expect(clippy::result_large_err, reason = "the machine comes back")]
    pub fn set(&self, kmem: Kmem<P>) -> Result<&Kmem<P>, Kmem<P>> {
        if self.state.compare_exchange(EMPTY, FILLING, Relaxed, Relaxed).is_err() {
            return Err(kmem);
        }
        // SAFETY: only one caller gets here, and nobody reads before the state says so.
        let kmem = unsafe { &*(*self.kmem.get()).write(kmem) };
        // Release pairs with the Acquire in `get`.
        self.state.store(TAKEN, Release);
        Ok(kmem)
    }
}

impl<P: Platform> Default for Seat<P> {
    fn default() -> Self {
        Seat::new()
    }
}

/// Makes a module for the one machine of a kernel or a program: its home, allocators and owners without a
/// size, and the classic free functions.
///
/// ```
/// # use kmem_hosted::{Hosted, Shape};
/// # use kmem::{Config, Kmem, zone::{Layout, ZoneLimit}};
/// use kmem::alloc::flags::*;
///
/// kmem::global! {
///     /// This program's memory.
///     pub mod mem: kmem_hosted::Hosted
/// }
///
/// # let shape = Shape::x86_64(64 << 20);
/// # let boot = shape.memblock().unwrap();
/// # let platform = Hosted::new(shape).unwrap();
/// mem::init(Kmem::bring_up(platform, boot, &Config::default()).unwrap()).ok().unwrap();
///
/// let answer = mem::KBox::new(42u64, GFP_KERNEL)?;
/// let mut list = mem::KVec::new();
/// list.push(*answer, GFP_KERNEL)?;
/// let raw = mem::kmalloc(100, GFP_KERNEL)?;
/// assert_eq!(mem::ksize(raw.as_ptr()), Some(128));
/// // SAFETY: ours, and not used after.
/// unsafe { mem::kfree(raw.as_ptr()) }.unwrap();
/// # Ok::<(), kmem::AllocError>(())
/// ```
#[macro_export]
macro_rules! global {
    ($(#[$meta:meta])* $vis:vis mod $name:ident : $platform:ty) => {
        $(#[$meta])*
        $vis mod $name {
            use $crate::{AllocError, Kmem, Misuse, alloc::Flags};
            use ::core::{option::Option, primitive::{u8, usize}, ptr::NonNull, result::Result};

            type Platform = <Here as $crate::alloc::Home>::Platform;

            pub(super) static SEAT: $crate::alloc::Seat<Platform> = $crate::alloc::Seat::new();

            /// Where the machine lives.
            #[derive(Debug)]
            pub struct Here;

            /// The machine's kmalloc as an allocator without a size.
            pub type Kmalloc = $crate::alloc::Kmalloc<Here>;
            /// A value in kmalloc memory.
            pub type KBox<T> = $crate::alloc::KBox<T, Kmalloc>;
            /// Values in a row in kmalloc memory.
            pub type KVec<T> = $crate::alloc::KVec<T, Kmalloc>;

            /// The machine's vmalloc as an allocator without a size.
            pub type Vmalloc = $crate::alloc::Vmalloc<Here>;
            /// The machine's kvmalloc as an allocator without a size.
            pub type KVmalloc = $crate::alloc::KVmalloc<Here>;
            /// A value in vmalloc memory.
            pub type VBox<T> = $crate::alloc::VBox<T, Here>;
            /// A value in kvmalloc memory.
            pub type KVBox<T> = $crate::alloc::KVBox<T, Here>;
            /// Values in a row in vmalloc memory.
            pub type VVec<T> = $crate::alloc::VVec<T, Here>;
            /// Values in a row in kvmalloc memory.
            pub type KVVec<T> = $crate::alloc::KVVec<T, Here>;

            /// Puts the machine in its place, once.
            ///
            /// # Errors
            /// The machine, if there is one already.
            #[allow(clippy::result_large_err, reason = "the machine comes back")]
            pub fn init(kmem: Kmem<Platform>) -> Result<&'static Kmem<Platform>, Kmem<Platform>> {
                SEAT.set(kmem)
            }

            /// The machine; `None` before [`init`].
            pub fn machine() -> Option<&'static Kmem<Platform>> {
                SEAT.get()
            }

            /// [`Kmem::kmalloc`].
            ///
            /// # Errors
            /// As there, and `NoMemory` before [`init`].
            #[track_caller]
            pub fn kmalloc(size: usize, flags: Flags) -> Result<NonNull<u8>, AllocError> {
                SEAT.get().ok_or(AllocError::NoMemory)?.kmalloc(size, flags)
            }

            /// [`Kmem::kzalloc`].
            ///
            /// # Errors
            /// As there, and `NoMemory` before [`init`].
            #[track_caller]
            pub fn kzalloc(size: usize, flags: Flags) -> Result<NonNull<u8>, AllocError> {
                SEAT.get().ok_or(AllocError::NoMemory)?.kzalloc(size, flags)
            }

            /// [`Kmem::krealloc`].
            ///
            /// # Safety
            /// As there.
            ///
            /// # Errors
            /// As there, and `NoMemory` before [`init`].
            #[track_caller]
            pub unsafe fn krealloc(
                at: *mut u8,
                size: usize,
                flags: Flags,
            ) -> Result<NonNull<u8>, AllocError> {
                let kmem = SEAT.get().ok_or(AllocError::NoMemory)?;
                // SAFETY: the caller's.
                unsafe { kmem.krealloc(at, size, flags) }
            }

            /// [`Kmem::kfree`].
            ///
            /// # Safety
            /// As there.
            ///
            /// # Errors
            /// As there, and `NotAnObject` before [`init`].
            #[track_caller]
            pub unsafe fn kfree(at: *mut u8) -> Result<(), Misuse> {
                let Some(kmem) = SEAT.get() else {
                    return Err(Misuse::NotAnObject { addr: at.addr() });
                };
                // SAFETY: the caller's.
                unsafe { kmem.kfree(at) }
            }

            /// [`Kmem::ksize`].
            pub fn ksize(at: *const u8) -> Option<usize> {
                SEAT.get()?.ksize(at)
            }
        }

        // Out here, where the platform's name means what it does to the caller.
        impl $crate::alloc::Home for $name::Here {
            type Platform = $platform;

            #[inline(always)]
            fn kmem() -> ::core::option::Option<&'static $crate::Kmem<$platform>> {
                $name::SEAT.get()
            }
        }
    };
}
