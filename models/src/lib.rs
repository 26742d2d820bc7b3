//! A machine for models: CPUs are threads that shuttle schedules, and interrupts land before any atomic
//! access of the thread whose CPU they are for.
//!
//! # Concepts
//! [`on_cpu`] makes a thread a CPU. From then on every atomic access of kmem's code is a place where
//! another thread may go on, a request of another CPU lands, or the thread's own timer.
//!
//! # Locking
//! What the models share are atomics that are no scheduling points; threads really run one at a time.

use kmem::{
    Config, Kmem, Platform, ZoneType,
    context::{Cpu, Section},
    highmem::{LAST_PKMAP, SLOTS_PER_CPU},
    memblock::Memblock,
    platform::{IrqState, Level, MapFailed, PageProt},
    types::Pfn,
    zone::{Layout, ZoneLimit},
};
use shuttle::rand::{Rng, thread_rng};
use std::{
    alloc::{Layout as Table, alloc_zeroed, dealloc},
    cell::{Cell, RefCell},
    collections::HashMap,
    fmt,
    ops::Range,
    ptr::NonNull,
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst},
    },
};

/// kmem's own atomics, as the core of the models has them.
pub use kmem_models_core::sync::atomic as modelled;

/// CPUs of the machine.
pub const CPUS: usize = 3;

/// The shortest sleep that somebody ends.
const NAP_NS: u64 = 1_000_000;

/// What a timer interrupt does.
pub type Timer = dyn Fn(&Kmem<Modelled>, usize) + Send + Sync;

/// The platform.
pub struct Modelled {
    cpus: [Cpu; CPUS],
    ipis: [AtomicBool; CPUS],
    /// Whether a thread is the CPU.
    taken: [AtomicBool; CPUS],
    tables: Mutex<Vec<(usize, Table)>>,
    /// Contents of the frames.
    memory: usize,
    /// Frames that the direct map shows.
    low: u32,
    /// The page-table entries of kmap's places, and what each CPU knows of them.
    maps: Mutex<Maps>,
    kmem: Mutex<Weak<Kmem<Modelled>>>,
    timer: Mutex<Option<Arc<Timer>>>,
    relaxed: AtomicU64,
    ticks: AtomicU64,
    /// The last grace period that was named, and the last one that has ended.
    grace: [AtomicU64; 2],
    /// Reports of misuse.
    pub bugs: Mutex<Vec<String>>,
    sleepers: shuttle::sync::Mutex<()>,
    woken: shuttle::sync::Condvar,
    /// Threads that came to be asleep.
    pub slept: AtomicU32,
}

/// Page-table entries by address, and translations that CPUs know: they forget them only when told to.
#[derive(Default)]
struct Maps {
    entries: HashMap<usize, Pfn>,
    known: [HashMap<usize, Pfn>; CPUS],
}

/// Where kmap's places are; nothing is there but for the model.
const KMAP: usize = 1 << 40;

/// Where areas are: addresses only.
const VMALLOC: Range<usize> = 1 << 41..(1 << 41) + (64 << 20);

shuttle::thread_local! {
    static HERE: RefCell<Option<(Arc<Kmem<Modelled>>, usize)>> = RefCell::new(None);
    static QUIET: Cell<bool> = Cell::new(false);
    static TICKS_LEFT: Cell<u32> = Cell::new(0);
}

/// Before each atomic access of kmem's.
fn point() {
    if QUIET.try_with(Cell::get).unwrap_or(true) {
        return;
    }
    let Ok(Some((kmem, cpu))) = HERE.try_with(|here| here.borrow().clone()) else { return };
    // Now and then a CPU is held up for long.
    let turns = match thread_rng().gen_range(0..200) {
        0 => thread_rng().gen_range(0..40),
        1..40 => 1,
        _ => 0,
    };
    (0..turns).for_each(|_| shuttle::thread::yield_now());
    kmem.platform().land(&kmem, cpu);
}

fn quietly<R>(f: impl FnOnce() -> R) -> R {
    let was = QUIET.with(|q| q.replace(true));
    let r = f();
    QUIET.with(|q| q.set(was));
    r
}

/// Bytes of memory.
const BYTES: usize = 72 << 20;

const ONE_ZONE: [ZoneLimit; 1] = [ZoneLimit { zone: ZoneType::Normal, end: u64::MAX }];

