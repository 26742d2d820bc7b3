//! Spilling and draining: from the per-CPU lists back to the buddy \[P3\].
//!
//! # Concepts
//! A list that runs over spills a batch from its cold end. A CPU that goes offline, and everyone when
//! memory is short, drains all lists.
//!
//! # Locking
//! Ownership of the CPU's lists, then an area's lock, held for a run of blocks of the same area.

use super::{
    Owned, PageAllocator,
    pcp::{ListId, Pcp},
    slow::Reclaim,
};
use crate::{
    context::{Cpu, DEFER_DRAIN, Path},
    error::Misuse,
    platform::Platform,
    trace::Event,
    types::Pfn,
    vmstat::VmEvent,
    zone::Zone,
};
use core::sync::atomic::{
    Ordering::{AcqRel, Acquire, Relaxed, SeqCst},
    compiler_fence,
};

/// Turns of waiting for other CPUs to drain their lists.
const DRAIN_PATIENCE: u32 = 20_000;

impl<P: Platform, R: Reclaim> PageAllocator<P, R> {
    /// Makes room on a full list for `pfn` and puts it there; to the buddy if the list is off. The
    /// caller owns the lists.
    #[cold]
    #[inline(never)]
    pub(super) fn spill(&self, cpu: &Cpu, slot: usize, list: ListId, pfn: u32) {
        let before = cpu.path_raw();
        cpu.set_path(Path::Drain);
        if let (Some(zone), Some(pcp)) = (self.zones.get(slot), self.pcp_of(cpu.id(), slot)) {
            let limits = &self.limits[slot];
            let pressed = zone.pressed.load(Relaxed) != 0;
            pcp.note_spill(list, limits, pressed);
            let over = (pcp.len(list) + 1).saturating_sub(pcp.high(list));
            let batch = limits.batch[list.class()].max(over);
            if pcp.high(list) > 0 {
                self.counters_of(cpu).owned(VmEvent::PcpSpill, 1);
            }
            self.give_back(zone, pcp, list, batch);
            if !pcp.push_hot(list, pfn) {
                // The free is counted by the list.
                self.give_uncounted(zone, pfn, list.order(), || ());
            }
        }
        cpu.set_path_raw(before);
    }

    /// Gives up to `n` blocks from the cold end of a list to the buddy and returns the number of
    /// frames. The caller owns the lists.
    fn give_back(&self, zone: &Zone, pcp: &Pcp, list: ListId, n: u32) -> u64 {
        let order = list.order();
        let mut left = n;
        let mut frames = 0;
        let mut next = if left > 0 { pcp.pop_cold(list) } else { None };
        while let Some(first) = next {
            let area = zone.area_of(first);
            let mut damaged = None;
            let mut given = 0;
            next = zone.with_area(&self.p, &self.map, area, |a| {
                let mut pfn = first;
                loop {
                    match a.give(pfn, order) {
                        Ok(()) => {
                            given += 1;
                            self.trace_drain(pfn, order);
                        }
                        Err(_) => damaged = Some(pfn),
                    }
                    left -= 1;
                    if left == 0 {
                        return None;
                    }
                    match pcp.pop_cold(list) {
                        Some(p) if damaged.is_none() && zone.area_of(p) == area => pfn = p,
                        other => return other,
                    }
                }
            });
            let n = i64::from(given) << order;
            frames += n as u64;
            let free = zone.free.fetch_add(n, Relaxed) + n;
            self.relieve(zone, free);
            if let Some(pfn) = damaged {
                self.misuse(Misuse::DoubleFree { pfn: Pfn(pfn) });
            }
        }
        frames
    }

    fn trace_drain(&self, pfn: u32, order: u32) {
        if self.tracing() {
            let migratetype = self.map.flags_of(pfn).migratetype();
            self.trace(&Event::PagePcpuDrain { pfn: Pfn(pfn), order, migratetype });
        }
    }

    /// Drains all lists of a CPU that the caller owns.
    fn drain_owned(&self, cpu: &Cpu) -> u64 {
        cpu.set_path(Path::Drain);
        let mut frames = 0;
        for zone in self.zones {
            let Some(pcp) = self.pcp_of(cpu.id(), zone.slot) else { continue };
            for list in ListId::all() {
                frames += self.give_back(zone, pcp, list, pcp.len(list));
            }
        }
        frames
    }

