//! The events of areas and of per-CPU memory as one list of operations.

use super::result::Linux;
use kmem_trace::{Kind, Recording, proc::AreaKind};
use serde::Serialize;
use std::collections::BTreeMap;

/// What an operation is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Of {
    /// An area, whole frames and a guard.
    Area,
    /// Per-CPU memory.
    Percpu,
}

/// Something to allocate.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Thing {
    /// What it is.
    pub of: Of,
    /// Bytes: of the area with its guard, or of one CPU.
    pub bytes: u64,
    /// log2 of the alignment.
    pub align: u8,
    /// Whether an area has frames of its own.
    pub frames: bool,
    /// Linux's flags of the request.
    pub gfp: u32,
}

/// One operation.
#[derive(Clone, Copy, Debug)]
pub struct Op {
    /// Row in the recording.
    pub row: usize,
    /// What it is about.
    pub handle: usize,
    /// Whether it is given, or given back.
    pub alloc: bool,
    /// The recorded CPU.
    pub cpu: u16,
}

/// A free that makes no sense.
#[derive(Clone, Debug, Serialize)]
pub struct OddFree {
    /// Row in the recording.
    pub row: usize,
    /// The recorded address.
    pub address: u64,
    /// What is odd.
    pub why: &'static str,
}

/// Odd frees that are listed.
const LISTED: usize = 20;

/// All of a recording.
#[derive(Default)]
pub struct Plan {
    /// What is allocated; the first `start` of them before the first operation.
    pub things: Vec<Thing>,
    /// Those that are there at the start.
    pub start: usize,
    /// The operations, in the recorded order.
    pub ops: Vec<Op>,
    /// Frees of areas, and of per-CPU memory, that make no sense.
    pub unmatched: [u64; 2],
    /// The first of either.
    pub odd: [Vec<OddFree>; 2],
    /// Frees of what was there before the recording.
    pub prior: [u64; 2],
}

/// The value that is there most often, the smallest of them.
fn most_frequent(values: impl Iterator<Item = (u64, u8)>) -> Option<(u64, u8)> {
    let mut counts: BTreeMap<(u64, u8), usize> = BTreeMap::new();
    values.for_each(|value| *counts.entry(value).or_default() += 1);
    counts.into_iter().rev().max_by_key(|(_, n)| *n).map(|(value, _)| value)
}

impl Plan {
    /// The operations of a recording.
    pub fn new(recording: &Recording, linux: &Linux) -> Plan {
        let mut plan = Plan::default();
        let shapes = |kind| {
            let rows = recording.rows.iter().filter(move |row| row.kind == kind);
            most_frequent(rows.map(|row| (u64::from(row.bytes_requested), row.order)))
        };
        let usual_area = shapes(Kind::VmapAlloc);
        let usual_percpu = shapes(Kind::PerCpuAlloc);
        for area in linux.start.iter().flat_map(|start| start.in_use()) {
            // Some that count as vmalloc's have frames of others: those of per-CPU memory.
            let frames = area.kind == AreaKind::Vmalloc && area.pages > 0;
            plan.things.push(Thing { of: Of::Area, bytes: area.bytes, align: 0, frames, gfp: 0 });
        }
        // Those that a free from before may end, the last made first.
        let usual = usual_area.map(|(bytes, _)| bytes);
        let mut areas: Vec<usize> = (0..plan.things.len())
            .filter(|i| plan.things[*i].frames && Some(plan.things[*i].bytes) == usual)
            .collect();
        // Per-CPU memory from before is there because it is freed.
        let from_before = |row: &&kmem_trace::Row| row.kind == Kind::PerCpuFree && row.id.is_none();
        let before = recording.rows.iter().filter(from_before).count();
        let (bytes, align) = usual_percpu.unwrap_or((8, 3));
        let mut percpu: Vec<usize> = (0..before)
            .map(|_| {
                let thing = Thing { of: Of::Percpu, bytes, align, frames: false, gfp: 0 };
                plan.things.push(thing);
                plan.things.len() - 1
            })
            .collect();
        plan.start = plan.things.len();
        let mut handles: BTreeMap<u32, usize> = BTreeMap::new();
        for (at, row) in recording.rows.iter().enumerate() {
            let of = match row.kind {
                Kind::VmapAlloc | Kind::VmapFree => Of::Area,
                Kind::PerCpuAlloc | Kind::PerCpuFree => Of::Percpu,
                _ => continue,
            };
            let alloc = row.kind.gives_id();
            let handle = if alloc {
                let bytes = u64::from(row.bytes_requested);
                plan.things.push(Thing { of, bytes, align: row.order, frames: true, gfp: row.gfp });
                let handle = plan.things.len() - 1;
                row.id.and_then(|id| handles.insert(id, handle));
                Ok(handle)
            } else {
                match row.id {
                    Some(id) => handles.remove(&id).ok_or("its allocation is not in the recording"),
                    None => {
                        let prior = if of == Of::Area { &mut areas } else { &mut percpu };
                        let ended = prior.pop();
                        plan.prior[of as usize] += u64::from(ended.is_some());
                        ended.ok_or("no area from before can be the one")
                    }
                }
            };
            match handle {
                Ok(handle) => plan.ops.push(Op { row: at, handle, alloc, cpu: row.cpu }),
                Err(why) => {
                    plan.unmatched[of as usize] += 1;
                    let odd = &mut plan.odd[of as usize];
                    if odd.len() < LISTED {
                        odd.push(OddFree { row: at, address: row.address, why });
                    }
                }
            }
        }
        plan
    }

    /// Most bytes of areas in use, guards included, if every allocation succeeds.
    pub fn area_peak(&self) -> u64 {
        let area = |thing: &Thing| if thing.of == Of::Area { thing.bytes } else { 0 };
        let mut bytes: u64 = self.things[..self.start].iter().map(area).sum();
        let mut peak = bytes;
        for op in &self.ops {
            let of = area(&self.things[op.handle]);
            bytes = if op.alloc { bytes + of } else { bytes - of };
            peak = peak.max(bytes);
        }
        peak
    }

    /// Operations on areas, or on per-CPU memory, and frees that make no sense.
    pub fn events(&self, areas: bool) -> u64 {
        let of = if areas { Of::Area } else { Of::Percpu };
        let done = self.ops.iter().filter(|op| self.things[op.handle].of == of).count() as u64;
        done + self.unmatched[of as usize]
    }
}
