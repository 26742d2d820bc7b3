//! Magazines: arrays of free objects that a CPU holds.
//!
//! # Concepts
//! A CPU takes objects from its *loaded* magazine and puts them back there. When that is empty (or full)
//! it turns to the *previous* one, so that traffic that swings around the edge of a magazine stays on
//! the CPU, and then exchanges a magazine with its shelf's *depot*: one lock for a magazine's worth of
//! objects (Bonwick and Adams, Magazines and Vmem, 2001). How the two share what there is: see `cpu`.
//!
//! # Implementation
//! ```text
//!                   entries, the oldest first
//!   ┌────────┬────────┬────────┬────────┬────────┬──────────┐
//!   │ bottom │ object │ object │  ...   │  room  │ Magazine │
//!   └────────┴────────┴────────┴────────┴────────┴──────────┘
//!                              top               end
//! ```
//! An entry is an object and its state byte, so that taking an object computes nothing. What the fast paths must know of
//! a CPU's loaded magazine is in the `Cpu` ([`Loaded`]), at a place that the cache's number tells: two addresses of the
//! magazine's, and what of the cache's layout is needed to find an object's state byte. What is kept of a magazine lies
//! behind its last place, so it is at `end`; an entry without an object lies before its first, so that taking one off an
//! empty magazine gives none. A CPU that has no magazine of a cache has [`NOTHING`] loaded, which is empty and full at
//! once.
//!
//! # Locking
//! A CPU's magazines are touched by the CPU itself, while it owns its lists (see `page_alloc`); a
//! depot's under its shelf's lock.

use super::{layout::Layout, state::State};
use crate::{context::Loaded, memmap::MemMap, prefetch::prefetch};
use core::{
    ptr::{self, NonNull},
    sync::atomic::{AtomicPtr, AtomicU8, AtomicUsize, Ordering::Relaxed},
};

/// Objects of the magazine sizes. A magazine is a power of two of bytes.
pub(super) const MAGAZINES: [u32; 4] = [6, 14, 30, 62];

/// Objects of the largest.
const MOST: u32 = MAGAZINES[MAGAZINES.len() - 1];

/// Bytes of the objects that a CPU's first magazines of a cache hold at most, if that is more than one: with more
/// the layer held more pages than Linux on the recorded traces.
const FIRST_BYTES: u32 = 1920;

/// Bytes of the objects of those that it comes to when its traffic is heavy.
const MOST_BYTES: u32 = 65536;

/// Index into `MAGAZINES` of the first magazines for objects of `stride` bytes.
pub(super) fn first_class(stride: u32) -> usize {
    largest_class(stride, FIRST_BYTES).saturating_sub(1)
}

/// And of the largest.
pub(super) fn most_class(stride: u32) -> usize {
    largest_class(stride, MOST_BYTES)
}

fn largest_class(stride: u32, bytes: u32) -> usize {
    MAGAZINES.iter().rposition(|cap| cap * stride <= bytes).unwrap_or(0)
}

const _: () = {
    let mut class = 0;
    while class < MAGAZINES.len() {
        assert!(Magazine::bytes(MAGAZINES[class]).is_power_of_two());
        class += 1;
    }
    // Alone at the end of its memory.
    assert!(size_of::<Magazine>() <= size_of::<Slot>());
};

/// A free object.
#[derive(Clone, Copy)]
pub(crate) struct Object {
    pub(crate) at: NonNull<u8>,
    pub(super) state: State,
}

/// An entry's place.
struct Slot {
    at: AtomicUsize,
    state: AtomicUsize,
}

impl Slot {
    /// What is in the slot, if something was written to it before.
    #[inline(always)]
    fn read(&self) -> Option<Object> {
        let at = NonNull::new(ptr::with_exposed_provenance_mut(self.at.load(Relaxed)))?;
        Some(Object { at, state: State::from_addr(self.state.load(Relaxed)) })
    }

    #[inline(always)]
    fn write(&self, at: *mut u8, state: State) {
        self.at.store(at.expose_provenance(), Relaxed);
        self.state.store(state.addr(), Relaxed);
    }

    #[inline(always)]
    fn copy_to(&self, to: &Slot) {
        to.at.store(self.at.load(Relaxed), Relaxed);
        to.state.store(self.state.load(Relaxed), Relaxed);
    }
}

const SLOT: usize = size_of::<Slot>();

/// What is kept of a magazine, behind its places.
pub(super) struct Magazine {
    /// The next one in the depot.
    pub(super) next: AtomicPtr<Magazine>,
    /// Objects, while no CPU has it loaded.
    nr: AtomicU8,
    cap: u8,
    /// Index into `MAGAZINES`.
    class: u8,
}

/// The magazine without places.
#[repr(C)]
struct Nothing {
    bottom: Slot,
    magazine: Magazine,
}

