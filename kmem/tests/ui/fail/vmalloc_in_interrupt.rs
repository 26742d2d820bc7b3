//! Interrupt handler: vmalloc.

use kmem::{Kmem, Platform, context::Atomic, gfp::typed::KERNEL};

fn handler<P: Platform>(kmem: &Kmem<P>, atomic: Atomic<'_>) {
    let _ = kmem.vmalloc_in(atomic, KERNEL, 1 << 20);
}

fn main() {
    let _ = handler::<kmem_hosted::Hosted>;
}
