//! Threads that stay for all turns.
//!
//! # Concepts
//! Many byte allocators keep memory per thread, and treat what an ended thread left behind differently. So the
//! threads that are measured are the same throughout: each is bound to a processor of the host and does the jobs
//! it is sent. A [`Team`] is what a contender does on them.
//!
//! # Locking
//! Channels carry the jobs; [`side::Start`] is where measured threads meet.

use crate::{
    contest::{Turn, thread_time, try_calibrate},
    side::{self, Seen, Start, Together},
    work::Work,
};
use anyhow::{Result, anyhow};
use std::{
    sync::{
        Arc,
        mpsc::{self, Receiver, Sender},
    },
    thread::Scope,
    time::{Duration, Instant},
};

type Job<'a> = Box<dyn FnOnce() + Send + 'a>;

/// What a thread does for as long as it lives: calls its argument once, within whatever the measured code needs
/// around it.
pub type Life<'a> = dyn Fn(usize, &mut dyn FnMut()) -> Result<()> + Sync + 'a;

/// What a thread does to have its work.
pub type Making<'a> = Box<dyn FnOnce() -> Box<dyn Work + 'a> + Send + 'a>;

/// The threads. They end when this is dropped.
pub struct Crew<'a> {
    jobs: Vec<Sender<Job<'a>>>,
}

fn gone() -> anyhow::Error {
    anyhow!("a measured thread panicked")
}

impl<'a> Crew<'a> {
    /// Starts `threads` threads, each in a life of its own.
    ///
    /// # Errors
    /// That of a life that ended before it called its argument.
    pub fn start<'scope, 'env>(
        scope: &'scope Scope<'scope, 'env>,
        threads: usize,
        life: &'env Life<'env>,
    ) -> Result<Crew<'a>>
    where
        'a: 'scope,
    {
        let mut crew = Crew { jobs: Vec::new() };
        let mut started = Vec::new();
        for thread in 0..threads {
            let (jobs, todo): (_, Receiver<Job<'a>>) = mpsc::channel();
            let (ready, is_ready) = mpsc::channel();
            scope.spawn(move || {
                side::bind(thread);
                let lived = life(thread, &mut || {
                    let _ = ready.send(Ok(()));
                    todo.iter().for_each(|job| job());
                });
                if let Err(e) = lived {
                    let _ = ready.send(Err(e));
                }
            });
            crew.jobs.push(jobs);
            started.push(is_ready);
        }
        for is_ready in started {
            is_ready.recv().map_err(|_| gone())??;
        }
        Ok(crew)
    }

    /// How many threads there are.
    pub fn threads(&self) -> usize {
        self.jobs.len()
    }

    fn send<R: Send + 'a>(
        &self,
        thread: usize,
        f: impl FnOnce() -> R + Send + 'a,
    ) -> Result<Receiver<R>> {
        let (done, result) = mpsc::channel();
        let job = Box::new(move || _ = done.send(f()));
        self.jobs[thread].send(job).map_err(|_| gone())?;
        Ok(result)
    }

    /// Has a thread do something and waits for it.
    ///
    /// # Errors
    /// It panicked.
    pub fn on<R: Send + 'a>(&self, thread: usize, f: impl FnOnce() -> R + Send + 'a) -> Result<R> {
        self.send(thread, f)?.recv().map_err(|_| gone())
    }
}

/// A contender's works, one per thread.
pub struct Team<'c, 'a> {
    crew: &'c Crew<'a>,
    works: Vec<Box<dyn Work + 'a>>,
}

impl<'c, 'a> Team<'c, 'a> {
    /// Has each thread make its work.
    ///
    /// # Errors
    /// One panicked.
    pub fn new(
        crew: &'c Crew<'a>,
        mut make: impl FnMut(usize) -> Making<'a>,
    ) -> Result<Team<'c, 'a>> {
        let mut team = Team { crew, works: Vec::new() };
        for thread in 0..crew.threads() {
            team.works.push(crew.on(thread, make(thread))?);
        }
        Ok(team)
    }

    /// Runs the works of the first `threads` threads at once, `n` operations each.
    ///
    /// # Errors
    /// One panicked.
    pub fn together(&mut self, threads: usize, n: u64) -> Result<Together> {
        let start = Arc::new(Start::new(threads));
        let mut results = Vec::new();
        let rest = self.works.split_off(threads.min(self.works.len()));
        for (thread, mut work) in self.works.drain(..).enumerate() {
            let start = start.clone();
            results.push(self.crew.send(thread, move || {
                work.run(n / 8 + 1);
                start.ready();
                start.wait();
                let (began, from) = (Instant::now(), thread_time());
                let spent = work.run(n);
                let ran = thread_time() - from;
                (work, Seen { spent, ran, began, ended: Instant::now() })
            })?);
        }
        let mut seen = Vec::new();
        for result in results {
            let (work, saw) = result.recv().map_err(|_| gone())?;
            self.works.push(work);
            seen.push(saw);
        }
        self.works.extend(rest);
        Ok(Together::new(&seen, n))
    }
}

/// The turns of a team whose works `make` makes: for each row, which is a number of threads, time per operation, of
/// which a work does `ops` at once. A turn takes about `length` a row.
///
/// # Errors
/// A thread panicked.
pub fn turns<'c, 'a: 'c>(
    crew: &'c Crew<'a>,
    length: Duration,
    rows: impl IntoIterator<Item = usize>,
    ops: u64,
    make: impl FnMut(usize) -> Making<'a>,
) -> Result<Turn<'c>> {
    let mut team = Team::new(crew, make)?;
    let mut plan = Vec::new();
    for threads in rows {
        let spent = |n| {
            let ns = team.together(threads, n)?.ns * n as f64;
            anyhow::Ok(Duration::from_nanos(ns as u64))
        };
        plan.push((threads, try_calibrate(length, spent)?));
    }
    Ok(Box::new(move || {
        let mut figures = Vec::new();
        for &(threads, n) in &plan {
            figures.push(side::settled(|| team.together(threads, n))? / ops as f64);
        }
        Ok(figures)
    }))
}

impl Drop for Team<'_, '_> {
    fn drop(&mut self) {
        for (thread, work) in self.works.drain(..).enumerate() {
            // A thread that is gone took the contest with it already.
            let _ = self.crew.on(thread, move || work.end());
        }
    }
}
