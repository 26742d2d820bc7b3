//! Memory before the page allocator \[B1\], \[B2\].
//!
//! # Concepts
//! Until zones exist, somebody has to know what the firmware said about memory and hand some of it
//! out: the frame descriptors of the page allocator need a home themselves. That is the boot
//! allocator ([Boot time memory management](https://docs.kernel.org/core-api/boot-time-mm.html)). It
//! keeps two lists of address ranges. *Memory* is what exists, each range on one node. *Reserved* is
//! what somebody uses: the kernel image, firmware tables, every allocation. What is memory and not
//! reserved is *free*. The lists are independent: firmware may reserve an address that is no memory,
//! and removing memory leaves a reservation on it in place.
//!
//! All addresses and sizes are physical and in bytes. Ranges are half-open and end at `u64::MAX` at the
//! latest, so the last byte of the 64-bit space can be neither memory nor reserved.
//!
//! A reservation is *permanent* when a device's start-up hook took it ([`Memblock::device_init`]): the
//! oldest way to own memory, a pointer that each built-in driver moves up past what it keeps. Such
//! memory is never given back.
//!
//! When the page allocator is ready it reads [`Memblock::free_ranges`], and [`Memblock::hand_over`]
//! closes the book: whatever was free belongs to the zones, and no call changes the lists any more.
//!
//! # Implementation
//! Each list is a sorted table of [`MAX_REGIONS`] slots inside the struct, kept canonical: ranges are
//! disjoint, and ranges that touch and have the same owner (node, or permanence) are one range. An
//! operation first works out the slots that it replaces and whether the result fits, and only then
//! writes; a call that returns an error has changed nothing. Searching walks both tables side by side,
//! once, whatever the direction; with some hundred slots and a machine that boots once nothing more
//! is needed.
//!
//! # Locking
//! None. One CPU runs at this stage and owns the struct; every change takes `&mut self`.

mod error;
mod free;
mod table;

pub use error::MemblockError;
pub use free::{FrameRange, FreeRanges};

use crate::types::MAX_NODES;
use core::{fmt, ops::Range};
use table::{Edit, Refused, Slot, Table};

/// Ranges that each of the two tables holds.
pub const MAX_REGIONS: usize = 128;

/// Where [`Memblock::device_init`] starts to look unless told otherwise: above the first MiB, which
/// PC firmware and devices share.
pub const DEFAULT_LOW_MARK: u64 = 1 << 20;

/// Alignment, in bytes, of the pointer a start-up hook is given.
pub const DEVICE_ALIGN: u64 = 16;

/// Alignment, in bytes, of an allocation that asks for none: a cache line.
pub const DEFAULT_ALIGN: u64 = 64;

/// A range of memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Region {
    /// First address.
    pub base: u64,
    /// Bytes; never 0.
    pub size: u64,
    /// The node the memory belongs to, below [`MAX_NODES`].
    pub node: u32,
}

impl Region {
    /// One past the last address.
    pub const fn end(&self) -> u64 {
        self.base + self.size
    }
}

/// A range somebody uses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Reserved {
    /// First address.
    pub base: u64,
    /// Bytes; never 0.
    pub size: u64,
    /// Whether a device took it for ever \[B2\].
    pub permanent: bool,
}

impl Reserved {
    /// One past the last address.
    pub const fn end(&self) -> u64 {
        self.base + self.size
    }
}

/// Which end of the permitted range an allocation is taken from.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Direction {
    /// The highest place that fits. Keeps low memory for those who can use no other.
    #[default]
    TopDown,
    /// The lowest place that fits.
    BottomUp,
}

/// What to allocate and where \[B1\].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Request {
    /// Bytes; at least 1.
    pub size: u64,
    /// Alignment of the first byte: a power of two.
    pub align: u64,
    /// Addresses that the allocation may use; all of it lies inside.
    pub range: Range<u64>,
    /// The only node to take it from; `None` for any. An allocation never spans two nodes.
    pub node: Option<u32>,
    /// Which end of `range` to start at.
    pub direction: Direction,
}

