//! The state of an object: one byte, apart from the object.
//!
//! # Concepts
//! ```text
//!              refill                    allocation
//!     FREE  ------------->   CACHED   --------------->   LIVE
//!   (in its slab)        (in a magazine)            (somebody's)
//!           <-------------            <---------------
//!              flush                       free
//! ```
//! Of a cache that looks for mistakes, an object whose bytes were found overwritten while nobody had it, or when
//! it was freed, is QUARANTINED: nobody is given it again (see `debug`).
//!
//! While its cache moves an object elsewhere it is MOVING, and GONE if it is freed meanwhile: then whoever moves it
//! puts it back (see `moving`).
//!
//! One that is freed once its readers are done is DYING until then (see `rcu`); LEAVING, as long as it is being moved as
//! well.
//!
//! The leak scan keeps notes in the bytes of objects in use (see `leaks`): NOTED and further bits stand for LIVE then.
//!
//! An object is freed by a compare-and-exchange from LIVE. Whoever frees it a second time finds it
//! CACHED or FREE, whether it lies in a slab or in a magazine \[S9\]; of two CPUs that free it at once,
//! one succeeds.
//!
//! # Locking
//! FREE and what becomes of it change under the lock of the slab's shelf; CACHED belongs to whoever has the
//! magazine; LIVE changes by the compare-and-exchange only.

use core::sync::atomic::{
    AtomicU8,
    Ordering::{AcqRel, Acquire, Relaxed, Release},
};

/// In its slab.
pub(super) const FREE: u8 = 0;
/// In a magazine.
pub(super) const CACHED: u8 = 1;
/// Given out.
pub(super) const LIVE: u8 = 2;
/// Kept from use: its bytes were overwritten.
pub(super) const QUARANTINED: u8 = 3;
/// Given out, and about to be moved.
pub(super) const MOVING: u8 = 4;
/// Freed while it was being moved.
pub(super) const GONE: u8 = 5;

/// Given out, and freed once its readers are done.
pub(super) const DYING: u8 = 6;
/// As DYING, and being moved.
pub(super) const LEAVING: u8 = 7;

/// Given out, with notes of the leak scan in the other bits.
pub(super) const NOTED: u8 = 0x80;

/// Whether an object in that state is somebody's.
pub(super) const fn in_use(state: u8) -> bool {
    state == LIVE || state & NOTED != 0
}

/// Whether an object in that state is not the layer's to give out.
pub(super) const fn held(state: u8) -> bool {
    in_use(state) || dying(state)
}

/// Whether an object in that state waits for its readers.
pub(super) const fn dying(state: u8) -> bool {
    state == DYING || state == LEAVING
}

/// The place of one object's state byte.
#[derive(Clone, Copy)]
pub(crate) struct State(*const AtomicU8);

impl State {
    /// The state byte at `at`.
    ///
    /// # Safety
    /// `at` is a state byte of a slab, which are atomics in memory that stays mapped for the platform's
    /// lifetime.
    pub(super) unsafe fn new(at: *const AtomicU8) -> State {
        State(at)
    }

    /// What [`addr`](Self::addr) gave.
    #[inline(always)]
    pub(super) fn from_addr(addr: usize) -> State {
        State(core::ptr::with_exposed_provenance(addr))
    }

    #[inline(always)]
    pub(super) fn addr(self) -> usize {
        self.0.expose_provenance()
    }

    #[inline(always)]
    fn byte(self) -> &'static AtomicU8 {
        // SAFETY: by `new`'s contract; `from_addr` is given what `addr` gave only.
        unsafe { &*self.0 }
    }

    #[inline(always)]
    pub(super) fn get(self) -> u8 {
        self.byte().load(Relaxed)
    }

    #[inline(always)]
    pub(super) fn set(self, state: u8) {
        self.byte().store(state, Relaxed);
    }

    /// As `get`, for those who look at what was done before [`publish`](Self::publish).
    pub(super) fn look(self) -> u8 {
        self.byte().load(Acquire)
    }

    /// As `set`; Release pairs with the Acquire in [`look`](Self::look).
    pub(super) fn publish(self, state: u8) {
        self.byte().store(state, Release);
    }

    /// Exchanges one state for another; says whether it was that.
    ///
    /// AcqRel: as in [`free`](Self::free).
    pub(super) fn exchange(self, from: u8, to: u8) -> bool {
        self.byte().compare_exchange(from, to, AcqRel, Relaxed).is_ok()
    }

    /// As [`free`](Self::free), for whatever is in use, and to any state; returns what it was.
    #[cold]
    pub(super) fn end(self, to: u8) -> Option<u8> {
        // AcqRel: as in `free`.
        self.byte().fetch_update(AcqRel, Relaxed, |s| in_use(s).then_some(to)).ok()
    }

    /// Changes the notes on an object in use; 0 stands for none. Returns what they were, or `None` if it is not in
    /// use or `f` wants no change.
    pub(super) fn note(self, mut f: impl FnMut(u8) -> Option<u8>) -> Option<u8> {
        let bare = |s| if s == LIVE { 0 } else { s };
        let change = |s| {
            let to = if in_use(s) { f(bare(s)) } else { None };
            to.map(|to| if to == 0 { LIVE } else { to | NOTED })
        };
        self.byte().fetch_update(AcqRel, Relaxed, change).ok().map(bare)
    }

    /// Makes a live object a cached one; says whether it was live.
    ///
    /// AcqRel: Release publishes what the last owner wrote to whoever is given the object next; Acquire
    /// pairs with it where the object was given out and freed elsewhere.
    #[inline(always)]
    pub(super) fn free(self) -> bool {
        self.byte().compare_exchange(LIVE, CACHED, AcqRel, Relaxed).is_ok()
    }
}
