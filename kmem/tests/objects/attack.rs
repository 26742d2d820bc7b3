//! What came of trying to break the layer: one test for each way that once worked.

use super::{
    QUIET,
    stage::{Cue, Machine, NOBODY, be},
};
use kmem::{
    AllocError, Config, Gfp, Misuse, Pfn,
    context::{Path, Section},
    platform::Platform,
    slab::{KmemCache, SlabFlags},
};
use kmem_hosted::Shape;
use kmem_test_support::{MIB, Rig};
use std::{
    collections::HashSet,
    ptr::NonNull,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
        mpsc,
    },
    thread,
};

type M = Machine<12>;

fn cache<const S: u32>(m: &Machine<S>, name: &str, size: usize) -> KmemCache {
    m.kmem_cache_create(name, size, 0, SlabFlags::NO_MERGE, None).unwrap()
}

/// Takes `n` objects and gives them back, so that they are in the CPU's magazines.
fn warm(m: &M, cache: &KmemCache, n: usize) {
    let held: Vec<_> = (0..n).map(|_| m.kmem_cache_alloc(cache, Gfp::KERNEL).unwrap()).collect();
    // SAFETY: not used after.
    unsafe { m.kmem_cache_free_bulk(cache, &held).unwrap() };
}

/// A cache is destroyed while another CPU, asked by somebody else, is in the middle of emptying its magazines
/// and past those of the cache: it must come back to them.
#[test]
fn a_cache_that_dies_behind_a_flush() {
    let m = M::new(&[8], Config::default());
    let (a, b) = (cache(&m, "early", 64), cache(&m, "late", 64));
    be(1);
    warm(&m, &a, 3);
    warm(&m, &b, 3);
    let cached = m.kmem_cache_info(&a).cached_objects;
    assert!(cached >= 3);
    let (past, heard) = mpsc::channel();
    let (kicked, go) = (Arc::new(AtomicBool::new(false)), AtomicUsize::new(0));
    let asked = Arc::clone(&kicked);
    m.stage().set_prompter(move |kmem, cue| {
        if cue == Cue::Kick(1) {
            asked.store(true, SeqCst);
        }
        // One lock for the objects of each cache; at the second one, those of the first are through.
        if cue == Cue::Mask(1)
            && kmem.platform().cpu(1).unwrap().path() == Path::ObjFlush
            && go.fetch_add(1, SeqCst) == 1
        {
            past.send(()).unwrap();
            while !asked.load(SeqCst) {
                thread::yield_now();
            }
        }
    });
    thread::scope(|s| {
        s.spawn(|| {
            be(1);
            m.kmem_cache_shrink(&b);
        });
        heard.recv().unwrap();
        be(0);
        m.kmem_cache_destroy(a).unwrap();
    });
    m.stage().dismiss_prompter();
    assert!(kicked.load(SeqCst));
    m.audit_objects().unwrap();
    // Its number, and likely its memory, goes to one of another layout. 2 is what a live object's state byte is.
    let c = cache(&m, "heir", 200);
    be(1);
    let held: Vec<_> = (0..40).map(|_| m.kmem_cache_alloc(&c, Gfp::KERNEL).unwrap()).collect();
    // SAFETY: objects of that size, ours.
    held.iter().for_each(|at| unsafe { at.write_bytes(2, 200) });
    for at in &held {
        // SAFETY: not used after; the second time it is found out.
        unsafe {
            m.kmem_cache_free(&c, *at).unwrap();
            assert!(m.kmem_cache_free(&c, *at).is_err());
        }
    }
    m.audit_objects().unwrap();
    be(0);
    for cache in [b, c] {
        m.kmem_cache_destroy(cache).unwrap();
    }
}

