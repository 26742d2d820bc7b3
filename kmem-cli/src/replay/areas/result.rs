//! What kmem's vmalloc and per-CPU memory came to, beside Linux's.

use super::{
    plan::{OddFree, Of, Plan},
    run::{Counts, Moment, PAGE, Run},
};
use kmem_trace::{
    Kind, Recording,
    proc::{AreaKind, Vmallocinfo},
};
use serde::Serialize;

/// What a recording says of Linux.
pub struct Linux {
    /// Areas before the recording.
    pub start: Option<Vmallocinfo>,
    /// Areas after it.
    end: Option<Vmallocinfo>,
    /// KiB of chunks before and after.
    percpu_kib: [Option<u64>; 2],
    /// Most bytes that Linux counted for per-CPU memory of the recording, all CPUs together.
    percpu_peak: u64,
}

impl Linux {
    /// Reads the recording's texts.
    ///
    /// # Errors
    /// A `vmallocinfo` that cannot be parsed.
    pub fn new(recording: &Recording) -> anyhow::Result<Linux> {
        let meta = &recording.meta;
        let areas = |name: &'static str| {
            meta.file(name).map(|text| Vmallocinfo::parse(text, name)).transpose()
        };
        let kib = |name: &str| {
            let line = meta.file(name)?.lines().find_map(|line| line.strip_prefix("Percpu:"));
            line?.split_whitespace().next()?.parse().ok()
        };
        let mut live = std::collections::BTreeMap::new();
        let (mut percpu, mut percpu_peak) = (0u64, 0);
        for row in &recording.rows {
            match row.kind {
                Kind::PerCpuAlloc => {
                    percpu += u64::from(row.bytes_allocated);
                    live.insert(row.id, u64::from(row.bytes_allocated));
                }
                // What is from before was not counted.
                Kind::PerCpuFree if row.id.is_some() => {
                    percpu = percpu.saturating_sub(live.remove(&row.id).unwrap_or(0));
                }
                _ => {}
            }
            percpu_peak = percpu_peak.max(percpu);
        }
        Ok(Linux {
            start: areas("start/vmallocinfo")?,
            end: areas("end/vmallocinfo")?,
            percpu_kib: [kib("start/meminfo"), kib("end/meminfo")],
            percpu_peak,
        })
    }

    /// Linux's vmalloc, if the recording has a text of it.
    pub fn result(&self, plan: &Plan) -> Option<LinuxVmalloc> {
        let start = self.start.as_ref().filter(|_| plan.events(true) > 0)?;
        Some(LinuxVmalloc {
            start: AreaState::of(start),
            peak_bytes: plan.area_peak(),
            end: self.end.as_ref().map(AreaState::of),
        })
    }
}

/// Areas at one moment.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct AreaState {
    /// Areas in use.
    pub areas: u64,
    /// Bytes of them, guards included.
    pub bytes: u64,
    /// Frames that they have of their own.
    pub pages: u64,
    /// Bytes of areas that were freed and are not purged, or kept for the next: no other area can have them.
    pub unpurged_bytes: u64,
}

impl AreaState {
    fn of(info: &Vmallocinfo) -> AreaState {
        let (mut state, mut unpurged_bytes) = ((0, 0, 0), 0);
        for area in &info.areas {
            if area.kind == AreaKind::Unpurged {
                unpurged_bytes += area.bytes;
            } else {
                state = (state.0 + 1, state.1 + area.bytes, state.2 + area.pages);
            }
        }
        let (areas, bytes, pages) = state;
        AreaState { areas, bytes, pages, unpurged_bytes }
    }

    fn at(run: &Run, at: &Moment) -> AreaState {
        AreaState {
            areas: at.areas,
            bytes: at.area_bytes,
            pages: at.area_pages,
            unpurged_bytes: run.range_bytes - at.free_bytes - at.area_bytes,
        }
    }
}

/// What the replay of the areas came to.
#[derive(Clone, Debug, Serialize)]
pub struct VmallocResult {
    /// What was done.
    #[serde(flatten)]
    pub done: Done,
    /// Before the first event.
    pub start: AreaState,
    /// When most bytes were in use.
    pub peak: AreaState,
    /// Row of the recording that brought them.
    pub peak_row: usize,
    /// After the last event.
    pub end: AreaState,
    /// Areas that wait for a purge at the end.
    pub end_lazy: u64,
    /// Free areas in pools at the end.
    pub end_pooled: u64,
    /// Bytes of addresses that there are.
    pub range_bytes: u64,
    /// Bytes of addresses free at the end.
    pub free_bytes: u64,
    /// The largest range of them.
    pub largest_free_bytes: u64,
    /// 1 − largest / free.
    pub fragmentation: f64,
    /// At the moments of the result's samples: bytes in use.
    pub samples_bytes: Vec<u64>,
    /// The same: bytes that no other area can have, those in use included.
    pub samples_taken: Vec<u64>,
}

