//! Which mobility type each pageblock had.
//!
//! `pagetypeinfo` fixes how many pageblocks of a zone are of each type, and how many free blocks each type has. Free
//! blocks of a pageblock's size or more decide their pageblocks first, as many of each type as the text counts, those
//! with most allocations of the type seen inside before the others. The remaining pageblocks go by the share of
//! the type among the allocations seen; where nothing was seen, the most common type fills up, as it does under the kernel's image: Linux makes
//! all pageblocks movable when it boots. Then pageblocks of
//! different types change places as long as that brings the smaller free blocks of each type closer to the text.

use std::collections::BTreeMap;

use super::frames::{Frames, MIGRATETYPES};
use crate::proc::{Pagetypeinfo, Zone};

/// Types pageblocks that a vote or the text has decided, and how many of each type are still to be given.
struct Ballot {
    types: BTreeMap<u64, Option<u8>>,
    left: Vec<u64>,
}

impl Ballot {
    fn give(&mut self, pageblock: u64, migratetype: usize) {
        if let Some(given) = self.types.get_mut(&pageblock)
            && given.is_none()
        {
            *given = Some(migratetype as u8);
            self.left[migratetype] = self.left[migratetype].saturating_sub(1);
        }
    }
}

/// The type of each pageblock with a frame in the zone, by its first pfn, ascending. `chosen` are the free blocks.
pub(super) fn pageblock_types(
    zone: &Zone,
    frames: &Frames,
    chosen: &[(u64, u8)],
    info: &Pagetypeinfo,
) -> Vec<(u64, u8)> {
    let order = info.pageblock_order;
    let size = 1u64 << order;
    let first = frames.start >> order << order;
    let present = |pageblock: &u64| frames.has_any(*pageblock..*pageblock + size);
    let pageblocks = (first..frames.end()).step_by(size as usize).filter(present);
    let left = info.zone(zone.node, &zone.name).unwrap_or(&[]).to_vec();
    let mut ballot =
        Ballot { types: pageblocks.map(|pageblock| (pageblock, None)).collect(), left };

    // What is common is left for last: it takes what nothing speaks for.
    let common = (0..ballot.left.len())
        .max_by_key(|migratetype| (ballot.left[*migratetype], usize::MAX - migratetype));
    large_free_blocks(zone, frames, chosen, info, &mut ballot);
    let image: Vec<u64> =
        ballot.types.keys().copied().filter(|at| frames.only_kernel(*at..*at + size)).collect();
    for pageblock in &image {
        if let Some(common) = common.filter(|common| ballot.left[*common] > 0) {
            ballot.give(*pageblock, common);
        }
    }
    let mut pleas = Vec::new();
    for (pageblock, _) in ballot.types.iter().filter(|(_, given)| given.is_none()) {
        let votes = frames.votes(*pageblock..*pageblock + size);
        let all: u32 = votes.iter().sum();
        for (migratetype, votes) in votes.into_iter().enumerate().filter(|(_, votes)| *votes > 0) {
            pleas.push((
                u64::from(votes) * 1_000_000 / u64::from(all),
                votes,
                *pageblock,
                migratetype,
            ));
        }
    }
    pleas.sort_unstable_by_key(|(share, votes, pageblock, _)| {
        std::cmp::Reverse((*share, *votes, u64::MAX - pageblock))
    });
    for (_, _, pageblock, migratetype) in pleas {
        if Some(migratetype) != common && ballot.left.get(migratetype).is_some_and(|left| *left > 0)
        {
            ballot.give(pageblock, migratetype);
        }
    }
    let open: Vec<u64> = ballot
        .types
        .iter()
        .filter(|(_, given)| given.is_none())
        .map(|(pageblock, _)| *pageblock)
        .collect();
    // From the top: what is given here without evidence is boot memory and what followed it, which lies there.
    for pageblock in open.into_iter().rev() {
        let uncommon = (0..ballot.left.len())
            .find(|migratetype| Some(*migratetype) != common && ballot.left[*migratetype] > 0);
        ballot.give(pageblock, uncommon.or(common).unwrap_or(0));
    }
    let mut types: Vec<(u64, u8)> = ballot
        .types
        .into_iter()
        .map(|(pageblock, given)| (pageblock, given.unwrap_or(0)))
        .collect();
    settle(zone, &mut types, &image, chosen, info);
    types
}

/// How often two pageblocks are weighed against each other before what there is must do.
const MOST_COMPARISONS: u64 = 4_000_000;