/// A node without memory, and one whose memory is used up: objects come from slabs that are there.
#[test]
fn a_node_without_memory_shares_slabs() {
    let m = M::new(&[4, 0], Config::default());
    let cache = cache(&m, "guests", 64);
    be(1);
    let held: Vec<_> = (0..600).map(|_| m.kmem_cache_alloc(&cache, Gfp::KERNEL).unwrap()).collect();
    let info = m.kmem_cache_info(&cache);
    assert!(info.slabs <= 600 / u64::from(info.objects_per_slab) + 2, "{info:?}");
    // SAFETY: not used after.
    unsafe { m.kmem_cache_free_bulk(&cache, &held).unwrap() };
    m.kmem_cache_destroy(cache).unwrap();
}

#[test]
fn a_node_that_ran_out_shares_slabs() {
    let m = M::new(&[4, 4], Config::default());
    let cache = cache(&m, "guests", 64);
    be(1);
    let this = Gfp::KERNEL | Gfp::THISNODE | QUIET;
    let full: Vec<_> = std::iter::from_fn(|| m.alloc_pages(this, 0).ok()).collect();
    for node in [-1, 1] {
        let held: Vec<_> =
            (0..600).map(|_| m.kmem_cache_alloc_node(&cache, Gfp::KERNEL, node).unwrap()).collect();
        let info = m.kmem_cache_info(&cache);
        assert!(info.slabs <= 600 / u64::from(info.objects_per_slab) + 2, "{info:?}");
        assert!(m.kmem_cache_alloc_node(&cache, this, 1).is_err());
        // SAFETY: not used after.
        unsafe { m.kmem_cache_free_bulk(&cache, &held).unwrap() };
    }
    for page in full {
        m.__free_page(page).unwrap();
    }
    m.kmem_cache_destroy(cache).unwrap();
}

/// A large block that is mapped somewhere cannot be freed, and can once it is not.
#[test]
fn a_large_block_in_use_as_a_page() {
    let m = M::new(&[4], Config::default());
    let at = m.kmalloc(20_000, Gfp::KERNEL).unwrap();
    let page = m.virt_to_page(at.as_ptr()).unwrap();
    page.inc_mapcount();
    // SAFETY: it is refused.
    let refused = unsafe { m.kfree(at.as_ptr()) };
    assert!(matches!(refused, Err(Misuse::StillMapped { .. })), "{refused:?}");
    page.dec_mapcount();
    assert_eq!(m.ksize(at.as_ptr()), Some(32 << 10), "nothing changed");
    // SAFETY: not used after.
    unsafe { m.kfree(at.as_ptr()).unwrap() };
}

/// What the layer needs for itself is ordinary memory, whatever the request that it is made for says.
#[test]
fn a_first_request_for_high_memory() {
    let rig = Rig::new(Shape::x86_32(1200 * MIB), Config::default());
    rig.run(|_| {
        let refused = rig.kmalloc(8, Gfp::KERNEL | Gfp::HIGHMEM);
        assert!(matches!(refused, Err(AllocError::Invalid(_))), "{refused:?}");
        let at = rig.kmalloc(8, Gfp::KERNEL | Gfp::MOVABLE).unwrap();
        // SAFETY: not used after.
        unsafe { rig.kfree(at.as_ptr()).unwrap() };
    });
}

/// The last object of a slab is written beyond its end, over the state bytes: the layer goes on with what is
/// left, and says so where it notices.
#[test]
fn state_bytes_overwritten() {
    let m = M::new(&[4], Config::default());
    be(NOBODY);
    let cache = cache(&m, "overrun", 72);
    let first = m.kmem_cache_alloc(&cache, Gfp::KERNEL).unwrap();
    let nr = m.kmem_cache_info(&cache).objects_per_slab as usize;
    let start = first.addr().get() & !4095;
    let states = NonNull::new(first.as_ptr().wrapping_add(nr * 72)).unwrap();
    // SAFETY: in the slab. All but the first two objects are no longer free.
    unsafe { states.add(2).write_bytes(0xee, nr - 2) };
    let second = m.kmem_cache_alloc(&cache, Gfp::KERNEL).unwrap();
    let other = m.kmem_cache_alloc(&cache, Gfp::KERNEL).unwrap();
    assert_eq!(second.addr().get() & !4095, start);
    assert_ne!(other.addr().get() & !4095, start, "another slab");
    // SAFETY: as above. They are in use, if anything, and go back that way.
    unsafe { states.add(2).write_bytes(2, nr - 2) };
    for i in 0..nr {
        let at = first.as_ptr().wrapping_add(i * 72);
        // SAFETY: not used after.
        unsafe { m.kfree(at).unwrap() };
    }
    // SAFETY: as above.
    unsafe { m.kmem_cache_free(&cache, other).unwrap() };
    m.kmem_cache_destroy(cache).unwrap();
}

