//! Objects of KFENCE's pool: how an allocation comes to be one, and how they are freed \[D2\].
//!
//! # Implementation
//! The frames of the pool have an owner with number 0, nobody's, and a colour, which frames without a cache do not have
//! otherwise. So a free of such an object finds no magazine and no cache, and then this. The state byte
//! that its first owner is told of never says that it is live, so that an owner's free takes the same way.
//!
//! Which requests are served from the pool: those of caches for ordinary memory (of ZONE_DMA and ZONE_DMA32 the pool has
//! none to give) without [`SKIP_KFENCE`](SlabFlags::SKIP_KFENCE), of at most a page, not bound to another node than the
//! pool's. A constructor runs at each allocation; red zones, poison and users of caches that look for mistakes are
//! left out; objects are not moved.
//!
//! # Locking
//! None of its own.

use super::{Objects, SlabFlags, cache::Descriptor, magazine::Object, order_for, state::State};
use crate::{
    context::{Cpu, DEFER_RECALL, DEFER_SAMPLE},
    error::Misuse,
    gfp::Gfp,
    kfence::{
        Ask, Fault, FaultReport, FreeError, FreeReport, Info, KfenceConfig, KfenceError,
        KfenceStats, Pool,
    },
    page_alloc::Reclaim,
    platform::{Level, Platform},
    vmstat::VmEvent,
};
use core::{
    panic::Location,
    ptr::NonNull,
    sync::atomic::{
        AtomicU8,
        Ordering::{AcqRel, Relaxed},
    },
};

/// The owner of the pool's frames: number 0, which is no cache's, and not nobody's.
pub(super) const SAMPLED: u16 = 1;
const _: () = assert!(super::node::number(SAMPLED) == 0);

impl<'a, P: Platform, R: Reclaim> Objects<'a, P, R> {
    /// Whether an owner is that of the pool's frames.
    pub(super) fn is_sampled(&self, owner: u16) -> bool {
        owner == SAMPLED
    }

