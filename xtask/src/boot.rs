//! `cargo xtask boot`: kmem on a machine of its own.
//!
//! Builds the freestanding image `kmem-boot`, boots it in QEMU (emulation, no KVM needed), shows what
//! it prints, and ends with its verdict.

use crate::{
    cargo,
    qemu::{Machine, Outcome},
};
use anyhow::{Context, Result};
use serde::Serialize;
use std::{fs, process::ExitCode, str::FromStr, time::Duration, time::Instant};

/// Build the bare-metal image, boot it in QEMU and report its verdict
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  cargo xtask boot                           256 MiB, half of it beyond 4 GiB
  cargo xtask boot --memory 5G --below-4g 3G
  cargo xtask boot --singlestep              interrupts may land after any instruction (slow)
  cargo xtask boot --check                   formatting and lints of the image, no machine
  cargo xtask boot --json | jq .outcome      the image's output goes to standard error

Exit status: 0 when the image says that every test passed, 1 otherwise, 2 for wrong arguments.")]
pub struct Args {
    /// Memory of the machine: bytes, or with a suffix K, M or G
    #[arg(long, value_name = "SIZE", default_value = "256M")]
    memory: Size,

    /// How much of it lies below 4 GiB [default: half, at most 3G]; the rest is in zone Normal
    #[arg(long, value_name = "SIZE")]
    below_4g: Option<Size>,

    /// Seed of the image's random choices
    #[arg(long, default_value_t = 1)]
    seed: u64,

    /// Seconds of interrupt storm
    #[arg(long, value_name = "SECONDS", default_value_t = 2)]
    storm: u64,

    /// Show /proc/zoneinfo's text at the end, besides /proc/buddyinfo's
    #[arg(long)]
    zoneinfo: bool,

    /// Let QEMU translate one instruction at a time, so that timer interrupts land after any
    #[arg(long)]
    singlestep: bool,

    /// Cargo profile of the image: release, or dev with overflow checks and debug assertions
    #[arg(long, value_parser = ["release", "dev"], default_value = "release")]
    profile: String,

    /// Seconds after which the machine is stopped
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    timeout: u64,

    /// Check the image's formatting and lints instead of booting it
    #[arg(long)]
    check: bool,

    /// Print one JSON object on standard output when done
    #[arg(long)]
    json: bool,
}

/// A number of bytes, written `4096`, `64K`, `256M` or `3G`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Size(u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Size, String> {
        let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
        let shift = match &text[digits.len()..] {
            "" => 0,
            "K" | "k" => 10,
            "M" | "m" => 20,
            "G" | "g" => 30,
            other => return Err(format!("unknown suffix `{other}`: use K, M or G")),
        };
        let number: u64 = digits.parse().map_err(|e| format!("`{digits}`: {e}"))?;
        let bytes = number.checked_mul(1 << shift).ok_or("more than 2^64 bytes")?;
        Ok(Size(bytes))
    }
}

#[derive(Serialize)]
struct Summary<'a> {
    outcome: Outcome,
    passed: bool,
    profile: &'a str,
    memory_bytes: u64,
    below_4g_bytes: u64,
    seed: u64,
    build_seconds: f64,
    run_seconds: f64,
    image_bytes: u64,
    output: Vec<&'a str>,
}

/// Builds, boots, reports.
pub fn run(args: &Args) -> Result<ExitCode> {
    const MAX_BELOW: u64 = 3 << 30;
    if args.check {
        cargo::check_image()?;
        return Ok(ExitCode::SUCCESS);
    }
    let below_4g = args.below_4g.map_or((args.memory.0 / 2).min(MAX_BELOW), |s| s.0);
    let start = Instant::now();
    let image = cargo::build_image(&args.profile)?;
    let build_seconds = start.elapsed().as_secs_f64();
    let image_bytes =
        fs::metadata(&image).with_context(|| format!("cannot look at {}", image.display()))?.len();

    let append =
        format!("seed={} storm={} zoneinfo={}", args.seed, args.storm, u8::from(args.zoneinfo));
    let machine = Machine {
        image: &image,
        memory: args.memory.0,
        below_4g,
        cpus: 1,
        append: &append,
        single_step: args.singlestep,
        timeout: Duration::from_secs(args.timeout),
    };
    let run = machine.run(|line| {
        if args.json {
            eprintln!("{line}");
        } else {
            println!("{line}");
        }
    })?;
    let passed = run.outcome == Outcome::Pass;
    if args.json {
        let summary = Summary {
            outcome: run.outcome,
            passed,
            profile: &args.profile,
            memory_bytes: args.memory.0,
            below_4g_bytes: below_4g,
            seed: args.seed,
            build_seconds,
            run_seconds: run.elapsed.as_secs_f64(),
            image_bytes,
            output: run.output.lines().collect(),
        };
        println!("{}", serde_json::to_string_pretty(&summary)?);
    }
    eprintln!(
        "boot: {} (build {build_seconds:.1} s, run {:.1} s)",
        run.outcome.describe(),
        run.elapsed.as_secs_f64(),
    );
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!("4096".parse(), Ok(Size(4096)));
        assert_eq!("64K".parse(), Ok(Size(64 << 10)));
        assert_eq!("256M".parse(), Ok(Size(256 << 20)));
        assert_eq!("3g".parse(), Ok(Size(3 << 30)));
        for bad in ["", "M", "12X", "-1", "99999999999G", "1.5G"] {
            assert!(bad.parse::<Size>().is_err(), "{bad}");
        }
    }
}
