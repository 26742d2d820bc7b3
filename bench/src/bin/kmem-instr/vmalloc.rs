//! vmalloc: 64 KiB areas beside few and many others.

use super::Recorder;
use anyhow::{Result, bail};
use kmem::{Config, Kmem};
use kmem_hosted::{Hosted, Machine, Shape};
use std::hint::black_box;

/// Bytes of an area.
const SIZE: usize = 64 << 10;

/// Live areas beside the one that comes and goes, and what the operation is called then.
const BESIDE: [(usize, &str); 3] = [
    (10, "vmalloc-64k-pair"),
    (10_000, "vmalloc-64k-pair-10k"),
    (1_000_000, "vmalloc-64k-pair-1m"),
];

/// Pairs on machines where areas have addresses and nothing is mapped: what page tables cost is the platform's.
/// Those beside are of a frame each, so that a million of them fit.
pub fn run(r: &Recorder, who: &str) -> Result<()> {
    for (beside, op) in BESIDE {
        if r.wants(op) {
            let shape = Shape::no_dma(6 << 30).vmalloc(16 << 30).without_page_tables();
            let m = Machine::without_kswapd(shape, Config::default())?;
            m.run_on(Some(0), None, |_process| on(r, who, &m, beside, op))??;
        }
    }
    Ok(())
}

fn on(r: &Recorder, who: &str, m: &Kmem<Hosted>, beside: usize, op: &str) -> Result<()> {
    for i in 0..beside {
        if m.vmalloc(1).is_err() {
            bail!("only {i} areas of {beside}");
        }
    }
    r.twice(op, who, 1, |n| {
        for _ in 0..n {
            if let Ok(at) = m.vmalloc(black_box(SIZE)) {
                // SAFETY: it is not used after.
                let _ = unsafe { m.vfree(black_box(at.as_ptr())) };
            }
        }
    })?;
    match m.vmalloc(SIZE) {
        Ok(_) => Ok(()),
        Err(e) => bail!("areas were lost: {e}, {:?}", m.audit_vmalloc()),
    }
}

/// What the loop around them costs.
pub fn harness(r: &Recorder) -> Result<()> {
    for (_, op) in BESIDE {
        r.twice(op, "harness", 1, |n| {
            for _ in 0..n {
                black_box(SIZE);
                black_box(SIZE);
            }
        })?;
    }
    Ok(())
}
