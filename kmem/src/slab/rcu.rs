//! What readers may still look at: slabs of `SLAB_TYPESAFE_BY_RCU` caches, and `kfree_rcu` \[S5\].
//!
//! # Concepts
//! A reader that holds no lock may come upon an object that is being freed. Of a *type-safe* cache the object may be
//! given out again at once, but its memory stays an object of the cache until all readers are done that were at
//! it when its slab became empty: a *grace period*. `kfree_rcu` keeps a single object as it is for that long.
//!
//! Grace periods come from the platform ([`Platform::rcu_start`], [`Platform::rcu_done`]); nothing is called back.
//! Whoever comes along (a free, a shrink, reclaim, `rcu_barrier`) asks whether one is over, and gives back.
//!
//! # Implementation
//! Two lists of each kind: one *waits* for a grace period that is named, the other gathers until the first has gone.
//! A grace period is asked for after a list was taken off, so that all that is on it was unreachable before.
//! Slabs are linked through their first frames. Objects are linked through 16 bytes of themselves, which the caller
//! names, as the kernel's `rcu_head` is; they are `DYING` meanwhile (samples of KFENCE's too; the first frame of a
//! block of pages has another owner), so that another free is found out. One that its cache is moving is `LEAVING` until
//! that is over: whichever ends later, the move or the grace period, has it freed.
//!
//! # Locking
//! One `IrqLock` for the lists, a leaf. The platform is asked, and everything freed, with nothing held.
//!
//! See [What is RCU?](https://docs.kernel.org/RCU/whatisRCU.html).

use super::{
    Objects, SlabFlags,
    cache::{Descriptor, NONE},
    state::{self, State},
};
use crate::{
    error::Misuse, memmap::OWNER_RCU, page::Page, page_alloc::Reclaim, page_state::NodeStat,
    platform::Platform, sync::IrqLock,
};
use core::{
    mem,
    sync::atomic::{
        AtomicU32,
        Ordering::{AcqRel, Relaxed},
    },
};

/// How long to wait for a grace period before asking again.
const PATIENCE_NS: u64 = 100_000;

/// Bytes of an object that `kfree_rcu` needs, aligned to a word.
pub const RCU_HEAD: usize = size_of::<Head>();

/// What lies in an object that waits.
#[derive(Clone, Copy)]
struct Head {
    /// Where the next one's head is; 0 at the end.
    next: usize,
    /// Where the object begins.
    object: usize,
}

/// What waits, or is to.
struct Batch {
    /// First frames of slabs, linked.
    slabs: u32,
    /// Heads of objects, linked.
    objects: usize,
}

impl Batch {
    const EMPTY: Batch = Batch { slabs: NONE, objects: 0 };

    fn is_empty(&self) -> bool {
        self.slabs == NONE && self.objects == 0
    }
}

/// What waits for readers.
pub(super) struct Rcu(IrqLock<Lists>);

struct Lists {
    gathering: Batch,
    waiting: Batch,
    /// The grace period that `waiting` waits for; `None` while whoever took it off starts one.
    cookie: Option<u64>,
    /// Batches that were taken off and are being freed: `rcu_barrier` waits for them too.
    freeing: u32,
}

impl Rcu {
    pub(super) const fn new() -> Rcu {
        Rcu(IrqLock::new(Lists {
            gathering: Batch::EMPTY,
            waiting: Batch::EMPTY,
            cookie: None,
            freeing: 0,
        }))
    }
}

