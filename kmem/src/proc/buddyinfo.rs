//! `/proc/buddyinfo`: free blocks by zone and order.
//!
//! # Concepts
//! One line per populated zone, one column per order. A block counts at the order up to which it is
//! merged.
//!
//! # Locking
//! An area's lock for a region at a time: what moves meanwhile from one region to another may count twice, or not at all.

use crate::{
    page_alloc::{PageAllocator, Reclaim},
    platform::Platform,
};
use core::fmt::{self, Write};

impl<P: Platform, R: Reclaim> PageAllocator<P, R> {
    /// Writes the text of `/proc/buddyinfo` \[T1\].
    ///
    /// # Errors
    /// The writer's.
    pub fn write_buddyinfo(&self, w: &mut dyn Write) -> fmt::Result {
        for zone in self.zones() {
            write!(w, "Node {}, zone {:>8} ", zone.node(), zone.name())?;
            for n in self.nr_free(zone).iter().take(self.max_order() as usize + 1) {
                write!(w, "{n:6} ")?;
            }
            writeln!(w)?;
        }
        Ok(())
    }
}
