//! The lists themselves: stacks of pages.
//!
//! # Implementation
//! ```text
//!              first                top            limit
//!   ┌───────┬─────────┬────────┬───────────┬───────┬─────┐
//!   │ empty │ coldest │  ...   │  hottest  │ room  │ ... │
//!   └───────┴─────────┴────────┴───────────┴───────┴─────┘
//! ```
//! Taking from a list that has no block finds the empty place below, and one comparison says whether a list takes more.
//! What leaves at the cold end leaves places free there; once those are more than the list may hold, or than half of what it
//! can, the others move down. A refill, which finds the list empty, begins at the bottom again: so a list costs few cache
//! lines.
//!
//! The lists of a CPU in a zone are a row of one table, and a pageblock's descriptor says which row and which mobility in
//! one number ([`PbFlags::list`]): a free comes from its page to its list by two loads and a shift. Mobilities without
//! lists, and holes, have places there whose lists are full. What of that depends on the page, the next allocation
//! waits for, since it takes what was put last.
//!
//! # Locking
//! As the module above says. Whoever came out of turn would lose blocks; but since a place is looked at before it is passed
//! and ends are only ever places of the list, no access leaves them.

use crate::{
    memmap::MemMap,
    page::Page,
    pageblock::PbFlags,
    types::{MIGRATE_PCPTYPES, MIGRATE_TYPES, MigrateType, PAGEBLOCK_ORDER},
};
use core::{
    ptr, slice,
    sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering::Relaxed},
};

/// Largest of the small orders with lists.
pub(crate) const PCP_MAX_SMALL: u32 = 4;
/// Orders with lists.
pub(crate) const PCP_ORDERS: usize = PCP_MAX_SMALL as usize + 2;

/// Lists in a row.
pub(crate) const ROW: usize = 1 << PbFlags::ROW_SHIFT;
/// Of them, those of a small order: of each mobility one, also of those that have no lists.
const MOBILITIES: usize = MIGRATE_TYPES;

/// The first list of pageblocks in a row, where no pageblock's descriptor leads: behind those of the small orders.
const WHOLE: usize = MOBILITIES * (PCP_MAX_SMALL as usize + 1);
/// Mobilities whose requests for pageblocks have lists. Of the reclaimable there is no room for one, and no use.
const WHOLE_LISTS: usize = 2;
const _: () = assert!(WHOLE + WHOLE_LISTS <= ROW && ROW <= 32);
const _: () = assert!(
    (MigrateType::Unmovable as usize) < WHOLE_LISTS
        && (MigrateType::Movable as usize) < WHOLE_LISTS
);

/// Order and mobility of each list in a row, as numbers.
const KINDS: [(u8, u8); ROW] = {
    let mut kinds = [(0, 0); ROW];
    let mut class = 0;
    while class < PCP_ORDERS {
        let mut mt = 0;
        while mt < MIGRATE_PCPTYPES {
            if let Some(list) = ListId::of(order_of(class), mt) {
                kinds[list.0 as usize] = (class as u8, mt as u8);
            }
            mt += 1;
        }
        class += 1;
    }
    kinds
};

/// The order with a number.
pub(super) const fn order_of(class: usize) -> u32 {
    if class < PCP_ORDERS - 1 { class as u32 } else { PAGEBLOCK_ORDER }
}

/// Names a list: its place in a row, which only this module can break.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct ListId(u8);

impl ListId {
    /// All lists, by order and mobility.
    pub(crate) fn all() -> impl Iterator<Item = ListId> {
        let of = |i| ListId::of(order_of(i / MIGRATE_PCPTYPES), i % MIGRATE_PCPTYPES);
        (0..PCP_ORDERS * MIGRATE_PCPTYPES).filter_map(of)
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
        if order == PAGEBLOCK_ORDER {
            if mt < WHOLE_LISTS { Some(ListId((WHOLE + mt) as u8)) } else { None }
        } else {
            ListId::small(order, mt)
        }
    }

    fn mt(self) -> usize {
        KINDS[usize::from(self.0) % ROW].1.into()
    }

    /// The order of the list's blocks.
    pub(crate) fn order(self) -> u32 {
        order_of(self.class())
    }

    /// The mobility of the list's blocks.
    pub(crate) fn migratetype(self) -> MigrateType {
        MigrateType::ALL[self.mt()]
    }

    pub(super) const fn bit(self) -> u32 {
        1 << self.0
    }

