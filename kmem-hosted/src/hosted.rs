//! The machine: threads on its CPUs.
//!
//! # Concepts
//! [`Hosted`] is a handle; clones are the same machine, which goes away with the last of them. A thread
//! becomes a task by [`Hosted::run`]: it gets a CPU slot, waiting for one if need be, and its closure gets
//! the [`Process`] capability. The thread keeps the CPU until the closure ends, sleeps
//! ([`Platform::wait`](kmem::platform::Platform::wait)) or offers the CPU ([`Hosted::cond_resched`]); after these it may be on another one.
//! Nothing else takes the CPU from it but interrupts.
//!
//! A thread on one machine may enter another ([`Hosted::run_nested`]); on a machine that it has not
//! entered it is *unattached*: the core serves it without per-CPU lists. A handler must keep to its own
//! machine.
//!
//! # Locking
//! The queue for slots has a mutex ([`queue`](crate::queue)); the memory has one for bring-up. Nothing
//! here is called with either held.

use crate::{
    irq::{self, Signals},
    memory::{FrameMapping, MapError, PhysMemory},
    protocol,
    queue::{OfflineError, SlotQueue},
    rcu::Epoch,
    report::{Reports, Sink},
    shape::{Shape, ShapeError},
    slot::{self, Slot},
    stats::CpuStats,
    sys,
};
use core::{
    cell::Cell,
    ptr,
    sync::atomic::{
        Ordering::{Relaxed, SeqCst},
        compiler_fence,
    },
};
use kmem::{
    context::{Atomic, Context, Cpu, Process, Section, Task},
    platform::Level,
    types::{Pfn, PfnRange},
};
use rustix::io::Errno;
use std::sync::{Arc, OnceLock, Weak};
use thiserror::Error;

/// An interrupt handler: gets the capability of its context and the CPU's number. It runs in a signal
/// handler and must be async-signal-safe: no allocation on the host's heap, no locks that process
/// context may hold, no printing. A panic in it ends the process. An NMI handler, which may have landed in
/// any locked section, must not kick either.
pub type IrqHandler = dyn Fn(Atomic<'_>, usize) + Send + Sync;

/// A softirq handler: gets the raised bits too. As async-signal-safe as an [`IrqHandler`].
pub type SoftirqHandler = dyn Fn(Atomic<'_>, usize, u32) + Send + Sync;

/// What becomes of the task that runs on a CPU.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Switch {
    /// It gives the CPU up, and comes back.
    Out,
    /// It came back, maybe to another CPU.
    In,
    /// It ends.
    End,
}

/// What runs on a CPU, on behalf of the task, when it leaves it or comes back.
pub type SwitchHook = dyn Fn(Switch) + Send + Sync;

/// Why a machine could not be made.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum HostedError {
    /// The shape makes no sense.
    #[error("bad machine shape: {0}")]
    Shape(#[from] ShapeError),
    /// The host refused memory.
    #[error("the host has no memory for the machine: {0}")]
    Memory(Errno),
    /// The process uses every real-time signal.
    #[error("no two real-time signals are free to serve as interrupts")]
    NoSignal,
}

/// Why a thread could not run on a machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum AttachError {
    /// The thread runs on a machine already.
    #[error("the thread runs on a machine already")]
    AlreadyAttached,
    /// The CPU asked for is offline or does not exist.
    #[error("CPU {0} is not online")]
    NotOnline(usize),
    /// The thread cannot be made ready for interrupts.
    #[error("the host cannot give the thread a signal stack: {0}")]
    Host(Errno),
    /// The thread's number does not fit.
    #[error("thread number {0} is too large")]
    ThreadId(u32),
}

#[derive(Default)]
pub(crate) struct Handlers {
    pub(crate) timer: OnceLock<Arc<IrqHandler>>,
    pub(crate) ipi: OnceLock<Arc<IrqHandler>>,
    pub(crate) nmi: OnceLock<Arc<IrqHandler>>,
    pub(crate) softirq: OnceLock<Arc<SoftirqHandler>>,
    switch: OnceLock<Arc<SwitchHook>>,
}

/// Who left a CPU.
pub(crate) struct Left {
    task: *const Task,
    /// The CPU, if it is the only one to come back to.
    pinned: Option<usize>,
}

/// One machine.
pub(crate) struct Inner {
    pub(crate) slots: Box<[Slot]>,
    queue: SlotQueue,
    pub(crate) memory: PhysMemory,
    shape: Shape,
    pub(crate) signals: Signals,
    pub(crate) handlers: Handlers,
    pub(crate) reports: Reports,
    pub(crate) epoch: Epoch,
}

