//! `/proc/allocinfo`: who holds how much.
//!
//! # Concepts
//! One line per place in the source that holds objects, while allocation tags are on; and, where owners of pages are
//! noted too ([`Config::page_owner`](crate::Config::page_owner)), one per place that holds blocks of pages. As in Linux
//! pages of slabs are the slab layer's own, whoever holds the objects in them. A large kmalloc is an object,
//! and no block of pages beside. The compiler tells a caller's file and line, not its function, which is shown as `?`.
//!
//! # Locking
//! The tags' lock, for one line about objects at a time.

use crate::{page_alloc::PageAllocator, platform::Platform, reclaim::Vmscan};
use core::{
    fmt::{self, Write},
    panic::Location,
};

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
        let mut line = |at: Option<&Location<'_>>, bytes, calls| {
            let (file, line) = at.map_or(("?", 0), |at| (at.file(), at.line()));
            if result.is_ok() {
                result = writeln!(w, "{bytes:>12} {calls:>8} {file}:{line} func:?");
            }
        };
        let objects = self.reclaim().objects(self);
        if objects.tagging() {
            objects.each_tag(&mut line);
            self.each_page_tag(|pfn| !objects.is_large(pfn), &mut line);
        }
        result
    }
}
