//! Process context, cannot sleep: interrupts are masked.

use kmem::{Kmem, Platform, context::Process, gfp::typed::NOIO, sync::irqs_disabled};

fn request<P: Platform>(kmem: &Kmem<P>, process: &mut Process) {
    irqs_disabled(kmem.platform(), process, |_| {
        let _ = kmem.alloc_pages_in(&*process, NOIO, 0);
    });
}

fn main() {
    let _ = request::<kmem_hosted::Hosted>;
}
