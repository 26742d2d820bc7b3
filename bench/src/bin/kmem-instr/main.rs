//! Runs operations for callgrind to count instructions in: `cargo xtask budgets` starts it.
//!
//! # Concepts
//! Everything measured happens inside one function with a known symbol; see [`kmem_bench::plan`]. Set-up
//! and warm-up are outside. The operations run single-threaded and draw nothing from the clock, so the
//! counts repeat exactly.
//!
//! # Locking
//! One thread.

mod highmem;
mod objects;
mod percpu;
mod stacks;
mod vmalloc;

use anyhow::{Context, Result, bail};
use bitmap_allocator::BitAlloc64K;
use clap::{Parser, ValueEnum};
use kmem::platform::Platform;
use kmem_bench::{
    BULK, Bitmap, BuddyAllocFrames, BuddySlab, BuddySystem, Frames, KmemFrames, KmemPages, Null,
    PAGE_SIZE, machine,
    plan::Step,
    workload::{self, Fill, Mixed},
};
use kmem_hosted::Machine;
use std::{
    hint::black_box,
    io::{Write, stdout},
};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// What to measure.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Group {
    /// Pairs, batches, bulk, `this_cpu`.
    Hot,
    /// Random frees and mixed orders at 64 MiB.
    Small,
    /// The same at 16 GiB.
    Large,
    /// Order-0 and order-9 pairs of the peers.
    Peers,
}

/// Runs operations for callgrind to count instructions in.
#[derive(Parser)]
struct Args {
    /// Groups of operations.
    #[arg(long, value_delimiter = ',', default_values = ["hot", "small", "large"])]
    groups: Vec<Group>,
    /// Only operations whose name contains this.
    #[arg(long, default_value = "")]
    only: String,
}

/// What callgrind counts in.
#[unsafe(no_mangle)]
#[inline(never)]
fn kmem_instr_measured(work: &mut dyn FnMut()) {
    work();
}

/// Runs steps and says which.
struct Recorder {
    only: String,
}

impl Recorder {
    fn wants(&self, op: &str) -> bool {
        op.contains(&self.only)
    }

    /// One measured call that does an operation `ops` times.
    fn step(&self, op: &str, contender: &str, ops: u64, mut work: impl FnMut()) -> Result<()> {
        kmem_instr_measured(&mut work);
        let step = Step { op: op.to_owned(), contender: contender.to_owned(), ops };
        writeln!(stdout(), "{}", serde_json::to_string(&step)?).context("cannot write a step")
    }

    /// Two measured calls with different counts, after a warm-up.
    fn twice(&self, op: &str, contender: &str, per: u64, mut work: impl FnMut(u64)) -> Result<()> {
        if !self.wants(op) {
            return Ok(());
        }
        const N: u64 = 1024;
        work(N);
        self.step(op, contender, N * per, || work(N))?;
        self.step(op, contender, 3 * N * per, || work(3 * N))
    }
}

/// Hot pairs of each of the given orders, with one frame in use: memory that is all free would make a
/// pair split and merge through every order there is.
fn pairs<F: Frames>(r: &Recorder, who: &str, f: &mut F, orders: &[u32]) -> Result<()> {
    let Some(held) = f.alloc(0) else { bail!("{who} has no memory") };
    for &order in orders {
        r.twice(&format!("order-{order}-pair"), who, 1, |n| workload::pairs(f, order, n))?;
    }
    f.free(held, 0);
    Ok(())
}

/// `count` frames taken, then given back, again and again: allocations and frees counted apart.
fn batch<F: Frames>(r: &Recorder, who: &str, f: &mut F, name: &str, count: usize) -> Result<()> {
    let (alloc, free) = (format!("{name}-alloc"), format!("{name}-free"));
    if !r.wants(&alloc) && !r.wants(&free) {
        return Ok(());
    }
    let rounds = 16;
    let mut blocks = Vec::with_capacity(count);
    for round in 0..2 * rounds {
        if round < rounds {
            workload::take(f, &mut blocks, count);
        } else {
            r.step(&alloc, who, count as u64, || workload::take(f, &mut blocks, count))?;
        }
        if blocks.len() != count {
            bail!("{who} has only {} frames of {count}", blocks.len());
        }
        if round < rounds {
            workload::give(f, &blocks);
        } else {
            r.step(&free, who, count as u64, || workload::give(f, &blocks))?;
        }
        blocks.clear();
    }
    Ok(())
}

/// Pairs through the calls for single pages.
fn page_pairs<F: Frames>(r: &Recorder, who: &str, f: &mut F) -> Result<()> {
    let Some(held) = f.alloc(0) else { bail!("{who} has no memory") };
    r.twice("page-pair", who, 1, |n| workload::pairs(f, 0, n))?;
    f.free(held, 0);
    Ok(())
}

