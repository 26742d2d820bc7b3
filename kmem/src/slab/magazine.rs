//! Magazines: arrays of free objects that a CPU holds.
//!
//! # Concepts
//! A CPU takes objects from its *loaded* magazine and puts them back there. When that is empty (or full)
//! it turns to the *previous* one, so that traffic that swings around the edge of a magazine stays on
//! the CPU, and then exchanges a magazine with its shelf's *depot*: one lock for a magazine's worth of
//! objects (Bonwick and Adams, Magazines and Vmem, 2001).
//!
//! # Implementation
//! The head of a magazine is the one cache line that the fast paths work with: it repeats what of the
//! cache's layout is needed to find an object's state byte. An entry is an object and its state byte, so that
//! taking an object computes nothing. A CPU that has no magazine of a cache has [`NOTHING`] in its place, which
//! is empty and full at once. Everything that changes is in atomics that are loaded and stored plainly: to
//! the language an interrupt handler is another thread.
//!
//! # Locking
//! A CPU's magazines are touched by the CPU itself, while it owns its lists (see `page_alloc`); a
//! depot's under its shelf's lock.

use super::{
    cache::{CpuCache, Descriptor},
    state::State,
};
use crate::{memmap::MemMap, prefetch::prefetch};
use core::{
    mem,
    ptr::{self, NonNull},
    sync::atomic::{AtomicPtr, AtomicU32, AtomicUsize, Ordering::Relaxed},
};

/// Objects of the magazine sizes. A magazine is a power of two of bytes.
pub(super) const MAGAZINES: [u32; 4] = [4, 12, 28, 60];

/// Bytes of the objects that a CPU's first magazines of a cache hold at most, if that is more than one: with more
/// the layer held more pages than Linux on the recorded traces.
const FIRST_BYTES: u32 = 2048;

/// Bytes of the objects of those that it comes to when its traffic is heavy.
const MOST_BYTES: u32 = 16384;

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
}

const SLOT: u32 = size_of::<Slot>() as u32;

/// The head of a magazine; its slots follow.
#[repr(C, align(64))]
pub(super) struct Magazine {
    /// Objects and room, in bytes of slots, so that a slot is found by one addition.
    top: AtomicU32,
    limit: u32,
    /// `limit` for objects of an owner's, or 0 where a free must look where the object is from.
    limit_owned: u16,
    /// Index into `MAGAZINES`.
    class: u8,
    /// Where state bytes are: see `Layout::states_place`.
    states_shift: u8,
    /// The layout's.
    mask: u32,
    /// The layout's, or 0 where a free must look at nodes.
    reciprocal: u32,
    /// The same: what is compared with needs no register this way.
    bound: u32,
    states_base: usize,
    cache: *const Descriptor,
    /// The CPU's side of the cache, while it has the magazine.
    pub(super) owner: AtomicPtr<CpuCache>,
    /// Null. Lies where the object below the first one would be, so that taking one off an empty magazine gives
    /// none.
    bottom: usize,
    /// The next one in the depot.
    pub(super) next: AtomicPtr<Magazine>,
}

const _: () = assert!(size_of::<Magazine>() == 64);
const _: () = assert!(
    mem::offset_of!(Magazine, bottom) + SLOT as usize
        == size_of::<Magazine>() + mem::offset_of!(Slot, at)
);

// SAFETY: what changes is atomic; the cache outlives its magazines.
unsafe impl Sync for Magazine {}

/// What a CPU has that has no magazine of a cache.
pub(super) static NOTHING: Magazine = Magazine {
    top: AtomicU32::new(0),
    limit: 0,
    limit_owned: 0,
    class: 0,
    states_shift: 0,
    mask: 0,
    reciprocal: 0,
    bound: 0,
    states_base: 0,
    cache: ptr::null(),
    owner: AtomicPtr::new(ptr::null_mut()),
    bottom: 0,
    next: AtomicPtr::new(ptr::null_mut()),
};

