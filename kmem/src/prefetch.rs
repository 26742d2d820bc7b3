//! Fetching cache lines ahead of their use.
//!
//! # Concepts
//! A locked instruction waits until all writes before it are done: a write to a line that is far away costs its whole
//! journey at the next free. Where it is known early what will be written to, the line is sent for.
//!
//! # Locking
//! None: nothing is read or written.

/// Sends for the cache line at an address, to be written to soon. Nothing else happens, whatever the address.
#[inline(always)]
pub(crate) fn prefetch_write<T>(at: *const T) {
    // SAFETY: it reads and writes nothing, whatever the address; processors without it do nothing.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        let at = at.addr();
        core::arch::asm!("prefetchw [{}]", in(reg) at, options(nomem, nostack, preserves_flags));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}
