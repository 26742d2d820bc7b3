//! Objects: kmalloc and caches.

use super::Recorder;
use anyhow::{Result, anyhow};
use kmem::{Config, Gfp, Kmem, alloc::Cache, slab::SlabFlags};
use kmem_bench::{
    bytes::{
        Bytes, KmemBytes, Same,
        workload::{LARGEST, Larson},
    },
    work::Work,
};
use kmem_hosted::{Hosted, Machine, Shape};
use std::{hint::black_box, ptr::NonNull};

/// Objects of 64 bytes through kmalloc and through a cache: hot pairs, a size that the compiler does not know,
/// and more at once than magazines hold.
pub fn run(r: &Recorder, who: &str) -> Result<()> {
    // Objects need memory that is there.
    let m = Machine::without_kswapd(Shape::x86_64(256 << 20), Config::default())?;
    m.run_on(Some(0), None, |_process| on(r, who, &m))?
}

fn on(r: &Recorder, who: &str, m: &Machine) -> Result<()> {
    let m: &Kmem<Hosted> = m;
    let cache = m.kmem_cache_create("bench", 64, 0, SlabFlags::NO_MERGE, None)?;
    let held = m.kmalloc(64, Gfp::KERNEL)?;
    // SAFETY, for every free below: the object is not used after.
    r.twice("kmalloc-64-pair", who, 1, |n| {
        for _ in 0..n {
            let at = m.kmalloc(64, Gfp::KERNEL).map(NonNull::as_ptr).unwrap_or_default();
            // SAFETY: as above.
            let _ = unsafe { m.kfree(black_box(at)) };
        }
    })?;
    r.twice("kmalloc-any-pair", who, 1, |n| {
        for i in 0..n {
            let size = black_box(8 + (i as usize & 127) * 8);
            let at = m.kmalloc(size, Gfp::KERNEL).map(NonNull::as_ptr).unwrap_or_default();
            // SAFETY: as above.
            let _ = unsafe { m.kfree(black_box(at)) };
        }
    })?;
    r.twice("cache-64-pair", who, 1, |n| {
        for _ in 0..n {
            if let Ok(at) = m.kmem_cache_alloc(&cache, Gfp::KERNEL) {
                // SAFETY: as above.
                let _ = unsafe { m.kmem_cache_free(&cache, black_box(at)) };
            }
        }
    })?;
    let typed = Cache::new(m, "typed", SlabFlags::NO_MERGE)?;
    r.twice("slot-pair", who, 1, |n| {
        for i in 0..n {
            if let Ok(slot) = typed.alloc(i, Gfp::KERNEL) {
                black_box(&*slot);
            }
        }
    })?;
    for round in 0..8 {
        let mut blocks = Vec::with_capacity(4096);
        let mut take = || {
            (0..4096).for_each(|_| blocks.extend(m.kmalloc(64, Gfp::KERNEL)));
        };
        if round < 4 {
            take();
        } else {
            r.step("kmalloc-64-4096-alloc", who, 4096, take)?;
        }
        let give = || {
            for at in &blocks {
                // SAFETY: as above.
                let _ = unsafe { m.kfree(at.as_ptr()) };
            }
        };
        if round < 4 {
            give();
        } else {
            r.step("kmalloc-64-4096-free", who, 4096, give)?;
        }
    }
    // SAFETY: as above.
    let _ = unsafe { m.kfree(held.as_ptr()) };
    larson(r, who, KmemBytes(m))?;
    m.kmem_cache_destroy(cache).map_err(|e| anyhow!("{e}"))
}

/// Objects of mixed sizes, replaced at random.
fn larson<B: Bytes + Send>(r: &Recorder, who: &str, bytes: B) -> Result<()> {
    const WARM: u64 = 1 << 17;
    if !r.wants("larson") {
        return Ok(());
    }
    let mut larson = Box::new(Larson::new(bytes, 0));
    larson.run(WARM);
    r.step("larson", who, WARM, || _ = larson.run(WARM))?;
    r.step("larson", who, 2 * WARM, || _ = larson.run(2 * WARM))?;
    larson.end();
    Ok(())
}

/// What the loops around the objects cost.
pub fn harness(r: &Recorder) -> Result<()> {
    let who = "harness";
    for op in ["kmalloc-64-pair", "cache-64-pair", "slot-pair"] {
        r.twice(op, who, 1, |n| {
            for _ in 0..n {
                black_box(8_usize);
            }
        })?;
    }
    r.twice("kmalloc-any-pair", who, 1, |n| {
        for i in 0..n {
            black_box(8 + (i as usize & 127) * 8);
            black_box(8_usize);
        }
    })?;
    for _ in 0..4 {
        let mut blocks = Vec::with_capacity(4096);
        r.step("kmalloc-64-4096-alloc", who, 4096, || {
            (0..4096).for_each(|i| blocks.push(black_box(i)))
        })?;
        r.step("kmalloc-64-4096-free", who, 4096, || {
            blocks.iter().for_each(|at| {
                black_box(*at);
            });
        })?;
    }
    larson(r, who, Same::new(LARGEST))
}
