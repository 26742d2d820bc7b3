//! Objects freed wrongly: found out, reported, nothing changed \[S9\].

use kmem::{
    Gfp, Misuse,
    slab::SlabFlags,
    trace::{Event, TraceSink},
};
use kmem_hosted::Machine;
use kmem_test_support::Rig;
use std::{
    collections::BTreeSet,
    ptr::{self, NonNull},
    sync::{Arc, Mutex},
};

#[test]
fn freed_twice_wherever_it_lies() {
    let rig = Rig::flat();
    rig.run(|_| {
        let cache = rig.kmem_cache_create("twice", 64, 0, SlabFlags::NO_MERGE, None).unwrap();
        let held: Vec<_> =
            (0..300).map(|_| rig.kmem_cache_alloc(&cache, Gfp::KERNEL).unwrap()).collect();
        let again = |at: NonNull<u8>| {
            let mark = rig.mark();
            // SAFETY: it is found out.
            let refused = unsafe { rig.kmem_cache_free(&cache, at) };
            assert!(
                matches!(refused, Err(Misuse::ObjectFree { addr, .. }) if addr == at.addr().get()),
                "{refused:?}"
            );
            let report = rig.one_report(mark);
            assert!(report.contains("Bad object") && report.contains("twice"), "{report}");
        };
        // SAFETY: not used after.
        unsafe { rig.kmem_cache_free(&cache, held[0]).unwrap() };
        // In the loaded magazine.
        again(held[0]);
        // In the previous one, in the depot, and back in its slab.
        for at in &held[1..] {
            // SAFETY: as above.
            unsafe { rig.kmem_cache_free(&cache, *at).unwrap() };
        }
        let info = rig.kmem_cache_info(&cache);
        assert!(info.cached_objects > 0 && info.cached_objects < 300, "{info:?}");
        let still = |at: &&NonNull<u8>| rig.virt_to_page(at.as_ptr()).unwrap().page_count() > 0;
        let there: Vec<_> = held.iter().filter(still).collect();
        assert!(there.len() > info.cached_objects as usize);
        there.into_iter().for_each(|at| again(*at));
        rig.audit_objects().unwrap();
        rig.kmem_cache_destroy(cache).unwrap();
    });
}

/// Frees objects once more whenever a block of pages goes, and counts how often it was let.
#[derive(Default)]
struct Again(Mutex<Option<(Arc<Machine>, Vec<usize>)>>, Mutex<[usize; 2]>);

impl TraceSink for Again {
    fn event(&self, _cpu: Option<usize>, event: &Event) {
        // In an event of such a free nothing is done.
        let Ok(freed) = self.0.try_lock() else { return };
        if let (Event::PageFree { .. }, Some((m, objects))) = (event, &*freed) {
            for at in objects {
                // SAFETY: that it does no harm is what is tested.
                let let_be = unsafe { m.kfree(ptr::with_exposed_provenance_mut(*at)) }.is_err();
                self.1.lock().unwrap()[usize::from(let_be)] += 1;
            }
        }
    }
}

/// Slabs leave several at a time: those that are to go next are nobody's any more, and no large objects either.
#[test]
fn freed_twice_while_its_slab_leaves() {
    let rig = Rig::flat();
    let again: &Again = Box::leak(Box::default());
    rig.run(|_| {
        let cache = rig.kmem_cache_create("leaving", 256, 0, SlabFlags::NO_MERGE, None).unwrap();
        let held: Vec<_> =
            (0..999).map(|_| rig.kmem_cache_alloc(&cache, Gfp::KERNEL).unwrap()).collect();
        // One object of each slab is freed last: then a flush of a magazine ends several slabs.
        let (mut slabs, bytes) =
            (BTreeSet::new(), rig.kmem_cache_info(&cache).frames_per_slab as usize * 4096);
        let (last, first): (Vec<_>, Vec<_>) =
            held.iter().copied().partition(|at| slabs.insert(at.addr().get() / bytes));
        // SAFETY: not used after.
        unsafe { rig.kmem_cache_free_bulk(&cache, &first).unwrap() };
        rig.kmem_cache_shrink(&cache);
        let objects = held.iter().map(|at| at.as_ptr().expose_provenance()).collect();
        // SAFETY: as above.
        unsafe { rig.kmem_cache_free_bulk(&cache, &last).unwrap() };
        assert!(rig.kmem_cache_info(&cache).cached_objects > 4, "nothing is left to flush");
        *again.0.lock().unwrap() = Some((Arc::clone(rig.machine()), objects));
        rig.set_tracer(Some(again));
        rig.kmem_cache_shrink(&cache);
        rig.set_tracer(None);
        *again.0.lock().unwrap() = None;
        let [freed, refused] = *again.1.lock().unwrap();
        assert!(freed == 0 && refused >= 999, "{freed} were freed twice, {refused} were not");
        rig.kmem_cache_destroy(cache).unwrap();
    });
}

#[test]
fn freed_to_another_cache() {
    let rig = Rig::flat();
    rig.run(|_| {
        let a = rig.kmem_cache_create("mine", 64, 0, SlabFlags::NO_MERGE, None).unwrap();
        let b = rig.kmem_cache_create("yours", 64, 0, SlabFlags::NO_MERGE, None).unwrap();
        let at = rig.kmem_cache_alloc(&a, Gfp::KERNEL).unwrap();
        let other = rig.kmem_cache_alloc(&b, Gfp::KERNEL).unwrap();
        let mark = rig.mark();
        // SAFETY: it is found out.
        let refused = unsafe { rig.kmem_cache_free(&b, at) };
        assert!(matches!(refused, Err(Misuse::WrongCache { .. })), "{refused:?}");
        let report = rig.one_report(mark);
        assert!(report.contains("of mine freed to yours"), "{report}");
        // SAFETY: not used after; kfree takes what any cache gave.
        unsafe {
            rig.kmem_cache_free(&a, at).unwrap();
            rig.kfree(other.as_ptr()).unwrap();
        }
        rig.kmem_cache_destroy(a).unwrap();
        rig.kmem_cache_destroy(b).unwrap();
    });
}

