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
    ptr,
    sync::atomic::{AtomicPtr, AtomicU32, AtomicUsize, Ordering::Relaxed},
};

/// Objects of the magazine sizes. A magazine is a power of two of bytes.
pub(super) const MAGAZINES: [u32; 4] = [4, 12, 28, 60];

const _: () = {
    let mut class = 0;
    while class < MAGAZINES.len() {
        assert!(Magazine::bytes(MAGAZINES[class]).is_power_of_two());
        class += 1;
    }
};

/// A free object.
#[derive(Clone, Copy)]
pub(super) struct Object {
    pub(super) at: *mut u8,
    pub(super) state: State,
}

/// An entry's place.
struct Slot {
    at: AtomicUsize,
    state: AtomicUsize,
}

/// The head of a magazine; its slots follow.
#[repr(C, align(64))]
pub(super) struct Magazine {
    /// Objects.
    nr: AtomicU32,
    cap: u32,
    /// Objects of a slab, or 0 if those of this cache are freed by the slow path.
    objects: u32,
    mask: u32,
    inverse: u32,
    rotate: u32,
    states_at: u32,
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
    nr: AtomicU32::new(0),
    cap: 0,
    objects: 0,
    mask: 0,
    inverse: 0,
    rotate: 0,
    states_at: OUTSIDE,
    cache: ptr::null(),
    owner: AtomicPtr::new(ptr::null_mut()),
    next: AtomicPtr::new(ptr::null_mut()),
};

/// A place in a magazine.
pub(super) struct Room<'a> {
    m: &'a Magazine,
    nr: u32,
}

impl Room<'_> {
    /// Puts an object there.
    #[inline(always)]
    pub(super) fn put(self, object: Object) {
        let slot = self.m.slot(self.nr);
        slot.at.store(object.at.expose_provenance(), Relaxed);
        slot.state.store(object.state.addr(), Relaxed);
        self.m.nr.store(self.nr + 1, Relaxed);
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
    /// `at` points to `bytes(cap)` bytes, aligned to a cache line, that are nobody else's for as long as the
    /// magazine is used.
    pub(super) unsafe fn init(
        at: *mut u8,
        cap: u32,
        d: &'static Descriptor,
        several_nodes: bool,
    ) -> &'static Magazine {
        let Layout { nr, mask, inverse, rotate, states_at, .. } = d.layout;
        let head = Magazine {
            nr: AtomicU32::new(0),
            cap,
            objects: if several_nodes || states_at == OUTSIDE { 0 } else { nr },
            mask,
            inverse,
            rotate,
            states_at,
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
            m.add(1).cast::<u8>().write_bytes(0, cap as usize * size_of::<Slot>());
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
        self.nr.load(Relaxed)
    }

    /// As [`nr`](Self::nr), for others than the owner: whatever the memory is by now, a number of objects.
    pub(super) fn seen(&self) -> u32 {
        self.nr().min(MAGAZINES[MAGAZINES.len() - 1])
    }

    #[inline(always)]
    pub(super) fn cap(&self) -> u32 {
        self.cap
    }

    /// Whether it holds objects of the cache.
    #[inline(always)]
    pub(super) fn is_of(&self, d: &Descriptor) -> bool {
        ptr::eq(self.cache, d)
    }

    /// The place behind the last object, if there is one; good while nothing else is done to the magazine.
    #[inline(always)]
    pub(super) fn room(&self) -> Option<Room<'_>> {
        let nr = self.nr();
        (nr < self.cap).then_some(Room { m: self, nr })
    }

    /// The place of entry `i`, which is below `cap`.
    #[inline(always)]
    fn slot(&self, i: u32) -> &Slot {
        debug_assert!(i < self.cap);
        let slots = ptr::from_ref(self).addr() + size_of::<Magazine>();
        // SAFETY: by `init`'s contract the slots of a magazine lie behind its head, `cap` of them; callers
        // (in this module) pass indices below `nr` or, with room for one more, `nr` itself, and `nr` is
        // never above `cap`. `init` exposed the memory.
        unsafe { &*ptr::with_exposed_provenance::<Slot>(slots).add(i as usize) }
    }

    /// Takes the last object.
    #[inline(always)]
    pub(super) fn pop(&self) -> Option<Object> {
        let nr = self.nr().checked_sub(1)?;
        let object = self.read(nr);
        self.nr.store(nr, Relaxed);
        Some(object)
    }

    /// Puts an object behind the last one; `false` if there is no room.
    #[inline(always)]
    pub(super) fn push(&self, object: Object) -> bool {
        self.room().map(|room| room.put(object)).is_some()
    }

    #[inline(always)]
    fn read(&self, i: u32) -> Object {
        let slot = self.slot(i);
        Object {
            at: ptr::with_exposed_provenance_mut(slot.at.load(Relaxed)),
            state: State::from_addr(slot.state.load(Relaxed)),
        }
    }

    /// The objects, oldest first.
    pub(super) fn iter(&self) -> impl Iterator<Item = Object> + '_ {
        (0..self.nr()).map(|i| self.read(i))
    }

    /// Takes the oldest `n` objects out, and gives each to `f`.
    pub(super) fn drain_oldest(&self, n: u32, f: impl FnMut(Object)) {
        let nr = self.nr();
        let n = n.min(nr);
        (0..n).map(|i| self.read(i)).for_each(f);
        for i in n..nr {
            let object = self.read(i);
            let slot = self.slot(i - n);
            slot.at.store(object.at.expose_provenance(), Relaxed);
            slot.state.store(object.state.addr(), Relaxed);
        }
        self.nr.store(nr - n, Relaxed);
    }

    /// The state byte of the object at an address `offset` bytes into the direct map, in a slab of the
    /// magazine's cache; `None` if no object begins there, or if that is for the slow path to find out.
    #[inline(always)]
    pub(super) fn state_of(&self, at: *mut u8, offset: usize) -> Option<State> {
        let within = offset as u32 & self.mask;
        let i = within.wrapping_mul(self.inverse).rotate_right(self.rotate);
        if i >= self.objects {
            return None;
        }
        let states = at.wrapping_sub(within as usize).wrapping_add(self.states_at as usize);
        // SAFETY: the caller's frame is a slab's of this cache, `within` bytes from its start, and `i` is the
        // index of one of its objects; its state bytes are inside, or `objects` would be 0.
        Some(unsafe { State::new(states.wrapping_add(i as usize).cast()) })
    }
}
