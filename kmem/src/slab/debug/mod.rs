//! Finding mistakes with objects: overruns, writes after free, who did it \[S5, S6, S9, D2\].
//!
//! # Concepts
//! A cache *watches* its objects if one of [`SlabFlags::DEBUG`] is on: at its creation by its flags or by the
//! machine's pattern (`pattern`), or later for what needs no room of its own.
//!
//! - `RED_ZONE`: bytes before and behind each object, of one value while it is free and another while it is in
//!   use (`areas`). Of kmalloc's objects also what is left behind the bytes asked for.
//! - `POISON`: a free object's bytes are known, so that a write after free shows; one just given out holds 0xa5,
//!   so that its use before it is written to shows. Constructors rerun at each allocation.
//! - `STORE_USER`: who allocated and who freed an object last, when and on which CPU.
//! - `CONSISTENCY_CHECKS`: what is counted of a slab agrees with the states of its objects.
//!
//! Bytes are checked when an object is freed, when it is given out, when its slab is given back, and when
//! somebody asks ([`kmem_cache_validate`](crate::Kmem::kmem_cache_validate)). A report says what is wrong, where,
//! with the bytes around, and the object's users.
//!
//! *Quarantine.* A free object that was written to, and one that is freed with a zone overwritten, is not
//! used again: whoever wrote there may do so once more, and what is there is evidence. It belongs to nobody,
//! keeps its slab, and goes with its cache. A live object whose zone is found overwritten stays its owner's.
//!
//! # Implementation
//! Watching caches have no magazines, so every request takes the slow path that exists anyway and that looks
//! here; the fast paths know nothing of all this. The same goes for all caches while objects are to be zeroed
//! ([`set_init_on_alloc`](crate::Kmem::set_init_on_alloc)), are noted by call site (`tags`) or traced (`trace`). To switch something on is to have CPUs
//! give their magazines up, and to wait until they did (`switch`).
//!
//! An object is CACHED between its slab and its user, while it is looked at. Watching caches keep some empty
//! slabs, or a write after free would mostly hit pages that are others' by then.
//!
//! # Locking
//! A shelf's lock while a whole cache is looked at. Nothing is reported with it held.
//!
//! See [SLUB debugging](https://docs.kernel.org/mm/slab.html).

mod areas;
pub(crate) mod pattern;
mod report;
mod switch;
mod tags;
mod trace;
mod validate;

pub(super) use pattern::flags_for;
pub use switch::DebugError;
pub(super) use tags::Tags;
pub(super) use trace::Asked;
pub(crate) use trace::TRACE;

use super::{
    Objects, SlabFlags,
    cache::{Descriptor, Lists, Root},
    magazine::Object,
    node::Slab,
    state,
};
use crate::{
    context::Cpu, error::Misuse, gfp::Gfp, page_alloc::Reclaim, platform::Platform, sites::Sites,
    types::Pfn,
};
use areas::{Bytes, POISON_FRESH, Track, Use, Wrong, ZONE_FREE, ZONE_LIVE};
use core::{
    panic::Location,
    sync::atomic::Ordering::{Acquire, Relaxed},
};
use report::Story;

/// Flags that need something to be kept in or around objects, so that they cannot be had later.
pub(super) const MARKED: SlabFlags =
    SlabFlags::RED_ZONE.union(SlabFlags::POISON).union(SlabFlags::STORE_USER);

/// Empty slabs that a watching cache keeps of each node, shared out among its shelves.
pub(super) const KEPT: u32 = 4;

/// What all caches of a machine do: bits of `Slabs::modes`.
pub(crate) const INIT_ON_ALLOC: u32 = 1;
/// Some allocations fail by plan.
pub(crate) const FAILSLAB: u32 = 8;
pub(crate) const INIT_ON_FREE: u32 = 2;

/// The CPU of those who are on none.
const NO_CPU: u32 = u32::MAX - 1;

/// What is wrong around a free object.
fn wrong_when_free(d: &Descriptor, bytes: &Bytes<'_>) -> Option<(Fault, Wrong)> {
    let poison = d.flags.contains(SlabFlags::POISON);
    let under = || bytes.underrun(ZONE_FREE).map(|w| (Fault::Underrun, w));
    let over = || bytes.overrun(ZONE_FREE, false).map(|w| (Fault::Overrun, w));
    let written = bytes.written_after_free().filter(|_| poison).map(|w| (Fault::Written, w));
    let zones = || if d.areas.zones() { under().or_else(over) } else { None };
    written.or_else(zones)
}

/// What is wrong around an object in use.
fn wrong_when_live(d: &Descriptor, bytes: &Bytes<'_>) -> Option<(Fault, Wrong)> {
    if !d.areas.zones() {
        return None;
    }
    let over = bytes.overrun(ZONE_LIVE, true).map(|w| (Fault::Overrun, w));
    over.or_else(|| bytes.underrun(ZONE_LIVE).map(|w| (Fault::Underrun, w)))
}

#[derive(Clone, Copy)]
enum Fault {
    Overrun,
    Underrun,
    Written,
}

