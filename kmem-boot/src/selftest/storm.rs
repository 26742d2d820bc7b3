//! GFP_ATOMIC from interrupts that land anywhere in the allocator \[C3\].
//!
//! # Concepts
//! The main flow allocates and frees in every way that leads down another path; interrupts land in it
//! and allocate and free as well. Two kinds of interrupt: the local APIC's timer, at intervals drawn
//! anew each time, and the single step, which comes after *every* instruction that runs with
//! interrupts unmasked. Each interrupt is counted under the path it landed in; a path that saw none
//! fails the test, because it was not shown.
//!
//! # Locking
//! What interrupts hold is in [`HELD`]. Handlers try its lock, and the main flow takes it with
//! interrupts masked, so nobody ever waits.

use super::{
    Bench, Failed, Verdict,
    block::{Block, Chain},
    check, fail,
    percpu::COUNT,
};
use crate::{
    KMEM, apic, clock,
    interrupts::{self, Source},
    platform::{self, BareMetal},
    println,
};
use core::{
    ptr,
    sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed},
};
use fastrand::Rng;
use kmem::{
    AllocError, Kmem,
    context::{NR_PATHS, Path},
    gfp::Gfp,
    page::Page,
    slab::SlabFlags,
    types::DEFAULT_MAX_ORDER,
};
use spin::Mutex;
use x86_64::instructions::interrupts::without_interrupts;

/// The first word of each frame, and the last of the block, prove enough here.
const STEP: usize = 512;
/// The timer's interval outside storms.
const TICK_NS: u64 = 1_000_000;
/// The longest interval within one.
const STORM_NS: u64 = 40_000;
/// Pages of a round that are held at once, to run lists empty and over.
const BURST: u32 = 300;
/// Objects of a round that are held at once.
const OBJECTS: usize = 200;
/// And those of the round's own cache: several times what two magazines hold at first.
const OWN_OBJECTS: usize = 100;
/// Per-CPU words of a round.
const PLACES: usize = 16;
/// Areas of a round.
const AREAS: usize = 4;
/// Pages of a round that are asked for in one call.
const BULK: usize = 48;
/// Of the single steps outside the allocator one in so many does something.
const IDLE_STEPS: u64 = 16;
const QUIET: Gfp = Gfp::NOWARN.union(Gfp::NORETRY);

/// Timer interrupts outside storms.
pub static TICKS: AtomicU32 = AtomicU32::new(0);
/// Interrupts that the CPU sent itself.
pub static KICKS: AtomicU32 = AtomicU32::new(0);
/// Paths of high memory, of which there is none.
const ABSENT: [Path; 2] = [Path::Kmap, Path::KmapLocal];
static STORM: AtomicBool = AtomicBool::new(false);
static HITS: [AtomicU64; NR_PATHS] = [const { AtomicU64::new(0) }; NR_PATHS];
static EXHAUSTED: AtomicU64 = AtomicU64::new(0);
static BROKEN: AtomicU32 = AtomicU32::new(0);
static HELD: Mutex<Held> =
    Mutex::new(Held { slots: [None; SLOTS], objects: [None; SLOTS], rng: None });
const SLOTS: usize = 64;

/// What interrupts allocated and have not freed yet.
struct Held {
    slots: [Option<Block>; SLOTS],
    objects: [Option<Object>; SLOTS],
    rng: Option<Rng>,
}

