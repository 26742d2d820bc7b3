//! Static per-CPU variables: a section of the program that every machine copies for each of its CPUs.
//!
//! # Implementation
//! [`define_per_cpu!`](crate::define_per_cpu) puts a variable's initial value into the section `kmem_percpu`, whose
//! ends the linker names. Bring-up copies it into each CPU's unit; a variable's place there is its
//! distance from the section's beginning. So a variable belongs to no machine: whoever names it names a machine too,
//! and each machine has its own instances.

use super::{PerCpuPlace, Statics};
use core::{cell::UnsafeCell, ptr::NonNull};

/// A static per-CPU variable, made by [`define_per_cpu!`](crate::define_per_cpu). What it holds itself is the
/// value that instances begin with.
#[repr(transparent)]
pub struct PerCpuVar<T>(UnsafeCell<T>);

// SAFETY: the initial value is not given out; the instances are shared between CPUs only where T is Sync, as the
// place's bound says.
unsafe impl<T> Sync for PerCpuVar<T> {}

impl<T> PerCpuVar<T> {
    /// For [`define_per_cpu!`](crate::define_per_cpu) alone.
    ///
    /// # Safety
    /// It initialises a static in the section `kmem_percpu`.
    #[doc(hidden)]
    pub const unsafe fn new(initial: T) -> Self {
        const { assert!(size_of::<T>() > 0, "a per-CPU variable has a size") };
        const { assert!(align_of::<T>() <= 4096, "aligned beyond a frame") };
        PerCpuVar(UnsafeCell::new(initial))
    }
}

/// Makes the section exist. The word is the machine's own: nothing lies at distance 0.
#[used]
#[unsafe(link_section = "kmem_percpu")]
// SAFETY: it is in the section.
static ANCHOR: PerCpuVar<u64> = unsafe { PerCpuVar::new(0) };

unsafe extern "C" {
    static __start_kmem_percpu: u8;
    static __stop_kmem_percpu: u8;
}

/// The section: where it begins and how long it is.
pub(super) fn section() -> (*const u8, usize) {
    // A linker that drops what nobody mentions keeps the anchor for this.
    let anchor = (&raw const ANCHOR).addr();
    let (start, stop) = (&raw const __start_kmem_percpu, &raw const __stop_kmem_percpu);
    debug_assert!((start.addr()..stop.addr()).contains(&anchor));
    (start, stop.addr() - start.addr())
}

// SAFETY: where the distance lies within the machine's copy of the section, bring-up copied the initial value
// there for each CPU, bit by bit: it is the value of a constant expression, which may be had any number of times.
unsafe impl<'a, T: 'static> PerCpuPlace<'a, T> for &'static PerCpuVar<T> {
    #[inline(always)]
    fn place(self, statics: Statics) -> Option<NonNull<T>> {
        let from = &raw const __start_kmem_percpu;
        let distance = core::ptr::from_ref(self).addr().wrapping_sub(from.addr());
        // Those of another image of the program are not in this one's section.
        (distance < statics.len).then(|| {
            // SAFETY: within the copy.
            unsafe { statics.at.add(distance) }.cast()
        })
    }
}

/// `DEFINE_PER_CPU`: static variables with an instance for each CPU of each machine \[U1\]
/// ([per-CPU variables](https://docs.kernel.org/core-api/this_cpu_ops.html)). What is shared between CPUs must be
/// `Sync`: counters are atomics, which the `this_cpu_*` calls change without a locked instruction.
///
/// ```
/// # use kmem_hosted::{Machine, Shape};
/// use core::sync::atomic::{AtomicU64, Ordering::Relaxed};
///
/// kmem::define_per_cpu! {
///     /// Packets that each CPU has seen.
///     static PACKETS: AtomicU64 = AtomicU64::new(0);
/// }
///
/// # let machine = Machine::new(Shape::x86_64(64 << 20)).unwrap();
/// machine.run(|_| machine.this_cpu_inc(&PACKETS)).unwrap();
/// let cpus = 0..machine.nr_cpu_ids();
/// let all = cpus.filter_map(|cpu| machine.per_cpu(&PACKETS, cpu));
/// assert_eq!(all.map(|n| n.load(Relaxed)).sum::<u64>(), 1);
/// ```
#[macro_export]
macro_rules! define_per_cpu {
    ($($(#[$meta:meta])* $vis:vis static $name:ident: $type:ty = $initial:expr;)*) => {$(
        $(#[$meta])*
        #[unsafe(link_section = "kmem_percpu")]
        $vis static $name: $crate::percpu::PerCpuVar<$type> = {
            const fn shared<T: ::core::marker::Sync>() {}
            shared::<$type>();
            let initial: $type = $initial;
            // SAFETY: the attribute above puts it there.
            unsafe { $crate::percpu::PerCpuVar::new(initial) }
        };
    )*};
}
