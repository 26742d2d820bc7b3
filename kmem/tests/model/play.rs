//! Operations as data, and a machine that plays them beside the reference allocator.
//!
//! # Concepts
//! An operation is four bytes, so that a property test can shrink a list of them and a fuzzer can
//! mutate it. After each one the sums of frames must agree; what the request says it allows, and what
//! the watermarks leave, decides whether it had to succeed and whether it was allowed to.
//!
//! # Locking
//! One thread.

use crate::{
    reference::{FreeBlocks, Live, LiveBlocks},
    small::{Machine, NOBODY, Small, Work},
};
use kmem::{
    AllocError, Config, Gfp, MigrateType, Misuse, Page, Pfn, ZoneType,
    fault::FaultPlan,
    memblock::Memblock,
    types::{PAGEBLOCK_FRAMES, PAGEBLOCK_ORDER},
    zone::{Layout, Zone, ZoneLimit},
};

const MIB: u64 = 1 << 20;

/// A bank of memory: base, size, node.
type Bank = (u64, u64, u32);

/// A machine to play on.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    banks: &'static [Bank],
    reserved: &'static [(u64, u64)],
    zones: &'static [(ZoneType, u64)],
    /// First address without a direct mapping.
    high_from: u64,
    nodes: [u32; 2],
    max_order: u32,
}

/// The machines: small ones whose lists are off, with odd banks, holes, high memory and two nodes; and
/// larger ones whose lists are on.
pub const SHAPES: [Shape; 7] = [
    Shape {
        banks: &[(0, 8 * MIB, 0)],
        reserved: &[(0, 0x1000)],
        zones: &[(ZoneType::Normal, u64::MAX)],
        high_from: u64::MAX,
        nodes: [0, 0],
        max_order: 10,
    },
    Shape {
        banks: &[
            (0x1000, 0x9e000, 0),
            (0x10_0000, 11 * MIB + 0x7000, 0),
            (14 * MIB, 17 * MIB + 0x3000, 0),
        ],
        reserved: &[(0x20_0000, 0x1234), (5 * MIB + 0xfff, 2), (20 * MIB, MIB)],
        zones: &[
            (ZoneType::Dma, 2 * MIB),
            (ZoneType::Dma32, 14 * MIB),
            (ZoneType::Normal, u64::MAX),
        ],
        high_from: u64::MAX,
        nodes: [0, 0],
        max_order: 10,
    },
    Shape {
        banks: &[(0, 24 * MIB, 0)],
        reserved: &[],
        zones: &[
            (ZoneType::Dma, 4 * MIB),
            (ZoneType::Normal, 14 * MIB),
            (ZoneType::HighMem, u64::MAX),
        ],
        high_from: 14 * MIB,
        nodes: [0, 0],
        max_order: 10,
    },
    Shape {
        banks: &[(0, 10 * MIB, 0), (12 * MIB, 4 * MIB, 0), (64 * MIB, 12 * MIB, 1)],
        reserved: &[(66 * MIB, 0x8000)],
        zones: &[
            (ZoneType::Dma, 4 * MIB),
            (ZoneType::Normal, 72 * MIB),
            (ZoneType::Movable, u64::MAX),
        ],
        high_from: u64::MAX,
        nodes: [0, 1],
        max_order: 10,
    },
    Shape {
        banks: &[(0, 64 * MIB, 0)],
        reserved: &[],
        zones: &[(ZoneType::Normal, u64::MAX)],
        high_from: u64::MAX,
        nodes: [0, 0],
        max_order: 10,
    },
    Shape {
        banks: &[(0, 66 * MIB, 0), (70 * MIB, 450 * MIB, 0)],
        reserved: &[(100 * MIB, 0x2_1000)],
        zones: &[(ZoneType::Dma, 16 * MIB), (ZoneType::Dma32, u64::MAX)],
        high_from: u64::MAX,
        nodes: [0, 0],
        max_order: 10,
    },
    Shape {
        banks: &[(0, 20 * MIB, 0)],
        reserved: &[],
        zones: &[(ZoneType::Normal, u64::MAX)],
        high_from: u64::MAX,
        nodes: [0, 0],
        max_order: 9,
    },
];

