//! The places at which `kmap` shows high frames: mappings of the frames' file in a reservation \[H3\].
//!
//! # Concepts
//! A reservation of addresses that cannot be touched, as large as x86-32 has it: 1024 frames for permanent
//! mappings, 512 with PAE, then the temporary ones of each CPU. What is set is mapped there for real; what is cleared
//! cannot be touched again. The host flushes what its processors know before the call returns.
//!
//! # Implementation
//! A call of the host's for each entry, made directly and not through the C library, so that it is right in a signal
//! handler too. Setting an entry must not fail, and the host may have no memory for its own tables, or the process may
//! have as many mappings as it is allowed: then it is tried again, after a report.
//!
//! # Locking
//! The host's.

use crate::{
    shape::{PAGE_SIZE, Shape},
    vmalloc::VmallocRange,
};
use kmem::{
    highmem::{LAST_PKMAP, LAST_PKMAP_PAE, SLOTS_PER_CPU},
    platform::PageProt,
    types::Pfn,
};
use rustix::{fd::OwnedFd, io};
use std::ops::Range;

const PAGE: usize = PAGE_SIZE as usize;

/// Addresses for `kmap`.
pub(crate) struct KmapRange(VmallocRange);

impl KmapRange {
    /// As many as the shape's processor has.
    pub(crate) fn new(shape: &Shape) -> io::Result<KmapRange> {
        let permanent = if shape.max_phys > 1 << 32 { LAST_PKMAP_PAE } else { LAST_PKMAP };
        let places = permanent + shape.cpus.len() * SLOTS_PER_CPU;
        VmallocRange::new(places * PAGE, true).map(KmapRange)
    }

    #[inline]
    pub(crate) fn range(&self) -> Range<usize> {
        self.0.range()
    }

    /// Shows a frame of a file; calls `refused` each time that the host refuses. Async-signal-safe.
    ///
    /// # Safety
    /// As for [`Platform::kmap_set`](kmem::platform::Platform::kmap_set).
    pub(crate) unsafe fn set(
        &self,
        addr: usize,
        pfn: Pfn,
        fd: &OwnedFd,
        mut refused: impl FnMut(),
    ) {
        let from = u64::from(pfn.0) * PAGE_SIZE;
        // SAFETY: the caller's; what is there may be replaced, since nobody uses it.
        while unsafe { self.0.map(addr, PAGE, PageProt::KERNEL, fd, from) }.is_err() {
            refused();
            rustix::thread::sched_yield();
        }
    }

    /// Takes what is shown away. Async-signal-safe.
    ///
    /// # Safety
    /// As for [`Platform::kmap_clear`](kmem::platform::Platform::kmap_clear).
    pub(crate) unsafe fn clear(&self, addr: usize) {
        // SAFETY: the caller's.
        unsafe { self.0.unmap(addr..addr + PAGE) };
    }
}
