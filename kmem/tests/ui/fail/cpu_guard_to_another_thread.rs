//! A guard that keeps its holder on a CPU does not leave the thread.

use kmem_hosted::{Machine, Shape};

fn main() {
    let m = Machine::new(Shape::x86_64(64 << 20)).unwrap();
    m.run(|_process| {
        let guard = m.get_cpu().unwrap();
        std::thread::scope(|s| {
            s.spawn(move || drop(guard));
        });
    })
    .unwrap();
}