const GFPS: [Gfp; 24] = [
    Gfp::KERNEL,
    Gfp::ATOMIC,
    Gfp::NOWAIT,
    Gfp::HIGHUSER_MOVABLE,
    Gfp::KERNEL.union(Gfp::RECLAIMABLE),
    Gfp::KERNEL.union(Gfp::MOVABLE),
    Gfp::NOIO,
    Gfp::NOFS,
    Gfp::USER,
    Gfp::HIGHUSER,
    Gfp::KERNEL.union(Gfp::DMA),
    Gfp::KERNEL.union(Gfp::DMA32),
    Gfp::KERNEL.union(Gfp::COMP),
    Gfp::KERNEL.union(Gfp::ZERO),
    Gfp::KERNEL.union(Gfp::COLD),
    Gfp::KERNEL.union(Gfp::NORETRY),
    Gfp::KERNEL.union(Gfp::RETRY_MAYFAIL),
    Gfp::NOWAIT.union(Gfp::MEMALLOC),
    Gfp::ATOMIC.union(Gfp::NOMEMALLOC),
    Gfp::KERNEL.union(Gfp::THISNODE),
    Gfp::KERNEL.union(Gfp::NOFAIL),
    Gfp::TRANSHUGE_LIGHT,
    Gfp::ATOMIC.union(Gfp::COMP).union(Gfp::RECLAIMABLE),
    Gfp::KERNEL.union(Gfp::HIGHMEM).union(Gfp::DMA),
];

/// One step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Alloc { gfp: Gfp, order: u32, context: u8 },
    Free { near: u16, context: u8 },
    FreeRaw { near: u16, order: u32 },
    Get { near: u16, tail: bool },
    Put { near: u16, tail: bool },
    Split { near: u16, to: u32 },
    AllocExact { gfp: Gfp, frames: u32 },
    FreeExact { nth: u8 },
    Bulk { gfp: Gfp, places: u8, context: u8 },
    FreeBulk { near: u16, count: u8 },
    At { near: u16, order: u32, gfp: Gfp },
    DrainHere,
    KeepHouse,
    DrainAll,
    SetMobility { near: u16, to: MigrateType },
    RunOn { cpu: usize },
    Interrupt { n: u32, work: Work },
    MinFree { kbytes: u64 },
    Fault { plan: FaultPlan },
}

impl Op {
    /// The step that four bytes mean; all-zero bytes are the plainest.
    pub fn decode([kind, a, b, c]: [u8; 4]) -> Op {
        let gfp = GFPS[usize::from(a) % GFPS.len()];
        let order = if c >= 0x80 { u32::from(c) % 12 } else { u32::from(c) % 4 };
        let near = u16::from_le_bytes([a, b]);
        let context = if b >= 0xc0 { b % 4 } else { 0 };
        match kind % 40 {
            0..=11 => Op::Alloc { gfp, order, context },
            12..=20 => Op::Free { near, context: if c >= 0xc0 { c % 4 } else { 0 } },
            21 => Op::FreeRaw { near, order },
            22 => Op::Get { near, tail: c & 1 == 1 },
            23 | 24 => Op::Put { near, tail: c & 1 == 1 },
            25 => Op::Split { near, to: order },
            26 => Op::AllocExact { gfp, frames: u32::from(b) * if c >= 0x80 { 5 } else { 1 } },
            27 => Op::FreeExact { nth: a },
            28 => Op::Bulk { gfp, places: c, context },
            29 => Op::FreeBulk { near, count: c },
            30 => Op::At { near, order, gfp: if c & 0x40 == 0 { Gfp::KERNEL } else { Gfp::COMP } },
            31 if a & 1 == 1 => Op::KeepHouse,
            31 => Op::DrainHere,
            32 => Op::DrainAll,
            33 => Op::SetMobility { near, to: MigrateType::ALL[usize::from(c) % 6] },
            34 | 35 => Op::RunOn { cpu: if a >= 0xe0 { NOBODY } else { usize::from(a % 2) } },
            36 | 37 => Op::Interrupt {
                n: u32::from(a) % 100 + 1,
                work: match b % 4 {
                    0 => Work::Alloc(u32::from(c) % 5),
                    1 => Work::Alloc(0),
                    2 => Work::Free,
                    _ => Work::Drain,
                },
            },
            38 => Op::MinFree { kbytes: u64::from(near) / 16 },
            _ => Op::Fault {
                plan: match a % 4 {
                    0 => FaultPlan::Nth(u64::from(b) % 8),
                    1 => FaultPlan::OneIn { n: u32::from(b) % 8, seed: u32::from(c) },
                    2 => FaultPlan::From(u64::from(b) % 8),
                    _ => FaultPlan::Off,
                },
            },
        }
    }
}

