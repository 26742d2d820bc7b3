//! `VmArea`: an area of the vmalloc range.

use crate::{
    error::AllocError,
    gfp::{
        Gfp,
        typed::{Capability, TypedGfp},
    },
    kmem::Kmem,
    page::Page,
    platform::{PageProt, Platform},
    vmalloc::{VmFlags, Wanted},
};
use core::{
    mem::{ManuallyDrop, MaybeUninit},
    ptr::NonNull,
    slice,
};

/// An area with frames of its own, or one that shows pages; and the only owner of it. It may be dropped in any
/// context but NMI.
///
/// ```
/// # use kmem_hosted::{Machine, Shape};
/// use kmem::{Gfp, alloc::VmArea};
/// # let machine = Machine::new(Shape::x86_64(64 << 20)).unwrap();
/// # let kmem = &*machine;
/// let mut area = VmArea::new(kmem, 10_000, Gfp::KERNEL)?;
/// assert_eq!(area.len(), 3 * 4096);
/// area.bytes_mut().unwrap()[9_999].write(7);
/// let third = area.page(8192).unwrap(); // the frame behind byte 8192
/// # let _ = third;
/// # Ok::<(), kmem::AllocError>(())
/// ```
pub struct VmArea<'k, P: Platform> {
    kmem: &'k Kmem<P>,
    at: NonNull<u8>,
    len: usize,
    /// Whether the frames are its own, and not somebody's who may write to them.
    own: bool,
}

// SAFETY: an area is its memory and a reference to its machine.
unsafe impl<P: Platform> Send for VmArea<'_, P> {}
// SAFETY: as above; shared, it gives no access to the memory but by address.
unsafe impl<P: Platform> Sync for VmArea<'_, P> {}

impl<'k, P: Platform> VmArea<'k, P> {
    /// At least `size` bytes, from vmalloc.
    ///
    /// Context: process context; may sleep.
    ///
    /// # Errors
    /// As [`vmalloc`](Kmem::vmalloc); `NoMemory` where areas [are not mapped](Platform::vmalloc_is_mapped).
    #[track_caller]
    pub fn new(kmem: &'k Kmem<P>, size: usize, gfp: Gfp) -> Result<Self, AllocError> {
        let at = kmem.vmap_layer().vmalloc_mapped(Wanted::new(size, gfp))?;
        Ok(VmArea { kmem, at, len: size.next_multiple_of(kmem.page_size()), own: true })
    }

    /// As [`new`](Self::new), with a capability \[C2\].
    ///
    /// # Errors
    /// As [`new`](Self::new).
    #[track_caller]
    pub fn new_in<const ZONE: u8>(
        kmem: &'k Kmem<P>,
        _capability: impl Capability<true>,
        gfp: TypedGfp<true, ZONE>,
        size: usize,
    ) -> Result<Self, AllocError> {
        Self::new(kmem, size, gfp.gfp())
    }

    /// Shows pages, one after the other. The area holds a reference to each, so they outlive it.
    ///
    /// Context: process context; may sleep.
    ///
    /// # Errors
    /// As [`vmap`](Kmem::vmap); `NoMemory` for a page that is not in use, after a report, and where areas
    /// [are not mapped](Platform::vmalloc_is_mapped).
    #[track_caller]
    pub fn map(kmem: &'k Kmem<P>, pages: &[&'k Page], prot: PageProt) -> Result<Self, AllocError> {
        let held = pages.iter().take_while(|page| kmem.get_page(page).is_ok()).count();
        let mapped = if held == pages.len() && kmem.platform().vmalloc_is_mapped() {
            kmem.vmap(pages, VmFlags::MAP_PUT_PAGES, prot)
        } else {
            Err(AllocError::NoMemory)
        };
        match mapped {
            Ok(at) => Ok(VmArea { kmem, at, len: pages.len() * kmem.page_size(), own: false }),
            Err(e) => {
                // They were taken above.
                pages[..held].iter().for_each(|page| _ = kmem.put_page(page));
                Err(e)
            }
        }
    }

    /// Where it is. What is behind is also in the frames, which others may know.
    pub fn as_ptr(&self) -> NonNull<u8> {
        self.at
    }

    /// Its bytes, to be written to; `None` if it shows pages, which others may write to as well.
    pub fn bytes_mut(&mut self) -> Option<&mut [MaybeUninit<u8>]> {
        // SAFETY: so many bytes, mapped, of frames that nobody else has, borrowed mutably.
        self.own.then(|| unsafe { slice::from_raw_parts_mut(self.at.as_ptr().cast(), self.len) })
    }

    /// Bytes, whole frames.
    #[expect(clippy::len_without_is_empty, reason = "it never is")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// The page behind a byte of it; `None` beyond its end.
    pub fn page(&self, offset: usize) -> Option<&'k Page> {
        let at = self.at.as_ptr().wrapping_add(offset);
        if offset < self.len { self.kmem.vmalloc_to_page(at) } else { None }
    }

    /// Gives the ownership up: the area is to be freed by [`vfree`](Kmem::vfree).
    pub fn into_raw(self) -> NonNull<u8> {
        ManuallyDrop::new(self).at
    }
}

impl<P: Platform> Drop for VmArea<'_, P> {
    fn drop(&mut self) {
        // A misuse (somebody freed it under us) is reported by the callee.
        // SAFETY: the area is ours, and this the last use of it.
        let _ = unsafe { self.kmem.vfree(self.at.as_ptr()) };
    }
}
