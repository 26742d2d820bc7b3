//! The result of a run, as data and as a table.
//!
//! # Concepts
//! A row is one workload at one size on one or more threads, with a figure per contender. kmem's
//! ratio is given to the best peer of all, and to the best of those that do what kmem does: coalesce, and
//! keep a state per frame. Among byte allocators it is given to jemalloc as well.
//!
//! # Locking
//! Plain values.

use crate::contest::{Samples, ns_per_op};
use serde::Serialize;
use std::{
    fmt::Write,
    hint::black_box,
    sync::atomic::{
        AtomicU64,
        Ordering::{AcqRel, Relaxed},
    },
};

/// How the names of workloads end that are mostly the host's calls: the limit for two threads is not for them.
pub const WITH_HOST: &str = "with page tables";
/// kmem's name.
pub const KMEM: &str = "kmem";
/// The peer that byte allocators are measured by.
pub const JEMALLOC: &str = "jemalloc";
/// The name of the contender that does nothing.
pub const HARNESS: &str = "harness";
/// Least width of a column of [`Report::by_contender`].
const WIDE: usize = 12;
/// Peers that merge free blocks and keep a state per frame.
const ALIKE: [&str; 2] = ["buddy-slab-allocator", "buddy_system_allocator"];

/// One contender's figure.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    /// Who.
    pub contender: String,
    /// Nanoseconds of processor time per operation.
    pub ns: Option<f64>,
    /// Why there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// kmem against one peer.
#[derive(Clone, Debug, Serialize)]
pub struct Ratio {
    /// The peer.
    pub peer: String,
    /// kmem's time divided by the peer's, from paired rounds.
    pub ratio: f64,
}

/// One workload at one size.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The workload.
    pub workload: String,
    /// Bytes of memory.
    pub bytes: u64,
    /// Threads.
    pub threads: usize,
    /// By contender.
    pub figures: Vec<Figure>,
    /// To the fastest peer.
    pub to_best: Option<Ratio>,
    /// To the fastest peer that coalesces and keeps a state per frame.
    pub to_best_alike: Option<Ratio>,
    /// To jemalloc, where it takes part.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to_jemalloc: Option<Ratio>,
}

/// A single figure with its limits.
#[derive(Clone, Debug, Serialize)]
pub struct Fact {
    /// What.
    pub name: String,
    /// How much.
    pub value: f64,
    /// Of what.
    pub unit: &'static str,
    /// The project's limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub must: Option<f64>,
    /// What we are after.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub goal: Option<f64>,
}

impl Fact {
    /// What one locked compare-and-exchange costs here, on a line at hand. A free that tells which of two CPUs frees first
    /// has one, an allocator that leaves that to its caller has none: what is left of a ratio to such a peer is
    /// the allocators'.
    pub fn locked_exchange() -> Fact {
        const TIMES: usize = 15;
        const OPS: u64 = 100_000;
        let word = AtomicU64::new(0);
        let run = || {
            for from in (0..OPS).map(|i| i & 1) {
                let _ = black_box(&word).compare_exchange(from, from ^ 1, AcqRel, Relaxed);
            }
        };
        let mut ns: Vec<_> = (0..TIMES).map(|_| ns_per_op(OPS, run)).collect();
        ns.sort_unstable_by(f64::total_cmp);
        let value = ns[TIMES / 2];
        Fact { name: "one locked exchange".to_owned(), value, unit: "ns", must: None, goal: None }
    }
}

/// A run.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// Rounds per row.
    pub rounds: usize,
    /// Workloads.
    pub rows: Vec<Row>,
    /// Two threads' time per operation divided by one thread's, and other single figures.
    pub facts: Vec<Fact>,
}