/// What was so before a step.
struct Before {
    free: Vec<u64>,
    faults: u64,
    interrupts: u64,
}

/// A machine, and what it should be like.
pub struct Game {
    machine: Machine,
    shape: Shape,
    zones: Vec<FreeBlocks>,
    /// Index of each pageblock's zone, from the machine's first pageblock on.
    zone_of: Vec<Option<usize>>,
    first: u32,
    managed: u64,
    live: LiveBlocks,
    exact: Vec<(u32, u32)>,
    cpu: usize,
    faulty: bool,
}

impl Game {
    /// Brings a machine of the shape up and checks that it has the memory that its banks say.
    pub fn new(shape: Shape) -> Game {
        let mut boot = Memblock::new();
        for (base, size, node) in shape.banks {
            boot.add(*base, *size, *node).unwrap();
        }
        for (base, size) in shape.reserved {
            boot.reserve(*base, *size).unwrap();
        }
        let limits: Vec<ZoneLimit> =
            shape.zones.iter().map(|(zone, end)| ZoneLimit { zone: *zone, end: *end }).collect();
        let config = Config {
            layout: Layout::new(&limits).unwrap(),
            max_order: shape.max_order,
            ..Config::default()
        };
        let high_from = u32::try_from(shape.high_from >> 12).unwrap_or(u32::MAX);
        let machine = Machine::new(Small::new(shape.nodes, high_from), boot, &config).unwrap();
        let mut game = Game {
            zones: machine
                .zones()
                .iter()
                .map(|z| FreeBlocks::new(z.spanned(), shape.max_order))
                .collect(),
            zone_of: Vec::new(),
            first: u32::MAX,
            managed: 0,
            live: LiveBlocks::default(),
            exact: Vec::new(),
            cpu: 0,
            faulty: false,
            machine,
            shape,
        };
        game.seed();
        game.audit();
        game
    }

    /// Every whole frame of the banks that no reservation touches is free.
    fn seed(&mut self) {
        let start = self.shape.banks.iter().map(|b| b.0 >> 12).min().unwrap() as u32;
        let end = self.shape.banks.iter().map(|b| (b.0 + b.1) >> 12).max().unwrap() as u32;
        self.first = start & !(PAGEBLOCK_FRAMES - 1);
        for pageblock in (self.first..end).step_by(PAGEBLOCK_FRAMES as usize) {
            let of_it = (pageblock..pageblock + PAGEBLOCK_FRAMES)
                .find_map(|f| self.machine.page_zone(Pfn(f)));
            self.zone_of.push(of_it.map(|zone| self.index_of(zone)));
        }
        for pfn in start..end {
            let (at, next) = (u64::from(pfn) << 12, (u64::from(pfn) + 1) << 12);
            let there = self.shape.banks.iter().any(|b| b.0 <= at && next <= b.0 + b.1);
            let taken = self.shape.reserved.iter().any(|r| r.0 < next && at < r.0 + r.1);
            if there && !taken {
                let zone = self.zone_at(pfn).expect("a frame of a bank is in a zone");
                self.zones[zone].give(pfn, 0);
                self.managed += 1;
            }
        }
        assert_eq!(self.machine.totalram_pages(), self.managed);
    }

    fn index_of(&self, zone: &Zone) -> usize {
        self.machine.zones().iter().position(|z| std::ptr::eq(z, zone)).unwrap()
    }

    fn zone_at(&self, pfn: u32) -> Option<usize> {
        let pageblock = pfn.checked_sub(self.first)? >> PAGEBLOCK_ORDER;
        self.zone_of.get(pageblock as usize).copied().flatten()
    }

    fn page(&self, pfn: u32) -> &Page {
        self.machine.pfn_to_page(Pfn(pfn)).unwrap()
    }

