//! The slot protocol under a model checker: the very code of `src/protocol.rs`, with threads and atomics
//! that shuttle schedules, and signals that land before any step of the thread they are sent to.
//!
//! Checked in every schedule: at most one thread acts as the CPU; a pending bit always has somebody who
//! will see to it; when all is over nothing is pending, and the hook saw what the last kicker wrote.

#[path = "../src/protocol.rs"]
mod protocol;

use protocol::{Env, IPI, NMI, REARM, SlotWord, TID_MAX, TIMER, Word};
use shuttle::{
    check_pct, check_random,
    rand::{Rng, thread_rng},
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread,
};
use std::{cell::RefCell, rc::Rc};

const SC: Ordering = Ordering::SeqCst;
const THREADS: usize = 5;

/// The machine with one CPU.
struct Model {
    slot: SlotWord<ModelWord>,
    /// Signals on their way to each thread.
    inbox: [AtomicBool; THREADS],
    /// Kicks that have begun, and those that have returned.
    kicking: AtomicU32,
    /// What the kickers wrote before they kicked, and what the hook saw of it.
    asked: AtomicU32,
    seen: AtomicU32,
    /// The thread that acts as the CPU; 0: none.
    actor: AtomicU32,
    /// The futex.
    sleepers: Mutex<()>,
    woken: Condvar,
}

/// One thread's side: what the slot module keeps in thread-locals and in the slot.
struct Task {
    model: Arc<Model>,
    tid: u32,
    published: std::cell::Cell<bool>,
    masked: std::cell::Cell<bool>,
    deferred: std::cell::Cell<bool>,
}

shuttle::thread_local! {
    static TASK: RefCell<Option<Rc<Task>>> = RefCell::new(None);
}

/// The host may take the processor away from a thread at any moment, for long; where that is known to
/// be awkward, the model makes it `likely`.
fn preemption_point(likely: bool) {
    if thread_rng().gen_bool(if likely { 0.5 } else { 0.1 }) {
        pass_time();
    }
}

/// Lets a signal that is on its way to this thread land, or not yet.
fn landing_point() {
    preemption_point(false);
    let task = TASK.with(|task| task.borrow().clone());
    if let Some(task) = task
        && thread_rng().gen_bool(0.5)
    {
        task.land();
    }
}

/// Time passes elsewhere, for some turns: spreads kicks over all moments of a stay and between stays.
fn pass_time() {
    for _ in 0..thread_rng().gen_range(0..40) {
        thread::yield_now();
    }
}

/// An atomic word before each access of which a signal may land.
struct ModelWord(AtomicU32);

impl Word for ModelWord {
    fn load(&self, order: Ordering) -> u32 {
        landing_point();
        self.0.load(order)
    }
    fn compare_exchange(
        &self,
        old: u32,
        new: u32,
        success: Ordering,
        failure: Ordering,
    ) -> Result<u32, u32> {
        landing_point();
        self.0.compare_exchange(old, new, success, failure)
    }
    fn fetch_or(&self, bits: u32, order: Ordering) -> u32 {
        landing_point();
        self.0.fetch_or(bits, order)
    }
    fn fetch_and(&self, bits: u32, order: Ordering) -> u32 {
        landing_point();
        self.0.fetch_and(bits, order)
    }
}

impl Task {
    fn enter(model: &Arc<Model>, tid: u32) -> Rc<Task> {
        assert!(tid <= TID_MAX);
        let task = Rc::new(Task {
            model: Arc::clone(model),
            tid,
            published: false.into(),
            masked: false.into(),
            deferred: false.into(),
        });
        TASK.with(|slot| *slot.borrow_mut() = Some(Rc::clone(&task)));
        task
    }

    /// The signal handler.
    fn land(&self) {
        if !self.model.inbox[self.tid as usize].swap(false, SC) {
            return;
        }
        if !self.published.get() || !self.model.slot.pending() {
            return;
        }
        if self.masked.get() {
            self.deferred.set(true);
        } else {
            self.act();
        }
    }

    /// Serves what is pending, as `irq::serve` does.
    fn act(&self) {
        loop {
            self.deferred.set(false);
            self.masked.set(true);
            // An NMI of its own, as its handler takes it; then the rest.
            let taken = self.model.slot.take(NMI) | self.model.slot.take_pending();
            if taken & (IPI | NMI) != 0 {
                self.as_cpu(|| self.model.seen.store(self.model.asked.load(SC), SC));
            }
            self.masked.set(false);
            if !self.deferred.get() {
                return;
            }
        }
    }

