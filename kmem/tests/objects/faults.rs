//! Fault injection \[D1\]: on a machine without any cache the first, the second, the third… inner allocation of
//! every public operation on objects fails, until there is none left to fail; after each, nothing is lost and the
//! operation works.

use super::{
    QUIET,
    stage::{Machine, be},
};
use kmem::{
    Config, Gfp,
    fault::{FaultPlan, FaultSite},
    slab::{KmemCache, SlabFlags},
};
use std::ptr::NonNull;

type M = Machine<12>;

/// Lets each inner allocation of `op` fail in turn, each time on a machine that `prepare` made something of. `op`
/// gives back whatever it gets and says whether it got it all. Returns how many there were.
fn each_fails<T>(
    name: &str,
    survives: bool,
    prepare: impl Fn(&M) -> T,
    op: impl Fn(&M, &T) -> bool,
    end: impl Fn(&M, T),
) -> u64 {
    for n in 0.. {
        let m = M::new(&[2, 2], Config::default());
        let state = prepare(&m);
        let live = m.audit_objects().unwrap().live;
        m.set_fault_plan(FaultPlan::Nth(n));
        let done = op(&m, &state);
        m.set_fault_plan(FaultPlan::Off);
        let fired = m.faults_injected();
        assert_eq!(m.audit_objects().unwrap().live, live, "{name}: objects after fault {n}");
        assert!(done || fired > 0, "{name} fails by itself");
        assert!(done || !survives, "{name} fails with fault {n}");
        assert!(op(&m, &state), "{name} does not work after fault {n}");
        end(&m, state);
        assert_eq!(m.lost(), 0, "{name}: frames after fault {n}");
        if fired == 0 {
            return n;
        }
        assert_eq!(fired, 1);
    }
    unreachable!("a fault plan beyond all inner allocations fires none")
}

fn nothing(_: &M) {}
fn end(_: &M, (): ()) {}

#[test]
fn caches_come_and_go() {
    let flags = [(8, SlabFlags::empty()), (1024, SlabFlags::NO_MERGE), (96, SlabFlags::DEBUG)];
    for (size, flags) in flags {
        let create = |m: &M, (): &()| match m.kmem_cache_create("made", size, 0, flags, None) {
            Ok(cache) => m.kmem_cache_destroy(cache).is_ok(),
            Err(e) => {
                assert_eq!(e, kmem::slab::CacheError::NoMemory);
                false
            }
        };
        let failed = each_fails("kmem_cache_create", false, nothing, create, end);
        assert!(failed >= 3, "{failed} inner allocations");
    }
}

#[test]
fn objects_of_caches() {
    // With state bytes inside, outside, in slabs of several frames.
    for size in [64, 600, 1024, 8192] {
        let prepare =
            |m: &M| m.kmem_cache_create("made", size, 0, SlabFlags::NO_MERGE, None).unwrap();
        let end = |m: &M, cache| m.kmem_cache_destroy(cache).unwrap();
        // SAFETY: not used after.
        let back = |m: &M, c: &KmemCache, at| unsafe { m.kmem_cache_free(c, at).is_ok() };
        for gfp in [Gfp::KERNEL, Gfp::ATOMIC, Gfp::NOWAIT, Gfp::KERNEL | Gfp::THISNODE] {
            let alloc =
                |m: &M, c: &KmemCache| m.kmem_cache_alloc(c, gfp).is_ok_and(|at| back(m, c, at));
            assert!(each_fails("kmem_cache_alloc", false, prepare, alloc, end) >= 5);
            let zalloc = |m: &M, c: &KmemCache| {
                m.kmem_cache_zalloc(c, gfp).is_ok_and(|at| {
                    // SAFETY: an object of that size, ours.
                    let bytes = unsafe { std::slice::from_raw_parts(at.as_ptr(), size) };
                    assert!(bytes.iter().all(|b| *b == 0));
                    back(m, c, at)
                })
            };
            assert!(each_fails("kmem_cache_zalloc", false, prepare, zalloc, end) >= 5);
            for node in [0, 1] {
                let alloc = |m: &M, c: &KmemCache| {
                    m.kmem_cache_alloc_node(c, gfp, node).is_ok_and(|at| back(m, c, at))
                };
                assert!(each_fails("kmem_cache_alloc_node", false, prepare, alloc, end) >= 1);
            }
        }
        let bulk = |m: &M, c: &KmemCache| {
            let mut objects = [NonNull::dangling(); 80];
            let got = m.kmem_cache_alloc_bulk(c, Gfp::KERNEL, &mut objects);
            // SAFETY: not used after.
            got.is_ok_and(|()| unsafe { m.kmem_cache_free_bulk(c, &objects).is_ok() })
        };
        assert!(each_fails("kmem_cache_alloc_bulk", false, prepare, bulk, end) >= 6);
        let surely = |m: &M, c: &KmemCache| {
            m.kmem_cache_alloc(c, Gfp::KERNEL | Gfp::NOFAIL).is_ok_and(|at| back(m, c, at))
        };
        assert!(each_fails("__GFP_NOFAIL", true, prepare, surely, end) >= 5);
    }
}

