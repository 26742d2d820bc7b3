//! Per-CPU page lists: arrays of frame numbers with a hot and a cold end \[P3\].
//!
//! # Concepts
//! Most frees are followed by an allocation of the same order on the same CPU, and the frame is still
//! in its caches. So a freed block goes on the *hot* end of a list of its order and mobility, and an
//! allocation takes it from there; `__GFP_COLD` takes from the *cold* end, which is also where blocks go
//! back to the buddy, a batch at a time.
//!
//! # Implementation
//! A list is a stack of pages in an array, with an empty place below its coldest block: taking from a list that has
//! none finds nothing. `top` is the place behind the hottest block, `limit` how far it may get: one comparison says whether
//! a list takes more. What leaves at the cold end leaves places free there; once that are as many as the list
//! may hold, or half as many as any, the others move down. A refill, which finds the list empty, begins at the bottom again, so that a list costs
//! few cache lines.
//!
//! Orders 0 to 3 and a pageblock's order have lists, one per mobility. The lists of a CPU in a zone are a row of places in
//! one table, and a pageblock's descriptor says which row and which mobility in one number: a free comes from its page
//! to its list by two loads and a shift. Mobilities without lists, and holes, have places there whose lists are full and empty
//! at once.
//!
//! How many blocks a list may hold (`high`) tunes
//! itself: a refill that follows a spill says that the traffic swings wider than the list, so it grows;
//! pressure on the zone puts it back to half of its smallest, since what lies on lists then keeps the
//! last large blocks from being whole. What rests on it is given back from time to time (`vmstat_update`).
//!
//! # Locking
//! A list is touched by its own CPU only, and only while [`Cpu::path`](crate::context::Cpu::path) says
//! so (the ownership flag): an interrupt that lands in between takes the locked path instead. Interrupts
//! nest strictly, so plain loads and stores suffice. Reports read the counters from anywhere.

use crate::{
    memmap::MemMap,
    page::Page,
    pageblock::PbFlags,
    types::{MIGRATE_PCPTYPES, MIGRATE_TYPES, MigrateType, PAGEBLOCK_ORDER},
};
use core::{
    ptr,
    sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering::Relaxed},
};

/// Largest of the small orders with lists.
pub(crate) const PCP_MAX_SMALL: u32 = 3;
/// Orders with lists.
pub(crate) const PCP_ORDERS: usize = PCP_MAX_SMALL as usize + 2;
/// Lists per CPU and zone.
pub(crate) const PCP_LISTS: usize = PCP_ORDERS * MIGRATE_PCPTYPES;

/// Blocks that a list may hold at most, by order: of large ones fewer are worth keeping.
const CAPACITY: [u32; PCP_ORDERS] = [256, 128, 64, 32, 2];

/// Places of a CPU's table for its lists in a zone.
pub(crate) const ROW: usize = 1 << PbFlags::ROW_SHIFT;
/// Of them, those of an order.
const MOBILITIES: usize = PbFlags::MOBILITIES;
const _: () = assert!(MOBILITIES * (PCP_MAX_SMALL as usize + 1) == ROW && ROW <= 32);

/// The places in a row of the lists of pageblocks, by mobility: some that no pageblock's descriptor names.
const WHOLE: [u8; MIGRATE_PCPTYPES] = [6, 7, 14];
const _: () = assert!(MIGRATE_TYPES <= 6);

/// What the list at a place in a row is.
#[derive(Clone, Copy)]
struct Kind {
    /// Index into [`Limits`].
    class: u8,
    mt: u8,
    /// Where its places are among those of the row.
    at: u16,
    /// How many.
    nr: u16,
}

const KINDS: [Kind; ROW] = {
    let mut kinds = [Kind { class: 0, mt: 0, at: 0, nr: 0 }; ROW];
    let mut class = 0;
    let mut at = 0;
    while class < PCP_ORDERS {
        let nr = places(class) as u16;
        let mut mt = 0;
        while mt < MIGRATE_PCPTYPES {
            let i =
                if class < PCP_ORDERS - 1 { class * MOBILITIES + mt } else { WHOLE[mt] as usize };
            kinds[i] = Kind { class: class as u8, mt: mt as u8, at, nr };
            at += nr;
            mt += 1;
        }
        class += 1;
    }
    kinds
};

/// The order of a class of lists.
const fn order_of(class: usize) -> u32 {
    if class < PCP_ORDERS - 1 { class as u32 } else { PAGEBLOCK_ORDER }
}