impl Request {
    /// `size` bytes, aligned to [`DEFAULT_ALIGN`], anywhere, from the top down.
    pub const fn new(size: u64) -> Request {
        Request {
            size,
            align: DEFAULT_ALIGN,
            range: 0..u64::MAX,
            node: None,
            direction: Direction::TopDown,
        }
    }

    /// With another alignment, in bytes.
    pub const fn align(self, align: u64) -> Request {
        Request { align, ..self }
    }

    /// Only at these addresses.
    pub const fn range(self, range: Range<u64>) -> Request {
        Request { range, ..self }
    }

    /// Only on this node.
    pub const fn node(self, node: u32) -> Request {
        Request { node: Some(node), ..self }
    }

    /// From this end.
    pub const fn direction(self, direction: Direction) -> Request {
        Request { direction, ..self }
    }

    /// The place for the request in one stretch of free memory.
    fn place(&self, free: &FrameRange) -> Option<u64> {
        // Address 0 stays unused: too much code takes it for "none".
        let start = free.start.max(self.range.start).max(1);
        let end = free.end.min(self.range.end);
        let lowest = start.checked_next_multiple_of(self.align)?;
        let room = end.checked_sub(lowest)?.checked_sub(self.size)?;
        Some(match self.direction {
            Direction::BottomUp => lowest,
            Direction::TopDown => lowest + (room & !(self.align - 1)),
        })
    }

    fn no_memory(&self) -> MemblockError {
        MemblockError::NoMemory {
            size: self.size,
            align: self.align,
            start: self.range.start,
            end: self.range.end,
            node: self.node,
        }
    }
}

/// The boot allocator \[B1\].
///
/// ```
/// use kmem::memblock::{Direction, Memblock, Request};
///
/// let mut boot = Memblock::new();
/// boot.add(0, 640 << 10, 0)?;
/// boot.add(1 << 20, 63 << 20, 0)?;
/// boot.reserve(0, 4096)?;
/// let low = boot.alloc(Request::new(4096).align(4096).direction(Direction::BottomUp))?;
/// assert_eq!(low, 4096);
/// let high = boot.alloc(Request::new(100))?;
/// assert_eq!(high, (64 << 20) - 128);
/// # Ok::<(), kmem::memblock::MemblockError>(())
/// ```
#[derive(Clone)]
pub struct Memblock {
    /// Tagged with the node.
    memory: Table<u32>,
    /// Tagged with permanence.
    reserved: Table<bool>,
    low_mark: u64,
    fault: Option<u32>,
    handed_over: bool,
}

impl Default for Memblock {
    fn default() -> Self {
        Memblock::new()
    }
}

impl Memblock {
    /// A machine without memory. Fit for a `static`.
    pub const fn new() -> Memblock {
        Memblock {
            memory: Table::new(0),
            reserved: Table::new(false),
            low_mark: DEFAULT_LOW_MARK,
            fault: None,
            handed_over: false,
        }
    }

    /// Records `size` bytes of memory at `base` on `node` and returns how many of them were not known
    /// before. Fewer than `size` means that the range overlaps memory already recorded on the same
    /// node, as firmware maps do; the result is the union. Overlap across nodes is an error.
    ///
    /// # Errors
    /// [`HandedOver`](MemblockError::HandedOver), [`Empty`](MemblockError::Empty),
    /// [`Wraps`](MemblockError::Wraps), [`BadNode`](MemblockError::BadNode),
    /// [`Overlap`](MemblockError::Overlap), [`TableFull`](MemblockError::TableFull),
    /// [`Injected`](MemblockError::Injected).
    pub fn add(&mut self, base: u64, size: u64, node: u32) -> Result<u64, MemblockError> {
        let end = self.check(base, size)?;
        if node as usize >= MAX_NODES {
            return Err(MemblockError::BadNode { node });
        }
        let edit = self.memory.plan_insert(Slot { base, end, tag: node }).map_err(|r| match r {
            Refused::Overlap(other) => {
                MemblockError::Overlap { at: base.max(other.base), node, existing: other.tag }
            }
            Refused::Full => MemblockError::TableFull { base, size },
        })?;
        self.inject()?;
        Ok(self.memory.commit(&edit))
    }

