//! Freeing: every free checked, a wrong one refused with memory intact \[P5\].
//!
//! # Concepts
//! A free is right when the page heads a live block of the given order, has exactly one reference,
//! is not mapped, belongs to no address space and carries no flag of use. All of that but the last two words is
//! in the state word, so the check and the transition to "free" are one compare-and-exchange.
//! Whatever fails it is looked at closely by [`PageAllocator::free_doubtful`]: a further reference makes it a
//! plain put, everything else is a [`Misuse`].
//!
//! # Locking
//! Ownership of the CPU's lists, or an area's lock.

use super::{
    PageAllocator,
    pcp::{ListId, PCP_MAX_SMALL},
    slow::Reclaim,
};
use crate::{
    context::{Cpu, Path},
    error::Misuse,
    page::{Page, PageFlags, PageState, Put},
    pageblock::PbFlags,
    platform::Platform,
    trace::Event,
    types::Pfn,
    vmstat::{VmCounters, VmEvent},
    zone::Zone,
};
use core::sync::atomic::Ordering::Relaxed;

impl<P: Platform, R: Reclaim> PageAllocator<P, R> {
    /// `__free_pages`: gives a block of `order` back \[P1\]. If someone else holds a reference, drops
    /// one reference; the last put frees the block.
    ///
    /// Context: any but NMI.
    ///
    /// # Errors
    /// [`Misuse`], reported as well, and nothing changed.
    ///
    /// See [`__free_pages`](https://docs.kernel.org/core-api/mm-api.html#c.__free_pages).
    #[inline]
    #[track_caller]
    pub fn __free_pages(&self, page: &Page, order: u32) -> Result<(), Misuse> {
        self.free_hot(page, order)
    }

    /// `__free_page`: as [`__free_pages`](Self::__free_pages) with order 0, inlined.
    ///
    /// # Errors
    /// As [`__free_pages`](Self::__free_pages).
    #[inline(always)]
    #[track_caller]
    pub fn __free_page(&self, page: &Page) -> Result<(), Misuse> {
        self.free_hot(page, 0)
    }

    /// The fast path of a free. Every way out on which something else is called is a tail call, so that a function that is
    /// nothing but this needs no stack.
    #[inline(always)]
    #[track_caller]
    fn free_hot(&self, page: &Page, order: u32) -> Result<(), Misuse> {
        let Some(cpu) = self.p.get_cpu_fast() else { return self.free_medium(page, order) };
        let small = order <= PCP_MAX_SMALL;
        let Some(idle) = self.idle_plain(cpu, false).filter(|_| small) else {
            self.p.put_cpu(cpu);
            return self.free_medium(page, order);
        };
        let found =
            self.map.locate(page).and_then(|(page, pb)| Some((page, pb, page.freeable(order)?)));
        let Some((page, pb, seen)) = found else {
            self.p.put_cpu(cpu);
            return self.free_general(page, order);
        };
        let data = self.data_of(&idle);
        let owned = self.own_idle(idle, Path::PcpFree, false);
        // All that is to be read is read before the locked instruction, which holds up what comes after it.
        // SAFETY: the flags are those of a pageblock of the map, and the order is small.
        let place = unsafe { data.rows.place(pb, order) };
        if let Some(place) = place
            && page.free_from(seen)
        {
            place.put_freed(page);
            self.disown_idle(owned);
            self.p.put_cpu(cpu);
            return Ok(());
        }
        self.disown_idle(owned);
        self.p.put_cpu(cpu);
        self.free_medium(page, order)
    }

    /// A plain free whose list is full, of an order without lists, or by a caller the fast path does not serve.
    #[inline(never)]
    #[track_caller]
    fn free_medium(&self, page: &Page, order: u32) -> Result<(), Misuse> {
        if self.gate.load(Relaxed) == 0
            && order <= self.max_order
            && let Some((page, pb)) = self.map.locate(page)
            && let Some(cpu) = self.p.get_cpu()
        {
            let done = !cpu.context().in_nmi() && page.try_free(order);
            if done {
                self.free_plain(cpu, page, pb, order);
            }
            self.p.put_cpu(cpu);
            if done {
                return Ok(());
            }
        }
        self.free_general(page, order)
    }

    /// Gives frames whose page is already in the free state to a list.
    #[inline]
    fn free_plain(&self, cpu: &Cpu, page: &'static Page, pb: PbFlags, order: u32) {
        let Some(zone) = pb.zone_slot().and_then(|s| self.zones.get(s)) else { return };
        if let Some(list) = ListId::of(order, pb.mt_index())
            && self.free_to_pcp(cpu, zone, list, page)
        {
            return;
        }
        let free = cpu.path_raw() < Path::FIRST_OWNER;
        let before = free.then(|| cpu.set_path(Path::BuddyFree));
        self.give(zone, self.map.frame_of(page), order, Some(self.counters_of(cpu)));
        if let Some(before) = before {
            cpu.restore(before);
        }
    }

    #[cold]
    #[inline(never)]
    #[track_caller]
    fn free_general(&self, page: &Page, order: u32) -> Result<(), Misuse> {
        self.free_checked(page, order).map(|_| ())
    }

    /// The general path of one free: `Ok(true)` if the block became free, `Ok(false)` if others still
    /// hold it.
    #[track_caller]
    pub(super) fn free_checked(&self, page: &Page, order: u32) -> Result<bool, Misuse> {
        if self.context().in_nmi() {
            return Err(self.misuse(Misuse::InNmi));
        }
        let Some(pfn) = self.map.pfn(page) else { return Err(self.misuse(Misuse::NotAPage)) };
        if order > self.max_order {
            return Err(self.misuse(Misuse::BadOrder { order }));
        }
        if !page.try_free(order) && !self.free_doubtful(pfn, page, order)? {
            return Ok(false);
        }
        if self.tracing() {
            self.trace(&Event::PageFree { pfn: Pfn(pfn), order });
        }
        self.see_off(pfn, order);
        self.free_frames(pfn, order);
        Ok(true)
    }

