//! `/proc/pagetypeinfo`: free blocks by mobility, and pageblocks by mobility.
//!
//! # Concepts
//! For each node that has memory the size of a pageblock, a table of free blocks by zone, mobility and order, and
//! a table of pageblocks by zone and mobility. Linux stops counting a list at 100000 blocks and
//! writes `>100000`, because it walks the list; here nothing is walked, and every number is exact.
//!
//! # Locking
//! An area's lock for a region at a time.

use crate::{
    page_alloc::{PageAllocator, Reclaim},
    platform::Platform,
    types::{MigrateType, PAGEBLOCK_FRAMES, PAGEBLOCK_ORDER},
    zone::Zone,
};
use core::fmt::{self, Write};

impl<P: Platform, R: Reclaim> PageAllocator<P, R> {
    /// Writes the text of `/proc/pagetypeinfo` \[T1, P2\].
    ///
    /// # Errors
    /// The writer's.
    pub fn write_pagetypeinfo(&self, w: &mut dyn Write) -> fmt::Result {
        for node in 0..self.nr_nodes() {
            let zones = || self.zones().iter().filter(move |z| z.node() == node);
            if zones().next().is_none() {
                continue;
            }
            writeln!(w, "Page block order: {PAGEBLOCK_ORDER}")?;
            writeln!(w, "Pages per block:  {PAGEBLOCK_FRAMES}\n")?;
            write!(w, "{:<43} ", "Free pages count per migrate type at order")?;
            for order in 0..=self.max_order() {
                write!(w, "{order:6} ")?;
            }
            writeln!(w)?;
            for zone in zones() {
                self.write_free_by_type(w, zone)?;
            }
            write!(w, "\n{:<23}", "Number of blocks type ")?;
            for mt in MigrateType::ALL {
                write!(w, "{:>12} ", mt.name())?;
            }
            writeln!(w)?;
            for zone in zones() {
                write!(w, "Node {node}, zone {:>8} ", zone.name())?;
                for n in self.pageblocks_by_migratetype(zone) {
                    write!(w, "{n:12} ")?;
                }
                writeln!(w)?;
            }
        }
        Ok(())
    }

    fn write_free_by_type(&self, w: &mut dyn Write, zone: &Zone) -> fmt::Result {
        let (node, name) = (zone.node(), zone.name());
        for (mt, counts) in MigrateType::ALL.into_iter().zip(self.free_by_migratetype(zone)) {
            write!(w, "Node {node:4}, zone {name:>8}, type {:>12} ", mt.name())?;
            for n in counts.iter().take(self.max_order() as usize + 1) {
                write!(w, "{n:6} ")?;
            }
            writeln!(w)?;
        }
        Ok(())
    }
}
