//! A mapping of kmap_atomic does not outlive its section.

use kmem::Gfp;
use kmem_hosted::{Machine, Shape};

fn main() {
    let m = Machine::new(Shape::x86_32(1 << 30)).unwrap();
    m.run(|process| {
        let page = m.alloc_page(Gfp::HIGHUSER).unwrap();
        let map = m.with_kmap_atomic(process, page, |_atomic, map| map).unwrap();
        let _ = map.as_ptr();
    })
    .unwrap();
}
