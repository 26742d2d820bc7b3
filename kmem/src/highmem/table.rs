//! The places of the permanent mappings: which page each shows, how many use it, and who stands in line.
//!
//! # Concepts
//! Plain data under a lock; nothing is mapped, flushed or woken here. Users of a page that is mapped come and go without
//! the lock.
//!
//! # Implementation
//! A place's *word* says all that must change at once:
//! ```text
//!    63          32   31     30          0
//!   +--------------+--------+-------------+
//!   | frame number | listed | count       |   0: shows no page
//!   +--------------+--------+-------------+
//! ```
//! A place is clean (count 0, on the list of clean ones), stale (1), mapped (above), or in somebody's hands (count 0, on
//! no list): being flushed, or given to who stood first in line. Stale places are *listed*, on the list of those that
//! may be taken; who uses one again leaves it there, so that mapped ones may be listed too.
//!
//! Without the lock a place gets a user more if it has any, or is listed, and a user less if others are left, or
//! it is listed. So what is about to be taken, or given to the first in line, is nobody's but who has the lock: he takes
//! `listed` off in the step that finds it unused. And while there is a line no place is listed: the last user of each
//! comes by the lock.
//!
//! # Locking
//! The table's, but for the words and for looking at chains. Who follows a chain without the lock may find himself in
//! another, and nothing there. Chains, lists and `set` are Relaxed: they change under the lock, and what is found along
//! a chain without it counts by its word only.

use crate::types::{LAST_PKMAP, Pfn};
use core::{
    ptr,
    sync::atomic::{
        AtomicBool, AtomicU16, AtomicU64,
        Ordering::{AcqRel, Acquire, Relaxed, Release},
    },
};

/// No place.
const NONE: u16 = u16::MAX;

/// Bells that sleepers share.
pub(super) const BELLS: usize = 16;

/// Places that are looked at without the lock, of a chain.
const GLANCES: usize = 4;

/// What a place shows, to how many.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Word(u64);

impl Word {
    const NOTHING: Word = Word(0);
    const LISTED: u64 = 1 << 31;
    const COUNT: u64 = Word::LISTED - 1;

    const fn new(pfn: Pfn, count: u32) -> Word {
        Word((pfn.0 as u64) << 32 | count as u64)
    }

    const fn pfn(self) -> Pfn {
        Pfn((self.0 >> 32) as u32)
    }

    /// One more than the users; 0 for no page.
    const fn count(self) -> u32 {
        (self.0 & Word::COUNT) as u32
    }

    const fn listed(self) -> bool {
        self.0 & Word::LISTED != 0
    }

    /// Whether it shows a page, to users or not.
    fn shows(self, pfn: Pfn) -> bool {
        self.count() > 0 && self.pfn() == pfn
    }
}

/// A place for a mapping. Each has a cache line: CPUs with mappings of their own do not meet.
#[repr(align(64))]
pub(super) struct Place {
    word: AtomicU64,
    /// The next with the same hash.
    chain: AtomicU16,
    /// Neighbours on the list of clean or listed places.
    next: AtomicU16,
    prev: AtomicU16,
    /// Whether the page-table entry is set. In somebody's hands: no, though it may be still.
    pub(super) set: AtomicBool,
}

impl Place {
    fn word(&self) -> Word {
        // Acquire pairs with the Release in `show`: the page-table entry is set.
        Word(self.word.load(Acquire))
    }

    /// Changes the word to what `to` makes of it; `None` as soon as that says so, else what it was.
    #[inline]
    fn change(&self, to: impl Fn(Word) -> Option<Word>) -> Option<Word> {
        // AcqRel: Acquire as in `word`; Release pairs with it where a place is taken, so that its last user is done.
        self.word.fetch_update(AcqRel, Acquire, |now| to(Word(now)).map(|to| to.0)).ok().map(Word)
    }

    /// One user more of the page, if it is shown here and may be held without the lock.
    #[inline]
    pub(super) fn try_hold(&self, pfn: Pfn) -> bool {
        let may = |now: Word| now.shows(pfn) && (now.count() > 1 || now.listed());
        let more = |now: Word| (may(now) && now.count() < MOST_USERS).then(|| Word(now.0 + 1));
        self.change(more).is_some()
    }

    /// One user less of the page, if it is shown here and may be let go without the lock.
    #[inline]
    pub(super) fn try_let_go(&self, pfn: Pfn) -> bool {
        let least = |now: Word| if now.listed() { 1 } else { 2 };
        let may = |now: Word| now.shows(pfn) && now.count() > least(now);
        self.change(|now| may(now).then(|| Word(now.0 - 1))).is_some()
    }