impl Row {
    /// A row from the samples of its contest.
    pub fn new(workload: &str, bytes: u64, threads: usize, all: &[Samples], row: usize) -> Row {
        let figures = all
            .iter()
            .map(|s| Figure {
                contender: s.name.to_owned(),
                ns: s.figure(row),
                note: s.rows.as_ref().err().cloned(),
            })
            .collect();
        let kmem = all.iter().find(|s| s.name == KMEM);
        let best = |wanted: &dyn Fn(&str) -> bool| {
            let peers = all.iter().filter(|s| s.name != KMEM && s.name != HARNESS);
            let timed = peers.filter(|s| wanted(s.name)).filter_map(|s| Some((s, s.figure(row)?)));
            let (peer, _) = timed.min_by(|a, b| a.1.total_cmp(&b.1))?;
            Some(Ratio { peer: peer.name.to_owned(), ratio: kmem?.ratio(peer, row)? })
        };
        Row {
            workload: workload.to_owned(),
            bytes,
            threads,
            figures,
            to_best: best(&|_| true),
            to_best_alike: best(&|name| ALIKE.contains(&name)),
            to_jemalloc: best(&|name| name == JEMALLOC),
        }
    }
}

/// 1099511627776 as `1 TiB`.
pub fn size(bytes: u64) -> String {
    match bytes {
        b if b >= 1 << 40 => format!("{} TiB", b >> 40),
        b if b >= 1 << 30 => format!("{} GiB", b >> 30),
        b => format!("{} MiB", b >> 20),
    }
}

fn short(contender: &str) -> &str {
    let name = contender.strip_suffix("-allocator").unwrap_or(contender);
    name.strip_suffix("_allocator").unwrap_or(name)
}

/// Width of a contender's column.
fn width(name: &str) -> usize {
    13.max(name.len() + 2)
}

fn number(ns: f64) -> String {
    match ns {
        ns if ns >= 10_000.0 => format!("{:.0}k", ns / 1000.0),
        ns if ns >= 100.0 => format!("{ns:.0}"),
        ns => format!("{ns:.1}"),
    }
}

impl Report {
    /// Adds a contest's rows, which are names and numbers of threads, less what the harness costs; where the second
    /// row is the first on two threads, their ratio as well.
    pub fn add_contest(&mut self, rows: &[(&str, usize)], bytes: u64, mut samples: Vec<Samples>) {
        let share = |s: &Samples| (0..rows.len()).map(|row| s.figure(row)).collect();
        let harness: Vec<Option<f64>> =
            samples.iter().find(|s| s.name == HARNESS).map(share).unwrap_or_default();
        samples.iter_mut().filter(|s| s.name != HARNESS).for_each(|s| s.less(&harness));
        for (i, (name, threads)) in rows.iter().enumerate() {
            self.rows.push(Row::new(name, bytes, *threads, &samples, i));
        }
        if let [(name, 1), (_, 2)] = rows[..] {
            for s in samples.iter().filter(|s| s.name != HARNESS) {
                // Two threads wait for each other in the host's calls, whoever makes them.
                let kmem = s.name == KMEM && !name.ends_with(WITH_HOST);
                self.facts.extend(s.between(1, 0).map(|value| Fact {
                    name: format!("{}: {}", name.trim_end_matches(", 1 thread"), s.name),
                    value,
                    unit: "2 threads / 1",
                    must: kmem.then_some(1.15),
                    goal: kmem.then_some(1.05),
                }));
            }
        }
    }

    /// The report for people.
    pub fn table(&self) -> String {
        let mut text = String::new();
        let mut heading = None;
        for row in &self.rows {
            let names: Vec<&str> = row.figures.iter().map(|f| short(&f.contender)).collect();
            let at = Some((row.bytes, names));
            if at != heading {
                let _ = write!(text, "\n{:<36}", size(row.bytes));
                for name in at.iter().flat_map(|(_, names)| names) {
                    let _ = write!(text, "{name:>0$}", width(name));
                }
                if row.to_best.is_some() {
                    let _ = write!(text, "  {:<18}", "kmem/best");
                }
                if row.to_best_alike.is_some() {
                    let _ = write!(text, "  kmem/best alike");
                }
                text.truncate(text.trim_end().len());
                text.push('\n');
                heading = at;
            }
            let _ = write!(text, "{:<36}", row.workload);
            for f in &row.figures {
                let ns = f.ns.map_or_else(|| "-".to_owned(), number);
                let _ = write!(text, "{ns:>0$}", width(short(&f.contender)));
            }
            for ratio in [&row.to_best, &row.to_best_alike] {
                let cell = ratio
                    .as_ref()
                    .map_or_else(String::new, |r| format!("{:.2} {}", r.ratio, short(&r.peer)));
                let _ = write!(text, "  {cell:<18}");
            }
            text.truncate(text.trim_end().len());
            text.push('\n');
        }
        if !self.rows.is_empty() {
            text.push_str("\nns of processor time per operation; - means not run\n");
            if self.rows.iter().any(|row| row.to_best_alike.is_some()) {
                text.push_str("alike: peers that coalesce and keep a state per frame\n");
            }
        }
        self.add_notes(&mut text);
        self.add_facts(&mut text);
        text
    }

