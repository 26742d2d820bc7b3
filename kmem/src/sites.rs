//! Who called: places in source code, by number.
//!
//! # Concepts
//! What is noted of an object or a page is the number of the place that asked for it, not its address: it is short,
//! and where it lies beside an object, whoever writes beyond that may change it into another number, which leads to
//! some place or to none.
//!
//! # Implementation
//! An open hash table of fixed size, one for a machine, made at bring-up or with the first cache that asks for it and
//! kept until the machine goes. Entries are never taken out. Places that find no room are number 0.
//!
//! # Locking
//! An entry is taken by one compare-and-exchange.

use core::{
    panic::Location,
    sync::atomic::{
        AtomicPtr,
        Ordering::{AcqRel, Acquire},
    },
};

/// Places that a machine can tell apart.
pub(crate) const PLACES: usize = 2048;

/// How far from where it should be a place may lie in the table.
const REACH: usize = 64;

/// The table. All zeros is an empty one.
pub(crate) struct Sites([AtomicPtr<Location<'static>>; PLACES]);

impl Sites {
    /// The number of a place; 0 if there are too many.
    pub(crate) fn number(&self, at: &'static Location<'static>) -> u32 {
        let place = core::ptr::from_ref(at).cast_mut();
        // Locations are aligned to words and close together; the product's high bits depend on all of it.
        let first = (place.addr() >> 3).wrapping_mul(0x9e37_79b1) >> 12;
        for i in (first..first + REACH).map(|i| i % PLACES) {
            // Acquire pairs with the Release of whoever put it there: a location is the same for all anyway.
            let there = self.0[i].load(Acquire);
            let there = if there.is_null() {
                match self.0[i].compare_exchange(there, place, AcqRel, Acquire) {
                    Ok(_) => return i as u32 + 1,
                    Err(other) => other,
                }
            } else {
                there
            };
            if there == place {
                return i as u32 + 1;
            }
        }
        0
    }

    /// The place with a number, whatever the number.
    pub(crate) fn place(&self, number: u32) -> Option<&'static Location<'static>> {
        let at = self.0.get((number as usize).checked_sub(1)?)?;
        // SAFETY: null, or what `number` stored: a location, which is there for ever.
        unsafe { at.load(Acquire).as_ref() }
    }
}