/// Runs in hard interrupt context for every interrupt of the machine.
pub fn on_interrupt(source: Source) {
    // Read before anything else can change it.
    let path = platform::CPU.path();
    let storm = STORM.load(Relaxed);
    match source {
        Source::Ipi => {
            KICKS.fetch_add(1, Relaxed);
            if let Some(kmem) = KMEM.get() {
                kmem.handle_ipi();
            }
            return;
        }
        Source::Timer if !storm => {
            TICKS.fetch_add(1, Relaxed);
            if let Some(kmem) = KMEM.get() {
                kmem.this_cpu_inc(&COUNT);
            }
            return apic::arm(TICK_NS);
        }
        Source::Timer | Source::Step => {}
    }
    let hits = HITS[path as usize].fetch_add(1, Relaxed);
    // Most single steps fall between the allocator's calls, where a few will do.
    if source == Source::Step && path == Path::Idle && !hits.is_multiple_of(IDLE_STEPS) {
        return;
    }
    let mut next = TICK_NS;
    if let Some(mut held) = HELD.try_lock() {
        if let Some(rng) = &mut held.rng {
            next = rng.u64(1_000..STORM_NS);
        }
        if held.turn().is_err() {
            BROKEN.fetch_add(1, Relaxed);
        }
    }
    if source == Source::Timer {
        apic::arm(next);
    }
}

/// An object of kmalloc's that holds its own address.
#[derive(Clone, Copy)]
struct Object(usize);

impl Object {
    fn alloc(kmem: &Kmem<BareMetal>, gfp: Gfp, size: usize) -> Result<Object, AllocError> {
        let at = kmem.kmalloc(size.max(8), gfp)?;
        let addr = at.as_ptr().expose_provenance();
        // SAFETY: at least eight bytes, just given to us.
        unsafe { at.cast::<usize>().write(addr) };
        Ok(Object(addr))
    }

    fn free(self, kmem: &Kmem<BareMetal>) -> Verdict {
        let at = ptr::with_exposed_provenance_mut::<u8>(self.0);
        // SAFETY: from `alloc`, and not used after.
        let (found, freed) = unsafe { (at.cast::<usize>().read(), kmem.kfree(at)) };
        check!(found == self.0, "object {:#x} holds {found:#x}", self.0);
        check!(freed.is_ok(), "object {:#x}: {freed:?}", self.0);
        Ok(())
    }
}

impl Held {
    /// Frees what random slots hold, or fills them.
    fn turn(&mut self) -> Verdict {
        let (Some(kmem), Some(rng)) = (KMEM.get(), &mut self.rng) else { return Ok(()) };
        let slot = &mut self.objects[rng.usize(..SLOTS)];
        *slot = match slot.take() {
            Some(object) => {
                object.free(kmem)?;
                None
            }
            None => {
                let most = 8 << rng.u32(..11);
                let size = rng.usize(1..=most);
                Object::alloc(kmem, Gfp::ATOMIC | Gfp::NOWARN, size).ok()
            }
        };
        let slot = &mut self.slots[rng.usize(..SLOTS)];
        if let Some(block) = slot.take() {
            block.verify(STEP)?;
            return block.free(kmem);
        }
        let order = rng.u32(..).trailing_zeros().min(4);
        match Block::alloc(kmem, Gfp::ATOMIC | Gfp::NOWARN, order, rng.u64(..)) {
            Ok(block) => {
                block.fill(STEP);
                *slot = Some(block);
            }
            Err(AllocError::NoMemory) => {
                EXHAUSTED.fetch_add(1, Relaxed);
            }
            Err(error) => fail!("GFP_ATOMIC from an interrupt, order {order}: {error}"),
        }
        Ok(())
    }
}

/// Interrupts by timer for the time asked for.
pub fn timer(bench: &mut Bench) -> Verdict {
    begin(bench);
    let end = clock::now_ns() + bench.storm_ns;
    let mut rounds = 0u64;
    let verdict = hold_dma(bench, |bench| {
        while clock::now_ns() < end {
            round(bench)?;
            rounds += 1;
        }
        Ok(())
    });
    finish(bench.kmem, "timer", rounds, &Path::ALL, verdict)
}

