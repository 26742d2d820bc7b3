//! Zonelists: in which order zones are tried \[Z3, Z5\].
//!
//! # Concepts
//! Nodes in order of distance from the one asked for; within a node the highest zone the request
//! allows, then the lower ones. No block spans two zones.
//!
//! # Implementation
//! Two small tables made at bring-up: nodes by distance for each node, and the zone slot for each node
//! and zone type. The first choice for (node, highest zone) is precomputed for the fast path.
//!
//! # Locking
//! Immutable after bring-up.

use crate::types::{MAX_NODES, MAX_NR_ZONES};

/// No zone here.
pub(crate) const NO_SLOT: u8 = u8::MAX;

/// The tables.
pub(crate) struct Zonelists {
    nodes: usize,
    /// `order[n]`: nodes by distance from n.
    order: [[u8; MAX_NODES]; MAX_NODES],
    slots: [[u8; MAX_NR_ZONES]; MAX_NODES],
    first: [[u8; 8]; MAX_NODES],
    /// The zone type that requests for each type start from.
    serves: [u8; MAX_NR_ZONES],
}

impl Zonelists {
    /// Tables for `nodes` nodes; `distance(a, b)` as in the firmware's table (10 is local).
    pub(crate) const fn empty() -> Zonelists {
        Zonelists {
            nodes: 0,
            order: [[0; MAX_NODES]; MAX_NODES],
            slots: [[NO_SLOT; MAX_NR_ZONES]; MAX_NODES],
            first: [[NO_SLOT; 8]; MAX_NODES],
            serves: [0, 1, 2, 3, 4, 5],
        }
    }

    /// Fills the tables. `slot(node, zone)` names the populated zones with managed frames that serve
    /// requests.
    pub(crate) fn build(
        &mut self,
        nodes: usize,
        distance: impl Fn(usize, usize) -> u32,
        slot: impl Fn(usize, usize) -> u8,
    ) {
        self.nodes = nodes;
        for n in 0..nodes {
            let row = &mut self.order[n];
            for (i, r) in row.iter_mut().enumerate().take(nodes) {
                *r = i as u8;
            }
            // Ties go to the node after this one, so that neighbours do not all fall back on node 0.
            row[..nodes].sort_unstable_by_key(|&m| {
                (distance(n, m as usize), (m as usize + nodes - n) % nodes)
            });
            for z in 0..MAX_NR_ZONES {
                self.slots[n][z] = slot(n, z);
            }
        }
        for n in 0..nodes {
            for highest in 0..MAX_NR_ZONES {
                let first = self.walk(n, highest).next().map_or(NO_SLOT, |s| s as u8);
                self.first[n][highest] = first;
            }
        }
    }

    pub(crate) fn nodes(&self) -> usize {
        self.nodes
    }

    /// Nodes by distance from `node`.
    pub(crate) fn nodes_from(&self, node: usize) -> impl Iterator<Item = usize> + '_ {
        self.order[node % MAX_NODES][..self.nodes].iter().map(|n| *n as usize)
    }

    /// The slot of a node's zone.
    pub(crate) fn slot(&self, node: usize, zone: usize) -> Option<usize> {
        match self.slots.get(node)?.get(zone) {
            Some(&s) if s != NO_SLOT => Some(s as usize),
            _ => None,
        }
    }

    /// The zone slots to try, best first.
    pub(crate) fn walk(&self, node: usize, highest: usize) -> impl Iterator<Item = usize> + '_ {
        self.nodes_from(node)
            .flat_map(move |n| (0..=highest).rev().filter_map(move |z| self.slot(n, z)))
    }

    /// The first slot that [`walk`](Zonelists::walk) would give, or one that no zone has.
    #[inline(always)]
    pub(crate) fn first_slot(&self, node: usize, highest: usize) -> usize {
        usize::from(self.first[node % MAX_NODES][highest % 8])
    }
}

impl Zonelists {
    /// Lets requests for a zone type start from the one that serves it on this machine.
    pub(crate) fn redirect(&mut self, serves: &[u8; MAX_NR_ZONES]) {
        for n in 0..self.nodes {
            let own = self.first[n];
            for (zone, served_by) in serves.iter().enumerate() {
                self.first[n][zone] = own[usize::from(*served_by)];
            }
        }
        self.serves = *serves;
    }

    /// The zone type that requests for `zone` start from.
    #[inline(always)]
    pub(crate) fn served_by(&self, zone: usize) -> usize {
        usize::from(self.serves[zone % MAX_NR_ZONES])
    }
}