impl Fault {
    fn misuse(self, d: &Descriptor, addr: usize, Wrong { offset, found }: Wrong) -> Misuse {
        let cache = d.name;
        match self {
            Fault::Overrun => Misuse::Overrun { addr, cache, offset, found },
            Fault::Underrun => Misuse::Underrun { addr, cache, offset, found },
            Fault::Written => Misuse::WrittenAfterFree { addr, cache, offset, found },
        }
    }
}

impl Descriptor {
    /// Whether something is kept in or around its objects.
    pub(super) fn marks(&self) -> bool {
        self.flags.intersects(MARKED)
    }

    /// Whether its objects may be zeroed where all are: not what a constructor made or readers may look at.
    fn may_be_zeroed(&self) -> bool {
        self.ctor.is_none() && !self.flags.contains(SlabFlags::TYPESAFE_BY_RCU)
    }

    /// Whether slabs' counts are checked.
    fn counts(&self) -> bool {
        SlabFlags::from_bits_retain(self.watched.load(Relaxed))
            .contains(SlabFlags::CONSISTENCY_CHECKS)
    }

    /// Whether an empty slab is kept, with so many there.
    pub(super) fn keeps(&self, empty: u32) -> bool {
        empty <= KEPT.div_ceil(self.per_node as u32) && self.marks()
    }

    /// An object of the cache's.
    fn bytes(&self, object: &Object) -> Bytes<'_> {
        // SAFETY: an object of one of its slabs, all of which have its areas; frames stay mapped.
        unsafe { Bytes::new(object.at, &self.areas) }
    }
}

impl<'a, P: Platform, R: Reclaim> Objects<'a, P, R> {
    /// Whether the cache has to do without magazines.
    pub(super) fn bare(&self, d: &Descriptor) -> bool {
        d.watched.load(Acquire) != 0 || self.slabs.modes.load(Acquire) != 0
    }

    /// The table of places, made if there is none.
    pub(super) fn make_sites(&self, root: &'static Root, gfp: Gfp) -> Option<()> {
        if self.pages.sites().is_some() {
            return Some(());
        }
        let order = super::order_for(size_of::<Sites>(), P::PAGE_SHIFT);
        let at = self.own_pages(gfp, order)?;
        // SAFETY: zeroed pages of that size, which are an empty table; from here on they are the machine's if it
        // takes them.
        if unsafe { self.pages.take_sites(at.cast()) } {
            root.frames.fetch_add(1 << order, Relaxed);
        } else {
            self.free_own_pages(at, order);
        }
        Some(())
    }

    /// A use of an object, by the caller, now.
    fn track(&self, caller: &'static Location<'static>) -> Track {
        let p = self.pages.platform();
        Track {
            site: self.pages.sites().map_or(0, |sites| sites.number(caller)),
            cpu: p.this_cpu().map_or(NO_CPU, |cpu: &Cpu| cpu.id() as u32),
            when: p.now_ns(),
        }
    }

    /// Makes an object of a new slab a free one, of a cache that `marks`.
    pub(super) fn prepare_object(&self, d: &Descriptor, object: &Object) {
        let bytes = d.bytes(object);
        bytes.set_track(Use::Alloc, Track::NONE);
        bytes.set_track(Use::Free, Track::NONE);
        bytes.draw_zones(ZONE_FREE);
        if d.flags.contains(SlabFlags::POISON) {
            bytes.poison();
        }
    }

    /// Looks at an object that was taken out of its slab and makes it one in use; `false`, after a report, if
    /// it was written to: it is quarantined then.
    #[track_caller]
    pub(super) fn outgoing(&self, d: &'static Descriptor, object: &Object) -> bool {
        let bytes = d.bytes(object);
        if d.marks()
            && let Some(damage) = wrong_when_free(d, &bytes)
        {
            object.state.set(state::QUARANTINED);
            self.damage(d, object, damage);
            return false;
        }
        if d.flags.contains(SlabFlags::POISON) {
            match d.ctor {
                Some(ctor) => ctor(object.at.as_ptr()),
                None => bytes.fill_object(POISON_FRESH),
            }
        } else if d.may_be_zeroed() && self.slabs.modes.load(Relaxed) & INIT_ON_ALLOC != 0 {
            self.zero(d, object.at);
        }
        if d.marks() {
            bytes.draw_zones(ZONE_LIVE);
            bytes.ask(d.size);
            bytes.set_track(Use::Alloc, self.track(Location::caller()));
        }
        self.tag(object.at.addr().get(), d.size as usize);
        object.state.publish(state::LIVE);
        true
    }

    /// Looks at an object that is being freed, and makes it one that nobody may write to.
    ///
    /// # Errors
    /// What is wrong with it, after a report: it is quarantined.
    #[track_caller]
    pub(super) fn incoming(&self, d: &'static Descriptor, object: &Object) -> Result<(), Misuse> {
        let bytes = d.bytes(object);
        self.untag(object.at.addr().get());
        if d.marks() {
            bytes.set_track(Use::Free, self.track(Location::caller()));
            if let Some(damage) = wrong_when_live(d, &bytes) {
                object.state.set(state::QUARANTINED);
                return Err(self.damage(d, object, damage));
            }
            bytes.draw_zones(ZONE_FREE);
        }
        if d.flags.contains(SlabFlags::POISON) {
            bytes.poison();
        } else if d.may_be_zeroed() && self.slabs.modes.load(Relaxed) & INIT_ON_FREE != 0 {
            self.zero(d, object.at);
        }
        Ok(())
    }