    fn pfn(&self, page: &Page) -> u32 {
        self.machine.page_to_pfn(page).unwrap().0
    }

    /// A frame of the machine for sixteen bits.
    fn frame(&self, near: u16) -> u32 {
        let frames = (self.zone_of.len() as u64) << PAGEBLOCK_ORDER;
        self.first + ((u64::from(near) * frames) >> 16) as u32
    }

    fn before(&self) -> Before {
        Before {
            free: self.machine.zones().iter().map(Zone::free_frames).collect(),
            faults: self.machine.faults_injected(),
            interrupts: self.machine.small().handler.lock().unwrap().runs,
        }
    }

    /// Takes note of a block that was handed out.
    fn got(&mut self, pfn: u32, live: Live) {
        assert!(Pfn(pfn).is_aligned(live.order), "pfn:{pfn:#x} is not aligned to {}", live.order);
        let last = pfn + ((1 << live.order) - 1);
        let zone = self.zone_at(pfn).expect("a block in no zone");
        assert_eq!(self.zone_at(last), Some(zone), "a block in two zones");
        assert!(self.zones[zone].take(pfn, live.order), "pfn:{pfn:#x} {live:?} was not free");
        self.live.add(pfn, live);
        let page = self.page(pfn);
        assert_eq!(page.page_count(), live.refs);
        assert_eq!(self.machine.compound_order(page), Some(live.order));
    }

    fn gave(&mut self, pfn: u32) {
        let live = self.live.remove(pfn).expect("a live block");
        let zone = self.zone_at(pfn).unwrap();
        self.zones[zone].give(pfn, live.order);
    }

    /// Takes note of what interrupt handlers freed.
    fn handlers_freed(&mut self) {
        let (freed, wrong) = {
            let mut h = self.machine.small().handler.lock().unwrap();
            (std::mem::take(&mut h.freed), h.wrong.take())
        };
        assert_eq!(wrong, None);
        freed.into_iter().for_each(|(pfn, _)| self.gave(pfn));
    }

    fn handlers_got(&mut self) {
        let got = std::mem::take(&mut self.machine.small().handler.lock().unwrap().got);
        for (pfn, order) in got {
            // A block that was freed in the same step is not live any more.
            if self.machine.small().handler.lock().unwrap().held.contains(&(pfn, order)) {
                self.got(pfn, Live { order, refs: 1, compound: false });
            }
        }
    }

    /// A live block that no interrupt handler holds.
    fn pick(&self, near: u16) -> Option<(u32, Live)> {
        let (pfn, live) = self.live.near(self.frame(near))?;
        let held =
            |pfn| self.machine.small().handler.lock().unwrap().held.iter().any(|h| h.0 == pfn);
        (!held(pfn)).then_some((pfn, live))
    }

    /// The zones a request may use, by index.
    fn candidates(&self, gfp: Gfp) -> Vec<usize> {
        let Ok(asked) = gfp.zone() else { return Vec::new() };
        let served = self.served(asked);
        let node = self.shape.nodes.get(self.cpu).copied().unwrap_or(0) as usize;
        let zones = self.machine.zones().iter().enumerate();
        let allowed = zones.filter(|(_, z)| {
            z.zone_type() <= served && (!gfp.contains(Gfp::THISNODE) || z.node() == node)
        });
        allowed.map(|(i, _)| i).collect()
    }

    /// The zone type that serves requests for `asked`: itself, else the next one up to Normal, else the
    /// next one down.
    fn served(&self, asked: ZoneType) -> ZoneType {
        let has = |zone: &ZoneType| self.shape.zones.iter().any(|z| z.0 == *zone);
        let up = ZoneType::ALL
            .into_iter()
            .filter(|z| *z >= asked && *z <= asked.max(ZoneType::Normal))
            .find(has);
        let down = ZoneType::ALL.into_iter().rev().filter(|z| *z <= asked).find(has);
        up.or(down).unwrap()
    }

    /// What a request must leave of a zone; `None` if it need leave nothing.
    fn floor(&self, gfp: Gfp, zone: &Zone) -> Option<i64> {
        if gfp.contains(Gfp::MEMALLOC) && !gfp.contains(Gfp::NOMEMALLOC) {
            return None;
        }
        let mut min = zone.watermarks().min as i64;
        if gfp.contains(Gfp::HIGH) {
            min -= min / 2;
            if !gfp.may_block() && !gfp.contains(Gfp::NOMEMALLOC) {
                min -= min / 4;
            }
        }
        Some(min + zone.lowmem_reserve(self.served(gfp.zone().unwrap())) as i64)
    }