static NOTHING: Nothing = Nothing {
    bottom: Slot { at: AtomicUsize::new(0), state: AtomicUsize::new(0) },
    magazine: Magazine {
        next: AtomicPtr::new(ptr::null_mut()),
        nr: AtomicU8::new(0),
        cap: 0,
        class: 0,
    },
};

/// What a CPU has loaded that has no magazine of a cache.
fn nothing() -> &'static Magazine {
    let _ = (&raw const NOTHING).expose_provenance();
    &NOTHING.magazine
}

/// The slot that begins at an address.
///
/// # Safety
/// The address is a slot's of a magazine, or of the bottom's before it.
#[inline(always)]
unsafe fn slot(at: usize) -> &'static Slot {
    // SAFETY: `init` and `nothing` exposed all of it, and what lies there are atomics only.
    unsafe { &*ptr::with_exposed_provenance::<Slot>(at) }
}

/// Objects between a magazine's first place and where its last object ends. Whatever those are, a number of objects.
pub(super) fn nr_between(first: usize, top: usize) -> u32 {
    (top.wrapping_sub(first) / SLOT).min(MOST as usize) as u32
}

/// A place in the loaded magazine.
pub(super) struct Room<'a> {
    of: Loaded<'a>,
    top: usize,
}

impl Room<'_> {
    /// Puts an object there.
    #[inline(always)]
    pub(super) fn put(self, at: *mut u8, state: State) {
        debug_assert_eq!(
            self.of.top().load(Relaxed),
            self.top,
            "the magazine was exchanged meanwhile"
        );
        // SAFETY: `Loaded::room` found the end of the magazine's places behind it.
        unsafe { slot(self.top) }.write(at, state);
        // Whoever is given it next writes to it, and the locked instruction of the free after that waits for the line.
        prefetch(at);
        self.of.top().store(self.top.wrapping_add(SLOT), Relaxed);
    }
}

/// From `attach_cpus` on, which comes before any use, the addresses are those of one magazine, `NOTHING` or the
/// CPU's, which lives until another is loaded: they change by these functions only.
impl<'a> Loaded<'a> {
    /// Makes the first magazine of a cache that the CPU has the loaded one. With `several_nodes` a free must look where
    /// the object is from, and is left to the slow path.
    pub(super) fn equip(
        self,
        m: &'static Magazine,
        layout: &Layout,
        map: &MemMap,
        several_nodes: bool,
    ) {
        debug_assert!(layout.lead == 0, "such caches have no magazines");
        let (states, shift) = layout.states_place(map);
        self.set_states(states);
        self.set_shift(shift as u8);
        self.set_mask(layout.mask);
        let reciprocal = if several_nodes { 0 } else { layout.reciprocal };
        self.set_reciprocal(reciprocal);
        self.set_bound(reciprocal);
        self.load(m);
    }

    /// The CPU has no magazine of the cache any more.
    pub(super) fn strip(self) {
        // At bring-up there was none before: pages that nobody has written to stay so.
        if self.reciprocal() != 0 {
            self.set_reciprocal(0);
            self.set_bound(0);
        }
        self.load(nothing());
    }

    /// The state byte of the object at an offset in the direct map, in a slab of the magazine's cache whose colour takes
    /// an address `back` (see `colour_back`); `None` if no object begins there, or if that is for a slower
    /// path to find out.
    #[inline(always)]
    pub(super) fn state_at(self, offset: usize, back: u32) -> Option<State> {
        let behind = (offset as u32).wrapping_add(back) & self.mask();
        let first = offset.wrapping_sub(behind as usize);
        // See `Layout`.
        let product = u64::from(behind) * u64::from(self.reciprocal());
        if product as u32 >= self.bound() {
            return None;
        }
        let states = self.states().wrapping_add((product >> 32) as usize);
        let state = states.wrapping_add(first >> (u32::from(self.shift()) & (usize::BITS - 1)));
        // SAFETY: the caller's frame is a slab's of this cache, and `offset` is `behind` bytes behind its first
        // object, a multiple of the stride, which has a state byte: `Layout` has no colour for which an address
        // before the first object would wrap around to one. Direct map and table were exposed.
        Some(unsafe { State::new(ptr::with_exposed_provenance(state)) })
    }

    /// Takes the last object.
    #[inline(always)]
    pub(super) fn pop(self) -> Option<Object> {
        let below = self.top().load(Relaxed).wrapping_sub(SLOT);
        // SAFETY: the slot below the top of the loaded magazine: the bottom of an empty one.
        let object = unsafe { slot(below) }.read()?;
        self.top().store(below, Relaxed);
        Some(object)
    }

