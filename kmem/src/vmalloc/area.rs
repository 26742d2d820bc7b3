//! Areas: what is known of a piece of the vmalloc range.
//!
//! # Concepts
//! An area is a number of frames' worth of addresses and one more, the *guard*, at which nothing is ever mapped.
//! Its descriptor is an object of a cache of its own, and the node of the tree of all areas too.
//!
//! # Implementation
//! The states of an area, and who may touch the rest of it:
//!
//! ```text
//!   BUILDING ──> LIVE ──> DYING ──────────> LAZY ──> POOLED ──> BUILDING
//!   its maker    all     who freed it,     a list    a list        or gone
//!                        or the list of deferred frees
//! ```
//! One of a kernel stack may go from LIVE to KEPT, and back, or from KEPT to DYING: it is whole, and whose who keeps
//! free stacks. One from get_vm_area goes from LIVE back to BUILDING while vm_map_pages adds to it: to look up what it
//! shows, and to free it, is denied meanwhile.
//!
//! # Locking
//! Place and links in the tree: the tree's lock. `next`: the lock of the list that the area is on. LIVE to DYING
//! happens under the tree's lock, so whoever holds that and finds an area LIVE may look at all of it. Everything
//! else has one owner at a time. The fields are atomics since the compiler cannot see that; all but the state are
//! `Relaxed`.

use super::{VmFlags, frames::Frames};
use core::{
    panic::Location,
    ptr,
    sync::atomic::{
        AtomicPtr, AtomicU32, AtomicU64, AtomicUsize,
        Ordering::{Acquire, Relaxed, Release},
    },
};

/// What an area is at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub(super) enum State {
    /// Has an address; its maker maps it.
    Building = 0,
    /// In use.
    Live = 1,
    /// Freed, and still mapped: its frames are being given back, or wait for process context.
    Dying = 2,
    /// Not mapped any more, but CPUs may still know what was.
    Lazy = 3,
    /// Free: no CPU knows anything of its addresses.
    Pooled = 4,
    /// Freed by its user, and kept for the next one, mapped as it was.
    Kept = 5,
}

impl State {
    fn of(word: u32) -> State {
        match word {
            0 => State::Building,
            1 => State::Live,
            2 => State::Dying,
            3 => State::Lazy,
            4 => State::Pooled,
            _ => State::Kept,
        }
    }
}

/// A place in the source, or none.
type Place = AtomicPtr<Location<'static>>;

/// An area's descriptor.
#[derive(Default)]
pub(super) struct Area {
    // The tree's: see there.
    pub(super) start: AtomicUsize,
    /// Bytes, the guard included. Does not change.
    pub(super) size: usize,
    pub(super) gap: AtomicUsize,
    pub(super) widest: AtomicUsize,
    left: AtomicPtr<Area>,
    right: AtomicPtr<Area>,
    pub(super) height: AtomicU32,
    state: AtomicU32,
    /// The next on the same list.
    next: AtomicPtr<Area>,
    flags: AtomicU32,
    pub(super) frames: Frames,
    /// Physical address of what is not in frames.
    pub(super) phys: AtomicU64,
    caller: Place,
    freed_by: Place,
}

/// An area, or none.
pub(super) type Link = Option<&'static Area>;

#[inline]
fn store(place: &AtomicPtr<Area>, area: Link) {
    place.store(area.map_or(ptr::null_mut(), |a| ptr::from_ref(a).cast_mut()), Relaxed);
}

#[inline]
fn load(place: &AtomicPtr<Area>) -> Link {
    // SAFETY: null, or an area that is in the tree or on the list of the one that links to it: a descriptor is
    // given back only after it was taken out of both.
    unsafe { place.load(Relaxed).as_ref() }
}

impl Area {
    /// One of `size` bytes that is nowhere yet.
    pub(super) fn new(size: usize) -> Area {
        Area { size, ..Area::default() }
    }

    #[inline]
    pub(super) fn start(&self) -> usize {
        self.start.load(Relaxed)
    }

    /// Where its guard ends.
    #[inline]
    pub(super) fn end(&self) -> usize {
        self.start() + self.size
    }

