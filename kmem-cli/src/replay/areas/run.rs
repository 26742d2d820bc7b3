//! Running the operations on areas and per-CPU memory.

use super::{
    plan::{Of, Op, Plan, Thing},
    result::chunk_pages,
};
use crate::replay::objects::frames;
use anyhow::{Context, anyhow, bail};
use indicatif::{ProgressBar, ProgressStyle};
use kmem::{
    Config, Gfp,
    alloc::{Allocator, VmallocOn},
    context::Task,
    page_state::SystemStat,
    percpu::PerCpuPtr,
    vmalloc::VmallocAudit,
};
use kmem_hosted::{Machine, Shape};
use kmem_trace::Recording;
use std::{
    alloc::Layout,
    ptr::NonNull,
    time::{Duration, Instant},
};

/// Bytes of a frame.
pub const PAGE: u64 = 4096;

/// What was done of one kind.
#[derive(Clone, Copy, Default)]
pub struct Counts {
    /// Allocations that succeeded.
    pub allocs: u64,
    /// Frees.
    pub frees: u64,
    /// Allocations that failed.
    pub failures: u64,
    /// Frees that the allocator refused.
    pub refused_frees: u64,
    /// Frees of what could not be allocated.
    pub skipped: u64,
    /// Wall-clock time.
    pub elapsed: Duration,
}

/// The machine at one moment.
#[derive(Clone, Copy, Default)]
pub struct Moment {
    /// Row of the recording after which.
    pub row: usize,
    /// Areas in use.
    pub areas: u64,
    /// Bytes of them, guards included.
    pub area_bytes: u64,
    /// Frames that they have of their own.
    pub area_pages: u64,
    /// Bytes of addresses that no area has, in use or not.
    pub free_bytes: u64,
    /// Pieces of per-CPU memory in use.
    pub percpu: u64,
    /// Bytes of one CPU that were asked for and are in use.
    pub percpu_bytes: u64,
    /// Bytes of one CPU that are free without further memory.
    pub percpu_free: u64,
    /// Frames of the chunks that were made.
    pub percpu_pages: u64,
}

/// What a run came to.
#[derive(Default)]
pub struct Run {
    /// By [`Of`].
    pub counts: [Counts; 2],
    /// Bytes of addresses that there are.
    pub range_bytes: u64,
    /// Bytes that static per-CPU variables and those of the machine's own take of one CPU.
    pub percpu_static: u64,
    /// Bytes of one CPU in a chunk.
    pub stride: u64,
    /// Frames of a chunk.
    pub chunk_pages: u64,
    /// Before the first operation.
    pub start: Moment,
    /// When most bytes of areas were in use.
    pub area_peak: Moment,
    /// When most bytes of per-CPU memory were.
    pub percpu_peak: Moment,
    /// After the last operation.
    pub end: Moment,
    /// Areas at the end.
    pub audit: VmallocAudit,
    /// At the rows that were asked for: bytes in use, and bytes that no new area can have.
    pub samples: Vec<(u64, u64)>,
}

/// Something that was given.
#[derive(Clone, Copy)]
enum Given {
    Area(NonNull<u8>),
    /// Addresses without frames.
    Addresses(NonNull<u8>),
    Percpu(PerCpuPtr<u8>),
}

struct Replay<'a> {
    machine: &'a Machine,
    plan: &'a Plan,
    given: Vec<Option<Given>>,
    now: Moment,
    run: Run,
}

