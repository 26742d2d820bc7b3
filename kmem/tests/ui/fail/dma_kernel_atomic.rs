//! DMA-able memory, cannot sleep: GFP_DMA | GFP_KERNEL.

use kmem::{Kmem, Platform, context::Atomic, gfp::typed::KERNEL};

fn handler<P: Platform>(kmem: &Kmem<P>, atomic: Atomic<'_>) {
    let _ = kmem.get_free_pages_in(atomic, KERNEL.dma(), 0);
}

fn main() {
    let _ = handler::<kmem_hosted::Hosted>;
}
