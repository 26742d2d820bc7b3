//! `Page`: what is known of one physical frame.
//!
//! # Concepts
//! There is one [`Page`] per frame, whatever the frame's state \[F1\]. It describes the frame, never its
//! data: what a frame holds may move to another frame while the `Page` stays where it is.
//!
//! # Implementation
//! 32 bytes \[F4\]: two to a cache line, and a multiplication-free conversion to and from frame numbers.
//!
//! ```text
//!   0        8          12        16         20         24      28        32
//!  +--------+----------+---------+----------+----------+-------+---------+
//!  | state  | mapcount | mapping | lru.next | lru.prev | index | private |
//!  +--------+----------+---------+----------+----------+-------+---------+
//!   state: 63..32 flags | 31..28 order | 27..0 reference count
//! ```
//!
//! Reference count, order and flags share one word because freeing must check all three at once: the
//! free of a block is one compare-and-exchange from "allocated, this order, one reference" to zero, so
//! of two CPUs that free one block only one succeeds, and a wrong order can never be half believed.
//! Only the first frame of a live block has [`PageFlags::ALLOCATED`]; the word of every other frame (free,
//! on a per-CPU list, or inside a block) is zero but for sticky flags. Whether a frame is free is in the
//! buddy's bitmap; whether it is a tail, and of what, follows from the frame numbers around it.
//!
//! Links are frame numbers. `mapping` is a handle of the address space, zero for none.
//!
//! # Locking
//! The state word changes by atomic operations only. `lru` belongs to whoever owns the list the page is
//! on; `mapping`, `index` and `private` to whoever owns the page.

use core::{
    fmt,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
};

bitflags::bitflags! {
    /// State of a frame \[F1\]
    /// (see the kernel's [page flags](https://docs.kernel.org/admin-guide/mm/pagemap.html)).
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
    pub struct PageFlags: u32 {
        /// Locked for I/O or truncation.
        const LOCKED = 1 << 0;
        /// Accessed since last looked at.
        const REFERENCED = 1 << 1;
        /// Contents are valid.
        const UPTODATE = 1 << 2;
        /// Contents are newer than their backing store.
        const DIRTY = 1 << 3;
        /// On an LRU list.
        const LRU = 1 << 4;
        /// On the active LRU list.
        const ACTIVE = 1 << 5;
        /// Was evicted and came back soon.
        const WORKINGSET = 1 << 6;
        /// First frame of a compound page.
        const HEAD = 1 << 7;
        /// Belongs to the slab layer.
        const SLAB = 1 << 8;
        /// Not the allocator's: the firmware's, the kernel image's, a device's.
        const RESERVED = 1 << 9;
        /// `private` is in use by the owner's file system.
        const PRIVATE = 1 << 10;
        /// A second private mark.
        const PRIVATE_2 = 1 << 11;
        /// Being written back.
        const WRITEBACK = 1 << 12;
        /// To be reclaimed as soon as it is written.
        const RECLAIM = 1 << 13;
        /// Backed by swap.
        const SWAPBACKED = 1 << 14;
        /// In the swap cache.
        const SWAPCACHE = 1 << 15;
        /// Must not be reclaimed.
        const UNEVICTABLE = 1 << 16;
        /// Locked into memory by its user.
        const MLOCKED = 1 << 17;
        /// Has blocks on disk.
        const MAPPEDTODISK = 1 << 18;
        /// Someone waits for the page.
        const WAITERS = 1 << 19;
        /// An I/O error happened.
        const ERROR = 1 << 20;
        /// For the owner's use.
        const OWNER_PRIV_1 = 1 << 21;
        /// Taken off its LRU list for migration.
        const ISOLATED = 1 << 22;
        /// Can be migrated through its owner's callback.
        const MOVABLE_OPS = 1 << 23;
        /// Anonymous memory.
        const ANON = 1 << 24;
        /// Holds page tables.
        const TABLE = 1 << 25;
        /// The hardware reported the frame as bad.
        const HWPOISON = 1 << 26;
        /// Idle tracking: not accessed.
        const IDLE = 1 << 27;
        /// Idle tracking: accessed by others.
        const YOUNG = 1 << 28;
        /// Offline: present but withdrawn from use.
        const OFFLINE = 1 << 29;
        /// A guard: never mapped.
        const GUARD = 1 << 30;
        /// First frame of a live block. The allocator's own.
        const ALLOCATED = 1 << 31;
    }
}

