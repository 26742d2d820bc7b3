//! kmem as the global allocator of this program \[O2\]: what the test harness and std allocate comes from it too.

use kmem_hosted::KmemGlobal;

mod blocks;
mod child;
mod forks;
mod shortage;
mod threads;

/// Of a machine that a test can fill.
#[global_allocator]
static HEAP: KmemGlobal = KmemGlobal::with_memory(MEMORY);

const MEMORY: usize = 96 << 20;

/// Whether an address is that of an object of the machine.
fn is_kmem<T: ?Sized>(at: *const T) -> bool {
    HEAP.with(|kmem| kmem.ksize(at.cast()).is_some_and(|n| n > 0)).unwrap()
}
