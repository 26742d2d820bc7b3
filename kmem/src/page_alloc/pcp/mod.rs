//! Per-CPU page lists: stacks of pages with a hot and a cold end \[P3\].
//!
//! # Concepts
//! Most frees are followed by an allocation of the same order on the same CPU, and the frame is still
//! in its caches. So a freed block goes on the *hot* end of a list of its order and mobility, and an
//! allocation takes it from there; `__GFP_COLD` takes from the *cold* end, which is also where blocks go
//! back to the buddy, a batch at a time.
//!
//! # Implementation
//! Orders 0 to 4 and a pageblock's order have lists, one per mobility (of pageblocks, one for what moves and one for what
//! does not); what they are made of is in [`lists`]. How many blocks a list may hold (`high`) tunes itself:
//! - a refill that follows a spill says that the traffic swings wider than the list, so it grows;
//! - a spill that follows a spill, that somebody only gives: it grows until whole batches leave at once;
//! - where the zone has little above its watermarks, all lists of a CPU are put back to what they had at first;
//! - under pressure it holds half of that, and of large blocks fewer, since what lies on lists then keeps the last large
//!   blocks from being whole; the next refill or spill after that gives it back the rest;
//! - what rests on it is given back from time to time (`vmstat_update`), and it shrinks.
//!
//! What all lists of a CPU may grow by is one sum.
//!
//! # Locking
//! A list is touched by its own CPU only, and only while [`Cpu::path`](crate::context::Cpu::path) says
//! so (the ownership flag): an interrupt that lands in between takes the locked path instead. Interrupts
//! nest strictly, so plain loads and stores suffice. Reports read the counters from anywhere.

mod lists;

pub(crate) use lists::{Line, List, ListId, PCP_MAX_SMALL, ROW, Room, Row, Rows};

use crate::{memmap::MemMap, page::Page, types::MIGRATE_PCPTYPES, zone::Zone};
use core::{
    array,
    sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
};
use lists::{HotBlocks, HotEnd, PCP_ORDERS, Refill, Stack, bump, order_of};

/// What is known of the lists of an order in any zone.
struct Size {
    /// The largest batch.
    batch: u32,
    /// Blocks from which on a list is seldom empty or full while blocks of all orders come and go at random.
    enough: u32,
    /// The longest list: of large blocks fewer are worth keeping.
    longest: u32,
}

const SIZES: [Size; PCP_ORDERS] = [
    Size { batch: 32, enough: 64, longest: 256 },
    Size { batch: 16, enough: 32, longest: 128 },
    Size { batch: 8, enough: 32, longest: 64 },
    Size { batch: 8, enough: 16, longest: 32 },
    Size { batch: 4, enough: 16, longest: 16 },
    Size { batch: 1, enough: 0, longest: 2 },
];

/// What a zone has left, as far as its lists care.
#[derive(Clone, Copy)]
pub(crate) enum Supply {
    /// Somebody found the zone below a watermark.
    Pressed,
    /// Less above the watermarks than half of what all its lists could hold.
    Short,
    Plenty,
}

impl Supply {
    /// Whether lists are to hold no more than they do at first.
    #[inline(always)]
    pub(crate) fn is_little(self) -> bool {
        !matches!(self, Supply::Plenty)
    }
}

/// Limits of a zone's lists, in blocks, by order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// The most that are moved between a list and the buddy at once.
    batch: [u32; PCP_ORDERS],
    min: [u32; PCP_ORDERS],
    max: [u32; PCP_ORDERS],
    /// Frames by which all lists of a CPU together may be longer than their smallest.
    growth: u32,
    /// Frames that all lists of all CPUs can hold.
    all: u64,
}

