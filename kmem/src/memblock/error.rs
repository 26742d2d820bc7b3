//! What the boot allocator refuses.

use super::MAX_REGIONS;
use crate::types::MAX_NODES;
use core::{error::Error, fmt};

/// Why a [`Memblock`](super::Memblock) call failed; nothing was changed. Addresses and sizes are in
/// bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum MemblockError {
    /// A range of no bytes.
    Empty {
        /// Where it was to start.
        base: u64,
    },
    /// A request for no bytes.
    EmptyRequest,
    /// A range that goes past the end of the address space.
    Wraps {
        /// First address.
        base: u64,
        /// Bytes.
        size: u64,
    },
    /// A node number that no machine has.
    BadNode {
        /// The number.
        node: u32,
    },
    /// An alignment that is not a power of two.
    BadAlign {
        /// The alignment.
        align: u64,
    },
    /// Memory that is already known to be on another node.
    Overlap {
        /// The first address claimed by both.
        at: u64,
        /// The node it was to be added to.
        node: u32,
        /// The node it is on.
        existing: u32,
    },
    /// The change needs more than [`MAX_REGIONS`] regions.
    TableFull {
        /// First address of the range to be changed.
        base: u64,
        /// Bytes of the range to be changed.
        size: u64,
    },
    /// No free memory satisfies the request.
    NoMemory {
        /// Bytes wanted.
        size: u64,
        /// Alignment wanted.
        align: u64,
        /// First permitted address.
        start: u64,
        /// One past the last permitted address.
        end: u64,
        /// The permitted node; `None` for any.
        node: Option<u32>,
    },
    /// A range to be freed that is not reserved in full.
    NotReserved {
        /// The first address that is not.
        at: u64,
    },
    /// A device took the memory for ever \[B2\].
    Permanent {
        /// The first address that is the device's.
        at: u64,
    },
    /// A start-up hook returned a lower address than it was given \[B2\].
    HookReturnedLower {
        /// What it was given.
        given: u64,
        /// What it returned.
        returned: u64,
    },
    /// A start-up hook returned an address past the free memory it was given \[B2\].
    HookReturnedBeyond {
        /// What it was given.
        given: u64,
        /// What it returned.
        returned: u64,
        /// The highest address that it could have returned.
        limit: u64,
    },
    /// The page allocator has taken over.
    HandedOver,
    /// Fault injection struck \[D1\].
    Injected,
}

impl fmt::Display for MemblockError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Empty { base } => write!(f, "empty range at {base:#x}"),
            Self::EmptyRequest => f.write_str("allocation of 0 bytes"),
            Self::Wraps { base, size } => {
                write!(f, "{size:#x} bytes at {base:#x} go past the end of the address space")
            }
            Self::BadNode { node } => {
                write!(f, "node {node} is out of range, the highest is {}", MAX_NODES - 1)
            }
            Self::BadAlign { align } => write!(f, "alignment {align:#x} is not a power of two"),
            Self::Overlap { at, node, existing } => {
                write!(f, "address {at:#x} cannot be on node {node}, it is on node {existing}")
            }
            Self::TableFull { base, size } => write!(
                f,
                "no slot left for {size:#x} bytes at {base:#x}, the table holds {MAX_REGIONS} regions"
            ),
            Self::NoMemory { size, align, start, end, node } => {
                write!(
                    f,
                    "no {size:#x} free bytes aligned to {align:#x} in {start:#x}..{end:#x} on "
                )?;
                match node {
                    Some(node) => write!(f, "node {node}"),
                    None => f.write_str("any node"),
                }
            }
            Self::NotReserved { at } => write!(f, "address {at:#x} is not reserved"),
            Self::Permanent { at } => write!(f, "address {at:#x} belongs to a device for ever"),
            Self::HookReturnedLower { given, returned } => {
                write!(f, "start-up hook was given {given:#x} and returned the lower {returned:#x}")
            }
            Self::HookReturnedBeyond { given, returned, limit } => write!(
                f,
                "start-up hook was given {given:#x} and returned {returned:#x}, free memory ends at {limit:#x}"
            ),
            Self::HandedOver => f.write_str("boot memory has been handed to the page allocator"),
            Self::Injected => f.write_str("injected failure"),
        }
    }
}

impl Error for MemblockError {}