    /// Number of its order.
    pub(crate) fn class(self) -> usize {
        KINDS[usize::from(self.0) % ROW].0.into()
    }
}

/// A place for a block.
type Place = AtomicPtr<Page>;

/// One list: its ends, counts and tuning.
#[repr(C, align(64))]
pub(crate) struct List {
    /// Behind the hottest block.
    top: AtomicPtr<Place>,
    /// Where that may get to: what the list may hold behind the coldest block. Below the top while it holds more, since
    /// that was lowered.
    limit: AtomicPtr<Place>,
    /// Blocks ever taken for an allocation.
    pub(super) allocs: AtomicU64,
    /// Blocks ever put by a free.
    pub(super) frees: AtomicU64,
    /// Number of the coldest block's place.
    first: AtomicU32,
    /// How many blocks it may hold now; 0 switches it off.
    high: AtomicU32,
    /// How many blocks had been taken when it was last looked through for what rests.
    pub(super) looked: AtomicU32,
}

/// As many places as a cache line holds: no two lists share one.
#[repr(C, align(64))]
pub(crate) struct Line([Place; LINE]);

const LINE: usize = 64 / size_of::<Place>();
const _: () = assert!(size_of::<Line>() == LINE * size_of::<Place>());

/// Number of the lowest place that a block may be in.
const BASE: usize = 1;

/// How large the lists of a zone can get, and where they have their places.
#[derive(Clone, Copy)]
pub(crate) struct Room {
    /// Blocks of a list, by order.
    blocks: [u16; PCP_ORDERS],
    /// The first line of an order's lists; then that behind the last.
    at: [u16; PCP_ORDERS + 1],
}

impl Room {
    /// For lists of as many blocks, by order.
    pub(super) fn new(blocks: [u32; PCP_ORDERS]) -> Room {
        let mut room = Room { blocks: blocks.map(|n| n.max(1) as u16), at: [0; PCP_ORDERS + 1] };
        for class in 0..PCP_ORDERS {
            let lines = (room.lines(class) * MIGRATE_PCPTYPES) as u16;
            room.at[class + 1] = room.at[class] + lines;
        }
        room
    }

    /// Lines for all lists of a CPU.
    pub(crate) fn all_lines(&self) -> usize {
        self.at[PCP_ORDERS].into()
    }

    /// Lines of one list.
    fn lines(&self, class: usize) -> usize {
        // The empty place, one for each block, those that are free at the cold end, and one for the limit.
        let blocks = usize::from(self.blocks[class]);
        (BASE + blocks + slack(blocks) + 1).div_ceil(LINE)
    }
}

/// Places that may be free at the cold end of a list that can hold so many.
const fn slack(blocks: usize) -> usize {
    blocks / 2
}

/// A CPU's lists in all zones: a row for holes, and one by zone slot.
#[derive(Clone, Copy)]
pub(crate) struct Rows(&'static [List]);

impl Rows {
    /// Those of a CPU of a machine with as many zones as there are rows behind the first.
    pub(crate) fn new(rows: &'static [[List; ROW]]) -> Rows {
        Rows(rows.as_flattened())
    }

    /// The hot end of the list for a free block in a pageblock, if that may grow.
    ///
    /// # Safety
    /// The pageblock is one of the machine's, in a zone or a hole; the order is a small one.
    #[inline(always)]
    pub(crate) unsafe fn place(self, pb: PbFlags, order: u32) -> Option<HotPlace<'static>> {
        let i = pb.list() + order as usize * MOBILITIES;
        debug_assert!(i < self.0.len());
        // SAFETY: by the contract the number of the row is one of those there are, and what is added to its first list's
        // stays below `WHOLE`, which is in the row: a mobility is below `MOBILITIES`, an order no more than the largest.
        unsafe { self.0.get_unchecked(i) }.place()
    }
}

