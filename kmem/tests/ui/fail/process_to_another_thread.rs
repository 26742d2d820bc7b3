//! Context belongs to the thread of execution.

use kmem::context::Process;

fn send(process: &Process) {
    std::thread::scope(|s| {
        s.spawn(|| {
            let _ = &process;
        });
    });
}

fn main() {
    let _ = send;
}
