//! A CPU's magazines: what happens when the loaded one is empty or full.
//!
//! # Implementation
//! Loaded and previous magazine are one stack, of which the fast paths see the upper part: what was freed last is given
//! out first.
//!
//! Empty: the previous one if it has objects, else a full one from the depot, else the loaded one is filled from the
//! slabs of the CPU's shelf; what other shelves have is had when its own is bare. Full: the older half goes to the previous
//! one, or as much as that has room for. (Exchanged for an empty one it would be exchanged again and again by traffic that
//! swings around there; with half of it both ends are far.) If that is full as well, it is exchanged for an empty one from
//! the depot, where the CPU is busy with the cache, else all of it goes back to the slabs: a free never asks for memory.
//! Magazines are made on the way of an allocation, when the caller owns nothing.
//!
//! *Size.* A CPU whose exchanges go back and forth has traffic that swings wider than its magazines; after many such
//! swings it is busy, and asks for the next size.
//!
//! # Locking
//! Ownership of the CPU's lists, then a shelf's lock.

use super::{
    Objects,
    cache::{CpuCache, Descriptor, Internal, Lists, MAX_CACHES, NONE, Root, SWINGS},
    magazine::{MAGAZINES, Magazine, Object, Room, first_class},
    node::Whose,
    state,
};
use crate::{
    context::{Cpu, DEFER_OBJECTS, DEFER_OBJECTS_BUSY, Held, Path},
    gfp::Gfp,
    page_alloc::Reclaim,
    platform::Platform,
};
use core::{
    ptr,
    sync::atomic::{
        AtomicPtr, AtomicU32, AtomicUsize,
        Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst},
        fence,
    },
};

/// Magazines that are made for a depot, full and empty ones, for CPUs that are busy with the cache. For others there are
/// none: with a few for all the layer held more pages than Linux on the recorded traces.
const DEPOT: u32 = 4;

/// Slabs that became empty in one flush, kept in mind until the lock is let go.
const EMPTIED: usize = 16;

/// What a CPU lacks for a cache.
pub(super) enum Need {
    Nothing,
    Magazines,
    Tuning(Tuning),
}

/// What a CPU's traffic in a cache asks for.
pub(super) struct Tuning {
    cpu: usize,
    node: usize,
    /// Of its magazines.
    class: usize,
    /// Its previous magazine is smaller than that.
    small: bool,
    /// A free of a busy CPU found no empty magazine in the depot.
    flushed: bool,
    /// It is to have larger ones.
    grows: bool,
}

impl Need {
    /// Of a CPU that has magazines of the cache, and whose lists the caller owns.
    #[inline]
    fn of(cpu: &Cpu, cc: &CpuCache) -> Need {
        let class = cc.class.load(Relaxed) as usize % MAGAZINES.len();
        let small = cc.previous().class() < class;
        let flushed = cc.flushed.load(Relaxed) != 0 && cc.busy();
        let larger = || cc.cache.largest.is_some_and(|most| class < most);
        let grows = cc.swings.load(Relaxed) >= SWINGS && larger();
        if !(small || flushed || grows) {
            return Need::Nothing;
        }
        Need::Tuning(Tuning { cpu: cpu.id(), node: cpu.node(), class, small, flushed, grows })
    }
}

impl<'a, P: Platform, R: Reclaim> Objects<'a, P, R> {
    /// Gives every CPU a table that has nothing, at bring-up.
    pub(crate) fn attach_cpus(&self) {
        let p = self.pages.platform();
        for cpu in (0..p.nr_cpu_ids()).filter_map(|id| p.cpu(id)) {
            cpu.set_equipped(false);
            // SAFETY: the machine has just claimed the CPU, and is nobody's yet: nothing that runs there gets to here.
            let held = unsafe { Held::new(cpu) };
            for id in 0..MAX_CACHES as u16 {
                held.loaded(id).strip();
                // Only what another machine has left: a fresh page stays untouched.
                if !cpu.side(id).load(Relaxed).is_null() {
                    cpu.side(id).store(ptr::null_mut(), Relaxed);
                }
            }
        }
    }