/// A CPU's lists in a zone, which have their places.
#[derive(Clone, Copy)]
pub(crate) struct Row(&'static [List; ROW]);

impl Row {
    /// Gives lists their places, as many as `room` says, and has them off. All is nobody else's, and zero.
    pub(super) fn new(lists: &'static [List; ROW], lines: &'static [Line], room: &Room) -> Row {
        let row = Row(lists);
        ListId::all().for_each(|list| row.stack(list, lines, room).set_ends(BASE, BASE));
        row
    }

    #[inline(always)]
    pub(super) fn list(self, list: ListId) -> &'static List {
        // SAFETY: a ListId is below ROW: its constructors check, and its field is private.
        unsafe { self.0.get_unchecked(usize::from(list.0)) }
    }

    /// A list with its places, with what `new` was given.
    #[inline]
    pub(super) fn stack(self, list: ListId, lines: &'static [Line], room: &Room) -> Stack {
        let class = list.class();
        let nr = room.lines(class);
        let lines = &lines[usize::from(room.at[class]) + list.mt() * nr..][..nr];
        // SAFETY: a line is as many places, and nothing else.
        let places = unsafe { slice::from_raw_parts(lines.as_ptr().cast(), nr * LINE) };
        Stack { list: self.list(list), places, blocks: room.blocks[class].into() }
    }

    /// Takes the hottest block.
    #[inline(always)]
    pub(crate) fn pop_hot(self, list: ListId) -> Option<&'static Page> {
        let l = self.list(list);
        let below = l.top.load(Relaxed).wrapping_sub(1);
        // SAFETY: `new`, which alone makes rows, gave each list that has an id its places. The top is above the first,
        // which is empty, and stays so since it only goes past a block.
        let page = unsafe { block_at(below) }?;
        l.top.store(below, Relaxed);
        Some(page)
    }

    /// Counts `n` blocks taken for allocations.
    #[inline(always)]
    pub(crate) fn count_allocs(self, list: ListId, n: u64) {
        bump(&self.list(list).allocs, n);
    }

    /// The hot end, to take several blocks from.
    #[inline(always)]
    pub(super) fn hot_blocks(self, list: ListId) -> HotBlocks {
        let l = self.list(list);
        let top = l.top.load(Relaxed);
        HotBlocks { list: l, from: top, top }
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
pub(super) fn bump(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Relaxed).wrapping_add(n), Relaxed);
}

impl List {
    /// The hot end, if the list may grow there.
    #[inline(always)]
    fn place(&self) -> Option<HotPlace<'_>> {
        let top = self.top.load(Relaxed);
        (top < self.limit.load(Relaxed)).then_some(HotPlace { list: self, top })
    }

    /// The hot end, to put several blocks there.
    #[inline(always)]
    pub(super) fn hot_end(&self) -> HotEnd<'_> {
        let top = self.top.load(Relaxed);
        HotEnd { list: self, from: top, top, limit: self.limit.load(Relaxed) }
    }

    /// Puts a block on the hot end if the list may grow; says whether it did.
    #[inline(always)]
    pub(super) fn push_hot(&self, page: &'static Page) -> bool {
        self.place().map(|place| place.put(page)).is_some()
    }

    /// How many blocks it may hold now.
    #[inline(always)]
    pub(super) fn high(&self) -> u32 {
        self.high.load(Relaxed)
    }
}

/// A place at the hot end of a list, good while the caller owns the lists and changes nothing else.
pub(crate) struct HotPlace<'a> {
    list: &'a List,
    top: *mut Place,
}

impl HotPlace<'_> {
    #[inline(always)]
    fn put(self, page: &'static Page) {
        // SAFETY: `List::place` found it below the list's limit, so it is one of the list's places.
        unsafe { &*self.top }.store(ptr::from_ref(page).cast_mut(), Relaxed);
        self.list.top.store(self.top.wrapping_add(1), Relaxed);
    }

    /// Puts a block there that its owner has freed, and counts that.
    #[inline(always)]
    pub(crate) fn put_freed(self, page: &'static Page) {
        bump(&self.list.frees, 1);
        self.put(page);
    }
}

/// Takes blocks off the hot end of a list, good while the caller owns the lists and changes nothing
/// else. What was taken counts once it is dropped.
pub(crate) struct HotBlocks {
    list: &'static List,
    /// Where the top was.
    from: *mut Place,
    top: *mut Place,
}

