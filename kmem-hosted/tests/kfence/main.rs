//! Sampled objects on pages of their own: real faults, and everything else that can be done to such an object \[D2\].

mod bounds;
mod caches;
mod frees;
mod model;
mod sampling;

use kmem::{Config, Gfp, Misuse, kfence::KfenceConfig};
use kmem_hosted::Shape;
use kmem_test_support::{MIB, Rig};
use std::ptr::NonNull;

/// A machine whose every allocation on a slow path is a sample.
fn rig(objects: u32) -> Rig {
    let kfence = Some(KfenceConfig { objects, sample_interval_ns: 1 });
    Rig::new(Shape::no_dma(64 * MIB), Config { kfence, ..Config::default() })
}

/// Whether an object is one of the pool's.
fn sampled(rig: &Rig, at: NonNull<u8>) -> bool {
    rig.is_kfence_address(at.as_ptr())
}

/// An object of the pool, for `size` bytes.
#[track_caller]
fn sample(rig: &Rig, size: usize) -> NonNull<u8> {
    rig.kfence_toggle();
    let at = rig.kmalloc(size, Gfp::KERNEL).unwrap();
    assert!(sampled(rig, at), "not a sample");
    at
}

/// Where on its page an object begins.
fn offset(at: NonNull<u8>) -> usize {
    at.addr().get() % 4096
}

/// A sample at the end of its page, or at its beginning.
#[track_caller]
fn sample_at(rig: &Rig, size: usize, right: bool) -> NonNull<u8> {
    for _ in 0..200 {
        let at = sample(rig, size);
        if (offset(at) != 0) == right {
            return at;
        }
        free(rig, at).unwrap();
    }
    panic!("chance has a favourite");
}

fn free(rig: &Rig, at: NonNull<u8>) -> Result<(), Misuse> {
    // SAFETY: nobody uses the object after this, save those who test that they are found out.
    unsafe { rig.kfree(at.as_ptr()) }
}

fn read(at: *const u8) -> u8 {
    // SAFETY: what a fault is about is opened by its handler; all else is the machine's memory.
    unsafe { at.read_volatile() }
}

fn write(at: *mut u8, byte: u8) {
    // SAFETY: as in `read`; what is written to there are pages of the pool.
    unsafe { at.write_volatile(byte) }
}

#[track_caller]
fn assert_has(report: &str, parts: &[&str]) {
    for part in parts {
        assert!(report.contains(part), "no {part:?} in:\n{report}");
    }
}
