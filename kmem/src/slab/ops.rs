//! Allocating and freeing objects.
//!
//! # Implementation
//! The fast paths take an object from, or put one in, the CPU's loaded magazine. Where that is empty (or full)
//! the same is tried again out of line, with magazines exchanged, filled or flushed on the way: a CPU that has
//! magazines of a cache has nothing unusual to look for. Whatever is not plain (no magazine, no object in the
//! node's slabs, lists owned beneath, a caller on no CPU) goes to the slow paths, and so does every address that
//! is not the beginning of a live object.
//!
//! # Locking
//! Ownership of the CPU's lists; a shelf's lock off the fast paths.

use super::{
    KmemCache, Objects,
    cache::{CpuCache, Descriptor, Root},
    cpu::Need,
    magazine::Object,
    node::{Slab, Whose, colour_back, number},
    state,
};
use crate::{
    context::Path,
    error::{AllocError, Answer, Misuse},
    gfp::{Gfp, GfpError},
    page_alloc::Reclaim,
    platform::Platform,
};
use core::{
    panic::Location,
    ptr::{self, NonNull},
    sync::atomic::Ordering::Relaxed,
};

/// Flags of a request that say where its memory comes from, which is the cache's to say.
const ZONES: Gfp =
    Gfp::DMA_ZONE.union(Gfp::DMA32).union(Gfp::HIGHMEM).union(Gfp::MOVABLE).union(Gfp::RECLAIMABLE);

impl<'a, P: Platform, R: Reclaim> Objects<'a, P, R> {
    #[inline(never)]
    pub(super) fn zero(&self, d: &Descriptor, at: NonNull<u8>) {
        // SAFETY: the object has `size` bytes and was just given to the caller.
        unsafe { at.write_bytes(0, d.size as usize) };
    }

    /// Takes an object off the CPU's loaded magazine of a cache, if there is nothing unusual about the request
    /// and its caller, and the cache `is_right`. With `WARM` an empty one is filled.
    #[inline(always)]
    pub(super) fn take_hot<const WARM: bool>(
        self,
        id: u16,
        gfp: Gfp,
        is_right: impl FnOnce() -> bool,
    ) -> Option<Object> {
        if gfp.intersects(ZONES) {
            return None;
        }
        let p = self.pages.platform();
        let cpu = p.get_cpu_fast()?;
        let mut taken = None;
        if let Some(idle) = self.pages.idle(cpu, gfp.may_block()) {
            // From here on no interrupt exchanges the magazine.
            let (path, process) =
                if WARM { (Path::ObjRefill, false) } else { (Path::ObjAlloc, gfp.may_block()) };
            let owned = self.pages.own_idle(idle, path, process);
            let held = owned.held();
            if is_right()
                && let Some(object) = held
                    .loaded(id)
                    .pop()
                    .or_else(|| if WARM { self.pop_warm(held, id) } else { None })
            {
                object.state.set(state::LIVE);
                taken = Some(object);
            }
            self.pages.disown_idle(owned);
            if WARM {
                self.pages.do_deferred(cpu);
            }
        }
        p.put_cpu(cpu);
        taken
    }

