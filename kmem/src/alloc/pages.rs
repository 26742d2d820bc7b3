//! `Pages`: a block of frames that knows its order.

use crate::{
    error::{AllocError, Misuse},
    gfp::{
        Gfp,
        typed::{Capability, TypedGfp},
    },
    kmem::Kmem,
    page::Page,
    platform::Platform,
    types::Pfn,
};
use core::{mem::ManuallyDrop, ptr::NonNull};

/// A block of 2^order frames, and the only owner of it.
///
/// ```
/// # use kmem_hosted::{Machine, Shape};
/// use kmem::{Gfp, alloc::Pages};
/// # let machine = Machine::new(Shape::x86_64(64 << 20)).unwrap();
/// # let kmem = &*machine;
/// let block = Pages::new(kmem, Gfp::KERNEL, 3)?;
/// assert_eq!(block.bytes(), 8 * 4096);
/// drop(block); // as what it is: a block of order 3
/// # Ok::<(), kmem::AllocError>(())
/// ```
pub struct Pages<'k, P: Platform> {
    kmem: &'k Kmem<P>,
    head: &'k Page,
    order: u32,
}

impl<'k, P: Platform> Pages<'k, P> {
    /// Allocates a block.
    ///
    /// Context: may sleep if `gfp` has `__GFP_DIRECT_RECLAIM`; never from an NMI.
    ///
    /// # Errors
    /// [`AllocError`].
    #[inline]
    #[track_caller]
    pub fn new(kmem: &'k Kmem<P>, gfp: Gfp, order: u32) -> Result<Self, AllocError> {
        let head = kmem.alloc_pages(gfp, order)?;
        Ok(Pages { kmem, head, order })
    }

    /// As [`new`](Self::new), with a capability \[C2\].
    ///
    /// # Errors
    /// As [`new`](Self::new).
    #[track_caller]
    pub fn new_in<const BLOCK: bool, const ZONE: u8>(
        kmem: &'k Kmem<P>,
        capability: impl Capability<BLOCK>,
        gfp: TypedGfp<BLOCK, ZONE>,
        order: u32,
    ) -> Result<Self, AllocError> {
        let head = kmem.alloc_pages_in(capability, gfp, order)?;
        Ok(Pages { kmem, head, order })
    }

    /// The block's order.
    pub fn order(&self) -> u32 {
        self.order
    }

    /// Bytes of the block.
    pub fn bytes(&self) -> usize {
        self.kmem.page_size() << self.order
    }

    /// The first frame's page.
    pub fn page(&self) -> &'k Page {
        self.head
    }

    /// The first frame.
    pub fn pfn(&self) -> Pfn {
        self.kmem.page_to_pfn(self.head).unwrap_or_default()
    }

    /// Where the direct map shows the block; `None` for high memory, which [`kmap`](Self::kmap) shows.
    pub fn address(&self) -> Option<NonNull<u8>> {
        self.kmem.pages().page_address(self.head)
    }

    pub(super) fn kmem(&self) -> &'k Kmem<P> {
        self.kmem
    }

    /// The page of the block's frame with number `index`.
    ///
    /// # Errors
    /// `NoMemory`, after a report, for one that the block does not have.
    #[track_caller]
    pub(super) fn frame(&self, index: usize) -> Result<&'k Page, AllocError> {
        let inside = index < 1 << self.order;
        match self
            .pfn()
            .checked_add(index as u32)
            .filter(|_| inside)
            .and_then(|pfn| self.kmem.pfn_to_page(pfn))
        {
            Some(page) => Ok(page),
            None => {
                let offset = index.saturating_mul(self.kmem.page_size());
                let what = Misuse::OutsideBlock { pfn: self.pfn(), order: self.order, offset };
                self.kmem.pages().misuse(what);
                Err(AllocError::NoMemory)
            }
        }
    }

    /// Splits the block into its two halves, each an owner of its own; a single frame comes back whole.
    ///
    /// # Errors
    /// The block, if somebody else holds a reference to it.
    pub fn split(self) -> Result<(Self, Self), Self> {
        let Some(half) = self.order.checked_sub(1) else { return Err(self) };
        if self.kmem.split_page_to(self.head, self.order, half).is_err() {
            return Err(self);
        }
        let second = Pfn(self.pfn().0 + (1 << half));
        let (kmem, head) = (self.kmem, self.head);
        let _ = ManuallyDrop::new(self);
        match kmem.pfn_to_page(second) {
            Some(other) => {
                Ok((Pages { kmem, head, order: half }, Pages { kmem, head: other, order: half }))
            }
            None => Err(Pages { kmem, head, order: half }),
        }
    }

    /// Gives the ownership up: the block is to be freed with its order.
    pub fn into_raw(self) -> (&'k Page, u32) {
        let this = ManuallyDrop::new(self);
        (this.head, this.order)
    }
}

impl<P: Platform> Drop for Pages<'_, P> {
    #[inline]
    fn drop(&mut self) {
        // A misuse (somebody freed it under us) is reported by the callee.
        let _ = self.kmem.__free_pages(self.head, self.order);
    }
}
