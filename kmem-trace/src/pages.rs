//! The page events of a recording, with compaction explained.
//!
//! # Concepts
//!
//! A page allocator under replay is asked for blocks and given blocks back; ids tie the two together. Most page rows
//! are just that. Three need context, which [`PageEvents`] keeps as it walks the rows:
//!
//! *Blocks from before the recording.* A free without an id, of frames no row has touched yet, frees a block that was
//! in use when the recording began: [`PageOp::FreePrior`]. The start state has it in use at that very pfn.
//!
//! *Compaction.* Linux moves pages out of the way to make room for large blocks. It takes free frames off the free
//! lists silently, hands them to the pages it moves ([`Kind::CompactionAlloc`]), and frees the frame each page left.
//! To the allocator's users nothing happened: the memory they hold merely lies elsewhere. So none of it is an
//! allocation or a free here. The frames taken stay in the pool, and the free of a vacated frame becomes
//! [`PageOp::Migrate`]: the block known by one id is known by another from now on. Which free belongs to which taken
//! frame is found by order: a compacting task takes a batch of frames, then vacates one for each that it will not
//! put back ([`Kind::CompactionFree`]), in the same order and on the same CPU, and [`PageEvents`] follows it when it is
//! moved to another. (A page may be freed in its new frame before its old one is: then the free of the new frame asks
//! for nothing, and that of the old one frees the block.) Frames put back, and isolated ones released to the free
//! lists at the end, are [`PageOp::Compaction`], which asks for nothing.
//!
//! *Events that make no sense.* A free of something that is not live is [`PageOp::Nonsense`], to be counted and
//! listed, not acted upon.
//!
//! Rows of blocks that belong to the slab layer are not left out, only marked
//! ([`PageEvent::belongs_to_slab_layer`]): a replay of the page allocator alone wants all of them, one with a slab
//! layer of its own must skip the marked ones.

use std::collections::VecDeque;

use rustc_hash::{FxHashMap, FxHashSet};

use crate::recording::Recording;
use crate::row::{Id, Kind, Row};

/// Why an event makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Nonsense {
    /// The block freed or split is not live: never allocated, or freed already.
    NotLive,
    /// The id is live, but its block begins elsewhere or has another order.
    OtherBlock,
    /// A free without an id overlaps a live block.
    OverlapsLive,
}

/// What a page event asks of the allocator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageOp {
    /// Allocate a block, known as `id` from here on.
    Alloc {
        /// Its id.
        id: Id,
    },
    /// Free the live block `id`.
    Free {
        /// Its id.
        id: Id,
    },
    /// Free the live block `id`, which no row frees: the next event allocates its frames again, so its free is missing
    /// from the recording. Count it among the events that make no sense.
    Vanished {
        /// Its id.
        id: Id,
    },
    /// Free a block allocated before the recording, at its pfn.
    FreePrior,
    /// The live block `id` becomes two halves, `first` at its first frame and `second` at its middle.
    Split {
        /// The block that ends.
        id: Id,
        /// The lower half.
        first: Id,
        /// The upper half.
        second: Id,
    },
    /// Compaction moved the block at the event's pfn: it is known as `to` from here on. Nothing is allocated or freed.
    Migrate {
        /// The id it had, or `None`: it was allocated before the recording.
        from: Option<Id>,
        /// The id it has now.
        to: Id,
        /// The frame it lies in now, on the recorded machine.
        to_pfn: u64,
    },
    /// Compaction takes, returns or releases frames it holds isolated: nothing to do.
    Compaction,
    /// An event that makes no sense: count it, list it, do nothing.
    Nonsense(Nonsense),
}

/// One event of the page allocator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageEvent {
    /// Index of the row in [`Recording::rows`].
    pub row: usize,
    /// Nanoseconds since the recording began; may run backwards.
    pub time_ns: u64,
    /// The CPU it happened on.
    pub cpu: u16,
    /// The block's first frame on the recorded machine.
    pub pfn: u64,
    /// log2 of its frames.
    pub order: u8,
    /// Mobility type, by Linux's number.
    pub migratetype: u8,
    /// The request's gfp mask in Linux 6.12 bits; 0 for frees.
    pub gfp: u32,
    /// The block is a slab or a large `kmalloc`'s: skip the event if the replay has its own slab layer.
    pub belongs_to_slab_layer: bool,
    /// What it asks for.
    pub op: PageOp,
}

