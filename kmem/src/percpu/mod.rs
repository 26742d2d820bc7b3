//! Per-CPU data: one instance of a thing for each CPU \[U1–U3\].
//!
//! # Concepts
//! What only one CPU touches needs no lock and shares no cache line. A *per-CPU address* ([`PerCpuPtr`]) names
//! all instances at once; the one of CPU `c` lies `c` strides further. There are *static* variables
//! ([`define_per_cpu!`](crate::define_per_cpu)), of which every machine of the process has instances of its own, and
//! what [`Kmem::alloc_percpu`](crate::Kmem::alloc_percpu) gives out while the machine runs.
//!
//! Whoever works on the instance of his CPU must stay on it: [`Kmem::get_cpu_var`](crate::Kmem::get_cpu_var) turns
//! preemption off until its guard goes. The `this_cpu_*` calls need no guard: each is one step.
//!
//! # Implementation
//! ```text
//!   chunk:   | unit of CPU 0      | unit of CPU 1      | unit of CPU 2      | ...
//!            | a | bb |   | ccc   | a | bb |   | ccc   | a | bb |   | ccc   |
//!              ^ per-CPU address    ^ + stride           ^ + 2 strides
//! ```
//! A *chunk* is a block of memory with a *unit* for each possible CPU; what is taken of one unit is taken of
//! all, so small things of one CPU lie packed together and those of two CPUs a unit apart. All units of a machine
//! are of one size, the stride, so that an instance is found by an addition. What is free in a chunk is kept
//! apart from it (`chunk`), and chunks are found by their longest free run.
//!
//! The first chunk is a table of the machine's, made at bring-up: it begins with the static variables and
//! never goes. Further ones are pages, and go when nothing in them is live. CPUs come and go without anybody's
//! doing: instances are those of the *possible* CPUs.
//!
//! *Atomic requests* take what there is, or a new chunk where the page allocator gives one without
//! sleeping. Whoever may sleep makes a new chunk when less than the reserve is free afterwards.
//!
//! *CPUs that allocate at once* would be in each other's way: all take from the first *shard* of chunks, under one lock,
//! until one has found it held too often. From then on that CPU takes from another, whose first chunk it makes. What
//! is kept there goes under memory pressure. So a machine whose CPUs seldom meet has one shard, and its chunks are
//! full.
//!
//! *Addresses lead to their chunk* by the owner of their frame, a number no cache has, which names the shard, and the page's
//! `private`.
//!
//! # Locking
//! An `IrqLock` a shard, of which no two are held at once. Pages are asked for and given back, and instances zeroed, with nothing held.
//!
//! See [this_cpu operations](https://docs.kernel.org/core-api/this_cpu_ops.html).

mod chunk;
mod guard;
mod lists;
mod ops;
mod space;
mod statics;

pub use guard::{CpuGuard, CpuPtr, CpuPtrGuard, CpuVar};
pub use ops::ThisCpu;
pub(crate) use space::{Chunks, Space};
pub use statics::PerCpuVar;

use core::{fmt, marker::PhantomData, ptr::NonNull};

/// A per-CPU address: names the instances of all CPUs, and is the address of none but by accident.
/// It is what [`Kmem::alloc_percpu`](crate::Kmem::alloc_percpu) returns, and as plain as a pointer.
pub struct PerCpuPtr<T>(NonNull<T>);

// SAFETY: it is an address; what is done with it is unsafe, or needs a Sync T.
unsafe impl<T> Send for PerCpuPtr<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for PerCpuPtr<T> {}

impl<T> Clone for PerCpuPtr<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for PerCpuPtr<T> {}

impl<T> PartialEq for PerCpuPtr<T> {
    fn eq(&self, other: &Self) -> bool {
        self.0 == other.0
    }
}

impl<T> Eq for PerCpuPtr<T> {}

impl<T> fmt::Debug for PerCpuPtr<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PerCpuPtr({:#x})", self.0.addr())
    }
}

impl<T> PerCpuPtr<T> {
    /// The per-CPU address as C has it.
    pub const fn into_raw(self) -> NonNull<T> {
        self.0
    }

    /// A per-CPU address that was one before.
    pub const fn from_raw(raw: NonNull<T>) -> Self {
        PerCpuPtr(raw)
    }

    /// As an address of another type.
    pub const fn cast<U>(self) -> PerCpuPtr<U> {
        PerCpuPtr(self.0.cast())
    }

    /// What is there, for the calls that take a variable.
    ///
    /// # Safety
    /// For `'a` the address is live, of the machine it is used on, and each instance a valid `T`.
    pub const unsafe fn live<'a>(self) -> Live<'a, T> {
        Live(self.0, PhantomData)
    }
}

/// A per-CPU address whose instances are known to be there for `'a`.
pub struct Live<'a, T>(NonNull<T>, PhantomData<&'a T>);

impl<T> Clone for Live<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Live<'_, T> {}

/// What has an instance on each CPU: a static variable, an owner, a per-CPU address that is
/// [live](PerCpuPtr::live).
///
/// # Safety
/// If [`place`](PerCpuPlace::place) says where CPU 0's instance is, then for `'a` each CPU of that machine has one, a
/// stride further each, all valid `T`s, and nobody makes a mutable reference to one.
pub unsafe trait PerCpuPlace<'a, T>: Copy {
    /// Where CPU 0's instance is on the machine; `None` if it has none.
    fn place(self, space: Statics) -> Option<NonNull<T>>;
}

/// Where a machine has its static variables: no two machines have them at one place.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Statics {
    at: NonNull<u8>,
    len: usize,
}

// SAFETY: `live`'s contract.
unsafe impl<'a, T> PerCpuPlace<'a, T> for Live<'a, T> {
    #[inline(always)]
    fn place(self, _: Statics) -> Option<NonNull<T>> {
        Some(self.0)
    }
}
