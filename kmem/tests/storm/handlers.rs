//! What interrupts do in the storm: they allocate and free pages and objects, keep them from one interrupt to the next,
//! and hand blocks over to the task they interrupted and back.
//!
//! Handlers run in signal handlers: everything here is atomics, and nothing panics.

use kmem::{Gfp, Kmem, Pfn};
use kmem_hosted::{Hosted, Machine};
use std::{
    ptr::NonNull,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed, Ordering::SeqCst},
    },
};

/// A place for a block; 0 is empty.
#[derive(Default)]
pub struct Place(AtomicU64);

impl Place {
    /// Exchanges what is in the place for a block, or nothing.
    pub fn swap(&self, block: Option<(u32, u32)>) -> Option<(u32, u32)> {
        let word =
            block.map_or(0, |(pfn, order)| 1 << 63 | u64::from(order) << 32 | u64::from(pfn));
        let was = self.0.swap(word, SeqCst);
        (was != 0).then_some((was as u32, (was >> 32) as u32 & 0xff))
    }
}

/// A pseudo-random sequence that several may draw from.
pub struct Random(AtomicU64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(AtomicU64::new(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1))
    }

    pub fn next(&self) -> u64 {
        let mut x = self.0.load(Relaxed);
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        self.0.store(x, Relaxed);
        x
    }

    pub fn below(&self, n: u64) -> u64 {
        (self.next() >> 20) % n
    }
}

/// One CPU's places.
struct Places {
    held: [Place; 24],
    /// From handlers to tasks, and the other way.
    up: [Place; 4],
    down: [Place; 4],
    /// Addresses of objects.
    objects: [AtomicUsize; 24],
    random: Random,
}

/// What an object holds while it is in use: nobody else writes there.
fn stamp(at: *mut u8) -> usize {
    at.addr() ^ 0x5a5a_5a5a
}

/// An object of up to 8 KiB, stamped.
pub fn object(kmem: &Kmem<Hosted>, gfp: Gfp, random: u64) -> Option<NonNull<u8>> {
    let size = 8 << ((random >> 40) % 8);
    let at = kmem.kmalloc(size + (random >> 50) as usize % size, gfp | Gfp::NOWARN).ok()?;
    // SAFETY: at least eight bytes, just given to us.
    unsafe { at.cast::<usize>().write(stamp(at.as_ptr())) };
    Some(at)
}

/// Frees such an object; says whether it was as it should be.
pub fn free_object(kmem: &Kmem<Hosted>, at: NonNull<u8>) -> bool {
    // SAFETY: from `object`, and not used after.
    unsafe { at.cast::<usize>().read() == stamp(at.as_ptr()) && kmem.kfree(at.as_ptr()).is_ok() }
}

/// The handlers' state.
pub struct Handlers {
    cpus: [Places; 2],
    up: AtomicU64,
    down: AtomicU64,
    wrong: AtomicU64,
    /// Orders that handlers ask for go up to this; the task on a CPU changes it.
    pub max_order: AtomicU64,
}

impl Handlers {
    /// Sets the machine's timer and softirq handlers.
    pub fn install(machine: &Arc<Machine>) -> Arc<Handlers> {
        let places = |seed| Places {
            held: Default::default(),
            up: Default::default(),
            down: Default::default(),
            objects: Default::default(),
            random: Random::new(seed),
        };
        let handlers = Arc::new(Handlers {
            cpus: [places(7), places(11)],
            up: AtomicU64::new(0),
            down: AtomicU64::new(0),
            wrong: AtomicU64::new(0),
            max_order: AtomicU64::new(3),
        });
        let (state, to): (_, Weak<Machine>) = (Arc::clone(&handlers), Arc::downgrade(machine));
        assert!(machine.hosted().set_timer_handler(Arc::new(move |_atomic, cpu| {
            // The test keeps the machine until no handler runs, so this is never the last handle.
            if let Some(machine) = to.upgrade() {
                let random = state.act(&machine, cpu);
                if random.is_multiple_of(16) {
                    machine.hosted().raise_softirq(1);
                }
            }
        })));
        let (state, to) = (Arc::clone(&handlers), Arc::downgrade(machine));
        assert!(machine.hosted().set_softirq_handler(Arc::new(move |_atomic, cpu, _raised| {
            if let Some(machine) = to.upgrade() {
                for _ in 0..40 {
                    state.act(&machine, cpu);
                }
            }
        })));
        handlers
    }