impl PageFlags {
    /// Flags that mean someone still uses the page; freeing it then is a mistake
    /// (`PAGE_FLAGS_CHECK_AT_FREE`).
    pub const CHECK_AT_FREE: PageFlags = PageFlags::LOCKED
        .union(PageFlags::LRU)
        .union(PageFlags::ACTIVE)
        .union(PageFlags::SLAB)
        .union(PageFlags::RESERVED)
        .union(PageFlags::PRIVATE)
        .union(PageFlags::PRIVATE_2)
        .union(PageFlags::WRITEBACK)
        .union(PageFlags::SWAPCACHE)
        .union(PageFlags::UNEVICTABLE)
        .union(PageFlags::MLOCKED)
        .union(PageFlags::ISOLATED)
        .union(PageFlags::OFFLINE)
        .union(PageFlags::GUARD);

    /// Flags that the allocator keeps and owners cannot change.
    pub const ALLOCATORS_OWN: PageFlags = PageFlags::ALLOCATED
        .union(PageFlags::HEAD)
        .union(PageFlags::RESERVED)
        .union(PageFlags::SLAB);
}

const REF_MASK: u64 = (1 << 28) - 1;
/// From here on a count is taken for run-away and pinned: the page is never freed.
const REF_SATURATED: u64 = 1 << 27;
const ORDER_SHIFT: u32 = 28;
const ORDER_MASK: u64 = 0xf << ORDER_SHIFT;
const FLAGS_SHIFT: u32 = 32;

/// Flags that do not matter when a block is freed: they vanish with it. HEAD included, as the order
/// is checked apart.
const FREE_IGNORE: u64 =
    ((!PageFlags::CHECK_AT_FREE.bits() & !PageFlags::ALLOCATED.bits()) as u64) << FLAGS_SHIFT;

/// A page's state word, taken apart.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct PageState(u64);

impl PageState {
    /// The state of a frame that heads no live block.
    pub const FREE: PageState = PageState(0);

    /// The state of a freshly allocated block.
    #[inline(always)]
    pub(crate) const fn allocated(order: u32, flags: PageFlags) -> PageState {
        PageState(
            1 | (order as u64) << ORDER_SHIFT
                | ((flags.bits() | PageFlags::ALLOCATED.bits()) as u64) << FLAGS_SHIFT,
        )
    }

    /// References held.
    #[inline(always)]
    pub const fn count(self) -> u32 {
        (self.0 & REF_MASK) as u32
    }

    /// Order of the block; meaningful when allocated.
    #[inline(always)]
    pub const fn order(self) -> u32 {
        ((self.0 & ORDER_MASK) >> ORDER_SHIFT) as u32
    }

    /// The flags.
    #[inline(always)]
    pub const fn flags(self) -> PageFlags {
        PageFlags::from_bits_retain((self.0 >> FLAGS_SHIFT) as u32)
    }

    /// Whether the frame is the first of a live block.
    #[inline(always)]
    pub const fn is_allocated(self) -> bool {
        self.0 >> 63 != 0
    }

    /// Whether freeing a block of `order` in this state is right and frees it at once.
    #[inline(always)]
    pub(crate) const fn freeable(self, order: u32) -> bool {
        self.0 & !FREE_IGNORE == PageState::allocated(order, PageFlags::empty()).0
    }
}

impl fmt::Debug for PageState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "count:{} order:{} flags:{:?}", self.count(), self.order(), self.flags())
    }
}

/// Flags that mean nothing for a block of the slab layer's, and that a free does not mind: its notes.
const NOTES: [PageFlags; 7] = [
    PageFlags::REFERENCED,
    PageFlags::UPTODATE,
    PageFlags::DIRTY,
    PageFlags::WORKINGSET,
    PageFlags::RECLAIM,
    PageFlags::SWAPBACKED,
    PageFlags::MAPPEDTODISK,
];

/// The half of `used_by` that is the mapping.
const MAPPING: u64 = u64::MAX << 32;