/// Runs the plan, looking at the machine at the rows `samples`, which ascend.
pub fn run(
    recording: &Recording,
    plan: &Plan,
    cpus: usize,
    samples: &[usize],
    quiet: bool,
) -> anyhow::Result<Run> {
    let shape = Shape::x86_64(frames(recording)? << 12).cpus(cpus);
    let machine = Machine::without_kswapd(shape, Config::default())
        .context("cannot build the machine for areas and per-CPU memory")?;
    let mut replay = Replay {
        machine: &machine,
        plan,
        given: vec![None; plan.things.len()],
        now: Moment::default(),
        run: Run::default(),
    };
    let task = Task::new();
    machine.run_on(Some(0), Some(&task), |_| replay.populate())??;
    let bar = if quiet { ProgressBar::hidden() } else { ProgressBar::new(plan.ops.len() as u64) };
    let style = "areas     {bar:40} {percent:>3}% {human_pos}/{human_len}";
    let bar = match ProgressStyle::with_template(style) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    };
    let mut samples = samples.iter().copied().peekable();
    for ops in plan.ops.chunk_by(|a, b| a.cpu == b.cpu) {
        let cpu = usize::from(ops[0].cpu) % cpus;
        let some = |_: &mut kmem::context::Process| replay.operations(ops, &mut samples);
        machine.run_on(Some(cpu), Some(&task), some)??;
        bar.inc(ops.len() as u64);
    }
    bar.finish_and_clear();
    machine.run_on(Some(0), Some(&task), |_| {
        while samples.next().is_some() {
            replay.sample()?;
        }
        replay.finish()
    })??;
    Ok(replay.run)
}

/// A number that a thing's memory is marked with.
fn mark_of(handle: usize) -> u32 {
    handle as u32 ^ 0x6b6d_656d
}

