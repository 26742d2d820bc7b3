//! A small machine of plain data: frames without contents, CPUs that one thread poses as in turn.
//!
//! # Concepts
//! Everything happens on one thread and in one order, so a failing case shrinks and repeats. An
//! interrupt is a call of [`Small::serve`] from inside a platform call, armed by [`Small::arm`] to land
//! at the n-th of them: in the middle of whatever the core does there, lists owned or not.
//!
//! # Locking
//! One thread; the atomics and mutexes are there because a platform is `Sync`.

use kmem::{
    BringUpError, Config, Gfp, Kmem, Platform,
    context::{Cpu, Section},
    memblock::{Memblock, Request},
    platform::{IrqState, Level},
    types::Pfn,
};
use std::{
    alloc::{Layout, alloc_zeroed, dealloc},
    fmt,
    ptr::{self, NonNull},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
};

/// Nobody's CPU: the thread is unattached.
pub const NOBODY: usize = usize::MAX;
/// Where the direct map would begin, if frames had contents.
const DIRECT_MAP: usize = 0x5000_0000_0000;

/// What an interrupt handler does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Work {
    /// Allocates a block with `GFP_ATOMIC`.
    Alloc(u32),
    /// Frees the block it holds longest.
    Free,
    /// Another CPU has all lists drained meanwhile; its request lands here.
    Drain,
}

/// What interrupt handlers hold, and what they did since it was last looked at.
#[derive(Default)]
pub struct Handler {
    pub held: Vec<(u32, u32)>,
    pub got: Vec<(u32, u32)>,
    pub freed: Vec<(u32, u32)>,
    pub wrong: Option<String>,
    pub runs: u64,
}

/// Memory for the core's tables.
struct Table(NonNull<u8>, Layout);

// SAFETY: the memory is the table's alone; nothing about it is bound to a thread.
unsafe impl Send for Table {}

/// The machine.
pub struct Small {
    cpus: [Cpu; 2],
    current: AtomicUsize,
    ipis: [AtomicBool; 2],
    tables: Mutex<Vec<Table>>,
    /// Whether tables take frames from the boot allocator.
    from_boot: bool,
    /// First frame without an address.
    high_from: u32,
    kmem: AtomicPtr<Kmem<Small>>,
    fuse: AtomicU32,
    work: Mutex<Work>,
    pub handler: Mutex<Handler>,
    zeroed: AtomicU64,
    reports: Mutex<Vec<String>>,
}

impl Small {
    /// A platform whose CPUs are on the given nodes; frames from `high_from` on have no address.
    pub fn new(nodes: [u32; 2], high_from: u32) -> Small {
        Small {
            cpus: [Cpu::new(0, nodes[0]), Cpu::new(1, nodes[1])],
            current: AtomicUsize::new(0),
            ipis: Default::default(),
            tables: Mutex::default(),
            from_boot: false,
            high_from,
            kmem: AtomicPtr::default(),
            fuse: AtomicU32::new(0),
            work: Mutex::new(Work::Free),
            handler: Mutex::default(),
            zeroed: AtomicU64::new(0),
            reports: Mutex::default(),
        }
    }

    /// Takes the tables' frames from the boot allocator, which may refuse.
    #[must_use]
    pub fn tables_from_boot(mut self) -> Small {
        self.from_boot = true;
        self
    }

    /// The thread poses as another CPU from now on, or as none.
    pub fn run_on(&self, cpu: usize) {
        self.current.store(cpu, Relaxed);
    }

    /// Lets an interrupt do `work` at the `n`-th platform call from now; 0 disarms.
    pub fn arm(&self, n: u32, work: Work) {
        *self.work.lock().unwrap() = work;
        self.fuse.store(n, Relaxed);
    }

    /// Frames zeroed so far.
    pub fn zeroed(&self) -> u64 {
        self.zeroed.load(Relaxed)
    }

    /// Takes the reports made so far.
    pub fn take_reports(&self) -> Vec<String> {
        std::mem::take(&mut *self.reports.lock().unwrap())
    }

    fn kmem(&self) -> Option<&Kmem<Small>> {
        // SAFETY: null, or set by `Machine::new` to the box that owns this platform, which stays where it
        // is until it is dropped, and this platform with it.
        unsafe { self.kmem.load(Relaxed).as_ref() }
    }

