//! What readers may still look at \[S5\]: type-safe caches and `kfree_rcu`, with readers on other CPUs.

use kmem::{
    AllocError, Config, Gfp, Misuse,
    slab::{CacheError, KmemCache, MoveError, MoveResult, RCU_HEAD, SlabFlags},
    sync::preempt_disabled,
    trace::{Event, TraceSink},
};
use kmem_hosted::{Machine, Shape};
use kmem_test_support::Rig;
use std::{
    ptr::NonNull,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering::*},
        mpsc,
    },
    thread,
    time::Duration,
};

/// Runs `during` while a reader is at it on CPU 1, from CPU 0.
fn with_reader<R>(rig: &Rig, during: impl FnOnce() -> R) -> R {
    let (begin, began) = mpsc::channel::<()>();
    let (go, gone) = mpsc::channel::<()>();
    thread::scope(move |s| {
        // Goes with a failure, too: then the reader ends.
        let go = go;
        s.spawn(move || {
            let m = rig.machine();
            m.run_on(Some(1), None, |_| {
                m.hosted().rcu_read(|| {
                    begin.send(()).unwrap();
                    _ = gone.recv();
                })
            })
            .unwrap()
            .unwrap();
        });
        began.recv().unwrap();
        let out = rig.run(|_| during());
        go.send(()).unwrap();
        out
    })
}

fn live(rig: &Rig) -> u64 {
    rig.machine().audit_objects().unwrap().live
}

fn barrier(rig: &Rig) {
    assert!(rig.run(|_| rig.machine().rcu_barrier()));
}

#[test]
fn slabs_of_a_type_safe_cache_outlive_their_readers() {
    let rig = Rig::flat();
    let m = rig.machine();
    let cache = m.kmem_cache_create("safe", 1000, 0, SlabFlags::TYPESAFE_BY_RCU, None).unwrap();
    let plain = m.kmem_cache_create("plain", 1000, 0, SlabFlags::NO_MERGE, None).unwrap();
    let frames = |cache: &_| m.kmem_cache_info(cache).slabs;
    let fill = |cache: &_| -> Vec<_> {
        (0..40).map(|_| m.kmem_cache_alloc(cache, Gfp::KERNEL).unwrap()).collect()
    };
    let (safe_at, plain_at) = rig.run(|_| (fill(&cache), fill(&plain)));
    let first = safe_at[0];
    // SAFETY: ours.
    unsafe { first.cast::<u64>().write(0x1dea) };
    let give = |cache: &KmemCache, objects: &[NonNull<u8>]| {
        for at in objects {
            // SAFETY: ours, and not written to after.
            unsafe { m.kmem_cache_free(cache, *at) }.unwrap();
        }
        m.kmem_cache_shrink(cache);
    };
    let before = m.nr_free_pages();
    with_reader(&rig, || {
        give(&plain, &plain_at);
        assert!(m.nr_free_pages() >= before + 10, "a plain cache's pages go at once");
        let before = m.nr_free_pages();
        give(&cache, &safe_at);
        assert_eq!(frames(&cache), 0);
        assert!(m.nr_free_pages() < before + 10, "pages went under a reader's eyes");
        // The memory is still that of the object, as its last owner left it.
        // SAFETY: the frames are nobody else's as long as there is a reader.
        assert_eq!(unsafe { first.cast::<u64>().read() }, 0x1dea);
        // And no address in it is anybody's to free.
        let mark = rig.mark();
        // SAFETY: that it does no harm is what is tested.
        let freed = unsafe { m.kfree(first.as_ptr()) };
        assert_eq!(freed, Err(Misuse::NotAnObject { addr: first.addr().get() }));
        assert_eq!((m.ksize(first.as_ptr()), rig.since(mark).len()), (None, 1));
        // Its cache may go before them.
        rig.machine().kmem_cache_destroy(cache).unwrap();
    });
    barrier(&rig);
    m.kmem_cache_destroy(plain).unwrap();
}

