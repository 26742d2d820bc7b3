//! The vmalloc range: mappings of the frames' file in a reservation \[V1, X1\].
//!
//! # Concepts
//! A reservation of addresses that cannot be touched. What the core maps is mapped there for real, a run of
//! frames in one mapping; what it unmaps becomes reservation again. The host flushes what its processors know
//! before the call returns, so there is nothing left to flush later.
//!
//! # Implementation
//! A process has some 65000 mappings (`vm.max_map_count`): to map fails when there are no more. To unmap needs none,
//! since what is unmapped was mapped whole, but the host makes no mapping at all then, not even one that replaces
//! others. So a few are kept that nobody needs (`headroom`), and given up for the moment of unmapping. Where that does
//! not help, since somebody else took them, access is taken away, which faults as well: whatever comes there next
//! replaces the mapping.
//!
//! # Locking
//! `headroom` has a mutex, held while something is unmapped in its stead. Handlers never unmap.

use crate::{memory::Area, shape::PAGE_SIZE};
use kmem::platform::{MapFailed, PageProt};
use rustix::{
    fd::OwnedFd,
    io,
    mm::{self, MapFlags, MprotectFlags, ProtFlags},
};
use std::{
    ops::Range,
    ptr::NonNull,
    sync::{Mutex, TryLockError},
};

/// Addresses for vmalloc.
pub(crate) struct VmallocRange {
    /// Holds the reservation.
    _area: Area,
    first: NonNull<u8>,
    len: usize,
    /// Whether anything is mapped.
    mapped: bool,
    headroom: Mutex<Option<Area>>,
}

/// Mappings of the headroom.
const HEADROOM: usize = 16;

/// Mappings that nobody needs: pages that can be touched and that cannot, in turn.
fn headroom() -> io::Result<Area> {
    let page = PAGE_SIZE as usize;
    let area = Area::anonymous(HEADROOM * page, ProtFlags::empty())?;
    for at in (0..HEADROOM).step_by(2) {
        area.open(at * page..(at + 1) * page)?;
    }
    Ok(area)
}

// SAFETY: the pointer is into the area, which this value owns.
unsafe impl Send for VmallocRange {}
// SAFETY: as above; parts of it are mapped by whoever they are given to.
unsafe impl Sync for VmallocRange {}

impl VmallocRange {
    pub(crate) fn new(len: usize, mapped: bool) -> io::Result<VmallocRange> {
        let (area, first) = Area::reserved(len)?;
        let _ = first.as_ptr().expose_provenance();
        Ok(VmallocRange { _area: area, first, len, mapped, headroom: Mutex::new(headroom().ok()) })
    }

    #[inline]
    pub(crate) fn range(&self) -> Range<usize> {
        let start = self.first.addr().get();
        start..start + self.len
    }

    pub(crate) fn is_mapped(&self) -> bool {
        self.mapped
    }

    /// A part of it as the host takes it; `None` if it is not one.
    fn part(&self, range: &Range<usize>) -> Option<*mut core::ffi::c_void> {
        let own = self.range();
        let inside = own.start <= range.start && range.start < range.end && range.end <= own.end;
        inside.then(|| self.first.as_ptr().wrapping_add(range.start - own.start).cast())
    }

    /// Maps `len` bytes of a file, from `from` on.
    ///
    /// # Safety
    /// The addresses are the caller's, and nothing is mapped there.
    pub(crate) unsafe fn map(
        &self,
        addr: usize,
        len: usize,
        prot: PageProt,
        fd: &OwnedFd,
        from: u64,
    ) -> Result<(), MapFailed> {
        if !self.mapped {
            return Ok(());
        }
        let at = self.part(&(addr..addr.checked_add(len).ok_or(MapFailed)?)).ok_or(MapFailed)?;
        let mut access = ProtFlags::READ;
        access.set(ProtFlags::WRITE, prot.contains(PageProt::WRITE));
        access.set(ProtFlags::EXEC, prot.contains(PageProt::EXEC));
        let flags = MapFlags::SHARED | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: the addresses are in the reservation and the caller's; nobody has a reference to what is there.
        unsafe { mm::mmap(at, len, access, flags, fd, from) }.map(drop).map_err(|_| MapFailed)
    }

    /// Makes a part of it reservation again.
    ///
    /// # Safety
    /// The addresses are the caller's, and nobody uses what is mapped there.
    pub(crate) unsafe fn unmap(&self, range: Range<usize>) {
        let Some(at) = self.part(&range).filter(|_| self.mapped) else { return };
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: the addresses are in the reservation and the caller's, who does not use them any more.
        let replace =
            || unsafe { mm::mmap_anonymous(at, range.len(), ProtFlags::empty(), flags).is_ok() };
        if replace() {
            return;
        }
        // Never waited for: an interrupt may have landed in who has it.
        let mut spare = match self.headroom.try_lock() {
            Ok(spare) => Some(spare),
            Err(TryLockError::Poisoned(e)) => Some(e.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        };
        if let Some(spare) = &mut spare {
            drop(spare.take());
        }
        // SAFETY: as above.
        let lock = || unsafe { mm::mprotect(at, range.len(), MprotectFlags::empty()).is_ok() };
        while !replace() && !lock() {
            // The host has no memory for its own tables at the moment.
            rustix::thread::sched_yield();
        }
        if let Some(mut spare) = spare {
            *spare = headroom().ok();
        }
    }
}