    /// Notes that only so many bytes of an object that was just given out may be used, where that is kept.
    #[inline]
    pub(super) fn ask(&self, d: &'static Descriptor, object: &Object, bytes: usize) {
        if d.areas.asked_at != 0 {
            d.bytes(object).ask(bytes as u32);
        }
    }

    /// Bytes of a live object that its owner may use.
    pub(super) fn usable(&self, d: &'static Descriptor, object: &Object) -> usize {
        d.bytes(object).asked() as usize
    }

    /// Looks at the objects of a slab that is about to be given back: all are free, and nobody else's.
    pub(super) fn inspect_leaving(&self, d: &'static Descriptor, slab: &Slab) {
        if !d.marks() {
            return;
        }
        for object in (0..d.layout.nr).map(|i| slab.object(d, i)) {
            if let Some(damage) = wrong_when_free(d, &d.bytes(&object)) {
                self.damage(d, &object, damage);
            }
        }
    }

    /// What a slab's states say where its count disagrees; the count is made to agree.
    pub(super) fn mend(&self, d: &Descriptor, lists: &mut Lists, head: u32) -> Option<Misuse> {
        if !d.counts() {
            return None;
        }
        let slab = self.slab(d, head);
        let states = || (0..d.layout.nr).map(|i| slab.object(d, i).state);
        // No object is in such a state: somebody wrote there. It is nobody's from now on.
        // Acquire pairs with the Release in `pack`: after the last move nothing is MOVING.
        let moves = d.moves.load(Acquire) > 0;
        let known = |s: u8| match s {
            state::FREE..=state::QUARANTINED | state::DYING => true,
            state::MOVING | state::GONE | state::LEAVING => moves,
            s => self.leaks_noted() && state::in_use(s),
        };
        let strange = states().filter(|s| !known(s.get()));
        strange.for_each(|s| s.set(state::QUARANTINED));
        let found = states().filter(|s| s.get() == state::FREE).count() as u32;
        let counted = self.pages.map().page_in_map(head).free_objects();
        if counted == found {
            return None;
        }
        if counted <= d.layout.nr {
            self.change_free(lists, d, head, counted, found);
        }
        Some(Misuse::SlabDamaged { cache: d.name, pfn: Pfn(head), counted, found })
    }

    /// Reports a misuse of an object with what is known of it.
    #[cold]
    #[track_caller]
    pub(super) fn object_misuse(
        &self,
        d: &'static Descriptor,
        object: &Object,
        what: Misuse,
    ) -> Misuse {
        if !d.marks() {
            return self.pages.misuse(what);
        }
        let story = self.story(d, object, None);
        self.pages.misuse_with(what, format_args!("{story}"))
    }

    /// Reports what is wrong around an object, with the bytes there.
    #[cold]
    #[track_caller]
    fn damage(
        &self,
        d: &'static Descriptor,
        object: &Object,
        (fault, wrong): (Fault, Wrong),
    ) -> Misuse {
        let what = fault.misuse(d, object.at.addr().get(), wrong);
        let story = self.story(d, object, Some(wrong.offset));
        self.pages.misuse_with(what, format_args!("{story}"))
    }

    /// What is known of an object.
    fn story(
        &self,
        d: &'static Descriptor,
        object: &Object,
        offset: Option<i32>,
    ) -> Story<'static> {
        let addr = object.at.addr().get();
        let map = self.pages.map();
        let frame = map.frame_at(map.direct_offset(addr), P::PAGE_SHIFT);
        let head = d.head(frame);
        let free = self.count(d, head, state::FREE);
        Story {
            cache: d.name,
            addr,
            size: d.size,
            slab: (Pfn(head), d.layout.nr, free),
            bytes: d.bytes(object),
            sites: self.pages.sites(),
            offset,
        }
    }

    /// Who allocated an object, and when, if that is kept with it.
    pub(super) fn user_of(
        &self,
        d: &'static Descriptor,
        object: &Object,
    ) -> Option<(Option<&'static Location<'static>>, u64)> {
        let track = d.bytes(object).track(Use::Alloc)?;
        Some((self.pages.sites().and_then(|sites| sites.place(track.site)), track.when))
    }

    /// Where an object of a cache was found live, for a destroy that lists them.
    pub(super) fn report_live(&self, d: &'static Descriptor, object: &Object) {
        let p = self.pages.platform();
        let addr = object.at.addr();
        let text = format_args!("Object {addr:#x} of {} is in use", d.name);
        if d.marks() {
            let story = self.story(d, object, None);
            p.report(crate::platform::Level::Bug, format_args!("{text}{story}"));
        } else {
            p.report(crate::platform::Level::Bug, text);
        }
    }
}
