//! The words everything else speaks: frame numbers, zones, mobility types, limits.
//!
//! # Concepts
//! Physical memory is counted in *frames* of `Platform::PAGE_SHIFT` bits each; a [`Pfn`] is a frame's
//! number. Frame numbers are 32 bits wide (16 TiB of 4 KiB frames): links, per-CPU lists and bitmaps
//! hold them by the million, and half the size is half the cache. Memory above that limit is refused
//! at bring-up, never truncated.
//!
//! # Locking
//! Plain values; nothing here is shared.

use core::fmt;

/// Largest order the default configuration hands out (1024 frames, 4 MiB of 4 KiB frames) \[P1\].
pub const DEFAULT_MAX_ORDER: u32 = 10;

/// Largest order any configuration may allow: one region's worth of frames.
pub const MAX_MAX_ORDER: u32 = 15;

/// Frames of a pageblock as a power of two: the unit of mobility grouping, and one cache line of
/// free bits (512 bits).
pub const PAGEBLOCK_ORDER: u32 = 9;

/// Frames in a pageblock.
pub const PAGEBLOCK_FRAMES: u32 = 1 << PAGEBLOCK_ORDER;

/// Largest order Linux calls cheap (`PAGE_ALLOC_COSTLY_ORDER`): up to here the slow path keeps
/// trying, above it gives up after a few rounds.
pub const PAGE_ALLOC_COSTLY_ORDER: u32 = 3;

/// Nodes a machine may have; node masks are one 64-bit word.
pub const MAX_NODES: usize = 64;

/// CPUs a machine may have.
pub const MAX_CPUS: usize = 1024;

/// Places for `kmap` that a machine uses at most (x86-32 without PAE) \[H1\].
pub const LAST_PKMAP: usize = 1024;

/// A page frame number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct Pfn(pub u32);

impl Pfn {
    /// The frame `n` frames after this one; `None` past the end of the 32-bit frame space.
    pub const fn checked_add(self, n: u32) -> Option<Pfn> {
        match self.0.checked_add(n) {
            Some(v) => Some(Pfn(v)),
            None => None,
        }
    }

    /// Whether the frame is the first of a naturally aligned block of 2^`order` frames.
    pub const fn is_aligned(self, order: u32) -> bool {
        order < 32 && self.0 & ((1 << order) - 1) == 0
    }

    /// The first frame of the naturally aligned block of 2^`order` frames around this one.
    /// `order` must be below 32.
    pub const fn align_down(self, order: u32) -> Pfn {
        Pfn(self.0 & !((1 << order) - 1))
    }

    /// The frame number as an index.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Debug for Pfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pfn:{:#x}", self.0)
    }
}

impl fmt::Display for Pfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A half-open range of frames.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PfnRange {
    /// First frame.
    pub start: u32,
    /// One past the last frame.
    pub end: u32,
}

impl PfnRange {
    /// A range; empty when `end <= start`.
    pub const fn new(start: u32, end: u32) -> Self {
        PfnRange { start, end }
    }

    /// Frames in the range.
    pub const fn len(&self) -> u32 {
        self.end.saturating_sub(self.start)
    }

    /// Whether no frame is in the range.
    pub const fn is_empty(&self) -> bool {
        self.end <= self.start
    }

    /// Whether `pfn` is in the range.
    pub const fn contains(&self, pfn: u32) -> bool {
        self.start <= pfn && pfn < self.end
    }

    /// The frames in both ranges.
    pub fn intersect(&self, other: &PfnRange) -> PfnRange {
        PfnRange::new(self.start.max(other.start), self.end.min(other.end))
    }
}

/// The kinds of zone \[Z1\], lowest addresses first; a request that may use one may use every lower
/// one, save for [`ZoneType::Device`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
#[repr(u8)]
pub enum ZoneType {
    /// Frames that devices with the narrowest addressing reach (16 MiB on x86).
    Dma = 0,
    /// Frames that 32-bit devices reach.
    Dma32 = 1,
    /// Frames that are always mapped.
    Normal = 2,
    /// Frames without a permanent kernel address.
    HighMem = 3,
    /// Frames that only movable allocations may take.
    Movable = 4,
    /// Frames on a device; never handed out by the page allocator.
    Device = 5,
}

/// Number of zone types.
pub const MAX_NR_ZONES: usize = 6;

impl ZoneType {
    /// All zone types, lowest first.
    pub const ALL: [ZoneType; MAX_NR_ZONES] = [
        ZoneType::Dma,
        ZoneType::Dma32,
        ZoneType::Normal,
        ZoneType::HighMem,
        ZoneType::Movable,
        ZoneType::Device,
    ];

    /// The name the kernel prints.
    pub const fn name(self) -> &'static str {
        match self {
            ZoneType::Dma => "DMA",
            ZoneType::Dma32 => "DMA32",
            ZoneType::Normal => "Normal",
            ZoneType::HighMem => "HighMem",
            ZoneType::Movable => "Movable",
            ZoneType::Device => "Device",
        }
    }

    /// The zone type with the given kernel name.
    pub fn from_name(name: &str) -> Option<ZoneType> {
        ZoneType::ALL.into_iter().find(|z| z.name() == name)
    }
}

/// Mobility of the frames in a pageblock \[P2\].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
#[repr(u8)]
pub enum MigrateType {
    /// Cannot move: the kernel's own.
    Unmovable = 0,
    /// Can be migrated.
    Movable = 1,
    /// Cannot move, but can be given up by a shrinker.
    Reclaimable = 2,
    /// Set aside for high-order atomic requests.
    HighAtomic = 3,
    /// Lent to movable allocations until its owner wants a contiguous range.
    Cma = 4,
    /// Withheld from allocation.
    Isolate = 5,
}

/// Number of mobility types.
pub const MIGRATE_TYPES: usize = 6;

/// Number of mobility types that per-CPU lists hold.
pub const MIGRATE_PCPTYPES: usize = 3;

impl MigrateType {
    /// All mobility types in the kernel's order.
    pub const ALL: [MigrateType; MIGRATE_TYPES] = [
        MigrateType::Unmovable,
        MigrateType::Movable,
        MigrateType::Reclaimable,
        MigrateType::HighAtomic,
        MigrateType::Cma,
        MigrateType::Isolate,
    ];

    /// The type with the given number; `None` outside `0..MIGRATE_TYPES`.
    pub const fn from_index(i: usize) -> Option<MigrateType> {
        if i < MIGRATE_TYPES { Some(MigrateType::ALL[i]) } else { None }
    }

    /// The name the kernel prints.
    pub const fn name(self) -> &'static str {
        match self {
            MigrateType::Unmovable => "Unmovable",
            MigrateType::Movable => "Movable",
            MigrateType::Reclaimable => "Reclaimable",
            MigrateType::HighAtomic => "HighAtomic",
            MigrateType::Cma => "CMA",
            MigrateType::Isolate => "Isolate",
        }
    }
}

/// A set of nodes; bit n is node n.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct NodeMask(pub u64);

impl NodeMask {
    /// Every node.
    pub const ALL: NodeMask = NodeMask(u64::MAX);

    /// The set of one node; empty when `node >= MAX_NODES`.
    pub const fn single(node: usize) -> NodeMask {
        if node < MAX_NODES { NodeMask(1 << node) } else { NodeMask(0) }
    }

    /// Whether `node` is in the set.
    pub const fn contains(self, node: usize) -> bool {
        node < MAX_NODES && self.0 >> node & 1 == 1
    }
}