    /// The report for people where there are many contenders and few workloads: a line per contender.
    pub fn by_contender(&self) -> String {
        let mut text = String::new();
        let width = |row: &Row| row.workload.chars().count().max(WIDE) + 2;
        let mut line = |first: &str, cell: &dyn Fn(&Row) -> String| {
            let mut line = format!("{first:<32}");
            for row in &self.rows {
                let _ = write!(line, "{:>1$}", cell(row), width(row));
            }
            text.push_str(line.trim_end());
            text.push('\n');
        };
        let ratio = |r: &Option<Ratio>, name: bool| match r {
            Some(r) if name => format!("{} {:.2}", short(&r.peer), r.ratio),
            Some(r) => format!("{:.2}", r.ratio),
            None => "-".to_owned(),
        };
        if let Some(row) = self.rows.first() {
            line(&size(row.bytes), &|row| row.workload.clone());
            for (i, f) in row.figures.iter().enumerate() {
                line(&f.contender, &|row| {
                    row.figures.get(i).and_then(|f| f.ns).map_or_else(|| "-".to_owned(), number)
                });
            }
            line("kmem/jemalloc", &|row| ratio(&row.to_jemalloc, false));
            line("kmem/best", &|row| ratio(&row.to_best, true));
            text.push_str(
                "\nns of processor time per operation, the harness's taken off; - means not run\n",
            );
        }
        self.add_notes(&mut text);
        self.add_facts(&mut text);
        text
    }

    fn add_notes(&self, text: &mut String) {
        let mut notes: Vec<String> = Vec::new();
        for row in &self.rows {
            for f in row.figures.iter() {
                let note = f.note.as_ref().map(|n| format!("{}: {n}", f.contender));
                notes.extend(note.filter(|n| !notes.contains(n)));
            }
        }
        notes.iter().for_each(|note| {
            let _ = writeln!(text, "  {note}");
        });
    }

    fn add_facts(&self, text: &mut String) {
        if !self.facts.is_empty() {
            let _ = write!(text, "\n{:<58}{:>12}  {:<16}", "", "value", "unit");
            let _ = writeln!(text, "{:>8}{:>8}", "must", "goal");
        }
        for f in &self.facts {
            let limit = |l: Option<f64>| l.map_or_else(|| "-".to_owned(), |l| l.to_string());
            let _ = write!(text, "{:<58}{:>12.3}  {:<16}", f.name, f.value, f.unit);
            let _ = writeln!(text, "{:>8}{:>8}", limit(f.must), limit(f.goal));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_kmem_s_to_the_named_and_to_the_fastest() {
        let sample = |name, ns: &[f64]| Samples::new(name, vec![ns.to_vec()]);
        let all = [
            sample(KMEM, &[4.0, 5.0, 9.0]),
            sample(JEMALLOC, &[8.0, 10.0, 10.0]),
            sample("quick", &[2.0, 2.5, 3.0]),
            sample(HARNESS, &[1.0, 1.0, 1.0]),
        ];
        let row = Row::new("pair", 64 << 20, 1, &all, 0);
        let to = |r: &Option<Ratio>| r.as_ref().map(|r| (r.peer.clone(), r.ratio));
        assert_eq!(to(&row.to_jemalloc), Some((JEMALLOC.to_owned(), 0.5)));
        assert_eq!(to(&row.to_best), Some(("quick".to_owned(), 2.0)));
        assert_eq!(to(&row.to_best_alike), None);
        let report = Report { rounds: 3, rows: vec![row], facts: Vec::new() };
        let text = report.by_contender();
        let line = |name: &str| {
            let line = text.lines().find(|l| l.starts_with(name)).unwrap();
            line.split_whitespace().skip(1).map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(line("jemalloc"), ["10.0"]);
        assert_eq!(line("kmem/jemalloc"), ["0.50"]);
        assert_eq!(line("kmem/best"), ["quick", "2.00"]);
    }
}
