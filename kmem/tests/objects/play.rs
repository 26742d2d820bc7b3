//! The slab layer beside a reference: steps over a few caches and all kmalloc sizes on small
//! machines, on two CPUs and on none, with interrupts in the middle of them.
//!
//! # Concepts
//! A step is four bytes, so that a failing list of them shrinks. The reference knows what is live: where, how
//! many bytes, and the stamp that they are filled with. Whatever is allocated must be apart from all that, aligned
//! and as large as asked for; whatever is freed must hold its stamp; whatever is not live must be refused.
//! Interrupt handlers keep objects of their own, with stamps.

use super::stage::{Machine, NOBODY, be};
use kmem::{
    AllocError, Config, Gfp, Misuse, Pfn,
    fault::FaultPlan,
    slab::{Ctor, KmemCache, SlabFlags, ZERO_SIZE_PTR},
    zone::Zone,
};
use std::{
    collections::BTreeMap,
    ptr::NonNull,
    sync::{Arc, Mutex},
};

const SIZES: [usize; 20] = [
    1, 8, 9, 16, 33, 64, 65, 96, 100, 192, 193, 256, 500, 1000, 2000, 4096, 5000, 8192, 8193,
    20_000,
];

/// What a constructor leaves at the beginning of its objects.
const MADE: u64 = 0xc0de_c0de_5eed_5eed;

fn construct(at: *mut u8) {
    // SAFETY: the constructor is given an object of the cache, at least eight bytes.
    unsafe { at.cast::<u64>().write_unaligned(MADE) };
}

type Kind = (usize, usize, SlabFlags, Option<Ctor>);

/// Caches: some alike enough to be merged, some with state bytes outside, with colours, with a constructor,
/// some that look for mistakes.
const KINDS: [Kind; 16] = [
    (64, 0, SlabFlags::NO_MERGE, None),
    (64, 0, SlabFlags::empty(), None),
    (60, 8, SlabFlags::empty(), None),
    (200, 0, SlabFlags::empty(), Some(construct)),
    (600, 64, SlabFlags::NO_MERGE, None),
    (1024, 1024, SlabFlags::empty(), None),
    (1000, 0, SlabFlags::HWCACHE_ALIGN, None),
    (3000, 0, SlabFlags::empty(), None),
    (8192, 0, SlabFlags::empty(), Some(construct)),
    (8, 0, SlabFlags::NO_MERGE, None),
    (24, 0, SlabFlags::RECLAIM_ACCOUNT, None),
    (5000, 4096, SlabFlags::NO_MERGE, None),
    (72, 0, SlabFlags::DEBUG, None),
    (200, 0, SlabFlags::POISON, Some(construct)),
    (600, 64, SlabFlags::RED_ZONE, None),
    (64, 0, SlabFlags::CONSISTENCY_CHECKS, None),
];

/// Where an object is from: the name of its cache, or kmalloc.
type From = Option<String>;

struct Object {
    bytes: usize,
    stamp: u8,
    from: From,
    /// Whether it has a constructor's mark.
    made: bool,
}

/// What an interrupt handler holds.
#[derive(Default)]
struct Hand {
    job: u8,
    held: Vec<(usize, usize, u8)>,
    runs: u32,
}

fn pointer(at: usize) -> *mut u8 {
    std::ptr::with_exposed_provenance_mut(at)
}

fn fill(at: usize, bytes: usize, stamp: u8) {
    // SAFETY: a live object of that size.
    unsafe { pointer(at).write_bytes(stamp, bytes) };
}

fn holds(at: usize, bytes: usize, stamp: u8) -> bool {
    // SAFETY: a live object of that size.
    unsafe { std::slice::from_raw_parts(pointer(at), bytes) }.iter().all(|b| *b == stamp)
}

