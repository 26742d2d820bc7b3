//! `PerCpu<T>`: a value for each CPU, and the only owner of them.

use crate::{
    error::AllocError,
    gfp::{
        Gfp,
        typed::{Capability, TypedGfp},
    },
    kmem::Kmem,
    percpu::{PerCpuPlace, PerCpuPtr, Statics},
    platform::Platform,
};
use core::{fmt, marker::PhantomData, ptr::NonNull};

/// A value for each possible CPU of a machine.
///
/// ```
/// # use kmem_hosted::{Machine, Shape};
/// use core::sync::atomic::{AtomicU64, Ordering::Relaxed};
/// use kmem::{Gfp, alloc::PerCpu};
/// # let machine = Machine::new(Shape::x86_64(64 << 20)).unwrap();
/// # let kmem = &*machine;
/// let hits = PerCpu::new(kmem, Gfp::KERNEL, |_cpu| AtomicU64::new(0))?;
/// machine.run(|_| kmem.this_cpu_add(&hits, 3)).unwrap();
/// assert_eq!(hits.iter().map(|n| n.load(Relaxed)).sum::<u64>(), 3);
/// # Ok::<(), kmem::AllocError>(())
/// ```
pub struct PerCpu<'k, P: Platform, T> {
    kmem: &'k Kmem<P>,
    at: PerCpuPtr<T>,
    _owns: PhantomData<T>,
}

// SAFETY: it is its values and a reference to the machine.
unsafe impl<P: Platform, T: Send> Send for PerCpu<'_, P, T> where Kmem<P>: Sync {}
// SAFETY: shared, it shows its values to whoever asks.
unsafe impl<P: Platform, T: Sync> Sync for PerCpu<'_, P, T> where Kmem<P>: Sync {}

/// Drops what was made of a half-made one.
struct Making<'k, P: Platform, T> {
    kmem: &'k Kmem<P>,
    at: PerCpuPtr<T>,
    made: usize,
}

impl<P: Platform, T> Drop for Making<'_, P, T> {
    fn drop(&mut self) {
        for cpu in 0..self.made {
            if let Some(at) = self.kmem.per_cpu_ptr(self.at, cpu) {
                // SAFETY: made, and not dropped before.
                unsafe { at.drop_in_place() };
            }
        }
        // SAFETY: ours, and nobody uses it any more. A misuse is reported by the callee.
        let _ = unsafe { self.kmem.free_percpu(self.at) };
    }
}

impl<'k, P: Platform, T> PerCpu<'k, P, T> {
    /// Makes a value for each CPU.
    ///
    /// Context: may sleep if `gfp` has `__GFP_DIRECT_RECLAIM`; never from an NMI.
    ///
    /// # Errors
    /// [`AllocError`], before any value is made.
    #[track_caller]
    pub fn new(
        kmem: &'k Kmem<P>,
        gfp: Gfp,
        mut make: impl FnMut(usize) -> T,
    ) -> Result<Self, AllocError> {
        let at = kmem.alloc_percpu_gfp::<T>(gfp)?;
        let mut making = Making { kmem, at, made: 0 };
        for cpu in 0..kmem.nr_cpu_ids() {
            if let Some(at) = kmem.per_cpu_ptr(at, cpu) {
                // SAFETY: a place for a T, ours and not yet filled.
                unsafe { at.write(make(cpu)) };
            }
            making.made = cpu + 1;
        }
        core::mem::forget(making);
        Ok(PerCpu { kmem, at, _owns: PhantomData })
    }

    /// As [`new`](Self::new), with a capability \[C2\].
    ///
    /// # Errors
    /// As [`new`](Self::new).
    #[track_caller]
    pub fn new_in<const BLOCK: bool, const ZONE: u8>(
        kmem: &'k Kmem<P>,
        _capability: impl Capability<BLOCK>,
        gfp: TypedGfp<BLOCK, ZONE>,
        make: impl FnMut(usize) -> T,
    ) -> Result<Self, AllocError> {
        Self::new(kmem, gfp.gfp(), make)
    }

    /// The per-CPU address, for the classic calls.
    pub fn as_ptr(&self) -> PerCpuPtr<T> {
        self.at
    }

    /// A CPU's value; `None` for a CPU that is not possible.
    pub fn get(&self, cpu: usize) -> Option<&T>
    where
        T: Sync,
    {
        self.kmem.per_cpu(self, cpu)
    }

    /// All CPUs' values, by number.
    pub fn iter(&self) -> impl Iterator<Item = &T>
    where
        T: Sync,
    {
        (0..self.kmem.nr_cpu_ids()).filter_map(|cpu| self.get(cpu))
    }

    /// A CPU's value, to change; `None` for a CPU that is not possible.
    pub fn get_mut(&mut self, cpu: usize) -> Option<&mut T> {
        let mut at = self.kmem.per_cpu_ptr(self.at, cpu)?;
        // SAFETY: ours, and borrowed mutably with all its values.
        Some(unsafe { at.as_mut() })
    }
}

// SAFETY: the owner has a value for each CPU of its machine as long as it is borrowed, and makes a mutable reference
// only of a mutable borrow.
unsafe impl<'a, P: Platform, T> PerCpuPlace<'a, T> for &'a PerCpu<'_, P, T> {
    #[inline(always)]
    fn place(self, statics: Statics) -> Option<NonNull<T>> {
        // Another machine has another stride.
        (self.kmem.statics() == statics).then_some(self.at.into_raw())
    }
}

impl<P: Platform, T> Drop for PerCpu<'_, P, T> {
    fn drop(&mut self) {
        drop(Making { kmem: self.kmem, at: self.at, made: self.kmem.nr_cpu_ids() });
    }
}

impl<P: Platform, T: fmt::Debug + Sync> fmt::Debug for PerCpu<'_, P, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}
