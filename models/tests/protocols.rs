//! Each protocol of kmem that avoids a lock, and the one lock, in many thousand schedules \[C3\]: kmem's
//! own code, with two CPUs and interrupts at any atomic access.

use kmem::{
    Gfp, Kmem, MigrateType, Page, Pfn,
    context::Atomic,
    slab::{KmemCache, MoveResult, RCU_HEAD, SlabFlags},
    sync::SpinLock,
    vmstat::VmEvent,
    zone::Watermarks,
};
use kmem_models::{
    CPUS, Modelled, machine, machine_with_areas, machine_with_high_memory, modelled, on_cpu,
};
use shuttle::{
    Config, Runner,
    rand::{Rng, thread_rng},
    scheduler::RandomScheduler,
    thread,
};
use std::{
    ptr::NonNull,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering::SeqCst},
    },
};

/// Turns after which something that is to happen at once has not.
const PATIENCE: u64 = 10_000;

/// Schedules per model; `KMEM_MODEL_SCHEDULES` sets it.
fn schedules(default: usize) -> usize {
    std::env::var("KMEM_MODEL_SCHEDULES").map_or(default, |s| s.parse().expect("a number"))
}

/// Runs a model in so many schedules, drawn at random. A machine is made on the model's stack, and is larger than
/// shuttle's stacks usually are.
fn check_random(model: impl Fn() + Send + Sync + 'static, schedules: usize) {
    let mut config = Config::new();
    config.stack_size = 1 << 18;
    Runner::new(RandomScheduler::new(schedules), config).run(model);
}

/// Runs closures at once, each on a CPU of its own, with some timer interrupts each.
fn at_once<F, const N: usize>(kmem: &Arc<Kmem<Modelled>>, ticks: u32, work: [F; N])
where
    F: FnOnce(&Kmem<Modelled>) + Send + 'static,
{
    let done = Arc::new(AtomicUsize::new(0));
    let threads: Vec<_> = work
        .into_iter()
        .enumerate()
        .map(|(cpu, f)| {
            let (kmem, done) = (Arc::clone(kmem), Arc::clone(&done));
            thread::spawn(move || {
                let over = || done.load(SeqCst) == N;
                on_cpu(&kmem, cpu, ticks, over, |k| {
                    f(k);
                    done.fetch_add(1, SeqCst);
                });
            })
        })
        .collect();
    threads.into_iter().for_each(|t| t.join().unwrap());
}

/// Everything is free, wherever it lay, and nothing was reported.
fn check_all_free(kmem: &Arc<Kmem<Modelled>>, bugs: usize) {
    for cpu in 0..CPUS {
        on_cpu(kmem, cpu, 0, || true, |k| k.drain_this_cpu());
    }
    let audit = kmem.audit().unwrap();
    assert_eq!((audit.allocated, audit.free), (0, audit.managed), "{audit:?}");
    let reports = kmem.platform().bugs.lock().unwrap();
    assert_eq!(reports.len(), bugs, "{reports:?}");
}

/// Sets a timer that allocates and frees in turn.
fn busy_timer(kmem: &Kmem<Modelled>) -> Arc<Mutex<Vec<u32>>> {
    let held = Arc::new(Mutex::new(Vec::new()));
    let list = Arc::clone(&held);
    kmem.platform().set_timer(Arc::new(move |kmem, _cpu| {
        let freed = list.lock().unwrap().pop();
        match freed {
            Some(pfn) => kmem.__free_page(kmem.pfn_to_page(Pfn(pfn)).unwrap()).unwrap(),
            None => {
                let page = kmem.alloc_page(Gfp::ATOMIC).unwrap();
                let pfn = kmem.page_to_pfn(page).unwrap().0;
                list.lock().unwrap().push(pfn);
            }
        }
    }));
    held
}

fn free_held(kmem: &Kmem<Modelled>, held: &Mutex<Vec<u32>>) {
    for pfn in held.lock().unwrap().drain(..) {
        kmem.__free_page(kmem.pfn_to_page(Pfn(pfn)).unwrap()).unwrap();
    }
}

