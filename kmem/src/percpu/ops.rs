//! Operations on the running CPU's instance that are one step: no interrupt sees half of one \[U1\].
//!
//! # Implementation
//! On x86-64 each is one instruction without a lock prefix, which interrupts cannot divide; elsewhere a relaxed
//! atomic. Where the platform keeps a CPU's distance in its GS segment
//! ([`Platform::PER_CPU_SEGMENT`](crate::Platform::PER_CPU_SEGMENT)) that instruction finds the instance too. On a
//! hosted machine a task changes CPU only when it sleeps, so the CPU's number is read first.
//!
//! Other CPUs may read an instance meanwhile; what they write may be lost.

use core::sync::atomic::{
    AtomicI8, AtomicI16, AtomicI32, AtomicI64, AtomicIsize, AtomicU8, AtomicU16, AtomicU32,
    AtomicU64, AtomicUsize, Ordering::Relaxed,
};

mod sealed {
    pub trait Sealed {}
}

/// An atomic integer that `this_cpu_*` calls work on.
pub trait ThisCpu: sealed::Sealed + Sync + 'static {
    /// Its value.
    type Int: Copy + PartialEq;

    #[doc(hidden)]
    const ONE: Self::Int;
    #[doc(hidden)]
    const MINUS_ONE: Self::Int;

    /// # Safety
    /// With `SEGMENT` the place lies at `at` plus the GS base, else at `at`; it is valid, and on the CPU that runs.
    #[doc(hidden)]
    unsafe fn read<const SEGMENT: bool>(at: *mut Self) -> Self::Int;
    /// # Safety
    /// As [`read`](Self::read).
    #[doc(hidden)]
    unsafe fn write<const SEGMENT: bool>(at: *mut Self, value: Self::Int);
    /// # Safety
    /// As [`read`](Self::read).
    #[doc(hidden)]
    unsafe fn add<const SEGMENT: bool>(at: *mut Self, value: Self::Int);
    /// # Safety
    /// As [`read`](Self::read).
    #[doc(hidden)]
    unsafe fn and<const SEGMENT: bool>(at: *mut Self, value: Self::Int);
    /// # Safety
    /// As [`read`](Self::read).
    #[doc(hidden)]
    unsafe fn or<const SEGMENT: bool>(at: *mut Self, value: Self::Int);
    /// Returns the sum.
    ///
    /// # Safety
    /// As [`read`](Self::read).
    #[doc(hidden)]
    unsafe fn add_return<const SEGMENT: bool>(at: *mut Self, value: Self::Int) -> Self::Int;
    /// Returns what was there; it was exchanged if that is `old`.
    ///
    /// # Safety
    /// As [`read`](Self::read).
    #[doc(hidden)]
    unsafe fn cmpxchg<const SEGMENT: bool>(
        at: *mut Self,
        old: Self::Int,
        new: Self::Int,
    ) -> Self::Int;
}

