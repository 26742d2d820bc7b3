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
//! pressure on the zone puts it back to half of its smallest, since what lies on lists then keeps the
//! last large blocks from being whole. What rests on it is given back from time to time (`vmstat_update`). The
//! ring goes round in no more places than that takes, so that a list costs few cache lines; its size changes
//! when it is empty, which it is when it is refilled. Where the tail may get to is kept beside the ends: one
//! comparison says whether a list takes more.
//!
//! # Locking
//! A list is touched by its own CPU only, and only while [`Cpu::path`](crate::context::Cpu::path) says
//! so (the ownership flag): an interrupt that lands in between takes the locked path instead. Interrupts
//! nest strictly, so plain loads and stores suffice. Reports read the counters from anywhere.

use crate::types::{MIGRATE_PCPTYPES, MigrateType, PAGEBLOCK_ORDER};
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

/// Largest of the small orders with lists.
pub(crate) const PCP_MAX_SMALL: u32 = 3;
/// Orders with lists.
pub(crate) const PCP_ORDERS: usize = PCP_MAX_SMALL as usize + 2;
/// Lists per CPU and zone.
pub(crate) const PCP_LISTS: usize = PCP_ORDERS * MIGRATE_PCPTYPES;

/// Blocks a list's ring has place for: a power of two.
const CAPACITY: u32 = 256;
const _: () = assert!(CAPACITY.is_power_of_two() && PCP_LISTS <= 32);

/// Names a list: below `PCP_LISTS`, which only this module can break.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct ListId(usize);

impl ListId {
    /// All lists.
    pub(crate) fn all() -> impl Iterator<Item = ListId> {
        (0..PCP_LISTS).map(ListId)
    }

    /// The list of a small order and a mobility; `None` for other orders and for mobilities without
    /// lists.
    #[inline(always)]
    pub(crate) const fn small(order: u32, mt: usize) -> Option<ListId> {
        if order <= PCP_MAX_SMALL && mt < MIGRATE_PCPTYPES {
            Some(ListId(order as usize * MIGRATE_PCPTYPES + mt))
        } else {
            None
        }
    }

    /// The list for an order and a mobility; `None` for orders and mobilities without lists.
    #[inline(always)]
    pub(crate) const fn of(order: u32, mt: usize) -> Option<ListId> {
        if order == PAGEBLOCK_ORDER && mt < MIGRATE_PCPTYPES {
            Some(ListId((PCP_ORDERS - 1) * MIGRATE_PCPTYPES + mt))
        } else {
            ListId::small(order, mt)
        }
    }

    /// The order of the list's blocks.
    pub(crate) const fn order(self) -> u32 {
        match self.0 / MIGRATE_PCPTYPES {
            o if o < PCP_ORDERS - 1 => o as u32,
            _ => PAGEBLOCK_ORDER,
        }
    }

    /// The mobility of the list's blocks.
    pub(crate) const fn migratetype(self) -> MigrateType {
        MigrateType::ALL[self.0 % MIGRATE_PCPTYPES]
    }

    const fn bit(self) -> u32 {
        1 << self.0
    }

