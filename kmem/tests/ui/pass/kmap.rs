//! Mappings nest: who may sleep keeps the capability, who may not has the other.

use kmem::{
    Gfp,
    gfp::typed::{ATOMIC, KERNEL},
};
use kmem_hosted::{Machine, Shape};

fn main() {
    let m = Machine::new(Shape::x86_32(1 << 30)).unwrap();
    m.run(|process| {
        let page = m.alloc_page(Gfp::HIGHUSER).unwrap();
        m.with_kmap(process, page, |_map| {
            m.with_kmap_local(page, |_map| {
                m.__free_page(m.alloc_pages_in(&*process, KERNEL, 0).unwrap()).unwrap();
            })
            .unwrap();
        })
        .unwrap();
        m.with_kmap_atomic(process, page, |atomic, _map| {
            m.__free_page(m.alloc_pages_in(atomic, ATOMIC, 0).unwrap()).unwrap();
            m.with_kmap_atomic_in(atomic, page, |_atomic, _map| ()).unwrap();
        })
        .unwrap();
        m.__free_page(page).unwrap();
    })
    .unwrap();
}