    /// One handler's work.
    fn act(&self, kmem: &Kmem<Hosted>, cpu: usize) -> u64 {
        let places = &self.cpus[cpu];
        let random = places.random.next();
        let at = (random >> 8) as usize % places.held.len();
        let alloc = || {
            let order = ((random >> 16) % (self.max_order.load(Relaxed) + 1)) as u32;
            let gfp = if random >> 32 & 3 == 0 { Gfp::ATOMIC | Gfp::COMP } else { Gfp::ATOMIC };
            let page = kmem.alloc_pages(gfp | Gfp::NOWARN, order).ok()?;
            Some((kmem.page_to_pfn(page)?.0, order))
        };
        let out = match random >> 24 & 7 {
            0..=2 => places.held[at].swap(alloc()),
            3..=5 => places.held[at].swap(None),
            6 => {
                let block = places.held[at].swap(None);
                self.up.fetch_add(u64::from(block.is_some()), Relaxed);
                places.up[at % places.up.len()].swap(block)
            }
            _ => {
                let block = places.down[at % places.down.len()].swap(None);
                self.down.fetch_add(u64::from(block.is_some()), Relaxed);
                block
            }
        };
        self.free(kmem, out);
        // Two objects in, on average, for one out and the other way round.
        for random in [random, random.rotate_left(13), random.rotate_left(29)] {
            let new = if random >> 9 & 1 == 0 { object(kmem, Gfp::ATOMIC, random) } else { None };
            let place = &places.objects[(random >> 3) as usize % places.objects.len()];
            self.free_held(
                kmem,
                place.swap(new.map_or(0, |at| at.as_ptr().expose_provenance()), SeqCst),
            );
        }
        random
    }

    fn free_held(&self, kmem: &Kmem<Hosted>, at: usize) {
        if let Some(at) = NonNull::new(std::ptr::with_exposed_provenance_mut(at)) {
            self.wrong.fetch_add(u64::from(!free_object(kmem, at)), Relaxed);
        }
    }

    /// Frees a block, if there is one.
    pub fn free(&self, kmem: &Kmem<Hosted>, block: Option<(u32, u32)>) {
        let Some((pfn, order)) = block else { return };
        let freed = match kmem.pfn_to_page(Pfn(pfn)) {
            Some(page) => kmem.__free_pages(page, order).is_ok(),
            None => false,
        };
        self.wrong.fetch_add(u64::from(!freed), Relaxed);
    }

    /// For the task on a CPU: takes what handlers left for it, and leaves them a block.
    pub fn exchange(
        &self,
        cpu: usize,
        at: usize,
        block: Option<(u32, u32)>,
    ) -> [Option<(u32, u32)>; 2] {
        let places = &self.cpus[cpu];
        [
            places.up[at % places.up.len()].swap(None),
            places.down[at % places.down.len()].swap(block),
        ]
    }

    /// Frees everything the handlers hold, once no handler runs.
    pub fn release(&self, kmem: &Kmem<Hosted>) {
        for places in &self.cpus {
            for place in places.held.iter().chain(&places.up).chain(&places.down) {
                self.free(kmem, place.swap(None));
            }
            for place in &places.objects {
                self.free_held(kmem, place.swap(0, SeqCst));
            }
        }
    }

    /// Blocks that could not be freed.
    pub fn wrong(&self) -> u64 {
        self.wrong.load(SeqCst)
    }

    /// Blocks that handlers gave to tasks, and that they took from them.
    pub fn handed_over(&self) -> (u64, u64) {
        (self.up.load(SeqCst), self.down.load(SeqCst))
    }
}
