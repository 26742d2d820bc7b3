//! The slab layer: caches of objects of one kind \[S1–S7, S9, S10\].
//!
//! # Concepts
//! 1. A *cache* hands out objects of one size. Their memory comes in *slabs*, blocks of frames cut into
//!    objects; a slab is *full*, *partial* or *empty*, and requests are served from partial slabs first,
//!    then from empty ones, then from a new one. Slabs that became empty go back to the page allocator.
//! 2. Whether an object is in its slab, in a magazine or in use is one byte, apart from the object
//!    (`state`). Nothing of the allocator's lies in free memory or between objects, unless the cache looks
//!    for mistakes: what is written to freed memory reaches nothing, what is written beyond a slab's last object
//!    at most state bytes, which lead nowhere. A second free of an object is found out at once.
//! 3. In front of the slabs each CPU has two *magazines* of free objects, and the CPUs of a *shelf* a *depot* of full
//!    and empty ones (`cpu`). The common allocation and free touch the CPU's own and take no lock.
//! 4. The caches themselves, their lists and their magazines are objects of *internal* caches (`cache`),
//!    which have no magazines.
//! 5. Caches that look for overruns, writes after free and the like have no magazines either (`debug`), and no
//!    cache has any while everything is zeroed, noted by call site or traced: the fast paths then miss, and the slow
//!    paths do what is to be done.
//! 6. Now and then an object is served from a page of its own between guard pages (`sampled`,
//!    [`kfence`](crate::kfence)).
//! 7. Objects that nothing refers to are found by walking the caches (`leaks`).
//!
//! # Implementation
//! ```text
//!   address ──> frame ──> owner: cache number, colour        (memmap, dense, two bytes a frame)
//!                            │
//!     CPU ──> table ─────────┴──> loaded magazine of (object, state byte), where state bytes are
//!                                    │ empty / full
//!                                    ▼
//!                   shelf: depot of magazines, lists of slabs (lock)
//!                                    │ nothing left / a slab became empty
//!                                    ▼
//!                             page allocator
//! ```
//! Everything is made at its first use: a machine that allocates no objects pays two bytes a frame.
//! *Colouring*: a slab whose objects leave slack begins them at a multiple of a cache line within it, so
//! that objects of equal index do not compete for the same lines. The colour is in the owner of each of the
//! slab's frames, where a free finds it.
//!
//! # Locking
//! Magazines: ownership of the CPU's lists (see `page_alloc`). Slabs and depot: the shelf's lock of the cache;
//! no two are held at once, and no page is asked for or given back under one. The registry's lock is never
//! held together with another.
//!
//! See [memory allocation guide](https://docs.kernel.org/core-api/memory-allocation.html).

mod audit;
mod cache;
mod cpu;
mod create;
mod debug;
mod kmalloc;
mod layout;
mod leaks;
mod magazine;
mod moving;
mod node;
mod ops;
mod rcu;
mod sampled;
mod shuffle;
mod state;

pub use audit::{CacheInfo, ObjectAudit, ObjectAuditError};
pub use cache::Ctor;
pub(crate) use create::CacheHandle;
pub use create::{CacheError, DestroyError, KmemCache};
pub use debug::DebugError;
pub(crate) use debug::{INIT_ON_ALLOC, INIT_ON_FREE, TRACE, pattern};
pub(crate) use kmalloc::KMALLOC_MAX_CACHE_SIZE;
pub use kmalloc::ZERO_SIZE_PTR;
pub use leaks::{KmemleakConfig, Leak, LeakError, LeakScan};
pub use moving::{MoveError, MoveFn, MoveResult};
pub use rcu::RCU_HEAD;

use crate::{
    context::Cpu,
    fault::{Fault, FaultSite},
    gfp::Gfp,
    kfence::Kfence,
    page_alloc::{Config, PageAllocator, Reclaim},
    platform::Platform,
    sync::IrqLock,
};
use cache::{Descriptor, MAX_CACHES, Root};
use core::{
    ptr::NonNull,
    sync::atomic::{
        AtomicPtr, AtomicU32, AtomicU64,
        Ordering::{Acquire, Relaxed, Release},
    },
};
pub(crate) use magazine::Object;

