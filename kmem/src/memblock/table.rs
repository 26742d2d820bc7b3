//! A sorted, canonical table of address ranges with owners.
//!
//! Changes are made in two steps: a plan says which slots are replaced by what, or why that is
//! impossible, and [`Table::commit`] carries it out and cannot fail.

use super::MAX_REGIONS;
use core::{fmt, ops::Range};

/// A range and its owner. Not empty, save in unused places of the table.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Slot<T> {
    pub base: u64,
    pub end: u64,
    pub tag: T,
}

impl<T> Slot<T> {
    pub fn size(&self) -> u64 {
        self.end - self.base
    }
}

/// Why a range cannot be inserted.
pub(super) enum Refused<T> {
    /// The first slot in its way that has another owner.
    Overlap(Slot<T>),
    /// The result has more than [`MAX_REGIONS`] slots.
    Full,
}

/// A change that is known to fit the table it was planned on.
pub(super) struct Edit<T> {
    /// The slots to replace.
    window: Range<usize>,
    /// What to replace them with, in order.
    pieces: [Option<Slot<T>>; 2],
    /// Bytes that become covered or uncovered.
    bytes: u64,
}

impl<T> Edit<T> {
    fn count(&self) -> usize {
        self.pieces.iter().flatten().count()
    }

    /// Whether the change needs a slot more.
    pub fn grows(&self) -> bool {
        self.count() > self.window.len()
    }
}

/// Ranges, sorted and disjoint; those that touch have different owners.
#[derive(Clone)]
pub(super) struct Table<T> {
    slots: [Slot<T>; MAX_REGIONS],
    len: usize,
}

impl<T: Copy + PartialEq> Table<T> {
    /// An empty table; `tag` fills unused places and means nothing.
    pub const fn new(tag: T) -> Self {
        Table { slots: [Slot { base: 0, end: 0, tag }; MAX_REGIONS], len: 0 }
    }

    pub fn slots(&self) -> &[Slot<T>] {
        &self.slots[..self.len]
    }

    /// Indices of the slots that share a byte with the range, which is not empty.
    fn window(&self, base: u64, end: u64) -> Range<usize> {
        let slots = self.slots();
        slots.partition_point(|s| s.end <= base)..slots.partition_point(|s| s.base < end)
    }

    /// The slots that share a byte with the range, which is not empty.
    pub fn overlapping(&self, base: u64, end: u64) -> &[Slot<T>] {
        &self.slots()[self.window(base, end)]
    }

    /// The first address of the range that no slot covers.
    pub fn first_gap(&self, base: u64, end: u64) -> Option<u64> {
        let mut covered = base;
        for s in self.overlapping(base, end) {
            if s.base > covered {
                break;
            }
            covered = s.end;
        }
        (covered < end).then_some(covered)
    }

    /// Plans to cover `new`'s range, which is not empty, merging with all of the same owner that it
    /// overlaps or touches.
    pub fn plan_insert(&self, new: Slot<T>) -> Result<Edit<T>, Refused<T>> {
        let slots = self.slots();
        let mut window = self.window(new.base, new.end);
        if let Some(other) = slots[window.clone()].iter().find(|s| s.tag != new.tag) {
            return Err(Refused::Overlap(*other));
        }
        let touches = |s: &Slot<T>| s.tag == new.tag && (s.end == new.base || s.base == new.end);
        if window.start > 0 && touches(&slots[window.start - 1]) {
            window.start -= 1;
        }
        if window.end < slots.len() && touches(&slots[window.end]) {
            window.end += 1;
        }
        let merged = slots[window.clone()].iter().fold(new, |m, s| Slot {
            base: m.base.min(s.base),
            end: m.end.max(s.end),
            tag: m.tag,
        });
        let known: u64 = slots[window.clone()].iter().map(Slot::size).sum();
        self.fit(Edit { window, pieces: [Some(merged), None], bytes: merged.size() - known })
            .ok_or(Refused::Full)
    }

    /// Plans to uncover the range, which is not empty; `None` when a split needs a slot that is not
    /// there.
    pub fn plan_remove(&self, base: u64, end: u64) -> Option<Edit<T>> {
        let window = self.window(base, end);
        let slots = &self.slots()[window.clone()];
        let head = slots.first().filter(|s| s.base < base).map(|s| Slot { end: base, ..*s });
        let tail = slots.last().filter(|s| s.end > end).map(|s| Slot { base: end, ..*s });
        let bytes = slots.iter().map(|s| s.end.min(end) - s.base.max(base)).sum();
        self.fit(Edit { window, pieces: [head, tail], bytes })
    }

    fn fit(&self, edit: Edit<T>) -> Option<Edit<T>> {
        (self.len - edit.window.len() + edit.count() <= MAX_REGIONS).then_some(edit)
    }

    /// Carries out a plan made on the table as it is now. Returns the bytes that it covered or
    /// uncovered.
    pub fn commit(&mut self, edit: &Edit<T>) -> u64 {
        let start = edit.window.start;
        let count = edit.count();
        self.slots.copy_within(edit.window.end..self.len, start + count);
        for (slot, piece) in self.slots[start..].iter_mut().zip(edit.pieces.iter().flatten()) {
            *slot = *piece;
        }
        self.len = self.len - edit.window.len() + count;
        edit.bytes
    }
}

impl<T: Copy + PartialEq + fmt::Debug> fmt::Debug for Table<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.slots()).finish()
    }
}

impl<T: fmt::Debug> fmt::Debug for Slot<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x} ({:?})", self.base, self.end, self.tag)
    }
}
