//! The system calls that rustix does not wrap, or not in a form that a signal handler may use.
//!
//! # Concepts
//! Interrupts of a hosted machine are signals, so most of what is here runs inside signal handlers:
//! nothing allocates, takes a lock or uses stdio. The calls go through `libc::syscall`, which sets
//! `errno`; the handlers save and restore it ([`Errno`]).
//!
//! # Locking
//! None.

use core::{ffi::c_void, mem, ptr, sync::atomic::AtomicU32};
use libc::{c_int, c_long};
use rustix::{
    io,
    mm::{self, MapFlags, MprotectFlags, ProtFlags},
};
use std::cell::{Cell, RefCell};

/// Keeps `errno` as it was found: what runs in a signal handler must not change it for the code it
/// interrupted.
pub(crate) struct Errno(c_int);

impl Errno {
    pub(crate) fn save() -> Errno {
        // SAFETY: the location is valid for the calling thread for as long as it lives.
        Errno(unsafe { *libc::__errno_location() })
    }
}

impl Drop for Errno {
    fn drop(&mut self) {
        // SAFETY: the location is valid for the calling thread for as long as it lives.
        unsafe { *libc::__errno_location() = self.0 }
    }
}

thread_local! {
    static TID: Cell<u32> = const { Cell::new(0) };
}

/// The calling thread's id; asks the kernel once per thread.
pub(crate) fn gettid() -> u32 {
    let known = TID.get();
    if known != 0 {
        return known;
    }
    let tid = rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs();
    TID.set(tid);
    tid
}

/// Sends `signo` to thread `tid` of this process. A thread that is gone is no error: what it held, it
/// gave up. The kernel's queue of real-time signals can be full; then this gives the time slice away
/// until it is not.
pub(crate) fn tgkill(tid: u32, signo: c_int) {
    let pid = rustix::process::getpid().as_raw_nonzero().get();
    // SAFETY: tgkill takes three integers and touches no memory of ours.
    while unsafe { libc::syscall(libc::SYS_tgkill, pid, tid as c_int, signo) } == -1 {
        if io::Errno::from_raw_os_error(errno()) != io::Errno::AGAIN {
            return;
        }
        rustix::thread::sched_yield();
    }
}

fn errno() -> c_int {
    // SAFETY: the location is valid for the calling thread for as long as it lives.
    unsafe { *libc::__errno_location() }
}

/// Sleeps until `word` no longer holds `expected`, a wake-up, a signal, or the time-out.
pub(crate) fn futex_wait(word: &AtomicU32, expected: u32, timeout_ns: Option<u64>) {
    let timeout = timeout_ns.map(|ns| rustix::thread::futex::Timespec {
        tv_sec: (ns / 1_000_000_000) as i64,
        tv_nsec: (ns % 1_000_000_000) as i64,
    });
    // Every outcome (woken, changed, interrupted, timed out) means the same: look again.
    let _ = rustix::thread::futex::wait(
        word,
        rustix::thread::futex::Flags::PRIVATE,
        expected,
        timeout.as_ref(),
    );
}

/// Wakes up to `count` sleepers on the word at `word`. The word may be gone already: the kernel uses
/// the address as a key only.
pub(crate) fn futex_wake(word: *const AtomicU32, count: u32) {
    const OP: c_int = libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: FUTEX_WAKE neither reads nor writes through the address; a stale one wakes nobody, or
    // somebody who looks again.
    unsafe {
        libc::syscall(libc::SYS_futex, word, OP, count.min(i32::MAX as u32) as c_int);
    }
}

/// Turns of a spin loop between two offers of the time slice to the host.
const SPINS_PER_YIELD: u32 = 64;

/// One turn of a spin loop.
#[inline]
pub(crate) fn relax() {
    thread_local! {
        static TURNS: Cell<u32> = const { Cell::new(0) };
    }
    core::hint::spin_loop();
    let turns = TURNS.get().wrapping_add(1);
    TURNS.set(turns);
    if turns.is_multiple_of(SPINS_PER_YIELD) {
        rustix::thread::sched_yield();
    }
}

