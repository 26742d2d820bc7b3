//! `/proc/slabinfo`: caches of the slab layer.
//!
//! # Concepts
//! One line per cache, the youngest first, those of the layer itself included. An object counts as active
//! while it is not in its slab, in a magazine as well as in use; `objsize` is what an object takes up. There is
//! nothing to tune by hand, so the tunables are zero, as they are in Linux.
//!
//! # Locking
//! The registry's and a node's lock at a time.

use crate::{page_alloc::PageAllocator, platform::Platform, reclaim::Vmscan};
use core::fmt::{self, Write};

impl<P: Platform> PageAllocator<P, Vmscan> {
    /// Writes the text of `/proc/slabinfo`, version 2.1 \[T1\].
    ///
    /// # Errors
    /// The writer's.
    pub fn write_slabinfo(&self, w: &mut dyn Write) -> fmt::Result {
        w.write_str("slabinfo - version: 2.1\n")?;
        w.write_str(
            "# name            <active_objs> <num_objs> <objsize> <objperslab> <pagesperslab>",
        )?;
        w.write_str(" : tunables <limit> <batchcount> <sharedfactor>")?;
        w.write_str(" : slabdata <active_slabs> <num_slabs> <sharedavail>\n")?;
        let mut result = Ok(());
        self.reclaim().objects(self).info(|i| {
            let line = || {
                write!(w, "{:<17} {:>6} {:>6} ", i.name, i.active_objects, i.objects)?;
                write!(w, "{:>6} {:>4} {:>4}", i.stride, i.objects_per_slab, i.frames_per_slab)?;
                write!(w, " : tunables {:>4} {:>4} {:>4}", 0, 0, 0)?;
                writeln!(w, " : slabdata {:>6} {:>6} {:>6}", i.active_slabs, i.slabs, 0)
            };
            if result.is_ok() {
                result = { line }();
            }
        });
        result
    }
}
