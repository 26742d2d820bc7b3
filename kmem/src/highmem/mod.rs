//! High memory: frames without an address get one for a while \[H1–H3\].
//!
//! # Concepts
//! 1. A machine may have more memory than addresses. What the direct map does not reach is *high memory*: its frames
//!    have pages, and no address. On a page that has one all calls here return that, and cost next to nothing.
//! 2. *Permanent mappings* (`kmap`) may be kept as long as one likes, are seen by all CPUs, and there is one for each
//!    page, however often it is asked for: they are counted. There are few places for them ([`LAST_PKMAP`]). Who
//!    finds none sleeps until somebody unmaps a page; so `kmap` is for process context, and never fails.
//! 3. *Temporary mappings* are the CPU's that they were made on, and are undone in the reverse order. They never sleep.
//!    `kmap_local_page` lets its holder be preempted, and even sleep: the mappings go with the task, which comes back to
//!    the same CPU. `kmap_atomic` turns preemption off until it is undone. The textbook's form of it names a purpose,
//!    a [`KmType`], whose place it takes.
//!
//! # Implementation
//! ```text
//!   Platform::kmap_range:
//!   | pkmap: up to 1024 places | CPU 0: 16 nested, 20 by purpose | CPU 1: ... | ...
//!
//!              kmap                  last kunmap
//!   clean ─────────────> mapped ─────────────────> stale ──┐ take away, one flush for all
//!     ^                    ^  └──> given to the first       │ that are
//!     │                    │       who sleeps, flushed      │
//!     │                    └────── kmap of the same page ───┤
//!     └─────────────────────────────────────────────────────┘ when no place is clean
//! ```
//! *A place's count* is one more than its users; 1 is *stale*: nobody uses it, but CPUs may still know the old
//! translation, so it serves no other page before a flush, while its own page gets it back at once. Places by page are
//! found by a hash over frame numbers with chains through the places: the page's own fields stay its owner's. Users of
//! a page that is mapped come and go by a compare-and-exchange of its place's word (see `table`).
//!
//! *Sleepers* stand in line, in nodes on their stacks. While there is a line no place is clean and none stale: `kunmap`
//! gives the place straight to the first in line, who flushes it, so nobody who comes later gets past. Who maps a page
//! serves all in line who want the same one. Each sleeper waits on one of a few *bells*: it reads the bell, then looks
//! (under the lock) whether it was served, then sleeps if the bell is as it was; it is served first, and the bell rung
//! after.
//!
//! *Temporary mappings* are a stack a CPU: its depth grows before the place is set and shrinks after it was cleared,
//! so an interrupt that lands in between works above, and leaves the depth as it was.
//!
//! # Locking
//! The permanent mappings have one `IrqLock`; not for a page that is mapped already, or was a moment ago. Entries are
//! set under it; flushes and sleep have nothing held.
//! Temporary mappings need none: all is the CPU's own.
//!
//! See [high memory handling](https://docs.kernel.org/mm/highmem.html).

mod info;
mod kmtype;
mod local;
mod permanent;
mod table;

pub use crate::types::LAST_PKMAP;
pub use info::{HighmemAudit, HighmemAuditError};
pub use kmtype::KmType;

use crate::{
    context::{KM_MAX_IDX, Path},
    error::Misuse,
    memblock::Memblock,
    page::Page,
    page_alloc::{BringUpError, Config, Mark, PageAllocator, Reclaim},
    platform::Platform,
    sync::{IrqGuard, IrqLock},
    types::Pfn,
};
use core::{
    ops::{Deref, DerefMut},
    ptr::{self, NonNull},
    sync::atomic::{AtomicU16, AtomicU32},
};
use local::Stack;
use table::{BELLS, Place, Places, Table};

/// Places for `kmap` on x86-32 with PAE, whose page tables have half the entries.
pub const LAST_PKMAP_PAE: usize = 512;

/// Places for temporary mappings of each CPU: those that nest, then one for each [`KmType`].
pub const SLOTS_PER_CPU: usize = KM_MAX_IDX + KmType::COUNT;

/// The high memory of one machine.
pub(crate) struct Highmem {
    /// The first place for permanent mappings.
    base: usize,
    /// The first place for temporary ones, and where they end.
    local: usize,
    end: usize,
    places: Places,
    table: IrqLock<Table>,
    bells: [AtomicU32; BELLS],
    /// By CPU.
    stacks: &'static [Stack],
    /// Whether what is unmapped is taken away at once.
    eager: bool,
}

