//! The page allocator: `alloc_pages` and its family \[P1–P8, G1–G4, C1–C4\].
//!
//! # Concepts
//! A request goes down until something can answer it:
//!
//! ```text
//!   alloc_pages ─ fast path ─ own CPU's list of the preferred zone       (fast.rs)
//!        │ anything unusual, or the list and the zone's low watermark say no
//!        ▼
//!   general path: checks, scopes, policy, each zone of the zonelist      (general.rs)
//!        │ no zone is above its low watermark
//!        ▼
//!   slow path: wake kswapd, min watermark, reserves, reclaim, drain, OOM (slow.rs)
//! ```
//!
//! # Implementation
//! *Ownership.* The fast path takes the CPU's lists by storing a [`Path`] in its `Cpu`'s word, works, and
//! stores the word again that it found; no interrupt is masked and no shared cache line written. An interrupt that lands in
//! between finds the path set and goes to the buddy, under the area's lock. Locks mask interrupts, so
//! no interrupt ever finds its own CPU's lock held.
//!
//! *Draining.* Nobody touches another CPU's lists. To have them drained one sets `DEFER_DRAIN` in the
//! CPU's `deferred` word and kicks it; the kick's handler drains at once if the lists are not owned. A slower path that
//! owns them looks at `deferred` after it let them go. A fast path does not: whoever waits for an answer kicks
//! again now and then, until a kick lands elsewhere; what is asked for from a context that cannot wait is done
//! at the next kick or slower path.
//!
//! *The gate.* Tracing, fault injection, zeroing of everything, noting of owners and the early-boot mask close the
//! gate; then every operation takes the general path, which knows about them. Open, they cost nothing.
//!
//! # Locking
//! Ownership of the CPU's lists, then an area's lock. Areas are leaves; no two are held at once.
//!
//! See [memory management APIs](https://docs.kernel.org/core-api/mm-api.html).

mod addressed;
mod audit;
mod bringup;
mod bulk;
mod drain;
mod fast;
mod frames;
mod free;
mod general;
mod highatomic;
mod housekeeping;
mod info;
mod owner;
mod pageref;
mod pcp;
mod slow;
mod typed;

pub use audit::Audit;
pub use bringup::{BringUpError, Config};
pub use owner::PageOwner;
pub use slow::{Reclaim, ReclaimRequest};

use crate::{
    context::{Before, Context, Cpu, DEFER_PANIC, Gated, Held, IdleWord, Path, Task},
    error::Misuse,
    fault::{Fault, FaultPlan, FaultSite},
    gfp::Gfp,
    memmap::MemMap,
    page::Page,
    page_state::{NR_NODE_STATS, NR_SYSTEM_STATS, NR_ZONE_STATS, StatRow},
    platform::{Level, Platform},
    sites::Sites,
    sync::IrqLock,
    trace::{Event, TraceSink},
    types::{MigrateType, Pfn, ZoneType},
    vmstat::{NumaRow, VmCounters, VmEvent},
    zone::{MAX_AREAS, Watermarks, Zone, zonelist::Zonelists},
};
use core::{
    panic::Location,
    ptr::NonNull,
    sync::atomic::Ordering::SeqCst,
    sync::atomic::{
        AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering::Relaxed, compiler_fence,
    },
};
use owner::Owners;
use pcp::{Limits, ListId, Pcp, Rows};

/// Reasons for the gate to be closed.
const GATE_BOOT_MASK: u32 = 1;
const GATE_TRACE: u32 = 2;
const GATE_FAULT: u32 = 4;
const GATE_INIT_ALLOC: u32 = 8;
const GATE_INIT_FREE: u32 = 16;
const GATE_OWNER: u32 = 32;
const GATE_FAIL_PAGE_ALLOC: u32 = 64;

const _: () = assert!(MAX_AREAS <= 64);