    /// The page that is shown to somebody.
    pub(super) fn used(&self) -> Option<Pfn> {
        let now = self.word();
        (now.count() > 1).then(|| now.pfn())
    }

    /// Shows a page from now on, to one user. The page-table entry is set, and the place the caller's.
    pub(super) fn show(&self, pfn: Pfn) {
        // Release pairs with the Acquire in `word` and `change`.
        self.word.store(Word::new(pfn, 2).0, Release);
    }
}

/// All places and the way to them.
#[derive(Clone, Copy)]
pub(super) struct Places {
    all: &'static [Place],
    /// By hash of the frame number: the first place of the chain.
    heads: &'static [AtomicU16],
}

impl Places {
    pub(super) const NONE: Places = Places { all: &[], heads: &[] };

    pub(super) fn new(all: &'static [Place], heads: &'static [AtomicU16]) -> Places {
        heads.iter().for_each(|head| head.store(NONE, Relaxed));
        Places { all, heads }
    }

    pub(super) fn get(&self, at: u16) -> Option<&'static Place> {
        self.all.get(usize::from(at))
    }

    fn at(&self, at: u16) -> &'static Place {
        &self.all[usize::from(at)]
    }

    /// The chain of a page; `None` if there are no places.
    fn head(&self, pfn: Pfn) -> Option<&'static AtomicU16> {
        // No places, no hash.
        let bits = self.heads.len().checked_ilog2()?;
        self.heads.get((pfn.0.wrapping_mul(0x9e37_79b1) >> (32 - bits)) as usize)
    }

    /// The place that shows a page, if it is among the first `glances` of its chain.
    fn find_in(&self, pfn: Pfn, glances: usize) -> Option<u16> {
        let mut at = self.head(pfn)?.load(Relaxed);
        for _ in 0..glances {
            let place = self.get(at)?;
            if place.word().shows(pfn) {
                return Some(at);
            }
            at = place.chain.load(Relaxed);
        }
        None
    }

    /// The place that shows a page, stale ones too, as far as that is seen without the lock.
    #[inline]
    pub(super) fn glance(&self, pfn: Pfn) -> Option<(u16, &'static Place)> {
        let at = self.find_in(pfn, GLANCES)?;
        Some((at, self.at(at)))
    }
}

/// A list through places.
struct List {
    first: u16,
    len: usize,
}

impl List {
    const EMPTY: List = List { first: NONE, len: 0 };

    fn push(&mut self, places: Places, at: u16) {
        let next = self.first;
        places.at(at).next.store(next, Relaxed);
        places.at(at).prev.store(NONE, Relaxed);
        if let Some(next) = places.get(next) {
            next.prev.store(at, Relaxed);
        }
        self.first = at;
        self.len += 1;
    }

    fn remove(&mut self, places: Places, at: u16) {
        let place = places.at(at);
        let (next, prev) = (place.next.load(Relaxed), place.prev.load(Relaxed));
        match places.get(prev) {
            None => self.first = next,
            Some(prev) => prev.next.store(next, Relaxed),
        }
        if let Some(next) = places.get(next) {
            next.prev.store(prev, Relaxed);
        }
        self.len -= 1;
    }

