//! The places of the permanent mappings: which page each shows, how many use it, and who stands in line.
//!
//! # Concepts
//! Plain data under a lock; nothing is mapped, flushed or woken here.
//!
//! # Implementation
//! A place is clean (count 0, on the list of clean ones), stale (1, hashed, on the list of stale ones), mapped (above,
//! hashed), or in somebody's hands (count 0, on no list): being flushed, or given to who stood first in line.

use crate::types::{LAST_PKMAP, Pfn};
use core::ptr;

/// No place.
const NONE: u16 = u16::MAX;

/// Bells that sleepers share.
pub(super) const BELLS: usize = 16;

/// A place for a mapping.
pub(super) struct Place {
    pfn: Pfn,
    /// One more than its users; 0 for no page.
    count: u32,
    /// The next with the same hash.
    chain: u16,
    /// Neighbours on the list of clean or stale places.
    next: u16,
    prev: u16,
    /// Whether the page-table entry is set. In somebody's hands: no, though it may be still.
    pub(super) set: bool,
}

/// A list through places.
struct List {
    first: u16,
    len: usize,
}

impl List {
    const EMPTY: List = List { first: NONE, len: 0 };

    fn push(&mut self, places: &mut [Place], at: u16) {
        let next = self.first;
        places[usize::from(at)].next = next;
        places[usize::from(at)].prev = NONE;
        if next != NONE {
            places[usize::from(next)].prev = at;
        }
        self.first = at;
        self.len += 1;
    }

    fn remove(&mut self, places: &mut [Place], at: u16) {
        let Place { next, prev, .. } = places[usize::from(at)];
        match prev {
            NONE => self.first = next,
            prev => places[usize::from(prev)].next = next,
        }
        if next != NONE {
            places[usize::from(next)].prev = prev;
        }
        self.len -= 1;
    }

    fn pop(&mut self, places: &mut [Place]) -> Option<u16> {
        let at = self.first;
        (at != NONE).then(|| {
            self.remove(places, at);
            at
        })
    }
}

/// Places in one's hands: they show no page, and nobody else knows them.
#[derive(Clone)]
pub(super) struct Batch {
    bits: [u64; LAST_PKMAP / 64],
    /// Whether CPUs may know what they showed last.
    pub(super) stale: bool,
}

impl Batch {
    pub(super) const EMPTY: Batch = Batch { bits: [0; LAST_PKMAP / 64], stale: false };

    pub(super) fn one(place: u16, stale: bool) -> Batch {
        let mut batch = Batch { stale, ..Batch::EMPTY };
        batch.add(place);
        batch
    }

    fn add(&mut self, place: u16) {
        self.bits[usize::from(place) / 64] |= 1 << (place % 64);
    }

    /// The places, ascending.
    pub(super) fn iter(&self) -> impl DoubleEndedIterator<Item = u16> + '_ {
        let firsts = (0..LAST_PKMAP as u16).step_by(64);
        let words = self.bits.iter().zip(firsts).filter(|(word, _)| **word != 0);
        words.flat_map(|(word, first)| {
            (0..64).filter(move |bit| word & 1 << bit != 0).map(move |bit| first + bit)
        })
    }
}

/// What came of standing in line.
#[derive(Clone, Copy)]
pub(super) enum Outcome {
    /// Nothing yet.
    Waiting,
    /// A place, which CPUs may still know as another page's.
    Given { place: u16, stale: bool },
    /// The page is mapped there, one of its users is the sleeper.
    Mapped(u16),
}

/// Somebody in line, on his own stack.
pub(super) struct Waiter {
    pfn: Pfn,
    bell: usize,
    outcome: Outcome,
    next: *mut Waiter,
}

impl Waiter {
    pub(super) const fn new(pfn: Pfn) -> Waiter {
        Waiter { pfn, bell: 0, outcome: Outcome::Waiting, next: ptr::null_mut() }
    }
}

/// Bells to ring once the lock is let go, a bit each.
#[derive(Default)]
pub(super) struct Ring(u32);

impl Ring {
    pub(super) fn bells(&self) -> impl Iterator<Item = usize> + '_ {
        let most = if self.0 == 0 { 0 } else { BELLS };
        (0..most).filter(|bell| self.0 & 1 << bell != 0)
    }
}

/// What was found out about the table by counting.
pub(super) struct Counts {
    pub(super) clean: usize,
    pub(super) stale: usize,
    pub(super) mapped: usize,
    pub(super) users: u64,
    /// In somebody's hands.
    pub(super) held: usize,
}

/// All places.
pub(super) struct Table {
    places: &'static mut [Place],
    /// By hash of the frame number: the first place of the chain.
    heads: &'static mut [u16],
    clean: List,
    stale: List,
    /// First and last in line; null when there is no line.
    head: *mut Waiter,
    tail: *mut Waiter,
    pub(super) sleepers: usize,
    /// Sleepers since bring-up: the next one's number.
    pub(super) slept: u64,
    /// Flushes since bring-up.
    pub(super) flushes: u64,
}

