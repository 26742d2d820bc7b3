//! A small machine with contents: CPUs that threads pose as in turn, and a script that is played in the middle
//! of whatever the core does.
//!
//! # Concepts
//! On one thread everything happens in one order, so a failing case shrinks and repeats. An interrupt is a call
//! of the handler from inside a platform call, armed by [`Stage::arm`] to land at the n-th of them. A *prompter*
//! is called at each [`Cue`], from the thread that gives it: with two threads, tests let one wait there for the
//! other.
//!
//! # Locking
//! The platform's own mutexes are never held while the core is called.

use kmem::{
    Config, Kmem, Platform, ZoneType,
    context::{Cpu, Section},
    memblock::Memblock,
    platform::{IrqState, Level},
    types::Pfn,
    zone::{Layout as Zones, ZoneLimit},
};
use std::{
    alloc::{Layout, alloc_zeroed, dealloc},
    cell::{Cell, RefCell},
    fmt,
    ops::Deref,
    ptr::{self, NonNull},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicPtr, AtomicU32, Ordering::SeqCst},
    },
};

/// Nobody's CPU.
pub const NOBODY: usize = usize::MAX;

/// Memory of the host.
struct Block(NonNull<u8>, Layout);

// SAFETY: the memory is the block's alone; nothing about it is bound to a thread.
unsafe impl Send for Block {}

impl Block {
    /// Zeros, and where in them the first frame begins. Aligned by hand: what is allocated with less than a
    /// word's alignment is not touched before its use.
    fn zeroed(bytes: usize, shift: u32) -> (Block, NonNull<u8>) {
        let layout = Layout::from_size_align(bytes + (1 << shift), 16).unwrap();
        // SAFETY: the layout's size is not 0.
        let raw = NonNull::new(unsafe { alloc_zeroed(layout) }).unwrap();
        let _ = raw.as_ptr().expose_provenance();
        let first = raw.as_ptr().wrapping_add(raw.as_ptr().align_offset(1 << shift));
        (Block(raw, layout), NonNull::new(first).unwrap())
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout in `zeroed`.
        unsafe { dealloc(self.0.as_ptr(), self.1) };
    }
}

thread_local! {
    static HERE: Cell<usize> = const { Cell::new(0) };
    /// The memory of the thread's last machine: the next one is likely as large.
    static SPARE: RefCell<Option<(Block, NonNull<u8>)>> = const { RefCell::new(None) };
}

/// The calling thread poses as a CPU from now on, or as none.
pub fn be(cpu: usize) {
    HERE.set(cpu);
}

/// What a prompter hears.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cue {
    /// A CPU is about to mask interrupts, mostly to take a lock.
    Mask(usize),
    /// A CPU was kicked.
    Kick(usize),
}

type Prompter<const S: u32> = dyn Fn(&Kmem<Stage<S>>, Cue) + Send + Sync;
type Handler<const S: u32> = dyn Fn(&Kmem<Stage<S>>, usize) + Send + Sync;

/// The platform.
pub struct Stage<const SHIFT: u32> {
    cpus: [Cpu; 2],
    ipis: [AtomicBool; 2],
    memory: NonNull<u8>,
    frames: usize,
    backing: Option<(Block, NonNull<u8>)>,
    tables: Mutex<Vec<Block>>,
    kmem: AtomicPtr<Kmem<Stage<SHIFT>>>,
    fuse: AtomicU32,
    alone: AtomicBool,
    handler: Mutex<Option<Arc<Handler<SHIFT>>>>,
    prompted: AtomicBool,
    prompter: Mutex<Option<Arc<Prompter<SHIFT>>>>,
    reports: Mutex<Vec<String>>,
}

// SAFETY: the memory is reached through frame addresses only, which the allocator hands to one owner at a
// time.
unsafe impl<const SHIFT: u32> Send for Stage<SHIFT> {}
// SAFETY: as above; the rest is Sync.
unsafe impl<const SHIFT: u32> Sync for Stage<SHIFT> {}

impl<const SHIFT: u32> Stage<SHIFT> {
    fn new(frames: usize, nodes: [u32; 2]) -> Self {
        let bytes = frames << SHIFT;
        let spare = SPARE.take().filter(|(block, _)| block.1.size() == bytes + (1 << SHIFT));
        let memory = spare.unwrap_or_else(|| Block::zeroed(bytes, SHIFT));
        Stage {
            cpus: [Cpu::new(0, nodes[0]), Cpu::new(1, nodes[1])],
            ipis: Default::default(),
            memory: memory.1,
            backing: Some(memory),
            frames,
            tables: Mutex::default(),
            kmem: AtomicPtr::default(),
            fuse: AtomicU32::new(0),
            alone: AtomicBool::new(false),
            handler: Mutex::default(),
            prompted: AtomicBool::new(false),
            prompter: Mutex::default(),
            reports: Mutex::default(),
        }
    }