/// What was done.
#[derive(Clone, Debug, Serialize)]
pub struct Done {
    /// Events of the recording.
    pub events: u64,
    /// Allocations that succeeded.
    pub allocs: u64,
    /// Frees.
    pub frees: u64,
    /// Allocations that failed.
    pub failures: u64,
    /// Frees that the allocator refused.
    pub refused_frees: u64,
    /// Frees of what could not be allocated.
    pub skipped: u64,
    /// Frees that make no sense.
    pub unmatched_frees: u64,
    /// Frees of what was there before the recording.
    pub prior_frees: u64,
    /// The first frees that make no sense.
    pub odd_frees: Vec<OddFree>,
    /// Wall-clock seconds.
    pub seconds: f64,
    /// Allocations and frees per second.
    pub ops_per_second: f64,
}

impl Done {
    fn new(plan: &Plan, run: &Run, of: Of) -> Done {
        let Counts { allocs, frees, failures, refused_frees, skipped, elapsed } =
            run.counts[of as usize];
        let seconds = elapsed.as_secs_f64();
        Done {
            events: plan.events(of == Of::Area),
            allocs,
            frees,
            failures,
            refused_frees,
            skipped,
            unmatched_frees: plan.unmatched[of as usize],
            prior_frees: plan.prior[of as usize],
            odd_frees: plan.odd[of as usize].clone(),
            seconds,
            ops_per_second: (allocs + frees) as f64 / seconds.max(1e-9),
        }
    }
}

impl VmallocResult {
    /// Puts everything together.
    pub fn new(plan: &Plan, run: &Run) -> VmallocResult {
        let (free, largest) = (run.audit.free as u64, run.audit.largest as u64);
        VmallocResult {
            done: Done::new(plan, run, Of::Area),
            start: AreaState::at(run, &run.start),
            peak: AreaState::at(run, &run.area_peak),
            peak_row: run.area_peak.row,
            end: AreaState::at(run, &run.end),
            end_lazy: run.audit.lazy,
            end_pooled: run.audit.pooled,
            range_bytes: run.range_bytes,
            free_bytes: free,
            largest_free_bytes: largest,
            fragmentation: 1.0 - largest as f64 / free.max(1) as f64,
            samples_bytes: run.samples.iter().map(|(used, _)| *used).collect(),
            samples_taken: run.samples.iter().map(|(_, taken)| *taken).collect(),
        }
    }
}

/// What Linux's vmalloc had.
#[derive(Clone, Debug, Serialize)]
pub struct LinuxVmalloc {
    /// By `vmallocinfo`, before the recording.
    pub start: AreaState,
    /// Most bytes in use: those of the start and of the recording's areas. A free of an area from before takes off what most
    /// areas have, as kmem's replay does, and nothing if there is no such area at the start: then it is an upper bound.
    pub peak_bytes: u64,
    /// By `vmallocinfo`, after the recording.
    pub end: Option<AreaState>,
}

/// Per-CPU memory at one moment.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct PercpuState {
    /// Pieces in use.
    pub live: u64,
    /// Bytes of one CPU that were asked for.
    pub bytes: u64,
    /// Bytes of one CPU that they take: rounded up, and with what is lost between them.
    pub taken_bytes: u64,
    /// Chunks, the first one included.
    pub chunks: u64,
}

impl PercpuState {
    fn at(run: &Run, cpus_pages: u64, at: &Moment) -> PercpuState {
        let further = at.percpu_pages / cpus_pages.max(1);
        let chunks = 1 + further;
        let used = chunks * run.stride - at.percpu_free;
        let taken_bytes = used.saturating_sub(run.percpu_static);
        PercpuState { live: at.percpu, bytes: at.percpu_bytes, taken_bytes, chunks }
    }
}

/// What the replay of per-CPU memory came to.
#[derive(Clone, Debug, Serialize)]
pub struct PercpuResult {
    /// What was done.
    #[serde(flatten)]
    pub done: Done,
    /// Bytes of one CPU in a chunk.
    pub stride: u64,
    /// Before the first event: what is freed from before.
    pub start: PercpuState,
    /// When most bytes were in use.
    pub peak: PercpuState,
    /// Row of the recording that brought them.
    pub peak_row: usize,
    /// After the last event.
    pub end: PercpuState,
    /// Most bytes that Linux counted for the recording's, all CPUs and their accounting together.
    pub linux_peak_bytes: u64,
    /// KiB of Linux's chunks before the recording, with those of its static variables.
    pub linux_start_kib: Option<u64>,
    /// The same after it.
    pub linux_end_kib: Option<u64>,
}

impl PercpuResult {
    /// Puts everything together.
    pub fn new(plan: &Plan, run: &Run, linux: &Linux) -> PercpuResult {
        let state = |at| PercpuState::at(run, run.chunk_pages, at);
        PercpuResult {
            done: Done::new(plan, run, Of::Percpu),
            stride: run.stride,
            start: state(&run.start),
            peak: state(&run.percpu_peak),
            peak_row: run.percpu_peak.row,
            end: state(&run.end),
            linux_peak_bytes: linux.percpu_peak,
            linux_start_kib: linux.percpu_kib[0],
            linux_end_kib: linux.percpu_kib[1],
        }
    }
}

/// Frames of a chunk of so many CPUs, its description included.
pub fn chunk_pages(stride: u64, cpus: u64) -> u64 {
    (stride * cpus).div_ceil(PAGE) + 1
}