    /// Forgets the memory in a range, as a `mem=` limit does, and returns how many bytes there were.
    /// What is no memory is passed over; reservations stay.
    ///
    /// # Errors
    /// [`HandedOver`](MemblockError::HandedOver), [`Empty`](MemblockError::Empty),
    /// [`Wraps`](MemblockError::Wraps), [`Permanent`](MemblockError::Permanent) when a device owns part
    /// of the range; when a region has to be split, [`TableFull`](MemblockError::TableFull) and
    /// [`Injected`](MemblockError::Injected).
    pub fn remove(&mut self, base: u64, size: u64) -> Result<u64, MemblockError> {
        let end = self.check(base, size)?;
        self.check_not_permanent(base, end)?;
        let edit =
            self.memory.plan_remove(base, end).ok_or(MemblockError::TableFull { base, size })?;
        if edit.grows() {
            self.inject()?;
        }
        Ok(self.memory.commit(&edit))
    }

    /// Reserves a range, memory or not, and returns how many of its bytes were not reserved before.
    /// Fewer than `size` means that somebody else has reserved part of it; the result is the union.
    ///
    /// # Errors
    /// [`HandedOver`](MemblockError::HandedOver), [`Empty`](MemblockError::Empty),
    /// [`Wraps`](MemblockError::Wraps), [`Permanent`](MemblockError::Permanent) when a device owns part
    /// of the range, [`TableFull`](MemblockError::TableFull), [`Injected`](MemblockError::Injected).
    pub fn reserve(&mut self, base: u64, size: u64) -> Result<u64, MemblockError> {
        let end = self.check(base, size)?;
        let edit = self.plan_reserve(Slot { base, end, tag: false })?;
        self.inject()?;
        Ok(self.reserved.commit(&edit))
    }

    /// Gives back a range that was reserved or allocated. It may be part of a reservation, or cover
    /// several that touch.
    ///
    /// # Errors
    /// [`HandedOver`](MemblockError::HandedOver), [`Empty`](MemblockError::Empty),
    /// [`Wraps`](MemblockError::Wraps), [`Permanent`](MemblockError::Permanent) when a device owns part
    /// of the range \[B2\], [`NotReserved`](MemblockError::NotReserved) when part of it is not
    /// reserved; when a region has to be split, [`TableFull`](MemblockError::TableFull) and
    /// [`Injected`](MemblockError::Injected).
    pub fn free(&mut self, base: u64, size: u64) -> Result<(), MemblockError> {
        let end = self.check(base, size)?;
        self.check_not_permanent(base, end)?;
        if let Some(at) = self.reserved.first_gap(base, end) {
            return Err(MemblockError::NotReserved { at });
        }
        let edit =
            self.reserved.plan_remove(base, end).ok_or(MemblockError::TableFull { base, size })?;
        if edit.grows() {
            self.inject()?;
        }
        self.reserved.commit(&edit);
        Ok(())
    }

    /// Finds free memory for the request, reserves it and returns its address, which is never 0. The
    /// contents are whatever the firmware left there.
    ///
    /// # Errors
    /// [`HandedOver`](MemblockError::HandedOver), [`EmptyRequest`](MemblockError::EmptyRequest),
    /// [`BadAlign`](MemblockError::BadAlign), [`Injected`](MemblockError::Injected),
    /// [`NoMemory`](MemblockError::NoMemory), [`TableFull`](MemblockError::TableFull).
    pub fn alloc(&mut self, request: Request) -> Result<u64, MemblockError> {
        self.check_open()?;
        if request.size == 0 {
            return Err(MemblockError::EmptyRequest);
        }
        if !request.align.is_power_of_two() {
            return Err(MemblockError::BadAlign { align: request.align });
        }
        self.inject()?;
        let mut places = self
            .free_ranges(0)
            .filter(|free| request.node.is_none_or(|node| node == free.node))
            .filter_map(|free| request.place(&free));
        let place = match request.direction {
            Direction::BottomUp => places.next(),
            Direction::TopDown => places.last(),
        };
        let base = place.ok_or_else(|| request.no_memory())?;
        let edit = self.plan_reserve(Slot { base, end: base + request.size, tag: false })?;
        self.reserved.commit(&edit);
        Ok(base)
    }