    /// Index into [`Limits`].
    pub(crate) const fn class(self) -> usize {
        self.0 / MIGRATE_PCPTYPES
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
    /// Limits for a zone of `managed` frames shared by `cpus` CPUs.
    ///
    /// All lists of all CPUs together may hold a sixty-fourth of the zone: what lies on lists cannot merge, and
    /// on replayed kernel traces that is the largest single cause of fragmentation. Half of it goes to
    /// order 0, the rest to the other orders alike. Where a share is less than is worth a list, the list
    /// is off, or as short as does any good as long as all such lists together hold no more than another
    /// sixty-fourth.
    pub(crate) fn for_zone(managed: u64, cpus: usize) -> Limits {
        /// The largest batch, the least share worth its own list, and the shortest list.
        const SIZES: [(u32, u32, u32); PCP_ORDERS] =
            [(32, 16, 8), (16, 8, 4), (8, 8, 4), (8, 4, 2), (1, 1, 1)];
        let mut l = Limits { batch: [1; PCP_ORDERS], min: [0; PCP_ORDERS], max: [0; PCP_ORDERS] };
        let per_cpu = managed / 64 / cpus.max(1) as u64;
        let mut spare = per_cpu;
        for (o, (batch, worth, shortest)) in SIZES.into_iter().enumerate() {
            let order = ListId(o * MIGRATE_PCPTYPES).order();
            let (share, most) = match o {
                0 => (per_cpu / 2 / MIGRATE_PCPTYPES as u64, CAPACITY),
                // One mobility at a time asks for pageblocks, so a list may have the whole share.
                _ if order == PAGEBLOCK_ORDER => (per_cpu, 2),
                _ => (per_cpu / 2 / (PCP_ORDERS as u64 - 1) / MIGRATE_PCPTYPES as u64, CAPACITY),
            };
            let mut blocks = (share >> order).min(u64::from(most)) as u32;
            if blocks < worth {
                let lists = (u64::from(shortest) << order) * MIGRATE_PCPTYPES as u64;
                let Some(left) = spare.checked_sub(lists) else { continue };
                spare = left;
                blocks = shortest;
            }
            l.batch[o] = batch.min(blocks / 2).max(1);
            l.min[o] = (2 * l.batch[o]).min(blocks);
            l.max[o] = blocks;
        }
        l
    }

    /// What a list may hold while the zone is under pressure: about a batch. One that is on stays on.
    fn pressed(&self, class: usize) -> u32 {
        self.min[class].div_ceil(2)
    }
}

/// One list's ends, tuning and counts.
#[repr(C, align(32))]
struct List {
    /// Cold end; free-running.
    head: AtomicU32,
    /// Hot end; free-running.
    tail: AtomicU32,
    /// Where the tail may get to: what the list may hold behind the head, and never below the tail.
    limit: AtomicU32,
    /// Places of the ring that are in use, less one: below `CAPACITY`, which only this module can break.
    mask: AtomicU32,
    /// Blocks ever taken for an allocation.
    allocs: AtomicU64,
    /// Blocks ever put by a free.
    frees: AtomicU64,
}

/// The lists of one CPU in one zone.
#[repr(C, align(64))]
pub(crate) struct Pcp {
    lists: [List; PCP_LISTS],
    /// Lists, by bit, of which blocks were spilled since the last refill.
    spilled: AtomicU32,
    /// The zone's area that the CPU takes from as long as it has something.
    home: AtomicU32,
    /// The area that had something last: where it looks first until blocks were spilled.
    last: AtomicU32,
    /// Blocks that the fast paths took straight from the buddy.
    direct: AtomicU64,
    /// Of each list, how many blocks it may hold now; 0 switches it off.
    high: [AtomicU32; PCP_LISTS],
    /// Of each list, how many blocks had been taken when it was last looked through for what rests.
    looked: [AtomicU32; PCP_LISTS],
    rings: [[AtomicU32; CAPACITY as usize]; PCP_LISTS],
}

/// A place at the hot end of a list, good while the caller owns the lists and changes nothing else.
pub(crate) struct Place<'a> {
    list: &'a List,
    slot: &'a AtomicU32,
    tail: u32,
}

impl Place<'_> {
    /// Puts a block there.
    #[inline(always)]
    pub(crate) fn put(self, pfn: u32) {
        self.slot.store(pfn, Relaxed);
        self.list.tail.store(self.tail.wrapping_add(1), Relaxed);
    }
}

/// Takes blocks off the hot end of a list, good while the caller owns the lists and changes nothing
/// else. What was taken counts once it is dropped.
pub(crate) struct HotBlocks<'a> {
    list: &'a List,
    ring: Ring<'a>,
    head: u32,
    /// Where the tail was.
    from: u32,
    tail: u32,
}

impl Iterator for HotBlocks<'_> {
    type Item = u32;

    #[inline(always)]
    fn next(&mut self) -> Option<u32> {
        if self.tail == self.head {
            return None;
        }
        self.tail = self.tail.wrapping_sub(1);
        Some(self.ring.slot(self.tail).load(Relaxed))
    }
}