/// What is known of one frame \[F1\].
#[repr(C, align(32))]
pub struct Page {
    state: AtomicU64,
    /// Mapcount in the low half, mapping in the high one, so that a free looks once.
    used_by: AtomicU64,
    lru_next: AtomicU32,
    lru_prev: AtomicU32,
    index: AtomicU32,
    private: AtomicU32,
}

// Metadata per frame: 32 bytes, and a power of two so that frame number arithmetic is shifts [F4].
const _: () = assert!(size_of::<Page>() == 32 && align_of::<Page>() == 32);

/// What became of one reference.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Put {
    /// Others remain.
    Remaining,
    /// It was the last; the block of this order is the caller's to free.
    Last(u32),
    /// There was none to drop.
    None,
    /// The page cannot be freed as it stands.
    Busy(PageState),
}

impl Page {
    /// The state word.
    #[inline(always)]
    pub fn state(&self) -> PageState {
        PageState(self.state.load(Ordering::Relaxed))
    }

    /// References held: 0 for a free frame, positive for one in use \[F2\].
    #[inline(always)]
    pub fn page_count(&self) -> u32 {
        self.state().count()
    }

    /// The flags.
    pub fn flags(&self) -> PageFlags {
        self.state().flags()
    }

    /// Sets flags. The allocator's own ([`PageFlags::ALLOCATORS_OWN`]) are left alone.
    pub fn set_flags(&self, flags: PageFlags) {
        let bits = u64::from(flags.difference(PageFlags::ALLOCATORS_OWN).bits()) << FLAGS_SHIFT;
        self.state.fetch_or(bits, Ordering::AcqRel);
    }

    /// Clears flags. The allocator's own ([`PageFlags::ALLOCATORS_OWN`]) are left alone.
    pub fn clear_flags(&self, flags: PageFlags) {
        let bits = u64::from(flags.difference(PageFlags::ALLOCATORS_OWN).bits()) << FLAGS_SHIFT;
        self.state.fetch_and(!bits, Ordering::AcqRel);
    }

    /// Sets one flag and says whether it was clear before (`TestSetPage…`): the way to take
    /// [`PageFlags::LOCKED`].
    pub fn test_and_set(&self, flag: PageFlags) -> bool {
        let bits = u64::from(flag.difference(PageFlags::ALLOCATORS_OWN).bits()) << FLAGS_SHIFT;
        self.state.fetch_or(bits, Ordering::AcqRel) & bits != bits
    }

    /// Marks the page as the slab layer's.
    pub(crate) fn mark_slab(&self) {
        let bits = u64::from(PageFlags::SLAB.bits()) << FLAGS_SHIFT;
        // Release: who takes the mark off sees what was noted of the block before.
        self.state.fetch_or(bits, Ordering::Release);
    }

    /// Takes the slab layer's mark off; says whether it was there.
    pub(crate) fn take_slab_mark(&self) -> bool {
        let bits = u64::from(PageFlags::SLAB.bits()) << FLAGS_SHIFT;
        self.state.fetch_and(!bits, Ordering::AcqRel) & bits != 0
    }

    /// Changes the notes that the slab layer has about a block of its own, seven bits; 0 is none. Returns what they
    /// were, or `None` if it is not the slab layer's or `f` wants no change. They go with the block.
    pub(crate) fn note(&self, mut f: impl FnMut(u8) -> Option<u8>) -> Option<u8> {
        let own = PageFlags::SLAB.union(PageFlags::ALLOCATED);
        let notes = |flags: PageFlags| {
            let set = NOTES.iter().enumerate().filter(|(_, flag)| flags.contains(**flag));
            set.fold(0, |notes, (i, _)| notes | 1 << i)
        };
        let change = |word: u64| {
            let flags = PageState(word).flags();
            let to = if flags.contains(own) { f(notes(flags)) } else { None }?;
            let mut changed = flags;
            NOTES.iter().enumerate().for_each(|(i, flag)| changed.set(*flag, to >> i & 1 != 0));
            Some(word & u64::from(u32::MAX) | u64::from(changed.bits()) << FLAGS_SHIFT)
        };
        let before = self.state.fetch_update(Ordering::AcqRel, Ordering::Relaxed, change).ok()?;
        Some(notes(PageState(before).flags()))
    }

