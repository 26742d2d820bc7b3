//! Blocks from before the recording that the machine does not have.
//!
//! # Concepts
//! A recording may free a frame that no zone of the recorded machine has: memory that was added later, or a
//! damaged line of a text. No such block is there to be freed, so its free makes no sense; it is counted and
//! listed as such, and everything that follows from the block is taken out of the plan.

use super::{
    machine::Start,
    plan::{Odd, Op, Plan, Prior, What},
};
use kmem_trace::{PageOp, Recording};
use std::collections::HashSet;

/// How many odd events are listed.
const LISTED: usize = 20;

/// Takes out of `plan` every operation on a block that `start` has no place for.
pub fn forget(recording: &Recording, plan: &mut Plan, start: &Start) {
    let known: HashSet<u32> = start.blocks().iter().map(|b| b.0).collect();
    let (kept, strays): (Vec<Prior>, Vec<Prior>) =
        plan.prior.iter().partition(|p| known.contains(&p.handle));
    if strays.is_empty() {
        return;
    }
    let gone = descendants(plan, strays.iter().map(|p| p.handle).collect());
    for (ops, times) in plan.cpus.iter_mut().zip(&mut plan.times) {
        let pairs = ops.iter().copied().zip(times.iter().copied());
        let kept: Vec<(Op, u64)> = pairs.filter(|(op, _)| !gone.contains(&op.handle)).collect();
        (*ops, *times) = kept.into_iter().unzip();
    }
    let places: HashSet<(u64, u8)> = strays.iter().map(|p| (p.pfn, p.order)).collect();
    let from_before =
        |op: &PageOp| matches!(op, PageOp::FreePrior | PageOp::Migrate { from: None, .. });
    let events = recording.page_events();
    for e in events.filter(|e| from_before(&e.op) && places.contains(&(e.pfn, e.order))) {
        let why = "frees a frame that no zone has";
        plan.odd.push(Odd { row: e.row, pfn: e.pfn, order: e.order, why });
    }
    plan.odd.sort_by_key(|o| o.row);
    plan.odd.truncate(LISTED);
    plan.unmatched_frees += strays.len();
    plan.prior = kept;
}

/// The handles and what their blocks become by moves and splits.
fn descendants(plan: &Plan, mut handles: HashSet<u32>) -> HashSet<u32> {
    loop {
        let before = handles.len();
        for op in plan.cpus.iter().flatten() {
            if handles.contains(&op.handle) {
                match op.what {
                    What::Rename => handles.extend([op.other]),
                    What::Split => handles.extend([op.other, op.other + 1]),
                    What::Alloc | What::Free => {}
                }
            }
        }
        if handles.len() == before {
            return handles;
        }
    }
}