impl Iterator for HotBlocks {
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

impl Drop for HotBlocks {
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
        if self.top >= self.limit {
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

/// A list with its places, for whatever is not done at its hot end. The ends are numbers of places here.
#[derive(Clone, Copy)]
pub(super) struct Stack {
    list: &'static List,
    places: &'static [Place],
    /// As many as it can hold.
    blocks: usize,
}

impl Stack {
    /// The coldest block's place, and the one behind the hottest block's.
    #[inline]
    fn ends(self) -> (usize, usize) {
        let top = blocks_between(self.place(0), self.list.top.load(Relaxed)).min(self.places.len());
        ((self.list.first.load(Relaxed) as usize).min(top), top)
    }

    /// A place, the last one if there are fewer, as a pointer that reaches the others.
    #[inline]
    fn place(self, n: usize) -> *mut Place {
        self.places.as_ptr().wrapping_add(n.min(self.places.len() - 1)).cast_mut()
    }

    /// Sets both ends, and the limit.
    #[inline]
    fn set_ends(self, first: usize, top: usize) {
        self.places[first - 1].store(ptr::null_mut(), Relaxed);
        self.list.first.store(first as u32, Relaxed);
        self.list.top.store(self.place(top), Relaxed);
        self.set_limit(first);
    }

    /// Sets the limit, after the coldest block or what the list may hold have changed.
    #[inline]
    fn set_limit(self, first: usize) {
        self.list.limit.store(self.place(first + self.list.high() as usize), Relaxed);
    }

    /// Sets how many blocks the list may hold.
    pub(super) fn set_high(self, high: u32) {
        self.list.high.store(high.min(self.blocks as u32), Relaxed);
        self.set_limit(self.ends().0);
    }

    /// Whether both ends are one. Of another CPU's list that is a guess, since they are not looked at in one moment.
    pub(super) fn is_empty(self) -> bool {
        let top = blocks_between(self.place(0), self.list.top.load(Relaxed));
        self.list.first.load(Relaxed) as usize == top
    }

    /// Blocks on the list. Of another CPU's, about as many: the two ends are not looked at in one moment.
    pub(super) fn len(self) -> u32 {
        let (first, top) = self.ends();
        (top - first) as u32
    }

    /// Every block, coldest first.
    pub(super) fn blocks(self) -> impl Iterator<Item = &'static Page> {
        let (first, top) = self.ends();
        // SAFETY: one of the list's places.
        let block = |place: &Place| unsafe { block_at(ptr::from_ref(place).cast_mut()) };
        self.places[first..top].iter().filter_map(block)
    }

    /// Takes the coldest block.
    pub(super) fn pop_cold(self) -> Option<&'static Page> {
        let page = self.blocks().next()?;
        let (first, top) = self.ends();
        self.leave(first + 1, top);
        Some(page)
    }

    /// Takes blocks off the cold end, their frames into `to`, as many as there are; says how many.
    pub(super) fn pop_cold_many(self, map: &MemMap, to: &mut [u32]) -> usize {
        let (first, top) = self.ends();
        let n = to.len().min(top - first);
        for (at, place) in to.iter_mut().zip(&self.places[first..first + n]) {
            *at = map.frame_of(place.load(Relaxed));
        }
        self.leave(first + n, top);
        n
    }

    /// Has the blocks before a place leave. If many have, the others move down.
    #[inline]
    fn leave(self, first: usize, top: usize) {
        if first - BASE <= slack(self.blocks).min(self.list.high() as usize) {
            return self.set_ends(first, top);
        }
        for (to, from) in self.places[BASE..].iter().zip(&self.places[first..top]) {
            to.store(from.load(Relaxed), Relaxed);
        }
        self.set_ends(BASE, BASE + (top - first));
    }

    /// To fill the list, which is empty, with at most `n` blocks, no more than it can hold.
    #[inline(always)]
    pub(super) fn refill(self, n: u32) -> Refill {
        debug_assert_eq!(self.len(), 0);
        let top = BASE + (n as usize).min(self.blocks);
        Refill { stack: self, top, at: top }
    }
}

/// Fills an empty list from its hot end down, good while the caller owns the lists and changes nothing else.
pub(crate) struct Refill {
    stack: Stack,
    /// The place that the top will be at.
    top: usize,
    /// That of the last block.
    at: usize,
}

impl Refill {
    /// Puts blocks below the others, each below the one before.
    #[inline(always)]
    pub(crate) fn put(&mut self, blocks: impl ExactSizeIterator<Item = &'static Page>) {
        let at = self.at - blocks.len();
        assert!(at >= BASE, "more blocks than were asked for");
        for (place, page) in self.stack.places[at..self.at].iter().rev().zip(blocks) {
            place.store(ptr::from_ref(page).cast_mut(), Relaxed);
        }
        self.at = at;
    }
}

impl Drop for Refill {
    #[inline(always)]
    fn drop(&mut self) {
        if self.at != self.top {
            self.stack.leave(self.at, self.top);
        }
    }
}
