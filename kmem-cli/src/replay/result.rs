//! What came of a replay: the object that `--json` prints and the report draws.
//!
//! # Concepts
//! Everything is plain data, put together once the run is over. What Linux had is read from the texts of
//! the recording itself, whatever machine the replay ran on, so that the two sides of a comparison never come
//! from one source. Frames on per-CPU lists are free, but in no block; they are told beside the blocks and
//! never drained into them.

use super::{
    Args, Speed,
    areas::{LinuxVmalloc, PercpuResult, VmallocResult},
    engine::{Run, Sample},
    machine::{Start, free_blocks},
    objects::{LinuxResult, SlabResult},
    plan::{Odd, Plan},
};
use kmem::vmstat::VmEvent;
use kmem_hosted::Machine;
use kmem_trace::{
    PageOp, Recording,
    end::unusable_index,
    proc::{Buddyinfo, Zoneinfo},
};
use serde::Serialize;
use std::collections::BTreeMap;

/// Orders whose unusable index is reported.
pub const INDEX_ORDERS: [usize; 4] = [3, 5, 7, 9];

/// Free memory at one end of a run.
#[derive(Clone, Debug, Serialize)]
pub struct FreeState {
    /// Free blocks by order, all zones together.
    pub free_blocks: Vec<u64>,
    /// Frames in them.
    pub free_frames: u64,
    /// Frames on per-CPU lists, which are not in the blocks.
    pub pcp_frames: u64,
    /// Free frames in blocks of order 9 and above, in units of 512.
    pub order9_equivalents: u64,
    /// 1 − free frames in blocks of at least that order / free frames, by order.
    pub unusable_index: BTreeMap<String, f64>,
}

impl FreeState {
    fn new(free_blocks: Vec<u64>, pcp_frames: u64) -> FreeState {
        let frames = |from: usize| -> u64 {
            free_blocks.iter().enumerate().skip(from).map(|(o, n)| n << o).sum()
        };
        FreeState {
            free_frames: frames(0),
            pcp_frames,
            order9_equivalents: frames(9) >> 9,
            unusable_index: indices(&free_blocks),
            free_blocks,
        }
    }

    /// Where Linux began, from the recording's texts.
    fn linux_start(recording: &Recording) -> anyhow::Result<Option<FreeState>> {
        let meta = &recording.meta;
        let Some((name, text)) = meta.first_file(&["buddyinfo.traced_start", "start/buddyinfo"])
        else {
            return Ok(None);
        };
        let free_blocks = Buddyinfo::parse(text, name)?.total();
        let on_lists = match meta.first_file(&["zoneinfo.traced_start", "start/zoneinfo"]) {
            Some((name, text)) => {
                let zones = Zoneinfo::parse(text, name)?.zones;
                zones.iter().filter(|z| z.present > 0).map(|z| z.pcp_count()).sum()
            }
            None => 0,
        };
        Ok(Some(FreeState::new(free_blocks, on_lists)))
    }
}

/// The unusable index of the reported orders.
fn indices(free_blocks: &[u64]) -> BTreeMap<String, f64> {
    INDEX_ORDERS.iter().map(|o| (o.to_string(), unusable_index(free_blocks, *o))).collect()
}

/// The machine at one moment.
#[derive(Clone, Debug, Serialize)]
pub struct Moment {
    /// What was counted.
    #[serde(flatten)]
    pub sample: Sample,
    /// As in [`FreeState`].
    pub unusable_index: BTreeMap<String, f64>,
}

/// A mark the workload left in the recording.
#[derive(Clone, Debug, Serialize)]
pub struct PhaseMark {
    /// Its number.
    pub number: u64,
    /// Page events before it.
    pub seq: u64,
    /// Milliseconds of recorded time before it.
    pub recorded_ms: f64,
}

/// One zone of the machine.
#[derive(Clone, Debug, Serialize)]
pub struct ZoneResult {
    /// Its node.
    pub node: usize,
    /// Its name.
    pub name: &'static str,
    /// Frames it manages.
    pub managed_frames: u64,
    /// Frames below which only some may allocate.
    pub min: u64,
    /// Frames below which reclaim begins.
    pub low: u64,
}

/// Where allocations of list orders were answered from.
#[derive(Clone, Debug, Serialize)]
pub struct PcpResult {
    /// From a per-CPU list.
    pub hits: u64,
    /// From a list that had to be refilled first.
    pub refills: u64,
    /// From the free lists.
    pub bypasses: u64,
}

