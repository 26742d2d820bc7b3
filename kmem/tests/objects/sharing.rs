//! Several CPUs, several nodes, threads on no CPU.

use kmem::{
    Config, Gfp, Misuse,
    slab::{KmemCache, SlabFlags},
};
use kmem_hosted::Shape;
use kmem_test_support::{MIB, OomScript, Rig};
use std::{
    collections::BTreeSet,
    ptr::NonNull,
    sync::{
        Barrier, Mutex,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    thread,
};

/// An address that threads hand to each other.
#[derive(Clone, Copy)]
struct Sent(NonNull<u8>);

// SAFETY: an address; who has it uses what is there.
unsafe impl Send for Sent {}

#[test]
fn objects_freed_on_the_other_cpu() {
    let rig = Rig::flat();
    let shelf: Mutex<Vec<Sent>> = Mutex::new(Vec::new());
    let cache =
        rig.run(|_| rig.kmem_cache_create("moved", 64, 0, SlabFlags::NO_MERGE, None).unwrap());
    thread::scope(|s| {
        for cpu in 0..2 {
            let (rig, shelf, cache) = (&rig, &shelf, &cache);
            s.spawn(move || {
                rig.machine()
                    .run_on(Some(cpu), None, |_| {
                        for n in 0..20_000u64 {
                            let at = rig.kmem_cache_alloc(cache, Gfp::KERNEL).unwrap();
                            // SAFETY: an object of ours.
                            unsafe { at.cast::<u64>().write(n) };
                            let mut shelf = shelf.lock().unwrap();
                            shelf.push(Sent(at));
                            let i = n as usize * 7 % shelf.len();
                            let Sent(at) = shelf.swap_remove(i);
                            drop(shelf);
                            // SAFETY: taken off the shelf, so ours, and not used after.
                            unsafe { rig.kmem_cache_free(cache, at).unwrap() };
                            if n % 64 == 0 {
                                rig.machine().handle_ipi();
                            }
                        }
                    })
                    .unwrap();
            });
        }
    });
    rig.run(|_| {
        let audit = rig.audit_objects().unwrap();
        assert_eq!(audit.live, 0);
        rig.kmem_cache_destroy(cache).unwrap();
    });
}

#[test]
fn of_two_cpus_that_free_one_object_one_succeeds() {
    let rig = Rig::flat();
    let cache =
        rig.run(|_| rig.kmem_cache_create("raced", 64, 0, SlabFlags::NO_MERGE, None).unwrap());
    // One that stays, so that the slab does: of a slab that went the second free finds nothing at all.
    let anchor = rig.run(|_| rig.kmem_cache_alloc(&cache, Gfp::KERNEL).unwrap());
    let (barrier, done) = (Barrier::new(2), AtomicUsize::new(0));
    let target = Mutex::new(None::<Sent>);
    const ROUNDS: usize = 300;
    thread::scope(|s| {
        for cpu in 0..2 {
            let (rig, cache, barrier, done, target) = (&rig, &cache, &barrier, &done, &target);
            s.spawn(move || {
                for _ in 0..ROUNDS {
                    if cpu == 0 {
                        let at = rig.machine().run_on(Some(0), None, |_| {
                            rig.kmem_cache_alloc(cache, Gfp::KERNEL).unwrap()
                        });
                        *target.lock().unwrap() = Some(Sent(at.unwrap()));
                    }
                    barrier.wait();
                    let Sent(at) = target.lock().unwrap().unwrap();
                    let freed = rig.machine().run_on(Some(cpu), None, |_| {
                        // SAFETY: nobody uses the object; one of the two is refused.
                        unsafe { rig.kmem_cache_free(cache, at) }
                    });
                    match freed.unwrap() {
                        Ok(()) => {
                            done.fetch_add(1, Relaxed);
                        }
                        Err(e) => assert!(matches!(e, Misuse::ObjectFree { .. }), "{e:?}"),
                    }
                    barrier.wait();
                }
            });
        }
    });
    assert_eq!(done.load(Relaxed), ROUNDS);
    rig.run(|_| {
        // SAFETY: not used after.
        unsafe { rig.kmem_cache_free(&cache, anchor).unwrap() };
        rig.audit_objects().unwrap();
        rig.kmem_cache_destroy(cache).unwrap();
    });
}

/// Objects that a CPU allocates.
fn taken_on(rig: &Rig, cpu: usize, cache: &KmemCache, nr: usize) -> Vec<NonNull<u8>> {
    let take = || rig.kmem_cache_alloc(cache, Gfp::KERNEL).unwrap();
    rig.machine().run_on(Some(cpu), None, |_| (0..nr).map(|_| take()).collect()).unwrap()
}

fn frames(objects: &[NonNull<u8>]) -> BTreeSet<usize> {
    objects.iter().map(|at| at.addr().get() >> 12).collect()
}

#[test]
fn cpus_share_slabs_while_there_are_few_and_then_have_their_own() {
    let rig = Rig::flat();
    let slabs = |cache: &KmemCache| rig.kmem_cache_info(cache).slabs;
    let cache =
        rig.run(|_| rig.kmem_cache_create("shared", 64, 0, SlabFlags::NO_MERGE, None).unwrap());
    let mut first = taken_on(&rig, 0, &cache, 1);
    let mut second = taken_on(&rig, 1, &cache, 1);
    assert_eq!(slabs(&cache), 1, "one slab for one object of each CPU");
    assert_eq!(frames(&first), frames(&second));

    let per_slab = rig.kmem_cache_info(&cache).objects_per_slab as usize;
    first.extend(taken_on(&rig, 0, &cache, 8 * per_slab));
    let before = slabs(&cache);
    // What is left in the other's last slab, and in the shared one's magazine, is not for these.
    let own = taken_on(&rig, 1, &cache, 8 * per_slab);
    let common = frames(&own).intersection(&frames(&first)).count();
    assert!(common <= 1, "{common} slabs of both CPUs");
    assert!(slabs(&cache) - before >= 8, "{} slabs more", slabs(&cache) - before);
    second.extend(own);

    // The other CPU frees seven of eight: they go back to where they came from, and are had from there as long as those
    // slabs are half free.
    let mut kept = Vec::new();
    rig.machine()
        .run_on(Some(1), None, |_| {
            for (i, at) in first.drain(..).enumerate() {
                if i % 8 == 0 {
                    kept.push(at);
                } else {
                    // SAFETY: in use, and not after this.
                    unsafe { rig.kmem_cache_free(&cache, at).unwrap() };
                }
            }
        })
        .unwrap();
    rig.run(|_| rig.audit_objects().unwrap());
    let before = slabs(&cache);
    second.extend(taken_on(&rig, 1, &cache, 2 * per_slab));
    assert_eq!(slabs(&cache), before, "sparse slabs of the other CPU's are taken before a new one");

    rig.run(|_| {
        for at in kept.into_iter().chain(second) {
            // SAFETY: in use, and not after this.
            unsafe { rig.kmem_cache_free(&cache, at).unwrap() };
        }
        assert_eq!(rig.audit_objects().unwrap().live, 0);
        rig.kmem_cache_destroy(cache).unwrap();
    });
}

/// CPUs that write to the state bytes of one slab wait for each other's cache lines; a slab of several frames for each CPU
/// is memory.
#[test]
fn a_cpu_that_comes_again_has_slabs_of_its_own_where_they_are_small() {
    let rig = Rig::flat();
    for (size, shared) in [(64, false), (512, true)] {
        let cache = rig
            .run(|_| rig.kmem_cache_create("again", size, 0, SlabFlags::NO_MERGE, None).unwrap());
        let per_slab = rig.kmem_cache_info(&cache).objects_per_slab as usize;
        let mut first = taken_on(&rig, 0, &cache, 1);
        let mut second = taken_on(&rig, 1, &cache, 1);
        first.extend(taken_on(&rig, 0, &cache, per_slab / 4));
        second.extend(taken_on(&rig, 1, &cache, per_slab / 4));
        let others = frames(&first);
        let among = |at: &&NonNull<u8>| others.contains(&(at.addr().get() >> 12));
        if shared {
            assert_eq!(rig.kmem_cache_info(&cache).slabs, 1, "slabs of {size} bytes");
        } else {
            assert_eq!(second.iter().filter(among).count(), 1, "objects in the other's slab");
        }
        rig.run(|_| {
            for at in first.into_iter().chain(second) {
                // SAFETY: in use, and not after this.
                unsafe { rig.kmem_cache_free(&cache, at).unwrap() };
            }
            assert_eq!(rig.audit_objects().unwrap().live, 0);
            rig.kmem_cache_destroy(cache).unwrap();
        });
    }
}

/// What lies free on other CPUs' shelves is had before memory is reclaimed for a slab.
#[test]
fn nothing_is_reclaimed_while_other_cpus_shelves_have_objects() {
    let rig = Rig::flat();
    let oom = OomScript::install(&rig, |_, _| false);
    let cache =
        rig.run(|_| rig.kmem_cache_create("spread", 64, 0, SlabFlags::NO_MERGE, None).unwrap());
    let per_slab = rig.kmem_cache_info(&cache).objects_per_slab as usize;
    let mut held = taken_on(&rig, 1, &cache, 1);
    held.extend(taken_on(&rig, 0, &cache, 20 * per_slab));
    // Two of five go, so no slab is half free.
    let mut kept = Vec::new();
    rig.run(|_| {
        for (i, at) in held.into_iter().enumerate() {
            if i % 5 < 2 {
                // SAFETY: in use, and not after this.
                unsafe { rig.kmem_cache_free(&cache, at).unwrap() };
            } else {
                kept.push(at);
            }
        }
    });
    let pages = rig.run(|_| rig.exhaust(Gfp::KERNEL | Gfp::NOWARN, 0));
    let (calls, stalls) = (oom.calls(), rig.stalls());
    let slabs = rig.kmem_cache_info(&cache).slabs;
    kept.extend(taken_on(&rig, 1, &cache, 5 * per_slab));
    assert_eq!((oom.calls(), rig.stalls()), (calls, stalls), "nothing was reclaimed");
    assert!(rig.kmem_cache_info(&cache).slabs <= slabs + 1);
    rig.set_oom_handler(None);
    rig.run(|_| {
        rig.release(pages);
        for at in kept {
            // SAFETY: in use, and not after this.
            unsafe { rig.kmem_cache_free(&cache, at).unwrap() };
        }
        assert_eq!(rig.audit_objects().unwrap().live, 0);
        rig.kmem_cache_destroy(cache).unwrap();
    });
}

#[test]
fn machines_of_many_nodes_and_cpus_have_caches() {
    for (nodes, cpus) in [(1, 64), (3, 24), (32, 32), (64, 64)] {
        let mut shape = Shape::no_dma(8 * MIB);
        for node in 1..nodes {
            shape = shape.bank(node as u64 * 8 * MIB, 8 * MIB, node);
        }
        let rig = Rig::new(shape.cpus(cpus), Config::default());
        let cache =
            rig.run(|_| rig.kmem_cache_create("wide", 64, 0, SlabFlags::NO_MERGE, None).unwrap());
        let objects = [0, cpus / 2, cpus - 1].map(|cpu| taken_on(&rig, cpu, &cache, 100));
        rig.run(|_| {
            let audit = rig.audit_objects().unwrap();
            assert!(
                audit.own_frames <= 16,
                "{nodes} nodes: {} frames of its own",
                audit.own_frames
            );
            for at in objects.into_iter().flatten() {
                // SAFETY: in use, and not after this.
                unsafe { rig.kmem_cache_free(&cache, at).unwrap() };
            }
            rig.kmem_cache_destroy(cache).unwrap();
        });
    }
}

#[test]
fn a_thread_on_no_cpu_is_served() {
    let rig = Rig::flat();
    let held: Vec<_> = (0..100).map(|n| rig.kmalloc(1 + n * 7, Gfp::KERNEL).unwrap()).collect();
    let audit = rig.audit_objects().unwrap();
    assert_eq!((audit.live, audit.cached), (100, 0));
    for at in held {
        // SAFETY: not used after.
        unsafe { rig.kfree(at.as_ptr()).unwrap() };
    }
}

#[test]
fn objects_go_home_to_their_node() {
    let rig = Rig::new(Shape::numa(2, 64 * MIB), Config::default());
    let node_of = |at: NonNull<u8>| {
        let (pfn, _) = rig.place(rig.virt_to_page(at.as_ptr()).unwrap());
        rig.page_zone(pfn).unwrap().node()
    };
    // CPUs 0 and 1 are on node 0, 2 and 3 on node 1.
    let cache =
        rig.run(|_| rig.kmem_cache_create("homes", 64, 0, SlabFlags::NO_MERGE, None).unwrap());
    let far: Vec<_> = rig.on(2, &kmem::context::Task::new(), |_| {
        (0..50).map(|_| Sent(rig.kmem_cache_alloc(&cache, Gfp::KERNEL).unwrap())).collect()
    });
    assert!(far.iter().all(|at| node_of(at.0) == 1));
    rig.run(|_| {
        for Sent(at) in far {
            // SAFETY: not used after.
            unsafe { rig.kmem_cache_free(&cache, at).unwrap() };
        }
        // What is freed here is not given out here.
        let near: Vec<_> =
            (0..50).map(|_| rig.kmem_cache_alloc(&cache, Gfp::KERNEL).unwrap()).collect();
        assert!(near.iter().all(|at| node_of(*at) == 0));
        let asked = rig.kmem_cache_alloc_node(&cache, Gfp::KERNEL, 1).unwrap();
        assert_eq!(node_of(asked), 1);
        for at in near.into_iter().chain([asked]) {
            // SAFETY: not used after.
            unsafe { rig.kmem_cache_free(&cache, at).unwrap() };
        }
        rig.kmem_cache_destroy(cache).unwrap();
    });
}

#[test]
fn a_cpu_that_leaves_gives_its_magazines_up() {
    let rig = Rig::flat();
    let cache =
        rig.run(|_| rig.kmem_cache_create("left", 64, 0, SlabFlags::NO_MERGE, None).unwrap());
    rig.on(1, &kmem::context::Task::new(), |_| {
        let held: Vec<_> =
            (0..40).map(|_| rig.kmem_cache_alloc(&cache, Gfp::KERNEL).unwrap()).collect();
        for at in held {
            // SAFETY: not used after.
            unsafe { rig.kmem_cache_free(&cache, at).unwrap() };
        }
    });
    assert!(rig.kmem_cache_info(&cache).cached_objects > 0);
    rig.cpu_offline(1);
    assert_eq!(rig.kmem_cache_info(&cache).cached_objects, 0);
    rig.cpu_online(1);
    rig.run(|_| rig.kmem_cache_destroy(cache).unwrap());
}