/// Interrupts by timer while the main flow sweeps free memory from some to none and back, through
/// every watermark, so that the interrupts' own requests take the slow path, too, and fail in the end.
pub fn pressure(bench: &mut Bench) -> Verdict {
    // Also what is set aside for atomic requests of higher orders.
    const ALL: Gfp = Gfp::MEMALLOC.union(Gfp::ATOMIC).union(QUIET);
    const SWING: u32 = 3000;
    const PATIENCE_NS: u64 = 200_000_000;
    let mut chain = Chain::new(bench.rng.u64(..));
    begin(bench);
    let end = clock::now_ns() + bench.storm_ns / 2;
    let mut rounds = 0;
    let mut sweep = || {
        while clock::now_ns() < end {
            for gfp in [QUIET, ALL] {
                take_all(bench.kmem, gfp, &mut chain)?;
            }
            // Empty now: stay so until an interrupt has met it.
            let (met, late) = (EXHAUSTED.load(Relaxed), clock::now_ns() + PATIENCE_NS);
            while EXHAUSTED.load(Relaxed) == met && clock::now_ns() < late {
                core::hint::spin_loop();
            }
            for _ in 0..bench.rng.u32(..SWING) {
                if let Some(block) = chain.pop(bench.kmem, STEP)? {
                    block.free(bench.kmem)?;
                }
            }
            rounds += 1;
        }
        Ok(())
    };
    let verdict = sweep();
    let paths = [Path::Slow, Path::Refill, Path::Drain];
    let verdict = finish(bench.kmem, "pressure", rounds, &paths, verdict);
    chain.free_all(bench.kmem, STEP)?;
    verdict?;
    check!(EXHAUSTED.load(Relaxed) > 0, "no request of an interrupt met an empty machine");
    Ok(())
}

/// Allocates single frames until there are none.
fn take_all(kmem: &'static Kmem<BareMetal>, gfp: Gfp, chain: &mut Chain) -> Verdict {
    loop {
        match Block::alloc(kmem, gfp, 0, 0) {
            Ok(block) => chain.push(block, STEP),
            Err(AllocError::NoMemory) => return Ok(()),
            Err(error) => fail!("order 0, {gfp:?}: {error}"),
        }
    }
}

/// An interrupt after every instruction, for a few rounds.
pub fn single_step(bench: &mut Bench) -> Verdict {
    const ROUNDS: u64 = 8;
    begin(bench);
    let verdict = hold_dma(bench, |bench| {
        interrupts::single_stepped(|| {
            (0..ROUNDS).try_for_each(|_| {
                run_dry(bench)?;
                round(bench)
            })
        })
    });
    finish(bench.kmem, "single step", ROUNDS, &Path::ALL, verdict)
}

/// Takes more single frames than a list holds after a refill, so that it must be refilled, and gives
/// them back. They are movable: what interrupts free, and the slab layer with them, goes to other lists.
fn run_dry(bench: &mut Bench) -> Verdict {
    const FRAMES: u32 = 160;
    let mut chain = Chain::new(bench.rng.u64(..));
    bench.kmem.drain_this_cpu();
    for _ in 0..FRAMES {
        match Block::alloc(bench.kmem, QUIET | Gfp::MOVABLE, 0, 0) {
            Ok(block) => chain.push(block, STEP),
            Err(error) => fail!("order 0, {QUIET:?} movable: {error}"),
        }
    }
    chain.free_all(bench.kmem, STEP)
}

fn begin(bench: &mut Bench) {
    for hits in &HITS {
        hits.store(0, Relaxed);
    }
    EXHAUSTED.store(0, Relaxed);
    BROKEN.store(0, Relaxed);
    without_interrupts(|| HELD.lock().rng = Some(bench.rng.fork()));
    STORM.store(true, Relaxed);
}

