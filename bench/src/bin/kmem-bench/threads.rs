//! Two threads against one.
//!
//! # Concepts
//! Each thread works on blocks of its own from memory that both share; peers have a spin lock around
//! them, with one thread too. kmem's threads are on a CPU each. A turn measures one thread, then two
//! [side by side](kmem_bench::side), and takes the mean of their times per operation.
//!
//! # Locking
//! That of [`kmem_bench::side`].

use crate::Run;
use anyhow::{Result, anyhow, bail};
use bitmap_allocator::{BitAlloc1M, BitAlloc16M, BitAlloc64K};
use kmem_bench::{
    Bitmap, BuddyAllocFrames, BuddySlab, BuddySystem, Frames, KmemFrames, Locked, PAGE_SIZE,
    contest::{self, Contestant, Turn, calibrate, thread_time},
    report::{Fact, KMEM, Row, size},
    side::{self, Seen, Start, Together},
    used_machine,
    workload::{self, Fill, Mixed},
};
use kmem_hosted::Machine;
use std::{thread, time::Instant};

/// Threads at most.
const THREADS: usize = 2;
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

/// Runs all works at once, `n` operations each.
fn together(place: Place<'_>, works: &mut [Box<dyn Work + '_>], n: u64) -> Result<Together> {
    let start = &Start::new(works.len());
    let seen: Result<Vec<Seen>> = thread::scope(|scope| {
        let mut threads = Vec::new();
        for (i, work) in works.iter_mut().enumerate() {
            threads.push(scope.spawn(move || {
                side::bind(i);
                let seen = place.enter(i, || {
                    work.run(n / 8 + 1);
                    start.ready();
                    start.wait();
                    let (began, from) = (Instant::now(), thread_time());
                    work.run(n);
                    let spent = thread_time() - from;
                    Seen { spent, ran: spent, began, ended: Instant::now() }
                });
                if seen.is_err() {
                    start.ready();
                }
                seen
            }));
        }
        let join = |t: thread::ScopedJoinHandle<'_, Result<_>>| {
            t.join().unwrap_or_else(|_| Err(anyhow!("a measured thread panicked")))
        };
        threads.into_iter().map(join).collect()
    });
    Ok(Together::new(&seen?, n))
}

/// The turns of a contender: time per operation with one thread and with all.
fn turn<'a>(place: Place<'a>, mut works: Works<'a>, run: &Run) -> Result<Turn<'a>> {
    let n = place.enter(0, || calibrate(run.turn, |n| works[0].run(n)))?;
    Ok(Box::new(move || {
        let mut figures = Vec::new();
        for threads in [1, THREADS] {
            figures.push(side::settled(|| together(place, &mut works[..threads], n))?);
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
    let m = used_machine(bytes)?;
    let place = Place(Some(&m));
    let mut works: Works<'_> = Vec::new();
    for thread in 0..THREADS {
        works.push(place.enter(thread, || w.work(KmemFrames(&m), bytes, run))??);
    }
    // At once, like everybody's: a host may put memory aside that lies idle while the others fill theirs, and what it
    // takes to have it back is not to be calibrated by.
    let kmem = turn(place, works, run);
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
        Contestant { name: KMEM, turn: kmem },
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