impl<P: Platform, R: Reclaim> Objects<'_, P, R> {
    /// Puts a slab that is nobody's any more aside, until its readers are done.
    pub(super) fn release_later(&self, d: &Descriptor, head: u32) {
        let page = self.pages.map().page_in_map(head);
        page.set_free_objects(u32::from(d.flags.contains(SlabFlags::RECLAIM_ACCOUNT)));
        {
            let mut lists = self.slabs.rcu.0.lock(self.pages.platform());
            page.set_lru(lists.gathering.slabs, NONE);
            lists.gathering.slabs = head;
        }
        self.advance_rcu();
    }

    /// Gives back what no reader can be at any more, and starts the next grace period. Returns the frames of slabs.
    pub(crate) fn advance_rcu(&self) -> u64 {
        let p = self.pages.platform();
        let rcu = &self.slabs.rcu.0;
        let mut frames = 0;
        loop {
            let cookie = rcu.lock(p).cookie;
            if cookie.is_some_and(|cookie| p.rcu_done(cookie)) {
                let done = {
                    let mut lists = rcu.lock(p);
                    if lists.cookie != cookie {
                        continue;
                    }
                    lists.cookie = None;
                    lists.freeing += 1;
                    mem::replace(&mut lists.waiting, Batch::EMPTY)
                };
                frames += self.free_batch(done);
                rcu.lock(p).freeing -= 1;
            }
            {
                let mut lists = rcu.lock(p);
                if !lists.waiting.is_empty() || lists.gathering.is_empty() {
                    return frames;
                }
                // While there is no cookie nobody takes it.
                lists.waiting = mem::replace(&mut lists.gathering, Batch::EMPTY);
            }
            // After it was taken off: readers that come now cannot reach what is on it.
            let started = p.rcu_start();
            rcu.lock(p).cookie = started;
            if !started.is_some_and(|cookie| p.rcu_done(cookie)) {
                return frames;
            }
        }
    }

    fn free_batch(&self, batch: Batch) -> u64 {
        let (map, mut frames) = (self.pages.map(), 0);
        let mut head = batch.slabs;
        while head != NONE {
            let page = map.page_in_map(head);
            let order = page.state().order();
            let stat = match page.free_objects() {
                0 => NodeStat::SlabUnreclaimable,
                _ => NodeStat::SlabReclaimable,
            };
            let (next, _) = page.lru();
            if self.give_back(head, order, stat) {
                frames += 1 << order;
            }
            head = next;
        }
        let mut at = batch.objects;
        while at != 0 {
            // SAFETY: a head that `free_later` wrote, in an object that nobody frees or writes to but this.
            let Head { next, object } =
                unsafe { core::ptr::with_exposed_provenance::<Head>(at).read() };
            // A misuse (somebody freed its pages) is reported by the callee.
            let _ = self.free_now(core::ptr::with_exposed_provenance_mut(object));
            at = next;
        }
        frames
    }

    /// Frees an object that waited, in one step: at no time could another free succeed.
    fn free_now(&self, at: *mut u8) -> Result<(), Misuse> {
        let addr = at.addr();
        if let Some((d, object)) = self.in_slab(at) {
            // One that is still being moved is freed by whoever moves it. In this order: LEAVING may become DYING.
            let moving = object.state.exchange(state::LEAVING, state::GONE);
            if !moving && !object.state.exchange(state::DYING, state::CACHED) {
                let what = Misuse::ObjectFree { addr, cache: d.name };
                return Err(self.object_misuse(d, &object, what));
            }
            self.trace_free(addr, Some(d.name), d.layout.stride as usize, false);
            return match moving {
                true => Ok(()),
                false => self.put_slow(d, &self.slab(d, self.frame_of(object.at)), object),
            };
        }
        if self.pool_at(addr).is_some() {
            return self.free_sampled(at, None, true);
        }
        match self.pages.platform().direct_unmap(at).and_then(|pfn| self.pages.pfn_to_page(pfn)) {
            Some(page) => self.end_large(at, page, OWNER_RCU),
            None => Err(self.pages.misuse(Misuse::NotAnObject { addr })),
        }
    }

    /// `kfree_rcu`: frees an object once its readers are done; `head` is where in it 16 bytes are that they do not
    /// look at.
    #[track_caller]
    pub(crate) fn free_later(self, at: *mut u8, head: usize) -> Result<(), Misuse> {
        let addr = at.addr();
        if self.pages.context().in_nmi() {
            return Err(self.pages.misuse(Misuse::InNmi));
        }
        if self.pages.platform().rcu_start().is_none() {
            return Err(self.pages.misuse(Misuse::NoGracePeriods));
        }
        let owner = self.owner_at(at);
        let size = match self.ksize(at) {
            Some(0) => return Ok(()),
            Some(size) => size,
            None if self.dying_at(at)
                || self.pool_at(addr).is_some_and(|pool| pool.is_dying(addr)) =>
            {
                return Err(self.pages.misuse(Misuse::FreedLater { addr }));
            }
            None => return Err(self.pages.misuse(Misuse::NotAnObject { addr })),
        };
        let fits = head.checked_add(RCU_HEAD).is_some_and(|end| end <= size);
        if !fits || !(addr + head).is_multiple_of(align_of::<Head>()) {
            return Err(self.pages.misuse(Misuse::BadRcuHead { addr, head }));
        }
        let place = at.wrapping_add(head).cast::<Head>();
        let began = match (self.live_at(at), self.pool_at(addr)) {
            (Some((_, object)), _) => self.begin_later(object.state, at, owner),
            (None, Some(pool)) => pool.set_dying(addr),
            (None, None) => self.large_at(at).is_some_and(|page| self.begin_large(at, page)),
        };
        if !began {
            // Another free came first.
            return Err(self.pages.misuse(Misuse::FreedLater { addr }));
        }
        {
            let mut lists = self.slabs.rcu.0.lock(self.pages.platform());
            let next = lists.gathering.objects;
            // SAFETY: within the object, and by the caller's word nobody else's.
            unsafe { place.write(Head { next, object: addr }) };
            lists.gathering.objects = place.expose_provenance();
        }
        self.advance_rcu();
        Ok(())
    }

    /// Makes an object in use, of a slab whose frames have that owner, one that waits; says whether it was one.
    fn begin_later(&self, state: State, at: *mut u8, owner: u16) -> bool {
        let was = match state.end(state::DYING) {
            Some(was) => was,
            None if state.exchange(state::MOVING, state::LEAVING) => state::MOVING,
            None => return false,
        };
        if self.owner_at(at) != owner {
            // Freed twice, and its slab went meanwhile: that byte was somebody else's.
            match was {
                // Whoever moves it may be done meanwhile.
                state::MOVING => {
                    _ = state.exchange(state::LEAVING, was)
                        || state.exchange(state::DYING, state::LIVE)
                }
                _ => state.set(was),
            }
            return false;
        }
        self.forget_notes(at.addr(), was);
        true
    }

    /// Makes a large object one that waits; says whether it was one in use.
    fn begin_large(&self, at: *mut u8, page: &Page) -> bool {
        // Who takes the mark off, for this or to free it, has it to himself.
        if !page.take_slab_mark() {
            return false;
        }
        let began = self.change_owner(at, 0, OWNER_RCU);
        page.mark_slab();
        began
    }

    /// Whether the object at an address waits for its readers.
    fn dying_at(&self, at: *mut u8) -> bool {
        self.in_slab(at).is_some_and(|(_, object)| state::dying(object.state.get()))
    }

    /// Changes the owner of an address's frame, if it is `from`.
    pub(super) fn change_owner(&self, at: *mut u8, from: u16, to: u16) -> bool {
        let map = self.pages.map();
        map.owner_cell(map.direct_offset(at.addr()), P::PAGE_SHIFT)
            .is_some_and(|owner| owner.compare_exchange(from, to, AcqRel, Relaxed).is_ok())
    }

    /// Waits until all readers are done that are at it now. Process context.
    pub(crate) fn synchronize_rcu(&self) -> bool {
        let p = self.pages.platform();
        let Some(cookie) = p.rcu_start() else { return false };
        let never = AtomicU32::new(0);
        while !p.rcu_done(cookie) {
            p.wait(&never, 0, PATIENCE_NS);
        }
        true
    }

    /// `rcu_barrier`: waits until all that was to be freed later is freed. Process context.
    pub(crate) fn rcu_barrier(&self) {
        let p = self.pages.platform();
        let never = AtomicU32::new(0);
        // Again and again: what gathers now waits for what waits already.
        loop {
            self.advance_rcu();
            let lists = self.slabs.rcu.0.lock(p);
            if lists.waiting.is_empty() && lists.gathering.is_empty() && lists.freeing == 0 {
                return;
            }
            drop(lists);
            p.wait(&never, 0, PATIENCE_NS);
        }
    }
}
