//! Bring-up: from the boot allocator's ranges to zones with free lists \[B1, F4, F5, Z1\].
//!
//! # Concepts
//! Once, on one CPU: name the populated zones, take memory for the tables, hand every free frame over,
//! compute reserves and watermarks.
//!
//! # Implementation
//! The tables start as zero-filled memory, and zero means "nothing known", so the work is proportional to
//! pageblocks (one word each) and regions (one word each), not to frames: a terabyte of 4 KiB frames
//! takes half a million stores, in four megabytes.
//!
//! # Locking
//! None: nobody else knows the allocator yet.

use super::{
    CpuData, PageAllocator,
    fast::Preferred,
    owner::Owners,
    pcp::{self, Limits, Line, List, Pcp, ROW, Rows},
    slow::Reclaim,
};
use crate::{
    buddy::{AreaLists, MAX_REGION_SHIFT, Region},
    context::{Cpu, Gated, IdleWord},
    fault::Fault,
    gfp::Gfp,
    kfence::{KfenceConfig, KfenceError},
    memblock::{Memblock, MemblockError},
    memmap::{self, MemMap, STATE_SHIFT},
    page::Page,
    pageblock::{FreeBits, Links, Pageblock, PbFlags},
    platform::Platform,
    sites::Sites,
    sync::IrqLock,
    types::{
        DEFAULT_MAX_ORDER, LAST_PKMAP, MAX_CPUS, MAX_MAX_ORDER, MAX_NODES, MAX_NR_ZONES,
        MigrateType, PAGEBLOCK_FRAMES, PAGEBLOCK_ORDER, Pfn, PfnRange, ZoneType,
    },
    vmstat::VmCounters,
    zone::{
        self, Layout, LayoutError, MAX_AREAS, Zone,
        zonelist::{NO_SLOT, Zonelists},
    },
};
use core::{
    fmt,
    mem::MaybeUninit,
    ops::Range,
    ptr::{self, NonNull},
    sync::atomic::{AtomicBool, AtomicPtr, AtomicU8, AtomicU16, AtomicU32, AtomicU64},
};
use crossbeam_utils::CachePadded;

/// Settings of a machine.
#[derive(Clone, Debug)]
pub struct Config {
    /// Division into zones.
    pub layout: Layout,
    /// Largest order of a request: 9 to 15 \[P1\].
    pub max_order: u32,
    /// `min_free_kbytes`; computed from the size of low memory if `None` \[Z4\].
    pub min_free_kbytes: Option<u64>,
    /// `watermark_scale_factor`, in ten-thousandths of a zone.
    pub watermark_scale_factor: u64,
    /// `lowmem_reserve_ratio` by zone type; 0 for no reserve \[Z3\].
    pub lowmem_reserve_ratio: [u32; MAX_NR_ZONES],
    /// Distance between two nodes; 10 is local.
    pub distance: fn(usize, usize) -> u32,
    /// Areas (locks) that a zone is divided into at most; `None` for one for each CPU, of 16 pageblocks at least.
    /// Their number is a power of two, and 32 at most; each has room for a block of the largest order.
    pub areas: Option<usize>,
    /// Flags that requests may use at first (`gfp_allowed_mask`) \[G1\].
    pub gfp_allowed_mask: Gfp,
    /// Which caches look for mistakes (`slab_debug`), such as `"PZU,dentry*;FZ,kmalloc-*"`: blocks divided by
    /// semicolons, each of letters and names of caches. Letters are F (consistency checks), Z (red zones),
    /// P (poison) and U (users); none are all, `-` is nothing. A name may end in `*`. The first block that
    /// names a cache decides, else the last one without names. `None` for no cache \[S9, D2\].
    pub slab_debug: Option<&'static str>,
    /// Whether everything is zeroed when it is given out (`init_on_alloc`) \[D2\].
    pub init_on_alloc: bool,
    /// Whether everything is zeroed when it is freed (`init_on_free`) \[D2\].
    pub init_on_free: bool,
    /// Whether there is room to note who holds each page, 48 bytes a frame, and they are noted from the start
    /// (`page_owner`) \[D2\]. [`set_page_owner`](PageAllocator::set_page_owner) switches it off and on again.
    pub page_owner: bool,
    /// What the order is drawn from in which the objects of a slab are given out; `None` for ascending
    /// addresses (`CONFIG_SLAB_FREELIST_RANDOM`) \[D2\].
    pub slab_random: Option<u64>,
    /// The pool of pages for sampled objects; `None` for none \[D2\]. The platform must be able to
    /// [take frames out of the direct map](Platform::set_direct_map).
    pub kfence: Option<KfenceConfig>,
    /// Places for `kmap` at most (`LAST_PKMAP`), at least 1; the platform may have fewer \[H1\].
    pub last_pkmap: usize,
    /// Whether what `kunmap` lets go is taken away at once, so that whoever uses it still faults, and not when its place
    /// is wanted (`CONFIG_DEBUG_HIGHMEM`) \[H1\].
    pub debug_highmem: bool,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            layout: Layout::x86_64(),
            max_order: DEFAULT_MAX_ORDER,
            min_free_kbytes: None,
            watermark_scale_factor: 10,
            lowmem_reserve_ratio: [256, 256, 32, 0, 0, 0],
            distance: |a, b| if a == b { 10 } else { 20 },
            areas: None,
            gfp_allowed_mask: Gfp::all(),
            slab_debug: None,
            init_on_alloc: false,
            init_on_free: false,
            page_owner: false,
            slab_random: None,
            kfence: None,
            last_pkmap: LAST_PKMAP,
            debug_highmem: cfg!(debug_assertions),
        }
    }
}