/// Zeros that are not touched before their use, and where in them the first frame begins.
fn zeroed(bytes: usize) -> Option<(usize, Table, NonNull<u8>)> {
    let table = Table::from_size_align(bytes + 4096, 16).ok()?;
    // SAFETY: the size is not 0.
    let raw = NonNull::new(unsafe { alloc_zeroed(table) })?;
    let first = raw.as_ptr().wrapping_add(raw.as_ptr().align_offset(4096));
    Some((raw.as_ptr().expose_provenance(), table, NonNull::new(first)?))
}

/// A machine with so much memory that lists of single pages are on.
pub fn machine() -> Arc<Kmem<Modelled>> {
    machine_with(BYTES, 1, 1)
}

/// As [`machine`], with so many areas.
pub fn machine_with_areas(areas: usize) -> Arc<Kmem<Modelled>> {
    machine_with(BYTES, 1, areas)
}

/// As [`machine`], of which the last 8 MiB are high memory, with so many places for kmap.
pub fn machine_with_high_memory(places: usize) -> Arc<Kmem<Modelled>> {
    machine_with(BYTES - (8 << 20), places, 1)
}

fn machine_with(low: usize, places: usize, areas: usize) -> Arc<Kmem<Modelled>> {
    // Nothing is checked before a thread is a CPU.
    let mut boot = Memblock::new();
    boot.add(0, BYTES as u64, 0).unwrap();
    let limits = [
        ZoneLimit { zone: ZoneType::Normal, end: low as u64 },
        ZoneLimit { zone: ZoneType::HighMem, end: u64::MAX },
    ];
    let layout = Layout::new(if low == BYTES { &ONE_ZONE } else { &limits }).unwrap();
    let areas = Some(areas);
    let config =
        Config { layout, areas, last_pkmap: places, debug_highmem: false, ..Config::default() };
    let (raw, table, memory) = zeroed(BYTES).unwrap();
    let platform = Modelled {
        cpus: [Cpu::new(0, 0), Cpu::new(1, 0), Cpu::new(2, 0)],
        ipis: Default::default(),
        taken: Default::default(),
        tables: Mutex::new(vec![(raw, table)]),
        memory: memory.as_ptr().expose_provenance(),
        low: (low >> 12) as u32,
        maps: Mutex::default(),
        kmem: Mutex::default(),
        timer: Mutex::default(),
        relaxed: AtomicU64::new(0),
        ticks: AtomicU64::new(0),
        grace: Default::default(),
        bugs: Mutex::default(),
        sleepers: shuttle::sync::Mutex::new(()),
        woken: shuttle::sync::Condvar::new(),
        slept: AtomicU32::new(0),
    };
    let kmem = Arc::new(Kmem::bring_up(platform, boot, &config).unwrap());
    *kmem.platform().kmem.lock().unwrap() = Arc::downgrade(&kmem);
    (0..CPUS).for_each(|cpu| kmem.cpu_online(cpu));
    modelled::set_hook(point);
    kmem
}

/// Runs `f` as a CPU; `ticks` timer interrupts land at places that the model chooses. The thread stays
/// for requests of others until `over` says so.
pub fn on_cpu<R>(
    kmem: &Arc<Kmem<Modelled>>,
    cpu: usize,
    ticks: u32,
    over: impl Fn() -> bool,
    f: impl FnOnce(&Kmem<Modelled>) -> R,
) -> R {
    while kmem.platform().taken[cpu].swap(true, SeqCst) {
        // Somebody poses as it.
        shuttle::thread::yield_now();
    }
    HERE.with(|here| *here.borrow_mut() = Some((Arc::clone(kmem), cpu)));
    TICKS_LEFT.with(|t| t.set(ticks));
    let r = f(kmem);
    TICKS_LEFT.with(|t| t.set(0));
    while !over() {
        shuttle::thread::yield_now();
        kmem.platform().land(kmem, cpu);
    }
    kmem.platform().land(kmem, cpu);
    HERE.with(|here| *here.borrow_mut() = None);
    kmem.platform().taken[cpu].store(false, SeqCst);
    r
}

impl Modelled {
    /// Sets what timer interrupts do.
    pub fn set_timer(&self, timer: Arc<Timer>) {
        *self.timer.lock().unwrap() = Some(timer);
    }

    /// Turns of spin loops so far.
    pub fn relaxed(&self) -> u64 {
        self.relaxed.load(SeqCst)
    }

