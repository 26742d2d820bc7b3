//! The queue for CPU slots: which task may run on which CPU.
//!
//! # Concepts
//! There may be more tasks than CPUs \[X1\]. A task that wants to run takes an idle CPU or waits its
//! turn: first come, first served, save that a task bound to one CPU lets others pass while that one is
//! taken. A CPU that is given up goes straight to the first task in line that may use it, so nobody
//! barges in and an idle CPU means that nobody who could use it waits.
//!
//! A CPU can be taken offline: it is given to nobody any more, and whoever takes it offline waits until
//! its task has given it up. Tasks bound to it are told. A CPU that a sleeping task must come back to (it is *pinned*)
//! stays online.
//!
//! # Implementation
//! The line is a list through nodes on the waiting threads' stacks, so that waiting allocates nothing.
//! A node is on the list from its owner's decision to wait until somebody sets its outcome, both under
//! the mutex; the owner leaves only when the outcome is set, so nodes on the list are alive. Waking uses
//! the node's address after that, as a futex key only.
//!
//! # Locking
//! One mutex, never taken in a signal handler: handlers neither sleep nor give up CPUs. It is held for
//! a few steps, and for a walk over those waiters that are bound elsewhere.

use crate::sys;
use core::{
    mem, ptr,
    sync::atomic::{
        AtomicU32,
        Ordering::{Acquire, Relaxed, Release},
    },
};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Outcomes of waiting other than a CPU's number.
const WAITING: u32 = u32::MAX;
const OFFLINE: u32 = u32::MAX - 1;

/// The CPU that was asked for is offline, or does not exist.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Offline;

/// Why a CPU could not be taken offline.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum OfflineError {
    /// No such CPU.
    #[error("there is no CPU {0}")]
    NoSuchCpu(usize),
    /// It is the last one online.
    #[error("CPU {0} is the last one online")]
    LastCpu(usize),
    /// The caller runs on it.
    #[error("the caller runs on CPU {0}")]
    OwnCpu(usize),
    /// A task that sleeps has temporary mappings there, and has to come back to it.
    #[error("a sleeping task has temporary mappings on CPU {0}")]
    LocalMaps(usize),
}

#[derive(Clone, Copy)]
struct CpuState {
    online: bool,
    busy: bool,
    /// Tasks that gave it up and must come back to it.
    pinned: u32,
    /// It was to go offline, and a task that must come back kept it.
    kept: bool,
}

struct Waiter {
    /// The only CPU that will do.
    bound: Option<usize>,
    /// WAITING, OFFLINE, or the CPU given.
    outcome: AtomicU32,
    /// The next in line; written under the mutex.
    next: *mut Waiter,
}

struct State {
    cpus: Box<[CpuState]>,
    /// First and last in line; null when nobody waits.
    head: *mut Waiter,
    tail: *mut Waiter,
}

// SAFETY: the pointers are to waiters that stay in place while they are on the list; they are followed
// under the mutex only.
unsafe impl Send for State {}

impl State {
    /// Adds a waiter at the end of the line.
    fn push(&mut self, waiter: *mut Waiter) {
        if self.tail.is_null() {
            self.head = waiter;
        } else {
            // SAFETY: the tail is a waiter on the list, which is alive and touched under the mutex only.
            unsafe { (*self.tail).next = waiter };
        }
        self.tail = waiter;
    }

    /// The first waiter that `wanted` accepts, and the one before it.
    fn find(&self, wanted: impl Fn(Option<usize>) -> bool) -> Option<(*mut Waiter, *mut Waiter)> {
        let (mut before, mut at) = (ptr::null_mut(), self.head);
        while !at.is_null() {
            // SAFETY: waiters on the list are alive, and their `bound` and `next` are touched under the
            // mutex only, which the owner of `self` holds.
            let (bound, next) = unsafe { ((*at).bound, (*at).next) };
            if wanted(bound) {
                return Some((before, at));
            }
            (before, at) = (at, next);
        }
        None
    }

    /// Takes the first waiter that `wanted` accepts off the list, sets its outcome, and returns the
    /// futex word to wake it by.
    fn pop(
        &mut self,
        outcome: u32,
        wanted: impl Fn(Option<usize>) -> bool,
    ) -> Option<*const AtomicU32> {
        let (before, waiter) = self.find(wanted)?;
        // SAFETY: both are on the list (or `before` is null), hence alive until the outcome is stored;
        // only the address of the word is used after that.
        unsafe {
            let next = (*waiter).next;
            if before.is_null() {
                self.head = next;
            } else {
                (*before).next = next;
            }
            if next.is_null() {
                self.tail = before;
            }
            let word = &raw const (*waiter).outcome;
            // Release pairs with the Acquire in `acquire`.
            (*word).store(outcome, Release);
            Some(word)
        }
    }

    /// Gives a CPU that nobody is on to the first in line who may use it.
    fn hand_over(&mut self, cpu: usize) -> Option<*const AtomicU32> {
        let word = self.pop(cpu as u32, |bound| bound.is_none_or(|b| b == cpu));
        self.cpus[cpu].busy = word.is_some();
        word
    }
}

/// One machine's slots and the line for them.
pub(crate) struct SlotQueue {
    state: Mutex<State>,
    /// Threads in line, and those that wait for a CPU to drain: lets a task that offers its CPU see that nobody wants it.
    waiting: AtomicU32,
    /// Goes up when a CPU that is offline has been given up.
    drained: AtomicU32,
}

