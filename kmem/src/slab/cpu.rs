//! A CPU's magazines: what happens when the loaded one is empty or full.
//!
//! # Implementation
//! Empty: the previous one if it has objects, else a full one from the depot, else the loaded one is
//! filled from the node's slabs. Full: the previous one if it is empty, else an empty one from the depot,
//! else the older half goes back to the slabs: a free never asks for memory. Magazines are made on the
//! way of an allocation, when the caller owns nothing.
//!
//! *Size.* A CPU whose exchanges go back and forth has traffic that swings wider than its magazines; after
//! a few such swings it asks for the next size.
//!
//! # Locking
//! Ownership of the CPU's lists, then the node's lock.

use super::{
    Objects,
    cache::{CpuCache, CpuTable, Descriptor, Internal, Lists, MAGAZINES, Root},
    magazine::{Magazine, Object},
    state,
};
use crate::{
    context::{Cpu, DEFER_OBJECTS, Path},
    gfp::Gfp,
    page_alloc::Reclaim,
    platform::Platform,
};
use core::{
    ptr,
    sync::atomic::{
        AtomicPtr, AtomicU32, AtomicU64,
        Ordering::{AcqRel, Acquire, Relaxed},
    },
};

/// Full magazines a depot keeps.
const DEPOT: u32 = 4;

/// Swings after which a CPU asks for larger magazines.
const SWINGS: u32 = 8;

/// Turns of waiting for other CPUs to give their magazines up, and how often they are kicked meanwhile.
const PATIENCE: u32 = 20_000;
const KICK_EVERY: u32 = 1_000;