impl Limits {
    /// Limits for a zone of `managed` frames shared by `cpus` CPUs.
    ///
    /// A sixty-fourth of the zone is dealt out to all lists of all CPUs: what lies on lists cannot merge, and on replayed
    /// kernel traces that is the largest single cause of fragmentation. Half of it goes to order 0, the rest to the other
    /// orders alike; of pageblocks, which few ask for, each list may have all of its CPU's. Where that is less than is
    /// enough, lists may grow to as much as is, as long as all of them hold no more than an eighth of the zone, which is what
    /// Linux's may hold of any. Mostly one or two mobilities are asked for, and their lists may have what the others do not
    /// use. Lists begin with an eighth of what is enough, or that halved as often as it takes to leave half of all for those
    /// that grow; where there is nothing left of it, the list is off.
    pub(crate) fn for_zone(managed: u64, cpus: usize) -> Limits {
        let cpus = cpus.max(1) as u64;
        let (share, most) = (share(managed / 64 / cpus), managed / 8 / cpus);
        let begin =
            |shift: u32| array::from_fn(|o| share[o].max((SIZES[o].enough >> shift).div_ceil(8)));
        let fits = |min: &[u32; PCP_ORDERS]| frames_of(*min) <= most / 2;
        let min = (0..u32::BITS).map(begin).find(fits).unwrap_or_default();
        let max: [u32; PCP_ORDERS] =
            array::from_fn(|o| if min[o] == 0 { 0 } else { share[o].max(SIZES[o].enough) });
        let batch = array::from_fn(|o| SIZES[o].batch.min(max[o] / 2).max(1));
        let min = array::from_fn(|o| min[o].min(2 * batch[o]));
        let most = frames_of(max).min(most);
        Limits { batch, min, max, growth: (most - frames_of(min)) as u32, all: most * cpus }
    }

    /// What a zone with these limits has left.
    #[inline]
    pub(crate) fn supply(&self, zone: &Zone) -> Supply {
        match zone.pressed.load(Relaxed) {
            0 if zone.free_frames() >= zone.high_mark() + self.all / 2 => Supply::Plenty,
            0 => Supply::Short,
            _ => Supply::Pressed,
        }
    }

    /// What a list of an order may hold under pressure: half of its smallest, and of large blocks fewer. One that is on
    /// stays on.
    fn pressed(&self, class: usize) -> u32 {
        let min = self.min[class];
        (min.div_ceil(2) >> class).max(min.min(1))
    }
}

/// Blocks that each list may hold, by order, where a CPU's all together may hold so many frames.
fn share(frames: u64) -> [u32; PCP_ORDERS] {
    array::from_fn(|o| {
        let share = match o {
            0 => frames / 2 / MIGRATE_PCPTYPES as u64,
            // One mobility at a time asks for pageblocks, so a list may have the whole share.
            _ if o == PCP_ORDERS - 1 => frames,
            _ => frames / 2 / (PCP_ORDERS as u64 - 1) / MIGRATE_PCPTYPES as u64,
        };
        (share >> order_of(o)).min(u64::from(SIZES[o].longest)) as u32
    })
}

/// Frames on a CPU's lists, if they hold so many blocks by order.
fn frames_of(blocks: [u32; PCP_ORDERS]) -> u64 {
    ListId::all().map(|list| u64::from(blocks[list.class()]) << list.order()).sum()
}

// `Room` numbers lines and blocks in 16 bits.
const _: () = assert!(SIZES[0].longest * (PCP_ORDERS * MIGRATE_PCPTYPES) as u32 <= u16::MAX as u32);

/// The room that the lists of a zone need of which no more than `frames` frames will be managed.
pub(crate) fn room_for(frames: u64, cpus: usize) -> Room {
    Room::new(Limits::for_zone(frames, cpus).max)
}

/// The lists of one CPU in one zone.
#[repr(C, align(64))]
pub(crate) struct Pcp {
    row: Row,
    lines: &'static [Line],
    room: Room,
    /// Lists, by bit, of which blocks were spilled since the last refill.
    spilled: AtomicU32,
    /// The zone's area that the CPU takes from as long as it has something.
    home: AtomicU32,
    /// The area that had something last: where it looks first until blocks were spilled.
    last: AtomicU32,
    /// Frames by which the lists together may be longer than their smallest.
    grown: AtomicU32,
    /// Blocks that the fast paths took straight from the buddy.
    direct: AtomicU64,
}

impl Pcp {
    /// Lists that are off, made of a CPU's row for a zone and of as many lines as `room` says, which are nobody else's and
    /// zero.
    pub(crate) fn new(lists: &'static [List; ROW], lines: &'static [Line], room: Room) -> Pcp {
        let zero = || AtomicU32::new(0);
        let (row, direct) = (Row::new(lists, lines, &room), AtomicU64::new(0));
        let [spilled, home, last, grown] = array::from_fn(|_| zero());
        Pcp { row, lines, room, spilled, home, last, grown, direct }
    }

    /// What the fast paths use.
    pub(crate) fn row(&self) -> Row {
        self.row
    }

