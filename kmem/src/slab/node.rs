//! Slabs: making them, giving them back, and taking objects out of them under a shelf's lock.
//!
//! # Implementation
//! A slab is named by its first frame. Its frames' owners name the cache and the slab's colour; its links
//! and the number of its free objects are in its first frame's `Page`.
//!
//! A node's slabs lie on *shelves*. A slab is on that of the CPU it was made for as long as there is the slab; full or
//! empty, its lists are that shelf's. So CPUs that allocate and free objects of their own share neither locks nor
//! lists, and state bytes at most of objects that they shared while the cache was small, or of large ones, whose table has
//! several slabs in a line. A CPU whose shelf is bare takes what others' have, as far as [`Whose`] says.
//!
//! # Locking
//! A shelf's lock guards its lists and the state bytes of its slabs that are FREE. Nothing is called with it held.

use super::{
    Objects, SlabFlags,
    cache::{Descriptor, Internal, List, Lists, NONE, Root},
    layout::{COLOUR_UNIT, MAX_COLOURS, OUTSIDE},
    magazine::Object,
    shuffle::Shuffle,
    state::{self, State},
};
use crate::{
    context::Cpu,
    error::AllocError,
    gfp::Gfp,
    memmap::{LEAVING, NO_CACHE, OWNER_RCU, OWNER_SHIFT},
    page_alloc::Reclaim,
    page_state::NodeStat,
    platform::{Level, Platform},
    types::Pfn,
};
use core::{
    ptr::{self, NonNull},
    sync::atomic::{
        Ordering::{Relaxed, Release},
        fence,
    },
};

// A frame's owner says the number of its cache, and below that the slab's colour as a negative number: where an object is
// looked for, adding that is an instruction less.
const _: () = assert!(
    super::cache::MAX_CACHES == 1 << (16 - OWNER_SHIFT)
        && NO_CACHE as usize == super::cache::MAX_CACHES - 1
        && LEAVING == NO_CACHE - 1
        && MAX_COLOURS <= 1 << (OWNER_SHIFT - 1)
);

/// The number of the cache that a frame with an owner belongs to.
#[inline(always)]
pub(super) const fn number(owner: u16) -> u16 {
    owner >> OWNER_SHIFT
}

/// The owner of a slab's frames.
const fn owner_for(number: u16, colour: u32) -> u16 {
    number << OWNER_SHIFT | low_bits(colour.wrapping_neg() as u16)
}

const fn low_bits(owner: u16) -> u16 {
    owner % (1 << OWNER_SHIFT)
}

/// What to add to an address to go back as far as the first object of its slab is behind the slab's beginning: a
/// negative number, wrapped.
#[inline(always)]
pub(super) const fn colour_back(owner: u16) -> u32 {
    const UNUSED: u32 = u32::BITS - OWNER_SHIFT;
    (((owner as i32) << UNUSED) >> (UNUSED - COLOUR_UNIT.ilog2())) as u32
}

/// What of a request's flags concerns the pages of a new slab.
pub(super) const FOR_PAGES: Gfp = Gfp::RECLAIM
    .union(Gfp::IO)
    .union(Gfp::FS)
    .union(Gfp::HIGH)
    .union(Gfp::MEMALLOC)
    .union(Gfp::NOMEMALLOC)
    .union(Gfp::NOWARN)
    .union(Gfp::NORETRY)
    .union(Gfp::RETRY_MAYFAIL)
    .union(Gfp::NOFAIL)
    .union(Gfp::HARDWALL)
    .union(Gfp::THISNODE);

/// How often a request that may reclaim tries.
const RETRIES: Gfp = Gfp::NORETRY.union(Gfp::RETRY_MAYFAIL).union(Gfp::NOFAIL);

/// A slab, found.
pub(super) struct Slab {
    /// Its first frame.
    pub(super) head: u32,
    /// Its first object.
    first: NonNull<u8>,
    states: *mut u8,
}

