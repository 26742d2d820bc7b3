//! Magazines: arrays of free objects that a CPU holds.
//!
//! # Concepts
//! A CPU takes objects from its *loaded* magazine and puts them back there. When that is empty (or full)
//! it turns to the *previous* one, so that traffic that swings around the edge of a magazine stays on
//! the CPU, and then exchanges a magazine with its node's *depot*: one lock for a magazine's worth of
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
//! depot's under its node's lock.

use super::{
    cache::{CpuCache, Descriptor},
    layout::{Layout, OUTSIDE},
    state::State,
};
use core::{
    ptr::{self, NonNull},
    sync::atomic::{AtomicPtr, AtomicU32, AtomicUsize, Ordering::Relaxed},
};

/// Objects of the magazine sizes. A magazine is a power of two of bytes.
pub(super) const MAGAZINES: [u32; 4] = [4, 12, 28, 60];

/// Bytes of the objects that a magazine holds at most, if that is more than one: with more the layer held
/// more pages than Linux on the recorded traces.
pub(super) const MOST_BYTES: u32 = 2048;

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
    /// What is in the slot, which was written before.
    #[inline(always)]
    fn read(&self) -> Object {
        let at = ptr::with_exposed_provenance_mut(self.at.load(Relaxed));
        Object {
            // SAFETY: `write` put it there, which is given no null.
            at: unsafe { NonNull::new_unchecked(at) },
            state: State::from_addr(self.state.load(Relaxed)),
        }
    }

    #[inline(always)]
    fn write(&self, object: Object) {
        self.at.store(object.at.as_ptr().expose_provenance(), Relaxed);
        self.state.store(object.state.addr(), Relaxed);
    }
}

const SLOT: u32 = size_of::<Slot>() as u32;

/// The head of a magazine; its slots follow.
#[repr(C, align(64))]
pub(super) struct Magazine {
    /// Objects and room, in bytes of slots, so that a slot is found by one addition.
    top: AtomicU32,
    limit: u32,
    /// Objects of a slab, if its state bytes are inside, else 0; 0 also where a free must look at nodes.
    objects: u32,
    /// The same for state bytes outside.
    outside: u32,
    mask: u32,
    inverse: u32,
    rotate: u8,
    colour_shift: u8,
    /// Index into `MAGAZINES`.
    class: u8,
    states_at: u32,
    /// `limit` for objects of an owner's, or 0 where a free must look where the object is from.
    limit_owned: u32,
    cache: *const Descriptor,
    /// The CPU's side of the cache, while it has the magazine.
    pub(super) owner: AtomicPtr<CpuCache>,
    /// The next one in the depot.
    pub(super) next: AtomicPtr<Magazine>,
}

const _: () = assert!(size_of::<Magazine>() == 64);

// SAFETY: what changes is atomic; the cache outlives its magazines.
unsafe impl Sync for Magazine {}

/// What a CPU has that has no magazine of a cache.
pub(super) static NOTHING: Magazine = Magazine {
    top: AtomicU32::new(0),
    limit: 0,
    objects: 0,
    outside: 0,
    mask: 0,
    inverse: 0,
    rotate: 0,
    colour_shift: 0,
    class: 0,
    states_at: OUTSIDE,
    limit_owned: 0,
    cache: ptr::null(),
    owner: AtomicPtr::new(ptr::null_mut()),
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
    pub(super) fn put(self, object: Object) {
        self.m.slot(self.top).write(object);
        self.m.top.store(self.top + SLOT, Relaxed);
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
        several_nodes: bool,
    ) -> &'static Magazine {
        // Of large objects fewer than there are slots for.
        let slots = MAGAZINES[class];
        let cap = slots.min((MOST_BYTES / d.layout.stride).max(1));
        let Layout { nr, mask, inverse, rotate, colour_shift, states_at, .. } = d.layout;
        let head = Magazine {
            top: AtomicU32::new(0),
            limit: cap * SLOT,
            objects: if several_nodes || states_at == OUTSIDE { 0 } else { nr },
            outside: if several_nodes || states_at != OUTSIDE { 0 } else { nr },
            mask,
            inverse,
            rotate: rotate as u8,
            colour_shift: colour_shift as u8,
            class: class as u8,
            states_at,
            limit_owned: if several_nodes { 0 } else { cap * SLOT },
            cache: d,
            owner: AtomicPtr::new(ptr::null_mut()),
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
        usize::from(self.class)
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
        (top < self.limit_owned).then_some(Room { m: self, top })
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
        // this module) pass multiples of a slot below `top` or, with room for one more, `top` itself, and
        // `top` is never above `limit`. `init` exposed the memory.
        unsafe { &*ptr::with_exposed_provenance::<Slot>(slots + at as usize) }
    }

    /// Takes the last object.
    #[inline(always)]
    pub(super) fn pop(&self) -> Option<Object> {
        let top = self.top.load(Relaxed).checked_sub(SLOT)?;
        let object = self.slot(top).read();
        self.top.store(top, Relaxed);
        Some(object)
    }

    /// Puts an object behind the last one; `false` if there is no room.
    #[inline(always)]
    pub(super) fn push(&self, object: Object) -> bool {
        self.room().map(|room| room.put(object)).is_some()
    }

    /// The objects, oldest first.
    pub(super) fn iter(&self) -> impl Iterator<Item = Object> + '_ {
        (0..self.nr()).map(|i| self.slot(i * SLOT).read())
    }

    /// Takes the oldest `n` objects out, and gives each to `f`.
    pub(super) fn drain_oldest(&self, n: u32, f: impl FnMut(Object)) {
        let nr = self.nr();
        let n = n.min(nr);
        self.iter().take(n as usize).for_each(f);
        for i in n..nr {
            self.slot((i - n) * SLOT).write(self.slot(i * SLOT).read());
        }
        self.top.store((nr - n) * SLOT, Relaxed);
    }

    /// The order of the cache's slabs.
    #[inline(always)]
    pub(super) fn order(&self, page_shift: u32) -> u32 {
        (self.mask + 1).ilog2() - page_shift
    }

    /// Of what index the object at an offset into the direct map is, in a slab of the magazine's cache with the
    /// given colour; more than any slab has where no object begins.
    #[inline(always)]
    fn index(&self, offset: usize, colour: u32) -> u32 {
        let within = offset as u32 & self.mask;
        let behind = within.wrapping_sub(colour << self.colour_shift);
        behind.wrapping_mul(self.inverse).rotate_right(u32::from(self.rotate))
    }

    /// The state byte of the object at an address `offset` bytes into the direct map, in a slab of the
    /// magazine's cache with the given colour; `None` if no object begins there, or if that is for a slower
    /// path to find out.
    #[inline(always)]
    pub(super) fn state_inside(&self, at: *mut u8, offset: usize, colour: u32) -> Option<State> {
        let i = self.index(offset, colour);
        if i >= self.objects {
            return None;
        }
        let start = at.wrapping_sub((offset as u32 & self.mask) as usize);
        let states = start.wrapping_add(self.states_at as usize);
        // SAFETY: the caller's frame is a slab's of this cache, which begins at `start`, and `i` is the index
        // of one of its objects; its state bytes are inside, or `objects` would be 0.
        Some(unsafe { State::new(states.wrapping_add(i as usize).cast()) })
    }

    /// The index of such an object, if the cache has its state bytes outside.
    #[inline(always)]
    pub(super) fn index_outside(&self, offset: usize, colour: u32) -> Option<u32> {
        let i = self.index(offset, colour);
        (i < self.outside).then_some(i)
    }
}