/// Why a machine could not be brought up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BringUpError {
    /// The layout makes no sense for this frame size.
    Layout(LayoutError),
    /// `max_order` is not in 9..=15.
    MaxOrder(u32),
    /// The boot allocator knows no memory in any zone.
    NoMemory,
    /// A frame number above 32 bits; the physical byte address.
    TooHigh(u64),
    /// Two nodes meet inside a pageblock; the frame.
    NodesShareAPageblock(u32),
    /// More zones are populated than the tables can name.
    TooManyZones,
    /// No CPU, or more than the machine may have.
    Cpus(usize),
    /// A CPU that the platform does not have, or that another allocator uses.
    CpuInUse(usize),
    /// The platform has no memory for the tables; the bytes asked for.
    NoMetadata(usize),
    /// The boot allocator refused.
    Boot(MemblockError),
    /// `PAGE_SHIFT` is not that of a supported frame size.
    PageShift(u32),
    /// `slab_debug` cannot be read: from which byte on, and why.
    SlabDebug(usize, &'static str),
    /// Static per-CPU variables of so many bytes do not fit, or there are too many CPUs for so small blocks.
    PerCpu(usize),
    /// There is no pool for sampled objects, and why.
    Kfence(KfenceError),
    /// The platform's range for `kmap` is so many bytes long, which is too short for its CPUs.
    Kmap(usize),
}

impl fmt::Display for BringUpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BringUpError::Layout(e) => write!(f, "zone layout: {e}"),
            BringUpError::MaxOrder(n) => write!(f, "max_order {n} is not in 9..=15"),
            BringUpError::NoMemory => f.write_str("no memory in any zone"),
            BringUpError::TooHigh(a) => write!(f, "memory at {a:#x} is beyond 2^32 frames"),
            BringUpError::NodesShareAPageblock(p) => {
                write!(f, "two nodes share the pageblock of pfn:{p:#x}")
            }
            BringUpError::TooManyZones => f.write_str("too many populated zones"),
            BringUpError::Cpus(n) => write!(f, "{n} CPUs (at least 1, at most {MAX_CPUS})"),
            BringUpError::CpuInUse(n) => write!(f, "CPU {n} is missing or another allocator's"),
            BringUpError::NoMetadata(n) => write!(f, "no memory for a table of {n} bytes"),
            BringUpError::Boot(e) => write!(f, "boot allocator: {e}"),
            BringUpError::SlabDebug(at, why) => write!(f, "slab_debug at byte {at}: {why}"),
            BringUpError::PerCpu(n) => write!(f, "no room for {n} bytes of per-CPU variables"),
            BringUpError::Kfence(e) => write!(f, "KFENCE: {e}"),
            BringUpError::Kmap(n) => write!(f, "{n} bytes of addresses for kmap are too few"),
            BringUpError::PageShift(n) => write!(f, "frames of 2^{n} bytes are not supported"),
        }
    }
}