    /// The place behind the last object, if there is one; good while nothing else is done to the magazine.
    #[inline(always)]
    pub(super) fn room(self) -> Option<Room<'a>> {
        let top = self.top().load(Relaxed);
        // They are never further apart than a magazine is large.
        debug_assert!(self.end().wrapping_sub(top as u16) <= (MOST as usize * SLOT) as u16);
        (top as u16 != self.end()).then_some(Room { of: self, top })
    }

    /// Makes a magazine the loaded one.
    pub(super) fn load(self, m: &'static Magazine) {
        let end = m.end();
        self.top().store(end - (m.cap() - m.nr()) as usize * SLOT, Relaxed);
        self.set_end(end as u16);
    }
}

impl Magazine {
    /// Bytes of a magazine for `cap` objects.
    pub(super) const fn bytes(cap: u32) -> u32 {
        // The bottom, and what is kept of it.
        (cap + 2) * SLOT as u32
    }

    /// Makes an empty magazine for objects of `stride` bytes.
    ///
    /// # Safety
    /// `at` points to `bytes(MAGAZINES[class])` bytes, aligned to a cache line, that are nobody else's for as
    /// long as the magazine is used.
    pub(super) unsafe fn init(at: *mut u8, class: usize, stride: u32) -> &'static Magazine {
        // Of large objects fewer than there are slots for.
        let slots = MAGAZINES[class];
        let bytes = if class <= first_class(stride) { FIRST_BYTES } else { MOST_BYTES };
        let cap = slots.min((bytes / stride).max(1));
        let _ = at.expose_provenance();
        // SAFETY: by the contract the memory is large enough, aligned and ours; the slots, two words each,
        // are zeroed and from then on only used as atomics.
        unsafe {
            at.write_bytes(0, Magazine::bytes(slots) as usize);
            let m = at.add((cap as usize + 1) * SLOT).cast::<Magazine>();
            m.write(Magazine {
                next: AtomicPtr::new(ptr::null_mut()),
                nr: AtomicU8::new(0),
                cap: cap as u8,
                class: class as u8,
            });
            &*m
        }
    }

    /// As a pointer for the places that magazines are kept in.
    pub(super) fn place(&'static self) -> *mut Magazine {
        ptr::from_ref(self).cast_mut()
    }

    /// The memory that `init` was given.
    pub(super) fn memory(&'static self) -> *mut u8 {
        ptr::with_exposed_provenance_mut(self.end() - (usize::from(self.cap) + 1) * SLOT)
    }

    /// The address behind its last place, which is its own.
    fn end(&self) -> usize {
        ptr::from_ref(self).addr()
    }

    /// Takes note of where its last object ends, when it was loaded until now.
    #[inline]
    pub(super) fn settle(&self, top: usize) {
        // What moves objects between magazines relies on there being no more than places.
        self.set_nr(nr_between(self.first(), top).min(self.cap()));
    }

    /// Objects, of one that no CPU has loaded.
    pub(super) fn nr(&self) -> u32 {
        self.nr.load(Relaxed).into()
    }

    /// As [`nr`](Self::nr), for others than the owner: whatever the memory is by now, a number of objects.
    pub(super) fn seen(&self) -> u32 {
        self.nr().min(MOST)
    }

    pub(super) fn cap(&self) -> u32 {
        self.cap.into()
    }

    /// Index into `MAGAZINES`.
    pub(super) fn class(&self) -> usize {
        self.class as usize
    }

    /// Its place number `i` of those that it has.
    #[inline(always)]
    fn place_at(&self, first: usize, i: u32) -> &'static Slot {
        debug_assert!(i < self.cap());
        // SAFETY: as many lie before what is kept of it as it has places, from `first` on.
        unsafe { slot(first + i as usize * SLOT) }
    }

    /// Where its first place is.
    pub(super) fn first(&self) -> usize {
        self.end() - self.cap() as usize * SLOT
    }

    /// The first `nr` objects, as many of them as there can be, oldest first.
    pub(super) fn first_objects(&self, nr: u32) -> impl Iterator<Item = Object> + '_ {
        let first = self.first();
        (0..nr.min(self.cap())).filter_map(move |i| self.place_at(first, i).read())
    }

    /// Puts the older half of its objects on top of those of another magazine, or as many as that has room for. No CPU has
    /// either loaded.
    pub(super) fn give_older_half(&self, to: &Magazine) {
        let (nr, there) = (self.nr(), to.nr());
        let n = nr.div_ceil(2).min(to.cap() - there);
        let (first, first_to) = (self.first(), to.first());
        (0..n).for_each(|i| self.place_at(first, i).copy_to(to.place_at(first_to, there + i)));
        // The others take their places.
        (n..nr).for_each(|i| self.place_at(first, i).copy_to(self.place_at(first, i - n)));
        to.set_nr(there + n);
        self.set_nr(nr - n);
    }

    /// Takes all objects out, and gives each to `f`, the oldest first.
    pub(super) fn drain(&self, f: impl FnMut(Object)) {
        self.first_objects(self.nr()).for_each(f);
        self.set_nr(0);
    }

    fn set_nr(&self, nr: u32) {
        self.nr.store(nr as u8, Relaxed);
    }
}
