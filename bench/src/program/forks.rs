//! Forks from a process whose threads allocate; the children allocate too.
//!
//! # Concepts
//! A child has memory and locks as they were at the fork: an allocator that does not see to it leaves it with locks
//! that nobody will open. A child that hangs is ended by its alarm, and the run fails.
//!
//! # Locking
//! None.

use super::{NOTHING, digest, parser};
use anyhow::{Result, anyhow, bail, ensure};
use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    thread,
};

/// Children at a time, and generations of them per unit of scale.
const CHILDREN: usize = 4;
const GENERATIONS: u64 = 3;
/// Files that a child parses.
const FILES: usize = 30;
/// Seconds a child may take.
const PATIENCE: u32 = 60;

/// Forks a child that parses; it ends with success if the result is the `expected` one.
fn start(sources: &[String], expected: u64) -> Result<libc::pid_t> {
    // SAFETY: the child calls nothing but the parser, which needs memory and no lock that another thread may have
    // held, and ends without running anything else.
    match unsafe { libc::fork() } {
        -1 => bail!("cannot fork: {}", std::io::Error::last_os_error()),
        0 => {
            // SAFETY: plain calls; the second ends the process.
            unsafe { libc::alarm(PATIENCE) };
            let right = parser::parse(sources).is_ok_and(|result| result == expected);
            // SAFETY: as above.
            unsafe { libc::_exit(i32::from(!right)) }
        }
        pid => Ok(pid),
    }
}

fn join(pid: libc::pid_t) -> Result<()> {
    let mut status = 0;
    // SAFETY: the number of a child that was not waited for yet, and a place for its status.
    while unsafe { libc::waitpid(pid, &raw mut status, 0) } == -1 {
        let error = std::io::Error::last_os_error();
        ensure!(error.kind() == std::io::ErrorKind::Interrupted, "cannot wait: {error}");
    }
    ensure!(status == 0, "a forked child failed (wait status {status:#x})");
    Ok(())
}

/// Forks generations of children beside threads that parse, and returns the digest of what all of them found.
pub(super) fn run(threads: usize, scale: u64) -> Result<u64> {
    let sources = parser::sources()?;
    let few = &sources[..FILES.min(sources.len())];
    let expected = parser::parse(few)?;
    let (stop, wrong) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while !stop.load(Relaxed) {
                    let right = parser::parse(few).is_ok_and(|result| result == expected);
                    wrong.fetch_add(u64::from(!right), Relaxed);
                }
            });
        }
        let result = (0..GENERATIONS * scale).try_for_each(|_| {
            let children: Vec<_> =
                (0..CHILDREN).map(|_| start(few, expected)).collect::<Result<_>>()?;
            children.into_iter().try_for_each(join)
        });
        stop.store(true, Relaxed);
        result
    })?;
    if wrong.load(Relaxed) != 0 {
        return Err(anyhow!("threads found something else"));
    }
    Ok(digest(NOTHING, &expected.to_le_bytes()))
}
