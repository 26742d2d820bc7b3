//! DMA-able memory: GFP_DMA | GFP_KERNEL where one can sleep, GFP_DMA | GFP_ATOMIC where one cannot.

use kmem::{Kmem, Platform, context::Process, gfp::typed::{ATOMIC, KERNEL}, sync::preempt_disabled};

fn request<P: Platform>(kmem: &Kmem<P>, process: &mut Process) {
    let _ = kmem.get_free_pages_in(&*process, KERNEL.dma(), 2);
    preempt_disabled(kmem.platform(), process, |atomic| {
        let _ = kmem.get_free_pages_in(atomic, ATOMIC.dma(), 0);
    });
}

fn main() {
    let _ = request::<kmem_hosted::Hosted>;
}
