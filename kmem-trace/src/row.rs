//! One event.
//!
//! A recording is a list of rows in the order in which they happened. That order is the truth: the clocks of two CPUs
//! may disagree by milliseconds, so a row's time may lie before that of the row above it. Allocations number
//! themselves densely in row order, whatever they allocate; a free names the allocation it ends, or nothing when the
//! memory was allocated before the recording began. A row is the same for every kind of event, so that a recording
//! is one flat array; what `address` and `bytes_requested` hold depends on the kind and is told there.
//!
//! **Compaction.** Linux takes free frames out of its free lists without an allocation event and keeps them
//! privately ("isolated"). [`Kind::CompactionAlloc`] hands one of them to a page that is being moved,
//! [`Kind::CompactionFree`] takes it back when the move failed, and what is left over is freed to the lists again,
//! which shows as a [`Kind::PageFree`] with no id. None of this is an allocation anybody asked for. How a replay
//! treats it is settled in [`crate::pages`].
//!
//! **Splits.** [`Kind::Split`] ends one live block and begins two, each half its order, the first at the block's
//! first frame, the second at its middle. Both count as live from there on, and each is freed under its own id.

/// Number given to an allocation by its position among the allocations of a recording, from 0.
pub type Id = u32;

/// What happened. The discriminants are those of the `KMT1` row form.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Kind {
    /// `kmalloc`: `address` is the object's virtual address.
    Kmalloc = 1,
    /// `kfree` of an object from `kmalloc`.
    Kfree = 2,
    /// `kmem_cache_alloc`: `address` is the object's virtual address.
    CacheAlloc = 3,
    /// `kmem_cache_free`.
    CacheFree = 4,
    /// A block of 2^order frames allocated; `address` is its first pfn, `bytes_requested` the stack's id.
    PageAlloc = 5,
    /// A block freed; with no id it was allocated before the recording, or held by compaction.
    PageFree = 6,
    /// Per-CPU memory allocated; `order` is log2 of the alignment, `address` the low 32 bits of the address.
    PerCpuAlloc = 11,
    /// Per-CPU memory freed.
    PerCpuFree = 12,
    /// A range of the vmap area taken; `order` is log2 of the alignment, `address` its virtual address.
    VmapAlloc = 13,
    /// A range of the vmap area given back.
    VmapFree = 14,
    /// One object of `kmem_cache_alloc_bulk`.
    BulkAlloc = 15,
    /// One object of `kmem_cache_free_bulk`.
    BulkFree = 16,
    /// One frame of a bulk page allocation.
    PageBulkAlloc = 17,
    /// Compaction hands an isolated free frame to a page on the move. Carries an id, but is no allocation.
    CompactionAlloc = 20,
    /// Compaction takes such a frame back unused.
    CompactionFree = 21,
    /// kswapd is woken: `address` is the zone's index, `order` the order asked for.
    KswapdWake = 22,
    /// kswapd sleeps.
    KswapdSleep = 23,
    /// Direct reclaim begins, for `order` and `gfp`.
    ReclaimBegin = 24,
    /// Direct reclaim ends; `address` is the number of frames it reclaimed.
    ReclaimEnd = 25,
    /// Compaction of a zone begins; `address` is the zone's first pfn, `bytes_requested` one past its last.
    CompactionBegin = 26,
    /// Compaction of a zone ends; `bytes_allocated` is its result code.
    CompactionEnd = 27,
    /// The workload enters phase number `address`.
    Phase = 28,
    /// A live block becomes two; `bytes_requested` is the first of the two (consecutive) ids.
    Split = 40,
}

impl Kind {
    /// Every kind, by ascending number.
    pub const ALL: [Kind; 23] = [
        Kind::Kmalloc,
        Kind::Kfree,
        Kind::CacheAlloc,
        Kind::CacheFree,
        Kind::PageAlloc,
        Kind::PageFree,
        Kind::PerCpuAlloc,
        Kind::PerCpuFree,
        Kind::VmapAlloc,
        Kind::VmapFree,
        Kind::BulkAlloc,
        Kind::BulkFree,
        Kind::PageBulkAlloc,
        Kind::CompactionAlloc,
        Kind::CompactionFree,
        Kind::KswapdWake,
        Kind::KswapdSleep,
        Kind::ReclaimBegin,
        Kind::ReclaimEnd,
        Kind::CompactionBegin,
        Kind::CompactionEnd,
        Kind::Phase,
        Kind::Split,
    ];

