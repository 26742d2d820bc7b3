//! The slow path: what a request may do when no zone is above its low watermark \[G2, P4, R2, R3\].
//!
//! # Concepts
//! In this order, as far as the flags allow each:
//! 1. wake kswapd;
//! 2. try again down to *min*, or below it with `__GFP_HIGH`;
//! 3. with `__GFP_MEMALLOC`, a reclaiming task or an OOM victim: the reserves;
//! 4. reclaim directly, drain every CPU's lists, give the high-order reserve back, and try again, as
//!    long as that gets anywhere (`__GFP_NORETRY`: once);
//! 5. call the OOM handler;
//! 6. `__GFP_NOFAIL`: wait and start over. Anything else fails, with one report unless
//!    `__GFP_NOWARN`.
//!
//! What reclaims is behind [`Reclaim`], so that this module knows nothing of what is above it.
//!
//! # Locking
//! None held anywhere here: reclaim sleeps.

use super::{PageAllocator, general::Request};
use crate::{
    context::{Cpu, PF_KSWAPD, PF_MEMALLOC, PF_OOM_VICTIM, Path, Task},
    error::AllocError,
    gfp::Gfp,
    page::Page,
    platform::{Level, Platform},
    types::ZoneType,
    vmstat::VmEvent,
    zone::AllocFlags,
};
use core::sync::atomic::{AtomicU32, Ordering::Relaxed};

/// Rounds of reclaim without progress before a request gives up.
const MAX_RECLAIM_RETRIES: u32 = 16;

/// What a request tells those who reclaim for it \[R1–R5\].
#[derive(Clone, Copy, Debug)]
pub struct ReclaimRequest {
    /// Node to reclaim on first.
    pub node: usize,
    /// Nodes it may use at all.
    pub nodes: u64,
    /// Highest zone it can use.
    pub highest: ZoneType,
    /// Its order.
    pub order: u32,
    /// Its flags, after scopes: without `__GFP_IO` no block I/O may be started, without `__GFP_FS`
    /// no file system called \[G4\].
    pub gfp: Gfp,
}

/// What stands behind the slow path. The page allocator calls it with nothing held.
pub trait Reclaim: Sync + Sized {
    /// Wakes kswapd of a node, if it sleeps. Any context.
    fn wake_kswapd<P: Platform>(
        &self,
        pages: &PageAllocator<P, Self>,
        node: usize,
        order: u32,
        highest: ZoneType,
    );

    /// Frees frames on behalf of a request (`try_to_free_pages`) and returns how many. May sleep. The
    /// caller is in a `memalloc_noreclaim` scope, so allocations inside use the reserves and do not come back here \[C4\].
    fn try_to_free_pages<P: Platform>(
        &self,
        pages: &PageAllocator<P, Self>,
        r: &ReclaimRequest,
    ) -> u64;

    /// Frames that reclaim could free on a node, at most.
    fn reclaimable<P: Platform>(&self, pages: &PageAllocator<P, Self>, node: usize) -> u64;

    /// Whether kswapd of a node has given up, until something can be reclaimed again.
    fn unreclaimable(&self, node: usize) -> bool;

    /// Does what others asked of the CPU the caller runs on, beyond giving its pages up. The CPU's lists are
    /// not owned.
    fn run_deferred<P: Platform>(&self, pages: &PageAllocator<P, Self>, cpu: &Cpu);

    /// CPU `cpu` goes out of service: gives back what is kept for it, beyond its pages and objects. Process context.
    fn cpu_offline<P: Platform>(&self, pages: &PageAllocator<P, Self>, cpu: usize);

    /// Nothing can be reclaimed: chooses a victim, or does something else about it. `true` if trying
    /// again makes sense \[R3\].
    fn out_of_memory<P: Platform>(
        &self,
        pages: &PageAllocator<P, Self>,
        r: &ReclaimRequest,
    ) -> bool;
}

impl<P: Platform, R: Reclaim> PageAllocator<P, R> {
    fn slow_flags(r: &Request) -> AllocFlags {
        let gfp = r.gfp;
        let can_block = gfp.may_block();
        let high = gfp.contains(Gfp::HIGH);
        let non_block = !can_block && !gfp.contains(Gfp::NOMEMALLOC);
        AllocFlags {
            wmark: 0,
            min_reserve: high,
            non_block: high && non_block,
            oom: false,
            highatomic: high && non_block && r.order > 0,
            no_watermarks: false,
            // Atomic requests are not bound by the cpuset; kernel ones are bound softly.
            cpuset: gfp.contains(Gfp::HARDWALL) && (can_block || !high),
        }
    }