    /// The pool, if an address is in it.
    pub(super) fn pool_at(&self, addr: usize) -> Option<&'static Pool> {
        self.slabs.kfence.pool().filter(|pool| pool.contains(addr))
    }

    /// Sets the pool aside, at bring-up.
    pub(crate) fn make_pool(&self, wanted: KfenceConfig) -> Result<(), KfenceError> {
        let objects = wanted.objects;
        let pages = (objects as usize).saturating_add(1).saturating_mul(2);
        let bytes = pages.saturating_mul(1 << P::PAGE_SHIFT);
        let largest = (1usize << P::PAGE_SHIFT) << self.pages.max_order();
        if objects == 0 || bytes > largest {
            return Err(KfenceError::Objects(objects));
        }
        let order = order_for(bytes, P::PAGE_SHIFT);
        let tables = order_for(Pool::table_bytes(1 << order), P::PAGE_SHIFT);
        let gfp = Gfp::NOWAIT;
        let at = self.own_pages(gfp, order).ok_or(KfenceError::NoMemory)?;
        let Some(table) = self.own_pages(gfp, tables) else {
            self.free_own_pages(at, order);
            return Err(KfenceError::NoMemory);
        };
        let map = self.pages.map();
        let first = map.frame_at(map.direct_offset(at.addr().get()), P::PAGE_SHIFT);
        let frames = (1 << order) + (1 << tables);
        // SAFETY: zeroed pages of these orders, aligned to a page, which are kept if this succeeds; `own_pages`
        // exposed them.
        match unsafe { Pool::new(self.pages.platform(), (at, first, 1 << order), table, frames) } {
            Ok(pool) => {
                // Nobody frees it as pages, or its frames as anything but objects.
                map.page_in_map(first).mark_slab();
                map.set_owner(first, 1 << order, SAMPLED);
                self.slabs.kfence.set_pool(pool);
                self.slabs.kfence.set_interval_ns(wanted.sample_interval_ns);
                Ok(())
            }
            Err(e) => {
                self.free_own_pages(at, order);
                self.free_own_pages(table, tables);
                Err(e)
            }
        }
    }

    /// `set_kfence`.
    pub(crate) fn set_kfence(&self, interval_ns: u64) -> Result<(), KfenceError> {
        self.slabs.kfence.pool().ok_or(KfenceError::NoPool)?;
        self.slabs.kfence.set_interval_ns(interval_ns);
        self.nudge_kfence();
        if interval_ns == 0 {
            // Those that were asked for one have none to take now.
            self.each_equipped(|cpu| self.ask_cpu(cpu, DEFER_RECALL));
        }
        Ok(())
    }

    /// Wakes who keeps the time.
    pub(crate) fn nudge_kfence(&self) {
        let bell = &self.slabs.kfence.bell;
        bell.fetch_add(1, Relaxed);
        self.pages.platform().wake(bell);
    }

    /// Calls `f` with every CPU that has allocated objects.
    fn each_equipped(&self, f: impl Fn(&Cpu)) {
        let p = self.pages.platform();
        let cpus = (0..p.nr_cpu_ids()).filter_map(|id| p.cpu(id));
        cpus.filter(|cpu| cpu.equipped()).for_each(f);
    }

    fn ask_cpu(&self, cpu: &Cpu, what: u32) {
        // AcqRel: the CPU that answers sees what the asker did before.
        cpu.deferred.fetch_or(what, AcqRel);
        self.pages.platform().kick(cpu.id());
    }

    /// Has every CPU that allocates objects come to a slow path, if a sample is due.
    pub(crate) fn kfence_toggle(&self) {
        if self.slabs.kfence.due(self.pages.platform().now_ns()) {
            self.each_equipped(|cpu| self.ask_cpu(cpu, DEFER_SAMPLE));
        }
    }

    /// Whether the pool serves such a request.
    fn suits(&self, d: &Descriptor, gfp: Gfp, node: Option<usize>, size: u32) -> bool {
        let not = SlabFlags::CACHE_DMA | SlabFlags::CACHE_DMA32 | SlabFlags::SKIP_KFENCE;
        let here = |pool: &Pool| node.is_none_or(|node| node == self.node_of(pool.pages().0));
        !d.flags.intersects(not)
            && !gfp.intersects(Gfp::DMA_ZONE | Gfp::DMA32)
            && size as usize <= 1 << P::PAGE_SHIFT
            && self.slabs.kfence.pool().is_some_and(here)
    }

    /// An object of the pool for `size` bytes of a cache, if a sample is due and there is one. Contents as a new
    /// object of the cache has them.
    #[cold]
    #[inline(never)]
    #[track_caller]
    pub(super) fn sample(
        &self,
        d: &'static Descriptor,
        gfp: Gfp,
        node: Option<usize>,
        size: u32,
    ) -> Option<Object> {
        let (p, kfence) = (self.pages.platform(), &self.slabs.kfence);
        if let Some(cpu) = p.get_cpu() {
            self.pages.remember(cpu);
            p.put_cpu(cpu);
        }
        if !self.suits(d, gfp, node, size) {
            if kfence.due(p.now_ns()) {
                kfence.incompatible.fetch_add(1, Relaxed);
            }
            return None;
        }
        if !kfence.take_turn(p.now_ns()) {
            return None;
        }
        let at = Location::caller();
        let ask = Ask { cache: d.id, name: d.name, size, align: d.align, at };
        let (at, byte) = kfence.pool()?.alloc(p, &ask)?;
        match d.ctor {
            Some(ctor) => ctor(at.as_ptr()),
            None if self.slabs.modes.load(Relaxed) & super::INIT_ON_ALLOC != 0 => {
                // SAFETY: an object of so many bytes, just given to us.
                unsafe { at.write_bytes(0, size as usize) }
            }
            None => (),
        }
        self.tag(at.addr().get(), size as usize);
        Some(Object { at, state: byte_state(byte) })
    }

    /// Frees the object at an address in the pool, to `cache` if the caller named one: one in use, or one that `waited` for
    /// its readers.
    #[cold]
    #[inline(never)]
    #[track_caller]
    pub(super) fn free_sampled(
        &self,
        at: *mut u8,
        cache: Option<&Descriptor>,
        waited: bool,
    ) -> Result<(), Misuse> {
        let (addr, site) = (at.addr(), Location::caller());
        let Some(pool) = self.pool_at(addr) else {
            return Err(self.pages.misuse(Misuse::NotAnObject { addr }));
        };
        let wipe = self.slabs.modes.load(Relaxed) & super::INIT_ON_FREE != 0;
        let cache_id = cache.map(|d| d.id);
        let freed = pool.free(self.pages.platform(), addr, (cache_id, waited), site, |at, info| {
            self.untag(addr);
            self.forget_areas(addr);
            if wipe {
                // SAFETY: an object of so many bytes, which nobody uses any more.
                unsafe { at.write_bytes(0, usize::from(info.size)) };
            }
        });
        let Err(why) = freed else { return Ok(()) };
        let slot = pool.slot_at(addr);
        let name = || slot.map(|(_, slot)| slot.name());
        let mut damage = None;
        let misuse = match (why, name()) {
            (FreeError::NoObject, _) | (_, None) => Misuse::NotAnObject { addr },
            (FreeError::Free, Some(cache)) => Misuse::ObjectFree { addr, cache },
            (FreeError::Inside, Some(cache)) => Misuse::InsideObject { addr, cache },
            (FreeError::WrongCache, Some(actual)) => {
                let given = cache.map_or(actual, |d| d.name);
                Misuse::WrongCache { addr, given, actual }
            }
            (FreeError::Damaged(found), Some(cache)) => {
                damage = Some(found);
                let (offset, found) = (found.offset, found.found());
                match offset < 0 {
                    true => Misuse::Underrun { addr, cache, offset, found },
                    false => Misuse::Overrun { addr, cache, offset, found },
                }
            }
        };
        pool.bugs.fetch_add(1, Relaxed);
        let used = |i: &usize| why != FreeError::NoObject && *i < pool.slots().len();
        let slot = slot.map(|(i, _)| i).filter(used);
        let report = FreeReport { pool, addr, slot, damage, at: site };
        Err(self.pages.misuse_as(misuse, format_args!("{report}")))
    }

    /// Bytes asked for of the pool's object that begins at an address.
    pub(super) fn sampled_size(&self, at: *mut u8) -> Option<usize> {
        let info = self.pool_at(at.addr())?.object_at(at.addr())?;
        Some(usize::from(info.size))
    }

    /// Calls `f` with each object of a cache that is in the pool.
    pub(super) fn each_sampled_of(&self, d: &Descriptor, mut f: impl FnMut(Object)) {
        let Some(pool) = self.slabs.kfence.pool() else { return };
        pool.each_live(|addr, info: Info| {
            let at = NonNull::new(core::ptr::with_exposed_provenance_mut(addr));
            if info.cache == d.id
                && let Some(at) = at
                && let Some((_, slot)) = pool.slot_at(addr)
            {
                f(Object { at, state: byte_state(slot.byte()) });
            }
        });
    }

    /// How many there are.
    pub(super) fn sampled_of(&self, d: &Descriptor) -> u64 {
        let mut nr = 0;
        self.each_sampled_of(d, |_| nr += 1);
        nr
    }

    /// Looks at a fault at an address. `true` if the access that faulted may go on.
    pub(crate) fn kfence_fault(&self, addr: usize, is_write: bool, ip: usize) -> bool {
        let Some(pool) = self.pool_at(addr) else { return false };
        let p = self.pages.platform();
        let fault = pool.fault(addr);
        if fault != Fault::Stale {
            pool.bugs.fetch_add(1, Relaxed);
            self.pages.count(VmEvent::Misuse, 1);
            let report = FaultReport { pool, fault, addr, is_write, ip };
            p.report(Level::Bug, format_args!("{report}"));
        }
        !self.pages.panics_on_misuse() && pool.open(p, addr)
    }

    /// Whether an address is in the pool.
    pub(crate) fn is_kfence_address(&self, addr: usize) -> bool {
        self.pool_at(addr).is_some()
    }

    /// What became of the samples.
    pub(crate) fn kfence_stats(&self) -> Option<KfenceStats> {
        let kfence = &self.slabs.kfence;
        let pool = kfence.pool()?;
        let mut live = 0;
        pool.each_live(|_, _| live += 1);
        Some(KfenceStats {
            sample_interval_ns: kfence.interval_ns(),
            objects: pool.slots().len() as u64,
            live,
            allocations: pool.allocations.load(Relaxed),
            frees: pool.frees.load(Relaxed),
            bugs: pool.bugs.load(Relaxed),
            skipped_incompatible: kfence.incompatible.load(Relaxed),
            skipped_capacity: pool.full.load(Relaxed),
        })
    }
}

/// The state byte of an object in the pool.
fn byte_state(byte: &'static AtomicU8) -> State {
    // SAFETY: an atomic in the pool's tables, which stay until the machine goes.
    unsafe { State::new(byte) }
}