// SAFETY: the pointers are to waiters that stay in place while they are in line; they are followed under the table's
// lock only.
unsafe impl Send for Table {}

/// Users of one place: whoever forgets so many mappings gets no more. The rest is room for all who may be in line.
const MOST_USERS: u32 = u32::MAX / 2;

impl Table {
    /// No places.
    pub(super) const fn empty() -> Table {
        Table {
            places: &mut [],
            heads: &mut [],
            clean: List::EMPTY,
            stale: List::EMPTY,
            head: ptr::null_mut(),
            tail: ptr::null_mut(),
            sleepers: 0,
            slept: 0,
            flushes: 0,
        }
    }

    /// How many chains there are to so many places.
    pub(super) const fn heads_for(places: usize) -> usize {
        places.next_power_of_two() * 2
    }

    /// All places clean, the first to be used first.
    pub(super) fn new(places: &'static mut [Place], heads: &'static mut [u16]) -> Table {
        heads.fill(NONE);
        let mut table = Table { heads, ..Table::empty() };
        for at in (0..places.len() as u16).rev() {
            table.clean.push(places, at);
        }
        table.places = places;
        table
    }

    pub(super) fn len(&self) -> usize {
        self.places.len()
    }

    pub(super) fn place(&mut self, at: u16) -> &mut Place {
        &mut self.places[usize::from(at)]
    }

    fn hash(&self, pfn: Pfn) -> usize {
        let bits = self.heads.len().trailing_zeros();
        (pfn.0.wrapping_mul(0x9e37_79b1) >> (32 - bits)) as usize
    }

    /// The place that shows a page, stale ones too.
    fn find(&self, pfn: Pfn) -> Option<u16> {
        if self.heads.is_empty() {
            // No places, no hash.
            return None;
        }
        let mut at = *self.heads.get(self.hash(pfn))?;
        while at != NONE {
            let place = &self.places[usize::from(at)];
            if place.pfn == pfn {
                return Some(at);
            }
            at = place.chain;
        }
        None
    }

    /// The place that shows a page that somebody uses.
    pub(super) fn find_used(&self, pfn: Pfn) -> Option<u16> {
        self.find(pfn).filter(|at| self.places[usize::from(*at)].count > 1)
    }

    /// The page that a place shows to somebody.
    pub(super) fn used_by(&self, at: u16) -> Option<Pfn> {
        self.places.get(usize::from(at)).filter(|place| place.count > 1).map(|place| place.pfn)
    }

    /// One user more of the page's mapping, if it has one.
    pub(super) fn hold(&mut self, pfn: Pfn) -> Option<u16> {
        debug_assert!(!self.is_crowded(pfn));
        let at = self.find(pfn)?;
        if self.place(at).count == 1 {
            self.stale.remove(self.places, at);
        }
        self.place(at).count += 1;
        Some(at)
    }

    /// Whether a page has as many users as may be counted, those in line aside.
    pub(super) fn is_crowded(&self, pfn: Pfn) -> bool {
        self.find(pfn).is_some_and(|at| self.places[usize::from(at)].count >= MOST_USERS)
    }

    /// One user less of the page's mapping, if it has one. Says whether that was the last; then the place is
    /// to be [given to the first in line](Self::give), or [left](Self::leave).
    pub(super) fn let_go(&mut self, pfn: Pfn) -> Option<(u16, bool)> {
        let at = self.find_used(pfn)?;
        let place = self.place(at);
        place.count -= 1;
        Some((at, place.count == 1))
    }

    /// Leaves a place without users until it is wanted.
    pub(super) fn leave(&mut self, at: u16) {
        self.stale.push(self.places, at);
    }

    /// A clean place shows a page from now on, to one user.
    pub(super) fn take_clean(&mut self, pfn: Pfn) -> Option<u16> {
        let at = self.clean.pop(self.places)?;
        let hash = self.hash(pfn);
        let head = core::mem::replace(&mut self.heads[hash], at);
        let place = self.place(at);
        (place.pfn, place.count, place.chain) = (pfn, 2, head);
        Some(at)
    }

    /// Adds a place that shows no page to the clean ones.
    pub(super) fn put_clean(&mut self, at: u16) {
        self.clean.push(self.places, at);
    }

    /// A stale place, or one that just lost its last user, shows no page any more.
    fn forget(&mut self, at: u16) {
        let Place { pfn, chain, .. } = *self.place(at);
        let hash = self.hash(pfn);
        let mut link = &mut self.heads[hash];
        while *link != at {
            let next = usize::from(*link);
            link = &mut self.places[next].chain;
        }
        *link = chain;
        let place = self.place(at);
        (place.count, place.set) = (0, false);
    }

