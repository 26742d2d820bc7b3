//! What the tasks do in the storm: every call there is, with memory plenty and with memory short in turn.

use crate::handlers::{Handlers, Random, free_object, object};
use kmem::{Gfp, Kmem, MigrateType, Page, Pfn, context::Task};
use kmem_hosted::{Hosted, Machine};
use std::{
    ptr::NonNull,
    sync::atomic::Ordering::Relaxed,
    time::{Duration, Instant},
};

/// How long memory is plenty, or short.
const PHASE: Duration = Duration::from_millis(250);

const GFPS: [Gfp; 12] = [
    Gfp::KERNEL,
    Gfp::HIGHUSER_MOVABLE,
    Gfp::KERNEL.union(Gfp::RECLAIMABLE),
    Gfp::ATOMIC,
    Gfp::NOWAIT,
    Gfp::KERNEL.union(Gfp::COLD),
    Gfp::KERNEL.union(Gfp::COMP),
    Gfp::KERNEL.union(Gfp::DMA),
    Gfp::USER,
    Gfp::NOFS,
    Gfp::ATOMIC.union(Gfp::NOMEMALLOC),
    Gfp::KERNEL.union(Gfp::DMA32),
];

struct Worker<'a> {
    kmem: &'a Kmem<Hosted>,
    handlers: &'a Handlers,
    cpu: usize,
    random: Random,
    live: Vec<(&'a Page, u32)>,
    ballast: Vec<(&'a Page, u32)>,
    exact: Vec<(NonNull<u8>, usize)>,
    objects: Vec<NonNull<u8>>,
}

/// Works on a CPU until `end`, then frees everything.
pub fn run(machine: &Machine, handlers: &Handlers, cpu: usize, end: Instant) {
    let task = Task::new();
    let mut worker = Worker {
        kmem: machine,
        handlers,
        cpu,
        random: Random::new(cpu as u64 + 1),
        live: Vec::new(),
        ballast: Vec::new(),
        exact: Vec::new(),
        objects: Vec::new(),
    };
    machine
        .run_on(Some(cpu), Some(&task), |_process| {
            let mut phase = 0u32;
            while Instant::now() < end {
                phase += 1;
                let short = phase.is_multiple_of(2);
                handlers.max_order.store(if short { 4 } else { 3 }, Relaxed);
                if short {
                    worker.take_ballast();
                }
                let stop = end.min(Instant::now() + PHASE);
                while Instant::now() < stop {
                    (0..64).for_each(|_| worker.step(short));
                }
                worker.drop_ballast();
            }
            worker.finish();
        })
        .unwrap();
}

impl<'a> Worker<'a> {
    fn alloc(&mut self, gfp: Gfp, order: u32) -> bool {
        let got = self.kmem.alloc_pages(gfp | Gfp::NOWARN | Gfp::NORETRY, order);
        self.live.extend(got.ok().map(|page| (page, order)));
        got.is_ok()
    }

    fn free_one(&mut self) {
        if !self.live.is_empty() {
            let (page, order) =
                self.live.swap_remove(self.random.below(self.live.len() as u64) as usize);
            self.kmem.__free_pages(page, order).unwrap();
        }
    }

    /// Takes memory until ordinary requests fail.
    fn take_ballast(&mut self) {
        for order in [9, 5, 2, 0] {
            let gfp = [Gfp::HIGHUSER_MOVABLE, Gfp::NOWAIT][self.random.below(2) as usize];
            while let Ok(page) = self.kmem.alloc_pages(gfp | Gfp::NOWARN | Gfp::NORETRY, order) {
                self.ballast.push((page, order));
            }
        }
        // Holes all over.
        for _ in 0..200.min(self.ballast.len()) {
            let at = self.random.below(self.ballast.len() as u64) as usize;
            let (page, order) = self.ballast.swap_remove(at);
            self.kmem.__free_pages(page, order).unwrap();
        }
    }

    fn drop_ballast(&mut self) {
        for (page, order) in self.ballast.drain(..) {
            self.kmem.__free_pages(page, order).unwrap();
        }
    }

    fn objects(&mut self, gfp: Gfp) {
        for _ in 0..32 {
            let random = self.random.next();
            if random >> 11 & 1 == 0 && self.objects.len() < 2000 {
                let gfp = (gfp & !(Gfp::HIGHMEM | Gfp::MOVABLE | Gfp::DMA32)) | Gfp::NORETRY;
                self.objects.extend(object(self.kmem, gfp, random));
            } else if !self.objects.is_empty() {
                let at = self.random.below(self.objects.len() as u64) as usize;
                assert!(free_object(self.kmem, self.objects.swap_remove(at)));
            }
        }
    }

    fn step(&mut self, short: bool) {
        if self.random.below(4) == 0 {
            let gfp = GFPS[self.random.below(GFPS.len() as u64) as usize];
            return self.objects(gfp);
        }
        let n = self.random.below(1000);
        let gfp = GFPS[self.random.below(GFPS.len() as u64) as usize];
        let full = self.live.len() > if short { 4000 } else { 400 };
        match n {
            0..=399 if !full => {
                let order =
                    self.random.below(11).min(self.random.below(11)).min(self.random.below(11));
                self.alloc(gfp, order as u32);
            }
            0..=799 => self.free_one(),
            800..=849 => self.bulk(gfp),
            850..=869 => self.exact(gfp),
            870..=889 => self.split(),
            890..=909 => self.references(),
            910..=979 => self.exchange(),
            980..=984 => {
                self.kmem.drain_this_cpu();
            }
            985..=989 => {
                self.kmem.vmstat_update();
            }
            990..=991 => self.kmem.drain_all_pages(),
            992..=993 => self.mobility(),
            994..=995 => self.at(),
            996..=997 => self.areas(),
            998 => self.per_cpu(),
            _ => {
                // A swing wide enough for the lists to run over and run empty.
                let order = self.random.below(4) as u32;
                let before = self.live.len();
                (0..300).for_each(|_| {
                    self.alloc(gfp, order);
                });
                for (page, order) in self.live.split_off(before) {
                    self.kmem.__free_pages(page, order).unwrap();
                }
            }
        }
    }

    fn bulk(&mut self, gfp: Gfp) {
        let mut pages = [None; 64];
        let n = 1 + self.random.below(64) as usize;
        let gfp = gfp | Gfp::NOWARN | Gfp::NORETRY;
        self.kmem.alloc_pages_bulk(gfp, &mut pages[..n]).unwrap();
        self.kmem.free_pages_bulk(&mut pages[..n]).unwrap();
        assert!(pages.iter().all(Option::is_none));
    }

    /// Areas of the vmalloc range, as far as there is memory.
    fn areas(&mut self) {
        let size = (1 + self.random.below(8) as usize) << 12;
        let gfp = Gfp::KERNEL | Gfp::NOWARN | Gfp::NORETRY;
        let areas: Vec<_> = (0..8).map_while(|_| self.kmem.__vmalloc(size, gfp).ok()).collect();
        for area in areas {
            // SAFETY: just given to us, and not used after.
            unsafe { self.kmem.vfree(area.as_ptr()).unwrap() };
        }
    }

    /// Places of the per-CPU space, as far as there is memory.
    fn per_cpu(&mut self) {
        let size = 8 << self.random.below(8);
        let gfp = Gfp::KERNEL | Gfp::NOWARN | Gfp::NORETRY;
        let places = (0..64).map_while(|_| self.kmem.__alloc_percpu_gfp(size, 8, gfp).ok());
        for at in places.collect::<Vec<_>>() {
            // SAFETY: just given to us, and not used after.
            unsafe { self.kmem.free_percpu(at).unwrap() };
        }
    }

    fn exact(&mut self, gfp: Gfp) {
        if self.exact.len() > 30 {
            let (address, size) = self.exact.swap_remove(self.random.below(30) as usize);
            self.kmem.free_pages_exact(address.as_ptr(), size).unwrap();
        }
        let size = 1 + self.random.below(100_000) as usize;
        let gfp = (gfp - Gfp::HIGHMEM) | Gfp::NOWARN | Gfp::NORETRY;
        let got = self.kmem.alloc_pages_exact(size, gfp);
        self.exact.extend(got.ok().map(|address| (address, size)));
    }

    fn split(&mut self) {
        let Ok(page) = self.kmem.alloc_pages(Gfp::NOWAIT, 3) else { return };
        self.kmem.split_page_to(page, 3, 1).unwrap();
        let pfn = self.kmem.page_to_pfn(page).unwrap().0;
        let part = |n: u32| self.kmem.pfn_to_page(Pfn(pfn + 2 * n)).unwrap();
        self.live.extend((0..4).map(|n| (part(n), 1)));
    }

    fn references(&mut self) {
        if let Some((page, order)) = self.live.last().copied() {
            self.kmem.get_page(page).unwrap();
            self.kmem.__free_pages(page, order).unwrap();
            assert_eq!(page.page_count(), 1);
            if self.random.below(2) == 0 {
                self.live.pop();
                self.kmem.put_page(page).unwrap();
            }
        }
    }

    /// Gives a block to the handlers, and takes what they left.
    fn exchange(&mut self) {
        let block =
            self.live.pop().map(|(page, order)| (self.kmem.page_to_pfn(page).unwrap().0, order));
        let at = self.random.below(4) as usize;
        for (pfn, order) in self.handlers.exchange(self.cpu, at, block).into_iter().flatten() {
            self.live.push((self.kmem.pfn_to_page(Pfn(pfn)).unwrap(), order));
        }
    }

    fn any_frame(&self) -> Pfn {
        let zone = &self.kmem.zones()[self.random.below(self.kmem.zones().len() as u64) as usize];
        Pfn(zone.start_pfn() + self.random.below(zone.spanned().len().into()) as u32)
    }

    fn mobility(&mut self) {
        let to = MigrateType::ALL[self.random.below(3) as usize];
        assert!(self.kmem.set_pageblock_migratetype(self.any_frame(), to));
    }

    fn at(&mut self) {
        let order = self.random.below(11) as u32;
        let pfn = self.any_frame().align_down(order);
        let got = self.kmem.alloc_pages_at(pfn, order, Gfp::KERNEL);
        self.live.extend(got.ok().map(|page| (page, order)));
    }

    fn finish(&mut self) {
        for at in self.objects.drain(..) {
            assert!(free_object(self.kmem, at));
        }
        for (page, order) in self.live.drain(..) {
            self.kmem.__free_pages(page, order).unwrap();
        }
        for (address, size) in self.exact.drain(..) {
            self.kmem.free_pages_exact(address.as_ptr(), size).unwrap();
        }
    }
}