/// The interrupt: takes an object, gives one back, or another CPU asks for magazines meanwhile.
fn serve<const S: u32>(m: &kmem::Kmem<super::stage::Stage<S>>, cpu: usize, hand: &Mutex<Hand>) {
    let mut hand = hand.lock().unwrap();
    hand.runs += 1;
    let job = hand.job;
    match job % 4 {
        0 | 1 => {
            let size = SIZES[usize::from(job / 4) % 12];
            if let Ok(at) = m.kmalloc(size, Gfp::ATOMIC | Gfp::NOWARN) {
                fill(at.as_ptr().expose_provenance(), size, job);
                hand.held.push((at.addr().get(), size, job));
            }
        }
        2 => {
            if let Some((at, size, stamp)) = hand.held.pop() {
                assert!(holds(at, size, stamp), "an interrupt's object was written to");
                // SAFETY: not used after; the second time it is found out.
                unsafe {
                    m.kfree(pointer(at)).unwrap();
                    assert!(m.kfree(pointer(at)).is_err());
                }
            }
        }
        _ => {
            be(1 - cpu);
            m.drop_slab();
            be(cpu);
        }
    }
}

/// Whether a zone may refuse a slab: what is below its watermarks, and in blocks too small for a large one,
/// comes to less than that. Most requests get nothing of what is set aside for atomic ones.
fn is_full(zone: &Zone) -> bool {
    is_nearly_full(zone, 0)
}

/// The same before so many frames were given back.
fn is_nearly_full(zone: &Zone, given_back: u64) -> bool {
    zone.free_frames() < zone.highatomic_frames() + zone.managed_frames() / 8 + given_back
}

struct Game<const S: u32> {
    m: Machine<S>,
    caches: Vec<Option<(KmemCache, usize)>>,
    live: BTreeMap<usize, Object>,
    /// Addresses that were live once.
    dead: Vec<usize>,
    hand: Arc<Mutex<Hand>>,
    squeezed: Vec<Pfn>,
    nodes: usize,
    /// Whether each node has memory.
    all: bool,
    cpu: usize,
    away: bool,
    made: u32,
    /// Frees of what was not live.
    refused: u64,
}

impl<const S: u32> Game<S> {
    fn new(blocks: &[u64], config: Config) -> Self {
        let m = Machine::new(blocks, config);
        let hand = Arc::new(Mutex::new(Hand::default()));
        let hands = Arc::clone(&hand);
        m.stage().set_alone();
        m.stage().set_handler(move |m, cpu| serve(m, cpu, &hands));
        Game {
            m,
            caches: (0..4).map(|_| None).collect(),
            live: BTreeMap::new(),
            dead: Vec::new(),
            hand,
            squeezed: Vec::new(),
            nodes: blocks.len(),
            all: blocks.iter().all(|blocks| *blocks > 0),
            cpu: 0,
            away: false,
            made: 0,
            refused: 0,
        }
    }

    fn cache(&self, which: u8) -> Option<(&KmemCache, usize)> {
        let at = usize::from(which) % self.caches.len();
        self.caches[at].as_ref().map(|(cache, kind)| (cache, *kind))
    }

    /// A live object's address.
    fn pick(&self, which: u8) -> Option<usize> {
        let n = usize::from(which) % self.live.len().max(1);
        self.live.keys().nth(n).copied()
    }

    /// A request failed: that is right where memory is short.
    fn failed(&self, e: AllocError) {
        self.failed_after(e, 0);
    }

    /// The same of one that gave back what it had of so many frames.
    fn failed_after(&self, e: AllocError, frames: u64) {
        assert_eq!(e, AllocError::NoMemory);
        let full = self.m.zones().iter().all(|zone| is_nearly_full(zone, frames));
        let free = self.m.nr_free_pages();
        assert!(!self.squeezed.is_empty() || full, "out of memory with {free} free");
    }