type Work = Box<dyn FnOnce(&Kmem<Modelled>) + Send>;

/// Ownership of a CPU's lists, work deferred to the owner, and requests to drain: no request is lost, and
/// nobody touches lists that are owned (a block would be handed out twice, or be lost).
#[test]
fn ownership_and_deferred_drains() {
    let run = || {
        let kmem = machine();
        let held = busy_timer(&kmem);
        let busy: Work = Box::new(|k| {
            let pages: Vec<&Page> = (0..3).map(|_| k.alloc_page(Gfp::NOWAIT).unwrap()).collect();
            for page in pages {
                k.__free_page(page).unwrap();
            }
            let mut pages = [None; 3];
            assert_eq!(k.alloc_pages_bulk(Gfp::NOWAIT, &mut pages), Ok(3));
            k.free_pages_bulk(&mut pages).unwrap();
            k.drain_this_cpu();
            let page = k.alloc_page(Gfp::NOWAIT).unwrap();
            k.__free_page(page).unwrap();
        });
        // Two of them: one may ask in the moment in which the other's request is done.
        let asking = || -> Work {
            Box::new(|k| {
                for _ in 0..3 {
                    let before = k.platform().relaxed();
                    k.drain_all_pages();
                    let turns = k.platform().relaxed() - before;
                    assert!(turns < PATIENCE, "a request to drain was lost");
                }
            })
        };
        at_once(&kmem, 4, [busy, asking(), asking()]);
        free_held(&kmem, &held);
        check_all_free(&kmem, 0);
    };
    check_random(run, schedules(1500));
}

/// Two free one block, an interrupt tries a third time: exactly one succeeds.
#[test]
fn a_double_free_frees_once() {
    let run = || {
        let kmem = machine();
        let pfn = {
            let page = kmem.alloc_pages(Gfp::KERNEL, 1).unwrap();
            kmem.page_to_pfn(page).unwrap()
        };
        let freed = Arc::new(AtomicU32::new(0));
        let tried = Arc::new(AtomicU32::new(0));
        let free = {
            let (freed, tried) = (Arc::clone(&freed), Arc::clone(&tried));
            move |k: &Kmem<Modelled>| {
                let ok = k.__free_pages(k.pfn_to_page(pfn).unwrap(), 1).is_ok();
                freed.fetch_add(u32::from(ok), SeqCst);
                tried.fetch_add(1, SeqCst);
            }
        };
        let in_timer = free.clone();
        kmem.platform().set_timer(Arc::new(move |k, _cpu| in_timer(k)));
        at_once(&kmem, 1, [free.clone(), free]);
        assert_eq!(freed.load(SeqCst), 1);
        check_all_free(&kmem, tried.load(SeqCst) as usize - 1);
    };
    check_random(run, schedules(1500));
}

/// Two CPUs change at once, in areas of their own, what the fast path's marks come from: the marks are those of
/// both changes in the end, whoever looked first and stored last. The audit compares them.
#[test]
fn marks_are_those_of_all_changes() {
    let run = || {
        let kmem = machine_with_areas(2);
        let shift = kmem.max_order();
        let reserved = [Pfn(1 << shift), Pfn(2 << shift)];
        on_cpu(
            &kmem,
            0,
            0,
            || true,
            |k| {
                for pfn in reserved {
                    assert!(k.set_pageblock_migratetype(pfn, MigrateType::HighAtomic));
                }
            },
        );
        let change = |pfn: Pfn| -> Work {
            Box::new(move |k| {
                let page = k.alloc_pages_at(pfn, 3, Gfp::NOWAIT).unwrap();
                k.__free_pages(page, 3).unwrap();
            })
        };
        at_once(&kmem, 0, reserved.map(change));
        check_all_free(&kmem, 0);
    };
    check_random(run, schedules(1500));
}

