//! Kernel stacks \[K1, K2\], through the public calls.

mod atomic;
mod direct;
mod faults;
mod misuse;
mod model;
mod plain;

use kmem::{Kmem, Platform};
use std::{
    io::pipe,
    os::fd::AsRawFd,
    ptr::{NonNull, without_provenance},
};

/// Bytes of a frame.
const PAGE: usize = 4096;
/// Bytes of the two words at a stack's low end.
const END: usize = 16;

/// Whether the byte at an address can be read; the host's kernel tries, so nothing faults here.
fn readable(address: usize) -> bool {
    let (_reader, writer) = pipe().unwrap();
    // SAFETY: write(2) checks the address itself and fails with EFAULT if it is not readable.
    let n = unsafe { libc::write(writer.as_raw_fd(), without_provenance::<u8>(address).cast(), 1) };
    if n == -1 {
        let error = std::io::Error::last_os_error();
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT), "{error}");
    }
    n == 1
}

/// Frees a stack of the test's own.
#[track_caller]
fn free<P: Platform>(m: &Kmem<P>, low: NonNull<u8>) {
    // SAFETY: the tests do not use it after.
    unsafe { m.free_thread_stack(low.as_ptr()) }.unwrap();
}

/// Writes a word of a stack, so many bytes above its low end.
fn write(low: NonNull<u8>, at: usize, value: usize) {
    // SAFETY: the callers pass a place in a live stack, aligned, to which there are no references.
    unsafe { low.byte_add(at).cast::<usize>().write_volatile(value) };
}

/// Reads one.
fn read(low: NonNull<u8>, at: usize) -> usize {
    // SAFETY: as for `write`.
    unsafe { low.byte_add(at).cast::<usize>().read_volatile() }
}
