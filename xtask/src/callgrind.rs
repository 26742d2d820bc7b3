//! Exact instruction counts: `kmem-instr` under valgrind's callgrind.
//!
//! # Concepts
//! The program calls one function per measurement, callgrind counts inside it only and writes a dump each
//! time it returns, and the program prints one line per call. The n-th dump belongs to the n-th line. Two
//! lines with different counts give the cost per operation without any constant part; what the same
//! loop costs around an allocator that does nothing (the harness) is subtracted.
//!
//! # Locking
//! One thread per group of operations; each runs a process of its own.

use crate::cargo;
use anyhow::{Context, Result, anyhow, bail};
use serde::Deserialize;
use std::{
    collections::BTreeMap,
    env, fs,
    io::ErrorKind,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
};

/// The function that callgrind counts in.
const MEASURED: &str = "kmem_instr_measured";
/// The contender that does nothing.
const HARNESS: &str = "harness";

/// One line of the program.
#[derive(Deserialize)]
struct Step {
    op: String,
    contender: String,
    ops: u64,
}

/// What an operation costs.
#[derive(Clone, PartialEq, Debug)]
pub struct Cost {
    /// The operation.
    pub op: String,
    /// Whose.
    pub contender: String,
    /// Instructions per operation, the harness's subtracted.
    pub instructions: f64,
    /// The harness's.
    pub harness: f64,
    /// Cache lines per operation that were not in the simulated first-level cache, the harness's
    /// subtracted: what it touches of memory that it has not touched lately.
    pub lines: f64,
}

/// What one step was counted at.
#[derive(Clone)]
struct Counted {
    op: String,
    contender: String,
    ops: u64,
    instructions: u64,
    lines: u64,
}

/// The simulated caches: the same everywhere, whatever the host has. The data cache has far more ways
/// than a real one, for which lines get in each other's way depends on where the host puts the
/// stack and the tables, and what is counted is the lines that an operation needs.
const CACHES: [&str; 4] =
    ["--cache-sim=yes", "--I1=32768,8,64", "--D1=32768,64,64", "--LL=1048576,8,64"];

/// Builds one of the benchmark programs as released and returns its path.
pub fn build(bin: &str) -> Result<PathBuf> {
    build_all(&[bin])?;
    Ok(cargo::target_dir().join("release").join(bin))
}

/// Builds several programs of the bench crate.
pub fn build_all(bins: &[&str]) -> Result<()> {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(&cargo)
        .current_dir(cargo::root())
        .args(["build", "--release", "--package", "kmem-bench"])
        .args(bins.iter().flat_map(|bin| ["--bin", bin]))
        // The figures are those of the default release build.
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("cannot run {}", cargo.display()))?;
    if !status.success() {
        bail!("cargo build failed for {} ({status})", bins.join(", "));
    }
    Ok(())
}

/// Counts the operations of each set of groups, the sets side by side.
pub fn count(sets: &[&str]) -> Result<Vec<Cost>> {
    let program = build("kmem-instr")?;
    let dir = cargo::target_dir().join("callgrind").join(std::process::id().to_string());
    fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    let counted = thread::scope(|scope| {
        let run = |groups: &&str| {
            let (program, dir, groups) = (&program, &dir, (*groups).to_owned());
            scope.spawn(move || count_groups(program, dir, &groups))
        };
        let threads: Vec<_> = sets.iter().map(run).collect();
        threads
            .into_iter()
            .map(|t| t.join().unwrap_or_else(|_| Err(anyhow!("a counting thread panicked"))))
            .collect::<Result<Vec<_>>>()
    });
    let removed = fs::remove_dir_all(&dir);
    let costs = costs(&counted?.concat())?;
    removed.with_context(|| format!("cannot remove {}", dir.display()))?;
    Ok(costs)
}

/// Runs the program over some groups and returns each step with its instructions.
fn count_groups(program: &Path, dir: &Path, groups: &str) -> Result<Vec<Counted>> {
    let out = dir.join(groups.replace(',', "-"));
    let output = Command::new("valgrind")
        .arg("--tool=callgrind")
        .args(CACHES)
        .arg(format!("--toggle-collect={MEASURED}"))
        .arg(format!("--dump-after={MEASURED}"))
        .arg(format!("--callgrind-out-file={}", out.display()))
        .arg(program)
        .args(["--groups", groups])
        .stdin(Stdio::null())
        .output()
        .map_err(|e| match e.kind() {
            ErrorKind::NotFound => {
                anyhow!("valgrind is missing: install Debian's package `valgrind`")
            }
            _ => anyhow!(e).context("cannot run valgrind"),
        })?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        bail!("kmem-instr --groups {groups} failed under valgrind ({}):\n{text}", output.status);
    }
    let text = String::from_utf8(output.stdout).context("kmem-instr printed no UTF-8")?;
    let mut steps = Vec::new();
    for (i, line) in text.lines().enumerate() {
        let step: Step = serde_json::from_str(line)
            .with_context(|| format!("kmem-instr --groups {groups}: line {}", i + 1))?;
        let dump = out.with_extension((i + 1).to_string());
        let (instructions, lines) = totals(&dump)?;
        let Step { op, contender, ops } = step;
        steps.push(Counted { op, contender, ops, instructions, lines });
    }
    Ok(steps)
}

