//! The classic calls of vmalloc \[V1–V4\].

use super::Kmem;
use crate::{
    error::{AllocError, Misuse},
    gfp::{
        Gfp,
        typed::{Capability, TypedGfp},
    },
    page::Page,
    platform::{PageProt, Platform},
    reclaim::Vmscan,
    types::Pfn,
    vmalloc::{By, VmAreaInfo, VmAuditError, VmFlags, VmallocAudit, Vmap, Wanted},
};
use core::ptr::NonNull;

impl<P: Platform> Kmem<P> {
    #[inline(always)]
    pub(crate) fn vmap_layer(&self) -> Vmap<'_, P, Vmscan> {
        self.pages.reclaim().vmap(&self.pages)
    }

    /// `vmalloc`: at least `size` bytes at consecutive addresses, aligned to a frame, from frames that need not
    /// be, high ones preferred \[V1\]. Not for devices: the frames are found by
    /// [`vmalloc_to_page`](Self::vmalloc_to_page). Free it with [`vfree`](Self::vfree).
    ///
    /// Context: process context; may sleep.
    ///
    /// # Errors
    /// `NoMemory` for want of frames or addresses, on a platform without a vmalloc range, and for size 0; `Context`,
    /// after a report, where sleeping is not allowed \[V2\].
    ///
    /// See [`vmalloc`](https://docs.kernel.org/core-api/mm-api.html#c.vmalloc).
    #[inline]
    #[track_caller]
    pub fn vmalloc(&self, size: usize) -> Result<NonNull<u8>, AllocError> {
        self.vmap_layer().vmalloc(Wanted::new(size, Gfp::KERNEL))
    }

    /// [`vmalloc`](Self::vmalloc) with a capability \[C2\].
    ///
    /// # Errors
    /// As [`vmalloc`](Self::vmalloc).
    #[track_caller]
    pub fn vmalloc_in<const ZONE: u8>(
        &self,
        _capability: impl Capability<true>,
        gfp: TypedGfp<true, ZONE>,
        size: usize,
    ) -> Result<NonNull<u8>, AllocError> {
        self.__vmalloc(size, gfp.gfp())
    }

    /// `__vmalloc`: as [`vmalloc`](Self::vmalloc), with flags for the frames. `__GFP_NOFAIL` tries again for as long as
    /// the request could be served at all.
    ///
    /// # Errors
    /// As [`vmalloc`](Self::vmalloc); `Invalid` for flags that contradict each other.
    #[track_caller]
    pub fn __vmalloc(&self, size: usize, gfp: Gfp) -> Result<NonNull<u8>, AllocError> {
        self.vmap_layer().vmalloc(Wanted::new(size, gfp))
    }

    /// `vzalloc`: as [`vmalloc`](Self::vmalloc), zeroed.
    ///
    /// # Errors
    /// As [`vmalloc`](Self::vmalloc).
    #[track_caller]
    pub fn vzalloc(&self, size: usize) -> Result<NonNull<u8>, AllocError> {
        self.__vmalloc(size, Gfp::KERNEL | Gfp::ZERO)
    }

    /// `vmalloc_node`: as [`vmalloc`](Self::vmalloc), from node `node` if that has memory; −1 is the caller's.
    ///
    /// # Errors
    /// As [`vmalloc`](Self::vmalloc).
    #[track_caller]
    pub fn vmalloc_node(&self, size: usize, node: i32) -> Result<NonNull<u8>, AllocError> {
        self.vmap_layer().vmalloc(Wanted { node, ..Wanted::new(size, Gfp::KERNEL) })
    }

    /// `vzalloc_node`: as [`vmalloc_node`](Self::vmalloc_node), zeroed.
    ///
    /// # Errors
    /// As [`vmalloc`](Self::vmalloc).
    #[track_caller]
    pub fn vzalloc_node(&self, size: usize, node: i32) -> Result<NonNull<u8>, AllocError> {
        let gfp = Gfp::KERNEL | Gfp::ZERO;
        self.vmap_layer().vmalloc(Wanted { node, ..Wanted::new(size, gfp) })
    }

    /// `vmalloc_32`: as [`vmalloc`](Self::vmalloc), from frames that 32-bit devices reach.
    ///
    /// # Errors
    /// As [`vmalloc`](Self::vmalloc).
    #[track_caller]
    pub fn vmalloc_32(&self, size: usize) -> Result<NonNull<u8>, AllocError> {
        self.__vmalloc(size, Gfp::KERNEL | Gfp::DMA32)
    }

    /// `vmalloc_user`: as [`vzalloc`](Self::vzalloc), and marked as fit to be shown to user space.
    ///
    /// # Errors
    /// As [`vmalloc`](Self::vmalloc).
    #[track_caller]
    pub fn vmalloc_user(&self, size: usize) -> Result<NonNull<u8>, AllocError> {
        let flags = VmFlags::ALLOC | VmFlags::USERMAP;
        let gfp = Gfp::KERNEL | Gfp::ZERO;
        self.vmap_layer().vmalloc(Wanted { flags, ..Wanted::new(size, gfp) })
    }

    /// `vmalloc_huge`: as [`vmalloc`](Self::vmalloc), from blocks that one large entry maps, as far as the size is at
    /// least such a block and they are to be had without effort \[V4\].
    ///
    /// # Errors
    /// As [`vmalloc`](Self::vmalloc).
    #[track_caller]
    pub fn vmalloc_huge(&self, size: usize, gfp: Gfp) -> Result<NonNull<u8>, AllocError> {
        let flags = VmFlags::ALLOC | VmFlags::ALLOW_HUGE_VMAP;
        self.vmap_layer().vmalloc(Wanted { flags, ..Wanted::new(size, gfp) })
    }

    /// `vfree`: frees what vmalloc and its variants returned, and areas of [`vmap`](Self::vmap) with
    /// `VM_MAP_PUT_PAGES`. Null is left alone.
    ///
    /// Context: any but NMI. In atomic context the frames come back later, with the next call here in process
    /// context or with reclaim \[V2\].
    ///
    /// # Safety
    /// Nobody uses the memory any more. A wrong address does no harm: it is found out.
    ///
    /// # Errors
    /// [`Misuse`], reported as well, and nothing changed; save that an area of which somebody else freed a frame
    /// is freed all the same.
    ///
    /// See [`vfree`](https://docs.kernel.org/core-api/mm-api.html#c.vfree).
    #[inline]
    #[track_caller]
    pub unsafe fn vfree(&self, at: *const u8) -> Result<(), Misuse> {
        if at.is_null() { Ok(()) } else { self.vmap_layer().free(at.addr(), By::Vfree) }
    }

    /// `vmap`: shows pages one after the other at an address of their own. They stay the caller's, unless `flags`
    /// have `VM_MAP_PUT_PAGES`: then [`vfree`](Self::vfree) drops a reference to each. Other flags are ignored.
    ///
    /// Context: process context; may sleep.
    ///
    /// # Errors
    /// As [`vmalloc`](Self::vmalloc); `NoMemory` for no pages, and, after a report, for pages of another machine.
    ///
    /// See [`vmap`](https://docs.kernel.org/core-api/mm-api.html#c.vmap).
    #[track_caller]
    pub fn vmap(
        &self,
        pages: &[&Page],
        flags: VmFlags,
        prot: PageProt,
    ) -> Result<NonNull<u8>, AllocError> {
        self.vmap_layer().vmap(pages, flags, prot)
    }

    /// `vunmap`: takes the mapping that [`vmap`](Self::vmap) or [`get_vm_area`](Self::get_vm_area) made away. The pages
    /// stay. Null is left alone.
    ///
    /// Context: any but NMI.
    ///
    /// # Safety
    /// As [`vfree`](Self::vfree).
    ///
    /// # Errors
    /// As [`vfree`](Self::vfree).
    #[track_caller]
    pub unsafe fn vunmap(&self, at: *const u8) -> Result<(), Misuse> {
        if at.is_null() { Ok(()) } else { self.vmap_layer().free(at.addr(), By::Vunmap) }
    }

    /// `get_vm_area`: addresses for `size` bytes, with nothing there until [`vm_map_pages`](Self::vm_map_pages). Give
    /// them back with [`vunmap`](Self::vunmap).
    ///
    /// # Errors
    /// As [`vmalloc`](Self::vmalloc); `NoMemory` for more than the machine has memory.
    #[track_caller]
    pub fn get_vm_area(&self, size: usize) -> Result<NonNull<u8>, AllocError> {
        self.vmap_layer().get_vm_area(size)
    }

    /// `vm_map_pages`: shows pages in an area from [`get_vm_area`](Self::get_vm_area), behind those it shows already. They
    /// stay the caller's.
    ///
    /// Context: process context; may sleep. Not while somebody else frees the area or maps into it. Meanwhile
    /// [`vmalloc_to_page`](Self::vmalloc_to_page) and its like find nothing there.
    ///
    /// # Errors
    /// As [`vmap`](Self::vmap); `NoMemory` for more pages than the area has room for, and, after a report, for an
    /// address where no such area is. The area is as it was then.
    #[track_caller]
    pub fn vm_map_pages(
        &self,
        at: NonNull<u8>,
        pages: &[&Page],
        prot: PageProt,
    ) -> Result<(), AllocError> {
        self.vmap_layer().vm_map_pages(at, pages, prot)
    }

    /// `ioremap_prot`: shows `size` bytes from physical address `phys` on, which must not be memory. Free it with
    /// [`iounmap`](Self::iounmap).
    ///
    /// Context: process context; may sleep.
    ///
    /// # Errors
    /// As [`vmalloc`](Self::vmalloc); `NoMemory` where addresses wrap or are beyond the frame space, and, after a
    /// report, for memory.
    #[track_caller]
    pub fn ioremap_prot(
        &self,
        phys: u64,
        size: usize,
        prot: PageProt,
    ) -> Result<NonNull<u8>, AllocError> {
        self.vmap_layer().ioremap(phys, size, prot)
    }

    /// `ioremap`: as [`ioremap_prot`](Self::ioremap_prot), not cached.
    ///
    /// # Errors
    /// As [`ioremap_prot`](Self::ioremap_prot).
    #[track_caller]
    pub fn ioremap(&self, phys: u64, size: usize) -> Result<NonNull<u8>, AllocError> {
        self.ioremap_prot(phys, size, PageProt::KERNEL_NOCACHE)
    }

    /// `iounmap`: takes the mapping that [`ioremap`](Self::ioremap) made away; any address of its first frame will do.
    ///
    /// Context: any but NMI.
    ///
    /// # Safety
    /// As [`vfree`](Self::vfree).
    ///
    /// # Errors
    /// As [`vfree`](Self::vfree).
    #[track_caller]
    pub unsafe fn iounmap(&self, at: *const u8) -> Result<(), Misuse> {
        self.vmap_layer().free(at.addr(), By::Iounmap)
    }

    /// `vmalloc_to_page`: the page that an area shows at an address \[V4\]; `None` where there is none.
    ///
    /// Context: any but NMI.
    pub fn vmalloc_to_page(&self, at: *const u8) -> Option<&Page> {
        self.vmap_layer().to_page(at.addr())
    }

    /// `vmalloc_to_pfn`: the frame that an area shows at an address \[V4\].
    ///
    /// Context: any but NMI.
    pub fn vmalloc_to_pfn(&self, at: *const u8) -> Option<Pfn> {
        self.vmap_layer().to_pfn(at.addr())
    }

    /// `vm_unmap_aliases`: finishes what was freed: frames come back, no CPU knows an old mapping any more, and all
    /// free addresses are one again \[V3\]. Returns how many areas that took. Elsewhere than in process context it does
    /// nothing.
    pub fn vm_unmap_aliases(&self) -> u64 {
        self.vmap_layer().unmap_aliases()
    }

    /// Calls `f` with each area that is in use or not purged, by address \[V4\].
    pub fn for_each_vmap_area(&self, f: impl FnMut(&VmAreaInfo)) {
        self.vmap_layer().each(f);
    }

    /// Checks that every area is where it should be, and its frames in use. For a quiet machine.
    ///
    /// # Errors
    /// [`VmAuditError`].
    pub fn audit_vmalloc(&self) -> Result<VmallocAudit, VmAuditError> {
        self.vmap_layer().audit()
    }
}