/// With `__GFP_ZERO` all along, what krealloc grows into is zeros, in place or not.
#[test]
fn krealloc_grows_into_zeros() {
    let m = M::new(&[4], Config::default());
    let zero = Gfp::KERNEL | Gfp::ZERO;
    for size in [9, 40, 70, 100, 200, 5000, 9000] {
        // Memory that is not zeros to begin with.
        let dirty = m.kmalloc(size, Gfp::KERNEL).unwrap();
        let usable = m.ksize(dirty.as_ptr()).unwrap();
        // SAFETY: that many bytes are ours until they are given back.
        unsafe {
            dirty.write_bytes(0xff, usable);
            m.kfree(dirty.as_ptr()).unwrap();
            let mut at = m.kzalloc(size, Gfp::KERNEL).unwrap();
            at.write_bytes(0xff, size);
            let mut grow = |to: usize, kept: usize| {
                at = m.krealloc(at.as_ptr(), to, zero).unwrap();
                let bytes = std::slice::from_raw_parts(at.as_ptr(), to);
                assert!(bytes[..kept].iter().all(|b| *b == 0xff), "{size} to {to}");
                assert!(bytes[kept..].iter().all(|b| *b == 0), "{size} to {to}");
            };
            grow(usable, size);
            grow(size / 2, size / 2);
            grow(usable, size / 2);
            grow(2 * usable, size / 2);
            m.kfree(at.as_ptr()).unwrap();
        }
    }
}

/// Magazines are made of memory to spare: nobody is killed for them.
#[test]
fn magazines_are_nobodys_death() {
    let rig = Rig::flat();
    let cache =
        rig.run(|_| rig.kmem_cache_create("spare", 64, 0, SlabFlags::NO_MERGE, None).unwrap());
    let kept = rig.run(|_| rig.kmem_cache_alloc(&cache, Gfp::KERNEL).unwrap());
    rig.on(1, &kmem::context::Task::new(), |_| {
        let full = rig.exhaust(Gfp::NOWAIT | Gfp::HIGH | Gfp::MEMALLOC, 0);
        let stalls = rig.stalls();
        // The slab has free objects; the CPU has no table yet.
        let at = rig.kmem_cache_alloc(&cache, Gfp::KERNEL).unwrap();
        assert_eq!(rig.stalls(), stalls, "nobody reclaims for a magazine");
        rig.release(full);
        // SAFETY: not used after.
        unsafe { rig.kmem_cache_free(&cache, at).unwrap() };
    });
    rig.run(|_| {
        // SAFETY: not used after.
        unsafe { rig.kmem_cache_free(&cache, kept).unwrap() };
        rig.kmem_cache_destroy(cache).unwrap();
    });
}

/// Before interrupts are on, requests that may sleep are served as if they may not.
#[test]
fn early_boot_allocates_with_interrupts_masked() {
    let early = Gfp::all() - Gfp::RECLAIM - Gfp::IO - Gfp::FS;
    let m = M::new(&[4], Config { gfp_allowed_mask: early, ..Config::default() });
    let state = m.platform().local_irq_save();
    let cache = cache(&m, "early", 64);
    let at = m.kmem_cache_alloc(&cache, Gfp::KERNEL).unwrap();
    let other = m.kmalloc(100, Gfp::KERNEL).unwrap();
    // SAFETY: not used after.
    unsafe {
        m.kmem_cache_free(&cache, at).unwrap();
        m.kfree(other.as_ptr()).unwrap();
    }
    m.set_gfp_allowed_mask(Gfp::all());
    assert_eq!(m.kmalloc(100, Gfp::KERNEL), Err(AllocError::Context));
    m.platform().local_irq_restore(state);
    m.kmem_cache_destroy(cache).unwrap();
}

