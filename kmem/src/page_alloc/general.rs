//! The general path: every request, with all that its flags and its context say.
//!
//! # Concepts
//! A [`Request`] is what remains of flags, scopes, policy and cpuset once they are decided. It is tried
//! on each zone of the zonelist, first against the low watermark; `rmqueue` then takes the block from the
//! CPU's list or from the buddy, with stealing between mobilities last.
//!
//! # Locking
//! As for the fast path. Nothing is held between zones.

use super::{
    GATE_INIT_ALLOC, Owned, PageAllocator,
    pcp::{ListId, Pcp},
    slow::Reclaim,
};
use crate::{
    buddy::Area,
    context::{
        Cpu, MemPolicy, PF_CPUSET, PF_MEMALLOC_NOFS, PF_MEMALLOC_NOIO, PF_OOM_VICTIM, PF_POLICY,
        Path,
    },
    error::AllocError,
    gfp::{Gfp, GfpError},
    page::{Page, PageFlags, PageState},
    platform::{Level, Platform},
    prefetch::prefetch,
    trace::Event,
    types::{MigrateType, PAGEBLOCK_ORDER, Pfn, ZoneType},
    vmstat::VmEvent,
    zone::{AllocFlags, Zone},
};
use core::{panic::Location, sync::atomic::Ordering::Relaxed};

/// A request, decided.
#[derive(Clone, Copy)]
pub(super) struct Request {
    pub(super) gfp: Gfp,
    pub(super) order: u32,
    pub(super) highest: usize,
    pub(super) mt: MigrateType,
    /// Node to start from.
    pub(super) node: usize,
    /// Nodes the memory policy allows.
    pub(super) nodes: u64,
    /// Nodes the cpuset allows.
    pub(super) cpuset: u64,
    /// Whether an interleave policy chose the node.
    pub(super) interleave: bool,
    /// Who asked.
    pub(super) at: &'static Location<'static>,
}

impl<P: Platform, R: Reclaim> PageAllocator<P, R> {
    /// `alloc_pages_node`: as [`alloc_pages`](Self::alloc_pages), from node `nid` first; −1 is the
    /// caller's node \[Z5\]. The memory policy does not apply.
    ///
    /// # Errors
    /// As [`alloc_pages`](Self::alloc_pages), and `Invalid` for a node that does not exist.
    #[track_caller]
    pub fn alloc_pages_node(&self, nid: i32, gfp: Gfp, order: u32) -> Result<&Page, AllocError> {
        if nid == -1 {
            return self.alloc_pages(gfp, order);
        }
        match usize::try_from(nid) {
            Ok(n) if n < self.lists.nodes() => self.alloc_general(gfp, order, Some(n)),
            _ => Err(self.refuse(gfp, order, GfpError::NoSuchNode)),
        }
    }

    /// Reports a request that contradicts itself.
    #[cold]
    #[track_caller]
    pub(crate) fn refuse(&self, gfp: Gfp, order: u32, e: GfpError) -> AllocError {
        let at = Location::caller();
        self.p.report(
            Level::Bug,
            format_args!(
                "WARNING: bad allocation request: {e}: order:{order}, mode:{:#x}({gfp}), at {}:{}",
                gfp.bits(),
                at.file(),
                at.line()
            ),
        );
        AllocError::Invalid(e)
    }

    #[cold]
    #[track_caller]
    pub(crate) fn refuse_context(&self, gfp: Gfp, order: u32) -> AllocError {
        let at = Location::caller();
        let context = self.context();
        let what = if context.in_nmi() {
            "allocation in NMI context"
        } else {
            "sleeping function called from invalid context"
        };
        self.p.report(
            Level::Bug,
            format_args!(
                "BUG: {what} at {}:{}: {context:?}, order:{order}, mode:{:#x}({gfp})",
                at.file(),
                at.line(),
                gfp.bits()
            ),
        );
        AllocError::Context
    }