impl core::error::Error for BringUpError {}

impl From<MemblockError> for BringUpError {
    fn from(e: MemblockError) -> Self {
        BringUpError::Boot(e)
    }
}

/// Slots that pageblock flags can name.
const MAX_SLOTS: usize = NO_SLOT as usize;
const _: () = assert!(MAX_SLOTS <= PbFlags::MAX_SLOTS);

/// A populated zone, before it is one.
#[derive(Clone, Copy)]
struct Plan {
    node: u32,
    zone: ZoneType,
    spanned: PfnRange,
    present: u64,
}

/// How many areas a zone of so many frames has, and the pageblocks of a region of it as a power of two.
fn dealt_out(frames: u32, cpus: usize, config: &Config) -> (usize, u32) {
    /// Pageblocks worth an area, and the regions that each has at least where they can be so small.
    const WORTH: u32 = 16;
    const EACH: u32 = 4;
    /// The smallest region: as many pageblocks as have their descriptors in one cache line, which is then one area's if the
    /// map begins with a multiple of that, as memory mostly does.
    const LINE: u32 = (64 / size_of::<Pageblock>()).ilog2();
    let blocks = frames >> PAGEBLOCK_ORDER;
    let areas = config.areas.unwrap_or((blocks / WORTH) as usize);
    let areas = areas.clamp(1, MAX_AREAS);
    // A power of two, if that is one for each CPU or less than there may be.
    let areas = (1 << areas.ilog2()).min(cpus.max(1).next_power_of_two());
    let enough = |shift: &u32| areas == 1 || blocks >> shift >= EACH * areas as u32;
    let smallest = (config.max_order - PAGEBLOCK_ORDER).max(LINE);
    let shift = (smallest..=MAX_REGION_SHIFT).rev().find(enough).unwrap_or(smallest);
    // None without a region.
    (areas.min(1 << (blocks >> shift).max(1).ilog2()), shift)
}

/// The frames of a machine as its memory regions say, split at zone boundaries.
fn pieces<'a, P: Platform>(
    boot: &'a Memblock,
    layout: &'a Layout,
) -> impl Iterator<Item = (u32, ZoneType, Range<u64>)> + 'a {
    let frame = 1u64 << P::PAGE_SHIFT;
    boot.memory().flat_map(move |m| {
        let (start, end) = (m.base.div_ceil(frame), m.end() / frame);
        layout.ranges().filter_map(move |(zone, zs, ze)| {
            let s = start.max(zs / frame);
            let e = end.min(if ze == u64::MAX { u64::MAX } else { ze / frame });
            (s < e).then_some((m.node, zone, s..e))
        })
    })
}

/// Zero-filled tables from the platform.
struct Tables<'a, P: Platform> {
    p: &'a P,
    boot: &'a mut Memblock,
}

