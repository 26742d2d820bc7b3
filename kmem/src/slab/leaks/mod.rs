//! Leaks: objects that nothing refers to any more \[D2\].
//!
//! # Concepts
//! A scan looks for addresses in memory that is in use by itself (the *roots*: static data, stacks, what a task has in
//! its registers; the embedder names them) and then in every object that one was found of. An address anywhere in an
//! object counts, so a word that looks like one may hide a leak; none is made up. What is in use and was not reached is
//! *unreferenced*. Objects are those of caches, of kmalloc, those in KFENCE's pool, and foreign memory that
//! [`kmemleak_alloc`](crate::Kmem::kmemleak_alloc) names. Pages are not, as in Linux: what is in them is found only if
//! they are named.
//!
//! *Age.* Who just got an object may have its address where no scan sees it. So an object counts as reached until
//! two scans, some seconds apart, have found it in use; being freed and given out again in between makes it young again.
//! A scan that finds suspects looks at all memory a second time, for addresses that were moved behind its back.
//!
//! # Implementation
//! There is no registry: caches are walked, and what a scan knows of an object is in its state byte. `NOTED` with
//! further bits (`notes`) stands for LIVE there; the fast path of a free does not know it and leaves such
//! objects to the slower one, and giving an object out makes it plainly LIVE, without notes. Large objects have theirs
//! among the flags of their first page, sampled ones in their slot, foreign memory in the table of ranges.
//!
//! Objects reached and not yet looked at are on a stack of fixed size in pages that are had for the scan. When it is
//! full, what is found stays marked, and a walk over all objects picks it up.
//!
//! # Locking
//! One scan at a time (`busy`). An object's notes are changed under its shelf's lock, under which no slab goes away. The
//! table of ranges has a lock; no other is taken under it.
//!
//! See [kmemleak](https://docs.kernel.org/dev-tools/kmemleak.html).

mod report;
mod scan;
mod table;
mod walk;

pub use report::Leak;

use super::{Objects, order_for};
use crate::{gfp::Gfp, page_alloc::Reclaim, platform::Platform, sync::IrqLock};
use core::{
    fmt,
    ptr::NonNull,
    sync::atomic::{
        AtomicBool, AtomicU32, AtomicU64,
        Ordering::{Acquire, Relaxed, Release},
    },
};
use table::{Range, Table};

/// Scans that found the object in use, up to two.
const AGE: u8 = 0x03;
const OLD: u8 = 2;
/// Reached by this scan.
const MARKED: u8 = 0x04;
/// Its contents are looked at, or will be.
const DONE: u8 = 0x08;
/// Never a leak.
const NOT_LEAK: u8 = 0x10;
/// Its contents are not looked at.
const NO_SCAN: u8 = 0x20;
/// Of its contents only the areas in the table are looked at.
const AREAS: u8 = 0x40;

/// Notes that the object's user asked for.
pub(super) const USERS: u8 = NOT_LEAK | NO_SCAN | AREAS;

/// Whether notes are those of an object that nothing refers to.
fn leaked(notes: u8) -> bool {
    notes & AGE == OLD && notes & (MARKED | NOT_LEAK) == 0
}

/// How the leak scan works.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KmemleakConfig {
    /// Ranges of foreign memory and areas of objects that there is room for.
    pub ranges: usize,
    /// Nanoseconds that an object must have been in use to be reported.
    pub min_age_ns: u64,
}

impl Default for KmemleakConfig {
    /// 512 ranges, five seconds.
    fn default() -> Self {
        KmemleakConfig { ranges: 512, min_age_ns: 5_000_000_000 }
    }
}

/// Why the leak scan did not do what it was asked to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LeakError {
    /// It is off.
    Off,
    /// No memory for it.
    NoMemory,
    /// Another scan is under way, or the context may not wait for one.
    Busy,
    /// No object begins at the address, or no foreign memory.
    Unknown,
    /// The range is empty, reaches beyond its object, or shares addresses with another.
    Range,
    /// No room for a further range.
    Full,
}

