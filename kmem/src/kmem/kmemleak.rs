//! Calls about objects that nothing refers to \[D2\].

use super::Kmem;
use crate::{
    platform::Platform,
    slab::{KmemleakConfig, Leak, LeakError, LeakScan},
};
use core::{
    fmt::{self, Write},
    ops::Range,
};

impl<P: Platform> Kmem<P> {
    /// Switches the leak scan on, or with `None` off. What was noted of objects, areas and foreign memory is
    /// forgotten at each call. While it is on, the first free of an object that a scan has seen takes a slower path;
    /// nothing else is slower.
    ///
    /// Context: process context; may sleep.
    ///
    /// # Errors
    /// [`LeakError::NoMemory`], [`LeakError::Busy`]; nothing changed then.
    ///
    /// See [kmemleak](https://docs.kernel.org/dev-tools/kmemleak.html).
    pub fn set_kmemleak(&self, config: Option<KmemleakConfig>) -> Result<(), LeakError> {
        self.objects().set_kmemleak(config)
    }

    /// Looks for objects that nothing refers to (`echo scan >/sys/kernel/debug/kmemleak`). An address of any byte
    /// of an object counts, at a multiple of a word, in the `roots` (ranges of addresses: static data, stacks, what
    /// tasks have in registers), and in objects that count as reached, among them all that are young: that have not been
    /// in use since another scan that is at least
    /// [`min_age_ns`](KmemleakConfig::min_age_ns) ago. So the second scan is the first to find something.
    ///
    /// Other CPUs may go on; with roots that name all memory where addresses are kept, an object is not reported unless its
    /// address was moved about during both looks of the scan.
    ///
    /// Context: process context; may sleep. Interrupts are masked while a node's slabs of a cache are walked.
    ///
    /// # Safety
    /// All bytes of the roots, and of foreign memory that [`kmemleak_alloc`](Self::kmemleak_alloc) was told of, can be
    /// read until this returns, or until [`kmemleak_free`](Self::kmemleak_free).
    ///
    /// # Errors
    /// [`LeakError::Off`], [`LeakError::NoMemory`], [`LeakError::Busy`].
    pub unsafe fn kmemleak_scan(&self, roots: &[Range<usize>]) -> Result<LeakScan, LeakError> {
        // SAFETY: the caller's.
        unsafe { self.objects().kmemleak_scan(roots) }
    }

    /// Calls `f` with each object that the last scan found unreferenced and that is still in use, by ascending addresses.
    ///
    /// Context: as [`kmemleak_scan`](Self::kmemleak_scan). `f` may allocate and free, but not scan.
    ///
    /// # Errors
    /// [`LeakError::Off`], [`LeakError::Busy`].
    pub fn for_each_leak(&self, f: impl FnMut(&Leak)) -> Result<(), LeakError> {
        self.objects().each_leak(f)
    }

    /// Writes the text of `/sys/kernel/debug/kmemleak`: what [`for_each_leak`](Self::for_each_leak) finds; nothing while
    /// the scan is off or another caller is at it.
    ///
    /// # Errors
    /// The writer's.
    pub fn write_kmemleak(&self, w: &mut dyn Write) -> fmt::Result {
        let mut result = Ok(());
        let _ = self.for_each_leak(|leak| {
            if result.is_ok() {
                result = write!(w, "{leak}");
            }
        });
        result
    }

    /// Never reports again what the last scan found (`echo clear >/sys/kernel/debug/kmemleak`).
    ///
    /// Context: as [`kmemleak_scan`](Self::kmemleak_scan).
    ///
    /// # Errors
    /// [`LeakError::Off`], [`LeakError::Busy`].
    pub fn kmemleak_clear(&self) -> Result<(), LeakError> {
        self.objects().kmemleak_clear()
    }

    /// `kmemleak_not_leak`: the object that begins at an address is never reported; its contents are looked at.
    /// Forgotten when it is freed.
    ///
    /// Context: any but NMI.
    ///
    /// # Errors
    /// [`LeakError::Off`], [`LeakError::Unknown`].
    pub fn kmemleak_not_leak(&self, at: *const u8) -> Result<(), LeakError> {
        self.objects().kmemleak_note(at.addr(), true, false)
    }

    /// `kmemleak_ignore`: the object that begins at an address is never reported, and its contents are not looked at.
    ///
    /// Context: as [`kmemleak_not_leak`](Self::kmemleak_not_leak).
    ///
    /// # Errors
    /// As [`kmemleak_not_leak`](Self::kmemleak_not_leak).
    pub fn kmemleak_ignore(&self, at: *const u8) -> Result<(), LeakError> {
        self.objects().kmemleak_note(at.addr(), true, true)
    }

    /// `kmemleak_no_scan`: the contents of the object that begins at an address are not looked at.
    ///
    /// Context: as [`kmemleak_not_leak`](Self::kmemleak_not_leak).
    ///
    /// # Errors
    /// As [`kmemleak_not_leak`](Self::kmemleak_not_leak).
    pub fn kmemleak_no_scan(&self, at: *const u8) -> Result<(), LeakError> {
        self.objects().kmemleak_note(at.addr(), false, true)
    }

    /// `kmemleak_scan_area`: of the contents of the object that begins at `at` only the `len` bytes from `start` on are
    /// looked at, and other areas that it was given.
    ///
    /// Context: any but NMI.
    ///
    /// # Errors
    /// [`LeakError::Off`], [`LeakError::Unknown`]; [`LeakError::Range`] for an area that is empty or not within
    /// the object; [`LeakError::Full`].
    pub fn kmemleak_scan_area(
        &self,
        at: *const u8,
        start: *const u8,
        len: usize,
    ) -> Result<(), LeakError> {
        self.objects().kmemleak_area(at.addr(), start.addr(), len)
    }

    /// `kmemleak_alloc`: memory of `len` bytes that is not kmem's is treated as an object.
    ///
    /// Context: any but NMI.
    ///
    /// # Safety
    /// It can be read until [`kmemleak_free`](Self::kmemleak_free).
    ///
    /// # Errors
    /// [`LeakError::Off`]; [`LeakError::Range`] for a range that is empty, kmem's, or shares addresses with
    /// another; [`LeakError::Full`].
    pub unsafe fn kmemleak_alloc(&self, at: *const u8, len: usize) -> Result<(), LeakError> {
        self.objects().kmemleak_add(at.expose_provenance(), len)
    }

    /// `kmemleak_free`: the foreign memory that begins at an address is no object any more. No scan reads it after
    /// this.
    ///
    /// Context: any but NMI.
    ///
    /// # Errors
    /// [`LeakError::Off`], [`LeakError::Unknown`].
    pub fn kmemleak_free(&self, at: *const u8) -> Result<(), LeakError> {
        self.objects().kmemleak_remove(at.addr())
    }
}