/// A machine in this process \[X1\]. Clones are handles to the same machine.
#[derive(Clone)]
pub struct Hosted {
    pub(crate) inner: Arc<Inner>,
    /// Address of `inner`, to compare with: one load less for each look.
    id: usize,
}

thread_local! {
    /// The CPU that the thread's innermost task is bound to.
    static BOUND: Cell<Option<usize>> = const { Cell::new(None) };
    /// The CPU that the thread was on last, to go back to if it is idle.
    static LAST: Cell<usize> = const { Cell::new(0) };
}

impl Hosted {
    /// Makes a machine. All its CPUs are online and idle.
    pub fn new(shape: Shape) -> Result<Hosted, HostedError> {
        shape.check()?;
        let signals = irq::signals().ok_or(HostedError::NoSignal)?;
        let memory = PhysMemory::new(&shape).map_err(HostedError::Memory)?;
        let inner = Arc::new_cyclic(|weak: &Weak<Inner>| {
            let slot = |(id, &node): (usize, &usize)| {
                Slot::new(Cpu::new(id as u32, node as u32), weak.as_ptr().cast_mut())
            };
            Inner {
                slots: shape.cpus.iter().enumerate().map(slot).collect(),
                queue: SlotQueue::new(shape.cpus.len()),
                memory,
                shape,
                signals,
                handlers: Handlers::default(),
                reports: Reports::new(),
                epoch: Epoch::new(),
            }
        });
        let id = Arc::as_ptr(&inner).addr();
        Ok(Hosted { inner, id })
    }

    /// The machine's shape.
    pub fn shape(&self) -> &Shape {
        &self.inner.shape
    }

    /// Runs `f` as a task of the machine, on any CPU.
    pub fn run<R>(&self, f: impl FnOnce(&mut Process) -> R) -> Result<R, AttachError> {
        self.run_on(None, None, f)
    }

    /// Runs `f` as `task` of the machine, bound to `cpu` or on any, waiting for it to be free. The
    /// thread must not be on any machine. Without a `task` it gets one of its own, which ends with `f`.
    ///
    /// A task bound to a CPU that goes offline while it sleeps goes on on another.
    pub fn run_on<R>(
        &self,
        cpu: Option<usize>,
        task: Option<&Task>,
        f: impl FnOnce(&mut Process) -> R,
    ) -> Result<R, AttachError> {
        if !slot::unattached() {
            return Err(AttachError::AlreadyAttached);
        }
        sys::prepare_thread([self.inner.signals.irq, self.inner.signals.nmi])
            .map_err(AttachError::Host)?;
        let tid = sys::gettid();
        if tid > protocol::TID_MAX {
            return Err(AttachError::ThreadId(tid));
        }
        let own = Task::new();
        let _attached = Attached::new(&self.inner, cpu, task.unwrap_or(&own))?;
        // SAFETY: the thread was on no machine and is on this one now, in process context. Other
        // `Process`es on it can come from this function only, which refuses a thread that is on a
        // machine, or from `run_nested`, which borrows this one.
        Ok(f(&mut unsafe { Process::new() }))
    }

    /// Runs `f` as a task of this machine, from a task of another. The other machine's CPU stays
    /// taken meanwhile, its interrupts are served, and the capability to sleep there is given up for
    /// the one here.
    pub fn run_nested<R>(
        &self,
        outer: &mut Process,
        cpu: Option<usize>,
        task: Option<&Task>,
        f: impl FnOnce(&mut Process) -> R,
    ) -> Result<R, AttachError> {
        let _ = outer;
        if slot::unattached() {
            return self.run_on(cpu, task, f);
        }
        if slot::slot_of(self.id()).is_some() {
            return Err(AttachError::AlreadyAttached);
        }
        let own = Task::new();
        let _attached = Attached::new(&self.inner, cpu, task.unwrap_or(&own))?;
        // SAFETY: the thread is on this machine's CPU now, in process context, and so it was before:
        // the caller had a `Process`, which is borrowed for as long as this one lives.
        Ok(f(&mut unsafe { Process::new() }))
    }

    /// Offers the CPU: gives it up and waits for one again if somebody waits for it or it is to go
    /// offline.
    pub fn cond_resched(&self, process: &mut Process) {
        let _ = process;
        if let Some(slot) = slot::top_of(self.id()) {
            irq::run_softirqs(slot);
            if self.inner.queue.wanted(slot.cpu.id()) {
                let left = self.inner.leave(slot, Switch::Out);
                self.inner.enter_again(left);
            }
        }
    }

