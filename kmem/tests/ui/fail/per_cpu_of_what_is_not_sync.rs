//! What all CPUs can reach must be Sync.

use core::cell::Cell;

kmem::define_per_cpu! {
    static DEPTH: Cell<u32> = Cell::new(0);
}

fn main() {}
