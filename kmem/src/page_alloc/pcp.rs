//! Per-CPU page lists: arrays of frame numbers with a hot and a cold end \[P3\].
//!
//! # Concepts
//! Most frees are followed by an allocation of the same order on the same CPU, and the frame is still
//! in its caches. So a freed block goes on the *hot* end of a list of its order and mobility, and an
//! allocation takes it from there; `__GFP_COLD` takes from the *cold* end, which is also where blocks go
//! back to the buddy, a batch at a time.
//!
//! # Implementation
//! A list is a ring of 32-bit frame numbers; two free-running counters are its ends. Orders 0 to 3 and
//! a pageblock's order have lists, one per mobility. How many blocks a list may hold (`high`) tunes
//! itself: a refill that follows a spill says that the traffic swings wider than the list, so it grows;
//! pressure on the zone puts it back to its smallest.
//!
//! # Locking
//! A list is touched by its own CPU only, and only while [`Cpu::path`](crate::context::Cpu::path) says
//! so (the ownership flag): an interrupt that lands in between takes the locked path instead. Interrupts
//! nest strictly, so plain loads and stores suffice. Reports read the counters from anywhere.

use crate::types::{MIGRATE_PCPTYPES, PAGEBLOCK_ORDER};
use core::sync::atomic::{AtomicU32, Ordering::Relaxed};

/// Largest of the small orders with lists.
pub(crate) const PCP_MAX_SMALL: u32 = 3;
/// Orders with lists.
pub(crate) const PCP_ORDERS: usize = PCP_MAX_SMALL as usize + 2;
/// Lists per CPU and zone.
pub(crate) const PCP_LISTS: usize = PCP_ORDERS * MIGRATE_PCPTYPES;

/// Blocks each order's ring has place for; powers of two.
const CAPACITY: [u32; PCP_ORDERS] = [1024, 256, 128, 64, 8];

const RING: usize = {
    let mut n = 0;
    let mut i = 0;
    while i < PCP_ORDERS {
        assert!(CAPACITY[i].is_power_of_two());
        n += CAPACITY[i] as usize * MIGRATE_PCPTYPES;
        i += 1;
    }
    n
};

/// Start and index mask of each list's ring.
const RINGS: [(u32, u32); PCP_LISTS] = {
    let mut r = [(0, 0); PCP_LISTS];
    let mut start = 0;
    let mut i = 0;
    while i < PCP_LISTS {
        let cap = CAPACITY[i / MIGRATE_PCPTYPES];
        r[i] = (start, cap - 1);
        start += cap;
        i += 1;
    }
    r
};

/// The list for an order and a mobility (below `MIGRATE_PCPTYPES`); `None` for orders without lists.
#[inline(always)]
pub(crate) fn list_of(order: u32, mt: usize) -> Option<usize> {
    let o = if order <= PCP_MAX_SMALL {
        order as usize
    } else if order == PAGEBLOCK_ORDER {
        PCP_ORDERS - 1
    } else {
        return None;
    };
    if mt < MIGRATE_PCPTYPES { Some(o * MIGRATE_PCPTYPES + mt) } else { None }
}

/// The order of a list's blocks.
pub(crate) fn list_order(list: usize) -> u32 {
    match list / MIGRATE_PCPTYPES {
        o if o < PCP_ORDERS - 1 => o as u32,
        _ => PAGEBLOCK_ORDER,
    }
}

/// Limits of a zone's lists, in blocks, by order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    pub(crate) batch: [u32; PCP_ORDERS],
    pub(crate) min: [u32; PCP_ORDERS],
    pub(crate) max: [u32; PCP_ORDERS],
}

impl Limits {
    /// Limits for a zone of `managed` frames shared by `cpus` CPUs. All lists of all CPUs together may
    /// hold an eighth of the zone; a zone too small for that to be worth it has no lists.
    pub(crate) fn for_zone(managed: u64, cpus: usize) -> Limits {
        let mut l = Limits { batch: [1; PCP_ORDERS], min: [0; PCP_ORDERS], max: [0; PCP_ORDERS] };
        let per_list = managed / 8 / cpus.max(1) as u64 / PCP_LISTS as u64;
        for (o, capacity) in CAPACITY.into_iter().enumerate() {
            let order = list_order(o * MIGRATE_PCPTYPES);
            let blocks = (per_list >> order).min(u64::from(capacity)) as u32;
            let (batch, floor) = match o {
                0 => (32, 16),
                1 => (16, 8),
                2 => (8, 8),
                3 => (8, 4),
                _ => (1, 2),
            };
            if blocks < floor {
                continue;
            }
            l.batch[o] = batch.min(blocks / 2).max(1);
            l.min[o] = (2 * l.batch[o]).min(blocks);
            l.max[o] = blocks;
        }
        l
    }
}

