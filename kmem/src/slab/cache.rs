//! What is kept for a cache: its descriptor, its shelves by node and CPU, its magazines by CPU.
//!
//! # Implementation
//! Descriptors, lists and magazines are objects themselves, of *internal*
//! caches whose descriptors lie in the [`Root`]. Internal caches have no magazines, so nothing goes round
//! in circles.

use super::{
    SlabFlags,
    layout::{Areas, Layout},
    magazine::{MAGAZINES, Magazine},
    moving::Mover,
    node::Whose,
};
use crate::{context::IdleWord, error::Name, sync::IrqLock};
use core::{
    ops::Range,
    sync::atomic::{
        AtomicPtr, AtomicU32, AtomicU64, AtomicUsize,
        Ordering::{Acquire, Relaxed},
    },
};

/// Caches a machine may have; their numbers fit nine bits of a frame's owner.
pub(super) use crate::context::MAX_CACHES;

/// A constructor: is given each object once, when its pages join the cache \[S6\].
pub type Ctor = fn(*mut u8);

/// A cache.
pub(crate) struct Descriptor {
    pub(super) id: u16,
    /// Its number for a free of an object that is known to be its: 0, of which no CPU has a magazine, on machines
    /// where such a free must look what node the object is from.
    pub(super) owned_id: u16,
    /// The machine that it is of.
    pub(super) machine: IdleWord,
    pub(super) name: Name,
    /// Bytes that the user asked for.
    pub(super) size: u32,
    pub(super) align: u32,
    pub(super) flags: SlabFlags,
    pub(super) ctor: Option<Ctor>,
    pub(super) layout: Layout,
    pub(super) areas: Areas,
    /// By node, and of a node's by CPU.
    pub(super) shelves: &'static [Shelf],
    /// Of one node: a power of two, at least 1.
    pub(super) per_node: usize,
    /// Index into `MAGAZINES` of the largest its CPUs may have; `None` for internal caches.
    pub(super) largest: Option<usize>,
    /// Which of `SlabFlags::DEBUG` are on: while there are any, CPUs have no magazines of it.
    pub(super) watched: AtomicU32,
    /// Users that share it, by merging.
    pub(super) users: AtomicU32,
    /// Being destroyed: CPUs give their magazines up for good.
    pub(super) dying: AtomicU32,
    /// Those who look at it without being its users; it does not go while there are any.
    pub(super) pins: AtomicU32,
    /// Those who move its objects.
    pub(super) moves: AtomicU32,
    /// What moves its objects, if anybody does.
    pub(super) mover: IrqLock<Option<Mover>>,
    /// What CPUs gave up, for the destroyer to free or for other CPUs to take.
    pub(super) retired: AtomicPtr<CpuCache>,
}

impl Descriptor {
    /// The number of the shelf of a CPU's on a node.
    #[inline]
    pub(super) fn shelf_of(&self, node: usize, cpu: usize) -> usize {
        // The remainder, of a power of two.
        node * self.per_node + (cpu & (self.per_node - 1))
    }

    /// The first frame of the slab that has a frame.
    #[inline(always)]
    pub(super) fn head(&self, pfn: u32) -> u32 {
        pfn & !((1 << self.layout.order) - 1)
    }

    /// The numbers of a node's shelves.
    pub(super) fn shelves_of(&self, node: usize) -> Range<usize> {
        let first = (node * self.per_node).min(self.shelves.len());
        first..(first + self.per_node).min(self.shelves.len())
    }
}

/// Swings after which a CPU is busy with a cache and asks for larger magazines: so many that in the recorded traces few
/// caches came to that, and the layer held fewer pages than Linux.
pub(super) const SWINGS: u32 = 1024;

/// Bytes of a slab that a CPU has for itself from the start. To share those saves little, and CPUs that have objects of one
/// slab write to the same lines for as long as the objects go around.
const SMALL_SLAB: u32 = 4096;

/// The slabs of one cache that are for some of a node's CPUs, and the depot of those. In cache lines of its own, as all
/// that CPUs write to.
#[repr(align(64))]
pub(crate) struct Shelf {
    pub(super) lists: IrqLock<Lists>,
}

/// First frames of slabs on a list.
#[derive(Clone, Copy)]
pub(super) struct List {
    pub(super) first: u32,
    pub(super) last: u32,
    pub(super) nr: u32,
}