/// References come and go on two CPUs, one of them taken by somebody who knows only the frame number:
/// the block is freed once, by the last, and never while a reference is held.
#[test]
fn the_last_reference_frees() {
    let run = || {
        let kmem = machine();
        let page = kmem.alloc_pages(Gfp::KERNEL | Gfp::COMP, 1).unwrap();
        kmem.get_page(page).unwrap();
        let pfn = kmem.page_to_pfn(page).unwrap();
        let work = |by_order: bool| -> Work {
            Box::new(move |k| {
                let page = k.pfn_to_page(pfn).unwrap();
                if k.get_page_unless_zero(page) {
                    assert!(page.page_count() > 0 && k.buddy_order(pfn).is_none());
                    k.put_page(page).unwrap();
                }
                if by_order {
                    k.__free_pages(page, 1).unwrap();
                } else {
                    k.put_page(page).unwrap();
                }
                if k.get_page_unless_zero(page) {
                    assert!(page.page_count() > 0 && k.buddy_order(pfn).is_none());
                    k.put_page(page).unwrap();
                }
            })
        };
        at_once(&kmem, 0, [work(true), work(false)]);
        check_all_free(&kmem, 0);
    };
    check_random(run, schedules(1500));
}

/// The interrupt-masking spin lock: one holder at a time, on two CPUs and in interrupts, and no interrupt
/// finds its own CPU's lock held (it would spin for ever).
#[test]
fn the_lock_is_held_by_one() {
    let run = || {
        let kmem = machine();
        let lock = Arc::new((SpinLock::new(0u32), AtomicU32::new(0)));
        let step = {
            let lock = Arc::clone(&lock);
            move |k: &Kmem<Modelled>| {
                Atomic::interrupt(|atomic| {
                    lock.0.with_atomic(k.platform(), atomic, |_, n| {
                        assert_eq!(lock.1.fetch_add(1, SeqCst), 0, "two holders");
                        thread::yield_now();
                        *n += 1;
                        lock.1.fetch_sub(1, SeqCst);
                    });
                });
                assert!(k.platform().relaxed() < PATIENCE, "the lock is never given up");
            }
        };
        let in_timer = step.clone();
        kmem.platform().set_timer(Arc::new(move |k, _cpu| in_timer(k)));
        let work = move |k: &Kmem<Modelled>| (0..3).for_each(|_| step(k));
        at_once(&kmem, 3, [work.clone(), work]);
        let sum = Atomic::interrupt(|a| lock.0.with_atomic(kmem.platform(), a, |_, n| *n));
        assert_eq!(u64::from(sum), 6 + kmem.platform().ticks());
    };
    check_random(run, schedules(1500));
}

/// kswapd's bell: whoever rings it while kswapd falls asleep is heard. Sleeps have no timeout here.
#[test]
fn a_wake_up_of_kswapd_is_heard() {
    let slept = Arc::new(AtomicU32::new(0));
    let sum = Arc::clone(&slept);
    let run = move || {
        let kmem = machine();
        // Below low, above min and high: each request rings, and kswapd has nothing to do.
        let marks = Watermarks { min: 0, low: 1 << 20, high: 0, promo: 0 };
        kmem.set_watermarks(&kmem.zones()[0], marks);
        let stop = Arc::new(modelled::AtomicBool::new(false));
        let stopping = Arc::clone(&stop);
        let kswapd: Work = Box::new(move |k| k.kswapd_run(0, &stopping));
        let asking: Work = Box::new(move |k| {
            for _ in 0..3 {
                let runs = k.vm_event(VmEvent::PageOutRun);
                let page = k.alloc_page(Gfp::KERNEL).unwrap();
                k.__free_page(page).unwrap();
                let mut turns = 0;
                while k.vm_event(VmEvent::PageOutRun) == runs {
                    turns += 1;
                    assert!(turns < PATIENCE, "kswapd sleeps through a wake-up");
                    thread::yield_now();
                }
            }
            stop.store(true, SeqCst);
            k.nudge_kswapd();
        });
        at_once(&kmem, 0, [kswapd, asking]);
        sum.fetch_add(kmem.platform().slept.load(SeqCst), SeqCst);
        check_all_free(&kmem, 0);
    };
    check_random(run, schedules(1000));
    assert!(slept.load(SeqCst) > 100, "kswapd slept now and then");
}