    fn pop(&mut self, places: Places) -> Option<u16> {
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

/// All places, and who waits for one.
pub(super) struct Table {
    places: Places,
    clean: List,
    /// Those that may be taken, if nobody uses them.
    listed: List,
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
const MOST_USERS: u32 = 1 << 30;

impl Table {
    /// No places.
    pub(super) const fn empty() -> Table {
        Table {
            places: Places::NONE,
            clean: List::EMPTY,
            listed: List::EMPTY,
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
    pub(super) fn new(places: Places) -> Table {
        let mut table = Table { places, ..Table::empty() };
        for at in (0..places.all.len() as u16).rev() {
            table.clean.push(places, at);
        }
        table
    }

    pub(super) fn len(&self) -> usize {
        self.places.all.len()
    }

    pub(super) fn place(&self, at: u16) -> &'static Place {
        self.places.at(at)
    }

    /// The place that shows a page, stale ones too.
    pub(super) fn find(&self, pfn: Pfn) -> Option<u16> {
        self.places.find_in(pfn, usize::MAX)
    }

    /// The place that shows a page that somebody uses.
    pub(super) fn find_used(&self, pfn: Pfn) -> Option<u16> {
        self.find(pfn).filter(|at| self.place(*at).used() == Some(pfn))
    }

    /// One user more of the page that a place shows: only who has the lock ends that.
    pub(super) fn hold(&mut self, at: u16) {
        let _ = self.place(at).change(|now| Some(Word(now.0 + 1)));
    }

    /// Whether a page has as many users as may be counted, those in line aside.
    pub(super) fn is_crowded(&self, pfn: Pfn) -> bool {
        self.find(pfn).is_some_and(|at| self.place(at).word().count() >= MOST_USERS)
    }

    /// One user less of the page's mapping, if it has one. Says whether that was the last; then the place is
    /// to be [given to the first in line](Self::give), or [left](Self::leave).
    pub(super) fn let_go(&mut self, pfn: Pfn) -> Option<(u16, bool)> {
        let at = self.find(pfn)?;
        let less = |now: Word| (now.count() > 1).then(|| Word(now.0 - 1));
        let before = self.place(at).change(less)?;
        Some((at, before.count() == 2))
    }

    /// Leaves a place without users until it is wanted.
    pub(super) fn leave(&mut self, at: u16) {
        let list = |now: Word| (!now.listed()).then_some(Word(now.0 | Word::LISTED));
        if self.place(at).change(list).is_some() {
            self.listed.push(self.places, at);
        }
    }

    /// A clean place, to show a page from now on: the caller sets the page-table entry, and [says
    /// so](Place::show) before it lets the lock go.
    pub(super) fn take_clean(&mut self, pfn: Pfn) -> Option<u16> {
        let head = self.places.head(pfn)?;
        let at = self.clean.pop(self.places)?;
        self.place(at).chain.store(head.load(Relaxed), Relaxed);
        head.store(at, Relaxed);
        Some(at)
    }

    /// Adds a place that shows no page to the clean ones.
    pub(super) fn put_clean(&mut self, at: u16) {
        self.clean.push(self.places, at);
    }

    /// Makes a place that is on no list show no page any more; `false` if somebody uses it. It is not listed then.
    fn take(&mut self, at: u16) -> bool {
        let place = self.place(at);
        let unlisted = |now: Word| Word(now.0 & !Word::LISTED);
        let end = |now: Word| if now.count() == 1 { Word::NOTHING } else { unlisted(now) };
        let Some(before) = place.change(|now| Some(end(now))) else { return false };
        if before.count() != 1 {
            return false;
        }
        let Some(mut link) = self.places.head(before.pfn()) else { return false };
        loop {
            match link.load(Relaxed) {
                next if next == at || next == NONE => break,
                next => link = &self.place(next).chain,
            }
        }
        link.store(place.chain.load(Relaxed), Relaxed);
        place.set.store(false, Relaxed);
        true
    }

    /// Takes all stale places; `None` if there are none. Then none is listed.
    pub(super) fn take_stale(&mut self) -> Option<Batch> {
        let mut batch = Batch { stale: true, ..Batch::EMPTY };
        let mut some = false;
        while let Some(at) = self.listed.pop(self.places) {
            if self.take(at) {
                batch.add(at);
                some = true;
            }
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
        // While there is a line none is listed, so nobody holds this one again.
        if self.head.is_null() || !self.take(at) {
            return false;
        }
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
        let pfn = self.place(at).word().pfn();
        let (mut before, mut waiter) = (ptr::null_mut(), self.head);
        while !waiter.is_null() {
            // SAFETY: it is in line, so in place until it is served.
            let (next, wants) = unsafe { ((*waiter).next, (*waiter).pfn == pfn) };
            if wants {
                self.hold(at);
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
        let (mut empty, mut listed) = (0, 0);
        for (at, place) in (0u16..).zip(self.places.all) {
            let now = place.word();
            listed += usize::from(now.listed());
            match now.count() {
                0 => empty += 1,
                1 => counts.stale += 1,
                n => {
                    counts.mapped += 1;
                    counts.users += u64::from(n - 1);
                }
            }
            if now.count() == 1 && !now.listed() {
                return Err("a stale place is not on the list of those");
            }
            if now.count() > 0 && self.find(now.pfn()) != Some(at) {
                return Err("a page's place is not found");
            }
            if now.count() > 1 && !place.set.load(Relaxed) {
                return Err("a mapped place is not set");
            }
        }
        if listed != self.listed.len {
            return Err("places are listed that are not on the list");
        }
        counts.clean = self.clean.len;
        counts.held = empty - counts.clean.min(empty);
        let line = self.sleepers > 0;
        if line && (counts.clean > 0 || listed > 0) {
            return Err("somebody sleeps though there are places");
        }
        Ok(counts)
    }
}
