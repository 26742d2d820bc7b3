//! Owners with the capability that their flags need.

use kmem::{
    Kmem, Platform,
    alloc::{Cache, KBox, KVec, Pages, VmArea},
    context::{Atomic, Process},
    gfp::typed::{ATOMIC, KERNEL},
};

fn process<P: Platform>(kmem: &Kmem<P>, cache: &Cache<'_, P, u64>, process: &Process) {
    let _ = KBox::new_in(kmem, process, KERNEL, 1u64);
    let _ = KVec::new_on(kmem).push_in(process, KERNEL, 1u64);
    let _ = cache.alloc_in(process, KERNEL, 1);
    let _ = Pages::new_in(kmem, process, KERNEL, 2);
    let _ = VmArea::new_in(kmem, process, KERNEL.highmem(), 1 << 20);
    let _ = kmem.vmalloc_in(process, KERNEL, 1 << 20);
}

fn handler<P: Platform>(kmem: &Kmem<P>, cache: &Cache<'_, P, u64>, atomic: Atomic<'_>) {
    let _ = KBox::new_in(kmem, atomic, ATOMIC, 1u64);
    let _ = KVec::<u64, _>::new_on(kmem).reserve_in(atomic, ATOMIC, 9);
    let _ = cache.alloc_in(atomic, ATOMIC, 1);
    let _ = Pages::new_in(kmem, atomic, ATOMIC, 2);
}

fn main() {
    let _ = process::<kmem_hosted::Hosted>;
    let _ = handler::<kmem_hosted::Hosted>;
}
