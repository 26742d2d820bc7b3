//! Two threads against one.
//!
//! # Concepts
//! Each thread works on blocks of its own from memory that both share; peers have a spin lock around
//! them, with one thread too. kmem's threads are on a CPU each. A turn measures one thread, then two that
//! start together, each bound to a processor of the host, and takes the mean of their times per operation.
//! If the host ran them one after the other instead of side by side, which shows in when each began and
//! ended, that part is made again; if it never ran them side by side there is no figure.
//!
//! # Locking
//! A barrier that spins.

use crate::Run;
use anyhow::{Result, anyhow, bail};
use bitmap_allocator::{BitAlloc1M, BitAlloc16M, BitAlloc64K};
use kmem_bench::{
    Bitmap, BuddyAllocFrames, BuddySlab, BuddySystem, Frames, KmemFrames, Locked, PAGE_SIZE,
    contest::{self, Contestant, Turn, calibrate, thread_time},
    machine,
    report::{Fact, KMEM, Row, size},
    workload::{self, Fill, Mixed},
};
use kmem_hosted::Machine;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use std::{
    hint,
    sync::atomic::{AtomicUsize, Ordering::SeqCst},
    thread,
    time::{Duration, Instant},
};

/// Threads at most.
const THREADS: usize = 2;
/// Measurements that were not side by side are made this often at most.
const ATTEMPTS: usize = 6;
/// Share of the time that all threads ran, of the time that any did: what is taken for side by side.
const OVERLAP: f64 = 0.85;
/// Below this there is no figure.
const LEAST_OVERLAP: f64 = 0.4;
/// Beyond this a contender that writes into free memory is not filled.
const FILL_LIMIT: u64 = 1 << 30;

/// Something that a thread does operations of.
trait Work: Send {
    fn run(&mut self, n: u64);
}

struct PairWork<F>(F);

impl<F: Frames + Send> Work for PairWork<F> {
    fn run(&mut self, n: u64) {
        workload::pairs(&mut self.0, 0, n);
    }
}

struct MixedWork<F: Frames>(F, Mixed<F::Block>);

impl<F: Frames + Send> Work for MixedWork<F>
where
    F::Block: Send,
{
    fn run(&mut self, n: u64) {
        self.1.run(&mut self.0, n as usize);
    }
}

type Works<'a> = Vec<Box<dyn Work + 'a>>;

/// Where a contender's threads have to be: on the machine's CPU with the thread's number, or anywhere.
#[derive(Clone, Copy)]
struct Place<'a>(Option<&'a Machine>);

impl Place<'_> {
    fn enter<T>(&self, thread: usize, f: impl FnOnce() -> T) -> Result<T> {
        match self.0 {
            Some(machine) => Ok(machine.run_on(Some(thread), None, |_process| f())?),
            None => Ok(f()),
        }
    }
}

/// Binds the thread to the host's `thread`-th processor, if it may use that many.
fn bind(thread: usize) {
    let Ok(allowed) = sched_getaffinity(None) else { return };
    if let Some(cpu) = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)).nth(thread) {
        let mut one = CpuSet::new();
        one.set(cpu);
        // Where it is not allowed to bind, the overlap tells whether that mattered.
        let _ = sched_setaffinity(None, &one);
    }
}

/// What a thread saw.
struct Seen {
    spent: Duration,
    began: Instant,
    ended: Instant,
}

/// Runs all works at once, `n` operations each. Returns the mean time per operation and the overlap.
fn together(place: Place<'_>, works: &mut [Box<dyn Work + '_>], n: u64) -> Result<(f64, f64)> {
    let waiting = &AtomicUsize::new(works.len());
    let seen: Result<Vec<Seen>> = thread::scope(|scope| {
        let mut threads = Vec::new();
        for (i, work) in works.iter_mut().enumerate() {
            threads.push(scope.spawn(move || {
                bind(i);
                let seen = place.enter(i, || {
                    work.run(n / 8 + 1);
                    waiting.fetch_sub(1, SeqCst);
                    while waiting.load(SeqCst) != 0 {
                        hint::spin_loop();
                    }
                    let (began, start) = (Instant::now(), thread_time());
                    work.run(n);
                    Seen { spent: thread_time() - start, began, ended: Instant::now() }
                });
                if seen.is_err() {
                    waiting.fetch_sub(1, SeqCst);
                }
                seen
            }));
        }
        let join = |t: thread::ScopedJoinHandle<'_, Result<_>>| {
            t.join().unwrap_or_else(|_| Err(anyhow!("a measured thread panicked")))
        };
        threads.into_iter().map(join).collect()
    });
    let seen = seen?;
    let spent: f64 = seen.iter().map(|s| s.spent.as_nanos() as f64).sum();
    let times = || (seen.iter().map(|s| s.began), seen.iter().map(|s| s.ended));
    let overlap = match (times().0.max(), times().1.min(), times().0.min(), times().1.max()) {
        (Some(all), Some(until), Some(any), Some(end)) => {
            until.saturating_duration_since(all).as_secs_f64() / (end - any).as_secs_f64()
        }
        _ => 0.0,
    };
    Ok((spent / (n * seen.len() as u64) as f64, overlap))
}

/// The turns of a contender: time per operation with one thread and with all.
fn turn<'a>(place: Place<'a>, mut works: Works<'a>, run: &Run) -> Result<Turn<'a>> {
    let n = place.enter(0, || calibrate(run.turn, |n| works[0].run(n)))?;
    Ok(Box::new(move || {
        let mut figures = Vec::new();
        for threads in [1, THREADS] {
            let mut best = (f64::NAN, LEAST_OVERLAP);
            for _ in 0..ATTEMPTS {
                let seen = together(place, &mut works[..threads], n)?;
                if seen.1 > best.1 {
                    best = seen;
                }
                if best.1 >= OVERLAP {
                    break;
                }
            }
            figures.push(best.0);
        }
        Ok(figures)
    }))
}