/// Ends the storm, frees what interrupts hold, and says what was hit; each of `paths` must have been.
fn finish(
    kmem: &Kmem<BareMetal>,
    name: &str,
    rounds: u64,
    paths: &[Path],
    verdict: Verdict,
) -> Verdict {
    STORM.store(false, Relaxed);
    without_interrupts(|| HELD.lock().rng = None);
    let held = || without_interrupts(|| HELD.lock().slots.iter_mut().find_map(Option::take));
    while let Some(block) = held() {
        block.verify(STEP)?;
        block.free(kmem)?;
    }
    let held = || without_interrupts(|| HELD.lock().objects.iter_mut().find_map(Option::take));
    while let Some(object) = held() {
        object.free(kmem)?;
    }
    verdict?;
    kmem.drop_slab();
    let objects = kmem.audit_objects();
    // The CPU's stacks are areas, each with a descriptor.
    let areas = kmem.audit_vmalloc().map_or(0, |areas| areas.live + areas.lazy + areas.pooled);
    let gone = objects.is_ok_and(|o| (o.live, o.cached) == (areas, 0));
    check!(gone, "objects left: {objects:?}");
    let total: u64 = HITS.iter().map(|h| h.load(Relaxed)).sum();
    println!(
        "{name}: {rounds} rounds, {total} interrupts, {} of their requests found no memory",
        EXHAUSTED.load(Relaxed)
    );
    for path in Path::ALL.into_iter().filter(|path| !ABSENT.contains(path)) {
        println!("{name}:   {:<12} {}", name_of(path), HITS[path as usize].load(Relaxed));
    }
    let broken = BROKEN.load(Relaxed);
    check!(broken == 0, "{broken} interrupts went wrong");
    for &path in paths.iter().filter(|path| !ABSENT.contains(path)) {
        check!(
            HITS[path as usize].load(Relaxed) > 0,
            "{name}: no interrupt landed in {}: not shown",
            name_of(path)
        );
    }
    Ok(())
}

fn name_of(path: Path) -> &'static str {
    match path {
        Path::Idle => "outside",
        Path::PcpAlloc => "pcp alloc",
        Path::PcpFree => "pcp free",
        Path::Refill => "refill",
        Path::Drain => "drain",
        Path::BuddyAlloc => "buddy alloc",
        Path::BuddyFree => "buddy free",
        Path::VmAlloc => "vm alloc",
        Path::VmFree => "vm free",
        Path::Kmap => "kmap",
        Path::KmapLocal => "kmap local",
        Path::PercpuAlloc => "percpu alloc",
        Path::PercpuFree => "percpu free",
        Path::Slow => "slow path",
        Path::Bulk => "bulk",
        Path::ObjAlloc => "obj alloc",
        Path::ObjFree => "obj free",
        Path::ObjRefill => "obj refill",
        Path::ObjFlush => "obj flush",
    }
}

/// Runs `f` while the DMA zone has no block of the largest order left, so that asking for one takes
/// the slow path.
fn hold_dma(bench: &mut Bench, f: impl FnOnce(&mut Bench) -> Verdict) -> Verdict {
    let mut chain = Chain::new(bench.rng.u64(..));
    while let Ok(block) = Block::alloc(bench.kmem, Gfp::DMA | QUIET, DEFAULT_MAX_ORDER, 0) {
        chain.push(block, STEP);
    }
    let verdict = f(bench);
    verdict.and(chain.free_all(bench.kmem, STEP))
}

