//! The reference allocator: sets of free blocks, merged as soon as they can be, and a map of live ones.
//!
//! # Concepts
//! It does not choose: it is told which block the allocator under test handed out and checks that the
//! block was free, aligned and in one zone. What is not live is free here, so it knows nothing of
//! per-CPU lists; once those are drained, its maximal blocks must be the allocator's.
//!
//! # Locking
//! Plain values.

use kmem::types::{MigrateType, PAGEBLOCK_ORDER, PfnRange};
use std::collections::{BTreeMap, BTreeSet};

/// A live block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Live {
    pub order: u32,
    pub refs: u32,
    pub compound: bool,
}

/// The free blocks of one zone: starts by order, none the buddy of another.
pub struct FreeBlocks {
    span: PfnRange,
    blocks: Vec<BTreeSet<u32>>,
    frames: u64,
}

impl FreeBlocks {
    /// No free block, orders up to `max_order`.
    pub fn new(span: PfnRange, max_order: u32) -> FreeBlocks {
        FreeBlocks { span, blocks: vec![BTreeSet::new(); max_order as usize + 1], frames: 0 }
    }

    /// Free frames.
    pub fn frames(&self) -> u64 {
        self.frames
    }

    /// Whether the frame is between the zone's first and its last.
    pub fn spans(&self, pfn: u32) -> bool {
        self.span.contains(pfn)
    }

    /// Gives a block back, merging it with its buddies.
    pub fn give(&mut self, pfn: u32, order: u32) {
        assert!(self.enclosing(pfn, order).is_none(), "pfn:{pfn:#x} order {order} is free");
        self.frames += 1 << order;
        let (mut pfn, mut order) = (pfn, order as usize);
        while order + 1 < self.blocks.len() && self.blocks[order].remove(&(pfn ^ (1 << order))) {
            pfn &= !(1 << order);
            order += 1;
        }
        self.blocks[order].insert(pfn);
    }

    /// The free block around a block, if all of it is free.
    fn enclosing(&self, pfn: u32, order: u32) -> Option<(u32, u32)> {
        (order..self.blocks.len() as u32)
            .map(|k| (pfn & !((1 << k) - 1), k))
            .find(|(start, k)| self.blocks[*k as usize].contains(start))
    }

    /// Whether all of a block is free.
    pub fn has(&self, pfn: u32, order: u32) -> bool {
        self.enclosing(pfn, order).is_some()
    }

    /// Takes a block; `false` if some of it is not free.
    pub fn take(&mut self, pfn: u32, order: u32) -> bool {
        let Some((start, mut k)) = self.enclosing(pfn, order) else { return false };
        self.blocks[k as usize].remove(&start);
        while k > order {
            k -= 1;
            self.blocks[k as usize].insert((pfn & !((1 << k) - 1)) ^ (1 << k));
        }
        self.frames -= 1 << order;
        true
    }

    /// Maximal blocks by order, given the mobility of each pageblock: pageblocks of the mobilities that
    /// do not mix merge with no other pageblock. And the largest order among those that do mix.
    pub fn maximal(&self, mobility: impl Fn(u32) -> MigrateType) -> ([u64; 16], Option<u32>) {
        let mixes = |pfn: u32| mobility(pfn) < MigrateType::HighAtomic;
        let (mut counts, mut largest) = ([0; 16], None);
        let mut todo: Vec<(u32, u32)> = Vec::new();
        for (k, starts) in self.blocks.iter().enumerate() {
            todo.extend(starts.iter().map(|pfn| (*pfn, k as u32)));
        }
        while let Some((pfn, k)) = todo.pop() {
            let mut pageblocks = (pfn..pfn + (1 << k)).step_by(1 << PAGEBLOCK_ORDER);
            if k > PAGEBLOCK_ORDER && !pageblocks.all(mixes) {
                todo.extend([(pfn, k - 1), (pfn + (1 << (k - 1)), k - 1)]);
                continue;
            }
            counts[k as usize] += 1;
            if mixes(pfn) {
                largest = largest.max(Some(k));
            }
        }
        (counts, largest)
    }

    /// Free frames in pageblocks for which `which` holds.
    pub fn frames_in(&self, which: impl Fn(u32) -> bool) -> u64 {
        let mut sum = 0;
        for (k, starts) in self.blocks.iter().enumerate() {
            let piece = (k as u32).min(PAGEBLOCK_ORDER);
            for pfn in starts.iter().flat_map(|s| (*s..s + (1 << k)).step_by(1 << piece)) {
                sum += u64::from(which(pfn)) << piece;
            }
        }
        sum
    }
}

/// The live blocks of a machine.
#[derive(Default)]
pub struct LiveBlocks {
    blocks: BTreeMap<u32, Live>,
    frames: u64,
}

impl LiveBlocks {
    /// Live frames.
    pub fn frames(&self) -> u64 {
        self.frames
    }

    /// The block that starts at the frame.
    pub fn at(&self, pfn: u32) -> Option<Live> {
        self.blocks.get(&pfn).copied()
    }

    /// The block that starts at the frame.
    pub fn at_mut(&mut self, pfn: u32) -> Option<&mut Live> {
        self.blocks.get_mut(&pfn)
    }

    /// Any block: the first at or after the frame, or the first of all.
    pub fn near(&self, pfn: u32) -> Option<(u32, Live)> {
        let mut after = self.blocks.range(pfn..).chain(self.blocks.iter());
        after.next().map(|(pfn, live)| (*pfn, *live))
    }

    /// Adds a block; panics if it meets another.
    pub fn add(&mut self, pfn: u32, live: Live) {
        if let Some((below, b)) = self.blocks.range(..pfn).next_back() {
            assert!(below + (1 << b.order) <= pfn, "pfn:{pfn:#x} is inside pfn:{below:#x} {b:?}");
        }
        if let Some((above, b)) = self.blocks.range(pfn..).next() {
            assert!(pfn + (1 << live.order) <= *above, "pfn:{pfn:#x} reaches pfn:{above:#x} {b:?}");
        }
        self.frames += 1 << live.order;
        self.blocks.insert(pfn, live);
    }

    /// Takes a block out.
    pub fn remove(&mut self, pfn: u32) -> Option<Live> {
        let live = self.blocks.remove(&pfn)?;
        self.frames -= 1 << live.order;
        Some(live)
    }

    /// All blocks.
    pub fn iter(&self) -> impl Iterator<Item = (u32, Live)> + '_ {
        self.blocks.iter().map(|(pfn, live)| (*pfn, *live))
    }
}