/// A workload: what each thread does with its handle of an allocator.
trait Shared {
    fn name(&self) -> &'static str;
    fn fills(&self) -> bool;
    fn work<'a, F: Frames + Send + 'a>(
        &self,
        f: F,
        bytes: u64,
        run: &Run,
    ) -> Result<Box<dyn Work + 'a>>
    where
        F::Block: Send + 'a;
}

struct SharedPairs;

impl Shared for SharedPairs {
    fn name(&self) -> &'static str {
        "order 0 pair"
    }

    fn fills(&self) -> bool {
        false
    }

    fn work<'a, F: Frames + Send + 'a>(
        &self,
        mut f: F,
        _: u64,
        _: &Run,
    ) -> Result<Box<dyn Work + 'a>>
    where
        F::Block: Send + 'a,
    {
        if f.alloc(0).is_none() {
            bail!("no memory");
        }
        Ok(Box::new(PairWork(f)))
    }
}

struct SharedMixed;

impl Shared for SharedMixed {
    fn name(&self) -> &'static str {
        "mixed orders, 80 % full"
    }

    fn fills(&self) -> bool {
        true
    }

    fn work<'a, F: Frames + Send + 'a>(
        &self,
        mut f: F,
        bytes: u64,
        run: &Run,
    ) -> Result<Box<dyn Work + 'a>>
    where
        F::Block: Send + 'a,
    {
        let frames = usize::try_from(bytes / PAGE_SIZE)?;
        let (start, patience) = (Instant::now(), run.patience);
        let script = frames.clamp(1 << 16, 1 << 20);
        let fill = Fill::four_fifths(frames, THREADS);
        match Mixed::set_up(&mut f, fill, script, || start.elapsed() > patience) {
            Some(state) => Ok(Box::new(MixedWork(f, state))),
            None => {
                bail!(
                    "takes more than {} ms to fill the memory with mixed orders",
                    patience.as_millis()
                )
            }
        }
    }
}

/// Turns of a peer behind a lock.
fn locked<'a, F: Frames + Send + 'a>(
    lock: &'a spin::Mutex<F>,
    w: &impl Shared,
    bytes: u64,
    run: &Run,
) -> Result<Turn<'a>>
where
    F::Block: Send + 'a,
{
    let works = (0..THREADS).map(|_| w.work(Locked(lock), bytes, run)).collect::<Result<_>>()?;
    turn(Place(None), works, run)
}

fn contest<W: Shared>(run: &mut Run, w: &W, bytes: u64) -> Result<()> {
    if !run.wants(w.name()) {
        return Ok(());
    }
    run.at(w.name(), bytes);
    let m = machine(bytes)?;
    let mut works: Works<'_> = Vec::new();
    for thread in 0..THREADS {
        let place = Place(Some(&m));
        works.push(place.enter(thread, || w.work(KmemFrames(&m), bytes, run))??);
    }
    let slab = spin::Mutex::new(BuddySlab::new(bytes)?);
    let system = spin::Mutex::new(BuddySystem::new(bytes)?);
    let buddy = spin::Mutex::new(BuddyAllocFrames::new(bytes)?);
    let small = Bitmap::<BitAlloc64K>::new(bytes).map(spin::Mutex::new);
    let medium = Bitmap::<BitAlloc1M>::new(bytes).map(spin::Mutex::new);
    let large = spin::Mutex::new(Bitmap::<BitAlloc16M>::new(bytes)?);
    let bitmap = match (&small, &medium) {
        (Ok(lock), _) => locked(lock, w, bytes, run),
        (_, Ok(lock)) => locked(lock, w, bytes, run),
        _ => locked(&large, w, bytes, run),
    };
    let buddy = if w.fills() && bytes > FILL_LIMIT {
        Err(anyhow!("writes into free memory, so it is not filled beyond 1 GiB"))
    } else {
        locked(&buddy, w, bytes, run)
    };
    let contestants = vec![
        Contestant { name: KMEM, turn: turn(Place(Some(&m)), works, run) },
        Contestant { name: "buddy-slab-allocator", turn: locked(&slab, w, bytes, run) },
        Contestant { name: "bitmap-allocator", turn: bitmap },
        Contestant { name: "buddy_system_allocator", turn: locked(&system, w, bytes, run) },
        Contestant { name: "buddy-alloc", turn: buddy },
    ];
    let samples = contest::run(contestants, 1, run.rounds, true, || run.bar.inc(1))?;
    for (i, threads) in [1, THREADS].into_iter().enumerate() {
        let plural = if threads == 1 { "" } else { "s" };
        let name = format!("{}, {threads} thread{plural}", w.name());
        run.report.rows.push(Row::new(&name, bytes, threads, &samples, i));
    }
    for s in &samples {
        if let Some(value) = s.between(1, 0) {
            let kmem = s.name == KMEM;
            run.report.facts.push(Fact {
                name: format!("{}, {}: {}", w.name(), size(bytes), s.name),
                value,
                unit: "2 threads / 1",
                must: kmem.then_some(1.15),
                goal: kmem.then_some(1.05),
            });
        }
    }
    Ok(())
}

/// Order-0 pairs on two threads.
pub fn pairs(run: &mut Run, bytes: u64) -> Result<()> {
    contest(run, &SharedPairs, bytes)
}

/// Mixed orders on two threads, each with half of what fills four fifths of the memory.
pub fn mixed(run: &mut Run, bytes: u64) -> Result<()> {
    contest(run, &SharedMixed, bytes)
}