    /// Brings a CPU online or takes it offline. Going offline waits until the task on it ends, sleeps or
    /// offers the CPU; the result says whether the CPU is in the wanted state, which it is not if somebody
    /// brought it back meanwhile. A CPU that has places of a sleeping task's temporary mappings stays online. Not to be called by a task that the task on that CPU waits for.
    pub fn set_online(&self, cpu: usize, online: bool) -> Result<bool, OfflineError> {
        if online {
            return self.inner.queue.bring_online(cpu).map(|()| true);
        }
        if slot::slot_of(self.id()).is_some_and(|slot| slot.cpu.id() == cpu) {
            return Err(OfflineError::OwnCpu(cpu));
        }
        self.inner.queue.take_offline(cpu)
    }

    /// Whether a CPU may be used.
    pub fn is_online(&self, cpu: usize) -> bool {
        self.inner.queue.is_online(cpu)
    }

    /// Sets what runs at each timer tick; once, `false` after that.
    pub fn set_timer_handler(&self, handler: Arc<IrqHandler>) -> bool {
        self.inner.handlers.timer.set(handler).is_ok()
    }

    /// Sets what runs on a CPU that was [kicked](kmem::platform::Platform::kick); once, `false` after that. Keep no
    /// [`Hosted`] in it, directly or not: the machine would own itself. A [`std::sync::Weak`] does.
    pub fn set_ipi_hook(&self, hook: Arc<IrqHandler>) -> bool {
        self.inner.handlers.ipi.set(hook).is_ok()
    }

    /// Sets what runs when a task leaves a CPU or comes back; once, `false` after that. As for
    /// [`set_ipi_hook`](Self::set_ipi_hook), keep no [`Hosted`] in it.
    pub fn set_switch_hook(&self, hook: Arc<SwitchHook>) -> bool {
        self.inner.handlers.switch.set(hook).is_ok()
    }

    /// Sets what runs at an NMI; once, `false` after that.
    pub fn set_nmi_handler(&self, handler: Arc<IrqHandler>) -> bool {
        self.inner.handlers.nmi.set(handler).is_ok()
    }

    /// Sets what runs for raised softirqs; once, `false` after that.
    pub fn set_softirq_handler(&self, handler: Arc<SoftirqHandler>) -> bool {
        self.inner.handlers.softirq.set(handler).is_ok()
    }

    /// Starts a timer on a CPU that ticks `hz` times a second while somebody is on it; 0 stops it.
    /// `false` if there is no such CPU or `hz` is above 1000000.
    pub fn start_storm(&self, cpu: usize, hz: u32) -> bool {
        let Some(slot) = self.inner.slots.get(cpu) else { return false };
        if hz > 1_000_000 {
            return false;
        }
        let period = if hz == 0 { 0 } else { 1_000_000_000 / u64::from(hz) };
        slot.period_ns.store(period, Relaxed);
        slot.kick(protocol::REARM, self.inner.signals.irq);
        true
    }

    /// Stops a CPU's timer. A tick that is on its way still arrives.
    pub fn stop_storm(&self, cpu: usize) -> bool {
        self.start_storm(cpu, 0)
    }

    /// Sends an NMI to a CPU.
    pub fn send_nmi(&self, cpu: usize) {
        if let Some(slot) = self.inner.slots.get(cpu) {
            slot.kick(protocol::NMI, self.inner.signals.nmi);
        }
    }

    /// Raises softirqs on the caller's CPU. They run before this returns if the context allows, else on
    /// the way out of the interrupt or when interrupts are unmasked. `false` if the caller is on no CPU.
    pub fn raise_softirq(&self, bits: u32) -> bool {
        match slot::slot_of(self.id()) {
            Some(slot) => {
                irq::raise_softirqs(slot, bits);
                true
            }
            None => false,
        }
    }

    /// A CPU's counters.
    pub fn stats(&self, cpu: usize) -> Option<CpuStats> {
        self.inner.slots.get(cpu).map(|slot| slot.stats.read())
    }

    /// Maps frames one after the other at an address of their own. Whatever is written there is in the
    /// frames, and the other way round.
    pub fn map_frames(&self, frames: &[Pfn]) -> Result<FrameMapping, MapError> {
        self.inner.memory.map_frames(frames)
    }

    /// Gives the contents of `count` frames from `pfn` back to the host; they read as zero afterwards.
    /// For frames that nobody uses.
    pub fn release_frames(&self, pfn: Pfn, count: u32) {
        self.inner.memory.punch(PfnRange::new(pfn.0, pfn.0.saturating_add(count)));
    }

