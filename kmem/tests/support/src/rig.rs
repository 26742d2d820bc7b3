//! A machine that keeps its reports and checks that nothing was lost.

use kmem::{
    AllocError, Audit, Config, Gfp, Page, Pfn, ZoneType,
    context::{Process, Task},
    platform::Level,
    stack::StackAudit,
    vmstat::VmEvent,
    zone::Zone,
};
use kmem_hosted::{Machine, ReportLog, Shape};
use std::{ops::Deref, sync::Arc, thread};

/// Bytes.
pub const MIB: u64 = 1 << 20;

/// Blocks that a test holds.
pub type Held = Vec<(Pfn, u32)>;

/// A machine under test. When it goes, all its frames must be free again.
pub struct Rig {
    machine: Arc<Machine>,
    log: Arc<ReportLog>,
    start: Audit,
    /// Frames that the slab layer held then.
    held: u64,
}

impl Rig {
    /// A machine without kswapd.
    pub fn new(shape: Shape, config: Config) -> Rig {
        Rig::of(Machine::without_kswapd(shape, config).unwrap())
    }

    /// A machine with kswapd running.
    pub fn with_kswapd(shape: Shape) -> Rig {
        let machine = Machine::new(shape).unwrap();
        // Nobody is to touch lists while they are counted.
        machine.set_stat_interval(0);
        Rig::of(machine)
    }

    /// A machine that is up already.
    pub fn of(machine: Machine) -> Rig {
        let log = Arc::new(ReportLog::new());
        let sink = Arc::clone(&log);
        machine.hosted().set_report_sink(Arc::new(move |level, text: &str| sink.push(level, text)));
        let start = machine.audit().unwrap();
        let objects = machine.audit_objects().unwrap();
        let held = objects.slab_frames + objects.own_frames;
        Rig { machine: Arc::new(machine), log, start, held }
    }

    /// A PC with 64 MiB: zones DMA and DMA32, two CPUs, per-CPU lists in use.
    pub fn pc() -> Rig {
        Rig::new(Shape::x86_64(64 * MIB), Config::default())
    }

    /// One zone of 64 MiB, two CPUs.
    pub fn flat() -> Rig {
        Rig::new(Shape::no_dma(64 * MIB), Config::default())
    }

    /// The machine, to be kept.
    pub fn machine(&self) -> &Arc<Machine> {
        &self.machine
    }

    /// Runs `f` on CPU 0 as a task of its own.
    pub fn run<R>(&self, f: impl FnOnce(&mut Process) -> R) -> R {
        self.run_as(&Task::new(), f)
    }

    /// Runs `f` on CPU 0 as `task`.
    pub fn run_as<R>(&self, task: &Task, f: impl FnOnce(&mut Process) -> R) -> R {
        self.on(0, task, f)
    }

    /// Runs `f` on a CPU as `task`.
    pub fn on<R>(&self, cpu: usize, task: &Task, f: impl FnOnce(&mut Process) -> R) -> R {
        self.machine.run_on(Some(cpu), Some(task), f).unwrap()
    }

    /// Reports so far.
    pub fn mark(&self) -> usize {
        self.log.count()
    }

    /// Reports since a mark.
    pub fn since(&self, mark: usize) -> Vec<(Level, String)> {
        self.log.since(mark)
    }

    /// The one report since a mark.
    #[track_caller]
    pub fn one_report(&self, mark: usize) -> String {
        let mut reports = self.since(mark);
        assert_eq!(reports.len(), 1, "{reports:?}");
        reports.remove(0).1
    }

    /// A zone of node 0.
    #[track_caller]
    pub fn zone(&self, kind: ZoneType) -> &Zone {
        self.machine.zone_of(0, kind).unwrap()
    }

    /// Frame and zone of a page.
    pub fn place(&self, page: &Page) -> (Pfn, ZoneType) {
        let pfn = self.machine.page_to_pfn(page).unwrap();
        (pfn, self.machine.page_zone(pfn).unwrap().zone_type())
    }

    /// Allocates, and returns the block to hold.
    pub fn take(&self, gfp: Gfp, order: u32) -> Result<(Pfn, u32), AllocError> {
        let page = self.machine.alloc_pages(gfp, order)?;
        Ok((self.machine.page_to_pfn(page).unwrap(), order))
    }

    /// Allocates until the first refusal.
    pub fn exhaust(&self, gfp: Gfp, order: u32) -> Held {
        std::iter::from_fn(|| self.take(gfp, order).ok()).collect()
    }

    /// Frees blocks.
    #[track_caller]
    pub fn release(&self, held: impl IntoIterator<Item = (Pfn, u32)>) {
        for (pfn, order) in held {
            self.machine.__free_pages(self.machine.pfn_to_page(pfn).unwrap(), order).unwrap();
        }
    }

    /// Passes of direct reclaim so far.
    pub fn stalls(&self) -> u64 {
        ZoneType::ALL.into_iter().map(|z| self.machine.vm_event(VmEvent::allocstall(z))).sum()
    }

    /// Gives what lies on per-CPU lists back and audits.
    #[track_caller]
    pub fn settle(&self) -> Audit {
        for cpu in 0..self.machine.hosted().shape().cpus.len() {
            // A CPU that the test took offline was drained then.
            let _ = self.machine.run_on(Some(cpu), None, |_| self.machine.drain_this_cpu());
        }
        self.machine.audit().unwrap()
    }

    /// Checks that every object is back, and every frame but those that the slab layer keeps for itself.
    #[track_caller]
    pub fn assert_conserved(&self) {
        self.machine.drop_kept_stacks();
        assert_eq!(self.machine.audit_stacks(), Ok(StackAudit::default()), "stacks lost or found");
        self.machine.vm_unmap_aliases();
        let areas = self.machine.audit_vmalloc().unwrap();
        assert_eq!((areas.live, areas.lazy, areas.pooled), (0, 0, 0), "areas lost or found");
        assert_eq!(areas.free, areas.largest, "free addresses are in pieces");
        let maps = self.machine.audit_highmem().unwrap();
        let used = (maps.mapped, maps.users, maps.held, maps.sleepers, maps.local);
        assert_eq!(used, (0, 0, 0, 0, 0), "mappings lost or found");
        assert_eq!(maps.clean + maps.stale, maps.places, "places lost");
        self.machine.drop_slab();
        let objects = self.machine.audit_objects().unwrap();
        assert_eq!((objects.live, objects.cached), (0, 0), "objects lost or found");
        let kept = objects.slab_frames + objects.own_frames - self.held;
        let Audit { free, allocated, .. } = self.start;
        let start = Audit { free: free - kept, allocated: allocated + kept, ..self.start };
        assert_eq!(self.settle(), start, "frames lost or found");
    }
}

impl Deref for Rig {
    type Target = Machine;

    fn deref(&self) -> &Machine {
        &self.machine
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if !thread::panicking() {
            self.assert_conserved();
        }
    }
}
