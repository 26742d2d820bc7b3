//! `/proc/allocinfo`: who holds how much.
//!
//! # Concepts
//! One line per place in the source that holds objects, while allocation tags are on. The compiler tells a caller's
//! file and line, not its function, which is shown as `?`.
//!
//! # Locking
//! The tags' lock, for one line at a time.

use crate::{page_alloc::PageAllocator, platform::Platform, reclaim::Vmscan};
use core::fmt::{self, Write};

impl<P: Platform> PageAllocator<P, Vmscan> {
    /// Writes the text of `/proc/allocinfo`, version 1.0 \[T1\]: nothing but its head while tags are off.
    ///
    /// # Errors
    /// The writer's.
    ///
    /// See [allocation profiling](https://docs.kernel.org/mm/allocation-profiling.html).
    pub fn write_allocinfo(&self, w: &mut dyn Write) -> fmt::Result {
        w.write_str("allocinfo - version: 1.0\n#     <size>  <calls> <tag info>\n")?;
        let mut result = Ok(());
        self.reclaim().objects(self).each_tag(|at, bytes, objects| {
            let (file, line) = at.map_or(("?", 0), |at| (at.file(), at.line()));
            if result.is_ok() {
                result = writeln!(w, "{bytes:>12} {objects:>8} {file}:{line} func:?");
            }
        });
        result
    }
}
