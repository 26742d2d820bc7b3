//! Moving objects, so that sparsely used slabs come free \[S10\].
//!
//! # Concepts
//! After a burst most slabs of a cache hold a few objects each, and none can go. Where the cache's user can
//! move its objects, it says so with a callback: given an object and a free one in a fuller slab, it
//! copies the content and turns every reference it has to the new place.
//!
//! # Implementation
//! `kmem_cache_shrink` goes over the partial slabs of each node, first those with the fewest objects, and empties
//! one object at a time into slabs that hold at least as many. Slabs keep their place in the lists all along; the
//! one being emptied is made the last of them, so that others' allocations go elsewhere.
//!
//! An object that is offered is MOVING. Its memory is nobody else's until that is over, even if it is freed
//! meanwhile: the callback may look at it, find under its own lock that it is no longer in use, and refuse.
//! Whoever frees it makes it GONE, and the free ends then, without waiting: whoever moves it puts it back. `kfree_rcu`
//! makes it LEAVING: DYING if the move is over first, GONE if its readers are done first.
//!
//! # Locking
//! A shelf's lock to choose; none while the callback runs. A slab with an object that is MOVING is not empty, so it
//! does not go.

use super::{
    KmemCache, Objects,
    cache::{Descriptor, List, NONE},
    leaks::USERS,
    magazine::Object,
    node::{Slab, Whose},
    state,
};
use crate::{error::Misuse, page_alloc::Reclaim, platform::Platform};
use core::{
    ptr::NonNull,
    sync::atomic::Ordering::{Relaxed, Release},
};

/// What a [`MoveFn`] did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MoveResult {
    /// The object is at the new place; nothing refers to the old one, which is as a constructor left it.
    Moved,
    /// It stays, or is not in use any more. The rest of its slab is left alone this time.
    Refused,
    /// Nobody needs the object: both are freed.
    Unneeded,
}

/// Moves an object from the first place to the second; the third argument is what
/// [`kmem_cache_set_move`](crate::Kmem::kmem_cache_set_move) was given.
///
/// Context: process context, no lock of kmem held. It may sleep, allocate and free, but not shrink or destroy the
/// cache.
pub type MoveFn = unsafe fn(from: NonNull<u8>, to: NonNull<u8>, private: usize) -> MoveResult;

/// Why a cache cannot have its objects moved.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MoveError {
    /// It is another machine's.
    Foreign,
    /// It is shared by merging: create it with [`NO_MERGE`](super::SlabFlags::NO_MERGE).
    Mergeable,
    /// Readers may look at its objects at any time
    /// ([`TYPESAFE_BY_RCU`](super::SlabFlags::TYPESAFE_BY_RCU)).
    Rcu,
}

impl core::fmt::Display for MoveError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            MoveError::Rcu => "readers may look at the cache's objects at any time",
            MoveError::Foreign => "the cache is another machine's",
            MoveError::Mergeable => "the cache may be shared with others; create it with NO_MERGE",
        })
    }
}

impl core::error::Error for MoveError {}

/// A callback and what it is given.
#[derive(Clone, Copy)]
pub(super) struct Mover(MoveFn, usize);

/// Passes over a node's slabs, with rising numbers of objects.
const PASSES: u32 = 64;

/// Slabs that are looked at for one to move an object to.
const LOOKS: u32 = 32;

/// An object that is MOVING, and where it lies.
struct Offered {
    slab: Slab,
    index: u32,
}

impl<'a, P: Platform, R: Reclaim> Objects<'a, P, R> {
    /// `kmem_cache_set_move`.
    pub(crate) fn set_move(
        &self,
        cache: &KmemCache,
        f: Option<MoveFn>,
        private: usize,
    ) -> Result<(), MoveError> {
        let d = cache.0;
        if self.own_root(d).is_none() {
            return Err(MoveError::Foreign);
        }
        if !d.flags.contains(super::SlabFlags::NO_MERGE) && d.ctor.is_none() {
            return Err(MoveError::Mergeable);
        }
        if d.flags.contains(super::SlabFlags::TYPESAFE_BY_RCU) {
            return Err(MoveError::Rcu);
        }
        *d.mover.lock(self.pages.platform()) = f.map(|f| Mover(f, private));
        Ok(())
    }

    /// Pulls the objects of a cache together, if they can be moved and the context allows it. Caches that look for
    /// mistakes are left alone: where their objects are is part of what they show.
    pub(super) fn pack(&self, d: &'static Descriptor) {
        let mover = *d.mover.lock(self.pages.platform());
        let Some(mover) = mover.filter(|_| self.pages.context().may_sleep() && !self.bare(d))
        else {
            return;
        };
        // Before the first one is MOVING, under a shelf's lock, and until the last is not: who finds such a state under
        // that lock sees it.
        d.moves.fetch_add(1, Relaxed);
        self.pack_with(d, mover);
        // Release pairs with the Acquire in `mend`.
        d.moves.fetch_sub(1, Release);
    }

