//! CPU slots: the thread-local record of which CPUs a thread is on.
//!
//! # Concepts
//! A thread that runs on a machine holds one of its CPU slots. It may then enter another machine and
//! hold a slot there too, so a thread has a *chain* of slots, the innermost first, at most one per
//! machine. A thread that serves an idle CPU's interrupt has that CPU's slot on top of its chain for the
//! moment (it *poses* as the CPU), and there it hides the slot of the same machine that the thread holds.
//!
//! # Implementation
//! The chain's top is a thread-local pointer that needs neither set-up nor destruction, so reading it is
//! one instruction and valid in signal handlers and while the thread is torn down. It is never null:
//! the chain ends in a slot of no machine, so that "is the top mine?" is one comparison.
//!
//! A signal handler walks the chain and serves every slot on it that has something pending. While the
//! thread poses it serves none: the poser may hold locks of a machine, and a handler that ran as
//! another CPU of that machine could want them. What came in is served when the posing ends.
//!
//! # Locking
//! A chain belongs to its thread. Its links change by single stores, with the handler in mind: a slot
//! is complete before it becomes the top. Who may be on which slot is [`protocol`](crate::protocol)'s.

use crate::{
    hosted::Inner,
    irq,
    protocol::{self, SlotWord, Word},
    rcu::Reader,
    stats::Stats,
    sys,
};
use core::{
    cell::Cell,
    ptr,
    sync::atomic::{
        AtomicBool, AtomicI32, AtomicPtr, AtomicU32, AtomicU64,
        Ordering::{self, Relaxed, SeqCst},
        compiler_fence,
    },
};
use crossbeam_utils::CachePadded;
use kmem::context::Cpu;

impl Word for AtomicU32 {
    fn load(&self, order: Ordering) -> u32 {
        AtomicU32::load(self, order)
    }
    fn compare_exchange(
        &self,
        old: u32,
        new: u32,
        success: Ordering,
        failure: Ordering,
    ) -> Result<u32, u32> {
        AtomicU32::compare_exchange(self, old, new, success, failure)
    }
    fn fetch_or(&self, bits: u32, order: Ordering) -> u32 {
        AtomicU32::fetch_or(self, bits, order)
    }
    fn fetch_and(&self, bits: u32, order: Ordering) -> u32 {
        AtomicU32::fetch_and(self, bits, order)
    }
}

/// One CPU of a machine.
#[repr(C)]
pub(crate) struct Slot {
    /// First, so that the slot's address is the `Cpu`'s.
    pub(crate) cpu: Cpu,
    /// The machine; null for the end of the chain. Constant.
    owner: AtomicPtr<Inner>,
    /// The next slot on the thread's chain. Own thread only.
    below: AtomicPtr<Slot>,
    /// Set when an interrupt landed and could not be served. Own thread only.
    pub(crate) deferred: AtomicBool,
    /// Whether who is on the slot poses. Own thread only.
    posed: AtomicBool,
    /// Softirqs raised and not yet run. Own thread only.
    pub(crate) softirqs: AtomicU32,
    /// The running timer, or -1. Own thread only, with interrupts masked.
    timer: AtomicI32,
    /// Who is on the slot, and what is pending.
    pub(crate) word: CachePadded<SlotWord<AtomicU32>>,
    /// The timer's period; 0: no timer is wanted.
    pub(crate) period_ns: AtomicU64,
    /// Whether somebody on the CPU reads what others may free.
    pub(crate) reader: Reader,
    pub(crate) stats: Stats,
}

/// Ends every chain.
static NO_SLOT: Slot = Slot::new(Cpu::new(u32::MAX, 0), ptr::null_mut());

const NO_TIMER: i32 = -1;

thread_local! {
    /// The top of this thread's chain.
    static TOP: Cell<*const Slot> = const { Cell::new(&raw const NO_SLOT) };
    /// How many slots on the chain the thread poses on.
    static POSING: Cell<u32> = const { Cell::new(0) };
}