    pub(crate) fn mark_reserved(&self) {
        let bits = u64::from(PageFlags::RESERVED.bits()) << FLAGS_SHIFT;
        self.state.fetch_or(bits, Ordering::Relaxed);
    }

    /// Makes the frame the head of a live block. It was free or on a per-CPU list, and the caller's.
    #[inline(always)]
    pub(crate) fn set_allocated(&self, state: PageState) {
        self.private.store(0, Ordering::Relaxed);
        self.state.store(state.0, Ordering::Relaxed);
    }

    /// Frees the block if nothing speaks against it. All of that but mappings is in the word that is exchanged; whoever maps
    /// the page has a reference, so there are no others while there is only the caller's.
    #[inline(always)]
    pub(crate) fn try_free(&self, order: u32) -> bool {
        self.freeable(order).is_some_and(|seen| self.free_from(seen))
    }

    /// The first half of [`try_free`](Self::try_free): the state, if nothing speaks against freeing the block.
    #[inline(always)]
    pub(crate) fn freeable(&self, order: u32) -> Option<PageState> {
        let now = self.state();
        (now.freeable(order) && self.unmapped()).then_some(now)
    }

    /// The second half: frees the block if it is still in that state.
    ///
    /// AcqRel: Release publishes the last owner's writes to the page to whoever takes it next;
    /// Acquire sees the writes of those who dropped their references in `put`.
    #[inline(always)]
    pub(crate) fn free_from(&self, seen: PageState) -> bool {
        self.state.compare_exchange(seen.0, 0, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// Whether neither a page table nor an address space knows the page.
    #[inline(always)]
    fn unmapped(&self) -> bool {
        self.used_by.load(Ordering::Relaxed) == 0
    }

    /// Takes a reference unless the count is zero (`get_page_unless_zero`): the speculative form for
    /// those who only know the frame number.
    pub(crate) fn get_unless_zero(&self) -> bool {
        let mut now = self.state.load(Ordering::Relaxed);
        loop {
            if now & REF_MASK == 0 {
                return false;
            }
            if now & REF_MASK >= REF_SATURATED {
                return true;
            }
            // Acquire pairs with the Release in `put` and `try_free`.
            match self.state.compare_exchange_weak(
                now,
                now + 1,
                Ordering::Acquire,
                Ordering::Relaxed,
            ) {
                Ok(_) => return true,
                Err(seen) => now = seen,
            }
        }
    }

    /// Drops a reference; the last one turns the frame into a free one. `order`, if given, must be
    /// the block's.
    pub(crate) fn put(&self, order: Option<u32>) -> Put {
        let mut now = self.state.load(Ordering::Relaxed);
        loop {
            let state = PageState(now);
            if !state.is_allocated() || state.count() == 0 {
                return Put::None;
            }
            if order.is_some_and(|o| o != state.order()) {
                return Put::Busy(state);
            }
            if now & REF_MASK >= REF_SATURATED {
                return Put::Remaining;
            }
            let (next, outcome) = if state.count() > 1 {
                (now - 1, Put::Remaining)
            } else {
                let order = state.order();
                if !state.freeable(order) || !self.unmapped() {
                    return Put::Busy(state);
                }
                (0, Put::Last(order))
            };
            // Release pairs with the Acquire of the last put; see `try_free`.
            match self.state.compare_exchange_weak(now, next, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => return outcome,
                Err(seen) => now = seen,
            }
        }
    }

    /// Changes the order of a live block, and drops the compound mark: for splitting.
    pub(crate) fn restate(&self, from: PageState, to: PageState) -> bool {
        self.state.compare_exchange(from.0, to.0, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    /// Page-table entries that map the page.
    pub fn mapcount(&self) -> u32 {
        self.used_by.load(Ordering::Relaxed) as u32
    }

    /// Counts one more mapping and returns the new count, which stays at `u32::MAX` once it is there. A
    /// frame that is mapped cannot be freed \[P5\].
    pub fn inc_mapcount(&self) -> u32 {
        self.count_mapping(|n| n.checked_add(1)).unwrap_or(u32::MAX)
    }

    /// Counts one mapping less and returns the new count; `None`, and nothing changed, if there was
    /// none.
    pub fn dec_mapcount(&self) -> Option<u32> {
        self.count_mapping(|n| n.checked_sub(1))
    }

    fn count_mapping(&self, change: impl Fn(u32) -> Option<u32>) -> Option<u32> {
        let changed = |used: u64| Some(used & MAPPING | u64::from(change(used as u32)?));
        // AcqRel: whoever counts the last mapping away sees what was done under the others.
        let before = self.used_by.fetch_update(Ordering::AcqRel, Ordering::Relaxed, changed);
        before.ok().and_then(|used| change(used as u32))
    }

    /// Handle of the address space the page belongs to; 0 for none.
    pub fn mapping(&self) -> u32 {
        (self.used_by.load(Ordering::Relaxed) >> 32) as u32
    }

    /// Sets the address-space handle.
    pub fn set_mapping(&self, mapping: u32) {
        let changed = |used| Some(used & !MAPPING | u64::from(mapping) << 32);
        let _ = self.used_by.fetch_update(Ordering::Relaxed, Ordering::Relaxed, changed);
    }

    /// Offset in the address space, in pages.
    pub fn index(&self) -> u32 {
        self.index.load(Ordering::Relaxed)
    }

    /// Sets the offset in the address space. A page of the slab layer's is left alone.
    pub fn set_index(&self, index: u32) {
        if !self.flags().contains(PageFlags::SLAB) {
            self.index.store(index, Ordering::Relaxed);
        }
    }

    /// Free objects, of a slab's first page.
    #[inline]
    pub(crate) fn free_objects(&self) -> u32 {
        self.index.load(Ordering::Relaxed)
    }

    /// Sets what [`free_objects`](Self::free_objects) says. For the holder of the shelf's lock.
    #[inline]
    pub(crate) fn set_free_objects(&self, nr: u32) {
        self.index.store(nr, Ordering::Relaxed);
    }

    /// The owner's word.
    pub fn private(&self) -> u32 {
        self.private.load(Ordering::Relaxed)
    }

    /// Sets the owner's word. A page of the slab layer's is left alone.
    pub fn set_private(&self, private: u32) {
        if !self.flags().contains(PageFlags::SLAB) {
            self.private.store(private, Ordering::Relaxed);
        }
    }

    /// Where to go on looking for free objects, of a slab's first page.
    #[inline]
    pub(crate) fn next_object(&self) -> u32 {
        self.private.load(Ordering::Relaxed) % (1 << SHELF_AT)
    }

    /// Sets what [`next_object`](Self::next_object) says. For the holder of the shelf's lock.
    #[inline]
    pub(crate) fn set_next_object(&self, i: u32) {
        self.private.store(i | (self.shelf() as u32) << SHELF_AT, Ordering::Relaxed);
    }

    /// On which shelf of its node's a slab is, of its first page.
    #[inline]
    pub(crate) fn shelf(&self) -> usize {
        (self.private.load(Ordering::Relaxed) >> SHELF_AT) as usize
    }

    /// Sets what [`shelf`](Self::shelf) says. For who makes a slab or gives it back.
    #[inline]
    pub(crate) fn set_shelf(&self, shelf: usize) {
        self.private.store(self.next_object() | (shelf as u32) << SHELF_AT, Ordering::Relaxed);
    }

    /// The list links: next and previous frame number, as the list's owner set them.
    #[inline]
    pub fn lru(&self) -> (u32, u32) {
        (self.lru_next.load(Ordering::Relaxed), self.lru_prev.load(Ordering::Relaxed))
    }

    /// Sets the list links. For the owner of the list, which is always a layer of the core: a list
    /// that others could bend would lead anywhere.
    #[inline]
    pub(crate) fn set_lru(&self, next: u32, prev: u32) {
        self.lru_next.store(next, Ordering::Relaxed);
        self.lru_prev.store(prev, Ordering::Relaxed);
    }
}

/// Where in a slab's `private` word its shelf is noted.
const SHELF_AT: u32 = 28;

impl fmt::Debug for Page {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "page:{:p} {:?} mapcount:{} mapping:{:#x} index:{:#x} private:{:#x}",
            self,
            self.state(),
            self.mapcount(),
            self.mapping(),
            self.index(),
            self.private()
        )
    }
}
