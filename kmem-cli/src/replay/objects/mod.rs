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

use super::Args;
use kmem_trace::Recording;

/// Replays the objects of a recording. `None` if it has none.
///
/// # Errors
/// A `slabinfo` that cannot be parsed, no machine, or a machine on which something does not add up.
pub fn replay(
    recording: &Recording,
    cpus: usize,
    args: &Args,
) -> anyhow::Result<(Option<SlabResult>, Option<LinuxResult>)> {
    let linux = recording.linux_slab()?;
    let replay = |known_free| {
        let plan = plan::Plan::new(recording, linux.as_ref(), known_free);
        if plan.ops.is_empty() {
            return Ok(None);
        }
        let run = run::run(recording, &plan, cpus, args.quiet)?;
        anyhow::Ok(Some(SlabResult::new(&plan, run)))
    };
    let Some(mut slab) = replay(false)? else { return Ok((None, None)) };
    if linux.as_ref().is_some_and(|linux| linux.shown_free() > 0) {
        slab.known_free = replay(true)?.map(|slab| slab.pages());
    }
    Ok((Some(slab), linux.as_ref().map(LinuxResult::new)))
}