    /// Runs a built-in device's start-up hook \[B2\]: `hook` is given the lowest free address at or
    /// above the low mark ([`set_low_mark`](Memblock::set_low_mark)), a multiple of [`DEVICE_ALIGN`],
    /// and returns the address past what it keeps, at the least the one it was given. The range between
    /// is returned and reserved for ever. Successive hooks get successive addresses, save for rounding
    /// up and for what others reserved meanwhile.
    ///
    /// The hook cannot know how much room it has. Run hooks before other allocations from the bottom
    /// up, or move the low mark past holes that are too small.
    ///
    /// # Errors
    /// Before the hook runs: [`HandedOver`](MemblockError::HandedOver),
    /// [`NoMemory`](MemblockError::NoMemory), [`TableFull`](MemblockError::TableFull),
    /// [`Injected`](MemblockError::Injected). After: [`HookReturnedLower`] and [`HookReturnedBeyond`];
    /// nothing is reserved then.
    ///
    /// [`HookReturnedLower`]: MemblockError::HookReturnedLower
    /// [`HookReturnedBeyond`]: MemblockError::HookReturnedBeyond
    pub fn device_init(
        &mut self,
        hook: impl FnOnce(u64) -> u64,
    ) -> Result<Range<u64>, MemblockError> {
        self.check_open()?;
        let request = Request::new(1)
            .align(DEVICE_ALIGN)
            .range(self.low_mark..u64::MAX)
            .direction(Direction::BottomUp);
        let (given, limit) = self
            .free_ranges(0)
            .find_map(|free| Some((request.place(&free)?, free.end)))
            .ok_or_else(|| request.no_memory())?;
        // A hook that ran has set its memory up: it must not learn of a full table only then. One byte
        // needs as many slots as any longer range from the same address, or more.
        self.plan_reserve(Slot { base: given, end: given + 1, tag: true })?;
        self.inject()?;

        let returned = hook(given);
        if returned < given {
            return Err(MemblockError::HookReturnedLower { given, returned });
        }
        if returned > limit {
            return Err(MemblockError::HookReturnedBeyond { given, returned, limit });
        }
        if returned > given {
            let edit = self.plan_reserve(Slot { base: given, end: returned, tag: true })?;
            self.reserved.commit(&edit);
        }
        Ok(given..returned)
    }

    /// Sets the address from which [`device_init`](Memblock::device_init) looks for memory.
    /// [`DEFAULT_LOW_MARK`] at first.
    pub fn set_low_mark(&mut self, address: u64) {
        self.low_mark = address;
    }

    /// The address from which [`device_init`](Memblock::device_init) looks for memory.
    pub fn low_mark(&self) -> u64 {
        self.low_mark
    }

    /// Fault injection \[D1\]: makes the `n`-th operation from now (0 is the next) that needs a place
    /// in a table fail with [`MemblockError::Injected`], once; `None` calls it off. Counted are
    /// [`add`](Memblock::add), [`reserve`](Memblock::reserve), [`alloc`](Memblock::alloc) and
    /// [`device_init`](Memblock::device_init), and those [`free`](Memblock::free) and
    /// [`remove`](Memblock::remove) calls that split a region; each once, and only when its arguments
    /// are in order.
    pub fn fail_after(&mut self, n: Option<u32>) {
        self.fault = n;
    }

