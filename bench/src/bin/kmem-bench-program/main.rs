//! Runs whole programs with kmem and others as their global allocator: `cargo xtask bench program` starts it.
//!
//! # Concepts
//! One run is one process: its time and its peak of resident memory are its own. Allocators take turns, in another
//! order each round, so that what disturbs the machine disturbs all alike; medians count, and kmem's time is
//! compared with each peer's round by round.
//!
//! # Locking
//! None.

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use kmem_bench::{
    options::Options,
    program::{ALLOCATORS, Outcome, Workload},
};
use serde::Serialize;
use std::{
    env,
    process::{Command, Stdio},
};

/// Runs whole programs with kmem and others as their global allocator.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    options: Options,
}

/// One allocator's figures.
#[derive(Serialize)]
struct Figure {
    allocator: &'static str,
    /// Median.
    seconds: f64,
    /// kmem's time divided by this one's: the median over rounds.
    kmem_to_this: f64,
    /// Median, in bytes.
    peak: u64,
}

/// One workload.
#[derive(Serialize)]
struct Row {
    workload: &'static str,
    threads: usize,
    rounds: usize,
    /// The same for all.
    result: u64,
    figures: Vec<Figure>,
}

fn main() -> Result<()> {
    let Args { options: args } = Args::parse();
    let (rounds, scale) = if args.quick { (3, 1) } else { (7, 4) };
    let style = ProgressStyle::with_template("{spinner} {elapsed} {pos}/{len} runs  {msg}")?;
    let wanted = || Workload::ALL.into_iter().filter(|w| w.name().contains(&args.only));
    let runs = wanted().count() * rounds * ALLOCATORS.len();
    let bar = ProgressBar::new(runs as u64).with_style(style);
    let rows: Vec<Row> =
        wanted().map(|w| contest(w, rounds, scale, &bar)).collect::<Result<_>>()?;
    bar.finish_and_clear();
    ensure!(!rows.is_empty(), "no workload's name contains {:?}", args.only);
    if args.json {
        println!("{}", serde_json::to_string_pretty(&rows)?);
    } else {
        print(&rows);
    }
    Ok(())
}

fn contest(workload: Workload, rounds: usize, scale: u64, bar: &ProgressBar) -> Result<Row> {
    let mut outcomes: [Vec<Outcome>; ALLOCATORS.len()] = Default::default();
    for round in 0..rounds {
        for turn in 0..ALLOCATORS.len() {
            let i = (round + turn) % ALLOCATORS.len();
            bar.set_message(format!("{} {}", workload.name(), ALLOCATORS[i]));
            outcomes[i].push(run(ALLOCATORS[i], workload, scale)?);
            bar.inc(1);
        }
    }
    let first = outcomes[0].first().context("no rounds")?.clone();
    for (allocator, all) in ALLOCATORS.iter().zip(&outcomes) {
        if let Some(other) = all.iter().find(|o| o.result != first.result) {
            bail!(
                "{} with {allocator} came to {:#x}, not {:#x}",
                workload.name(),
                other.result,
                first.result
            );
        }
    }
    let figure = |(allocator, all): (&&'static str, &Vec<Outcome>)| Figure {
        allocator,
        seconds: median(all.iter().map(|o| o.seconds)),
        kmem_to_this: median(outcomes[0].iter().zip(all).map(|(k, o)| k.seconds / o.seconds)),
        peak: median(all.iter().map(|o| o.peak as f64)) as u64,
    };
    let figures = ALLOCATORS.iter().zip(&outcomes).map(figure).collect();
    Ok(Row {
        workload: workload.name(),
        threads: first.threads,
        rounds,
        result: first.result,
        figures,
    })
}

/// Runs the program of one allocator, which lies beside this one.
fn run(allocator: &str, workload: Workload, scale: u64) -> Result<Outcome> {
    let program = env::current_exe()
        .context("cannot tell where this program is")?
        .with_file_name(format!("program-{allocator}"));
    let output = Command::new(&program)
        .args([workload.name(), &scale.to_string()])
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot run {}", program.display()))?;
    ensure!(
        output.status.success(),
        "{} with {allocator} failed ({})",
        workload.name(),
        output.status
    );
    serde_json::from_slice(&output.stdout)
        .with_context(|| format!("{} printed something else", program.display()))
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn print(rows: &[Row]) {
    println!("Whole programs by global allocator: medians of seconds and of peak resident MiB");
    println!(
        "\n{:<12}{:>8}{:<2}{:<12}{:>10}{:>14}{:>12}",
        "", "threads", "", "", "seconds", "kmem / this", "peak MiB"
    );
    for row in rows {
        for (i, f) in row.figures.iter().enumerate() {
            let (name, threads) = match i {
                0 => (row.workload, row.threads.to_string()),
                _ => ("", String::new()),
            };
            println!(
                "{name:<12}{threads:>8}  {:<12}{:>10.3}{:>14.2}{:>12.1}",
                f.allocator,
                f.seconds,
                f.kmem_to_this,
                f.peak as f64 / f64::from(1 << 20)
            );
        }
        println!("{:>22}all came to {:#018x} in {} rounds", "", row.result, row.rounds);
    }
}
