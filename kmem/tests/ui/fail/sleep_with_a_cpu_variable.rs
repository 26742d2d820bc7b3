//! A variable of the running CPU is used with preemption off: nothing inside can sleep.

use core::sync::atomic::AtomicU32;
use kmem::gfp::typed::KERNEL;
use kmem_hosted::{Machine, Shape};

kmem::define_per_cpu! {
    static DEPTH: AtomicU32 = AtomicU32::new(0);
}

fn main() {
    let m = Machine::new(Shape::x86_64(64 << 20)).unwrap();
    m.run(|process| {
        m.with_cpu_var(process, &DEPTH, |atomic, _depth| {
            let _ = m.alloc_percpu_in::<u32, true, 0>(atomic, KERNEL);
        });
    })
    .unwrap();
}
