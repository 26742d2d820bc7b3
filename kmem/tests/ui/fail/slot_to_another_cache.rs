//! A slot goes back to its cache: there is no way to give it to another one, even for the same type.

use kmem::{
    Platform,
    alloc::{Cache, Slot},
};

fn free<'c, P: Platform>(slot: Slot<'c, P, u64>, other: &'c Cache<'c, P, u64>) {
    drop(Slot { cache: other, ..slot });
}

fn main() {
    let _ = free::<kmem_hosted::Hosted>;
}