/// One instruction on the place, in the segment or not.
#[cfg(target_arch = "x86_64")]
macro_rules! one {
    ($op:literal, $width:literal, $operand:literal, $at:ident, $($args:tt)*) => {
        // SAFETY: the caller's: the place is valid, and the instruction touches nothing else.
        unsafe {
            if SEGMENT {
                core::arch::asm!(
                    concat!($op, " ", $width, " ptr gs:[{at}], ", $operand),
                    at = in(reg) $at, $($args)* options(nostack)
                )
            } else {
                core::arch::asm!(
                    concat!($op, " ", $width, " ptr [{at}], ", $operand),
                    at = in(reg) $at, $($args)* options(nostack)
                )
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
macro_rules! this_cpu {
    ($($atomic:ty, $int:ty, $width:literal, $class:ident, $v:literal, $acc:tt;)*) => {$(
        impl sealed::Sealed for $atomic {}

        impl ThisCpu for $atomic {
            type Int = $int;
            const ONE: $int = 1;
            const MINUS_ONE: $int = (0 as $int).wrapping_sub(1);

            #[inline(always)]
            unsafe fn read<const SEGMENT: bool>(at: *mut Self) -> $int {
                let value: $int;
                // SAFETY: as in `one`.
                unsafe {
                    if SEGMENT {
                        core::arch::asm!(
                            concat!("mov ", $v, ", ", $width, " ptr gs:[{at}]"),
                            at = in(reg) at, v = out($class) value, options(nostack, readonly, preserves_flags)
                        );
                    } else {
                        value = (*at).load(Relaxed);
                    }
                }
                value
            }

            #[inline(always)]
            unsafe fn write<const SEGMENT: bool>(at: *mut Self, value: $int) {
                one!("mov", $width, $v, at, v = in($class) value,);
            }

            #[inline(always)]
            unsafe fn add<const SEGMENT: bool>(at: *mut Self, value: $int) {
                one!("add", $width, $v, at, v = in($class) value,);
            }

            #[inline(always)]
            unsafe fn and<const SEGMENT: bool>(at: *mut Self, value: $int) {
                one!("and", $width, $v, at, v = in($class) value,);
            }

            #[inline(always)]
            unsafe fn or<const SEGMENT: bool>(at: *mut Self, value: $int) {
                one!("or", $width, $v, at, v = in($class) value,);
            }

            #[inline(always)]
            unsafe fn add_return<const SEGMENT: bool>(at: *mut Self, value: $int) -> $int {
                let mut before = value;
                one!("xadd", $width, $v, at, v = inout($class) before,);
                before.wrapping_add(value)
            }

            #[inline(always)]
            unsafe fn cmpxchg<const SEGMENT: bool>(at: *mut Self, old: $int, new: $int) -> $int {
                let mut seen = old;
                one!("cmpxchg", $width, $v, at, v = in($class) new, inout($acc) seen,);
                seen
            }
        }
    )*};
}

#[cfg(target_arch = "x86_64")]
this_cpu! {
    AtomicU8, u8, "byte", reg_byte, "{v}", "al";
    AtomicI8, i8, "byte", reg_byte, "{v}", "al";
    AtomicU16, u16, "word", reg, "{v:x}", "ax";
    AtomicI16, i16, "word", reg, "{v:x}", "ax";
    AtomicU32, u32, "dword", reg, "{v:e}", "eax";
    AtomicI32, i32, "dword", reg, "{v:e}", "eax";
    AtomicU64, u64, "qword", reg, "{v:r}", "rax";
    AtomicI64, i64, "qword", reg, "{v:r}", "rax";
    AtomicUsize, usize, "qword", reg, "{v:r}", "rax";
    AtomicIsize, isize, "qword", reg, "{v:r}", "rax";
}

#[cfg(not(target_arch = "x86_64"))]
macro_rules! this_cpu {
    ($($atomic:ty, $int:ty;)*) => {$(
        impl sealed::Sealed for $atomic {}

        // Platforms of these processors have no such segment.
        impl ThisCpu for $atomic {
            type Int = $int;
            const ONE: $int = 1;
            const MINUS_ONE: $int = (0 as $int).wrapping_sub(1);

            unsafe fn read<const SEGMENT: bool>(at: *mut Self) -> $int {
                const { assert!(!SEGMENT) };
                // SAFETY: the caller's.
                unsafe { (*at).load(Relaxed) }
            }

            unsafe fn write<const SEGMENT: bool>(at: *mut Self, value: $int) {
                const { assert!(!SEGMENT) };
                // SAFETY: the caller's.
                unsafe { (*at).store(value, Relaxed) }
            }

            unsafe fn add<const SEGMENT: bool>(at: *mut Self, value: $int) {
                const { assert!(!SEGMENT) };
                // SAFETY: the caller's.
                _ = unsafe { (*at).fetch_add(value, Relaxed) };
            }

            unsafe fn and<const SEGMENT: bool>(at: *mut Self, value: $int) {
                const { assert!(!SEGMENT) };
                // SAFETY: the caller's.
                _ = unsafe { (*at).fetch_and(value, Relaxed) };
            }

            unsafe fn or<const SEGMENT: bool>(at: *mut Self, value: $int) {
                const { assert!(!SEGMENT) };
                // SAFETY: the caller's.
                _ = unsafe { (*at).fetch_or(value, Relaxed) };
            }

            unsafe fn add_return<const SEGMENT: bool>(at: *mut Self, value: $int) -> $int {
                const { assert!(!SEGMENT) };
                // SAFETY: the caller's.
                unsafe { (*at).fetch_add(value, Relaxed).wrapping_add(value) }
            }

            unsafe fn cmpxchg<const SEGMENT: bool>(at: *mut Self, old: $int, new: $int) -> $int {
                const { assert!(!SEGMENT) };
                // SAFETY: the caller's.
                unsafe { (*at).compare_exchange(old, new, Relaxed, Relaxed) }
                    .unwrap_or_else(|seen| seen)
            }
        }
    )*};
}

#[cfg(not(target_arch = "x86_64"))]
this_cpu! {
    AtomicU8, u8;
    AtomicI8, i8;
    AtomicU16, u16;
    AtomicI16, i16;
    AtomicU32, u32;
    AtomicI32, i32;
    AtomicU64, u64;
    AtomicI64, i64;
    AtomicUsize, usize;
    AtomicIsize, isize;
}
