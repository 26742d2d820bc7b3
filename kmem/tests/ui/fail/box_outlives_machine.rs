//! An owner that borrows its machine does not outlive it.

use kmem::{
    Kmem, Platform,
    alloc::{KBox, flags::GFP_KERNEL},
};

fn end<P: Platform>(kmem: Kmem<P>) {
    let boxed = KBox::new_on(&kmem, 1u64, GFP_KERNEL);
    drop(kmem);
    drop(boxed);
}

fn main() {
    let _ = end::<kmem_hosted::Hosted>;
}