impl Drop for HotBlocks<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        self.list.tail.store(self.tail, Relaxed);
        bump(&self.list.allocs, self.from.wrapping_sub(self.tail).into());
    }
}

/// The hot end of a list, good while the caller owns the lists and changes nothing else. What was put
/// counts once it is dropped.
pub(crate) struct HotEnd<'a> {
    list: &'a List,
    ring: Ring<'a>,
    /// Where the tail was.
    from: u32,
    tail: u32,
    /// Where it may get to.
    limit: u32,
}

impl HotEnd<'_> {
    /// Puts a block there, freed by the caller; `false` if the list may not grow.
    #[inline(always)]
    pub(crate) fn put(&mut self, pfn: u32) -> bool {
        if self.tail == self.limit {
            return false;
        }
        self.ring.slot(self.tail).store(pfn, Relaxed);
        self.tail = self.tail.wrapping_add(1);
        true
    }
}

impl Drop for HotEnd<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        self.list.tail.store(self.tail, Relaxed);
        bump(&self.list.frees, self.tail.wrapping_sub(self.from).into());
    }
}

/// The cold end of a list, good while the caller owns the lists and changes nothing else. What was put
/// counts once it is dropped.
pub(crate) struct ColdEnd<'a> {
    pcp: &'a Pcp,
    list: ListId,
    ring: Ring<'a>,
    head: u32,
}

impl ColdEnd<'_> {
    /// Puts a block there; the ring has places for `high` of them.
    #[inline(always)]
    pub(crate) fn put(&mut self, pfn: u32) {
        self.head = self.head.wrapping_sub(1);
        self.ring.slot(self.head).store(pfn, Relaxed);
    }
}

impl Drop for ColdEnd<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        self.pcp.set_head(self.list, self.head);
    }
}

/// The places of a list's ring.
#[derive(Clone, Copy)]
struct Ring<'a> {
    places: &'a [AtomicU32; CAPACITY as usize],
    /// Those in use, less one.
    mask: u32,
}

impl<'a> Ring<'a> {
    #[inline(always)]
    fn slot(self, at: u32) -> &'a AtomicU32 {
        let i = (at & self.mask) as usize;
        // SAFETY: a mask is below CAPACITY: it is 0 in zeroed memory, and `set_high` clamps.
        unsafe { self.places.get_unchecked(i) }
    }
}

/// Adds to a counter that only its own CPU writes, while it owns the lists.
#[inline(always)]
fn bump(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Relaxed).wrapping_add(n), Relaxed);
}

impl Pcp {
    #[inline(always)]
    fn list(&self, list: ListId) -> &List {
        // SAFETY: a ListId is below PCP_LISTS: its constructors check, and its field is private.
        unsafe { self.lists.get_unchecked(list.0) }
    }