#[test]
fn objects_of_caches_that_look_for_mistakes() {
    for size in [64, 600, 8192] {
        let prepare = |m: &M| m.kmem_cache_create("made", size, 0, SlabFlags::DEBUG, None).unwrap();
        let end = |m: &M, cache| m.kmem_cache_destroy(cache).unwrap();
        let alloc = |m: &M, c: &KmemCache| {
            // SAFETY: not used after.
            let back = |at| unsafe { m.kmem_cache_free(c, at).is_ok() };
            m.kmem_cache_alloc(c, Gfp::KERNEL).is_ok_and(back)
        };
        assert!(each_fails("kmem_cache_alloc", false, prepare, alloc, end) >= 1);
    }
}

/// How memory is asked for.
type Get = fn(&M, usize, Gfp) -> Result<NonNull<u8>, kmem::AllocError>;

#[test]
fn kmalloc_and_its_family() {
    let gets: [(&str, Get); 8] = [
        ("kmalloc", |m, size, gfp| m.kmalloc(size, gfp)),
        ("kzalloc", |m, size, gfp| m.kzalloc(size, gfp)),
        ("kmalloc_node", |m, size, gfp| m.kmalloc_node(size, gfp, 1)),
        ("kmalloc_array", |m, size, gfp| m.kmalloc_array(3, size / 3 + 1, gfp)),
        ("kcalloc", |m, size, gfp| m.kcalloc(3, size / 3 + 1, gfp)),
        ("kmemdup", |m, size, gfp| m.kmemdup(&vec![7; size], gfp)),
        ("kstrdup", |m, size, gfp| m.kstrdup(&"x".repeat(size), gfp)),
        // SAFETY: null is from kmalloc.
        ("krealloc", |m, size, gfp| unsafe { m.krealloc(std::ptr::null_mut(), size, gfp) }),
    ];
    for (name, get) in gets {
        for size in [5, 100, 700, 4090, 8000, 20_000] {
            for gfp in [Gfp::KERNEL, Gfp::ATOMIC, Gfp::KERNEL | Gfp::RECLAIMABLE] {
                let op = |m: &M, (): &()| {
                    // SAFETY: not used after.
                    get(m, size, gfp).is_ok_and(|at| unsafe { m.kfree(at.as_ptr()).is_ok() })
                };
                let failed = each_fails(&format!("{name}({size}, {gfp})"), false, nothing, op, end);
                assert!(failed >= if size < 8192 { 5 } else { 1 }, "{name}({size}): {failed}");
            }
        }
    }
}

/// What cannot be moved stays where it is, with all that it holds.
#[test]
fn krealloc_leaves_what_it_cannot_move() {
    for (from, to) in [(60, 70), (100, 8000), (8000, 9000), (9000, 90_000)] {
        let op = |m: &M, (): &()| {
            let Ok(old) = m.kmalloc(from, Gfp::KERNEL) else { return false };
            // SAFETY: memory of ours, of these sizes, until it is freed.
            unsafe {
                old.write_bytes(0x5a, from);
                let moved = m.krealloc(old.as_ptr(), to, Gfp::KERNEL);
                let at = moved.unwrap_or(old);
                let bytes = std::slice::from_raw_parts(at.as_ptr(), from);
                assert!(bytes.iter().all(|b| *b == 0x5a));
                m.kfree(at.as_ptr()).unwrap();
                moved.is_ok()
            }
        };
        assert!(each_fails(&format!("krealloc({from} to {to})"), false, nothing, op, end) >= 2);
    }
}

/// Giving back and ending needs no memory.
#[test]
fn what_gives_back_allocates_nothing() {
    let m = M::new(&[2, 2], Config::default());
    for size in [64, 1024, 8192] {
        let cache = m.kmem_cache_create("back", size, 0, SlabFlags::NO_MERGE, None).unwrap();
        let mut held = Vec::new();
        for cpu in [0, 1] {
            be(cpu);
            held.extend((0..150).map(|_| m.kmem_cache_alloc(&cache, Gfp::KERNEL).unwrap()));
            held.push(m.kmalloc(size, Gfp::KERNEL).unwrap());
        }
        m.set_fault_plan(FaultPlan::From(0));
        let before = m.faults_injected();
        for (n, at) in held.into_iter().enumerate() {
            be(n % 2);
            // SAFETY: not used after.
            unsafe { m.kfree(at.as_ptr()).unwrap() };
        }
        m.kmem_cache_shrink(&cache);
        be(0);
        m.cpu_offline(1);
        m.cpu_online(1);
        m.kmem_cache_destroy(cache).unwrap();
        m.drop_slab();
        assert_eq!(m.faults_injected(), before, "nothing was asked for");
        m.set_fault_plan(FaultPlan::Off);
    }
}

