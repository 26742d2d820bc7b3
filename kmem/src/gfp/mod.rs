//! GFP flags: how a caller says what may be done on its behalf.
//!
//! # Concepts
//! A [`Gfp`] mask has three parts: *zone modifiers* (where from), *action modifiers* (what the
//! allocator may do: sleep, start I/O, call the file system, use reserves, retry) and *mobility*
//! (what the frames can later do). Type flags such as [`Gfp::KERNEL`] are the sums people write.
//!
//! # Implementation
//! The bits are Linux 6.12's own values, so that a recorded mask is a mask here; the textbook's
//! `__GFP_COLD`, which Linux has since dropped, keeps a bit of its own above them. The textbook's
//! `__GFP_WAIT` is both reclaim bits and its `__GFP_REPEAT` is `__GFP_RETRY_MAYFAIL` \[G1\].
//! Zone modifiers are decoded by one table look-up; impossible combinations are in the same table.
//!
//! # Locking
//! Masks are plain values.
//!
//! See the kernel's [memory allocation guide](https://docs.kernel.org/core-api/memory-allocation.html).

mod format;
pub mod typed;

use crate::types::{MigrateType, PAGE_ALLOC_COSTLY_ORDER, ZoneType};
pub use format::ParseGfpError;

bitflags::bitflags! {
    /// A GFP mask \[G1\].
    #[derive(Clone, Copy, PartialEq, Eq, Hash)]
    pub struct Gfp: u32 {
        /// `__GFP_DMA`: only from ZONE_DMA.
        const DMA_ZONE = 1 << 0;
        /// `__GFP_HIGHMEM`: high memory will do, and is preferred.
        const HIGHMEM = 1 << 1;
        /// `__GFP_DMA32`: only frames that 32-bit devices reach.
        const DMA32 = 1 << 2;
        /// `__GFP_MOVABLE`: the frames can be migrated.
        const MOVABLE = 1 << 3;
        /// `__GFP_RECLAIMABLE`: a shrinker can give the frames up.
        const RECLAIMABLE = 1 << 4;
        /// `__GFP_HIGH`: may go part of the way into the reserve below min.
        const HIGH = 1 << 5;
        /// `__GFP_IO`: reclaim may start block I/O.
        const IO = 1 << 6;
        /// `__GFP_FS`: reclaim may call into file systems.
        const FS = 1 << 7;
        /// `__GFP_ZERO`: the frames are zero-filled.
        const ZERO = 1 << 8;
        /// `__GFP_DIRECT_RECLAIM`: the caller may sleep and reclaim.
        const DIRECT_RECLAIM = 1 << 10;
        /// `__GFP_KSWAPD_RECLAIM`: kswapd may be woken.
        const KSWAPD_RECLAIM = 1 << 11;
        /// `__GFP_WRITE`: the page will be dirtied soon.
        const WRITE = 1 << 12;
        /// `__GFP_NOWARN`: no failure report.
        const NOWARN = 1 << 13;
        /// `__GFP_RETRY_MAYFAIL`: try hard, but fail in the end.
        const RETRY_MAYFAIL = 1 << 14;
        /// `__GFP_NOFAIL`: never return failure.
        const NOFAIL = 1 << 15;
        /// `__GFP_NORETRY`: one pass of reclaim only.
        const NORETRY = 1 << 16;
        /// `__GFP_MEMALLOC`: may use the reserves entirely.
        const MEMALLOC = 1 << 17;
        /// `__GFP_COMP`: build a compound page.
        const COMP = 1 << 18;
        /// `__GFP_NOMEMALLOC`: never use the reserves; beats MEMALLOC.
        const NOMEMALLOC = 1 << 19;
        /// `__GFP_HARDWALL`: stay within the task's cpuset.
        const HARDWALL = 1 << 20;
        /// `__GFP_THISNODE`: stay on the asked-for node.
        const THISNODE = 1 << 21;
        /// `__GFP_ACCOUNT`: charge to the task's group (accepted; counted).
        const ACCOUNT = 1 << 22;
        /// `__GFP_ZEROTAGS`: accepted for recordings; no tags exist here.
        const ZEROTAGS = 1 << 23;
        /// `__GFP_COLD`: take from the cold end of the per-CPU list. kmem's own bit; the
        /// textbook has the flag, today's Linux does not.
        const COLD = 1 << 31;

        /// `__GFP_RECLAIM`: both reclaim bits.
        const RECLAIM = Self::DIRECT_RECLAIM.bits() | Self::KSWAPD_RECLAIM.bits();
        /// The textbook's `__GFP_WAIT`: the caller may sleep.
        const WAIT = Self::RECLAIM.bits();
        /// The textbook's `__GFP_REPEAT`.
        const REPEAT = Self::RETRY_MAYFAIL.bits();

        /// `GFP_ATOMIC`: cannot sleep, may use part of the reserve.
        const ATOMIC = Self::HIGH.bits() | Self::KSWAPD_RECLAIM.bits();
        /// `GFP_NOWAIT`: cannot sleep, no reserve.
        const NOWAIT = Self::KSWAPD_RECLAIM.bits() | Self::NOWARN.bits();
        /// `GFP_NOIO`: may sleep, starts no block I/O.
        const NOIO = Self::RECLAIM.bits();
        /// `GFP_NOFS`: may sleep and start I/O, makes no file-system call.
        const NOFS = Self::RECLAIM.bits() | Self::IO.bits();
        /// `GFP_KERNEL`: may sleep and do whatever reclaim needs.
        const KERNEL = Self::RECLAIM.bits() | Self::IO.bits() | Self::FS.bits();
        /// `GFP_KERNEL_ACCOUNT`.
        const KERNEL_ACCOUNT = Self::KERNEL.bits() | Self::ACCOUNT.bits();
        /// `GFP_USER`: for user space, bound by the task's cpuset.
        const USER = Self::KERNEL.bits() | Self::HARDWALL.bits();
        /// `GFP_DMA`.
        const DMA = Self::DMA_ZONE.bits();
        /// `GFP_HIGHUSER`: for user space, high memory preferred.
        const HIGHUSER = Self::USER.bits() | Self::HIGHMEM.bits();
        /// `GFP_HIGHUSER_MOVABLE`: the same, and the frames can move.
        const HIGHUSER_MOVABLE = Self::HIGHUSER.bits() | Self::MOVABLE.bits();
        /// `GFP_TRANSHUGE_LIGHT`: a huge page if one is at hand.
        const TRANSHUGE_LIGHT = (Self::HIGHUSER_MOVABLE.bits() | Self::COMP.bits()
            | Self::NOMEMALLOC.bits() | Self::NOWARN.bits()) & !Self::RECLAIM.bits();
        /// `GFP_TRANSHUGE`: a huge page, reclaiming for it.
        const TRANSHUGE = Self::TRANSHUGE_LIGHT.bits() | Self::DIRECT_RECLAIM.bits();
    }
}

