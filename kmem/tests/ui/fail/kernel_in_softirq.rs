//! Softirq: an address of sleeping memory.

use kmem::{Kmem, Platform, context::Atomic, gfp::typed::USER};

fn softirq<P: Platform>(kmem: &Kmem<P>, atomic: Atomic<'_>) {
    let _ = kmem.get_free_pages_in(atomic, USER, 0);
}

fn main() {
    let _ = softirq::<kmem_hosted::Hosted>;
}
