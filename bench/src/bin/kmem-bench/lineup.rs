//! All contenders of a size.
//!
//! # Concepts
//! Each contest starts with fresh allocators. kmem's machine has one zone and no contents; the thread
//! is on its first CPU for as long as the contest lasts, which costs the peers nothing.
//!
//! # Locking
//! None.

use crate::{Run, workloads::Workload};
use anyhow::{Result, bail};
use bitmap_allocator::{BitAlloc1M, BitAlloc16M, BitAlloc64K};
use kmem_bench::{
    Bitmap, BuddyAllocFrames, BuddySlab, BuddySystem, KmemFrames, Null,
    contest::{self, Contestant, Turn},
    report::{HARNESS, KMEM, Row},
    used_machine,
};

/// Beyond this a contender that writes into free memory is not filled.
const FILL_LIMIT: u64 = 1 << 30;

/// Frames of the bitmaps, in bytes of memory.
const BITMAP_64K: u64 = 1 << 28;
const BITMAP_1M: u64 = 1 << 32;

fn bitmap<'a, W: Workload>(w: &W, bytes: u64, run: &Run) -> Result<Turn<'a>> {
    if bytes <= BITMAP_64K {
        w.turn(Bitmap::<BitAlloc64K>::new(bytes)?, bytes, run)
    } else if bytes <= BITMAP_1M {
        w.turn(Bitmap::<BitAlloc1M>::new(bytes)?, bytes, run)
    } else {
        w.turn(Bitmap::<BitAlloc16M>::new(bytes)?, bytes, run)
    }
}

fn buddy_alloc<'a, W: Workload>(w: &W, bytes: u64, run: &Run) -> Result<Turn<'a>> {
    if w.fills() && bytes > FILL_LIMIT {
        bail!("writes into free memory, so it is not filled beyond 1 GiB");
    }
    w.turn(BuddyAllocFrames::new(bytes)?, bytes, run)
}

/// Runs a workload on one thread for everyone.
pub fn single<W: Workload>(run: &mut Run, w: &W, bytes: u64) -> Result<()> {
    let rows = w.rows();
    if !rows.iter().any(|row| run.wants(row)) {
        return Ok(());
    }
    run.at(&rows[0], bytes);
    let m = used_machine(bytes)?;
    let samples = m.run_on(Some(0), None, |_process| {
        let contestants = vec![
            Contestant { name: KMEM, turn: w.turn(KmemFrames(&m), bytes, run) },
            Contestant {
                name: "buddy-slab-allocator",
                turn: BuddySlab::new(bytes).and_then(|f| w.turn(f, bytes, run)),
            },
            Contestant { name: "bitmap-allocator", turn: bitmap(w, bytes, run) },
            Contestant {
                name: "buddy_system_allocator",
                turn: BuddySystem::new(bytes).and_then(|f| w.turn(f, bytes, run)),
            },
            Contestant { name: "buddy-alloc", turn: buddy_alloc(w, bytes, run) },
            Contestant { name: HARNESS, turn: w.turn(Null, bytes, run) },
        ];
        // A walk of several legs is long enough to warm up by itself, and too long to make often.
        let (legs, once) = (w.legs(), w.legs() > 1);
        let walks = if once { 1 } else { run.rounds };
        contest::run(contestants, legs, walks, !once, || run.bar.inc(1))
    })??;
    for (i, row) in rows.iter().enumerate() {
        run.report.rows.push(Row::new(row, bytes, 1, &samples, i));
    }
    Ok(())
}