    fn pack_with(&self, d: &'static Descriptor, mover: Mover) {
        let nr = d.layout.nr;
        let step = nr.div_ceil(PASSES);
        for node in 0..self.pages.nr_nodes() {
            let mut most = 0;
            while most + 1 < nr {
                most = (most + step).min(nr - 1);
                for shelf in d.shelves_of(node).map(|at| &d.shelves[at]) {
                    let slabs = shelf.lists.lock(self.pages.platform()).partial.nr;
                    for _ in 0..slabs {
                        let offered = {
                            let mut lists = shelf.lists.lock(self.pages.platform());
                            self.offer(d, &mut lists.partial, most)
                        };
                        if let Some(offered) = offered {
                            self.empty(d, offered, mover);
                        }
                    }
                }
            }
        }
    }

    /// Offers an object of the first partial slab if that has at most so many, and makes it the last one.
    fn offer(&self, d: &'static Descriptor, partial: &mut List, most: u32) -> Option<Offered> {
        let head = partial.first;
        if head == NONE {
            return None;
        }
        let used = d.layout.nr - self.pages.map().page_in_map(head).free_objects();
        let slab = self.slab(d, head);
        let index = if used <= most { offer_next(d, &slab, 0) } else { None };
        self.rotate(partial);
        Some(Offered { slab, index: index? })
    }

    /// Moves the objects of a slab, from the offered one on, into others.
    fn empty(&self, d: &'static Descriptor, mut offered: Offered, mover: Mover) {
        loop {
            let result =
                self.place_beside(d, &offered.slab).map(|to| self.move_to(d, &offered, to, mover));
            // Before the slab may go with this one.
            let next = match result {
                Some(MoveResult::Refused) | None => None,
                Some(_) => offer_next(d, &offered.slab, offered.index + 1),
            };
            let stays = matches!(result, Some(MoveResult::Refused) | None);
            let object = offered.slab.object(d, offered.index);
            if !(stays && object.state.exchange(state::MOVING, state::LIVE)) {
                let freed_too = !object.state.exchange(state::MOVING, state::CACHED);
                // Its readers may not be done; else, if it was freed, it is GONE, and nobody's but the mover's.
                if !freed_too || !object.state.exchange(state::LEAVING, state::DYING) {
                    object.state.set(state::CACHED);
                    self.give_home(d, &offered.slab, object);
                }
                if freed_too && result == Some(MoveResult::Moved) {
                    // The callback says that nothing refers to it, and yet it was freed.
                    self.pages
                        .misuse(Misuse::ObjectFree { addr: object.at.addr().get(), cache: d.name });
                }
            }
            match next {
                Some(index) => offered.index = index,
                None => return,
            }
        }
    }

    /// Has an object moved. The new one is the user's then, or free again.
    fn move_to(
        &self,
        d: &'static Descriptor,
        offered: &Offered,
        to: Object,
        Mover(f, private): Mover,
    ) -> MoveResult {
        let from = offered.slab.object(d, offered.index);
        // SAFETY: `kmem_cache_set_move`'s contract: it is given an object of its cache that was in use just now, and
        // whose memory stays, and one that nobody has.
        let result = unsafe { f(from.at, to.at, private) };
        if result != MoveResult::Moved {
            to.state.set(state::CACHED);
            self.give_home(d, &self.slab(d, self.frame_of(to.at)), to);
        }
        result
    }

    /// A free object, taken from a slab that holds at least as many as another one does.
    fn place_beside(&self, d: &'static Descriptor, other: &Slab) -> Option<Object> {
        let map = self.pages.map();
        for shelf in d.shelves_of(self.node_of(other.head)).map(|at| &d.shelves[at]) {
            let mut lists = shelf.lists.lock(self.pages.platform());
            for _ in 0..LOOKS.min(lists.partial.nr) {
                let first = lists.partial.first;
                let least = map.page_in_map(other.head).free_objects();
                if first != other.head && map.page_in_map(first).free_objects() <= least {
                    let mut to = None;
                    self.take(d, &mut lists, Whose::Any, 1, state::LIVE, |object| {
                        to = Some(object)
                    });
                    return to;
                }
                self.rotate(&mut lists.partial);
            }
        }
        None
    }

    /// The frame of an object.
    pub(super) fn frame_of(&self, at: NonNull<u8>) -> u32 {
        let map = self.pages.map();
        map.frame_at(map.direct_offset(at.addr().get()), P::PAGE_SHIFT)
    }
}

/// Makes the next object in use MOVING, from `from` on. The slab is on a list whose lock the caller holds, or has an
/// object that is MOVING.
fn offer_next(d: &Descriptor, slab: &Slab, from: u32) -> Option<u32> {
    // One that the leak scan knows is young again where it comes to; notes of its user's would be lost.
    let may = |i: u32| slab.state(i).note(|n| (n & USERS == 0).then_some(0)).is_some();
    (from..d.layout.nr).find(|i| may(*i) && slab.state(*i).exchange(state::LIVE, state::MOVING))
}
