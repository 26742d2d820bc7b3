//! High memory has no address.

use kmem::{Kmem, Platform, context::Process, gfp::typed::HIGHUSER};

fn request<P: Platform>(kmem: &Kmem<P>, process: &Process) {
    let _ = kmem.get_free_pages_in(process, HIGHUSER, 0);
}

fn main() {
    let _ = request::<kmem_hosted::Hosted>;
}