impl<P: Platform> Tables<'_, P> {
    fn raw<T>(&mut self, n: usize) -> Result<NonNull<T>, BringUpError> {
        const { assert!(align_of::<T>() <= 4096) };
        let bytes = n.saturating_mul(size_of::<T>()).max(1);
        let at = self.p.metadata(self.boot, bytes).ok_or(BringUpError::NoMetadata(bytes))?;
        Ok(at.cast())
    }

    /// `n` values of a type for which all-zero bytes are a value.
    ///
    /// # Safety
    /// All-zero bytes are a valid `T`.
    unsafe fn zeroed<T>(&mut self, n: usize) -> Result<&'static [T], BringUpError> {
        let at = self.raw::<T>(n)?;
        // SAFETY: `Platform::metadata` returns zero-filled memory of the size, frame-aligned, used
        // for nothing else and kept as long as the platform, which the allocator owns and does not
        // outlive; zero is a valid T by this function's contract.
        Ok(unsafe { core::slice::from_raw_parts(at.as_ptr(), n) })
    }

    fn uninit<T>(&mut self, n: usize) -> Result<&'static mut [MaybeUninit<T>], BringUpError> {
        let at = self.raw::<MaybeUninit<T>>(n)?;
        // SAFETY: as in `zeroed`; MaybeUninit is valid whatever the bytes, and nobody else has the
        // memory.
        Ok(unsafe { core::slice::from_raw_parts_mut(at.as_ptr(), n) })
    }

    /// `n` values made by `make`.
    fn made<T>(
        &mut self,
        n: usize,
        mut make: impl FnMut(usize) -> T,
    ) -> Result<&'static [T], BringUpError> {
        let slots = self.uninit::<T>(n)?;
        for (i, s) in slots.iter_mut().enumerate() {
            s.write(make(i));
        }
        // SAFETY: every element was written above.
        Ok(unsafe { core::slice::from_raw_parts(slots.as_ptr().cast(), n) })
    }

    /// A table with one `T` per `per` frames of the span, of which only what covers the populated
    /// pageblocks is backed.
    fn sparse<T>(
        &mut self,
        layout: &Layout,
        span: PfnRange,
        per: u32,
    ) -> Result<NonNull<T>, BringUpError> {
        self.sparse_array(layout, span, per, 1)
    }

    /// As `sparse`, with `each` of `T`.
    fn sparse_array<T>(
        &mut self,
        layout: &Layout,
        span: PfnRange,
        per: u32,
        each: usize,
    ) -> Result<NonNull<T>, BringUpError> {
        let entry = each * size_of::<T>();
        let bytes = (span.len() / per) as usize * entry;
        let map = self.boot.clone();
        let mut used = pieces::<P>(&map, layout).map(|(_, _, r)| {
            let first = (r.start as u32 & !(PAGEBLOCK_FRAMES - 1)) - span.start;
            let last = (r.end as u32).next_multiple_of(PAGEBLOCK_FRAMES) - span.start;
            (first / per) as usize * entry..(last / per) as usize * entry
        });
        let at = self
            .p
            .sparse_metadata(self.boot, bytes, &mut used)
            .ok_or(BringUpError::NoMetadata(bytes))?;
        Ok(at.cast())
    }
}

fn plan<P: Platform>(
    boot: &Memblock,
    layout: &Layout,
) -> Result<([Option<Plan>; MAX_SLOTS], usize, PfnRange), BringUpError> {
    let mut plans: [Option<Plan>; MAX_SLOTS] = [None; MAX_SLOTS];
    let mut n = 0;
    let mut span: Option<(u64, u64)> = None;
    let mut last: Option<(u64, u32)> = None;
    let limit = u64::from(!(PAGEBLOCK_FRAMES - 1));
    for (node, zone, r) in pieces::<P>(boot, layout) {
        if r.end > limit {
            return Err(BringUpError::TooHigh(r.end << P::PAGE_SHIFT));
        }
        if let Some((end, prev)) = last
            && prev != node
            && end.div_ceil(PAGEBLOCK_FRAMES.into()) > r.start / u64::from(PAGEBLOCK_FRAMES)
        {
            return Err(BringUpError::NodesShareAPageblock(r.start as u32));
        }
        last = Some((r.end, node));
        span = Some(span.map_or((r.start, r.end), |(s, e)| (s.min(r.start), e.max(r.end))));
        let found = plans[..n].iter_mut().flatten().find(|p| p.node == node && p.zone == zone);
        let frames = PfnRange::new(r.start as u32, r.end as u32);
        match found {
            Some(p) => {
                p.spanned =
                    PfnRange::new(p.spanned.start.min(frames.start), p.spanned.end.max(frames.end));
                p.present += u64::from(frames.len());
            }
            None => {
                let slot = plans.get_mut(n).ok_or(BringUpError::TooManyZones)?;
                *slot = Some(Plan { node, zone, spanned: frames, present: frames.len().into() });
                n += 1;
            }
        }
    }
    plans[..n].sort_unstable_by_key(|p| p.map(|p| (p.node, p.zone)));
    let (start, end) = span.ok_or(BringUpError::NoMemory)?;
    let start = start as u32 & !(PAGEBLOCK_FRAMES - 1);
    let end = (end as u32).next_multiple_of(PAGEBLOCK_FRAMES);
    Ok((plans, n, PfnRange::new(start, end)))
}

