//! The capability of process context cannot be used while kmap_atomic is in force.

use kmem::Gfp;
use kmem_hosted::{Machine, Shape};

fn main() {
    let m = Machine::new(Shape::x86_32(1 << 30)).unwrap();
    m.run(|process| {
        let page = m.alloc_page(Gfp::HIGHUSER).unwrap();
        m.with_kmap_atomic(process, page, |_atomic, _map| {
            let _ = m.with_kmap(process, page, |_map| ());
        })
        .unwrap();
    })
    .unwrap();
}
