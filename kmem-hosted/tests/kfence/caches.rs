//! Objects of caches, and all that can be asked about an object.

use super::{free, rig, sample, sample_at, sampled};
use kmem::{
    Config, Gfp,
    alloc::Cache,
    kfence::KfenceConfig,
    slab::{KmemCache, SlabFlags},
};
use kmem_hosted::Shape;
use kmem_test_support::{MIB, Rig};
use std::ptr::NonNull;

/// A sample of a cache.
#[track_caller]
fn from(rig: &Rig, cache: &KmemCache, gfp: Gfp) -> NonNull<u8> {
    rig.kfence_toggle();
    let at = rig.kmem_cache_alloc(cache, gfp).unwrap();
    assert!(sampled(rig, at));
    at
}

fn give(rig: &Rig, cache: &KmemCache, at: NonNull<u8>) {
    // SAFETY: not used after.
    unsafe { rig.kmem_cache_free(cache, at).unwrap() };
}

fn bytes(at: NonNull<u8>, n: usize) -> Vec<u8> {
    // SAFETY: an object of so many bytes.
    unsafe { NonNull::slice_from_raw_parts(at, n).as_ref() }.to_vec()
}

#[test]
fn an_object_of_the_pool_is_one_of_its_cache() {
    let rig = rig(7);
    rig.run(|_| {
        let flags = SlabFlags::NO_MERGE;
        let cache = rig.kmem_cache_create("sampled", 100, 32, flags, None).unwrap();
        for _ in 0..20 {
            let at = from(&rig, &cache, Gfp::KERNEL | Gfp::ZERO);
            assert!(at.addr().get().is_multiple_of(32));
            assert_eq!(bytes(at, 100), [0; 100]);
            // SAFETY: ours.
            unsafe { at.write_bytes(0xff, 100) };
            assert_eq!(rig.ksize(at.as_ptr()), Some(100));
            assert_eq!(rig.ksize(at.as_ptr().wrapping_add(1)), None);
            let audit = rig.audit_objects().unwrap();
            assert_eq!((audit.live, audit.sampled), (1, 1));
            give(&rig, &cache, at);
            assert_eq!(rig.ksize(at.as_ptr()), None);
        }
        rig.kmem_cache_destroy(cache).unwrap();
    });
}

#[test]
fn a_cache_with_objects_in_the_pool_is_not_destroyed() {
    let rig = rig(7);
    rig.run(|_| {
        let cache = rig.kmem_cache_create("kept", 48, 0, SlabFlags::NO_MERGE, None).unwrap();
        let at = from(&rig, &cache, Gfp::KERNEL);
        let mark = rig.mark();
        let error = rig.kmem_cache_destroy(cache).unwrap_err();
        assert_eq!(error.live, 1);
        let reports: Vec<_> = rig.since(mark).into_iter().map(|(_, text)| text).collect();
        assert!(reports[1].contains(&format!("{:#x} of kept is in use", at.addr().get())));
        let cache = error.cache;
        assert_eq!(rig.kmem_cache_shrink(&cache), 0);
        give(&rig, &cache, at);
        rig.kmem_cache_destroy(cache).unwrap();
        // Its name outlives it, for those who come too late.
        let mark = rig.mark();
        super::read(at.as_ptr());
        super::assert_has(&rig.one_report(mark), &["use-after-free", "cache=kept"]);
    });
}

fn construct(at: *mut u8) {
    // SAFETY: an object of 24 bytes.
    unsafe { at.write_bytes(0xc7, 24) };
}

#[test]
fn constructors_run_and_contents_are_wiped_where_that_is_wanted() {
    let rig = rig(7);
    rig.run(|_| {
        let cache = rig.kmem_cache_create("made", 24, 0, SlabFlags::empty(), Some(construct));
        let cache = cache.unwrap();
        for _ in 0..16 {
            let at = from(&rig, &cache, Gfp::KERNEL);
            assert_eq!(bytes(at, 24), [0xc7; 24]);
            // SAFETY: ours.
            unsafe { at.write_bytes(0, 24) };
            give(&rig, &cache, at);
        }
        rig.set_init_on_alloc(true).unwrap();
        let at = sample(&rig, 77);
        assert_eq!(bytes(at, 77), [0; 77]);
        // SAFETY: ours.
        unsafe { at.write_bytes(0xee, 77) };
        rig.set_init_on_alloc(false).unwrap();
        rig.set_init_on_free(true).unwrap();
        free(&rig, at).unwrap();
        // After the fault the page can be looked at.
        assert_eq!(bytes(at, 77), [0; 77]);
        rig.set_init_on_free(false).unwrap();
        rig.kmem_cache_destroy(cache).unwrap();
    });
}