/// Every object is back, and every frame but those that the slab layer keeps; so many misuses were reported.
fn check_all_back(kmem: &Arc<Kmem<Modelled>>, bugs: usize) {
    on_cpu(kmem, 0, 0, || true, |k| k.drop_slab());
    let objects = kmem.audit_objects().unwrap();
    assert_eq!((objects.live, objects.cached), (0, 0), "{objects:?}");
    for cpu in 0..CPUS {
        on_cpu(kmem, cpu, 0, || true, |k| k.drain_this_cpu());
    }
    let allocated = kmem.audit().unwrap().allocated;
    assert_eq!(allocated, objects.slab_frames + objects.own_frames);
    let reports = kmem.platform().bugs.lock().unwrap();
    assert_eq!(reports.len(), bugs, "{reports:?}");
}

fn cache(k: &Kmem<Modelled>, name: &str, size: usize) -> KmemCache {
    k.kmem_cache_create(name, size, 0, SlabFlags::NO_MERGE, None).unwrap()
}

/// Takes `n` objects, writes to them and gives them back.
fn cycle(k: &Kmem<Modelled>, cache: &KmemCache, n: usize) {
    let held: Vec<_> = (0..n).map(|_| k.kmem_cache_alloc(cache, Gfp::NOWAIT).unwrap()).collect();
    // SAFETY: objects of ours. 2 is what a live object's state byte is.
    held.iter().for_each(|at| unsafe { at.write_bytes(2, cache.size()) });
    // SAFETY: not used after.
    unsafe { k.kmem_cache_free_bulk(cache, &held).unwrap() };
}

/// The objects' fast paths own the CPU's lists as well: whoever asks meanwhile for anything is answered when they
/// let them go.
#[test]
fn fast_paths_of_objects_answer_requests() {
    let run = || {
        let kmem = machine();
        on_cpu(
            &kmem,
            0,
            0,
            || true,
            |k| {
                let at = k.kmalloc(64, Gfp::KERNEL).unwrap();
                // SAFETY: not used after.
                unsafe { k.kfree(at.as_ptr()).unwrap() };
                let page = k.alloc_page(Gfp::KERNEL).unwrap();
                k.__free_page(page).unwrap();
            },
        );
        let busy: Work = Box::new(|k| {
            for _ in 0..12 {
                let held = [(); 2].map(|()| k.kmalloc(64, Gfp::NOWAIT).unwrap());
                // SAFETY: not used after.
                held.into_iter().for_each(|at| unsafe { k.kfree(at.as_ptr()).unwrap() });
            }
        });
        let asking = || -> Work {
            Box::new(|k| {
                for _ in 0..2 {
                    let before = k.platform().relaxed();
                    k.drain_all_pages();
                    let turns = k.platform().relaxed() - before;
                    assert!(turns < PATIENCE, "a request to drain was lost");
                }
            })
        };
        at_once(&kmem, 0, [busy, asking(), asking()]);
        check_all_back(&kmem, 0);
    };
    check_random(run, schedules(500));
}

