//! Running the operations.
//!
//! # Concepts
//! One thread per recorded CPU runs that CPU's operations in order, holding a CPU of the machine. A table of
//! words, one per handle, says where each block is; who needs a block that is not there yet waits.
//!
//! Memory orders operations too, where it is short. A thread that ran far ahead of the others would take
//! frames that Linux, at that point of the recording, did not have, and free them only where the others are
//! still to come; so an allocation waits while its thread is further ahead than one event, and for a block as
//! many as it has frames, for each 128 frames that are free above the low watermarks. Plenty of memory, and the threads run as they may; none left,
//! and the allocations follow the recording.
//!
//! An allocation that finds no memory all the same, even after the allocator has drained its lists, waits until every operation that
//! the recording has before it is done: Linux had those frees. If there is still no memory it is tried
//! below the watermarks (`__GFP_MEMALLOC`), again while other threads come further, and counted as `below_watermark`; if
//! that fails too it is a failure. The others do not keep pace with a thread that waits so: what is missing then is
//! seldom frames, but a block of some order. Where blocks lie differs from Linux and from run to run, so the moment
//! at which the last of an order is taken does too, and the frees that merge into another are a few events ahead.
//! Linux's reclaim needs no replaying: what it freed are events of the recording.
//!
//! Once a recorded second each CPU does its housekeeping (`vmstat_update`), as Linux's CPUs do by a timer that no event
//! tells of.
//!
//! # Locking
//! The table's words are written once each (release) and read by waiters (acquire). A waiter gives its CPU
//! up now and then, so that more threads than CPUs still make progress; the operation with the smallest position
//! never waits for anything but memory, and that not for ever, so somebody always does.

use super::{
    Args, Speed,
    machine::free_blocks,
    plan::{Op, Plan, What},
};
use anyhow::anyhow;
use hdrhistogram::Histogram;
use indicatif::{ProgressBar, ProgressStyle};
use kmem::{
    AllocError, Gfp, Page, Pfn,
    context::{Process, Task},
    vmstat::VmEvent,
};
use kmem_hosted::Machine;
use std::{
    sync::{
        Mutex,
        atomic::{
            AtomicBool, AtomicU32, AtomicU64,
            Ordering::{Acquire, Relaxed, Release},
        },
    },
    time::{Duration, Instant},
};

/// Not there yet.
const ABSENT: u32 = 0;
/// When no thread has come further for so long, none will.
const STUCK: Duration = Duration::from_millis(500);
/// Recorded nanoseconds between two of a CPU's housekeeping: Linux's `vm.stat_interval`.
const STAT_INTERVAL: u64 = 1_000_000_000;
/// After so many failures the machine is too small, and nobody is waited for.
const HOPELESS: u32 = 8;
/// Its allocation failed.
const FAILED: u32 = u32::MAX;

/// The state of the machine at one moment of the replay.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Sample {
    /// Position among the page events.
    pub seq: u64,
    /// Milliseconds since the replay began.
    pub ms: f64,
    /// Free blocks by order.
    pub free_blocks: Vec<u64>,
    /// Frames on per-CPU lists.
    pub pcp_frames: u64,
    /// Allocations answered from a per-CPU list without a refill, so far, in hundredths of all.
    pub pcp_hit_percent: f64,
    /// Requests that found every zone below its low watermark so far.
    pub low_crossings: u64,
    /// Requests that found every zone below its min watermark so far.
    pub min_crossings: u64,
}

/// What one thread counted.
struct Counts {
    alloc_ns: Histogram<u64>,
    free_ns: Histogram<u64>,
    allocs: u64,
    frees: u64,
    failures: u64,
    below_watermark: u64,
    waited_for_memory: u64,
    refused_frees: u64,
    skipped: u64,
}

