//! Masks whose type says whether they may sleep and whether they have an address \[C2, G3\].
//!
//! # Concepts
//! A [`TypedGfp`] knows two things at compile time: `BLOCK`, whether the request may sleep, and `ZONE`,
//! which zone was chosen ([`ANY`], [`LOW`] or [`HIGH`]). A sleeping request needs the capability of process
//! context, a high one cannot be asked for an address, and a second zone cannot be chosen: each of these
//! mistakes does not compile.
//!
//! # Locking
//! Plain values.

use super::Gfp;
use crate::context::{Atomic, Process};

/// No zone chosen yet: ZONE_NORMAL and below.
pub const ANY: u8 = 0;
/// A low zone was chosen.
pub const LOW: u8 = 1;
/// High memory was allowed.
pub const HIGH: u8 = 2;

/// A mask that may sleep or not (`BLOCK`), with its zone chosen or not (`ZONE`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TypedGfp<const BLOCK: bool, const ZONE: u8>(Gfp);

/// `GFP_KERNEL`.
pub const KERNEL: TypedGfp<true, ANY> = TypedGfp(Gfp::KERNEL);
/// `GFP_NOFS`.
pub const NOFS: TypedGfp<true, ANY> = TypedGfp(Gfp::NOFS);
/// `GFP_NOIO`.
pub const NOIO: TypedGfp<true, ANY> = TypedGfp(Gfp::NOIO);
/// `GFP_USER`.
pub const USER: TypedGfp<true, ANY> = TypedGfp(Gfp::USER);
/// `GFP_HIGHUSER`.
pub const HIGHUSER: TypedGfp<true, HIGH> = TypedGfp(Gfp::HIGHUSER);
/// `GFP_HIGHUSER_MOVABLE`.
pub const HIGHUSER_MOVABLE: TypedGfp<true, HIGH> = TypedGfp(Gfp::HIGHUSER_MOVABLE);
/// `GFP_ATOMIC`.
pub const ATOMIC: TypedGfp<false, ANY> = TypedGfp(Gfp::ATOMIC);
/// `GFP_NOWAIT`.
pub const NOWAIT: TypedGfp<false, ANY> = TypedGfp(Gfp::NOWAIT);

impl<const BLOCK: bool, const ZONE: u8> TypedGfp<BLOCK, ZONE> {
    /// The mask.
    pub const fn gfp(self) -> Gfp {
        self.0
    }

    /// With `__GFP_ZERO`.
    pub const fn zero(self) -> Self {
        TypedGfp(self.0.union(Gfp::ZERO))
    }

    /// With `__GFP_COMP`.
    pub const fn comp(self) -> Self {
        TypedGfp(self.0.union(Gfp::COMP))
    }

    /// With `__GFP_COLD`.
    pub const fn cold(self) -> Self {
        TypedGfp(self.0.union(Gfp::COLD))
    }

    /// With `__GFP_NOWARN`.
    pub const fn nowarn(self) -> Self {
        TypedGfp(self.0.union(Gfp::NOWARN))
    }

    /// With `__GFP_THISNODE`.
    pub const fn thisnode(self) -> Self {
        TypedGfp(self.0.union(Gfp::THISNODE))
    }

    /// With `__GFP_NOMEMALLOC`.
    pub const fn nomemalloc(self) -> Self {
        TypedGfp(self.0.union(Gfp::NOMEMALLOC))
    }

    /// With `__GFP_RECLAIMABLE`, and not `__GFP_MOVABLE`.
    pub const fn reclaimable(self) -> Self {
        TypedGfp(self.0.difference(Gfp::MOVABLE).union(Gfp::RECLAIMABLE))
    }

    /// With `__GFP_MOVABLE`, and not `__GFP_RECLAIMABLE`.
    pub const fn movable(self) -> Self {
        TypedGfp(self.0.difference(Gfp::RECLAIMABLE).union(Gfp::MOVABLE))
    }
}

impl<const BLOCK: bool> TypedGfp<BLOCK, ANY> {
    /// From ZONE_DMA (`GFP_DMA | …`).
    pub const fn dma(self) -> TypedGfp<BLOCK, LOW> {
        TypedGfp(self.0.union(Gfp::DMA_ZONE))
    }

    /// From what 32-bit devices reach.
    pub const fn dma32(self) -> TypedGfp<BLOCK, LOW> {
        TypedGfp(self.0.union(Gfp::DMA32))
    }

    /// High memory will do.
    pub const fn highmem(self) -> TypedGfp<BLOCK, HIGH> {
        TypedGfp(self.0.union(Gfp::HIGHMEM))
    }
}

impl<const ZONE: u8> TypedGfp<true, ZONE> {
    /// With `__GFP_NORETRY`.
    pub const fn noretry(self) -> Self {
        TypedGfp(self.0.union(Gfp::NORETRY))
    }

    /// With `__GFP_RETRY_MAYFAIL`.
    pub const fn retry_mayfail(self) -> Self {
        TypedGfp(self.0.union(Gfp::RETRY_MAYFAIL))
    }

    /// With `__GFP_NOFAIL`: only for requests that can wait.
    pub const fn nofail(self) -> Self {
        TypedGfp(self.0.union(Gfp::NOFAIL))
    }
}

mod sealed {
    pub trait Sealed {}
}

/// What one must hold to make a request that sleeps (`BLOCK`) or does not.
pub trait Capability<const BLOCK: bool>: sealed::Sealed {}

impl sealed::Sealed for &Process {}
impl sealed::Sealed for Atomic<'_> {}
impl Capability<true> for &Process {}
impl Capability<false> for &Process {}
impl Capability<false> for Atomic<'_> {}

/// Masks whose pages always have an address.
pub trait HasAddress: sealed::Sealed {}

impl<const BLOCK: bool> sealed::Sealed for TypedGfp<BLOCK, ANY> {}
impl<const BLOCK: bool> sealed::Sealed for TypedGfp<BLOCK, LOW> {}
impl<const BLOCK: bool> HasAddress for TypedGfp<BLOCK, ANY> {}
impl<const BLOCK: bool> HasAddress for TypedGfp<BLOCK, LOW> {}