    fn mobility(&self, pfn: u32) -> MigrateType {
        self.machine.pageblock_migratetype(Pfn(pfn)).unwrap()
    }

    /// Whether the request can be served from what is in the free lists, all per-CPU lists being empty.
    fn possible(&self, gfp: Gfp, order: u32) -> bool {
        self.candidates(gfp).into_iter().any(|i| {
            let zone = &self.machine.zones()[i];
            let reserved = self.zones[i].frames_in(|f| self.mobility(f) == MigrateType::HighAtomic);
            let free = zone.free_frames() as i64;
            let room = match self.floor(gfp, zone) {
                Some(floor) => free - floor - reserved as i64,
                None => free,
            };
            let (_, largest) = self.zones[i].maximal(|pfn| self.mobility(pfn));
            room - ((1 << order) - 1) > 0 && largest >= Some(order)
        })
    }

    /// Checks that an allocation succeeded where it may, and failed only where it must.
    fn judge(
        &self,
        gfp: Gfp,
        order: u32,
        got: Result<u32, AllocError>,
        before: &Before,
        context: u8,
    ) {
        let disturbed = self.machine.small().handler.lock().unwrap().runs != before.interrupts;
        let sleeps = gfp.may_block() && context != 0 && self.cpu != NOBODY;
        match got {
            Ok(pfn) => {
                assert!(gfp.check(order).is_ok() && order <= self.shape.max_order && !sleeps);
                let i = self.zone_at(pfn).unwrap();
                assert!(self.candidates(gfp).contains(&i), "{gfp} from a zone it may not use");
                let zone = &self.machine.zones()[i];
                if let Some(floor) = self.floor(gfp, zone)
                    && zone.free_frames() < before.free[i]
                    && !disturbed
                {
                    let free = zone.free_frames() as i64;
                    assert!(
                        free >= floor,
                        "{gfp} order {order} leaves {free} of {floor} in {}",
                        zone.name()
                    );
                }
            }
            Err(AllocError::NoMemory) => {
                if disturbed || self.faulty || self.machine.faults_injected() != before.faults {
                    return;
                }
                let on_lists = self.machine.on_lists();
                assert!(
                    !gfp.may_block() || on_lists == 0,
                    "gave up with {on_lists} frames on lists"
                );
                assert!(
                    on_lists > 0 || !self.possible(gfp, order),
                    "{gfp} order {order} failed in vain"
                );
                assert!(!gfp.contains(Gfp::NOFAIL));
            }
            Err(AllocError::Invalid(_)) => {
                assert!(gfp.check(order).is_err() || order > self.shape.max_order);
            }
            Err(AllocError::Context) => assert!(sleeps),
        }
    }

    /// Plays one step.
    pub fn play(&mut self, op: Op) {
        match op {
            Op::Alloc { gfp, order, context } => self.alloc(gfp, order, context),
            Op::Free { near, context } => self.free(near, context),
            Op::FreeRaw { near, order } => self.free_raw(near, order),
            Op::Get { near, tail } => self.get(near, tail),
            Op::Put { near, tail } => self.put(near, tail),
            Op::Split { near, to } => self.split(near, to),
            Op::AllocExact { gfp, frames } => self.alloc_exact(gfp, frames),
            Op::FreeExact { nth } => self.free_exact(nth),
            Op::Bulk { gfp, places, context } => self.bulk(gfp, places, context),
            Op::FreeBulk { near, count } => self.free_bulk(near, count),
            Op::At { near, order, gfp } => self.at(near, order, gfp),
            Op::DrainHere => {
                self.machine.drain_this_cpu();
            }
            Op::KeepHouse => {
                let runs = self.before().interrupts;
                self.machine.vmstat_update();
                self.machine.vmstat_update();
                let left = self.machine.vmstat_update();
                if self.before().interrupts == runs {
                    assert_eq!(left, 0, "all that rested went");
                }
            }
            Op::DrainAll => {
                let runs = self.before().interrupts;
                self.machine.drain_all_pages();
                if self.before().interrupts == runs {
                    assert_eq!(self.machine.on_lists(), 0);
                }
            }
            Op::SetMobility { near, to } => {
                let pfn = self.frame(near);
                let set = self.machine.set_pageblock_migratetype(Pfn(pfn), to);
                assert_eq!(set, self.zone_at(pfn).is_some());
                assert!(!set || self.mobility(pfn) == to || self.before().interrupts > 0);
            }
            Op::RunOn { cpu } => {
                self.cpu = cpu;
                self.machine.small().run_on(cpu);
            }
            Op::Interrupt { n, work } => self.machine.small().arm(n, work),
            Op::MinFree { kbytes } => self.machine.set_min_free_kbytes(kbytes),
            Op::Fault { plan } => {
                self.machine.set_fault_plan(plan);
                self.faulty = !matches!(plan, FaultPlan::Off);
            }
        }
        self.handlers_freed();
        self.handlers_got();
        self.check_sums();
    }