/// Latency of an operation in nanoseconds.
#[derive(Clone, Debug, Serialize)]
pub struct Latency {
    /// Operations.
    pub count: u64,
    /// Half are below.
    pub p50: u64,
    /// Nine tenths are below.
    pub p90: u64,
    /// 99 % are below.
    pub p99: u64,
    /// 99.9 % are below.
    pub p999: u64,
    /// The slowest.
    pub max: u64,
    /// The mean.
    pub mean: f64,
}

impl Latency {
    fn new(h: &hdrhistogram::Histogram<u64>) -> Latency {
        Latency {
            count: h.len(),
            p50: h.value_at_quantile(0.5),
            p90: h.value_at_quantile(0.9),
            p99: h.value_at_quantile(0.99),
            p999: h.value_at_quantile(0.999),
            max: h.max(),
            mean: h.mean(),
        }
    }
}

/// The start.
#[derive(Clone, Debug, Serialize)]
pub struct StartResult {
    /// Free blocks by order when the replay began.
    pub free_blocks: Vec<u64>,
    /// The recorded ones, if known.
    pub linux_free_blocks: Option<Vec<u64>>,
    /// Frames from Linux's per-CPU lists, put on kmem's.
    pub pcp_frames: u64,
    /// What was done in place of the recorded start state, if anything.
    pub note: Option<String>,
}

/// The whole result.
#[derive(Clone, Debug, Serialize)]
pub struct ReplayResult {
    /// Name of the recording.
    pub recording: String,
    /// Whether every event ran on one thread.
    pub single_thread: bool,
    /// Whether events kept to their recorded times.
    pub recorded_speed: bool,
    /// Seconds from the first recorded event to the last.
    pub recorded_seconds: f64,
    /// Threads that ran events.
    pub threads: usize,
    /// CPUs of the machine.
    pub cpus: usize,
    /// Frames that the machine's allocator manages.
    pub managed_frames: u64,
    /// Its populated zones.
    pub zones: Vec<ZoneResult>,
    /// Page events in the recording.
    pub events: usize,
    /// Of these, compaction's, which ask for nothing.
    pub compaction_events: usize,
    /// Allocations done.
    pub allocs: u64,
    /// Frees done.
    pub frees: u64,
    /// Allocations that Linux satisfied and kmem could not.
    pub failures: u64,
    /// Allocations that succeeded only below the watermarks.
    pub below_watermark: u64,
    /// Allocations that waited for earlier frees of the recording.
    pub waited_for_memory: u64,
    /// Frees that make no sense in the recording.
    pub unmatched_frees: usize,
    /// Frees that the recording lacks: their frames are allocated again without.
    pub missing_frees: usize,
    /// Events that the recorder says it lost.
    pub lost_events: u64,
    /// Lines of a text recording that were passed over, by what they are.
    pub skipped_lines: BTreeMap<String, u64>,
    /// Frees that the allocator refused.
    pub refused_frees: u64,
    /// Operations on blocks whose allocation had failed.
    pub skipped: u64,
    /// The first events that make no sense.
    pub odd_events: Vec<Odd>,
    /// Wall-clock seconds.
    pub seconds: f64,
    /// Allocations and frees per second, all threads together.
    pub ops_per_second: f64,
    /// Latency by operation.
    pub latency_ns: BTreeMap<&'static str, Latency>,
    /// Most frames in use at a sample.
    pub high_water_frames: u64,
    /// Where it began.
    pub start: StartResult,
    /// Where it ended, nothing drained.
    pub end: FreeState,
    /// Where Linux ended, if recorded.
    pub linux_end: Option<FreeState>,
    /// Where Linux began, if recorded.
    pub linux_start: Option<FreeState>,
    /// Answers of the per-CPU lists over the whole run.
    pub pcp: PcpResult,
    /// The marks of the recording's phases.
    pub phases: Vec<PhaseMark>,
    /// The machine over time.
    pub samples: Vec<Moment>,
    /// The slab layer, if the recording has objects.
    pub slab: Option<SlabResult>,
    /// Linux's slab layer, if the recording has objects and `slabinfo`.
    pub linux_slab: Option<LinuxResult>,
    /// vmalloc, if the recording has areas.
    pub vmalloc: Option<VmallocResult>,
    /// Linux's vmalloc, if the recording has areas and `vmallocinfo`.
    pub linux_vmalloc: Option<LinuxVmalloc>,
    /// Per-CPU memory, if the recording has any.
    pub percpu: Option<PercpuResult>,
}

