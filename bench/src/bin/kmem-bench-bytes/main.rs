//! Times kmem and other byte allocators in one run: `cargo xtask bench bytes` starts it.
//!
//! # Concepts
//! The two threads of a [`Crew`] stay for the whole run, each on a CPU of kmem's machine, which costs the
//! peers nothing. A [`workloads::Workload`] makes a team's works out of any contender's handles; [`lineup`] makes
//! the contenders.
//!
//! # Locking
//! None.

mod lineup;
mod workloads;

use anyhow::Result;
use clap::Parser;
use indicatif::ProgressBar;
use kmem::Config;
use kmem_bench::{
    bytes::Presence,
    crew::Crew,
    options::{Options, spinner},
    report::{Fact, Report},
};
use kmem_hosted::{Machine, Shape};
use lineup::Heaps;
use std::{thread, time::Duration};
use workloads::{Hot, Larson, Swapped};

/// Memory of each contender that is given any.
const BYTES: u64 = 64 << 20;
/// Threads.
const THREADS: usize = 2;

/// Times kmem and other byte allocators.
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
    bar: ProgressBar,
    report: Report,
}

impl Run {
    fn wants(&self, workload: &str) -> bool {
        workload.contains(&self.only)
    }
}

fn main() -> Result<()> {
    let Args { options } = Args::parse();
    let rounds = if options.quick { 7 } else { 11 };
    let mut run = Run {
        only: options.only.clone(),
        rounds,
        // Each turn finds the caches full of what others left there. What it takes to have a workload's two or three MiB
        // there again is to be little of it.
        turn: Duration::from_millis(if options.quick { 8 } else { 20 }),
        bar: spinner()?,
        report: Report { rounds, ..Report::default() },
    };
    let machine = Machine::without_kswapd(Shape::no_dma(BYTES), Config::default())?;
    let heaps = Heaps::new(&machine)?;
    let life = |thread, f: &mut dyn FnMut()| {
        let _presence = Presence::new(thread)?;
        Ok(machine.run_on(Some(thread), None, |_process| f())?)
    };
    thread::scope(|scope| {
        let crew = Crew::start(scope, THREADS, &life)?;
        lineup::contest(&mut run, &crew, &heaps, &Hot)?;
        lineup::contest(&mut run, &crew, &heaps, &Larson)?;
        lineup::contest(&mut run, &crew, &heaps, &Swapped)
    })?;
    run.bar.finish_and_clear();
    run.report.facts.push(Fact::locked_exchange());
    options.print(&run.report, Report::by_contender)
}