impl fmt::Display for LeakError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            LeakError::Off => "the leak scan is off",
            LeakError::NoMemory => "out of memory",
            LeakError::Busy => "another leak scan is under way",
            LeakError::Unknown => "nothing known begins at the address",
            LeakError::Range => "the range is empty or not apart from others",
            LeakError::Full => "no room for a further range",
        })
    }
}

impl core::error::Error for LeakError {}

/// What a scan found.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct LeakScan {
    /// Objects in use at its beginning, foreign memory included.
    pub objects: u64,
    /// Those of them that are old enough to be reported.
    pub old: u64,
    /// Those that nothing refers to.
    pub unreferenced: u64,
}

/// What there is beside objects' notes.
pub(super) struct Leaks {
    on: AtomicBool,
    /// Whether it ever was.
    ever: AtomicBool,
    busy: AtomicBool,
    min_age_ns: AtomicU64,
    /// When objects' ages were last raised, and whether ever.
    aged_at: AtomicU64,
    aged: AtomicBool,
    /// Parts of objects in the table.
    areas: AtomicU32,
    table: IrqLock<Option<Table>>,
}

impl Leaks {
    pub(super) const fn new() -> Leaks {
        Leaks {
            on: AtomicBool::new(false),
            ever: AtomicBool::new(false),
            busy: AtomicBool::new(false),
            min_age_ns: AtomicU64::new(0),
            aged_at: AtomicU64::new(0),
            aged: AtomicBool::new(false),
            areas: AtomicU32::new(0),
            table: IrqLock::new(None),
        }
    }
}

/// Keeps others from scanning.
struct Busy<'a>(&'a AtomicBool);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        // Release pairs with the Acquire in `begin`.
        self.0.store(false, Release);
    }
}