    /// A free that is not the plain case: `Ok(true)` if the block became free after all, `Ok(false)`
    /// if others still hold it.
    #[track_caller]
    fn free_doubtful(&self, pfn: u32, page: &Page, order: u32) -> Result<bool, Misuse> {
        match page.put(Some(order)) {
            Put::Remaining => Ok(false),
            Put::Last(_) => Ok(true),
            Put::None => Err(self.misuse(self.not_live(pfn))),
            Put::Busy(state) if state.order() != order => Err(self.misuse(Misuse::WrongOrder {
                pfn: Pfn(pfn),
                given: order,
                actual: state.order(),
            })),
            Put::Busy(state) => Err(self.misuse(Self::in_use(pfn, page, state))),
        }
    }

    /// What speaks against freeing a live block.
    pub(super) fn in_use(pfn: u32, page: &Page, state: PageState) -> Misuse {
        let pfn = Pfn(pfn);
        if page.mapcount() != 0 {
            Misuse::StillMapped { pfn, mapcount: page.mapcount() }
        } else if page.mapping() != 0 {
            Misuse::StillInMapping { pfn, mapping: page.mapping() }
        } else {
            Misuse::StillInUse { pfn, flags: state.flags() & PageFlags::CHECK_AT_FREE }
        }
    }

    /// What a frame is that heads no live block.
    pub(super) fn not_live(&self, pfn: u32) -> Misuse {
        let flags = self.map.flags_of(pfn);
        let zone = flags.zone_slot().and_then(|s| self.zones.get(s));
        let Some(zone) = zone else { return Misuse::NeverAllocated { pfn: Pfn(pfn) } };
        if self.map.page_in_map(pfn).flags().contains(PageFlags::RESERVED) {
            return Misuse::NeverAllocated { pfn: Pfn(pfn) };
        }
        if let Some((head, order)) = self.head_of(pfn) {
            return Misuse::TailPage { pfn: Pfn(pfn), head: Pfn(head), order };
        }
        let _ = zone;
        Misuse::DoubleFree { pfn: Pfn(pfn) }
    }

    /// The live block around a frame that does not head one: its first frame and order. A block is
    /// naturally aligned, so there is one place to look per order.
    pub(super) fn head_of(&self, pfn: u32) -> Option<(u32, u32)> {
        (1..=self.max_order).find_map(|order| {
            let head = Pfn(pfn).align_down(order).0;
            if head == pfn {
                return None;
            }
            let state = self.map.page(Pfn(head))?.state();
            (state.is_allocated() && state.order() >= order).then_some((head, state.order()))
        })
    }

    /// Gives frames whose page is already in the free state to a list. Any context but NMI.
    pub(super) fn free_frames(&self, pfn: u32, order: u32) {
        let pb = self.map.flags_of(pfn);
        if let Some(cpu) = self.p.get_cpu() {
            self.free_plain(cpu, self.map.page_in_map(pfn), pb, order);
            self.p.put_cpu(cpu);
        } else if let Some(zone) = pb.zone_slot().and_then(|s| self.zones.get(s)) {
            self.give(zone, pfn, order, None);
        }
    }

    #[inline(always)]
    fn free_to_pcp(&self, cpu: &Cpu, zone: &Zone, list: ListId, page: &'static Page) -> bool {
        let Some(pcp) = self.pcp_of(cpu.id(), zone.slot) else { return false };
        if pcp.high(list) == 0 {
            return false;
        }
        let Some(owned) = self.own(cpu, Path::PcpFree) else { return false };
        if !pcp.push_hot(list, page) {
            self.spill(cpu, zone, pcp, list, page, 0);
        }
        pcp.count_frees(list, 1);
        self.disown(owned);
        true
    }

    /// Gives one block to the buddy.
    pub(super) fn give(&self, zone: &Zone, pfn: u32, order: u32, counters: Option<&VmCounters>) {
        // Interrupts are masked when this is called, so nobody else counts on this CPU.
        self.give_uncounted(zone, pfn, order, || match counters {
            Some(c) => c.owned(VmEvent::PgFree, 1 << order),
            None => self.stray_counters.shared(VmEvent::PgFree, 1 << order),
        });
    }

    /// Gives one block to the buddy, counting the free only by `locked`, which runs under the area's
    /// lock.
    #[inline(always)]
    pub(super) fn give_uncounted(&self, zone: &Zone, pfn: u32, order: u32, locked: impl FnOnce()) {
        let given = zone.with_area(&self.p, &self.map, zone.area_of(pfn), |area| {
            locked();
            area.give(pfn, order)
        });
        match given {
            Ok(()) => self.relieve(zone),
            // The state word said live, the bitmap free: one of them was overwritten.
            Err(crate::buddy::AlreadyFree) => {
                self.misuse(Misuse::DoubleFree { pfn: Pfn(pfn) });
            }
        }
    }

    /// Ends the pressure on the zone's lists once it is above its high watermark.
    #[inline(always)]
    pub(super) fn relieve(&self, zone: &Zone) {
        if zone.pressed.load(Relaxed) != 0 && zone.free_frames() > zone.high_mark() {
            zone.pressed.store(0, Relaxed);
        }
    }
}