impl<P: Platform, R: Reclaim> PageAllocator<P, R> {
    /// Brings a machine up: takes what the boot allocator has left and ends its use \[B1\].
    ///
    /// # Errors
    /// [`BringUpError`]; the boot allocator's memory is then gone with it.
    pub(crate) fn bring_up(
        p: P,
        mut boot: Memblock,
        config: &Config,
        reclaim: R,
    ) -> Result<Self, BringUpError> {
        if !matches!(P::PAGE_SHIFT, 12 | 13 | 14 | 16) {
            return Err(BringUpError::PageShift(P::PAGE_SHIFT));
        }
        if !(PAGEBLOCK_ORDER..=MAX_MAX_ORDER).contains(&config.max_order) {
            return Err(BringUpError::MaxOrder(config.max_order));
        }
        let cpus = p.nr_cpu_ids();
        if cpus == 0 || cpus > MAX_CPUS {
            return Err(BringUpError::Cpus(cpus));
        }
        let layout = &config.layout;
        layout
            .check_alignment(u64::from(PAGEBLOCK_FRAMES) << P::PAGE_SHIFT)
            .map_err(BringUpError::Layout)?;
        let (plans, nr_zones, span) = plan::<P>(&boot, layout)?;
        let plans = &plans[..nr_zones];

        let direct = boot
            .memory()
            .find_map(|m| {
                let pfn = Pfn(u32::try_from(m.base.div_ceil(1 << P::PAGE_SHIFT)).ok()?);
                let at = p.direct_map(pfn)?.as_ptr().expose_provenance();
                Some(at.wrapping_sub(((pfn.0 - span.start) as usize) << P::PAGE_SHIFT))
            })
            .unwrap_or(0);
        let mut tables = Tables { p: &p, boot: &mut boot };
        let blocks = (span.len() / PAGEBLOCK_FRAMES) as usize;
        let per_block = PAGEBLOCK_FRAMES;
        let pages = tables.sparse::<Page>(layout, span, 1)?;
        let bits = tables.sparse::<FreeBits>(layout, span, per_block)?;
        let descs = tables.sparse::<Pageblock>(layout, span, per_block)?;
        let links = tables.sparse::<Links>(layout, span, per_block)?;
        let owners = tables.sparse::<AtomicU16>(layout, span, 1)?;
        let per_frame = 1 << (P::PAGE_SHIFT - STATE_SHIFT);
        let states = tables.sparse_array::<AtomicU8>(layout, span, 1, per_frame)?;
        let noted = match config.page_owner {
            false => None,
            true => {
                let at = tables.sparse_array::<u8>(layout, span, 1, Owners::PER_FRAME)?;
                // SAFETY: the platform made the table of that size, zero-filled and page-aligned, for nothing else,
                // to live as long as itself, which the allocator will own.
                Some(unsafe { Owners::new(span.start, span.len(), at) })
            }
        };
        let sites: &[Sites] = match config.page_owner {
            false => &[],
            // SAFETY: a table of places is atomics; zero is an empty one.
            true => unsafe { tables.zeroed(1)? },
        };
        // SAFETY: the platform made the tables for at least so many entries, to live as long as itself,
        // which the allocator will own. They are zero-filled, made of atomics for which zero is a value,
        // and nobody else's.
        let map = unsafe {
            use core::slice::from_raw_parts;
            let made = memmap::Tables {
                pages: from_raw_parts(pages.as_ptr(), span.len() as usize),
                bits: from_raw_parts(bits.as_ptr(), blocks),
                blocks: from_raw_parts(descs.as_ptr(), blocks),
                links: from_raw_parts(links.as_ptr(), blocks),
                owners: from_raw_parts(owners.as_ptr(), span.len() as usize),
                states: from_raw_parts(states.as_ptr(), span.len() as usize * per_frame),
            };
            MemMap::new(span.start, made, direct)
        };

        let zone_slots = tables.uninit::<Zone>(nr_zones)?;
        for (slot, (at, plan)) in zone_slots.iter_mut().zip(plans.iter().flatten()).enumerate() {
            let (nr_areas, shift) = dealt_out(plan.spanned.len(), cpus, config);
            let region = |pfn: u32| pfn >> (PAGEBLOCK_ORDER + shift);
            let nr_regions =
                (region(plan.spanned.end - 1) - region(plan.spanned.start) + 1) as usize;
            // SAFETY: a region is atomics; zero is one without whole pageblocks, in no bin.
            let regions = unsafe { tables.zeroed::<Region>(nr_regions)? };
            let areas = tables.made(nr_areas, |_| {
                CachePadded::new(IrqLock::new(AreaLists::new(config.max_order)))
            })?;
            let Plan { zone, node, spanned, present } = *plan;
            Zone::init(at, zone, node, slot, spanned, present, areas, regions, shift);
        }
        // SAFETY: every element was initialised by the loop above: the plans are `nr_zones` long.
        let zones: &'static [Zone] =
            unsafe { core::slice::from_raw_parts(zone_slots.as_ptr().cast(), nr_zones) };
        // A row for each zone, and one for holes.
        // SAFETY: lists are atomics; zero is one that takes nothing.
        let rows = unsafe { tables.zeroed::<[List; ROW]>((nr_zones + 1) * cpus)? };
        let room = |slot: usize| pcp::room_for(zones[slot].present_frames(), cpus);
        let lines: usize = (0..nr_zones).map(|slot| room(slot).all_lines()).sum();
        // SAFETY: lines are atomics; zero is one of empty places.
        let mut lines = unsafe { tables.zeroed::<Line>(lines * cpus)? };
        let pcps = tables.made(nr_zones * cpus, |i| {
            let (cpu, slot) = (i / nr_zones, i % nr_zones);
            let room = room(slot);
            let (own, others) = lines.split_at(room.all_lines());
            lines = others;
            Pcp::new(&rows[cpu * (nr_zones + 1) + slot + 1], own, room)
        })?;
        // SAFETY: counters are atomics; zero is zero.
        let counters = unsafe { tables.zeroed::<VmCounters>(cpus + 1)? };
        // SAFETY: rows are atomics; zero is zero.
        let numa = unsafe { tables.zeroed(nr_zones * (cpus + 1))? };
        // A CPU's node counts, whether it has memory or not: its requests need a zonelist.
        let of_cpus = (0..cpus).filter_map(|cpu| p.cpu(cpu)).map(|cpu| cpu.node() + 1);
        let of_zones = plans.iter().flatten().map(|p| p.node as usize + 1);
        let nodes = of_zones.chain(of_cpus).max().unwrap_or(1);
        let nr_stat_nodes = nodes.min(MAX_NODES);
        // SAFETY: as above.
        let node_stats = unsafe { tables.zeroed(nr_stat_nodes * (cpus + 1))? };
        // SAFETY: as above.
        let system_stats = unsafe { tables.zeroed(cpus + 1)? };
        // SAFETY: as above.
        let zone_stats = unsafe { tables.zeroed(nr_zones)? };

        for (node, zone, r) in pieces::<P>(&boot, layout) {
            let slot = zones
                .iter()
                .position(|z| z.zone_type() == zone && z.node() == node as usize)
                .ok_or(BringUpError::NoMemory)?;
            let mut pfn = r.start as u32 & !(PAGEBLOCK_FRAMES - 1);
            while pfn < r.end as u32 {
                if let Some(block) = map.block_index(pfn).and_then(|i| map.blocks.get(i)) {
                    block.set_flags(PbFlags::new(slot, MigrateType::Movable));
                }
                pfn += PAGEBLOCK_FRAMES;
            }
        }
        // The tables are reserved now; with this the free ranges are final.
        let mut tables = Tables { p: &p, boot: &mut boot };
        let limit_slots = tables.uninit::<Limits>(nr_zones)?;
        let data_slots = tables.uninit::<CpuData>(cpus)?;
        boot.hand_over()?;
        for range in boot.free_ranges(P::PAGE_SHIFT) {
            for (_, zone, piece) in pieces::<P>(&boot, layout) {
                let (s, e) = (range.start.max(piece.start), range.end.min(piece.end));
                if s < e && zone != ZoneType::Device {
                    hand_over(&p, &map, zones, s as u32, e as u32);
                }
            }
        }
        for r in boot.reserved() {
            for (_, _, piece) in pieces::<P>(&boot, layout) {
                let s = (r.base >> P::PAGE_SHIFT).max(piece.start);
                let e = r.end().div_ceil(1 << P::PAGE_SHIFT).min(piece.end);
                for pfn in s..e {
                    map.page_in_map(pfn as u32).mark_reserved();
                }
            }
        }

        for (at, zone) in limit_slots.iter_mut().zip(zones) {
            at.write(Limits::for_zone(zone.managed_frames(), cpus));
        }
        // SAFETY: every element was written: there are as many zones as slots.
        let limits: &'static [Limits] =
            unsafe { core::slice::from_raw_parts(limit_slots.as_ptr().cast(), nr_zones) };
        for (i, pcp) in pcps.iter().enumerate() {
            pcp.reset_high(&limits[i % nr_zones]);
            pcp.set_home(zones[i % nr_zones].own_area(i / nr_zones));
        }
        let mut lists = Zonelists::empty();
        lists.build(nodes.min(MAX_NODES), config.distance, |node, zone| {
            zones
                .iter()
                .position(|z| {
                    z.node() == node
                        && z.zone_type() as usize == zone
                        && z.zone_type() != ZoneType::Device
                        && z.managed_frames() > 0
                })
                .map_or(NO_SLOT, |s| s as u8)
        });
        let mut serves = [0u8; MAX_NR_ZONES];
        for zone in ZoneType::ALL {
            serves[zone as usize] = layout.serve(zone) as u8;
        }
        lists.redirect(&serves);
        for (id, at) in data_slots.iter_mut().enumerate() {
            let node = p.cpu(id).map_or(0, Cpu::node);
            let pcps = &pcps[id * nr_zones..(id + 1) * nr_zones];
            let rows = &rows[id * (nr_zones + 1)..(id + 1) * (nr_zones + 1)];
            let mut preferred = [None; 8];
            for (highest, place) in preferred.iter_mut().enumerate().take(MAX_NR_ZONES) {
                let zone = zones.get(lists.first_slot(node, highest));
                let pcp = |zone: &Zone| &pcps[zone.slot];
                *place = zone.map(|zone| Preferred { zone, row: pcp(zone).row(), pcp: pcp(zone) });
            }
            at.write(CpuData { preferred, rows: Rows::new(rows) });
        }
        // SAFETY: every element was written just now.
        let cpu_data: &'static [CpuData] =
            unsafe { core::slice::from_raw_parts(data_slots.as_ptr().cast(), cpus) };
        for (id, data) in cpu_data.iter().enumerate() {
            let claimed = p.cpu(id).is_some_and(|cpu| cpu.claim(core::ptr::from_ref(data).cast()));
            if !claimed {
                for (id, data) in cpu_data.iter().enumerate().take(id) {
                    if let Some(cpu) = p.cpu(id) {
                        cpu.disclaim(core::ptr::from_ref(data).cast());
                    }
                }
                return Err(BringUpError::CpuInUse(id));
            }
        }

        let lowmem_kbytes = zones
            .iter()
            .filter(|z| z.zone_type() <= ZoneType::Normal)
            .map(|z| z.managed_frames() << (P::PAGE_SHIFT - 10))
            .sum();
        let min_free =
            config.min_free_kbytes.unwrap_or_else(|| zone::min_free_kbytes_for(lowmem_kbytes));
        zone::reserve(zones, &config.lowmem_reserve_ratio);
        let (stray, counters) = counters.split_last().ok_or(BringUpError::Cpus(0))?;
        let sites = sites.first().map_or(ptr::null_mut(), |s| ptr::from_ref(s).cast_mut());
        let idle = IdleWord::unique();
        let pages = PageAllocator {
            p,
            map,
            zones,
            limits,
            lists,
            pcps,
            cpu_data,
            counters,
            stray_counters: stray,
            numa,
            node_stats,
            nr_stat_nodes,
            zone_stats,
            system_stats,
            gate: AtomicU32::new(0),
            gating: IrqLock::new(()),
            allowed: AtomicU32::new(u32::MAX),
            max_order: config.max_order,
            min_free_kbytes: AtomicU64::new(min_free),
            watermark_scale: AtomicU64::new(config.watermark_scale_factor.min(3000)),
            idle,
            plain: Gated::open(idle),
            stat_interval: super::housekeeping::Interval::new(),
            fault: Fault::new(),
            tracer: IrqLock::new(None),
            panic_on_misuse: AtomicBool::new(false),
            failure_reports: AtomicU64::new(0),
            fail_page_alloc: Fault::new(),
            fail_page_alloc_site: IrqLock::new(None),
            owners: noted,
            sites: AtomicPtr::new(sites),
            reclaim,
        };
        pages.spread_watermarks();
        pages.set_gfp_allowed_mask(config.gfp_allowed_mask);
        pages.set_page_owner(config.page_owner);
        Ok(pages)
    }
}

