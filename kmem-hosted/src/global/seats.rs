//! Seats: which thread is which CPU of the global machine.
//!
//! # Concepts
//! The first [`SHARED`] seats are held for the length of one call, by threads that have none of their own; each
//! other is one thread's from its first call to its end. Both are one word, *taken* or not. A seat's lists and
//! magazines stay with it: the next thread goes on with what the last one left, and the lowest free seat goes
//! first, so that what lies on seats stays little.
//!
//! # Implementation
//! The thread's own seat and the seat it is on, which it is during calls only, are thread-local pointers that need
//! neither set-up nor destruction, so they are there for the whole of a thread's life. The end of the thread is told by the destructor of a pthread key, which the C library
//! calls after those of Rust's thread-locals; what other keys' destructors allocate then comes by a shared seat.
//!
//! `inside` counts calls of the seat's thread: a fork, or whoever wants all stopped, waits until it is zero
//! ([`gate`]). A call within a call, which [`KmemGlobal::with`](super::KmemGlobal::with) allows, passes a gate that
//! waits for the outer one.
//!
//! # Locking
//! A seat's `taken` word: a spin lock for shared seats, with the time slice offered between rounds; never waited
//! for otherwise.

use super::{bringup, gate};
use crate::sys;
use core::{
    cell::Cell,
    ffi::c_void,
    mem::{self, MaybeUninit},
    ptr,
    sync::atomic::{
        AtomicBool, AtomicU32, AtomicUsize,
        Ordering::{Acquire, Relaxed, Release, SeqCst},
        compiler_fence, fence,
    },
};
use kmem::context::Cpu;

/// Seats that are held for the length of a call.
const SHARED: usize = 4;
/// Seats a machine has at most.
const MOST: usize = 64;
/// Seats of their own for threads, for each CPU of the host.
const PER_HOST_CPU: usize = 8;

/// One CPU of the global machine.
#[repr(C, align(128))]
pub(super) struct Seat {
    pub(super) cpu: Cpu,
    /// Calls that the seat's thread is in. Written by that thread only.
    inside: AtomicU32,
    taken: AtomicBool,
}

impl Seat {
    const fn new(id: usize) -> Seat {
        Seat {
            cpu: Cpu::new(id as u32, 0),
            inside: AtomicU32::new(0),
            taken: AtomicBool::new(false),
        }
    }

    pub(super) fn take(&self) -> bool {
        // Acquire pairs with the Release in `free`: what the last thread left is seen.
        !self.taken.load(Relaxed)
            && self.taken.compare_exchange(false, true, Acquire, Relaxed).is_ok()
    }

    pub(super) fn free(&self) {
        // Release pairs with the Acquire in `take`.
        self.taken.store(false, Release);
    }

    fn put_online(&self) {
        if let Some(kmem) = bringup::machine()
            && !self.cpu.online()
        {
            kmem.cpu_online(self.cpu.id());
        }
    }

    /// Whether the seat's thread is in a call.
    pub(super) fn is_inside(&self) -> bool {
        // Acquire pairs with the Release in the stays' drops: what the thread did is seen.
        self.inside.load(Acquire) != 0
    }
}

static SEATS: [Seat; MOST] = {
    let mut all = [const { MaybeUninit::<Seat>::uninit() }; MOST];
    let mut id = 0;
    while id < MOST {
        all[id] = MaybeUninit::new(Seat::new(id));
        id += 1;
    }
    // SAFETY: every element was written.
    unsafe { mem::transmute::<[MaybeUninit<Seat>; MOST], [Seat; MOST]>(all) }
};
static COUNT: AtomicUsize = AtomicUsize::new(0);
/// The pthread key whose destructor tells the end of a thread.
static KEY: AtomicU32 = AtomicU32::new(0);

thread_local! {
    /// The thread's own seat, or null.
    static OWN: Cell<*const Seat> = const { Cell::new(ptr::null()) };
    /// The seat that the thread is on, or null: outside of calls it is on none, so that whoever closed the gate may
    /// pose as it.
    static CURRENT: Cell<*const Seat> = const { Cell::new(ptr::null()) };
    /// Whether the thread has given its seat up at its end.
    static ENDED: Cell<bool> = const { Cell::new(false) };
}

/// Decides how many seats there are and makes the key. At bring-up.
pub(super) fn prepare() -> Option<()> {
    let count = SHARED.saturating_add(sys::host_cpus().saturating_mul(PER_HOST_CPU)).min(MOST);
    COUNT.store(count, Relaxed);
    let mut key = 0;
    // SAFETY: `key` is valid for the call; the destructor is a function for the whole of the program.
    if unsafe { libc::pthread_key_create(&raw mut key, Some(end_of_thread)) } != 0 {
        return None;
    }
    KEY.store(key, Relaxed);
    Some(())
}

/// Number of seats.
pub(super) fn count() -> usize {
    COUNT.load(Relaxed)
}

/// Seat number `id`.
pub(super) fn get(id: usize) -> Option<&'static Seat> {
    SEATS.get(id).filter(|_| id < count())
}

/// All seats.
pub(super) fn all() -> &'static [Seat] {
    &SEATS[..count().min(MOST)]
}

/// The seat that the thread is on.
#[inline(always)]
pub(super) fn current() -> Option<&'static Seat> {
    // SAFETY: null or a seat, which is a static.
    unsafe { CURRENT.get().as_ref() }
}