impl<'a, P: Platform, R: Reclaim> Objects<'a, P, R> {
    /// Begins something that only one may do at a time.
    fn begin(&self) -> Result<Busy<'a>, LeakError> {
        let busy = &self.slabs.leaks.busy;
        if !self.pages.context().may_sleep() || busy.swap(true, Acquire) {
            return Err(LeakError::Busy);
        }
        Ok(Busy(busy))
    }

    /// Whether objects may have notes.
    pub(super) fn leaks_noted(&self) -> bool {
        self.slabs.leaks.ever.load(Relaxed)
    }

    fn leaks_on(&self) -> Result<(), LeakError> {
        if self.slabs.leaks.on.load(Relaxed) { Ok(()) } else { Err(LeakError::Off) }
    }

    /// `set_kmemleak`.
    pub(crate) fn set_kmemleak(&self, config: Option<KmemleakConfig>) -> Result<(), LeakError> {
        let _busy = self.begin()?;
        let (p, leaks) = (self.pages.platform(), &self.slabs.leaks);
        let table = match config {
            Some(config) => Some(self.make_table(config.ranges)?),
            None => None,
        };
        let old = {
            let mut at = leaks.table.lock(p);
            // Under the lock, as all that changes it: what is added from now on is in the new table.
            leaks.areas.store(0, Relaxed);
            core::mem::replace(&mut *at, table)
        };
        if let Some(old) = old {
            let order = old.order;
            if let Some(at) = NonNull::new(old.place()) {
                self.account(order, false);
                self.free_own_pages(at, order);
            }
        }
        self.walk_things(&mut |thing| _ = thing.notes.note(&mut |n| (n != 0).then_some(0)));
        leaks.aged.store(false, Relaxed);
        leaks.min_age_ns.store(config.map_or(0, |c| c.min_age_ns), Relaxed);
        leaks.ever.fetch_or(config.is_some(), Relaxed);
        leaks.on.store(config.is_some(), Relaxed);
        Ok(())
    }

    fn make_table(&self, ranges: usize) -> Result<Table, LeakError> {
        self.make_root(Gfp::KERNEL).ok_or(LeakError::NoMemory)?;
        let bytes = ranges.max(1).saturating_mul(size_of::<Range>());
        if bytes > (1usize << P::PAGE_SHIFT) << self.pages.max_order() {
            return Err(LeakError::NoMemory);
        }
        let order = order_for(bytes, P::PAGE_SHIFT);
        let at = self.own_pages(Gfp::KERNEL, order).ok_or(LeakError::NoMemory)?;
        self.account(order, true);
        // SAFETY: zeroed pages, large enough and aligned, ours until the table goes; zero is a value of ranges.
        let ranges = unsafe { core::slice::from_raw_parts_mut(at.as_ptr().cast(), ranges) };
        Ok(Table::new(ranges, order))
    }

    /// Counts pages of the layer's own.
    fn account(&self, order: u32, more: bool) {
        if let Some(root) = self.root() {
            match more {
                true => root.frames.fetch_add(1 << order, Relaxed),
                false => root.frames.fetch_sub(1 << order, Relaxed),
            };
        }
    }

    /// Adds notes of the user's to an object, or to foreign memory.
    pub(crate) fn kmemleak_note(
        &self,
        addr: usize,
        gray: bool,
        skip: bool,
    ) -> Result<(), LeakError> {
        self.leaks_on()?;
        let notes = if gray { NOT_LEAK } else { 0 } | if skip { NO_SCAN } else { 0 };
        self.note_at(addr, notes)
    }

    fn note_at(&self, addr: usize, notes: u8) -> Result<(), LeakError> {
        let noted = self.thing_at(addr, |thing| {
            thing.addr == addr && thing.notes.note(&mut |n| Some(n | notes)).is_some()
        });
        if noted == Some(true) { Ok(()) } else { Err(LeakError::Unknown) }
    }

    /// `kmemleak_scan_area`.
    pub(crate) fn kmemleak_area(
        &self,
        addr: usize,
        start: usize,
        len: usize,
    ) -> Result<(), LeakError> {
        self.leaks_on()?;
        let size = self.thing_at(addr, |thing| (thing.addr == addr).then_some(thing.size));
        let size = size.flatten().ok_or(LeakError::Unknown)?;
        let inside = start >= addr && len > 0 && len <= size && start - addr <= size - len;
        if !inside {
            return Err(LeakError::Range);
        }
        let leaks = &self.slabs.leaks;
        {
            let mut table = leaks.table.lock(self.pages.platform());
            let table = table.as_mut().ok_or(LeakError::Off)?;
            if !table.add(addr, start, len) {
                return Err(LeakError::Full);
            }
            leaks.areas.fetch_add(1, Relaxed);
        }
        let noted = self.note_at(addr, AREAS);
        if noted.is_err() {
            self.forget_areas(addr);
        }
        noted
    }

    /// `kmemleak_alloc`.
    pub(crate) fn kmemleak_add(&self, start: usize, len: usize) -> Result<(), LeakError> {
        let mut table = self.slabs.leaks.table.lock(self.pages.platform());
        let table = table.as_mut().ok_or(LeakError::Off)?;
        let ours = |at| self.pages.platform().direct_unmap(core::ptr::without_provenance(at));
        let end = start.checked_add(len).filter(|_| start != 0 && len != 0);
        let end = end.ok_or(LeakError::Range)?;
        if table.overlaps(start, len) || ours(start).is_some() || ours(end - 1).is_some() {
            return Err(LeakError::Range);
        }
        if table.add(0, start, len) { Ok(()) } else { Err(LeakError::Full) }
    }

    /// `kmemleak_free`.
    pub(crate) fn kmemleak_remove(&self, start: usize) -> Result<(), LeakError> {
        let found = {
            let mut table = self.slabs.leaks.table.lock(self.pages.platform());
            table.as_mut().ok_or(LeakError::Off)?.remove(start)
        };
        self.forget_areas(start);
        if found { Ok(()) } else { Err(LeakError::Unknown) }
    }

    /// An object that had notes is freed.
    #[inline]
    pub(super) fn forget_notes(&self, addr: usize, state: u8) {
        if state & (super::state::NOTED | AREAS) == super::state::NOTED | AREAS {
            self.forget_areas(addr);
        }
    }

    /// An object is freed that may have areas.
    pub(super) fn forget_areas(&self, addr: usize) {
        let leaks = &self.slabs.leaks;
        if leaks.areas.load(Relaxed) != 0
            && let Some(table) = leaks.table.lock(self.pages.platform()).as_mut()
        {
            let n = table.remove_areas(addr);
            leaks.areas.fetch_sub(n as u32, Relaxed);
        }
    }
}
