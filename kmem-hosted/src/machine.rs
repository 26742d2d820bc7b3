//! A whole machine: memory, CPUs, the memory manager, and its threads.
//!
//! # Concepts
//! [`Machine`] is what most users want: [`Hosted`] with a [`Kmem`] brought up on it, interrupts between
//! CPUs wired to it, one kswapd per node running on a thread of its own, and a thread that has CPUs give back what rests on
//! their lists; with a KFENCE pool one more that keeps the time of samples. It dereferences to its [`Kmem`].
//!
//! # Implementation
//! These threads are tasks like any other, asleep they hold no CPU, but for the housekeeper, which never has one. Dropping
//! the machine stops and joins them.
//!
//! # Locking
//! None of its own.

use crate::{
    OfflineError,
    fault::{self, Watch},
    hosted::{AttachError, Hosted, HostedError, Switch},
    shape::{Shape, ShapeError},
};
use kmem::{
    BringUpError, Config, Kmem,
    context::{Process, Task},
    memblock::{Memblock, MemblockError},
    zone::{Layout, LayoutError, ZoneLimit},
};
use std::{
    ops::Deref,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Release},
    },
    thread::JoinHandle,
};
use thiserror::Error;

/// Why a machine could not be brought up.
#[derive(Debug, Error)]
pub enum MachineError {
    /// The host refused.
    #[error(transparent)]
    Hosted(#[from] HostedError),
    /// The boot allocator refused.
    #[error("boot memory")]
    Boot(#[from] MemblockError),
    /// The shape's zones make no sense.
    #[error("zones")]
    Layout(#[from] LayoutError),
    /// The shape makes no sense.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// The memory manager could not be brought up.
    #[error("bring-up")]
    BringUp(#[from] BringUpError),
    /// The process's faults cannot be looked at for one more machine.
    #[error("no fault handler")]
    Faults,
    /// A thread could not be started.
    #[error("a thread of the machine's")]
    Thread(#[from] std::io::Error),
}

/// Why a CPU did not go off- or online.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum CpuError {
    /// Nobody could run on it.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// It has to stay as it is.
    #[error(transparent)]
    Offline(#[from] OfflineError),
}

/// A machine with its memory manager \[X1\].
pub struct Machine {
    kmem: Arc<Kmem<Hosted>>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    /// Faults of its direct map are its own; ends before the rest goes.
    _watch: Option<Watch>,
}

impl Machine {
    /// Brings a machine of the given shape up with default settings, kswapd and housekeeping running.
    pub fn new(shape: Shape) -> Result<Machine, MachineError> {
        Machine::with_config(shape, Config::default())
    }

    /// Brings a machine up with the given settings; the shape's zones replace the configuration's.
    pub fn with_config(shape: Shape, config: Config) -> Result<Machine, MachineError> {
        let mut machine = Machine::without_kswapd(shape, config)?;
        for node in 0..machine.kmem.nr_nodes() {
            machine
                .start(format!("kswapd{node}"), move |kmem, stop| kmem.kswapd_run(node, stop))?;
        }
        // Aside: what rests goes back though nobody on any CPU ever sleeps.
        machine.start_aside("vmstat".into(), |kmem, stop| kmem.vmstat_run(stop))?;
        if machine.kmem.kfence_stats().is_some() {
            machine.start("kfence".into(), Kmem::kfence_run)?;
        }
        Ok(machine)
    }

    /// Starts a thread of the machine's own, a task like any other.
    fn start(
        &mut self,
        name: String,
        f: impl FnOnce(&Kmem<Hosted>, &AtomicBool) + Send + 'static,
    ) -> Result<(), MachineError> {
        self.start_aside(name, move |kmem, stop| {
            let task = Task::new();
            // A machine without any CPU online has nobody to work for.
            let _ = kmem.platform().run_on(None, Some(&task), |_| f(kmem, stop));
        })
    }

    /// Starts a thread of the machine's own that is on none of its CPUs.
    fn start_aside(
        &mut self,
        name: String,
        f: impl FnOnce(&Kmem<Hosted>, &AtomicBool) + Send + 'static,
    ) -> Result<(), MachineError> {
        let (kmem, stop) = (self.kmem.clone(), self.stop.clone());
        let run = move || f(&kmem, &stop);
        self.threads.push(std::thread::Builder::new().name(name).spawn(run)?);
        Ok(())
    }

    /// Brings a machine up on which nobody reclaims or keeps house in the background: for tests that count frames.
    pub fn without_kswapd(shape: Shape, config: Config) -> Result<Machine, MachineError> {
        let boot = shape.memblock()?;
        Machine::from_boot(shape, config, boot)
    }

    /// As [`without_kswapd`](Machine::without_kswapd), with what was reserved or allocated in boot memory
    /// before. `boot` is the shape's [`memblock`](Shape::memblock), used by the caller.
    pub fn from_boot(
        shape: Shape,
        mut config: Config,
        boot: Memblock,
    ) -> Result<Machine, MachineError> {
        let limits: Vec<ZoneLimit> =
            shape.zones.iter().map(|l| ZoneLimit { zone: l.zone, end: l.end }).collect();
        config.layout = Layout::new(&limits)?;
        let hosted = Hosted::new(shape)?;
        let kmem = Arc::new(Kmem::bring_up(hosted.clone(), boot, &config)?);
        let weak = Arc::downgrade(&kmem);
        hosted.set_ipi_hook(Arc::new(move |_, _| {
            // Whoever runs on a CPU of the machine keeps it alive, so this is never the last handle.
            if let Some(kmem) = weak.upgrade() {
                kmem.handle_ipi();
            }
        }));
        let weak = Arc::downgrade(&kmem);
        hosted.set_switch_hook(Arc::new(move |how| {
            // As above.
            let Some(kmem) = weak.upgrade() else { return };
            match how {
                Switch::Out => kmem.kmap_local_sched_out(),
                Switch::In => kmem.kmap_local_sched_in(),
                Switch::End => kmem.kmap_local_exit(),
            }
        }));
        (0..hosted.shape().cpus.len()).for_each(|cpu| kmem.cpu_online(cpu));
        let watch = match kmem.kfence_stats() {
            Some(_) => Some(fault::watch(&kmem).ok_or(MachineError::Faults)?),
            None => None,
        };
        let stop = Arc::new(AtomicBool::new(false));
        Ok(Machine { kmem, stop, threads: Vec::new(), _watch: watch })
    }

    /// The memory manager.
    pub fn kmem(&self) -> &Kmem<Hosted> {
        &self.kmem
    }

    /// The machine's host side.
    pub fn hosted(&self) -> &Hosted {
        self.kmem.platform()
    }

    /// Runs `f` as a task on any CPU.
    pub fn run<R>(&self, f: impl FnOnce(&mut Process) -> R) -> Result<R, AttachError> {
        self.hosted().run(f)
    }

    /// Runs `f` as `task`, bound to `cpu` or on any.
    pub fn run_on<R>(
        &self,
        cpu: Option<usize>,
        task: Option<&Task>,
        f: impl FnOnce(&mut Process) -> R,
    ) -> Result<R, AttachError> {
        self.hosted().run_on(cpu, task, f)
    }

    /// Takes a CPU out of service: its lists are drained, then it goes offline \[P3\]. Waits until the
    /// task on it ends, sleeps or offers the CPU. The caller must not be on it.
    pub fn cpu_down(&self, cpu: usize) -> Result<(), CpuError> {
        self.hosted().set_online(cpu, false)?;
        self.kmem.cpu_offline(cpu);
        Ok(())
    }

    /// Brings a CPU back into service.
    pub fn cpu_up(&self, cpu: usize) -> Result<(), CpuError> {
        self.hosted().set_online(cpu, true)?;
        self.kmem.cpu_online(cpu);
        Ok(())
    }
}

impl Deref for Machine {
    type Target = Kmem<Hosted>;

    fn deref(&self) -> &Kmem<Hosted> {
        &self.kmem
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Release pairs with the Acquire in `kswapd_run` and its like.
        self.stop.store(true, Release);
        self.kmem.nudge_kswapd();
        self.kmem.nudge_vmstat();
        self.kmem.nudge_kfence();
        for t in self.threads.drain(..) {
            let _ = t.join();
        }
    }
}
