//! Process context, cannot sleep: the capability to sleep was given up for the lock.

use kmem::{Kmem, Platform, context::Process, gfp::typed::KERNEL, sync::SpinLock};

fn request<P: Platform>(kmem: &Kmem<P>, process: &mut Process, lock: &SpinLock<u32>) {
    lock.with(kmem.platform(), process, |_, _| {
        let _ = kmem.alloc_pages_in(&*process, KERNEL, 0);
    });
}

fn main() {
    let _ = request::<kmem_hosted::Hosted>;
}
