//! `cargo xtask budgets`: instruction counts against `budgets.toml`.
//!
//! # Concepts
//! An operation has three figures in the file. *must* and *goal* are the project's targets; *budget* is what
//! it may cost today, and a ratchet: `--update` lowers budgets to what was measured plus slack and never
//! raises one. Whoever has to raise a budget edits the file and writes the reason beside it as
//! `why`. An operation that costs more than its budget fails the command; with `--strict` so does one
//! above its must.
//!
//! *Lines* are cache lines per operation that a simulated first-level cache did not hold, for those
//! operations that the file gives limits. A *ratio* compares two operations, for costs that must not grow with the size of memory.
//!
//! # Locking
//! None.

use crate::{callgrind, cargo};
use anyhow::{Context, Result, bail};
use serde::Serialize;
use std::{collections::BTreeMap, fs, process::ExitCode};
use toml_edit::{DocumentMut, Item, Table, value};

const FILE: &str = "budgets.toml";
/// What a new budget leaves above the measured figure, in hundredths.
const SLACK_PERCENT: f64 = 2.0;

/// Counts instructions per operation and checks them against budgets.toml.
#[derive(clap::Args)]
pub struct Args {
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Lower budgets to what was measured, and add operations that have none.
    #[arg(long)]
    update: bool,
    /// Fail as well on an operation above its must.
    #[arg(long)]
    strict: bool,
}

/// One line of the result.
#[derive(Serialize, Clone, PartialEq, Debug)]
struct Line {
    operation: String,
    /// Instructions per operation, or the ratio of two operations.
    measured: f64,
    /// The harness's own instructions, already subtracted.
    #[serde(skip_serializing_if = "Option::is_none")]
    harness: Option<f64>,
    budget: Option<f64>,
    must: Option<f64>,
    goal: Option<f64>,
    within_budget: bool,
    within_must: bool,
    within_goal: bool,
}

impl Line {
    fn new(operation: &str, measured: f64, harness: Option<f64>, entry: Option<&Table>) -> Line {
        let figure = |key: &str| {
            let item = entry.and_then(|t| t.get(key))?;
            item.as_float().or_else(|| item.as_integer().map(|n| n as f64))
        };
        let (budget, must, goal) = (figure("budget"), figure("must"), figure("goal"));
        let within = |limit: Option<f64>| limit.is_none_or(|l| measured <= l);
        Line {
            operation: operation.to_owned(),
            measured,
            harness,
            budget,
            must,
            goal,
            // An operation nobody gave a budget is not checked, and that is not right.
            within_budget: budget.is_some() && within(budget),
            within_must: within(must),
            within_goal: within(goal),
        }
    }

    fn verdict(&self) -> &'static str {
        match self {
            Line { budget: None, .. } => "NO BUDGET",
            Line { within_budget: false, .. } => "BREACH",
            Line { within_must: false, .. } => "above must",
            Line { goal: Some(_), within_goal: true, .. } => "goal met",
            _ => "ok",
        }
    }
}

/// The result.
#[derive(Serialize)]
struct Report {
    operations: Vec<Line>,
    lines: Vec<Line>,
    ratios: Vec<Line>,
    breaches: usize,
    above_must: usize,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<ExitCode> {
    let path = cargo::root().join(FILE);
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(e) if args.update && e.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(e) => return Err(e).with_context(|| format!("cannot read {}", path.display())),
    };
    let mut file: DocumentMut = text.parse().with_context(|| format!("{FILE} is not TOML"))?;
    let costs = callgrind::count(&["hot,small", "large"])?;
    if args.update {
        update(&mut file, &costs)?;
        fs::write(&path, file.to_string())
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    let report = check(&file, &costs)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print(&report);
    }
    let failed = report.breaches > 0 || args.strict && report.above_must > 0;
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn section<'a>(file: &'a DocumentMut, name: &str) -> Result<Option<&'a Table>> {
    match file.get(name) {
        None => Ok(None),
        Some(item) => {
            item.as_table().map(Some).with_context(|| format!("{FILE}: [{name}] is no table"))
        }
    }
}

