//! DMA-able memory: both kinds at once.

use kmem::gfp::typed::ATOMIC;

fn main() {
    let _ = ATOMIC.dma().dma32();
}
