//! What kmem's slab layer held, beside what Linux's held.
//!
//! # Concepts
//! *Waste* of a cache is the bytes of its slabs less those of its live objects, at the size their user may
//! touch (kmalloc: the size of the cache). Live objects are the same on both sides: those of the start and what the
//! recording made of them. Free objects, slack, padding, state and what lies in magazines all are waste.

use super::{
    plan::{Plan, own_name},
    run::{Run, Snapshot},
};
use kmem_trace::slab::{Held, LinuxSlab};
use serde::Serialize;
use std::collections::BTreeMap;

pub(super) const PAGE: u64 = 4096;

/// One cache at one moment.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Use {
    /// Frames of its slabs.
    pub pages: u64,
    /// Its slabs; `None` where only the frames are known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slabs: Option<u64>,
    /// Live objects.
    pub live: u64,
    /// Free objects in magazines.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cached: Option<u64>,
    /// Bytes held that are no live object's.
    pub waste_bytes: u64,
}

/// One cache.
#[derive(Clone, Debug, Default, Serialize)]
pub struct CacheUse {
    /// Its name.
    pub name: String,
    /// Bytes of an object.
    pub object_size: u64,
    /// Bytes from one object to the next; not told of Linux's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stride: Option<u32>,
    /// Objects of a slab; likewise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub objects_per_slab: Option<u32>,
    /// Whether it is one of the slab layer's own.
    pub internal: bool,
    /// When most was held in all.
    pub peak: Use,
    /// At the end.
    pub end: Use,
}

/// Frames held.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Pages {
    /// At the start.
    pub start: u64,
    /// At most.
    pub peak: u64,
    /// At the end.
    pub end: u64,
}

/// What the replay of the objects came to.
#[derive(Clone, Debug, Serialize)]
pub struct SlabResult {
    /// Events on objects.
    pub events: usize,
    /// Allocations that succeeded.
    pub allocs: u64,
    /// Frees.
    pub frees: u64,
    /// Allocations that failed.
    pub failures: u64,
    /// Frees that the allocator refused.
    pub refused_frees: u64,
    /// Frees of objects whose allocation had failed.
    pub skipped: u64,
    /// Frees that make no sense, or of which too little is known.
    pub unmatched_frees: u64,
    /// Frees of objects from before the recording.
    pub prior_frees: u64,
    /// Events of Linux's own caches, left out.
    pub own_events: u64,
    /// Caches that kmem cannot have; kmalloc stood in for them.
    pub by_kmalloc: u64,
    /// Wall-clock seconds.
    pub seconds: f64,
    /// Allocations and frees per second.
    pub ops_per_second: f64,
    /// Live objects at the start.
    pub start_objects: u64,
    /// Frames held at the start, in slabs and for the layer's tables.
    pub pages_start: u64,
    /// Most frames held, likewise.
    pub pages_peak: u64,
    /// Row of the recording that brought them.
    pub peak_row: usize,
    /// Frames held at the end, nothing shrunk.
    pub pages_end: u64,
    /// Of these, in empty slabs.
    pub pages_end_empty: u64,
    /// Of these, the layer's own: state, magazines, descriptors and tables.
    pub pages_end_own: u64,
    /// Of these, the layer's tables, which are in no slab.
    pub pages_tables: u64,
    /// Of those at the peak, what the states of large objects take in the machine's table.
    pub pages_states_peak: u64,
    /// The same at the end.
    pub pages_states_end: u64,
    /// Bytes in slabs and tables that are no live object's, at the peak.
    pub waste_bytes_peak: u64,
    /// The same at the end.
    pub waste_bytes_end: u64,
    /// Frames of slabs once everything was freed and every cache destroyed.
    pub pages_left: u64,
    /// Held in a second replay whose start is without the objects that Linux calls active and the recording shows to
    /// be free; `None` if there are none.
    pub known_free: Option<Pages>,
    /// The caches, the largest at the peak first.
    pub caches: Vec<CacheUse>,
}

/// What Linux's slab layer held.
#[derive(Clone, Debug, Serialize)]
pub struct LinuxResult {
    /// Frames at the start, by `slabinfo`.
    pub pages_start: u64,
    /// Most frames: those of the start, and the page rows that back slabs.
    pub pages_peak: Option<u64>,
    /// Row that brought them.
    pub peak_row: Option<usize>,
    /// Frames at the end, by `slabinfo`.
    pub pages_end: Option<u64>,
    /// Frames at the last row, by the rows.
    pub pages_last_row: Option<u64>,
    /// Bytes in slabs that are no live object's, at the peak.
    pub waste_bytes_peak: Option<u64>,
    /// The same at the end.
    pub waste_bytes_end: Option<u64>,
    /// Objects that `slabinfo` called active at the start and the recording shows to have been free.
    pub start_shown_free: u64,
    /// The caches, under kmem's names, the largest at the peak first.
    pub caches: Vec<CacheUse>,
}

/// Sums of some caches' waste.
fn waste(caches: &[CacheUse], of: impl Fn(&CacheUse) -> Use) -> u64 {
    caches.iter().map(|c| of(c).waste_bytes).sum()
}

