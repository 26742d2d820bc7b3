//! Process context, cannot sleep: a slot with GFP_KERNEL under a spin lock.

use kmem::{Platform, alloc::Cache, context::Process, gfp::typed::KERNEL, sync::SpinLock};

fn request<P: Platform>(
    p: &P,
    cache: &Cache<'_, P, u64>,
    process: &mut Process,
    lock: &SpinLock<u32>,
) {
    lock.with(p, process, |atomic, _| {
        let _ = cache.alloc_in(atomic, KERNEL, 1);
    });
}

fn main() {
    let _ = request::<kmem_hosted::Hosted>;
}
