//! Caches: objects, slabs, constructors, merging, the end.

use super::QUIET;
use kmem::{
    AllocError, Config, Gfp,
    slab::{CacheError, Ctor, SlabFlags},
};
use kmem_hosted::Shape;
use kmem_test_support::{MIB, Rig};
use proptest::{collection::vec, prelude::*, sample::select};
use std::{
    collections::HashSet,
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

#[test]
fn objects_are_distinct_aligned_and_hold_what_is_written() {
    let rig = Rig::flat();
    rig.run(|_| {
        for (size, align) in [
            (1, 0),
            (8, 8),
            (24, 8),
            (40, 64),
            (100, 0),
            (256, 256),
            (700, 4),
            (1024, 1024),
            (1500, 0),
            (4096, 4096),
            (5000, 512),
            (8192, 0),
        ] {
            let cache =
                rig.kmem_cache_create("test", size, align, SlabFlags::NO_MERGE, None).unwrap();
            assert_eq!(cache.size(), size);
            let objects: Vec<_> = (0..200u32)
                .map(|n| {
                    let at = rig.kmem_cache_alloc(&cache, Gfp::KERNEL).unwrap();
                    assert!(at.addr().get().is_multiple_of(align.max(8)));
                    // SAFETY: an object of that size, ours.
                    unsafe { at.write_bytes(n as u8, size) };
                    at
                })
                .collect();
            let mut places: Vec<_> = objects.iter().map(|at| at.addr().get()).collect();
            places.sort_unstable();
            assert!(places.windows(2).all(|w| w[1] - w[0] >= size), "size {size}");
            for (n, at) in objects.iter().enumerate() {
                // SAFETY: written above.
                let bytes = unsafe { std::slice::from_raw_parts(at.as_ptr(), size) };
                assert!(bytes.iter().all(|b| *b == n as u8), "size {size}, object {n}");
                // SAFETY: nobody uses it any more.
                unsafe { rig.kmem_cache_free(&cache, *at).unwrap() };
            }
            rig.audit_objects().unwrap();
            rig.kmem_cache_destroy(cache).unwrap();
        }
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whichever of the two magazines an object is in, and however they share what there is. Runs of frees and of
    /// allocations, one after the other.
    #[test]
    fn a_cpus_magazines_are_one_stack(
        size in select(&[16, 64, 300, 700, 4096]),
        runs in vec(1..40_usize, 1..60),
    ) {
        let rig = Rig::flat();
        rig.run(|_| {
            let cache = rig.kmem_cache_create("stack", size, 0, SlabFlags::NO_MERGE, None).unwrap();
            let alloc = || rig.kmem_cache_alloc(&cache, Gfp::KERNEL).unwrap();
            let free = |at| {
                // SAFETY: from `alloc`, and not used after.
                unsafe { rig.kmem_cache_free(&cache, at).unwrap() };
            };
            let cached = || rig.kmem_cache_info(&cache).cached_objects;
            let mut held: Vec<_> = (0..1000).map(|_| alloc()).collect();
            let before = cached();
            let mut freed = 0;
            while cached() == before + freed {
                free(held.pop().unwrap());
                freed += 1;
            }
            let room = before + freed - 1;
            assert!(room >= 2 && room.is_multiple_of(2), "{room}");
            assert_eq!(cached(), room / 2 + 1, "the older one was full, and went");
            held.extend((0..cached()).map(|_| alloc()));
            assert_eq!(cached(), 0);

            let mut stack: Vec<NonNull<u8>> = Vec::new();
            for (i, n) in runs.into_iter().enumerate() {
                if i.is_multiple_of(2) {
                    for _ in 0..n.min(room as usize - stack.len()) {
                        let at = held.swap_remove(i * n % held.len());
                        stack.push(at);
                        free(at);
                    }
                } else {
                    for at in stack.drain(stack.len().saturating_sub(n)..).rev() {
                        assert_eq!(alloc(), at, "the last is the first");
                        held.push(at);
                    }
                }
                assert_eq!(cached(), stack.len() as u64);
            }
            for at in stack.drain(..).rev() {
                assert_eq!(alloc(), at);
                held.push(at);
            }
            held.into_iter().for_each(free);
            rig.audit_objects().unwrap();
            rig.kmem_cache_destroy(cache).unwrap();
        });
    }
}

/// Of a CPU that takes and gives a hundred objects by turns: its magazines grow, one after the other, and it has a depot.
#[test]
fn a_busy_cpu_keeps_more() {
    const BURST: usize = 100;
    // Of its magazines, at last.
    const LONGEST: usize = 14;
    let rig = Rig::flat();
    rig.run(|_| {
        let cache = rig.kmem_cache_create("busy", 4096, 0, SlabFlags::NO_MERGE, None).unwrap();
        let cached = || rig.kmem_cache_info(&cache).cached_objects as usize;
        let alloc = || rig.kmem_cache_alloc(&cache, Gfp::KERNEL).unwrap();
        let mut held: Vec<_> = (0..BURST).map(|_| alloc()).collect();
        // Frees the last so many of them, and takes as many.
        let mut swing = |n: usize| {
            let freed = held.split_off(BURST - n);
            for at in &freed {
                // SAFETY: from `alloc`, and not used after.
                unsafe { rig.kmem_cache_free(&cache, *at).unwrap() };
            }
            let most = cached();
            // What the depot has is older than what went back to the slabs.
            for at in freed.iter().rev().take(most.min(LONGEST)) {
                held.push(alloc());
                assert_eq!(held.last(), Some(at), "the last is the first");
            }
            held.resize_with(BURST, alloc);
            most
        };
        let mut kept = vec![0];
        for _ in 0..1200 {
            // Also while one magazine has grown and the other has not.
            swing(LONGEST - 2);
            let most = swing(BURST);
            assert!(cached() <= 2 * LONGEST, "what the depot has is taken before new objects");
            if kept.last() != Some(&most) {
                kept.push(most);
            }
        }
        assert!(kept.is_sorted() && kept.len() > 5 && kept[1] < 4, "{kept:?}");
        assert!(kept[kept.len() - 1] > 5 * LONGEST, "two magazines and a depot: {kept:?}");
        for at in held {
            // SAFETY: as above.
            unsafe { rig.kmem_cache_free(&cache, at).unwrap() };
        }
        rig.audit_objects().unwrap();
        rig.kmem_cache_destroy(cache).unwrap();
    });
}

#[test]
fn freed_objects_come_again_and_slabs_go_back() {
    let rig = Rig::flat();
    rig.run(|_| {
        let cache = rig.kmem_cache_create("again", 64, 0, SlabFlags::NO_MERGE, None).unwrap();
        let first = rig.kmem_cache_alloc(&cache, Gfp::KERNEL).unwrap();
        // SAFETY: ours, and not used after.
        unsafe { rig.kmem_cache_free(&cache, first).unwrap() };
        assert_eq!(rig.kmem_cache_alloc(&cache, Gfp::KERNEL).unwrap(), first, "the hottest first");
        let mut held = vec![first];
        held.extend((0..10_000).map(|_| rig.kmem_cache_alloc(&cache, Gfp::KERNEL).unwrap()));
        let full = rig.kmem_cache_info(&cache);
        assert!(full.slabs >= 10_001 / u64::from(full.objects_per_slab));
        assert!(full.active_objects >= 10_001);
        let before = rig.nr_free_pages();
        for at in held.drain(..) {
            // SAFETY: as above.
            unsafe { rig.kmem_cache_free(&cache, at).unwrap() };
        }
        // Most went back as they became empty.
        assert!(rig.nr_free_pages() > before + 9 * full.slabs / 10);
        rig.kmem_cache_shrink(&cache);
        let info = rig.kmem_cache_info(&cache);
        assert_eq!((info.slabs, info.objects, info.cached_objects), (0, 0, 0), "{info:?}");
        assert_eq!(info.grown, info.released);
        rig.kmem_cache_destroy(cache).unwrap();
    });
}

fn construct(at: *mut u8) {
    let at = at.cast::<u32>();
    // SAFETY: the constructor is given an object of the cache, at least eight bytes.
    unsafe {
        at.write(7);
        at.add(1).write(0xc0de);
    }
}

static CONSTRUCTED: AtomicU64 = AtomicU64::new(0);

fn construct_counted(at: *mut u8) {
    CONSTRUCTED.fetch_add(1, Relaxed);
    construct(at);
}

#[test]
fn a_constructor_runs_once_per_object() {
    let rig = Rig::flat();
    rig.run(|_| {
        let ctor = Some(construct_counted as Ctor);
        let cache = rig.kmem_cache_create("made", 48, 0, SlabFlags::empty(), ctor).unwrap();
        let mut seen = HashSet::new();
        // One in every slab stays, so that no slab goes.
        let mut anchors = Vec::new();
        for round in 0..5 {
            let held: Vec<_> =
                (0..150).map(|_| rig.kmem_cache_alloc(&cache, Gfp::KERNEL).unwrap()).collect();
            for at in held {
                let mark = at.as_ptr().cast::<u32>().wrapping_add(1);
                // What the constructor made of it, or its last user.
                let expected = if seen.insert(at) { 0xc0de } else { 0xdead };
                // SAFETY: an object of ours, not used after.
                unsafe {
                    assert_eq!(mark.read(), expected, "round {round}");
                    mark.write(0xdead);
                    if at.addr().get() >> 12
                        != anchors.last().map_or(0, |a: &NonNull<u8>| a.addr().get() >> 12)
                        && round == 0
                    {
                        anchors.push(at);
                    } else {
                        rig.kmem_cache_free(&cache, at).unwrap();
                    }
                }
            }
        }
        let info = rig.kmem_cache_info(&cache);
        assert_eq!((info.released, info.objects), (0, CONSTRUCTED.load(Relaxed)), "{info:?}");
        // SAFETY: not used after.
        unsafe { rig.kmem_cache_free_bulk(&cache, &anchors).unwrap() };
        rig.kmem_cache_destroy(cache).unwrap();
    });
}

#[test]
fn zalloc_zeroes_what_others_left() {
    let rig = Rig::flat();
    rig.run(|_| {
        let cache = rig.kmem_cache_create("zeroed", 120, 0, SlabFlags::empty(), None).unwrap();
        for _ in 0..3 {
            let at = rig.kmem_cache_zalloc(&cache, Gfp::KERNEL).unwrap();
            // SAFETY: an object of 120 bytes, ours, not used after.
            unsafe {
                assert!(std::slice::from_raw_parts(at.as_ptr(), 120).iter().all(|b| *b == 0));
                at.write_bytes(0xff, 120);
                rig.kmem_cache_free(&cache, at).unwrap();
            }
        }
        rig.kmem_cache_destroy(cache).unwrap();
    });
}

#[test]
fn slack_is_at_most_an_eighth_and_colours_use_it() {
    let rig = Rig::new(Shape::no_dma(256 * MIB), Config::default());
    rig.run(|_| {
        for size in (8..8192).step_by(88).chain([16, 32, 64, 512, 1024, 2048, 4096]) {
            let cache = rig.kmem_cache_create("slack", size, 0, SlabFlags::NO_MERGE, None).unwrap();
            let info = rig.kmem_cache_info(&cache);
            let bytes = info.frames_per_slab * 4096;
            let used = info.objects_per_slab * info.stride;
            assert!(bytes - used <= bytes / 8, "size {size}: {} of {bytes} unused", bytes - used);
            rig.kmem_cache_destroy(cache).unwrap();
        }
        let cache = rig.kmem_cache_create("colours", 600, 64, SlabFlags::NO_MERGE, None).unwrap();
        let held: Vec<_> =
            (0..400).map(|_| rig.kmem_cache_alloc(&cache, Gfp::KERNEL).unwrap()).collect();
        let info = rig.kmem_cache_info(&cache);
        let slab = info.frames_per_slab as usize * 4096;
        let starts: HashSet<_> =
            held.iter().map(|at| at.addr().get() % slab % info.stride as usize).collect();
        assert!(starts.len() > 1, "{starts:?}");
        for at in held {
            // SAFETY: not used after.
            unsafe { rig.kmem_cache_free(&cache, at).unwrap() };
        }
        rig.audit_objects().unwrap();
        rig.kmem_cache_destroy(cache).unwrap();
    });
}

#[test]
fn caches_of_one_shape_are_merged() {
    let rig = Rig::flat();
    rig.run(|_| {
        let none = SlabFlags::empty();
        let a = rig.kmem_cache_create("first", 96, 0, none, None).unwrap();
        let b = rig.kmem_cache_create("second", 90, 8, none, None).unwrap();
        let apart = rig.kmem_cache_create("apart", 96, 0, SlabFlags::NO_MERGE, None).unwrap();
        let made = rig.kmem_cache_create("made", 96, 0, none, Some(construct)).unwrap();
        assert_eq!((b.name().as_str(), apart.name().as_str()), ("first", "apart"));
        assert_eq!(made.name().as_str(), "made");
        assert_eq!(rig.kmem_cache_info(&a).users, 2);
        let at = rig.kmem_cache_alloc(&b, Gfp::KERNEL).unwrap();
        rig.kmem_cache_destroy(a).unwrap();
        // SAFETY: not used after.
        unsafe { rig.kmem_cache_free(&b, at).unwrap() };
        for cache in [b, apart, made] {
            rig.kmem_cache_destroy(cache).unwrap();
        }
    });
}

#[test]
fn a_cache_with_live_objects_stays_and_lists_them() {
    let rig = Rig::flat();
    rig.run(|_| {
        let cache = rig.kmem_cache_create("busy", 200, 0, SlabFlags::empty(), None).unwrap();
        let held: Vec<_> =
            (0..3).map(|_| rig.kmem_cache_alloc(&cache, Gfp::KERNEL).unwrap()).collect();
        let mark = rig.mark();
        let refused = rig.kmem_cache_destroy(cache).unwrap_err();
        assert_eq!(refused.live, 3);
        let reports = rig.since(mark);
        assert_eq!(reports.len(), 4, "{reports:?}");
        assert!(reports[0].1.contains("BUG busy: 3 objects remaining"), "{reports:?}");
        for at in &held {
            let named = format!("{:#x}", at.addr());
            assert!(reports.iter().any(|(_, text)| text.contains(&named)), "{named}: {reports:?}");
        }
        // It works as before.
        let cache = refused.cache;
        let more = rig.kmem_cache_alloc(&cache, Gfp::KERNEL).unwrap();
        for at in held.into_iter().chain([more]) {
            // SAFETY: not used after.
            unsafe { rig.kmem_cache_free(&cache, at).unwrap() };
        }
        rig.kmem_cache_destroy(cache).unwrap();
    });
}

#[test]
fn caches_that_make_no_sense_are_refused() {
    let rig = Rig::flat();
    rig.run(|_| {
        let none = SlabFlags::empty();
        let refused = |name, size, align, flags| {
            rig.kmem_cache_create(name, size, align, flags, None).unwrap_err()
        };
        assert_eq!(refused("", 8, 0, none), CacheError::Name);
        assert_eq!(refused("two words", 8, 0, none), CacheError::Name);
        assert_eq!(refused("a-name-of-thirty-two-characters-", 8, 0, none), CacheError::Name);
        assert_eq!(refused("none", 0, 0, none), CacheError::Size);
        assert_eq!(refused("large", 8193, 0, none), CacheError::Size);
        assert_eq!(refused("odd", 8, 3, none), CacheError::Align);
        assert_eq!(refused("wide", 8, 8192, none), CacheError::Align);
        let both = SlabFlags::CACHE_DMA | SlabFlags::CACHE_DMA32;
        assert_eq!(refused("both", 8, 0, both), CacheError::Flags);
        let mark = rig.mark();
        let _ = refused("none", 0, 0, none);
        assert!(rig.one_report(mark).contains("kmem_cache_create(none) failed"));
    });
}

#[test]
fn neither_end_of_a_cache_works_in_atomic_context() {
    let rig = Rig::flat();
    rig.run(|process| {
        let cache = rig.kmem_cache_create("here", 8, 0, SlabFlags::NO_MERGE, None).unwrap();
        let lock = kmem::sync::SpinLock::new(());
        let cache = lock.with(rig.platform(), process, |_, ()| {
            let refused = rig.kmem_cache_create("there", 8, 0, SlabFlags::empty(), None);
            assert_eq!(refused.unwrap_err(), CacheError::Context);
            let at = rig.kmem_cache_alloc(&cache, Gfp::ATOMIC).unwrap();
            assert_eq!(rig.kmem_cache_alloc(&cache, Gfp::KERNEL), Err(AllocError::Context));
            // SAFETY: not used after.
            unsafe { rig.kmem_cache_free(&cache, at).unwrap() };
            rig.kmem_cache_destroy(cache).unwrap_err().cache
        });
        rig.kmem_cache_destroy(cache).unwrap();
    });
}

#[test]
#[should_panic(expected = "kmem_cache_create(must) failed")]
fn a_cache_that_must_be_panics_when_it_cannot() {
    let rig = Rig::flat();
    rig.run(|_| {
        rig.kmem_cache_create("must", 0, 0, SlabFlags::PANIC, None).map(|_| ()).unwrap_or(())
    });
}

#[test]
fn dma_caches_are_in_their_zones() {
    let rig = Rig::new(Shape::x86_64(64 * MIB), Config::default());
    rig.run(|_| {
        let dma = rig.kmem_cache_create("dma", 64, 0, SlabFlags::CACHE_DMA, None).unwrap();
        let at = rig.kmem_cache_alloc(&dma, Gfp::KERNEL).unwrap();
        let page = rig.virt_to_page(at.as_ptr()).unwrap();
        assert_eq!(rig.place(page).1, kmem::ZoneType::Dma);
        // SAFETY: not used after.
        unsafe { rig.kmem_cache_free(&dma, at).unwrap() };
        rig.kmem_cache_destroy(dma).unwrap();
    });
}

#[test]
fn memory_runs_out_as_an_error_and_comes_back() {
    let rig = Rig::new(Shape::no_dma(16 * MIB), Config::default());
    rig.run(|_| {
        let cache = rig.kmem_cache_create("all", 1000, 0, SlabFlags::empty(), None).unwrap();
        let mut held: Vec<NonNull<u8>> = Vec::new();
        let last = loop {
            match rig.kmem_cache_alloc(&cache, Gfp::KERNEL | QUIET) {
                Ok(at) => held.push(at),
                Err(e) => break e,
            }
        };
        assert_eq!(last, AllocError::NoMemory);
        assert!(held.len() > 12_000, "{}", held.len());
        rig.audit_objects().unwrap();
        for at in held.drain(..) {
            // SAFETY: not used after.
            unsafe { rig.kmem_cache_free(&cache, at).unwrap() };
        }
        assert!(rig.kmem_cache_alloc(&cache, Gfp::KERNEL).map(|at| held.push(at)).is_ok());
        // SAFETY: not used after.
        unsafe { rig.kmem_cache_free_bulk(&cache, &held).unwrap() };
        rig.kmem_cache_destroy(cache).unwrap();
    });
}

#[test]
fn bulk_is_all_or_nothing() {
    let rig = Rig::new(Shape::no_dma(16 * MIB), Config::default());
    rig.run(|_| {
        let cache = rig.kmem_cache_create("bulk", 4096, 0, SlabFlags::empty(), None).unwrap();
        let mut objects = [NonNull::dangling(); 64];
        rig.kmem_cache_alloc_bulk(&cache, Gfp::KERNEL, &mut objects).unwrap();
        assert_eq!(objects.iter().collect::<HashSet<_>>().len(), 64);
        // SAFETY: not used after.
        unsafe { rig.kmem_cache_free_bulk(&cache, &objects).unwrap() };
        let mut more = vec![NonNull::dangling(); 5000];
        let refused = rig.kmem_cache_alloc_bulk(&cache, Gfp::KERNEL | QUIET, &mut more);
        assert_eq!(refused, Err(AllocError::NoMemory));
        assert_eq!(rig.audit_objects().unwrap().live, 0);
        rig.kmem_cache_destroy(cache).unwrap();
    });
}