/// Swaps types between pageblocks while the free blocks inside them come closer to the text's count by type.
/// Those of the kernel's `image` and of large free blocks stay as they are.
fn settle(
    zone: &Zone,
    types: &mut [(u64, u8)],
    image: &[u64],
    chosen: &[(u64, u8)],
    info: &Pagetypeinfo,
) {
    let small = usize::from(info.pageblock_order);
    let mut free = vec![vec![0i64; small]; types.len()];
    let mut fixed: Vec<bool> =
        types.iter().map(|(pageblock, _)| image.binary_search(pageblock).is_ok()).collect();
    for (pfn, order) in chosen {
        let pageblock = pfn >> info.pageblock_order << info.pageblock_order;
        let Ok(index) = types.binary_search_by_key(&pageblock, |(pfn, _)| *pfn) else {
            continue;
        };
        match free[index].get_mut(usize::from(*order)) {
            Some(blocks) => *blocks += 1,
            None => {
                let blocks = 1usize << (usize::from(*order) - small);
                fixed.iter_mut().skip(index).take(blocks).for_each(|fixed| *fixed = true);
            }
        }
    }
    // By type and order: free blocks we have more than the text. Types the text does not list want none.
    let listed =
        types.iter().map(|(_, migratetype)| usize::from(*migratetype) + 1).max().unwrap_or(0);
    let mut excess = vec![vec![0i64; small]; listed];
    for (migratetype, excess) in excess.iter_mut().enumerate() {
        let text = info.free_of(zone.node, &zone.name, migratetype as u8).unwrap_or(&[]);
        excess.iter_mut().zip(text).for_each(|(excess, blocks)| {
            *excess -= i64::try_from(*blocks).unwrap_or(i64::MAX >> 16)
        });
    }
    for ((_, migratetype), free) in types.iter().zip(&free) {
        excess[usize::from(*migratetype)]
            .iter_mut()
            .zip(free)
            .for_each(|(excess, blocks)| *excess += blocks);
    }
    let movable: Vec<usize> = (0..types.len()).filter(|index| !fixed[*index]).collect();
    let mut comparisons = 0;
    let mut improved = true;
    while improved {
        improved = false;
        for (from, one) in movable.iter().enumerate() {
            for other in &movable[from + 1..] {
                comparisons += 1;
                if comparisons > MOST_COMPARISONS {
                    return;
                }
                let (one_type, other_type) =
                    (usize::from(types[*one].1), usize::from(types[*other].1));
                if one_type == other_type {
                    continue;
                }
                // What the swap moves from the one type to the other, and what that changes, in frames.
                let moved = |order: usize| free[*one][order] - free[*other][order];
                let change: i64 = (0..small)
                    .map(|order| {
                        let (a, b, moved) =
                            (excess[one_type][order], excess[other_type][order], moved(order));
                        ((a - moved).abs() - a.abs() + (b + moved).abs() - b.abs()) << order
                    })
                    .sum();
                if change < 0 {
                    (0..small).for_each(|order| {
                        excess[one_type][order] -= moved(order);
                        excess[other_type][order] += moved(order);
                    });
                    (types[*one].1, types[*other].1) = (other_type as u8, one_type as u8);
                    improved = true;
                }
            }
        }
    }
}

/// Gives the pageblocks inside large free blocks the types the text counts for such blocks.
fn large_free_blocks(
    zone: &Zone,
    frames: &Frames,
    chosen: &[(u64, u8)],
    info: &Pagetypeinfo,
    ballot: &mut Ballot,
) {
    let size = 1u64 << info.pageblock_order;
    let types = info.types.len().min(MIGRATETYPES).min(ballot.left.len());
    let mut pleas = Vec::new();
    for (pfn, order) in chosen.iter().filter(|(_, order)| *order >= info.pageblock_order) {
        let votes = frames.votes(*pfn..*pfn + (1u64 << order));
        pleas.extend((0..types).map(|migratetype| (votes[migratetype], *pfn, *order, migratetype)));
    }
    pleas.sort_unstable_by_key(|(votes, pfn, _, migratetype)| {
        (std::cmp::Reverse(*votes), *pfn, *migratetype)
    });
    let mut wanted: BTreeMap<(usize, u8), u64> = BTreeMap::new();
    for migratetype in 0..types {
        let free = info.free_of(zone.node, &zone.name, migratetype as u8).unwrap_or(&[]);
        wanted.extend(
            free.iter().enumerate().map(|(order, blocks)| ((migratetype, order as u8), *blocks)),
        );
    }
    for (_, pfn, order, migratetype) in pleas {
        let pageblocks = (pfn..pfn + (1u64 << order)).step_by(size as usize);
        let open = pageblocks.clone().all(|pageblock| ballot.types.get(&pageblock) == Some(&None));
        let enough = ballot.left[migratetype] >= 1u64 << (order - info.pageblock_order);
        if let Some(wanted) =
            wanted.get_mut(&(migratetype, order)).filter(|wanted| **wanted > 0 && open && enough)
        {
            *wanted -= 1;
            pageblocks.for_each(|pageblock| ballot.give(pageblock, migratetype));
        }
    }
}