fn hot<F: Frames>(r: &Recorder, who: &str, f: &mut F) -> Result<()> {
    pairs(r, who, f, &[0, 1, 2, 3, 4, 9, 10])?;
    let mut blocks = [None; BULK];
    let per = BULK as u64;
    r.twice("bulk-64", who, per, |n| workload::bulk(f, &mut blocks, n))?;
    r.twice("bulk-64-single-frees", who, per, |n| {
        workload::bulk_then_frees(f, &mut blocks, n);
    })?;
    batch(r, who, f, "hot-16", 16)?;
    batch(r, who, f, "batch-1000", 1000)?;
    batch(r, who, f, "refill-drain-4096", 4096)
}

/// Nearly all memory taken, then freed in random order; then mixed orders at four fifths.
fn full<F: Frames>(r: &Recorder, who: &str, f: &mut F, bytes: u64, size: &str) -> Result<()> {
    let frames = usize::try_from(bytes / PAGE_SIZE)?;
    let count = workload::nearly_all(frames);
    let (fill, free) = (format!("fill-{size}"), format!("random-free-{size}"));
    if r.wants(&free) || r.wants(&fill) {
        let mut blocks = Vec::with_capacity(count);
        r.step(&fill, who, count as u64, || workload::take(f, &mut blocks, count))?;
        if blocks.len() != count {
            bail!("{who} has only {} frames of {count} at {size}", blocks.len());
        }
        workload::shuffle(&mut blocks);
        r.step(&free, who, count as u64, || workload::give(f, &blocks))?;
    }
    let mixed = format!("mixed-80-{size}");
    if r.wants(&mixed) {
        let ops = (frames / 16).clamp(4096, 65536);
        let fill = Fill::four_fifths(frames, 1);
        let Some(mut state) = Mixed::set_up(f, fill, 4 * ops, || false) else { return Ok(()) };
        state.run(f, ops);
        r.step(&mixed, who, ops as u64, || state.run(f, ops))?;
        r.step(&mixed, who, 2 * ops as u64, || state.run(f, 2 * ops))?;
        let empty = state.empty();
        if empty > frames / 100 {
            bail!("{who} could not serve {empty} of the mixed requests at {size}");
        }
        state.tear_down(f);
    }
    Ok(())
}

/// Runs `f` on the first CPU of a machine.
fn on_cpu(bytes: u64, f: impl FnOnce(&Machine) -> Result<()>) -> Result<()> {
    let m = machine(bytes)?;
    m.run_on(Some(0), None, |_process| f(&m))?
}

fn run(args: &Args, group: Group) -> Result<()> {
    let r = Recorder { only: args.only.clone() };
    let (kmem, null) = ("kmem", "harness");
    match group {
        Group::Hot => {
            hot(&r, null, &mut Null)?;
            page_pairs(&r, null, &mut Null)?;
            r.twice("this-cpu", null, 1, |n| {
                for _ in 0..n {
                    black_box(0_usize);
                }
            })?;
            objects::harness(&r)?;
            objects::run(&r, kmem)?;
            percpu::harness(&r)?;
            percpu::run(&r, kmem)?;
            stacks::harness(&r)?;
            stacks::run(&r, kmem)?;
            vmalloc::harness(&r)?;
            vmalloc::run(&r, kmem)?;
            highmem::harness(&r)?;
            highmem::run(&r, kmem)?;
            on_cpu(GIB, |m| {
                hot(&r, kmem, &mut KmemFrames(m))?;
                page_pairs(&r, kmem, &mut KmemPages(m))?;
                let hosted = m.hosted();
                r.twice("this-cpu", kmem, 1, |n| {
                    for _ in 0..n {
                        black_box(hosted.this_cpu());
                    }
                })
            })
        }
        Group::Small => {
            full(&r, null, &mut Null, 64 * MIB, "64mib")?;
            on_cpu(64 * MIB, |m| full(&r, kmem, &mut KmemFrames(m), 64 * MIB, "64mib"))
        }
        Group::Large => {
            full(&r, null, &mut Null, 16 * GIB, "16gib")?;
            on_cpu(16 * GIB, |m| full(&r, kmem, &mut KmemFrames(m), 16 * GIB, "16gib"))
        }
        Group::Peers => {
            let b = 64 * MIB;
            let o = &[0, 9];
            pairs(&r, null, &mut Null, o)?;
            on_cpu(b, |m| pairs(&r, kmem, &mut KmemFrames(m), o))?;
            pairs(&r, "buddy-slab-allocator", &mut BuddySlab::new(b)?, o)?;
            pairs(&r, "bitmap-allocator", &mut Bitmap::<BitAlloc64K>::new(b)?, o)?;
            pairs(&r, "buddy_system_allocator", &mut BuddySystem::new(b)?, o)?;
            pairs(&r, "buddy-alloc", &mut BuddyAllocFrames::new(b)?, o)
        }
    }
}

fn main() -> Result<()> {
    let args = Args::parse();
    args.groups.iter().try_for_each(|group| run(&args, *group))
}