    /// Timer interrupts so far.
    pub fn ticks(&self) -> u64 {
        self.ticks.load(SeqCst)
    }

    /// Serves what is due on the CPU, if it takes interrupts.
    fn land(&self, kmem: &Kmem<Modelled>, id: usize) {
        let cpu = &self.cpus[id];
        let takes = quietly(|| {
            let context = cpu.context();
            !context.irqs_off() && !context.in_hardirq()
        });
        if !takes {
            return;
        }
        if self.ipis[id].load(SeqCst) && thread_rng().gen_bool(0.5) {
            self.ipis[id].store(false, SeqCst);
            self.handle(cpu, || kmem.handle_ipi());
        }
        let left = TICKS_LEFT.with(Cell::get);
        if left > 0 && thread_rng().gen_bool(0.05) {
            TICKS_LEFT.with(|t| t.set(left - 1));
            self.ticks.fetch_add(1, SeqCst);
            let timer = self.timer.lock().unwrap().clone();
            if let Some(timer) = timer {
                self.handle(cpu, || timer(kmem, id));
            }
        }
    }

    fn handle(&self, cpu: &Cpu, f: impl FnOnce()) {
        quietly(|| {
            cpu.mask_irqs();
            cpu.enter(Section::Hardirq);
        });
        f();
        quietly(|| {
            cpu.leave(Section::Hardirq);
            cpu.unmask_irqs();
        });
    }

    /// The frame that the running CPU reaches at an address of kmap's: by what it knows, or by the page table, which it
    /// knows from then on.
    pub fn touch(&self, addr: usize) -> Option<Pfn> {
        let cpu = self.here()?;
        let mut maps = self.maps.lock().unwrap();
        let entry = maps.entries.get(&addr).copied();
        let known = maps.known[cpu].get(&addr).copied();
        if let (None, Some(pfn)) = (known, entry) {
            maps.known[cpu].insert(addr, pfn);
        }
        known.or(entry)
    }

    /// Sets an entry; the running CPU forgets what it knew.
    fn set_entry(&self, addr: usize, pfn: Option<Pfn>) {
        let mut maps = self.maps.lock().unwrap();
        match pfn {
            Some(pfn) => maps.entries.insert(addr, pfn),
            None => maps.entries.remove(&addr),
        };
        if let Some(cpu) = self.here() {
            maps.known[cpu].remove(&addr);
        }
    }

    fn here(&self) -> Option<usize> {
        HERE.try_with(|here| here.borrow().as_ref().map(|h| h.1)).ok().flatten()
    }
}

impl Drop for Modelled {
    fn drop(&mut self) {
        for (at, table) in self.tables.lock().unwrap().drain(..) {
            // SAFETY: allocated with this layout in `metadata`; the core is gone.
            unsafe { dealloc(std::ptr::with_exposed_provenance_mut(at), table) };
        }
    }
}

// SAFETY: a CPU is one thread's for as long as it is anybody's, and handlers nest on that thread; frames are
// mapped one after the other; tables are zero-filled and kept; nothing lands while the context word masks.
unsafe impl Platform for Modelled {
    fn this_cpu(&self) -> Option<&Cpu> {
        self.cpus.get(self.here()?)
    }

    fn cpu(&self, id: usize) -> Option<&Cpu> {
        self.cpus.get(id)
    }

    fn nr_cpu_ids(&self) -> usize {
        CPUS
    }

    fn local_irq_save(&self) -> IrqState {
        let Some(cpu) = self.this_cpu() else { return IrqState(2) };
        IrqState(usize::from(quietly(|| cpu.mask_irqs())))
    }

    fn local_irq_restore(&self, state: IrqState) {
        if state == IrqState(0)
            && let Some(cpu) = self.this_cpu()
        {
            quietly(|| cpu.unmask_irqs());
        }
    }

    fn direct_map(&self, pfn: Pfn) -> Option<NonNull<u8>> {
        let at = std::ptr::with_exposed_provenance_mut(self.memory + (pfn.index() << 12));
        (pfn.0 < self.low).then(|| NonNull::new(at))?
    }

    fn direct_unmap(&self, addr: *const u8) -> Option<Pfn> {
        let frame = addr.addr().wrapping_sub(self.memory) >> 12;
        (frame < self.low as usize).then_some(Pfn(frame as u32))
    }

