//! kmalloc: memory by size \[S8\].
//!
//! # Concepts
//! Sizes up to 8 KiB come from one cache each for a row of sizes: 8, 16, 32, 64, 96, 128, 192, 256 and on by
//! powers of two; there is a row for ordinary memory, one for DMA memory and one for what can be reclaimed.
//! What is larger is a block of pages of its own.
//!
//! # Implementation
//! A cache is made when its size is first asked for, in whatever context that is. A block of pages is marked
//! as the slab layer's and has no owner among the caches, so `kfree` knows it, and nobody can free it as pages.
//!
//! # Locking
//! As for caches.

use super::{
    Objects, SlabFlags,
    cache::{Descriptor, FIRST_KMALLOC, KMALLOC_SIZES, Root},
    create::Wanted,
    debug::Asked,
};
use crate::{
    error::{AllocError, Answer, Misuse, Name},
    gfp::Gfp,
    page::{Page, PageFlags},
    page_alloc::Reclaim,
    platform::Platform,
    types::Pfn,
};
use core::ptr::NonNull;

/// Largest size that a cache serves.
pub(crate) const KMALLOC_MAX_CACHE_SIZE: usize = 8192;

/// What `kmalloc(0)` returns: an address that is not null, not memory, and may be freed.
pub const ZERO_SIZE_PTR: NonNull<u8> =
    NonNull::without_provenance(core::num::NonZeroUsize::new(16).unwrap());

const NAMES: [[&str; KMALLOC_SIZES.len()]; 3] = [
    [
        "kmalloc-8",
        "kmalloc-16",
        "kmalloc-32",
        "kmalloc-64",
        "kmalloc-96",
        "kmalloc-128",
        "kmalloc-192",
        "kmalloc-256",
        "kmalloc-512",
        "kmalloc-1k",
        "kmalloc-2k",
        "kmalloc-4k",
        "kmalloc-8k",
    ],
    [
        "dma-kmalloc-8",
        "dma-kmalloc-16",
        "dma-kmalloc-32",
        "dma-kmalloc-64",
        "dma-kmalloc-96",
        "dma-kmalloc-128",
        "dma-kmalloc-192",
        "dma-kmalloc-256",
        "dma-kmalloc-512",
        "dma-kmalloc-1k",
        "dma-kmalloc-2k",
        "dma-kmalloc-4k",
        "dma-kmalloc-8k",
    ],
    [
        "kmalloc-rcl-8",
        "kmalloc-rcl-16",
        "kmalloc-rcl-32",
        "kmalloc-rcl-64",
        "kmalloc-rcl-96",
        "kmalloc-rcl-128",
        "kmalloc-rcl-192",
        "kmalloc-rcl-256",
        "kmalloc-rcl-512",
        "kmalloc-rcl-1k",
        "kmalloc-rcl-2k",
        "kmalloc-rcl-4k",
        "kmalloc-rcl-8k",
    ],
];
const KIND_FLAGS: [SlabFlags; 3] =
    [SlabFlags::empty(), SlabFlags::CACHE_DMA, SlabFlags::RECLAIM_ACCOUNT];

/// Index of the smallest cache size that holds `size` bytes, which is at least 1 and at most the largest. With a
/// constant size it is a constant.
#[inline(always)]
const fn class(size: usize) -> usize {
    CLASSES[size.wrapping_sub(1) / 8] as usize
}

/// What [`class`] is for so many whole words and a part of one, or one.
// Not a static, whose contents users of the crate would not see when they compile.
const CLASSES: [u8; KMALLOC_MAX_CACHE_SIZE / 8] = {
    let mut classes = [0; KMALLOC_MAX_CACHE_SIZE / 8];
    let (mut words, mut class) = (0, 0);
    while words < classes.len() {
        while (KMALLOC_SIZES[class] as usize) < (words + 1) * 8 {
            class += 1;
        }
        classes[words] = class as u8;
        words += 1;
    }
    classes
};

const _: () = {
    let mut size = 1;
    while size <= KMALLOC_MAX_CACHE_SIZE {
        let c = class(size);
        assert!(KMALLOC_SIZES[c] as usize >= size);
        assert!(c == 0 || (KMALLOC_SIZES[c - 1] as usize) < size);
        size += 1;
    }
};

