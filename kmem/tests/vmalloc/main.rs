//! vmalloc and kvmalloc \[V1–V4, S8\].

mod areas;
mod atomic;
mod faults;
mod info;
mod kvmalloc;
mod misuse;
mod model;
mod owners;
mod threads;
mod unmapped;

use kmem::Kmem;
use kmem_hosted::Hosted;
use std::{io::pipe, os::fd::AsRawFd, ptr::NonNull};

/// Bytes of a frame.
const PAGE: usize = 4096;

/// Whether the byte at an address can be read; the host's kernel tries, so nothing faults here.
fn readable(address: *const u8) -> bool {
    let (_reader, writer) = pipe().unwrap();
    // SAFETY: write(2) checks the address itself and fails with EFAULT if it is not readable.
    let n = unsafe { libc::write(writer.as_raw_fd(), address.cast(), 1) };
    if n == -1 {
        let error = std::io::Error::last_os_error();
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT), "{error}");
    }
    n == 1
}

/// The address `bytes` behind another.
fn at(base: NonNull<u8>, bytes: usize) -> *mut u8 {
    base.as_ptr().wrapping_add(bytes)
}

/// Frees an area.
#[track_caller]
fn vfree(m: &Kmem<Hosted>, area: NonNull<u8>) {
    // SAFETY: the tests do not use it after.
    unsafe { m.vfree(area.as_ptr()).unwrap() };
}

/// Reads through an address.
fn read(address: *const u8) -> u8 {
    // SAFETY: the callers pass addresses of live mappings, to which there are no references.
    unsafe { address.read_volatile() }
}

/// Writes through an address.
fn write(address: *mut u8, value: u8) {
    // SAFETY: as for `read`.
    unsafe { address.write_volatile(value) }
}