impl Recording {
    /// The page events, in order.
    pub fn page_events(&self) -> PageEvents<'_> {
        let put_back = self.rows.iter().filter(|row| row.kind == Kind::CompactionFree);
        let state =
            State { put_back: put_back.filter_map(|row| row.id).collect(), ..State::default() };
        PageEvents { rows: &self.rows, next: 0, state, ready: VecDeque::new() }
    }
}

/// Iterator over the page events of a recording: see [`Recording::page_events`].
pub struct PageEvents<'a> {
    rows: &'a [Row],
    next: usize,
    state: State,
    /// Events a row gave rise to that have not been returned yet.
    ready: VecDeque<PageEvent>,
}

impl Iterator for PageEvents<'_> {
    type Item = PageEvent;

    fn next(&mut self) -> Option<PageEvent> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            let index = self.next;
            let row = self.rows.get(index)?;
            self.next += 1;
            let event = |op| PageEvent {
                row: index,
                time_ns: row.time_ns,
                cpu: row.cpu,
                pfn: row.address,
                order: row.order,
                migratetype: row.migratetype,
                gfp: row.gfp,
                belongs_to_slab_layer: row.belongs_to_slab_layer(),
                op,
            };
            let op = match row.kind {
                Kind::PageAlloc | Kind::PageBulkAlloc => {
                    for (id, pfn, order) in self.state.vanish(row) {
                        self.ready.push_back(PageEvent {
                            pfn,
                            order,
                            ..event(PageOp::Vanished { id })
                        });
                    }
                    self.state.alloc(row)
                }
                Kind::PageFree => self.state.free(row),
                Kind::Split => self.state.split(row),
                Kind::CompactionAlloc => {
                    let op = self.state.take(row);
                    self.follow(row.cpu);
                    op
                }
                Kind::CompactionFree => {
                    let op = self.state.put_back(row);
                    self.follow(row.cpu);
                    op
                }
                Kind::CompactionBegin => {
                    self.state.compactions += 1;
                    continue;
                }
                Kind::CompactionEnd => {
                    self.state.compactions = self.state.compactions.saturating_sub(1);
                    self.state.taken.remove(&row.cpu);
                    continue;
                }
                _ => continue,
            };
            self.ready.push_back(event(op));
        }
    }
}

impl PageEvents<'_> {
    /// A compacting task may be moved to another CPU between two of its rows. While it is the only one, it is found
    /// again by its next row, and the frames it vacates until then are looked for there.
    fn follow(&mut self, cpu: u16) {
        let own = |row: &&Row| {
            matches!(
                row.kind,
                Kind::CompactionAlloc
                    | Kind::CompactionFree
                    | Kind::CompactionBegin
                    | Kind::CompactionEnd
            )
        };
        let next = self.rows[self.next..].iter().find(own);
        if let Some(next) =
            next.filter(|next| next.kind != Kind::CompactionBegin && next.cpu != cpu)
            && self.state.compactions <= 1
            && let Some(mut taken) = self.state.taken.remove(&cpu)
        {
            self.state.taken.entry(next.cpu).or_default().append(&mut taken);
        }
    }
}

/// What the rows so far say about a frame; frames they do not mention are absent from the map.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Frame {
    Live(Id),
    Free,
}

/// A free frame that compaction took for a page on the move.
struct Taken {
    id: Id,
    pfn: u64,
    order: u8,
    /// The page has moved in and has been freed there, before the frame it left was.
    freed: bool,
}

#[derive(Default)]
struct State {
    frames: FxHashMap<u64, Frame>,
    /// First frame and order of each live block.
    blocks: FxHashMap<Id, (u64, u8)>,
    /// Frames compaction took for pages on the move and that no move has accounted for yet, by CPU.
    taken: FxHashMap<u16, VecDeque<Taken>>,
    /// Ids compaction gave whose move was not found.
    unmoved: FxHashSet<Id>,
    /// Ids of the taken frames that come back unused, at any later row.
    put_back: FxHashSet<Id>,
    /// Compactions under way.
    compactions: u32,
}

impl State {
    fn frames_of(pfn: u64, order: u8) -> impl Iterator<Item = u64> {
        pfn..pfn.saturating_add(1 << order.min(63))
    }

    fn mark(&mut self, pfn: u64, order: u8, as_what: Frame) {
        for frame in Self::frames_of(pfn, order) {
            self.frames.insert(frame, as_what);
        }
    }

