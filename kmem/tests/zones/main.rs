//! Zones and nodes \[Z1, Z3, Z5\]: what lies where, and in which order requests look.

mod areas;
mod fallback;
mod layouts;
mod list_sizes;
mod lists;
mod little;
mod nodes;
mod resting;

use kmem::{
    AllocError, Gfp, Page, Pfn,
    context::Task,
    zone::{Watermarks, Zone},
};
use kmem_test_support::Rig;

const MOVABLE: Gfp = Gfp::KERNEL.union(Gfp::MOVABLE);
const QUIET: Gfp = Gfp::NOWARN.union(Gfp::NORETRY);

/// Takes away every watermark, so that a zone can be used up to its last frame.
fn without_marks(rig: &Rig) {
    rig.set_watermark_scale_factor(0);
    rig.set_min_free_kbytes(0);
}

/// Frames on all per-CPU lists of a quiet machine.
fn on_lists(rig: &Rig) -> u64 {
    rig.audit().unwrap().pcp
}

/// Takes so many blocks and gives them back.
fn burst(rig: &Rig, gfp: Gfp, order: u32, n: usize) {
    let held: Vec<_> = (0..n).map(|_| rig.take(gfp, order).unwrap()).collect();
    rig.release(held);
}

/// Puts a zone under pressure: a request finds it below its low watermark, and no free lifts it above the high one.
/// Returns the watermarks to end that with.
fn press(rig: &Rig, zone: &Zone) -> Watermarks {
    let (marks, low) = (zone.watermarks(), zone.free_frames());
    rig.set_watermarks(zone, Watermarks { min: 0, low, high: 2 * low, promo: 2 * low });
    // Straight from the buddy, and back.
    rig.release([rig.take(Gfp::ATOMIC, 10).unwrap()]);
    marks
}

/// Where single pages come from until there are no more, on CPU 0 of a machine without watermarks: a
/// property of their frames, without repetitions in a row. All are free again afterwards.
fn order_of<T: PartialEq>(
    rig: &Rig,
    task: &Task,
    alloc: impl Fn() -> Result<Pfn, AllocError>,
    of: impl Fn(Pfn) -> T,
) -> Vec<T> {
    order_on(0, rig, task, alloc, of)
}

/// As [`order_of`], on a CPU.
fn order_on<T: PartialEq>(
    cpu: usize,
    rig: &Rig,
    task: &Task,
    alloc: impl Fn() -> Result<Pfn, AllocError>,
    of: impl Fn(Pfn) -> T,
) -> Vec<T> {
    rig.on(cpu, task, |_| {
        let mut seen = Vec::new();
        let mut held = Vec::new();
        while let Ok(pfn) = alloc() {
            let it = of(pfn);
            if seen.last() != Some(&it) {
                seen.push(it);
            }
            held.push((pfn, 0));
        }
        rig.release(held);
        rig.drain_this_cpu();
        seen
    })
}

/// A page's frame.
fn pfn(rig: &Rig, page: Result<&Page, AllocError>) -> Result<Pfn, AllocError> {
    page.map(|page| rig.page_to_pfn(page).unwrap())
}