/// The file's ratios: name, the two operations, the entry.
fn ratios(file: &DocumentMut) -> Result<Vec<(&str, &str, &str, &Table)>> {
    let mut found = Vec::new();
    for (name, item) in section(file, "ratio")?.into_iter().flatten() {
        let entry =
            item.as_table().with_context(|| format!("{FILE}: [ratio.{name}] is no table"))?;
        let operation = |key: &str| {
            let op = entry.get(key).and_then(Item::as_str);
            op.with_context(|| format!("{FILE}: [ratio.{name}] has no text `{key}`"))
        };
        found.push((name, operation("of")?, operation("to")?, entry));
    }
    Ok(found)
}

fn check(file: &DocumentMut, costs: &[callgrind::Cost]) -> Result<Report> {
    let by_op: BTreeMap<&str, f64> =
        costs.iter().map(|c| (c.op.as_str(), c.instructions)).collect();
    let entries = section(file, "op")?;
    for (op, _) in entries.into_iter().flatten() {
        if !by_op.contains_key(op) {
            bail!("{FILE}: [op.{op}] names an operation that is not measured");
        }
    }
    let line = |c: &callgrind::Cost| {
        let entry = entries.and_then(|t| t.get(&c.op)).and_then(Item::as_table);
        Line::new(&c.op, c.instructions, Some(c.harness), entry)
    };
    let operations: Vec<Line> = costs.iter().map(line).collect();
    let mut lines = Vec::new();
    for (op, item) in section(file, "lines")?.into_iter().flatten() {
        lines.push(Line::new(op, lines_of(costs, op)?, None, item.as_table()));
    }
    let mut ratio_lines = Vec::new();
    for (name, of, to, entry) in ratios(file)? {
        ratio_lines.push(Line::new(name, ratio(&by_op, name, of, to)?, None, Some(entry)));
    }
    let all = || operations.iter().chain(&lines).chain(&ratio_lines);
    let breaches = all().filter(|l| !l.within_budget).count();
    let above_must = all().filter(|l| !l.within_must).count();
    Ok(Report { operations, lines, ratios: ratio_lines, breaches, above_must })
}

fn lines_of(costs: &[callgrind::Cost], op: &str) -> Result<f64> {
    let cost = costs.iter().find(|c| c.op == op);
    let cost = cost.with_context(|| format!("{FILE}: [lines.{op}] is not measured"))?;
    Ok(cost.lines)
}

fn ratio(by_op: &BTreeMap<&str, f64>, name: &str, of: &str, to: &str) -> Result<f64> {
    match (by_op.get(of), by_op.get(to)) {
        (Some(of), Some(to)) => Ok(of / to),
        _ => bail!("{FILE}: [ratio.{name}] names an operation that is not measured"),
    }
}

/// Lowers budgets to the measured figures plus slack, and adds those that are missing.
fn update(file: &mut DocumentMut, costs: &[callgrind::Cost]) -> Result<()> {
    let by_op: BTreeMap<&str, f64> =
        costs.iter().map(|c| (c.op.as_str(), c.instructions)).collect();
    let mut measured_ratios = Vec::new();
    for (name, of, to, _) in ratios(file)? {
        measured_ratios.push((name.to_owned(), ratio(&by_op, name, of, to)?));
    }
    if let Some(table) = file.get_mut("lines").and_then(Item::as_table_mut) {
        let names: Vec<String> = table.iter().map(|(name, _)| name.to_owned()).collect();
        for op in names {
            lower(table, &op, hundredths(lines_of(costs, &op)?), value)?;
        }
    }
    let ops = file.entry("op").or_insert_with(implicit);
    let ops = ops.as_table_mut().with_context(|| format!("{FILE}: [op] is no table"))?;
    for c in costs {
        let fresh = (c.instructions * (1.0 + SLACK_PERCENT / 100.0)).ceil();
        lower(ops, &c.op, fresh, |n| value(n as i64))?;
    }
    if let Some(table) = file.get_mut("ratio").and_then(Item::as_table_mut) {
        for (name, measured) in measured_ratios {
            lower(table, &name, hundredths(measured), value)?;
        }
    }
    Ok(())
}

/// The measured figure plus slack, in hundredths.
fn hundredths(measured: f64) -> f64 {
    (measured * (100.0 + SLACK_PERCENT)).ceil() / 100.0
}

fn implicit() -> Item {
    let mut table = Table::new();
    table.set_implicit(true);
    Item::Table(table)
}

