//! What a machine looks like: banks of memory, zones, nodes, CPUs \[X1, Z1\].
//!
//! # Concepts
//! A [`Shape`] is data. The presets follow the machines of the textbook: x86-32 with and without PAE,
//! x86-64, a NUMA machine, an architecture whose devices reach all memory. Everything can be changed
//! before the machine is made; mistakes are reported then.
//!
//! # Locking
//! Plain values.

use kmem::{
    memblock::{Memblock, MemblockError},
    types::{MAX_CPUS, MAX_NODES, PfnRange, ZoneType},
};
use thiserror::Error;

/// Frame size of hosted machines as a power of two.
pub const PAGE_SHIFT: u32 = 12;
/// Frame size of hosted machines in bytes.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// Where a PC's devices begin below 4 GiB.
const PCI_HOLE: u64 = 3 * GIB;

/// A bank of memory: `size` bytes at physical address `base`, on one node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bank {
    /// First physical address, a multiple of the frame size.
    pub base: u64,
    /// Bytes, a multiple of the frame size.
    pub size: u64,
    /// The node it belongs to.
    pub node: usize,
}

impl Bank {
    /// One past the last address; saturates.
    pub const fn end(&self) -> u64 {
        self.base.saturating_add(self.size)
    }

    /// The bank's frames. The bank has been checked by [`Shape::check`].
    pub(crate) const fn frames(&self) -> PfnRange {
        PfnRange::new((self.base >> PAGE_SHIFT) as u32, (self.end() >> PAGE_SHIFT) as u32)
    }
}

/// The upper end of a zone: it has the memory from where the zone below it ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ZoneLimit {
    /// Which zone.
    pub zone: ZoneType,
    /// One past its last physical address.
    pub end: u64,
}

/// A machine's shape.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Shape {
    /// The banks; any order, no overlaps, holes between them as wanted.
    pub banks: Vec<Bank>,
    /// For each possible CPU the node it is on.
    pub cpus: Vec<usize>,
    /// The zones, lowest first, with ends that do not fall. Zones left out are empty.
    pub zones: Vec<ZoneLimit>,
    /// One past the highest physical address that the processor can form.
    pub max_phys: u64,
    /// Whether frames have contents. A machine without them has all its tables and none of its memory:
    /// no direct map, nothing to zero. It can be as big as frame numbers go.
    pub contents: bool,
    /// Bytes of addresses for vmalloc; 0 for none, `None` for as many as suit the memory. There are none
    /// without contents.
    pub vmalloc: Option<u64>,
    /// Whether areas of vmalloc are mapped. Without, they have addresses at which nothing is: the host maps no more
    /// than some ten thousand, and a bench may want a million.
    pub page_tables: bool,
}

/// What is wrong with a [`Shape`].
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum ShapeError {
    /// No bank at all.
    #[error("the machine has no memory")]
    NoMemory,
    /// A bank's base or size is not a multiple of the frame size, or the size is 0.
    #[error(
        "bank {0}: base {1:#x} and size {2:#x} must be multiples of {PAGE_SIZE:#x}, the size not 0"
    )]
    Unaligned(usize, u64, u64),
    /// A bank reaches beyond what the processor addresses.
    #[error("bank {0} ends at {1:#x}, beyond the last physical address {2:#x}")]
    TooHigh(usize, u64, u64),
    /// Two banks share memory.
    #[error("banks {0} and {1} overlap")]
    Overlap(usize, usize),
    /// A node number is out of range.
    #[error("{0}: node {1} is not below {MAX_NODES}")]
    BadNode(&'static str, usize),
    /// No CPU, or too many.
    #[error("{0} CPUs; a machine has 1 to {MAX_CPUS}")]
    CpuCount(usize),
    /// Zones out of order.
    #[error("zone {0:?} does not come after zone {1:?}, or ends before it")]
    ZoneOrder(ZoneType, ZoneType),
    /// The bytes for vmalloc are not a multiple of the frame size.
    #[error("{0:#x} bytes for vmalloc must be a multiple of {PAGE_SIZE:#x}")]
    Vmalloc(u64),
    /// Memory above the last zone.
    #[error("bank {0} ends at {1:#x}, above the last zone")]
    NoZone(usize, u64),
}

/// Highest physical address that 32-bit frame numbers reach.
const FRAME_LIMIT: u64 = 1 << (32 + PAGE_SHIFT);