    /// Takes an object in.
    fn got(&mut self, at: NonNull<u8>, bytes: usize, align: usize, from: From, mark: Option<bool>) {
        let at = at.as_ptr().expose_provenance();
        assert!(at.is_multiple_of(align), "{at:#x} for alignment {align}");
        let before = self.live.range(..at + bytes).next_back();
        assert!(before.is_none_or(|(start, o)| start + o.bytes <= at), "given out twice");
        assert_eq!(self.m.ksize(pointer(at)).map(|n| n >= bytes), Some(true));
        let made = mark.is_some();
        if mark == Some(true) {
            // SAFETY: a live object of a cache with a constructor.
            assert_eq!(unsafe { pointer(at).cast::<u64>().read_unaligned() }, MADE);
        }
        self.made += 1;
        let stamp = self.made as u8;
        fill(at, bytes, stamp);
        self.live.insert(at, Object { bytes, stamp, from, made });
    }

    /// Looks at an object a last time.
    fn give(&mut self, at: usize) -> Object {
        let object = self.live.remove(&at).unwrap();
        assert!(
            holds(at, object.bytes, object.stamp),
            "{at:#x} of {:?} was written to",
            object.from
        );
        if object.made {
            construct(pointer(at));
        }
        self.dead.push(at);
        object
    }

    /// Where plain requests are served from while there is memory.
    fn check_node(&self, at: NonNull<u8>, node: usize) {
        // An interrupt may give slabs back just when they are there.
        let drops = self.hand.lock().unwrap().job % 4 == 3;
        let short = !self.squeezed.is_empty() || !self.all || drops;
        let full = || self.m.zones().iter().filter(|zone| zone.node() == node).all(is_full);
        assert!(short || self.m.node_of(at) == node || full(), "from another node than {node}");
    }

    fn here(&self) -> usize {
        if self.cpu == 1 { self.nodes - 1 } else { 0 }
    }

    fn gfp(&self, how: u8) -> Gfp {
        let gfp = if how & 1 == 0 { Gfp::KERNEL } else { Gfp::ATOMIC };
        gfp | Gfp::NOWARN
    }

    fn alloc(&mut self, which: u8, how: u8) {
        let Some((cache, kind)) = self.cache(which) else { return };
        let (size, align, _, ctor) = KINDS[kind];
        let zero = how & 2 != 0;
        let gfp = self.gfp(how);
        let node = match how >> 2 & 3 {
            n @ (0 | 1) if usize::from(n) < self.nodes => i32::from(n),
            _ => -1,
        };
        let got = match (node, zero) {
            (-1, false) => self.m.kmem_cache_alloc(cache, gfp),
            (-1, true) => self.m.kmem_cache_zalloc(cache, gfp),
            (_, zero) => {
                let gfp = if zero { gfp | Gfp::ZERO } else { gfp };
                self.m.kmem_cache_alloc_node(cache, gfp, node)
            }
        };
        let from = Some(cache.name().to_string());
        match got {
            Err(e) => self.failed(e),
            Ok(at) => {
                assert!(!zero || holds(at.as_ptr().expose_provenance(), size, 0));
                self.check_node(at, usize::try_from(node).unwrap_or(self.here()));
                self.got(at, size, align.max(8), from, ctor.map(|_| !zero));
            }
        }
    }

    fn bulk(&mut self, which: u8, n: u8) {
        let Some((cache, kind)) = self.cache(which) else { return };
        let (size, align, _, ctor) = KINDS[kind];
        let mut objects = vec![NonNull::dangling(); usize::from(n) % 90];
        let from = Some(cache.name().to_string());
        match self.m.kmem_cache_alloc_bulk(cache, self.gfp(n), &mut objects) {
            Err(e) => {
                let frames = (cache.size() * objects.len()) as u64 >> S;
                // And slabs that had places left.
                self.failed_after(e, frames + 16);
            }
            Ok(()) => {
                for at in objects {
                    self.got(at, size, align.max(8), from.clone(), ctor.map(|_| true));
                }
            }
        }
    }