    #[inline(always)]
    fn list(&self, list: ListId) -> &'static List {
        self.row.list(list)
    }

    #[inline]
    fn stack(&self, list: ListId) -> Stack {
        self.row.stack(list, self.lines, &self.room)
    }

    /// Blocks on the list.
    pub(crate) fn len(&self, list: ListId) -> u32 {
        self.stack(list).len()
    }

    /// Takes the hottest block.
    #[inline(always)]
    pub(crate) fn pop_hot(&self, list: ListId) -> Option<&'static Page> {
        self.row.pop_hot(list)
    }

    /// Takes the coldest block.
    pub(crate) fn pop_cold(&self, list: ListId) -> Option<&'static Page> {
        self.stack(list).pop_cold()
    }

    /// Takes blocks off the cold end, their frames into `to`, as many as there are; says how many.
    pub(crate) fn pop_cold_many(&self, list: ListId, map: &MemMap, to: &mut [u32]) -> usize {
        self.stack(list).pop_cold_many(map, to)
    }

    /// The hot end, to take several blocks from.
    #[inline(always)]
    pub(crate) fn hot_blocks(&self, list: ListId) -> HotBlocks {
        self.row.hot_blocks(list)
    }

    /// The hot end, to put several blocks there.
    #[inline(always)]
    pub(crate) fn hot_end(&self, list: ListId) -> HotEnd<'static> {
        self.list(list).hot_end()
    }

    /// Puts a block on the hot end if the list may grow; says whether it did.
    #[inline(always)]
    pub(crate) fn push_hot(&self, list: ListId, page: &'static Page) -> bool {
        self.list(list).push_hot(page)
    }

    /// To fill a list, which is empty, with at most `n` blocks, no more than it can hold.
    #[inline(always)]
    pub(crate) fn refill(&self, list: ListId, n: u32) -> Refill {
        self.stack(list).refill(n)
    }

    /// Counts `n` blocks taken for allocations.
    #[inline(always)]
    pub(crate) fn count_allocs(&self, list: ListId, n: u64) {
        self.row.count_allocs(list, n);
    }

    /// Blocks that lie on a list for no use, more than were taken off it since this was asked last; and how many were.
    pub(crate) fn resting(&self, list: ListId) -> (u32, u32) {
        let l = self.list(list);
        let now = l.allocs.load(Relaxed) as u32;
        let taken = now.wrapping_sub(l.looked.swap(now, Relaxed));
        (self.len(list).saturating_sub(taken), taken)
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

    /// Notes in which area something was found, and which was asked first: from that one on those before it have nothing, and
    /// are not asked again soon.
    #[inline(always)]
    pub(crate) fn note_area(&self, first: usize, found: usize) {
        if found != first {
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
        self.list(list).high()
    }

    /// Sets every list to its smallest size.
    pub(crate) fn reset_high(&self, limits: &Limits) {
        for i in ListId::all() {
            self.set_high(i, limits, limits.min[i.class()]);
        }
    }

    #[inline]
    fn set_high(&self, list: ListId, limits: &Limits, to: u32) {
        let (min, now) = (limits.min[list.class()], self.high(list));
        if to != now {
            let grown = |high: u32| high.saturating_sub(min) << list.order();
            let all = self.grown.load(Relaxed) + grown(to) - grown(now);
            self.grown.store(all, Relaxed);
            self.stack(list).set_high(to);
            // Limits do not shrink with more frames, and the room is for no fewer than are managed.
            debug_assert_eq!(self.high(list), to, "there is room for so many");
        }
    }

    /// Has a list hold no more than `to` blocks, and says how many are too many.
    fn shorten(&self, list: ListId, limits: &Limits, to: u32) -> u32 {
        self.set_high(list, limits, to);
        self.len(list).saturating_sub(to)
    }

    /// Blocks by which a list may grow.
    fn growth(&self, list: ListId, limits: &Limits) -> u32 {
        limits.growth.saturating_sub(self.grown.load(Relaxed)) >> list.order()
    }

    /// Blocks to move between the list and the buddy at once: half of what it may hold, but no more than a batch.
    pub(crate) fn batch(&self, list: ListId, limits: &Limits) -> u32 {
        limits.batch[list.class()].min(self.high(list) / 2).max(1)
    }

    /// Notes that the list ran empty; it grows if it ran over since it did last: traffic swings wider than it is long. Says
    /// whether other lists are to give something back: see `PageAllocator::settle`.
    pub(crate) fn note_refill(&self, list: ListId, limits: &Limits, supply: Supply) -> bool {
        let spilled = self.spilled.load(Relaxed);
        self.spilled.store(spilled & !list.bit(), Relaxed);
        let more = if spilled & list.bit() != 0 { self.batch(list, limits) } else { 0 };
        self.adapt(list, limits, supply, more, limits.max[list.class()])
    }

    /// Notes that the list ran over. It grows if it did not run empty since it did last, until whole batches leave: beyond
    /// that a longer one is of no use to who only gives. Says what `note_refill` does.
    pub(crate) fn note_spill(&self, list: ListId, limits: &Limits, supply: Supply) -> bool {
        let spilled = self.spilled.load(Relaxed);
        self.spilled.store(spilled | list.bit(), Relaxed);
        self.last.store(self.home.load(Relaxed), Relaxed);
        let (o, again) = (list.class(), spilled & list.bit() != 0);
        let more = if again { self.batch(list, limits) } else { 0 };
        self.adapt(list, limits, supply, more, limits.max[o].min(2 * limits.batch[o]))
    }

    /// Notes that all was taken off the list.
    pub(crate) fn note_drain(&self, list: ListId, limits: &Limits, supply: Supply) {
        let _ = self.adapt(list, limits, supply, 0, 0);
    }

    /// Lets a list hold `more` blocks, up to `most`, and what pressure took from it, if the zone has plenty; else takes off
    /// what it has too little for. Says whether other lists are to give something back, since they have left it less to grow by
    /// than that, or since they are longer than the zone has enough for.
    #[inline]
    fn adapt(&self, list: ListId, limits: &Limits, supply: Supply, more: u32, most: u32) -> bool {
        let (o, high) = (list.class(), self.high(list));
        let wanted = match supply {
            Supply::Plenty => (high + more).min(most).max(high).max(limits.min[o]),
            Supply::Short => high.min(limits.min[o]),
            Supply::Pressed => limits.pressed(o),
        };
        let to = match more {
            0 => wanted,
            _ => wanted.min((high + self.growth(list, limits)).max(limits.min[o])),
        };
        self.set_high(list, limits, to);
        if supply.is_little() { self.has_grown() } else { to < wanted }
    }

    /// Has the list that has grown most, if that is by a batch of its own more than `list` has, hold a batch less. Returns
    /// that list and how many of its blocks are too many.
    pub(crate) fn make_room(&self, list: ListId, limits: &Limits) -> Option<(ListId, u32)> {
        let grown = |l: ListId| self.high(l).saturating_sub(limits.min[l.class()]) << l.order();
        let longest = ListId::all().max_by_key(|l| grown(*l))?;
        let batch = self.batch(longest, limits);
        if grown(longest) < grown(list) + (batch << longest.order()) {
            return None;
        }
        let to = (self.high(longest) - batch).max(limits.min[longest.class()]);
        Some((longest, self.shorten(longest, limits, to)))
    }

    /// Notes how many blocks were taken off the list: if it may hold a batch more than that, it shrinks by a batch.
    pub(crate) fn note_rest(&self, list: ListId, limits: &Limits, taken: u32) {
        let (min, high) = (limits.min[list.class()], self.high(list));
        let batch = self.batch(list, limits);
        if high > min && high.saturating_sub(taken) >= batch {
            self.set_high(list, limits, (high - batch).max(min));
        }
    }

    /// Whether any list is longer than its smallest.
    fn has_grown(&self) -> bool {
        self.grown.load(Relaxed) > 0
    }

    /// Whether housekeeping finds anything to do. Of another CPU's, about so.
    pub(crate) fn wants_housekeeping(&self) -> bool {
        self.has_grown() || !self.is_empty()
    }

    /// Puts a list back to its smallest if it is longer, and says how many blocks are too many.
    pub(crate) fn put_back(&self, list: ListId, limits: &Limits) -> u32 {
        let min = limits.min[list.class()];
        if self.high(list) > min { self.shorten(list, limits, min) } else { 0 }
    }

    /// Whether nothing is on any list; see [`Stack::is_empty`].
    pub(crate) fn is_empty(&self) -> bool {
        ListId::all().all(|list| self.stack(list).is_empty())
    }

    /// Frames on all lists. Of another CPU's, about as many.
    pub(crate) fn frames(&self) -> u64 {
        ListId::all().map(|i| u64::from(self.len(i)) << i.order()).sum()
    }

    /// Every block on the lists, coldest first. For audits, while the CPU is quiet.
    pub(crate) fn blocks(&self) -> impl Iterator<Item = (ListId, &'static Page)> + '_ {
        ListId::all().flat_map(|list| self.stack(list).blocks().map(move |page| (list, page)))
    }
}
