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
//! One of a kernel stack goes from BUILDING to KEPT, from there to LIVE and back, or from KEPT to DYING: it is whole, and
//! whose who keeps free stacks. One from get_vm_area goes from LIVE back to BUILDING while vm_map_pages adds to it: to look up what it
//! shows, and to free it, is denied meanwhile.
//!
//! # Locking
//! Place and links in the tree: the tree's lock. `next`: the lock of the list that the area is on. Everything else has
//! one owner at a time. The fields are atomics since the compiler cannot see that; all but the word are `Relaxed`.
//!
//! The *word* has state, flags and a count in one. A LIVE area has no owner: it gets one by a compare-and-exchange from
//! LIVE, counted by nobody, to another state (`take`), so of two that free it one succeeds, and as its flags are
//! compared too, nobody gets another kind of area than he found there. Who wants to look at all of an area that is LIVE
//! counts himself in (`look`); to take it waits for him. Both hold a shard of the tree's lock, so that the
//! descriptor stays one.

use super::{VmFlags, frames::Frames};
use core::{
    mem,
    panic::Location,
    ptr,
    sync::atomic::{
        AtomicPtr, AtomicU32, AtomicU64, AtomicUsize,
        Ordering::{AcqRel, Acquire, Relaxed, Release},
    },
};

/// What an area is at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
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

/// What is known of an area at one time: its state in the lowest byte, how many look at it in the three above, and its
/// flags in the upper half.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Word(u64);

impl Word {
    /// Where the flags begin.
    const FLAGS: u32 = 32;
    /// One that looks.
    const LOOK: u64 = 1 << 8;

    #[inline]
    fn new(flags: VmFlags, state: State) -> Word {
        Word(u64::from(flags.bits()) << Word::FLAGS | state as u64)
    }

    #[inline]
    pub(super) fn state(self) -> State {
        match self.0 as u8 {
            0 => State::Building,
            1 => State::Live,
            2 => State::Dying,
            3 => State::Lazy,
            4 => State::Pooled,
            _ => State::Kept,
        }
    }

    #[inline]
    pub(super) fn flags(self) -> VmFlags {
        VmFlags::from_bits_retain((self.0 >> Word::FLAGS) as u32)
    }
}

/// A place in the source, or none.
pub(super) type Place = Option<&'static Location<'static>>;

/// Where one is noted.
type PlaceOf = AtomicPtr<Location<'static>>;

/// An area's descriptor. What walks through the tree read is a cache line of its own, which is written only when the
/// tree changes; what an area's owner writes is in the next ones.
#[derive(Default)]
#[repr(C, align(64))]
pub(super) struct Area {
    // The tree's: see there.
    pub(super) start: AtomicUsize,
    /// Bytes, the guard included. Does not change.
    pub(super) size: usize,
    left: AtomicPtr<Area>,
    right: AtomicPtr<Area>,
    pub(super) gap: AtomicUsize,
    pub(super) widest: AtomicUsize,
    pub(super) height: AtomicU32,
    /// Physical address of what is not in frames: seldom written.
    pub(super) phys: AtomicU64,
    word: AtomicU64,
    /// The next on the same list.
    next: AtomicPtr<Area>,
    caller: PlaceOf,
    freed_by: PlaceOf,
    pub(super) frames: Frames,
}

/// A processor with words of 64 bits has the tree's fields in one line.
const _: () = assert!(mem::offset_of!(Area, word) <= 64);

/// Looks at a live area, which stays that as long as this is there.
pub(super) struct Looking<'a>(&'a Area);

impl Drop for Looking<'_> {
    fn drop(&mut self) {
        // Release pairs with the Acquire in `take`: who takes it has everything behind that was done while looking.
        self.0.word.fetch_sub(Word::LOOK, Release);
    }
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

    /// What it is, and at.
    #[inline]
    pub(super) fn word(&self) -> Word {
        // Acquire pairs with the Release in `set` and `take`: who finds it LIVE finds it whole.
        Word(self.word.load(Acquire))
    }

    #[inline]
    pub(super) fn state(&self) -> State {
        self.word().state()
    }

    /// Only its owner writes the word of an area that is not LIVE.
    #[inline]
    fn set(&self, word: Word) {
        debug_assert!(self.state() != State::Live, "others may look at it");
        // Release pairs with the Acquire in `word`, `look` and `take`.
        self.word.store(word.0, Release);
    }

    /// Its owner begins to make something of it.
    #[inline]
    pub(super) fn begin(&self, flags: VmFlags) {
        self.set(Word::new(flags, State::Building));
    }

    /// For its owner: it is not LIVE.
    #[inline]
    pub(super) fn set_state(&self, state: State) {
        self.set(Word::new(self.flags(), state));
    }

    /// Takes an area that was found LIVE to another state: it is the caller's then. `false` if it is not what was found
    /// any more, or somebody looks at it.
    #[inline]
    pub(super) fn take(&self, found: Word, to: State) -> bool {
        let alone = Word::new(found.flags(), State::Live).0;
        let taken = Word::new(found.flags(), to).0;
        // Acquire pairs with the Release in `set`, and with that of who looked last; Release with the Acquire in
        // `word`.
        self.word.compare_exchange(alone, taken, AcqRel, Relaxed).is_ok()
    }

    /// Keeps it LIVE for a while, if it is.
    pub(super) fn look(&self) -> Option<Looking<'_>> {
        // Acquire pairs with the Release in `set`: what is looked at is what its maker made.
        let looked = self.word.fetch_update(Acquire, Relaxed, |word| {
            (Word(word).state() == State::Live).then_some(word + Word::LOOK)
        });
        looked.ok().map(|_| Looking(self))
    }

    /// Where the first of its frames is shown: a frame further than it begins, if it has a guard before them.
    #[inline]
    pub(super) fn shown(&self, page: usize) -> usize {
        self.shown_as(self.flags(), page)
    }

    /// The same of one with such flags.
    #[inline]
    pub(super) fn shown_as(&self, flags: VmFlags, page: usize) -> usize {
        self.start() + if flags.contains(VmFlags::STACK) { page } else { 0 }
    }

    /// What it is, to its owner or to who looks at it.
    #[inline]
    pub(super) fn flags(&self) -> VmFlags {
        Word(self.word.load(Relaxed)).flags()
    }

    /// For its owner, as [`set_state`](Self::set_state).
    #[inline]
    pub(super) fn set_flags(&self, flags: VmFlags) {
        self.set(Word::new(flags, self.state()));
    }

    #[inline]
    pub(super) fn caller(&self) -> Place {
        // SAFETY: null or a location, which is there for ever.
        unsafe { self.caller.load(Relaxed).as_ref() }
    }

    #[inline]
    pub(super) fn set_caller(&self, at: &'static Location<'static>) {
        self.caller.store(ptr::from_ref(at).cast_mut(), Relaxed);
    }

    #[inline]
    pub(super) fn freed_by(&self) -> Place {
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
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_none()
    }

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
