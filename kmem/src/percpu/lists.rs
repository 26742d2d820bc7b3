//! The chunks of a shard, by their longest free run.
//!
//! # Implementation
//! A list for each power of two, and one for chunks of which nothing is live. A request looks at a few chunks
//! of each class from its own on; where a search is in vain, the chunk goes to the class that it is truly of.
//! A chunk of which the only object comes and goes stays with the empty ones; the second object takes it from there.

use super::chunk::{Bad, GRANULE, MAX_UNIT, Room};
use core::{cell::Cell, ptr::NonNull};

/// Classes of longest runs: none, 1, 2 to 3, 4 to 7, …; and the empty ones.
const CLASSES: usize = EMPTY + 1;
const EMPTY: usize = (MAX_UNIT / GRANULE).ilog2() as usize + 2;
/// Chunks of one class that a request looks at.
const TRIES: usize = 4;

/// A chunk: a unit for each CPU.
pub(crate) struct Chunk {
    /// Where CPU 0's unit is.
    pub(super) base: usize,
    room: Room,
    class: Cell<usize>,
    next: Cell<Option<ChunkRef>>,
    prev: Cell<Option<ChunkRef>>,
}

impl Chunk {
    pub(super) const fn new(base: usize, granules: u32) -> Chunk {
        Chunk {
            base,
            room: Room::new(granules),
            class: Cell::new(0),
            next: Cell::new(None),
            prev: Cell::new(None),
        }
    }
}

/// Names a chunk.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct ChunkRef(NonNull<Chunk>);

// SAFETY: a name; the chunk is looked at with the lists at hand, which one thread has at a time.
unsafe impl Send for ChunkRef {}

impl ChunkRef {
    /// # Safety
    /// There is a chunk, and it stays until it was [taken out](Lists::take_empty) of its lists.
    pub(super) const unsafe fn new(at: NonNull<Chunk>) -> ChunkRef {
        ChunkRef(at)
    }

    pub(super) const fn at(self) -> NonNull<Chunk> {
        self.0
    }
}

/// The chunks of a shard.
pub(super) struct Lists {
    heads: [Option<ChunkRef>; CLASSES],
    /// Classes that have chunks.
    present: u32,
    /// Never goes: the machine's first.
    first: Option<ChunkRef>,
    /// Where something was freed last, and where that chunk is.
    recent: Option<(usize, ChunkRef)>,
    /// Granules free in all.
    free: u64,
    chunks: u32,
}

impl Lists {
    pub(super) const fn new() -> Lists {
        Lists { heads: [None; CLASSES], present: 0, first: None, recent: None, free: 0, chunks: 0 }
    }

    fn chunk(&self, at: ChunkRef) -> &Chunk {
        // SAFETY: by `ChunkRef::new` it is there as long as it is on these lists, which is as long as anybody has
        // its name; and only who has the lists looks at it.
        unsafe { at.0.as_ref() }
    }

    pub(super) fn free_granules(&self) -> u64 {
        self.free
    }

    pub(super) fn chunks(&self) -> u32 {
        self.chunks
    }

    /// Adds a chunk of which nothing is live.
    pub(super) fn add(&mut self, at: ChunkRef) {
        self.free += u64::from(self.chunk(at).room.free_granules());
        self.chunks += 1;
        self.link(at);
    }

    /// Adds the chunk that never goes.
    pub(super) fn add_first(&mut self, at: ChunkRef) {
        self.first = Some(at);
        self.add(at);
    }

    fn class_of(longest: u32) -> usize {
        (u32::BITS - longest.leading_zeros()) as usize
    }

    fn class(&self, at: ChunkRef) -> usize {
        let room = &self.chunk(at).room;
        if room.is_empty() && self.first != Some(at) {
            return EMPTY;
        }
        Self::class_of(room.largest())
    }

    fn link(&mut self, at: ChunkRef) {
        let chunk = self.chunk(at);
        let class = self.class(at);
        chunk.class.set(class);
        let head = self.heads[class];
        chunk.prev.set(None);
        chunk.next.set(head);
        if let Some(head) = head {
            self.chunk(head).prev.set(Some(at));
        }
        self.heads[class] = Some(at);
        self.present |= 1 << class;
    }