    /// Refuses a request that its context does not allow.
    #[track_caller]
    pub(crate) fn check_context(&self, gfp: Gfp) -> Result<(), AllocError> {
        let context = self.context();
        if context.in_nmi() || (self.allowed(gfp).may_block() && !context.may_sleep()) {
            return Err(self.refuse_context(gfp, 0));
        }
        Ok(())
    }

    /// Checks a request and decides it; the boot mask, scopes, policy and cpuset are in the result.
    #[track_caller]
    pub(super) fn decide(
        &self,
        gfp: Gfp,
        order: u32,
        node: Option<usize>,
    ) -> Result<Request, AllocError> {
        if order > self.max_order {
            return Err(self.refuse(gfp, order, GfpError::OrderTooLarge));
        }
        if let Err(e) = gfp.check(order) {
            return Err(self.refuse(gfp, order, e));
        }
        let context = self.context();
        let mut gfp = self.allowed(gfp);
        if context.in_nmi() || (gfp.may_block() && !context.may_sleep()) {
            return Err(self.refuse_context(gfp, order));
        }
        let highest = match gfp.zone_index() {
            Some(z) => self.lists.served_by(z),
            None => return Err(self.refuse(gfp, order, GfpError::TwoZones)),
        };
        let local = self.p.this_cpu().map_or(0, Cpu::node);
        let mut r = Request {
            gfp,
            order,
            highest,
            mt: gfp.migratetype(),
            node: node.unwrap_or(local),
            nodes: u64::MAX,
            cpuset: u64::MAX,
            interleave: false,
            at: Location::caller(),
        };
        self.with_task(|task| {
            let Some(task) = task else { return };
            let flags = task.flags();
            if flags & PF_MEMALLOC_NOIO != 0 {
                gfp.remove(Gfp::IO | Gfp::FS);
            }
            if flags & PF_MEMALLOC_NOFS != 0 {
                gfp.remove(Gfp::FS);
            }
            if flags & PF_CPUSET != 0 && flags & PF_OOM_VICTIM == 0 {
                r.cpuset = task.mems_allowed().0;
            }
            if flags & PF_POLICY != 0 && node.is_none() && !gfp.contains(Gfp::THISNODE) {
                match task.mempolicy() {
                    MemPolicy::Default => {}
                    MemPolicy::Bind(nodes) => {
                        r.nodes = nodes;
                        if nodes >> local & 1 == 0 {
                            let nearest =
                                self.lists.nodes_from(local).find(|n| nodes >> n & 1 == 1);
                            r.node = nearest.unwrap_or(local);
                        }
                    }
                    MemPolicy::Interleave(nodes) => {
                        if let Some(n) =
                            task.next_interleave(nodes).filter(|n| *n < self.lists.nodes())
                        {
                            r.node = n;
                            r.interleave = true;
                        }
                    }
                    MemPolicy::Preferred(n) if usize::from(n) < self.lists.nodes() => {
                        r.node = usize::from(n);
                    }
                    MemPolicy::Preferred(_) => {}
                }
            }
        });
        r.gfp = gfp;
        Ok(r)
    }

    /// The general path of one allocation.
    #[cold]
    #[inline(never)]
    #[track_caller]
    pub(super) fn alloc_general(
        &self,
        gfp: Gfp,
        order: u32,
        node: Option<usize>,
    ) -> Result<&Page, AllocError> {
        let r = self.decide(gfp, order, node)?;
        let fails = self.fails(r.gfp, r.at);
        let got = if fails || self.fault.strikes() && !r.gfp.contains(Gfp::NOFAIL) {
            self.fail(&r)
        } else {
            // The first attempt stays within the cpuset, whoever asks.
            let flags = AllocFlags { cpuset: true, ..AllocFlags::LOW };
            match self.marked(Path::Slow, || self.try_zonelist(&r, flags)) {
                Some(page) => Ok(page),
                None => self.alloc_slow(&r),
            }
        };
        if let Ok(page) = got
            && (r.gfp.contains(Gfp::ZERO) || self.gate.load(Relaxed) & GATE_INIT_ALLOC != 0)
            && let Some(pfn) = self.map.pfn(page)
        {
            self.p.zero_frames(Pfn(pfn), 1 << order);
        }
        if let Ok(page) = got {
            self.note_alloc(page, order, r.gfp, r.at);
        }
        if self.tracing() {
            self.trace(&Event::PageAlloc {
                pfn: got.ok().and_then(|p| self.map.pfn(p)).map(Pfn),
                order,
                gfp: r.gfp,
                migratetype: r.mt,
            });
        }
        got
    }

