//! Looking at caches: what they hold, and whether it adds up.
//!
//! # Locking
//! Reports take the lock of each shelf of each cache. An audit looks at CPUs' magazines and is for a quiet
//! machine.

use super::{
    Objects, SlabFlags,
    cache::{Descriptor, List, MAX_CACHES, NONE},
    layout::OUTSIDE,
    magazine::{Magazine, nr_between},
    state,
};
use crate::{
    error::Name,
    memmap::STATE_SHIFT,
    page_alloc::Reclaim,
    platform::{Level, Platform},
    types::Pfn,
};
use core::{fmt, ptr::NonNull, sync::atomic::Ordering::Relaxed};

/// Live objects that a failing destroy names.
const LISTED: u64 = 16;

/// What a cache holds, as `/proc/slabinfo` shows it \[T1\].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CacheInfo {
    /// Its name.
    pub name: Name,
    /// Bytes of an object, as asked for.
    pub object_size: u32,
    /// Bytes from one object to the next.
    pub stride: u32,
    /// Alignment in bytes.
    pub align: u32,
    /// Flags it was created with, and of those of debugging the ones that are on.
    pub flags: SlabFlags,
    /// Whether it is one of the layer's own.
    pub internal: bool,
    /// Users that share it.
    pub users: u32,
    /// Objects of a slab.
    pub objects_per_slab: u32,
    /// Frames of a slab.
    pub frames_per_slab: u32,
    /// Objects that are not in their slab: in use or in a magazine.
    pub active_objects: u64,
    /// Objects in the magazines of CPUs and depots.
    pub cached_objects: u64,
    /// All objects.
    pub objects: u64,
    /// Slabs with an object that is not in it.
    pub active_slabs: u64,
    /// All slabs.
    pub slabs: u64,
    /// Bytes that the states of its objects take in the machine's table, outside of slabs.
    pub table_bytes: u64,
    /// Slabs ever made.
    pub grown: u64,
    /// Slabs ever given back.
    pub released: u64,
}

/// Where everything is, if all adds up.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ObjectAudit {
    /// Objects in use, those of the layer's own caches left out.
    pub live: u64,
    /// Objects in magazines.
    pub cached: u64,
    /// Objects that nobody has or is given, since they were written to \[S9\].
    pub quarantined: u64,
    /// Objects free in slabs, those of the layer's own caches left out.
    pub free: u64,
    /// Frames of all slabs.
    pub slab_frames: u64,
    /// Further frames that the layer holds for itself, KFENCE's pool included.
    pub own_frames: u64,
    /// Objects in use that are in that pool; they are among the live ones.
    pub sampled: u64,
}

/// What does not add up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ObjectAuditError {
    /// A slab's list, count or state bytes contradict each other; the cache and the first frame.
    Slab(Name, Pfn),
    /// Free objects of a node: counted, and as the slabs say.
    Free(Name, u64, u64),
    /// Cached objects: in magazines, and as the state bytes say.
    Cached(Name, u64, u64),
    /// A CPU has magazines of a cache that is no more; the CPU and the cache's number.
    Left(usize, u16),
}

impl fmt::Display for ObjectAuditError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ObjectAuditError::Slab(name, pfn) => {
                write!(f, "{name}: slab pfn:{pfn} is not as listed")
            }
            ObjectAuditError::Free(name, counted, found) => {
                write!(f, "{name}: {counted} free objects counted, {found} found")
            }
            ObjectAuditError::Cached(name, held, found) => {
                write!(f, "{name}: {held} objects in magazines, {found} marked so")
            }
            ObjectAuditError::Left(cpu, id) => {
                write!(f, "CPU {cpu} has magazines of cache {id}, which is no more")
            }
        }
    }
}

impl core::error::Error for ObjectAuditError {}

impl<'a, P: Platform, R: Reclaim> Objects<'a, P, R> {
    /// Calls `f` with what each cache holds.
    pub(crate) fn info(&self, mut f: impl FnMut(&CacheInfo)) {
        self.each(|_, d| f(&self.info_of(d)));
    }

