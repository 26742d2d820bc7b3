//! What an embedder supplies \[X3\].
//!
//! # Concepts
//! The core knows no operating system and no processor. It asks a [`Platform`] which CPU it runs on,
//! where frames are mapped, how to mask interrupts, how to wait and wake, and where reports go.
//!
//! # Locking
//! No method is called with a lock of the core held, save where it says so.

use crate::{context::Cpu, memblock::Memblock, types::Pfn};
use core::{fmt, ops::Range, ptr::NonNull, sync::atomic::AtomicU32};

/// How serious a report is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Level {
    /// A misuse of the allocator (`BUG:`).
    Bug,
    /// Something worth a look (`WARNING:`, allocation failures).
    Warning,
    /// Information.
    Info,
}

bitflags::bitflags! {
    /// How a kernel mapping may be used. All of them can be read.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
    pub struct PageProt: u32 {
        /// May be written to.
        const WRITE = 1 << 0;
        /// May be executed. A platform may allow it everywhere.
        const EXEC = 1 << 1;
        /// Goes past the caches, as a device's registers need it.
        const NO_CACHE = 1 << 2;
        /// Entries of more than a frame may be used where addresses and frames are aligned for them.
        const HUGE = 1 << 3;
        /// `PAGE_KERNEL`.
        const KERNEL = Self::WRITE.bits();
        /// `PAGE_KERNEL_RO`.
        const KERNEL_RO = 0;
        /// `PAGE_KERNEL_NOCACHE`.
        const KERNEL_NOCACHE = Self::WRITE.bits() | Self::NO_CACHE.bits();
    }
}

/// Pages could not be mapped: there is no frame for a page table, or the host refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MapFailed;

impl fmt::Display for MapFailed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the platform could not map the pages")
    }
}

impl core::error::Error for MapFailed {}

/// What interrupt masking found; restored as it was.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use = "interrupts stay masked until this is restored"]
pub struct IrqState(pub usize);

/// One machine, as the core sees it.
///
/// # Safety
/// The core's soundness rests on these promises:
/// - [`this_cpu`](Platform::this_cpu) returns the `Cpu` that the caller runs on, and as long as the
///   caller neither sleeps nor enables preemption nobody else runs on it, save interrupt handlers,
///   which nest strictly;
/// - [`cpu`](Platform::cpu) returns the same `Cpu` for the same number for the platform's lifetime;
/// - [`direct_map`](Platform::direct_map) returns an address at which the frame's whole content can be
///   read and written, the same each time, and the next frame's, if it has one, is at the next frame's
///   place, holes or not: the direct map is linear. Frames that the core took out of it by
///   [`set_direct_map`](Platform::set_direct_map) are excepted;
/// - [`metadata`](Platform::metadata) returns zero-filled memory of the size asked for, used for nothing
///   else until the platform value is dropped;
/// - [`vmalloc_range`](Platform::vmalloc_range) is the same each time, begins and ends at multiples of a frame,
///   and is used for nothing but what [`map_pages`](Platform::map_pages) maps there: those frames, readable and
///   writable as asked, until [`unmap_pages`](Platform::unmap_pages), unless
///   [`vmalloc_is_mapped`](Platform::vmalloc_is_mapped) says that there is nothing; all else in it faults when
///   touched, once [`flush_tlb_kernel_range`](Platform::flush_tlb_kernel_range) has returned;
/// - when [`rcu_done`](Platform::rcu_done) says that a grace period has ended, every reader (as the platform has them)
///   that had begun before [`rcu_start`](Platform::rcu_start) named it is done;
/// - [`kmap_range`](Platform::kmap_range) is the same each time, begins and ends at multiples of a frame, and is used for
///   nothing but what [`kmap_set`](Platform::kmap_set) shows there: when that returns, the calling CPU and every CPU that
///   knows nothing of the address reach that frame there, readable and writable, until
///   [`kmap_clear`](Platform::kmap_clear); when that returns, the calling CPU faults there, and the others do once
///   `flush_tlb_kernel_range` has returned;
/// - [`wait`](Platform::wait) returns: it does not unwind;
/// - between [`local_irq_save`](Platform::local_irq_save) and the matching restore no interrupt
///   handler runs on the CPU.
pub unsafe trait Platform: Sync {
    /// Frame size as a power of two: 12 (4 KiB), 13, 14 or 16 \[F5\].
    const PAGE_SHIFT: u32 = 12;

    /// Whether an interrupt can make the CPU switch to another task while its context word is zero.
    /// Such a platform implements [`get_cpu`](Platform::get_cpu) and [`put_cpu`](Platform::put_cpu).
    const PREEMPTIBLE: bool = false;

