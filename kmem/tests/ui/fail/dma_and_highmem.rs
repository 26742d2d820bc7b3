//! DMA-able memory: two zones at once.

use kmem::gfp::typed::KERNEL;

fn main() {
    let _ = KERNEL.dma().highmem();
}
