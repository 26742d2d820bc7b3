//! Fallback between mobilities: what happens when a mobility's own pageblocks, and the whole ones,
//! are used up \[P2, S2\].
//!
//! # Concepts
//! Frames that cannot move, spread over many pageblocks, keep all of them from ever becoming whole.
//! So a request that must go to another mobility's pageblock takes the largest block it finds, and if
//! half of that pageblock is free it takes the pageblock over: the next such request stays inside it. A movable
//! request does the opposite, it takes the smallest fitting block, since it can be moved away again.
//!
//! # Locking
//! As for the area.

use super::Area;
use crate::types::{MigrateType, PAGEBLOCK_FRAMES, PAGEBLOCK_ORDER};

/// Where each mobility turns, best first.
const FALLBACKS: [[MigrateType; 2]; 3] = [
    [MigrateType::Reclaimable, MigrateType::Movable],
    [MigrateType::Reclaimable, MigrateType::Unmovable],
    [MigrateType::Unmovable, MigrateType::Movable],
];

/// A block taken from another mobility.
pub(crate) struct Stolen {
    pub(crate) pfn: u32,
    /// Order of the free block it was taken from.
    pub(crate) order: u32,
    /// Mobility of the pageblock before.
    pub(crate) from: MigrateType,
    /// Whether the whole pageblock changed its mobility.
    pub(crate) converted: bool,
}

impl Area<'_> {
    /// Takes one block of `order` (below a pageblock's) from a pageblock of another mobility.
    pub(crate) fn steal(&mut self, order: u32, mt: MigrateType) -> Option<Stolen> {
        for from in FALLBACKS.get(mt as usize).into_iter().flatten().copied() {
            let mask = u32::from(self.lists.masks[from as usize]) >> order;
            if mask == 0 {
                continue;
            }
            let largest = order + (31 - mask.leading_zeros());
            let smallest = order + mask.trailing_zeros();
            let index = self.lists.heads[from as usize][largest as usize];
            let half = self.block(index).word().frames() >= PAGEBLOCK_FRAMES / 2;
            if half {
                self.set_migratetype(self.first_pfn(index), mt);
                let (pfn, found) = self.carve(index, order)?;
                return Some(Stolen { pfn, order: found, from, converted: true });
            }
            let bin = if mt == MigrateType::Movable { smallest } else { largest };
            let index = self.lists.heads[from as usize][bin as usize];
            let (pfn, found) = self.carve(index, order)?;
            return Some(Stolen { pfn, order: found, from, converted: false });
        }
        None
    }

    /// Takes one block of `order` out of the pageblocks set aside for high-order atomic requests.
    pub(crate) fn take_reserved(&mut self, order: u32) -> Option<u32> {
        if order >= PAGEBLOCK_ORDER {
            return None;
        }
        self.take(order, MigrateType::HighAtomic)
    }
}
