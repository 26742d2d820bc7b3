//! Per-CPU data \[U1–U3\], through the public calls.

mod crowded;
mod model;
mod owners;
mod places;
mod statics;
mod storm;

use kmem::{Config, Kmem, percpu::PerCpuPtr};
use kmem_hosted::{Hosted, Shape};
use kmem_test_support::{MIB, Rig};

/// 64 MiB, four CPUs.
fn four() -> Rig {
    Rig::new(Shape::no_dma(64 * MIB).cpus(4), Config::default())
}

/// The instances of eight bytes at a per-CPU address.
fn values(m: &Kmem<Hosted>, at: PerCpuPtr<u64>) -> Vec<u64> {
    (0..m.nr_cpu_ids())
        .map(|cpu| {
            let at = m.per_cpu_ptr(at, cpu).unwrap();
            // SAFETY: the test's own, live, and nobody writes there now.
            unsafe { at.read() }
        })
        .collect()
}

/// Writes to one instance.
fn set(m: &Kmem<Hosted>, at: PerCpuPtr<u64>, cpu: usize, value: u64) {
    // SAFETY: the test's own, live, and nobody else uses it now.
    unsafe { m.per_cpu_ptr(at, cpu).unwrap().write(value) };
}

/// Frees what the test allocated.
#[track_caller]
fn free<T>(m: &Kmem<Hosted>, at: PerCpuPtr<T>) {
    // SAFETY: the test's own, and not used after.
    unsafe { m.free_percpu(at) }.unwrap();
}
