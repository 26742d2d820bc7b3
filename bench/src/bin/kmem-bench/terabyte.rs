//! What is measured of kmem alone: a terabyte, bring-up, the size of its tables.
//!
//! # Concepts
//! Tables are backed by host memory when touched, 4 KiB at a time, so a terabyte's worth can be used as
//! long as what is touched is few frames, or large blocks. Mixed orders are therefore measured with most
//! of the memory in blocks of the largest order, taken at random places, and one hundredth in small
//! blocks.
//!
//! # Locking
//! None.

use crate::{
    Run,
    workloads::{Batch, Bulk, Pairs, Workload},
};
use anyhow::{Context, Result, bail};
use kmem::{Config, GFP_KERNEL, Page, types::Pfn};
use kmem_bench::{
    Frames, KmemFrames, Null, PAGE_SIZE,
    contest::{self, Contestant, Samples, Turn, calibrate, median, ns_per_op},
    machine, numbers_only,
    report::{Fact, HARNESS, KMEM, Row, size},
    workload::{self, Fill, Mixed},
};
use kmem_hosted::{Machine, Shape};
use std::{fs, time::Instant};

const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

/// Order that bring-up is tried with, and that fills a terabyte.
const BLOCK: u32 = 10;

fn record(run: &mut Run, rows: &[String], bytes: u64, samples: &[Samples]) {
    for (i, row) in rows.iter().enumerate() {
        run.report.rows.push(Row::new(row, bytes, 1, samples, i));
    }
}

/// A workload of [`crate::workloads`] for kmem alone.
fn alone<W: Workload>(run: &mut Run, w: &W, bytes: u64) -> Result<()> {
    let rows = w.rows();
    if !rows.iter().any(|row| run.wants(row)) {
        return Ok(());
    }
    run.at(&rows[0], bytes);
    let m = machine(bytes)?;
    let samples = m.run_on(Some(0), None, |_process| {
        let contestants = vec![
            Contestant { name: KMEM, turn: w.turn(KmemFrames(&m), bytes, run) },
            Contestant { name: HARNESS, turn: w.turn(Null, bytes, run) },
        ];
        contest::run(contestants, w.legs(), run.rounds, true, || run.bar.inc(1))
    })??;
    record(run, &rows, bytes, &samples);
    Ok(())
}

/// Single frames at random places of the whole memory, given back in random order.
fn scattered(run: &mut Run, bytes: u64) -> Result<()> {
    const COUNT: usize = 1 << 17;
    let row = "order 0 free, scattered frames".to_owned();
    if !run.wants(&row) {
        return Ok(());
    }
    run.at(&row, bytes);
    let m = machine(bytes)?;
    let mut rng = fastrand::Rng::with_seed(bytes);
    let frames = u32::try_from(bytes / PAGE_SIZE)?;
    let pfns: Vec<Pfn> = (0..COUNT).map(|_| Pfn(rng.u32(..frames))).collect();
    let turn: Turn<'_> = Box::new(|| {
        // A frame drawn twice is had once.
        let mut blocks: Vec<&Page> =
            pfns.iter().filter_map(|pfn| m.alloc_pages_at(*pfn, 0, GFP_KERNEL).ok()).collect();
        workload::shuffle(&mut blocks);
        let ops = blocks.len() as u64;
        let ns = ns_per_op(ops, || workload::give(&mut KmemFrames(&m), &blocks));
        // What stayed on the CPU's lists would not be found at its place next time.
        m.drain_all_pages();
        Ok(vec![ns])
    });
    let contestants = vec![Contestant { name: KMEM, turn: Ok(turn) }];
    let samples = m.run_on(Some(0), None, |_process| {
        contest::run(contestants, 1, run.rounds, true, || run.bar.inc(1))
    })??;
    record(run, &[row], bytes, &samples);
    Ok(())
}

