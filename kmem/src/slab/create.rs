//! Creating, merging, shrinking and destroying caches.
//!
//! # Locking
//! The registry's lock is held while a cache gets or loses its number, is pinned or begins to die, and for
//! nothing else. A dying cache is pinned by nobody: its destroyer has waited for those who looked at it.

use super::{
    Objects, SlabFlags,
    cache::{
        CpuCache, Ctor, Descriptor, FIRST_ORDINARY, Internal, NR_INTERNAL, Root, Shelf, nr_shelves,
    },
    debug::{MARKED, flags_for},
    layout::{Areas, Layout},
    magazine::most_class,
};
use crate::{
    error::Name,
    gfp::Gfp,
    memmap::LEAVING,
    page_alloc::Reclaim,
    platform::{Level, Platform},
    sync::IrqLock,
};
use core::{
    fmt, ptr,
    sync::atomic::{
        AtomicPtr, AtomicU32,
        Ordering::{AcqRel, Acquire, Relaxed, Release},
    },
};

/// A cache: its owner's hold on it, given up by
/// [`kmem_cache_destroy`](crate::Kmem::kmem_cache_destroy). Dropping it leaves the cache in place for ever.
#[derive(Debug)]
#[must_use = "without it the cache cannot be used or destroyed"]
pub struct KmemCache(pub(super) &'static Descriptor);

impl fmt::Debug for Descriptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (size {}, align {})", self.name, self.size, self.align)
    }
}

/// A cache that the core has for itself, made at its first use.
pub(crate) struct CacheHandle(AtomicPtr<Descriptor>);

impl CacheHandle {
    pub(crate) const fn new() -> CacheHandle {
        CacheHandle(AtomicPtr::new(ptr::null_mut()))
    }

    /// The cache, once there is one.
    #[inline]
    pub(crate) fn get(&self) -> Option<KmemCache> {
        // SAFETY: null or the descriptor of a cache that nobody destroys. Acquire pairs with the AcqRel in `set`.
        unsafe { self.0.load(Acquire).as_ref() }.map(KmemCache)
    }

    /// Keeps a cache that was just made, or the one that somebody else was faster to make.
    pub(crate) fn set<P: Platform, R: Reclaim>(
        &self,
        objects: &Objects<'_, P, R>,
        made: KmemCache,
    ) -> KmemCache {
        let at = ptr::from_ref(made.0).cast_mut();
        match self.0.compare_exchange(ptr::null_mut(), at, AcqRel, Acquire) {
            Ok(_) => made,
            Err(there) => {
                // It has no objects. Where a CPU does not give its magazines up it stays, and is merely there.
                let _ = objects.destroy(made);
                // SAFETY: as in `get`.
                KmemCache(unsafe { &*there })
            }
        }
    }
}

impl KmemCache {
    /// The cache's name; of caches that were merged, the first one's.
    pub fn name(&self) -> Name {
        self.0.name
    }

    /// `kmem_cache_size`: bytes of an object, as asked for \[S1\].
    pub fn size(&self) -> usize {
        self.0.size as usize
    }

    /// Alignment of an object in bytes.
    pub fn align(&self) -> usize {
        self.0.align as usize
    }
}

/// Why a cache was not created.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CacheError {
    /// No name, one of more than 31 bytes, or one with blanks.
    Name,
    /// No bytes, or more than fit the largest slab.
    Size,
    /// Not a power of two, or more than a frame.
    Align,
    /// Flags that contradict each other.
    Flags,
    /// [`TYPESAFE_BY_RCU`](SlabFlags::TYPESAFE_BY_RCU) on a platform without grace periods.
    NoGracePeriods,
    /// There are 509 already.
    Full,
    /// No memory for it.
    NoMemory,
    /// It may sleep, and the context may not \[S7\].
    Context,
}

impl fmt::Display for CacheError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            CacheError::Name => "a cache's name is one word of at most 31 bytes",
            CacheError::Size => "no object can have that size",
            CacheError::Align => "alignment must be a power of two, at most a frame",
            CacheError::Flags => "flags contradict each other",
            CacheError::NoGracePeriods => "the platform has no grace periods",
            CacheError::Full => "too many caches",
            CacheError::NoMemory => "out of memory",
            CacheError::Context => "a cache cannot be created in atomic context",
        })
    }
}

