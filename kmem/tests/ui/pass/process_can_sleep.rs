//! Process context, can sleep: use GFP_KERNEL.

use kmem::{Kmem, Platform, context::Process, gfp::typed::{KERNEL, NOFS, NOIO, USER}};

fn request<P: Platform>(kmem: &Kmem<P>, process: &Process) {
    let _ = kmem.alloc_pages_in(process, KERNEL, 0);
    let _ = kmem.alloc_pages_in(process, NOFS.nofail(), 0);
    let _ = kmem.alloc_pages_in(process, NOIO.noretry(), 3);
    let _ = kmem.get_free_pages_in(process, USER.zero(), 1);
}

fn main() {
    let _ = request::<kmem_hosted::Hosted>;
}
