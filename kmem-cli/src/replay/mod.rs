//! `kmem replay`: every page event of a recording, on a machine of the recorded shape; then every event on
//! objects; then those on vmalloc areas and per-CPU memory.
//!
//! # Concepts
//! A recording says what a kernel asked of its page allocator. [`machine`] builds a machine that starts
//! where the recording started: the same zones and watermarks, the same free blocks. [`plan`] turns the
//! recording into one list of operations per recorded CPU; [`strays`] takes out what the machine cannot have;
//! [`engine`] runs each list on a thread of its own.
//! [`objects`] replays the objects afterwards, on a machine of their own, and [`areas`] the vmalloc areas and per-CPU
//! memory.
//! [`result`] is what came of it; [`mod@print`] and [`html`] show it. [`record`] makes a recording of what kmem did.
//!
//! # What orders the events
//! Only what a free needs of its allocation: a thread that is to free a block that another thread has not
//! allocated yet waits for it. Beyond that the threads run as they may. An allocation that finds no
//! memory waits for the events that the recording has before it, since Linux had their frees; see
//! [`engine`].

mod areas;
mod engine;
mod html;
mod machine;
mod objects;
mod plan;
mod print;
mod record;
mod result;
mod strays;

use anyhow::{Context, bail};
use clap::ValueEnum;
use kmem::types::MAX_CPUS;
use kmem_trace::Recording;
use std::{io::Write, path::PathBuf};

/// How fast to replay.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Speed {
    /// As fast as the allocator goes.
    Max,
    /// At the recorded times.
    Recorded,
}

/// Options of `kmem replay`.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  kmem replay                                   the recording that comes with the project
  kmem replay data/linux-6.12-b.kmr --json      another one, result as JSON on standard output
  kmem replay my.kmt.zst --report my.html       a recording with my.json and my/ beside it
  kmem replay perf.txt --memory 1G --cpus 4     what `perf script` printed, on a machine of your own
  kmem replay perf.txt --speed recorded -q      at the recorded times, without a progress bar
  kmem replay --record kmem.kmr                 records what kmem did, to be replayed in its turn

How to record your own machine is told in docs/RECORDING.md. Exit codes: 0 the replay is complete and
its result written, 1 an error told on standard error, 2 the command line was wrong.
")]
pub struct Args {
    /// The recording: a .kmr file, a .kmt.zst file with its .json and folder beside it, or the text of
    /// `perf script` or ftrace.
    #[arg(default_value = "data/linux-6.12-a.kmr")]
    recording: PathBuf,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
    /// How fast to replay.
    #[arg(long, value_enum, default_value = "max")]
    speed: Speed,
    /// Memory of the pages' machine instead of the recorded one, as in 512M or 2G. Blocks from before the
    /// recording are then stood in for by others of their order.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    memory: Option<u64>,
    /// CPUs of the machines instead of the recorded number. Each recorded CPU keeps a thread of its own.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    cpus: Option<u16>,
    /// Leave out all but pages: the objects of kmalloc and kmem_cache_alloc, vmalloc areas, per-CPU memory.
    #[arg(long)]
    pages_only: bool,
    /// Replay every page event on one thread, in the recorded order.
    #[arg(long)]
    single_thread: bool,
    /// Where to write the HTML report.
    #[arg(long, value_name = "PATH", default_value = "kmem-replay.html")]
    report: PathBuf,
    /// Record what kmem itself did, events of pages and of objects, to a .kmr file that can be replayed in its turn.
    /// This replay is slower then: no request takes a fast path, and CPUs have no magazines of objects.
    #[arg(long, value_name = "FILE")]
    record: Option<PathBuf>,
    /// Write no HTML report.
    #[arg(long, conflicts_with = "report")]
    no_report: bool,
    /// No progress bar.
    #[arg(long, short)]
    quiet: bool,
}

fn parse_size(s: &str) -> Result<u64, String> {
    let (digits, unit) = match s.find(|c: char| !c.is_ascii_digit()) {
        Some(i) => s.split_at(i),
        None => (s, ""),
    };
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        _ => return Err(format!("unknown unit {unit:?}: use K, M, G or T")),
    };
    let n: u64 = digits.parse().map_err(|_| format!("{digits:?} is not a number"))?;
    n.checked_shl(shift)
        .filter(|v| v >> shift == n && *v > 0 && *v <= MAX_MEMORY)
        .ok_or_else(|| "a machine has more than nothing and less than 16T".to_string())
}

/// More than frame numbers of 32 bits reach.
const MAX_MEMORY: u64 = (1 << 44) - (1 << 22);

/// Runs the command.
pub fn run(args: &Args) -> anyhow::Result<()> {
    if !args.no_report {
        html::check(&args.report)?;
    }
    if let Some(path) = &args.record {
        record::check(path, &args.recording)?;
    }
    let recording = Recording::open(&args.recording)?;
    let file = args.recording.display();
    let mut plan = plan::Plan::new(&recording);
    if plan.events == 0 {
        bail!("{file}: no page events to replay");
    }
    if plan.nr_cpus().max(recording.meta.cpus as usize) > MAX_CPUS {
        bail!(
            "{file}: events of CPU {}; a machine has at most {MAX_CPUS} CPUs",
            plan.nr_cpus().max(recording.meta.cpus as usize) - 1
        );
    }
    let (machine, start) = machine::build(&recording, &plan, args.memory, args.cpus)
        .with_context(|| format!("{file}: cannot build the machine"))?;
    strays::forget(&recording, &mut plan, &start);
    let tape = match args.record {
        Some(_) => Some(record::Tape::pages(&machine, plan.events)?),
        None => None,
    };
    let run = engine::run(&machine, &plan, start.blocks(), args)?;
    let pages = tape.map(record::Tape::stop).transpose()?;
    let cpus = machine.hosted().shape().cpus.len();
    let mut result = result::ReplayResult::new(&recording, &plan, &machine, &start, run, args)?;
    drop(machine);
    let mut objects = objects::Replayed::default();
    if !args.pages_only {
        objects = objects::replay(&recording, cpus, args)
            .with_context(|| format!("{file}: cannot replay the objects"))?;
    }
    (result.slab, result.linux_slab) = (objects.slab, objects.linux);
    if !args.pages_only {
        let rows = result::sample_rows(&recording, &result);
        let areas = areas::replay(&recording, cpus, &rows, args)
            .with_context(|| format!("{file}: cannot replay areas and per-CPU memory"))?;
        (result.vmalloc, result.linux_vmalloc, result.percpu) =
            (areas.vmalloc, areas.linux, areas.percpu);
    }
    if let (Some(path), Some(pages)) = (&args.record, pages) {
        record::write(path, pages, objects.taken, |cache| objects.constructors.contains(cache))?;
        eprintln!("recording: {}", path.display());
    }
    let text =
        if args.json { serde_json::to_string(&result)? + "\n" } else { print::text(&result) };
    print(&text).context("cannot write to standard output")?;
    if !args.no_report {
        html::write(&result, &args.report)?;
        eprintln!("report: {}", args.report.display());
    }
    Ok(())
}

/// Prints, unless nobody is there to read.
fn print(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        done => done,
    }
}