impl core::error::Error for CacheError {}

/// Why a cache was not destroyed, and the cache.
#[derive(Debug)]
pub struct DestroyError {
    /// The cache, unharmed.
    pub cache: KmemCache,
    /// Objects that are in use; 0 if the context was the reason, or another CPU that did not give its
    /// magazines up in time.
    pub live: u64,
}

impl fmt::Display for DestroyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.live {
            0 => write!(f, "cache {} cannot be destroyed now", self.cache.name()),
            n => write!(f, "cache {} still has {n} objects in use", self.cache.name()),
        }
    }
}

impl core::error::Error for DestroyError {}

/// What a cache is to be.
pub(super) struct Wanted {
    pub(super) name: Name,
    pub(super) size: u32,
    pub(super) align: u32,
    pub(super) flags: SlabFlags,
    pub(super) ctor: Option<Ctor>,
    /// Whether less may be asked for than an object's size.
    pub(super) keeps_asked: bool,
    /// Its number, if that is fixed.
    pub(super) id: Option<usize>,
}

/// Objects beyond this size lie in no slab.
const MAX_SIZE: usize = super::kmalloc::KMALLOC_MAX_CACHE_SIZE;

/// A word: every object is aligned to it at least.
const MIN_ALIGN: u32 = 8;

/// A cache line.
const LINE: u32 = 64;

impl Wanted {
    fn new(
        name: &str,
        size: usize,
        align: usize,
        flags: SlabFlags,
        ctor: Option<Ctor>,
        page_shift: u32,
    ) -> Result<Wanted, CacheError> {
        let name = Name::new(name).ok_or(CacheError::Name)?;
        if size == 0 || size > MAX_SIZE {
            return Err(CacheError::Size);
        }
        if align > 1 << page_shift || (align != 0 && !align.is_power_of_two()) {
            return Err(CacheError::Align);
        }
        if flags.contains(SlabFlags::CACHE_DMA | SlabFlags::CACHE_DMA32) {
            return Err(CacheError::Flags);
        }
        let size = size as u32;
        let mut align = (align as u32).max(MIN_ALIGN);
        if flags.contains(SlabFlags::HWCACHE_ALIGN) {
            // As many to a line as fit evenly.
            let mut line = LINE;
            while line / 2 >= size {
                line /= 2;
            }
            align = align.max(line);
        }
        Ok(Wanted { name, size, align, flags, ctor, keeps_asked: false, id: None })
    }

    fn areas(&self) -> Areas {
        Areas::new(self.size, self.align, self.flags, self.keeps_asked)
    }

    /// Whether an existing cache will do as well.
    fn fits(&self, d: &Descriptor) -> bool {
        const MATTER: SlabFlags = SlabFlags::CACHE_DMA
            .union(SlabFlags::CACHE_DMA32)
            .union(SlabFlags::RECLAIM_ACCOUNT)
            .union(SlabFlags::SKIP_KFENCE)
            .union(SlabFlags::NO_MERGE);
        let plain = self.ctor.is_none() && d.ctor.is_none();
        plain
            && d.largest.is_some()
            && d.users.load(Relaxed) > 0
            && d.dying.load(Relaxed) == 0
            && !self.flags.contains(SlabFlags::NO_MERGE)
            && !(self.flags | d.flags).intersects(SlabFlags::DEBUG)
            && (self.flags & MATTER) == (d.flags & MATTER)
            && self.areas().stride == d.layout.stride
            && d.align.is_multiple_of(self.align)
            && d.size >= self.size
    }
}