/// Magazines, interrupts that use them, and requests to give them up from two CPUs, one of which ends a cache:
/// what a CPU has of it is gone when it is.
#[test]
fn flushes_and_the_end_of_a_cache() {
    let run = || {
        let kmem = machine();
        let prepare = |k: &Kmem<Modelled>| {
            let (ends, stays) = (cache(k, "ends", 64), cache(k, "stays", 200));
            cycle(k, &ends, 3);
            cycle(k, &stays, 3);
            // Enough to make emptying the CPU's magazines take long.
            let more: Vec<_> = (0..5).map(|_| cache(k, "more", 48)).collect();
            more.iter().for_each(|cache| cycle(k, cache, 20));
            (ends, stays, more)
        };
        let (ends, stays, more) = on_cpu(&kmem, 0, 0, || true, prepare);
        let stays = Arc::new(stays);
        let (busy_with, shrunk) = (Arc::clone(&stays), Arc::clone(&stays));
        let in_timer = Arc::clone(&stays);
        kmem.platform().set_timer(Arc::new(move |k, _cpu| cycle(k, &in_timer, 2)));
        let busy: Work = Box::new(move |k| (0..3).for_each(|_| cycle(k, &busy_with, 4)));
        let ending: Work = Box::new(move |k| k.kmem_cache_destroy(ends).unwrap());
        let asking: Work = Box::new(move |k| {
            k.kmem_cache_shrink(&shrunk);
            k.kmem_cache_shrink(&more[0]);
        });
        at_once(&kmem, 2, [busy, ending, asking]);
        kmem.audit_objects().unwrap();
        // The next cache gets its number.
        on_cpu(
            &kmem,
            0,
            0,
            || true,
            |k| {
                let next = cache(k, "next", 96);
                cycle(k, &next, 30);
                k.audit_objects().unwrap();
            },
        );
        check_all_back(&kmem, 0);
    };
    check_random(run, schedules(300));
}

/// Two free one object, an interrupt tries a third time, and its slab goes as soon as it can: exactly one
/// succeeds. The state bytes are outside of the slab, and go with it.
#[test]
fn an_object_freed_twice_is_freed_once() {
    let run = || {
        let kmem = machine();
        let (cache, at) = on_cpu(
            &kmem,
            0,
            0,
            || true,
            |k| {
                let cache = cache(k, "raced", 8192);
                let at = k.kmem_cache_alloc(&cache, Gfp::KERNEL).unwrap();
                (cache, at.as_ptr().expose_provenance())
            },
        );
        let cache = Arc::new(cache);
        let freed = Arc::new(AtomicU32::new(0));
        let tried = Arc::new(AtomicU32::new(0));
        let free = {
            let (cache, freed, tried) =
                (Arc::clone(&cache), Arc::clone(&freed), Arc::clone(&tried));
            move |k: &Kmem<Modelled>| {
                let at = NonNull::new(std::ptr::with_exposed_provenance_mut(at)).unwrap();
                // SAFETY: nobody uses it; all but one are refused.
                let ok = unsafe { k.kmem_cache_free(&cache, at) }.is_ok();
                freed.fetch_add(u32::from(ok), SeqCst);
                tried.fetch_add(1, SeqCst);
                if ok {
                    k.kmem_cache_shrink(&cache);
                }
            }
        };
        let in_timer = free.clone();
        kmem.platform().set_timer(Arc::new(move |k, _cpu| in_timer(k)));
        at_once(&kmem, 1, [free.clone(), free]);
        assert_eq!(freed.load(SeqCst), 1);
        check_all_back(&kmem, tried.load(SeqCst) as usize - 1);
    };
    check_random(run, schedules(500));
}

/// An object that its user moves: where it is, and whether the user gave it up.
#[derive(Default)]
struct Movable {
    at: Mutex<(usize, bool)>,
    /// The callback was called, or will not be any more.
    began: AtomicBool,
    moved: AtomicU32,
    refused: AtomicU32,
}

impl Movable {
    /// Gives it up, and says where it is.
    fn give_up(&self) -> NonNull<u8> {
        let mut place = self.at.lock().unwrap();
        place.1 = true;
        NonNull::new(std::ptr::with_exposed_provenance_mut(place.0)).unwrap()
    }
}

/// The contents of the objects of that model.
const CONTENTS: u8 = 0x77;

