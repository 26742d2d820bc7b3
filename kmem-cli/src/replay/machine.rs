//! The machine a recording is replayed on, in the state the recording started from.
//!
//! # Concepts
//! With the recorded memory: the banks are the recorded frames; what the kernel never gave its allocator is
//! reserved in boot memory; watermarks are the recorded ones; every frame that was not free is then
//! taken off the free lists at its place, so that the free blocks left are exactly the recorded ones. Frames
//! that lay on Linux's per-CPU lists are freed last, onto kmem's.
//!
//! With other memory, or without the texts that tell the start state: an ordinary PC, all free but for one
//! stand-in per block from before the recording.

use super::plan::Plan;
use anyhow::{Context, anyhow, bail};
use kmem::{
    Config, Gfp, Pfn, ZoneType,
    types::{DEFAULT_MAX_ORDER, MAX_MAX_ORDER, MigrateType},
    zone::Watermarks,
};
use kmem_hosted::{Machine, Shape, ZoneLimit};
use kmem_trace::{Recording, StartState, start::ZoneStart};
use std::{collections::HashMap, ops::Range};

const PAGE: u64 = 4096;

/// Where the machine started.
pub struct Start {
    /// Free blocks by order when the replay began, before the recorded per-CPU frames were placed.
    pub free_blocks: Vec<u64>,
    /// The recorded ones.
    pub linux_free_blocks: Option<Vec<u64>>,
    /// First frame and order of each block from before the recording, by handle.
    blocks: Vec<(u32, u32, u8)>,
    /// Frames that lay on Linux's per-CPU lists.
    pub pcp_frames: u64,
    /// What was done in place of the recorded start state, if anything.
    pub note: Option<String>,
}

impl Start {
    /// Handle, first frame and order of the blocks from before the recording.
    pub fn blocks(&self) -> &[(u32, u32, u8)] {
        &self.blocks
    }
}

/// Free blocks by order, all zones together.
pub fn free_blocks(machine: &Machine) -> Vec<u64> {
    let mut sum = vec![0; machine.max_order() as usize + 1];
    for zone in machine.zones() {
        for (s, n) in sum.iter_mut().zip(machine.nr_free(zone)) {
            *s += n;
        }
    }
    sum
}

/// Builds the machine.
pub fn build(
    recording: &Recording,
    plan: &Plan,
    memory: Option<u64>,
    cpus: Option<u16>,
) -> anyhow::Result<(Machine, Start)> {
    let cpus = cpus.map_or(plan.nr_cpus().max(recording.meta.cpus as usize), usize::from).max(1);
    if memory.is_none()
        && recording.meta.first_file(&["buddyinfo.traced_start", "start/buddyinfo"]).is_some()
    {
        return recorded(recording, plan, cpus);
    }
    let bytes = memory.unwrap_or(1 << 30).next_multiple_of(2 << 20);
    let shape = Shape::x86_64(bytes).cpus(cpus).without_contents();
    let largest = plan.largest_order().clamp(DEFAULT_MAX_ORDER, MAX_MAX_ORDER);
    let config = Config { max_order: largest, ..Config::default() };
    let machine = Machine::without_kswapd(shape, config)?;
    let mut blocks = Vec::new();
    machine.run(|_| {
        for prior in &plan.prior {
            let gfp = Gfp::HIGHUSER_MOVABLE | Gfp::NOWARN | Gfp::NORETRY;
            let page = machine
                .alloc_pages(gfp, prior.order.into())
                .map_err(|e| anyhow!("no room for the blocks from before the recording: {e}"))?;
            let pfn = machine.page_to_pfn(page).context("page of another machine")?;
            blocks.push((prior.handle, pfn.0, prior.order));
        }
        Ok::<(), anyhow::Error>(())
    })??;
    let why = if memory.is_some() {
        "memory given on the command line"
    } else {
        "the recording has no buddyinfo of its start"
    };
    let start = Start {
        free_blocks: free_blocks(&machine),
        linux_free_blocks: None,
        blocks,
        pcp_frames: 0,
        note: Some(format!("{why}: started from {} MiB of free memory", bytes >> 20)),
    };
    Ok((machine, start))
}

fn recorded(recording: &Recording, plan: &Plan, cpus: usize) -> anyhow::Result<(Machine, Start)> {
    let state = StartState::build(recording)?;
    let mut shape = Shape { cpus: vec![0; cpus], contents: false, ..Shape::x86_64(1 << 30) };
    shape.banks.clear();
    shape.zones = zone_limits(&state.zones)?;
    for zone in &state.zones {
        for r in &zone.present {
            shape = shape.bank(r.start * PAGE, (r.end - r.start) * PAGE, zone.node as usize);
        }
    }
    let nodes = shape.nr_nodes();
    for (i, node) in shape.cpus.iter_mut().enumerate() {
        *node = i % nodes;
    }
    let mut boot = shape.memblock()?;
    for r in state.zones.iter().flat_map(|z| &z.reserved) {
        boot.reserve(r.start * PAGE, (r.end - r.start) * PAGE)?;
    }
    let config = Config { max_order: state.max_order.into(), ..Config::default() };
    let machine = Machine::from_boot(shape, config, boot)?;

    let mut prior: HashMap<(u64, u8), u32> = HashMap::new();
    for p in &plan.prior {
        prior.insert((p.pfn, p.order), p.handle);
    }
    let mut blocks = Vec::new();
    let mut want = vec![0; usize::from(state.max_order) + 1];
    for zone in &state.zones {
        take_used(&machine, zone, &prior, &mut blocks)?;
        for (w, n) in want.iter_mut().zip(zone.free_by_order()) {
            *w += n;
        }
    }
    let have = free_blocks(&machine);
    if have != want {
        bail!("start state: free blocks by order are {have:?}, recorded are {want:?}");
    }
    let pcp = place_pcp_frames(&machine, &state)?;
    let start = Start {
        free_blocks: have,
        linux_free_blocks: Some(want),
        blocks,
        pcp_frames: pcp,
        note: None,
    };
    Ok((machine, start))
}

