//! Spilling and draining: from the per-CPU lists back to the buddy \[P3\].
//!
//! # Concepts
//! A list that runs over spills a batch from its cold end. A CPU that goes offline, and everyone when
//! memory is short, drains all lists. What rests on them goes back from time to time (see `housekeeping`).
//!
//! # Locking
//! Ownership of the CPU's lists, then an area's lock, held for all blocks of a chunk that belong there.

use super::{
    Owned, PageAllocator,
    pcp::{ListId, Pcp, Supply},
    slow::Reclaim,
};
use crate::{
    buddy::Area,
    context::{
        Cpu, DEFER_DRAIN, DEFER_OBJECTS, DEFER_OBJECTS_BUSY, DEFER_PANIC, DEFER_RECALL, DEFER_REST,
        DEFER_SAMPLE, Path,
    },
    error::Misuse,
    page::Page,
    platform::Platform,
    trace::Event,
    types::{PAGEBLOCK_ORDER, Pfn},
    vmstat::VmEvent,
    zone::Zone,
};
use core::{
    iter,
    sync::atomic::{
        Ordering::{AcqRel, Acquire, Relaxed, SeqCst},
        compiler_fence,
    },
};

/// Blocks given back at a time: as many as a word has bits.
const CHUNK: usize = u32::BITS as usize;

/// The largest order of what neighbours are joined to: all of a chunk, and less than a pageblock.
const JOINED: u32 = PAGEBLOCK_ORDER - 1;

/// Whether some of the blocks of an order lie one after the other.
#[inline(always)]
fn has_neighbours(chunk: &[u32], order: u32) -> bool {
    let step = 1 << order;
    let apart = |two: &[u32]| two[1].wrapping_sub(two[0]);
    let near = |two: &[u32]| apart(two) == step || apart(two) == step.wrapping_neg();
    // Who frees a run begins with one. Of the others all are looked at, several at a time.
    chunk.get(..2).is_some_and(near) || chunk.windows(2).fold(false, |any, two| any | near(two))
}

/// Joins blocks of an order that lie one after the other, upwards or downwards, to larger ones. Returns how many there
/// are then, first frames and orders in `out`.
#[inline(always)]
fn join(chunk: &[u32], order: u32, out: &mut [(u32, u32); CHUNK]) -> usize {
    let step = 1u32 << order;
    let (mut n, mut rest) = (0, chunk);
    while let Some((&first, others)) = rest.split_first() {
        let by = others.first().map_or(0, |next| next.wrapping_sub(first));
        if !(by == step || by == step.wrapping_neg()) {
            out[n] = (first, order);
            (n, rest) = (n + 1, others);
            continue;
        }
        let mut last = first;
        rest = others;
        while let Some((&next, others)) = rest.split_first()
            && next == last.wrapping_add(by)
        {
            (last, rest) = (next, others);
        }
        let (mut at, end) = (first.min(last), first.max(last) + step);
        while at != end {
            let fits = at.trailing_zeros().min((end - at).ilog2()).min(JOINED);
            out[n] = (at, fits);
            n += 1;
            at += 1 << fits;
        }
    }
    n
}

/// Blocks that could not be given back.
struct Refused {
    pfns: [u32; CHUNK],
    nr: usize,
}

impl Refused {
    fn pfns(&self) -> &[u32] {
        &self.pfns[..self.nr]
    }

    fn push(&mut self, pfn: u32) {
        self.pfns[self.nr] = pfn;
        self.nr += 1;
    }
}

/// Gives what can be of a joined block of which some is free already, in parts of `order`.
#[cold]
fn give_parts(a: &mut Area<'_>, pfn: u32, joined: u32, order: u32, refused: &mut Refused) {
    if joined == order {
        refused.push(pfn);
        return;
    }
    for part in (pfn..=pfn + ((1 << joined) - 1)).step_by(1 << order) {
        if a.give(part, order).is_err() {
            refused.push(part);
        }
    }
}

/// Turns of waiting for other CPUs to answer, and after how many of them they are kicked again.
const PATIENCE: u32 = 20_000;
const KICK_EVERY: u32 = 256;