/// No frame.
pub(super) const NONE: u32 = u32::MAX;

impl List {
    pub(super) const EMPTY: List = List { first: NONE, last: NONE, nr: 0 };
}

/// Shelves of a node at most; what a slab notes of its own has no room for more.
const MOST_SHELVES: usize = 16;

/// Shelves of all nodes at most, as long as each has one: all of a cache's are one object.
const MOST_OF_ALL: usize = 32;

/// Shelves of a node on a machine with so many nodes and CPUs. CPUs whose numbers leave the same remainder have one
/// together.
pub(super) fn nr_shelves(nodes: usize, cpus: usize) -> usize {
    let mut nr = cpus.clamp(1, MOST_SHELVES).next_power_of_two();
    while nr > 1 && nr * nodes > MOST_OF_ALL {
        nr /= 2;
    }
    nr
}

/// What a shelf's lock guards.
pub(super) struct Lists {
    pub(super) partial: List,
    pub(super) full: List,
    pub(super) empty: List,
    /// Objects that lie free in slabs.
    pub(super) free: u64,
    pub(super) colour: u32,
    pub(super) full_magazines: *const Magazine,
    pub(super) nr_full_magazines: u32,
    pub(super) empty_magazines: *const Magazine,
    pub(super) nr_empty_magazines: u32,
    /// Slabs ever made and given back.
    pub(super) grown: u64,
    pub(super) released: u64,
}

// SAFETY: the pointers are to magazines in the depot, which belong to whoever holds the lock.
unsafe impl Send for Lists {}

impl Lists {
    /// The lists of slabs.
    pub(super) fn all(&self) -> impl Iterator<Item = &List> {
        [&self.partial, &self.full, &self.empty].into_iter()
    }

    /// Those of slabs with an object that is not in it.
    pub(super) fn in_use(&self) -> impl Iterator<Item = &List> {
        [&self.partial, &self.full].into_iter()
    }
}

impl Shelf {
    pub(super) const fn new() -> Shelf {
        Shelf {
            lists: IrqLock::new(Lists {
                partial: List::EMPTY,
                full: List::EMPTY,
                empty: List::EMPTY,
                free: 0,
                colour: 0,
                full_magazines: core::ptr::null(),
                nr_full_magazines: 0,
                empty_magazines: core::ptr::null(),
                nr_empty_magazines: 0,
                grown: 0,
                released: 0,
            }),
        }
    }
}

/// One cache on one CPU, beside the loaded magazine. Touched by the CPU itself, while it owns its lists.
#[repr(align(64))]
pub(crate) struct CpuCache {
    pub(super) cache: &'static Descriptor,
    pub(super) previous: AtomicPtr<Magazine>,
    /// The loaded one; once the CPU gave the cache up, the one that was.
    pub(super) loaded: AtomicPtr<Magazine>,
    /// Where that one's first place is, for reports: it may be gone by the time they look.
    pub(super) first_place: AtomicUsize,
    /// Index into `MAGAZINES` of those it had first, and of those it asks for.
    pub(super) first: u32,
    pub(super) class: AtomicU32,
    /// Whether the last exchange was a flush, and how often that changed since it grew last.
    pub(super) flushed: AtomicU32,
    pub(super) swings: AtomicU32,
    /// The next one that was given up.
    pub(super) next: AtomicPtr<CpuCache>,
}

impl CpuCache {
    /// Whether there was so much traffic that its magazines grew, or would have if there were larger ones.
    #[inline]
    pub(super) fn busy(&self) -> bool {
        self.class.load(Relaxed) > self.first || self.swings.load(Relaxed) >= SWINGS
    }

    /// Whose slabs the CPU takes: its own where it is busy, or where they are small.
    pub(super) fn whose(&self) -> Whose {
        let small = self.cache.layout.mask < SMALL_SLAB;
        if self.busy() || small { Whose::Own } else { Whose::Few }
    }

    /// Makes a magazine the loaded one, as far as this knows of it.
    #[inline]
    pub(super) fn set_loaded(&self, m: &'static Magazine) {
        self.loaded.store(m.place(), Relaxed);
        self.first_place.store(m.first(), Relaxed);
    }

