//! Programs that others wrote, with one global allocator or another.
//!
//! # Concepts
//! The allocator of a program is chosen when it is built, so there is one binary per allocator
//! (`bin/program-*.rs`) and all do the same: run one [`Workload`] named on the command line and print what it
//! came to, its time and its peak of resident memory, as one line of JSON. `kmem-bench-program` runs them in turn.
//!
//! What a workload comes to is a number that depends on all its results and on nothing else: it must be the same
//! for all allocators.
//!
//! # Locking
//! None.

mod database;
mod forks;
mod parser;

use anyhow::{Context, Result, bail};
use clap::{Parser, ValueEnum};
use serde::{Deserialize, Serialize};
use std::{fs, time::Instant};

/// Binaries' names without `program-`, which are the allocators'.
pub const ALLOCATORS: [&str; 4] = ["kmem", "mimalloc", "jemalloc", "glibc"];

/// Threads for each CPU.
const THREADS_PER_CPU: usize = 4;

/// What to run.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Workload {
    /// redb, a database engine, in memory: loads, transactions, and readers on many threads.
    Database,
    /// syn, a parser: this project's sources to syntax trees and back to text, on many threads.
    Parser,
    /// Processes forked while threads parse, which parse in their turn.
    Forks,
}

impl Workload {
    /// All of them.
    pub const ALL: [Workload; 3] = [Workload::Database, Workload::Parser, Workload::Forks];

    /// Its name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Workload::Database => "database",
            Workload::Parser => "parser",
            Workload::Forks => "forks",
        }
    }
}

/// What a run came to.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Outcome {
    /// Depends on all results.
    pub result: u64,
    /// Seconds from beginning to end.
    pub seconds: f64,
    /// Most resident memory, in bytes. Of forked processes the parent's counts.
    pub peak: u64,
    /// Threads at work at a time.
    pub threads: usize,
}

#[derive(Parser)]
struct Args {
    #[arg(value_enum)]
    workload: Workload,
    /// How much to do: 1 is little.
    #[arg(default_value_t = 4)]
    scale: u64,
}

/// Runs a workload and prints its [`Outcome`].
///
/// # Errors
/// If it fails, or the host does not say how much memory it took.
pub fn main() -> Result<()> {
    let args = Args::parse();
    let threads = std::thread::available_parallelism()?.get() * THREADS_PER_CPU;
    let start = Instant::now();
    let result = match args.workload {
        Workload::Database => database::run(threads, args.scale)?,
        Workload::Parser => parser::run(threads, args.scale)?,
        Workload::Forks => forks::run(threads, args.scale)?,
    };
    let seconds = start.elapsed().as_secs_f64();
    let outcome = Outcome { result, seconds, peak: peak()?, threads };
    println!("{}", serde_json::to_string(&outcome)?);
    Ok(())
}

/// The peak of this process's resident memory (`VmHWM`), in bytes.
fn peak() -> Result<u64> {
    let status =
        fs::read_to_string("/proc/self/status").context("cannot read /proc/self/status")?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).context("no VmHWM")?;
    let Some(kib) = line.trim().strip_suffix(" kB") else { bail!("VmHWM is {line}") };
    Ok(kib.trim().parse::<u64>()? << 10)
}

/// FNV-1a: adds bytes to a digest.
fn digest(so_far: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(so_far, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3))
}

/// The digest of nothing.
const NOTHING: u64 = 0xcbf2_9ce4_8422_2325;