/// Names a list: its place in a row, which only this module can break.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct ListId(u8);

impl ListId {
    /// All lists, by order and mobility.
    pub(crate) fn all() -> impl Iterator<Item = ListId> {
        (0..PCP_LISTS)
            .filter_map(|i| ListId::of(order_of(i / MIGRATE_PCPTYPES), i % MIGRATE_PCPTYPES))
    }

    /// The list of a small order and a mobility; `None` for other orders and for mobilities without
    /// lists.
    #[inline(always)]
    pub(crate) const fn small(order: u32, mt: usize) -> Option<ListId> {
        if order <= PCP_MAX_SMALL && mt < MIGRATE_PCPTYPES {
            Some(ListId((order as usize * MOBILITIES + mt) as u8))
        } else {
            None
        }
    }

    /// The list for an order and a mobility; `None` for orders and mobilities without lists.
    #[inline(always)]
    pub(crate) const fn of(order: u32, mt: usize) -> Option<ListId> {
        if order == PAGEBLOCK_ORDER && mt < MIGRATE_PCPTYPES {
            Some(ListId(WHOLE[mt]))
        } else {
            ListId::small(order, mt)
        }
    }

    fn kind(self) -> Kind {
        KINDS[usize::from(self.0) % ROW]
    }

    /// The order of the list's blocks.
    pub(crate) fn order(self) -> u32 {
        order_of(self.class())
    }

    /// The mobility of the list's blocks.
    pub(crate) fn migratetype(self) -> MigrateType {
        MigrateType::ALL[usize::from(self.kind().mt)]
    }

    const fn bit(self) -> u32 {
        1 << self.0
    }

    /// Index into [`Limits`].
    pub(crate) fn class(self) -> usize {
        self.kind().class.into()
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
            let order = order_of(o);
            let share = match o {
                0 => per_cpu / 2 / MIGRATE_PCPTYPES as u64,
                // One mobility at a time asks for pageblocks, so a list may have the whole share.
                _ if order == PAGEBLOCK_ORDER => per_cpu,
                _ => per_cpu / 2 / (PCP_ORDERS as u64 - 1) / MIGRATE_PCPTYPES as u64,
            };
            let mut blocks = (share >> order).min(u64::from(CAPACITY[o])) as u32;
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

/// A place for a block.
type Place = AtomicPtr<Page>;

/// One list: its ends, counts and tuning.
#[repr(C, align(64))]
pub(crate) struct List {
    /// Behind the hottest block.
    top: AtomicPtr<Place>,
    /// Where that may get to: what the list may hold behind the coldest block, and never below the top.
    limit: AtomicPtr<Place>,
    /// Blocks ever taken for an allocation.
    allocs: AtomicU64,
    /// Blocks ever put by a free.
    frees: AtomicU64,
    /// Number of the coldest block's place; below it is an empty one.
    first: AtomicU32,
    /// How many blocks it may hold now; 0 switches it off.
    high: AtomicU32,
    /// How many blocks had been taken when it was last looked through for what rests.
    looked: AtomicU32,
}

/// Number of the lowest place that a block may be in.
const BASE: usize = 1;

/// Places of a list: the empty one, for as many as it can hold, for those that have left at the cold end, and the one that
/// the limit is at then.
const fn places(class: usize) -> usize {
    BASE + CAPACITY[class] as usize + slack(class) + 1
}

/// Places that may be free at the cold end of a list.
const fn slack(class: usize) -> usize {
    CAPACITY[class] as usize / 2
}

/// The places of the lists of one CPU in one zone.
#[repr(C, align(64))]
pub(crate) struct Places([Place; PLACES]);

const PLACES: usize = {
    let last = KINDS[WHOLE[MIGRATE_PCPTYPES - 1] as usize];
    (last.at + last.nr) as usize
};

/// The lists of one CPU in one zone.
#[repr(C, align(64))]
pub(crate) struct Pcp {
    row: Row,
    places: &'static Places,
    /// Lists, by bit, of which blocks were spilled since the last refill.
    spilled: AtomicU32,
    /// The zone's area that the CPU takes from as long as it has something.
    home: AtomicU32,
    /// The area that had something last: where it looks first until blocks were spilled.
    last: AtomicU32,
    /// Blocks that the fast paths took straight from the buddy.
    direct: AtomicU64,
}

/// A CPU's lists in all zones: a row for holes, and one by zone slot.
#[derive(Clone, Copy)]
pub(crate) struct Rows(&'static [List]);

impl Rows {
    /// Those of a CPU in a machine with as many zones as there are rows behind the first.
    pub(crate) fn new(lists: &'static [List]) -> Rows {
        Rows(lists)
    }

    /// The hot end of the list for a free block in a pageblock, if that may grow.
    ///
    /// # Safety
    /// The pageblock is one of the machine's, in a zone or a hole; the order is a small one.
    #[inline(always)]
    pub(crate) unsafe fn place(self, pb: PbFlags, order: u32) -> Option<HotPlace<'static>> {
        let i = pb.list() + order as usize * MOBILITIES;
        debug_assert!(i < self.0.len());
        // SAFETY: by the contract the number is below that of the first list behind the last zone's row.
        unsafe { self.0.get_unchecked(i) }.place()
    }
}

/// A CPU's lists in a zone, which have their places.
#[derive(Clone, Copy)]
pub(crate) struct Row(&'static [List; ROW]);

impl Row {
    #[inline(always)]
    fn list(self, list: ListId) -> &'static List {
        // SAFETY: a ListId is below ROW: its constructors check, and its field is private.
        unsafe { self.0.get_unchecked(usize::from(list.0)) }
    }

    /// Takes the hottest block.
    #[inline(always)]
    pub(crate) fn pop_hot(self, list: ListId) -> Option<&'static Page> {
        let l = self.list(list);
        let below = l.top.load(Relaxed).wrapping_sub(1);
        // SAFETY: `Pcp::new`, which alone makes rows, gave each list that has an id its places, and the top is above the
        // empty one below the coldest block.
        let page = unsafe { block_at(below) }?;
        l.top.store(below, Relaxed);
        Some(page)
    }

    /// Counts `n` blocks taken for allocations.
    #[inline(always)]
    pub(crate) fn count_allocs(self, list: ListId, n: u64) {
        bump(&self.list(list).allocs, n);
    }
}

/// A place at the hot end of a list, good while the caller owns the lists and changes nothing else.
pub(crate) struct HotPlace<'a> {
    list: &'a List,
    top: *mut Place,
}