    /// The loaded magazine, for who owns the CPU's lists, and on a quiet machine.
    pub(super) fn loaded(&self) -> &'static Magazine {
        // SAFETY: a magazine of the CPU's, which lives until another is put here.
        unsafe { &*self.loaded.load(Relaxed) }
    }

    pub(super) fn previous(&self) -> &'static Magazine {
        // SAFETY: a magazine of the CPU's, which lives until it is taken off here.
        unsafe { &*self.previous.load(Relaxed) }
    }
}

/// What magazines are aligned to: CPUs write to them.
const CACHE_LINE: u32 = 64;

/// The internal caches.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Internal {
    Descriptors,
    Shelves,
    CpuCaches,
    /// By index into `MAGAZINES`.
    Magazines(usize),
}

pub(super) const NR_INTERNAL: usize = 3 + MAGAZINES.len();

impl Internal {
    pub(super) const ALL: [Internal; NR_INTERNAL] = {
        use Internal::*;
        [Descriptors, Shelves, CpuCaches, Magazines(0), Magazines(1), Magazines(2), Magazines(3)]
    };

    pub(super) const fn index(self) -> usize {
        match self {
            Internal::Descriptors => 0,
            Internal::Shelves => 1,
            Internal::CpuCaches => 2,
            Internal::Magazines(i) => 3 + i,
        }
    }

    pub(super) const fn name(self) -> &'static str {
        match self {
            Internal::Descriptors => "kmem_cache",
            Internal::Shelves => "kmem_cache_node",
            Internal::CpuCaches => "kmem_cache_cpu",
            Internal::Magazines(0) => "kmem_magazine_6",
            Internal::Magazines(1) => "kmem_magazine_14",
            Internal::Magazines(2) => "kmem_magazine_30",
            Internal::Magazines(_) => "kmem_magazine_62",
        }
    }

    /// Bytes of an object, on a machine whose caches have so many shelves.
    pub(super) const fn size(self, shelves: usize) -> u32 {
        match self {
            Internal::Descriptors => size_of::<Descriptor>() as u32,
            Internal::Shelves => (shelves * size_of::<Shelf>()) as u32,
            Internal::CpuCaches => size_of::<CpuCache>() as u32,
            Internal::Magazines(i) => Magazine::bytes(MAGAZINES[i]),
        }
    }

    pub(super) const fn align(self) -> u32 {
        match self {
            Internal::Descriptors => align_of::<Descriptor>() as u32,
            Internal::Shelves => align_of::<Shelf>() as u32,
            Internal::CpuCaches => align_of::<CpuCache>() as u32,
            Internal::Magazines(_) => CACHE_LINE,
        }
    }
}

/// Sizes of the kmalloc caches.
pub(super) const KMALLOC_SIZES: [u32; 13] =
    [8, 16, 32, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096, 8192];

/// Kinds of kmalloc cache: ordinary, DMA, reclaimable.
pub(super) const KMALLOC_KINDS: usize = 3;

/// The kmalloc caches have numbers of their own, so that a size known at compile time is a number known at
/// compile time.
pub(super) const FIRST_KMALLOC: usize = NR_INTERNAL + 1;
pub(super) const FIRST_ORDINARY: usize = FIRST_KMALLOC + KMALLOC_KINDS * KMALLOC_SIZES.len();

/// Everything there is of one machine's caches, made at their first use.
pub(super) struct Root {
    /// By number; 0 is nobody's.
    pub(super) caches: [AtomicPtr<Descriptor>; MAX_CACHES],
    pub(super) internal: [Descriptor; NR_INTERNAL],
    /// Held by whoever creates, merges or destroys.
    pub(super) registry: IrqLock<()>,
    /// Frames of the root itself.
    pub(super) frames: AtomicU64,
}

impl Root {
    pub(super) fn internal(&'static self, which: Internal) -> &'static Descriptor {
        &self.internal[which.index()]
    }

    /// The cache with a number.
    pub(super) fn cache(&self, id: u16) -> Option<&'static Descriptor> {
        // SAFETY: null or a descriptor, which is taken off here before it goes. Acquire pairs with the Release
        // that put it there.
        unsafe { self.caches.get(usize::from(id))?.load(Acquire).as_ref() }
    }

    /// All caches, internal ones included.
    pub(super) fn all(&self) -> impl Iterator<Item = &'static Descriptor> + '_ {
        (1..MAX_CACHES as u16).filter_map(|id| self.cache(id))
    }
}