    /// Sends the machine's reports to `sink` and no longer to standard error; once, `false` after that.
    pub fn set_report_sink(&self, sink: Arc<Sink>) -> bool {
        self.inner.reports.set(sink)
    }

    /// What the machine's slots name as their owner.
    #[inline(always)]
    pub(crate) fn id(&self) -> *const Inner {
        core::ptr::without_provenance(self.id)
    }
}

/// A thread's stay on a machine.
struct Attached<'a> {
    inner: &'a Inner,
    /// What the outer task was bound to.
    outer_bound: Option<usize>,
}

impl<'a> Attached<'a> {
    fn new(inner: &'a Inner, bound: Option<usize>, task: &Task) -> Result<Self, AttachError> {
        let cpu = inner
            .queue
            .acquire(bound, LAST.get())
            .map_err(|_| AttachError::NotOnline(bound.unwrap_or(0)))?;
        let outer_bound = BOUND.replace(bound);
        inner.enter(cpu, task);
        Ok(Attached { inner, outer_bound })
    }
}

impl Drop for Attached<'_> {
    fn drop(&mut self) {
        if let Some(slot) = slot::top_of(self.inner) {
            self.inner.leave(slot, Switch::End);
        }
        BOUND.set(self.outer_bound);
    }
}

impl Inner {
    /// Goes on a CPU that the queue gave to the caller. `task`, if not null, stays valid until the
    /// caller leaves the CPU.
    fn enter(&self, cpu: usize, task: *const Task) {
        LAST.set(cpu);
        let slot = &self.slots[cpu];
        slot.hold();
        // SAFETY: the caller runs on the CPU now, and keeps the task until `leave`.
        unsafe { slot.cpu.set_current(task) };
    }

    /// Leaves the CPU that the caller holds and gives it to the next in line.
    pub(crate) fn leave(&self, slot: &Slot, how: Switch) -> Left {
        let context = slot.cpu.context();
        if context != Context::PROCESS {
            self.reports.report(
                Level::Bug,
                format_args!("scheduling while atomic: CPU {} ({context:?})", slot.cpu.id()),
            );
            reset(slot);
        }
        irq::run_softirqs(slot);
        self.switch(how);
        let cpu = slot.cpu.id();
        let pinned = slot.cpu.current().is_some_and(|task| task.local_maps() > 0).then_some(cpu);
        let task = slot.cpu.current().map_or(ptr::null(), ptr::from_ref);
        // SAFETY: null is always allowed.
        unsafe { slot.cpu.set_current(ptr::null()) };
        slot.give_up();
        self.queue.release(cpu, pinned.is_some());
        Left { task, pinned }
    }

    /// Waits for a CPU again after [`Inner::leave`]. A task whose CPU went offline takes any; one that is pinned has it
    /// kept online.
    pub(crate) fn enter_again(&self, left: Left) {
        let hint = LAST.get();
        let cpu = loop {
            match self.queue.acquire(left.pinned.or(BOUND.get()), hint) {
                Ok(cpu) => break cpu,
                Err(_) => BOUND.set(None),
            }
        };
        if left.pinned.is_some() {
            self.queue.unpin(cpu);
        }
        self.enter(cpu, left.task);
        self.switch(Switch::In);
    }

    fn switch(&self, how: Switch) {
        if let Some(hook) = self.handlers.switch.get() {
            hook(how);
        }
    }

    pub(crate) fn kick(&self, cpu: usize) {
        if let Some(slot) = self.slots.get(cpu) {
            slot.kick(protocol::IPI, self.signals.irq);
        }
    }

    /// Kicks a CPU unless somebody is on it. Who comes at this moment may be signalled after all.
    pub(crate) fn kick_idle(&self, cpu: usize) {
        if let Some(slot) = self.slots.get(cpu).filter(|slot| !slot.is_held()) {
            slot.kick(protocol::IPI, self.signals.irq);
        }
    }
}

/// Brings a CPU that was left in an atomic section back to process context.
fn reset(slot: &Slot) {
    slot.reader.clear();
    while slot.cpu.context().preempt_depth() > 0 {
        slot.cpu.leave(Section::Preempt);
    }
    while slot.cpu.context().in_softirq() {
        slot.cpu.leave(Section::Softirq);
    }
    compiler_fence(SeqCst);
    slot.cpu.unmask_irqs();
    compiler_fence(SeqCst);
    irq::serve_deferred(slot);
}
