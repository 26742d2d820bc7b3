//! NOFAIL without being able to wait.

use kmem::gfp::typed::ATOMIC;

fn main() {
    let _ = ATOMIC.nofail();
}
