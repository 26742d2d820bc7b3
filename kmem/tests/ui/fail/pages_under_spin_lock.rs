//! Process context, cannot sleep: a block of frames with GFP_KERNEL under a spin lock.

use kmem::{Kmem, Platform, alloc::Pages, context::Process, gfp::typed::KERNEL, sync::SpinLock};

fn request<P: Platform>(kmem: &Kmem<P>, process: &mut Process, lock: &SpinLock<u32>) {
    lock.with(kmem.platform(), process, |atomic, _| {
        let _ = Pages::new_in(kmem, atomic, KERNEL, 2);
    });
}

fn main() {
    let _ = request::<kmem_hosted::Hosted>;
}
