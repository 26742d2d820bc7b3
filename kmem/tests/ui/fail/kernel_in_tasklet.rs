//! Tasklet: several sleeping pages at once.

use kmem::{Kmem, Platform, context::Atomic, gfp::typed::KERNEL};

fn tasklet<P: Platform>(kmem: &Kmem<P>, atomic: Atomic<'_>) {
    let _ = kmem.alloc_pages_bulk_in(atomic, KERNEL, &mut [None; 4]);
}

fn main() {
    let _ = tasklet::<kmem_hosted::Hosted>;
}
