//! A forked child: one thread, memory of its own, so that what disturbs others can be tried there.
//!
//! Its threads are the C library's: std's take locks that another thread of the parent may have held at the fork.

/// Says what went wrong, without the locks of stdio, which somebody may have held at the fork.
pub fn complain(text: &str) {
    // SAFETY: standard error, and so many bytes.
    unsafe { libc::write(2, text.as_ptr().cast(), text.len()) };
}

/// Forks; `f` says in the child what is wrong, if anything. Returns the child.
pub fn start(f: impl FnOnce() -> Result<(), String>) -> libc::pid_t {
    // SAFETY: the child does what `f` does and ends; memory is kmem's, which copes with forks, and the C library's,
    // which does too.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0, "no fork");
    if pid != 0 {
        return pid;
    }
    // SAFETY: plain calls; a child that hangs is ended.
    unsafe { libc::alarm(60) };
    let code = match f() {
        Ok(()) => 0,
        Err(text) => {
            complain(&format!("child: {text}\n"));
            1
        }
    };
    // SAFETY: ends the process.
    unsafe { libc::_exit(code) }
}

/// Waits for a child, which must have found nothing wrong.
#[track_caller]
pub fn join(pid: libc::pid_t) {
    let mut status = 0;
    // SAFETY: the child's number, and a place for its status.
    while unsafe { libc::waitpid(pid, &raw mut status, 0) } == -1 {}
    assert_eq!(status, 0, "the child failed (wait status {status:#x})");
}

/// Forks and waits.
#[track_caller]
pub fn run(f: impl FnOnce() -> Result<(), String>) {
    join(start(f));
}

/// An error unless a condition holds.
pub fn check(holds: bool, text: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(text()) }
}

/// Audits the machine, which must be quiet: every object and frame is where it should be.
pub fn audit() -> Result<(u64, u64), String> {
    crate::HEAP
        .with(|kmem| {
            let objects = kmem.audit_objects().map_err(|e| format!("objects: {e:?}"))?;
            let frames = kmem.audit().map_err(|e| format!("frames: {e:?}"))?;
            Ok((objects.live, frames.free))
        })
        .unwrap_or(Err("no machine".into()))
}

/// Threads of a child.
pub struct Threads(Vec<libc::pthread_t>);

impl Threads {
    /// Starts `count` threads.
    pub fn start<F: Fn(u64) + Copy + Send + 'static>(count: u64, f: F) -> Threads {
        extern "C" fn run<F: Fn(u64)>(at: *mut libc::c_void) -> *mut libc::c_void {
            // SAFETY: the box that `start` gave away.
            let (f, n) = *unsafe { Box::from_raw(at.cast::<(F, u64)>()) };
            f(n);
            std::ptr::null_mut()
        }
        let start = |n| {
            let mut thread = 0;
            let at = Box::into_raw(Box::new((f, n))).cast();
            // SAFETY: a place for the thread, a function, and a box that it takes.
            let rc =
                unsafe { libc::pthread_create(&raw mut thread, std::ptr::null(), run::<F>, at) };
            assert_eq!(rc, 0, "no thread");
            thread
        };
        Threads((0..count).map(start).collect())
    }

    /// Waits for them.
    pub fn join(self) {
        for thread in self.0 {
            // SAFETY: joined once.
            unsafe { libc::pthread_join(thread, std::ptr::null_mut()) };
        }
    }
}