fn lower(table: &mut Table, name: &str, fresh: f64, item: impl Fn(f64) -> Item) -> Result<()> {
    let entry = table.entry(name).or_insert_with(|| Item::Table(Table::new()));
    let entry = entry.as_table_mut().with_context(|| format!("{FILE}: [{name}] is no table"))?;
    let old = entry.get("budget").and_then(|i| i.as_float().or(i.as_integer().map(|n| n as f64)));
    if old.is_none_or(|old| fresh < old) {
        entry["budget"] = item(fresh);
    }
    Ok(())
}

fn print(report: &Report) {
    let limit = |f: Option<f64>, digits: usize| {
        f.map_or_else(|| "-".to_owned(), |f| format!("{f:.digits$}"))
    };
    let sections = [
        ("operation", "instructions", &report.operations, 0, 1),
        ("operation", "cache lines", &report.lines, 2, 2),
        ("comparison", "ratio", &report.ratios, 2, 2),
    ];
    for (what, unit, lines, limits, digits) in sections {
        println!("{what:<28}{unit:>14}{:>10}{:>10}{:>10}  verdict", "budget", "must", "goal");
        for line in lines {
            println!(
                "{:<28}{:>14.digits$}{:>10}{:>10}{:>10}  {}",
                line.operation,
                line.measured,
                limit(line.budget, limits),
                limit(line.must, limits),
                limit(line.goal, limits),
                line.verdict()
            );
        }
        println!();
    }
    println!("breaches: {}   above must: {}", report.breaches, report.above_must);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cost(op: &str, instructions: f64) -> callgrind::Cost {
        callgrind::Cost {
            op: op.to_owned(),
            contender: "kmem".to_owned(),
            instructions,
            harness: 5.0,
            lines: 3.5,
        }
    }

    const TEXT: &str = "# kept\n[op.a]\nmust = 150\ngoal = 60\nbudget = 100\n[op.b]\nbudget = 10\n\
                        [lines.a]\nmust = 3\nbudget = 4\n\
                        [ratio.r]\nof = \"a\"\nto = \"b\"\nmust = 1.1\nbudget = 12.5\n";

    #[test]
    fn what_is_above_its_budget_is_a_breach() {
        let file: DocumentMut = TEXT.parse().unwrap();
        let report = check(&file, &[cost("a", 100.5), cost("b", 10.0)]).unwrap();
        assert_eq!(report.breaches, 1);
        assert_eq!(report.operations[0].verdict(), "BREACH");
        assert_eq!(report.operations[1].verdict(), "ok");
        assert_eq!(report.ratios[0].verdict(), "above must");
        assert_eq!((report.lines[0].measured, report.lines[0].verdict()), (3.5, "above must"));
        assert_eq!(report.above_must, 2);
    }

    #[test]
    fn an_operation_without_a_budget_is_a_breach() {
        let file: DocumentMut = TEXT.parse().unwrap();
        let report = check(&file, &[cost("a", 50.0), cost("b", 10.0), cost("c", 1.0)]).unwrap();
        assert_eq!(report.operations[0].verdict(), "goal met");
        assert_eq!(report.operations[2].verdict(), "NO BUDGET");
        assert_eq!(report.breaches, 1);
    }

    #[test]
    fn a_budget_for_nothing_is_an_error() {
        let file: DocumentMut = TEXT.parse().unwrap();
        let error = check(&file, &[cost("a", 1.0)]).err().map(|e| e.to_string());
        assert!(error.is_some_and(|e| e.contains("[op.b]")));
    }

    #[test]
    fn an_update_only_tightens_and_keeps_the_rest() {
        let mut file: DocumentMut = TEXT.parse().unwrap();
        update(&mut file, &[cost("a", 50.0), cost("b", 20.0), cost("c", 7.0)]).unwrap();
        let budget = |path: [&str; 2]| file[path[0]][path[1]]["budget"].to_string();
        assert_eq!(budget(["op", "a"]).trim(), "51");
        assert_eq!(budget(["op", "b"]).trim(), "10");
        assert_eq!(budget(["op", "c"]).trim(), "8");
        assert_eq!(budget(["lines", "a"]).trim(), "3.57");
        assert_eq!(budget(["ratio", "r"]).trim(), "2.55");
        assert!(file.to_string().starts_with("# kept"));
    }
}
