//! The calls that deal in addresses: `__get_free_pages`, `free_pages`, exact sizes \[P1, S1, S3\].
//!
//! # Concepts
//! An address exists for low memory only, so `__GFP_HIGHMEM` is refused \[G3\]. Exact sizes take the next
//! power of two, split it, and give the rest back.
//!
//! # Locking
//! None of its own.

use super::{PageAllocator, slow::Reclaim};
use crate::{
    error::{AllocError, Misuse},
    gfp::{Gfp, GfpError},
    page::Page,
    platform::Platform,
    types::Pfn,
};
use core::ptr::NonNull;

impl<P: Platform, R: Reclaim> PageAllocator<P, R> {
    /// `__get_free_pages`: the address of 2^`order` contiguous frames, contents undefined.
    ///
    /// Context: as [`alloc_pages`](Self::alloc_pages).
    ///
    /// # Errors
    /// As [`alloc_pages`](Self::alloc_pages); `Invalid` for `__GFP_HIGHMEM`.
    ///
    /// See [`__get_free_pages`](https://docs.kernel.org/core-api/mm-api.html).
    #[track_caller]
    pub fn __get_free_pages(&self, gfp: Gfp, order: u32) -> Result<NonNull<u8>, AllocError> {
        self.address_from(-1, gfp, order)
    }

    /// The address of 2^`order` contiguous frames, from node `nid` first, or, for −1, as the policy says.
    #[inline(always)]
    #[track_caller]
    fn address_from(&self, nid: i32, gfp: Gfp, order: u32) -> Result<NonNull<u8>, AllocError> {
        if gfp.contains(Gfp::HIGHMEM) {
            return Err(self.refuse(gfp, order, GfpError::HighMemNeedsPage));
        }
        let page = self.alloc_pages_node(nid, gfp, order)?;
        match self.page_address(page) {
            Some(address) => Ok(address),
            None => {
                // A platform without a direct map (a machine without contents).
                let _ = self.__free_pages(page, order);
                Err(AllocError::NoMemory)
            }
        }
    }

    /// `__get_free_page`: one frame's address.
    ///
    /// # Errors
    /// As [`__get_free_pages`](Self::__get_free_pages).
    #[track_caller]
    pub fn __get_free_page(&self, gfp: Gfp) -> Result<NonNull<u8>, AllocError> {
        self.__get_free_pages(gfp, 0)
    }

    /// `get_zeroed_page`: one zero-filled frame's address.
    ///
    /// # Errors
    /// As [`__get_free_pages`](Self::__get_free_pages).
    #[track_caller]
    pub fn get_zeroed_page(&self, gfp: Gfp) -> Result<NonNull<u8>, AllocError> {
        self.__get_free_pages(gfp | Gfp::ZERO, 0)
    }

    /// `get_free_page`: the old name of [`get_zeroed_page`](Self::get_zeroed_page) \[S3\].
    ///
    /// # Errors
    /// As [`__get_free_pages`](Self::__get_free_pages).
    #[track_caller]
    pub fn get_free_page(&self, gfp: Gfp) -> Result<NonNull<u8>, AllocError> {
        self.get_zeroed_page(gfp)
    }

    /// `__get_dma_pages`: as [`__get_free_pages`](Self::__get_free_pages), from ZONE_DMA.
    ///
    /// # Errors
    /// As [`__get_free_pages`](Self::__get_free_pages).
    #[track_caller]
    pub fn __get_dma_pages(&self, gfp: Gfp, order: u32) -> Result<NonNull<u8>, AllocError> {
        self.__get_free_pages(gfp | Gfp::DMA, order)
    }

    /// `free_pages`: frees what [`__get_free_pages`](Self::__get_free_pages) returned. A null address is accepted and
    /// ignored.
    ///
    /// # Errors
    /// [`Misuse`], reported as well, and nothing changed.
    #[track_caller]
    pub fn free_pages(&self, addr: *const u8, order: u32) -> Result<(), Misuse> {
        if addr.is_null() {
            return Ok(());
        }
        let page = self.page_at(addr)?;
        self.__free_pages(page, order)
    }