impl Slot {
    /// A free slot. `owner` is the machine, valid whenever a thread is on the slot.
    pub(crate) const fn new(cpu: Cpu, owner: *mut Inner) -> Slot {
        Slot {
            cpu,
            owner: AtomicPtr::new(owner),
            below: AtomicPtr::new(ptr::null_mut()),
            deferred: AtomicBool::new(false),
            posed: AtomicBool::new(false),
            softirqs: AtomicU32::new(0),
            timer: AtomicI32::new(NO_TIMER),
            word: CachePadded::new(SlotWord::new(AtomicU32::new(0))),
            period_ns: AtomicU64::new(0),
            reader: Reader::new(),
            stats: Stats::new(),
        }
    }

    /// The slot's machine.
    #[inline(always)]
    pub(crate) fn owner(&self) -> *const Inner {
        self.owner.load(Relaxed)
    }

    /// Puts the slot on top of the thread's chain.
    fn push(&self) {
        self.below.store(TOP.get().cast_mut(), Relaxed);
        compiler_fence(SeqCst);
        TOP.set(self);
        compiler_fence(SeqCst);
    }

    /// Takes the slot, which is the top, off the thread's chain.
    fn pop(&self) {
        debug_assert!(ptr::eq(TOP.get(), self));
        compiler_fence(SeqCst);
        TOP.set(self.below.load(Relaxed));
        compiler_fence(SeqCst);
    }

    /// Makes the calling thread hold the slot.
    pub(crate) fn hold(&self) {
        self.word.acquire(sys::gettid(), &Holder { slot: self, leaving: false });
    }

    /// Gives the slot up. The CPU is in process context with interrupts on.
    pub(crate) fn give_up(&self) {
        self.word.release(&Holder { slot: self, leaving: true });
    }

    /// Whether somebody is on it now.
    pub(crate) fn is_held(&self) -> bool {
        self.word.is_held()
    }

    /// Sets pending bits and has them served, by `signo` if a thread is on the slot. Any context.
    pub(crate) fn kick(&self, bits: u32, signo: i32) {
        self.word.kick(bits, sys::gettid(), &Poser { slot: self, signo });
        if POSING.get() == 0 {
            // What came in for the thread's own CPUs while it posed.
            for slot in chain() {
                irq::serve_deferred(slot);
            }
        }
    }

    /// Sets the timer as `period_ns` asks. On the slot, with interrupts masked.
    pub(crate) fn rearm(&self, signo: i32) -> bool {
        self.disarm_masked();
        let period = self.period_ns.load(Relaxed);
        if period == 0 || self.posed.load(Relaxed) {
            // A poser has no timer; the next holder sets one when it arrives.
            return true;
        }
        match sys::timer_start(sys::gettid(), signo, ptr::from_ref(self).cast(), period) {
            Some(id) => {
                self.timer.store(id, Relaxed);
                true
            }
            None => false,
        }
    }

    fn disarm_masked(&self) {
        let id = self.timer.load(Relaxed);
        if id != NO_TIMER {
            self.timer.store(NO_TIMER, Relaxed);
            sys::timer_delete(id);
        }
    }
}

/// The thread that holds, or is about to hold, the slot.
struct Holder<'a> {
    slot: &'a Slot,
    leaving: bool,
}

impl protocol::Env<AtomicU32> for Holder<'_> {
    fn publish(&self) {
        self.slot.push();
        // Also after the storm was started while nobody was here. The word's order decides: either
        // `start_storm` finds the slot held and signals, or its period is visible to us.
        if !self.leaving && self.slot.period_ns.load(Relaxed) != 0 {
            self.slot.word.raise(protocol::REARM);
        }
    }

    fn retract(&self) {
        let slot = self.slot;
        if slot.timer.load(Relaxed) != NO_TIMER {
            slot.cpu.mask_irqs();
            compiler_fence(SeqCst);
            // The timer's last signal lands in here, is deferred, and found by the caller as pending.
            slot.disarm_masked();
            compiler_fence(SeqCst);
            slot.cpu.unmask_irqs();
        }
        slot.pop();
    }

    fn serve(&self) {
        irq::serve(self.slot);
    }

    fn signal(&self, _tid: u32) {}

    fn wait(&self, word: &AtomicU32, seen: u32) {
        sys::futex_wait(word, seen, None);
    }

    fn wake(&self, word: &AtomicU32) {
        sys::futex_wake(word, 1);
    }
}