    /// Lets the handler run at the `n`-th platform call from now; 0 disarms.
    pub fn arm(&self, n: u32) {
        self.fuse.store(n, SeqCst);
    }

    /// One thread plays all CPUs: who waits for another need not give way to it.
    pub fn set_alone(&self) {
        self.alone.store(true, SeqCst);
    }

    /// Names the interrupt handler.
    pub fn set_handler(&self, f: impl Fn(&Kmem<Stage<SHIFT>>, usize) + Send + Sync + 'static) {
        *self.handler.lock().unwrap() = Some(Arc::new(f));
    }

    /// Names the prompter.
    pub fn set_prompter(&self, f: impl Fn(&Kmem<Stage<SHIFT>>, Cue) + Send + Sync + 'static) {
        *self.prompter.lock().unwrap() = Some(Arc::new(f));
        self.prompted.store(true, SeqCst);
    }

    /// Does without a prompter from now on.
    pub fn dismiss_prompter(&self) {
        self.prompted.store(false, SeqCst);
        *self.prompter.lock().unwrap() = None;
    }

    /// Takes the reports made so far.
    pub fn take_reports(&self) -> Vec<String> {
        std::mem::take(&mut *self.reports.lock().unwrap())
    }

    fn kmem(&self) -> Option<&Kmem<Stage<SHIFT>>> {
        // SAFETY: null, or set by `Machine::new` to the box that owns this platform, which stays where it
        // is until it is dropped, and this platform with it.
        unsafe { self.kmem.load(SeqCst).as_ref() }
    }

    fn cue(&self, cue: Cue) {
        if !self.prompted.load(SeqCst) {
            return;
        }
        let prompter = self.prompter.lock().unwrap().clone();
        if let (Some(prompter), Some(kmem)) = (prompter, self.kmem()) {
            prompter(kmem, cue);
        }
    }

    fn here(&self) -> Option<&Cpu> {
        self.cpus.get(HERE.get())
    }

    /// A place where an interrupt may land.
    fn landing(&self) {
        let left = self.fuse.load(SeqCst);
        if left == 0 {
            return;
        }
        let Some(cpu) = self.here().filter(|cpu| takes_irqs(cpu)) else { return };
        self.fuse.store(left - 1, SeqCst);
        let handler = self.handler.lock().unwrap().clone();
        if left == 1
            && let (Some(handler), Some(kmem)) = (handler, self.kmem())
        {
            self.interrupt(cpu, || handler(kmem, cpu.id()));
        }
    }

    fn interrupt(&self, cpu: &Cpu, f: impl FnOnce()) {
        let masked = cpu.mask_irqs();
        cpu.enter(Section::Hardirq);
        f();
        cpu.leave(Section::Hardirq);
        if !masked {
            cpu.unmask_irqs();
            self.serve_ipi(cpu);
        }
    }

    fn serve_ipi(&self, cpu: &Cpu) {
        if let Some(kmem) = self.kmem()
            && self.ipis[cpu.id()].swap(false, SeqCst)
        {
            let was = HERE.replace(cpu.id());
            self.interrupt(cpu, || kmem.handle_ipi());
            HERE.set(was);
        }
    }
}

fn takes_irqs(cpu: &Cpu) -> bool {
    let context = cpu.context();
    !context.irqs_off() && !context.in_hardirq() && !context.in_nmi()
}

impl<const SHIFT: u32> Drop for Stage<SHIFT> {
    fn drop(&mut self) {
        let _ = SPARE.try_with(|spare| spare.replace(self.backing.take()));
    }
}

// SAFETY: one thread poses as one CPU at a time, and handlers nest on it; CPUs, memory and tables stay where
// they are until the platform is dropped; frames are mapped one after the other; nothing is served while the
// context word masks.
unsafe impl<const SHIFT: u32> Platform for Stage<SHIFT> {
    const PAGE_SHIFT: u32 = SHIFT;

    fn this_cpu(&self) -> Option<&Cpu> {
        self.landing();
        self.here()
    }

    fn cpu(&self, id: usize) -> Option<&Cpu> {
        self.cpus.get(id)
    }

    fn nr_cpu_ids(&self) -> usize {
        self.cpus.len()
    }

    fn local_irq_save(&self) -> IrqState {
        self.landing();
        let Some(cpu) = self.here() else { return IrqState(2) };
        self.cue(Cue::Mask(cpu.id()));
        IrqState(usize::from(cpu.mask_irqs()))
    }

    fn local_irq_restore(&self, state: IrqState) {
        if state == IrqState(0)
            && let Some(cpu) = self.here()
        {
            cpu.unmask_irqs();
            self.serve_ipi(cpu);
            self.landing();
        }
    }

