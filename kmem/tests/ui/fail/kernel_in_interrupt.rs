//! Interrupt handler: GFP_KERNEL.

use kmem::{Kmem, Platform, context::Atomic, gfp::typed::KERNEL};

fn handler<P: Platform>(kmem: &Kmem<P>, atomic: Atomic<'_>) {
    let _ = kmem.alloc_pages_in(atomic, KERNEL, 0);
}

fn main() {
    let _ = handler::<kmem_hosted::Hosted>;
}
