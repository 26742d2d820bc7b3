//! Interrupt handler: an area.

use kmem::{Kmem, Platform, alloc::VmArea, context::Atomic, gfp::typed::KERNEL};

fn handler<P: Platform>(kmem: &Kmem<P>, atomic: Atomic<'_>) {
    let _ = VmArea::new_in(kmem, atomic, KERNEL, 1 << 20);
}

fn main() {
    let _ = handler::<kmem_hosted::Hosted>;
}