impl Slab {
    pub(super) fn state(&self, i: u32) -> State {
        let at = self.states.wrapping_add(i as usize).cast();
        // SAFETY: `Objects::slab` made `states` the state bytes of a slab, and callers stay below their
        // number.
        unsafe { State::new(at) }
    }

    /// The object that an address of the slab's is in.
    pub(super) fn object_around(&self, d: &Descriptor, addr: usize) -> Option<Object> {
        let i = addr.checked_sub(self.first.addr().get())? as u32 / d.layout.stride;
        (i < d.layout.nr).then(|| self.object(d, i))
    }

    pub(super) fn object(&self, d: &Descriptor, i: u32) -> Object {
        let offset = (i * d.layout.stride) as usize;
        // SAFETY: callers stay below the number of objects, so this is inside the slab.
        let at = unsafe { self.first.add(offset) };
        Object { at, state: self.state(i) }
    }
}

/// Takes up to `most` free objects out of a slab, from the `i`-th in the given order on, and makes them `to`. Says
/// how many there were, and where the search ended.
#[inline(always)]
fn search(
    d: &Descriptor,
    slab: &Slab,
    mut i: u32,
    most: u32,
    to: u8,
    order: impl Fn(u32) -> u32,
    out: &mut impl FnMut(Object),
) -> (u32, u32) {
    let mut taken = 0;
    for _ in 0..d.layout.nr {
        if taken == most {
            break;
        }
        if i >= d.layout.nr {
            i = 0;
        }
        let object = slab.object(d, order(i));
        if object.state.get() == state::FREE {
            object.state.set(to);
            out(object);
            taken += 1;
        }
        i += 1;
    }
    (taken, i)
}

/// As `search`, in an order drawn from a seed.
#[cold]
#[inline(never)]
fn search_shuffled(
    d: &Descriptor,
    slab: &Slab,
    i: u32,
    most: u32,
    to: u8,
    seed: u64,
    mut out: &mut dyn FnMut(Object),
) -> (u32, u32) {
    let order = Shuffle::new(seed, d.id, slab.head, d.layout.nr);
    search(d, slab, i, most, to, |i| order.at(i), &mut out)
}

/// Slabs of a shelf's from which on its partial ones are for its own CPUs.
const MANY: u64 = 4;

/// From whose partial slabs a CPU takes objects when its own shelf is bare, before a slab is made; empty ones are
/// anybody's. CPUs that take objects of one slab write to the same state bytes. With slabs of their own of every size for all
/// CPUs the layer held more pages than Linux on the recorded traces; with small ones it does not.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Whose {
    /// From anybody's.
    Any,
    /// From those of shelves with few slabs, and as for `Own`.
    Few,
    /// From nobody's, save one that is half free where there are more.
    Own,
}

impl<'a, P: Platform, R: Reclaim> Objects<'a, P, R> {
    /// The slab of a cache that the frame belongs to. The frame is one of the cache's.
    #[inline]
    pub(super) fn slab(&self, d: &Descriptor, pfn: u32) -> Slab {
        let map = self.pages.map();
        let head = d.head(pfn);
        let addr = map.direct_address(head, P::PAGE_SHIFT);
        let start: *mut u8 = core::ptr::with_exposed_provenance_mut(addr);
        let owner = map.owner_at(map.direct_offset(addr), P::PAGE_SHIFT);
        let first = start.wrapping_add(d.layout.lead.wrapping_sub(colour_back(owner)) as usize);
        let (base, shift) = d.layout.states_place(map);
        let states = base.wrapping_add(map.direct_offset(first.addr()) >> shift);
        let states = ptr::with_exposed_provenance_mut(states);
        // A slab is not at address 0.
        Slab { head, first: NonNull::new(first).unwrap_or(NonNull::dangling()), states }
    }

