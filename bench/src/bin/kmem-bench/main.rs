//! Times kmem and the page allocators of crates.io in one run: `cargo xtask bench pages` starts it.
//!
//! # Concepts
//! A [`workloads::Workload`] makes a turn out of any contender; [`lineup`] makes all contenders of a size;
//! [`kmem_bench::contest`] has them take turns. What only kmem is measured at is in [`terabyte`].
//!
//! # Locking
//! None.

mod lineup;
mod terabyte;
mod threads;
mod workloads;

use anyhow::Result;
use clap::Parser;
use indicatif::ProgressBar;
use kmem_bench::{
    options::{Options, spinner},
    report::{Fact, Report, size},
};
use std::time::Duration;
use workloads::{Batch, Bulk, Mixed, Pairs, RandomFree};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Times kmem and the page allocators of crates.io.
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

impl Run {
    fn wants(&self, workload: &str) -> bool {
        workload.contains(&self.only)
    }

    fn at(&self, what: &str, bytes: u64) {
        self.bar.set_message(format!("{what}, {}", size(bytes)));
    }
}

fn main() -> Result<()> {
    let Args { options } = Args::parse();
    let rounds = if options.quick { 7 } else { 9 };
    let mut run = Run {
        only: options.only.clone(),
        rounds,
        turn: Duration::from_millis(if options.quick { 1 } else { 3 }),
        patience: Duration::from_millis(if options.quick { 200 } else { 2000 }),
        bar: spinner()?,
        report: Report { rounds, ..Report::default() },
    };
    for bytes in [64 * MIB, GIB, 16 * GIB] {
        for order in [0, 3, 9] {
            lineup::single(&mut run, &Pairs { order }, bytes)?;
        }
        lineup::single(&mut run, &Batch, bytes)?;
        lineup::single(&mut run, &Bulk, bytes)?;
        if bytes <= GIB || !options.quick {
            lineup::single(&mut run, &RandomFree { legs: if bytes > GIB { 8 } else { 1 } }, bytes)?;
            lineup::single(&mut run, &Mixed, bytes)?;
        }
    }
    for bytes in [64 * MIB, GIB, 16 * GIB] {
        threads::pairs(&mut run, bytes)?;
        if bytes <= GIB || !options.quick {
            threads::mixed(&mut run, bytes)?;
        }
    }
    terabyte::run(&mut run, options.quick)?;
    run.bar.finish_and_clear();
    run.report.facts.push(Fact::locked_exchange());
    options.print(&run.report, Report::table)
}
