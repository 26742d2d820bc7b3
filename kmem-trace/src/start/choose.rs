//! Choosing which frames were free: see the theory in [`super`].
//!
//! The evidence for a block is the number of its frames whose first event takes them. Among equals, one whose buddy has
//! less evidence comes first (if both had been free, they would have been one larger block), then the lower one (boot
//! memory and what never moves lie at the top).

use std::cmp::Reverse;

use super::frames::{Frames, Use};

/// Chooses `wanted[order]` free blocks of each order and marks their frames. Returns first pfns and orders.
///
/// # Errors
/// There is no such choice; the text says at which order it fails.
pub(super) fn free_blocks(frames: &mut Frames, wanted: &[u64]) -> Result<Vec<(u64, u8)>, String> {
    let mut chosen = Vec::new();
    for order in (0..wanted.len()).rev() {
        if wanted[order] == 0 {
            continue;
        }
        let largest = order + 1 == wanted.len();
        let blocks = best(frames, order as u8, wanted[order], largest);
        if (blocks.len() as u64) < wanted[order] {
            let (wanted, room) = (wanted[order], blocks.len());
            return Err(format!(
                "{wanted} free blocks of order {order} are recorded, there is room for {room}"
            ));
        }
        for pfn in blocks {
            frames.set(pfn, order as u8, Use::Free);
            chosen.push((pfn, order as u8));
        }
    }
    Ok(chosen)
}

/// The `wanted` likeliest free blocks of one order, as many as there are, no two of them buddies unless `largest`.
fn best(frames: &Frames, order: u8, wanted: u64, largest: bool) -> Vec<u64> {
    let size = 1u64 << order;
    let evidence = |pfn: u64| -> Option<u64> {
        let first = pfn.checked_sub(frames.start)? as usize;
        let block = frames.uses().get(first..first + size as usize)?;
        let may_be_free = block.iter().all(|usage| matches!(usage, Use::Unknown | Use::Touched));
        may_be_free.then(|| block.iter().filter(|usage| **usage == Use::Touched).count() as u64)
    };
    let first = frames.start.next_multiple_of(size);
    let mut candidates: Vec<(Reverse<u64>, u64, u64)> = Vec::new();
    for pfn in (first..frames.end()).step_by(size as usize) {
        if let Some(own) = evidence(pfn) {
            let of_buddy = if largest { 0 } else { evidence(pfn ^ size).unwrap_or(0) };
            candidates.push((Reverse(own), of_buddy, pfn));
        }
    }
    candidates.sort_unstable();
    let mut taken = rustc_hash::FxHashSet::default();
    for (_, _, pfn) in candidates {
        if taken.len() as u64 == wanted {
            break;
        }
        if largest || !taken.contains(&(pfn ^ size)) {
            taken.insert(pfn);
        }
    }
    taken.into_iter().collect()
}