    /// Operations that will still succeed before the injected failure; `None` when none is set, or it
    /// has struck.
    pub fn fault_pending(&self) -> Option<u32> {
        self.fault
    }

    /// The memory, lowest first; regions that touch are on different nodes.
    pub fn memory(&self) -> impl DoubleEndedIterator<Item = Region> + ExactSizeIterator + Clone {
        self.memory.slots().iter().map(|s| Region { base: s.base, size: s.size(), node: s.tag })
    }

    /// The reserved ranges, lowest first; of two that touch, one is permanent.
    pub fn reserved(
        &self,
    ) -> impl DoubleEndedIterator<Item = Reserved> + ExactSizeIterator + Clone {
        self.reserved.slots().iter().map(|s| Reserved {
            base: s.base,
            size: s.size(),
            permanent: s.tag,
        })
    }

    /// The frames of 2^`page_shift` bytes that are free as a whole, in runs on one node, lowest first
    /// \[F5\]. Memory is rounded inwards and reservations outwards: a frame that is partly used, or
    /// whose bytes are on two nodes, is nobody's. Frame 0 is among them unless it is reserved. With
    /// `page_shift` 0 these are the free bytes; with 64 or more there are no frames.
    pub fn free_ranges(&self, page_shift: u32) -> FreeRanges<'_> {
        FreeRanges::new(self.memory.slots(), self.reserved.slots(), page_shift)
    }

    /// Bytes of memory, free or not.
    pub fn total(&self) -> u64 {
        self.memory.slots().iter().map(Slot::size).sum()
    }

    /// Bytes reserved, memory or not.
    pub fn reserved_total(&self) -> u64 {
        self.reserved.slots().iter().map(Slot::size).sum()
    }

    /// Ends the boot allocator's reign: from here on every call that would change the lists fails with
    /// [`MemblockError::HandedOver`], and what they say can still be read.
    ///
    /// # Errors
    /// [`HandedOver`](MemblockError::HandedOver) the second time: free frames go to the zones once.
    pub fn hand_over(&mut self) -> Result<(), MemblockError> {
        self.check_open()?;
        self.handed_over = true;
        Ok(())
    }

    /// Whether the free memory belongs to the page allocator by now.
    pub fn handed_over(&self) -> bool {
        self.handed_over
    }

    fn check_open(&self) -> Result<(), MemblockError> {
        if self.handed_over { Err(MemblockError::HandedOver) } else { Ok(()) }
    }

    /// The end of a range that a change may be made to.
    fn check(&self, base: u64, size: u64) -> Result<u64, MemblockError> {
        self.check_open()?;
        if size == 0 {
            return Err(MemblockError::Empty { base });
        }
        base.checked_add(size).ok_or(MemblockError::Wraps { base, size })
    }

    fn check_not_permanent(&self, base: u64, end: u64) -> Result<(), MemblockError> {
        match self.reserved.overlapping(base, end).iter().find(|s| s.tag) {
            Some(s) => Err(MemblockError::Permanent { at: base.max(s.base) }),
            None => Ok(()),
        }
    }

    fn plan_reserve(&self, slot: Slot<bool>) -> Result<Edit<bool>, MemblockError> {
        self.reserved.plan_insert(slot).map_err(|r| match r {
            Refused::Overlap(other) => MemblockError::Permanent { at: slot.base.max(other.base) },
            Refused::Full => MemblockError::TableFull { base: slot.base, size: slot.size() },
        })
    }

    fn inject(&mut self) -> Result<(), MemblockError> {
        match self.fault {
            None => Ok(()),
            Some(0) => {
                self.fault = None;
                Err(MemblockError::Injected)
            }
            Some(n) => {
                self.fault = Some(n - 1);
                Ok(())
            }
        }
    }
}

impl fmt::Debug for Memblock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Memblock")
            .field("memory", &self.memory)
            .field("reserved", &self.reserved)
            .field("low_mark", &self.low_mark)
            .field("fault", &self.fault)
            .field("handed_over", &self.handed_over)
            .finish()
    }
}