    /// A place where an interrupt may land.
    fn landing(&self) {
        let left = self.fuse.load(Relaxed);
        if left == 0 {
            return;
        }
        if left > 1 {
            self.fuse.store(left - 1, Relaxed);
            return;
        }
        let Some(cpu) = self.cpus.get(self.current.load(Relaxed)) else { return };
        if takes_irqs(cpu) {
            self.fuse.store(0, Relaxed);
            self.serve(cpu);
        }
    }

    fn serve(&self, cpu: &Cpu) {
        let Some(kmem) = self.kmem() else { return };
        cpu.mask_irqs();
        cpu.enter(Section::Hardirq);
        let work = *self.work.lock().unwrap();
        let mut wrong = None;
        match work {
            Work::Alloc(order) => {
                if let Ok(page) = kmem.alloc_pages(Gfp::ATOMIC | Gfp::NOWARN, order) {
                    let block = (kmem.page_to_pfn(page).unwrap().0, order);
                    let mut h = self.handler.lock().unwrap();
                    h.got.push(block);
                    h.held.push(block);
                }
            }
            Work::Free => {
                let oldest = {
                    let mut h = self.handler.lock().unwrap();
                    if h.held.is_empty() { None } else { Some(h.held.remove(0)) }
                };
                if let Some((pfn, order)) = oldest {
                    let page = kmem.pfn_to_page(Pfn(pfn)).unwrap();
                    if let Err(e) = kmem.__free_pages(page, order) {
                        wrong = Some(format!("handler frees pfn:{pfn:#x} order {order}: {e}"));
                    }
                    self.handler.lock().unwrap().freed.push((pfn, order));
                }
            }
            Work::Drain => {
                let other = &self.cpus[1 - cpu.id()];
                self.run_on(other.id());
                other.enter(Section::Hardirq);
                kmem.drain_all_pages();
                other.leave(Section::Hardirq);
                self.run_on(cpu.id());
            }
        }
        let mut h = self.handler.lock().unwrap();
        h.runs += 1;
        h.wrong = h.wrong.take().or(wrong);
        drop(h);
        cpu.leave(Section::Hardirq);
        cpu.unmask_irqs();
        self.serve_ipi(cpu);
    }

    fn serve_ipi(&self, cpu: &Cpu) {
        if let Some(kmem) = self.kmem()
            && self.ipis[cpu.id()].swap(false, Relaxed)
        {
            let was = self.current.swap(cpu.id(), Relaxed);
            let masked = cpu.mask_irqs();
            cpu.enter(Section::Hardirq);
            kmem.handle_ipi();
            cpu.leave(Section::Hardirq);
            if !masked {
                cpu.unmask_irqs();
            }
            self.current.store(was, Relaxed);
        }
    }
}

fn takes_irqs(cpu: &Cpu) -> bool {
    let context = cpu.context();
    !context.irqs_off() && !context.in_hardirq() && !context.in_nmi()
}

impl Drop for Small {
    fn drop(&mut self) {
        for table in self.tables.lock().unwrap().drain(..) {
            // SAFETY: allocated with this layout in `metadata`; the core is gone.
            unsafe { dealloc(table.0.as_ptr(), table.1) };
        }
    }
}

// SAFETY: one thread poses as one CPU at a time, and handlers nest on it; the CPUs live as long as the
// platform; no frame has contents, so no address of the direct map is ever used; tables are zero-filled
// allocations kept until the platform is dropped; nothing is served while the context word masks.
unsafe impl Platform for Small {
    fn this_cpu(&self) -> Option<&Cpu> {
        self.landing();
        self.cpus.get(self.current.load(Relaxed))
    }

    fn cpu(&self, id: usize) -> Option<&Cpu> {
        self.cpus.get(id)
    }

    fn nr_cpu_ids(&self) -> usize {
        self.cpus.len()
    }

    fn local_irq_save(&self) -> IrqState {
        self.landing();
        let Some(cpu) = self.cpus.get(self.current.load(Relaxed)) else { return IrqState(2) };
        IrqState(usize::from(cpu.mask_irqs()))
    }

