//! Reports: from any context to standard error, or to a sink.
//!
//! # Concepts
//! The core reports from interrupt handlers too, so a report is formatted into a buffer on the stack
//! and written with one system call; what does not fit is cut off. An embedder can put a sink of its
//! own in place, once. [`ReportLog`] is a sink that keeps what it is told, for tests and tools.
//!
//! # Implementation
//! The log is a fixed number of entries. A reporter claims one by counting up, fills it in, and marks it
//! complete; nobody waits for anybody, so an interrupt may report in the middle of a report.
//!
//! # Locking
//! None.

use core::{
    fmt::{self, Write},
    mem,
    sync::atomic::{
        AtomicU8, AtomicUsize,
        Ordering::{Acquire, Relaxed, Release},
    },
};
use kmem::platform::Level;
use std::{
    panic::{self, AssertUnwindSafe},
    sync::{Arc, OnceLock},
};

/// Bytes of a report that are kept.
pub const REPORT_MAX: usize = 1008;

/// What a sink is called with; it runs in any context, interrupts included, and must be
/// async-signal-safe. A panic of its goes no further than the sink: whoever reported may be in the middle of things.
pub type Sink = dyn Fn(Level, &str) + Send + Sync;

/// Where a machine's reports go.
pub(crate) struct Reports {
    sink: OnceLock<Arc<Sink>>,
}

impl Reports {
    pub(crate) const fn new() -> Reports {
        Reports { sink: OnceLock::new() }
    }

    /// Puts a sink in place; `false` if there is one already.
    pub(crate) fn set(&self, sink: Arc<Sink>) -> bool {
        self.sink.set(sink).is_ok()
    }

    pub(crate) fn report(&self, level: Level, message: fmt::Arguments<'_>) {
        match self.sink.get() {
            Some(sink) => {
                let mut line = Line::new();
                // As in `print`.
                let _ = line.write_fmt(message);
                let call = AssertUnwindSafe(|| sink(level, line.as_str()));
                if let Err(panic) = panic::catch_unwind(call) {
                    // To drop it could panic once more.
                    mem::forget(panic);
                    print(
                        Level::Bug,
                        format_args!("the report sink panicked at: {}", line.as_str()),
                    );
                }
            }
            None => print(level, message),
        }
    }
}

/// Writes a report to standard error.
pub(crate) fn print(level: Level, message: fmt::Arguments<'_>) {
    let mut line = Line::new();
    // Writing to a Line never fails; a Display that does leaves what it wrote before.
    let _ = write!(line, "{}{message}", prefix(level));
    line.end();
    write_stderr(line.as_str().as_bytes());
}

const fn prefix(level: Level) -> &'static str {
    match level {
        Level::Bug => "BUG: ",
        Level::Warning => "WARNING: ",
        Level::Info => "",
    }
}

fn write_stderr(mut bytes: &[u8]) {
    while !bytes.is_empty() {
        // SAFETY: standard error's descriptor; if the process has closed it, the write fails.
        let stderr = unsafe { rustix::fd::BorrowedFd::borrow_raw(libc::STDERR_FILENO) };
        match rustix::io::write(stderr, bytes) {
            Ok(n) => bytes = bytes.get(n..).unwrap_or(&[]),
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return,
        }
    }
}

/// A report being formatted.
struct Line {
    /// One byte more than a report, for the end of the line.
    bytes: [u8; REPORT_MAX + 1],
    len: usize,
}

impl Line {
    const fn new() -> Line {
        Line { bytes: [0; REPORT_MAX + 1], len: 0 }
    }

    /// Ends the line; nothing is written after it.
    fn end(&mut self) {
        self.bytes[self.len] = b'\n';
        self.len += 1;
    }

    fn as_str(&self) -> &str {
        // Whole characters only are put in, so this never fails.
        core::str::from_utf8(&self.bytes[..self.len]).unwrap_or("")
    }
}

impl Write for Line {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        let room = REPORT_MAX - self.len;
        let take = s.floor_char_boundary(room);
        self.bytes[self.len..self.len + take].copy_from_slice(&s.as_bytes()[..take]);
        self.len += take;
        Ok(())
    }
}

/// Reports that a [`ReportLog`] keeps.
const LOG_ENTRIES: usize = 128;

const EMPTY: u8 = 0;

struct Entry {
    /// EMPTY, or a level's code once the entry is complete.
    state: AtomicU8,
    len: AtomicUsize,
    bytes: [AtomicU8; REPORT_MAX],
}

/// Keeps the first reports of a machine; usable from any context.
pub struct ReportLog {
    entries: Box<[Entry]>,
    next: AtomicUsize,
}

impl Default for ReportLog {
    fn default() -> Self {
        ReportLog::new()
    }
}

impl ReportLog {
    /// An empty log.
    pub fn new() -> ReportLog {
        let entry = || Entry {
            state: AtomicU8::new(EMPTY),
            len: AtomicUsize::new(0),
            bytes: [const { AtomicU8::new(0) }; REPORT_MAX],
        };
        ReportLog {
            entries: (0..LOG_ENTRIES).map(|_| entry()).collect(),
            next: AtomicUsize::new(0),
        }
    }

    /// Keeps a report, if there is room.
    pub fn push(&self, level: Level, message: &str) {
        let Some(entry) = self.entries.get(self.next.fetch_add(1, Relaxed)) else { return };
        let len = message.floor_char_boundary(REPORT_MAX);
        for (to, &from) in entry.bytes.iter().zip(&message.as_bytes()[..len]) {
            to.store(from, Relaxed);
        }
        entry.len.store(len, Relaxed);
        // Release pairs with the Acquire in `since`: who sees the level sees the text.
        entry.state.store(code(level), Release);
    }

    /// Reports so far, those that found no room included.
    pub fn count(&self) -> usize {
        self.next.load(Relaxed)
    }

    /// Reports that found no room.
    pub fn lost(&self) -> usize {
        self.count().saturating_sub(self.entries.len())
    }

    /// The reports from number `mark` on, a former [`ReportLog::count`]; those still being written are
    /// left out.
    pub fn since(&self, mark: usize) -> Vec<(Level, String)> {
        let entries = self.entries.iter().take(self.count()).skip(mark);
        entries
            .filter_map(|entry| {
                // Acquire pairs with the Release in `push`.
                let level = level_of(entry.state.load(Acquire))?;
                let len = entry.len.load(Relaxed);
                let bytes = entry.bytes[..len].iter().map(|b| b.load(Relaxed)).collect();
                Some((level, String::from_utf8(bytes).ok()?))
            })
            .collect()
    }

    /// All reports kept.
    pub fn all(&self) -> Vec<(Level, String)> {
        self.since(0)
    }
}

const fn code(level: Level) -> u8 {
    match level {
        Level::Bug => 1,
        Level::Warning => 2,
        Level::Info => 3,
    }
}

const fn level_of(code: u8) -> Option<Level> {
    match code {
        1 => Some(Level::Bug),
        2 => Some(Level::Warning),
        3 => Some(Level::Info),
        _ => None,
    }
}