impl<'a, P: Platform, R: Reclaim> Objects<'a, P, R> {
    /// The CPU's table of caches.
    #[inline(always)]
    pub(super) fn table(&self, cpu: &Cpu) -> Option<&'static CpuTable> {
        let table = self.pages.objects_of(cpu)?.load(Relaxed);
        // SAFETY: null or a table in a page of its own, kept until the machine goes.
        unsafe { table.cast::<CpuTable>().as_ref() }
    }

    /// The cache with a number on the CPU, if it has magazines there.
    #[inline(always)]
    pub(super) fn cpu_cache(&self, cpu: &Cpu, id: u16) -> Option<&'static CpuCache> {
        let at = self.table(cpu)?.0.get(usize::from(id))?.load(Relaxed);
        // SAFETY: null or the CPU's, which takes it off before it goes.
        unsafe { at.as_ref() }
    }

    /// Makes magazines for a cache on the caller's CPU. Nothing happens when there is no memory for that:
    /// the cache works without.
    pub(super) fn equip(&self, root: &'static Root, d: &'static Descriptor, gfp: Gfp) {
        let Some(largest) = d.largest else { return };
        let p = self.pages.platform();
        let Some(id) = p.this_cpu().map(Cpu::id) else { return };
        if self.ensure_table(root, gfp).is_none() {
            return;
        }
        let class = largest.saturating_sub(2);
        let Ok(at) = self.internal(root, Internal::CpuCaches, gfp) else { return };
        let loaded = self.make_magazine(root, class, gfp);
        let previous = self.make_magazine(root, class, gfp);
        let (Some(loaded), Some(previous)) = (loaded, previous) else {
            [loaded, previous].into_iter().flatten().for_each(|m| self.free_magazine(root, m));
            self.internal_free(root, Internal::CpuCaches, at);
            return;
        };
        let at = at.cast::<CpuCache>();
        // SAFETY: an object of the size and alignment of a CpuCache, just given to us.
        unsafe {
            at.write(CpuCache {
                nr: AtomicU32::new(0),
                several_nodes: self.pages.nr_nodes() > 1,
                layout: d.layout,
                loaded: AtomicPtr::new(ptr::from_ref(loaded).cast_mut()),
                cache: d,
                previous: AtomicPtr::new(ptr::from_ref(previous).cast_mut()),
                class: AtomicU32::new(class as u32),
                flushed: AtomicU32::new(0),
                swings: AtomicU32::new(0),
                allocs: AtomicU64::new(0),
                frees: AtomicU64::new(0),
                next: AtomicPtr::new(ptr::null_mut()),
            });
        }
        let mut installed = false;
        // The caller may have moved, or an interrupt been here before.
        if let Some(cpu) = p.get_cpu() {
            if cpu.id() == id
                && d.dying.load(Relaxed) == 0
                && let Some(owned) = self.pages.own(cpu, Path::ObjRefill)
            {
                if let Some(slot) = self.table(cpu).and_then(|t| t.0.get(usize::from(d.id)))
                    && slot.load(Relaxed).is_null()
                {
                    slot.store(at, Relaxed);
                    installed = true;
                }
                self.pages.disown(owned);
            }
            p.put_cpu(cpu);
        }
        if !installed {
            self.free_magazine(root, loaded);
            self.free_magazine(root, previous);
            self.internal_free(root, Internal::CpuCaches, at.cast());
        }
    }

    /// The table of the caller's CPU, made if there is none.
    fn ensure_table(&self, root: &'static Root, gfp: Gfp) -> Option<()> {
        let p = self.pages.platform();
        let cpu = p.this_cpu()?;
        let slot = self.pages.objects_of(cpu)?;
        if !slot.load(Relaxed).is_null() {
            return Some(());
        }
        let order = super::order_for(size_of::<CpuTable>(), P::PAGE_SHIFT);
        let at = self.own_pages(gfp, order)?;
        let table = at.as_ptr().cast::<()>();
        if slot.compare_exchange(ptr::null_mut(), table, AcqRel, Relaxed).is_err() {
            // An interrupt, or whoever ran here meanwhile, made one.
            self.free_own_pages(at, order);
            return Some(());
        }
        root.frames.fetch_add(1 << order, Relaxed);
        Some(())
    }

    pub(super) fn make_magazine(
        &self,
        root: &'static Root,
        class: usize,
        gfp: Gfp,
    ) -> Option<&'static Magazine> {
        let at = self.internal(root, Internal::Magazines(class), gfp).ok()?;
        // SAFETY: an object of the size of such a magazine, aligned to 16, just given to us.
        Some(unsafe { Magazine::init(at, MAGAZINES[class]) })
    }

    /// Frees a magazine; its objects, if it has any, are lost sight of.
    pub(super) fn free_magazine(&self, root: &'static Root, m: &'static Magazine) {
        let class = MAGAZINES.iter().position(|cap| *cap == m.cap()).unwrap_or(0);
        self.internal_free(root, Internal::Magazines(class), ptr::from_ref(m).cast_mut().cast());
    }

    /// Makes sure that the loaded magazine has an object, if the CPU's node has any. The caller owns the
    /// CPU's lists.
    pub(super) fn refill(&self, cpu: &Cpu, cc: &CpuCache) -> bool {
        cpu.set_path(Path::ObjRefill);
        let (Some(loaded), Some(previous)) = (cc.loaded(), cc.previous()) else { return false };
        if cc.nr.load(Relaxed) > 0 {
            return true;
        }
        if previous.nr.load(Relaxed) > 0 {
            self.swap(cc, loaded, previous);
            return true;
        }
        if cc.flushed.swap(0, Relaxed) != 0 {
            cc.swings.store(cc.swings.load(Relaxed) + 1, Relaxed);
        }
        let d = cc.cache;
        let Some(node) = d.nodes.get(cpu.node()) else { return false };
        let mut lists = node.lists.lock(self.pages.platform());
        if let Some(full) = pop_full(&mut lists) {
            push_empty(&mut lists, loaded);
            cc.loaded.store(ptr::from_ref(full).cast_mut(), Relaxed);
            cc.nr.store(full.nr.load(Relaxed), Relaxed);
            return true;
        }
        // Half of it, so that the next free finds room.
        let mut nr = 0;
        self.take(d, &mut lists, loaded.cap().div_ceil(2), state::CACHED, |object| {
            loaded.set(nr, object);
            nr += 1;
        });
        cc.nr.store(nr, Relaxed);
        nr > 0
    }

    fn swap(&self, cc: &CpuCache, loaded: &'static Magazine, previous: &'static Magazine) {
        loaded.nr.store(cc.nr.load(Relaxed), Relaxed);
        cc.loaded.store(ptr::from_ref(previous).cast_mut(), Relaxed);
        cc.previous.store(ptr::from_ref(loaded).cast_mut(), Relaxed);
        cc.nr.store(previous.nr.load(Relaxed), Relaxed);
    }

    /// Makes sure that the loaded magazine has room. The caller owns the CPU's lists.
    pub(super) fn make_room(&self, cpu: &Cpu, root: &'static Root, cc: &CpuCache) {
        cpu.set_path(Path::ObjFlush);
        let (Some(loaded), Some(previous)) = (cc.loaded(), cc.previous()) else { return };
        let nr = cc.nr.load(Relaxed);
        if nr < loaded.cap() {
            return;
        }
        if previous.nr.load(Relaxed) == 0 {
            self.swap(cc, loaded, previous);
            return;
        }
        if cc.flushed.swap(1, Relaxed) == 0 {
            cc.swings.store(cc.swings.load(Relaxed) + 1, Relaxed);
        }
        let d = cc.cache;
        if let Some(node) = d.nodes.get(cpu.node()) {
            let mut lists = node.lists.lock(self.pages.platform());
            if lists.nr_full_magazines < DEPOT
                && let Some(empty) = pop_empty(&mut lists)
            {
                // The previous one is the older.
                previous.nr.store(previous.cap().min(previous.nr.load(Relaxed)), Relaxed);
                push_full(&mut lists, previous);
                loaded.nr.store(nr, Relaxed);
                cc.previous.store(ptr::from_ref(loaded).cast_mut(), Relaxed);
                cc.loaded.store(ptr::from_ref(empty).cast_mut(), Relaxed);
                cc.nr.store(0, Relaxed);
                return;
            }
        }
        // The older half of the older magazine, and that is loaded.
        let old = previous.nr.load(Relaxed);
        let keep = old / 2;
        self.flush(root, d, previous, 0..old - keep);
        for i in 0..keep {
            previous.set(i, previous.get(old - keep + i));
        }
        previous.nr.store(keep, Relaxed);
        self.swap(cc, loaded, previous);
    }

    /// Gives the objects in a range of a magazine's slots back to their slabs.
    fn flush(
        &self,
        root: &'static Root,
        d: &'static Descriptor,
        m: &Magazine,
        slots: core::ops::Range<u32>,
    ) {
        for i in slots {
            self.send_home(root, d, m.get(i));
        }
    }

    /// Empties a cache's magazines on a CPU whose lists the caller owns.
    pub(super) fn flush_cpu(&self, root: &'static Root, cc: &CpuCache) {
        let (Some(loaded), Some(previous)) = (cc.loaded(), cc.previous()) else { return };
        self.flush(root, cc.cache, loaded, 0..cc.nr.load(Relaxed));
        cc.nr.store(0, Relaxed);
        self.flush(root, cc.cache, previous, 0..previous.nr.load(Relaxed));
        previous.nr.store(0, Relaxed);
    }

    /// Replaces an empty previous magazine by a larger one, if the CPU's traffic asks for it. The caller
    /// owns nothing.
    pub(super) fn retune(&self, root: &'static Root, d: &'static Descriptor, gfp: Gfp) {
        let p = self.pages.platform();
        let Some(cpu) = p.this_cpu() else { return };
        let Some(cc) = self.cpu_cache(cpu, d.id) else { return };
        let (id, class) = (cpu.id(), cc.class.load(Relaxed) as usize);
        if cc.flushed.load(Relaxed) != 0
            && let Some(node) = d.nodes.get(cpu.node())
        {
            // The last free that ran over found no empty magazine in the depot.
            let few = |lists: &Lists| lists.nr_full_magazines + lists.nr_empty_magazines < DEPOT;
            if few(&node.lists.lock(p))
                && let Some(m) = self.make_magazine(root, class, gfp)
            {
                push_empty(&mut node.lists.lock(p), m);
            }
        }
        let small = cc.previous().is_some_and(|m| m.cap() < MAGAZINES[class.min(3)]);
        let grows = cc.swings.load(Relaxed) >= SWINGS && d.largest.is_some_and(|most| class < most);
        if !small && !grows {
            return;
        }
        let class = if grows { class + 1 } else { class };
        let Some(larger) = self.make_magazine(root, class, gfp) else { return };
        let mut spare = larger;
        if let Some(cpu) = p.get_cpu() {
            if cpu.id() == id
                && let Some(owned) = self.pages.own(cpu, Path::ObjRefill)
            {
                if let Some(cc) = self.cpu_cache(cpu, d.id)
                    && let Some(previous) = cc.previous()
                    && previous.nr.load(Relaxed) == 0
                    && previous.cap() < larger.cap()
                {
                    cc.previous.store(ptr::from_ref(larger).cast_mut(), Relaxed);
                    cc.class.store(class as u32, Relaxed);
                    cc.swings.store(0, Relaxed);
                    spare = previous;
                }
                self.pages.disown(owned);
            }
            p.put_cpu(cpu);
        }
        self.free_magazine(root, spare);
    }

    /// Empties all magazines of a CPU whose lists the caller owns. Those of dying caches go.
    fn flush_owned(&self, cpu: &Cpu) {
        let (Some(root), Some(table)) = (self.root(), self.table(cpu)) else { return };
        for (id, slot) in table.0.iter().enumerate() {
            let Some(cc) = self.cpu_cache(cpu, id as u16) else { continue };
            self.flush_cpu(root, cc);
            if cc.cache.dying.load(Acquire) != 0 {
                slot.store(ptr::null_mut(), Relaxed);
                let at = ptr::from_ref(cc).cast_mut();
                // Release pairs with the Acquire of the destroyer, who frees it.
                let _ = cc.cache.retired.fetch_update(AcqRel, Acquire, |first| {
                    cc.next.store(first, Relaxed);
                    Some(at)
                });
            }
        }
    }

    /// Gives the magazines of the CPU that the caller runs on up, as others may have asked. Nothing happens
    /// when its lists are owned beneath: whoever owns them answers.
    pub(super) fn answer(&self, cpu: &Cpu) {
        if let Some(owned) = self.pages.own(cpu, Path::ObjFlush) {
            self.flush_owned(cpu);
            self.pages.answered(owned, DEFER_OBJECTS);
        }
    }

    /// Has every CPU empty its magazines, and waits a little for those that are busy; says whether all did.
    ///
    /// Context: process context; elsewhere it does not wait.
    pub(super) fn flush_all(&self) -> bool {
        let p = self.pages.platform();
        if let Some(cpu) = p.get_cpu() {
            self.answer(cpu);
            p.put_cpu(cpu);
        }
        let here = p.this_cpu().map(Cpu::id);
        let others =
            || (0..p.nr_cpu_ids()).filter(|id| Some(*id) != here).filter_map(|id| p.cpu(id));
        for cpu in others().filter(|cpu| self.table(cpu).is_some()) {
            // AcqRel: the CPU that answers sees what the asker did before.
            cpu.deferred.fetch_or(DEFER_OBJECTS, AcqRel);
            p.kick(cpu.id());
        }
        // Acquire pairs with the AcqRel in `answer`.
        let waiting = |cpu: &&Cpu| cpu.deferred.load(Acquire) & DEFER_OBJECTS != 0;
        if !self.pages.context().may_sleep() {
            return !others().any(|cpu| waiting(&cpu));
        }
        for turn in 1..=PATIENCE {
            if !others().any(|cpu| waiting(&cpu)) {
                return true;
            }
            if turn % KICK_EVERY == 0 {
                others().filter(waiting).for_each(|cpu| p.kick(cpu.id()));
            }
            p.relax();
        }
        false
    }

    /// Empties the depots of a cache and gives back the slabs that are empty; returns their frames.
    pub(super) fn trim(&self, root: &'static Root, d: &'static Descriptor, node: usize) -> u64 {
        let Some(at) = d.nodes.get(node) else { return 0 };
        let lock = || at.lists.lock(self.pages.platform());
        loop {
            let full = pop_full(&mut lock());
            let Some(m) = full else { break };
            self.flush(root, d, m, 0..m.nr.load(Relaxed));
            self.free_magazine(root, m);
        }
        loop {
            let empty = pop_empty(&mut lock());
            let Some(m) = empty else { break };
            self.free_magazine(root, m);
        }
        let mut frames = 0;
        loop {
            let head = {
                let mut lists = lock();
                self.pop_empty(d, &mut lists)
            };
            let Some(head) = head else { return frames };
            self.release(root, d, head);
            frames += 1 << d.layout.order;
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
    m.nr.store(0, Relaxed);
    m.next.store(lists.empty_magazines.cast_mut(), Relaxed);
    lists.empty_magazines = m;
    lists.nr_empty_magazines += 1;
}

/// The objects of a magazine, for audits.
pub(super) fn objects(m: &Magazine, nr: u32) -> impl Iterator<Item = Object> + '_ {
    (0..nr).map(|i| m.get(i))
}