impl HotPlace<'_> {
    /// Puts a block there.
    #[inline(always)]
    fn put(self, page: &'static Page) {
        // SAFETY: `place` found the list's limit above it, so it is one of the list's places.
        unsafe { &*self.top }.store(ptr::from_ref(page).cast_mut(), Relaxed);
        self.list.top.store(self.top.wrapping_add(1), Relaxed);
    }

    /// Puts one there that its owner has freed, and counts that.
    #[inline(always)]
    pub(crate) fn put_freed(self, page: &'static Page) {
        bump(&self.list.frees, 1);
        self.put(page);
    }
}

/// Takes blocks off the hot end of a list, good while the caller owns the lists and changes nothing
/// else. What was taken counts once it is dropped.
pub(crate) struct HotBlocks<'a> {
    list: &'a List,
    /// Where the top was.
    from: *mut Place,
    top: *mut Place,
}

impl Iterator for HotBlocks<'_> {
    type Item = &'static Page;

    #[inline(always)]
    fn next(&mut self) -> Option<&'static Page> {
        let below = self.top.wrapping_sub(1);
        // SAFETY: as in `Row::pop_hot`.
        let page = unsafe { block_at(below) }?;
        self.top = below;
        Some(page)
    }
}

impl Drop for HotBlocks<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        self.list.top.store(self.top, Relaxed);
        bump(&self.list.allocs, blocks_between(self.top, self.from) as u64);
    }
}

/// The hot end of a list, good while the caller owns the lists and changes nothing else. What was put
/// counts once it is dropped.
pub(crate) struct HotEnd<'a> {
    list: &'a List,
    /// Where the top was.
    from: *mut Place,
    top: *mut Place,
    /// Where it may get to.
    limit: *mut Place,
}

impl HotEnd<'_> {
    /// Puts a block there, freed by the caller; `false` if the list may not grow.
    #[inline(always)]
    pub(crate) fn put(&mut self, page: &'static Page) -> bool {
        if self.top == self.limit {
            return false;
        }
        // SAFETY: below the list's limit, so it is one of the list's places.
        unsafe { &*self.top }.store(ptr::from_ref(page).cast_mut(), Relaxed);
        self.top = self.top.wrapping_add(1);
        true
    }
}

impl Drop for HotEnd<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        self.list.top.store(self.top, Relaxed);
        bump(&self.list.frees, blocks_between(self.from, self.top) as u64);
    }
}