fn zone_limits(zones: &[ZoneStart]) -> anyhow::Result<Vec<ZoneLimit>> {
    let mut limits: Vec<ZoneLimit> = Vec::new();
    for kind in
        [ZoneType::Dma, ZoneType::Dma32, ZoneType::Normal, ZoneType::HighMem, ZoneType::Movable]
    {
        // A zone ends where the architecture says; one that is above it starts there at the latest.
        let end = match kind {
            ZoneType::Dma => 16 << 20,
            ZoneType::Dma32 => 4 << 30,
            _ => u64::MAX,
        };
        let above = zones
            .iter()
            .filter(|z| ZoneType::from_name(&z.name).is_some_and(|k| k > kind))
            .map(|z| z.start_pfn * PAGE)
            .min();
        let known = zones.iter().any(|z| z.name == kind.name());
        if known || kind <= ZoneType::Normal {
            // A recorded zone ends where the next recorded one starts, whatever is usual.
            let end = match above {
                Some(a) if known => a,
                Some(a) => end.min(a),
                None => end,
            };
            limits.push(ZoneLimit { zone: kind, end });
        }
    }
    if let Some(z) = zones.iter().find(|z| ZoneType::from_name(&z.name).is_none()) {
        bail!("the recording has a zone {:?}, which this machine does not know", z.name);
    }
    Ok(limits)
}

/// Takes every frame of the zone that was not free off the free lists, at its place.
fn take_used(
    machine: &Machine,
    zone: &ZoneStart,
    prior: &HashMap<(u64, u8), u32>,
    blocks: &mut Vec<(u32, u32, u8)>,
) -> anyhow::Result<()> {
    let first = zone.present.first().map_or(zone.start_pfn, |r| r.start);
    let own = machine.page_zone(Pfn(first as u32)).context("zone without frames")?;
    machine.set_watermarks(
        own,
        Watermarks { min: zone.min, low: zone.low, high: zone.high, promo: zone.promo },
    );
    for (pfn, mt) in &zone.pageblock_types {
        let mt = migratetype(*mt)?;
        machine.set_pageblock_migratetype(Pfn(*pfn as u32), mt);
    }
    let claim = |pfn: u64, order: u8| {
        machine.alloc_pages_at(Pfn(pfn as u32), order.into(), Gfp::NOWAIT).map_err(|e| {
            anyhow!("frame {pfn:#x} order {order} was in use and is not to be had: {e}")
        })
    };
    for b in &zone.in_use {
        claim(b.pfn, b.order)?;
        if let Some(handle) = prior.get(&(b.pfn, b.order)) {
            blocks.push((*handle, b.pfn as u32, b.order));
        }
    }
    for r in &zone.held {
        for (pfn, order) in aligned_blocks(r.clone()) {
            claim(pfn, order)?;
        }
    }
    for pfn in &zone.unaccounted {
        claim(*pfn, 0)?;
    }
    Ok(())
}

/// Linux 6.12's numbers, without CMA.
fn migratetype(n: u8) -> anyhow::Result<MigrateType> {
    Ok(match n {
        0 => MigrateType::Unmovable,
        1 => MigrateType::Movable,
        2 => MigrateType::Reclaimable,
        3 => MigrateType::HighAtomic,
        _ => bail!("pageblocks of mobility {n} cannot be set up"),
    })
}

fn aligned_blocks(r: Range<u64>) -> impl Iterator<Item = (u64, u8)> {
    let mut at = r.start;
    std::iter::from_fn(move || {
        let left = r.end.checked_sub(at).filter(|n| *n > 0)?;
        let order = at.trailing_zeros().min(left.ilog2()).min(9) as u8;
        let pfn = at;
        at += 1 << order;
        Some((pfn, order))
    })
}

/// Frees the frames that lay on Linux's per-CPU lists, dealt out over the CPUs as they were there.
fn place_pcp_frames(machine: &Machine, state: &StartState) -> anyhow::Result<u64> {
    let cpus = machine.hosted().shape().cpus.len();
    let mut placed = 0;
    for zone in &state.zones {
        let counts: Vec<u64> = zone.pagesets.iter().map(|p| p.count).collect();
        let all: u64 = counts.iter().sum::<u64>().max(1);
        let mut rest = zone.unaccounted.as_slice();
        for cpu in 0..cpus {
            let share = counts.get(cpu).map_or(0, |c| zone.unaccounted.len() as u64 * c / all);
            let n = if cpu + 1 == cpus { rest.len() } else { (share as usize).min(rest.len()) };
            let (mine, others) = rest.split_at(n);
            rest = others;
            machine.run_on(Some(cpu), None, |_| {
                for pfn in mine {
                    if let Some(page) = machine.pfn_to_page(Pfn(*pfn as u32)) {
                        // Claimed above; it cannot be refused.
                        placed += u64::from(machine.__free_page(page).is_ok());
                    }
                }
            })?;
        }
    }
    Ok(placed)
}
