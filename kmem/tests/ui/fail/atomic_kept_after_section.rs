//! What stands for a section does not outlive it.

use kmem::{Kmem, Platform, context::Process, sync::preempt_disabled};

fn request<P: Platform>(kmem: &Kmem<P>, process: &mut Process) {
    let _kept = preempt_disabled(kmem.platform(), process, |atomic| atomic);
}

fn main() {
    let _ = request::<kmem_hosted::Hosted>;
}
