//! Interrupt handler: a box with GFP_KERNEL.

use kmem::{Kmem, Platform, alloc::KBox, context::Atomic, gfp::typed::KERNEL};

fn handler<P: Platform>(kmem: &Kmem<P>, atomic: Atomic<'_>) {
    let _ = KBox::new_in(kmem, atomic, KERNEL, 1u64);
}

fn main() {
    let _ = handler::<kmem_hosted::Hosted>;
}