unsafe fn move_unless_freed(from: NonNull<u8>, to: NonNull<u8>, private: usize) -> MoveResult {
    // SAFETY: the model's, which outlives the shrinking.
    let movable = unsafe { &*std::ptr::with_exposed_provenance::<Movable>(private) };
    movable.began.store(true, SeqCst);
    // Long enough for frees to come in between.
    (0..thread_rng().gen_range(0..60)).for_each(|_| thread::yield_now());
    let result = {
        let mut place = movable.at.lock().unwrap();
        if place.0 != from.addr().get() || place.1 {
            MoveResult::Refused
        } else {
            // SAFETY: two objects of that size.
            unsafe { to.copy_from_nonoverlapping(from, MOVED) };
            place.0 = to.as_ptr().expose_provenance();
            MoveResult::Moved
        }
    };
    thread::yield_now();
    // SAFETY: whatever became of it, its memory is nobody else's; the last bytes may be an rcu_head.
    let byte = |n| unsafe { from.add(n).read() };
    assert_eq!([byte(0), byte(MOVED / 2)], [CONTENTS; 2], "its memory is another's");
    match result {
        MoveResult::Moved => movable.moved.fetch_add(1, SeqCst),
        _ => movable.refused.fetch_add(1, SeqCst),
    };
    result
}

/// Bytes of an object that is moved.
const MOVED: usize = 1024;

/// A cache moves an object while two free it, each at once or once readers are done: one of them succeeds, whether it comes
/// before, during or after the move, and the object is freed once. Nobody is given its memory before the mover is done.
#[test]
fn an_object_that_is_moved_is_freed_once() {
    let during = Arc::new([AtomicU32::new(0), AtomicU32::new(0)]);
    let sums = Arc::clone(&during);
    let run = move || {
        let kmem = machine();
        let movable = Arc::new(Movable::default());
        let private = Arc::as_ptr(&movable).expose_provenance();
        // The first object of a slab of its own, and another slab with two.
        let prepare = |k: &Kmem<Modelled>| {
            let cache = cache(k, "moved", MOVED);
            let next = || k.kmem_cache_alloc(&cache, Gfp::KERNEL).unwrap();
            let first = next();
            let bytes = k.kmem_cache_info(&cache).frames_per_slab as usize * 4096;
            let slab = |at: &NonNull<u8>| at.addr().get() / bytes;
            let mut others = vec![next()];
            while others.iter().filter(|at| slab(at) != slab(&first)).count() < 3 {
                others.push(next());
            }
            let (ours, theirs): (Vec<_>, Vec<_>) =
                others.into_iter().partition(|at| slab(at) == slab(&first));
            let stay = theirs[..2].to_vec();
            // SAFETY: not used after.
            unsafe {
                k.kmem_cache_free_bulk(&cache, &ours).unwrap();
                k.kmem_cache_free_bulk(&cache, &theirs[2..]).unwrap();
            }
            k.kmem_cache_shrink(&cache);
            // SAFETY: ours.
            unsafe { first.write_bytes(CONTENTS, MOVED) };
            stay.iter().for_each(|at| unsafe { at.write_bytes(CONTENTS, MOVED) });
            movable.at.lock().unwrap().0 = first.as_ptr().expose_provenance();
            // SAFETY: the callback keeps the contract.
            unsafe {
                k.kmem_cache_set_move(&cache, Some(move_unless_freed), private).unwrap();
            }
            (cache, stay)
        };
        let (cache, stay) = on_cpu(&kmem, 0, 0, || true, prepare);
        let cache = Arc::new(cache);
        let freed = Arc::new(AtomicU32::new(0));
        let shrunk = Arc::clone(&cache);
        let moving = Arc::clone(&movable);
        let mover: Work = Box::new(move |k| {
            k.kmem_cache_shrink(&shrunk);
            moving.began.store(true, SeqCst);
        });
        let free = || -> Work {
            let (movable, freed) = (Arc::clone(&movable), Arc::clone(&freed));
            let [later, wait] = [0.5, 0.9].map(|p| thread_rng().gen_bool(p));
            Box::new(move |k| {
                while wait && !movable.began.load(SeqCst) {
                    thread::yield_now();
                }
                (0..thread_rng().gen_range(0..40)).for_each(|_| thread::yield_now());
                let at = movable.give_up().as_ptr();
                // SAFETY: nobody uses it; all but one are refused.
                let ok = unsafe {
                    match later {
                        true => k.kfree_rcu(at, MOVED - RCU_HEAD).is_ok(),
                        false => k.kfree(at).is_ok(),
                    }
                };
                freed.fetch_add(u32::from(ok), SeqCst);
            })
        };
        at_once(&kmem, 0, [mover, free(), free()]);
        assert_eq!(freed.load(SeqCst), 1);
        sums[0].fetch_add(movable.moved.load(SeqCst), SeqCst);
        sums[1].fetch_add(movable.refused.load(SeqCst), SeqCst);
        on_cpu(
            &kmem,
            0,
            0,
            || true,
            |k| {
                assert!(k.rcu_barrier());
                assert_eq!(k.audit_objects().unwrap().live, 2);
                // SAFETY: not used after.
                unsafe { k.kmem_cache_free_bulk(&cache, &stay).unwrap() };
                k.kmem_cache_shrink(&cache);
                assert_eq!(k.kmem_cache_info(&cache).slabs, 0);
            },
        );
        check_all_back(&kmem, 1);
    };
    check_random(run, schedules(500));
    let [moved, refused] = [0, 1].map(|n| during[n].load(SeqCst));
    assert!(moved > 20 && refused > 20, "{moved} moves, {refused} frees in one");
}

