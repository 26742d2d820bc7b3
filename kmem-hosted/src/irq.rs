//! Interrupts: signals that land on the thread that holds the CPU.
//!
//! # Concepts
//! Two process-wide real-time signals serve all machines: one for maskable interrupts (timer ticks and
//! inter-processor interrupts), one for the NMI. What is wanted is in the slot's pending bits; the
//! signal only makes the thread look. A signal that lands on a thread without a slot does nothing: what
//! it was sent for is still pending, and whoever comes to the slot looks.
//!
//! An interrupt that finds interrupts masked in the CPU's context word, or an interrupt handler running,
//! is *deferred*: a flag is set, and unmasking serves it. Handlers run with interrupts masked. After them
//! come softirqs, if some were raised and none was interrupted: they run with interrupts on, so
//! interrupts nest in them, and softirqs do not.
//!
//! # Implementation
//! Signal handlers run on the thread's alternate stack; masking is the flag in the context word and costs
//! no system call. The kernel blocks the signal while its handler runs. That changes nothing for the
//! machine, whose handlers run masked, but it bounds the stack: were it not blocked, a timer that expires
//! faster than the kernel can deliver its signal would put a new frame on top of the last before that
//! has got anywhere, without end. It is unblocked for softirqs that run in a signal handler. So on one
//! machine at most an interrupt, one in its softirq, and an NMI nest.
//!
//! Everything reached from here is async-signal-safe: no allocation, no locks of the host, no stdio,
//! `errno` kept. Handlers that users register must keep to that too. A panic that leaves one ends the
//! process: the chain of slots and the context word would stay as they are in the middle of an
//! interrupt.
//!
//! An interrupt handler is, to the compiler, another thread; what it shares with the code it interrupts
//! is atomic, and compiler fences stand where the order of plain memory accesses matters.
//!
//! # Locking
//! None. All state here belongs to the thread on the slot, save for the pending bits, whose rules are in
//! [`protocol`](crate::protocol).

use crate::{
    hosted::Inner,
    protocol::{IPI, NMI, REARM, TIMER},
    slot::{self, Slot},
    sys::{self, Errno},
};
use core::{
    ffi::{c_int, c_void},
    mem, ptr,
    sync::atomic::{
        Ordering::{Relaxed, SeqCst},
        compiler_fence,
    },
};
use kmem::{
    context::{Atomic, Context, Section},
    platform::Level,
};
use std::sync::OnceLock;

/// The signals of all machines in the process.
#[derive(Clone, Copy)]
pub(crate) struct Signals {
    /// Maskable interrupts.
    pub(crate) irq: c_int,
    /// Non-maskable interrupts.
    pub(crate) nmi: c_int,
}

/// Claims the signals, once per process; `None` if the process uses all real-time signals otherwise.
pub(crate) fn signals() -> Option<Signals> {
    static SIGNALS: OnceLock<Option<Signals>> = OnceLock::new();
    *SIGNALS.get_or_init(|| {
        let irq = sys::claim_signal(on_irq, None)?;
        Some(Signals { irq, nmi: sys::claim_signal(on_nmi, Some(irq))? })
    })
}

/// Softirq rounds before what is raised anew is left for later (Linux's `MAX_SOFTIRQ_RESTART`).
const MAX_SOFTIRQ_RESTART: u32 = 10;

/// Whether a maskable interrupt is served in this context.
const fn takes_irqs(context: Context) -> bool {
    !context.irqs_off() && !context.in_hardirq() && !context.in_nmi()
}

extern "C" fn on_irq(_signo: c_int, info: *const libc::siginfo_t, _ucontext: *const c_void) {
    let _errno = Errno::save();
    // SAFETY: the kernel called this handler with this `info`.
    let tick = unsafe { sys::timer_signal(info) };
    for slot in slot::chain() {
        if let Some((value, overruns)) = tick
            && ptr::eq(value, ptr::from_ref(slot).cast())
        {
            slot.word.raise(TIMER);
            slot.stats.overruns.add(u64::from(overruns));
        }
        if !slot.word.pending() {
            continue;
        }
        let context = slot.cpu.context();
        let path = slot.cpu.path() as usize;
        if slot::posing() || !takes_irqs(context) {
            slot.deferred.store(true, Relaxed);
            slot.stats.landed_deferred[path].add(1);
        } else {
            slot.stats.landed[path].add(1);
            slot.stats.nested.add(u64::from(context.in_softirq()));
            serve_here(slot, Mask::Blocked);
        }
    }
}

extern "C" fn on_nmi(_signo: c_int, _info: *const libc::siginfo_t, _ucontext: *const c_void) {
    let _errno = Errno::save();
    for slot in slot::chain() {
        // An NMI that lands in an NMI waits for it to end, as on the processor.
        while !slot.cpu.context().in_nmi() && slot.word.take(NMI) != 0 {
            run_nmi(slot);
        }
    }
}

/// Serves what was deferred, if interrupts are on now.
#[inline]
pub(crate) fn serve_deferred(slot: &Slot) {
    if slot.deferred.load(Relaxed) && takes_irqs(slot.cpu.context()) {
        serve(slot);
    }
}

/// Ends the process when it is dropped, which is on unwinding only.
struct NoUnwind;

impl Drop for NoUnwind {
    fn drop(&mut self) {
        std::process::abort();
    }
}