impl Highmem {
    /// Makes the tables, if the platform has addresses for them. Called before the page allocator takes what `boot` has
    /// left.
    pub(crate) fn bring_up<P: Platform>(
        p: &P,
        boot: &mut Memblock,
        config: &Config,
    ) -> Result<Highmem, BringUpError> {
        let cpus = p.nr_cpu_ids();
        let Some(range) = p.kmap_range() else {
            return Ok(Highmem {
                base: 0,
                local: 0,
                end: 0,
                places: Places::NONE,
                table: IrqLock::new(Table::empty()),
                bells: [const { AtomicU32::new(0) }; BELLS],
                stacks: &[],
                eager: false,
            });
        };
        let slots = range.len() >> P::PAGE_SHIFT;
        let permanent = match slots.checked_sub(cpus * SLOTS_PER_CPU) {
            Some(n) if n > 0 => n,
            _ => return Err(BringUpError::Kmap(range.len())),
        };
        let used = permanent.min(config.last_pkmap.max(1)).min(LAST_PKMAP);
        let mut table = |bytes| p.metadata(boot, bytes).ok_or(BringUpError::NoMetadata(bytes));
        let stacks = table(size_of::<Stack>() * cpus)?.cast::<Stack>();
        let places = table(size_of::<Place>() * used)?.cast::<Place>();
        let heads = size_of::<AtomicU16>() * Table::heads_for(used);
        let heads = table(heads)?.cast::<AtomicU16>();
        // SAFETY: `Platform::metadata` gave zero-filled memory of these sizes, aligned to a frame, nobody else's, and
        // kept as long as the platform, which the machine owns. Zero is a value of all three types.
        let (stacks, places) = unsafe {
            let places = NonNull::slice_from_raw_parts(places, used).as_ref();
            let heads = NonNull::slice_from_raw_parts(heads, Table::heads_for(used)).as_ref();
            let stacks = NonNull::slice_from_raw_parts(stacks, cpus).as_ref();
            (stacks, Places::new(places, heads))
        };
        Ok(Highmem {
            base: range.start,
            local: range.start + (permanent << P::PAGE_SHIFT),
            end: range.start + ((permanent + cpus * SLOTS_PER_CPU) << P::PAGE_SHIFT),
            places,
            table: IrqLock::new(Table::new(places)),
            bells: [const { AtomicU32::new(0) }; BELLS],
            stacks,
            eager: config.debug_highmem,
        })
    }
}

/// High memory at work, with what it works on.
pub(crate) struct Maps<'a, P: Platform, R> {
    pub(crate) state: &'a Highmem,
    pub(crate) pages: &'a PageAllocator<P, R>,
}

/// The table of permanent mappings, locked by a CPU whose path says so.
struct Locked<'a, P: Platform> {
    table: IrqGuard<'a, Table, P>,
    // Goes after the lock.
    _mark: Mark<'a, P>,
}

impl<P: Platform> Deref for Locked<'_, P> {
    type Target = Table;

    fn deref(&self) -> &Table {
        &self.table
    }
}

impl<P: Platform> DerefMut for Locked<'_, P> {
    fn deref_mut(&mut self) -> &mut Table {
        &mut self.table
    }
}

/// What is at an address of the range.
enum Where {
    /// A permanent mapping's place.
    Permanent(u16),
    /// A temporary one's: CPU, place.
    Local(usize, usize),
}

impl<'a, P: Platform, R: Reclaim> Maps<'a, P, R> {
    fn p(&self) -> &'a P {
        self.pages.platform()
    }

    fn lock(&self) -> Locked<'a, P> {
        let mark = self.pages.mark(Path::Kmap);
        Locked { table: self.state.table.lock(self.p()), _mark: mark }
    }

    /// The frame of a page of this machine.
    #[track_caller]
    fn pfn_of(&self, page: &Page) -> Result<Pfn, Misuse> {
        match self.pages.page_to_pfn(page) {
            Some(pfn) => Ok(pfn),
            None => Err(self.pages.misuse(Misuse::NotAPage)),
        }
    }

    /// Address of a permanent mapping's place.
    fn permanent_at(&self, place: u16) -> usize {
        self.state.base + (usize::from(place) << P::PAGE_SHIFT)
    }

    /// Address of a temporary mapping's place.
    fn local_at(&self, cpu: usize, place: usize) -> usize {
        self.state.local + ((cpu * SLOTS_PER_CPU + place) << P::PAGE_SHIFT)
    }

    /// Which place an address is at.
    fn place_at(&self, addr: usize) -> Option<Where> {
        let state = self.state;
        if (state.local..state.end).contains(&addr) {
            let n = (addr - state.local) >> P::PAGE_SHIFT;
            return Some(Where::Local(n / SLOTS_PER_CPU, n % SLOTS_PER_CPU));
        }
        let within = (state.base..state.local).contains(&addr);
        let n = within.then(|| (addr - state.base) >> P::PAGE_SHIFT)?;
        u16::try_from(n).ok().map(Where::Permanent)
    }

    /// Where a page can be reached: the direct map, or its permanent mapping; in an NMI, which may have landed in the
    /// lock, only what is found without it.
    pub(crate) fn page_address(&self, page: &Page) -> Option<NonNull<u8>> {
        let pfn = self.pages.page_to_pfn(page)?;
        match self.p().direct_map(pfn) {
            Some(at) => Some(at),
            None => self.mapped_at(pfn).map(pointer),
        }
    }

    /// The page at an address of the direct map or of a permanent mapping.
    #[track_caller]
    pub(crate) fn to_page(&self, addr: *const u8) -> Option<&'a Page> {
        if let Some(pfn) = self.p().direct_unmap(addr) {
            return self.pages.pfn_to_page(pfn);
        }
        match self.place_at(addr.addr()) {
            Some(Where::Permanent(place)) => self.pages.pfn_to_page(self.mapped_in(place)?),
            Some(Where::Local(..)) => {
                self.pages.misuse(Misuse::LocalAddress { addr: addr.addr() });
                None
            }
            None => {
                self.pages.refuse_vmalloc(addr);
                None
            }
        }
    }
}

/// An address of the range as a pointer.
fn pointer(addr: usize) -> NonNull<u8> {
    // The range does not contain null.
    NonNull::new(ptr::with_exposed_provenance_mut(addr)).unwrap_or(NonNull::dangling())
}
