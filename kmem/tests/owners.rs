//! Owners: they free what they own, once, and nobody can free it wrongly \[O1\].

use kmem::{
    AllocError, Config, Gfp,
    alloc::{Cache, KBox, Pages},
    slab::SlabFlags,
};
use kmem_hosted::Shape;
use kmem_test_support::{MIB, Rig};
use std::{
    cell::Cell,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread,
};

/// Counts its drops.
struct Counted<'a>(&'a Cell<u32>, u64);

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() + 1);
    }
}

#[test]
fn a_box_drops_its_value_once_and_frees_its_memory() {
    let rig = Rig::flat();
    rig.run(|_| {
        let drops = Cell::new(0);
        let mut boxed = KBox::new_on(&rig, Counted(&drops, 1), Gfp::KERNEL).unwrap();
        boxed.1 += 1;
        assert_eq!((boxed.1, rig.audit_objects().unwrap().live), (2, 1));
        drop(boxed);
        assert_eq!((drops.get(), rig.audit_objects().unwrap().live), (1, 0));

        let boxed = KBox::new_on(&rig, Counted(&drops, 3), Gfp::KERNEL).unwrap();
        let value = KBox::into_inner(boxed);
        assert_eq!((drops.get(), rig.audit_objects().unwrap().live), (1, 0));
        assert_eq!(value.1, 3);

        let raw = KBox::into_raw(KBox::new_on(&rig, Counted(&drops, 4), Gfp::KERNEL).unwrap());
        assert_eq!(rig.audit_objects().unwrap().live, 1);
        // SAFETY: from `into_raw`, on this machine, once.
        let boxed = unsafe { KBox::from_raw_on(&rig, raw) };
        assert_eq!(boxed.1, 4);
        let pinned = KBox::into_pin(boxed);
        drop(pinned);
        assert_eq!((drops.get(), rig.audit_objects().unwrap().live), (2, 0));
    });
}

#[test]
fn boxes_of_any_size_and_alignment() {
    #[repr(align(64))]
    struct Line([u8; 3]);
    #[repr(align(1024))]
    struct Wide([u8; 1500]);
    #[repr(align(8192))]
    struct Wider;
    let rig = Rig::flat();
    rig.run(|_| {
        let line = KBox::new_on(&rig, Line([1, 2, 3]), Gfp::KERNEL).unwrap();
        let wide = KBox::new_on(&rig, Wide([7; 1500]), Gfp::KERNEL).unwrap();
        let large = KBox::new_on(&rig, [9u8; 50_000], Gfp::KERNEL).unwrap();
        let nothing = KBox::new_on(&rig, (), Gfp::KERNEL).unwrap();
        assert!((&raw const *line).addr().is_multiple_of(64) && line.0 == [1, 2, 3]);
        assert!((&raw const *wide).addr().is_multiple_of(1024) && wide.0 == [7; 1500]);
        assert!(large.iter().all(|b| *b == 9));
        let () = *nothing;
        // Without a size there is nothing to align.
        let wider = KBox::new_on(&rig, Wider, Gfp::KERNEL).unwrap();
        assert!((&raw const *wider).addr().is_multiple_of(8192));
        // More than a frame: a block of frames.
        let two = KBox::new_on(&rig, (Wider, 1u8), Gfp::KERNEL).unwrap();
        assert!((&raw const *two).addr().is_multiple_of(8192) && two.1 == 1);
    });
}

#[test]
fn a_value_comes_back_when_there_is_no_memory() {
    let rig = Rig::new(Shape::no_dma(16 * MIB), Config::default());
    rig.run(|_| {
        let held = rig.exhaust(Gfp::KERNEL | Gfp::MEMALLOC | Gfp::NOWARN, 0);
        let drops = Cell::new(0);
        let refused = KBox::try_new_on(&rig, Counted(&drops, 5), Gfp::NOWAIT);
        let Err((e, value)) = refused else { panic!("there is memory") };
        assert_eq!((e, value.1, drops.get()), (AllocError::NoMemory, 5, 0));
        assert!(KBox::new_on(&rig, Counted(&drops, 6), Gfp::NOWAIT).is_err());
        assert_eq!(drops.get(), 1);
        rig.release(held);
    });
}