/// An NMI may land on a holder of any lock, so it takes none.
#[test]
fn an_nmi_shrinks_nothing() {
    let m = M::new(&[4], Config::default());
    let cache = cache(&m, "still", 64);
    warm(&m, &cache, 3);
    let cpu = m.platform().cpu(0).unwrap();
    cpu.enter(Section::Nmi);
    let masked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&masked);
    m.stage().set_prompter(move |_, _| {
        count.fetch_add(1, SeqCst);
    });
    assert_eq!((m.kmem_cache_shrink(&cache), m.drop_slab()), (0, 0));
    assert_eq!(masked.load(SeqCst), 0, "locks taken in an NMI");
    cpu.leave(Section::Nmi);
    m.stage().dismiss_prompter();
    m.kmem_cache_destroy(cache).unwrap();
}

/// In slabs of all colours only the beginnings of objects can be freed.
#[test]
fn addresses_of_another_colour() {
    let m = M::new(&[4], Config::default());
    for (size, align) in [(600, 64), (200, 0), (700, 4), (320, 64)] {
        let flags = SlabFlags::NO_MERGE;
        let cache = m.kmem_cache_create("colours", size, align, flags, None).unwrap();
        let info = m.kmem_cache_info(&cache);
        let n = 4 * info.objects_per_slab as usize;
        let slab = (info.frames_per_slab as usize) << 12;
        let held: HashSet<_> =
            (0..n).map(|_| m.kmem_cache_alloc(&cache, Gfp::KERNEL).unwrap()).collect();
        let starts: HashSet<_> = held.iter().map(|at| at.addr().get() & !4095).collect();
        let base = m.page_address(m.pfn_to_page(Pfn(0)).unwrap()).unwrap().as_ptr();
        for at in starts.iter().flat_map(|start| (0..4096).step_by(4).map(move |by| start + by)) {
            let at = NonNull::new(base.with_addr(at)).unwrap();
            if !held.contains(&at) {
                // SAFETY: it is found out.
                let refused = unsafe { m.kfree(at.as_ptr()) };
                assert!(matches!(refused, Err(Misuse::InsideObject { .. })), "{at:?}: {refused:?}");
            }
        }
        assert!(starts.len() * 4096 >= 4 * slab);
        let held: Vec<_> = held.into_iter().collect();
        // SAFETY: not used after.
        unsafe { m.kmem_cache_free_bulk(&cache, &held).unwrap() };
        m.kmem_cache_destroy(cache).unwrap();
    }
}

/// Magazines and the like are objects, but nobody else's.
#[test]
fn the_layers_own_objects_are_not_for_others() {
    let m = M::new(&[4], Config::default());
    let cache = cache(&m, "outer", 64);
    warm(&m, &cache, 3);
    let mut own = 0;
    for pfn in 0..2048 {
        let page = m.pfn_to_page(Pfn(pfn)).unwrap();
        let base = m.page_address(page).unwrap().as_ptr();
        for by in (0..4096).step_by(64) {
            let at = base.wrapping_add(by);
            assert_eq!(m.ksize(at), None, "{at:?}");
            // SAFETY: it is found out.
            let refused = unsafe { m.kfree_sensitive(at) };
            assert!(refused.is_err());
            own += usize::from(page.page_count() > 0);
        }
    }
    assert!(own > 64);
    m.kmem_cache_destroy(cache).unwrap();
}

