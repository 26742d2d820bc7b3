//! Running the operations on objects.
//!
//! # Implementation
//! One thread runs all operations in the recorded order, changing CPUs where the recording does. A table says
//! where each object is. The first bytes of an object are written when it is allocated and looked at when it is
//! freed: two objects in one place would show.
//!
//! After each operation the frames of all slabs are read from the machine's counters; what each cache holds is
//! looked at whenever they are more than ever before, so that the peak is known cache by cache.

use super::plan::{Cache, Op, Plan, Source, What};
use super::result::PAGE;
use crate::replay::record::{Taken, Tape};
use anyhow::{Context, anyhow, bail};
use indicatif::{ProgressBar, ProgressStyle};
use kmem::{
    Config, Gfp,
    context::{Cpu, Process, Task},
    page_state::NodeStat,
    platform::Platform,
    slab::{CacheInfo, KmemCache, ObjectAudit, SlabFlags},
};
use kmem_hosted::{Hosted, Machine, Shape};
use kmem_trace::{Recording, proc::Zoneinfo};
use std::{
    ptr::NonNull,
    time::{Duration, Instant},
};

/// What the machine held at one moment.
#[derive(Clone, Default)]
pub struct Snapshot {
    /// Row of the recording after which.
    pub row: usize,
    /// What each cache holds.
    pub caches: Vec<CacheInfo>,
    /// Live objects, by the plan's caches.
    pub live: Vec<u64>,
}

impl Snapshot {
    /// Frames of all slabs, and what the states of objects take outside of them.
    pub fn frames(&self) -> u64 {
        let slabs: u64 = self.caches.iter().map(|c| c.slabs * u64::from(c.frames_per_slab)).sum();
        slabs + self.state_frames()
    }

    /// Frames that the states of large objects take in the machine's table.
    pub fn state_frames(&self) -> u64 {
        self.caches.iter().map(|c| c.table_bytes).sum::<u64>().div_ceil(PAGE)
    }
}

/// What a run came to.
#[derive(Default)]
pub struct Run {
    /// Wall-clock time of the operations.
    pub elapsed: Duration,
    /// Allocations that succeeded.
    pub allocs: u64,
    /// Frees.
    pub frees: u64,
    /// Allocations that failed.
    pub failures: u64,
    /// Frees that the allocator refused.
    pub refused_frees: u64,
    /// Frees of objects whose allocation had failed.
    pub skipped: u64,
    /// Caches that kmem cannot have; kmalloc stands in for them.
    pub by_kmalloc: u64,
    /// Objects made before the first operation.
    pub start_objects: u64,
    /// Once they were made.
    pub start: Snapshot,
    /// When most was held.
    pub peak: Snapshot,
    /// After the last operation.
    pub end: Snapshot,
    /// Frames of the layer's tables, which are in no slab.
    pub own_frames: u64,
    /// Frames held once every object was freed, every cache destroyed and every empty slab given back.
    pub frames_left: u64,
}

/// A cache, made.
enum Made {
    Cache(KmemCache),
    Kmalloc(Gfp),
}

/// Memory of a machine whose recording does not tell it.
const DEFAULT_FRAMES: u64 = 1 << 18;
/// The least that a machine is given.
const LEAST_FRAMES: u64 = 1 << 14;

/// Frames of the recorded machine.
pub fn frames(recording: &Recording) -> anyhow::Result<u64> {
    let Some((name, text)) =
        recording.meta.first_file(&["zoneinfo.traced_start", "start/zoneinfo"])
    else {
        return Ok(DEFAULT_FRAMES);
    };
    let zones = Zoneinfo::parse(text, name)?.zones;
    let frames = zones.iter().map(|z| z.present).fold(0, u64::saturating_add);
    Ok(frames.clamp(LEAST_FRAMES, 1 << 30).next_multiple_of(512))
}

/// Runs the plan; with `record` it is told what the machine did.
pub fn run(
    recording: &Recording,
    plan: &Plan,
    cpus: usize,
    quiet: bool,
    record: bool,
) -> anyhow::Result<(Run, Option<Taken>)> {
    let shape = Shape::x86_64(frames(recording)? << 12).cpus(cpus);
    let machine = Machine::without_kswapd(shape, Config::default())
        .context("cannot build the machine for the objects")?;
    let mut replay = Replay {
        machine: &machine,
        plan,
        made: plan.caches.iter().map(|_| None).collect(),
        table: vec![None; plan.handles],
        standing: Vec::new(),
        live: vec![0; plan.caches.len()],
        most: 0,
        run: Run::default(),
    };
    let task = Task::new();
    machine.run_on(Some(0), Some(&task), |_| replay.populate())??;
    let mut tape = None;
    if record {
        let start = |_: &mut Process| Tape::objects(&machine, plan.ops.len());
        tape = Some(machine.run_on(Some(0), Some(&task), start)??);
    }
    let bar = progress(plan.ops.len() as u64, quiet);
    let began = Instant::now();
    for ops in plan.ops.chunk_by(|a, b| a.cpu == b.cpu) {
        let cpu = usize::from(ops[0].cpu) % cpus;
        machine.run_on(Some(cpu), Some(&task), |_| replay.operations(ops))??;
        bar.inc(ops.len() as u64);
    }
    replay.run.elapsed = began.elapsed();
    bar.finish_and_clear();
    let mut taken = None;
    if let Some(tape) = tape {
        taken = Some(machine.run_on(Some(0), Some(&task), |_| tape.stop())??);
    }
    machine.run_on(Some(0), Some(&task), |_| replay.finish())??;
    Ok((replay.run, taken))
}