    fn local_irq_restore(&self, state: IrqState) {
        let Some(cpu) = self.cpus.get(self.current.load(Relaxed)) else { return };
        if state == IrqState(0) {
            cpu.unmask_irqs();
            self.serve_ipi(cpu);
            self.landing();
        }
    }

    fn direct_map(&self, pfn: Pfn) -> Option<NonNull<u8>> {
        let address = DIRECT_MAP + (pfn.index() << Self::PAGE_SHIFT);
        (pfn.0 < self.high_from).then(|| NonNull::new(ptr::without_provenance_mut(address)))?
    }

    fn direct_unmap(&self, addr: *const u8) -> Option<Pfn> {
        let pfn = addr.addr().checked_sub(DIRECT_MAP)? >> Self::PAGE_SHIFT;
        u32::try_from(pfn).ok().filter(|pfn| *pfn < self.high_from).map(Pfn)
    }

    fn zero_frames(&self, _pfn: Pfn, count: u32) {
        self.zeroed.fetch_add(count.into(), Relaxed);
    }

    fn metadata(&self, boot: &mut Memblock, bytes: usize) -> Option<NonNull<u8>> {
        if self.from_boot {
            boot.alloc(Request::new(bytes as u64).align(1 << Self::PAGE_SHIFT)).ok()?;
        }
        let layout = Layout::from_size_align(bytes, 1 << Self::PAGE_SHIFT).ok()?;
        // SAFETY: the core never asks for zero bytes.
        let at = NonNull::new(unsafe { alloc_zeroed(layout) })?;
        self.tables.lock().unwrap().push(Table(at, layout));
        Some(at)
    }

    fn kick(&self, cpu: usize) {
        if let Some(cpu) = self.cpus.get(cpu) {
            self.ipis[cpu.id()].store(true, Relaxed);
            if !cpu.context().irqs_off() {
                self.serve_ipi(cpu);
            }
        }
    }

    fn wait(&self, _word: &AtomicU32, _expected: u32, _timeout_ns: u64) {
        self.landing();
    }

    fn wake(&self, _word: &AtomicU32) {}

    fn now_ns(&self) -> u64 {
        0
    }

    fn report(&self, _level: Level, message: fmt::Arguments<'_>) {
        self.reports.lock().unwrap().push(message.to_string());
    }
}

/// A [`Small`] with its memory manager.
pub struct Machine(Box<Kmem<Small>>);

impl Machine {
    /// Brings it up; all CPUs are online, and the thread poses as CPU 0.
    pub fn new(small: Small, boot: Memblock, config: &Config) -> Result<Machine, BringUpError> {
        let kmem = Box::new(Kmem::bring_up(small, boot, config)?);
        kmem.platform().kmem.store(ptr::from_ref(&*kmem).cast_mut(), Relaxed);
        (0..2).for_each(|cpu| kmem.cpu_online(cpu));
        Ok(Machine(kmem))
    }

    /// The host side.
    pub fn small(&self) -> &Small {
        self.0.platform()
    }

    /// Runs `f` in a context: 1 softirq, 2 hardirq, 3 interrupts masked, else as it is.
    pub fn in_context<R>(&self, context: u8, f: impl FnOnce() -> R) -> R {
        let Some(cpu) = self.small().cpus.get(self.small().current.load(Relaxed)) else {
            return f();
        };
        let section = match context {
            1 => Section::Softirq,
            2 => Section::Hardirq,
            3 => {
                let state = self.small().local_irq_save();
                let r = f();
                self.small().local_irq_restore(state);
                return r;
            }
            _ => return f(),
        };
        cpu.enter(section);
        let r = f();
        cpu.leave(section);
        r
    }

    /// Empties every CPU's lists; the thread is on CPU 0 then.
    pub fn drain_everything(&self) {
        for cpu in [1, 0] {
            self.small().run_on(cpu);
            self.drain_this_cpu();
        }
    }

    /// Frames on all lists of all CPUs.
    pub fn on_lists(&self) -> u64 {
        self.zones().iter().map(|z| self.pcp_frames(z).sum::<u64>()).sum()
    }
}

impl std::ops::Deref for Machine {
    type Target = Kmem<Small>;

    fn deref(&self) -> &Kmem<Small> {
        &self.0
    }
}