impl<P: Platform, R: Reclaim> PageAllocator<P, R> {
    /// Makes room on a full list for a block, and `more` that are to come, and puts it there; to the buddy if the list is
    /// off. The caller owns the lists.
    #[cold]
    #[inline(never)]
    pub(super) fn spill(
        &self,
        cpu: &Cpu,
        zone: &Zone,
        pcp: &Pcp,
        list: ListId,
        page: &'static Page,
        more: usize,
    ) {
        let before = cpu.set_path(Path::Drain);
        let limits = &self.limits[zone.slot];
        let supply = limits.supply(zone);
        if pcp.note_spill(list, limits, supply) {
            self.settle(cpu, zone, pcp, list, supply);
        }
        let high = pcp.high(list);
        let over = (pcp.len(list) + 1).saturating_sub(high);
        let batch = pcp.batch(list, limits).max(over).max(more as u32);
        if high > 0 {
            self.counters_of(cpu).owned(VmEvent::PcpSpill, 1);
        }
        // Also if it grew just now: what is kept instead would be missed in the buddy.
        self.give_back(zone, pcp, list, batch);
        if !pcp.push_hot(list, page) {
            // The free is counted by the list.
            self.give_uncounted(zone, self.map.frame_of(page), list.order(), || ());
        }
        cpu.restore(before);
    }

    /// Has the lists of a CPU give back what one of them needs to grow by, or, in a zone that has little left, all that they
    /// hold since they grew: those, too, that nobody uses now. The caller owns the lists.
    #[cold]
    #[inline(never)]
    pub(super) fn settle(&self, cpu: &Cpu, zone: &Zone, pcp: &Pcp, list: ListId, supply: Supply) {
        let before = cpu.set_path(Path::Drain);
        let limits = &self.limits[zone.slot];
        if supply.is_little() {
            for list in ListId::all() {
                self.give_back(zone, pcp, list, pcp.put_back(list, limits));
            }
        } else if let Some((longest, over)) = pcp.make_room(list, limits) {
            self.give_back(zone, pcp, longest, over);
        }
        cpu.restore(before);
    }

    /// Gives up to `n` blocks from the cold end of a list to the buddy and returns the number of
    /// frames. The caller owns the lists.
    pub(super) fn give_back(&self, zone: &Zone, pcp: &Pcp, list: ListId, n: u32) -> u64 {
        let mut chunk = [0; CHUNK];
        let mut frames = 0;
        let mut left = n as usize;
        while left > 0 {
            let got = pcp.pop_cold_many(list, &self.map, &mut chunk[..left.min(CHUNK)]);
            if got == 0 {
                break;
            }
            left -= got;
            frames += self.give_chunk(zone, &chunk[..got], list.order());
        }
        zone.count_given(frames);
        self.relieve(zone);
        frames
    }

    /// Gives blocks to the buddy, and returns the number of frames, which are still to be counted. Neighbours go as one
    /// block: who allocates many pages at once gets them in runs, and frees them so.
    #[inline]
    fn give_chunk(&self, zone: &Zone, chunk: &[u32], order: u32) -> u64 {
        let mut refused = Refused { pfns: [0; CHUNK], nr: 0 };
        let neighbours = order < JOINED && has_neighbours(chunk, order);
        if !neighbours && order < PAGEBLOCK_ORDER {
            // Those that were freed here and there lie in as many pageblocks: now all their lines come at once.
            self.map.prefetch_bits(chunk);
        }
        if order == 0 && !neighbours {
            self.give_all::<true>(zone, chunk.len(), |i| (chunk[i], 0), 0, &mut refused);
        } else {
            self.give_blocks(zone, chunk, order, neighbours, &mut refused);
        }
        if self.tracing() {
            let given = chunk.iter().filter(|pfn| !refused.pfns().contains(pfn));
            given.for_each(|pfn| self.trace_drain(*pfn, order));
        }
        for pfn in refused.pfns() {
            self.misuse(Misuse::DoubleFree { pfn: Pfn(*pfn) });
        }
        ((chunk.len() - refused.nr) as u64) << order
    }

    /// The same of larger blocks, or with neighbours joined.
    #[inline(never)]
    fn give_blocks(
        &self,
        zone: &Zone,
        chunk: &[u32],
        order: u32,
        neighbours: bool,
        refused: &mut Refused,
    ) {
        let mut blocks = [(0, 0); CHUNK];
        let n = if neighbours {
            join(chunk, order, &mut blocks)
        } else {
            blocks.iter_mut().zip(chunk).for_each(|(block, pfn)| *block = (*pfn, order));
            chunk.len()
        };
        self.give_all::<false>(zone, n, |i| blocks[i], order, refused);
    }