    fn kmalloc(&mut self, which: u8, how: u8) {
        let size = SIZES[usize::from(which) % SIZES.len()];
        let node = if how & 4 != 0 { i32::from(how >> 3) % self.nodes as i32 } else { -1 };
        let gfp = self.gfp(how);
        let got = match (node, how & 2 != 0) {
            (-1, false) => self.m.kmalloc(size, gfp),
            (-1, true) => self.m.kzalloc(size, gfp),
            (_, zero) => {
                let gfp = if zero { gfp | Gfp::ZERO } else { gfp };
                self.m.kmalloc_node(size, gfp, node)
            }
        };
        match got {
            Err(e) => self.failed(e),
            Ok(at) => {
                assert!(how & 2 == 0 || holds(at.as_ptr().expose_provenance(), size, 0));
                self.check_node(at, usize::try_from(node).unwrap_or(self.here()));
                let align = if size.is_power_of_two() { size.min(1 << S) } else { 8 };
                self.got(at, size, align.max(8), None, None);
            }
        }
    }

    fn free(&mut self, which: u8, to: u8) {
        let Some(at) = self.pick(which) else { return };
        let from = self.live[&at].from.clone();
        let place = NonNull::new(pointer(at)).unwrap();
        let result = match self.cache(to).filter(|_| to & 1 == 0) {
            None => {
                self.give(at);
                // SAFETY: not used after.
                unsafe { self.m.kfree(pointer(at)) }
            }
            Some((cache, _)) => {
                let name = cache.name().to_string();
                if from.as_ref() != Some(&name) {
                    // SAFETY: it is found out.
                    let refused = unsafe { self.m.kmem_cache_free(cache, place) };
                    let large = from.is_none() && self.m.ksize(pointer(at)).unwrap() > 8192;
                    let right = match refused {
                        Err(Misuse::WrongCache { addr, given, .. }) => {
                            !large && addr == at && given.as_str() == name
                        }
                        Err(Misuse::NotAnObject { addr }) => large && addr == at,
                        _ => false,
                    };
                    assert!(right, "{from:?} freed to {name}: {refused:?}");
                    return;
                }
                self.give(at);
                let (cache, _) = self.cache(to).unwrap();
                // SAFETY: not used after.
                unsafe { self.m.kmem_cache_free(cache, place) }
            }
        };
        assert_eq!(result, Ok(()));
    }

    /// Frees what is not live: what was once, and what is inside or behind of what is.
    fn misuse(&mut self, which: u8, how: u8) {
        let dead = self.dead.get(usize::from(which) % self.dead.len().max(1)).copied();
        let inner = self.pick(which).map(|at| {
            let bytes = self.live[&at].bytes;
            match how >> 2 & 3 {
                0 => at + 1,
                1 => at + bytes - usize::from(bytes > 1),
                2 => at + (usize::from(how) * 8) % bytes.max(9),
                // The end of its frame, where state bytes are.
                _ => at | ((1 << S) - 1),
            }
        });
        let Some(at) = (if how & 1 == 0 { dead } else { inner }) else { return };
        let mut hands = self.hand.lock().unwrap();
        let theirs = hands.held.iter().any(|(held, ..)| *held == at);
        hands.job |= 1;
        drop(hands);
        // An interrupt may be given what is to be freed here in vain.
        self.m.stage().arm(0);
        if theirs || self.live.contains_key(&at) || pointer(at) == ZERO_SIZE_PTR.as_ptr() {
            return;
        }
        self.refused += 1;
        assert_eq!(self.m.ksize(pointer(at)), None, "{at:#x}");
        // SAFETY: it is found out.
        let refused = unsafe { self.m.kfree(pointer(at)) };
        assert!(
            matches!(
                refused,
                Err(Misuse::ObjectFree { addr, .. }
                    | Misuse::InsideObject { addr, .. }
                    | Misuse::NotAnObject { addr }) if addr == at
            ),
            "{at:#x}: {refused:?}"
        );
    }

