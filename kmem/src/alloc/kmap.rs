//! `Kmap`, `KmapAtomic`, `KmapLocal`: pages that can be reached as long as these are there \[H1, H2\].

use super::Pages;
use crate::{
    context::{Atomic, Process},
    error::{AllocError, Misuse},
    kmem::Kmem,
    page::Page,
    platform::Platform,
};
use core::{
    fmt,
    marker::PhantomData,
    ops::{Deref, DerefMut},
    ptr::NonNull,
};

/// Where a page can be reached for the time. The page may be shown elsewhere too, so there are no references to
/// what is in it: [`Pages::kmap`] gives those to who owns it. It does not leave the thread.
pub struct MappedPage<'a, P: Platform> {
    kmem: &'a Kmem<P>,
    at: NonNull<u8>,
    _stays: PhantomData<*mut ()>,
}

impl<'a, P: Platform> MappedPage<'a, P> {
    fn new(kmem: &'a Kmem<P>, at: NonNull<u8>) -> Self {
        MappedPage { kmem, at, _stays: PhantomData }
    }

    /// The address of the page's first byte.
    #[inline(always)]
    pub fn as_ptr(&self) -> NonNull<u8> {
        self.at
    }

    #[track_caller]
    fn part(&self, offset: usize, len: usize) -> Result<*mut u8, Misuse> {
        self.kmem.inside_page(offset, len)?;
        // SAFETY: inside of the page.
        Ok(unsafe { self.at.add(offset) }.as_ptr())
    }

    /// Copies `from` to the page, from byte `offset` on.
    ///
    /// # Safety
    /// What is in the page is the caller's to change, and nobody else uses those bytes meanwhile. Who slept since it was
    /// mapped is a [`Task`](crate::context::Task), whose mappings come back with it.
    ///
    /// # Errors
    /// [`Misuse::OutsidePage`], reported as well, and nothing copied.
    #[track_caller]
    pub unsafe fn copy_from(&self, offset: usize, from: &[u8]) -> Result<(), Misuse> {
        let to = self.part(offset, from.len())?;
        // SAFETY: the bytes are mapped as long as `self` is, and the caller's.
        unsafe { to.copy_from(from.as_ptr(), from.len()) };
        Ok(())
    }

    /// Copies bytes of the page to `to`, from byte `offset` on.
    ///
    /// # Safety
    /// What is in the page is the caller's to read, and nobody changes those bytes meanwhile; as for
    /// [`copy_from`](Self::copy_from), who slept is a task.
    ///
    /// # Errors
    /// As [`copy_from`](Self::copy_from).
    #[track_caller]
    pub unsafe fn copy_to(&self, offset: usize, to: &mut [u8]) -> Result<(), Misuse> {
        let from = self.part(offset, to.len())?;
        // SAFETY: as in `copy_from`.
        unsafe { to.as_mut_ptr().copy_from(from, to.len()) };
        Ok(())
    }

    /// Zeroes `len` bytes of the page, from byte `offset` on.
    ///
    /// # Safety
    /// As [`copy_from`](Self::copy_from).
    ///
    /// # Errors
    /// As [`copy_from`](Self::copy_from).
    #[track_caller]
    pub unsafe fn zero(&self, offset: usize, len: usize) -> Result<(), Misuse> {
        let at = self.part(offset, len)?;
        // SAFETY: as in `copy_from`.
        unsafe { at.write_bytes(0, len) };
        Ok(())
    }
}

impl<P: Platform> fmt::Debug for MappedPage<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MappedPage({:#x})", self.at.addr())
    }
}

macro_rules! guard {
    ($name:ident) => {
        impl<'a, P: Platform> Deref for $name<'a, P> {
            type Target = MappedPage<'a, P>;

            #[inline(always)]
            fn deref(&self) -> &MappedPage<'a, P> {
                &self.map
            }
        }

        impl<P: Platform> fmt::Debug for $name<'_, P> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.map, f)
            }
        }
    };
}

/// A page that `kmap` shows, until this goes.
///
/// ```
/// # use kmem_hosted::{Machine, Shape};
/// use kmem::{Gfp, alloc::Kmap};
/// # let machine = Machine::new(Shape::x86_32(1 << 30)).unwrap();
/// # let kmem = &*machine;
/// machine.run(|process| {
///     let page = kmem.alloc_page(Gfp::HIGHUSER)?;
///     assert_eq!(kmem.page_address(page), None);
///     let map = Kmap::new(kmem, process, page)?;
///     // SAFETY: the page is ours, and nobody else's.
///     unsafe { map.copy_from(100, b"high").unwrap() };
///     drop(map);
///     kmem.__free_page(page).unwrap();
///     Ok::<(), kmem::AllocError>(())
/// }).unwrap().unwrap();
/// ```
#[must_use = "the page is unmapped as soon as it goes"]
pub struct Kmap<'a, P: Platform> {
    map: MappedPage<'a, P>,
    page: &'a Page,
}

guard!(Kmap);

impl<'a, P: Platform> Kmap<'a, P> {
    /// Maps a page, as [`Kmem::kmap`] does; the capability says that it may sleep.
    ///
    /// # Errors
    /// As [`Kmem::kmap`].
    #[track_caller]
    pub fn new(kmem: &'a Kmem<P>, _process: &Process, page: &'a Page) -> Result<Self, AllocError> {
        let at = kmem.kmap(page)?;
        Ok(Kmap { map: MappedPage::new(kmem, at), page })
    }
}

impl<P: Platform> Drop for Kmap<'_, P> {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: the address went with the guard. A misuse is reported by the callee.
        let _ = unsafe { self.map.kmem.kunmap(self.page) };
    }
}

