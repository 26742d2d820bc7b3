//! The [`Platform`] of the global machine.
//!
//! # Concepts
//! Physical address 0 is the beginning of one private mapping. CPUs are seats. There are no interrupts, so there is
//! nothing to mask, and a CPU whose thread does something else cannot be made to look: a kick serves the request as
//! that CPU, with its thread kept outside of calls meanwhile.
//!
//! # Locking
//! None: the memory is set before the machine is up.

use super::{huge, seats};
use crate::{report, sys};
use core::{
    fmt,
    ptr::{self, NonNull},
    sync::atomic::{
        AtomicPtr, AtomicU32, AtomicUsize,
        Ordering::{Acquire, Relaxed},
    },
};
use kmem::{
    context::Cpu,
    memblock::Memblock,
    platform::{IrqState, Level, Platform},
    types::Pfn,
};

static BASE: AtomicPtr<u8> = AtomicPtr::new(ptr::null_mut());
static BYTES: AtomicUsize = AtomicUsize::new(0);

const PAGE_SHIFT: u32 = 12;

/// Says where the machine's memory is. Called once, before the machine is up.
pub(super) fn set_memory(base: NonNull<u8>, bytes: usize) {
    BASE.store(base.as_ptr(), Relaxed);
    BYTES.store(bytes, Relaxed);
}

/// The machine below a program's global allocator ([`KmemGlobal`](super::KmemGlobal)). A process has one.
pub struct GlobalPlatform;

// SAFETY: a seat is held by one thread at a time (see `seats`), which gives it up only outside of calls; whoever
// poses as a seat holds it, or has its thread stopped outside of calls. Seats are a static. The direct map is one mapping, kept for
// ever; so is metadata. There are no interrupts.
unsafe impl Platform for GlobalPlatform {
    #[inline(always)]
    fn this_cpu(&self) -> Option<&Cpu> {
        seats::current().map(|seat| &seat.cpu)
    }

    #[inline]
    fn cpu(&self, id: usize) -> Option<&Cpu> {
        seats::get(id).map(|seat| &seat.cpu)
    }

    #[inline]
    fn nr_cpu_ids(&self) -> usize {
        seats::count()
    }

    #[inline(always)]
    fn local_irq_save(&self) -> IrqState {
        IrqState(0)
    }

    #[inline(always)]
    fn local_irq_restore(&self, _state: IrqState) {}

    #[inline]
    fn direct_map(&self, pfn: Pfn) -> Option<NonNull<u8>> {
        let offset = pfn.index() << PAGE_SHIFT;
        if offset >= BYTES.load(Relaxed) {
            return None;
        }
        NonNull::new(BASE.load(Relaxed).wrapping_add(offset))
    }

    #[inline]
    fn direct_unmap(&self, addr: *const u8) -> Option<Pfn> {
        let offset = addr.addr().wrapping_sub(BASE.load(Relaxed).addr());
        (offset < BYTES.load(Relaxed)).then_some(Pfn((offset >> PAGE_SHIFT) as u32))
    }

    fn zero_frames(&self, pfn: Pfn, count: u32) {
        let bytes = (count as usize) << PAGE_SHIFT;
        if let (Some(at), Some(_)) = (
            self.direct_map(pfn),
            self.direct_map(Pfn(pfn.0.saturating_add(count.saturating_sub(1)))),
        ) {
            // SAFETY: the frames are the machine's, from the first to the last, and the caller's to zero.
            unsafe { at.write_bytes(0, bytes) };
        }
    }

    fn metadata(&self, _boot: &mut Memblock, bytes: usize) -> Option<NonNull<u8>> {
        huge::reserve(bytes.max(1).checked_next_multiple_of(1 << PAGE_SHIFT)?, 1 << PAGE_SHIFT)
    }

    fn kick(&self, cpu: usize) {
        seats::pose(cpu);
    }

    fn wait(&self, word: &AtomicU32, expected: u32, timeout_ns: u64) {
        if word.load(Acquire) == expected {
            sys::futex_wait(word, expected, Some(timeout_ns));
        }
    }

    fn wake(&self, word: &AtomicU32) {
        sys::futex_wake(word, u32::MAX);
    }

    #[inline]
    fn relax(&self) {
        sys::relax();
    }

    fn now_ns(&self) -> u64 {
        sys::now_ns()
    }

    fn report(&self, level: Level, message: fmt::Arguments<'_>) {
        report::print(level, message);
    }
}