/// Mixed orders with four fifths of a terabyte in use.
fn mixed(run: &mut Run) -> Result<()> {
    let row = "mixed orders, 80 % full".to_owned();
    if !run.wants(&row) {
        return Ok(());
    }
    run.at(&row, TIB);
    let m = machine(TIB)?;
    let samples = m.run_on(Some(0), None, |_process| {
        let mut f = KmemFrames(&m);
        let frames = usize::try_from(TIB / PAGE_SIZE)?;
        let all = frames >> BLOCK;
        let mut blocks = Vec::with_capacity(all);
        while blocks.len() < all / 100 * 99 {
            blocks.push(f.alloc(BLOCK).context("a terabyte ran out of its largest blocks")?);
        }
        workload::shuffle(&mut blocks);
        for block in blocks.drain(all / 100 * 79..) {
            f.free(block, BLOCK);
        }
        let fill = Fill { peak: frames / 100 * 12 / 10, keep: frames / 100 };
        let Some(mut state) = Mixed::set_up(&mut f, fill, 1 << 20, || false) else {
            bail!("mixed orders were given up");
        };
        let n = calibrate(run.turn, |n| state.run(&mut f, n as usize));
        let turn: Turn<'_> =
            Box::new(move || Ok(vec![ns_per_op(n, || state.run(&mut f, n as usize))]));
        let contestants = vec![Contestant { name: KMEM, turn: Ok(turn) }];
        contest::run(contestants, 1, run.rounds, true, || run.bar.inc(1))
    })??;
    record(run, &[row], TIB, &samples);
    Ok(())
}

/// Takes the first, the middle and the last large block of every zone.
fn probe(m: &Machine) -> Result<usize> {
    let mut taken = 0;
    for zone in m.zones() {
        let span = zone.spanned();
        let first = span.start.next_multiple_of(1 << BLOCK);
        let last = Pfn(span.end).align_down(BLOCK).0 - (1 << BLOCK);
        let middle = Pfn(first + (last - first) / 2).align_down(BLOCK).0;
        for pfn in [first, middle, last] {
            m.alloc_pages_at(Pfn(pfn), BLOCK, GFP_KERNEL)
                .map_err(|e| anyhow::anyhow!("{}: no block at frame {pfn:#x}: {e}", zone.name()))?;
            taken += 1;
        }
    }
    Ok(taken)
}

fn bring_up(run: &mut Run) -> Result<()> {
    let name = "bring-up of 1 TiB and 3 blocks of every zone";
    if !run.wants(name) {
        return Ok(());
    }
    run.at(name, TIB);
    let mut times = Vec::new();
    for _ in 0..run.rounds {
        let start = Instant::now();
        let shape = Shape::x86_64(TIB).without_contents();
        let m = Machine::without_kswapd(shape, Config::default())?;
        let taken = m.run_on(Some(0), None, |_process| probe(&m))??;
        times.push(start.elapsed().as_secs_f64() * 1000.0);
        if taken != 3 * m.zones().len() {
            bail!("{taken} blocks of {} zones", m.zones().len());
        }
        run.bar.inc(1);
    }
    run.report.facts.push(Fact {
        name: name.to_owned(),
        value: median(times),
        unit: "ms",
        must: Some(1000.0),
        goal: Some(50.0),
    });
    Ok(())
}

/// Bytes of address space that the process uses.
fn address_space() -> Result<u64> {
    let text = fs::read_to_string("/proc/self/statm").context("cannot read /proc/self/statm")?;
    let pages: u64 = text.split(' ').next().unwrap_or("").parse().context("/proc/self/statm")?;
    Ok(pages * rustix::param::page_size() as u64)
}

fn metadata(run: &mut Run) -> Result<()> {
    let name = "metadata per frame";
    if !run.wants(name) {
        return Ok(());
    }
    let fact = |name: String, value: f64| Fact {
        name,
        value,
        unit: "bytes",
        must: Some(40.0),
        goal: Some(32.0),
    };
    run.report.facts.push(fact(format!("{name}, the page"), size_of::<Page>() as f64));
    for bytes in [GIB, 16 * GIB, TIB] {
        let before = address_space()?;
        let m = Machine::without_kswapd(numbers_only(bytes), Config::default())?;
        // A machine without contents takes address space for its tables only.
        let tables = address_space()?.saturating_sub(before);
        drop(m);
        let value = tables as f64 / (bytes / PAGE_SIZE) as f64;
        run.report.facts.push(fact(format!("{name}, all tables, {}", size(bytes)), value));
    }
    Ok(())
}

/// All of it.
pub fn run(run: &mut Run, quick: bool) -> Result<()> {
    if !quick {
        scattered(run, 16 * GIB)?;
    }
    for order in [0, 3, 9] {
        alone(run, &Pairs { order }, TIB)?;
    }
    alone(run, &Batch, TIB)?;
    alone(run, &Bulk, TIB)?;
    if !quick {
        scattered(run, TIB)?;
        mixed(run)?;
    }
    bring_up(run)?;
    metadata(run)
}
