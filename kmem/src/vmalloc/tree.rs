//! The tree of areas: what is where, and where there is room.
//!
//! # Concepts
//! All areas by address, those that wait to be used again included. Each knows the *gap* before it, the free
//! addresses between it and the area below; what is free behind the last one is the tree's `tail`. So one tree
//! says both what is used and what is free, and no free range needs a descriptor.
//!
//! # Implementation
//! An AVL tree. `widest` is the largest gap before any area of a subtree, so the lowest gap that is wide enough
//! is found on one way down, and everything is O(log n). There are no links to parents: the way from the root is
//! noted in an array, which an AVL tree of all the addresses there are does not fill.
//!
//! # Locking
//! The lock that the tree is in. Whoever finds something in it only reads.

use super::area::{Area, Link};
use core::sync::atomic::Ordering::Relaxed;

/// Longest way from the root: an AVL tree of 2^32 areas is at most 47 high.
const HIGHEST: usize = 48;

/// The areas of a range of addresses.
pub(super) struct Tree {
    root: Link,
    /// Where the range ends; 0 until it is known.
    end: usize,
    /// Free bytes behind the last area.
    tail: usize,
    nr: usize,
}

/// Areas from the root down.
struct Way {
    areas: [Link; HIGHEST],
    len: usize,
}

impl Way {
    fn new() -> Way {
        Way { areas: [None; HIGHEST], len: 0 }
    }

    fn push(&mut self, area: &'static Area) {
        self.areas[self.len] = Some(area);
        self.len += 1;
    }

    /// From the end to the beginning.
    fn back(&self) -> impl Iterator<Item = &'static Area> + '_ {
        self.areas[..self.len].iter().rev().flatten().copied()
    }
}

fn height(of: Link) -> u32 {
    of.map_or(0, |a| a.height.load(Relaxed))
}

fn widest(of: Link) -> usize {
    of.map_or(0, |a| a.widest.load(Relaxed))
}

fn gap(of: &Area) -> usize {
    of.gap.load(Relaxed)
}

/// Computes what an area knows of its subtree.
fn update(a: &Area) {
    let (l, r) = (a.left(), a.right());
    a.height.store(1 + height(l).max(height(r)), Relaxed);
    a.widest.store(gap(a).max(widest(l)).max(widest(r)), Relaxed);
}

