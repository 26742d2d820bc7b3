//! Addresses alone: areas that come and go among few and many others.
//!
//! # Concepts
//! An operation takes a range of 1 to 16 pages and gives a random one of those in use back. kmem's areas have a guard
//! page each and are listed; nothing is mapped on this machine.
//!
//! # Locking
//! A spin lock around each peer: areas may be had by several CPUs at once.

use crate::{Run, absent, failed, on_cpus};
use anyhow::{Result, bail};
use kmem::{Config, Kmem};
use kmem_bench::{
    contest::Contestant,
    crew::{Crew, Making},
    report::{HARNESS, KMEM},
    work::{Work, timed},
};
use kmem_hosted::{Hosted, Machine, Shape};
use offset_allocator::Allocation;
use std::{
    mem,
    ptr::with_exposed_provenance,
    time::{Duration, Instant},
};
use vm_allocator::{AddressAllocator, AllocPolicy, RangeInclusive};

const PAGE: u64 = kmem_bench::PAGE_SIZE;
/// Addresses there are.
const SPACE: u64 = 64 << 30;
/// Pages of the largest range.
const MOST: u32 = 16;
const SEED: u64 = 0x006b_6d65_6d00_0003;
/// Replacements before anything is measured, at most.
const MIXED: usize = 100_000;

/// Who has ranges of addresses.
trait Ranges: Send {
    /// What names a range.
    type Held: Send;

    /// Takes a range of so many pages.
    fn take(&mut self, pages: u32) -> Option<Self::Held>;

    /// Gives one back.
    fn give(&mut self, held: Self::Held);
}

/// kmem's `get_vm_area` and `vunmap`.
struct Areas<'a>(&'a Kmem<Hosted>);

impl Ranges for Areas<'_> {
    type Held = usize;

    fn take(&mut self, pages: u32) -> Option<usize> {
        let at = self.0.get_vm_area(pages as usize * PAGE as usize).ok()?;
        Some(at.expose_provenance().get())
    }

    fn give(&mut self, held: usize) {
        // SAFETY: nothing is mapped there.
        if let Err(e) = unsafe { self.0.vunmap(with_exposed_provenance(held)) } {
            failed("vunmap", &e);
        }
    }
}

impl Ranges for spin::Mutex<AddressAllocator> {
    type Held = RangeInclusive;

    fn take(&mut self, pages: u32) -> Option<RangeInclusive> {
        self.lock().allocate(u64::from(pages) * PAGE, PAGE, AllocPolicy::FirstMatch).ok()
    }

    fn give(&mut self, held: RangeInclusive) {
        if let Err(e) = self.lock().free(&held) {
            failed("vm-allocator's free", &e);
        }
    }
}

impl Ranges for spin::Mutex<range_alloc::RangeAllocator<u64>> {
    type Held = std::ops::Range<u64>;

    fn take(&mut self, pages: u32) -> Option<Self::Held> {
        self.lock().allocate_range(pages.into()).ok()
    }

    fn give(&mut self, held: Self::Held) {
        self.lock().free_range(held);
    }
}

impl Ranges for spin::Mutex<offset_allocator::Allocator> {
    type Held = Allocation;

    fn take(&mut self, pages: u32) -> Option<Allocation> {
        self.lock().allocate(pages)
    }

    fn give(&mut self, held: Allocation) {
        self.lock().free(held);
    }
}

/// Hands out nothing.
struct Nothing;

impl Ranges for Nothing {
    type Held = u32;

    fn take(&mut self, pages: u32) -> Option<u32> {
        Some(std::hint::black_box(pages))
    }

    fn give(&mut self, held: u32) {
        std::hint::black_box(held);
    }
}

/// Ranges in use, replaced at random.
struct Replace<R: Ranges> {
    ranges: R,
    held: Vec<R::Held>,
    rng: fastrand::Rng,
}