/// The row of caches that a request is served from.
#[inline(always)]
const fn kind(gfp: Gfp) -> usize {
    if gfp.contains(Gfp::DMA_ZONE) {
        1
    } else if gfp.contains(Gfp::RECLAIMABLE) {
        2
    } else {
        0
    }
}

/// The number of a kmalloc cache.
const fn number(class: usize, kind: usize) -> usize {
    FIRST_KMALLOC + kind * KMALLOC_SIZES.len() + class
}

/// The number of the cache that a request is served from. With constants it is one.
#[inline(always)]
const fn id(size: usize, gfp: Gfp) -> u16 {
    number(class(size), kind(gfp)) as u16
}

/// Flags that chose the row of caches and mean nothing to the cache itself.
const CHOSEN: Gfp = Gfp::DMA_ZONE.union(Gfp::RECLAIMABLE);

impl<'a, P: Platform, R: Reclaim> Objects<'a, P, R> {
    #[inline(always)]
    #[track_caller]
    pub(crate) fn kmalloc(self, size: usize, gfp: Gfp) -> Result<NonNull<u8>, AllocError> {
        // Of no bytes as well.
        if size.wrapping_sub(1) >= KMALLOC_MAX_CACHE_SIZE {
            return self.kmalloc_large(size, gfp, -1).result();
        }
        let Some(object) = self.take_hot::<false>(id(size, gfp), gfp - CHOSEN, || true) else {
            return self.kmalloc_warm(size, gfp).result();
        };
        if gfp.contains(Gfp::ZERO) {
            // SAFETY: just given to us.
            unsafe { self.zero_usable(object.at, size) };
        }
        Ok(object.at)
    }

    /// Zeroes what kmalloc returned for `size` bytes, as far as it may be used: krealloc may grow into it.
    ///
    /// # Safety
    /// `at` is an object of the cache for `size` bytes, just given to the caller.
    #[inline(always)]
    unsafe fn zero_usable(&self, at: NonNull<u8>, size: usize) {
        // Only by the pattern do these caches have zones behind what was asked for.
        let bytes = match self.slabs.pattern {
            None => KMALLOC_SIZES[class(size)] as usize,
            Some(_) => self.ksize(at.as_ptr()).unwrap_or(size),
        };
        // SAFETY: the caller's.
        unsafe { at.write_bytes(0, bytes) };
    }

    #[track_caller]
    pub(crate) fn kmalloc_node(
        &self,
        size: usize,
        gfp: Gfp,
        node: i32,
    ) -> Result<NonNull<u8>, AllocError> {
        let Ok(n) = usize::try_from(node) else { return self.kmalloc(size, gfp) };
        if size.wrapping_sub(1) >= KMALLOC_MAX_CACHE_SIZE {
            return self.kmalloc_large(size, gfp, node).result();
        }
        self.kmalloc_slow(size, gfp, Some(n))
    }

    /// The end of a `kmalloc` that found the loaded magazine empty; zeroed if that is asked for.
    #[cold]
    #[inline(never)]
    #[track_caller]
    fn kmalloc_warm(self, size: usize, gfp: Gfp) -> Answer {
        let Some(object) = self.take_hot::<true>(id(size, gfp), gfp - CHOSEN, || true) else {
            return self.kmalloc_slow(size, gfp, None).into();
        };
        if gfp.contains(Gfp::ZERO) {
            // SAFETY: just given to us.
            unsafe { self.zero_usable(object.at, size) };
        }
        Answer::given(object.at)
    }

    /// Allocates from the cache for a size, which is made if there is none, zeroed if that is asked for.
    #[cold]
    #[inline(never)]
    #[track_caller]
    fn kmalloc_slow(
        self,
        size: usize,
        gfp: Gfp,
        node: Option<usize>,
    ) -> Result<NonNull<u8>, AllocError> {
        let d = match self.root().and_then(|root| root.cache(id(size, gfp))) {
            Some(d) => d,
            None => {
                self.pages.check_context(gfp)?;
                let made = self.make_kmalloc_cache(class(size), kind(gfp), gfp);
                made.ok_or(AllocError::NoMemory)?
            }
        };
        let got = self.alloc_slow(d, gfp - CHOSEN, node, size as u32).map(|object| {
            let at = object.at;
            let sampled = self.sampled_size(at.as_ptr()).is_some();
            if !sampled {
                self.ask(d, &object, size);
            }
            match gfp.contains(Gfp::ZERO) {
                // There is no more of a sampled one than was asked for.
                // SAFETY: just given to us.
                true if sampled => unsafe { at.write_bytes(0, size) },
                // SAFETY: just given to us.
                true => unsafe { self.zero_usable(at, size) },
                false => (),
            }
            at
        });
        if self.tracing() {
            let asked = Asked { bytes: size, gfp, node };
            self.trace_kmalloc(Some(d), d.layout.stride as usize, asked, got);
        }
        got
    }

