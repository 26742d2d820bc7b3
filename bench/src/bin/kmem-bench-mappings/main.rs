//! Times kmem's mappings, per-CPU data and kernel stacks beside what a program has for the same ends:
//! `cargo xtask bench mappings` starts it.
//!
//! # Concepts
//! There is no other vmalloc to measure against. Finding addresses is compared with the range allocators of crates.io,
//! mapping with the host's own calls, per-CPU data with thread-local data, kernel stacks with those of coroutines. Each
//! group has a machine of its own, and a [`Crew`] on its CPUs.
//!
//! # Locking
//! None.

mod highmem;
mod percpu;
mod ranges;
mod stacks;
mod vmalloc;

use anyhow::{Error, Result};
use clap::Parser;
use indicatif::ProgressBar;
use kmem_bench::{
    contest::{self, Contestant, Turn},
    crew::{self, Crew, Making},
    options::{Options, spinner},
    report::Report,
    work::Each,
};
use kmem_hosted::Machine;
use std::{thread, time::Duration};

/// Threads.
const THREADS: usize = 2;

/// Times kmem's mappings and what else there is.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    options: Options,
}

/// What all measurements share.
struct Run {
    only: String,
    rounds: usize,
    /// Length of a turn.
    turn: Duration,
    /// How long a contender may take to set a workload up.
    patience: Duration,
    bar: ProgressBar,
    report: Report,
}

/// Rows of a contest: the name, and how many threads run at once.
type Rows<'r> = &'r [(&'r str, usize)];

impl Run {
    fn wants(&self, rows: Rows<'_>) -> bool {
        rows.iter().any(|(name, _)| name.contains(&self.only))
    }

    /// A contender, whose works on the crew `make` makes.
    fn contender<'c, 'a: 'c>(
        &self,
        crew: &'c Crew<'a>,
        rows: Rows<'_>,
        name: &'static str,
        make: impl FnMut(usize) -> Making<'a>,
    ) -> Contestant<'c> {
        let threads = rows.iter().map(|(_, threads)| *threads);
        Contestant { name, turn: crew::turns(crew, self.turn, threads, 1, make) }
    }

    /// Has them take turns.
    fn contest(&mut self, rows: Rows<'_>, bytes: u64, all: Vec<Contestant<'_>>) -> Result<()> {
        self.bar.set_message(rows[0].0.to_owned());
        let samples = contest::run(all, 1, self.rounds, true, || self.bar.inc(1))?;
        self.report.add_contest(rows, bytes, samples);
        Ok(())
    }
}

/// A contender that cannot take part.
fn absent<'c>(name: &'static str, why: Error) -> Contestant<'c> {
    Contestant { name, turn: Err::<Turn<'c>, _>(why) }
}

/// A thread's work of calls.
fn each<'a>(op: impl FnMut() + Send + 'a) -> Making<'a> {
    Box::new(|| Box::new(Each::new(op, || ())))
}

/// Ends the program: a figure over calls that fail would be a lie.
#[cold]
fn failed(what: &str, why: &dyn std::fmt::Display) -> ! {
    eprintln!("error: {what} failed: {why}");
    std::process::exit(3)
}

/// Runs `f` with threads on the CPUs of a machine.
fn on_cpus<'a>(
    machine: &'a Machine,
    threads: usize,
    f: impl for<'c> FnOnce(&'c Crew<'a>) -> Result<()>,
) -> Result<()> {
    let life = |thread, f: &mut dyn FnMut()| Ok(machine.run_on(Some(thread), None, |_| f())?);
    thread::scope(|scope| f(&Crew::start(scope, threads, &life)?))
}

fn main() -> Result<()> {
    let Args { options } = Args::parse();
    let rounds = if options.quick { 5 } else { 15 };
    let mut run = Run {
        only: options.only.clone(),
        rounds,
        turn: Duration::from_millis(if options.quick { 1 } else { 4 }),
        patience: Duration::from_secs(if options.quick { 2 } else { 10 }),
        bar: spinner()?,
        report: Report { rounds, ..Report::default() },
    };
    ranges::run(&mut run)?;
    vmalloc::run(&mut run)?;
    highmem::run(&mut run)?;
    percpu::run(&mut run)?;
    stacks::run(&mut run)?;
    run.bar.finish_and_clear();
    options.print(&run.report, Report::table)
}
