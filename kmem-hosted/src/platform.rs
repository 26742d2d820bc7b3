//! The [`Platform`] that the core sees.
//!
//! # Concepts
//! Thin: each call goes to the module that does the work. What is worth a look is what an allocator does
//! all the time, finding the CPU and masking interrupts: a thread-local load, a comparison, and a plain
//! read-modify-write of the context word; no system call.
//!
//! # Locking
//! None of its own.

use crate::{
    hosted::{Hosted, Switch},
    irq, report, slot, sys,
};
use core::{
    fmt,
    ops::Range,
    ptr::NonNull,
    sync::atomic::{
        AtomicU32,
        Ordering::{Relaxed, SeqCst},
        compiler_fence,
    },
};
use kmem::{
    context::{Cpu, Path},
    memblock::Memblock,
    platform::{IrqState, Level, MapFailed, PageProt, Platform},
    types::Pfn,
};

/// What [`Platform::local_irq_save`] found.
const IRQS_ON: IrqState = IrqState(0);
const IRQS_OFF: IrqState = IrqState(1);
/// The caller was on no CPU: there is nothing to mask, and nothing lands.
const NO_CPU: IrqState = IrqState(2);

// SAFETY: a slot is held by one thread at a time (see `protocol`), which gives it up only in `wait` and
// in calls that take `&mut Process`; handlers nest on that thread. CPUs live as long as the machine. The
// direct map is a fixed mapping of distinct file pages. The vmalloc range is a reservation of its own, and so is that of kmap, in which
// the host maps and unmaps for all its processors. Metadata is anonymous memory of its own. The
// signal handlers serve nothing while the context word masks interrupts.
unsafe impl Platform for Hosted {
    /// 2 MiB.
    const HUGE_ORDER: u32 = 9;

    #[inline(always)]
    fn get_cpu_fast(&self) -> Option<&Cpu> {
        Some(slot::top_cpu())
    }

    #[inline(always)]
    fn this_cpu(&self) -> Option<&Cpu> {
        slot::slot_of(self.id()).map(|slot| &slot.cpu)
    }

    #[inline]
    fn cpu(&self, id: usize) -> Option<&Cpu> {
        self.inner.slots.get(id).map(|slot| &slot.cpu)
    }

    #[inline]
    fn nr_cpu_ids(&self) -> usize {
        self.inner.slots.len()
    }

    #[inline(always)]
    fn local_irq_save(&self) -> IrqState {
        let Some(slot) = slot::slot_of(self.id()) else { return NO_CPU };
        let was_off = slot.cpu.mask_irqs();
        // What follows is not moved before the mask.
        compiler_fence(SeqCst);
        if was_off { IRQS_OFF } else { IRQS_ON }
    }

    #[inline(always)]
    fn local_irq_restore(&self, state: IrqState) {
        if state != IRQS_ON {
            return;
        }
        let Some(slot) = slot::slot_of(self.id()) else { return };
        // What came before is not moved behind the unmasking.
        compiler_fence(SeqCst);
        slot.cpu.unmask_irqs();
        compiler_fence(SeqCst);
        irq::serve_deferred(slot);
    }

    #[inline]
    fn direct_map(&self, pfn: Pfn) -> Option<NonNull<u8>> {
        self.inner.memory.direct_map(pfn)
    }

    #[inline]
    fn direct_unmap(&self, addr: *const u8) -> Option<Pfn> {
        self.inner.memory.direct_unmap(addr)
    }

    fn set_direct_map(&self, pfn: Pfn, count: u32, valid: bool) -> bool {
        self.inner.memory.set_direct_map(pfn, count, valid)
    }

    fn zero_frames(&self, pfn: Pfn, count: u32) {
        self.inner.memory.zero(pfn, count);
    }

    fn metadata(&self, _boot: &mut Memblock, bytes: usize) -> Option<NonNull<u8>> {
        self.inner.memory.metadata(bytes, None)
    }

    fn sparse_metadata(
        &self,
        _boot: &mut Memblock,
        bytes: usize,
        used: &mut dyn Iterator<Item = Range<usize>>,
    ) -> Option<NonNull<u8>> {
        self.inner.memory.metadata(bytes, Some(used))
    }

    #[inline]
    fn vmalloc_range(&self) -> Option<Range<usize>> {
        self.inner.memory.vmalloc_range()
    }

    fn vmalloc_is_mapped(&self) -> bool {
        self.inner.memory.vmalloc_is_mapped()
    }

    unsafe fn map_pages(
        &self,
        addr: usize,
        pfn: Pfn,
        count: u32,
        prot: PageProt,
        _tables: &mut dyn FnMut() -> Option<Pfn>,
    ) -> Result<(), MapFailed> {
        // SAFETY: the caller's.
        unsafe { self.inner.memory.map_kernel(addr, pfn, count, prot) }
    }

    unsafe fn unmap_pages(&self, range: Range<usize>) {
        // SAFETY: the caller's.
        unsafe { self.inner.memory.unmap_kernel(range) };
    }

    fn kmap_range(&self) -> Option<Range<usize>> {
        self.inner.memory.kmap_range()
    }

    unsafe fn kmap_set(&self, addr: usize, pfn: Pfn) {
        let mut told = false;
        let refused = || {
            if !told {
                // Not to the sink: a lock of the core's may be held.
                report::print(Level::Warning, format_args!("kmap: the host maps no more"));
            }
            told = true;
        };
        // SAFETY: the caller's.
        unsafe { self.inner.memory.kmap_set(addr, pfn, refused) };
    }

    unsafe fn kmap_clear(&self, addr: usize) {
        // SAFETY: the caller's.
        unsafe { self.inner.memory.kmap_clear(addr) };
    }

    fn kick(&self, cpu: usize) {
        self.inner.kick(cpu);
    }

    /// A signal would end the host's calls that the CPU's thread sleeps in.
    fn kick_idle(&self, cpu: usize) {
        self.inner.kick_idle(cpu);
    }

    fn wait(&self, word: &AtomicU32, expected: u32, timeout_ns: u64) {
        if word.load(Relaxed) != expected {
            return;
        }
        // A CPU below the top of the chain cannot be given up: the thread is on another machine on
        // top of it. It stays taken, as it was while the thread worked there.
        let Some(slot) = slot::top_of(self.id()) else {
            sys::futex_wait(word, expected, Some(timeout_ns));
            return;
        };
        let context = slot.cpu.context();
        if !context.may_sleep() {
            self.report(Level::Bug, format_args!("sleeping in atomic context: {context:?}"));
            return;
        }
        // Below the allocator's own business, such as a trace sink: somebody else would go on as this CPU.
        let path = slot.cpu.path();
        if path != Path::Idle {
            self.report(Level::Bug, format_args!("sleeping inside the allocator: {path:?}"));
            return;
        }
        let left = self.inner.leave(slot, Switch::Out);
        sys::futex_wait(word, expected, Some(timeout_ns));
        self.inner.enter_again(left);
    }

    fn wake(&self, word: &AtomicU32) {
        sys::futex_wake(word, u32::MAX);
    }

    #[inline]
    fn relax(&self) {
        sys::relax();
    }

    fn rcu_start(&self) -> Option<u64> {
        Some(self.inner.epoch.end())
    }

    fn rcu_done(&self, end: u64) -> bool {
        self.rcu_reached(end)
    }

    fn now_ns(&self) -> u64 {
        sys::now_ns()
    }

    fn report(&self, level: Level, message: fmt::Arguments<'_>) {
        self.inner.reports.report(level, message);
    }
}