    /// What one cache holds.
    pub(crate) fn info_of(&self, d: &'static Descriptor) -> CacheInfo {
        let mut info = CacheInfo {
            name: d.name,
            object_size: d.size,
            stride: d.layout.stride,
            align: d.align,
            flags: (d.flags - SlabFlags::DEBUG)
                | SlabFlags::from_bits_retain(d.watched.load(Relaxed)),
            internal: d.largest.is_none(),
            users: d.users.load(Relaxed),
            objects_per_slab: d.layout.nr,
            frames_per_slab: 1 << d.layout.order,
            active_objects: 0,
            cached_objects: self.in_cpus(d),
            objects: 0,
            active_slabs: 0,
            slabs: 0,
            table_bytes: 0,
            grown: 0,
            released: 0,
        };
        for shelf in d.shelves {
            let lists = shelf.lists.lock(self.pages.platform());
            let active = lists.in_use().map(|list| u64::from(list.nr)).sum::<u64>();
            let slabs = active + u64::from(lists.empty.nr);
            let objects = slabs * u64::from(d.layout.nr);
            info.active_slabs += active;
            info.slabs += slabs;
            info.objects += objects;
            info.active_objects += objects - lists.free;
            info.grown += lists.grown;
            info.released += lists.released;
            let mut m = lists.full_magazines;
            // SAFETY: null or a magazine in the depot, which nobody changes under the lock.
            while let Some(full) = unsafe { m.as_ref() } {
                info.cached_objects += u64::from(full.nr());
                m = full.next.load(Relaxed);
            }
        }
        if d.layout.states_at == OUTSIDE {
            info.table_bytes = (info.slabs << (d.layout.order + P::PAGE_SHIFT)) >> STATE_SHIFT;
        }
        info
    }

    /// Calls `f` with each magazine of the cache that a CPU has, and how many objects it holds. For a quiet machine: of
    /// another what it sees is out of date, no more.
    fn each_magazine(&self, d: &Descriptor, mut f: impl FnMut(&Magazine, u32)) {
        let p = self.pages.platform();
        for cpu in (0..p.nr_cpu_ids()).filter_map(|id| p.cpu(id)) {
            if let Some(cc) = self.cpu_cache(cpu, d.id) {
                f(cc.loaded(), nr_between(cc.loaded().first(), cpu.loaded_top(d.id)));
                f(cc.previous(), cc.previous().seen());
            }
        }
    }

    /// Objects in the magazines of the CPUs, which may be busy with them meanwhile.
    fn in_cpus(&self, d: &Descriptor) -> u64 {
        let p = self.pages.platform();
        let cpus = (0..p.nr_cpu_ids()).filter_map(|id| p.cpu(id));
        cpus.map(|cpu| {
            // The CPU's side of a pinned cache stays, and what is read of magazines that do not is a number.
            self.cpu_cache(cpu, d.id).map_or(0, |cc| {
                let loaded = nr_between(cc.first_place.load(Relaxed), cpu.loaded_top(d.id));
                u64::from(loaded + cc.previous().seen())
            })
        })
        .sum()
    }

    /// Calls `f` with each slab of a list.
    pub(super) fn walk(&self, list: &List, mut f: impl FnMut(u32)) {
        let mut head = list.first;
        for _ in 0..list.nr {
            if head == NONE {
                return;
            }
            f(head);
            (head, _) = self.pages.map().page_in_map(head).lru();
        }
    }

    /// Checks that every object is where it should be.
    pub(crate) fn audit(&self) -> Result<ObjectAudit, ObjectAuditError> {
        let mut sum = ObjectAudit::default();
        let mut result = Ok(());
        self.each(|_, d| result = result.and_then(|()| self.audit_cache(d, &mut sum)));
        let result = result.and_then(|()| self.audit_tables());
        sum.own_frames = self.root().map_or(0, |root| root.frames.load(Relaxed));
        if let Some(pool) = self.slabs.kfence.pool() {
            sum.own_frames += pool.frames;
            pool.each_live(|_, _| sum.sampled += 1);
            sum.live += sum.sampled;
        }
        result.map(|()| sum)
    }