#[test]
fn a_freed_object_of_a_type_safe_cache_comes_again_at_once() {
    let rig = Rig::new(Shape::no_dma(64 << 20), Config { init_on_free: true, ..Config::default() });
    let m = rig.machine();
    let flags = SlabFlags::TYPESAFE_BY_RCU | SlabFlags::POISON;
    let cache = m.kmem_cache_create("safe", 64, 0, flags, None).unwrap();
    let keep = m.kmem_cache_alloc(&cache, Gfp::KERNEL).unwrap();
    let at = m.kmem_cache_alloc(&cache, Gfp::KERNEL).unwrap();
    // SAFETY: ours.
    unsafe { at.cast::<[u8; 64]>().write([7; 64]) };
    with_reader(&rig, || {
        // SAFETY: ours, and not written to after.
        unsafe { m.kmem_cache_free(&cache, at) }.unwrap();
        // Nobody has touched what a reader may look at: no poison, no zeros.
        // SAFETY: the slab is kept by `keep`.
        assert_eq!(unsafe { at.cast::<[u8; 64]>().read() }, [7; 64]);
        let next = || m.kmem_cache_alloc(&cache, Gfp::KERNEL).unwrap();
        let others: Vec<_> = (0..64).map(|_| next()).take_while(|got| *got != at).collect();
        assert!(others.len() < 64, "it does not come again under a reader's eyes");
        for at in others {
            // SAFETY: ours.
            unsafe { m.kmem_cache_free(&cache, at) }.unwrap();
        }
    });
    for at in [keep, at] {
        // SAFETY: ours.
        unsafe { m.kmem_cache_free(&cache, at) }.unwrap();
    }
    m.kmem_cache_destroy(cache).unwrap();
    barrier(&rig);
}

#[test]
fn kfree_rcu_waits_for_readers() {
    let rig = Rig::flat();
    let m = rig.machine();
    let sizes = [16, 64, 1024, 8192, 40_000];
    let objects: Vec<_> =
        rig.run(|_| sizes.iter().map(|size| m.kmalloc(*size, Gfp::KERNEL).unwrap()).collect());
    let was = live(&rig);
    let refused = |at: *mut u8, head: usize, what: Misuse| {
        let mark = rig.mark();
        // SAFETY: that it does no harm is what is tested.
        assert_eq!(unsafe { m.kfree_rcu(at, head) }, Err(what));
        assert!(rig.one_report(mark).contains("Bad object"));
    };
    with_reader(&rig, || {
        for (at, size) in objects.iter().zip(sizes) {
            let (at, addr) = (at.as_ptr(), at.addr().get());
            let room = m.ksize(at).unwrap();
            refused(
                at,
                room - RCU_HEAD + 8,
                Misuse::BadRcuHead { addr, head: room - RCU_HEAD + 8 },
            );
            refused(at, 4, Misuse::BadRcuHead { addr, head: 4 });
            refused(at, usize::MAX & !7, Misuse::BadRcuHead { addr, head: usize::MAX & !7 });
            // SAFETY: ours; nobody looks at its last bytes.
            unsafe {
                at.write(size as u8 | 1);
                m.kfree_rcu(at, size.max(RCU_HEAD) - RCU_HEAD).unwrap();
            }
        }
        assert_eq!(live(&rig), was, "what waits is in use");
        // Again, in each way, is found out.
        for at in objects.iter().map(|at| at.as_ptr()) {
            let mark = rig.mark();
            // SAFETY: as above.
            unsafe {
                assert!(m.kfree_rcu(at, 0).is_err());
                assert!(m.kfree(at).is_err());
            }
            assert_eq!(rig.since(mark).len(), 2);
        }
        for (at, size) in objects.iter().zip(sizes).skip(1) {
            // SAFETY: a reader is at it.
            assert_eq!(unsafe { at.read() }, size as u8 | 1);
        }
    });
    barrier(&rig);
    assert_eq!(live(&rig), was - 4);
    // SAFETY: null is left alone.
    unsafe { m.kfree_rcu(std::ptr::null_mut(), 0) }.unwrap();
    let inside = 0xdead_beef_0000 as *mut u8;
    refused(inside, 0, Misuse::NotAnObject { addr: inside.addr() });
}