fn largest_first(caches: &mut [CacheUse]) {
    caches.sort_by(|a, b| {
        let pages = |c: &CacheUse| (c.peak.pages, c.end.pages);
        pages(b).cmp(&pages(a)).then_with(|| a.name.cmp(&b.name))
    });
}

impl SlabResult {
    /// Puts everything together.
    pub fn new(plan: &Plan, run: Run) -> SlabResult {
        let mut caches: BTreeMap<String, CacheUse> = BTreeMap::new();
        fill(&mut caches, plan, &run.peak, |cache| &mut cache.peak);
        fill(&mut caches, plan, &run.end, |cache| &mut cache.end);
        let mut caches: Vec<CacheUse> = caches.into_values().collect();
        largest_first(&mut caches);
        let tables = run.own_frames;
        let (states_peak, states_end) = (run.peak.state_frames(), run.end.state_frames());
        let seconds = run.elapsed.as_secs_f64();
        let empty = |s: &Snapshot| -> u64 {
            let caches = s.caches.iter();
            caches.map(|c| (c.slabs - c.active_slabs) * u64::from(c.frames_per_slab)).sum()
        };
        let own = caches.iter().filter(|c| c.internal).map(|c| c.end.pages).sum::<u64>();
        SlabResult {
            events: plan.ops.len(),
            allocs: run.allocs,
            frees: run.frees,
            failures: run.failures,
            refused_frees: run.refused_frees,
            skipped: run.skipped,
            unmatched_frees: plan.unmatched_frees,
            prior_frees: plan.prior_frees,
            own_events: plan.own_events,
            by_kmalloc: run.by_kmalloc,
            seconds,
            ops_per_second: (run.allocs + run.frees) as f64 / seconds.max(1e-9),
            start_objects: run.start_objects,
            pages_start: run.start.frames() + tables,
            pages_peak: run.peak.frames() + tables,
            peak_row: run.peak.row,
            pages_end: run.end.frames() + tables,
            pages_end_empty: empty(&run.end),
            pages_end_own: own + tables + states_end,
            pages_tables: tables,
            pages_states_peak: states_peak,
            pages_states_end: states_end,
            waste_bytes_peak: waste(&caches, |c| c.peak) + (tables + states_peak) * PAGE,
            waste_bytes_end: waste(&caches, |c| c.end) + (tables + states_end) * PAGE,
            pages_left: run.frames_left,
            known_free: None,
            caches,
        }
    }

    /// The frames held.
    pub fn pages(&self) -> Pages {
        Pages { start: self.pages_start, peak: self.pages_peak, end: self.pages_end }
    }
}

/// Adds what the caches hold at one moment.
fn fill(
    caches: &mut BTreeMap<String, CacheUse>,
    plan: &Plan,
    at: &Snapshot,
    of: impl Fn(&mut CacheUse) -> &mut Use,
) {
    let mut live: BTreeMap<String, u64> = BTreeMap::new();
    for (cache, n) in plan.caches.iter().zip(&at.live) {
        *live.entry(own_name(&cache.name)).or_default() += n;
    }
    for info in &at.caches {
        let name = info.name.as_str().to_owned();
        let pages = info.slabs * u64::from(info.frames_per_slab);
        let size = u64::from(info.object_size);
        // What the layer has for itself serves no user: all of it is waste.
        let live = live.get(&name).copied().filter(|_| !info.internal).unwrap_or(0);
        let cache = caches.entry(name.clone()).or_default();
        (cache.name, cache.object_size, cache.internal) = (name, size, info.internal);
        cache.stride = Some(info.stride);
        cache.objects_per_slab = Some(info.objects_per_slab);
        *of(cache) = Use {
            pages,
            slabs: Some(info.slabs),
            live,
            cached: Some(info.cached_objects),
            waste_bytes: (pages * PAGE).saturating_sub(live.saturating_mul(size)),
        };
    }
}

impl LinuxResult {
    /// What a recording says, under kmem's names.
    pub fn new(linux: &LinuxSlab) -> LinuxResult {
        let mut caches: BTreeMap<String, CacheUse> = BTreeMap::new();
        for cache in &linux.caches {
            let own = caches.entry(own_name(&cache.name)).or_default();
            let size = u64::from(cache.object_size);
            let internal = super::plan::is_own(&cache.name);
            (own.name, own.object_size, own.internal) = (own_name(&cache.name), size, internal);
            for (held, sum) in [(cache.peak, &mut own.peak), (cache.end, &mut own.end)] {
                let Held { frames, live } = held;
                let live = if internal { 0 } else { live };
                sum.pages += frames;
                sum.live += live;
                let used = live.saturating_mul(size);
                sum.waste_bytes += (frames * PAGE).saturating_sub(used);
            }
        }
        let mut caches: Vec<CacheUse> = caches.into_values().collect();
        largest_first(&mut caches);
        LinuxResult {
            pages_start: linux.frames_start,
            pages_peak: linux.peak.map(|(frames, _)| frames),
            peak_row: linux.peak.map(|(_, row)| row),
            pages_end: linux.frames_end,
            pages_last_row: linux.frames_last_row,
            waste_bytes_peak: linux.peak.map(|_| waste(&caches, |c| c.peak)),
            waste_bytes_end: linux.frames_end.map(|_| waste(&caches, |c| c.end)),
            start_shown_free: linux.shown_free(),
            caches,
        }
    }
}