impl<R: Ranges> Replace<R> {
    /// With `live` ranges in use, if that takes no longer than `patience`.
    fn new(ranges: R, live: usize, patience: Duration) -> Result<Replace<R>> {
        let begin = Instant::now();
        let rng = fastrand::Rng::with_seed(SEED);
        let mut all = Replace { ranges, held: Vec::with_capacity(live), rng };
        let late = |i: usize, all: &mut Replace<R>| {
            let late = i.is_multiple_of(64) && begin.elapsed() > patience;
            if late {
                all.held.drain(..).for_each(|held| all.ranges.give(held));
            }
            late
        };
        for i in 0..live {
            if late(i, &mut all) {
                bail!("{i} of {live} ranges after {patience:?}");
            }
            let pages = all.rng.u32(1..=MOST);
            let Some(held) = all.ranges.take(pages) else { bail!("only {i} ranges of {live}") };
            all.held.push(held);
        }
        for i in 0..live.min(MIXED) {
            if late(i, &mut all) {
                bail!("{i} replacements among {live} ranges after {patience:?}");
            }
            all.replace();
        }
        Ok(all)
    }

    #[inline(always)]
    fn replace(&mut self) {
        let pages = self.rng.u32(1..=MOST);
        let Some(new) = self.ranges.take(pages) else { failed("taking a range", &"no addresses") };
        let at = self.rng.usize(..self.held.len());
        let old = mem::replace(&mut self.held[at], new);
        self.ranges.give(old);
    }
}

impl<R: Ranges> Work for Replace<R> {
    #[inline(never)]
    fn run(&mut self, n: u64) -> Duration {
        timed(|| (0..n).for_each(|_| self.replace()))
    }

    fn end(mut self: Box<Self>) {
        self.held.drain(..).for_each(|held| self.ranges.give(held));
    }
}

/// Fills on the crew's thread.
fn contender<'c, 'a: 'c, R: Ranges + 'a>(
    run: &Run,
    crew: &'c Crew<'a>,
    row: (&str, usize),
    name: &'static str,
    ranges: R,
    live: usize,
) -> Contestant<'c> {
    let patience = run.patience;
    match crew.on(0, move || Replace::new(ranges, live, patience)).and_then(|filled| filled) {
        Ok(filled) => {
            let mut filled = Some(filled);
            let make = |_| -> Making<'a> {
                let Some(filled) = filled.take() else { failed("a contest", &"one thread") };
                Box::new(|| Box::new(filled))
            };
            run.contender(crew, &[row], name, make)
        }
        Err(e) => absent(name, e),
    }
}

/// Among 10, 10 000 and a million others.
pub fn run(run: &mut Run) -> Result<()> {
    for (live, name) in
        [(10, "range among 10"), (10_000, "range among 10^4"), (1_000_000, "range among 10^6")]
    {
        let row = (name, 1);
        if !run.wants(&[row]) {
            continue;
        }
        let shape = Shape::no_dma(6 << 30).vmalloc(SPACE).without_page_tables();
        let machine = Machine::without_kswapd(shape, Config::default())?;
        on_cpus(&machine, 1, |crew| {
            let pages = SPACE / PAGE;
            let vm = AddressAllocator::new(0, SPACE);
            let offset =
                offset_allocator::Allocator::with_max_allocs(pages as u32, live as u32 * 3 + 1024);
            let all = vec![
                contender(run, crew, row, KMEM, Areas(machine.kmem()), live),
                match vm {
                    Ok(vm) => {
                        let vm = spin::Mutex::new(vm);
                        contender(run, crew, row, "vm-allocator", vm, live)
                    }
                    Err(e) => absent("vm-allocator", e.into()),
                },
                {
                    let ranges = spin::Mutex::new(range_alloc::RangeAllocator::new(0..pages));
                    contender(run, crew, row, "range-alloc", ranges, live)
                },
                contender(run, crew, row, "offset-allocator", spin::Mutex::new(offset), live),
                contender(run, crew, row, HARNESS, Nothing, live),
            ];
            run.contest(&[row], SPACE, all)
        })?;
    }
    Ok(())
}