impl Shape {
    fn preset(bytes: u64, zones: &[(ZoneType, u64)], max_phys: u64) -> Shape {
        Shape {
            banks: vec![Bank { base: 0, size: bytes, node: 0 }],
            cpus: vec![0; 2],
            zones: zones.iter().map(|&(zone, end)| ZoneLimit { zone, end }).collect(),
            max_phys,
            contents: true,
            vmalloc: None,
            page_tables: true,
        }
    }

    /// A PC leaves the gigabyte below 4 GiB to its devices and puts the memory above.
    fn with_pci_hole(mut self) -> Shape {
        let size = self.banks[0].size;
        if size > PCI_HOLE {
            self.banks[0].size = PCI_HOLE;
            self.banks.push(Bank { base: 4 * GIB, size: size - PCI_HOLE, node: 0 });
        }
        self
    }

    /// x86-64: DMA below 16 MiB, DMA32 below 4 GiB, Normal above; memory beyond 3 GiB continues at
    /// 4 GiB. Two CPUs.
    pub fn x86_64(bytes: u64) -> Shape {
        Shape::preset(
            bytes,
            &[
                (ZoneType::Dma, 16 * MIB),
                (ZoneType::Dma32, 4 * GIB),
                (ZoneType::Normal, FRAME_LIMIT),
            ],
            FRAME_LIMIT,
        )
        .with_pci_hole()
    }

    /// x86-32: DMA below 16 MiB, Normal below 896 MiB, HighMem above, at most 4 GiB. Two CPUs.
    pub fn x86_32(bytes: u64) -> Shape {
        Shape::preset(
            bytes,
            &[
                (ZoneType::Dma, 16 * MIB),
                (ZoneType::Normal, 896 * MIB),
                (ZoneType::HighMem, 4 * GIB),
            ],
            4 * GIB,
        )
    }

    /// x86-32 with physical address extension: as [`Shape::x86_32`], up to 64 GiB, memory beyond 3 GiB
    /// continuing at 4 GiB.
    pub fn x86_32_pae(bytes: u64) -> Shape {
        let mut shape = Shape::x86_32(bytes).with_pci_hole();
        shape.max_phys = 64 * GIB;
        if let Some(high) = shape.zones.last_mut() {
            high.end = 64 * GIB;
        }
        shape
    }

    /// An architecture whose devices reach all memory: one zone, Normal. Two CPUs.
    pub fn no_dma(bytes: u64) -> Shape {
        Shape::preset(bytes, &[(ZoneType::Normal, FRAME_LIMIT)], FRAME_LIMIT)
    }

    /// `nodes` nodes of `bytes_per_node` each with the zones of x86-64, two CPUs per node. The first
    /// node's memory begins at 0, and each further one's at the next 4 GiB boundary.
    pub fn numa(nodes: usize, bytes_per_node: u64) -> Shape {
        let mut shape = Shape::x86_64(bytes_per_node);
        let stride = bytes_per_node.saturating_add(GIB).max(1).next_multiple_of(4 * GIB);
        for node in 1..nodes {
            let base = stride.saturating_mul(node as u64);
            shape.banks.push(Bank { base, size: bytes_per_node, node });
        }
        shape.cpus(2 * nodes.max(1))
    }

    /// Replaces the CPUs by `count`, spread evenly and in order over the nodes that have memory.
    #[must_use]
    pub fn cpus(mut self, count: usize) -> Shape {
        let mut nodes: Vec<usize> = self.banks.iter().map(|b| b.node).collect();
        nodes.sort_unstable();
        nodes.dedup();
        let spread = nodes.len().max(1);
        self.cpus =
            (0..count).map(|cpu| nodes.get(cpu * spread / count).copied().unwrap_or(0)).collect();
        self
    }

    /// Adds a bank.
    #[must_use]
    pub fn bank(mut self, base: u64, size: u64, node: usize) -> Shape {
        self.banks.push(Bank { base, size, node });
        self
    }

    /// Cuts `base..base + size` out of the banks: a hole.
    #[must_use]
    pub fn hole(mut self, base: u64, size: u64) -> Shape {
        let end = base.saturating_add(size);
        let mut kept = Vec::with_capacity(self.banks.len() + 1);
        for bank in self.banks {
            let below = Bank { size: bank.end().min(base).saturating_sub(bank.base), ..bank };
            let from = bank.base.max(end);
            let above = Bank { base: from, size: bank.end().saturating_sub(from), ..bank };
            kept.extend([below, above].into_iter().filter(|b| b.size != 0));
        }
        self.banks = kept;
        self
    }

    /// Replaces the zones.
    #[must_use]
    pub fn zones(mut self, zones: &[(ZoneType, u64)]) -> Shape {
        self.zones = zones.iter().map(|&(zone, end)| ZoneLimit { zone, end }).collect();
        self
    }