/// Whether the interrupt signal is to be unblocked for softirqs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mask {
    /// In the signal's handler: yes.
    Blocked,
    /// Outside, or inside another machine's or another CPU's interrupt, which goes on first: no.
    AsIs,
}

/// Serves what is pending for the slot, then softirqs. On the slot, with interrupts on and outside of
/// hard interrupts and NMIs.
#[cold]
pub(crate) fn serve(slot: &Slot) {
    serve_here(slot, Mask::AsIs);
}

fn serve_here(slot: &Slot, mask: Mask) {
    let no_unwind = NoUnwind;
    loop {
        slot.deferred.store(false, Relaxed);
        compiler_fence(SeqCst);
        slot.cpu.mask_irqs();
        compiler_fence(SeqCst);
        let pending = slot.word.take_pending();
        let mut nmi = pending & NMI;
        while nmi != 0 {
            run_nmi(slot);
            // One that landed meanwhile was left to this.
            nmi = slot.word.take(NMI);
        }
        if pending & REARM != 0 {
            rearm(slot);
        }
        if pending & (IPI | TIMER) != 0 {
            slot.cpu.enter(Section::Hardirq);
            compiler_fence(SeqCst);
            run_hardirq(slot, pending);
            compiler_fence(SeqCst);
            slot.cpu.leave(Section::Hardirq);
        }
        compiler_fence(SeqCst);
        slot.cpu.unmask_irqs();
        compiler_fence(SeqCst);
        softirqs_here(slot, mask);
        if !slot.deferred.load(Relaxed) {
            break;
        }
    }
    mem::forget(no_unwind);
}

/// The machine of a slot that the caller is on.
fn machine(slot: &Slot) -> &Inner {
    // SAFETY: somebody is on the slot, inside a call that borrows the machine; only the end of the
    // chain has no machine, and nobody is on that.
    unsafe { &*slot.owner() }
}

fn run_hardirq(slot: &Slot, pending: u32) {
    let handlers = &machine(slot).handlers;
    if pending & IPI != 0 {
        slot.stats.ipis.add(1);
        if let Some(hook) = handlers.ipi.get() {
            Atomic::interrupt(|atomic| hook(atomic, slot.cpu.id()));
        }
    }
    if pending & TIMER != 0 {
        slot.stats.ticks.add(1);
        if let Some(handler) = handlers.timer.get() {
            Atomic::interrupt(|atomic| handler(atomic, slot.cpu.id()));
        }
    }
}

fn run_nmi(slot: &Slot) {
    slot.cpu.enter(Section::Nmi);
    compiler_fence(SeqCst);
    slot.stats.nmis.add(1);
    if let Some(handler) = machine(slot).handlers.nmi.get() {
        Atomic::interrupt(|atomic| handler(atomic, slot.cpu.id()));
    }
    compiler_fence(SeqCst);
    slot.cpu.leave(Section::Nmi);
}

fn rearm(slot: &Slot) {
    let machine = machine(slot);
    if !slot.rearm(machine.signals.irq) {
        let cpu = slot.cpu.id();
        machine
            .reports
            .report(Level::Warning, format_args!("CPU {cpu}: the host has no timer left"));
    }
}

/// Runs the softirqs that were raised on the slot, unless one runs already. Interrupts are on.
pub(crate) fn run_softirqs(slot: &Slot) {
    softirqs_here(slot, Mask::AsIs);
}

fn softirqs_here(slot: &Slot, mask: Mask) {
    let wanted = || slot.softirqs.load(Relaxed) != 0 && !slot.cpu.context().in_softirq();
    if !wanted() {
        return;
    }
    let no_unwind = NoUnwind;
    let mut rounds = 0;
    // Looked at again after leaving: an interrupt in the last moment inside could only raise.
    while wanted() && rounds < MAX_SOFTIRQ_RESTART {
        slot.cpu.enter(Section::Softirq);
        compiler_fence(SeqCst);
        // What is raised by an interrupt from here on is seen by the next look.
        open(slot, mask, true);
        let raised = slot.softirqs.swap(0, Relaxed);
        slot.stats.softirqs.add(1);
        if let Some(handler) = machine(slot).handlers.softirq.get() {
            Atomic::interrupt(|atomic| handler(atomic, slot.cpu.id(), raised));
        }
        open(slot, mask, false);
        compiler_fence(SeqCst);
        slot.cpu.leave(Section::Softirq);
        rounds += 1;
    }
    mem::forget(no_unwind);
}

/// Lets the interrupt signal in, or out again, if the caller is in its handler.
fn open(slot: &Slot, mask: Mask, open: bool) {
    if mask == Mask::Blocked {
        // It fails for bad arguments only; softirqs that nothing nests in would still be right.
        let _ = sys::block_signals(&[machine(slot).signals.irq], !open);
    }
}

/// Raises softirqs on the slot that the caller is on; they run now if the context allows, else on the
/// way out of the interrupt or when interrupts are unmasked.
pub(crate) fn raise_softirqs(slot: &Slot, bits: u32) {
    slot.softirqs.fetch_or(bits, Relaxed);
    let context = slot.cpu.context();
    if takes_irqs(context) {
        run_softirqs(slot);
    } else if !context.in_interrupt() {
        slot.deferred.store(true, Relaxed);
    }
}