    /// The kind with this number, or `None` if there is none.
    pub fn from_number(number: u8) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| *kind as u8 == number)
    }

    /// The number the `KMT1` row form gives this kind.
    pub fn number(self) -> u8 {
        self as u8
    }

    /// Whether a row of this kind is given one new id (a [`Kind::Split`] is given two).
    pub fn gives_id(self) -> bool {
        matches!(
            self,
            Kind::Kmalloc
                | Kind::CacheAlloc
                | Kind::PageAlloc
                | Kind::PerCpuAlloc
                | Kind::VmapAlloc
                | Kind::BulkAlloc
                | Kind::PageBulkAlloc
                | Kind::CompactionAlloc
        )
    }

    /// Whether a row of this kind ends the allocation its id names.
    pub fn ends_id(self) -> bool {
        matches!(
            self,
            Kind::Kfree
                | Kind::CacheFree
                | Kind::PageFree
                | Kind::PerCpuFree
                | Kind::VmapFree
                | Kind::BulkFree
                | Kind::CompactionFree
                | Kind::Split
        )
    }

    /// Whether `address` is a pfn of the page allocator's and the row speaks of 2^order frames from there.
    pub fn is_page(self) -> bool {
        matches!(
            self,
            Kind::PageAlloc
                | Kind::PageFree
                | Kind::PageBulkAlloc
                | Kind::CompactionAlloc
                | Kind::CompactionFree
                | Kind::Split
        )
    }

    /// Whether `address` is the virtual address of a slab object.
    pub fn is_slab(self) -> bool {
        matches!(
            self,
            Kind::Kmalloc
                | Kind::Kfree
                | Kind::CacheAlloc
                | Kind::CacheFree
                | Kind::BulkAlloc
                | Kind::BulkFree
        )
    }

    /// Whether `address` is a virtual address in the vmap area.
    pub fn is_vmap(self) -> bool {
        matches!(self, Kind::VmapAlloc | Kind::VmapFree)
    }
}

/// One event of a recording.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Nanoseconds since the recording began. May run backwards from row to row.
    pub time_ns: u64,
    /// Pages: first pfn. Slab and vmap: virtual address. Others: see [`Kind`].
    pub address: u64,
    /// The allocation this row makes or ends. `None`: it ends one from before the recording, or is about none.
    pub id: Option<Id>,
    /// Bytes asked for. Page allocations: the stack's id, [`NO_STACK`] for none. [`Kind::Split`]: first child id.
    pub bytes_requested: u32,
    /// Bytes given.
    pub bytes_allocated: u32,
    /// The request's gfp mask, in the bit values of Linux 6.12.
    pub gfp: u32,
    /// Index of the call site in [`crate::Meta::sites`]; 0 is the unknown one.
    pub site: u16,
    /// Key of the slab cache in [`crate::Meta::caches`].
    pub cache: Option<u16>,
    /// The CPU it happened on.
    pub cpu: u16,
    /// What happened.
    pub kind: Kind,
    /// log2 of the block's frames (per-CPU and vmap rows: log2 of the alignment).
    pub order: u8,
    /// Linux's number of the mobility type: 0 unmovable, 1 movable, 2 reclaimable, 3 highatomic, 4 CMA, 5 isolate
    /// (where the kernel has CMA).
    pub migratetype: u8,
    /// The block is a slab of some cache: a replay of the whole memory system skips it, its own slab layer asks.
    pub backs_slab: bool,
    /// The block backs a large `kmalloc`: likewise skipped by such a replay.
    pub backs_large_kmalloc: bool,
}

/// [`Row::bytes_requested`] of a page allocation whose stack was not recorded.
pub const NO_STACK: u32 = u32::MAX;

impl Row {
    /// Key of the stack in [`crate::Meta::stacks`], for a page allocation that has one.
    pub fn stack(&self) -> Option<u32> {
        (matches!(self.kind, Kind::PageAlloc | Kind::PageBulkAlloc | Kind::CompactionAlloc)
            && self.bytes_requested != NO_STACK)
            .then_some(self.bytes_requested)
    }

    /// The two ids a [`Kind::Split`] gives, lower half first.
    pub fn children(&self) -> Option<(Id, Id)> {
        (self.kind == Kind::Split)
            .then(|| (self.bytes_requested, self.bytes_requested.saturating_add(1)))
    }

    /// Whether a replay of the page allocator under its own slab layer must leave this row out.
    pub fn belongs_to_slab_layer(&self) -> bool {
        self.backs_slab || self.backs_large_kmalloc
    }

    /// Frames a page row speaks of.
    pub fn frames(&self) -> u64 {
        1u64 << self.order.min(63)
    }
}

/// The largest order a page row may have: no Linux configuration has a larger MAX_PAGE_ORDER.
pub(crate) const MAX_ORDER: u8 = 13;

impl Row {
    /// What no reader lets pass, whatever the form: blocks that are none.
    pub(crate) fn check(&self) -> Result<(), String> {
        if !self.kind.is_page() {
            return Ok(());
        }
        if self.order > MAX_ORDER {
            return Err(format!("a block of order {}; the largest is {MAX_ORDER}", self.order));
        }
        if !self.address.is_multiple_of(1 << self.order) || self.address > u64::MAX >> 12 {
            return Err(format!(
                "a block of order {} cannot begin at pfn {:#x}",
                self.order, self.address
            ));
        }
        Ok(())
    }
}