#[test]
fn a_soak_of_random_faults_loses_nothing() {
    let m = M::new(&[2, 2], Config::default());
    for n in [2, 3, 7, 20] {
        m.set_fault_plan(FaultPlan::OneIn { n, seed: n });
        let cache = loop {
            if let Ok(cache) = m.kmem_cache_create("soak", 600, 64, SlabFlags::empty(), None) {
                break cache;
            }
        };
        let mut live = Vec::new();
        for i in 0..4000u32 {
            be((i >> 4 & 1) as usize);
            let size = i.wrapping_mul(2_654_435_761) >> 19;
            let got = match i % 4 {
                0 => m.kmalloc(size as usize, Gfp::KERNEL | Gfp::NOWARN),
                1 => m.kmalloc_node(size as usize, Gfp::NOWAIT, (i >> 3 & 1) as i32),
                _ => m.kmem_cache_alloc(&cache, Gfp::ATOMIC | Gfp::NOWARN),
            };
            live.extend(got);
            if i % 3 != 0 && live.len() > 40 {
                let at = live.swap_remove(i as usize * 7 % live.len());
                // SAFETY: not used after.
                unsafe { m.kfree(at.as_ptr()).unwrap() };
            }
            if i % 500 == 0 {
                m.audit_objects().unwrap();
                m.drop_slab();
            }
        }
        for at in live {
            // SAFETY: not used after.
            unsafe { m.kfree(at.as_ptr()).unwrap() };
        }
        m.kmem_cache_destroy(cache).unwrap();
        m.set_fault_plan(FaultPlan::Off);
    }
    assert!(m.faults_injected() > 100, "{}", m.faults_injected());
    be(0);
}

/// failslab: each allocation of a script fails in turn, and only that; with `__GFP_NOFAIL` none does.
#[test]
fn failslab_fails_the_nth_object() {
    let m = M::new(&[4], Config::default());
    be(0);
    let cache = m.kmem_cache_create("failing", 40, 0, SlabFlags::NO_MERGE, None).unwrap();
    let quiet = Gfp::KERNEL | Gfp::NOWARN;
    let script = || {
        [
            m.kmalloc(64, quiet).ok(),
            m.kmem_cache_alloc(&cache, quiet).ok(),
            m.kzalloc(100, quiet).ok(),
            m.kmem_cache_zalloc(&cache, quiet).ok(),
        ]
    };
    let free = |objects: [Option<NonNull<u8>>; 4]| {
        for at in objects.into_iter().flatten() {
            // SAFETY: not used after.
            unsafe { m.kfree(at.as_ptr()).unwrap() };
        }
    };
    free(script());
    let live = m.audit_objects().unwrap().live;
    for n in 0..5 {
        m.set_failslab(FaultPlan::Nth(n), None).unwrap();
        let got = script();
        m.set_failslab(FaultPlan::Off, None).unwrap();
        let failed: Vec<usize> = (0..4).filter(|i| got[*i].is_none()).collect();
        assert_eq!(failed, if n < 4 { vec![n as usize] } else { vec![] });
        free(got);
        assert_eq!(m.audit_objects().unwrap().live, live);
    }
    assert_eq!(m.failslab_injected(), 4);
    m.set_failslab(FaultPlan::From(0), None).unwrap();
    assert!(script().iter().all(Option::is_none));
    let at = m.kmalloc(64, Gfp::KERNEL | Gfp::NOFAIL).unwrap();
    m.set_failslab(FaultPlan::Off, None).unwrap();
    // SAFETY: not used after.
    unsafe { m.kfree(at.as_ptr()).unwrap() };
    // Magazines come back.
    free(script());
    assert!(m.kmem_cache_info(&cache).cached_objects > 0);
    m.kmem_cache_destroy(cache).unwrap();
}

/// Only the caller that is named fails.
#[test]
fn failslab_fails_one_caller() {
    let m = M::new(&[4], Config::default());
    be(0);
    let ask = || (m.kmalloc(64, QUIET | Gfp::KERNEL), line!());
    let other = || m.kmalloc(64, QUIET | Gfp::KERNEL);
    let (first, line) = ask();
    let site = FaultSite { file: "objects/faults.rs", lines: (line, line) };
    m.set_failslab(FaultPlan::From(0), Some(site)).unwrap();
    assert!(ask().0.is_err());
    let second = other();
    let elsewhere = FaultSite { file: "objects/other.rs", ..site };
    m.set_failslab(FaultPlan::From(0), Some(elsewhere)).unwrap();
    let third = ask().0;
    m.set_failslab(FaultPlan::Off, None).unwrap();
    assert_eq!(m.failslab_injected(), 1);
    for at in [first, second, third] {
        // SAFETY: not used after.
        unsafe { m.kfree(at.unwrap().as_ptr()).unwrap() };
    }
    assert_eq!(m.audit_objects().unwrap().live, 0);
}