macro_rules! gfp_errors {
    ($($(#[$doc:meta])* $name:ident: $text:literal,)*) => {
        /// What is wrong with a mask or an order \[G3\].
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum GfpError {
            $($(#[$doc])* $name,)*
        }

        impl GfpError {
            /// All of them, in numeric order.
            pub(crate) const ALL: &[GfpError] = &[$(GfpError::$name,)*];
        }

        impl core::fmt::Display for GfpError {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                f.write_str(match self {
                    $(GfpError::$name => $text,)*
                })
            }
        }
    };
}

gfp_errors! {
    /// Two zones were asked for at once.
    TwoZones: "two zone modifiers in one mask",
    /// High memory was asked for where an address is returned.
    HighMemNeedsPage: "__GFP_HIGHMEM where an address is returned",
    /// `__GFP_NOFAIL` without `__GFP_DIRECT_RECLAIM`.
    NofailCannotWait: "__GFP_NOFAIL without __GFP_DIRECT_RECLAIM",
    /// `__GFP_NOFAIL` with an order above 1.
    NofailOrder: "__GFP_NOFAIL with an order above 1",
    /// The order is above the machine's MAX_ORDER.
    OrderTooLarge: "order above MAX_ORDER",
    /// Both mobility flags at once.
    TwoMobilities: "__GFP_MOVABLE and __GFP_RECLAIMABLE in one mask",
    /// The node does not exist.
    NoSuchNode: "no such node",
    /// The cache belongs to another machine.
    ForeignCache: "a cache of another machine",
    /// Nothing, or more than there is of one piece.
    BadSize: "illegal size",
    /// The alignment is not a power of two, or more than a frame.
    BadAlignment: "illegal alignment",
}

impl core::error::Error for GfpError {}

const ZONE_BITS: u32 = 0xf;
const BAD_ZONE: u8 = 0xff;

/// Highest zone by the mask's four zone bits. MOVABLE alone means NORMAL (the frames can move, but
/// any zone will do); with HIGHMEM it opens ZONE_MOVABLE.
const GFP_ZONE_TABLE: [u8; 16] = {
    let mut t = [BAD_ZONE; 16];
    let (d, h, d32, m) = (1usize, 2usize, 4usize, 8usize);
    t[0] = ZoneType::Normal as u8;
    t[d] = ZoneType::Dma as u8;
    t[h] = ZoneType::HighMem as u8;
    t[d32] = ZoneType::Dma32 as u8;
    t[m] = ZoneType::Normal as u8;
    t[m | d] = ZoneType::Dma as u8;
    t[m | h] = ZoneType::Movable as u8;
    t[m | d32] = ZoneType::Dma32 as u8;
    t
};

impl Gfp {
    /// The highest zone the mask allows; an error when it names two.
    #[inline]
    pub const fn zone(self) -> Result<ZoneType, GfpError> {
        match GFP_ZONE_TABLE[(self.bits() & ZONE_BITS) as usize] {
            BAD_ZONE => Err(GfpError::TwoZones),
            z => Ok(ZoneType::ALL[z as usize]),
        }
    }

    /// The highest zone's number, or `None` when the mask names two zones.
    #[inline(always)]
    pub(crate) const fn zone_index(self) -> Option<usize> {
        let z = GFP_ZONE_TABLE[(self.bits() & ZONE_BITS) as usize];
        if z == BAD_ZONE { None } else { Some(z as usize) }
    }

    /// The mobility the mask asks for. Both mobility flags at once count as unmovable here; the
    /// allocator refuses them.
    #[inline(always)]
    pub const fn migratetype(self) -> MigrateType {
        match (self.bits() >> 3) & 3 {
            1 => MigrateType::Movable,
            2 => MigrateType::Reclaimable,
            _ => MigrateType::Unmovable,
        }
    }

    /// Whether the caller may be put to sleep (`gfpflags_allow_blocking`).
    #[inline(always)]
    pub const fn may_block(self) -> bool {
        self.bits() & Gfp::DIRECT_RECLAIM.bits() != 0
    }

    /// Checks the mask and order against everything but the machine \[G3\].
    ///
    /// # Errors
    /// The first contradiction found.
    pub const fn check(self, order: u32) -> Result<(), GfpError> {
        if self.zone_index().is_none() {
            return Err(GfpError::TwoZones);
        }
        let mobility = Gfp::MOVABLE.bits() | Gfp::RECLAIMABLE.bits();
        if self.bits() & mobility == mobility {
            return Err(GfpError::TwoMobilities);
        }
        if self.contains(Gfp::NOFAIL) {
            if !self.may_block() {
                return Err(GfpError::NofailCannotWait);
            }
            if order > 1 {
                return Err(GfpError::NofailOrder);
            }
        }
        Ok(())
    }

    /// [`Gfp::check`] for the calls that return an address: high memory has none.
    ///
    /// # Errors
    /// As [`Gfp::check`], and [`GfpError::HighMemNeedsPage`].
    pub const fn check_addressed(self, order: u32) -> Result<(), GfpError> {
        if self.contains(Gfp::HIGHMEM) {
            return Err(GfpError::HighMemNeedsPage);
        }
        self.check(order)
    }

    /// A mask from Linux 6.12's numeric value, and the bits that mean nothing here.
    pub const fn from_linux(raw: u32) -> (Gfp, u32) {
        let known = Gfp::all().bits() & !Gfp::COLD.bits();
        (Gfp::from_bits_truncate(raw & known), raw & !known)
    }

    /// Linux 6.12's numeric value; `COLD`, which Linux no longer has, is left out.
    pub const fn to_linux(self) -> u32 {
        self.bits() & !Gfp::COLD.bits()
    }

    /// Whether `order` is one the slow path keeps retrying by itself.
    pub(crate) const fn costly(order: u32) -> bool {
        order > PAGE_ALLOC_COSTLY_ORDER
    }
}

impl core::fmt::Debug for Gfp {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        core::fmt::Display::fmt(self, f)
    }
}

macro_rules! classic {
    ($($(#[$doc:meta])* $name:ident = $value:ident;)*) => {
        /// The kernel's own spellings of the flags.
        pub mod classic {
            use super::Gfp;
            $(
                #[doc = concat!("[`Gfp::", stringify!($value), "`] under the kernel's name.")]
                pub const $name: Gfp = Gfp::$value;
            )*
        }
    };
}

classic! {
    __GFP_DMA = DMA_ZONE; __GFP_HIGHMEM = HIGHMEM; __GFP_DMA32 = DMA32; __GFP_MOVABLE = MOVABLE;
    __GFP_RECLAIMABLE = RECLAIMABLE; __GFP_HIGH = HIGH; __GFP_IO = IO; __GFP_FS = FS;
    __GFP_ZERO = ZERO; __GFP_DIRECT_RECLAIM = DIRECT_RECLAIM; __GFP_KSWAPD_RECLAIM = KSWAPD_RECLAIM;
    __GFP_RECLAIM = RECLAIM; __GFP_WAIT = WAIT; __GFP_WRITE = WRITE; __GFP_NOWARN = NOWARN;
    __GFP_RETRY_MAYFAIL = RETRY_MAYFAIL; __GFP_REPEAT = REPEAT; __GFP_NOFAIL = NOFAIL;
    __GFP_NORETRY = NORETRY; __GFP_MEMALLOC = MEMALLOC; __GFP_COMP = COMP;
    __GFP_NOMEMALLOC = NOMEMALLOC; __GFP_HARDWALL = HARDWALL; __GFP_THISNODE = THISNODE;
    __GFP_ACCOUNT = ACCOUNT; __GFP_COLD = COLD;
    GFP_ATOMIC = ATOMIC; GFP_NOWAIT = NOWAIT; GFP_NOIO = NOIO; GFP_NOFS = NOFS; GFP_KERNEL = KERNEL;
    GFP_KERNEL_ACCOUNT = KERNEL_ACCOUNT; GFP_USER = USER; GFP_DMA = DMA; GFP_DMA32 = DMA32;
    GFP_HIGHUSER = HIGHUSER; GFP_HIGHUSER_MOVABLE = HIGHUSER_MOVABLE;
    GFP_TRANSHUGE_LIGHT = TRANSHUGE_LIGHT; GFP_TRANSHUGE = TRANSHUGE;
}
