//! Memory of one machine is not another's.

use kmem::alloc::{Home, KBox, Kmalloc};

fn keep<A: Home, B: Home>(of_a: KBox<u64, Kmalloc<A>>) -> KBox<u64, Kmalloc<B>> {
    of_a
}

fn main() {}