#[test]
fn who_may_sleep_needs_no_room() {
    let rig = Rig::flat();
    let m = rig.machine();
    rig.run(|process| {
        let at = m.kmalloc(8, Gfp::KERNEL).unwrap();
        // SAFETY: ours.
        unsafe { m.kfree_rcu_mightsleep(at.as_ptr()) }.unwrap();
        assert!(m.synchronize_rcu());
        let at = m.kmalloc(8, Gfp::KERNEL).unwrap();
        preempt_disabled(m.platform(), process, |_| {
            let mark = rig.mark();
            // SAFETY: ours.
            let freed = unsafe { m.kfree_rcu_mightsleep(at.as_ptr()) };
            assert_eq!(freed, Err(Misuse::AtomicContext));
            assert!(!m.rcu_barrier() && !m.synchronize_rcu());
            assert_eq!(rig.since(mark).len(), 3);
        });
        // SAFETY: ours.
        unsafe { m.kfree(at.as_ptr()) }.unwrap();
        // A reader cannot sleep.
        m.hosted().rcu_read(|| {
            assert_eq!(m.kmalloc(64, Gfp::KERNEL), Err(AllocError::Context));
            assert!(m.hosted().rcu_read(|| ()).is_some());
        });
    });
    assert!(m.hosted().rcu_read(|| ()).is_none(), "on no CPU");
}

#[test]
fn objects_that_readers_see_are_not_moved() {
    unsafe fn stay(_: NonNull<u8>, _: NonNull<u8>, _: usize) -> MoveResult {
        MoveResult::Refused
    }
    let rig = Rig::flat();
    let m = rig.machine();
    let cache = m.kmem_cache_create("safe", 64, 0, SlabFlags::TYPESAFE_BY_RCU, None).unwrap();
    // SAFETY: it moves nothing.
    let set = unsafe { m.kmem_cache_set_move(&cache, Some(stay), 0) };
    assert_eq!(set, Err(MoveError::Rcu));
    m.kmem_cache_destroy(cache).unwrap();
}

#[test]
fn a_platform_without_readers_has_no_such_caches() {
    let m = super::stage::Machine::<12>::new(&[2], Config::default());
    super::stage::be(0);
    let made = m.kmem_cache_create("safe", 64, 0, SlabFlags::TYPESAFE_BY_RCU, None);
    assert_eq!(made.err(), Some(CacheError::NoGracePeriods));
    let at = m.kmalloc(64, Gfp::KERNEL).unwrap();
    // SAFETY: ours.
    unsafe {
        assert_eq!(m.kfree_rcu(at.as_ptr(), 0), Err(Misuse::NoGracePeriods));
        m.kfree(at.as_ptr()).unwrap();
    }
}

/// Holds up the first that frees an object.
#[derive(Default)]
struct Slow {
    inside: AtomicBool,
    go: AtomicBool,
}

impl TraceSink for Slow {
    fn event(&self, _cpu: Option<usize>, event: &Event) {
        if matches!(event, Event::Kfree { .. }) && !self.inside.swap(true, SeqCst) {
            while !self.go.load(SeqCst) {
                thread::yield_now();
            }
        }
    }
}

#[test]
fn a_barrier_waits_for_whoever_is_freeing() {
    let rig = Rig::flat();
    let m = rig.machine();
    let sink: &Slow = Box::leak(Box::default());
    let at = rig.run(|_| m.kmalloc(64, Gfp::KERNEL).unwrap());
    m.set_tracer(Some(sink));
    m.set_trace_objects(true).unwrap();
    let addr = at.as_ptr().expose_provenance();
    let over = AtomicBool::new(false);
    thread::scope(|s| {
        s.spawn(|| {
            m.run_on(Some(1), None, |_| {
                let at = std::ptr::with_exposed_provenance_mut(addr);
                // SAFETY: ours.
                unsafe { m.kfree_rcu(at, 0) }.unwrap();
                assert!(m.rcu_barrier());
            })
            .unwrap();
        });
        while !sink.inside.load(SeqCst) {
            thread::yield_now();
        }
        let waiting = s.spawn(|| {
            m.run_on(Some(0), None, |_| assert!(m.rcu_barrier())).unwrap();
            over.store(true, SeqCst);
        });
        // Time enough to come back, for one that does not wait.
        thread::sleep(Duration::from_millis(20));
        let early = over.load(SeqCst);
        sink.go.store(true, SeqCst);
        waiting.join().unwrap();
        assert!(!early, "an object was not free yet");
    });
    m.set_trace_objects(false).unwrap();
    m.set_tracer(None);
    assert_eq!(live(&rig), 0);
}

