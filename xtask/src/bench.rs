//! `cargo xtask bench`: kmem beside other allocators.
//!
//! # Concepts
//! The times come from `kmem-bench` for pages, `kmem-bench-bytes` for bytes, `kmem-bench-mappings` for mappings, one
//! program and one run for all contenders, and from `kmem-bench-program` for programs, one process each. `--instructions` adds exact counts for the order-0 and order-9 pairs of each page allocator.
//!
//! # Locking
//! None.

use crate::callgrind::{self, Cost};
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::process::{Command, ExitCode, Stdio};

/// Runs benchmarks.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// Page allocation: kmem and its peers at several sizes, on one thread and on two.
    Pages(Pages),
    /// Byte allocation: kmem's kmalloc beside jemalloc, mimalloc, glibc and others.
    Bytes(Bytes),
    /// vmalloc, high memory, per-CPU data and kernel stacks, beside what a program has for the same ends.
    Mappings(Mappings),
    /// Whole programs that others wrote, with kmem, mimalloc, jemalloc or glibc as their global allocator.
    Program(Program),
}

/// What all benchmarks are told.
#[derive(clap::Args)]
struct Options {
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Fewer and shorter rounds, and less of what is large.
    #[arg(long)]
    quick: bool,
    /// Only workloads whose name contains this.
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
}

/// Arguments of `bench program`.
#[derive(clap::Args)]
#[command(after_help = "\
Example: forked children of a process whose threads allocate
  cargo xtask bench program --only forks

\"database\" is redb in memory, \"parser\" is syn on kmem's sources; each runs four threads per CPU. \"forks\" has
processes forked meanwhile parse as well. All allocators must come to the same result.

Building jemalloc needs Debian's package `make`.")]
struct Program {
    #[command(flatten)]
    options: Options,
}

/// The programs that `kmem-bench-program` runs.
const PROGRAMS: [&str; 4] =
    ["program-kmem", "program-mimalloc", "program-jemalloc", "program-glibc"];

/// Arguments of `bench pages`.
#[derive(clap::Args)]
struct Pages {
    #[command(flatten)]
    options: Options,
    /// Count instructions of the order-0 and order-9 pairs as well.
    #[arg(long)]
    instructions: bool,
}

/// Arguments of `bench bytes`.
#[derive(clap::Args)]
#[command(after_help = "\
Example: what frees of objects from another thread cost, in nanoseconds per free and allocation
  cargo xtask bench bytes --only swapped

\"64 B pair\" is an allocation and a free. \"larson\" frees and allocates a random one of 4096 objects of 16 to
1024 bytes, on one thread and on two; \"swapped\" has the two exchange their objects every 4096 operations.
Only ratios within one run mean something.

Building jemalloc needs Debian's package `make`.")]
struct Bytes {
    #[command(flatten)]
    options: Options,
}

/// Arguments of `bench mappings`.
#[derive(clap::Args)]
#[command(after_help = "\
Example: what finding addresses costs among 10, 10 000 and a million areas
  cargo xtask bench mappings --only range

\"range among n\" takes addresses for 1 to 16 pages and gives those of a random other area back. \"vmalloc 64 KiB\"
maps 16 scattered frames and frees them. Only ratios within one run mean something.

Building jemalloc, which the crate links, needs Debian's package `make`.")]
struct Mappings {
    #[command(flatten)]
    options: Options,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<ExitCode> {
    match &args.what {
        What::Pages(args) => {
            let counts = if args.instructions { callgrind::count(&["peers"])? } else { Vec::new() };
            measure("kmem-bench", &args.options, &counts)?;
        }
        What::Bytes(args) => {
            measure("kmem-bench-bytes", &args.options, &[])?;
        }
        What::Mappings(args) => {
            measure("kmem-bench-mappings", &args.options, &[])?;
        }
        What::Program(args) => {
            callgrind::build_all(&PROGRAMS)?;
            measure("kmem-bench-program", &args.options, &[])?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs a benchmark program and prints its report, with exact counts if there are any.
fn measure(name: &str, options: &Options, counts: &[Cost]) -> Result<()> {
    let program = callgrind::build(name)?;
    let mut command = Command::new(&program);
    command.stdin(Stdio::null());
    if options.quick {
        command.arg("--quick");
    }
    if let Some(only) = &options.only {
        command.args(["--only", only]);
    }
    let run = || format!("cannot run {}", program.display());
    if options.json {
        let output = command.arg("--json").stderr(Stdio::inherit()).output().with_context(run)?;
        if !output.status.success() {
            bail!("{name} failed ({})", output.status);
        }
        let mut report: Value = serde_json::from_slice(&output.stdout)
            .with_context(|| format!("{name} printed no JSON"))?;
        if !counts.is_empty() {
            report["instructions"] = counts
                .iter()
                .map(|c| {
                    json!({
                        "operation": c.op, "contender": c.contender, "instructions": c.instructions
                    })
                })
                .collect();
        }
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        let status = command.status().with_context(run)?;
        if !status.success() {
            bail!("{name} failed ({status})");
        }
        if !counts.is_empty() {
            println!("\nInstructions per operation at 64 MiB, exact, harness subtracted");
        }
        for c in counts {
            println!("{:<16}{:<24}{:>10.1}", c.op, c.contender, c.instructions);
        }
    }
    Ok(())
}