impl<'a, P: Platform, R: Reclaim> Objects<'a, P, R> {
    /// The root, made if there is none.
    pub(super) fn make_root(&self, gfp: Gfp) -> Option<&'static Root> {
        if let Some(root) = self.root() {
            return Some(root);
        }
        let nr_nodes = self.pages.nr_nodes();
        let per_node = nr_shelves(nr_nodes, self.pages.platform().nr_cpu_ids());
        let nr_shelves = nr_nodes * per_node;
        let lists_at = size_of::<Root>().next_multiple_of(align_of::<Shelf>());
        let bytes = lists_at + NR_INTERNAL * nr_shelves * size_of::<Shelf>();
        let order = super::order_for(bytes, P::PAGE_SHIFT);
        let max_order = self.pages.max_order();
        let internal = |i: usize, shelves: &'static [Shelf]| {
            let which = Internal::ALL[i];
            let (size, align) = (which.size(nr_shelves), which.align());
            let areas = Areas::new(size, align, SlabFlags::empty(), false);
            let layout = Layout::new(areas.stride, align, 0, P::PAGE_SHIFT, max_order)?;
            Some(Descriptor {
                id: i as u16 + 1,
                owned_id: 0,
                machine: self.pages.idle_word(),
                name: Name::new(which.name())?,
                size,
                align,
                flags: SlabFlags::NO_MERGE,
                ctor: None,
                layout,
                areas,
                shelves,
                per_node,
                largest: None,
                watched: AtomicU32::new(0),
                users: AtomicU32::new(1),
                dying: AtomicU32::new(0),
                pins: AtomicU32::new(0),
                moves: AtomicU32::new(0),
                mover: IrqLock::new(None),
                retired: AtomicPtr::new(ptr::null_mut()),
            })
        };
        if (0..NR_INTERNAL).any(|i| internal(i, &[]).is_none()) {
            return None;
        }
        let at = self.own_pages(gfp, order)?;
        let shelves_of = |i: usize| -> &'static [Shelf] {
            // SAFETY: the block is ours and large enough for the root and, behind it, the shelves of each
            // internal cache, each written before it is referred to.
            unsafe {
                let first = at.as_ptr().add(lists_at).cast::<Shelf>().add(i * nr_shelves);
                (0..nr_shelves).for_each(|n| first.add(n).write(Shelf::new()));
                core::slice::from_raw_parts(first, nr_shelves)
            }
        };
        let root = at.cast::<Root>();
        // SAFETY: zeroed memory of the root's size, ours; what is not written here is atomics for which
        // zero is a value.
        unsafe {
            let this = root.as_ptr();
            (&raw mut (*this).registry).write(IrqLock::new(()));
            for i in 0..NR_INTERNAL {
                let d = (&raw mut (*this).internal).cast::<Descriptor>().add(i);
                if let Some(made) = internal(i, shelves_of(i)) {
                    d.write(made);
                }
                (*this).caches[i + 1].store(d, Relaxed);
            }
            (*this).frames.store(1 << order, Relaxed);
        }
        // Release publishes the root to the Acquire in `root`.
        let won = self.slabs.root.compare_exchange(ptr::null_mut(), root.as_ptr(), AcqRel, Acquire);
        if won.is_err() {
            self.free_own_pages(at, order);
        }
        self.root()
    }

    /// `kmem_cache_create`.
    pub(crate) fn create(
        &self,
        name: &str,
        size: usize,
        align: usize,
        flags: SlabFlags,
        ctor: Option<Ctor>,
    ) -> Result<KmemCache, CacheError> {
        let made = Wanted::new(name, size, align, flags, ctor, P::PAGE_SHIFT)
            .map(|wanted| self.as_patterned(wanted))
            .and_then(|wanted| self.create_wanted(&wanted));
        if let Err(e) = made {
            self.pages
                .platform()
                .report(Level::Warning, format_args!("kmem_cache_create({name}) failed: {e}"));
            if flags.contains(SlabFlags::PANIC) {
                panic!("kmem_cache_create({name}) failed: {e}");
            }
        }
        made.map(KmemCache)
    }

    /// With the flags that the machine's pattern adds.
    pub(super) fn as_patterned(&self, mut wanted: Wanted) -> Wanted {
        if let Some(pattern) = self.slabs.pattern {
            wanted.flags |= flags_for(pattern, wanted.name.as_str());
        }
        if wanted.flags.contains(SlabFlags::TYPESAFE_BY_RCU) {
            // Readers may look at what is free; nobody may change it.
            wanted.flags -= SlabFlags::POISON;
            wanted.flags |= SlabFlags::NO_MERGE | SlabFlags::SKIP_KFENCE;
        }
        wanted
    }

    fn create_wanted(&self, wanted: &Wanted) -> Result<&'static Descriptor, CacheError> {
        let gfp = Gfp::KERNEL;
        // Before interrupts are on nothing sleeps.
        if self.pages.allowed(gfp).may_block() && !self.pages.context().may_sleep() {
            return Err(CacheError::Context);
        }
        if wanted.flags.contains(SlabFlags::TYPESAFE_BY_RCU)
            && self.pages.platform().rcu_start().is_none()
        {
            return Err(CacheError::NoGracePeriods);
        }
        let root = self.make_root(gfp).ok_or(CacheError::NoMemory)?;
        match self.merge(root, wanted) {
            Some(d) => Ok(d),
            None => self.make_cache(root, wanted, gfp),
        }
    }

    /// Makes a cache and gives it a number. Any context that `gfp` is for.
    pub(super) fn make_cache(
        &self,
        root: &'static Root,
        wanted: &Wanted,
        gfp: Gfp,
    ) -> Result<&'static Descriptor, CacheError> {
        let max_order = self.pages.max_order();
        let areas = wanted.areas();
        let (stride, lead) = (areas.stride, areas.lead);
        let layout = Layout::new(stride, wanted.align, lead, P::PAGE_SHIFT, max_order)
            .ok_or(CacheError::Size)?;
        if wanted.flags.intersects(MARKED) {
            self.make_sites(root, gfp).ok_or(CacheError::NoMemory)?;
        }
        let memory = |which| self.internal(root, which, gfp).map_err(|_| CacheError::NoMemory);
        let shelves = memory(Internal::Shelves)?;
        let Ok(at) = memory(Internal::Descriptors) else {
            self.internal_free(root, Internal::Shelves, shelves);
            return Err(CacheError::NoMemory);
        };
        // As many as internal caches have.
        let internal = root.internal(Internal::Shelves);
        let (nr_shelves, per_node) = (internal.shelves.len(), internal.per_node);
        let first = shelves.cast::<Shelf>();
        // SAFETY: an object of the size of so many shelves, aligned like one, just given to us.
        let lists: &'static [Shelf] = unsafe {
            (0..nr_shelves).for_each(|n| first.add(n).write(Shelf::new()));
            core::slice::from_raw_parts(first, nr_shelves)
        };
        let d = at.cast::<Descriptor>();
        let registered = {
            let _registry = root.registry.lock(self.pages.platform());
            let free = |id: &usize| root.caches[*id].load(Relaxed).is_null();
            let id = match wanted.id {
                Some(id) => Some(id).filter(free),
                None => (FIRST_ORDINARY..usize::from(LEAVING)).find(free),
            };
            if let Some(id) = id {
                let owned_id = if self.pages.nr_nodes() > 1 { 0 } else { id as u16 };
                // SAFETY: an object of the size of a descriptor, just given to us.
                unsafe {
                    d.write(Descriptor {
                        id: id as u16,
                        owned_id,
                        machine: self.pages.idle_word(),
                        name: wanted.name,
                        size: wanted.size,
                        align: wanted.align,
                        flags: wanted.flags,
                        ctor: wanted.ctor,
                        layout,
                        areas,
                        shelves: lists,
                        per_node,
                        largest: Some(most_class(stride)),
                        watched: AtomicU32::new((wanted.flags & SlabFlags::DEBUG).bits()),
                        users: AtomicU32::new(1),
                        dying: AtomicU32::new(0),
                        pins: AtomicU32::new(0),
                        moves: AtomicU32::new(0),
                        mover: IrqLock::new(None),
                        retired: AtomicPtr::new(ptr::null_mut()),
                    });
                }
                // Release: whoever finds it sees it whole.
                root.caches[id].store(d, Release);
            }
            id
        };
        if registered.is_none() {
            self.internal_free(root, Internal::Descriptors, at);
            self.internal_free(root, Internal::Shelves, shelves);
            return Err(CacheError::Full);
        }
        // SAFETY: written above.
        Ok(unsafe { &*d })
    }

    fn merge(&self, root: &'static Root, wanted: &Wanted) -> Option<&'static Descriptor> {
        let _registry = root.registry.lock(self.pages.platform());
        let d = root.all().find(|d| wanted.fits(d))?;
        d.users.fetch_add(1, Relaxed);
        Some(d)
    }

    /// `kmem_cache_shrink`: returns the frames given back.
    pub(crate) fn shrink_cache(&self, cache: &KmemCache) -> u64 {
        let d = cache.0;
        let Some(root) = self.own_root(d).filter(|_| !self.pages.context().in_nmi()) else {
            return 0;
        };
        let before = self.released(d);
        self.flush_all();
        (0..d.shelves.len()).for_each(|shelf| self.trim(root, d, shelf));
        self.pack(d);
        self.released(d) - before
    }

    /// Gives back what magazines, depots and empty slabs of all caches hold; returns the frames.
    pub(crate) fn drop_slab(&self) -> u64 {
        if self.pages.context().in_nmi() {
            return 0;
        }
        let all = || {
            let mut frames = 0;
            self.each(|_, d| frames += self.released(d));
            frames
        };
        let before = all();
        self.flush_all();
        // Once more for what the first pass freed of the layer's own.
        for _ in 0..2 {
            (0..self.pages.nr_nodes()).for_each(|node| self.trim_all(node));
        }
        // A cache that was destroyed meanwhile takes its count along.
        all().saturating_sub(before)
    }

    /// Frames of slabs that a cache ever gave back.
    pub(super) fn released(&self, d: &Descriptor) -> u64 {
        let lock = |shelf: &Shelf| shelf.lists.lock(self.pages.platform()).released;
        d.shelves.iter().map(lock).sum::<u64>() << d.layout.order
    }

    /// `kmem_cache_destroy`.
    pub(crate) fn destroy(&self, cache: KmemCache) -> Result<(), DestroyError> {
        let d = cache.0;
        let Some(root) = self.own_root(d).filter(|_| self.pages.context().may_sleep()) else {
            return Err(DestroyError { cache, live: 0 });
        };
        let p = self.pages.platform();
        {
            let _registry = root.registry.lock(p);
            if d.users.load(Relaxed) > 1 {
                d.users.fetch_sub(1, Relaxed);
                return Ok(());
            }
            // From here on nobody merges with it.
            d.dying.store(1, Release);
        }
        // Nobody pins it from here on either: what reports and reclaim look at stays while they do.
        // Acquire pairs with the Release of those who looked at it.
        while d.pins.load(Acquire) > 0 {
            p.relax();
        }
        let answered = self.flush_all();
        self.free_retired(root, d);
        (0..d.shelves.len()).for_each(|shelf| self.trim(root, d, shelf));
        self.end_quarantine(d);
        let slabs = || {
            d.shelves.iter().map(|shelf| {
                let lists = shelf.lists.lock(p);
                lists.all().map(|list| u64::from(list.nr)).sum::<u64>()
            })
        };
        if !answered || slabs().sum::<u64>() > 0 || self.sampled_of(d) > 0 {
            d.dying.store(0, Release);
            let live = self.list_live(d);
            return Err(DestroyError { cache, live });
        }
        self.unmake_cache(root, d);
        Ok(())
    }

    /// Takes a cache without slabs its number, and its memory.
    pub(super) fn unmake_cache(&self, root: &'static Root, d: &'static Descriptor) {
        let p = self.pages.platform();
        {
            let _registry = root.registry.lock(p);
            root.caches[usize::from(d.id)].store(ptr::null_mut(), Relaxed);
        }
        let shelves = d.shelves.as_ptr().cast_mut().cast();
        self.internal_free(root, Internal::Shelves, shelves);
        self.internal_free(root, Internal::Descriptors, ptr::from_ref(d).cast_mut().cast());
    }

    /// The root, if the cache is one of its.
    pub(super) fn own_root(&self, d: &'static Descriptor) -> Option<&'static Root> {
        self.root().filter(|r| r.cache(d.id).is_some_and(|own| ptr::eq(own, d)))
    }

    /// What a cache holds.
    pub(crate) fn cache_info(&self, cache: &KmemCache) -> super::CacheInfo {
        self.info_of(cache.0)
    }

    /// Frees what CPUs gave up of a dying cache.
    fn free_retired(&self, root: &'static Root, d: &'static Descriptor) {
        // Acquire pairs with the Release of the CPU that retired it.
        let mut next = d.retired.swap(ptr::null_mut(), AcqRel);
        // SAFETY: a CPU's, which took it off its table before it put it here.
        while let Some(cc) = unsafe { next.as_ref::<'static>() } {
            let at = next;
            next = cc.next.load(Relaxed);
            self.free_magazine(root, cc.loaded());
            self.free_magazine(root, cc.previous());
            self.internal_free(root, Internal::CpuCaches, at.cast::<CpuCache>().cast());
        }
    }
}