#[test]
fn some_caches_have_no_samples() {
    let kfence = Some(KfenceConfig { objects: 7, sample_interval_ns: 1 });
    let rig = Rig::new(Shape::x86_64(64 * MIB), Config { kfence, ..Config::default() });
    rig.run(|_| {
        let kinds = [SlabFlags::SKIP_KFENCE, SlabFlags::CACHE_DMA, SlabFlags::CACHE_DMA32];
        for (flags, name) in kinds.into_iter().zip(["skip", "dma", "dma32"]) {
            let cache = rig.kmem_cache_create(name, 64, 0, flags, None).unwrap();
            let held: Vec<_> =
                (0..50).map(|_| rig.kmem_cache_alloc(&cache, Gfp::KERNEL).unwrap()).collect();
            assert!(held.iter().all(|at| !sampled(&rig, *at)));
            held.into_iter().for_each(|at| give(&rig, &cache, at));
            rig.kmem_cache_destroy(cache).unwrap();
        }
        rig.kfence_toggle();
        let dma = rig.kmalloc(64, Gfp::KERNEL | Gfp::DMA).unwrap();
        let large = rig.kmalloc(5000, Gfp::KERNEL).unwrap();
        assert!(!sampled(&rig, dma) && !sampled(&rig, large));
        assert!(rig.kfence_stats().unwrap().skipped_incompatible > 0);
        [dma, large].into_iter().for_each(|at| free(&rig, at).unwrap());
    });
}

#[test]
fn requests_bound_to_a_node_get_memory_of_it() {
    let kfence = Some(KfenceConfig { objects: 7, sample_interval_ns: 1 });
    let rig = Rig::new(Shape::numa(2, 64 * MIB), Config { kfence, ..Config::default() });
    rig.run(|_| {
        for node in [0, 1, 0, 1] {
            let at = rig.kmalloc_node(64, Gfp::KERNEL, node).unwrap();
            let (pfn, _) = rig.place(rig.virt_to_page(at.as_ptr()).unwrap());
            assert_eq!(rig.page_zone(pfn).unwrap().node(), node as usize);
            free(&rig, at).unwrap();
        }
        assert_eq!(rig.kfence_stats().unwrap().allocations, 2);
    });
}

#[test]
fn kmalloc_has_what_was_asked_for_and_grows_elsewhere() {
    let rig = rig(7);
    rig.run(|_| {
        let at = sample_at(&rig, 50, true);
        assert_eq!(rig.ksize(at.as_ptr()), Some(50));
        // SAFETY: ours.
        unsafe { at.write_bytes(0x42, 50) };
        // SAFETY: from kmalloc; the old address is not used again.
        let less = unsafe { rig.krealloc(at.as_ptr(), 20, Gfp::KERNEL) }.unwrap();
        assert_eq!(less, at);
        // SAFETY: as above.
        let more = unsafe { rig.krealloc(at.as_ptr(), 60, Gfp::KERNEL) }.unwrap();
        assert_ne!(more, at);
        assert_eq!(bytes(more, 50), [0x42; 50]);
        free(&rig, more).unwrap();
        rig.kfence_toggle();
        let zeroed = rig.kzalloc(33, Gfp::KERNEL).unwrap();
        assert!(sampled(&rig, zeroed));
        assert_eq!(bytes(zeroed, 33), [0; 33]);
        // SAFETY: not used after.
        unsafe { rig.kfree_sensitive(zeroed.as_ptr()).unwrap() };
        assert_eq!(rig.kfence_stats().unwrap().bugs, 0);
    });
}

#[test]
fn owners_have_samples_too() {
    let rig = rig(7);
    rig.run(|_| {
        let cache =
            Cache::<_, [u64; 6]>::new(&**rig.machine(), "owned", SlabFlags::empty()).unwrap();
        let mut hits = 0;
        for n in 0..30 {
            rig.kfence_toggle();
            let slot = cache.alloc([n; 6], Gfp::KERNEL).unwrap();
            hits += u32::from(rig.is_kfence_address((&raw const *slot).cast()));
            assert_eq!(*slot, [n; 6]);
        }
        assert_eq!(hits, 30);
        assert_eq!(rig.kfence_stats().unwrap().frees, 30);
    });
}

#[test]
fn notes_of_callers_and_watching_caches_know_them() {
    let rig = rig(7);
    rig.run(|_| {
        rig.set_alloc_tags(Some(100)).unwrap();
        let at = sample(&rig, 500);
        let mut text = String::new();
        rig.write_allocinfo(&mut text).unwrap();
        assert!(text.lines().any(|l| l.trim_start().starts_with("500 ")), "{text}");
        free(&rig, at).unwrap();
        text.clear();
        rig.write_allocinfo(&mut text).unwrap();
        assert!(!text.lines().any(|l| l.trim_start().starts_with("500 ")), "{text}");
        rig.set_alloc_tags(None).unwrap();
        let cache = rig.kmem_cache_create("watched", 40, 0, SlabFlags::DEBUG, None).unwrap();
        let at = from(&rig, &cache, Gfp::KERNEL);
        rig.kmem_cache_validate(&cache).unwrap();
        give(&rig, &cache, at);
        rig.kmem_cache_destroy(cache).unwrap();
    });
}