    #[inline]
    pub(super) fn left(&self) -> Link {
        load(&self.left)
    }

    #[inline]
    pub(super) fn right(&self) -> Link {
        load(&self.right)
    }

    #[inline]
    pub(super) fn set_left(&self, area: Link) {
        store(&self.left, area);
    }

    #[inline]
    pub(super) fn set_right(&self, area: Link) {
        store(&self.right, area);
    }

    /// Where it is.
    #[inline]
    pub(super) fn state(&self) -> State {
        // Acquire pairs with the Release in `set_state`: who finds it LIVE finds it whole.
        State::of(self.state.load(Acquire))
    }

    #[inline]
    pub(super) fn set_state(&self, state: State) {
        // Release pairs with the Acquire in `state`.
        self.state.store(state as u32, Release);
    }

    /// Where the first of its frames is shown: a frame further than it begins, if it has a guard before them.
    #[inline]
    pub(super) fn shown(&self, page: usize) -> usize {
        self.start() + if self.flags().contains(VmFlags::STACK) { page } else { 0 }
    }

    #[inline]
    pub(super) fn flags(&self) -> VmFlags {
        VmFlags::from_bits_retain(self.flags.load(Relaxed))
    }

    #[inline]
    pub(super) fn set_flags(&self, flags: VmFlags) {
        self.flags.store(flags.bits(), Relaxed);
    }

    #[inline]
    pub(super) fn caller(&self) -> Option<&'static Location<'static>> {
        // SAFETY: null or a location, which is there for ever.
        unsafe { self.caller.load(Relaxed).as_ref() }
    }

    #[inline]
    pub(super) fn set_caller(&self, at: &'static Location<'static>) {
        self.caller.store(ptr::from_ref(at).cast_mut(), Relaxed);
    }

    #[inline]
    pub(super) fn freed_by(&self) -> Option<&'static Location<'static>> {
        // SAFETY: null or a location, which is there for ever.
        unsafe { self.freed_by.load(Relaxed).as_ref() }
    }

    #[inline]
    pub(super) fn set_freed_by(&self, at: &'static Location<'static>) {
        self.freed_by.store(ptr::from_ref(at).cast_mut(), Relaxed);
    }
}

/// Areas linked by `next`.
#[derive(Clone, Copy, Default)]
pub(super) struct List(Link);

impl List {
    pub(super) const EMPTY: List = List(None);

    #[inline]
    pub(super) fn push(&mut self, area: &'static Area) {
        store(&area.next, self.0);
        self.0 = Some(area);
    }

    #[inline]
    pub(super) fn pop(&mut self) -> Link {
        let area = self.0?;
        self.0 = load(&area.next);
        Some(area)
    }

    /// Its areas, without taking them off.
    pub(super) fn iter(&self) -> impl Iterator<Item = &'static Area> {
        core::iter::successors(self.0, |area| load(&area.next))
    }
}

/// A list that any context puts areas on, and somebody takes as a whole.
#[derive(Default)]
pub(super) struct Stack(AtomicPtr<Area>);

impl Stack {
    pub(super) const fn new() -> Stack {
        Stack(AtomicPtr::new(ptr::null_mut()))
    }

    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.0.load(Relaxed).is_null()
    }

    #[inline]
    pub(super) fn push(&self, area: &'static Area) {
        let mut top = self.0.load(Relaxed);
        loop {
            area.next.store(top, Relaxed);
            let new = ptr::from_ref(area).cast_mut();
            // Release pairs with the Acquire in `take`. Nothing is taken from the middle, so a top that came
            // back is no harm.
            match self.0.compare_exchange_weak(top, new, Release, Relaxed) {
                Ok(_) => return,
                Err(now) => top = now,
            }
        }
    }

    #[inline]
    pub(super) fn take(&self) -> List {
        // SAFETY: null or an area that was put here; what is on the list stays until it is taken. Acquire pairs
        // with the Release in `push`.
        List(unsafe { self.0.swap(ptr::null_mut(), Acquire).as_ref() })
    }
}
