//! Magazines: arrays of free objects that a CPU holds.
//!
//! # Concepts
//! A CPU takes objects from its *loaded* magazine and puts them back there. When that is empty (or full)
//! it turns to the *previous* one, so that traffic that swings around the edge of a magazine stays on
//! the CPU, and then exchanges a magazine with its node's *depot*: one lock for a magazine's worth of
//! objects (Bonwick and Adams, Magazines and Vmem, 2001).
//!
//! # Implementation
//! An entry is an object and its state byte, so that taking an object computes nothing. Everything is
//! in atomics that are loaded and stored plainly: to the language an interrupt handler is another thread.
//!
//! # Locking
//! A CPU's magazines are touched by the CPU itself, while it owns its lists (see `page_alloc`); a
//! depot's under its node's lock.

use super::state::State;
use core::sync::atomic::{AtomicPtr, AtomicU32, AtomicUsize, Ordering::Relaxed};

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
#[repr(C, align(16))]
pub(super) struct Magazine {
    /// The next one in the depot.
    pub(super) next: AtomicPtr<Magazine>,
    /// Objects, while it is not loaded.
    pub(super) nr: AtomicU32,
    cap: u32,
    slots: [Slot; 0],
}

impl Magazine {
    /// Bytes of a magazine for `cap` objects.
    pub(super) const fn bytes(cap: u32) -> u32 {
        (size_of::<Magazine>() + cap as usize * size_of::<Slot>()) as u32
    }

    /// Makes an empty magazine.
    ///
    /// # Safety
    /// `at` points to `bytes(cap)` bytes, aligned to 16, that are nobody else's for as long as the magazine
    /// is used.
    pub(super) unsafe fn init(at: *mut u8, cap: u32) -> &'static Magazine {
        let head = Magazine {
            next: AtomicPtr::new(core::ptr::null_mut()),
            nr: AtomicU32::new(0),
            cap,
            slots: [],
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

    #[inline(always)]
    pub(super) fn cap(&self) -> u32 {
        self.cap
    }

    #[inline(always)]
    fn slot(&self, i: u32) -> &Slot {
        assert!(i < self.cap);
        let slots = core::ptr::from_ref(self).addr() + size_of::<Magazine>();
        // SAFETY: by `init`'s contract the slots of a magazine lie behind its head, `cap` of them, and `i`
        // is below that. `init` exposed the memory.
        unsafe { &*core::ptr::with_exposed_provenance::<Slot>(slots).add(i as usize) }
    }

    /// The object in a slot below the number of objects.
    #[inline(always)]
    pub(super) fn get(&self, i: u32) -> Object {
        let slot = self.slot(i);
        Object {
            at: core::ptr::with_exposed_provenance_mut(slot.at.load(Relaxed)),
            state: State::from_addr(slot.state.load(Relaxed)),
        }
    }

    #[inline(always)]
    pub(super) fn set(&self, i: u32, object: Object) {
        let slot = self.slot(i);
        slot.at.store(object.at.expose_provenance(), Relaxed);
        slot.state.store(object.state.addr(), Relaxed);
    }
}