/// Nanoseconds of the monotonic clock.
pub(crate) fn now_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Bytes of the host's memory.
pub(crate) fn host_memory() -> usize {
    let info = rustix::system::sysinfo();
    (info.totalram as usize).saturating_mul(info.mem_unit as usize)
}

/// CPUs of the host that this process may run on.
pub(crate) fn host_cpus() -> usize {
    rustix::thread::sched_getaffinity(None).map_or(1, |set| set.count() as usize).max(1)
}

/// A kernel timer's number, as `timer_create` gave it.
pub(crate) type TimerId = c_int;

/// Starts a periodic timer that sends `signo` to thread `tid`, with `value` in `si_value`. `None` when
/// the kernel has none to give.
pub(crate) fn timer_start(
    tid: u32,
    signo: c_int,
    value: *const c_void,
    period_ns: u64,
) -> Option<TimerId> {
    // SAFETY: sigevent is plain data for which all zeroes is a valid value.
    let mut event: libc::sigevent = unsafe { mem::zeroed() };
    event.sigev_notify = libc::SIGEV_THREAD_ID;
    event.sigev_signo = signo;
    event.sigev_value = libc::sigval { sival_ptr: value.cast_mut() };
    event.sigev_notify_thread_id = tid as c_int;
    let mut id: TimerId = 0;
    // SAFETY: `event` and `id` are valid for the call and of the types the kernel expects.
    let made = unsafe {
        libc::syscall(libc::SYS_timer_create, libc::CLOCK_MONOTONIC, &raw const event, &raw mut id)
    };
    if made == -1 {
        return None;
    }
    let period = libc::timespec {
        tv_sec: (period_ns / 1_000_000_000) as libc::time_t,
        tv_nsec: (period_ns % 1_000_000_000) as c_long,
    };
    let spec = libc::itimerspec { it_interval: period, it_value: period };
    // SAFETY: `id` is the timer just made, `spec` is valid for the call, a null old value is allowed.
    let set = unsafe {
        libc::syscall(libc::SYS_timer_settime, id, 0, &raw const spec, ptr::null::<c_void>())
    };
    if set == -1 {
        timer_delete(id);
        return None;
    }
    Some(id)
}

/// Deletes a timer. Its last signal, if queued for the calling thread, is delivered before this
/// returns.
pub(crate) fn timer_delete(id: TimerId) {
    // SAFETY: takes an integer; a wrong one is refused.
    unsafe { libc::syscall(libc::SYS_timer_delete, id) };
}

/// What a signal handler learns of a timer's signal: the value it carries and how many expirations
/// went by without a signal of their own. `None` when the signal is not a timer's.
///
/// # Safety
/// `info` is the one that the kernel gave to the handler.
pub(crate) unsafe fn timer_signal(info: *const libc::siginfo_t) -> Option<(*const c_void, u32)> {
    /// `siginfo_t` as the kernel fills it in for a POSIX timer.
    #[repr(C)]
    struct TimerInfo {
        signo: c_int,
        errno: c_int,
        code: c_int,
        _pad: c_int,
        timer: c_int,
        overrun: c_int,
        value: *mut c_void,
    }
    const { assert!(size_of::<TimerInfo>() <= size_of::<libc::siginfo_t>()) };
    // SAFETY: the kernel gave a valid siginfo_t.
    let code = unsafe { (*info).si_code };
    if code != libc::SI_TIMER {
        return None;
    }
    // SAFETY: si_code says that the timer member of the union was filled in; TimerInfo has its layout
    // and is no bigger.
    let timer = unsafe { &*info.cast::<TimerInfo>() };
    Some((timer.value, timer.overrun.unsigned_abs()))
}

/// A signal handler of the three-argument kind.
pub(crate) type Handler = extern "C" fn(c_int, *const libc::siginfo_t, *const c_void);

/// What is done at a signal now.
pub(crate) fn signal_action(signo: c_int) -> Option<libc::sigaction> {
    // SAFETY: sigaction is plain data for which all zeroes is a valid value (SIG_DFL, no flags, an empty mask).
    let mut now: libc::sigaction = unsafe { mem::zeroed() };
    // SAFETY: a null new action asks only; `now` is valid for the call.
    (unsafe { libc::sigaction(signo, ptr::null(), &raw mut now) } == 0).then_some(now)
}