    /// Gives `n` blocks, made of such of `order`, area by area. Notes which of those could not be given, since some of
    /// them is free already. `FRAMES`: all are single frames.
    #[inline(always)]
    fn give_all<const FRAMES: bool>(
        &self,
        zone: &Zone,
        n: usize,
        block: impl Fn(usize) -> (u32, u32),
        order: u32,
        refused: &mut Refused,
    ) {
        if zone.nr_areas() == 1 {
            return self.give_to::<FRAMES>(zone, 0, (0..n).map(block), order, refused);
        }
        let all = u32::MAX >> (CHUNK - n);
        let mut todo = all;
        while todo != 0 {
            let area = zone.area_of(block(todo.trailing_zeros() as usize).0);
            // Without branches: of blocks that were freed here and there nothing is foreseen.
            let also = |mask: u32, i| mask << 1 | u32::from(zone.area_of(block(i).0) == area);
            let mut here = match zone.nr_areas() {
                2 if todo != all => todo,
                2 => {
                    // All of a chunk are to do yet, so the first of them is meant.
                    let odd = |mask: u32, i| mask << 1 | zone.parity_of(block(i).0);
                    let odd = (0..n).rev().fold(0, odd);
                    if odd & 1 == 1 { odd } else { !odd & all }
                }
                _ => (0..n).rev().fold(0, also),
            };
            todo &= !here;
            let next = || {
                let i = (here != 0).then(|| here.trailing_zeros())?;
                here &= here - 1;
                Some(block(i as usize))
            };
            self.give_to::<FRAMES>(zone, area, iter::from_fn(next), order, refused);
        }
    }

    /// Gives blocks to one area.
    #[inline(always)]
    fn give_to<const FRAMES: bool>(
        &self,
        zone: &Zone,
        area: usize,
        blocks: impl Iterator<Item = (u32, u32)>,
        order: u32,
        refused: &mut Refused,
    ) {
        zone.with_area_uncounted(&self.p, &self.map, area, |a| {
            if FRAMES {
                a.give_frames(blocks.map(|(pfn, _)| pfn), |pfn| refused.push(pfn));
                return;
            }
            for (pfn, joined) in blocks {
                if a.give(pfn, joined).is_err() {
                    // With the lock at hand: what is free already may be somebody's the next moment.
                    give_parts(a, pfn, joined, order, refused);
                }
            }
        });
    }

    #[cold]
    fn trace_drain(&self, pfn: u32, order: u32) {
        let migratetype = self.map.flags_of(pfn).migratetype();
        self.trace(&Event::PagePcpuDrain { pfn: Pfn(pfn), order, migratetype });
    }

    /// Gives all of a list back.
    fn empty(&self, zone: &Zone, pcp: &Pcp, list: ListId) -> u64 {
        let limits = &self.limits[zone.slot];
        pcp.note_drain(list, limits, limits.supply(zone));
        self.give_back(zone, pcp, list, pcp.len(list))
    }

    /// Has `give` give something of each list of a CPU back. The caller owns the lists.
    fn give_owned(&self, cpu: &Cpu, give: impl Fn(&Zone, &Pcp, ListId) -> u64) -> u64 {
        let _ = cpu.set_path(Path::Drain);
        let mut frames = 0;
        for zone in self.zones {
            let Some(pcp) = self.pcp_of(cpu.id(), zone.slot) else { continue };
            for list in ListId::all() {
                frames += give(zone, pcp, list);
            }
        }
        frames
    }

    /// As [`give_owned`](Self::give_owned), of the CPU that the caller runs on, if its lists can be had.
    pub(super) fn give_here(&self, give: impl Fn(&Zone, &Pcp, ListId) -> u64) -> u64 {
        let Some(cpu) = self.p.get_cpu() else { return 0 };
        let mut frames = 0;
        if !cpu.context().in_nmi()
            && let Some(owned) = self.own(cpu, Path::Drain)
        {
            frames = self.give_owned(cpu, give);
            self.disown(owned);
        }
        self.p.put_cpu(cpu);
        frames
    }

    /// Drains the lists of the CPU the caller runs on and returns the number of frames; 0 when it runs
    /// on none or the lists are owned beneath it. Any context but NMI.
    pub fn drain_this_cpu(&self) -> u64 {
        self.give_here(|zone, pcp, list| self.empty(zone, pcp, list))
    }