/// A thread that kicks a slot, and poses on it if nobody is there.
struct Poser<'a> {
    slot: &'a Slot,
    signo: i32,
}

impl protocol::Env<AtomicU32> for Poser<'_> {
    fn publish(&self) {
        POSING.set(POSING.get() + 1);
        compiler_fence(SeqCst);
        self.slot.posed.store(true, Relaxed);
        self.slot.push();
    }

    fn retract(&self) {
        self.slot.pop();
        self.slot.posed.store(false, Relaxed);
        compiler_fence(SeqCst);
        POSING.set(POSING.get() - 1);
    }

    fn serve(&self) {
        self.slot.stats.posed.add(1);
        irq::serve(self.slot);
    }

    fn signal(&self, tid: u32) {
        sys::tgkill(tid, self.signo);
    }

    fn wait(&self, _word: &AtomicU32, _seen: u32) {}

    fn wake(&self, word: &AtomicU32) {
        sys::futex_wake(word, 1);
    }
}

/// Whether the thread poses as some CPU.
pub(crate) fn posing() -> bool {
    POSING.get() != 0
}

/// Whether the thread is on no CPU of any machine.
pub(crate) fn unattached() -> bool {
    ptr::eq(TOP.get(), &raw const NO_SLOT)
}

/// The thread's slots, the innermost first.
pub(crate) fn chain<'a>() -> impl Iterator<Item = &'a Slot> {
    let mut at = TOP.get();
    core::iter::from_fn(move || {
        if ptr::eq(at, &raw const NO_SLOT) {
            return None;
        }
        // SAFETY: a slot on the chain is alive: the thread is inside a call that borrows its machine
        // (`Hosted::run_on`, or a kick). The lifetime is the caller's to keep that short.
        let slot = unsafe { &*at };
        at = slot.below.load(Relaxed);
        Some(slot)
    })
}

/// The CPU of the top of the chain, of whatever machine; one of none where there is no top.
#[inline(always)]
pub(crate) fn top_cpu<'a>() -> &'a Cpu {
    let top = TOP.get();
    // SAFETY: as in `top_of`.
    unsafe { core::hint::assert_unchecked(!top.is_null()) };
    // SAFETY: as in `top_of`.
    unsafe { &(*top).cpu }
}

/// The top of the chain if it is a slot of the machine at `owner`.
#[inline(always)]
pub(crate) fn top_of<'a>(owner: *const Inner) -> Option<&'a Slot> {
    let top = TOP.get();
    // SAFETY: the top is never null: `NO_SLOT` or a slot on the chain. (Said aloud, since the compiler
    // forgets it where the reference becomes an option.)
    unsafe { core::hint::assert_unchecked(!top.is_null()) };
    // SAFETY: the top is `NO_SLOT` or a slot on the chain, alive as said in `chain`.
    let top = unsafe { &*top };
    if ptr::eq(top.owner(), owner) { Some(top) } else { None }
}

/// The slot of the machine at `owner` that the thread is on.
#[inline(always)]
pub(crate) fn slot_of<'a>(owner: *const Inner) -> Option<&'a Slot> {
    match top_of(owner) {
        Some(slot) => Some(slot),
        None => deeper(owner),
    }
}

#[cold]
#[inline(never)]
fn deeper<'a>(owner: *const Inner) -> Option<&'a Slot> {
    chain().find(|slot| ptr::eq(slot.owner(), owner))
}