    /// Whether the base of the processor's GS segment is, on each CPU, its number times
    /// [`Kmem::per_cpu_stride`](crate::Kmem::per_cpu_stride) (x86-64), so that a `this_cpu` operation is one
    /// instruction \[U1\]. On a machine with one CPU that is a base of zero. The bound of the trait's promises covers
    /// it: it must be so whenever a `this_cpu` operation runs.
    const PER_CPU_SEGMENT: bool = false;

    /// The CPU the caller runs on; `None` when it runs on none (a thread that never attached, or one
    /// that is being torn down). Such callers are served, without per-CPU lists.
    fn this_cpu(&self) -> Option<&Cpu>;

    /// Pins the caller to its CPU: one level of preemption-off in the CPU's context word, counted
    /// indivisibly with finding the CPU. Where tasks switch only of their own accord nothing need be
    /// counted.
    #[inline(always)]
    fn get_cpu(&self) -> Option<&Cpu> {
        self.this_cpu()
    }

    /// As [`get_cpu`](Platform::get_cpu), but may say `None` where finding the CPU takes more than a
    /// few instructions: the fast paths ask this and leave the rest to the others. It may also be another
    /// platform's CPU, or one that is nobody's: the CPU's word tells.
    #[inline(always)]
    fn get_cpu_fast(&self) -> Option<&Cpu> {
        self.get_cpu()
    }

    /// Undoes [`get_cpu`](Platform::get_cpu).
    #[inline(always)]
    fn put_cpu(&self, _cpu: &Cpu) {}

    /// The possible CPU with number `id`.
    fn cpu(&self, id: usize) -> Option<&Cpu>;

    /// Number of possible CPUs; their numbers are `0..nr_cpu_ids()`.
    fn nr_cpu_ids(&self) -> usize;

    /// Masks interrupts on this CPU and returns what to restore.
    fn local_irq_save(&self) -> IrqState;

    /// Restores the mask; interrupts that came in between are served before this returns, if they
    /// are unmasked now.
    fn local_irq_restore(&self, state: IrqState);

    /// Where the direct map shows the frame; `None` for high memory and frames that do not exist.
    fn direct_map(&self, pfn: Pfn) -> Option<NonNull<u8>>;

    /// The frame that the direct map shows at `addr`; `None` when the address is not in it.
    fn direct_unmap(&self, addr: *const u8) -> Option<Pfn>;

    /// Takes `count` frames from `pfn` out of the direct map, so that every access there faults, or, with `valid`,
    /// puts them back, contents unchanged; on all CPUs, before it returns. `false`, and nothing changed, where that
    /// cannot be done. Must not sleep and must not allocate; called from any context, from a fault's handler
    /// included ([KFENCE](crate::kfence)).
    fn set_direct_map(&self, _pfn: Pfn, _count: u32, _valid: bool) -> bool {
        false
    }

    /// Zero-fills `count` frames from `pfn`, wherever they are: this is the only way the core touches
    /// a high frame's contents. Must not sleep and must not allocate. May be called with interrupts
    /// masked.
    fn zero_frames(&self, pfn: Pfn, count: u32);

    /// Zero-filled memory for the core's own tables, `bytes` long, aligned to at least a frame and
    /// kept as long as the platform. Called at bring-up only. A plain kernel takes it from `boot`
    /// through the direct map; a host may take it from elsewhere. `None` when there is none.
    fn metadata(&self, boot: &mut Memblock, bytes: usize) -> Option<NonNull<u8>>;

    /// Zero-filled memory for a table of `bytes` of which only the byte ranges in `used` (ascending,
    /// disjoint) will ever be written: a machine with holes in its memory backs no more than those
    /// \[F5\]. The rest is read, as zeros, so one zero-filled frame mapped everywhere will do for it. A
    /// platform without page tables to play with backs everything.
    fn sparse_metadata(
        &self,
        boot: &mut Memblock,
        bytes: usize,
        _used: &mut dyn Iterator<Item = Range<usize>>,
    ) -> Option<NonNull<u8>> {
        self.metadata(boot, bytes)
    }

    /// Frames, as a power of two, that one entry of more than a frame maps at [`map_pages`](Platform::map_pages); 0
    /// where there are no such entries.
    const HUGE_ORDER: u32 = 0;

    /// The addresses for vmalloc and its like \[V1\]; `None` on a platform without.
    fn vmalloc_range(&self) -> Option<Range<usize>> {
        None
    }

    /// Whether what [`map_pages`](Platform::map_pages) maps is there. A simulation may have areas that are addresses
    /// only: what writes to its areas itself (stacks, owners, kvmalloc) has no memory there. The same each time.
    fn vmalloc_is_mapped(&self) -> bool {
        true
    }