    /// How far into the reserves the request may go, if at all.
    fn reserve_flags(&self, r: &Request, flags: AllocFlags) -> Option<AllocFlags> {
        if r.gfp.contains(Gfp::NOMEMALLOC) {
            return None;
        }
        let task = self.with_task(|t| t.map_or(0, |t| t.flags()));
        if r.gfp.contains(Gfp::MEMALLOC) || task & PF_MEMALLOC != 0 {
            return Some(AllocFlags { no_watermarks: true, cpuset: false, ..flags });
        }
        (task & PF_OOM_VICTIM != 0).then_some(AllocFlags { oom: true, cpuset: false, ..flags })
    }

    fn reclaim_request(r: &Request) -> ReclaimRequest {
        ReclaimRequest {
            node: r.node,
            nodes: r.nodes & if r.gfp.contains(Gfp::THISNODE) { 1 << r.node } else { u64::MAX },
            highest: Self::highest_zone(r),
            order: r.order,
            gfp: r.gfp,
        }
    }

    fn wake_all_kswapds(&self, r: &Request) {
        let mut woken = 0u64;
        for zone in self.zones_for(r, AllocFlags::default()) {
            let bit = 1 << zone.node();
            if woken & bit == 0 {
                woken |= bit;
                zone.pressed.store(1, Relaxed);
                self.reclaim.wake_kswapd(self, zone.node(), r.order, Self::highest_zone(r));
            }
        }
    }

    fn attempt(&self, r: &Request, flags: AllocFlags) -> Option<&Page> {
        self.marked(Path::Slow, || self.try_zonelist(r, flags))
    }

    #[cold]
    pub(super) fn alloc_slow(&self, r: &Request) -> Result<&Page, AllocError> {
        self.count(VmEvent::WmarkLow, 1);
        let task = self.with_task(|t| t.map_or(0, |t| t.flags()));
        let flags = Self::slow_flags(r);
        let can_reclaim = r.gfp.may_block();
        let mut fruitless = 0;
        let mut drained = false;
        loop {
            if r.gfp.contains(Gfp::KSWAPD_RECLAIM) {
                self.wake_all_kswapds(r);
            }
            if let Some(page) = self.attempt(r, flags) {
                self.note_highatomic(r, flags, page);
                return Ok(page);
            }
            let deepest = self.reserve_flags(r, flags).unwrap_or(flags);
            if deepest != flags
                && let Some(page) = self.attempt(r, deepest)
            {
                return Ok(page);
            }
            self.count(VmEvent::WmarkMin, 1);
            // A reclaiming task does not reclaim again [C4], and a caller on no CPU, of whom nobody could tell
            // whether it reclaims, leaves it to kswapd.
            let on_cpu = self.p.this_cpu().is_some();
            if !can_reclaim || task & PF_MEMALLOC != 0 || !on_cpu {
                // What lies on this CPU's other lists can be given back without waiting for anyone. Who is on none
                // and may wait has all CPUs' drained.
                if !drained {
                    drained = true;
                    let all = can_reclaim && !on_cpu;
                    if all {
                        self.drain_all_pages();
                    }
                    if all || self.drain_this_cpu() > 0 {
                        continue;
                    }
                }
                let patient = !on_cpu && !r.gfp.contains(Gfp::NORETRY);
                if can_reclaim
                    && (r.gfp.contains(Gfp::NOFAIL) || patient && fruitless < MAX_RECLAIM_RETRIES)
                {
                    fruitless += 1;
                    self.pause();
                    self.drain_all_pages();
                    continue;
                }
                break;
            }
            let progress = self.direct_reclaim(r);
            if let Some(page) = self.attempt(r, deepest) {
                return Ok(page);
            }
            if !drained || progress > 0 {
                self.unreserve_highatomic(r, false);
                self.drain_all_pages();
                drained = true;
                if let Some(page) = self.attempt(r, deepest) {
                    return Ok(page);
                }
            }
            if r.gfp.contains(Gfp::NORETRY) {
                break;
            }
            let persistent = r.gfp.contains(Gfp::RETRY_MAYFAIL);
            if Gfp::costly(r.order) && !persistent {
                break;
            }
            // Progress resets the patience of the cheap orders only: for a costly one it need not lead anywhere.
            fruitless = if progress > 0 && !Gfp::costly(r.order) { 0 } else { fruitless + 1 };
            if fruitless < MAX_RECLAIM_RETRIES && self.could_succeed(r, flags) {
                if progress == 0 {
                    self.pause();
                }
                continue;
            }
            if self.unreserve_highatomic(r, true) {
                continue;
            }
            // What the handler, or somebody else meanwhile, frees may lie on a list.
            if self.try_oom(r, task) {
                fruitless = 0;
                drained = false;
                continue;
            }
            if r.gfp.contains(Gfp::NOFAIL) {
                self.pause();
                drained = false;
                continue;
            }
            break;
        }
        self.fail(r)
    }