    fn alloc(&mut self, gfp: Gfp, order: u32, context: u8) {
        if gfp.contains(Gfp::NOFAIL) && order < 2 {
            // An interrupt could take what there is, and a plan could fail it for ever.
            self.machine.small().arm(0, Work::Free);
            if self.faulty || self.machine.on_lists() > 0 || !self.possible(gfp, order) {
                return;
            }
        }
        let before = self.before();
        let got = self.machine.in_context(context, || self.machine.alloc_pages(gfp, order));
        let got = got.map(|page| self.pfn(page));
        self.judge(gfp, order, got, &before, context);
        self.handlers_freed();
        if let Ok(pfn) = got {
            let compound = gfp.contains(Gfp::COMP) && order > 0;
            self.got(pfn, Live { order, refs: 1, compound });
        }
    }

    /// Drops a reference in the model; `true` if it was the last.
    fn drop_reference(&mut self, pfn: u32) -> bool {
        let live = self.live.at_mut(pfn).expect("a live block");
        live.refs -= 1;
        let last = live.refs == 0;
        if last {
            self.gave(pfn);
        }
        last
    }

    fn free(&mut self, near: u16, context: u8) {
        let Some((pfn, live)) = self.pick(near) else { return };
        self.drop_reference(pfn);
        let page = self.page(pfn);
        let freed =
            self.machine.in_context(context, || self.machine.__free_pages(page, live.order));
        assert_eq!(freed, Ok(()));
    }

    fn free_raw(&mut self, near: u16, order: u32) {
        let pfn = self.frame(near);
        let Some(page) = self.machine.pfn_to_page(Pfn(pfn)) else { return };
        if self.live.at(pfn).is_some_and(|live| live.order == order) {
            return;
        }
        let freed = self.machine.__free_pages(page, order);
        let expected = match self.live.at(pfn) {
            _ if order > self.shape.max_order => matches!(freed, Err(Misuse::BadOrder { .. })),
            Some(_) => matches!(freed, Err(Misuse::WrongOrder { .. })),
            None => freed.is_err(),
        };
        assert!(expected, "pfn:{pfn:#x} order {order}: {freed:?}");
    }

    /// The frame to name a block by: its first, or one further on.
    fn part_of(pfn: u32, live: Live, tail: bool) -> u32 {
        if tail { pfn + (1 << live.order) - 1 } else { pfn }
    }

    fn get(&mut self, near: u16, tail: bool) {
        let Some((pfn, live)) = self.pick(near) else { return };
        let part = Self::part_of(pfn, live, tail);
        let taken = self.machine.get_page(self.page(part));
        assert_eq!(taken.is_ok(), part == pfn || live.compound);
        if taken.is_ok() {
            self.live.at_mut(pfn).unwrap().refs += 1;
        }
        assert_eq!(self.page(pfn).page_count(), self.live.at(pfn).unwrap().refs);
    }

    fn put(&mut self, near: u16, tail: bool) {
        let Some((pfn, live)) = self.pick(near) else { return };
        let part = Self::part_of(pfn, live, tail);
        if part == pfn || live.compound {
            self.drop_reference(pfn);
            assert_eq!(self.machine.put_page(self.page(part)), Ok(()));
        } else {
            let put = self.machine.put_page(self.page(part));
            assert!(matches!(put, Err(Misuse::TailPage { .. })), "{put:?}");
        }
    }