fn progress(ops: u64, quiet: bool) -> ProgressBar {
    if quiet {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(ops);
    match ProgressStyle::with_template("objects   {bar:40} {percent:>3}% {human_pos}/{human_len}") {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

struct Replay<'a> {
    machine: &'a Machine,
    plan: &'a Plan,
    made: Vec<Option<Made>>,
    /// Where each handle's object is.
    table: Vec<Option<NonNull<u8>>>,
    /// Objects from before that nobody frees, and their caches.
    standing: Vec<(NonNull<u8>, u32)>,
    live: Vec<u64>,
    /// Most frames so far.
    most: u64,
    run: Run,
}

/// What Linux's constructors made of objects is not recorded; that there is one is.
fn constructor(_: *mut u8) {}

/// Marks an object as `handle`'s.
fn mark(at: NonNull<u8>, handle: u32) {
    // SAFETY: objects begin at a word and have at least the bytes of one; it was just given to us.
    unsafe { at.cast::<u32>().write(handle) };
}

/// Whether the object is marked as `handle`'s.
fn marked(at: NonNull<u8>, handle: u32) -> bool {
    // SAFETY: a live object of ours, marked.
    unsafe { at.cast::<u32>().read() == handle }
}

/// The mark of objects that nobody frees.
const STANDING: u32 = u32::MAX;

impl Replay<'_> {
    /// Makes the caches and objects of the start.
    fn populate(&mut self) -> anyhow::Result<()> {
        for (at, cache) in self.plan.caches.iter().enumerate() {
            if matches!(cache.source, Source::Nowhere) || !(cache.at_start || cache.live > 0) {
                continue;
            }
            let nr = cache.live;
            let freed = cache.freed.len() as u64;
            let mut next = 0;
            for i in 0..nr {
                let object =
                    self.get(at as u32, cache.size as usize, Gfp::KERNEL).ok_or_else(|| {
                        anyhow!("no memory for the objects from before in {}", cache.name)
                    })?;
                // The k-th of those that are freed stands in the middle of the k-th of equal parts.
                if next < freed && i == (2 * next + 1) * nr / (2 * freed) {
                    let handle = cache.freed[next as usize];
                    mark(object, handle);
                    self.table[handle as usize] = Some(object);
                    next += 1;
                } else {
                    mark(object, STANDING);
                    self.standing.push((object, at as u32));
                }
            }
            debug_assert_eq!(next, freed);
            self.live[at] = nr;
            self.run.start_objects += nr;
            // A cache without objects was there as well.
            self.make(at as u32);
        }
        self.audit()?;
        self.run.start = self.snapshot(0);
        self.run.peak = self.run.start.clone();
        self.most = self.run.peak.frames();
        Ok(())
    }

    fn make(&mut self, cache: u32) -> &Made {
        let Cache { name, size, align, source, .. } = &self.plan.caches[cache as usize];
        self.made[cache as usize].get_or_insert_with(|| match source {
            Source::Kmalloc(gfp) => Made::Kmalloc(*gfp),
            Source::Cache { flags, constructor: c } => {
                let ctor = c.then_some(constructor as fn(*mut u8));
                let flags = *flags | SlabFlags::NO_MERGE;
                let (size, align) = (*size as usize, *align as usize);
                match self.machine.kmem_cache_create(name, size, align, flags, ctor) {
                    Ok(cache) => Made::Cache(cache),
                    Err(_) => {
                        self.run.by_kmalloc += 1;
                        Made::Kmalloc(Gfp::empty())
                    }
                }
            }
            Source::Nowhere => Made::Kmalloc(Gfp::empty()),
        })
    }

    /// Allocates an object of a cache; `bytes` matter to kmalloc.
    fn get(&mut self, cache: u32, bytes: usize, gfp: Gfp) -> Option<NonNull<u8>> {
        let machine = self.machine;
        let bytes = bytes.max(1);
        match self.make(cache) {
            Made::Cache(cache) => machine.kmem_cache_alloc(cache, gfp),
            Made::Kmalloc(more) => machine.kmalloc(bytes, gfp | *more),
        }
        .ok()
    }

    fn operations(&mut self, ops: &[Op]) -> anyhow::Result<()> {
        for op in ops {
            match op.what {
                What::Kmalloc | What::CacheAlloc => self.alloc(op),
                What::Kfree | What::CacheFree => self.free(op)?,
            }
            let frames = self.frames();
            if frames > self.most {
                self.most = frames;
                self.run.peak = self.snapshot(op.row as usize);
            }
        }
        Ok(())
    }

    /// Frames of all slabs.
    fn frames(&self) -> u64 {
        [NodeStat::SlabReclaimable, NodeStat::SlabUnreclaimable]
            .map(|item| self.machine.global_node_page_state(item))
            .iter()
            .sum()
    }

    fn alloc(&mut self, op: &Op) {
        let (gfp, _) = Gfp::from_linux(op.gfp);
        let size = self.plan.caches[op.cache as usize].size;
        let bytes = if op.what == What::Kmalloc { op.bytes } else { size };
        let object = self.get(op.cache, bytes as usize, gfp);
        match object {
            Some(at) => {
                mark(at, op.handle);
                self.run.allocs += 1;
                self.live[op.cache as usize] += 1;
            }
            None => self.run.failures += 1,
        }
        self.table[op.handle as usize] = object;
    }

    fn free(&mut self, op: &Op) -> anyhow::Result<()> {
        let Some(at) = self.table[op.handle as usize].take() else {
            self.run.skipped += 1;
            return Ok(());
        };
        if !marked(at, op.handle) {
            bail!("row {}: somebody else wrote into the object that is freed", op.row);
        }
        if self.put(at, op.cache, op.what == What::CacheFree) {
            self.run.frees += 1;
            self.live[op.cache as usize] -= 1;
        } else {
            self.run.refused_frees += 1;
        }
        Ok(())
    }

    /// Frees an object; `false` if the allocator refuses.
    fn put(&self, at: NonNull<u8>, cache: u32, to_cache: bool) -> bool {
        match &self.made[cache as usize] {
            // SAFETY: the object is ours, and its address is forgotten.
            Some(Made::Cache(cache)) if to_cache => unsafe {
                self.machine.kmem_cache_free(cache, at).is_ok()
            },
            // SAFETY: as above.
            _ => unsafe { self.machine.kfree(at.as_ptr()).is_ok() },
        }
    }

    fn snapshot(&self, row: usize) -> Snapshot {
        let mut caches = Vec::with_capacity(self.plan.caches.len());
        self.machine.for_each_cache(|info| caches.push(*info));
        Snapshot { row, caches, live: self.live.clone() }
    }

    /// Has the machine check that every object is where it should be, and that it has as many live ones as we.
    fn audit(&self) -> anyhow::Result<ObjectAudit> {
        let found = self.machine.audit_objects().map_err(|e| anyhow!("objects: {e}"))?;
        // What is larger than any cache's objects is no object of a slab.
        let largest = 8192;
        let caches = self.plan.caches.iter().zip(&self.live);
        let live: u64 = caches.filter(|(c, _)| c.size <= largest).map(|(_, live)| live).sum();
        if found.live != live {
            bail!("objects: {live} are live, the machine says {}", found.live);
        }
        if found.slab_frames != self.frames() {
            bail!(
                "objects: slabs have {} frames, counted are {}",
                found.slab_frames,
                self.frames()
            );
        }
        Ok(found)
    }

    /// Looks at the end, then frees everything.
    fn finish(&mut self) -> anyhow::Result<()> {
        // Each CPU's places for loaded magazines are in its `Cpu`.
        let per_cpu = size_of::<Cpu>().div_ceil(1 << Hosted::PAGE_SHIFT) as u64;
        let cpus = self.machine.platform().nr_cpu_ids() as u64;
        self.run.own_frames = self.audit()?.own_frames + cpus * per_cpu;
        self.run.end = self.snapshot(self.plan.ops.last().map_or(0, |op| op.row as usize));
        let mut cache_of = vec![0; self.table.len()];
        self.plan.ops.iter().for_each(|op| cache_of[op.handle as usize] = op.cache);
        let mut left = std::mem::take(&mut self.standing);
        for (handle, object) in self.table.iter_mut().enumerate() {
            left.extend(object.take().map(|at| (at, cache_of[handle])));
        }
        for (at, cache) in left {
            if !self.put(at, cache, true) {
                bail!(
                    "objects: the machine refuses to free one of {}",
                    self.plan.caches[cache as usize].name
                );
            }
            self.live[cache as usize] -= 1;
        }
        self.audit()?;
        for made in std::mem::take(&mut self.made) {
            if let Some(Made::Cache(cache)) = made {
                self.machine.kmem_cache_destroy(cache).map_err(|e| anyhow!("objects: {e}"))?;
            }
        }
        self.machine.drop_slab();
        self.run.frames_left = self.frames();
        Ok(())
    }
}