    /// Lets others run for a moment.
    fn pause(&self) {
        let word = AtomicU32::new(0);
        self.p.wait(&word, 0, 1_000_000);
    }

    /// Reclaims on behalf of the request, in a scope in which allocations use the reserves.
    fn direct_reclaim(&self, r: &Request) -> u64 {
        self.count(VmEvent::allocstall(Self::highest_zone(r)), 1);
        let lent = Task::new();
        let _lent = LentTask::new(&self.p, &lent);
        let saved = self.with_task(|t| t.map(|t| t.memalloc_noreclaim_save()));
        let freed = self.reclaim.try_to_free_pages(self, &Self::reclaim_request(r));
        if let Some(saved) = saved {
            self.with_task(|t| {
                if let Some(t) = t {
                    t.memalloc_restore(saved);
                }
            });
        }
        freed
    }

    /// Whether the request would succeed if all that is reclaimable were reclaimed
    /// (`should_reclaim_retry`).
    fn could_succeed(&self, r: &Request, flags: AllocFlags) -> bool {
        self.zones_for(r, flags).any(|zone| {
            let reclaimable = self.reclaim.reclaimable(self, zone.node()) as i64;
            reclaimable > 0 && zone.room(r.highest, flags) + reclaimable > (1 << r.order) - 1
        })
    }

    /// Calls the OOM handler for those who may not simply fail. Costly orders have given up before, save
    /// for `__GFP_RETRY_MAYFAIL`.
    fn try_oom(&self, r: &Request, task: u32) -> bool {
        let nofail = r.gfp.contains(Gfp::NOFAIL);
        if task & (PF_OOM_VICTIM | PF_KSWAPD) != 0
            || r.gfp.intersects(Gfp::RETRY_MAYFAIL | Gfp::THISNODE)
            || (!r.gfp.contains(Gfp::FS) && !nofail)
        {
            return false;
        }
        self.reclaim.out_of_memory(self, &Self::reclaim_request(r))
    }

    /// Ends a request in failure, with a report unless the flags forbid it \[P4\].
    #[cold]
    pub(super) fn fail(&self, r: &Request) -> Result<&Page, AllocError> {
        self.count(VmEvent::AllocFail, 1);
        if !r.gfp.contains(Gfp::NOWARN) && self.may_report_failure() {
            self.p.report(
                Level::Warning,
                format_args!(
                    "page allocation failure: order:{}, mode:{:#x}({}), nodemask={:#x}, at {}:{}",
                    r.order,
                    r.gfp.bits(),
                    r.gfp,
                    r.nodes & r.cpuset,
                    r.at.file(),
                    r.at.line()
                ),
            );
        }
        Err(AllocError::NoMemory)
    }

    /// At most ten failure reports in five seconds.
    pub(crate) fn may_report_failure(&self) -> bool {
        const INTERVAL_NS: u64 = 5_000_000_000;
        const BURST: u64 = 10;
        // High bits: interval number plus one; low byte: reports in it.
        let interval = (self.p.now_ns() / INTERVAL_NS + 1) << 8;
        self.failure_reports
            .fetch_update(Relaxed, Relaxed, |w| {
                if w & !0xff != interval {
                    Some(interval | 1)
                } else if w & 0xff < BURST {
                    Some(w + 1)
                } else {
                    None
                }
            })
            .is_ok()
    }
}

/// Lends a task to a caller that has none, so that it has something to carry the scope of its reclaim.
struct LentTask<'a, P: Platform> {
    p: &'a P,
    lent: bool,
}

impl<'a, P: Platform> LentTask<'a, P> {
    /// The task is lent until the result is dropped.
    fn new(p: &'a P, task: &'a Task) -> Self {
        let cpu = p.this_cpu().filter(|cpu| cpu.current().is_none());
        if let Some(cpu) = cpu {
            // SAFETY: the call is made on this CPU, and the task outlives `self`, which takes it back.
            unsafe { cpu.set_current(task) };
        }
        LentTask { p, lent: cpu.is_some() }
    }
}

impl<P: Platform> Drop for LentTask<'_, P> {
    fn drop(&mut self) {
        if let Some(cpu) = self.p.this_cpu().filter(|_| self.lent) {
            // SAFETY: null is always allowed, and the call is made on this CPU.
            unsafe { cpu.set_current(core::ptr::null()) };
        }
    }
}
