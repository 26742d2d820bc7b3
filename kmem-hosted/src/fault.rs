//! Page faults: SIGSEGV for an address of a machine's that is not there \[D2\].
//!
//! # Concepts
//! An access to a page that a machine took out of its direct map (see [`kmem::kfence`]) is a signal to the thread that
//! made it. The handler asks the machine whose address it is; that reports the mistake and opens the page, and the
//! access is made once more. Any other fault goes to the handler that was installed before, or has its usual end.
//!
//! # Implementation
//! One handler for the process, installed with the first machine that wants it and kept. Machines are in a table of
//! fixed size. Everything reached from the handler is async-signal-safe. It runs on the thread's alternate stack, which
//! is large enough on threads that are on a machine; the one that Rust's library gives to other threads may be too small
//! for a report.
//!
//! # Locking
//! None. An entry of the table counts the handlers that look at its machine, and is emptied only when there are none:
//! the handler counts itself in before it reads the machine, who takes it out empties the entry before the look at
//! the count (both sequentially consistent, so one of them sees the other).

use crate::{hosted::Hosted, sys};
use core::{
    ffi::{c_int, c_void},
    mem, ptr,
    sync::atomic::{
        AtomicPtr, AtomicUsize,
        Ordering::{Acquire, SeqCst},
    },
};
use kmem::Kmem;
use std::sync::{Arc, OnceLock};

/// Machines whose faults are looked at.
const MACHINES: usize = 256;

struct Entry {
    kmem: AtomicPtr<Kmem<Hosted>>,
    /// Handlers that may be looking at it.
    visitors: AtomicUsize,
}

static TABLE: [Entry; MACHINES] =
    [const { Entry { kmem: AtomicPtr::new(ptr::null_mut()), visitors: AtomicUsize::new(0) } };
        MACHINES];

/// What handled faults before.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

/// A machine's place in the table; it leaves it when this is dropped.
pub(crate) struct Watch {
    entry: &'static Entry,
    /// Keeps the machine, to which the entry points.
    _kmem: Arc<Kmem<Hosted>>,
}

/// Has faults of a machine's direct map looked at; `None` if the table is full, or there can be no handler.
pub(crate) fn watch(kmem: &Arc<Kmem<Hosted>>) -> Option<Watch> {
    install()?;
    let at = Arc::as_ptr(kmem).cast_mut();
    let free = |e: &&Entry| e.kmem.compare_exchange(ptr::null_mut(), at, SeqCst, SeqCst).is_ok();
    let entry = TABLE.iter().find(free)?;
    Some(Watch { entry, _kmem: kmem.clone() })
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.entry.kmem.store(ptr::null_mut(), SeqCst);
        while self.entry.visitors.load(SeqCst) != 0 {
            sys::relax();
        }
    }
}

/// Installs the handler, once.
fn install() -> Option<()> {
    static DONE: OnceLock<bool> = OnceLock::new();
    let done = *DONE.get_or_init(|| {
        let Some(before) = sys::signal_action(libc::SIGSEGV) else { return false };
        // Before the handler can run, which reads it.
        BEFORE.set(before).is_ok() && sys::set_handler(libc::SIGSEGV, on_fault)
    });
    done.then_some(())
}

extern "C" fn on_fault(signo: c_int, info: *const libc::siginfo_t, context: *const c_void) {
    let _errno = sys::Errno::save();
    // SAFETY: the kernel called this handler with this `info` and, since it is a fault, an address in it;
    // for a SIGSEGV that somebody sent it is something else, which is no machine's address, or does no harm.
    let (addr, sent) = unsafe { ((*info).si_addr().addr(), (*info).si_code <= 0) };
    if sent || !TABLE.iter().any(|entry| handled(entry, addr, context)) {
        forward(signo, sent, info, context);
    }
}

/// Whether an entry's machine says that the access may go on.
fn handled(entry: &Entry, addr: usize, context: *const c_void) -> bool {
    // Most entries are nobody's. Acquire pairs with the SeqCst in `watch`.
    if entry.kmem.load(Acquire).is_null() {
        return false;
    }
    entry.visitors.fetch_add(1, SeqCst);
    // SAFETY: null, or a machine that stays while there are visitors.
    let kmem = unsafe { entry.kmem.load(SeqCst).as_ref() };
    let handled = kmem.is_some_and(|kmem| {
        // SAFETY: the context that the kernel gave to the handler.
        let (is_write, ip) = unsafe { sys::fault_access(context) };
        kmem.kfence_handle_page_fault(addr, is_write, ip)
    });
    entry.visitors.fetch_sub(1, SeqCst);
    handled
}

/// Leaves a fault to what handled it before.
fn forward(signo: c_int, sent: bool, info: *const libc::siginfo_t, context: *const c_void) {
    let Some(before) = BEFORE.get() else { return };
    let handler = before.sa_sigaction;
    if sent && handler == libc::SIG_IGN {
        return;
    }
    if handler == libc::SIG_DFL || handler == libc::SIG_IGN {
        // The access is made again, and this time ends the process; so does a signal that was sent, sent again.
        sys::set_default(signo);
        if sent {
            sys::tgkill(sys::gettid(), signo);
        }
    } else if before.sa_flags & libc::SA_SIGINFO != 0 {
        // SAFETY: installed with SA_SIGINFO, so it is a function of this kind, called as the kernel would.
        let handler: sys::Handler = unsafe { mem::transmute(handler) };
        handler(signo, info, context);
    } else {
        // SAFETY: installed without SA_SIGINFO, so it is a function of this kind.
        let handler: extern "C" fn(c_int) = unsafe { mem::transmute(handler) };
        handler(signo);
    }
}