    /// Checks that the CPUs have nothing of caches that are no more.
    fn audit_tables(&self) -> Result<(), ObjectAuditError> {
        let Some(root) = self.root() else { return Ok(()) };
        let p = self.pages.platform();
        for cpu in (0..p.nr_cpu_ids()).filter_map(|id| p.cpu(id)) {
            let left = |id: &u16| root.cache(*id).is_none() && self.cpu_cache(cpu, *id).is_some();
            if let Some(id) = (1..MAX_CACHES as u16).find(left) {
                return Err(ObjectAuditError::Left(cpu.id(), id));
            }
        }
        Ok(())
    }

    fn audit_cache(
        &self,
        d: &'static Descriptor,
        sum: &mut ObjectAudit,
    ) -> Result<(), ObjectAuditError> {
        let (mut cached, mut live, mut all_free, mut kept) = (0, 0, 0, 0);
        for (at, shelf) in d.shelves.iter().enumerate() {
            let lists = shelf.lists.lock(self.pages.platform());
            let mut free = 0;
            let mut bad = None;
            for list in lists.all() {
                let mut seen = 0;
                self.walk(list, |head| {
                    seen += 1;
                    let page = self.pages.map().page_in_map(head);
                    let of = |state| self.count(d, head, state);
                    let here = of(state::FREE);
                    free += u64::from(here);
                    cached += u64::from(of(state::CACHED));
                    live += u64::from(self.count_used(d, head));
                    kept += u64::from(of(state::QUARANTINED));
                    sum.slab_frames += 1 << d.layout.order;
                    let listed = if here == 0 {
                        &lists.full
                    } else if here == d.layout.nr {
                        &lists.empty
                    } else {
                        &lists.partial
                    };
                    let counted = page.free_objects();
                    let elsewhere = self.shelf_with(d, head) != at;
                    if !core::ptr::eq(list, listed) || counted != here || elsewhere {
                        bad = Some(head);
                    }
                });
                if seen != list.nr {
                    bad = Some(list.first);
                }
            }
            if let Some(head) = bad {
                return Err(ObjectAuditError::Slab(d.name, Pfn(head)));
            }
            if free != lists.free {
                return Err(ObjectAuditError::Free(d.name, lists.free, free));
            }
            all_free += free;
        }
        let held = self.info_of(d).cached_objects;
        let marked = self.cached_right(d);
        if held != cached || !marked {
            return Err(ObjectAuditError::Cached(d.name, held, cached));
        }
        if d.largest.is_some() {
            sum.live += live;
            sum.free += all_free;
        }
        sum.cached += cached;
        sum.quarantined += kept;
        Ok(())
    }

    /// Whether every object in the CPUs' magazines is marked as cached.
    fn cached_right(&self, d: &'static Descriptor) -> bool {
        let mut right = true;
        self.each_magazine(d, |m, nr| {
            right &= m.first_objects(nr).all(|object| self.is_cached(d, object.at));
        });
        right
    }

    /// Whether an object of the cache begins at an address, marked as cached. Any address may be asked about: on a machine
    /// that is not quiet a magazine's memory may be another's by now.
    fn is_cached(&self, d: &Descriptor, at: NonNull<u8>) -> bool {
        self.in_slab(at.as_ptr())
            .is_some_and(|(of, object)| of.id == d.id && object.state.get() == state::CACHED)
    }

    /// Reports the live objects of a cache, the first few by address and with their users if those are noted, and returns how many there are.
    pub(super) fn list_live(&self, d: &'static Descriptor) -> u64 {
        let mut live = 0;
        let p = self.pages.platform();
        let mut listed = [const { None }; LISTED as usize];
        for shelf in d.shelves {
            let lists = shelf.lists.lock(p);
            for list in lists.in_use() {
                self.walk(list, |head| {
                    self.each_live(d, head, |object| {
                        if let Some(at) = listed.get_mut(live as usize) {
                            *at = Some(object);
                        }
                        live += 1;
                    });
                });
            }
        }
        self.each_sampled_of(d, |object| {
            if let Some(at) = listed.get_mut(live as usize) {
                *at = Some(object);
            }
            live += 1;
        });
        if live > 0 {
            p.report(
                Level::Bug,
                format_args!("BUG {}: {live} objects remaining on kmem_cache_destroy()", d.name),
            );
            listed.iter().flatten().for_each(|object| self.report_live(d, object));
        }
        live
    }
}
