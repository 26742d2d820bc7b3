//! Process context, cannot sleep: preemption is off.

use kmem::{Kmem, Platform, context::Process, gfp::typed::NOFS, sync::preempt_disabled};

fn request<P: Platform>(kmem: &Kmem<P>, process: &mut Process) {
    preempt_disabled(kmem.platform(), process, |_| {
        let _ = kmem.alloc_pages_in(&*process, NOFS, 0);
    });
}

fn main() {
    let _ = request::<kmem_hosted::Hosted>;
}