#[test]
fn slots_go_back_to_their_cache() {
    let rig = Rig::flat();
    rig.run(|_| {
        let drops = Cell::new(0);
        let cache = Cache::new(&rig, "counted", SlabFlags::NO_MERGE).unwrap();
        let mut slots: Vec<_> =
            (0..100).map(|n| cache.alloc(Counted(&drops, n), Gfp::KERNEL).unwrap()).collect();
        assert!(slots.iter().enumerate().all(|(n, slot)| slot.1 == n as u64));
        let value = kmem::alloc::Slot::into_inner(slots.swap_remove(50));
        assert_eq!((value.1, drops.get()), (50, 0));
        drop((slots, value));
        assert_eq!(drops.get(), 100);
        let audit = rig.audit_objects().unwrap();
        assert_eq!(audit.live, 0);
        assert!(cache.info().cached_objects > 0);
        assert!(cache.shrink() > 0);
        drop(cache);
        let mut names = Vec::new();
        rig.for_each_cache(|info| names.push(info.name.to_string()));
        assert!(!names.contains(&"counted".to_owned()), "{names:?}");
    });
}

#[test]
fn slots_go_home_to_their_node() {
    let rig = Rig::new(Shape::numa(2, 64 * MIB), Config::default());
    let node_of = |at: &u64| {
        let (pfn, _) = rig.place(rig.virt_to_page(std::ptr::from_ref(at).cast()).unwrap());
        rig.page_zone(pfn).unwrap().node()
    };
    let cache = rig.run(|_| Cache::new(&rig, "homes", SlabFlags::NO_MERGE).unwrap());
    let take = |n: u64| (0..n).map(|i| cache.alloc(i, Gfp::KERNEL).unwrap()).collect::<Vec<_>>();
    // CPUs 0 and 1 are on node 0, 2 and 3 on node 1.
    let far = rig.run_on(Some(2), None, |_| take(50)).unwrap();
    assert!(far.iter().all(|slot| node_of(slot) == 1));
    rig.run(|_| {
        // This CPU has magazines of the cache when the others come.
        drop(take(50));
        drop(far);
        assert!(take(50).iter().all(|slot| node_of(slot) == 0));
    });
    rig.run(|_| drop(cache));
}

#[test]
fn a_cache_with_forgotten_slots_stays_and_says_so() {
    let rig = Rig::flat();
    rig.run(|_| {
        let cache = Cache::new(&rig, "forgotten", SlabFlags::NO_MERGE).unwrap();
        let slot = cache.alloc(1u64, Gfp::KERNEL).unwrap();
        let at = (&raw const *slot).cast_mut().cast::<u8>();
        std::mem::forget(slot);
        let mark = rig.mark();
        drop(cache);
        assert!(rig.since(mark).iter().any(|(_, text)| text.contains("forgotten")));
        // SAFETY: forgotten, so nobody's.
        unsafe { rig.kfree(at).unwrap() };
    });
}

#[test]
fn owners_cross_threads() {
    let rig = Rig::flat();
    let drops = Arc::new(AtomicUsize::new(0));
    struct Sent(Arc<AtomicUsize>);
    impl Drop for Sent {
        fn drop(&mut self) {
            self.0.fetch_add(1, Relaxed);
        }
    }
    let boxed = rig.run(|_| KBox::new_on(&rig, Sent(drops.clone()), Gfp::KERNEL).unwrap());
    let pages = rig.run(|_| Pages::new(&rig, Gfp::KERNEL, 2).unwrap());
    thread::scope(|s| {
        s.spawn(|| drop((boxed, pages)));
    });
    assert_eq!(drops.load(Relaxed), 1);
}

#[test]
fn pages_know_their_order() {
    let rig = Rig::flat();
    rig.run(|_| {
        let block = Pages::new(&rig, Gfp::KERNEL, 4).unwrap();
        assert_eq!((block.order(), block.bytes()), (4, 65_536));
        assert!(block.pfn().0.is_multiple_of(16) && block.address().is_some());
        let Ok((low, high)) = block.split() else { panic!("nobody else has it") };
        assert_eq!((low.order(), high.order()), (3, 3));
        assert_eq!(high.pfn().0, low.pfn().0 + 8);
        drop(low);
        // Somebody else holds the other.
        rig.get_page(high.page()).unwrap();
        let Err(high) = high.split() else { panic!("it is shared") };
        let (page, order) = high.into_raw();
        assert_eq!((order, page.page_count()), (3, 2));
        rig.put_page(page).unwrap();
        rig.__free_pages(page, order).unwrap();
        let single = Pages::new(&rig, Gfp::KERNEL, 0).unwrap();
        let Err(single) = single.split() else { panic!("there are no halves of a frame") };
        drop(single);
    });
}