    /// The object of a cache at an address; `None` where none begins.
    pub(super) fn object_at(
        &self,
        d: &Descriptor,
        pfn: u32,
        at: NonNull<u8>,
    ) -> Option<(Slab, Object)> {
        let slab = self.slab(d, pfn);
        let i = d.layout.index(at.addr().get().wrapping_sub(slab.first.addr().get()) as u32)?;
        let object = Object { at, state: slab.state(i) };
        Some((slab, object))
    }

    fn unlink(&self, list: &mut List, head: u32) {
        let map = self.pages.map();
        let (next, prev) = map.page_in_map(head).lru();
        if next != NONE {
            let (n, _) = map.page_in_map(next).lru();
            map.page_in_map(next).set_lru(n, prev);
        } else {
            list.last = prev;
        }
        if prev != NONE {
            let (_, p) = map.page_in_map(prev).lru();
            map.page_in_map(prev).set_lru(next, p);
        } else {
            list.first = next;
        }
        list.nr -= 1;
    }

    fn link(&self, list: &mut List, head: u32) {
        let map = self.pages.map();
        if list.first != NONE {
            let (next, _) = map.page_in_map(list.first).lru();
            map.page_in_map(list.first).set_lru(next, head);
        } else {
            list.last = head;
        }
        map.page_in_map(head).set_lru(list.first, NONE);
        list.first = head;
        list.nr += 1;
    }

    /// Makes the first slab of a list the last.
    pub(super) fn rotate(&self, list: &mut List) {
        if list.nr < 2 {
            return;
        }
        let map = self.pages.map();
        let head = list.first;
        self.unlink(list, head);
        let (_, prev) = map.page_in_map(list.last).lru();
        map.page_in_map(list.last).set_lru(head, prev);
        map.page_in_map(head).set_lru(NONE, list.last);
        list.last = head;
        list.nr += 1;
    }