    /// Maps `count` frames from `pfn` on, one after the other, at `addr`. The frames need not be memory: they may
    /// be a device's. What page tables it takes are frames from `tables`, zero-filled; they are the platform's for
    /// ever. A failure may leave part of it mapped; the caller unmaps all. Called in process context, for different
    /// addresses on several CPUs at once.
    ///
    /// # Safety
    /// The addresses are in the vmalloc range, nothing is mapped there, and they are the caller's.
    ///
    /// # Errors
    /// [`MapFailed`].
    unsafe fn map_pages(
        &self,
        _addr: usize,
        _pfn: Pfn,
        _count: u32,
        _prot: PageProt,
        _tables: &mut dyn FnMut() -> Option<Pfn>,
    ) -> Result<(), MapFailed> {
        Err(MapFailed)
    }

    /// Takes all mappings in a range away. CPUs may still know them until
    /// [`flush_tlb_kernel_range`](Platform::flush_tlb_kernel_range). Called in process context, as `map_pages` is.
    ///
    /// # Safety
    /// The range is in the vmalloc range and the caller's, and nobody uses what is mapped there.
    unsafe fn unmap_pages(&self, _range: Range<usize>) {}

    /// Addresses at which single frames are shown by [`kmap_set`](Platform::kmap_set) \[H1, H2\], one frame's worth each:
    /// first those for `kmap`, any number (1024 are used at most), then
    /// [`SLOTS_PER_CPU`](crate::highmem::SLOTS_PER_CPU) for each possible CPU. `None` where there is no high memory.
    fn kmap_range(&self) -> Option<Range<usize>> {
        None
    }

    /// Shows a frame at an address: one page-table entry, whose table is there already. Whatever was there before, the
    /// calling CPU forgets it. Called from any context, interrupts and NMIs included, maybe with interrupts masked and a
    /// lock of the core held: it neither allocates nor sleeps, and it does not fail.
    ///
    /// # Safety
    /// The address is one of the [`kmap_range`](Platform::kmap_range), a multiple of a frame, and the caller's; the frame
    /// is memory.
    unsafe fn kmap_set(&self, _addr: usize, _pfn: Pfn) {}

    /// Takes away what is shown at an address; the calling CPU forgets it. Called as
    /// [`kmap_set`](Platform::kmap_set) is.
    ///
    /// # Safety
    /// The address is as for `kmap_set`, and nobody uses what is shown there.
    unsafe fn kmap_clear(&self, _addr: usize) {}

    /// Makes every CPU forget translations of addresses in the range, of vmalloc's or of kmap's. Called in process
    /// context.
    fn flush_tlb_kernel_range(&self, _range: Range<usize>) {}

    /// Makes CPU `cpu` call [`Kmem::handle_ipi`](crate::PageAllocator::handle_ipi) soon. For a CPU that runs
    /// nothing the platform may make the call itself, posing as that CPU. Called from any context.
    ///
    /// A call that lands while the CPU's lists are owned does nothing, and the fast paths do not look for requests
    /// at their end; whoever waits kicks again every few hundred turns. So of repeated kicks some must reach a CPU
    /// between two calls, even if it never makes others than fast ones or none at all.
    fn kick(&self, cpu: usize);

    /// As [`kick`](Platform::kick), for what can wait. Where an interrupt disturbs what a CPU runs, beyond taking its time, a CPU
    /// that runs something may be left alone: it does what it was asked for when it comes by a slower path.
    fn kick_idle(&self, cpu: usize) {
        self.kick(cpu);
    }

    /// Waits until `word` no longer holds `expected`, a wake-up on it, or `timeout_ns` nanoseconds.
    /// May return early. Called in process context only; gives the CPU to others meanwhile.
    fn wait(&self, word: &AtomicU32, expected: u32, timeout_ns: u64);

    /// Wakes everyone in [`wait`](Platform::wait) on `word`. Called from any context.
    fn wake(&self, word: &AtomicU32);

    /// One turn of a spin loop. A host may give the time slice away now and then.
    fn relax(&self) {
        core::hint::spin_loop();
    }

    /// Nanoseconds since some fixed moment, never running backwards on one CPU.
    fn now_ns(&self) -> u64;

    /// Starts a grace period, and names its end for [`rcu_done`](Platform::rcu_done): until then there may be readers who
    /// were at it when this was called. `None` on a platform without such readers \[S5\], always. One that has ended is
    /// never named again: names are compared. Called from any context but NMI.
    /// See [`start_poll_synchronize_rcu`](https://docs.kernel.org/core-api/kernel-api.html).
    fn rcu_start(&self) -> Option<u64> {
        None
    }

    /// Whether a grace period has ended, and then it stays so. Whoever asks again and again brings it about, as far as
    /// readers let it. Called from any context but NMI.
    fn rcu_done(&self, _end: u64) -> bool {
        true
    }

    /// A report for people. Called from any context, interrupts included, never with a lock held, but maybe with
    /// the CPU's lists owned: it must not sleep and must not unwind.
    fn report(&self, level: Level, message: fmt::Arguments<'_>);
}