    /// Takes all stale places; `None` if there are none.
    pub(super) fn take_stale(&mut self) -> Option<Batch> {
        let mut batch = Batch { stale: true, ..Batch::EMPTY };
        let some = self.stale.len > 0;
        while let Some(at) = self.stale.pop(self.places) {
            self.forget(at);
            batch.add(at);
        }
        some.then_some(batch)
    }

    /// Puts somebody at the end of the line, and says which bell is his.
    ///
    /// # Safety
    /// The waiter stays in place, and is touched through this table only, until its [`outcome`](Self::outcome) is no
    /// longer `Waiting`.
    pub(super) unsafe fn push(&mut self, waiter: *mut Waiter) -> usize {
        let bell = (self.slept % BELLS as u64) as usize;
        // SAFETY: the caller's; the tail, if any, is in line.
        unsafe {
            (*waiter).bell = bell;
            if self.tail.is_null() {
                self.head = waiter;
            } else {
                (*self.tail).next = waiter;
            }
        }
        self.tail = waiter;
        self.sleepers += 1;
        self.slept += 1;
        bell
    }

    /// What came of it.
    ///
    /// # Safety
    /// The waiter was [pushed](Self::push) to this table and is in place.
    pub(super) unsafe fn outcome(&self, waiter: *const Waiter) -> Outcome {
        // SAFETY: the caller's; the lock that guards the table is held.
        unsafe { (*waiter).outcome }
    }

    /// Takes `waiter`, behind `before` (null for the first), out of the line.
    ///
    /// # Safety
    /// Both are in line, one behind the other.
    unsafe fn serve(
        &mut self,
        before: *mut Waiter,
        waiter: *mut Waiter,
        outcome: Outcome,
        ring: &mut Ring,
    ) {
        // SAFETY: the caller's: who is in line is in place until the outcome is set, and looks at it under the lock,
        // which is held.
        unsafe {
            let next = (*waiter).next;
            if before.is_null() {
                self.head = next;
            } else {
                (*before).next = next;
            }
            if next.is_null() {
                self.tail = before;
            }
            ring.0 |= 1 << (*waiter).bell;
            (*waiter).outcome = outcome;
        }
        self.sleepers -= 1;
    }

    /// Gives a place that just lost its last user to the first in line; `false` if there is no line.
    pub(super) fn give(&mut self, at: u16, ring: &mut Ring) -> bool {
        if self.head.is_null() {
            return false;
        }
        self.forget(at);
        let outcome = Outcome::Given { place: at, stale: true };
        // SAFETY: the head is in line.
        unsafe { self.serve(ptr::null_mut(), self.head, outcome, ring) };
        true
    }

    /// Gives clean places to those in line, as many as there are.
    pub(super) fn give_clean(&mut self, ring: &mut Ring) {
        while !self.head.is_null()
            && let Some(place) = self.clean.pop(self.places)
        {
            let outcome = Outcome::Given { place, stale: false };
            // SAFETY: the head is in line.
            unsafe { self.serve(ptr::null_mut(), self.head, outcome, ring) };
        }
    }

    /// Makes all in line who want the page that a place shows its users.
    pub(super) fn share(&mut self, at: u16, ring: &mut Ring) {
        let pfn = self.place(at).pfn;
        let (mut before, mut waiter) = (ptr::null_mut(), self.head);
        while !waiter.is_null() {
            // SAFETY: it is in line, so in place until it is served.
            let (next, wants) = unsafe { ((*waiter).next, (*waiter).pfn == pfn) };
            if wants {
                self.place(at).count += 1;
                // SAFETY: both are in line, one behind the other.
                unsafe { self.serve(before, waiter, Outcome::Mapped(at), ring) };
            } else {
                before = waiter;
            }
            waiter = next;
        }
    }

    /// Counts, and checks that lists, chains and counts agree.
    pub(super) fn counts(&self) -> Result<Counts, &'static str> {
        let mut counts = Counts { clean: 0, stale: 0, mapped: 0, users: 0, held: 0 };
        let mut empty = 0;
        for (at, place) in self.places.iter().enumerate() {
            match place.count {
                0 => empty += 1,
                1 => counts.stale += 1,
                n => {
                    counts.mapped += 1;
                    counts.users += u64::from(n - 1);
                }
            }
            if place.count > 0 && self.find(place.pfn) != Some(at as u16) {
                return Err("a page's place is not found");
            }
            if place.count > 1 && !place.set {
                return Err("a mapped place is not set");
            }
        }
        if counts.stale != self.stale.len {
            return Err("stale places are not on their list");
        }
        counts.clean = self.clean.len;
        counts.held = empty - counts.clean.min(empty);
        let line = self.sleepers > 0;
        if line && (counts.clean > 0 || counts.stale > 0) {
            return Err("somebody sleeps though there are places");
        }
        Ok(counts)
    }
}
