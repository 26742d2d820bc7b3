//! The audit: is every frame where exactly one place says it is?
//!
//! # Concepts
//! Every managed frame is in the free lists, on a per-CPU list, or in a live block. The audit looks at
//! every frame and every list and checks that the three agree with each other and with the counters. It
//! is for tests, torture runs and debugging: it walks all of memory, and the machine must be quiet.
//!
//! # Locking
//! Areas' locks, one at a time.

use super::{PageAllocator, pcp::Pcp, slow::Reclaim};
use crate::{
    page::PageFlags,
    platform::Platform,
    types::{MigrateType, PAGEBLOCK_FRAMES, PAGEBLOCK_ORDER, Pfn},
    zone::Zone,
};
use core::{fmt, sync::atomic::Ordering::Relaxed};

/// What an audit counted, in frames.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Audit {
    /// In the free lists.
    pub free: u64,
    /// On per-CPU lists.
    pub pcp: u64,
    /// In live blocks.
    pub allocated: u64,
    /// Managed in all.
    pub managed: u64,
}

/// What an audit found wrong first.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AuditError {
    /// A frame in two states, or in none; the frame, and how many say it is theirs.
    Frame(Pfn, u32),
    /// A zone's counter of free frames differs from its lists; the slot, counter and lists.
    FreeCount(usize, u64, u64),
    /// What is reported of a zone's free blocks of an order differs from their bits; slot, order, reported, bits.
    NrFree(usize, u32, u64, u64),
    /// A zone's counter of free frames kept for high-order atomic requests differs; the slot, counter and lists.
    HighAtomic(usize, u64, u64),
    /// The marks that a zone's fast path compares with are not those that its watermarks and reserves come to; the slot.
    FastMark(usize),
    /// A pageblock's descriptor differs from its bits; the first frame.
    Pageblock(Pfn),
    /// Managed frames differ from those accounted for.
    Total(Audit),
}

impl fmt::Display for AuditError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AuditError::Frame(pfn, n) => write!(f, "pfn:{pfn} is claimed {n} times"),
            AuditError::FreeCount(slot, a, b) => {
                write!(f, "zone {slot}: {a} frames counted free, {b} on lists")
            }
            AuditError::NrFree(slot, order, a, b) => {
                write!(f, "zone {slot}, order {order}: {a} blocks reported, {b} by their bits")
            }
            AuditError::HighAtomic(slot, a, b) => {
                write!(f, "zone {slot}: {a} frames counted free for atomic requests, {b} on lists")
            }
            AuditError::FastMark(slot) => {
                write!(f, "zone {slot}: the fast path's marks are not the watermarks'")
            }
            AuditError::Pageblock(pfn) => {
                write!(f, "pageblock pfn:{pfn}: descriptor and bits differ")
            }
            AuditError::Total(a) => write!(f, "frames do not add up: {a:?}"),
        }
    }
}

impl core::error::Error for AuditError {}

/// What a zone's bits say: free frames, those of them kept for high-order atomic requests, maximal blocks by order.
struct Blocks {
    free: u64,
    highatomic: u64,
    nr_free: [u64; 16],
}

impl<P: Platform, R: Reclaim> PageAllocator<P, R> {
    /// Checks every frame, list and counter. The machine must be quiet: what others do meanwhile shows
    /// as an error.
    ///
    /// # Errors
    /// The first thing found wrong.
    pub fn audit(&self) -> Result<Audit, AuditError> {
        let mut sum = Audit::default();
        for zone in self.zones {
            sum.managed += zone.managed_frames();
            let Blocks { free, highatomic, nr_free } = self.audit_blocks(zone)?;
            let counted = zone.free_highatomic.load(Relaxed).max(0) as u64;
            if counted != highatomic {
                return Err(AuditError::HighAtomic(zone.slot, counted, highatomic));
            }
            if !zone.fast_marks_agree() {
                return Err(AuditError::FastMark(zone.slot));
            }
            if free != zone.free_frames() {
                return Err(AuditError::FreeCount(zone.slot, zone.free_frames(), free));
            }
            for (order, (have, want)) in self.nr_free(zone).iter().zip(nr_free).enumerate() {
                if *have != want {
                    return Err(AuditError::NrFree(zone.slot, order as u32, *have, want));
                }
            }
            sum.free += free;
            for cpu in 0..self.p.nr_cpu_ids() {
                let Some(pcp) = self.pcp_of(cpu, zone.slot) else { continue };
                sum.pcp += pcp.frames();
                self.audit_pcp(pcp)?;
            }
        }
        let (start, end) = self.map.span();
        let mut pfn = start;
        while pfn < end {
            if self.map.flags_of(pfn).zone_slot().is_none() {
                pfn += PAGEBLOCK_FRAMES;
                continue;
            }
            let state = self.map.page_in_map(pfn).state();
            if !state.is_allocated() {
                pfn += 1;
                continue;
            }
            let n = 1 << state.order();
            if state.count() == 0 {
                return Err(AuditError::Frame(Pfn(pfn), 0));
            }
            for f in pfn..pfn + n {
                let other_head = f != pfn && self.map.page_in_map(f).state().is_allocated();
                if self.buddy_order(Pfn(f)).is_some() || other_head {
                    return Err(AuditError::Frame(Pfn(f), 2));
                }
            }
            sum.allocated += u64::from(n);
            pfn += n;
        }
        if sum.free + sum.pcp + sum.allocated != sum.managed {
            return Err(AuditError::Total(sum));
        }
        Ok(sum)
    }

    fn audit_blocks(&self, zone: &Zone) -> Result<Blocks, AuditError> {
        let (mut free, mut highatomic, mut nr_free) = (0, 0, [0; 16]);
        for region in zone.regions() {
            free += u64::from(region.whole().count_ones()) << PAGEBLOCK_ORDER;
            let h = region.histogram(self.max_order - PAGEBLOCK_ORDER);
            for (k, n) in h.iter().enumerate() {
                nr_free[PAGEBLOCK_ORDER as usize + k] += u64::from(*n);
            }
        }
        for pfn in self.map.pageblocks() {
            if self.map.flags_of(pfn).zone_slot() != Some(zone.slot) {
                continue;
            }
            let Some(i) = self.map.block_index(pfn) else { continue };
            let (bits, word) = (&self.map.bits[i], self.map.blocks[i].word());
            let h = bits.histogram();
            let bin = h.iter().rposition(|n| *n > 0).map_or(0, |k| k as u32 + 1);
            let agrees = bits.count() == word.frames()
                && (0..=PAGEBLOCK_ORDER).all(|k| word.count(k) == h[k as usize])
                && word.bin() == bin;
            if !agrees {
                return Err(AuditError::Pageblock(Pfn(pfn)));
            }
            free += u64::from(bits.count());
            if word.flags().migratetype() == MigrateType::HighAtomic {
                highatomic += u64::from(bits.count());
            }
            for (k, n) in h.iter().enumerate() {
                nr_free[k] += u64::from(*n);
            }
        }
        Ok(Blocks { free, highatomic, nr_free })
    }

    fn audit_pcp(&self, pcp: &Pcp) -> Result<(), AuditError> {
        for (list, page) in pcp.blocks() {
            let pfn = self.map.frame_of(page);
            for f in pfn..pfn + (1 << list.order()) {
                let live = self.map.page_in_map(f).state().is_allocated();
                let reserved = self.map.page_in_map(f).flags().contains(PageFlags::RESERVED);
                if live || reserved || self.buddy_order(Pfn(f)).is_some() {
                    return Err(AuditError::Frame(Pfn(f), 2));
                }
            }
        }
        Ok(())
    }
}
