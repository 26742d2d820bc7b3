//! Interrupt handler: a vector grows with GFP_KERNEL.

use kmem::{Kmem, Platform, alloc::KVec, context::Atomic, gfp::typed::KERNEL};

fn handler<P: Platform>(v: &mut KVec<u64, &Kmem<P>>, atomic: Atomic<'_>) {
    let _ = v.push_in(atomic, KERNEL, 1);
}

fn main() {
    let _ = handler::<kmem_hosted::Hosted>;
}