    /// Does what others left for this CPU, now that its lists are let go.
    #[cold]
    #[inline(never)]
    pub(crate) fn run_deferred(&self, cpu: &Cpu) {
        if cpu.path_raw() >= Path::FIRST_OWNER {
            return;
        }
        // Acquire pairs with the AcqRel in `ask`. The look is repeated after the flag has fallen:
        // the interrupt of a request made after the last one was done, and before that, found the lists
        // owned and left it to this.
        loop {
            let asked = cpu.deferred.load(Acquire);
            if asked & DEFER_OBJECTS != 0 {
                self.reclaim.run_deferred(self, cpu);
            } else if asked & DEFER_DRAIN != 0 {
                let Some(owned) = self.own(cpu, Path::Drain) else { return };
                self.give_owned(cpu, |zone, pcp, list| self.empty(zone, pcp, list));
                self.answered(owned, DEFER_DRAIN);
            } else if asked & DEFER_REST != 0 {
                let Some(owned) = self.own(cpu, Path::Drain) else { return };
                self.give_owned(cpu, |zone, pcp, list| self.give_rest(zone, pcp, list));
                self.answered(owned, DEFER_REST);
            } else {
                break;
            }
        }
        let mut asked = cpu.deferred.load(Acquire) & (DEFER_SAMPLE | DEFER_RECALL);
        if cpu.path_raw() != 0 {
            // It would forget its machine for as long as its path is marked, and then know it again.
            asked &= !DEFER_SAMPLE;
        }
        if asked != 0 {
            cpu.deferred.fetch_and(!asked, AcqRel);
            match asked & DEFER_RECALL {
                0 => cpu.forget_machine(),
                _ => self.remember(cpu),
            }
        }
        assert!(
            cpu.deferred.fetch_and(!DEFER_PANIC, Relaxed) & DEFER_PANIC == 0,
            "a misuse was found while CPU {}'s lists were owned",
            cpu.id()
        );
    }

    /// Lets the CPU's lists go after what was asked for in `deferred` was done.
    pub(crate) fn answered(&self, owned: Owned<'_>, what: u32) {
        let Owned { cpu, before } = owned;
        // The request is done once the lists are empty, not before: whoever waits reads this.
        cpu.deferred.fetch_and(!what, AcqRel);
        compiler_fence(SeqCst);
        cpu.restore(before);
        compiler_fence(SeqCst);
    }

    /// What the platform calls on a CPU after [`Platform::kick`], from its interrupt or posing as it.
    pub fn handle_ipi(&self) {
        if let Some(cpu) = self.p.get_cpu() {
            self.run_deferred(cpu);
            self.p.put_cpu(cpu);
        }
    }

    fn ask(&self, cpu: &Cpu, what: u32) {
        // AcqRel: the drain that answers sees all that the asker did before.
        cpu.deferred.fetch_or(what, AcqRel);
        self.p.kick(cpu.id());
    }

    /// As [`ask`](Self::ask), for what a CPU that runs something need not be interrupted for.
    pub(super) fn ask_idle(&self, cpu: &Cpu, what: u32) {
        // As above.
        cpu.deferred.fetch_or(what, AcqRel);
        self.p.kick_idle(cpu.id());
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
                .any(|z| self.pcp_of(cpu.id(), z.slot).is_some_and(|pcp| !pcp.is_empty()));
            if loaded {
                self.ask(cpu, DEFER_DRAIN);
            }
        }
        if !self.context().may_sleep() {
            return;
        }
        self.await_answers(|c| Some(c.id()) != here);
    }

    /// Notes that CPU `id` is in service: the platform lets code run on it.
    pub fn cpu_online(&self, id: usize) {
        if let Some(cpu) = self.p.cpu(id) {
            cpu.set_online(true);
        }
    }

    /// Takes CPU `id` out of service: its lists and magazines are drained, and the stacks it keeps go back \[P3, S4, K1\]. To be called on that CPU before it
    /// stops, or on another one once nothing runs on it any more; the platform's
    /// [`kick`](Platform::kick) then poses as it.
    ///
    /// Context: process context.
    pub fn cpu_offline(&self, id: usize) {
        let Some(cpu) = self.p.cpu(id) else { return };
        cpu.set_online(false);
        self.reclaim.cpu_offline(self, id);
        if self.p.this_cpu().map(Cpu::id) == Some(id) {
            // Magazines first: slabs that become empty give pages to the lists.
            cpu.deferred.fetch_or(DEFER_OBJECTS, AcqRel);
            self.run_deferred(cpu);
            self.drain_this_cpu();
            return;
        }
        self.ask(cpu, DEFER_DRAIN | DEFER_OBJECTS);
        self.await_answers(|c| c.id() == id);
    }

    /// Waits a little until the CPUs that were asked have done it; says whether all have. Those that have not are
    /// kicked again now and then: a kick that lands in a fast path is not answered at its end.
    pub(crate) fn await_answers(&self, of: impl Fn(&Cpu) -> bool) -> bool {
        const ALL: u32 = DEFER_DRAIN | DEFER_OBJECTS | DEFER_OBJECTS_BUSY;
        let pending = || {
            (0..self.p.nr_cpu_ids())
                .filter_map(|id| self.p.cpu(id))
                // Acquire pairs with the AcqRel in `run_deferred`.
                .filter(|c| of(c) && c.deferred.load(Acquire) & ALL != 0)
        };
        for turn in 1..=PATIENCE {
            if pending().next().is_none() {
                return true;
            }
            if turn % KICK_EVERY == 0 {
                pending().for_each(|c| self.p.kick(c.id()));
            }
            self.p.relax();
        }
        false
    }
}