    fn begin(&mut self, id: Id, pfn: u64, order: u8) {
        self.mark(pfn, order, Frame::Live(id));
        self.blocks.insert(id, (pfn, order));
    }

    fn alloc(&mut self, row: &Row) -> PageOp {
        let Some(id) = row.id else {
            return PageOp::Nonsense(Nonsense::NotLive);
        };
        self.begin(id, row.address, row.order);
        PageOp::Alloc { id }
    }

    /// Ends the live blocks at the frames `row` allocates.
    fn vanish(&mut self, row: &Row) -> Vec<(Id, u64, u8)> {
        let mut vanished = Vec::new();
        for frame in Self::frames_of(row.address, row.order) {
            if let Some(Frame::Live(id)) = self.frames.get(&frame).copied()
                && let Some((pfn, order)) = self.blocks.remove(&id)
            {
                self.mark(pfn, order, Frame::Free);
                vanished.push((id, pfn, order));
            }
        }
        vanished
    }

    fn free(&mut self, row: &Row) -> PageOp {
        let (pfn, order) = (row.address, row.order);
        match row.id {
            Some(id) => match self.blocks.get(&id).copied() {
                Some(block) if block == (pfn, order) => {
                    self.blocks.remove(&id);
                    self.mark(pfn, order, Frame::Free);
                    self.vacated(row).unwrap_or(PageOp::Free { id })
                }
                Some(_) => PageOp::Nonsense(Nonsense::OtherBlock),
                None if self.unmoved.remove(&id) => {
                    self.mark(pfn, order, Frame::Free);
                    let taken = self.taken.values_mut().flatten().find(|taken| taken.id == id);
                    taken.into_iter().for_each(|taken| taken.freed = true);
                    PageOp::Compaction
                }
                None => PageOp::Nonsense(Nonsense::NotLive),
            },
            None => {
                let known = |frame: u64| self.frames.get(&frame);
                if Self::frames_of(pfn, order).all(|frame| known(frame).is_none()) {
                    self.mark(pfn, order, Frame::Free);
                    return self.vacated(row).unwrap_or(PageOp::FreePrior);
                }
                if Self::frames_of(pfn, order)
                    .any(|frame| matches!(known(frame), Some(Frame::Live(_))))
                {
                    return PageOp::Nonsense(Nonsense::OverlapsLive);
                }
                self.mark(pfn, order, Frame::Free);
                if self.compactions > 0 {
                    PageOp::Compaction
                } else {
                    PageOp::Nonsense(Nonsense::NotLive)
                }
            }
        }
    }

    /// Whether this free is of a frame whose page has moved into one that compaction took, and lives on there.
    fn vacated(&mut self, row: &Row) -> Option<PageOp> {
        if row.belongs_to_slab_layer() {
            return None;
        }
        let taken = self.taken.get_mut(&row.cpu)?;
        if taken.front()?.order != row.order {
            return None;
        }
        let taken = taken.pop_front().filter(|taken| !taken.freed)?;
        self.unmoved.remove(&taken.id);
        self.begin(taken.id, taken.pfn, taken.order);
        Some(PageOp::Migrate { from: row.id, to: taken.id, to_pfn: taken.pfn })
    }

    fn split(&mut self, row: &Row) -> PageOp {
        let (Some(id), Some((first, second))) = (row.id, row.children()) else {
            return PageOp::Nonsense(Nonsense::NotLive);
        };
        match self.blocks.get(&id).copied() {
            Some((pfn, order)) if pfn == row.address && order == row.order && order > 0 => {
                self.blocks.remove(&id);
                self.begin(first, pfn, order - 1);
                self.begin(second, pfn + (1 << (order - 1)), order - 1);
                PageOp::Split { id, first, second }
            }
            Some(_) => PageOp::Nonsense(Nonsense::OtherBlock),
            None => PageOp::Nonsense(Nonsense::NotLive),
        }
    }

    fn take(&mut self, row: &Row) -> PageOp {
        self.mark(row.address, row.order, Frame::Free);
        if let Some(id) = row.id.filter(|id| !self.put_back.contains(id)) {
            let taken = Taken { id, pfn: row.address, order: row.order, freed: false };
            self.taken.entry(row.cpu).or_default().push_back(taken);
            self.unmoved.insert(id);
        }
        PageOp::Compaction
    }

    fn put_back(&mut self, row: &Row) -> PageOp {
        self.mark(row.address, row.order, Frame::Free);
        PageOp::Compaction
    }
}
