//! vmalloc: memory that is contiguous to look at, and scattered \[V1–V4, S8\].
//!
//! # Concepts
//! 1. The platform has a range of addresses for this. An *area* is a piece of it with frames behind: vmalloc's own
//!    (`VM_ALLOC`), the caller's (`VM_MAP`, by vmap and vm_map_pages), or a device's (`VM_IOREMAP`). Behind each
//!    area is one frame's worth of addresses where nothing is ever mapped: running off the end faults.
//! 2. All of it may sleep, since page tables may have to be made, and is refused in atomic context; but areas may
//!    be *freed* in any context (NMI excepted): in atomic context the address is dead from then on, and the frames
//!    come back with the next call in process context, or with reclaim, whichever is first.
//! 3. Addresses are not those of the direct map. What needs one of that (kfree, virt_to_page, virt_to_phys) refuses
//!    them with a report; `vmalloc_to_page` is the way to the frames.
//! 4. `kvmalloc` asks kmalloc first, where that is likely to succeed at once, and `kvfree` knows both.
//!
//! # Implementation
//! ```text
//!   vmalloc ──> pool of the CPU's shard ──> tree: lowest gap that is wide enough
//!                  ^ (same size, up to 256 frames)    │ none: purge, empty the pools, once more
//!                  │                                  v
//!                  │                         frames ──> table ──> Platform::map_pages, by runs
//!                  │
//!               purge <── lazy lists <── Platform::unmap_pages <── vfree, deferred frees
//!          one flush for all
//! ```
//! *Metadata* are objects of a cache, `vmap_area`, and of kmalloc. The frames' numbers are kept (`frames`), so
//! that no page table has to be read.
//!
//! *The lazy purge.* An address is used again only after these steps, in this order: (1) vfree takes the area from
//! LIVE to DYING, so that it is found by nobody; (2) `unmap_pages` takes the mappings out of the page tables; (3)
//! the frames are given back and the area waits on a lazy list; (4) a purge takes whole lists, calls
//! `flush_tlb_kernel_range` once for all that is on them, and only then (5) puts the areas in a pool, or takes them
//! out of the tree. Between (3) and (4) other CPUs may still reach the frames through old addresses: whoever does
//! so uses memory after freeing it; but no *new* area is ever seen through an old address. A purge happens when
//! lazy areas sum up to 32 MiB for each doubling of CPUs, as in Linux; when there is no room; and on
//! `vm_unmap_aliases`.
//!
//! *Pools* keep descriptor and place in the tree, so that the common pair changes the tree not at all. So two CPUs
//! that make and free areas of their own write to no cache line in common: the tree's lock is taken by shards (`find`),
//! a descriptor's links are in a line of their own (`area`), and descriptors stay with a shard (`pool`).
//!
//! # Locking
//! The tree has a lock of as many shards as there are: who finds something in it holds one of them, who changes it all.
//! Each shard has a lock for its lazy list and pools; the list of deferred frees needs none. They are leaves, no two
//! but those of the tree are held at once, and nothing is mapped, flushed, allocated or freed under them. Whose an area
//! is, is decided by its own word (`area`).
//!
//! See [virtually contiguous mappings](https://docs.kernel.org/core-api/mm-api.html#virtually-contiguous-mappings).

mod alloc;
mod area;
mod find;
mod frames;
mod free;
mod guarded;
mod info;
mod kvmalloc;
mod map;
mod pool;
mod purge;
mod tree;

pub(crate) use alloc::Wanted;
pub(crate) use free::By;
pub(crate) use guarded::{Guarded, Shelf};
pub use info::{VmAreaInfo, VmAuditError, VmallocAudit};

use crate::{
    page_alloc::Reclaim,
    platform::Platform,
    slab::{CacheHandle, Objects},
    sync::ShardedLock,
};
use area::Stack;
use core::{panic::Location, sync::atomic::AtomicU32};
use crossbeam_utils::CachePadded;
use pool::{SHARDS, Shard};
use tree::Tree;

bitflags::bitflags! {
    /// What an area is; Linux's values \[V1\].
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
    pub struct VmFlags: u32 {
        /// `VM_IOREMAP`: a device's registers.
        const IOREMAP = 0x1;
        /// `VM_ALLOC`: has frames of its own.
        const ALLOC = 0x2;
        /// `VM_MAP`: shows frames of the caller's.
        const MAP = 0x4;
        /// `VM_USERMAP`: may be shown to user space, so it was zeroed.
        const USERMAP = 0x8;
        /// `VM_MAP_PUT_PAGES`: vfree drops a reference to each of the caller's pages.
        const MAP_PUT_PAGES = 0x200;
        /// `VM_ALLOW_HUGE_VMAP`: large blocks and large entries are welcome.
        const ALLOW_HUGE_VMAP = 0x400;
        /// `VM_SPARSE`: got without pages; `vm_map_pages` maps them.
        const SPARSE = 0x1000;
        /// A kernel stack: nothing is mapped at the first frame's worth of addresses either. Linux has no such
        /// flag.
        const STACK = 1 << 16;
        /// A kernel stack that interrupts run on. Linux has no such flag.
        const IRQ_STACK = 1 << 17;
    }
}

/// The vmalloc state of one machine. Empty until its first use.
pub struct Vmalloc {
    tree: ShardedLock<Tree, SHARDS>,
    shards: [CachePadded<Shard>; SHARDS],
    /// Freed in atomic context, and still mapped.
    deferred: Stack,
    /// Purges that are under way; what others wait on.
    purging: AtomicU32,
    cache: CacheHandle,
}

impl Vmalloc {
    /// No areas.
    pub const fn new() -> Vmalloc {
        Vmalloc {
            tree: ShardedLock::new(Tree::new()),
            shards: [const { CachePadded::new(Shard::new()) }; SHARDS],
            deferred: Stack::new(),
            purging: AtomicU32::new(0),
            cache: CacheHandle::new(),
        }
    }
}

impl Default for Vmalloc {
    fn default() -> Self {
        Vmalloc::new()
    }
}

/// vmalloc at work, with what it works on.
pub(crate) struct Vmap<'a, P: Platform, R: Reclaim> {
    pub(crate) objects: Objects<'a, P, R>,
    pub(crate) state: &'a Vmalloc,
}

impl<P: Platform, R: Reclaim> Clone for Vmap<'_, P, R> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<P: Platform, R: Reclaim> Copy for Vmap<'_, P, R> {}

impl<'a, P: Platform, R: Reclaim> Vmap<'a, P, R> {
    fn p(&self) -> &'a P {
        self.objects.pages.platform()
    }

    const PAGE: usize = 1 << P::PAGE_SHIFT;

    /// Whether the caller may do what this module does.
    fn may_sleep(&self) -> bool {
        self.objects.pages.context().may_sleep()
    }
}

/// A place in the source as `/proc` shows it.
pub(crate) struct At(pub(crate) &'static Location<'static>);

impl core::fmt::Display for At {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{}:{}", self.0.file(), self.0.line())
    }
}