/// A page that `kmap_atomic` shows on this CPU; preemption is off until it goes. Made by
/// [`Kmem::with_kmap_atomic`].
pub struct KmapAtomic<'a, P: Platform> {
    map: MappedPage<'a, P>,
}

guard!(KmapAtomic);

impl<P: Platform> Drop for KmapAtomic<'_, P> {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: as for `Kmap`.
        let _ = unsafe { self.map.kmem.kunmap_atomic(self.map.at.as_ptr()) };
    }
}

/// A page that `kmap_local_page` shows to this task. Made by [`Kmem::with_kmap_local`].
pub struct KmapLocal<'a, P: Platform> {
    map: MappedPage<'a, P>,
}

guard!(KmapLocal);

impl<P: Platform> Drop for KmapLocal<'_, P> {
    #[inline]
    fn drop(&mut self) {
        // SAFETY: as for `Kmap`.
        let _ = unsafe { self.map.kmem.kunmap_local(self.map.at.as_ptr()) };
    }
}

impl<P: Platform> Kmem<P> {
    /// Runs `f` with a page mapped by [`kmap`](Self::kmap).
    ///
    /// # Errors
    /// As [`kmap`](Self::kmap).
    #[track_caller]
    pub fn with_kmap<R>(
        &self,
        process: &Process,
        page: &Page,
        f: impl FnOnce(&Kmap<'_, P>) -> R,
    ) -> Result<R, AllocError> {
        Ok(f(&Kmap::new(self, process, page)?))
    }

    /// Runs `f` with a page mapped by [`kmap_atomic`](Self::kmap_atomic): what runs inside cannot sleep \[C2\].
    ///
    /// # Errors
    /// As [`kmap_atomic`](Self::kmap_atomic).
    #[track_caller]
    pub fn with_kmap_atomic<R>(
        &self,
        process: &mut Process,
        page: &Page,
        f: impl FnOnce(Atomic<'_>, &KmapAtomic<'_, P>) -> R,
    ) -> Result<R, Misuse> {
        let _ = process;
        self.with_kmap_atomic_in(Atomic::new(), page, f)
    }

    /// As [`with_kmap_atomic`](Self::with_kmap_atomic), from where one cannot sleep anyway.
    ///
    /// # Errors
    /// As [`kmap_atomic`](Self::kmap_atomic).
    #[track_caller]
    pub fn with_kmap_atomic_in<R>(
        &self,
        _atomic: Atomic<'_>,
        page: &Page,
        f: impl FnOnce(Atomic<'_>, &KmapAtomic<'_, P>) -> R,
    ) -> Result<R, Misuse> {
        let map = KmapAtomic { map: MappedPage::new(self, self.kmap_atomic(page)?) };
        Ok(f(Atomic::new(), &map))
    }

    /// Runs `f` with a page mapped by [`kmap_local_page`](Self::kmap_local_page): what runs inside may sleep if the caller
    /// may. Mappings within are undone before this one.
    ///
    /// # Errors
    /// As [`kmap_local_page`](Self::kmap_local_page).
    #[track_caller]
    pub fn with_kmap_local<R>(
        &self,
        page: &Page,
        f: impl FnOnce(&KmapLocal<'_, P>) -> R,
    ) -> Result<R, Misuse> {
        let map = KmapLocal { map: MappedPage::new(self, self.kmap_local_page(page)?) };
        Ok(f(&map))
    }
}

/// What is in one frame of a block, for its owner alone. Made by [`Pages::kmap`].
#[must_use = "the frame is unmapped as soon as it goes"]
pub struct KmapMut<'a, P: Platform> {
    map: Kmap<'a, P>,
}

impl<'k, P: Platform> Pages<'k, P> {
    /// Maps the block's frame with number `index`, and shows what is in it: as long as the owner is borrowed nobody
    /// else has a view of it.
    ///
    /// ```
    /// # use kmem_hosted::{Machine, Shape};
    /// use kmem::{Gfp, alloc::Pages};
    /// # let machine = Machine::new(Shape::x86_32(1 << 30)).unwrap();
    /// # let kmem = &*machine;
    /// machine.run(|process| {
    ///     let mut block = Pages::new(kmem, Gfp::HIGHUSER, 1)?;
    ///     block.kmap(process, 1)?.fill(7);
    ///     assert_eq!(block.kmap(process, 1)?[4095], 7);
    ///     Ok::<(), kmem::AllocError>(())
    /// }).unwrap().unwrap();
    /// ```
    ///
    /// # Errors
    /// As [`Kmem::kmap`]; `NoMemory`, after a report, for a frame that the block does not have.
    #[track_caller]
    pub fn kmap(&mut self, process: &Process, index: usize) -> Result<KmapMut<'_, P>, AllocError> {
        let page = self.frame(index)?;
        Ok(KmapMut { map: Kmap::new(self.kmem(), process, page)? })
    }
}

impl<P: Platform> Deref for KmapMut<'_, P> {
    type Target = [u8];

    #[inline(always)]
    fn deref(&self) -> &[u8] {
        // SAFETY: the frame is mapped, and its owner is borrowed mutably, so no view of it changes anything.
        unsafe { NonNull::slice_from_raw_parts(self.map.at, self.map.kmem.page_size()).as_ref() }
    }
}

impl<P: Platform> DerefMut for KmapMut<'_, P> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and this view is borrowed mutably: it is the only one.
        unsafe { NonNull::slice_from_raw_parts(self.map.at, self.map.kmem.page_size()).as_mut() }
    }
}

impl<P: Platform> fmt::Debug for KmapMut<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.map, f)
    }
}