/// Three map pages, mostly more than there are places, while interrupts map theirs: everybody gets a place in the end, nobody
/// reaches another's page through what a CPU remembers, and sleepers for one page share its place.
#[test]
fn whoever_sleeps_for_a_place_gets_one() {
    let slept = Arc::new(AtomicUsize::new(0));
    let total = Arc::clone(&slept);
    let run = move || {
        let places = thread_rng().gen_range(1..3);
        let kmem = machine_with_high_memory(places);
        let pages = on_cpu(
            &kmem,
            0,
            0,
            || true,
            |k| {
                [0; 3].map(|_| {
                    let page = k.alloc_page(Gfp::HIGHUSER).unwrap();
                    k.page_to_pfn(page).unwrap()
                })
            },
        );
        let reach = |k: &Kmem<Modelled>, at: usize, pfn| {
            assert_eq!(k.platform().touch(at), Some(pfn), "another page is there");
        };
        kmem.platform().set_timer(Arc::new(move |k, _cpu| {
            let page = k.pfn_to_page(pages[2]).unwrap();
            let at = k.kmap_atomic(page).unwrap();
            reach(k, at.addr().get(), pages[2]);
            // SAFETY: not used after.
            unsafe { k.kunmap_atomic(at.as_ptr()).unwrap() };
        }));
        let map = |which: &'static [usize]| -> Work {
            Box::new(move |k| {
                for pfn in which.iter().map(|n| pages[*n]) {
                    let page = k.pfn_to_page(pfn).unwrap();
                    let at = k.kmap(page).unwrap().addr().get();
                    reach(k, at, pfn);
                    thread::yield_now();
                    reach(k, at, pfn);
                    // SAFETY: not used after.
                    unsafe { k.kunmap(page).unwrap() };
                }
            })
        };
        // One comes back to a page while its place is about to be given to who waits for another; or all of it.
        match places {
            1 => at_once(&kmem, 2, [map(&[0]), map(&[1]), map(&[0])]),
            _ => at_once(&kmem, 2, [map(&[0, 1]), map(&[1, 0]), map(&[2, 1])]),
        };
        let audit = kmem.audit_highmem().unwrap();
        assert_eq!((audit.mapped, audit.held, audit.sleepers, audit.local), (0, 0, 0, 0));
        total.fetch_add(audit.slept as usize, SeqCst);
        on_cpu(
            &kmem,
            0,
            0,
            || true,
            |k| pages.iter().for_each(|n| k.__free_page(k.pfn_to_page(*n).unwrap()).unwrap()),
        );
        check_all_free(&kmem, 0);
    };
    check_random(run, schedules(300));
    assert!(slept.load(SeqCst) > 0, "nobody slept");
}

