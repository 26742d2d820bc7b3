//! The calls for high memory \[H1, H2\].

use super::Kmem;
use crate::{
    error::{AllocError, Misuse},
    highmem::{HighmemAudit, HighmemAuditError, KmType, Maps},
    page::Page,
    platform::Platform,
    reclaim::Vmscan,
};
use core::ptr::NonNull;

impl<P: Platform> Kmem<P> {
    #[inline(always)]
    fn maps(&self) -> Maps<'_, P, Vmscan> {
        Maps { state: &self.highmem, pages: &self.pages }
    }

    /// `kmap`: where a page can be reached until [`kunmap`](Self::kunmap). A low page has its address; a high one is
    /// mapped, at one address however often it is asked for. Where all places for mappings are taken it sleeps until
    /// there is one; who sleeps longest is served first \[H1\].
    ///
    /// Context: process context; may sleep, for low pages too as far as the check goes.
    ///
    /// # Errors
    /// `Context`, after a report, where sleeping is not allowed; `NoMemory` on a platform that cannot map the
    /// page, and, after a report, for a page of another machine.
    ///
    /// See [`kmap`](https://docs.kernel.org/mm/highmem.html#c.kmap).
    #[inline]
    #[track_caller]
    pub fn kmap(&self, page: &Page) -> Result<NonNull<u8>, AllocError> {
        self.maps().kmap(page)
    }

    /// `kunmap`: ends what one [`kmap`](Self::kmap) of the page began.
    ///
    /// Context: any but NMI.
    ///
    /// # Safety
    /// Who called `kmap` does not use the address any more. A page that is not mapped does no harm: it is found out.
    ///
    /// # Errors
    /// [`Misuse`], reported as well, and nothing changed.
    ///
    /// See [`kunmap`](https://docs.kernel.org/mm/highmem.html#c.kunmap).
    #[inline]
    #[track_caller]
    pub unsafe fn kunmap(&self, page: &Page) -> Result<(), Misuse> {
        self.maps().kunmap(page)
    }

    /// `kmap_local_page`: where the running task reaches a page until [`kunmap_local`](Self::kunmap_local). What is mapped
    /// last is undone first. Never sleeps, but who has such mappings may: the task stays with its CPU
    /// \[H2\].
    ///
    /// Context: any, NMIs included. At most [`KM_MAX_IDX`](crate::context::KM_MAX_IDX) on a CPU, those of interrupts among
    /// them.
    ///
    /// # Errors
    /// [`Misuse`], reported as well: the places are all used, the caller is on no CPU and the page is high, the page
    /// is another machine's or cannot be mapped.
    ///
    /// See [`kmap_local_page`](https://docs.kernel.org/mm/highmem.html#c.kmap_local_page).
    #[inline]
    #[track_caller]
    pub fn kmap_local_page(&self, page: &Page) -> Result<NonNull<u8>, Misuse> {
        self.maps().kmap_local(page)
    }

    /// `kunmap_local`: undoes the last [`kmap_local_page`](Self::kmap_local_page), whose address or any in the same
    /// page is given.
    ///
    /// Context: that of `kmap_local_page`.
    ///
    /// # Safety
    /// Nobody uses the address any more. A wrong one does no harm: it is found out.
    ///
    /// # Errors
    /// [`Misuse`], reported as well, and nothing changed: a mapping that is not the last, or none of this CPU's.
    #[inline]
    #[track_caller]
    pub unsafe fn kunmap_local(&self, addr: *const u8) -> Result<(), Misuse> {
        self.maps().kunmap_local(addr.addr())
    }

    /// `kmap_atomic`: as [`kmap_local_page`](Self::kmap_local_page), with preemption off until
    /// [`kunmap_atomic`](Self::kunmap_atomic), for low pages too.
    ///
    /// Context: any, NMIs included. What follows may not sleep.
    ///
    /// # Errors
    /// As [`kmap_local_page`](Self::kmap_local_page); preemption is as it was then.
    ///
    /// See [`kmap_atomic`](https://docs.kernel.org/mm/highmem.html#c.kmap_atomic).
    #[inline]
    #[track_caller]
    pub fn kmap_atomic(&self, page: &Page) -> Result<NonNull<u8>, Misuse> {
        self.maps().kmap_atomic(page)
    }

    /// `kunmap_atomic`: undoes the last [`kmap_atomic`](Self::kmap_atomic). Something else may be there the next
    /// moment.
    ///
    /// # Safety
    /// The address is of a mapping by the other call that was made on this CPU and is not undone yet, and nobody uses it
    /// any more. A wrong one of high memory does no harm: it is found out; one of low memory ends somebody else's section.
    ///
    /// # Errors
    /// As [`kunmap_local`](Self::kunmap_local); preemption stays off then.
    #[inline]
    #[track_caller]
    pub unsafe fn kunmap_atomic(&self, addr: *const u8) -> Result<(), Misuse> {
        self.maps().kunmap_atomic(addr.addr())
    }

    /// `kmap_atomic` as the textbook has it: the place on the CPU that is there for the purpose. They do not nest,
    /// and may be undone in any order.
    ///
    /// Context: as [`kmap_atomic`](Self::kmap_atomic).
    ///
    /// # Errors
    /// As [`kmap_atomic`](Self::kmap_atomic); [`Misuse::KmTypeInUse`] where the purpose has a mapping on the CPU.
    #[track_caller]
    pub fn kmap_atomic_type(&self, page: &Page, purpose: KmType) -> Result<NonNull<u8>, Misuse> {
        self.maps().kmap_atomic_type(page, purpose)
    }

    /// `kunmap_atomic` as the textbook has it: undoes [`kmap_atomic_type`](Self::kmap_atomic_type).
    ///
    /// # Safety
    /// The address is of a mapping by the other call that was made on this CPU and is not undone yet, and nobody uses it
    /// any more. A wrong one of high memory does no harm: it is found out; one of low memory ends somebody else's section.
    ///
    /// # Errors
    /// [`Misuse`], reported as well, and nothing changed: the purpose has no mapping there on this CPU.
    #[track_caller]
    pub unsafe fn kunmap_atomic_type(
        &self,
        addr: *const u8,
        purpose: KmType,
    ) -> Result<(), Misuse> {
        self.maps().kunmap_atomic_type(addr.addr(), purpose)
    }

    /// `page_address`: where a page can be reached by all CPUs: by the direct map, or, while somebody has it mapped, by
    /// [`kmap`](Self::kmap) \[F3\]. `None` for a high page that is not mapped, and in an NMI for one
    /// that is not found without a lock.
    #[inline]
    pub fn page_address(&self, page: &Page) -> Option<NonNull<u8>> {
        self.maps().page_address(page)
    }

    /// `virt_to_page`: the page at an address of the direct map or of [`kmap`](Self::kmap)'s, as long as it is mapped;
    /// `None` for any other address. One of the vmalloc range or of a temporary mapping is reported as well: such a
    /// mapping says nothing on another CPU.
    #[inline]
    #[track_caller]
    pub fn virt_to_page(&self, addr: *const u8) -> Option<&Page> {
        self.maps().to_page(addr)
    }

    /// `kmap_to_page`: [`virt_to_page`](Self::virt_to_page) under another name.
    #[inline]
    #[track_caller]
    pub fn kmap_to_page(&self, addr: *const u8) -> Option<&Page> {
        self.virt_to_page(addr)
    }

    /// Says whether a page has those bytes.
    #[track_caller]
    pub(crate) fn inside_page(&self, offset: usize, len: usize) -> Result<(), Misuse> {
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.page_size());
        if inside { Ok(()) } else { Err(self.pages.misuse(Misuse::OutsidePage { offset, len })) }
    }

    /// Runs `f` on the address of a page, mapped for the time if it is high.
    #[track_caller]
    fn reach(&self, page: &Page, f: impl FnOnce(NonNull<u8>)) -> Result<(), Misuse> {
        let at = self.kmap_local_page(page)?;
        f(at);
        // SAFETY: mapped above, and not used any more.
        unsafe { self.kunmap_local(at.as_ptr()) }
    }

    /// `clear_highpage`: zeroes a page, high or low.
    ///
    /// Context: as [`kmap_local_page`](Self::kmap_local_page); that goes for the copies below too.
    ///
    /// # Safety
    /// What is in the page is the caller's to change, and nobody else uses it meanwhile.
    ///
    /// # Errors
    /// As [`kmap_local_page`](Self::kmap_local_page), and nothing changed.
    #[track_caller]
    pub unsafe fn clear_highpage(&self, page: &Page) -> Result<(), Misuse> {
        // SAFETY: the caller's.
        unsafe { self.zero_user(page, 0, self.page_size()) }
    }

    /// `zero_user`: zeroes `len` bytes of a page, from byte `start` on.
    ///
    /// # Safety
    /// As [`clear_highpage`](Self::clear_highpage), for those bytes.
    ///
    /// # Errors
    /// As [`clear_highpage`](Self::clear_highpage); [`Misuse::OutsidePage`], reported as well.
    #[track_caller]
    pub unsafe fn zero_user(&self, page: &Page, start: usize, len: usize) -> Result<(), Misuse> {
        self.inside_page(start, len)?;
        // SAFETY: inside of the page, which is mapped, and the caller's.
        self.reach(page, |at| unsafe { at.add(start).write_bytes(0, len) })
    }

    /// `copy_highpage`: copies what is in page `from` to page `to`.
    ///
    /// # Safety
    /// As [`clear_highpage`](Self::clear_highpage) for `to`; nobody changes `from` meanwhile.
    ///
    /// # Errors
    /// As [`clear_highpage`](Self::clear_highpage).
    #[track_caller]
    pub unsafe fn copy_highpage(&self, to: &Page, from: &Page) -> Result<(), Misuse> {
        let len = self.page_size();
        let mut inner = Ok(());
        self.reach(from, |from| {
            // SAFETY: both are pages and mapped, and the caller's.
            inner = self.reach(to, |to| unsafe { to.copy_from(from, len) });
        })?;
        inner
    }

    /// `memcpy_from_page`: copies bytes of a page, from byte `offset` on.
    ///
    /// # Safety
    /// What is in the page is the caller's to read, and nobody changes those bytes meanwhile.
    ///
    /// # Errors
    /// As [`zero_user`](Self::zero_user).
    #[track_caller]
    pub unsafe fn memcpy_from_page(
        &self,
        to: &mut [u8],
        page: &Page,
        offset: usize,
    ) -> Result<(), Misuse> {
        self.inside_page(offset, to.len())?;
        // SAFETY: inside of the page, which is mapped, and the caller's.
        self.reach(page, |at| unsafe {
            to.as_mut_ptr().copy_from(at.as_ptr().add(offset), to.len());
        })
    }

    /// `memcpy_to_page`: copies bytes to a page, from byte `offset` on.
    ///
    /// # Safety
    /// As [`zero_user`](Self::zero_user).
    ///
    /// # Errors
    /// As [`zero_user`](Self::zero_user).
    #[track_caller]
    pub unsafe fn memcpy_to_page(
        &self,
        page: &Page,
        offset: usize,
        from: &[u8],
    ) -> Result<(), Misuse> {
        self.inside_page(offset, from.len())?;
        // SAFETY: inside of the page, which is mapped, and the caller's.
        self.reach(page, |at| unsafe {
            at.as_ptr().add(offset).copy_from(from.as_ptr(), from.len());
        })
    }

    /// For the platform's scheduler: the running task is about to leave its CPU and to come back. If
    /// [`Task::local_maps`](crate::context::Task::local_maps) is not 0 after it, that must be to the same CPU. Code
    /// without a [`Task`](crate::context::Task) loses its temporary mappings, with a report.
    ///
    /// Context: on the CPU, on behalf of the task, with no interrupt running.
    pub fn kmap_local_sched_out(&self) {
        self.maps().sched_out();
    }

    /// For the platform's scheduler: the task that is now [the CPU's current one](crate::context::Cpu::set_current) has
    /// come back. What it had mapped is where it was, before it goes on.
    ///
    /// Context: as [`kmap_local_sched_out`](Self::kmap_local_sched_out).
    pub fn kmap_local_sched_in(&self) {
        self.maps().sched_in();
    }

    /// For the platform's scheduler: the running task ends. Temporary mappings that it left are reported, and undone.
    ///
    /// Context: as [`kmap_local_sched_out`](Self::kmap_local_sched_out).
    pub fn kmap_local_exit(&self) {
        self.maps().task_ends();
    }

    /// Counts the mappings and checks that what is known of them agrees.
    ///
    /// Context: any but NMI.
    ///
    /// # Errors
    /// [`HighmemAuditError`].
    pub fn audit_highmem(&self) -> Result<HighmemAudit, HighmemAuditError> {
        self.maps().audit()
    }
}