    fn krealloc(&mut self, which: u8, size: u8) {
        let Some(at) = self.pick(which) else { return };
        let size = SIZES[usize::from(size) % SIZES.len()];
        let (bytes, stamp) = (self.live[&at].bytes, self.live[&at].stamp);
        let usable = self.m.ksize(pointer(at)).unwrap();
        if self.live[&at].made {
            return;
        }
        // SAFETY: not used after if it succeeds.
        match unsafe { self.m.krealloc(pointer(at), size, Gfp::KERNEL | Gfp::NOWARN) } {
            Err(e) => self.failed(e),
            Ok(to) => {
                assert!(holds(to.as_ptr().expose_provenance(), bytes.min(size), stamp));
                let object = self.live.remove(&at).unwrap();
                if to.addr().get() != at {
                    assert!(size > usable, "moved for nothing");
                    self.dead.push(at);
                    self.got(to, size, 8, None, None);
                } else {
                    assert!(size <= usable);
                    self.got(to, size, 8, object.from, None);
                }
            }
        }
    }

    fn create(&mut self, which: u8, kind: u8) {
        let slot = usize::from(which) % self.caches.len();
        if self.caches[slot].is_some() {
            return;
        }
        let kind = usize::from(kind) % KINDS.len();
        let (size, align, flags, ctor) = KINDS[kind];
        self.made += 1;
        let name = format!("c{}", self.made);
        match self.m.kmem_cache_create(&name, size, align, flags, ctor) {
            Ok(cache) => {
                let merged = cache.name().as_str() != name;
                let same = |(other, k): &&(KmemCache, usize)| {
                    let same = other.name() == cache.name();
                    let (_, _, theirs, made) = KINDS[*k];
                    let marks = (flags | theirs).contains(SlabFlags::NO_MERGE)
                        || (flags | theirs).intersects(SlabFlags::DEBUG)
                        || (flags ^ theirs).contains(SlabFlags::RECLAIM_ACCOUNT)
                        || ctor.is_some()
                        || made.is_some();
                    assert!(!(same && marks), "{k} merged with {kind}");
                    same
                };
                assert!(cache.size() >= size && cache.align().is_multiple_of(align.max(1)));
                let users = self.caches.iter().flatten().filter(same).count();
                assert_eq!(merged, users > 0);
                self.caches[slot] = Some((cache, kind));
            }
            Err(e) => {
                assert!(!self.squeezed.is_empty(), "{e}");
            }
        }
    }

    fn destroy(&mut self, which: u8) {
        let slot = usize::from(which) % self.caches.len();
        let Some((cache, kind)) = self.caches[slot].take() else { return };
        let name = cache.name().to_string();
        let users = self.caches.iter().flatten().filter(|(c, _)| c.name().as_str() == name).count();
        let live = self.live.values().filter(|o| o.from.as_ref() == Some(&name)).count();
        match self.m.kmem_cache_destroy(cache) {
            Ok(()) => assert!(live == 0 || users > 0, "{live} live objects"),
            Err(refused) => {
                assert!(live > 0 && users == 0, "refused with {live} live, {users} users");
                assert_eq!(refused.live, live as u64);
                self.caches[slot] = Some((refused.cache, kind));
            }
        }
    }

    fn squeeze(&mut self) {
        if self.squeezed.is_empty() {
            let gfp = Gfp::KERNEL | Gfp::NOWARN;
            // All but a few frames; whole blocks first, for speed.
            for order in (0..10).rev() {
                while let Ok(page) = self.m.alloc_pages(gfp | Gfp::NORETRY, order) {
                    let pfn = self.m.page_to_pfn(page).unwrap();
                    self.m.split_page(page, order).unwrap();
                    self.squeezed.extend((0..1 << order).map(|i| Pfn(pfn.0 + i)));
                }
            }
        } else {
            self.m.set_fault_plan(FaultPlan::Off);
            for pfn in self.squeezed.drain(..) {
                self.m.__free_page(self.m.pfn_to_page(pfn).unwrap()).unwrap();
            }
        }
    }