/// Readers on two CPUs follow a pointer that a third keeps changing; what it led to is freed with a grace period, and
/// overwritten as soon as it is free.
#[test]
fn readers_see_nothing_that_was_freed() {
    const MARK: u64 = 0x0b1e_c7ed_0b1e_c7ed;
    let machine = Arc::new(
        Machine::without_kswapd(Shape::no_dma(64 << 20).cpus(3), Config::default()).unwrap(),
    );
    let start = machine.audit().unwrap();
    let current = AtomicPtr::new(std::ptr::null_mut::<AtomicU64>());
    let (stop, reads) = (AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|s| {
        for cpu in 0..2 {
            let (machine, current, stop, reads) = (&machine, &current, &stop, &reads);
            s.spawn(move || {
                machine
                    .run_on(Some(cpu), None, |_| {
                        while !stop.load(Relaxed) {
                            machine.hosted().rcu_read(|| {
                                let at = current.load(Acquire);
                                if !at.is_null() {
                                    for _ in 0..20 {
                                        // SAFETY: it stays as long as this reader.
                                        assert_eq!(unsafe { (*at).load(Relaxed) }, MARK);
                                    }
                                    reads.fetch_add(1, Relaxed);
                                }
                            });
                        }
                    })
                    .unwrap();
            });
        }
        machine
            .run_on(Some(2), None, |_| {
                let mut turns = 0;
                while turns < 3_000 || reads.load(Relaxed) < 2_000 {
                    turns += 1;
                    let new = machine.kmalloc(32, Gfp::KERNEL).unwrap().cast::<AtomicU64>();
                    // SAFETY: ours.
                    unsafe { new.write(AtomicU64::new(MARK)) };
                    let old = current.swap(new.as_ptr(), AcqRel);
                    if !old.is_null() {
                        // SAFETY: nobody finds it any more; readers look at its first word.
                        unsafe { machine.kfree_rcu(old.cast(), 16) }.unwrap();
                    }
                    // What is free now is written to.
                    let other = machine.kmalloc(32, Gfp::KERNEL).unwrap();
                    // SAFETY: ours.
                    unsafe {
                        other.write_bytes(0xee, 32);
                        machine.kfree(other.as_ptr()).unwrap();
                    }
                }
                stop.store(true, Relaxed);
                let last = current.swap(std::ptr::null_mut(), AcqRel);
                // SAFETY: as above.
                unsafe { machine.kfree_rcu(last.cast(), 16) }.unwrap();
            })
            .unwrap();
    });
    machine
        .run(|_| {
            assert!(machine.rcu_barrier());
            assert_eq!(machine.audit_objects().unwrap().live, 0);
            machine.drop_slab();
            machine.drain_all_pages();
        })
        .unwrap();
    let end = machine.audit().unwrap();
    assert!(end.free + end.pcp <= start.free + start.pcp);
}

#[test]
fn a_reader_that_leaves_its_cpu_does_no_harm() {
    let rig = Rig::new(Shape::no_dma(64 << 20).cpus(1), Config::default());
    let m = rig.machine();
    let (inside, ran) = (AtomicBool::new(false), AtomicBool::new(false));
    thread::scope(|s| {
        s.spawn(|| {
            while !inside.load(SeqCst) {
                thread::yield_now();
            }
            m.run(|_| ran.store(true, SeqCst)).unwrap();
        });
        let mark = rig.mark();
        rig.run(|process| {
            m.hosted().rcu_read(|| {
                inside.store(true, SeqCst);
                while !ran.load(SeqCst) {
                    m.hosted().cond_resched(process);
                }
            });
            assert!(rig.one_report(mark).contains("scheduling while atomic"));
            // The section is over, once.
            let at = m.kmalloc(64, Gfp::KERNEL).unwrap();
            // SAFETY: ours.
            unsafe { m.kfree(at.as_ptr()) }.unwrap();
            assert!(m.rcu_barrier());
        });
    });
}
