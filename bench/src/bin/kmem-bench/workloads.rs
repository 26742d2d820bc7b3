//! Workloads on one thread: how to make a turn out of a contender.
//!
//! # Concepts
//! Setting up is not measured. A contender that cannot be set up in time, or would need too much of the
//! host's memory, takes no turns and says why.
//!
//! # Locking
//! None.

use crate::Run;
use anyhow::{Result, bail};
use kmem_bench::{
    BULK, Frames, PAGE_SIZE,
    contest::{Turn, calibrate, ns_per_op},
    workload::{self, Fill},
};
use std::time::Instant;

/// A workload.
pub trait Workload {
    /// The names of its rows.
    fn rows(&self) -> Vec<String>;

    /// Turns in one walk, and whether a walk is made before any counts.
    fn legs(&self) -> usize {
        1
    }

    /// Whether it takes so much of the memory that a contender that writes into free memory would fill
    /// the host's.
    fn fills(&self) -> bool {
        false
    }

    /// The turns of a contender that has `bytes` of memory.
    fn turn<'a, F: Frames + 'a>(&self, f: F, bytes: u64, run: &Run) -> Result<Turn<'a>>
    where
        F::Block: 'a;
}

/// A block of one order taken and given back, with one frame in use: memory that is all free would make a
/// buddy allocator split and merge through every order there is, which memory in use never does.
pub struct Pairs {
    pub order: u32,
}

impl Workload for Pairs {
    fn rows(&self) -> Vec<String> {
        vec![format!("order {} pair", self.order)]
    }

    fn turn<'a, F: Frames + 'a>(&self, mut f: F, _bytes: u64, run: &Run) -> Result<Turn<'a>>
    where
        F::Block: 'a,
    {
        let order = self.order;
        if f.alloc(0).is_none() {
            bail!("no memory");
        }
        let n = calibrate(run.turn, |n| workload::pairs(&mut f, order, n));
        Ok(Box::new(move || Ok(vec![ns_per_op(n, || workload::pairs(&mut f, order, n))])))
    }
}

/// A thousand frames taken, then given back in the same order.
pub struct Batch;

impl Workload for Batch {
    fn rows(&self) -> Vec<String> {
        ["alloc", "free"].map(|what| format!("order 0 batch of 1000, {what}")).to_vec()
    }

    fn turn<'a, F: Frames + 'a>(&self, mut f: F, _bytes: u64, run: &Run) -> Result<Turn<'a>>
    where
        F::Block: 'a,
    {
        const COUNT: usize = 1000;
        let mut blocks = Vec::with_capacity(COUNT);
        let mut batch = move || {
            blocks.clear();
            let count = COUNT as u64;
            let alloc = ns_per_op(count, || workload::take(&mut f, &mut blocks, COUNT));
            let free = ns_per_op(count, || workload::give(&mut f, &blocks));
            (alloc, free)
        };
        let times = calibrate(run.turn, |n| (0..n).for_each(|_| _ = batch()));
        Ok(Box::new(move || {
            let (mut alloc, mut free) = (0.0, 0.0);
            for _ in 0..times {
                let (a, f) = batch();
                alloc += a;
                free += f;
            }
            Ok(vec![alloc / times as f64, free / times as f64])
        }))
    }
}

/// 64 frames at once, back at once; peers have no such calls and make 64.
pub struct Bulk;

impl Workload for Bulk {
    fn rows(&self) -> Vec<String> {
        vec!["bulk 64, per frame".to_owned()]
    }

    fn turn<'a, F: Frames + 'a>(&self, mut f: F, _bytes: u64, run: &Run) -> Result<Turn<'a>>
    where
        F::Block: 'a,
    {
        let mut blocks = [None; BULK];
        let n = calibrate(run.turn, |n| workload::bulk(&mut f, &mut blocks, n));
        let ops = n * BULK as u64;
        Ok(Box::new(move || Ok(vec![ns_per_op(ops, || workload::bulk(&mut f, &mut blocks, n))])))
    }
}

/// Nine tenths of the memory taken in single frames, which are then given back in random order.
pub struct RandomFree {
    pub legs: usize,
}

impl Workload for RandomFree {
    fn rows(&self) -> Vec<String> {
        vec!["order 0 free in random order".to_owned()]
    }

    fn legs(&self) -> usize {
        self.legs
    }

    fn fills(&self) -> bool {
        true
    }

    fn turn<'a, F: Frames + 'a>(&self, mut f: F, bytes: u64, _run: &Run) -> Result<Turn<'a>>
    where
        F::Block: 'a,
    {
        let legs = self.legs;
        let count = workload::nearly_all(usize::try_from(bytes / PAGE_SIZE)?) / legs * legs;
        let mut blocks = Vec::with_capacity(count);
        workload::take(&mut f, &mut blocks, count);
        if blocks.len() != count {
            bail!("has only {} of {count} frames", blocks.len());
        }
        workload::shuffle(&mut blocks);
        let mut leg = 0;
        Ok(Box::new(move || {
            if leg == legs {
                leg = 0;
                blocks.clear();
                workload::take(&mut f, &mut blocks, count);
                workload::shuffle(&mut blocks);
            }
            let part = &blocks[leg * (count / legs)..][..count / legs];
            leg += 1;
            Ok(vec![ns_per_op(part.len() as u64, || workload::give(&mut f, part))])
        }))
    }
}

/// Blocks of orders 0 to 4 replaced at random in memory that is four fifths full.
pub struct Mixed;

impl Workload for Mixed {
    fn rows(&self) -> Vec<String> {
        vec!["mixed orders, 80 % full".to_owned()]
    }

    fn fills(&self) -> bool {
        true
    }

    fn turn<'a, F: Frames + 'a>(&self, mut f: F, bytes: u64, run: &Run) -> Result<Turn<'a>>
    where
        F::Block: 'a,
    {
        let frames = usize::try_from(bytes / PAGE_SIZE)?;
        let (start, patience) = (Instant::now(), run.patience);
        let give_up = || start.elapsed() > patience;
        let fill = Fill::four_fifths(frames, 1);
        let script = frames.clamp(1 << 16, 1 << 20);
        let Some(mut state) = workload::Mixed::set_up(&mut f, fill, script, give_up) else {
            bail!(
                "takes more than {} ms to fill the memory with mixed orders",
                patience.as_millis()
            );
        };
        let n = calibrate(run.turn, |n| state.run(&mut f, n as usize));
        Ok(Box::new(move || Ok(vec![ns_per_op(n, || state.run(&mut f, n as usize))])))
    }
}
