//! What is a CPU's own while its lists are owned.
//!
//! # Concepts
//! Whoever [owns a CPU's lists](crate::page_alloc) works on them as if alone: other CPUs keep out, and an interrupt on
//! the CPU finds them owned. So what only owners touch need not be atomic. [`Held`] stands for the ownership: who has
//! one may read and write the CPU's [`Own`] values.
//!
//! # Locking
//! Ownership of the CPU's lists, which `page_alloc` takes and gives up between compiler fences.

use super::{Cpu, MAX_CACHES};
use core::{
    cell::UnsafeCell,
    marker::PhantomData,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

/// A CPU whose lists the caller owns, for as long as `'a`.
#[derive(Clone, Copy)]
pub(crate) struct Held<'a> {
    pub(crate) cpu: &'a Cpu,
    /// Of the CPU it is on alone.
    _here: PhantomData<*const ()>,
}

impl<'a> Held<'a> {
    /// # Safety
    /// The caller is on the CPU and owns its lists while `'a` lasts, or nothing runs on the CPU meanwhile.
    #[inline(always)]
    pub(crate) unsafe fn new(cpu: &'a Cpu) -> Held<'a> {
        Held { cpu, _here: PhantomData }
    }

    /// The CPU's loaded magazine of a cache.
    #[inline(always)]
    pub(crate) fn loaded(self, id: u16) -> Loaded<'a> {
        Loaded { held: self, i: usize::from(id) % MAX_CACHES }
    }
}

/// A value that only who holds its CPU's lists touches.
struct Own<T>(UnsafeCell<T>);

// SAFETY: reached through a `Loaded`, which came of a `Held`: one CPU at a time, and no interrupt on it between.
unsafe impl<T: Send> Sync for Own<T> {}

impl<T> Own<T> {
    const fn new(value: T) -> Own<T> {
        Own(UnsafeCell::new(value))
    }
}

/// What the fast paths must know of a CPU's loaded magazines, by the caches' numbers. Arrays of words and not of
/// structures: a number is then an index as processors have them. What the words are is the slab layer's business.
#[repr(C)]
pub(super) struct Magazines {
    tops: [AtomicUsize; MAX_CACHES],
    _1: Apart,
    states: [Own<usize>; MAX_CACHES],
    _2: Apart,
    spans: [Own<Span>; MAX_CACHES],
    _3: Apart,
    bounds: [Own<Bound>; MAX_CACHES],
}

/// Keeps what belongs to one cache, or to caches with near numbers, at different places within a page: processors that
/// compare the lower parts of addresses first take a load for one of what was just stored at the same place of another.
type Apart = [u8; 1024];

/// How a slab is cut into objects.
#[derive(Clone, Copy)]
struct Span {
    /// The slab's size less one.
    mask: u32,
    /// Of the objects' stride.
    reciprocal: u32,
}

/// What others are compared with.
#[derive(Clone, Copy)]
struct Bound {
    /// The reciprocal once more, where it need not be in a register.
    reciprocal: u32,
    /// Where the last place ends: the lower part of an address.
    end: u16,
    /// What an offset is shifted right by, to find states.
    shift: u8,
}

impl Magazines {
    /// Those of a CPU that has none.
    pub(super) const fn new() -> Magazines {
        Magazines {
            tops: [const { AtomicUsize::new(0) }; MAX_CACHES],
            _1: [0; 1024],
            states: [const { Own::new(0) }; MAX_CACHES],
            _2: [0; 1024],
            spans: [const { Own::new(Span { mask: 0, reciprocal: 0 }) }; MAX_CACHES],
            _3: [0; 1024],
            bounds: [const { Own::new(Bound { reciprocal: 0, end: 0, shift: 0 }) }; MAX_CACHES],
        }
    }

    /// Where the last object of a cache's ends.
    pub(super) fn top(&self, id: u16) -> usize {
        self.tops[usize::from(id) % MAX_CACHES].load(Relaxed)
    }
}

/// A held CPU's loaded magazine of one cache.
#[derive(Clone, Copy)]
pub(crate) struct Loaded<'a> {
    held: Held<'a>,
    i: usize,
}

macro_rules! own_value {
    ($($(#[$doc:meta])* $get:ident, $set:ident: $type:ty = $array:ident $(. $field:ident)?;)*) => {$(
        $(#[$doc])*
        #[inline(always)]
        pub(crate) fn $get(self) -> $type {
            // SAFETY: a `Held` made this, so the caller is alone with it.
            unsafe { (*self.held.cpu.loaded.$array[self.i].0.get()) $(.$field)? }
        }

        #[inline(always)]
        pub(crate) fn $set(self, value: $type) {
            // SAFETY: as above, and nobody is given a reference.
            unsafe { (*self.held.cpu.loaded.$array[self.i].0.get()) $(.$field)? = value };
        }
    )*};
}

impl<'a> Loaded<'a> {
    /// Where the last object ends. Reports look at it too.
    #[inline(always)]
    pub(crate) fn top(self) -> &'a AtomicUsize {
        &self.held.cpu.loaded.tops[self.i]
    }

    own_value! {
        /// Where the cache's state bytes are.
        states, set_states: usize = states;
        mask, set_mask: u32 = spans.mask;
        reciprocal, set_reciprocal: u32 = spans.reciprocal;
        bound, set_bound: u32 = bounds.reciprocal;
        end, set_end: u16 = bounds.end;
        shift, set_shift: u8 = bounds.shift;
    }
}