    /// The state a block of this request starts in.
    pub(super) fn initial_state(r: &Request) -> PageState {
        let head = r.order > 0 && r.gfp.contains(Gfp::COMP);
        PageState::allocated(r.order, if head { PageFlags::HEAD } else { PageFlags::empty() })
    }

    /// Tries each zone of the request's zonelist.
    pub(super) fn try_zonelist(&self, r: &Request, flags: AllocFlags) -> Option<&Page> {
        self.zones_for(r, flags).find_map(|zone| {
            let room = zone.room(r.highest, flags) - ((1 << r.order) - 1);
            if room <= 0 {
                return None;
            }
            if r.order > 0 && !zone.has_block(&self.p, r.order, r.mt, flags.highatomic) {
                // A block of a list may still do; the list of the CPU's own is asked below.
                ListId::of(r.order, r.mt as usize)?;
            }
            loop {
                let pfn = self.rmqueue(zone, r, flags, room)?;
                if let Some(page) = self.dress(self.map.page_in_map(pfn), Self::initial_state(r)) {
                    self.count_numa(zone, r);
                    return Some(page);
                }
            }
        })
    }

    /// The zones a request may have, best first.
    pub(super) fn zones_for<'s>(
        &'s self,
        r: &Request,
        flags: AllocFlags,
    ) -> impl Iterator<Item = &'s Zone> + use<'s, P, R> {
        let r = *r;
        self.lists.walk(r.node, r.highest).map(|slot| &self.zones[slot]).filter(move |zone| {
            let node = zone.node();
            let bit = 1u64 << node;
            r.nodes & bit != 0
                && (!flags.cpuset || r.cpuset & bit != 0)
                && (!r.gfp.contains(Gfp::THISNODE) || node == r.node)
        })
    }

    fn count_numa(&self, zone: &Zone, r: &Request) {
        let local = self.p.this_cpu().map_or(0, Cpu::node);
        if zone.node() == r.node {
            self.count_zone_numa(zone, VmEvent::NumaHit);
            if r.interleave {
                self.count_zone_numa(zone, VmEvent::NumaInterleave);
            }
        } else {
            self.count_zone_numa(zone, VmEvent::NumaMiss);
            if let Some(first) = self.zones.get(self.lists.first_slot(r.node, r.highest)) {
                self.count_zone_numa(first, VmEvent::NumaForeign);
            }
        }
        let here = zone.node() == local;
        self.count_zone_numa(zone, if here { VmEvent::NumaLocal } else { VmEvent::NumaOther });
    }

    /// Takes one block of a zone: from the reserve if that is there for the request, else from the CPU's
    /// list if there is one and it is not owned, else from the buddy.
    fn rmqueue(&self, zone: &Zone, r: &Request, flags: AllocFlags, room: i64) -> Option<u32> {
        if flags.highatomic
            && zone.reserved_highatomic.load(Relaxed) > 0
            && let Some(pfn) = self.rmqueue_buddy(zone, r, |home| self.reserved(zone, home, r))
        {
            return Some(pfn);
        }
        if let Some(list) = ListId::of(r.order, r.mt as usize)
            && let Some(cpu) = self.p.get_cpu()
        {
            let pfn = self.rmqueue_pcp(cpu, zone, list, r, room);
            self.p.put_cpu(cpu);
            match pfn {
                Some(Some(pfn)) => return Some(pfn),
                Some(None) if !flags.oom && !flags.non_block => return None,
                _ => {}
            }
        }
        self.rmqueue_buddy(zone, r, |home| {
            let pfn = self.ordinary(zone, home, r);
            // In the last resort an atomic request may eat into the high-order reserve.
            let desperate = flags.oom || flags.non_block;
            pfn.or_else(|| if desperate { self.reserved(zone, home, r) } else { None })
        })
    }

    /// `None`: the CPU has no list to use; `Some(None)`: the list is empty and cannot be refilled.
    fn rmqueue_pcp(
        &self,
        cpu: &Cpu,
        zone: &Zone,
        list: ListId,
        r: &Request,
        room: i64,
    ) -> Option<Option<u32>> {
        let pcp = self.pcp_of(cpu.id(), zone.slot)?;
        if pcp.high(list) == 0 {
            return None;
        }
        let owned: Owned<'_> = self.own(cpu, Path::PcpAlloc)?;
        let page = if r.gfp.contains(Gfp::COLD) { pcp.pop_cold(list) } else { pcp.pop_hot(list) };
        // `room` above zero means a block; what is left of it then is one less.
        let page = page.or_else(|| self.refill(cpu, zone, pcp, list, room - 1, 1));
        if page.is_some() {
            self.counters_of(cpu).owned(VmEvent::pgalloc(zone.zone_type()), 1 << r.order);
            self.counters_of(cpu).owned(VmEvent::PcpHit, 1);
        }
        self.disown(owned);
        Some(page.map(|page| self.map.frame_of(page)))
    }

    /// Refills a list that ran empty, and takes one block of it. The caller owns the lists, and is about to take
    /// `need` blocks. Takes no more than an eighth of `room` frames beyond that one, so that a batch does not go below the
    /// watermark that one block respected, and the last of a zone does not end on one CPU's list. Where the zone has little
    /// left, larger blocks are broken up for what is needed or half of a batch only.
    #[cold]
    #[inline(never)]
    pub(super) fn refill(
        &self,
        cpu: &Cpu,
        zone: &Zone,
        pcp: &Pcp,
        list: ListId,
        room: i64,
        need: usize,
    ) -> Option<&'static Page> {
        let _ = cpu.set_path(Path::Refill);
        let order = list.order();
        let mt = list.migratetype();
        let limits = &self.limits[zone.slot];
        let counters = self.counters_of(cpu);
        if self.fault.strikes() {
            return None;
        }
        let supply = limits.supply(zone);
        if pcp.note_refill(list, limits, supply) {
            self.settle(cpu, zone, pcp, list, supply);
        }
        let batch = pcp.batch(list, limits).max(need as u32).min(pcp.high(list)).max(1);
        let want = i64::from(batch).min((room >> order >> 3) + 1).max(1) as u32;
        let need =
            if supply.is_little() { want.min(want.div_ceil(2).max(need as u32)) } else { want };
        let mut got = 0;
        let first = Self::first_area(zone, pcp);
        for n in zone.areas_from(first) {
            got = zone.with_area(&self.p, &self.map, n, |area| {
                let mut end = pcp.refill(list, want);
                let mut put = |pfn: u32, n: u32| {
                    // Its state is about to change; those of the others lie behind it.
                    let pages = self.map.pages_from(pfn, n << order);
                    prefetch(pages.as_ptr());
                    end.put(pages.iter().step_by(1 << order));
                };
                if order == PAGEBLOCK_ORDER {
                    let taken = (0..want).map_while(|_| area.take_whole(order, mt));
                    taken.map(|pfn| put(pfn, 1)).count() as u32
                } else {
                    area.take_many(order, mt, need, want, &mut put)
                }
            });
            if got > 0 {
                pcp.note_area(first, n);
                break;
            }
        }
        if got == 0 && order < PAGEBLOCK_ORDER {
            let stolen = self.steal(zone, first, order, mt);
            let stolen = stolen.map(|pfn| self.map.page_in_map(pfn));
            got = u32::from(stolen.is_some());
            pcp.refill(list, 1).put(stolen.into_iter());
        }
        counters.owned(VmEvent::PcpRefill, u64::from(got > 0));
        if self.tracing() {
            let taken = pcp.blocks().filter(|(l, _)| *l == list);
            for (l, page) in taken {
                self.trace(&Event::PageAllocZoneLocked {
                    pfn: Pfn(self.map.frame_of(page)),
                    order: l.order(),
                    migratetype: mt,
                    percpu_refill: true,
                });
            }
        }
        let _ = cpu.set_path(Path::PcpAlloc);
        pcp.pop_hot(list)
    }

    /// The area to look in first: the CPU's own, or the one that had something last. All CPUs take from the same while
    /// the zone is short: what is left is kept together.
    #[inline(always)]
    pub(super) fn first_area(zone: &Zone, pcp: &Pcp) -> usize {
        if zone.pressed.load(Relaxed) != 0 { 0 } else { pcp.area() }
    }

    /// Takes a block from another mobility's pageblocks.
    fn steal(&self, zone: &Zone, home: usize, order: u32, mt: MigrateType) -> Option<u32> {
        zone.areas_from(home).find_map(|n| {
            let s = zone.with_area(&self.p, &self.map, n, |area| area.steal(order, mt))?;
            self.count(VmEvent::ExtfragSteal, 1);
            if s.converted {
                self.count(VmEvent::ExtfragConvert, 1);
            }
            if self.tracing() {
                self.trace(&Event::PageAllocExtfrag {
                    pfn: Pfn(s.pfn),
                    alloc_order: order,
                    fallback_order: s.order,
                    alloc_migratetype: mt,
                    fallback_migratetype: s.from,
                    change_ownership: s.converted,
                });
            }
            Some(s.pfn)
        })
    }

    /// Takes one block straight from the buddy: what `take` finds, beginning at the CPU's area.
    fn rmqueue_buddy(
        &self,
        zone: &Zone,
        r: &Request,
        take: impl FnOnce(usize) -> Option<u32>,
    ) -> Option<u32> {
        if self.fault.strikes() {
            return None;
        }
        let pcp = self.p.this_cpu().and_then(|cpu| self.pcp_of(cpu.id(), zone.slot));
        let home = pcp.map_or(0, |pcp| Self::first_area(zone, pcp));
        let pfn = self.marked(Path::BuddyAlloc, || take(home))?;
        self.count(VmEvent::pgalloc(zone.zone_type()), 1 << r.order);
        self.count(VmEvent::PcpBypass, 1);
        if self.tracing() {
            self.trace(&Event::PageAllocZoneLocked {
                pfn: Pfn(pfn),
                order: r.order,
                migratetype: r.mt,
                percpu_refill: false,
            });
        }
        Some(pfn)
    }

    /// A block that the areas of a zone have, asked one after the other from `home` on.
    fn first_of(
        &self,
        zone: &Zone,
        home: usize,
        ask: impl Fn(&mut Area<'_>) -> Option<u32>,
    ) -> Option<u32> {
        zone.areas_from(home).find_map(|n| zone.with_area(&self.p, &self.map, n, &ask))
    }

    /// A block of the pageblocks set aside for high-order atomic requests.
    fn reserved(&self, zone: &Zone, home: usize, r: &Request) -> Option<u32> {
        self.first_of(zone, home, |area| area.take_reserved(r.order))
    }

    /// A block of the request's mobility, or stolen from another.
    fn ordinary(&self, zone: &Zone, home: usize, r: &Request) -> Option<u32> {
        if r.order >= PAGEBLOCK_ORDER {
            return self.first_of(zone, home, |area| area.take_whole(r.order, r.mt));
        }
        let own = self.first_of(zone, home, |area| area.take(r.order, r.mt));
        own.or_else(|| self.steal(zone, home, r.order, r.mt))
    }

    /// The highest zone of the request as a type.
    pub(super) fn highest_zone(r: &Request) -> ZoneType {
        ZoneType::ALL[r.highest]
    }
}