    fn play(&mut self, [op, a, b, c]: [u8; 4]) {
        match op % 32 {
            0..=6 => self.alloc(a, b),
            7..=10 => self.kmalloc(a, b),
            11 | 12 => self.bulk(a, b),
            13..=17 => self.free(a, b),
            18 => (0..usize::from(b)).for_each(|_| self.free(a, 1)),
            19..=21 => self.misuse(a, b),
            22 | 23 => self.krealloc(a, b),
            24 => self.create(a, b),
            25 => self.destroy(a),
            26 => match a % 4 {
                0 => drop(self.m.drop_slab()),
                1 => self.m.drain_all_pages(),
                _ => {
                    if let Some((cache, _)) = self.cache(b) {
                        self.m.kmem_cache_shrink(cache);
                    }
                }
            },
            27 => {
                self.cpu = match a % 5 {
                    0 if b % 4 == 0 => NOBODY,
                    1 | 2 if !self.away => 1,
                    _ => 0,
                };
                be(self.cpu);
            }
            28 if a % 4 == 0 && self.cpu != 1 => {
                if self.away {
                    self.m.cpu_online(1);
                } else {
                    self.m.cpu_offline(1);
                }
                self.away = !self.away;
            }
            29 if a % 8 == 0 => self.squeeze(),
            30 if !self.squeezed.is_empty() => {
                // What fails otherwise fails here as well.
                self.m.set_fault_plan(FaultPlan::Nth(a.into()));
            }
            _ => {
                self.hand.lock().unwrap().job = a;
                self.m.stage().arm(u32::from(b) % 16 * u32::from(c % 4) + 1);
            }
        }
    }

    fn audit(&self) {
        self.m.stage().arm(0);
        let audit = self.m.audit_objects().unwrap();
        let hand = self.hand.lock().unwrap();
        let ours = self.live.values().filter(|o| o.from.is_some() || o.bytes <= 8192);
        let most = ours.count() + hand.held.len();
        // What krealloc left in a large block in place is small now, and no object.
        let shrunk = self.live.iter().filter(|(at, o)| {
            o.from.is_none() && o.bytes <= 8192 && self.m.ksize(pointer(**at)).unwrap() > 8192
        });
        assert_eq!(audit.live, (most - shrunk.count()) as u64);
        assert_eq!(audit.quarantined, 0);
        self.m.audit().unwrap();
    }

    /// Frees all, and says how many objects were given out and freed, and what was freed in vain.
    fn finish(mut self) -> u64 {
        self.m.stage().arm(0);
        self.m.set_fault_plan(FaultPlan::Off);
        self.audit();
        if !self.squeezed.is_empty() {
            self.squeeze();
        }
        while let Some(at) = self.pick(0) {
            self.give(at);
            // SAFETY: not used after.
            unsafe { self.m.kfree(pointer(at)).unwrap() };
        }
        for (at, bytes, stamp) in std::mem::take(&mut self.hand.lock().unwrap().held) {
            assert!(holds(at, bytes, stamp), "an interrupt's object was written to");
            // SAFETY: not used after.
            unsafe { self.m.kfree(pointer(at)).unwrap() };
        }
        if self.cpu == NOBODY {
            be(0);
        }
        for (cache, _) in self.caches.iter_mut().filter_map(Option::take) {
            self.m.kmem_cache_destroy(cache).unwrap();
        }
        u64::from(self.made) + self.dead.len() as u64 + self.refused
    }
}

pub fn play<const S: u32>(blocks: &[u64], steps: &[[u8; 4]]) -> u64 {
    play_with::<S>(blocks, Config::default(), steps)
}

/// The number of operations.
pub fn play_with<const S: u32>(blocks: &[u64], config: Config, steps: &[[u8; 4]]) -> u64 {
    let mut game = Game::<S>::new(blocks, config);
    (0..4).for_each(|slot| game.create(slot, steps[0][usize::from(slot)]));
    for (n, step) in steps.iter().enumerate() {
        game.play(*step);
        if n % 40 == 39 {
            game.audit();
        }
    }
    game.finish()
}