    /// Drains the lists of the CPU the caller runs on and returns the number of frames; 0 when it runs
    /// on none or the lists are owned beneath it. Any context but NMI.
    pub fn drain_this_cpu(&self) -> u64 {
        let Some(cpu) = self.p.get_cpu() else { return 0 };
        let mut frames = 0;
        if !cpu.context().in_nmi()
            && let Some(owned) = self.own(cpu, Path::Drain)
        {
            frames = self.drain_owned(cpu);
            self.disown(owned);
        }
        self.p.put_cpu(cpu);
        frames
    }

    /// Does what others left for this CPU, now that its lists are let go.
    #[cold]
    #[inline(never)]
    pub(super) fn run_deferred(&self, cpu: &Cpu) {
        if cpu.path_raw() >= Path::FIRST_OWNER {
            return;
        }
        // Acquire pairs with the AcqRel in `ask_to_drain`. The look is repeated after the flag has fallen:
        // the interrupt of a request made after the last one was done, and before that, found the lists
        // owned and left it to this.
        while cpu.deferred.load(Acquire) & DEFER_DRAIN != 0 {
            let Some(owned) = self.own(cpu, Path::Drain) else { return };
            self.drain_owned(cpu);
            let Owned { cpu, before } = owned;
            // The request is done once the lists are empty, not before: whoever waits reads this.
            cpu.deferred.fetch_and(!DEFER_DRAIN, AcqRel);
            compiler_fence(SeqCst);
            cpu.set_path_raw(before);
            compiler_fence(SeqCst);
        }
    }

    /// What the platform calls on a CPU after [`Platform::kick`], from its interrupt or posing as it.
    pub fn handle_ipi(&self) {
        if let Some(cpu) = self.p.get_cpu() {
            self.run_deferred(cpu);
            self.p.put_cpu(cpu);
        }
    }

    fn ask_to_drain(&self, cpu: &Cpu) {
        // AcqRel: the drain that answers sees all that the asker did before.
        cpu.deferred.fetch_or(DEFER_DRAIN, AcqRel);
        self.p.kick(cpu.id());
    }

    /// Drains every CPU's lists (`drain_all_pages`). Waits a little for CPUs that are busy with their
    /// lists or have interrupts masked; they drain when they let go.
    ///
    /// Context: process context; elsewhere it does not wait.
    pub fn drain_all_pages(&self) {
        let here = self.p.this_cpu().map(Cpu::id);
        self.drain_this_cpu();
        let others = || {
            (0..self.p.nr_cpu_ids()).filter(|id| Some(*id) != here).filter_map(|id| self.p.cpu(id))
        };
        for cpu in others() {
            let loaded = self
                .zones
                .iter()
                .any(|z| self.pcp_of(cpu.id(), z.slot).is_some_and(|pcp| pcp.frames() > 0));
            if loaded {
                self.ask_to_drain(cpu);
            }
        }
        if !self.context().may_sleep() {
            return;
        }
        self.await_drains(|c| Some(c.id()) != here);
    }

    /// Notes that CPU `id` is in service: the platform lets code run on it.
    pub fn cpu_online(&self, id: usize) {
        if let Some(cpu) = self.p.cpu(id) {
            cpu.set_online(true);
        }
    }

    /// Takes CPU `id` out of service: its lists are drained \[P3\]. To be called on that CPU before it
    /// stops, or on another one once nothing runs on it any more; the platform's
    /// [`kick`](Platform::kick) then poses as it.
    ///
    /// Context: process context.
    pub fn cpu_offline(&self, id: usize) {
        let Some(cpu) = self.p.cpu(id) else { return };
        cpu.set_online(false);
        if self.p.this_cpu().map(Cpu::id) == Some(id) {
            self.drain_this_cpu();
            return;
        }
        self.ask_to_drain(cpu);
        self.await_drains(|c| c.id() == id);
    }

    /// Waits a little until the CPUs that were asked have drained their lists.
    fn await_drains(&self, of: impl Fn(&Cpu) -> bool) {
        let pending = || {
            (0..self.p.nr_cpu_ids())
                .filter_map(|id| self.p.cpu(id))
                // Acquire pairs with the AcqRel in `run_deferred`.
                .any(|c| of(c) && c.deferred.load(Acquire) & DEFER_DRAIN != 0)
        };
        let mut patience = DRAIN_PATIENCE;
        while patience > 0 && pending() {
            patience -= 1;
            self.p.relax();
        }
    }
}
