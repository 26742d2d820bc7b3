//! Out of memory: the embedder decides \[R3\].
//!
//! # Concepts
//! When a request that may not simply fail has reclaimed in vain, the handler is told. It may free
//! something, or choose a victim task ([`Task::set_oom_victim`](crate::context::Task::set_oom_victim)), which may then
//! use part of the reserves to come to its end. Without a handler the request fails.
//!
//! # Locking
//! The handler runs with nothing held, in process context.

use super::Vmscan;
use crate::{
    page_alloc::{PageAllocator, ReclaimRequest},
    platform::{Level, Platform},
    vmstat::VmEvent,
};

/// Decides what to do when memory has run out.
pub trait OomHandler: Sync {
    /// `true` if the request should try again: something was freed, or a victim was chosen and will
    /// free its memory soon.
    fn out_of_memory(&self, request: &ReclaimRequest) -> bool;
}

pub(super) fn call<P: Platform>(
    vmscan: &Vmscan,
    pages: &PageAllocator<P, Vmscan>,
    r: &ReclaimRequest,
) -> bool {
    let handler = *vmscan.oom.lock(pages.platform());
    let Some(handler) = handler else { return false };
    pages.platform().report(
        Level::Warning,
        format_args!(
            "out of memory: invoked oom-killer: gfp_mask={:#x}({}), order={}",
            r.gfp.bits(),
            r.gfp,
            r.order
        ),
    );
    let again = handler.out_of_memory(r);
    if again {
        pages.count(VmEvent::OomKill, 1);
    }
    again
}
