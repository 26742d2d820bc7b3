//! KFENCE's pool on a platform that may refuse to change its direct map, with frames of several sizes \[D2\].

use kmem::{
    BringUpError, Config, Gfp, Kmem, ZoneType,
    kfence::{KfenceConfig, KfenceError},
    memblock::Memblock,
    zone::{Layout, ZoneLimit},
};
use kmem_test_support::Plain;
use std::{ptr::NonNull, sync::atomic::Ordering::SeqCst};

/// A machine whose platform changes the direct map so many times.
fn machine<const S: u32>(changes: u64) -> Result<Kmem<Plain<S>>, BringUpError> {
    let frames = 1024;
    let mut boot = Memblock::new();
    boot.add(0, (frames as u64) << S, 0).unwrap();
    let platform = Plain::<S>::new(frames, 1);
    platform.direct_changes.store(changes, SeqCst);
    Plain::<S>::be_cpu(0);
    let kfence = Some(KfenceConfig { objects: 7, sample_interval_ns: 1 });
    let layout = Layout::new(&[ZoneLimit { zone: ZoneType::Normal, end: u64::MAX }]).unwrap();
    Kmem::bring_up(platform, boot, &Config { layout, kfence, ..Config::default() })
}

/// Allocates once; whether that is a sample.
fn one<const S: u32>(m: &Kmem<Plain<S>>, size: usize) -> (NonNull<u8>, bool) {
    // Time stands still here otherwise.
    m.platform().now_ns.fetch_add(10, SeqCst);
    let at = m.kmalloc_node(size, Gfp::KERNEL, 0).unwrap();
    // SAFETY: an object of so many bytes, ours.
    unsafe { at.write_bytes(0x11, size) };
    (at, m.is_kfence_address(at.as_ptr()))
}

fn free<const S: u32>(m: &Kmem<Plain<S>>, at: NonNull<u8>) {
    // SAFETY: not used after.
    unsafe { m.kfree(at.as_ptr()).unwrap() };
}

#[test]
fn a_platform_without_the_hook_has_no_pool() {
    let refused = machine::<12>(0);
    assert!(matches!(refused, Err(BringUpError::Kfence(KfenceError::Unsupported))));
}

/// Whichever change of the direct map is the first to be refused, allocations and frees go on, and all is counted.
fn every_refusal<const S: u32>() {
    for changes in 1..14 {
        let m = machine::<S>(changes).unwrap();
        let start = m.audit().unwrap();
        let own = m.audit_objects().unwrap();
        let mut hits = 0;
        for n in 0..20 {
            let (first, hit) = one(&m, 64 + n);
            let (second, hit2) = one(&m, 2000);
            hits += u64::from(hit) + u64::from(hit2);
            let audit = m.audit_objects().unwrap();
            assert_eq!((audit.live, audit.sampled), (2, u64::from(hit) + u64::from(hit2)));
            free(&m, first);
            free(&m, second);
        }
        // One at bring-up; then two for allocations and two for frees, in turn.
        let (rounds, rest) = ((changes - 1) / 4, (changes - 1) % 4);
        assert_eq!(hits, 2 * rounds + rest.min(2), "with {changes} changes");
        let stats = m.kfence_stats().unwrap();
        assert_eq!((stats.allocations, stats.frees, stats.bugs), (hits, hits, 0));
        assert_eq!(stats.skipped_capacity, 40 - hits);
        m.drop_slab();
        m.drain_all_pages();
        let kept = m.audit_objects().unwrap();
        assert_eq!((kept.live, kept.cached), (0, 0));
        let more = kept.own_frames + kept.slab_frames - own.own_frames - own.slab_frames;
        assert_eq!(m.audit().unwrap().allocated, start.allocated + more);
        assert!(m.platform().reports.lock().unwrap().is_empty());
    }
}

#[test]
fn refusals_of_the_platform_leave_objects_to_the_slabs() {
    every_refusal::<12>();
}

#[test]
fn frames_may_be_larger() {
    every_refusal::<14>();
    let m = machine::<16>(1000).unwrap();
    // Large enough for all that caches serve.
    let held: Vec<_> = (0..5).map(|n| one(&m, 8192 - 100 * n)).collect();
    assert!(held.iter().all(|(_, hit)| *hit));
    held.into_iter().for_each(|(at, _)| free(&m, at));
    assert_eq!(m.kfence_stats().unwrap().bugs, 0);
}
