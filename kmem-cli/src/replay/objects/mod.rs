//! The objects of a recording: every event of `kmalloc` and `kmem_cache_alloc`, on a machine of their own.
//!
//! # Concepts
//! Objects need memory that is there, and the page replay's machine has none; its page events contain the slabs of
//! Linux's own slab layer besides. So objects run after the pages, on a second machine of the recorded amount of
//! memory, which is all free. [`plan`] turns the rows into operations, [`run`] runs them, [`result`] puts what
//! kmem held beside what Linux held.
//!
//! # Decisions
//! - **Order.** The recorded one, on the recorded CPUs: one thread changes from CPU to CPU. What a slab layer holds
//!   depends on how far one CPU is ahead of another, and the recording says what Linux's CPUs did.
//! - **Caches** are those of the recording, under their names, sizes and alignments, each for itself
//!   (`NO_MERGE`): Linux's merged caches have one name. `kmalloc-*`, `kmalloc-cg-*`, `kmalloc-rcl-*` and
//!   `dma-kmalloc-*` are kmem's own kmalloc caches; there is no accounting, so `cg` ones are ordinary ones.
//!   Linux's `kmem_cache` and `kmem_cache_node` are not recreated: what kmem keeps for its caches is there already.
//! - **Start.** As many live objects in each cache as Linux's `slabinfo` calls active. Which of them are freed
//!   later is told by address only; they are spread evenly over the cache's objects, in the order of their addresses.
//!   Free objects of slabs that a CPU has for itself are active to Linux. Where the recording shows such objects,
//!   it is replayed a second time without them, and what was held then is told as well.
//! - **Held** are the frames of all slabs, those of the layer's own caches (state bytes, magazines,
//!   descriptors) and of its tables included. Nothing is shrunk before the end is counted.
//! - **Bulk calls** are replayed object by object, as they are recorded.

mod plan;
mod result;
mod run;

pub use result::{CacheUse, LinuxResult, SlabResult};
pub use run::frames;

use super::{Args, record::Taken};
use kmem_trace::Recording;
use std::collections::BTreeSet;

/// What came of the objects of a recording.
#[derive(Default)]
pub struct Replayed {
    /// kmem's slab layer. `None` if there are no objects.
    pub slab: Option<SlabResult>,
    /// Linux's, if the recording tells of it.
    pub linux: Option<LinuxResult>,
    /// What kmem did, if that was to be recorded.
    pub taken: Option<Taken>,
    /// Caches with a constructor.
    pub constructors: BTreeSet<String>,
}

/// Replays the objects of a recording.
///
/// # Errors
/// A `slabinfo` that cannot be parsed, no machine, or a machine on which something does not add up.
pub fn replay(recording: &Recording, cpus: usize, args: &Args) -> anyhow::Result<Replayed> {
    let linux = recording.linux_slab()?;
    let plan = plan::Plan::new(recording, linux.as_ref(), false);
    if plan.ops.is_empty() {
        return Ok(Replayed::default());
    }
    let (run, taken) = run::run(recording, &plan, cpus, args.quiet, args.record.is_some())?;
    let mut slab = SlabResult::new(&plan, run);
    if linux.as_ref().is_some_and(|linux| linux.shown_free() > 0) {
        let plan = plan::Plan::new(recording, linux.as_ref(), true);
        let (run, _) = run::run(recording, &plan, cpus, args.quiet, false)?;
        slab.known_free = Some(SlabResult::new(&plan, run).pages());
    }
    Ok(Replayed {
        slab: Some(slab),
        linux: linux.as_ref().map(LinuxResult::new),
        taken,
        constructors: plan.constructors(),
    })
}