    /// `free_page`: as [`free_pages`](Self::free_pages) with order 0.
    ///
    /// # Errors
    /// As [`free_pages`](Self::free_pages).
    #[track_caller]
    pub fn free_page(&self, addr: *const u8) -> Result<(), Misuse> {
        self.free_pages(addr, 0)
    }

    #[track_caller]
    fn page_at(&self, addr: *const u8) -> Result<&Page, Misuse> {
        let aligned = (addr as usize).is_multiple_of(self.page_size());
        let page = self.p.direct_unmap(addr).and_then(|pfn| self.pfn_to_page(pfn));
        match page.filter(|_| aligned) {
            Some(page) => Ok(page),
            // Not in a closure, which has no caller.
            None => match self.refuse_vmalloc(addr) {
                Some(misuse) => Err(misuse),
                None => Err(self.misuse(Misuse::BadAddress { addr: addr as usize })),
            },
        }
    }

    fn frames_for(&self, size: usize) -> Option<(u32, u32)> {
        let frames = size.checked_add(self.page_size() - 1)? >> P::PAGE_SHIFT;
        let frames = u32::try_from(frames).ok().filter(|n| *n > 0)?;
        Some((frames, frames.checked_next_power_of_two()?.ilog2()))
    }

    /// `alloc_pages_exact`: the address of `size` bytes, rounded up to frames, contiguous. Free it with
    /// [`free_pages_exact`](Self::free_pages_exact) and the same size.
    ///
    /// # Errors
    /// As [`__get_free_pages`](Self::__get_free_pages); `Invalid` for 0 bytes and for more than the
    /// largest order holds. `__GFP_COMP` is ignored: compound pages cannot be split.
    #[track_caller]
    pub fn alloc_pages_exact(&self, size: usize, gfp: Gfp) -> Result<NonNull<u8>, AllocError> {
        self.alloc_pages_exact_nid(-1, size, gfp)
    }

    /// `alloc_pages_exact_nid`: as [`alloc_pages_exact`](Self::alloc_pages_exact), from node `nid` first, as
    /// [`alloc_pages_node`](Self::alloc_pages_node). The address is aligned to the size, rounded up to a power of two.
    ///
    /// # Errors
    /// As [`alloc_pages_exact`](Self::alloc_pages_exact), and `Invalid` for a node that does not exist.
    #[track_caller]
    pub fn alloc_pages_exact_nid(
        &self,
        nid: i32,
        size: usize,
        gfp: Gfp,
    ) -> Result<NonNull<u8>, AllocError> {
        let Some((frames, order)) = self.frames_for(size) else {
            return Err(self.refuse(gfp, u32::MAX, GfpError::OrderTooLarge));
        };
        let address = self.address_from(nid, gfp - Gfp::COMP, order)?;
        if let Ok(page) = self.page_at(address.as_ptr())
            && let Some(pfn) = self.map.pfn(page)
            && self.split_page(page, order).is_ok()
        {
            for tail in pfn + frames..pfn + (1 << order) {
                let _ = self.__free_page(self.map.page_in_map(tail));
            }
        }
        Ok(address)
    }

    /// `free_pages_exact`: frees `size` bytes from [`alloc_pages_exact`](Self::alloc_pages_exact).
    ///
    /// # Errors
    /// The first [`Misuse`] met; frames after it are left as they are.
    #[track_caller]
    pub fn free_pages_exact(&self, addr: *const u8, size: usize) -> Result<(), Misuse> {
        let first = self.page_at(addr)?;
        let (Some(pfn), Some((frames, _))) = (self.map.pfn(first), self.frames_for(size)) else {
            return Err(self.misuse(Misuse::BadAddress { addr: addr as usize }));
        };
        for n in pfn..pfn.saturating_add(frames) {
            match self.pfn_to_page(Pfn(n)) {
                Some(page) => self.__free_page(page)?,
                None => return Err(self.misuse(Misuse::NeverAllocated { pfn: Pfn(n) })),
            }
        }
        Ok(())
    }
}