/// What a run came to.
pub struct Run {
    /// Wall-clock time of the operations.
    pub elapsed: Duration,
    /// Latency of allocations in nanoseconds.
    pub alloc_ns: Histogram<u64>,
    /// Latency of frees in nanoseconds.
    pub free_ns: Histogram<u64>,
    /// Allocations that succeeded.
    pub allocs: u64,
    /// Frees.
    pub frees: u64,
    /// Allocations that failed.
    pub failures: u64,
    /// Allocations that succeeded only below the watermarks.
    pub below_watermark: u64,
    /// Allocations that had to wait for earlier frees of the recording.
    pub waited_for_memory: u64,
    /// Frees that the allocator refused.
    pub refused_frees: u64,
    /// Operations on blocks whose allocation had failed.
    pub skipped: u64,
    /// Most frames in use at a sample.
    pub high_water_frames: u64,
    /// The machine over time.
    pub samples: Vec<Sample>,
}

/// Samples taken over a run.
const SAMPLES: u64 = 400;

struct Shared<'a> {
    machine: &'a Machine,
    words: Vec<AtomicU32>,
    /// By thread: position of the operation it is at; `u64::MAX` once it is done, and while it waits for memory that
    /// the operations before do not give back.
    at: Vec<AtomicU64>,
    next_sample: AtomicU64,
    sample_every: u64,
    samples: Mutex<Vec<Sample>>,
    began: Instant,
    paced: bool,
    /// When the recording ends.
    end: u64,
    damaged: AtomicBool,
    /// A thread has panicked; nobody is to wait for what it had still to do.
    broken: AtomicBool,
    /// Allocations that found no memory whoever was waited for.
    hopeless: AtomicU32,
}

/// Tells the other threads when this one unwinds.
struct Alarm<'a>(&'a AtomicBool);

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.store(true, Release);
        }
    }
}

/// Runs the plan.
pub fn run(
    machine: &Machine,
    plan: &Plan,
    prior: &[(u32, u32, u8)],
    args: &Args,
) -> anyhow::Result<Run> {
    let merged;
    let (lists, times): (Vec<&[Op]>, Vec<&[u64]>) = if args.single_thread {
        merged = in_order(plan);
        (vec![&merged.0], vec![&merged.1])
    } else {
        (
            plan.cpus.iter().map(Vec::as_slice).collect(),
            plan.times.iter().map(Vec::as_slice).collect(),
        )
    };
    let shared = Shared {
        machine,
        words: (0..plan.handles).map(|_| AtomicU32::new(ABSENT)).collect(),
        at: lists
            .iter()
            .map(|l| AtomicU64::new(l.first().map_or(u64::MAX, |o| o.seq.into())))
            .collect(),
        next_sample: AtomicU64::new(0),
        sample_every: (plan.events as u64 / SAMPLES).max(1),
        samples: Mutex::new(Vec::with_capacity(SAMPLES as usize + 2)),
        began: Instant::now(),
        paced: args.speed == Speed::Recorded,
        end: times.iter().filter_map(|times| times.iter().max()).max().copied().unwrap_or(0),
        damaged: AtomicBool::new(false),
        broken: AtomicBool::new(false),
        hopeless: AtomicU32::new(0),
    };
    for (handle, pfn, _) in prior {
        shared.words[*handle as usize].store(pfn + 1, Release);
    }
    let bar = progress(plan.events as u64, args.quiet);
    let counts = std::thread::scope(|scope| {
        let cpus = machine.hosted().shape().cpus.len();
        let threads: Vec<_> = lists
            .iter()
            .zip(&times)
            .enumerate()
            .map(|(i, (ops, times))| {
                let shared = &shared;
                scope.spawn(move || {
                    let _alarm = Alarm(&shared.broken);
                    let task = Task::new();
                    machine.run_on(Some(i % cpus), Some(&task), |p| shared.thread(i, ops, times, p))
                })
            })
            .collect();
        while threads.iter().any(|t| !t.is_finished()) {
            std::thread::sleep(Duration::from_millis(20));
            bar.set_position(shared.slowest().min(plan.events as u64));
        }
        threads
            .into_iter()
            .map(|t| t.join().map_err(|_| anyhow!("a replay thread panicked"))?.map_err(Into::into))
            .collect::<anyhow::Result<Vec<Counts>>>()
    })?;
    bar.finish_and_clear();
    if shared.damaged.load(Relaxed) {
        return Err(anyhow!(
            "the replay found its own tables damaged; nothing it counted can be trusted"
        ));
    }
    shared.sample(plan.events as u64);
    let elapsed = shared.began.elapsed();
    let samples = shared.samples.into_inner().unwrap_or_else(|e| e.into_inner());
    Ok(gather(machine, counts, samples, elapsed))
}