    /// Takes the contents away: frames are numbers only.
    #[must_use]
    pub fn without_contents(mut self) -> Shape {
        self.contents = false;
        self
    }

    /// Sets how many bytes of addresses there are for vmalloc, a multiple of the frame size.
    #[must_use]
    pub fn vmalloc(mut self, bytes: u64) -> Shape {
        self.vmalloc = Some(bytes);
        self
    }

    /// Takes the page tables away: areas of vmalloc have addresses only, and there are no stacks nor owners of areas.
    #[must_use]
    pub fn without_page_tables(mut self) -> Shape {
        self.page_tables = false;
        self
    }

    /// Bytes of addresses for vmalloc: as asked for, or 128 MiB on a machine with high memory, as x86-32 has them, or
    /// enough elsewhere for all memory in areas of one frame and its guard.
    pub fn vmalloc_bytes(&self) -> u64 {
        let suiting = match self.highmem_from() {
            Some(_) => 128 * MIB,
            None => self.bytes().saturating_mul(2).saturating_add(GIB),
        };
        if self.contents { self.vmalloc.unwrap_or(suiting) } else { 0 }
    }

    /// Where high memory begins: physical addresses from here on are not in the direct map \[H3\].
    pub fn highmem_from(&self) -> Option<u64> {
        let at = self.zones.iter().position(|z| z.zone == ZoneType::HighMem)?;
        Some(at.checked_sub(1).map_or(0, |below| self.zones[below].end))
    }

    /// Number of nodes: one more than the highest named.
    pub fn nr_nodes(&self) -> usize {
        let banks = self.banks.iter().map(|b| b.node);
        banks.chain(self.cpus.iter().copied()).max().map_or(1, |n| n + 1)
    }

    /// Bytes in all banks.
    pub fn bytes(&self) -> u64 {
        self.banks.iter().map(|b| b.size).sum()
    }

    /// The machine's memory as its firmware would report it.
    ///
    /// # Errors
    /// What [`Memblock::add`] refuses: banks that [`Shape::check`] refuses too, or more of them than
    /// the boot allocator's table holds.
    pub fn memblock(&self) -> Result<Memblock, MemblockError> {
        let mut boot = Memblock::new();
        for bank in &self.banks {
            let node = u32::try_from(bank.node).unwrap_or(u32::MAX);
            boot.add(bank.base, bank.size, node)?;
        }
        Ok(boot)
    }

    /// Finds what is wrong with the shape.
    pub fn check(&self) -> Result<(), ShapeError> {
        if self.banks.is_empty() {
            return Err(ShapeError::NoMemory);
        }
        if self.cpus.is_empty() || self.cpus.len() > MAX_CPUS {
            return Err(ShapeError::CpuCount(self.cpus.len()));
        }
        if let Some(&node) = self.cpus.iter().find(|&&n| n >= MAX_NODES) {
            return Err(ShapeError::BadNode("CPU", node));
        }
        for pair in self.zones.windows(2) {
            if pair[1].zone <= pair[0].zone || pair[1].end < pair[0].end {
                return Err(ShapeError::ZoneOrder(pair[1].zone, pair[0].zone));
            }
        }
        let top = self.zones.last().map_or(0, |z| z.end);
        let max_phys = self.max_phys.min(FRAME_LIMIT - PAGE_SIZE);
        for (i, bank) in self.banks.iter().enumerate() {
            if bank.size == 0 || (bank.base | bank.size) % PAGE_SIZE != 0 {
                return Err(ShapeError::Unaligned(i, bank.base, bank.size));
            }
            if bank.end() > max_phys {
                return Err(ShapeError::TooHigh(i, bank.end(), max_phys));
            }
            if bank.end() > top {
                return Err(ShapeError::NoZone(i, bank.end()));
            }
            if bank.node >= MAX_NODES {
                return Err(ShapeError::BadNode("bank", bank.node));
            }
        }
        if !self.vmalloc_bytes().is_multiple_of(PAGE_SIZE) {
            return Err(ShapeError::Vmalloc(self.vmalloc_bytes()));
        }
        let mut order: Vec<usize> = (0..self.banks.len()).collect();
        order.sort_unstable_by_key(|&i| self.banks[i].base);
        for pair in order.windows(2) {
            if self.banks[pair[0]].end() > self.banks[pair[1]].base {
                return Err(ShapeError::Overlap(pair[0], pair[1]));
            }
        }
        Ok(())
    }
}
