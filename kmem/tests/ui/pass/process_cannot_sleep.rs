//! Process context, cannot sleep: use GFP_ATOMIC, or GFP_KERNEL earlier or later.

use kmem::{
    Kmem, Platform,
    context::Process,
    gfp::typed::{ATOMIC, KERNEL},
    sync::{SpinLock, irqs_disabled, preempt_disabled},
};

fn request<P: Platform>(kmem: &Kmem<P>, process: &mut Process, lock: &SpinLock<u32>) {
    let _earlier = kmem.alloc_pages_in(&*process, KERNEL, 0);
    lock.with(kmem.platform(), process, |atomic, _| {
        let _ = kmem.alloc_pages_in(atomic, ATOMIC, 0);
    });
    preempt_disabled(kmem.platform(), process, |atomic| {
        let _ = kmem.alloc_pages_in(atomic, ATOMIC, 0);
        lock.with_atomic(kmem.platform(), atomic, |atomic, _| {
            let _ = kmem.alloc_pages_in(atomic, ATOMIC, 0);
        });
    });
    irqs_disabled(kmem.platform(), process, |atomic| {
        let _ = kmem.alloc_pages_in(atomic, ATOMIC, 0);
    });
    let _later = kmem.alloc_pages_in(&*process, KERNEL, 0);
}

fn main() {
    let _ = request::<kmem_hosted::Hosted>;
}