    fn split(&mut self, near: u16, to: u32) {
        let Some((pfn, live)) = self.pick(near) else { return };
        let split = self.machine.split_page_to(self.page(pfn), live.order, to);
        assert_eq!(
            split.is_ok(),
            to <= live.order && !live.compound && live.refs == 1,
            "{split:?}"
        );
        if split.is_ok() {
            self.live.remove(pfn);
            for n in 0..1 << (live.order - to) {
                self.live.add(pfn + (n << to), Live { order: to, refs: 1, compound: false });
            }
        }
    }

    fn alloc_exact(&mut self, gfp: Gfp, frames: u32) {
        if gfp.contains(Gfp::NOFAIL) {
            return;
        }
        let got = self.machine.alloc_pages_exact((frames as usize) << 12, gfp);
        self.handlers_freed();
        let Ok(address) = got else {
            let right = matches!(got, Err(AllocError::NoMemory | AllocError::Invalid(_)));
            assert!(right, "{got:?}");
            return;
        };
        assert!(frames > 0 && !gfp.contains(Gfp::HIGHMEM));
        let pfn = self.pfn(self.machine.virt_to_page(address.as_ptr()).unwrap());
        for n in 0..frames {
            self.got(pfn + n, Live { order: 0, refs: 1, compound: false });
        }
        self.exact.push((pfn, frames));
    }

    fn free_exact(&mut self, nth: u8) {
        if self.exact.is_empty() {
            return;
        }
        let (pfn, frames) = self.exact.swap_remove(usize::from(nth) % self.exact.len());
        let single = Live { order: 0, refs: 1, compound: false };
        let held =
            |pfn| self.machine.small().handler.lock().unwrap().held.iter().any(|h| h.0 == pfn);
        if (pfn..pfn + frames).any(|f| self.live.at(f) != Some(single) || held(f)) {
            // Parts of it were freed or shared by other steps.
            return;
        }
        (pfn..pfn + frames).for_each(|f| self.gave(f));
        let address = self.machine.page_address(self.page(pfn)).unwrap();
        let freed = self.machine.free_pages_exact(address.as_ptr(), (frames as usize) << 12);
        assert_eq!(freed, Ok(()));
    }

    fn bulk(&mut self, gfp: Gfp, places: u8, context: u8) {
        if gfp.contains(Gfp::NOFAIL) {
            return;
        }
        let before = self.before();
        let mut pages: Vec<Option<&Page>> = vec![None; usize::from(places)];
        // Some places are filled already, by a block of which nothing may change.
        let mine = self.pick(u16::from(places) << 8).map(|(pfn, _)| pfn);
        for place in pages.iter_mut().skip(1).step_by(3) {
            *place = mine.map(|pfn| self.page(pfn));
        }
        let zeroed = self.machine.small().zeroed();
        let got =
            self.machine.in_context(context, || self.machine.alloc_pages_bulk(gfp, &mut pages));
        let new: Vec<u32> =
            pages.iter().flatten().map(|p| self.pfn(p)).filter(|p| Some(*p) != mine).collect();
        let zeroed = self.machine.small().zeroed() - zeroed;
        let wanted = if gfp.contains(Gfp::ZERO) { new.len() as u64 } else { 0 };
        assert_eq!(zeroed, wanted, "only what is new is zeroed");
        let failed = match got {
            Ok(n) => {
                assert!(pages[..n].iter().all(Option::is_some));
                assert!(pages.get(n).is_none_or(Option::is_none));
                (n < pages.len()).then_some(AllocError::NoMemory)
            }
            Err(e) => {
                assert!(new.is_empty());
                Some(e)
            }
        };
        self.handlers_freed();
        for pfn in new {
            self.got(pfn, Live { order: 0, refs: 1, compound: false });
        }
        if let Some(e) = failed {
            self.judge(gfp, 0, Err(e), &before, context);
        }
    }

