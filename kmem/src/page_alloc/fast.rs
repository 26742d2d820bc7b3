//! The fast path: a block of the CPU's own list, for requests with nothing unusual about them.
//!
//! # Concepts
//! What is unusual is decided by one mask test on the flags, one on the context, one on the gate and the
//! ownership flag. Everything the specification asks of a request is still true of those that pass:
//! the mask is free of contradictions (one table look-up), the context may do what the flags say, the
//! zone is above its low watermark, the frame's state is checked and set, the events are counted.
//!
//! # Locking
//! Ownership of the CPU's lists; an area's lock during a refill.

use super::{PageAllocator, pcp::PCP_MAX_SMALL, slow::Reclaim};
use crate::{
    context::{Cpu, Path},
    gfp::Gfp,
    page::{Page, PageFlags, PageState},
    platform::Platform,
    types::{MIGRATE_PCPTYPES, ZoneType},
    vmstat::VmEvent,
};
use core::sync::atomic::Ordering::Relaxed;

/// Flags that need the general path.
const UNUSUAL: u32 = Gfp::ZERO.union(Gfp::COLD).union(Gfp::THISNODE).union(Gfp::NOFAIL).bits();

const BAD: u8 = u8::MAX;

/// Highest zone (low nibble) and mobility (high nibble) by the low five bits of a mask: zone modifiers
/// and mobility flags. [`BAD`] for contradictions.
const KEYS: [u8; 32] = {
    let mut t = [BAD; 32];
    let mut i = 0;
    while i < 32 {
        let gfp = Gfp::from_bits_retain(i as u32);
        if gfp.check(0).is_ok()
            && let Some(zone) = gfp.zone_index()
        {
            t[i] = zone as u8 | (gfp.migratetype() as u8) << 4;
        }
        i += 1;
    }
    t
};

impl<P: Platform, R: Reclaim> PageAllocator<P, R> {
    /// `alloc_pages`: 2^`order` contiguous frames, naturally aligned, with one reference \[P1\].
    ///
    /// Context: may sleep if `gfp` has `__GFP_DIRECT_RECLAIM`; never from an NMI. The pages come from the
    /// caller's node, or as its memory policy says.
    ///
    /// # Errors
    /// [`AllocError::NoMemory`](crate::AllocError::NoMemory) after the retries that the flags allow;
    /// `Invalid` and `Context` when the request itself is wrong.
    ///
    /// See [`alloc_pages`](https://docs.kernel.org/core-api/mm-api.html#c.alloc_pages).
    #[inline]
    #[track_caller]
    pub fn alloc_pages(&self, gfp: Gfp, order: u32) -> Result<&Page, crate::AllocError> {
        if let Some(cpu) = self.p.get_cpu() {
            let page = self.alloc_owned(cpu, gfp, order);
            self.p.put_cpu(cpu);
            if let Some(page) = page {
                return Ok(page);
            }
        }
        self.alloc_general(gfp, order, None)
    }

    /// `alloc_page`: one frame \[P1\]. As [`alloc_pages`](Self::alloc_pages) with order 0.
    ///
    /// # Errors
    /// As [`alloc_pages`](Self::alloc_pages).
    #[inline]
    #[track_caller]
    pub fn alloc_page(&self, gfp: Gfp) -> Result<&Page, crate::AllocError> {
        self.alloc_pages(gfp, 0)
    }

    #[inline(always)]
    fn alloc_owned(&self, cpu: &Cpu, gfp: Gfp, order: u32) -> Option<&Page> {
        if order > PCP_MAX_SMALL || gfp.bits() & UNUSUAL != 0 {
            return None;
        }
        let context = cpu.context().unpinned(P::PREEMPTIBLE);
        if !context.may_sleep() && (gfp.may_block() || context.in_nmi()) {
            return None;
        }
        if self.gate.load(Relaxed) != 0 || cpu.path_raw() != Path::Idle as u8 {
            return None;
        }
        if cpu.current().is_some_and(|t| t.flags() != 0) {
            return None;
        }
        let key = KEYS[(gfp.bits() & 0x1f) as usize];
        let (highest, mt) = (usize::from(key & 0xf), usize::from(key >> 4));
        if highest > ZoneType::Movable as usize || mt >= MIGRATE_PCPTYPES {
            return None;
        }
        let slot = self.lists.first(cpu.node(), highest)?;
        let zone = &self.zones[slot];
        let room = zone.free.load(Relaxed)
            - zone.free_highatomic.load(Relaxed)
            - zone.fast_mark[highest].load(Relaxed)
            - (1 << order);
        if room <= 0 {
            return None;
        }
        let pcp = self.pcp_of(cpu.id(), slot)?;
        let list = order as usize * MIGRATE_PCPTYPES + mt;
        let owned = self.own(cpu, Path::PcpAlloc)?;
        let counters = self.counters_of(cpu);
        let pfn = match pcp.pop_hot(list) {
            Some(pfn) => Some(pfn),
            None => self.refill(cpu, zone, pcp, list, room),
        };
        if pfn.is_some() {
            counters.owned(VmEvent::pgalloc(zone.zone_type()), 1 << order);
        }
        self.disown(owned);
        let flags =
            if gfp.contains(Gfp::COMP) && order > 0 { PageFlags::HEAD } else { PageFlags::empty() };
        self.dress(pfn?, PageState::allocated(order, flags))
    }

    /// Turns a frame taken off a list into the head of a live block. `None`, after a report, if the
    /// frame's state says that it was not free: it is then left alone for ever.
    #[inline(always)]
    pub(super) fn dress(&self, pfn: u32, state: PageState) -> Option<&Page> {
        let page = self.map.page_in_map(pfn);
        if page.state() != PageState::FREE {
            self.bad_page(pfn, page);
            return None;
        }
        page.set_allocated(state);
        Some(page)
    }

    #[cold]
    fn bad_page(&self, pfn: u32, page: &Page) {
        self.p.report(
            crate::platform::Level::Bug,
            format_args!("BUG: Bad page state in free list: pfn:{pfn:#x} {page:?}"),
        );
        self.count(VmEvent::Misuse, 1);
    }
}