/// Installs a handler, on the alternate stack, which is async-signal-safe; says whether that went well.
pub(crate) fn set_handler(signo: c_int, handler: Handler) -> bool {
    // SAFETY: as in `signal_action`.
    let mut new: libc::sigaction = unsafe { mem::zeroed() };
    new.sa_sigaction = handler as *const () as usize;
    new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the handler has the signature that SA_SIGINFO promises; a null old action is allowed.
    unsafe { libc::sigaction(signo, &raw const new, ptr::null_mut()) == 0 }
}

/// Has a signal do what it does by default. Async-signal-safe.
pub(crate) fn set_default(signo: c_int) {
    // SAFETY: as in `signal_action`; all zeroes is the default.
    unsafe {
        let new: libc::sigaction = mem::zeroed();
        libc::sigaction(signo, &raw const new, ptr::null_mut());
    }
}

/// Whether the access that faulted was a write, and the instruction's address; a read by unknown code where the
/// processor's context is not known.
///
/// # Safety
/// `context` is the one that the kernel gave to a fault's handler.
pub(crate) unsafe fn fault_access(context: *const c_void) -> (bool, usize) {
    #[cfg(target_arch = "x86_64")]
    {
        /// Bit of the page fault's error code.
        const WRITE: i64 = 1 << 1;
        // SAFETY: the caller's.
        let registers = unsafe { &(*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
        let of = |register: c_int| registers[register as usize];
        (of(libc::REG_ERR) & WRITE != 0, of(libc::REG_RIP) as usize)
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = context;
        (false, 0)
    }
}

/// Takes a real-time signal that nobody in the process handles yet, and installs `handler` for it: on
/// the alternate stack, system calls restarted, and while it runs the signal itself and `also` blocked.
/// `None` when none is left.
pub(crate) fn claim_signal(handler: Handler, also: Option<c_int>) -> Option<c_int> {
    // The lowest few are left to libraries that take theirs from the start of the range.
    for signo in libc::SIGRTMIN() + 4..=libc::SIGRTMAX() {
        // SAFETY: sigaction is plain data for which all zeroes is a valid value (SIG_DFL, no flags, an
        // empty mask).
        let mut old: libc::sigaction = unsafe { mem::zeroed() };
        // SAFETY: a null new action asks only; `old` is valid for the call.
        if unsafe { libc::sigaction(signo, ptr::null(), &raw mut old) } != 0
            || old.sa_sigaction != libc::SIG_DFL
        {
            continue;
        }
        // SAFETY: as for `old`.
        let mut new: libc::sigaction = unsafe { mem::zeroed() };
        new.sa_sigaction = handler as *const () as usize;
        new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        if let Some(also) = also {
            new.sa_mask = signal_set(&[also]);
        }
        // SAFETY: the handler has the signature that SA_SIGINFO promises and is async-signal-safe.
        if unsafe { libc::sigaction(signo, &raw const new, ptr::null_mut()) } == 0 {
            return Some(signo);
        }
    }
    None
}

fn signal_set(signals: &[c_int]) -> libc::sigset_t {
    // SAFETY: sigset_t is plain data; sigemptyset makes it valid.
    let mut set: libc::sigset_t = unsafe { mem::zeroed() };
    // SAFETY: `set` is valid for the calls; a bad signal number is refused.
    unsafe {
        libc::sigemptyset(&raw mut set);
        for &signo in signals {
            libc::sigaddset(&raw mut set, signo);
        }
    }
    set
}

/// Blocks or unblocks signals for the calling thread. Async-signal-safe.
pub(crate) fn block_signals(signals: &[c_int], block: bool) -> io::Result<()> {
    let set = signal_set(signals);
    let how = if block { libc::SIG_BLOCK } else { libc::SIG_UNBLOCK };
    // SAFETY: `set` is valid for the call; a null old set is allowed.
    match unsafe { libc::pthread_sigmask(how, &raw const set, ptr::null_mut()) } {
        0 => Ok(()),
        error => Err(io::Errno::from_raw_os_error(error)),
    }
}

/// Makes the calling thread ready to take interrupts: the two signals unblocked, an alternate stack of
/// its own installed. Cheap when it is ready already.
pub(crate) fn prepare_thread(signals: [c_int; 2]) -> io::Result<()> {
    block_signals(&signals, false)?;
    ALT_STACK
        .try_with(|stack| {
            let mut stack = stack.borrow_mut();
            if stack.is_none() {
                *stack = Some(AltStack::new()?);
            }
            stack.as_ref().map_or(Ok(()), AltStack::install)
        })
        // In thread-local destruction, after the stack's own: interrupts use the thread's stack.
        .unwrap_or(Ok(()))
}

thread_local! {
    static ALT_STACK: RefCell<Option<AltStack>> = const { RefCell::new(None) };
}

/// A thread's signal stack, with a guard page below it.
struct AltStack {
    base: *mut c_void,
    len: usize,
}

/// An interrupt's frame may hold the whole AVX-512 or AMX state (8 KiB and more). Few nest: an
/// interrupt, one that lands in its softirq, and an NMI in that; the rest is for the handlers.
const ALT_STACK_MIN: usize = 256 << 10;
/// Frames of the kernel's own minimum that the stack holds at least.
const ALT_STACK_FRAMES: usize = 16;
const GUARD: usize = 64 << 10;

impl AltStack {
    fn new() -> io::Result<AltStack> {
        // SAFETY: getauxval reads a table that the kernel filled in at exec.
        let min = unsafe { libc::getauxval(libc::AT_MINSIGSTKSZ) } as usize;
        let size = ALT_STACK_MIN.max(min * ALT_STACK_FRAMES).next_multiple_of(GUARD);
        let len = size + GUARD;
        // SAFETY: a fresh private mapping at an address of the kernel's choice.
        let base = unsafe {
            mm::mmap_anonymous(ptr::null_mut(), len, ProtFlags::empty(), MapFlags::PRIVATE)?
        };
        let stack = AltStack { base, len };
        // SAFETY: the range is the mapping just made, less its guard.
        unsafe {
            mm::mprotect(base.byte_add(GUARD), size, MprotectFlags::READ | MprotectFlags::WRITE)?;
        }
        Ok(stack)
    }

    fn as_stack(&self) -> libc::stack_t {
        libc::stack_t {
            ss_sp: self.base.wrapping_byte_add(GUARD),
            ss_flags: 0,
            ss_size: self.len - GUARD,
        }
    }

    fn installed(&self) -> bool {
        let mut now = libc::stack_t { ss_sp: ptr::null_mut(), ss_flags: 0, ss_size: 0 };
        // SAFETY: a null new stack asks only; `now` is valid for the call.
        let rc = unsafe { libc::sigaltstack(ptr::null(), &raw mut now) };
        rc == 0 && now.ss_flags & libc::SS_DISABLE == 0 && now.ss_sp == self.as_stack().ss_sp
    }

    fn install(&self) -> io::Result<()> {
        if self.installed() {
            return Ok(());
        }
        let stack = self.as_stack();
        // SAFETY: the stack is mapped until `drop`, which takes it out of use first.
        if unsafe { libc::sigaltstack(&raw const stack, ptr::null_mut()) } != 0 {
            return Err(io::Errno::from_raw_os_error(errno()));
        }
        Ok(())
    }
}

impl Drop for AltStack {
    fn drop(&mut self) {
        if self.installed() {
            let off =
                libc::stack_t { ss_sp: ptr::null_mut(), ss_flags: libc::SS_DISABLE, ss_size: 0 };
            // SAFETY: turning the alternate stack off is always allowed outside of it, and thread-local
            // destructors do not run in signal handlers.
            unsafe { libc::sigaltstack(&raw const off, ptr::null_mut()) };
        }
        // SAFETY: the mapping is this value's own, and no longer the thread's signal stack.
        let _ = unsafe { mm::munmap(self.base, self.len) };
    }
}