fn progress(events: u64, quiet: bool) -> ProgressBar {
    if quiet {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template(
        "replaying {bar:40} {percent:>3}% {human_pos}/{human_len} events {per_sec} {eta}",
    );
    let bar = ProgressBar::new(events);
    match style {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

/// All operations in the recorded order.
fn in_order(plan: &Plan) -> (Vec<Op>, Vec<u64>) {
    let mut all: Vec<(Op, u64)> = plan
        .cpus
        .iter()
        .zip(&plan.times)
        .flat_map(|(ops, times)| ops.iter().copied().zip(times.iter().copied()))
        .collect();
    all.sort_unstable_by_key(|(op, _)| op.seq);
    all.into_iter().unzip()
}

fn histogram() -> Histogram<u64> {
    // Three digits from a nanosecond to a minute; values beyond are counted as a minute.
    match Histogram::new_with_bounds(1, 60_000_000_000, 3) {
        Ok(h) => h,
        Err(_) => unreachable!("the bounds are constants and valid"),
    }
}

fn gather(machine: &Machine, counts: Vec<Counts>, samples: Vec<Sample>, elapsed: Duration) -> Run {
    let total = machine.totalram_pages();
    let free = |s: &Sample| -> u64 {
        s.pcp_frames + s.free_blocks.iter().enumerate().map(|(o, n)| n << o).sum::<u64>()
    };
    let high_water_frames =
        samples.iter().map(|s| total.saturating_sub(free(s))).max().unwrap_or_default();
    let mut run = Run {
        elapsed,
        alloc_ns: histogram(),
        free_ns: histogram(),
        allocs: 0,
        frees: 0,
        failures: 0,
        below_watermark: 0,
        waited_for_memory: 0,
        refused_frees: 0,
        skipped: 0,
        high_water_frames,
        samples,
    };
    for c in counts {
        // Same bounds everywhere, so adding cannot fail.
        let _ = run.alloc_ns.add(&c.alloc_ns);
        let _ = run.free_ns.add(&c.free_ns);
        run.allocs += c.allocs;
        run.frees += c.frees;
        run.failures += c.failures;
        run.below_watermark += c.below_watermark;
        run.waited_for_memory += c.waited_for_memory;
        run.refused_frees += c.refused_frees;
        run.skipped += c.skipped;
    }
    run
}

impl Shared<'_> {
    /// Position that every thread has reached.
    fn slowest(&self) -> u64 {
        self.at.iter().map(|a| a.load(Acquire)).min().unwrap_or(u64::MAX)
    }

    fn thread(&self, index: usize, ops: &[Op], times: &[u64], process: &mut Process) -> Counts {
        let mut c = Counts {
            alloc_ns: histogram(),
            free_ns: histogram(),
            allocs: 0,
            frees: 0,
            failures: 0,
            below_watermark: 0,
            waited_for_memory: 0,
            refused_frees: 0,
            skipped: 0,
        };
        let mut second = 0;
        for (op, time) in ops.iter().zip(times) {
            self.at[index].store(op.seq.into(), Release);
            if self.paced {
                self.wait_until(*time, process);
            }
            self.keep_house(&mut second, *time);
            match op.what {
                What::Alloc => self.alloc(index, op, process, &mut c),
                What::Free => {
                    if let Some(pfn) = self.place(op.handle, process) {
                        self.free(pfn, op, &mut c);
                    } else {
                        c.skipped += 1;
                    }
                }
                What::Split => self.split(op, process, &mut c),
                What::Rename => {
                    let word = self.place(op.handle, process).map_or(FAILED, |pfn| pfn + 1);
                    self.words[op.other as usize].store(word, Release);
                }
            }
            let seq = u64::from(op.seq);
            if seq >= self.next_sample.load(Relaxed) {
                self.next_sample.store(seq + self.sample_every, Relaxed);
                self.sample(seq);
            }
        }
        self.keep_house(&mut second, self.end);
        self.at[index].store(u64::MAX, Release);
        c
    }

    /// What a CPU does by its timer up to a recorded time. `done` are the seconds that it has done.
    fn keep_house(&self, done: &mut u64, time: u64) {
        let due = (time / STAT_INTERVAL).saturating_sub(*done);
        *done += due;
        // Where nothing happened in between the second gives back all that is left.
        for _ in 0..due.min(2) {
            self.machine.vmstat_update();
        }
    }

    fn wait_until(&self, time_ns: u64, process: &mut Process) {
        let due = Duration::from_nanos(time_ns);
        while let Some(left) = due.checked_sub(self.began.elapsed()).filter(|d| !d.is_zero()) {
            if left > Duration::from_millis(1) {
                self.machine.hosted().cond_resched(process);
            }
            std::thread::sleep(left.min(Duration::from_millis(5)));
        }
    }

    /// The first frame of a block, once it is there; `None` if its allocation failed.
    fn place(&self, handle: u32, process: &mut Process) -> Option<u32> {
        let mut turns = 0u32;
        loop {
            // Acquire pairs with the Release of whoever allocated it.
            match self.words[handle as usize].load(Acquire) {
                ABSENT => self.idle(&mut turns, process),
                FAILED => return None,
                word => return Some(word - 1),
            }
        }
    }

    fn idle(&self, turns: &mut u32, process: &mut Process) {
        *turns += 1;
        if turns.is_multiple_of(64) {
            assert!(!self.broken.load(Acquire), "another replay thread panicked");
            self.machine.hosted().cond_resched(process);
            std::thread::yield_now();
        } else {
            std::hint::spin_loop();
        }
    }

    /// Waits while the operation is further ahead of the slowest thread than memory leaves room for.
    fn keep_pace(&self, op: &Op, process: &mut Process) {
        let mut turns = 0;
        // In frames: a large block is worth as many events.
        while u64::from(op.seq) > self.slowest().saturating_add(self.lead() >> op.order) {
            self.idle(&mut turns, process);
        }
    }

    /// How many frames' events a thread may be ahead of the slowest: one for each 128 that are free above the low
    /// watermarks.
    fn lead(&self) -> u64 {
        let zones = self.machine.zones().iter();
        zones.map(|z| z.free_frames().saturating_sub(z.watermarks().low)).sum::<u64>() / 128
    }

    fn alloc(&self, index: usize, op: &Op, process: &mut Process, c: &mut Counts) {
        self.keep_pace(op, process);
        // Where Linux would have repeated for ever, this engine waits for the frees instead.
        let (gfp, _) = Gfp::from_linux(op.gfp);
        let gfp = (gfp | Gfp::NOWARN) - Gfp::NOFAIL;
        let order = u32::from(op.order);
        let t = Instant::now();
        let mut got = self.machine.alloc_pages(gfp, order);
        c.alloc_ns.saturating_record(t.elapsed().as_nanos() as u64);
        if matches!(got, Err(AllocError::NoMemory)) {
            c.waited_for_memory += 1;
            let mut turns = 0;
            while self.slowest() < u64::from(op.seq) {
                self.idle(&mut turns, process);
            }
            got = self.machine.alloc_pages(gfp, order);
        }
        if got.is_err() {
            got = self.alloc_last(index, op, gfp, process);
            c.below_watermark += u64::from(got.is_ok());
        }
        let word = match got.ok().and_then(|page| self.machine.page_to_pfn(page)) {
            Some(pfn) => {
                c.allocs += 1;
                pfn.0 + 1
            }
            None => {
                c.failures += 1;
                FAILED
            }
        };
        self.words[op.handle as usize].store(word, Release);
    }

    /// Below the watermarks, for as long as others give frames back: those that are ahead hold some that they had not
    /// yet in the recording, and lists of a CPU whose thread the host keeps waiting are not drained. Nobody keeps pace
    /// with this thread meanwhile, or soon all would wait for each other.
    fn alloc_last(
        &self,
        index: usize,
        op: &Op,
        gfp: Gfp,
        process: &mut Process,
    ) -> Result<&Page, AllocError> {
        let got = self.alloc_waiting(index, gfp, op.order.into(), process);
        self.at[index].store(op.seq.into(), Release);
        got
    }

    fn alloc_waiting(
        &self,
        index: usize,
        gfp: Gfp,
        order: u32,
        process: &mut Process,
    ) -> Result<&Page, AllocError> {
        let progress = || self.at.iter().fold(0u64, |sum, at| sum.wrapping_add(at.load(Acquire)));
        let (mut seen, mut since, mut turns) = (progress(), Instant::now(), 0);
        loop {
            self.machine.drain_all_pages();
            let got = self.machine.alloc_pages((gfp | Gfp::MEMALLOC) - Gfp::NOMEMALLOC, order);
            if got.is_ok() {
                return got;
            }
            if since.elapsed() > STUCK || self.hopeless.load(Relaxed) >= HOPELESS {
                self.hopeless.fetch_add(1, Relaxed);
                return got;
            }
            self.at[index].store(u64::MAX, Release);
            self.idle(&mut turns, process);
            let now = progress();
            if now != seen {
                (seen, since) = (now, Instant::now());
            }
        }
    }

    fn free(&self, pfn: u32, op: &Op, c: &mut Counts) {
        let Some(page) = self.machine.pfn_to_page(Pfn(pfn)) else {
            self.damaged.store(true, Relaxed);
            return;
        };
        let t = Instant::now();
        let done = self.machine.__free_pages(page, op.order.into());
        c.free_ns.saturating_record(t.elapsed().as_nanos() as u64);
        match done {
            Ok(()) => c.frees += 1,
            Err(_) => c.refused_frees += 1,
        }
    }

    fn split(&self, op: &Op, process: &mut Process, c: &mut Counts) {
        let halves = [op.other, op.other + 1];
        let order = u32::from(op.order);
        let place = self.place(op.handle, process);
        let page = place.and_then(|pfn| self.machine.pfn_to_page(Pfn(pfn)));
        let split = match (page, order.checked_sub(1)) {
            (Some(page), Some(half)) => self.machine.split_page_to(page, order, half).is_ok(),
            _ => false,
        };
        c.skipped += u64::from(!split);
        for (i, handle) in halves.into_iter().enumerate() {
            let word = match place.filter(|_| split) {
                Some(pfn) => pfn + ((i as u32) << (order - 1)) + 1,
                None => FAILED,
            };
            self.words[handle as usize].store(word, Release);
        }
    }

    fn sample(&self, seq: u64) {
        let m = self.machine;
        let hits = m.vm_event(VmEvent::PcpHit);
        let requests = hits + m.vm_event(VmEvent::PcpRefill) + m.vm_event(VmEvent::PcpBypass);
        let sample = Sample {
            seq,
            ms: self.began.elapsed().as_secs_f64() * 1e3,
            free_blocks: free_blocks(m),
            pcp_frames: m.zones().iter().flat_map(|z| m.pcp_frames(z)).sum(),
            pcp_hit_percent: 100.0 * hits as f64 / requests.max(1) as f64,
            low_crossings: m.vm_event(VmEvent::WmarkLow),
            min_crossings: m.vm_event(VmEvent::WmarkMin),
        };
        self.samples.lock().unwrap_or_else(|e| e.into_inner()).push(sample);
    }
}