/// Fills an empty list from its hot end down, good while the caller owns the lists and changes nothing else.
pub(crate) struct Refill<'a> {
    pcp: &'a Pcp,
    list: ListId,
    places: &'static [Place],
    /// Number of the place that the top will be at.
    top: usize,
    /// Of that of the last block.
    at: usize,
}

impl Refill<'_> {
    /// Puts the blocks below the others that `pages` are the first pages of, each below the one before.
    #[inline(always)]
    pub(crate) fn put(&mut self, pages: impl ExactSizeIterator<Item = &'static Page>) {
        let at = self.at - pages.len();
        for (place, page) in self.places[at..self.at].iter().rev().zip(pages) {
            place.store(ptr::from_ref(page).cast_mut(), Relaxed);
        }
        self.at = at;
    }
}

impl Drop for Refill<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        if self.at != self.top {
            self.pcp.set_ends(self.list, self.places, self.at, self.top);
        }
    }
}

/// The block in a place, if there is one.
///
/// # Safety
/// The place is one of a list's.
#[inline(always)]
unsafe fn block_at(place: *mut Place) -> Option<&'static Page> {
    // SAFETY: places live as long as the platform, and hold null or what was a reference to a page of the map, which does
    // as well.
    unsafe { (*place).load(Relaxed).as_ref() }
}

/// Blocks from one place to another above it.
#[inline(always)]
fn blocks_between(from: *mut Place, to: *mut Place) -> usize {
    to.addr().wrapping_sub(from.addr()) / size_of::<Place>()
}

/// Adds to a counter that only its own CPU writes, while it owns the lists.
#[inline(always)]
fn bump(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Relaxed).wrapping_add(n), Relaxed);
}

impl List {
    /// The hot end, if the list may grow there. Any list.
    #[inline(always)]
    fn place(&self) -> Option<HotPlace<'_>> {
        let top = self.top.load(Relaxed);
        (top != self.limit.load(Relaxed)).then_some(HotPlace { list: self, top })
    }
}

impl Pcp {
    /// Lists that are off, made of a CPU's row and places for a zone that are nobody else's and zero.
    pub(crate) fn new(lists: &'static [List; ROW], places: &'static Places) -> Pcp {
        let zero = || AtomicU32::new(0);
        let direct = AtomicU64::new(0);
        let row = Row(lists);
        let pcp = Pcp { row, places, spilled: zero(), home: zero(), last: zero(), direct };
        ListId::all().for_each(|list| pcp.set_ends(list, pcp.places_of(list), BASE, BASE));
        pcp
    }

    /// What the fast paths use.
    pub(crate) fn row(&self) -> Row {
        self.row
    }

