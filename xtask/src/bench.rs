//! `cargo xtask bench`: kmem beside the page allocators of crates.io.
//!
//! # Concepts
//! The times come from `kmem-bench`, one program and one run for all contenders. `--instructions` adds exact
//! counts for the order-0 and order-9 pairs of each.
//!
//! # Locking
//! None.

use crate::callgrind;
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
}

/// Arguments of `bench pages`.
#[derive(clap::Args)]
struct Pages {
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Fewer rounds, and only the cheap workloads at 16 GiB and above.
    #[arg(long)]
    quick: bool,
    /// Only workloads whose name contains this.
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Count instructions of the order-0 and order-9 pairs as well.
    #[arg(long)]
    instructions: bool,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<ExitCode> {
    let What::Pages(args) = &args.what;
    let program = callgrind::build("kmem-bench")?;
    let counts = if args.instructions { callgrind::count(&["peers"])? } else { Vec::new() };
    let mut command = Command::new(&program);
    command.stdin(Stdio::null());
    if args.quick {
        command.arg("--quick");
    }
    if let Some(only) = &args.only {
        command.args(["--only", only]);
    }
    let run = || format!("cannot run {}", program.display());
    if args.json {
        let output = command.arg("--json").stderr(Stdio::inherit()).output().with_context(run)?;
        if !output.status.success() {
            bail!("kmem-bench failed ({})", output.status);
        }
        let mut report: Value =
            serde_json::from_slice(&output.stdout).context("kmem-bench printed no JSON")?;
        if args.instructions {
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
            bail!("kmem-bench failed ({status})");
        }
        if args.instructions {
            println!("\nInstructions per operation at 64 MiB, exact, harness subtracted");
        }
        for c in &counts {
            println!("{:<16}{:<24}{:>10.1}", c.op, c.contender, c.instructions);
        }
    }
    Ok(ExitCode::SUCCESS)
}