/// A value that no other living thread has.
pub(super) fn thread() -> usize {
    CURRENT.with(|current| ptr::from_ref(current).addr())
}

/// A thread's plain stay on its own seat: a call that is in no other, while the gate is open.
pub(super) struct Stay {
    seat: &'static Seat,
}

/// Comes to the machine the plain way, if that is open to the caller.
#[inline(always)]
pub(super) fn enter() -> Option<Stay> {
    // SAFETY: null or a seat, which is a static.
    let seat = unsafe { OWN.get().as_ref() }?;
    if !CURRENT.get().is_null() {
        return None;
    }
    // Plain stores: counting up and down would make each call wait for the one before.
    seat.inside.store(1, Relaxed);
    CURRENT.set(seat);
    let stay = Stay { seat };
    // What follows is not moved before the count.
    compiler_fence(SeqCst);
    gate::is_open().then_some(stay)
}

impl Drop for Stay {
    #[inline(always)]
    fn drop(&mut self) {
        CURRENT.set(ptr::null());
        // Release pairs with the Acquire in `is_inside`.
        self.seat.inside.store(0, Release);
    }
}

/// Any stay: on a seat of one's own or a shared one, also in a call within a call.
pub(super) struct AnyStay {
    seat: &'static Seat,
}

impl AnyStay {
    fn new(seat: &'static Seat) -> AnyStay {
        seat.inside.store(seat.inside.load(Relaxed) + 1, Relaxed);
        CURRENT.set(seat);
        AnyStay { seat }
    }
}

impl Drop for AnyStay {
    fn drop(&mut self) {
        let left = self.seat.inside.load(Relaxed) - 1;
        if left == 0 {
            CURRENT.set(ptr::null());
        }
        // Release pairs with the Acquire in `is_inside`.
        self.seat.inside.store(left, Release);
        if left == 0 && self.seat.cpu.id() < SHARED {
            self.seat.free();
        }
    }
}

/// Counts a call that waits out of its seat, until this is dropped. The seat stays the thread's.
pub(super) struct Out {
    seat: &'static Seat,
    calls: u32,
}

impl Out {
    pub(super) fn new(seat: &'static Seat) -> Out {
        // Release as in `AnyStay::drop`.
        Out { seat, calls: seat.inside.swap(0, Release) }
    }
}

impl Drop for Out {
    fn drop(&mut self) {
        self.seat.inside.store(self.calls, SeqCst);
    }
}

/// Comes to the machine; brings it up if it is not; `None` if there is none.
#[cold]
pub(super) fn enter_any(memory: usize) -> Option<AnyStay> {
    if !bringup::ensure(memory) {
        return None;
    }
    loop {
        // SAFETY: null or a seat, which is a static.
        let own = current().or(unsafe { OWN.get().as_ref() });
        let stay = AnyStay::new(own.or_else(take_own).unwrap_or_else(share));
        // Either whoever closes the gate sees the count, or the gate is seen closed here.
        fence(SeqCst);
        if stay.seat.inside.load(Relaxed) > 1 || gate::lets_in() {
            return Some(stay);
        }
        drop(stay);
        gate::wait();
    }
}

/// A seat for the rest of the thread's life, if there is one.
fn take_own() -> Option<&'static Seat> {
    if ENDED.get() {
        return None;
    }
    let seat = all().iter().skip(SHARED).find(|seat| seat.take())?;
    // SAFETY: the key was made at bring-up; the value is for `end_of_thread`.
    let told = unsafe { libc::pthread_setspecific(KEY.load(Relaxed), ptr::from_ref(seat).cast()) };
    if told != 0 {
        seat.free();
        return None;
    }
    seat.put_online();
    OWN.set(seat);
    Some(seat)
}

/// A seat for a call.
fn share() -> &'static Seat {
    let first = thread() >> 12;
    loop {
        for i in 0..SHARED {
            let seat = &SEATS[first.wrapping_add(i) % SHARED];
            if seat.take() {
                seat.put_online();
                return seat;
            }
        }
        sys::relax();
    }
}

/// The pthread key's destructor: the thread is over but for the destructors of other keys.
extern "C" fn end_of_thread(seat: *mut c_void) {
    ENDED.set(true);
    OWN.set(ptr::null());
    // SAFETY: the value that `take_own` set: a seat, which is a static.
    if let Some(seat) = unsafe { seat.cast::<Seat>().as_ref() } {
        seat.free();
    }
}

/// Serves as a CPU what others asked of it, unless its thread stays in a call.
pub(super) fn pose(cpu: usize) {
    let (Some(seat), Some(kmem)) = (get(cpu), bringup::machine()) else { return };
    let before = CURRENT.get();
    if ptr::eq(before, seat) {
        return kmem.handle_ipi();
    }
    gate::beside(seat, || {
        CURRENT.set(seat);
        kmem.handle_ipi();
        CURRENT.set(before);
    });
}

/// Frees the seats of the threads that a forked child does not have. A thread may have been about to see that the
/// gate is closed, and left its count behind.
pub(super) fn forget_other_threads() {
    let (own, current) = (OWN.get(), CURRENT.get());
    for seat in all().iter().filter(|seat| !ptr::eq(*seat, own) && !ptr::eq(*seat, current)) {
        seat.inside.store(0, Relaxed);
        seat.free();
    }
}