/// Puts the free frames `start..end` of one zone on its lists, the lowest last: they are the first to go.
fn hand_over<P: Platform>(p: &P, map: &MemMap, zones: &[Zone], start: u32, end: u32) {
    let Some(zone) = map.flags_of(start).zone_slot().and_then(|s| zones.get(s)) else { return };
    let per_region = 1 << (PAGEBLOCK_ORDER + zone.region_shift());
    let mut stop = end;
    while start < stop {
        let from = start.max((stop - 1) & !(per_region - 1));
        let first_whole = from.next_multiple_of(PAGEBLOCK_FRAMES).min(stop);
        let last_whole = (stop & !(PAGEBLOCK_FRAMES - 1)).max(first_whole);
        zone.with_area(p, map, zone.area_of(from), |area| {
            let mut give = |mut at: u32, to: u32| {
                while at < to {
                    let aligned = at.trailing_zeros().min(PAGEBLOCK_ORDER - 1);
                    let order = aligned.min((to - at).ilog2());
                    // Frames handed over twice do not exist: free ranges are disjoint.
                    let _ = area.give(at, order);
                    at += 1 << order;
                }
            };
            give(from, first_whole);
            give(last_whole, stop);
            let n = (last_whole - first_whole) >> PAGEBLOCK_ORDER;
            if n > 0 {
                let bit = (first_whole & (per_region - 1)) >> PAGEBLOCK_ORDER;
                let word = (u64::MAX >> (64 - n)) << bit;
                area.seed(zone.region_of(first_whole), word);
            }
        });
        zone.add_managed(u64::from(stop - from));
        stop = from;
    }
}