    fn direct_map(&self, pfn: Pfn) -> Option<NonNull<u8>> {
        // SAFETY: the frame is inside the memory.
        (pfn.index() < self.frames).then(|| unsafe { self.memory.add(pfn.index() << SHIFT) })
    }

    fn direct_unmap(&self, addr: *const u8) -> Option<Pfn> {
        let frame = addr.addr().wrapping_sub(self.memory.addr().get()) >> SHIFT;
        (frame < self.frames).then_some(Pfn(frame as u32))
    }

    fn zero_frames(&self, pfn: Pfn, count: u32) {
        for at in (pfn.0..pfn.0 + count).filter_map(|n| self.direct_map(Pfn(n))) {
            // SAFETY: a whole frame, the caller's.
            unsafe { at.write_bytes(0, 1 << SHIFT) };
        }
    }

    fn metadata(&self, _boot: &mut Memblock, bytes: usize) -> Option<NonNull<u8>> {
        let (block, first) = Block::zeroed(bytes, SHIFT);
        self.tables.lock().unwrap().push(block);
        Some(first)
    }

    fn kick(&self, cpu: usize) {
        let Some(cpu) = self.cpus.get(cpu) else { return };
        self.ipis[cpu.id()].store(true, SeqCst);
        self.cue(Cue::Kick(cpu.id()));
        // On one thread nobody runs there, or it is interrupted.
        if !self.prompted.load(SeqCst) && !cpu.context().irqs_off() {
            self.serve_ipi(cpu);
        }
    }

    fn wait(&self, _word: &AtomicU32, _expected: u32, _timeout_ns: u64) {
        self.landing();
    }

    fn wake(&self, _word: &AtomicU32) {}

    fn relax(&self) {
        // On a busy host each time may cost a slice of it, and a wait that nobody can answer has 20,000 turns.
        if self.alone.load(SeqCst) {
            std::hint::spin_loop();
        } else {
            std::thread::yield_now();
        }
    }

    fn now_ns(&self) -> u64 {
        0
    }

    fn report(&self, _level: Level, message: fmt::Arguments<'_>) {
        self.reports.lock().unwrap().push(message.to_string());
    }
}

/// A [`Stage`] with its memory manager. When it goes, every object and frame must be back.
pub struct Machine<const SHIFT: u32>(Box<Kmem<Stage<SHIFT>>>);

impl<const SHIFT: u32> Machine<SHIFT> {
    /// Brings one up whose nodes have so many pageblocks of memory each, 0 for a node without; its two CPUs
    /// are on the first and on the last node. The thread poses as CPU 0.
    pub fn new(blocks: &[u64], config: Config) -> Self {
        be(0);
        let block = 512u64 << SHIFT;
        let mut boot = Memblock::new();
        let mut at = 0;
        for (node, blocks) in blocks.iter().enumerate().filter(|(_, blocks)| **blocks > 0) {
            boot.add(at, blocks * block, node as u32).unwrap();
            at += blocks * block;
        }
        let limits = [ZoneLimit { zone: ZoneType::Normal, end: u64::MAX }];
        let config = Config { layout: Zones::new(&limits).unwrap(), ..config };
        let stage = Stage::new((at >> SHIFT) as usize, [0, blocks.len() as u32 - 1]);
        let kmem = Box::new(Kmem::bring_up(stage, boot, &config).unwrap());
        kmem.platform().kmem.store(ptr::from_ref(&*kmem).cast_mut(), SeqCst);
        (0..2).for_each(|cpu| kmem.cpu_online(cpu));
        Machine(kmem)
    }

    /// The host side.
    pub fn stage(&self) -> &Stage<SHIFT> {
        self.0.platform()
    }

    /// The node of the memory at an address.
    pub fn node_of(&self, at: NonNull<u8>) -> usize {
        let page = self.virt_to_page(at.as_ptr()).unwrap();
        self.page_zone(self.page_to_pfn(page).unwrap()).unwrap().node()
    }

    /// Frames that are in use beyond those that the layer keeps for itself, once all objects are back.
    pub fn lost(&self) -> u64 {
        self.drop_slab();
        for cpu in [1, 0] {
            be(cpu);
            self.drain_this_cpu();
        }
        let objects = self.audit_objects().unwrap();
        assert_eq!((objects.live, objects.cached), (0, 0), "objects lost or found");
        self.audit().unwrap().allocated - objects.slab_frames - objects.own_frames
    }
}

impl<const SHIFT: u32> Deref for Machine<SHIFT> {
    type Target = Kmem<Stage<SHIFT>>;

    fn deref(&self) -> &Kmem<Stage<SHIFT>> {
        &self.0
    }
}

impl<const SHIFT: u32> Drop for Machine<SHIFT> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.stage().arm(0);
            self.stage().dismiss_prompter();
            assert_eq!(self.lost(), 0, "frames lost");
        }
    }
}