    #[inline(always)]
    fn ring(&self, list: ListId) -> Ring<'_> {
        // SAFETY: as in `list`: there is a ring for every list.
        let places = unsafe { self.rings.get_unchecked(list.0) };
        Ring { places, mask: self.list(list).mask.load(Relaxed) }
    }

    /// Blocks on the list.
    #[inline(always)]
    pub(crate) fn len(&self, list: ListId) -> u32 {
        let l = self.list(list);
        l.tail.load(Relaxed).wrapping_sub(l.head.load(Relaxed))
    }

    #[inline(always)]
    pub(crate) fn pop_hot(&self, list: ListId) -> Option<u32> {
        let l = self.list(list);
        let tail = l.tail.load(Relaxed);
        if tail == l.head.load(Relaxed) {
            return None;
        }
        let at = tail.wrapping_sub(1);
        let pfn = self.ring(list).slot(at).load(Relaxed);
        l.tail.store(at, Relaxed);
        Some(pfn)
    }

    #[inline(always)]
    pub(crate) fn pop_cold(&self, list: ListId) -> Option<u32> {
        let l = self.list(list);
        let head = l.head.load(Relaxed);
        if l.tail.load(Relaxed) == head {
            return None;
        }
        let pfn = self.ring(list).slot(head).load(Relaxed);
        self.set_head(list, head.wrapping_add(1));
        Some(pfn)
    }

    #[inline]
    fn set_head(&self, list: ListId, head: u32) {
        self.list(list).head.store(head, Relaxed);
        self.set_limit(list);
    }

    /// Sets the limit, after the head or what the list may hold have changed. A list that holds more, since that was
    /// lowered, takes no more.
    #[inline]
    fn set_limit(&self, list: ListId) {
        let l = self.list(list);
        let tail = l.tail.load(Relaxed);
        let limit = l.head.load(Relaxed).wrapping_add(self.high(list));
        let over = limit.wrapping_sub(tail) > CAPACITY;
        l.limit.store(if over { tail } else { limit }, Relaxed);
    }

    /// Takes blocks off the cold end into `to`, as many as there are; says how many.
    pub(crate) fn pop_cold_many(&self, list: ListId, to: &mut [u32]) -> usize {
        let (l, ring) = (self.list(list), self.ring(list));
        let head = l.head.load(Relaxed);
        let n = (l.tail.load(Relaxed).wrapping_sub(head) as usize).min(to.len());
        for (i, at) in to[..n].iter_mut().enumerate() {
            *at = ring.slot(head.wrapping_add(i as u32)).load(Relaxed);
        }
        self.set_head(list, head.wrapping_add(n as u32));
        n
    }

    /// The hot end, if the list may grow there.
    #[inline(always)]
    pub(crate) fn place(&self, list: ListId) -> Option<Place<'_>> {
        let l = self.list(list);
        let tail = l.tail.load(Relaxed);
        (tail != l.limit.load(Relaxed)).then_some(Place {
            list: l,
            slot: self.ring(list).slot(tail),
            tail,
        })
    }

    /// The hot end, to take several blocks from.
    #[inline(always)]
    pub(crate) fn hot_blocks(&self, list: ListId) -> HotBlocks<'_> {
        let l = self.list(list);
        let (head, tail) = (l.head.load(Relaxed), l.tail.load(Relaxed));
        HotBlocks { list: l, ring: self.ring(list), head, from: tail, tail }
    }

    /// The hot end, to put several blocks there.
    #[inline(always)]
    pub(crate) fn hot_end(&self, list: ListId) -> HotEnd<'_> {
        let l = self.list(list);
        let (tail, limit) = (l.tail.load(Relaxed), l.limit.load(Relaxed));
        HotEnd { list: l, ring: self.ring(list), from: tail, tail, limit }
    }

    /// Puts a block on the hot end if the list may grow; says whether it did.
    #[inline(always)]
    pub(crate) fn push_hot(&self, list: ListId, pfn: u32) -> bool {
        self.place(list).map(|p| p.put(pfn)).is_some()
    }

    /// The cold end, to put several blocks there.
    #[inline(always)]
    pub(crate) fn cold_end(&self, list: ListId) -> ColdEnd<'_> {
        let l = self.list(list);
        ColdEnd { pcp: self, list, ring: self.ring(list), head: l.head.load(Relaxed) }
    }

    /// Counts `n` blocks taken for allocations.
    #[inline(always)]
    pub(crate) fn count_allocs(&self, list: ListId, n: u64) {
        bump(&self.list(list).allocs, n);
    }

    /// Blocks that lie on a list for no use: more than were taken off it since this was asked last.
    pub(crate) fn resting(&self, list: ListId) -> u32 {
        let now = self.list(list).allocs.load(Relaxed) as u32;
        let taken = now.wrapping_sub(self.looked[list.0].swap(now, Relaxed));
        self.len(list).saturating_sub(taken)
    }

    /// Counts `n` blocks put by frees.
    #[inline(always)]
    pub(crate) fn count_frees(&self, list: ListId, n: u64) {
        bump(&self.list(list).frees, n);
    }

    /// Blocks ever taken for allocations, and the frames in them.
    pub(crate) fn allocs(&self) -> (u64, u64) {
        ListId::all().fold((0, 0), |(blocks, frames), i| {
            let n = self.list(i).allocs.load(Relaxed);
            (blocks + n, frames + (n << i.order()))
        })
    }

    /// Sets the zone's area that the CPU takes from.
    pub(crate) fn set_home(&self, area: usize) {
        self.home.store(area as u32, Relaxed);
        self.last.store(area as u32, Relaxed);
    }

    /// The zone's area to look in first.
    #[inline(always)]
    pub(crate) fn area(&self) -> usize {
        self.last.load(Relaxed) as usize
    }

    /// Notes in which area something was found: those before it have nothing, and are not asked again soon.
    #[inline(always)]
    pub(crate) fn note_area(&self, found: usize) {
        if found != self.area() {
            self.last.store(found as u32, Relaxed);
        }
    }

    /// Counts a block that a fast path took straight from the buddy.
    pub(crate) fn count_direct(&self) {
        bump(&self.direct, 1);
    }

    /// Blocks that the fast paths ever took straight from the buddy.
    pub(crate) fn direct_allocs(&self) -> u64 {
        self.direct.load(Relaxed)
    }

    /// Blocks that the fast paths ever gave out, from the lists or straight from the buddy.
    pub(crate) fn plain_allocs(&self) -> u64 {
        self.allocs().0 + self.direct_allocs()
    }

    /// Frames ever put by frees.
    pub(crate) fn freed_frames(&self) -> u64 {
        ListId::all().map(|i| self.list(i).frees.load(Relaxed) << i.order()).sum()
    }

    /// Blocks the list may hold now; 0 means that it is off.
    #[inline(always)]
    pub(crate) fn high(&self, list: ListId) -> u32 {
        self.high[list.0].load(Relaxed)
    }

    /// Sets every list to its smallest size.
    pub(crate) fn reset_high(&self, limits: &Limits) {
        for i in ListId::all() {
            self.set_high(i, limits.min[i.class()]);
        }
    }

    /// Sets how many blocks the list may hold: any number while it is empty, no more than before
    /// otherwise.
    fn set_high(&self, list: ListId, high: u32) {
        let l = self.list(list);
        if self.len(list) == 0 {
            let places = high.clamp(1, CAPACITY).next_power_of_two();
            l.mask.store(places - 1, Relaxed);
        }
        self.high[list.0].store(high.min(l.mask.load(Relaxed) + 1), Relaxed);
        self.set_limit(list);
    }

    /// Notes that the list ran empty; it grows if it also ran over since.
    pub(crate) fn note_refill(&self, list: ListId, limits: &Limits, pressed: bool) {
        let o = list.class();
        let spilled = self.spilled.load(Relaxed);
        if pressed {
            self.set_high(list, limits.pressed(o));
        } else if spilled & list.bit() != 0 {
            self.set_high(list, (self.high(list) + limits.batch[o]).min(limits.max[o]));
        }
        self.spilled.store(spilled & !list.bit(), Relaxed);
    }

    /// Notes that the list ran over; under pressure it shrinks.
    pub(crate) fn note_spill(&self, list: ListId, limits: &Limits, pressed: bool) {
        self.spilled.store(self.spilled.load(Relaxed) | list.bit(), Relaxed);
        self.last.store(self.home.load(Relaxed), Relaxed);
        if pressed {
            self.set_high(list, limits.pressed(list.class()));
        }
    }

    /// Frames on all lists.
    pub(crate) fn frames(&self) -> u64 {
        ListId::all().map(|i| u64::from(self.len(i)) << i.order()).sum()
    }

    /// Every block on the lists, coldest first. For audits, while the CPU is quiet.
    pub(crate) fn blocks(&self) -> impl Iterator<Item = (ListId, u32)> + '_ {
        ListId::all().flat_map(move |i| {
            let head = self.list(i).head.load(Relaxed);
            (0..self.len(i))
                .map(move |n| (i, self.ring(i).slot(head.wrapping_add(n)).load(Relaxed)))
        })
    }
}