    fn unlink(&mut self, at: ChunkRef) {
        let chunk = self.chunk(at);
        let (class, next, prev) = (chunk.class.get(), chunk.next.get(), chunk.prev.get());
        if let Some(next) = next {
            self.chunk(next).prev.set(prev);
        }
        match prev {
            Some(prev) => self.chunk(prev).next.set(next),
            None => {
                self.heads[class] = next;
                if next.is_none() {
                    self.present &= !(1 << class);
                }
            }
        }
    }

    /// Puts a chunk on the list of its class.
    #[cold]
    #[inline(never)]
    fn sort(&mut self, at: ChunkRef) {
        if self.class(at) != self.chunk(at).class.get() {
            self.unlink(at);
            self.link(at);
        }
    }

    /// Takes `n` granules at a multiple of 2^`align`; returns where they are in CPU 0's unit.
    #[inline(always)]
    pub(super) fn alloc(&mut self, n: u32, align: u32) -> Option<usize> {
        let mut classes = self.present >> Self::class_of(n) << Self::class_of(n);
        while classes != 0 {
            let class = classes.trailing_zeros() as usize;
            classes &= classes - 1;
            let mut at = self.heads[class];
            for _ in 0..TRIES {
                let Some(this) = at else { break };
                let chunk = self.chunk(this);
                at = chunk.next.get();
                let empty = chunk.room.is_empty();
                let found = chunk.room.alloc(n, align).map(|g| chunk.base + g as usize * GRANULE);
                // Its class is the same unless the search in vain has made it exact, or it is in use by now.
                if found.is_none() || class == EMPTY && !empty {
                    self.sort(this);
                }
                if found.is_some() {
                    self.free -= u64::from(n);
                    return found;
                }
            }
        }
        None
    }

    /// Frees what begins at an offset in a chunk's units; returns its length in bytes.
    #[inline(always)]
    pub(super) fn free(&mut self, at: ChunkRef, offset: usize) -> Result<usize, Bad> {
        if !offset.is_multiple_of(GRANULE) {
            return Err(Bad::Inside);
        }
        let chunk = self.chunk(at);
        let before = chunk.room.largest();
        let n = chunk.room.free(u32::try_from(offset / GRANULE).map_err(|_| Bad::Free)?)?;
        let elsewhere =
            chunk.room.largest() != before || chunk.room.is_empty() && chunk.class.get() != EMPTY;
        self.free += u64::from(n);
        if elsewhere {
            self.sort(at);
        }
        Ok(n as usize * GRANULE)
    }

    /// Takes a chunk with nothing live out, if there is one and `reserve` granules are free without it.
    #[inline(always)]
    pub(super) fn take_empty(&mut self, reserve: u64) -> Option<ChunkRef> {
        let at = loop {
            let at = self.heads[EMPTY]?;
            let room = &self.chunk(at).room;
            let left = self.free - u64::from(room.free_granules());
            if left < reserve {
                return None;
            }
            if room.is_empty() {
                self.free = left;
                break at;
            }
            self.sort(at);
        };
        self.unlink(at);
        if self.recent.is_some_and(|(_, recent)| recent == at) {
            self.recent = None;
        }
        self.chunks -= 1;
        Some(at)
    }

    /// The chunk that never goes.
    pub(super) fn first(&self) -> Option<ChunkRef> {
        self.first
    }

    /// The chunk that something was freed in last, and where it begins.
    #[inline(always)]
    pub(super) fn recent(&self) -> Option<(usize, ChunkRef)> {
        self.recent
    }

    /// Notes that something is freed in a chunk.
    pub(super) fn note_recent(&mut self, at: ChunkRef) {
        self.recent = Some((self.base(at), at));
    }

    /// Where a chunk begins.
    pub(super) fn base(&self, at: ChunkRef) -> usize {
        self.chunk(at).base
    }
}