/// The instructions and the first-level misses for data that a dump counted.
fn totals(dump: &Path) -> Result<(u64, u64)> {
    let text = fs::read_to_string(dump)
        .with_context(|| format!("callgrind left no dump {}", dump.display()))?;
    parse_totals(&text).with_context(|| format!("callgrind's dump {}", dump.display()))
}

fn parse_totals(text: &str) -> Result<(u64, u64)> {
    let line = |key: &str| {
        let found = text.lines().find_map(|line| line.strip_prefix(key));
        found.with_context(|| format!("no line `{key}`"))
    };
    let values: Vec<&str> = line("totals:")?.split_whitespace().collect();
    let events: Vec<&str> = line("events:")?.split_whitespace().collect();
    let event = |name: &str| {
        let at = events.iter().position(|e| *e == name).with_context(|| format!("no {name}"))?;
        // Trailing zeros are left out.
        let value = values.get(at).copied().unwrap_or("0");
        value.parse::<u64>().with_context(|| format!("totals: `{value}` for {name}"))
    };
    Ok((event("Ir")?, event("D1mr")? + event("D1mw")?))
}

/// Cost per operation of all steps of one operation and contender: the slope of two steps with
/// different counts, else the mean.
fn per_op(steps: &[(u64, u64)]) -> f64 {
    match *steps {
        [(a, x), (b, y)] if a < b => (y as f64 - x as f64) / (b - a) as f64,
        _ => {
            let (ops, total) =
                steps.iter().fold((0, 0), |(n, t), (ops, total)| (n + ops, t + total));
            total as f64 / ops as f64
        }
    }
}

/// Costs in the order in which the operations were first counted.
fn costs(steps: &[Counted]) -> Result<Vec<Cost>> {
    let mut order = Vec::new();
    let mut by_key: BTreeMap<(&str, &str), Vec<&Counted>> = BTreeMap::new();
    for step in steps {
        let key = (step.op.as_str(), step.contender.as_str());
        let entry = by_key.entry(key).or_default();
        if entry.is_empty() {
            order.push(key);
        }
        entry.push(step);
    }
    let slope = |steps: &[&Counted], count: fn(&Counted) -> u64| {
        per_op(&steps.iter().map(|s| (s.ops, count(s))).collect::<Vec<_>>())
    };
    let mut costs = Vec::new();
    for (op, contender) in order.into_iter().filter(|(_, who)| *who != HARNESS) {
        let steps = &by_key[&(op, contender)];
        let none = by_key.get(&(op, HARNESS));
        let none = none.with_context(|| format!("{op} was not counted for the harness"))?;
        let harness = slope(none, |s| s.instructions);
        costs.push(Cost {
            op: op.to_owned(),
            contender: contender.to_owned(),
            instructions: slope(steps, |s| s.instructions) - harness,
            harness,
            lines: slope(steps, |s| s.lines) - slope(none, |s| s.lines),
        });
    }
    Ok(costs)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(op: &str, who: &str, ops: u64, instructions: u64) -> Counted {
        let (op, contender) = (op.to_owned(), who.to_owned());
        Counted { op, contender, ops, instructions, lines: 2 * ops }
    }

    #[test]
    fn totals_are_found_by_event() {
        let text = "x: 1\nevents: Ir Dr Dw I1mr D1mr D1mw\n+1 5\ntotals: 70 9 8 1 4\n";
        assert_eq!(parse_totals(text).unwrap(), (70, 4));
        let error = parse_totals("events: Ir\ntotals: 70\n").unwrap_err();
        assert!(error.to_string().contains("D1mr"), "{error}");
    }

    #[test]
    fn two_counts_cancel_the_constant_part() {
        let steps = [
            step("pair", HARNESS, 10, 57),
            step("pair", HARNESS, 30, 157),
            step("pair", "kmem", 10, 1_300),
            step("pair", "kmem", 30, 3_700),
        ];
        let costs = costs(&steps).unwrap();
        assert_eq!(costs.len(), 1);
        assert_eq!((costs[0].instructions, costs[0].harness), (115.0, 5.0));
        assert_eq!(costs[0].lines, 0.0);
    }

    #[test]
    fn equal_counts_are_averaged() {
        let steps =
            [step("free", HARNESS, 4, 8), step("free", "kmem", 4, 40), step("free", "kmem", 4, 48)];
        assert_eq!(costs(&steps).unwrap()[0].instructions, 9.0);
    }

    #[test]
    fn an_operation_without_harness_is_an_error() {
        let error = costs(&[step("free", "kmem", 4, 40)]).unwrap_err();
        assert!(error.to_string().contains("free"), "{error}");
    }
}