/// A place in a magazine.
pub(super) struct Room<'a> {
    m: &'a Magazine,
    top: u32,
}

impl Room<'_> {
    /// Puts an object there.
    #[inline(always)]
    pub(super) fn put(self, at: *mut u8, state: State) {
        self.m.slot(self.top).write(at, state);
        // Whoever is given it next writes to it, and the locked instruction of the free after that waits for the line.
        prefetch(at);
        self.m.top.store(self.m.top.load(Relaxed).wrapping_add(SLOT), Relaxed);
    }
}

impl Magazine {
    /// Bytes of a magazine for `cap` objects.
    pub(super) const fn bytes(cap: u32) -> u32 {
        (size_of::<Magazine>() + cap as usize * size_of::<Slot>()) as u32
    }

    /// Makes an empty magazine of a cache. With `several_nodes` a free must look where the object is from, and
    /// is left to the slow path.
    ///
    /// # Safety
    /// `at` points to `bytes(MAGAZINES[class])` bytes, aligned to a cache line, that are nobody else's for as
    /// long as the magazine is used.
    pub(super) unsafe fn init(
        at: *mut u8,
        class: usize,
        d: &'static Descriptor,
        map: &MemMap,
        several_nodes: bool,
    ) -> &'static Magazine {
        // Of large objects fewer than there are slots for.
        let slots = MAGAZINES[class];
        let bytes = if class <= first_class(d.layout.stride) { FIRST_BYTES } else { MOST_BYTES };
        let cap = slots.min((bytes / d.layout.stride).max(1));
        debug_assert!(d.layout.lead == 0, "such caches have no magazines");
        let reciprocal = if several_nodes { 0 } else { d.layout.reciprocal };
        let (states_base, shift) = d.layout.states_place(map);
        let head = Magazine {
            top: AtomicU32::new(0),
            limit: cap * SLOT,
            limit_owned: if several_nodes { 0 } else { (cap * SLOT) as u16 },
            class: class as u8,
            states_shift: shift as u8,
            mask: d.layout.mask,
            reciprocal,
            bound: reciprocal,
            states_base,
            cache: d,
            owner: AtomicPtr::new(ptr::null_mut()),
            bottom: 0,
            next: AtomicPtr::new(ptr::null_mut()),
        };
        let m = at.cast::<Magazine>();
        let _ = m.expose_provenance();
        // SAFETY: by the contract the memory is large enough, aligned and ours; the slots, two words each,
        // are zeroed and from then on only used as atomics.
        unsafe {
            m.write(head);
            m.add(1).cast::<u8>().write_bytes(0, slots as usize * size_of::<Slot>());
            &*m
        }
    }

    /// As a pointer for the places that magazines are kept in.
    #[inline(always)]
    pub(super) fn place(&'static self) -> *mut Magazine {
        ptr::from_ref(self).cast_mut()
    }

    #[inline(always)]
    pub(super) fn nr(&self) -> u32 {
        self.top.load(Relaxed) / SLOT
    }

    /// As [`nr`](Self::nr), for others than the owner: whatever the memory is by now, a number of objects.
    pub(super) fn seen(&self) -> u32 {
        self.nr().min(MAGAZINES[MAGAZINES.len() - 1])
    }

    #[inline(always)]
    pub(super) fn cap(&self) -> u32 {
        self.limit / SLOT
    }

    /// Index into `MAGAZINES`.
    pub(super) fn class(&self) -> usize {
        self.class as usize
    }

    /// Whether it holds objects of the cache.
    #[inline(always)]
    pub(super) fn is_of(&self, d: &Descriptor) -> bool {
        ptr::eq(self.cache, d)
    }

    /// As `room`, if what is freed here may stay here.
    #[inline(always)]
    pub(super) fn room_for_owned(&self) -> Option<Room<'_>> {
        let top = self.top.load(Relaxed);
        (top < self.limit_owned.into()).then_some(Room { m: self, top })
    }

    /// The place behind the last object, if there is one; good while nothing else is done to the magazine.
    #[inline(always)]
    pub(super) fn room(&self) -> Option<Room<'_>> {
        let top = self.top.load(Relaxed);
        (top < self.limit).then_some(Room { m: self, top })
    }

    /// The slot that begins `at` bytes behind the head.
    #[inline(always)]
    fn slot(&self, at: u32) -> &Slot {
        debug_assert!(at < self.limit && at.is_multiple_of(SLOT));
        let slots = ptr::from_ref(self).addr() + size_of::<Magazine>();
        // SAFETY: by `init`'s contract the slots of a magazine lie behind its head, up to `limit`; callers (in
        // this module) pass multiples of a slot below `limit`. `init` exposed the memory.
        unsafe { &*ptr::with_exposed_provenance::<Slot>(slots + at as usize) }
    }

    /// The slot that ends `at` bytes behind the head; the end of the head itself for 0.
    #[inline(always)]
    fn below(&self, at: u32) -> &Slot {
        let first = ptr::from_ref(self).addr() + size_of::<Magazine>() - SLOT as usize;
        // SAFETY: as in `slot`, with multiples up to `limit`. The end of the head is two words, of which
        // `bottom` is null for ever. `NOTHING`, which has nothing behind its head, was exposed by `attach_cpus`.
        unsafe { &*ptr::with_exposed_provenance::<Slot>(first + at as usize) }
    }

    /// Takes the last object.
    #[inline(always)]
    pub(super) fn pop(&self) -> Option<Object> {
        let object = self.below(self.top.load(Relaxed)).read()?;
        self.top.store(self.top.load(Relaxed).wrapping_sub(SLOT), Relaxed);
        Some(object)
    }

    /// Puts an object behind the last one; `false` if there is no room.
    #[inline(always)]
    pub(super) fn push(&self, object: Object) -> bool {
        self.room().map(|room| room.put(object.at.as_ptr(), object.state)).is_some()
    }

    /// The objects, oldest first.
    pub(super) fn iter(&self) -> impl Iterator<Item = Object> + '_ {
        (0..self.nr()).filter_map(|i| self.slot(i * SLOT).read())
    }

    /// Takes the oldest `n` objects out, and gives each to `f`.
    pub(super) fn drain_oldest(&self, n: u32, f: impl FnMut(Object)) {
        let nr = self.nr();
        let n = n.min(nr);
        self.iter().take(n as usize).for_each(f);
        for i in n..nr {
            if let Some(object) = self.slot(i * SLOT).read() {
                self.slot((i - n) * SLOT).write(object.at.as_ptr(), object.state);
            }
        }
        self.top.store((nr - n) * SLOT, Relaxed);
    }

    /// The state byte of the object at an offset in the direct map, in a slab of the magazine's cache whose colour takes
    /// an address `back` (see `colour_back`); `None` if no object begins there, or if that is for a slower
    /// path to find out.
    #[inline(always)]
    pub(super) fn state_at(&self, offset: usize, back: u32) -> Option<State> {
        let behind = (offset as u32).wrapping_add(back) & self.mask;
        let first = offset.wrapping_sub(behind as usize);
        // See `Layout`.
        let product = u64::from(behind) * u64::from(self.reciprocal);
        if product as u32 >= self.bound {
            return None;
        }
        let states = self.states_base.wrapping_add(first >> (self.states_shift & 63));
        let state = states.wrapping_add((product >> 32) as usize);
        // SAFETY: the caller's frame is a slab's of this cache, and `offset` is `behind` bytes behind its first
        // object, a multiple of the stride, which has a state byte: `Layout` has no colour for which an address
        // before the first object would wrap around to one. Direct map and table were exposed.
        Some(unsafe { State::new(ptr::with_exposed_provenance(state)) })
    }
}