    fn zero_frames(&self, pfn: Pfn, count: u32) {
        for at in (pfn.0..pfn.0 + count).filter_map(|n| self.direct_map(Pfn(n))) {
            // SAFETY: a whole frame, the caller's.
            unsafe { at.write_bytes(0, 4096) };
        }
    }

    fn metadata(&self, _boot: &mut Memblock, bytes: usize) -> Option<NonNull<u8>> {
        let (raw, table, first) = zeroed(bytes)?;
        self.tables.lock().unwrap().push((raw, table));
        Some(first)
    }

    fn vmalloc_range(&self) -> Option<Range<usize>> {
        Some(VMALLOC)
    }

    fn vmalloc_is_mapped(&self) -> bool {
        false
    }

    unsafe fn map_pages(
        &self,
        _addr: usize,
        _pfn: Pfn,
        _count: u32,
        _prot: PageProt,
        _tables: &mut dyn FnMut() -> Option<Pfn>,
    ) -> Result<(), MapFailed> {
        Ok(())
    }

    fn kmap_range(&self) -> Option<Range<usize>> {
        let places = LAST_PKMAP + CPUS * SLOTS_PER_CPU;
        (usize::try_from(self.low) != Ok(BYTES >> 12)).then(|| KMAP..KMAP + (places << 12))
    }

    unsafe fn kmap_set(&self, addr: usize, pfn: Pfn) {
        self.set_entry(addr, Some(pfn));
    }

    unsafe fn kmap_clear(&self, addr: usize) {
        self.set_entry(addr, None);
    }

    fn flush_tlb_kernel_range(&self, range: Range<usize>) {
        // One CPU after the other forgets.
        for cpu in 0..CPUS {
            shuttle::thread::yield_now();
            self.maps.lock().unwrap().known[cpu].retain(|addr, _| !range.contains(addr));
        }
    }

    fn kick(&self, cpu: usize) {
        self.ipis[cpu].store(true, SeqCst);
        let kmem = self.kmem.lock().unwrap().upgrade();
        if let Some(kmem) = kmem
            && !self.taken[cpu].swap(true, SeqCst)
        {
            // Nobody runs there.
            let was = HERE.with(|here| here.replace(Some((Arc::clone(&kmem), cpu))));
            while self.ipis[cpu].load(SeqCst) {
                self.land(&kmem, cpu);
            }
            HERE.with(|here| here.replace(was));
            self.taken[cpu].store(false, SeqCst);
        }
    }

    fn wait(&self, word: &modelled::AtomicU32, expected: u32, timeout_ns: u64) {
        if timeout_ns < NAP_NS {
            // Nobody wakes who sleeps for that little: it looks again.
            return shuttle::thread::yield_now();
        }
        // As a futex does it: the look and the falling asleep are one step for those who wake. There is
        // no timeout, so a lost wake-up is a deadlock.
        let guard = self.sleepers.lock().unwrap();
        if quietly(|| word.load(SeqCst)) == expected {
            self.slept.fetch_add(1, SeqCst);
            drop(self.woken.wait(guard).unwrap());
        }
    }

    fn wake(&self, _word: &modelled::AtomicU32) {
        let _guard = self.sleepers.lock().unwrap();
        self.woken.notify_all();
    }

    fn relax(&self) {
        self.relaxed.fetch_add(1, SeqCst);
        shuttle::thread::yield_now();
        // Taken out first: nothing may be locked where another thread may go on.
        let kmem = self.kmem.lock().unwrap().upgrade();
        if let (Some(cpu), Some(kmem)) = (self.here(), kmem) {
            self.land(&kmem, cpu);
        }
    }

    fn now_ns(&self) -> u64 {
        0
    }

    fn rcu_start(&self) -> Option<u64> {
        Some(self.grace[0].fetch_add(1, SeqCst) + 1)
    }

    fn rcu_done(&self, end: u64) -> bool {
        // There are no readers, so grace periods end whenever they like.
        if thread_rng().gen_bool(0.5) {
            self.grace[1].fetch_max(self.grace[0].load(SeqCst), SeqCst);
        }
        self.grace[1].load(SeqCst) >= end
    }

    fn report(&self, level: Level, message: fmt::Arguments<'_>) {
        if level == Level::Bug {
            self.bugs.lock().unwrap().push(message.to_string());
        }
    }
}