/// Every layout on every size of frame: objects apart from each other and from the state bytes, whichever
/// colour their slab has, and each freed by its address alone.
fn every_stride<const S: u32>() {
    let m = Machine::<S>::new(&[2], Config::default());
    for size in (8..=8192).step_by(8).filter(|s| s % 64 == 0 || s % 264 == 0 || *s < 200) {
        let cache = cache(&m, "strides", size);
        let info = m.kmem_cache_info(&cache);
        let n = (3 * info.objects_per_slab as usize).min(500);
        let held: Vec<_> =
            (0..n).map(|_| m.kmem_cache_alloc(&cache, Gfp::KERNEL).unwrap()).collect();
        for at in &held {
            // SAFETY: an object of that size, ours. 2 is what a live object's state byte is.
            unsafe { at.write_bytes(2, size) };
        }
        assert_eq!(held.iter().collect::<HashSet<_>>().len(), n);
        m.audit_objects().unwrap();
        for at in &held {
            // SAFETY: not used after; what is inside, and what comes again, is found out.
            unsafe {
                assert!(m.kfree(at.as_ptr().wrapping_add(4)).is_err(), "size {size}");
                m.kmem_cache_free(&cache, *at).unwrap();
                assert!(m.kfree(at.as_ptr()).is_err());
            }
        }
        m.stage().take_reports();
        m.kmem_cache_destroy(cache).unwrap();
    }
}

#[test]
fn every_stride_on_frames_of_4_kib() {
    every_stride::<12>();
}

#[test]
fn every_stride_on_frames_of_8_kib() {
    every_stride::<13>();
}

#[test]
fn every_stride_on_frames_of_16_kib() {
    every_stride::<14>();
}

#[test]
fn every_stride_on_frames_of_64_kib() {
    every_stride::<16>();
}

/// Every address of every slab of caches whose slabs have colours, of all strides: none that is not an object's is
/// taken for one, whatever lies before the slab.
#[test]
fn addresses_before_the_first_object() {
    let m = M::new(&[4], Config::default());
    be(0);
    for size in (8..=512).step_by(8) {
        let cache = cache(&m, "swept", size);
        let mut objects = Vec::new();
        let mut slabs = std::collections::BTreeSet::new();
        let bytes = m.kmem_cache_info(&cache).frames_per_slab as usize * 4096;
        while slabs.len() < 3 {
            let at = m.kmem_cache_alloc(&cache, Gfp::KERNEL).unwrap();
            slabs.insert(at.addr().get() & !(bytes - 1));
            objects.push(at);
        }
        // A neighbour's last bytes look like those of objects in use.
        let neighbours: Vec<_> = (0..64).map(|_| m.kmalloc(4096, Gfp::KERNEL).unwrap()).collect();
        // SAFETY: objects of the size.
        neighbours.iter().for_each(|at| unsafe { at.write_bytes(2, 4096) });
        let first = objects[0];
        for start in &slabs {
            let lowest = objects
                .iter()
                .map(|at| at.addr().get())
                .filter(|at| at & !(bytes - 1) == *start)
                .min();
            for at in (*start..lowest.unwrap_or(*start).min(start + bytes)).step_by(8) {
                let at = first.as_ptr().with_addr(at);
                if m.ksize(at).is_none() {
                    // SAFETY: it is refused.
                    let refused = unsafe { m.kmem_cache_free(&cache, NonNull::new(at).unwrap()) };
                    assert!(refused.is_err(), "size {size}, {at:?}");
                }
            }
        }
        let whole = |at: &NonNull<u8>| {
            // SAFETY: an object of ours.
            let bytes = unsafe { std::slice::from_raw_parts(at.as_ptr(), 4096) };
            bytes.iter().all(|byte| *byte == 2)
        };
        assert!(neighbours.iter().all(whole), "size {size}: somebody else's bytes");
        for at in neighbours {
            // SAFETY: not used after.
            unsafe { m.kfree(at.as_ptr()).unwrap() };
        }
        // SAFETY: as above.
        unsafe { m.kmem_cache_free_bulk(&cache, &objects).unwrap() };
        m.kmem_cache_destroy(cache).unwrap();
    }
    m.stage().take_reports();
}