bitflags::bitflags! {
    /// What a cache is to be like \[S5\].
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
    pub struct SlabFlags: u32 {
        /// Objects begin at cache lines, or at an even part of one if several fit (`SLAB_HWCACHE_ALIGN`).
        const HWCACHE_ALIGN = 1 << 0;
        /// Failing to create the cache panics (`SLAB_PANIC`).
        const PANIC = 1 << 1;
        /// Objects are in ZONE_DMA (`SLAB_CACHE_DMA`).
        const CACHE_DMA = 1 << 2;
        /// Objects are in ZONE_DMA32 or below (`SLAB_CACHE_DMA32`).
        const CACHE_DMA32 = 1 << 3;
        /// Pages count as reclaimable and come from reclaimable pageblocks (`SLAB_RECLAIM_ACCOUNT`).
        const RECLAIM_ACCOUNT = 1 << 4;
        /// Accepted and ignored: there are no memory cgroups (`SLAB_ACCOUNT`).
        const ACCOUNT = 1 << 5;
        /// Accepted and ignored: nothing tracks uninitialised reads (`SLAB_NOTRACK`).
        const NOTRACK = 1 << 6;
        /// The cache shares its slabs with no other (`SLAB_NO_MERGE`).
        const NO_MERGE = 1 << 7;
        /// Free objects hold 0x6b, and 0xa5 in their last byte, so that a write after free is found out; those
        /// just given out hold 0xa5 (`SLAB_POISON`). Constructors run at each allocation.
        const POISON = 1 << 8;
        /// Objects have bytes before and behind them that nobody may write to (`SLAB_RED_ZONE`).
        const RED_ZONE = 1 << 9;
        /// Who allocated and who freed an object last is known (`SLAB_STORE_USER`).
        const STORE_USER = 1 << 10;
        /// Counts of slabs are checked at each allocation and free (`SLAB_CONSISTENCY_CHECKS`).
        const CONSISTENCY_CHECKS = 1 << 11;
        /// Freed objects may be given out again at once, but their memory stays an object of the cache as long as
        /// readers may look at it (`SLAB_TYPESAFE_BY_RCU`): until a grace period of the platform's has passed. Such a
        /// cache is merged with no other, poisons nothing, and its objects are no samples of KFENCE's.
        const TYPESAFE_BY_RCU = 1 << 13;
        /// Objects are never samples of KFENCE's (`SLAB_SKIP_KFENCE`).
        const SKIP_KFENCE = 1 << 12;
        /// All flags that look for mistakes. A cache with one of them has no magazines and is merged with no
        /// other; see [SLUB debugging](https://docs.kernel.org/mm/slab.html).
        const DEBUG = Self::POISON.bits()
            | Self::RED_ZONE.bits()
            | Self::STORE_USER.bits()
            | Self::CONSISTENCY_CHECKS.bits();
    }
}

/// The slab layer of one machine. Empty until its first use.
pub struct Slabs {
    root: AtomicPtr<Root>,
    /// What all caches do: while it is not 0, CPUs have no magazines.
    modes: AtomicU32,
    /// What the order of objects is drawn from, if not 0.
    random: AtomicU64,
    /// Who holds how much, while that is noted.
    tags: IrqLock<Option<debug::Tags>>,
    /// Which caches look for mistakes.
    pattern: Option<&'static str>,
    /// Which allocations of objects fail, and whose.
    failslab: Fault,
    failslab_site: IrqLock<Option<FaultSite>>,
    /// Sampled objects, on pages of their own.
    pub(crate) kfence: Kfence,
    /// What the leak scan knows beside objects' notes.
    leaks: leaks::Leaks,
    /// What readers may still look at.
    rcu: rcu::Rcu,
}

impl Default for Slabs {
    fn default() -> Self {
        Slabs::new()
    }
}

/// The slab layer at work, with the pages it works on.
pub(crate) struct Objects<'a, P: Platform, R: Reclaim> {
    pub(crate) pages: &'a PageAllocator<P, R>,
    pub(crate) slabs: &'a Slabs,
}

impl<P: Platform, R: Reclaim> Clone for Objects<'_, P, R> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<P: Platform, R: Reclaim> Copy for Objects<'_, P, R> {}