/// One round of the main flow: every path of the allocator, in and out.
fn round(bench: &mut Bench) -> Verdict {
    let kmem = bench.kmem;
    // The CPU's own lists, in and out.
    let one = allocated(bench, Gfp::KERNEL, 0)?;
    one.free(kmem)?;
    // More than the lists hold: refill and drain.
    let mut chain = Chain::new(bench.rng.u64(..));
    for _ in 0..BURST {
        let block = allocated(bench, Gfp::KERNEL, 0)?;
        chain.push(block, STEP);
    }
    chain.free_all(kmem, STEP)?;
    // Straight from the buddy.
    let large = allocated(bench, Gfp::KERNEL, 6)?;
    large.fill(STEP);
    large.verify(STEP)?;
    large.free(kmem)?;
    // Several at once.
    let mut pages: [Option<&'static Page>; BULK] = [None; BULK];
    let filled = kmem.alloc_pages_bulk(Gfp::KERNEL, &mut pages);
    check!(filled == Ok(BULK), "{BULK} pages wanted, {filled:?} filled");
    let freed = kmem.free_pages_bulk(&mut pages);
    check!(freed.is_ok(), "freeing {BULK} pages: {freed:?}");
    // Objects: more than magazines hold.
    let mut objects = [None; OBJECTS];
    for object in &mut objects {
        match Object::alloc(kmem, Gfp::KERNEL, 64) {
            Ok(made) => *object = Some(made),
            Err(error) => fail!("an object of 64 bytes: {error}"),
        }
    }
    objects.into_iter().flatten().try_for_each(|object| object.free(kmem))?;
    own_cache(kmem)?;
    per_cpu(kmem)?;
    areas(kmem)?;
    // What cannot be had.
    match Block::alloc(kmem, Gfp::DMA | QUIET, DEFAULT_MAX_ORDER, 0) {
        Err(AllocError::NoMemory) => {}
        Err(error) => fail!("the largest order from DMA: {error}"),
        Ok(block) => block.free(kmem)?,
    }
    Ok(())
}

/// More objects than magazines hold, of a cache that interrupts do not touch: what they free and allocate of
/// the others may come just so that the main flow never finds a magazine full.
fn own_cache(kmem: &'static Kmem<BareMetal>) -> Verdict {
    let cache = match kmem.kmem_cache_create("storm", 64, 0, SlabFlags::NO_MERGE, None) {
        Ok(cache) => cache,
        Err(error) => fail!("a cache: {error}"),
    };
    let mut objects = [None; OWN_OBJECTS];
    for object in &mut objects {
        match kmem.kmem_cache_alloc(&cache, Gfp::KERNEL) {
            Ok(made) => *object = Some(made),
            Err(error) => fail!("an object of a cache: {error}"),
        }
    }
    for object in objects.into_iter().flatten() {
        // SAFETY: from the cache, just above, and not used after.
        let freed = unsafe { kmem.kmem_cache_free(&cache, object) };
        check!(freed.is_ok(), "an object of a cache: {freed:?}");
    }
    let gone = kmem.kmem_cache_destroy(cache);
    check!(gone.is_ok(), "destroying a cache: {:?}", gone.err());
    Ok(())
}

/// Places of the per-CPU space.
fn per_cpu(kmem: &'static Kmem<BareMetal>) -> Verdict {
    for _ in 0..PLACES {
        let at = match kmem.__alloc_percpu(8, 8) {
            Ok(at) => at,
            Err(error) => fail!("a per-CPU word: {error}"),
        };
        // SAFETY: just given to us, and not used after.
        let freed = unsafe { kmem.free_percpu(at) };
        check!(freed.is_ok(), "a per-CPU word: {freed:?}");
    }
    Ok(())
}

/// Areas of the vmalloc range.
fn areas(kmem: &'static Kmem<BareMetal>) -> Verdict {
    for _ in 0..AREAS {
        let at = match kmem.vmalloc(2 * 4096) {
            Ok(at) => at,
            Err(error) => fail!("an area: {error}"),
        };
        // SAFETY: just given to us, and not used after.
        let freed = unsafe { kmem.vfree(at.as_ptr()) };
        check!(freed.is_ok(), "an area: {freed:?}");
    }
    Ok(())
}

fn allocated(bench: &mut Bench, gfp: Gfp, order: u32) -> Result<Block, Failed> {
    match Block::alloc(bench.kmem, gfp, order, bench.rng.u64(..)) {
        Ok(block) => Ok(block),
        Err(error) => fail!("order {order}, {gfp:?}: {error}"),
    }
}