impl Replay<'_> {
    fn populate(&mut self) -> anyhow::Result<()> {
        self.run.stride = self.machine.per_cpu_stride() as u64;
        self.run.chunk_pages = chunk_pages(self.run.stride, self.machine.nr_cpu_ids() as u64);
        self.run.percpu_static = self.run.stride - self.machine.per_cpu_free();
        let audit = self.audit()?;
        self.run.range_bytes = audit.free as u64;
        for handle in 0..self.plan.start {
            if !self.alloc(handle) {
                bail!("no memory for what was there before the recording");
            }
        }
        self.run.counts = [Counts::default(); 2];
        self.look(0)?;
        (self.run.start, self.run.area_peak, self.run.percpu_peak) = (self.now, self.now, self.now);
        Ok(())
    }

    fn audit(&self) -> anyhow::Result<VmallocAudit> {
        self.machine.audit_vmalloc().map_err(|e| anyhow!("areas: {e}"))
    }

    /// Reads what the machine says.
    fn look(&mut self, row: usize) -> anyhow::Result<()> {
        let audit = self.audit()?;
        if audit.live != self.now.areas {
            bail!("areas: {} are in use, the machine says {}", self.now.areas, audit.live);
        }
        self.now.row = row;
        self.now.area_pages = audit.frames;
        self.now.free_bytes = audit.free as u64;
        self.now.percpu_free = self.machine.per_cpu_free();
        self.now.percpu_pages = self.machine.system_state(SystemStat::Percpu);
        Ok(())
    }

    fn sample(&mut self) -> anyhow::Result<()> {
        self.look(self.now.row)?;
        let taken = self.run.range_bytes - self.now.free_bytes;
        self.run.samples.push((self.now.area_bytes, taken));
        Ok(())
    }

    fn operations(
        &mut self,
        ops: &[Op],
        samples: &mut std::iter::Peekable<impl Iterator<Item = usize>>,
    ) -> anyhow::Result<()> {
        for op in ops {
            while samples.next_if(|row| *row < op.row).is_some() {
                self.sample()?;
            }
            let of = self.plan.things[op.handle].of as usize;
            let began = Instant::now();
            if op.alloc {
                self.alloc(op.handle);
            } else {
                self.free(op.handle, op.row)?;
            }
            self.run.counts[of].elapsed += began.elapsed();
            self.now.row = op.row;
            if self.now.area_bytes > self.run.area_peak.area_bytes {
                self.look(op.row)?;
                self.run.area_peak = self.now;
            }
            if self.now.percpu_bytes > self.run.percpu_peak.percpu_bytes {
                self.look(op.row)?;
                self.run.percpu_peak = self.now;
            }
        }
        Ok(())
    }

    fn ask(&self, thing: &Thing) -> Option<Given> {
        let kmem = self.machine.kmem();
        let bytes = usize::try_from(thing.bytes).ok()?;
        match thing.of {
            Of::Percpu => {
                let (gfp, _) = Gfp::from_linux(thing.gfp);
                let gfp = if thing.gfp == 0 { Gfp::KERNEL } else { gfp };
                let align = 1usize.checked_shl(thing.align.into())?;
                kmem.__alloc_percpu_gfp(bytes, align, gfp | Gfp::NOWARN).ok().map(Given::Percpu)
            }
            Of::Area => {
                // The guard is not asked for.
                let bytes = bytes.checked_sub(PAGE as usize).filter(|n| *n > 0)?;
                if !thing.frames {
                    return kmem.get_vm_area(bytes).ok().map(Given::Addresses);
                }
                let align = 1usize.checked_shl(thing.align.into())?;
                let layout = Layout::from_size_align(bytes, align).ok()?;
                let area = VmallocOn(kmem).alloc(layout, Gfp::KERNEL | Gfp::NOWARN).ok()?;
                Some(Given::Area(area.cast()))
            }
        }
    }

    /// Places to mark.
    fn marks(&self, given: Given) -> Vec<NonNull<u32>> {
        match given {
            Given::Area(at) => vec![at.cast()],
            Given::Addresses(_) => Vec::new(),
            Given::Percpu(at) => (0..self.machine.nr_cpu_ids())
                .filter_map(|cpu| self.machine.per_cpu_ptr(at.cast(), cpu))
                .collect(),
        }
    }

    fn alloc(&mut self, handle: usize) -> bool {
        let thing = self.plan.things[handle];
        let given = self.ask(&thing);
        let counts = &mut self.run.counts[thing.of as usize];
        let Some(given) = given else {
            counts.failures += 1;
            return false;
        };
        counts.allocs += 1;
        for at in self.marks(given) {
            // SAFETY: it was just given to us. Per-CPU memory comes in pieces of eight bytes.
            unsafe { at.write(mark_of(handle)) };
        }
        self.given[handle] = Some(given);
        match thing.of {
            Of::Area => {
                (self.now.areas, self.now.area_bytes) =
                    (self.now.areas + 1, self.now.area_bytes + thing.bytes)
            }
            Of::Percpu => {
                (self.now.percpu, self.now.percpu_bytes) =
                    (self.now.percpu + 1, self.now.percpu_bytes + thing.bytes)
            }
        }
        true
    }

    fn free(&mut self, handle: usize, row: usize) -> anyhow::Result<()> {
        let thing = self.plan.things[handle];
        let Some(given) = self.given[handle].take() else {
            self.run.counts[thing.of as usize].skipped += 1;
            return Ok(());
        };
        for at in self.marks(given) {
            // SAFETY: ours, and marked.
            if unsafe { at.read() } != mark_of(handle) {
                bail!("row {row}: somebody else wrote into what is freed");
            }
        }
        let kmem = self.machine.kmem();
        // SAFETY: ours, and its address is forgotten.
        let freed = unsafe {
            match given {
                Given::Area(at) => kmem.vfree(at.as_ptr()),
                Given::Addresses(at) => kmem.vunmap(at.as_ptr()),
                Given::Percpu(at) => kmem.free_percpu(at),
            }
        };
        let counts = &mut self.run.counts[thing.of as usize];
        if freed.is_err() {
            counts.refused_frees += 1;
            return Ok(());
        }
        counts.frees += 1;
        match thing.of {
            Of::Area => {
                (self.now.areas, self.now.area_bytes) =
                    (self.now.areas - 1, self.now.area_bytes - thing.bytes)
            }
            Of::Percpu => {
                (self.now.percpu, self.now.percpu_bytes) =
                    (self.now.percpu - 1, self.now.percpu_bytes - thing.bytes)
            }
        }
        Ok(())
    }

    /// Looks at the end, then frees everything: nothing may be left.
    fn finish(&mut self) -> anyhow::Result<()> {
        self.look(self.now.row)?;
        (self.run.end, self.run.audit) = (self.now, self.audit()?);
        let counts = self.run.counts;
        for handle in 0..self.given.len() {
            if self.given[handle].is_some() {
                self.free(handle, usize::MAX)?;
            }
        }
        self.run.counts = counts;
        self.machine.vm_unmap_aliases();
        self.look(self.now.row)?;
        if self.now.free_bytes != self.run.range_bytes || self.now.percpu != 0 {
            bail!(
                "areas: {} bytes of addresses are lost",
                self.run.range_bytes - self.now.free_bytes
            );
        }
        Ok(())
    }
}
