//! Who may sleep may also ask not to.

use kmem::{Kmem, Platform, context::Process, gfp::typed::{ATOMIC, NOWAIT}};

fn request<P: Platform>(kmem: &Kmem<P>, process: &Process) {
    let _ = kmem.alloc_pages_in(process, ATOMIC, 0);
    let _ = kmem.alloc_pages_in(process, NOWAIT.highmem(), 0);
}

fn main() {
    let _ = request::<kmem_hosted::Hosted>;
}