#[test]
fn addresses_that_are_not_objects() {
    let rig = Rig::flat();
    rig.run(|_| {
        let small = rig.kmalloc(100, Gfp::KERNEL).unwrap();
        let odd = rig.kmem_cache_create("odd", 600, 64, SlabFlags::NO_MERGE, None).unwrap();
        let coloured: Vec<_> =
            (0..40).map(|_| rig.kmem_cache_alloc(&odd, Gfp::KERNEL).unwrap()).collect();
        let large = rig.kmalloc(20_000, Gfp::KERNEL).unwrap();
        let page = rig.alloc_page(Gfp::KERNEL).unwrap();
        let local = 0u64;
        let inside = |at: NonNull<u8>, by: usize| at.as_ptr().wrapping_add(by);
        for at in [inside(small, 1), inside(small, 64), inside(small, 127)]
            .into_iter()
            .chain(coloured.iter().map(|at| inside(*at, 8)))
        {
            // SAFETY: it is found out.
            let refused = unsafe { rig.kfree(at) };
            assert!(matches!(refused, Err(Misuse::InsideObject { .. })), "{refused:?}");
        }
        for at in [
            inside(large, 8),
            inside(large, 4096),
            rig.page_address(page).unwrap().as_ptr(),
            (&raw const local).cast_mut().cast(),
            std::ptr::without_provenance_mut(usize::MAX - 7),
            std::ptr::without_provenance_mut(8),
        ] {
            // SAFETY: it is found out.
            let refused = unsafe { rig.kfree(at) };
            assert!(matches!(refused, Err(Misuse::NotAnObject { .. })), "{at:?}: {refused:?}");
        }
        // Nobody frees a slab's pages, or a large object's, as pages.
        for at in [small, large] {
            let page = rig.virt_to_page(at.as_ptr()).unwrap();
            let order = page.state().order();
            assert!(matches!(rig.__free_pages(page, order), Err(Misuse::StillInUse { .. })));
        }
        // SAFETY: not used after.
        unsafe {
            rig.kfree(small.as_ptr()).unwrap();
            rig.kfree(large.as_ptr()).unwrap();
            assert!(rig.kfree(large.as_ptr()).is_err(), "a large one twice");
            rig.kmem_cache_free_bulk(&odd, &coloured).unwrap();
        }
        rig.__free_page(page).unwrap();
        rig.kmem_cache_destroy(odd).unwrap();
    });
}

#[test]
fn caches_of_another_machine() {
    let (rig, other) = (Rig::flat(), Rig::flat());
    let foreign =
        other.run(|_| other.kmem_cache_create("far", 64, 0, SlabFlags::NO_MERGE, None).unwrap());
    rig.run(|_| {
        let near = rig.kmem_cache_create("near", 8, 0, SlabFlags::NO_MERGE, None).unwrap();
        let at = rig.kmem_cache_alloc(&near, Gfp::KERNEL).unwrap();
        assert!(rig.kmem_cache_alloc(&foreign, Gfp::KERNEL).is_err());
        // SAFETY: it is found out.
        unsafe { assert!(rig.kmem_cache_free(&foreign, at).is_err()) };
        // SAFETY: not used after.
        unsafe { rig.kmem_cache_free(&near, at).unwrap() };
        rig.kmem_cache_destroy(near).unwrap();
    });
    let foreign = rig.run(|_| rig.kmem_cache_destroy(foreign).unwrap_err().cache);
    other.run(|_| other.kmem_cache_destroy(foreign).unwrap());
}

/// Of objects of a KiB and more the states lie in a table: no other address in a slab leads to one, whatever the slab's
/// colour.
#[test]
fn addresses_beside_large_objects() {
    let rig = Rig::flat();
    rig.run(|_| {
        for size in (1024..4800).step_by(64) {
            let cache = rig.kmem_cache_create("large", size, 0, SlabFlags::NO_MERGE, None).unwrap();
            let bytes = rig.kmem_cache_info(&cache).frames_per_slab as usize * 4096;
            let held: Vec<_> =
                (0..48).map(|_| rig.kmem_cache_alloc(&cache, Gfp::KERNEL).unwrap()).collect();
            let objects: BTreeSet<usize> = held.iter().map(|at| at.addr().get()).collect();
            let slabs: BTreeSet<usize> = objects.iter().map(|at| at & !(bytes - 1)).collect();
            for slab in slabs {
                // One slab lies behind the other in the direct map: an address before this one counts, too.
                for at in (slab..slab + bytes).step_by(64).filter(|at| !objects.contains(at)) {
                    let at = std::ptr::with_exposed_provenance_mut::<u8>(at);
                    // SAFETY: it is found out.
                    let refused = unsafe { rig.kfree(at) };
                    assert!(
                        matches!(
                            refused,
                            Err(Misuse::InsideObject { .. } | Misuse::ObjectFree { .. })
                        ),
                        "size {size}, {} bytes into a slab: {refused:?}",
                        at.addr() - slab
                    );
                }
            }
            for at in held {
                // SAFETY: not used after.
                unsafe { rig.kmem_cache_free(&cache, at).unwrap() };
            }
            rig.kmem_cache_destroy(cache).unwrap();
        }
        rig.audit_objects().unwrap();
    });
}
