//! Interrupt handler: taking the interrupted task's capability along.

use kmem::context::Process;
use kmem_hosted::Hosted;
use std::sync::Arc;

fn install(hosted: &Hosted, process: &'static Process) {
    hosted.set_timer_handler(Arc::new(move |_atomic, _cpu| {
        let _kept: &Process = process;
    }));
}

fn main() {
    let _ = install;
}