/// Two free an area, and one of them has its descriptor go, while a third looks at it: one free succeeds, and who looks
/// sees what the area shows or nothing, not what became of its table.
#[test]
fn an_area_that_is_looked_at_is_freed_once() {
    const PAGE: usize = 4096;
    // So many that their numbers are in an object of its own.
    const PAGES: usize = 17;
    let seen = Arc::new(AtomicU32::new(0));
    let sum = Arc::clone(&seen);
    let run = move || {
        let kmem = machine();
        let (addr, shown) = on_cpu(
            &kmem,
            0,
            0,
            || true,
            |k| {
                let at = k.vmalloc(PAGES * PAGE).unwrap();
                let addr = at.addr().get();
                (addr, k.vmalloc_to_pfn(std::ptr::without_provenance(addr + (PAGES - 1) * PAGE)))
            },
        );
        assert!(shown.is_some());
        let freed = Arc::new(AtomicU32::new(0));
        let free = || -> Work {
            let freed = Arc::clone(&freed);
            Box::new(move |k| {
                // SAFETY: nobody touches what is there.
                if unsafe { k.vfree(std::ptr::without_provenance(addr)) }.is_err() {
                    return;
                }
                freed.fetch_add(1, SeqCst);
                let size = PAGES * size_of::<u32>();
                let held = k.kmalloc(size, Gfp::KERNEL).unwrap();
                // SAFETY: an object of ours of that size, most likely the table; not used after.
                unsafe {
                    held.write_bytes(0xff, size);
                    k.vm_unmap_aliases();
                    k.kfree(held.as_ptr()).unwrap();
                }
            })
        };
        let looking: Work = {
            let sum = Arc::clone(&sum);
            Box::new(move |k| {
                for i in 0..4 {
                    let page = PAGES - 1 - i % 2;
                    let found = k.vmalloc_to_pfn(std::ptr::without_provenance(addr + page * PAGE));
                    if page == PAGES - 1 && found.is_some() {
                        assert_eq!(found, shown);
                        sum.fetch_add(1, SeqCst);
                    }
                }
            })
        };
        at_once(&kmem, 0, [free(), free(), looking]);
        assert_eq!(freed.load(SeqCst), 1);
        let areas = on_cpu(&kmem, 0, 0, || true, |k| k.audit_vmalloc().unwrap());
        assert_eq!((areas.live, areas.lazy, areas.pooled), (0, 0, 0), "{areas:?}");
        check_all_back(&kmem, 1);
    };
    check_random(run, schedules(1500));
    assert!(seen.load(SeqCst) > 100, "the area was there now and then");
}

/// Reports and audits look at the magazines of a CPU that is busy with them: they may see what was, and change nothing.
#[test]
fn magazines_are_looked_at_while_they_are_exchanged() {
    let run = || {
        let kmem = machine();
        let made = on_cpu(
            &kmem,
            0,
            0,
            || true,
            |k| {
                let c = cache(k, "seen", 64);
                cycle(k, &c, 3);
                c
            },
        );
        let c = Arc::new(made);
        let (mine, seen) = (Arc::clone(&c), Arc::clone(&c));
        let busy: Work = Box::new(move |k| {
            for n in [29, 3, 30, 28, 14, 29] {
                let held: Vec<_> =
                    (0..n).map(|_| k.kmem_cache_alloc(&mine, Gfp::NOWAIT).unwrap()).collect();
                let mut all: Vec<_> = held.iter().map(|at| at.addr()).collect();
                all.sort_unstable();
                all.dedup();
                assert_eq!(all.len(), held.len(), "given out twice");
                for at in held {
                    // SAFETY: allocated above, and not used again.
                    unsafe { k.kmem_cache_free(&mine, at) }.unwrap();
                }
            }
        });
        let reports: Work = Box::new(move |k| {
            (0..3).for_each(|_| {
                let _ = k.kmem_cache_info(&seen);
            });
        });
        let audits: Work = Box::new(|k| {
            (0..4).for_each(|_| {
                let _ = k.audit_objects();
            });
        });
        at_once(&kmem, 0, [busy, reports, audits]);
        let audit = kmem.audit_objects().unwrap();
        assert_eq!(audit.live, 0);
    };
    check_random(run, schedules(500));
}