/// Raises the left child above `a` and returns it.
fn rotate_right(a: &'static Area) -> &'static Area {
    let Some(l) = a.left() else { return a };
    a.set_left(l.right());
    update(a);
    l.set_right(Some(a));
    update(l);
    l
}

/// Raises the right child above `a` and returns it.
fn rotate_left(a: &'static Area) -> &'static Area {
    let Some(r) = a.right() else { return a };
    a.set_right(r.left());
    update(a);
    r.set_left(Some(a));
    update(r);
    r
}

/// Makes a subtree right whose children are; returns its root.
fn balance(a: &'static Area) -> &'static Area {
    let (hl, hr) = (height(a.left()), height(a.right()));
    if hl > hr + 1 {
        if let Some(l) = a.left().filter(|l| height(l.left()) < height(l.right())) {
            a.set_left(Some(rotate_left(l)));
        }
        rotate_right(a)
    } else if hr > hl + 1 {
        if let Some(r) = a.right().filter(|r| height(r.right()) < height(r.left())) {
            a.set_right(Some(rotate_right(r)));
        }
        rotate_left(a)
    } else {
        update(a);
        a
    }
}

/// Goes back along a way, at whose end `child` stands now, and returns the root.
fn rise(way: &Way, child: Link, key: usize) -> Link {
    let mut child = child;
    for parent in way.back() {
        if key < parent.start() {
            parent.set_left(child);
        } else {
            parent.set_right(child);
        }
        child = Some(balance(parent));
    }
    child
}

impl Tree {
    pub(super) const fn new() -> Tree {
        Tree { root: None, end: 0, tail: 0, nr: 0 }
    }

    /// Says what the range is, if nobody did.
    pub(super) fn open(&mut self, start: usize, end: usize) {
        if self.end == 0 {
            (self.end, self.tail) = (end, end - start);
        }
    }

    /// Gives an area the lowest place that is wide enough, aligned to `align`, of which `page` is a divisor;
    /// `false` if there is none.
    pub(super) fn insert(&mut self, area: &'static Area, align: usize, page: usize) -> bool {
        let Some(need) = area.size.checked_add(align - page) else { return false };
        let place = |first: usize| {
            let start = first.next_multiple_of(align);
            area.start.store(start, Relaxed);
            area.gap.store(start - first, Relaxed);
            start + area.size
        };
        if let Some(above) = self.lowest(need) {
            let end = place(above.start() - gap(above));
            above.gap.store(above.start() - end, Relaxed);
        } else if self.tail >= need {
            self.tail = self.end - place(self.end - self.tail);
        } else {
            return false;
        }
        area.set_left(None);
        area.set_right(None);
        update(area);
        let key = area.start();
        let mut way = Way::new();
        let mut at = self.root;
        while let Some(a) = at {
            way.push(a);
            at = if key < a.start() { a.left() } else { a.right() };
        }
        // The area above, whose gap changed, is on the way.
        self.root = rise(&way, Some(area), key);
        self.nr += 1;
        true
    }

    /// The lowest area with a gap of `need` bytes before it.
    fn lowest(&self, need: usize) -> Link {
        let mut at = self.root.filter(|root| widest(Some(root)) >= need)?;
        loop {
            let left = at.left();
            at = if widest(left) >= need {
                left?
            } else if gap(at) >= need {
                return Some(at);
            } else {
                at.right()?
            };
        }
    }

    /// Takes an area of the tree out of it.
    pub(super) fn remove(&mut self, area: &'static Area) {
        let key = area.start();
        let mut way = Way::new();
        let mut above = None;
        let mut at = self.root;
        while let Some(a) = at.filter(|a| a.start() != key) {
            way.push(a);
            at = if key < a.start() {
                above = Some(a);
                a.left()
            } else {
                a.right()
            };
        }
        let freed = gap(area) + area.size;
        let child = match area.right() {
            None => area.left(),
            Some(right) => {
                let mut down = Way::new();
                let mut least = right;
                while let Some(l) = least.left() {
                    down.push(least);
                    least = l;
                }
                let rest = rise(&down, least.right(), least.start());
                above = None;
                least.gap.store(gap(least) + freed, Relaxed);
                least.set_left(area.left());
                least.set_right(rest);
                Some(balance(least))
            }
        };
        match (area.right(), above) {
            (Some(_), _) => {}
            (None, Some(a)) => a.gap.store(gap(a) + freed, Relaxed),
            (None, None) => self.tail += freed,
        }
        self.root = rise(&way, child, key);
        self.nr -= 1;
    }

    /// The area that an address is in, its guard included.
    pub(super) fn find(&self, addr: usize) -> Link {
        let mut below = None;
        let mut at = self.root;
        while let Some(a) = at {
            at = if addr < a.start() {
                a.left()
            } else {
                below = Some(a);
                a.right()
            };
        }
        below.filter(|a| addr < a.end())
    }

    /// The first area from an address on.
    pub(super) fn next(&self, addr: usize) -> Link {
        let mut above = None;
        let mut at = self.root;
        while let Some(a) = at {
            at = if addr <= a.start() {
                above = Some(a);
                a.left()
            } else {
                a.right()
            };
        }
        above
    }

    /// The largest free range in bytes, and all free bytes.
    pub(super) fn free(&self) -> (usize, usize) {
        let mut all = self.tail;
        let mut at = 0;
        while let Some(a) = self.next(at) {
            all += gap(a);
            at = a.end();
        }
        (widest(self.root).max(self.tail), all)
    }

    /// Whether everything is as it should be in a range that begins at `start`.
    pub(super) fn is_sound(&self, start: usize) -> bool {
        let mut nr = 0;
        let mut from = start;
        while let Some(a) = self.next(from) {
            let (l, r) = (a.left(), a.right());
            let sound = a.start() - from == gap(a)
                && height(l).abs_diff(height(r)) <= 1
                && height(Some(a)) == 1 + height(l).max(height(r))
                && widest(Some(a)) == gap(a).max(widest(l)).max(widest(r))
                && l.is_none_or(|l| l.start() < a.start())
                && r.is_none_or(|r| r.start() > a.start());
            if !sound {
                return false;
            }
            nr += 1;
            from = a.end();
        }
        nr == self.nr && (self.end == 0 || self.end - from == self.tail)
    }
}