/// A seed as it is kept: 0 is none.
fn seed_word(seed: Option<u64>) -> u64 {
    seed.map_or(0, |seed| seed | 1 << 63)
}

/// The order of a block of at least `bytes`.
fn order_for(bytes: usize, page_shift: u32) -> u32 {
    bytes.div_ceil(1 << page_shift).next_power_of_two().ilog2()
}

impl Slabs {
    /// No caches.
    pub const fn new() -> Slabs {
        Slabs {
            root: AtomicPtr::new(core::ptr::null_mut()),
            modes: AtomicU32::new(0),
            random: AtomicU64::new(0),
            tags: IrqLock::new(None),
            pattern: None,
            failslab: Fault::new(),
            failslab_site: IrqLock::new(None),
            kfence: Kfence::new(),
            leaks: leaks::Leaks::new(),
            rcu: rcu::Rcu::new(),
        }
    }

    /// Allocations of objects that were made to fail.
    pub(crate) fn failslab_count(&self) -> u64 {
        self.failslab.failed()
    }

    /// As a machine's settings say, before its first use.
    pub(crate) fn configure(&mut self, config: &Config) {
        self.pattern = config.slab_debug;
        *self.random.get_mut() = seed_word(config.slab_random);
    }
}

impl<'a, P: Platform, R: Reclaim> Objects<'a, P, R> {
    #[inline(always)]
    fn root(&self) -> Option<&'static Root> {
        // SAFETY: null or a root, which is kept until the machine goes. Acquire pairs with the Release that
        // published it.
        unsafe { self.slabs.root.load(Acquire).as_ref() }
    }

    /// Zeroed pages for the layer itself.
    fn own_pages(&self, gfp: Gfp, order: u32) -> Option<NonNull<u8>> {
        let page = self.pages.alloc_pages((gfp & node::FOR_PAGES) | Gfp::NOWARN, order).ok()?;
        let pfn = self.pages.page_to_pfn(page)?;
        let Some(at) = self.pages.platform().direct_map(pfn) else {
            let _ = self.pages.__free_pages(page, order);
            return None;
        };
        self.pages.platform().zero_frames(pfn, 1 << order);
        let _ = at.as_ptr().expose_provenance();
        Some(at)
    }

    fn free_own_pages(&self, at: NonNull<u8>, order: u32) {
        if let Some(page) = self.pages.virt_to_page(at.as_ptr()) {
            let _ = self.pages.__free_pages(page, order);
        }
    }

    /// Calls `f` with every cache, the youngest first, internal ones last; each stays for as long as that takes.
    fn each(&self, mut f: impl FnMut(&'static Root, &'static Descriptor)) {
        let Some(root) = self.root() else { return };
        for id in (1..MAX_CACHES as u16).rev() {
            if let Some(d) = self.pin(root, id) {
                f(root, d);
                // Release pairs with the Acquire of the destroyer.
                d.pins.fetch_sub(1, Release);
            }
        }
    }

    fn pin(&self, root: &'static Root, id: u16) -> Option<&'static Descriptor> {
        // Most numbers are nobody's.
        root.cache(id)?;
        let _registry = root.registry.lock(self.pages.platform());
        let d = root.cache(id).filter(|d| d.dying.load(Relaxed) == 0)?;
        d.pins.fetch_add(1, Acquire);
        Some(d)
    }

    /// Gives back what a node's depots and empty slabs hold; returns the frames. The magazines of CPUs are
    /// left alone.
    pub(crate) fn shrink_node(&self, node: usize) -> u64 {
        let mut frames = self.advance_rcu();
        self.each(|root, d| {
            let before = self.released(d);
            self.trim_node(root, d, node);
            frames += self.released(d) - before;
        });
        frames
    }

    fn trim_all(&self, node: usize) {
        self.each(|root, d| self.trim_node(root, d, node));
    }

    fn trim_node(&self, root: &'static Root, d: &'static Descriptor, node: usize) {
        d.shelves_of(node).for_each(|shelf| self.trim(root, d, shelf));
    }

    /// What a CPU does for those who asked it to give its magazines up.
    pub(crate) fn run_deferred(&self, cpu: &Cpu) {
        self.answer(cpu);
    }
}
