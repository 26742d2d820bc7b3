//! Layout: which addresses belong to which kind of zone \[Z1\].
//!
//! # Concepts
//! A layout is data the platform supplies: kinds of zone in ascending order, each with the address it ends at. A kind
//! that is listed exists, even if no memory falls into it; a request for a kind that is not listed
//! goes to the next one up (an architecture without ISA lists no DMA zone, and any address will do).

use crate::types::{MAX_NR_ZONES, ZoneType};

/// One kind of zone and where it ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ZoneLimit {
    /// The kind.
    pub zone: ZoneType,
    /// Physical byte address of its end (exclusive); `u64::MAX` for no end.
    pub end: u64,
}

/// A machine's division into zones.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Layout {
    limits: [Option<ZoneLimit>; MAX_NR_ZONES],
}

/// What is wrong with a layout.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LayoutError {
    /// No zone at all.
    Empty,
    /// Kinds or ends are not in ascending order.
    Unordered(ZoneType),
    /// An end that is not a multiple of the pageblock size.
    Unaligned(ZoneLimit),
}

impl core::fmt::Display for LayoutError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            LayoutError::Empty => f.write_str("a layout needs at least one zone"),
            LayoutError::Unordered(z) => {
                write!(f, "zone {} is not above the zone before it", z.name())
            }
            LayoutError::Unaligned(l) => {
                write!(f, "zone {} ends at {:#x}, inside a pageblock", l.zone.name(), l.end)
            }
        }
    }
}

impl core::error::Error for LayoutError {}

impl Layout {
    /// A layout from its limits, lowest first.
    ///
    /// # Errors
    /// [`LayoutError`] when there are none or they do not ascend.
    pub fn new(limits: &[ZoneLimit]) -> Result<Layout, LayoutError> {
        let mut l = Layout { limits: [None; MAX_NR_ZONES] };
        let mut last: Option<ZoneLimit> = None;
        for limit in limits {
            if last.is_some_and(|p| limit.zone <= p.zone || limit.end < p.end) {
                return Err(LayoutError::Unordered(limit.zone));
            }
            l.limits[limit.zone as usize] = Some(*limit);
            last = Some(*limit);
        }
        if last.is_none() {
            return Err(LayoutError::Empty);
        }
        Ok(l)
    }

    const fn of<const N: usize>(limits: [(ZoneType, u64); N]) -> Layout {
        let mut l = Layout { limits: [None; MAX_NR_ZONES] };
        let mut i = 0;
        while i < N {
            l.limits[limits[i].0 as usize] =
                Some(ZoneLimit { zone: limits[i].0, end: limits[i].1 });
            i += 1;
        }
        l
    }

    /// 64-bit PC: DMA below 16 MiB, DMA32 below 4 GiB, Normal above.
    pub const fn x86_64() -> Layout {
        Layout::of([
            (ZoneType::Dma, 16 << 20),
            (ZoneType::Dma32, 4 << 30),
            (ZoneType::Normal, u64::MAX),
            (ZoneType::Movable, u64::MAX),
            (ZoneType::Device, u64::MAX),
        ])
    }

    /// 32-bit PC: DMA below 16 MiB, Normal below 896 MiB, HighMem above (up to 4 GiB).
    pub const fn x86_32() -> Layout {
        Layout::of([
            (ZoneType::Dma, 16 << 20),
            (ZoneType::Normal, 896 << 20),
            (ZoneType::HighMem, 4 << 30),
            (ZoneType::Movable, 4 << 30),
        ])
    }

    /// 32-bit PC with physical address extension: the same, with HighMem up to 64 GiB.
    pub const fn x86_32_pae() -> Layout {
        Layout::of([
            (ZoneType::Dma, 16 << 20),
            (ZoneType::Normal, 896 << 20),
            (ZoneType::HighMem, 64 << 30),
            (ZoneType::Movable, 64 << 30),
        ])
    }

    /// A machine whose devices reach every address: no DMA zones.
    pub const fn flat() -> Layout {
        Layout::of([(ZoneType::Normal, u64::MAX), (ZoneType::Movable, u64::MAX)])
    }

    /// The same layout with everything from `start` on in ZONE_MOVABLE (`movablecore=`).
    pub fn with_movable_from(mut self, start: u64) -> Layout {
        for l in self.limits.iter_mut().flatten() {
            l.end = l.end.min(start);
        }
        self.limits[ZoneType::Movable as usize] =
            Some(ZoneLimit { zone: ZoneType::Movable, end: u64::MAX });
        self
    }

    /// Whether the layout lists this kind.
    pub fn has(&self, zone: ZoneType) -> bool {
        self.limits[zone as usize].is_some()
    }

    /// The zones with their address ranges, lowest first; empty ranges included.
    pub fn ranges(&self) -> impl Iterator<Item = (ZoneType, u64, u64)> + '_ {
        let mut start = 0;
        self.limits.iter().flatten().map(move |l| {
            let s = start;
            start = l.end.max(start);
            (l.zone, s, l.end)
        })
    }

    /// The highest zone a request for `zone` may use: the next listed kind up, else the highest
    /// listed below.
    pub(crate) fn serve(&self, zone: ZoneType) -> ZoneType {
        let up = ZoneType::ALL[zone as usize..=ZoneType::Normal.max(zone) as usize]
            .iter()
            .find(|z| self.has(**z));
        let down = ZoneType::ALL[..=zone as usize].iter().rev().find(|z| self.has(**z));
        *up.or(down).unwrap_or(&zone)
    }

    /// Checks that zones meet at multiples of the pageblock size.
    pub(crate) fn check_alignment(&self, pageblock_bytes: u64) -> Result<(), LayoutError> {
        match self
            .limits
            .iter()
            .flatten()
            .find(|l| l.end != u64::MAX && l.end % pageblock_bytes != 0)
        {
            Some(l) => Err(LayoutError::Unaligned(*l)),
            None => Ok(()),
        }
    }
}