impl SlotQueue {
    /// All CPUs online and idle.
    pub(crate) fn new(cpus: usize) -> SlotQueue {
        SlotQueue {
            state: Mutex::new(State {
                cpus: vec![CpuState { online: true, busy: false, pinned: 0, kept: false }; cpus]
                    .into_boxed_slice(),
                head: ptr::null_mut(),
                tail: ptr::null_mut(),
            }),
            waiting: AtomicU32::new(0),
            drained: AtomicU32::new(0),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a CPU: the one given in `bound`, or any, preferring `hint`.
    pub(crate) fn acquire(&self, bound: Option<usize>, hint: usize) -> Result<usize, Offline> {
        let mut state = self.lock();
        if let Some(cpu) = bound {
            match state.cpus.get_mut(cpu) {
                None | Some(CpuState { online: false, .. }) => return Err(Offline),
                Some(c) if !c.busy => {
                    c.busy = true;
                    return Ok(cpu);
                }
                Some(_) => {}
            }
        } else {
            let idle = |c: &CpuState| c.online && !c.busy;
            let cpu = if state.cpus.get(hint).is_some_and(idle) {
                Some(hint)
            } else {
                state.cpus.iter().position(idle)
            };
            if let Some(cpu) = cpu {
                state.cpus[cpu].busy = true;
                return Ok(cpu);
            }
        }
        let mut waiter = Waiter { bound, outcome: AtomicU32::new(WAITING), next: ptr::null_mut() };
        // One pointer for all uses from here on: the list's and this function's own.
        let waiter = &raw mut waiter;
        state.push(waiter);
        self.waiting.fetch_add(1, Relaxed);
        drop(state);
        // SAFETY: the waiter is this frame's and stays in place until the function returns.
        let word = unsafe { &(*waiter).outcome };
        let outcome = loop {
            // Acquire pairs with the Release in `State::pop`.
            match word.load(Acquire) {
                WAITING => sys::futex_wait(word, WAITING, None),
                outcome => break outcome,
            }
        };
        self.waiting.fetch_sub(1, Relaxed);
        if outcome == OFFLINE { Err(Offline) } else { Ok(outcome as usize) }
    }

    /// Gives a CPU up: to the first in line who may use it, if any. With `pins` the caller must come back to it, and
    /// [unpins](Self::unpin) it then.
    pub(crate) fn release(&self, cpu: usize, pins: bool) {
        let mut state = self.lock();
        if pins {
            let c = &mut state.cpus[cpu];
            c.pinned += 1;
            c.kept |= !c.online;
            if !mem::replace(&mut c.online, true) {
                self.wake_drainers();
            }
        }
        if state.cpus[cpu].online {
            let word = state.hand_over(cpu);
            drop(state);
            wake(word);
        } else {
            state.cpus[cpu].busy = false;
            drop(state);
            self.wake_drainers();
        }
    }

    /// A task that had to come back is there.
    pub(crate) fn unpin(&self, cpu: usize) {
        self.lock().cpus[cpu].pinned -= 1;
    }

    /// Whether a task on `cpu` ought to give it up: the CPU is to go offline, or somebody waits for it.
    pub(crate) fn wanted(&self, cpu: usize) -> bool {
        if self.waiting.load(Relaxed) == 0 {
            return false;
        }
        let state = self.lock();
        !state.cpus[cpu].online || state.find(|bound| bound.is_none_or(|b| b == cpu)).is_some()
    }

    /// Whether a CPU exists and is online.
    pub(crate) fn is_online(&self, cpu: usize) -> bool {
        self.lock().cpus.get(cpu).is_some_and(|c| c.online)
    }

    /// Lets a CPU be used. A task that was to give it up and did not yet simply keeps it.
    pub(crate) fn bring_online(&self, cpu: usize) -> Result<(), OfflineError> {
        let mut state = self.lock();
        let Some(c) = state.cpus.get_mut(cpu) else {
            return Err(OfflineError::NoSuchCpu(cpu));
        };
        c.online = true;
        let word = if c.busy { None } else { state.hand_over(cpu) };
        drop(state);
        wake(word);
        // Whoever waits for it to drain gives up.
        self.wake_drainers();
        Ok(())
    }

    /// Takes a CPU out of use and waits until its task has given it up. Returns whether it is offline
    /// and idle; it is not when somebody brought it online again meanwhile.
    pub(crate) fn take_offline(&self, cpu: usize) -> Result<bool, OfflineError> {
        let mut state = self.lock();
        let Some(c) = state.cpus.get_mut(cpu) else {
            return Err(OfflineError::NoSuchCpu(cpu));
        };
        if c.pinned > 0 {
            return Err(OfflineError::LocalMaps(cpu));
        }
        let was = mem::replace(&mut c.online, false);
        c.kept = false;
        if !state.cpus.iter().any(|c| c.online) {
            state.cpus[cpu].online = was;
            return Err(OfflineError::LastCpu(cpu));
        }
        while let Some(word) = state.pop(OFFLINE, |bound| bound == Some(cpu)) {
            sys::futex_wake(word, 1);
        }
        // Its task is to see that the CPU is wanted.
        self.waiting.fetch_add(1, Relaxed);
        while state.cpus[cpu].busy && !state.cpus[cpu].online {
            // Read under the mutex: whoever changes the state does so before the word changes.
            let seen = self.drained.load(Acquire);
            drop(state);
            sys::futex_wait(&self.drained, seen, None);
            state = self.lock();
        }
        self.waiting.fetch_sub(1, Relaxed);
        match state.cpus[cpu] {
            CpuState { online: true, kept: true, .. } => Err(OfflineError::LocalMaps(cpu)),
            c => Ok(!c.online),
        }
    }

    fn wake_drainers(&self) {
        // Release pairs with the Acquire in `take_offline`.
        self.drained.fetch_add(1, Release);
        sys::futex_wake(&raw const self.drained, u32::MAX);
    }
}

fn wake(word: Option<*const AtomicU32>) {
    if let Some(word) = word {
        sys::futex_wake(word, 1);
    }
}
