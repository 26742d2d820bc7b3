//! Interrupt handler, softirq, tasklet: use GFP_ATOMIC.

use kmem::{Kmem, Platform, context::Atomic, gfp::typed::{ATOMIC, NOWAIT}};

fn handler<P: Platform>(kmem: &Kmem<P>, atomic: Atomic<'_>) {
    let _ = kmem.alloc_pages_in(atomic, ATOMIC, 0);
    let _ = kmem.get_free_pages_in(atomic, NOWAIT, 0);
}

fn softirq<P: Platform>(kmem: &Kmem<P>, atomic: Atomic<'_>) {
    tasklet(kmem, atomic);
    let _ = kmem.alloc_pages_in(atomic, ATOMIC.nowarn(), 2);
}

fn tasklet<P: Platform>(kmem: &Kmem<P>, atomic: Atomic<'_>) {
    let _ = kmem.alloc_pages_bulk_in(atomic, ATOMIC, &mut [None; 4]);
}

fn main() {
    let _ = (handler::<kmem_hosted::Hosted>, softirq::<kmem_hosted::Hosted>);
}