/// The page allocator of one machine. `R` is what stands behind its slow path.
#[repr(C)]
pub struct PageAllocator<P: Platform, R> {
    // What every request looks at comes first.
    /// What a CPU's word says while a fast path may take its lists.
    idle: IdleWord,
    /// The same for plain requests, which a closed gate shuts out.
    plain: Gated,
    map: MemMap,
    p: P,
    zones: &'static [Zone],
    limits: &'static [Limits],
    lists: Zonelists,
    pcps: &'static [Pcp],
    cpu_data: &'static [CpuData],
    counters: &'static [VmCounters],
    /// For callers on no CPU.
    stray_counters: &'static VmCounters,
    /// By CPU, with one more for callers on none, and zone.
    numa: &'static [NumaRow],
    /// By CPU, with one more for callers on none, and node.
    node_stats: &'static [StatRow<NR_NODE_STATS>],
    /// Nodes that have such a row.
    nr_stat_nodes: usize,
    zone_stats: &'static [StatRow<NR_ZONE_STATS>],
    /// By CPU, with one more.
    system_stats: &'static [StatRow<NR_SYSTEM_STATS>],
    /// Why requests are not plain now: `GATE_*` bits.
    gate: AtomicU32,
    /// Held by who changes it.
    gating: IrqLock<()>,
    allowed: AtomicU32,
    max_order: u32,
    min_free_kbytes: AtomicU64,
    watermark_scale: AtomicU64,
    /// How often what rests on lists is looked for.
    stat_interval: housekeeping::Interval,
    fault: Fault,
    tracer: IrqLock<Option<&'static dyn TraceSink>>,
    panic_on_misuse: AtomicBool,
    failure_reports: AtomicU64,
    /// Which requests fail, and whose.
    fail_page_alloc: Fault,
    fail_page_alloc_site: IrqLock<Option<FaultSite>>,
    /// Who holds what, if there is room to note it.
    owners: Option<Owners>,
    /// Who called, by number; null until something asks for it.
    sites: AtomicPtr<Sites>,
    reclaim: R,
}

/// What the fast paths need to know of a CPU, in one place. Only the CPU uses it.
struct CpuData {
    /// By highest zone: the zone a plain request prefers, and the CPU's lists there.
    preferred: [Option<fast::Preferred<'static>>; 8],
    /// The CPU's lists.
    rows: Rows,
}

/// A CPU of the machine's whose lists nobody owned when it was looked at: an interrupt that came since has let them go again.
pub(crate) struct Idle<'a> {
    cpu: &'a Cpu,
    before: Before,
}

/// Ownership of a CPU's lists.
pub(crate) struct Owned<'a> {
    cpu: &'a Cpu,
    before: Before,
}

impl Owned<'_> {
    /// What the ownership gives access to.
    #[inline(always)]
    pub(crate) fn held(&self) -> Held<'_> {
        // SAFETY: `own` and `own_idle` alone make this, of a CPU that the platform said its caller is on and whose lists
        // nobody owned, once they have put its word on an owner's path. Until that is restored, by whoever ends this, an
        // interrupt on the CPU finds the lists owned, and no other CPU takes them.
        unsafe { Held::new(self.cpu) }
    }
}

/// A CPU's path is [marked](PageAllocator::mark).
#[must_use = "the mark goes with it"]
pub(crate) struct Mark<'a, P: Platform> {
    p: &'a P,
    cpu: Option<&'a Cpu>,
    /// `None` if the path stayed as it was.
    before: Option<Before>,
}

impl<P: Platform> Drop for Mark<'_, P> {
    #[inline(always)]
    fn drop(&mut self) {
        let Some(cpu) = self.cpu else { return };
        compiler_fence(SeqCst);
        if let Some(before) = self.before {
            cpu.restore(before);
        }
        self.p.put_cpu(cpu);
    }
}

impl<P: Platform, R> Drop for PageAllocator<P, R> {
    fn drop(&mut self) {
        for (id, data) in self.cpu_data.iter().enumerate() {
            if let Some(cpu) = self.p.cpu(id) {
                cpu.disclaim(core::ptr::from_ref(data).cast());
            }
        }
    }
}

impl<P: Platform, R: Reclaim> PageAllocator<P, R> {
    /// The platform.
    pub fn platform(&self) -> &P {
        &self.p
    }

    /// What stands behind the slow path.
    pub fn reclaim(&self) -> &R {
        &self.reclaim
    }

    /// Largest order of a request.
    pub fn max_order(&self) -> u32 {
        self.max_order
    }

    /// Frame size in bytes.
    pub const fn page_size(&self) -> usize {
        1 << P::PAGE_SHIFT
    }

    /// The populated zones: nodes ascending, within a node the lowest zone first.
    pub fn zones(&self) -> &[Zone] {
        self.zones
    }