impl ReplayResult {
    /// Puts everything together.
    pub fn new(
        recording: &Recording,
        plan: &Plan,
        machine: &Machine,
        start: &Start,
        run: Run,
        args: &Args,
    ) -> anyhow::Result<ReplayResult> {
        let pcp = machine.zones().iter().flat_map(|z| machine.pcp_frames(z)).sum();
        let linux_end =
            recording.linux_end()?.map(|end| FreeState::new(end.total.clone(), end.pcp_frames()));
        let seconds = run.elapsed.as_secs_f64();
        let (phases, missing_frees) = walk(recording);
        let mut samples = run.samples;
        samples.sort_by_key(|s| s.seq);
        Ok(ReplayResult {
            recording: recording.meta.name.clone(),
            single_thread: args.single_thread,
            recorded_speed: args.speed == Speed::Recorded,
            recorded_seconds: recording.duration_ns() as f64 / 1e9,
            threads: if args.single_thread { 1 } else { plan.nr_cpus() },
            cpus: machine.hosted().shape().cpus.len(),
            managed_frames: machine.totalram_pages(),
            zones: zones(machine),
            events: plan.events,
            compaction_events: plan.compaction_events,
            allocs: run.allocs,
            frees: run.frees,
            failures: run.failures,
            below_watermark: run.below_watermark,
            waited_for_memory: run.waited_for_memory,
            unmatched_frees: plan.unmatched_frees,
            missing_frees,
            lost_events: recording.meta.lost,
            skipped_lines: skipped_lines(recording),
            refused_frees: run.refused_frees,
            skipped: run.skipped,
            odd_events: plan.odd.clone(),
            seconds,
            ops_per_second: (run.allocs + run.frees) as f64 / seconds.max(1e-9),
            latency_ns: BTreeMap::from([
                ("alloc", Latency::new(&run.alloc_ns)),
                ("free", Latency::new(&run.free_ns)),
            ]),
            high_water_frames: run.high_water_frames,
            start: StartResult {
                free_blocks: start.free_blocks.clone(),
                linux_free_blocks: start.linux_free_blocks.clone(),
                pcp_frames: start.pcp_frames,
                note: start.note.clone(),
            },
            end: FreeState::new(free_blocks(machine), pcp),
            linux_end,
            linux_start: FreeState::linux_start(recording)?,
            pcp: PcpResult {
                hits: machine.vm_event(VmEvent::PcpHit),
                refills: machine.vm_event(VmEvent::PcpRefill),
                bypasses: machine.vm_event(VmEvent::PcpBypass),
            },
            phases,
            samples: samples
                .into_iter()
                .map(|sample| Moment { unusable_index: indices(&sample.free_blocks), sample })
                .collect(),
            slab: None,
            linux_slab: None,
            vmalloc: None,
            linux_vmalloc: None,
            percpu: None,
        })
    }
}

/// Where the phases begin among the page events, and how many frees are missing.
fn walk(recording: &Recording) -> (Vec<PhaseMark>, usize) {
    let mut waiting = recording.phases().into_iter().peekable();
    let mut marks = Vec::new();
    let mut missing = 0;
    let mut seq = 0;
    let mut mark = |row: usize, seq: u64| {
        while let Some(phase) = waiting.next_if(|p| p.row <= row) {
            let recorded_ms = phase.time_ns as f64 / 1e6;
            marks.push(PhaseMark { number: phase.number, seq, recorded_ms });
        }
    };
    for event in recording.page_events() {
        mark(event.row, seq);
        missing += usize::from(matches!(event.op, PageOp::Vanished { .. }));
        seq += 1;
    }
    mark(usize::MAX, seq);
    (marks, missing)
}

/// For each of the result's samples the row of the recording that it follows.
pub fn sample_rows(recording: &Recording, r: &ReplayResult) -> Vec<usize> {
    let mut waiting = r.samples.iter().map(|s| s.sample.seq).peekable();
    let mut rows = Vec::with_capacity(r.samples.len());
    for (seq, event) in recording.page_events().enumerate() {
        while waiting.next_if(|sample| *sample <= seq as u64).is_some() {
            rows.push(event.row);
        }
    }
    rows.extend(waiting.map(|_| recording.rows.len()));
    rows
}

fn zones(machine: &Machine) -> Vec<ZoneResult> {
    let populated = machine.zones().iter().filter(|z| z.managed_frames() > 0);
    populated
        .map(|z| ZoneResult {
            node: z.node(),
            name: z.zone_type().name(),
            managed_frames: z.managed_frames(),
            min: z.watermarks().min,
            low: z.watermarks().low,
        })
        .collect()
}

fn skipped_lines(recording: &Recording) -> BTreeMap<String, u64> {
    let counts = recording.meta.counts.iter();
    counts
        .filter_map(|(name, n)| Some((name.strip_prefix("skipped ")?.to_owned(), n.as_u64()?)))
        .collect()
}