/// One list's ends and tuning.
struct List {
    /// Cold end; free-running.
    head: AtomicU32,
    /// Hot end; free-running.
    tail: AtomicU32,
    /// Blocks the list may hold now; 0 switches it off.
    high: AtomicU32,
    /// Whether blocks were spilled since the last refill.
    spilled: AtomicU32,
}

/// The lists of one CPU in one zone.
#[repr(C, align(64))]
pub(crate) struct Pcp {
    lists: [List; PCP_LISTS],
    ring: [AtomicU32; RING],
}

impl Pcp {
    #[inline(always)]
    fn slot(&self, list: usize, at: u32) -> &AtomicU32 {
        let (start, mask) = RINGS[list];
        &self.ring[(start + (at & mask)) as usize]
    }

    /// Blocks on the list.
    #[inline(always)]
    pub(crate) fn len(&self, list: usize) -> u32 {
        let l = &self.lists[list];
        l.tail.load(Relaxed).wrapping_sub(l.head.load(Relaxed))
    }

    #[inline(always)]
    pub(crate) fn pop_hot(&self, list: usize) -> Option<u32> {
        let l = &self.lists[list];
        let tail = l.tail.load(Relaxed);
        if tail == l.head.load(Relaxed) {
            return None;
        }
        let at = tail.wrapping_sub(1);
        let pfn = self.slot(list, at).load(Relaxed);
        l.tail.store(at, Relaxed);
        Some(pfn)
    }

    #[inline(always)]
    pub(crate) fn pop_cold(&self, list: usize) -> Option<u32> {
        let l = &self.lists[list];
        let head = l.head.load(Relaxed);
        if l.tail.load(Relaxed) == head {
            return None;
        }
        let pfn = self.slot(list, head).load(Relaxed);
        l.head.store(head.wrapping_add(1), Relaxed);
        Some(pfn)
    }

    /// Puts a block on the hot end if the list may grow; says whether it did.
    #[inline(always)]
    pub(crate) fn push_hot(&self, list: usize, pfn: u32) -> bool {
        let l = &self.lists[list];
        let tail = l.tail.load(Relaxed);
        if tail.wrapping_sub(l.head.load(Relaxed)) >= l.high.load(Relaxed) {
            return false;
        }
        self.slot(list, tail).store(pfn, Relaxed);
        l.tail.store(tail.wrapping_add(1), Relaxed);
        true
    }

    /// Puts a block on the cold end; the ring has place for `high` of them.
    pub(crate) fn push_cold(&self, list: usize, pfn: u32) {
        let l = &self.lists[list];
        let at = l.head.load(Relaxed).wrapping_sub(1);
        self.slot(list, at).store(pfn, Relaxed);
        l.head.store(at, Relaxed);
    }

    /// Blocks the list may hold now; 0 means that it is off.
    #[inline(always)]
    pub(crate) fn high(&self, list: usize) -> u32 {
        self.lists[list].high.load(Relaxed)
    }

    /// Sets every list to its smallest size.
    pub(crate) fn reset_high(&self, limits: &Limits) {
        for (i, l) in self.lists.iter().enumerate() {
            l.high.store(limits.min[i / MIGRATE_PCPTYPES], Relaxed);
        }
    }

    /// Notes that the list ran empty; it grows if it also ran over since.
    pub(crate) fn note_refill(&self, list: usize, limits: &Limits, pressed: bool) {
        let l = &self.lists[list];
        let o = list / MIGRATE_PCPTYPES;
        if pressed {
            l.high.store(limits.min[o], Relaxed);
        } else if l.spilled.load(Relaxed) != 0 {
            let grown = l.high.load(Relaxed) + limits.batch[o];
            l.high.store(grown.min(limits.max[o]), Relaxed);
        }
        l.spilled.store(0, Relaxed);
    }

    /// Notes that the list ran over; under pressure it shrinks to its smallest.
    pub(crate) fn note_spill(&self, list: usize, limits: &Limits, pressed: bool) {
        let l = &self.lists[list];
        l.spilled.store(1, Relaxed);
        if pressed {
            l.high.store(limits.min[list / MIGRATE_PCPTYPES], Relaxed);
        }
    }

    /// Frames on all lists.
    pub(crate) fn frames(&self) -> u64 {
        (0..PCP_LISTS).map(|i| u64::from(self.len(i)) << list_order(i)).sum()
    }

    /// Every block on the lists, coldest first. For audits, while the CPU is quiet.
    pub(crate) fn blocks(&self) -> impl Iterator<Item = (usize, u32)> + '_ {
        (0..PCP_LISTS).flat_map(move |i| {
            let head = self.lists[i].head.load(Relaxed);
            (0..self.len(i)).map(move |n| (i, self.slot(i, head.wrapping_add(n)).load(Relaxed)))
        })
    }
}