    /// Number of nodes.
    pub fn nr_nodes(&self) -> usize {
        self.lists.nodes()
    }

    /// Nodes by distance from `node`, itself first.
    pub fn nodes_from(&self, node: usize) -> impl Iterator<Item = usize> + '_ {
        self.lists.nodes_from(node)
    }

    /// The page of a frame; `None` where there is no memory \[F3\].
    #[inline]
    pub fn pfn_to_page(&self, pfn: Pfn) -> Option<&Page> {
        self.map.page(pfn)
    }

    /// The frame of a page; `None` for a page of another machine \[F3\].
    #[inline]
    pub fn page_to_pfn(&self, page: &Page) -> Option<Pfn> {
        self.map.pfn(page).map(Pfn)
    }

    /// Where the direct map shows the page's frame; `None` for a high frame \[F3\].
    /// [`Kmem::page_address`](crate::Kmem::page_address) knows those that are mapped too.
    pub fn page_address(&self, page: &Page) -> Option<NonNull<u8>> {
        self.p.direct_map(self.page_to_pfn(page)?)
    }

    /// The page whose frame the direct map shows at `addr`; `None` for any other address \[F3\]. One of the vmalloc
    /// range is reported as well: [`vmalloc_to_page`](crate::Kmem::vmalloc_to_page) is the way there \[V2\].
    #[track_caller]
    pub fn virt_to_page(&self, addr: *const u8) -> Option<&Page> {
        match self.p.direct_unmap(addr) {
            Some(pfn) => self.pfn_to_page(pfn),
            None => {
                self.refuse_vmalloc(addr);
                None
            }
        }
    }

    /// The physical address that the direct map shows at `addr`; `None` for any other address, as by
    /// [`virt_to_page`](Self::virt_to_page).
    #[track_caller]
    pub fn virt_to_phys(&self, addr: *const u8) -> Option<u64> {
        let Some(pfn) = self.p.direct_unmap(addr) else {
            self.refuse_vmalloc(addr);
            return None;
        };
        let offset = addr.addr() & (self.page_size() - 1);
        Some((u64::from(pfn.0) << P::PAGE_SHIFT) + offset as u64)
    }

    /// Whether an address is in the vmalloc range, whatever is there \[V4\].
    pub fn is_vmalloc_addr(&self, addr: *const u8) -> bool {
        self.p.vmalloc_range().is_some_and(|range| range.contains(&addr.addr()))
    }

    /// Reports an address that should be one of the direct map, if it is one of the vmalloc range.
    #[cold]
    #[track_caller]
    pub(crate) fn refuse_vmalloc(&self, addr: *const u8) -> Option<Misuse> {
        let what = Misuse::VmallocAddress { addr: addr.addr() };
        self.is_vmalloc_addr(addr).then(|| self.misuse(what))
    }

    /// The zone of a frame; `None` where there is no memory.
    pub fn page_zone(&self, pfn: Pfn) -> Option<&Zone> {
        self.zones.get(self.map.flags_of(pfn.0).zone_slot()?)
    }

    /// Mobility of the frame's pageblock; `None` where there is no memory.
    pub fn pageblock_migratetype(&self, pfn: Pfn) -> Option<MigrateType> {
        let flags = self.map.flags_of(pfn.0);
        flags.zone_slot().map(|_| flags.migratetype())
    }

    /// Changes the mobility of the frame's pageblock; its free blocks go with it. `false` where there
    /// is no memory.
    pub fn set_pageblock_migratetype(&self, pfn: Pfn, mt: MigrateType) -> bool {
        let Some(zone) = self.page_zone(pfn) else { return false };
        zone.with_area(&self.p, &self.map, zone.area_of(pfn.0), |a| a.set_migratetype(pfn.0, mt));
        true
    }

    /// Free frames of the machine, those on per-CPU lists left out.
    pub fn nr_free_pages(&self) -> u64 {
        self.zones.iter().map(Zone::free_frames).sum()
    }

    /// Frames the allocator manages.
    pub fn totalram_pages(&self) -> u64 {
        self.zones.iter().map(Zone::managed_frames).sum()
    }

    /// Frames on the per-CPU lists of a zone, by CPU.
    pub fn pcp_frames(&self, zone: &Zone) -> impl Iterator<Item = u64> + '_ {
        let slot = zone.slot;
        (0..self.p.nr_cpu_ids()).map(move |cpu| self.pcp_of(cpu, slot).map_or(0, Pcp::frames))
    }

    /// Batch and present limit of the order-0 lists of a zone on a CPU, in frames.
    pub fn pcp_limits(&self, zone: &Zone, cpu: usize) -> (u32, u32) {
        let found = self
            .pcp_of(cpu, zone.slot)
            .zip(ListId::small(0, MigrateType::Movable as usize))
            .map(|(pcp, list)| (pcp.batch(list, &self.limits[zone.slot]), pcp.high(list)));
        found.unwrap_or_default()
    }

    #[inline(always)]
    fn pcp_of(&self, cpu: usize, slot: usize) -> Option<&Pcp> {
        self.pcps.get(cpu * self.zones.len() + slot)
    }

    #[inline(always)]
    fn counters_of(&self, cpu: &Cpu) -> &VmCounters {
        self.counters.get(cpu.id()).unwrap_or(self.stray_counters)
    }

    /// Counts an event from anywhere.
    pub(crate) fn count(&self, event: VmEvent, n: u64) {
        match self.p.this_cpu() {
            Some(cpu) => self.counters_of(cpu).shared(event, n),
            None => self.stray_counters.shared(event, n),
        }
    }

    /// The machine's count of an event since bring-up \[R5\].
    pub fn vm_event(&self, event: VmEvent) -> u64 {
        if event.numa_index().is_some() {
            return self.zones.iter().map(|zone| self.zone_numa_event(zone, event)).sum();
        }
        let cpus: u64 = self.counters.iter().map(|c| c.get(event)).sum();
        let counted = cpus + self.stray_counters.get(event);
        // The lists keep counts of their own for the fast paths.
        let lists = || self.pcps.chunks(self.zones.len()).flat_map(|c| c.iter().zip(self.zones));
        match event {
            VmEvent::PgFree => counted + lists().map(|(pcp, _)| pcp.freed_frames()).sum::<u64>(),
            VmEvent::PcpHit => {
                let hits = counted + lists().map(|(pcp, _)| pcp.allocs().0).sum::<u64>();
                hits.saturating_sub(self.vm_event(VmEvent::PcpRefill))
            }
            VmEvent::PcpBypass => {
                counted + lists().map(|(pcp, _)| pcp.direct_allocs()).sum::<u64>()
            }
            _ => match ZoneType::ALL.into_iter().find(|z| VmEvent::pgalloc(*z) == event) {
                Some(t) => {
                    let of = lists().filter(|(_, z)| z.zone_type() == t);
                    counted + of.map(|(pcp, _)| pcp.allocs().1).sum::<u64>()
                }
                None => counted,
            },
        }
    }

    /// Takes the CPU's lists, if nobody beneath the caller owns them.
    #[inline(always)]
    pub(crate) fn own<'a>(&self, cpu: &'a Cpu, path: Path) -> Option<Owned<'a>> {
        debug_assert!(path as u8 >= Path::FIRST_OWNER);
        if cpu.path_raw() >= Path::FIRST_OWNER {
            return None;
        }
        // The fast paths know the CPU from then on.
        cpu.set_machine(self.idle);
        let before = cpu.set_path(path);
        // An interrupt handler on this CPU must see the flag before any change of the lists.
        compiler_fence(SeqCst);
        Some(Owned { cpu, before })
    }

    /// The number of the machine, which no other has that matters.
    #[inline(always)]
    pub(crate) fn idle_word(&self) -> IdleWord {
        self.idle
    }

    /// Whether the lists of the CPU, which may be another machine's, may be taken by a fast path; with
    /// `process` only by a caller in process context.
    #[inline(always)]
    pub(crate) fn idle<'c>(&self, cpu: &'c Cpu, process: bool) -> Option<Idle<'c>> {
        cpu.idle(&self.idle, process, P::PREEMPTIBLE).map(|before| Idle { cpu, before })
    }

    /// As [`idle`](Self::idle), for plain requests: `None` while the gate is closed.
    #[inline(always)]
    fn idle_plain<'c>(&self, cpu: &'c Cpu, process: bool) -> Option<Idle<'c>> {
        cpu.idle(&self.plain.get(), process, P::PREEMPTIBLE).map(|before| Idle { cpu, before })
    }

    /// Takes the lists of an idle CPU.
    #[inline(always)]
    pub(crate) fn own_idle<'c>(&self, idle: Idle<'c>, path: Path, process: bool) -> Owned<'c> {
        debug_assert!(path as u8 >= Path::FIRST_OWNER);
        let Idle { cpu, before } = idle;
        cpu.leave_idle(before, path, process, P::PREEMPTIBLE);
        // As in `own`.
        compiler_fence(SeqCst);
        Owned { cpu, before }
    }

    /// Undoes [`own_idle`](Self::own_idle). The fast paths do not look at `deferred`: who waits for an answer kicks
    /// again. All others follow with [`do_deferred`](Self::do_deferred).
    #[inline(always)]
    pub(crate) fn disown_idle(&self, owned: Owned<'_>) {
        // An interrupt handler on this CPU must see every change of the lists before the flag falls.
        compiler_fence(SeqCst);
        owned.cpu.restore(owned.before);
    }

    /// The allocator's data for an idle CPU.
    #[inline(always)]
    fn data_of<'c>(&self, idle: &Idle<'c>) -> &'c CpuData {
        let data = idle.cpu.data().cast::<CpuData>();
        debug_assert!(!data.is_null());
        // SAFETY: the CPU's word had this machine's number, which is noted by callers on the CPUs of its platform only.
        // Those are tied to a CpuData each before the machine is whole, in memory kept as long as the platform, until
        // it is dropped; being tied to another takes the number off.
        unsafe { &*data }
    }

    /// Has a CPU know its machine again that was to forget it.
    pub(crate) fn remember(&self, cpu: &Cpu) {
        cpu.remember(self.idle);
    }

    /// Whether a misuse panics.
    pub(crate) fn panics_on_misuse(&self) -> bool {
        self.panic_on_misuse.load(Relaxed)
    }

    /// The memory map.
    #[inline(always)]
    pub(crate) fn map(&self) -> &MemMap {
        &self.map
    }

    /// Lets the CPU's lists go, and does what others left for that moment.
    #[inline(always)]
    pub(crate) fn disown(&self, owned: Owned<'_>) {
        let cpu = owned.cpu;
        self.disown_idle(owned);
        self.do_deferred(cpu);
    }

    /// Does what others left for a CPU, whose lists the caller has just let go.
    #[inline(always)]
    pub(crate) fn do_deferred(&self, cpu: &Cpu) {
        // The flag fell before the look at `deferred`: a request that comes before the look is seen
        // by it, one that comes after is served by its own interrupt.
        compiler_fence(SeqCst);
        if cpu.deferred.load(Relaxed) != 0 {
            self.run_deferred(cpu);
        }
    }

    /// Runs `f` with the CPU's path marked, for the statistics of where interrupts land. The lists are not
    /// owned by this.
    fn marked<T>(&self, path: Path, f: impl FnOnce() -> T) -> T {
        let cpu = self.p.get_cpu();
        let free = cpu.filter(|cpu| cpu.path_raw() < Path::FIRST_OWNER);
        let before = free.map(|cpu| cpu.set_path(path));
        compiler_fence(SeqCst);
        let _mark = Mark { p: &self.p, cpu, before };
        f()
    }

    /// Marks the path of a CPU that is in none until what this returns is dropped: for the layers above, with few
    /// instructions. The caller stays on the CPU meanwhile, and allocates nothing.
    #[inline(always)]
    pub(crate) fn mark(&self, path: Path) -> Mark<'_, P> {
        let cpu = self.p.get_cpu_fast();
        let before = cpu.and_then(|cpu| cpu.idle(&self.idle, false, P::PREEMPTIBLE));
        match (cpu, before) {
            (Some(cpu), Some(idle)) => {
                cpu.leave_idle(idle, path, false, P::PREEMPTIBLE);
                compiler_fence(SeqCst);
            }
            _ => self.note_machine(),
        }
        Mark { p: &self.p, cpu, before }
    }

    /// Has the caller's CPU know whose it is, for the next time.
    #[cold]
    #[inline(never)]
    fn note_machine(&self) {
        if let Some(cpu) = self.p.get_cpu() {
            cpu.set_machine(self.idle);
            self.p.put_cpu(cpu);
        }
    }

    /// The caller's context; process context for callers on no CPU.
    pub(crate) fn context(&self) -> Context {
        self.p.this_cpu().map_or(Context::PROCESS, Cpu::context)
    }

    /// Runs `f` on the current task, unless an interrupt runs.
    fn with_task<T>(&self, f: impl FnOnce(Option<&Task>) -> T) -> T {
        match self.p.this_cpu() {
            Some(cpu) if !cpu.context().in_interrupt() => f(cpu.current()),
            _ => f(None),
        }
    }

    fn gate_set(&self, bit: u32, closed: bool) {
        let _alone = self.gating.lock(&self.p);
        if closed {
            self.gate.fetch_or(bit, Relaxed);
        } else {
            self.gate.fetch_and(!bit, Relaxed);
        }
        self.plain.set(self.idle, self.gate.load(Relaxed) == 0);
    }

    /// Restricts what every request may do, as before interrupts and kswapd run (`gfp_allowed_mask`): bits
    /// outside `mask` are stripped from every request \[G1\]. [`Gfp::all`] lifts it.
    pub fn set_gfp_allowed_mask(&self, mask: Gfp) {
        self.allowed.store(mask.bits(), Relaxed);
        self.gate_set(GATE_BOOT_MASK, mask != Gfp::all());
    }

    /// What is left of a request's flags under the mask.
    #[inline(always)]
    pub(crate) fn allowed(&self, gfp: Gfp) -> Gfp {
        gfp & Gfp::from_bits_retain(self.allowed.load(Relaxed))
    }

    /// Sends every event of pages to `sink`, or to nobody \[T2\]; those of objects too while
    /// [`set_trace_objects`](crate::Kmem::set_trace_objects) has them on.
    pub fn set_tracer(&self, sink: Option<&'static dyn TraceSink>) {
        *self.tracer.lock(&self.p) = sink;
        self.gate_set(GATE_TRACE, sink.is_some());
    }

    #[inline(always)]
    fn tracing(&self) -> bool {
        self.gate.load(Relaxed) & GATE_TRACE != 0
    }

    /// Tells the sink of an event, if there is one.
    pub(crate) fn trace(&self, event: &Event) {
        if self.tracing() {
            let sink = *self.tracer.lock(&self.p);
            if let Some(sink) = sink {
                sink.event(self.p.this_cpu().map(Cpu::id), event);
            }
        }
    }

    /// Makes inner allocations fail by plan \[D1\].
    ///
    /// Context: any but NMI.
    pub fn set_fault_plan(&self, plan: FaultPlan) {
        self.fault.set(plan);
        self.gate_set(GATE_FAULT, plan != FaultPlan::Off);
    }

    /// How many inner allocations were made to fail since bring-up.
    pub fn faults_injected(&self) -> u64 {
        self.fault.failed()
    }

    /// Has requests for pages fail by plan (`fail_page_alloc`), all of them or those of the callers in some lines of a
    /// file \[D1\]: they find no memory. Requests with `__GFP_NOFAIL` do not. Each request counts once, whatever
    /// it would have tried; see [`set_fault_plan`](Self::set_fault_plan) for what lies within.
    ///
    /// Context: any but NMI.
    ///
    /// See [fault injection](https://docs.kernel.org/fault-injection/fault-injection.html).
    pub fn set_fail_page_alloc(&self, plan: FaultPlan, site: Option<FaultSite>) {
        // Off while it changes.
        self.fail_page_alloc.set(FaultPlan::Off);
        *self.fail_page_alloc_site.lock(&self.p) = site;
        self.fail_page_alloc.set(plan);
        self.gate_set(GATE_FAIL_PAGE_ALLOC, plan != FaultPlan::Off);
    }

    /// How many requests were made to fail by [`set_fail_page_alloc`](Self::set_fail_page_alloc).
    pub fn fail_page_alloc_injected(&self) -> u64 {
        self.fail_page_alloc.failed()
    }

    /// Whether a request from `at` is to fail.
    fn fails(&self, gfp: Gfp, at: &Location<'_>) -> bool {
        if self.gate.load(Relaxed) & GATE_FAIL_PAGE_ALLOC == 0 || gfp.contains(Gfp::NOFAIL) {
            return false;
        }
        let site = *self.fail_page_alloc_site.lock(&self.p);
        site.is_none_or(|site| site.is(at)) && self.fail_page_alloc.strikes()
    }

    /// Whether all pages are zeroed when they are given out (`init_on_alloc`) \[D2\].
    pub(crate) fn set_init_pages_on_alloc(&self, on: bool) {
        self.gate_set(GATE_INIT_ALLOC, on);
    }

    /// Whether all pages are zeroed when they are freed (`init_on_free`) \[D2\].
    pub(crate) fn set_init_pages_on_free(&self, on: bool) {
        self.gate_set(GATE_INIT_FREE, on);
    }

    /// Does what is wanted with frames that just became free and are on no list yet: notes who freed them, zeroes
    /// them.
    #[track_caller]
    fn see_off(&self, pfn: u32, order: u32) {
        self.note_free(pfn);
        if self.gate.load(Relaxed) & GATE_INIT_FREE != 0 {
            self.p.zero_frames(Pfn(pfn), 1 << order);
        }
    }

    /// Whether a misuse panics after it was reported (`PanicOnMisuse`). Off by default. One that is found while the
    /// CPU's lists are owned panics when they are let go, so that a caller who catches it finds them whole.
    pub fn set_panic_on_misuse(&self, on: bool) {
        self.panic_on_misuse.store(on, Relaxed);
    }

    /// Reports a misuse and returns it.
    #[cold]
    #[track_caller]
    pub(crate) fn misuse(&self, what: Misuse) -> Misuse {
        self.misuse_with(what, format_args!(""))
    }

    /// As [`misuse`](Self::misuse), with more behind the report's first line.
    #[cold]
    #[track_caller]
    pub(crate) fn misuse_with(&self, what: Misuse, more: core::fmt::Arguments<'_>) -> Misuse {
        self.tell(what, more);
        self.panic_if_asked(what)
    }

    /// As [`misuse`](Self::misuse), with a report of the caller's.
    #[cold]
    pub(crate) fn misuse_as(&self, what: Misuse, text: core::fmt::Arguments<'_>) -> Misuse {
        self.count(VmEvent::Misuse, 1);
        self.p.report(Level::Bug, text);
        self.panic_if_asked(what)
    }

    fn panic_if_asked(&self, what: Misuse) -> Misuse {
        if self.panic_on_misuse.load(Relaxed) {
            match self.p.this_cpu().filter(|cpu| cpu.path_raw() >= Path::FIRST_OWNER) {
                Some(cpu) => _ = cpu.deferred.fetch_or(DEFER_PANIC, Relaxed),
                None => panic!("{what}"),
            }
        }
        what
    }

    /// Reports a misuse where nothing may unwind.
    #[cold]
    #[track_caller]
    pub(crate) fn tell(&self, what: Misuse, more: core::fmt::Arguments<'_>) {
        let at = Location::caller();
        self.count(VmEvent::Misuse, 1);
        let (subject, owner) = (what.subject(), self.owner_story(what.frame()));
        self.p.report(
            Level::Bug,
            format_args!("BUG: {subject}: {what}, at {}:{}{owner}{more}", at.file(), at.line()),
        );
    }

    /// `min_free_kbytes` now.
    pub fn min_free_kbytes(&self) -> u64 {
        self.min_free_kbytes.load(Relaxed)
    }

    /// Sets `min_free_kbytes` and, with it, every zone's watermarks \[Z4\].
    pub fn set_min_free_kbytes(&self, kbytes: u64) {
        self.min_free_kbytes.store(kbytes, Relaxed);
        self.spread_watermarks();
    }

    /// Sets `watermark_scale_factor`, in ten-thousandths of a zone \[Z4\].
    pub fn set_watermark_scale_factor(&self, scale: u64) {
        self.watermark_scale.store(scale.min(3000), Relaxed);
        self.spread_watermarks();
    }

    /// Sets one zone's watermarks, whatever `min_free_kbytes` says, until that is set again.
    pub fn set_watermarks(&self, zone: &Zone, marks: Watermarks) {
        zone.set_watermarks(marks);
    }

    fn spread_watermarks(&self) {
        crate::zone::distribute(
            self.zones,
            P::PAGE_SHIFT,
            self.min_free_kbytes.load(Relaxed),
            self.watermark_scale.load(Relaxed),
        );
    }
}
