//! `/proc/vmallocinfo`: the areas of the vmalloc range.
//!
//! # Concepts
//! One line per area, by address, its guard included; behind them those that were freed and wait for a purge.
//! The caller is shown as file and line.
//!
//! # Locking
//! The tree's for one area, or for a few of its frames, at a time.

use crate::{
    page_alloc::PageAllocator,
    platform::Platform,
    reclaim::Vmscan,
    types::MAX_NODES,
    vmalloc::{At, VmAreaInfo, VmFlags},
};
use core::fmt::{self, Write};

/// What a line says of an area's flags, in the kernel's order.
const WORDS: [(VmFlags, &str); 5] = [
    (VmFlags::IOREMAP, " ioremap"),
    (VmFlags::SPARSE, " sparse"),
    (VmFlags::ALLOC, " vmalloc"),
    (VmFlags::MAP, " vmap"),
    (VmFlags::USERMAP, " user"),
];

impl<P: Platform> PageAllocator<P, Vmscan> {
    /// Writes the text of `/proc/vmallocinfo` \[V4, T1\].
    ///
    /// # Errors
    /// The writer's.
    pub fn write_vmallocinfo(&self, w: &mut dyn Write) -> fmt::Result {
        for unpurged in [false, true] {
            let mut result = Ok(());
            self.reclaim().vmap(self).each(|area| {
                if result.is_ok() && area.unpurged == unpurged {
                    result = self.write_area(w, area);
                }
            });
            result?;
        }
        Ok(())
    }

    fn write_area(&self, w: &mut dyn Write, area: &VmAreaInfo) -> fmt::Result {
        let VmAreaInfo { start, size, .. } = *area;
        let width = 2 * size_of::<usize>();
        write!(w, "0x{start:0width$x}-0x{:0width$x} {size:7}", start + size)?;
        if area.unpurged {
            return w.write_str(" unpurged vm_area\n");
        }
        if let Some(caller) = area.caller {
            write!(w, " {}", At(caller))?;
        }
        if area.frames > 0 {
            write!(w, " pages={}", area.frames)?;
        }
        if let Some(phys) = area.phys {
            write!(w, " phys=0x{phys:016x}")?;
        }
        for (flag, word) in WORDS {
            if area.flags.contains(flag) {
                w.write_str(word)?;
            }
        }
        let mut nodes = [0; MAX_NODES];
        self.reclaim().vmap(self).by_node(area, &mut nodes);
        for (node, frames) in nodes.iter().enumerate().filter(|(_, frames)| **frames > 0) {
            write!(w, " N{node}={frames}")?;
        }
        w.write_char('\n')
    }
}
