//! Housekeeping: what rests on the per-CPU lists goes back to the buddy \[P3\].
//!
//! # Concepts
//! What lies on lists cannot merge. A list with traffic gives back what is too much by itself; a CPU whose traffic has
//! ceased comes by no list any more. So once a second or so each CPU gives back the blocks that it had no use for
//! since the last time: by its own timer ([`vmstat_update`](PageAllocator::vmstat_update)), or because one task asks all of them
//! ([`vmstat_run`](PageAllocator::vmstat_run)), which leaves alone who has nothing.
//!
//! # Locking
//! Ownership of the CPU's lists, then an area's lock. A CPU is asked as for a drain.

use super::{
    PageAllocator,
    pcp::{ListId, Pcp},
    slow::Reclaim,
};
use crate::{
    context::{Cpu, DEFER_REST},
    platform::Platform,
    zone::Zone,
};
use core::sync::atomic::{
    AtomicBool, AtomicU32, AtomicU64,
    Ordering::{AcqRel, Acquire, Relaxed},
};

/// The interval at first, as the kernel's, and how long [`PageAllocator::vmstat_run`] sleeps at a time at the most.
const SECOND_NS: u64 = 1_000_000_000;

/// The shortest interval: what keeps house is not to be all that a machine does.
const LEAST_NS: u64 = 1_000_000;

/// Time from one round of housekeeping to the next.
pub(super) struct Interval {
    ns: AtomicU64,
    /// Changes when the task that keeps house is to look at something anew.
    bell: AtomicU32,
}

impl Interval {
    pub(super) const fn new() -> Interval {
        Interval { ns: AtomicU64::new(SECOND_NS), bell: AtomicU32::new(0) }
    }
}

impl<P: Platform, R: Reclaim> PageAllocator<P, R> {
    /// Housekeeping of the CPU that the caller runs on, for the platform's timer, about once a second as the kernel's:
    /// gives back the blocks that rest on the CPU's lists, which are those that it had no use for
    /// since the last time. Returns the number of frames; 0 when the caller runs on no CPU or its lists are owned
    /// beneath it. Any context but NMI \[P3\].
    ///
    /// See [`stat_interval`](https://docs.kernel.org/admin-guide/sysctl/vm.html#stat-interval).
    pub fn vmstat_update(&self) -> u64 {
        self.give_here(|zone, pcp, list| self.give_rest(zone, pcp, list))
    }

    /// Gives back what rests on one list. The caller owns the lists.
    pub(super) fn give_rest(&self, zone: &Zone, pcp: &Pcp, list: ListId) -> u64 {
        let (rest, taken) = pcp.resting(list);
        pcp.note_rest(list, &self.limits[zone.slot], taken);
        self.give_back(zone, pcp, list, rest)
    }

    /// Has every CPU that is in service and has something on its lists do what [`vmstat_update`](Self::vmstat_update)
    /// does: for machines on which one task keeps house for all CPUs, or a timer on one. Does not wait for them: a CPU that is
    /// busy with its lists, or that the platform [leaves alone](Platform::kick_idle) while it runs something, does it at its next
    /// slower path. What it was asked for long ago counts from then on \[P3\].
    ///
    /// Context: any but NMI.
    pub fn vmstat_shepherd(&self) {
        let here = self.p.this_cpu().map(Cpu::id);
        self.vmstat_update();
        for cpu in (0..self.p.nr_cpu_ids()).filter_map(|id| self.p.cpu(id)) {
            let mut pcps = self.zones.iter().filter_map(|zone| self.pcp_of(cpu.id(), zone.slot));
            if Some(cpu.id()) != here && cpu.online() && pcps.any(|pcp| pcp.wants_housekeeping()) {
                self.ask_idle(cpu, DEFER_REST);
            }
        }
    }

    /// Sets how many nanoseconds [`vmstat_run`](Self::vmstat_run) lets go by from one round to the next, a second at first, or
    /// 0 for no more rounds (`vm.stat_interval`). Less than a millisecond is one \[P3\].
    ///
    /// Context: any but NMI.
    ///
    /// See [`stat_interval`](https://docs.kernel.org/admin-guide/sysctl/vm.html#stat-interval).
    pub fn set_stat_interval(&self, ns: u64) {
        self.stat_interval.ns.store(ns, Relaxed);
        self.nudge_vmstat();
    }

    /// Calls [`vmstat_shepherd`](Self::vmstat_shepherd) at each interval until `stop` is set: to be run on a task of its own.
    /// Reacts to `stop` within a second, or when it is [nudged](Self::nudge_vmstat) \[P3\].
    ///
    /// Context: process context; sleeps. Also on no CPU, where the platform's [`wait`](Platform::wait) allows that.
    pub fn vmstat_run(&self, stop: &AtomicBool) {
        let Interval { ns, bell } = &self.stat_interval;
        let mut last = self.p.now_ns();
        loop {
            // Acquire pairs with the AcqRel in `nudge_vmstat`: what it was rung for is seen below, or the wait ends at once.
            let rung = bell.load(Acquire);
            if stop.load(Acquire) {
                return;
            }
            let (every, now) = (ns.load(Relaxed), self.p.now_ns());
            let left = match every {
                0 => SECOND_NS,
                _ => last.saturating_add(every.max(LEAST_NS)).saturating_sub(now),
            };
            if left == 0 {
                self.vmstat_shepherd();
                last = self.p.now_ns();
            } else {
                self.p.wait(bell, rung, left.min(SECOND_NS));
            }
        }
    }

    /// Wakes [`vmstat_run`](Self::vmstat_run), so that it looks at its `stop` at once.
    ///
    /// Context: any.
    pub fn nudge_vmstat(&self) {
        let bell = &self.stat_interval.bell;
        bell.fetch_add(1, AcqRel);
        self.p.wake(bell);
    }
}
