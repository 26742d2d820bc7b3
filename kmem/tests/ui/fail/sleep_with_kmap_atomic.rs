//! While kmap_atomic is in force nothing can sleep: the capability is given up for it.

use kmem::{Gfp, gfp::typed::KERNEL};
use kmem_hosted::{Machine, Shape};

fn main() {
    let m = Machine::new(Shape::x86_32(1 << 30)).unwrap();
    m.run(|process| {
        let page = m.alloc_page(Gfp::HIGHUSER).unwrap();
        m.with_kmap_atomic(process, page, |atomic, _map| {
            let _ = m.alloc_pages_in(atomic, KERNEL, 0);
        })
        .unwrap();
    })
    .unwrap();
}