    fn free_bulk(&mut self, near: u16, count: u8) {
        let mut blocks: Vec<u32> = Vec::new();
        let singles = self.live.iter().filter(|(_, live)| live.order == 0).map(|(pfn, _)| pfn);
        let from = self.frame(near);
        let held: Vec<u32> = {
            let handler = self.machine.small().handler.lock().unwrap();
            handler.held.iter().map(|h| h.0).collect()
        };
        blocks.extend(singles.filter(|pfn| *pfn >= from && !held.contains(pfn)).take(count.into()));
        for pfn in &blocks {
            self.drop_reference(*pfn);
        }
        let mut pages: Vec<Option<&Page>> =
            blocks.iter().map(|pfn| Some(self.page(*pfn))).collect();
        assert_eq!(self.machine.free_pages_bulk(&mut pages), Ok(()));
        assert!(pages.iter().all(Option::is_none));
    }

    fn at(&mut self, near: u16, order: u32, gfp: Gfp) {
        let pfn = self.frame(near) & !((1 << order) - 1);
        let before = self.before();
        let got = self.machine.alloc_pages_at(Pfn(pfn), order, gfp).map(|page| self.pfn(page));
        self.handlers_freed();
        if let Ok(at) = got {
            assert_eq!(at, pfn);
            let compound = gfp.contains(Gfp::COMP) && order > 0;
            self.got(pfn, Live { order, refs: 1, compound });
            return;
        }
        let zone = self.zone_at(pfn);
        let undisturbed = self.before().interrupts == before.interrupts
            && self.before().faults == before.faults
            && self.machine.on_lists() == 0;
        let whole = order <= PAGEBLOCK_ORDER
            || (pfn..pfn + (1 << order)).step_by(PAGEBLOCK_FRAMES as usize).all(|f| {
                self.zone_at(f) == zone
                    && zone.is_some()
                    && self.mobility(f) < MigrateType::HighAtomic
            });
        if order <= self.shape.max_order && undisturbed && whole {
            let free = zone.is_some_and(|zone| self.zones[zone].has(pfn, order));
            assert!(!free, "pfn:{pfn:#x} order {order} is free and cannot be had");
        }
    }

    /// What is cheap to check: in every zone, the frames in the free lists and on per-CPU lists are those
    /// that are not live.
    fn check_sums(&self) {
        for (zone, model) in self.machine.zones().iter().zip(&self.zones) {
            let free = zone.free_frames() + self.machine.pcp_frames(zone).sum::<u64>();
            assert_eq!(free, model.frames(), "free frames of {}", zone.name());
        }
    }

    /// Checks everything: every frame, and, with the per-CPU lists drained, every free block.
    pub fn audit(&mut self) {
        self.machine.small().arm(0, Work::Free);
        for (pfn, live) in self.live.iter() {
            assert_eq!(
                self.machine.compound_order(self.page(pfn)),
                Some(live.order),
                "pfn:{pfn:#x}"
            );
        }
        let audit = self.machine.audit().unwrap();
        assert_eq!(audit.managed, self.managed);
        assert_eq!(audit.allocated, self.live.frames());
        self.machine.drain_everything();
        assert_eq!(self.machine.on_lists(), 0);
        self.check_sums();
        for (zone, model) in self.machine.zones().iter().zip(&self.zones) {
            let (counts, _) = model.maximal(|pfn| self.mobility(pfn));
            assert_eq!(self.machine.nr_free(zone), counts, "free blocks of {}", zone.name());
        }
        assert!(self.live.iter().all(|(pfn, _)| self.zones.iter().any(|z| z.spans(pfn))));
        self.machine.audit().unwrap();
        self.machine.small().run_on(self.cpu);
    }

    /// Frees everything and checks that every frame is back.
    pub fn finish(mut self) {
        // An interrupt of this would be nobody's to reckon with.
        self.machine.small().arm(0, Work::Free);
        self.machine.set_fault_plan(FaultPlan::Off);
        self.audit();
        self.machine.small().handler.lock().unwrap().held.clear();
        let blocks: Vec<(u32, Live)> = self.live.iter().collect();
        for (pfn, live) in blocks {
            for _ in 0..live.refs {
                self.drop_reference(pfn);
                assert_eq!(self.machine.put_page(self.page(pfn)), Ok(()));
            }
        }
        self.audit();
        assert_eq!(self.machine.nr_free_pages(), self.managed);
    }
}