    #[inline(always)]
    fn list(&self, list: ListId) -> &'static List {
        self.row.list(list)
    }

    /// A list's places.
    fn places_of(&self, list: ListId) -> &'static [Place] {
        let Kind { at, nr, .. } = list.kind();
        &self.places.0[usize::from(at)..][..usize::from(nr)]
    }

    /// The numbers of the coldest block's place, and of the one behind the hottest block's.
    #[inline]
    fn ends(&self, list: ListId, places: &[Place]) -> (usize, usize) {
        let l = self.list(list);
        let bottom = places.as_ptr().cast_mut();
        let top = blocks_between(bottom, l.top.load(Relaxed)).min(places.len());
        ((l.first.load(Relaxed) as usize).min(top), top)
    }

    /// Sets both ends, and the limit.
    #[inline]
    fn set_ends(&self, list: ListId, places: &'static [Place], first: usize, top: usize) {
        let l = self.list(list);
        places[first - BASE].store(ptr::null_mut(), Relaxed);
        l.first.store(first as u32, Relaxed);
        l.top.store(ptr::from_ref(&places[top]).cast_mut(), Relaxed);
        self.set_limit(list, places, first, top);
    }

    /// Sets the limit, after the coldest block or what the list may hold have changed. A list that holds more, since that
    /// was lowered, takes no more.
    #[inline]
    fn set_limit(&self, list: ListId, places: &'static [Place], first: usize, top: usize) {
        let limit = (first + self.high(list) as usize).min(places.len() - 1).max(top);
        self.list(list).limit.store(ptr::from_ref(&places[limit]).cast_mut(), Relaxed);
    }

    /// Blocks on the list.
    pub(crate) fn len(&self, list: ListId) -> u32 {
        let (first, top) = self.ends(list, self.places_of(list));
        (top - first) as u32
    }

    #[inline(always)]
    pub(crate) fn pop_hot(&self, list: ListId) -> Option<&'static Page> {
        self.row.pop_hot(list)
    }

    /// Takes the coldest block.
    pub(crate) fn pop_cold(&self, list: ListId) -> Option<&'static Page> {
        let places = self.places_of(list);
        let (first, top) = self.ends(list, places);
        if first == top {
            return None;
        }
        // SAFETY: one of the list's places.
        let page = unsafe { block_at(ptr::from_ref(&places[first]).cast_mut()) };
        self.set_first(list, places, first + 1, top);
        page
    }

    /// Takes blocks off the cold end into `to`, as many as there are; says how many.
    pub(crate) fn pop_cold_many(&self, list: ListId, map: &MemMap, to: &mut [u32]) -> usize {
        let places = self.places_of(list);
        let (first, top) = self.ends(list, places);
        let n = to.len().min(top - first);
        for (at, place) in to.iter_mut().zip(&places[first..first + n]) {
            *at = map.frame_of(place.load(Relaxed));
        }
        self.set_first(list, places, first + n, top);
        n
    }

    /// Notes that the blocks before a place have left. If that are many, the others move down.
    #[inline]
    fn set_first(&self, list: ListId, places: &'static [Place], first: usize, top: usize) {
        if first - BASE <= slack(list.class()).min(self.high(list) as usize) {
            return self.set_ends(list, places, first, top);
        }
        for (to, from) in places[BASE..].iter().zip(&places[first..top]) {
            to.store(from.load(Relaxed), Relaxed);
        }
        self.set_ends(list, places, BASE, BASE + (top - first));
    }

    /// The hot end, to take several blocks from.
    #[inline(always)]
    pub(crate) fn hot_blocks(&self, list: ListId) -> HotBlocks<'_> {
        let l = self.list(list);
        let top = l.top.load(Relaxed);
        HotBlocks { list: l, from: top, top }
    }

    /// The hot end, to put several blocks there.
    #[inline(always)]
    pub(crate) fn hot_end(&self, list: ListId) -> HotEnd<'_> {
        let l = self.list(list);
        let top = l.top.load(Relaxed);
        HotEnd { list: l, from: top, top, limit: l.limit.load(Relaxed) }
    }

    /// Puts a block on the hot end if the list may grow; says whether it did.
    #[inline(always)]
    pub(crate) fn push_hot(&self, list: ListId, page: &'static Page) -> bool {
        self.list(list).place().map(|place| place.put(page)).is_some()
    }

    /// To fill a list, which is empty, with at most `n` blocks, no more than it can hold.
    #[inline(always)]
    pub(crate) fn refill(&self, list: ListId, n: u32) -> Refill<'_> {
        debug_assert_eq!(self.len(list), 0);
        let top = BASE + n.min(CAPACITY[list.class()]) as usize;
        Refill { pcp: self, list, places: self.places_of(list), top, at: top }
    }

    /// Counts `n` blocks taken for allocations.
    #[inline(always)]
    pub(crate) fn count_allocs(&self, list: ListId, n: u64) {
        self.row.count_allocs(list, n);
    }

    /// Blocks that lie on a list for no use: more than were taken off it since this was asked last.
    pub(crate) fn resting(&self, list: ListId) -> u32 {
        let l = self.list(list);
        let now = l.allocs.load(Relaxed) as u32;
        let taken = now.wrapping_sub(l.looked.swap(now, Relaxed));
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
        self.list(list).high.load(Relaxed)
    }

    /// Sets every list to its smallest size.
    pub(crate) fn reset_high(&self, limits: &Limits) {
        for i in ListId::all() {
            self.set_high(i, limits.min[i.class()]);
        }
    }

    /// Sets how many blocks the list may hold.
    fn set_high(&self, list: ListId, high: u32) {
        self.list(list).high.store(high.min(CAPACITY[list.class()]), Relaxed);
        let places = self.places_of(list);
        let (first, top) = self.ends(list, places);
        self.set_limit(list, places, first, top);
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
    pub(crate) fn blocks(&self) -> impl Iterator<Item = (ListId, &'static Page)> + '_ {
        ListId::all().flat_map(move |list| {
            let places = self.places_of(list);
            let (first, top) = self.ends(list, places);
            let places = places[first..top].iter();
            // SAFETY: one of the list's places.
            let block = |place| unsafe { block_at(ptr::from_ref::<Place>(place).cast_mut()) };
            places.filter_map(block).map(move |page| (list, page))
        })
    }
}
