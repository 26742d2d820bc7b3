//! Process context, cannot sleep: GFP_KERNEL under a spin lock.

use kmem::{Kmem, Platform, context::Process, gfp::typed::KERNEL, sync::SpinLock};

fn request<P: Platform>(kmem: &Kmem<P>, process: &mut Process, lock: &SpinLock<u32>) {
    lock.with(kmem.platform(), process, |atomic, _| {
        let _ = kmem.alloc_pages_in(atomic, KERNEL, 0);
    });
}

fn main() {
    let _ = request::<kmem_hosted::Hosted>;
}
