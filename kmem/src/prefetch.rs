//! Fetching cache lines ahead of their use.
//!
//! # Concepts
//! A locked instruction waits until all writes before it are done: a write to a line that is far away costs its whole
//! journey at the next free. Where it is known early what will be written to, the line is sent for.
//!
//! # Locking
//! None: nothing is read or written.

/// Sends for the cache line at an address. Nothing else happens, whatever the address.
// Not `prefetchw`, which is no faster here, and which some 64-bit processors lack.
#[inline(always)]
pub(crate) fn prefetch<T>(at: *const T) {
    // SAFETY: it reads and writes nothing, whatever the address; every processor of the architecture has it.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        let at = at.addr();
        core::arch::asm!("prefetcht0 [{}]", in(reg) at, options(nomem, nostack, preserves_flags));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}