    /// Does something that only one thread at a time may do: act as the CPU.
    fn as_cpu(&self, f: impl FnOnce()) {
        let before = self.model.actor.swap(self.tid, SC);
        assert!(before == 0 || before == self.tid, "{before} and {} act as one CPU", self.tid);
        thread::yield_now();
        f();
        let after = self.model.actor.swap(before, SC);
        assert_eq!(after, self.tid, "somebody else acted as the CPU meanwhile");
    }

    /// A task's stay on the CPU.
    fn stay(&self) {
        self.model.slot.acquire(self.tid, self);
        self.as_cpu(|| {
            // A tick of the CPU's own, as its timer's signal handler raises it.
            self.model.slot.raise(TIMER);
            for _ in 0..3 {
                self.land();
                self.check_nobody_forgotten();
                thread::yield_now();
            }
        });
        self.model.slot.release(self);
    }

    /// If something is pending while no kick is under way, this thread has been signalled. The order of
    /// the looks matters: a kicker signals before its kick is over. (The CPU's own tick is taken here, as
    /// the handler that raised it would have done.)
    fn check_nobody_forgotten(&self) {
        if self.model.slot.take(TIMER | REARM) == 0
            && self.model.slot.pending()
            && self.model.kicking.load(SC) == 0
            && !self.model.inbox[self.tid as usize].load(SC)
        {
            panic!("a kick was forgotten");
        }
    }

    fn kick(&self, bits: u32) {
        self.model.kicking.fetch_add(1, SC);
        self.model.asked.fetch_add(1, SC);
        self.model.slot.kick(bits, self.tid, self);
        self.model.kicking.fetch_sub(1, SC);
    }
}

impl Env<ModelWord> for Task {
    fn publish(&self) {
        landing_point();
        self.published.set(true);
        landing_point();
    }
    fn retract(&self) {
        preemption_point(true);
        landing_point();
        self.published.set(false);
        landing_point();
    }
    fn serve(&self) {
        self.act();
    }
    fn signal(&self, tid: u32) {
        // The signal may come when its reason is long gone.
        preemption_point(true);
        self.model.inbox[tid as usize].store(true, SC);
    }
    fn wait(&self, word: &ModelWord, seen: u32) {
        let guard = self.model.sleepers.lock().unwrap();
        if word.0.load(SC) == seen {
            drop(self.model.woken.wait(guard).unwrap());
        }
    }
    fn wake(&self, _word: &ModelWord) {
        drop(self.model.sleepers.lock().unwrap());
        self.model.woken.notify_all();
    }
}

/// Tasks come and go while others kick; `queue` is the slot queue, which lets one at a time come.
fn scenario(tasks: u32, kickers: u32, stays: u32, kicks: u32) {
    let model = Arc::new(Model {
        slot: SlotWord::new(ModelWord(AtomicU32::new(0))),
        inbox: [const { AtomicBool::new(false) }; THREADS],
        kicking: AtomicU32::new(0),
        asked: AtomicU32::new(0),
        seen: AtomicU32::new(0),
        actor: AtomicU32::new(0),
        sleepers: Mutex::new(()),
        woken: Condvar::new(),
    });
    let queue = Arc::new(Mutex::new(()));
    let mut threads = Vec::new();
    for tid in 1..=tasks {
        let (model, queue) = (Arc::clone(&model), Arc::clone(&queue));
        threads.push(thread::spawn(move || {
            let task = Task::enter(&model, tid);
            for _ in 0..stays {
                pass_time();
                let turn = queue.lock().unwrap();
                task.stay();
                drop(turn);
            }
        }));
    }
    for tid in tasks + 1..=tasks + kickers {
        let model = Arc::clone(&model);
        threads.push(thread::spawn(move || {
            let task = Task::enter(&model, tid);
            for kick in 0..kicks {
                pass_time();
                task.kick(if kick % 2 == 0 { IPI } else { NMI });
            }
        }));
    }
    for thread in threads {
        thread.join().unwrap();
    }
    assert!(!model.slot.is_held(), "everybody has left");
    assert!(!model.slot.pending(), "something is pending on a free slot");
    assert_eq!(model.seen.load(SC), model.asked.load(SC), "the hook missed a kick");
}

#[test]
fn random_schedules() {
    check_random(|| scenario(2, 2, 2, 4), 5000);
}

#[test]
fn priority_schedules() {
    check_pct(|| scenario(2, 2, 2, 2), 2000, 3);
}

#[test]
fn one_task_and_one_kicker() {
    check_random(|| scenario(1, 1, 2, 2), 2000);
}