    /// The list that a slab with so many free objects is on.
    fn list_for<'l>(lists: &'l mut Lists, d: &Descriptor, free: u32) -> &'l mut List {
        if free == 0 {
            &mut lists.full
        } else if free == d.layout.nr {
            &mut lists.empty
        } else {
            &mut lists.partial
        }
    }

    pub(super) fn change_free(
        &self,
        lists: &mut Lists,
        d: &Descriptor,
        head: u32,
        before: u32,
        after: u32,
    ) {
        let page = self.pages.map().page_in_map(head);
        page.set_free_objects(after);
        lists.free = lists.free + u64::from(after) - u64::from(before);
        let nr = d.layout.nr;
        if (before == 0, before == nr) != (after == 0, after == nr) {
            self.unlink(Self::list_for(lists, d, before), head);
            self.link(Self::list_for(lists, d, after), head);
        }
    }

    /// Free objects of a slab, by its state bytes.
    fn count_free(d: &Descriptor, slab: &Slab) -> u32 {
        (0..d.layout.nr).filter(|i| slab.state(*i).get() == state::FREE).count() as u32
    }

    /// Objects of a slab that are in a state.
    pub(super) fn count(&self, d: &Descriptor, head: u32, state: u8) -> u32 {
        let slab = self.slab(d, head);
        (0..d.layout.nr).filter(|i| slab.state(*i).get() == state).count() as u32
    }

    /// Objects of a slab that are in use.
    pub(super) fn count_used(&self, d: &Descriptor, head: u32) -> u32 {
        let slab = self.slab(d, head);
        (0..d.layout.nr).filter(|i| state::held(slab.state(*i).get())).count() as u32
    }

    /// Calls `f` with each live object of a slab.
    pub(super) fn each_live(&self, d: &Descriptor, head: u32, f: impl FnMut(Object)) {
        let slab = self.slab(d, head);
        let objects = (0..d.layout.nr).map(|i| slab.object(d, i));
        objects.filter(|o| state::held(o.state.get())).for_each(f);
    }

    /// Whether at least half of a slab's objects lie free in it.
    fn is_sparse(&self, d: &Descriptor, head: u32) -> bool {
        self.pages.map().page_in_map(head).free_objects() >= d.layout.nr / 2
    }

    /// The slab of a shelf to take objects from, for CPUs that take them from such a shelf.
    #[inline]
    fn next_slab(&self, d: &Descriptor, lists: &Lists, whose: Whose) -> Option<u32> {
        let partial = match whose {
            Whose::Any => lists.partial.first,
            _ => self.next_to_spare(d, lists, whose),
        };
        let head = if partial != NONE { partial } else { lists.empty.first };
        (head != NONE).then_some(head)
    }

    /// A partial slab that other CPUs may take objects from, or `NONE`.
    #[cold]
    fn next_to_spare(&self, d: &Descriptor, lists: &Lists, whose: Whose) -> u32 {
        let List { first, last, nr } = lists.partial;
        if whose == Whose::Few && lists.grown - lists.released < MANY {
            return first;
        }
        if nr < 2 {
            return NONE;
        }
        // The one that became partial last has the fewest free ones as a rule, and the one that is so for longest the
        // most.
        [first, last].into_iter().find(|head| self.is_sparse(d, *head)).unwrap_or(NONE)
    }

    /// Takes up to `want` objects out of a shelf's slabs, partial ones first, and makes them `to`.
    pub(super) fn take(
        &self,
        d: &Descriptor,
        lists: &mut Lists,
        whose: Whose,
        want: u32,
        to: u8,
        mut out: impl FnMut(Object),
    ) -> u32 {
        let seed = self.slabs.random.load(Relaxed);
        let mut got = 0;
        while got < want {
            let Some(head) = self.next_slab(d, lists, whose) else { break };
            let slab = self.slab(d, head);
            let page = self.pages.map().page_in_map(head);
            let before = page.free_objects();
            let most = before.min(want - got);
            // Where the last search ended, the next one goes on.
            let i = page.next_object();
            let (taken, i) = if seed == 0 {
                search(d, &slab, i, most, to, |i| i, &mut out)
            } else {
                search_shuffled(d, &slab, i, most, to, seed, &mut out)
            };
            page.set_next_object(i);
            got += taken;
            // Where all was looked at in vain, more were counted than there are: somebody wrote to the state
            // bytes, or to the page.
            let left = if taken < most { 0 } else { before - taken };
            self.change_free(lists, d, head, before, left);
            if whose != Whose::Any && head == lists.partial.last && !self.is_sparse(d, head) {
                // Another one's turn.
                self.unlink(&mut lists.partial, head);
                self.link(&mut lists.partial, head);
            }
            if most == 0 {
                break;
            }
        }
        got
    }

    /// Puts an object back in its slab. Returns a slab that became empty: it is on no list any more. None is
    /// kept: what magazines hold keeps the slabs in use that traffic swings over. Caches without magazines that
    /// look for mistakes keep some.
    #[inline]
    pub(super) fn put_back(
        &self,
        d: &Descriptor,
        lists: &mut Lists,
        head: u32,
        object: Object,
    ) -> Option<u32> {
        object.state.set(state::FREE);
        let page = self.pages.map().page_in_map(head);
        let (before, nr) = (page.free_objects(), d.layout.nr);
        if before > 0 && before + 1 < nr {
            page.set_free_objects(before + 1);
            lists.free += 1;
            return None;
        }
        self.change_free(lists, d, head, before, before + 1);
        if before + 1 == nr && !d.keeps(lists.empty.nr) {
            return self.pop_empty(d, lists);
        }
        None
    }

    /// Takes the cache's number off a slab that leaves: who finds it under the lock finds a slab of the cache's. The
    /// colour is needed until the end. Until then nobody's number is there, and not 0: marked as it is, the slab would
    /// look like a large object.
    #[inline(never)]
    fn unname(&self, d: &Descriptor, head: u32) {
        let map = self.pages.map();
        let at = map.direct_offset(map.direct_address(head, P::PAGE_SHIFT));
        let colour = low_bits(map.owner_at(at, P::PAGE_SHIFT));
        map.set_owner(head, 1 << d.layout.order, LEAVING << OWNER_SHIFT | colour);
    }

    /// Takes an empty slab off its list.
    pub(super) fn pop_empty(&self, d: &Descriptor, lists: &mut Lists) -> Option<u32> {
        let head = lists.empty.first;
        if head == NONE {
            return None;
        }
        self.unlink(&mut lists.empty, head);
        lists.free -= u64::from(d.layout.nr);
        lists.released += 1;
        self.unname(d, head);
        Some(head)
    }

    /// The node of a frame.
    pub(super) fn node_of(&self, pfn: u32) -> usize {
        if self.pages.nr_nodes() == 1 {
            return 0;
        }
        self.pages.page_zone(Pfn(pfn)).map_or(0, |zone| zone.node())
    }

    /// The number of the shelf that has a slab.
    #[inline]
    pub(super) fn shelf_with(&self, d: &Descriptor, head: u32) -> usize {
        d.shelf_of(self.node_of(head), self.pages.map().page_in_map(head).shelf())
    }

    /// Makes a slab for the CPUs of the caller's shelf, on its list of empty ones; returns the shelf's number.
    pub(super) fn grow(
        &self,
        d: &'static Descriptor,
        gfp: Gfp,
        node: Option<usize>,
    ) -> Result<usize, AllocError> {
        let order = d.layout.order;
        let mut flags = gfp & FOR_PAGES;
        if d.flags.contains(SlabFlags::CACHE_DMA) {
            flags |= Gfp::DMA;
        } else if d.flags.contains(SlabFlags::CACHE_DMA32) {
            flags |= Gfp::DMA32;
        }
        if d.flags.contains(SlabFlags::RECLAIM_ACCOUNT) {
            flags |= Gfp::RECLAIMABLE;
        }
        if order > 1 {
            flags -= Gfp::NOFAIL;
        }
        let page = self.pages.alloc_pages_node(node.map_or(-1, |n| n as i32), flags, order)?;
        let pfn = self.pages.page_to_pfn(page).unwrap_or_default();
        let Some(start) = self.pages.platform().direct_map(pfn) else {
            // A machine whose frames have no contents has no objects.
            let _ = self.pages.__free_pages(page, order);
            return Err(AllocError::NoMemory);
        };
        let node = self.node_of(pfn.0);
        let number = d.shelf_of(node, self.this_cpu());
        let Some(shelf) = d.shelves.get(number) else {
            let _ = self.pages.__free_pages(page, order);
            return Err(AllocError::NoMemory);
        };
        let map = self.pages.map();
        let colour = {
            let mut lists = shelf.lists.lock(self.pages.platform());
            lists.colour = (lists.colour + d.layout.colour_step) % d.layout.colours;
            lists.colour
        };
        page.set_shelf(number % d.per_node);
        // Release pairs with the Acquire in `object_in`.
        fence(Release);
        // Before the mark: what is marked and has no owner is a large object.
        map.set_owner(pfn.0, 1 << order, owner_for(d.id, colour));
        page.mark_slab();
        let _ = start.as_ptr().expose_provenance();
        let slab = self.slab(d, pfn.0);
        if d.layout.states_at != OUTSIDE {
            // Those behind the last object's, too.
            (0..=d.layout.mask / d.layout.stride).for_each(|i| slab.state(i).set(state::FREE));
        }
        for i in 0..d.layout.nr {
            slab.state(i).set(state::FREE);
            if let Some(ctor) = d.ctor {
                ctor(slab.object(d, i).at.as_ptr());
            }
        }
        if d.marks() {
            (0..d.layout.nr).for_each(|i| self.prepare_object(d, &slab.object(d, i)));
        }
        self.pages.mod_node_page_state(node, Self::slab_stat(d), 1 << order);
        let mut lists = shelf.lists.lock(self.pages.platform());
        page.set_free_objects(d.layout.nr);
        page.set_next_object(0);
        lists.free += u64::from(d.layout.nr);
        lists.grown += 1;
        self.link(&mut lists.empty, pfn.0);
        Ok(number)
    }

    fn slab_stat(d: &Descriptor) -> NodeStat {
        if d.flags.contains(SlabFlags::RECLAIM_ACCOUNT) {
            NodeStat::SlabReclaimable
        } else {
            NodeStat::SlabUnreclaimable
        }
    }

    /// Gives a slab's pages back. It is on no list. One that is not empty after all is reported and left
    /// alone for ever.
    pub(super) fn release(&self, d: &'static Descriptor, head: u32) {
        let slab = self.slab(d, head);
        if Self::count_free(d, &slab) != d.layout.nr {
            self.pages.platform().report(
                Level::Bug,
                format_args!("BUG {}: the state of slab pfn:{head:#x} was overwritten", d.name),
            );
            return;
        }
        self.inspect_leaving(d, &slab);
        if d.flags.contains(SlabFlags::TYPESAFE_BY_RCU) {
            self.pages.map().set_owner(head, 1 << d.layout.order, OWNER_RCU);
            return self.release_later(d, head);
        }
        self.give_back(head, d.layout.order, Self::slab_stat(d));
    }

    /// Gives the pages of a slab that is nobody's any more back; `false`, after a report, if somebody took its mark off.
    pub(super) fn give_back(&self, head: u32, order: u32, stat: NodeStat) -> bool {
        let map = self.pages.map();
        let page = map.page_in_map(head);
        // The mark first: what is marked and has no owner is a large object.
        if !page.take_slab_mark() {
            self.pages.platform().report(
                Level::Bug,
                format_args!("BUG: the mark of slab pfn:{head:#x} was taken off"),
            );
            return false;
        }
        map.set_owner(head, 1 << order, 0);
        page.set_free_objects(0);
        page.set_shelf(0);
        page.set_next_object(0);
        page.set_lru(0, 0);
        self.pages.mod_node_page_state(self.node_of(head), stat, -(1 << order));
        // A misuse is reported by the callee.
        self.pages.__free_pages(page, order).is_ok()
    }

    /// An object of an internal cache.
    pub(super) fn internal(
        &self,
        root: &'static Root,
        which: Internal,
        gfp: Gfp,
    ) -> Result<*mut u8, AllocError> {
        let d = root.internal(which);
        // Failing is no reason for a report: the request goes on without.
        self.alloc_locked(d, gfp | Gfp::NOWARN, None, Whose::Few).map(|object| object.at.as_ptr())
    }

    pub(super) fn internal_free(&self, root: &'static Root, which: Internal, at: *mut u8) {
        let d = root.internal(which);
        let offset = self.pages.map().direct_offset(at.addr());
        if let Some(pfn) = self.pages.map().owned_frame(offset, P::PAGE_SHIFT)
            && let Some(at) = NonNull::new(at)
            && let Some((slab, object)) = self.object_at(d, pfn, at)
        {
            self.give_home(d, &slab, object);
        }
    }

    /// Takes one object straight from a node's slabs, live, making a slab if there is none. `whose` is what the caller
    /// takes from the shelves of other CPUs before it has a slab made; before memory is reclaimed for one, anything.
    pub(super) fn alloc_locked(
        &self,
        d: &'static Descriptor,
        gfp: Gfp,
        node: Option<usize>,
        whose: Whose,
    ) -> Result<Object, AllocError> {
        let at = node.unwrap_or_else(|| self.here());
        if let Some(object) = self.take_one(d, at, whose) {
            return Ok(object);
        }
        let elsewhere = !gfp.contains(Gfp::THISNODE) && self.pages.nr_nodes() > 1;
        const SPARED: Gfp =
            Gfp::DIRECT_RECLAIM.union(RETRIES).union(Gfp::HIGH).union(Gfp::MEMALLOC);
        if elsewhere || d.per_node > 1 && gfp.intersects(SPARED) {
            // A slab, of this node, if there is memory to spare; else what other CPUs and nodes have. Without that
            // memory would be reclaimed while objects lie free, and every request of a node whose slabs come from
            // elsewhere would make another one.
            let mut spare = (gfp - SPARED) | Gfp::NOWARN;
            if elsewhere {
                spare |= Gfp::THISNODE;
            }
            let grown = self.grow(d, spare, if elsewhere { Some(at) } else { node });
            if let Ok(grown) = grown
                && let Some(object) = self.take_from(d, grown, Whose::Any)
            {
                return Ok(object);
            }
            if let Some(object) = self.take_any(d, at, elsewhere) {
                return Ok(object);
            }
        }
        loop {
            let e = match self.grow(d, gfp, node) {
                Ok(grown) => match self.take_from(d, grown, Whose::Any) {
                    Some(object) => return Ok(object),
                    None => continue,
                },
                Err(e) => e,
            };
            // Somebody may have freed one meanwhile.
            return self.take_any(d, at, elsewhere).ok_or(e);
        }
    }

    /// Takes an object of a node's, or of another one's.
    fn take_any(&self, d: &Descriptor, at: usize, elsewhere: bool) -> Option<Object> {
        let here = self.take_one(d, at, Whose::Any);
        if elsewhere { here.or_else(|| self.take_elsewhere(d, at)) } else { here }
    }

    /// Takes an object of another node than `at`, the nearest that has one.
    fn take_elsewhere(&self, d: &Descriptor, at: usize) -> Option<Object> {
        self.pages.nodes_from(at).filter(|n| *n != at).find_map(|n| self.take_one(d, n, Whose::Any))
    }

    /// Takes an object of a node, from the caller's shelf there or else from those of others.
    fn take_one(&self, d: &Descriptor, node: usize, whose: Whose) -> Option<Object> {
        let own = d.shelf_of(node, self.this_cpu());
        let others = d.shelves_of(node).filter(|at| *at != own);
        self.take_from(d, own, Whose::Any)
            .or_else(|| others.into_iter().find_map(|at| self.take_from(d, at, whose)))
    }

    fn take_from(&self, d: &Descriptor, shelf: usize, whose: Whose) -> Option<Object> {
        let mut found = None;
        // One that is looked at first is nobody's until then.
        let to = if d.marks() { state::CACHED } else { state::LIVE };
        let wrong = {
            let mut lists = d.shelves.get(shelf)?.lists.lock(self.pages.platform());
            let wrong =
                self.next_slab(d, &lists, whose).and_then(|head| self.mend(d, &mut lists, head));
            self.take(d, &mut lists, whose, 1, to, |object| found = Some(object));
            wrong
        };
        if let Some(wrong) = wrong {
            self.pages.misuse(wrong);
        }
        found
    }

    /// Puts a cached object back in its slab, on whatever node and shelf that is.
    pub(super) fn give_home(&self, d: &'static Descriptor, slab: &Slab, object: Object) {
        let Some(shelf) = d.shelves.get(self.shelf_with(d, slab.head)) else { return };
        let (wrong, emptied) = {
            let mut lists = shelf.lists.lock(self.pages.platform());
            let wrong = self.mend(d, &mut lists, slab.head);
            (wrong, self.put_back(d, &mut lists, slab.head, object))
        };
        if let Some(wrong) = wrong {
            self.pages.misuse(wrong);
        }
        if let Some(head) = emptied {
            self.release(d, head);
        }
    }

    /// The caller's CPU.
    fn this_cpu(&self) -> usize {
        self.pages.platform().this_cpu().map_or(0, Cpu::id)
    }

    /// The caller's node.
    pub(super) fn here(&self) -> usize {
        self.pages.platform().this_cpu().map_or(0, Cpu::node)
    }
}