    fn make_kmalloc_cache(
        &self,
        class: usize,
        kind: usize,
        gfp: Gfp,
    ) -> Option<&'static Descriptor> {
        // What the cache needs for itself is ordinary memory.
        let gfp = gfp - CHOSEN - Gfp::ZERO - Gfp::NOFAIL;
        let root: &'static Root = self.make_root(gfp)?;
        let size = KMALLOC_SIZES[class];
        let align = if size.is_power_of_two() {
            size.min(1 << P::PAGE_SHIFT)
        } else {
            size & size.wrapping_neg()
        };
        let number = number(class, kind);
        let wanted = Wanted {
            name: Name::new(NAMES[kind][class])?,
            size,
            align,
            flags: KIND_FLAGS[kind] | SlabFlags::NO_MERGE,
            ctor: None,
            keeps_asked: true,
            id: Some(number),
        };
        let wanted = self.as_patterned(wanted);
        // Where somebody else was first, that one is it.
        self.make_cache(root, &wanted, gfp).ok().or_else(|| root.cache(number as u16))
    }

    /// What no cache serves: a block of pages, or nothing.
    #[cold]
    #[inline(never)]
    #[track_caller]
    fn kmalloc_large(self, size: usize, gfp: Gfp, node: i32) -> Answer {
        if size == 0 {
            return Answer::given(ZERO_SIZE_PTR);
        }
        self.kmalloc_pages(size, gfp, node).into()
    }

    #[track_caller]
    fn kmalloc_pages(self, size: usize, gfp: Gfp, node: i32) -> Result<NonNull<u8>, AllocError> {
        if gfp.contains(Gfp::HIGHMEM) {
            return Err(self.pages.refuse(gfp, 0, crate::gfp::GfpError::HighMemNeedsPage));
        }
        if size > (1 << P::PAGE_SHIFT) << self.pages.max_order() {
            return Err(AllocError::NoMemory);
        }
        let order = super::order_for(size, P::PAGE_SHIFT);
        let got = self.large_block(gfp, node, order);
        if self.tracing() {
            let asked = Asked { bytes: size, gfp, node: usize::try_from(node).ok() };
            self.trace_kmalloc(None, (1 << P::PAGE_SHIFT) << order, asked, got);
        }
        got
    }

    #[track_caller]
    fn large_block(&self, gfp: Gfp, node: i32, order: u32) -> Result<NonNull<u8>, AllocError> {
        let page = self.pages.alloc_pages_node(node, gfp | Gfp::COMP, order)?;
        let Some(at) = self.pages.page_address(page) else {
            let _ = self.pages.__free_pages(page, order);
            return Err(AllocError::NoMemory);
        };
        let _ = at.as_ptr().expose_provenance();
        page.mark_slab();
        self.tag(at.addr().get(), (1 << P::PAGE_SHIFT) << order);
        Ok(at)
    }

    /// The block of pages that a large kmalloc returned at an address.
    pub(super) fn large_at(&self, at: *mut u8) -> Option<&'a Page> {
        let pfn = self.pages.platform().direct_unmap(at)?;
        let page = self.pages.pfn_to_page(pfn)?;
        let mask = (1 << P::PAGE_SHIFT) - 1;
        (at.addr() & mask == 0 && self.is_large(pfn)).then_some(page)
    }

    /// Whether a large kmalloc's block of pages begins at a frame.
    pub(crate) fn is_large(&self, pfn: Pfn) -> bool {
        let page = self.pages.pfn_to_page(pfn);
        page.is_some_and(|page| page.flags().contains(PageFlags::SLAB | PageFlags::ALLOCATED))
            && self.owner_of(pfn) == 0
    }

    fn owner_of(&self, pfn: Pfn) -> u16 {
        self.pages.platform().direct_map(pfn).map_or(0, |at| self.owner_at(at.as_ptr()))
    }

    /// The owner of the frame that an address is in.
    pub(super) fn owner_at(&self, at: *mut u8) -> u16 {
        let map = self.pages.map();
        map.owner_at(map.direct_offset(at.addr()), P::PAGE_SHIFT)
    }

    /// Frees what kmalloc returned.
    #[inline(always)]
    #[track_caller]
    pub(crate) fn kfree(self, at: *mut u8) -> Result<(), Misuse> {
        self.free(at, None)
    }

    /// Frees an address that is no slab's: null, nothing, or a block of pages.
    #[track_caller]
    pub(super) fn free_large(&self, at: *mut u8) -> Result<(), Misuse> {
        if at.is_null() || at == ZERO_SIZE_PTR.as_ptr() {
            return Ok(());
        }
        let Some(page) = self.large_at(at) else {
            // Not in a closure, which has no caller.
            return Err(match self.pages.refuse_vmalloc(at) {
                Some(misuse) => misuse,
                None => self.pages.misuse(Misuse::NotAnObject { addr: at.addr() }),
            });
        };
        self.end_large(at, page, 0)
    }

    /// Frees a large object whose frames have that owner.
    #[track_caller]
    pub(super) fn end_large(&self, at: *mut u8, page: &Page, owner: u16) -> Result<(), Misuse> {
        // Of two that free it at once one takes the mark off.
        if !page.take_slab_mark() {
            return Err(self.pages.misuse(Misuse::NotAnObject { addr: at.addr() }));
        }
        // Freed twice, and the block went meanwhile: that mark was somebody else's.
        let own = match owner {
            0 => self.owner_at(at) == 0,
            owner => self.change_owner(at, owner, 0),
        };
        if !own {
            page.mark_slab();
            return Err(self.pages.misuse(Misuse::NotAnObject { addr: at.addr() }));
        }
        self.untag(at.addr());
        self.trace_free(at.addr(), None, (1 << P::PAGE_SHIFT) << page.state().order(), false);
        self.forget_areas(at.addr());
        // Looked at now that the block is nobody else's.
        let freed = self.pages.__free_pages(page, page.state().order());
        if freed.is_err() {
            // It is still in use as a page.
            page.mark_slab();
        }
        freed
    }

    /// `ksize`: the bytes that may be used at an address that kmalloc returned; 0 for null and for what
    /// kmalloc(0) returned. With red zones, and of sampled objects, those that were asked for. `None` for other addresses.
    pub(crate) fn ksize(&self, at: *const u8) -> Option<usize> {
        let at = at.cast_mut();
        if at.is_null() || at == ZERO_SIZE_PTR.as_ptr() {
            return Some(0);
        }
        if let Some((d, object)) = self.live_at(at) {
            return Some(self.usable(d, &object));
        }
        if let Some(size) = self.sampled_size(at) {
            return Some(size);
        }
        let page = self.large_at(at)?;
        Some((1 << P::PAGE_SHIFT) << page.state().order())
    }

    /// `krealloc`.
    ///
    /// # Safety
    /// `at` is null or from kmalloc, and nobody uses it any more if this succeeds.
    #[track_caller]
    pub(crate) unsafe fn krealloc(
        &self,
        at: *mut u8,
        size: usize,
        gfp: Gfp,
    ) -> Result<NonNull<u8>, AllocError> {
        let Some(old) = self.ksize(at) else {
            self.pages.misuse(Misuse::NotAnObject { addr: at.addr() });
            return Err(AllocError::NoMemory);
        };
        if size == 0 {
            let _ = self.kfree(at);
            return Ok(ZERO_SIZE_PTR);
        }
        if size <= old
            && let Some(at) = NonNull::new(at)
        {
            if gfp.contains(Gfp::ZERO) {
                // What it does not hold now is zeros when it grows again.
                // SAFETY: `old` bytes may be used there.
                unsafe { at.add(size).write_bytes(0, old - size) };
            }
            return Ok(at);
        }
        let new = self.kmalloc(size, gfp)?;
        // SAFETY: `old` bytes may be used there, more than that here, and the new block is nobody's yet.
        unsafe { new.as_ptr().copy_from_nonoverlapping(at, old) };
        let _ = self.kfree(at);
        Ok(new)
    }
}
