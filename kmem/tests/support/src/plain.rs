//! The smallest platform: memory is a `Vec`, a CPU is a number in a thread-local, time stands still.
//!
//! Its threads never share a CPU number and take no interrupts.

use kmem::{
    Pfn,
    context::Cpu,
    memblock::Memblock,
    platform::{IrqState, Level, Platform},
};
use std::{
    alloc::{Layout, alloc_zeroed, dealloc},
    cell::Cell,
    fmt,
    ops::Range,
    ptr::NonNull,
    sync::{
        Condvar, Mutex,
        atomic::{AtomicU32, AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

thread_local! {
    static CPU: Cell<usize> = const { Cell::new(0) };
}

/// A machine of `frames` frames of 2^`SHIFT` bytes from frame 0, all of them mapped.
pub struct Plain<const SHIFT: u32> {
    cpus: Vec<Cpu>,
    memory: NonNull<u8>,
    frames: usize,
    tables: Mutex<Vec<(usize, Layout)>>,
    /// Bytes of sparse tables asked for, and how many of them to be backed.
    pub sparse: Mutex<Vec<(usize, usize)>>,
    /// Reports so far.
    pub reports: Mutex<Vec<String>>,
    /// The time.
    pub now_ns: AtomicU64,
    /// Calls of `wake`.
    pub wakes: AtomicU64,
    /// Callers in `wait`.
    pub waiting: AtomicU64,
    /// How many calls of `set_direct_map` do what they are asked.
    pub direct_changes: AtomicU64,
    sleepers: (Mutex<()>, Condvar),
}

// SAFETY: the memory is reached through frame addresses only, which the allocator hands to one owner at a
// time.
unsafe impl<const SHIFT: u32> Send for Plain<SHIFT> {}
// SAFETY: as above; the rest is Sync.
unsafe impl<const SHIFT: u32> Sync for Plain<SHIFT> {}

fn zeroed(bytes: usize, align: usize) -> Option<(NonNull<u8>, Layout)> {
    let layout = Layout::from_size_align(bytes.max(1), align).ok()?;
    // SAFETY: the layout's size is not 0.
    Some((NonNull::new(unsafe { alloc_zeroed(layout) })?, layout))
}

impl<const SHIFT: u32> Plain<SHIFT> {
    /// A machine with `frames` frames and `cpus` CPUs.
    pub fn new(frames: usize, cpus: u32) -> Self {
        let (memory, _) = zeroed(frames << SHIFT, 1 << SHIFT).unwrap();
        Plain {
            cpus: (0..cpus).map(|id| Cpu::new(id, 0)).collect(),
            memory,
            frames,
            tables: Mutex::default(),
            sparse: Mutex::default(),
            reports: Mutex::default(),
            now_ns: AtomicU64::new(0),
            wakes: AtomicU64::new(0),
            waiting: AtomicU64::new(0),
            direct_changes: AtomicU64::new(0),
            sleepers: (Mutex::new(()), Condvar::new()),
        }
    }

    /// Puts the calling thread on a CPU of its own.
    pub fn be_cpu(id: usize) {
        CPU.set(id);
    }
}

impl<const SHIFT: u32> Drop for Plain<SHIFT> {
    fn drop(&mut self) {
        let memory = Layout::from_size_align(self.frames << SHIFT, 1 << SHIFT).unwrap();
        let tables = std::mem::take(self.tables.get_mut().unwrap());
        for (at, layout) in tables.into_iter().chain([(self.memory.as_ptr() as usize, memory)]) {
            // SAFETY: allocated by `zeroed` with this layout, and freed here only.
            unsafe { dealloc(std::ptr::with_exposed_provenance_mut(at), layout) };
        }
    }
}

// SAFETY: each thread is on a CPU of its own and takes no interrupts; CPUs, memory and tables stay
// where they are until the platform is dropped; frames are mapped one after the other.
unsafe impl<const SHIFT: u32> Platform for Plain<SHIFT> {
    const PAGE_SHIFT: u32 = SHIFT;

    fn this_cpu(&self) -> Option<&Cpu> {
        self.cpus.get(CPU.get())
    }

    fn cpu(&self, id: usize) -> Option<&Cpu> {
        self.cpus.get(id)
    }

    fn nr_cpu_ids(&self) -> usize {
        self.cpus.len()
    }

    fn local_irq_save(&self) -> IrqState {
        IrqState(self.this_cpu().is_some_and(Cpu::mask_irqs).into())
    }

    fn local_irq_restore(&self, state: IrqState) {
        if let Some(cpu) = self.this_cpu().filter(|_| state == IrqState(0)) {
            cpu.unmask_irqs();
        }
    }

    fn direct_map(&self, pfn: Pfn) -> Option<NonNull<u8>> {
        // SAFETY: the frame is inside the memory.
        (pfn.index() < self.frames).then(|| unsafe { self.memory.add(pfn.index() << SHIFT) })
    }

    fn direct_unmap(&self, addr: *const u8) -> Option<Pfn> {
        let frame = (addr as usize).wrapping_sub(self.memory.as_ptr() as usize) >> SHIFT;
        (frame < self.frames).then_some(Pfn(frame as u32))
    }

    fn set_direct_map(&self, _pfn: Pfn, _count: u32, _valid: bool) -> bool {
        self.direct_changes.fetch_update(SeqCst, SeqCst, |n| n.checked_sub(1)).is_ok()
    }

    fn zero_frames(&self, pfn: Pfn, count: u32) {
        for at in (pfn.0..pfn.0 + count).filter_map(|n| self.direct_map(Pfn(n))) {
            // SAFETY: a whole frame, the caller's.
            unsafe { at.write_bytes(0, 1 << SHIFT) };
        }
    }

    fn metadata(&self, _boot: &mut Memblock, bytes: usize) -> Option<NonNull<u8>> {
        let (at, layout) = zeroed(bytes, 1 << SHIFT)?;
        self.tables.lock().unwrap().push((at.as_ptr().expose_provenance(), layout));
        Some(at)
    }

    fn sparse_metadata(
        &self,
        boot: &mut Memblock,
        bytes: usize,
        used: &mut dyn Iterator<Item = Range<usize>>,
    ) -> Option<NonNull<u8>> {
        self.sparse.lock().unwrap().push((bytes, used.map(|r| r.len()).sum()));
        self.metadata(boot, bytes)
    }

    fn kick(&self, _cpu: usize) {}

    fn wait(&self, word: &AtomicU32, expected: u32, timeout_ns: u64) {
        let held = self.sleepers.0.lock().unwrap();
        if word.load(SeqCst) == expected {
            self.waiting.fetch_add(1, SeqCst);
            drop(self.sleepers.1.wait_timeout(held, Duration::from_nanos(timeout_ns)));
            self.waiting.fetch_sub(1, SeqCst);
        }
    }

    fn wake(&self, _word: &AtomicU32) {
        self.wakes.fetch_add(1, SeqCst);
        let _held = self.sleepers.0.lock();
        self.sleepers.1.notify_all();
    }

    fn now_ns(&self) -> u64 {
        self.now_ns.load(SeqCst)
    }

    fn report(&self, _level: Level, message: fmt::Arguments<'_>) {
        self.reports.lock().unwrap().push(message.to_string());
    }
}