    /// `kmem_cache_alloc`.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn alloc_from(self, cache: &KmemCache, gfp: Gfp) -> Result<NonNull<u8>, AllocError> {
        let d = cache.0;
        let Some(object) = self.take_hot::<false>(d.id, gfp, || self.is_own(d)) else {
            return self.alloc_warm(d, gfp).result();
        };
        if gfp.contains(Gfp::ZERO) {
            self.zero(d, object.at);
        }
        Ok(object.at)
    }

    /// As `alloc_from`, for the owner of a cache of this machine, who frees by
    /// [`free_owned`](Self::free_owned).
    #[inline(always)]
    #[track_caller]
    pub(crate) fn alloc_owned(self, cache: &KmemCache, gfp: Gfp) -> Result<Object, AllocError> {
        let d = cache.0;
        let Some(object) = self.take_hot::<false>(d.id, gfp, || true) else {
            return self.alloc_owned_warm(d, gfp);
        };
        if gfp.contains(Gfp::ZERO) {
            self.zero(d, object.at);
        }
        Ok(object)
    }

    /// Whether a cache is one of this machine's.
    #[inline(always)]
    fn is_own(&self, d: &Descriptor) -> bool {
        d.machine == self.pages.idle_word()
    }

    /// `kmem_cache_alloc_node`.
    #[track_caller]
    pub(crate) fn alloc_from_node(
        &self,
        cache: &KmemCache,
        gfp: Gfp,
        node: i32,
    ) -> Result<NonNull<u8>, AllocError> {
        match usize::try_from(node) {
            Ok(node) => self.alloc_node(cache.0, gfp, node),
            Err(_) => self.alloc_from(cache, gfp),
        }
    }

    #[track_caller]
    pub(super) fn alloc_node(
        &self,
        d: &'static Descriptor,
        gfp: Gfp,
        node: usize,
    ) -> Result<NonNull<u8>, AllocError> {
        let object = self.alloc_cold(d, gfp, Some(node))?;
        if gfp.contains(Gfp::ZERO) {
            self.zero(d, object.at);
        }
        Ok(object.at)
    }

    /// `kmem_cache_alloc_bulk`.
    #[track_caller]
    pub(crate) fn alloc_bulk(
        &self,
        cache: &KmemCache,
        gfp: Gfp,
        objects: &mut [NonNull<u8>],
    ) -> Result<(), AllocError> {
        for i in 0..objects.len() {
            match self.alloc_from(cache, gfp) {
                Ok(at) => objects[i] = at,
                Err(e) => {
                    for at in &objects[..i] {
                        // It was allocated just now.
                        let _ = self.free(at.as_ptr(), Some(cache.0));
                    }
                    return Err(e);
                }
            }
        }
        Ok(())
    }

    /// `kmem_cache_free`.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn free_to(self, cache: &KmemCache, at: NonNull<u8>) -> Result<(), Misuse> {
        self.free(at.as_ptr(), Some(cache.0))
    }

    /// The end of a `kmem_cache_alloc` that found the loaded magazine empty, zeroed if that is asked for.
    #[cold]
    #[inline(never)]
    #[track_caller]
    fn alloc_warm(self, d: &'static Descriptor, gfp: Gfp) -> Answer {
        self.alloc_owned_warm(d, gfp).map(|object| object.at).into()
    }

    #[cold]
    #[inline(never)]
    #[track_caller]
    fn alloc_owned_warm(self, d: &'static Descriptor, gfp: Gfp) -> Result<Object, AllocError> {
        let object = match self.take_hot::<true>(d.id, gfp, || self.is_own(d)) {
            Some(object) => object,
            None => self.alloc_cold(d, gfp, None)?,
        };
        if gfp.contains(Gfp::ZERO) {
            self.zero(d, object.at);
        }
        Ok(object)
    }

    /// The end of a `kmem_cache_alloc` that the fast paths do not serve.
    #[cold]
    #[inline(never)]
    #[track_caller]
    fn alloc_cold(
        self,
        d: &'static Descriptor,
        gfp: Gfp,
        node: Option<usize>,
    ) -> Result<Object, AllocError> {
        let got = self.alloc_slow(d, gfp, node, d.size);
        if self.tracing() {
            self.trace_cache_alloc(d, gfp, node, got.as_ref().map(|o| o.at).map_err(|e| *e));
        }
        got
    }

    /// An object of which `size` bytes are asked for.
    #[cold]
    #[inline(never)]
    #[track_caller]
    pub(super) fn alloc_slow(
        self,
        d: &'static Descriptor,
        gfp: Gfp,
        node: Option<usize>,
        size: u32,
    ) -> Result<Object, AllocError> {
        let gfp = self.pages.allowed(gfp);
        let asked = gfp - ZONES;
        self.pages.check_context(gfp)?;
        if gfp.contains(Gfp::HIGHMEM) {
            return Err(self.pages.refuse(gfp, 0, GfpError::HighMemNeedsPage));
        }
        let Some(root) = self.own_root(d) else {
            return Err(self.pages.refuse(gfp, 0, GfpError::ForeignCache));
        };
        if node.is_some_and(|n| n >= self.pages.nr_nodes()) {
            return Err(self.pages.refuse(gfp, 0, GfpError::NoSuchNode));
        }
        if self.fails(gfp, Location::caller()) {
            return Err(AllocError::NoMemory);
        }
        // Also while there are no samples: the CPU may have been asked for one before.
        if self.slabs.kfence.pool().is_some()
            && let Some(object) = self.sample(d, gfp, node, size)
        {
            return Ok(object);
        }
        loop {
            let (found, whose) = match node {
                Some(n) if n != self.here() => (None, Whose::Few),
                _ => self.take_refilled(root, d),
            };
            if let Some(object) = found {
                return Ok(object);
            }
            match self.alloc_locked(d, asked, node, whose) {
                // One that turns out to be damaged is not given out.
                Ok(object) if self.bare(d) => {
                    if self.outgoing(d, &object) {
                        return Ok(object);
                    }
                }
                Ok(object) => return Ok(object),
                Err(AllocError::NoMemory) if gfp.contains(Gfp::NOFAIL) && gfp.may_block() => {
                    self.pages.platform().relax();
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// An object by way of the CPU's magazines, if they can be filled, and whose slabs the CPU takes from. What the CPU
    /// lacks for the cache is made if there is memory to spare: nobody reclaims for that or takes from the reserves.
    fn take_refilled(
        &self,
        root: &'static Root,
        d: &'static Descriptor,
    ) -> (Option<Object>, Whose) {
        let (object, whose, need) = self.try_refilled(d);
        match need {
            Need::Nothing => (object, whose),
            Need::Tuning(tuning) => {
                self.retune(root, d, &tuning, Gfp::NOWAIT);
                (object, whose)
            }
            Need::Magazines => {
                if self.equip(root, d, Gfp::NOWAIT) {
                    (self.try_refilled(d).0, whose)
                } else {
                    (None, whose)
                }
            }
        }
    }

    fn try_refilled(&self, d: &'static Descriptor) -> (Option<Object>, Whose, Need) {
        let p = self.pages.platform();
        let mut got = (None, Whose::Few, Need::Nothing);
        let Some(cpu) = p.get_cpu() else { return got };
        if let Some(owned) = self.pages.own(cpu, Path::ObjAlloc) {
            // Before the magazines are filled, which takes up what a free left word of.
            let need = self.need(cpu, d);
            let whose = self.cpu_cache(cpu, d.id).map_or(Whose::Few, CpuCache::whose);
            let object = self.pop_refilled(owned.held(), d);
            if let Some(object) = &object {
                object.state.set(state::LIVE);
            }
            got = (object, whose, need);
            self.pages.disown(owned);
        }
        p.put_cpu(cpu);
        got
    }

    /// Frees the object at an address, to `cache` if the caller named one.
    #[inline(always)]
    #[track_caller]
    pub(super) fn free(self, at: *mut u8, cache: Option<&Descriptor>) -> Result<(), Misuse> {
        if self.put_hot::<false>(at, cache, true) { Ok(()) } else { self.free_warm(at, cache) }
    }

    /// The fast path for callers in atomic context, and for those who find the loaded magazine full.
    #[cold]
    #[inline(never)]
    #[track_caller]
    fn free_warm(self, at: *mut u8, cache: Option<&Descriptor>) -> Result<(), Misuse> {
        if self.put_hot::<true>(at, cache, false) { Ok(()) } else { self.free_slow(at, cache) }
    }

    /// Frees an object whose only owner the caller is.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn free_owned(self, cache: &KmemCache, object: Object) -> Result<(), Misuse> {
        let p = self.pages.platform();
        if let Some(cpu) = p.get_cpu_fast() {
            let mut done = false;
            if let Some(idle) = self.pages.idle(cpu, true) {
                let owned = self.pages.own_idle(idle, Path::ObjFree, true);
                // Nobody else frees it, so a look is enough; that somebody did is found out all the same.
                if let Some(room) = owned.held().loaded(cache.0.owned_id).room()
                    && object.state.get() == state::LIVE
                {
                    object.state.set(state::CACHED);
                    room.put(object.at.as_ptr(), object.state);
                    done = true;
                }
                self.pages.disown_idle(owned);
            }
            p.put_cpu(cpu);
            if done {
                return Ok(());
            }
        }
        self.free_warm(object.at.as_ptr(), Some(cache.0))
    }

    /// Frees a plain object to the CPU's magazine; `false`, and nothing changed, if it is not plain, there
    /// is no place or, with `process`, the caller is in atomic context. With `WARM` place is made in a full one.
    #[inline(always)]
    fn put_hot<const WARM: bool>(
        self,
        at: *mut u8,
        cache: Option<&Descriptor>,
        process: bool,
    ) -> bool {
        let p = self.pages.platform();
        let Some(cpu) = p.get_cpu_fast() else { return false };
        let mut done = false;
        let map = self.pages.map();
        let offset = map.direct_offset(at.addr());
        if let Some(idle) = self.pages.idle(cpu, process)
            && let Some(owner) = map.owner_cell(offset, P::PAGE_SHIFT)
        {
            // From here on no interrupt exchanges the magazine.
            let path = if WARM { Path::ObjFlush } else { Path::ObjFree };
            let owned = self.pages.own_idle(idle, path, process);
            let held = owned.held();
            let of = owner.load(Relaxed);
            let id = number(of);
            let m = held.loaded(id);
            if cache.is_none_or(|d| d.id == id && self.is_own(d))
                && let Some(state) = m.state_at(offset, colour_back(of))
                && let Some(room) =
                    m.room().or_else(|| if WARM { self.room_flushed(held, id) } else { None })
                && state.free()
            {
                done = owner.load(Relaxed) == of;
                if done {
                    room.put(at, state);
                } else {
                    // Freed twice, and its slab went meanwhile: that byte was somebody else's.
                    state.set(state::LIVE);
                }
            }
            self.pages.disown_idle(owned);
            if WARM {
                self.pages.do_deferred(cpu);
            }
        }
        p.put_cpu(cpu);
        done
    }

    #[inline(never)]
    #[track_caller]
    fn free_slow(self, at: *mut u8, cache: Option<&Descriptor>) -> Result<(), Misuse> {
        if self.pages.context().in_nmi() {
            return Err(self.pages.misuse(Misuse::InNmi));
        }
        let addr = at.addr();
        let map = self.pages.map();
        let offset = map.direct_offset(addr);
        let owner = map.owner_at(offset, P::PAGE_SHIFT);
        let found = self.root().and_then(|root| root.cache(number(owner)));
        let (Some(d), Some(pfn)) = (found, map.owned_frame(offset, P::PAGE_SHIFT)) else {
            if self.is_sampled(owner) {
                return self.free_sampled(at, cache, false);
            }
            return match cache {
                Some(_) => Err(self.pages.misuse(Misuse::NotAnObject { addr })),
                None => self.free_large(at),
            };
        };
        if let Some(given) = cache.filter(|given| !ptr::eq(*given, d)) {
            let what = Misuse::WrongCache { addr, given: given.name, actual: d.name };
            let object = NonNull::new(at).and_then(|at| self.object_at(d, pfn, at));
            return Err(match object {
                Some((_, object)) => self.object_misuse(d, &object, what),
                None => self.pages.misuse(what),
            });
        }
        if d.largest.is_none() {
            return Err(self.pages.misuse(Misuse::NotAnObject { addr }));
        }
        let found = NonNull::new(at).and_then(|at| self.object_at(d, pfn, at));
        let Some((slab, object)) = found else {
            return Err(self.pages.misuse(Misuse::InsideObject { addr, cache: d.name }));
        };
        let live = object.state.free().then_some(state::LIVE);
        let was = live.or_else(|| object.state.end(state::CACHED));
        if let Some(was) = was {
            if map.owner_at(offset, P::PAGE_SHIFT) == owner {
                self.trace_free(addr, Some(d.name), d.layout.stride as usize, cache.is_some());
                self.forget_notes(addr, was);
                return self.put_slow(d, &slab, object);
            }
            // Freed twice, and its slab went meanwhile: that byte was somebody else's.
            object.state.set(was);
        } else if object.state.exchange(state::MOVING, state::GONE) {
            // Who moves it puts it back.
            self.trace_free(addr, Some(d.name), d.layout.stride as usize, cache.is_some());
            return Ok(());
        }
        Err(self.object_misuse(d, &object, Misuse::ObjectFree { addr, cache: d.name }))
    }

    /// Puts an object that was just freed in a magazine, or else in its slab.
    #[track_caller]
    pub(super) fn put_slow(
        &self,
        d: &'static Descriptor,
        slab: &Slab,
        object: Object,
    ) -> Result<(), Misuse> {
        let p = self.pages.platform();
        if let Some(cpu) = p.get_cpu() {
            let local = self.node_of(slab.head) == cpu.node();
            let mut put = false;
            if local && let Some(owned) = self.pages.own(cpu, Path::ObjFree) {
                put = self.push_flushed(owned.held(), d, object);
                self.pages.disown(owned);
            }
            p.put_cpu(cpu);
            if put {
                return Ok(());
            }
        }
        if self.bare(d) {
            self.incoming(d, &object)?;
        }
        self.give_home(d, slab, object);
        Ok(())
    }

    /// The cache and object at an address, for `ksize` and its like; `None` where no live object begins.
    pub(super) fn live_at(&self, at: *mut u8) -> Option<(&'static Descriptor, Object)> {
        self.in_slab(at).filter(|(_, object)| {
            let state = object.state.get();
            state::in_use(state) || state == state::MOVING
        })
    }

    /// The cache and object at an address, in whatever state; `None` where none begins.
    pub(super) fn in_slab(&self, at: *mut u8) -> Option<(&'static Descriptor, Object)> {
        let map = self.pages.map();
        let offset = map.direct_offset(at.addr());
        let owner = map.owner_at(offset, P::PAGE_SHIFT);
        let d = self.root()?.cache(number(owner))?;
        // The layer's own objects are not for others to know of.
        d.largest?;
        let pfn = map.owned_frame(offset, P::PAGE_SHIFT)?;
        let (_, object) = self.object_at(d, pfn, NonNull::new(at)?)?;
        Some((d, object))
    }
}
