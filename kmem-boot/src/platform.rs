//! What kmem needs of this machine \[X3\]: the worked example of a `Platform` for a simple kernel.
//!
//! One CPU, an identity map for a direct map, the processor's interrupt flag for a mask, a halt loop
//! for sleeping, the serial port for reports.

use crate::{apic, clock, paging, serial, vmalloc};
use core::{
    fmt,
    ops::Range,
    ptr::{self, NonNull},
    sync::atomic::{
        AtomicU32, AtomicU64,
        Ordering::{Acquire, Relaxed},
    },
};
use kmem::{
    context::Cpu,
    memblock::{self, Memblock, Request},
    platform::{IrqState, Level, MapFailed, PageProt, Platform},
    types::{Pfn, PfnRange},
};
use x86_64::instructions::interrupts;

/// The CPU. A static of its own, as interrupts come before the allocator is up.
pub static CPU: Cpu = Cpu::new(0, 0);

/// How long the halt loop sleeps at the most before it looks again.
const TICK_NS: u64 = 1_000_000;

/// The last grace period that was named, and the last one that has ended.
static RCU_STARTED: AtomicU64 = AtomicU64::new(0);
static RCU_ENDED: AtomicU64 = AtomicU64::new(0);

/// This machine: the runs of frames that are memory, all of them mapped at their own address.
pub struct BareMetal {
    ram: [PfnRange; memblock::MAX_REGIONS],
}

impl BareMetal {
    /// The machine whose memory `boot` knows.
    ///
    /// # Safety
    /// All of it is mapped to itself, interrupts work, the clock runs, and this is the only CPU.
    pub unsafe fn new(boot: &Memblock) -> BareMetal {
        let mut ram = [PfnRange::default(); memblock::MAX_REGIONS];
        for (slot, region) in ram.iter_mut().zip(boot.memory()) {
            let pfn = |address: u64| u32::try_from(address >> Self::PAGE_SHIFT).unwrap_or(u32::MAX);
            *slot = PfnRange::new(pfn(region.base), pfn(region.end()));
        }
        BareMetal { ram }
    }

    fn is_ram(&self, pfn: Pfn) -> bool {
        self.ram.iter().take_while(|r| !r.is_empty()).any(|r| r.contains(pfn.0))
    }
}

// SAFETY: there is one CPU, no threads, and interrupt handlers nest strictly. The map shows each
// frame at its own address. Tables come from boot memory, which is handed out once, and are filled
// with zeros. The vmalloc range has a top-level entry of its own. A cleared interrupt flag keeps handlers away; exceptions and NMI end the machine.
unsafe impl Platform for BareMetal {
    // The segment's base is zero, and so is the CPU's number.
    const PER_CPU_SEGMENT: bool = true;

    fn this_cpu(&self) -> Option<&Cpu> {
        Some(&CPU)
    }

    fn cpu(&self, id: usize) -> Option<&Cpu> {
        (id == 0).then_some(&CPU)
    }

    fn nr_cpu_ids(&self) -> usize {
        1
    }

    fn local_irq_save(&self) -> IrqState {
        let enabled = interrupts::are_enabled();
        if enabled {
            interrupts::disable();
            CPU.mask_irqs();
        }
        IrqState(usize::from(enabled))
    }

    fn local_irq_restore(&self, state: IrqState) {
        if state.0 != 0 {
            CPU.unmask_irqs();
            interrupts::enable();
        }
    }

    fn direct_map(&self, pfn: Pfn) -> Option<NonNull<u8>> {
        let address = pfn.index() << Self::PAGE_SHIFT;
        NonNull::new(ptr::with_exposed_provenance_mut(address)).filter(|_| self.is_ram(pfn))
    }

    fn direct_unmap(&self, addr: *const u8) -> Option<Pfn> {
        let pfn = u32::try_from(addr.addr() >> Self::PAGE_SHIFT).ok().map(Pfn)?;
        self.is_ram(pfn).then_some(pfn)
    }

    fn zero_frames(&self, pfn: Pfn, count: u32) {
        if let Some(frame) = self.direct_map(pfn) {
            // SAFETY: the core owns the frames it has zeroed; a block lies in one run of memory.
            unsafe { frame.write_bytes(0, (count as usize) << Self::PAGE_SHIFT) };
        }
    }

    fn metadata(&self, boot: &mut Memblock, bytes: usize) -> Option<NonNull<u8>> {
        let request = Request::new(bytes as u64).align(1 << Self::PAGE_SHIFT);
        let base = boot.alloc(request).ok()?;
        let table = NonNull::new(ptr::with_exposed_provenance_mut::<u8>(base as usize))?;
        // SAFETY: just allocated, so nobody else's, and mapped like all memory.
        unsafe { table.write_bytes(0, bytes) };
        Some(table)
    }

    fn sparse_metadata(
        &self,
        boot: &mut Memblock,
        bytes: usize,
        used: &mut dyn Iterator<Item = Range<usize>>,
    ) -> Option<NonNull<u8>> {
        paging::sparse(boot, bytes, used)
    }

    const HUGE_ORDER: u32 = 9;

    fn vmalloc_range(&self) -> Option<Range<usize>> {
        Some(vmalloc::range())
    }

    unsafe fn map_pages(
        &self,
        addr: usize,
        pfn: Pfn,
        count: u32,
        prot: PageProt,
        tables: &mut dyn FnMut() -> Option<Pfn>,
    ) -> Result<(), MapFailed> {
        vmalloc::map(addr, pfn, count, prot, tables)
    }

    unsafe fn unmap_pages(&self, range: Range<usize>) {
        vmalloc::unmap(range);
    }

    fn flush_tlb_kernel_range(&self, range: Range<usize>) {
        // There is no other CPU that could know anything.
        vmalloc::flush(range);
    }

    fn kick(&self, _cpu: usize) {
        apic::interrupt_self();
    }

    fn wait(&self, word: &AtomicU32, expected: u32, timeout_ns: u64) {
        let end = self.now_ns().saturating_add(timeout_ns);
        loop {
            // Masked between look and halt, so that what would change the word wakes the halt.
            interrupts::disable();
            if word.load(Acquire) != expected || self.now_ns() >= end {
                return interrupts::enable();
            }
            apic::arm(TICK_NS);
            interrupts::enable_and_hlt();
        }
    }

    fn wake(&self, _word: &AtomicU32) {
        // Whoever changed the word did so in an interrupt, which ended the halt.
    }

    fn now_ns(&self) -> u64 {
        clock::now_ns()
    }

    fn rcu_start(&self) -> Option<u64> {
        Some(RCU_STARTED.fetch_add(1, Relaxed) + 1)
    }

    fn rcu_done(&self, end: u64) -> bool {
        // Readers turn preemption off, and there is one CPU: who runs with it on has interrupted none.
        if CPU.context().may_sleep() {
            RCU_ENDED.fetch_max(RCU_STARTED.load(Relaxed), Relaxed);
        }
        RCU_ENDED.load(Relaxed) >= end
    }

    fn report(&self, level: Level, message: fmt::Arguments<'_>) {
        serial::report(level, message);
    }
}
