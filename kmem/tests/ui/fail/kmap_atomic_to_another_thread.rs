//! A mapping of one CPU does not leave the thread.

use kmem::Gfp;
use kmem_hosted::{Machine, Shape};

fn main() {
    let m = Machine::new(Shape::x86_32(1 << 30)).unwrap();
    m.run(|process| {
        let page = m.alloc_page(Gfp::HIGHUSER).unwrap();
        m.with_kmap_atomic(process, page, |_atomic, map| {
            std::thread::scope(|s| {
                s.spawn(move || map.as_ptr());
            });
        })
        .unwrap();
    })
    .unwrap();
}
