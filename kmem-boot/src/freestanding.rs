//! What a hosted program's C library and unwinder would have supplied.
//!
//! The precompiled `core` calls the mem* functions and mentions the unwinder, although nothing here
//! unwinds: a panic is reported and ends the machine. The string instructions do the copying, so the
//! compiler cannot turn a loop in here into a call to itself.

use crate::{exit, serial};
use core::arch::asm;

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    serial::print(format_args!("PANIC {info}\n"));
    exit::exit(exit::Status::Crash)
}

#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    exit::exit(exit::Status::Crash)
}

#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

/// Copies `n` bytes; the ranges do not overlap, or `d` is below `s`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(d: *mut u8, s: *const u8, n: usize) -> *mut u8 {
    // SAFETY: the caller vouches for n bytes at both addresses; DF is clear by the ABI.
    unsafe {
        asm!(
            "rep movsb",
            inout("rcx") n => _, inout("rdi") d => _, inout("rsi") s => _,
            options(nostack, preserves_flags),
        );
    }
    d
}

/// Copies `n` bytes between ranges that may overlap.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(d: *mut u8, s: *const u8, n: usize) -> *mut u8 {
    if d.addr().wrapping_sub(s.addr()) >= n {
        // SAFETY: forward copying is right: d is below s, or beyond its end.
        return unsafe { memcpy(d, s, n) };
    }
    // SAFETY: the caller vouches for n bytes at both addresses (n > 0 here); copying backwards
    // reads each byte before it is overwritten; DF is clear again afterwards.
    unsafe {
        asm!(
            "std", "rep movsb", "cld",
            inout("rcx") n => _,
            inout("rdi") d.wrapping_add(n - 1) => _,
            inout("rsi") s.wrapping_add(n - 1) => _,
            options(nostack),
        );
    }
    d
}

/// Fills `n` bytes with the low byte of `c`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(d: *mut u8, c: i32, n: usize) -> *mut u8 {
    // SAFETY: the caller vouches for n bytes at d; DF is clear by the ABI.
    unsafe {
        asm!(
            "rep stosb",
            inout("rcx") n => _, inout("rdi") d => _, in("al") c as u8,
            options(nostack, preserves_flags),
        );
    }
    d
}

/// Compares `n` bytes as unsigned numbers.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    for i in 0..n {
        // SAFETY: the caller vouches for n bytes at both addresses. Volatile, so that the loop is
        // not recognised as a memcmp.
        let (x, y) = unsafe { (a.add(i).read_volatile(), b.add(i).read_volatile()) };
        if x != y {
            return i32::from(x) - i32::from(y);
        }
    }
    0
}

/// Whether `n` bytes differ.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    // SAFETY: the same contract.
    unsafe { memcmp(a, b, n) }
}

/// Length of a zero-terminated string.
#[unsafe(no_mangle)]
unsafe extern "C" fn strlen(s: *const u8) -> usize {
    let mut n = 0;
    // SAFETY: the caller vouches for a terminated string. Volatile, so that the loop is not
    // recognised as a strlen.
    while unsafe { s.add(n).read_volatile() } != 0 {
        n += 1;
    }
    n
}
