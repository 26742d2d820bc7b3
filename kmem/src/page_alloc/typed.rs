//! The typed calls: capability in, no run-time surprise \[C2\].
//!
//! # Concepts
//! The same operations as the classic ones; what differs is that a request that sleeps cannot be written
//! where sleeping is not allowed. The run-time check stays: a token of one machine says nothing of another.
//!
//! # Locking
//! None of its own.

use super::{PageAllocator, slow::Reclaim};
use crate::{
    error::AllocError,
    gfp::typed::{Capability, HasAddress, TypedGfp},
    page::Page,
    platform::Platform,
};
use core::ptr::NonNull;

impl<P: Platform, R: Reclaim> PageAllocator<P, R> {
    /// [`alloc_pages`](Self::alloc_pages) with a capability.
    ///
    /// # Errors
    /// As [`alloc_pages`](Self::alloc_pages).
    #[inline]
    #[track_caller]
    pub fn alloc_pages_in<const BLOCK: bool, const ZONE: u8>(
        &self,
        _capability: impl Capability<BLOCK>,
        gfp: TypedGfp<BLOCK, ZONE>,
        order: u32,
    ) -> Result<&Page, AllocError> {
        self.alloc_pages(gfp.gfp(), order)
    }

    /// [`__get_free_pages`](Self::__get_free_pages) with a capability.
    ///
    /// # Errors
    /// As [`alloc_pages`](Self::alloc_pages).
    #[track_caller]
    pub fn get_free_pages_in<const BLOCK: bool, const ZONE: u8>(
        &self,
        _capability: impl Capability<BLOCK>,
        gfp: TypedGfp<BLOCK, ZONE>,
        order: u32,
    ) -> Result<NonNull<u8>, AllocError>
    where
        TypedGfp<BLOCK, ZONE>: HasAddress,
    {
        self.__get_free_pages(gfp.gfp(), order)
    }

    /// [`alloc_pages_bulk`](Self::alloc_pages_bulk) with a capability.
    ///
    /// # Errors
    /// As [`alloc_pages_bulk`](Self::alloc_pages_bulk).
    #[track_caller]
    pub fn alloc_pages_bulk_in<'a, const BLOCK: bool, const ZONE: u8>(
        &'a self,
        _capability: impl Capability<BLOCK>,
        gfp: TypedGfp<BLOCK, ZONE>,
        pages: &mut [Option<&'a Page>],
    ) -> Result<usize, AllocError> {
        self.alloc_pages_bulk(gfp.gfp(), pages)
    }
}