    /// The CPU's side of a cache; `None` if it has none.
    #[inline]
    pub(super) fn cpu_cache(&self, cpu: &Cpu, id: u16) -> Option<&'static CpuCache> {
        // SAFETY: null or the CPU's, which takes it off before it goes. Acquire pairs with the Release in `install`.
        unsafe { cpu.side(id).load(Acquire).cast::<CpuCache>().as_ref() }
    }

    /// Makes magazines for a cache on the caller's CPU, and says whether that has them now. Nothing happens when
    /// there is no memory for that: the cache works without.
    #[cold]
    #[inline(never)]
    pub(super) fn equip(&self, root: &'static Root, d: &'static Descriptor, gfp: Gfp) -> bool {
        if d.largest.is_none() || self.bare(d) {
            return false;
        }
        let p = self.pages.platform();
        let Some(id) = p.this_cpu().map(Cpu::id) else { return false };
        if let Some(cc) = Self::take_retired(d) {
            let installed = self.install(id, cc);
            if !installed {
                Self::retire(d, cc);
            }
            return installed;
        }
        let class = first_class(d.layout.stride);
        let Ok(at) = self.internal(root, Internal::CpuCaches, gfp) else { return false };
        let loaded = self.make_magazine(root, d, class, gfp);
        let previous = self.make_magazine(root, d, class, gfp);
        let (Some(loaded), Some(previous)) = (loaded, previous) else {
            [loaded, previous].into_iter().flatten().for_each(|m| self.free_magazine(root, m));
            self.internal_free(root, Internal::CpuCaches, at);
            return false;
        };
        let at = at.cast::<CpuCache>();
        // SAFETY: an object of the size and alignment of a CpuCache, just given to us.
        let cc: &'static CpuCache = unsafe {
            at.write(CpuCache {
                cache: d,
                previous: AtomicPtr::new(previous.place()),
                loaded: AtomicPtr::new(loaded.place()),
                first_place: AtomicUsize::new(loaded.first()),
                first: class as u32,
                class: AtomicU32::new(class as u32),
                flushed: AtomicU32::new(0),
                swings: AtomicU32::new(0),
                next: AtomicPtr::new(ptr::null_mut()),
            });
            &*at
        };
        let installed = self.install(id, cc);
        if !installed {
            self.free_magazine(root, loaded);
            self.free_magazine(root, previous);
            self.internal_free(root, Internal::CpuCaches, at.cast());
        }
        installed
    }

    /// Makes magazines those of the caller's CPU, if that is still `id` and has none.
    fn install(&self, id: usize, cc: &'static CpuCache) -> bool {
        let p = self.pages.platform();
        let d = cc.cache;
        let mut installed = false;
        // The caller may have moved, or an interrupt been here before.
        if let Some(cpu) = p.get_cpu() {
            cpu.set_equipped(true);
            // Pairs with the fence in `flush_all`: whoever switches magazines off either finds the CPU equipped, and
            // asks it, or is seen here.
            fence(SeqCst);
            if cpu.id() == id
                && d.dying.load(Relaxed) == 0
                && !self.bare(d)
                && let Some(owned) = self.pages.own(cpu, Path::ObjRefill)
            {
                if self.cpu_cache(cpu, d.id).is_none() {
                    let several_nodes = self.pages.nr_nodes() > 1;
                    let loaded = owned.held().loaded(d.id);
                    loaded.equip(cc.loaded(), &d.layout, self.pages.map(), several_nodes);
                    // Release: reports from other CPUs see the CPU's side whole.
                    cpu.side(d.id).store(ptr::from_ref(cc).cast_mut().cast(), Release);
                    installed = true;
                }
                self.pages.disown(owned);
            }
            p.put_cpu(cpu);
        }
        installed
    }

    /// Leaves what a CPU gave up to whoever destroys the cache, or to the next CPU that equips itself: it is
    /// not freed before, since others may be looking at it.
    fn retire(d: &Descriptor, cc: &'static CpuCache) {
        let at = ptr::from_ref(cc).cast_mut();
        // Release pairs with the Acquire of the destroyer, who frees it, or of the CPU that takes it.
        let _ = d.retired.fetch_update(AcqRel, Acquire, |first| {
            cc.next.store(first, Relaxed);
            Some(at)
        });
    }

    fn take_retired(d: &Descriptor) -> Option<&'static CpuCache> {
        if d.retired.load(Relaxed).is_null() {
            return None;
        }
        // All of them, since of one alone the next might change meanwhile.
        // SAFETY: null, or what a CPU gave up, which is freed by the destroyer only.
        let first = unsafe { d.retired.swap(ptr::null_mut(), AcqRel).as_ref::<'static>() }?;
        let mut next = first.next.load(Relaxed);
        // SAFETY: as above.
        while let Some(cc) = unsafe { next.as_ref::<'static>() } {
            next = cc.next.load(Relaxed);
            Self::retire(d, cc);
        }
        Some(first)
    }

    pub(super) fn make_magazine(
        &self,
        root: &'static Root,
        d: &'static Descriptor,
        class: usize,
        gfp: Gfp,
    ) -> Option<&'static Magazine> {
        let at = self.internal(root, Internal::Magazines(class), gfp).ok()?;
        // SAFETY: an object of the size of such a magazine, aligned to a cache line, just given to us.
        Some(unsafe { Magazine::init(at, class, d.layout.stride) })
    }

    /// Frees a magazine; its objects, if it has any, are lost sight of.
    pub(super) fn free_magazine(&self, root: &'static Root, m: &'static Magazine) {
        self.internal_free(root, Internal::Magazines(m.class()), m.memory());
    }

    /// Takes an object by way of the CPU's magazines, if they or the shelves that the CPU takes from have any.
    pub(super) fn pop_refilled(&self, held: Held<'_>, d: &'static Descriptor) -> Option<Object> {
        if let Some(object) = held.loaded(d.id).pop() {
            return Some(object);
        }
        let _ = held.cpu.set_path(Path::ObjRefill);
        let cc = self.cpu_cache(held.cpu, d.id)?;
        self.pop_previous(held, cc).or_else(|| self.refill(held, cc))
    }

    /// As [`pop_refilled`](Self::pop_refilled), where the loaded magazine of a cache was found empty, if nothing has to
    /// be made for the CPU on the way.
    #[inline(never)]
    pub(super) fn pop_warm(&self, held: Held<'_>, id: u16) -> Option<Object> {
        let cc = self.cpu_cache(held.cpu, id)?;
        if let Some(object) = self.pop_previous(held, cc) {
            return Some(object);
        }
        if matches!(Need::of(held.cpu, cc), Need::Nothing) { self.refill(held, cc) } else { None }
    }

    /// Has a CPU whose magazines of a cache are empty exchange the loaded one for a full one, or fills it, and takes
    /// an object.
    #[inline]
    fn refill(&self, held: Held<'_>, cc: &CpuCache) -> Option<Object> {
        let d = cc.cache;
        let swung = cc.flushed.swap(0, Relaxed) != 0;
        if swung {
            cc.swings.store(cc.swings.load(Relaxed).saturating_add(1), Relaxed);
        }
        // Where frees come in between, half of it, so that the next one finds room.
        let cap = cc.loaded().cap();
        let want = if swung { cap.div_ceil(2) } else { cap };
        let own = d.shelf_of(held.cpu.node(), held.cpu.id());
        let _ =
            self.fill(held, cc, own, Whose::Any, want) || self.fill_elsewhere(held, cc, own, want);
        held.loaded(d.id).pop()
    }

    /// The loaded magazine, with as many objects as it has by now.
    #[inline]
    fn settled(held: Held<'_>, cc: &CpuCache) -> &'static Magazine {
        let m = cc.loaded();
        m.settle(held.cpu.loaded_top(cc.cache.id));
        m
    }

    #[inline]
    fn load(held: Held<'_>, cc: &CpuCache, m: &'static Magazine) {
        cc.set_loaded(m);
        held.loaded(cc.cache.id).load(m);
    }

    /// Exchanges an empty loaded magazine for a full one of a shelf's, or fills it there; says whether that had any.
    #[inline]
    fn fill(&self, held: Held<'_>, cc: &CpuCache, shelf: usize, whose: Whose, want: u32) -> bool {
        let d = cc.cache;
        let Some(shelf) = d.shelves.get(shelf) else { return false };
        let mut lists = shelf.lists.lock(self.pages.platform());
        if (whose != Whose::Own || lists.nr_full_magazines > DEPOT / 2)
            && let Some(full) = pop_full(&mut lists)
        {
            push_empty(&mut lists, Self::settled(held, cc));
            Self::load(held, cc, full);
            return true;
        }
        let loaded = held.loaded(d.id);
        let push = |object: Object| {
            if let Some(room) = loaded.room() {
                room.put(object.at.as_ptr(), object.state);
            }
        };
        self.take(d, &mut lists, whose, want, state::CACHED, push) > 0
    }

    #[cold]
    fn fill_elsewhere(&self, held: Held<'_>, cc: &CpuCache, own: usize, want: u32) -> bool {
        let whose = cc.whose();
        let mut others = cc.cache.shelves_of(held.cpu.node()).filter(|at| *at != own);
        others.any(|at| self.fill(held, cc, at, whose, want))
    }

    /// Takes an object off the previous magazine, which is then the loaded one. Where both are empty, the smaller is the
    /// previous one then: that is the one to be replaced.
    #[inline]
    fn pop_previous(&self, held: Held<'_>, cc: &CpuCache) -> Option<Object> {
        let previous = cc.previous();
        if previous.nr() == 0 && previous.class() <= cc.loaded().class() {
            return None;
        }
        cc.previous.store(Self::settled(held, cc).place(), Relaxed);
        Self::load(held, cc, previous);
        held.loaded(cc.cache.id).pop()
    }

    /// Puts a cached object in the CPU's magazines; `false` if it has none.
    pub(super) fn push_flushed(
        &self,
        held: Held<'_>,
        d: &'static Descriptor,
        object: Object,
    ) -> bool {
        let room = held.loaded(d.id).room().or_else(|| {
            let _ = held.cpu.set_path(Path::ObjFlush);
            self.room_flushed(held, d.id)
        });
        room.map(|room| room.put(object.at.as_ptr(), object.state)).is_some()
    }

    /// A place in the CPU's magazines, where the loaded one of a cache was found full; `None` if it has none.
    #[inline(never)]
    pub(super) fn room_flushed<'c>(&self, held: Held<'c>, id: u16) -> Option<Room<'c>> {
        let cpu = held.cpu;
        let cc = self.cpu_cache(cpu, id)?;
        let (loaded, previous) = (Self::settled(held, cc), cc.previous());
        if previous.nr() < previous.cap() {
            loaded.give_older_half(previous);
            Self::load(held, cc, loaded);
            return held.loaded(id).room();
        }
        let d = cc.cache;
        if cc.flushed.swap(1, Relaxed) == 0 {
            cc.swings.store(cc.swings.load(Relaxed).saturating_add(1), Relaxed);
        }
        let empty = self.exchange_full(cpu, cc, previous).unwrap_or_else(|| {
            self.flush(d, previous);
            previous
        });
        cc.previous.store(loaded.place(), Relaxed);
        Self::load(held, cc, empty);
        held.loaded(id).room()
    }

    /// Gives a full magazine to the depot for an empty one, if the CPU is busy with the cache and both are to be had
    /// there.
    fn exchange_full(
        &self,
        cpu: &Cpu,
        cc: &CpuCache,
        full: &'static Magazine,
    ) -> Option<&'static Magazine> {
        let d = cc.cache;
        if !cc.busy() {
            return None;
        }
        let shelf = d.shelves.get(d.shelf_of(cpu.node(), cpu.id()))?;
        let mut lists = shelf.lists.lock(self.pages.platform());
        let empty = pop_empty(&mut lists)?;
        push_full(&mut lists, full);
        Some(empty)
    }

    /// Gives the objects of a magazine back to their slabs: those of one shelf after the other under one lock.
    fn flush(&self, d: &'static Descriptor, m: &Magazine) {
        let p = self.pages.platform();
        let map = self.pages.map();
        let mut held = None;
        let mut emptied = [0; EMPTIED];
        let mut nr = 0;
        // The slab that the last object went to: objects of one come together more often than not.
        let mut last = NONE;
        m.drain(|object| {
            let offset = map.direct_offset(object.at.addr().get());
            let Some(pfn) = map.owned_frame(offset, P::PAGE_SHIFT) else { return };
            let head = d.head(pfn);
            if head != last || nr == EMPTIED {
                last = head;
                let at = self.shelf_with(d, head);
                if held.as_ref().is_none_or(|(shelf, _)| *shelf != at) || nr == EMPTIED {
                    held = None;
                    emptied[..nr].iter().for_each(|head| self.release(d, *head));
                    nr = 0;
                    held = d.shelves.get(at).map(|shelf| (at, shelf.lists.lock(p)));
                }
            }
            if let Some((_, lists)) = &mut held
                && let Some(head) = self.put_back(d, lists, head, object)
            {
                emptied[nr] = head;
                nr += 1;
            }
        });
        drop(held);
        emptied[..nr].iter().for_each(|head| self.release(d, *head));
    }

    /// What the CPU lacks for a cache. The caller owns the CPU's lists, or an interrupt could exchange magazines
    /// while they are looked at.
    pub(super) fn need(&self, cpu: &Cpu, d: &Descriptor) -> Need {
        self.cpu_cache(cpu, d.id).map_or(Need::Magazines, |cc| Need::of(cpu, cc))
    }

    /// Replaces an empty previous magazine by a larger one, if the CPU's traffic asks for it, and gives the
    /// depot an empty one if a free found none there. The caller owns nothing.
    #[cold]
    #[inline(never)]
    pub(super) fn retune(
        &self,
        root: &'static Root,
        d: &'static Descriptor,
        tuning: &Tuning,
        gfp: Gfp,
    ) {
        let p = self.pages.platform();
        let &Tuning { cpu: id, node, class, small, flushed, grows } = tuning;
        if flushed && let Some(shelf) = d.shelves.get(d.shelf_of(node, id)) {
            let few = |lists: &Lists| lists.nr_full_magazines + lists.nr_empty_magazines < DEPOT;
            if few(&shelf.lists.lock(p))
                && let Some(m) = self.make_magazine(root, d, class, gfp)
            {
                push_empty(&mut shelf.lists.lock(p), m);
            }
        }
        if !small && !grows {
            return;
        }
        let class = if grows { class + 1 } else { class };
        let Some(larger) = self.make_magazine(root, d, class, gfp) else { return };
        let mut spare = larger;
        if let Some(cpu) = p.get_cpu() {
            if cpu.id() == id
                && let Some(owned) = self.pages.own(cpu, Path::ObjRefill)
            {
                if let Some(cc) = self.cpu_cache(cpu, d.id)
                    && cc.previous().nr() == 0
                    && cc.previous().class() < larger.class()
                {
                    spare = cc.previous();
                    cc.previous.store(larger.place(), Relaxed);
                    cc.class.store(class as u32, Relaxed);
                    cc.swings.store(0, Relaxed);
                }
                self.pages.disown(owned);
            }
            p.put_cpu(cpu);
        }
        self.free_magazine(root, spare);
    }

    /// Empties all magazines of a CPU. Those of dying caches, and of caches that have to do without, go.
    fn flush_owned(&self, held: Held<'_>) {
        for id in 0..MAX_CACHES as u16 {
            let Some(cc) = self.cpu_cache(held.cpu, id) else { continue };
            let d = cc.cache;
            let loaded = Self::settled(held, cc);
            self.flush(d, loaded);
            self.flush(d, cc.previous());
            Self::load(held, cc, loaded);
            // Acquire pairs with the Release of the destroyer.
            if d.dying.load(Acquire) != 0 || self.bare(d) {
                held.loaded(id).strip();
                held.cpu.side(id).store(ptr::null_mut(), Relaxed);
                Self::retire(d, cc);
            }
        }
    }

    /// Gives the magazines of the CPU that the caller runs on up, as others may have asked. Nothing happens
    /// when its lists are owned beneath: whoever owns them answers.
    pub(super) fn answer(&self, cpu: &Cpu) {
        if let Some(owned) = self.pages.own(cpu, Path::ObjFlush) {
            // Busy before the request is taken: whoever waits sees one of the two until all is done. AcqRel: a
            // cache that its destroyer marked before the request is seen as dying.
            cpu.deferred.fetch_or(DEFER_OBJECTS_BUSY, AcqRel);
            cpu.deferred.fetch_and(!DEFER_OBJECTS, AcqRel);
            self.flush_owned(owned.held());
            self.pages.answered(owned, DEFER_OBJECTS_BUSY);
        }
    }

    /// Has every CPU empty its magazines, and waits a little for those that are busy; says whether all did.
    ///
    /// Context: process context; elsewhere it does not wait.
    pub(super) fn flush_all(&self) -> bool {
        let p = self.pages.platform();
        // The CPU that answers here is the one not to ask again, wherever the caller is by then.
        let mut here = None;
        if let Some(cpu) = p.get_cpu() {
            here = Some(cpu.id());
            // As a request, so that one that comes from elsewhere meanwhile is looked for as well.
            cpu.deferred.fetch_or(DEFER_OBJECTS, AcqRel);
            self.pages.run_deferred(cpu);
            p.put_cpu(cpu);
        }
        // Pairs with the fence in `install`.
        fence(SeqCst);
        let others =
            || (0..p.nr_cpu_ids()).filter(|id| Some(*id) != here).filter_map(|id| p.cpu(id));
        for cpu in others().filter(|cpu| cpu.equipped()) {
            // AcqRel: the CPU that answers sees what the asker did before.
            cpu.deferred.fetch_or(DEFER_OBJECTS, AcqRel);
            p.kick(cpu.id());
        }
        if !self.pages.context().may_sleep() {
            // Acquire pairs with the AcqRel in `answer`.
            const ASKED: u32 = DEFER_OBJECTS | DEFER_OBJECTS_BUSY;
            return !others().any(|cpu| cpu.deferred.load(Acquire) & ASKED != 0);
        }
        self.pages.await_answers(|cpu| Some(cpu.id()) != here)
    }

    /// Empties the depot of a shelf and gives back the slabs that are empty.
    pub(super) fn trim(&self, root: &'static Root, d: &'static Descriptor, shelf: usize) {
        let Some(at) = d.shelves.get(shelf) else { return };
        let lock = || at.lists.lock(self.pages.platform());
        loop {
            let full = pop_full(&mut lock());
            let Some(m) = full else { break };
            self.flush(d, m);
            self.free_magazine(root, m);
        }
        loop {
            let empty = pop_empty(&mut lock());
            let Some(m) = empty else { break };
            self.free_magazine(root, m);
        }
        loop {
            let head = {
                let mut lists = lock();
                self.pop_empty(d, &mut lists)
            };
            let Some(head) = head else { return };
            self.release(d, head);
        }
    }
}

fn pop_full(lists: &mut Lists) -> Option<&'static Magazine> {
    // SAFETY: null or a magazine in the depot, which is ours under the lock.
    let m = unsafe { lists.full_magazines.as_ref() }?;
    lists.full_magazines = m.next.load(Relaxed);
    lists.nr_full_magazines -= 1;
    Some(m)
}

fn push_full(lists: &mut Lists, m: &'static Magazine) {
    m.next.store(lists.full_magazines.cast_mut(), Relaxed);
    lists.full_magazines = m;
    lists.nr_full_magazines += 1;
}

fn pop_empty(lists: &mut Lists) -> Option<&'static Magazine> {
    // SAFETY: as in `pop_full`.
    let m = unsafe { lists.empty_magazines.as_ref() }?;
    lists.empty_magazines = m.next.load(Relaxed);
    lists.nr_empty_magazines -= 1;
    Some(m)
}

fn push_empty(lists: &mut Lists, m: &'static Magazine) {
    m.next.store(lists.empty_magazines.cast_mut(), Relaxed);
    lists.empty_magazines = m;
    lists.nr_empty_magazines += 1;
}
