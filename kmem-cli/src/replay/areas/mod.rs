//! The vmalloc areas and the per-CPU memory of a recording, on a machine of their own.
//!
//! # Concepts
//! Few events of a recording are about them, but what they leave is not small: free ranges of addresses that nobody
//! purged, chunks with holes. As with the objects, they run after the pages, on a machine of the recorded amount of
//! memory, by one thread, in the recorded order, on the recorded CPUs. [`plan`] turns the rows into operations, [`run`]
//! runs them, [`result`] puts what kmem had beside what Linux had.
//!
//! # Decisions
//! - **Areas.** A row tells the bytes that Linux took, guard included, and the alignment, not what is shown there; kmem is
//!   asked for an area with frames of its own of as many bytes less the guard.
//! - **Start.** The areas that `vmallocinfo` calls in use: those with frames by vmalloc, others by `get_vm_area`.
//!   Which of them the recording frees is told by address only, and the text does not tell addresses: each free of an area
//!   from before ends one of the size that most of the recording's areas have, while there is one. Linux's peak is
//!   counted with the same sizes. Per-CPU memory is not
//!   told of at all: what is freed of it from before is made, at the size that is most frequent.
//! - **Marks.** Each instance of per-CPU memory, and each area's first word, is written to when it is allocated and looked
//!   at when it is freed.

mod plan;
mod result;
mod run;

pub use result::{Done, LinuxVmalloc, PercpuResult, VmallocResult};

use super::Args;
use kmem_trace::Recording;

/// What came of them.
#[derive(Default)]
pub struct Replayed {
    /// kmem's vmalloc. `None` if the recording has no areas.
    pub vmalloc: Option<VmallocResult>,
    /// Linux's, if the recording tells of it.
    pub linux: Option<LinuxVmalloc>,
    /// kmem's per-CPU memory. `None` if the recording has none.
    pub percpu: Option<PercpuResult>,
}

/// Replays the areas and the per-CPU memory of a recording. `samples` are the rows at which the report looks.
///
/// # Errors
/// A `vmallocinfo` that cannot be parsed, no machine, or a machine on which something does not add up.
pub fn replay(
    recording: &Recording,
    cpus: usize,
    samples: &[usize],
    args: &Args,
) -> anyhow::Result<Replayed> {
    let linux = result::Linux::new(recording)?;
    let plan = plan::Plan::new(recording, &linux);
    if plan.ops.is_empty() {
        return Ok(Replayed::default());
    }
    let run = run::run(recording, &plan, cpus, samples, args.quiet)?;
    let (areas, percpu) = (plan.events(true), plan.events(false));
    Ok(Replayed {
        linux: linux.result(&plan),
        vmalloc: (areas > 0).then(|| VmallocResult::new(&plan, &run)),
        percpu: (percpu > 0).then(|| PercpuResult::new(&plan, &run, &linux)),
    })
}
