//! A block's order is what it was allocated with: there is no way to free it with another one.

use kmem::{Platform, alloc::Pages};

fn free<P: Platform>(mut block: Pages<'_, P>) {
    block.order = 2;
    drop(block);
}

fn main() {
    let _ = free::<kmem_hosted::Hosted>;
}
