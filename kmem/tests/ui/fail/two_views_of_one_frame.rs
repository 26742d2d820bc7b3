//! An owner's frame has one mutable view at a time.

use kmem::{Gfp, alloc::Pages};
use kmem_hosted::{Machine, Shape};

fn main() {
    let m = Machine::new(Shape::x86_32(1 << 30)).unwrap();
    m.run(|process| {
        let mut block = Pages::new(m.kmem(), Gfp::HIGHUSER, 0).unwrap();
        let mut one = block.kmap(process, 0).unwrap();
        let mut two = block.kmap(process, 0).unwrap();
        one[0] = 1;
        two[0] = 2;
    })
    .unwrap();
}
