//! Ranges that the leak scan is told of: foreign memory, and parts of objects.

use core::sync::atomic::{AtomicU8, Ordering::Relaxed};

/// A range.
pub(super) struct Range {
    /// Address of the object that it is a part of; 0 for foreign memory.
    owner: usize,
    pub(super) start: usize,
    pub(super) len: usize,
    /// Of foreign memory, as those of an object.
    pub(super) notes: AtomicU8,
}

/// The ranges, by owner and beginning. Behind a lock.
pub(super) struct Table {
    ranges: &'static mut [Range],
    nr: usize,
    pub(super) order: u32,
}

impl Table {
    /// A table in zeroed memory, which zero is a value of.
    pub(super) fn new(ranges: &'static mut [Range], order: u32) -> Table {
        Table { ranges, nr: 0, order }
    }

    /// Where it is.
    pub(super) fn place(self) -> *mut u8 {
        self.ranges.as_mut_ptr().cast()
    }

    fn used(&self) -> &[Range] {
        &self.ranges[..self.nr]
    }

    /// How many ranges there are before that one.
    fn before(&self, owner: usize, start: usize) -> usize {
        self.used().partition_point(|r| (r.owner, r.start) < (owner, start))
    }

    /// Foreign ranges.
    pub(super) fn foreign(&self) -> &[Range] {
        &self.used()[..self.before(1, 0)]
    }

    /// The foreign range that an address is in.
    pub(super) fn around(&self, addr: usize) -> Option<&Range> {
        let after = self.before(0, addr.checked_add(1)?);
        let range = self.used().get(after.checked_sub(1)?)?;
        (range.owner == 0 && addr - range.start < range.len).then_some(range)
    }

    /// Parts of an object.
    pub(super) fn areas(&self, owner: usize) -> &[Range] {
        &self.used()[self.before(owner, 0)..self.before(owner + 1, 0)]
    }

    /// Whether a foreign range would share an address with one that is there.
    pub(super) fn overlaps(&self, start: usize, len: usize) -> bool {
        let next = self.foreign().get(self.before(0, start));
        self.around(start).is_some() || next.is_some_and(|next| next.start - start < len)
    }

    /// Adds a range; `false` if there is no room.
    pub(super) fn add(&mut self, owner: usize, start: usize, len: usize) -> bool {
        if self.nr == self.ranges.len() {
            return false;
        }
        let at = self.before(owner, start);
        self.ranges[at..=self.nr].rotate_right(1);
        self.ranges[at] = Range { owner, start, len, notes: AtomicU8::new(0) };
        self.nr += 1;
        true
    }

    /// Takes the foreign range that begins at an address out; says whether there was one.
    pub(super) fn remove(&mut self, start: usize) -> bool {
        let at = self.before(0, start);
        let is = self.used().get(at).is_some_and(|r| r.owner == 0 && r.start == start);
        if is {
            self.ranges[at..self.nr].rotate_left(1);
            self.nr -= 1;
        }
        is
    }

    /// Takes the parts of an object out; returns how many there were.
    pub(super) fn remove_areas(&mut self, owner: usize) -> usize {
        let n = self.areas(owner).len();
        let at = self.before(owner, 0);
        self.ranges[at..self.nr].rotate_left(n);
        self.nr -= n;
        n
    }

    /// Changes the notes on a foreign range.
    pub(super) fn note(range: &Range, f: &mut dyn FnMut(u8) -> Option<u8>) -> Option<u8> {
        range.notes.fetch_update(Relaxed, Relaxed, f).ok()
    }
}
