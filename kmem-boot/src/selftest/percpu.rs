//! Per-CPU data: a static variable that interrupts count in too, each step one instruction; and allocations.

use super::{Bench, Verdict, check, fail, storm::TICKS};
use crate::println;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};
use kmem::{gfp::Gfp, percpu::PerCpuPtr};

/// Timer interrupts that must fall into the counting.
const INTERRUPTS: u32 = 20;
const PLACES: usize = 300;

kmem::define_per_cpu! {
    /// Begins with a value of its own.
    pub static COUNT: AtomicU64 = AtomicU64::new(1000);
}

/// Counts until enough interrupts have counted too; then fills more than a chunk.
pub fn run(bench: &mut Bench) -> Verdict {
    let kmem = bench.kmem;
    // Both are read in one breath, or a tick comes between.
    let now = || {
        x86_64::instructions::interrupts::without_interrupts(|| {
            (TICKS.load(Relaxed), kmem.this_cpu_read(&COUNT))
        })
    };
    let ((first, begin), mut own) = (now(), 0u64);
    check!(
        begin.is_some_and(|n| n >= 1000),
        "the variable does not begin with its value: {begin:?}"
    );
    let mut ticks = 0;
    while ticks < INTERRUPTS {
        for _ in 0..1000 {
            check!(kmem.this_cpu_inc(&COUNT).is_some(), "on no CPU");
        }
        own += 1000;
        ticks = TICKS.load(Relaxed).wrapping_sub(first);
    }
    let (last, end) = now();
    let ticks = last.wrapping_sub(first);
    let counted = end.zip(begin).map(|(end, begin)| end - begin);
    check!(counted == Some(own + u64::from(ticks)), "{own} and {ticks} interrupts: {counted:?}");

    let free = kmem.per_cpu_free();
    let mut places: [Option<PerCpuPtr<u8>>; PLACES] = [None; PLACES];
    for (i, place) in places.iter_mut().enumerate() {
        let size = 8 + i % 50 * 20;
        let at = match kmem.__alloc_percpu_gfp(size, 8, Gfp::KERNEL) {
            Ok(at) => at,
            Err(error) => fail!("{size} bytes of each CPU: {error}"),
        };
        let Some(mine) = kmem.get_cpu_ptr(at) else { fail!("on no CPU") };
        for byte in 0..size {
            // SAFETY: ours, and of so many bytes.
            let was = unsafe { mine.as_ptr().add(byte).replace(i as u8) };
            check!(was == 0, "byte {byte} of place {i} holds {was}");
        }
        *place = Some(at);
    }
    for (i, at) in places.into_iter().flatten().enumerate() {
        let Some(first) = kmem.per_cpu_ptr(at, 0) else { fail!("CPU 0 is not possible") };
        // SAFETY: ours, written above.
        let held = unsafe { first.read() };
        check!(held == i as u8, "place {i} holds {held}");
        // SAFETY: ours, and not used after.
        let freed = unsafe { kmem.free_percpu(at) };
        check!(freed.is_ok(), "place {i}: {freed:?}");
    }
    check!(kmem.per_cpu_free() == free, "{free} bytes were free, now {}", kmem.per_cpu_free());
    println!("percpu: counted to {own} with {ticks} interrupts in between; {PLACES} places");
    Ok(())
}
