//! The leak scan \[D2\]: what is reached, what is not, and what does not count.

use kmem::{
    Config, Gfp, Kmem, ZoneType,
    fault::FaultPlan,
    kfence::KfenceConfig,
    memblock::Memblock,
    slab::{KmemleakConfig, Leak, LeakError, LeakScan, MoveResult, SlabFlags},
    zone::{Layout, ZoneLimit},
};
use kmem_hosted::Shape;
use kmem_test_support::{MIB, Plain, Rig};
use proptest::prelude::*;
use std::{
    collections::BTreeSet,
    ops::Range,
    ptr::NonNull,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    thread,
};

const QUICK: KmemleakConfig = KmemleakConfig { ranges: 16, min_age_ns: 0 };

/// A machine whose scans report what two of them found.
fn rig() -> Rig {
    let rig = Rig::flat();
    rig.run(|_| rig.set_kmemleak(Some(QUICK)).unwrap());
    rig
}

/// Memory that is in use by itself: what the test knows of.
struct Roots(Vec<usize>);

impl Roots {
    fn of(objects: &[NonNull<u8>]) -> Roots {
        Roots(objects.iter().map(|at| at.addr().get()).collect())
    }

    fn range(&self) -> Range<usize> {
        let range = self.0.as_ptr_range();
        range.start.expose_provenance()..range.end.addr()
    }
}

fn scan(rig: &Rig, roots: &Roots) -> LeakScan {
    // SAFETY: the roots' words, and foreign memory that the test keeps.
    unsafe { rig.kmemleak_scan(&[roots.range()]) }.unwrap()
}

/// What a scan reports once all objects are old.
fn leaks(rig: &Rig, roots: &Roots) -> Vec<usize> {
    (0..2).for_each(|_| _ = scan(rig, roots));
    let found = scan(rig, roots);
    let mut leaks = Vec::new();
    rig.for_each_leak(|leak| leaks.push(leak.addr)).unwrap();
    assert_eq!(found.unreferenced, leaks.len() as u64);
    assert!(leaks.is_sorted());
    leaks
}

fn addrs(objects: &[NonNull<u8>]) -> Vec<usize> {
    let mut addrs: Vec<_> = objects.iter().map(|at| at.addr().get()).collect();
    addrs.sort();
    addrs
}

/// Zeroed memory.
fn object(rig: &Rig, size: usize) -> NonNull<u8> {
    rig.kzalloc(size, Gfp::KERNEL).unwrap()
}

/// Writes an address into the `i`-th word of an object.
fn point(from: NonNull<u8>, i: usize, to: usize) {
    // SAFETY: a word of an object of the test's.
    unsafe { from.cast::<AtomicUsize>().add(i).as_ref() }.store(to, SeqCst);
}

fn free(rig: &Rig, at: NonNull<u8>) {
    // SAFETY: not used after.
    unsafe { rig.kfree(at.as_ptr()).unwrap() };
}

fn free_all(rig: &Rig, objects: impl IntoIterator<Item = NonNull<u8>>) {
    objects.into_iter().for_each(|at| free(rig, at));
}

#[test]
fn what_nothing_refers_to_is_found_and_all_else_is_not() {
    let rig = rig();
    rig.run(|_| {
        let [lost, held, inside, chain, end, wide] =
            [64, 64, 500, 24, 3000, 8].map(|n| object(&rig, n));
        point(chain, 2, end.addr().get());
        let mut roots = Roots::of(&[held, chain]);
        roots.0.push(inside.addr().get() + 499);
        // Beyond the object, and nowhere at all.
        roots.0.extend([wide.addr().get() + 8, 1, usize::MAX]);
        assert_eq!(leaks(&rig, &roots), addrs(&[lost, wide]));
        // Once more: it is no secret.
        assert_eq!(leaks(&rig, &roots), addrs(&[lost, wide]));
        point(end, 0, wide.addr().get() + 7);
        assert_eq!(leaks(&rig, &roots), addrs(&[lost]));
        roots.0[1] = 0;
        assert_eq!(leaks(&rig, &roots), addrs(&[lost, chain, end, wide]));
        free(&rig, lost);
        assert_eq!(leaks(&rig, &roots), addrs(&[chain, end, wide]));
        free_all(&rig, [held, inside, chain, end, wide]);
        assert_eq!(leaks(&rig, &roots), []);
        // Off, all is as before.
        rig.set_kmemleak(None).unwrap();
    });
}

#[test]
fn a_circle_is_no_reference() {
    let rig = rig();
    rig.run(|_| {
        let circle: Vec<_> = (0..10).map(|_| object(&rig, 32)).collect();
        for i in 0..10 {
            point(circle[i], 1, circle[(i + 1) % 10].addr().get());
        }
        assert_eq!(leaks(&rig, &Roots(Vec::new())), addrs(&circle));
        assert_eq!(leaks(&rig, &Roots::of(&circle[3..4])), []);
        free_all(&rig, circle);
    });
}

#[test]
fn large_and_sampled_objects_and_foreign_memory_are_objects_too() {
    let kfence = Some(KfenceConfig { objects: 7, sample_interval_ns: 1 });
    let rig = Rig::new(Shape::no_dma(64 * MIB), Config { kfence, ..Config::default() });
    rig.run(|_| {
        rig.set_kmemleak(Some(QUICK)).unwrap();
        let [large, leaf, other] = [40_000, 20_000, 100_000].map(|n| object(&rig, n));
        let sampled = object(&rig, 100);
        let leaf2 = object(&rig, 200);
        assert!(rig.is_kfence_address(sampled.as_ptr()) && rig.is_kfence_address(leaf2.as_ptr()));
        rig.set_kfence(0).unwrap();
        let mut foreign = vec![0usize; 1000];
        // SAFETY: kept until `kmemleak_free`.
        unsafe { rig.kmemleak_alloc(foreign.as_ptr().cast(), 8000).unwrap() };
        point(large, 4999, leaf.addr().get() + 19_000);
        point(sampled, 11, leaf2.addr().get() + 9);
        foreign[999] = sampled.addr().get() + 99;
        let alien = foreign.as_ptr().addr();
        // Deep in the large object, which leads to the leaf; the foreign memory through the leaf.
        point(leaf, 0, alien + 8);
        let roots = Roots(vec![large.addr().get() + 39_999]);
        assert_eq!(leaks(&rig, &roots), addrs(&[other]));
        point(leaf, 0, 0);
        let mut lost = addrs(&[other, sampled, leaf2]);
        lost.push(alien);
        lost.sort();
        assert_eq!(leaks(&rig, &roots), lost);
        let mut text = String::new();
        rig.write_kmemleak(&mut text).unwrap();
        assert!(
            text.contains(&format!("unreferenced object {alien:#018x} (size 8000):")),
            "{text}"
        );
        assert!(text.contains("(size 131072):"), "{text}");
        rig.kmemleak_free(foreign.as_ptr().cast()).unwrap();
        assert_eq!(leaks(&rig, &roots), addrs(&[other, sampled, leaf2]));
        free_all(&rig, [large, leaf, other, sampled, leaf2]);
        assert_eq!(leaks(&rig, &roots), []);
    });
}

#[test]
fn users_say_what_is_no_leak_and_what_is_not_looked_at() {
    let rig = rig();
    rig.run(|_| {
        let [fine, child, hidden, child2, blind, child3, part, in_part, beside] =
            [48; 9].map(|n| object(&rig, n));
        let large = object(&rig, 10_000);
        point(fine, 0, child.addr().get());
        point(hidden, 0, child2.addr().get());
        point(blind, 0, child3.addr().get());
        point(part, 1, in_part.addr().get());
        point(part, 4, beside.addr().get());
        rig.kmemleak_not_leak(fine.as_ptr()).unwrap();
        rig.kmemleak_not_leak(large.as_ptr()).unwrap();
        rig.kmemleak_ignore(hidden.as_ptr()).unwrap();
        rig.kmemleak_no_scan(blind.as_ptr()).unwrap();
        rig.kmemleak_scan_area(part.as_ptr(), part.as_ptr().wrapping_add(8), 16).unwrap();
        let roots = Roots::of(&[part, blind]);
        assert_eq!(leaks(&rig, &roots), addrs(&[child2, child3, beside]));
        rig.kmemleak_scan_area(part.as_ptr(), part.as_ptr().wrapping_add(32), 8).unwrap();
        assert_eq!(leaks(&rig, &roots), addrs(&[child2, child3]));
        rig.kmemleak_clear().unwrap();
        assert_eq!(leaks(&rig, &roots), []);
        // All that is forgotten when an object is freed.
        let again = |at: NonNull<u8>, size| {
            free(&rig, at);
            let others: Vec<_> = (0..200).map(|_| object(&rig, size)).collect();
            let (same, rest): (Vec<_>, Vec<_>) = others.into_iter().partition(|o| *o == at);
            free_all(&rig, rest);
            same[0]
        };
        [fine, hidden, part].iter().for_each(|at| assert_eq!(again(*at, 48), *at));
        point(part, 4, beside.addr().get());
        let roots = Roots::of(&[part, blind]);
        assert_eq!(leaks(&rig, &roots), addrs(&[fine, child, hidden, in_part]));
        free_all(&rig, [fine, child, hidden, child2, blind, child3, part, in_part, beside, large]);
    });
}

#[test]
fn requests_that_make_no_sense_are_refused() {
    let rig = Rig::flat();
    rig.run(|_| {
        let at = object(&rig, 64);
        let p = at.as_ptr();
        // SAFETY: no roots.
        assert_eq!(unsafe { rig.kmemleak_scan(&[]) }, Err(LeakError::Off));
        assert_eq!(rig.kmemleak_not_leak(p), Err(LeakError::Off));
        assert_eq!(rig.for_each_leak(|_| ()), Err(LeakError::Off));
        let huge = KmemleakConfig { ranges: usize::MAX, ..QUICK };
        assert_eq!(rig.set_kmemleak(Some(huge)), Err(LeakError::NoMemory));
        rig.set_kmemleak(Some(KmemleakConfig { ranges: 2, ..QUICK })).unwrap();
        assert_eq!(rig.kmemleak_ignore(p.wrapping_add(8)), Err(LeakError::Unknown));
        assert_eq!(rig.kmemleak_no_scan(std::ptr::null()), Err(LeakError::Unknown));
        for (start, len) in [(0, 0), (0, 65), (60, 8), (64, 1), (usize::MAX, 1), (1, usize::MAX)] {
            let area = rig.kmemleak_scan_area(p, p.wrapping_add(start), len);
            assert_eq!(area, Err(LeakError::Range), "{start} {len}");
        }
        let memory = [0u64; 8];
        let first = memory.as_ptr().cast::<u8>();
        // SAFETY: kept until the end of the test.
        let add = |at: *const u8, len| unsafe { rig.kmemleak_alloc(at, len) };
        assert_eq!(add(p, 64), Err(LeakError::Range), "it is kmem's");
        assert_eq!(add(std::ptr::null(), 64), Err(LeakError::Range));
        assert_eq!(add(first, 0), Err(LeakError::Range));
        add(first.wrapping_add(16), 16).unwrap();
        for (start, len) in [(16, 16), (0, 17), (31, 1), (0, 64)] {
            assert_eq!(add(first.wrapping_add(start), len), Err(LeakError::Range));
        }
        add(first, 16).unwrap();
        assert_eq!(add(first.wrapping_add(32), 16), Err(LeakError::Full));
        assert_eq!(rig.kmemleak_scan_area(p, p, 8), Err(LeakError::Full));
        assert_eq!(rig.kmemleak_free(first.wrapping_add(8)), Err(LeakError::Unknown));
        rig.kmemleak_free(first).unwrap();
        assert_eq!(rig.kmemleak_free(first), Err(LeakError::Unknown));
        kmem::sync::preempt_disabled(rig.hosted(), &mut process(), |_| {
            // SAFETY: no roots.
            assert_eq!(unsafe { rig.kmemleak_scan(&[]) }, Err(LeakError::Busy));
        });
        rig.for_each_leak(|_| ()).unwrap();
        rig.set_fault_plan(FaultPlan::From(0));
        // SAFETY: no roots.
        assert_eq!(unsafe { rig.kmemleak_scan(&[]) }, Err(LeakError::NoMemory));
        assert_eq!(rig.set_kmemleak(Some(QUICK)), Err(LeakError::NoMemory));
        rig.set_fault_plan(FaultPlan::Off);
        // SAFETY: no roots.
        unsafe { rig.kmemleak_scan(&[]) }.unwrap();
        free(&rig, at);
        rig.set_kmemleak(None).unwrap();
    });
}

fn process() -> kmem::context::Process {
    // SAFETY: used where the other one is not, and to claim less.
    unsafe { kmem::context::Process::new() }
}

#[test]
fn young_objects_are_not_reported() {
    let boot = {
        let mut boot = Memblock::new();
        boot.add(0, 4096 << 12, 0).unwrap();
        boot
    };
    let layout = Layout::new(&[ZoneLimit { zone: ZoneType::Normal, end: u64::MAX }]).unwrap();
    let m =
        Kmem::bring_up(Plain::<12>::new(4096, 1), boot, &Config { layout, ..Config::default() })
            .unwrap();
    m.set_kmemleak(Some(KmemleakConfig { min_age_ns: 5_000, ..QUICK })).unwrap();
    let scan = |after: u64| {
        m.platform().now_ns.fetch_add(after, SeqCst);
        // SAFETY: no roots.
        let found = unsafe { m.kmemleak_scan(&[]) }.unwrap();
        (found.objects, found.old, found.unreferenced)
    };
    let first = m.kmalloc(64, Gfp::KERNEL).unwrap();
    assert_eq!(scan(0), (1, 0, 0), "seen once");
    assert_eq!(scan(4_999), (1, 0, 0), "and again, but too soon");
    let second = m.kmalloc(64, Gfp::KERNEL).unwrap();
    assert_eq!(scan(1), (2, 1, 1));
    assert_eq!(scan(4_999), (2, 1, 1));
    assert_eq!(scan(1), (2, 2, 2));
    // Young once more: an object of the same address, but another.
    // SAFETY: not used after.
    unsafe { m.kfree(second.as_ptr()).unwrap() };
    let third = m.kmalloc(64, Gfp::KERNEL).unwrap();
    assert_eq!(third, second);
    assert_eq!(scan(0), (2, 1, 1));
    assert_eq!(scan(5_000), (2, 1, 1));
    // A young one holds what it refers to.
    point(third, 0, first.addr().get());
    // SAFETY: not used after.
    unsafe { m.kfree(m.kmalloc(8, Gfp::KERNEL).unwrap().as_ptr()).unwrap() };
    assert_eq!(scan(0), (2, 1, 0));
    assert_eq!(scan(5_000), (2, 2, 2), "and an old one does not");
    [first, third].into_iter().for_each(|at| {
        // SAFETY: not used after.
        unsafe { m.kfree(at.as_ptr()).unwrap() }
    });
    assert_eq!(m.audit_objects().unwrap().live, 0);
}

#[test]
fn long_chains_and_wide_ones_fit_the_stack() {
    let rig = rig();
    rig.run(|_| {
        let list: Vec<_> = (0..30_000).map(|_| object(&rig, 16)).collect();
        list.windows(2).for_each(|pair| point(pair[1], 1, pair[0].addr().get()));
        // 30 wide, and each of those 1000.
        let wide = object(&rig, 256);
        let middle: Vec<_> = (0..30).map(|_| object(&rig, 8192)).collect();
        let mut leaves = Vec::new();
        for (i, at) in middle.iter().enumerate() {
            point(wide, i, at.addr().get());
            for j in 0..1000 {
                let leaf = object(&rig, 8);
                point(*at, j, leaf.addr().get());
                leaves.push(leaf);
            }
        }
        let roots = Roots::of(&[list[29_999], wide]);
        assert_eq!(leaks(&rig, &roots), []);
        // Cut in the middle, and one branch off.
        point(list[15_000], 1, 0);
        point(wide, 7, 0);
        let mut lost = addrs(&list[..15_000]);
        lost.extend(addrs(&leaves[7000..8000]));
        lost.extend(addrs(&middle[7..8]));
        lost.sort();
        let found = scan(&rig, &roots);
        assert_eq!(found.unreferenced, lost.len() as u64);
        let mut seen = Vec::new();
        // The first few: each sixteen take a walk.
        point(list[15_000], 1, list[14_999].addr().get());
        scan(&rig, &roots);
        rig.for_each_leak(|leak| seen.push(leak.addr)).unwrap();
        assert_eq!(seen.len(), 1001);
        assert!(seen.iter().all(|at| lost.contains(at)));
        free_all(&rig, list.into_iter().chain(middle).chain(leaves).chain([wide]));
    });
}

#[test]
fn a_report_has_linuxs_form_and_says_who_allocated() {
    let rig = rig();
    rig.run(|_| {
        let users = SlabFlags::STORE_USER;
        let cache = rig.kmem_cache_create("noted", 40, 0, users, None).unwrap();
        let (at, line) = (rig.kmem_cache_zalloc(&cache, Gfp::KERNEL).unwrap(), line!());
        // SAFETY: ours.
        unsafe { at.copy_from_nonoverlapping(NonNull::from(b"leaked\n").cast(), 7) };
        assert_eq!(leaks(&rig, &Roots(Vec::new())), addrs(&[at]));
        let mut text = String::new();
        rig.write_kmemleak(&mut text).unwrap();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], format!("unreferenced object {:#018x} (size 40):", at.addr()));
        assert!(lines[1].starts_with("  comm \"?\", pid 0, jiffies "), "{text}");
        assert_eq!(lines[2], "  hex dump (first 32 bytes):");
        assert_eq!(
            lines[3],
            "    6c 65 61 6b 65 64 0a 00 00 00 00 00 00 00 00 00  leaked.........."
        );
        assert_eq!(lines[5], "  backtrace:");
        assert!(lines[6].starts_with(&format!("    {}:{line}:", file!())), "{text}");
        assert_eq!(lines.len(), 7);
        let mut found: Vec<Leak> = Vec::new();
        rig.for_each_leak(|leak| found.push(*leak)).unwrap();
        assert_eq!(found[0].cache.unwrap().as_str(), "noted");
        assert!(found[0].when_ns.is_some() && found[0].bytes().starts_with(b"leaked"));
        // SAFETY: not used after.
        unsafe { rig.kmem_cache_free(&cache, at).unwrap() };
        rig.kmem_cache_destroy(cache).unwrap();
        rig.set_alloc_tags(Some(100)).unwrap();
        let (at, line) = (rig.kzalloc(12, Gfp::KERNEL).unwrap(), line!());
        leaks(&rig, &Roots(Vec::new()));
        let mut text = String::new();
        rig.write_kmemleak(&mut text).unwrap();
        assert!(text.contains(&format!("\n    {}:{line}:", file!())), "{text}");
        assert!(text.contains("  hex dump (first 16 bytes):\n    00 00"), "{text}");
        free(&rig, at);
        rig.set_alloc_tags(None).unwrap();
    });
}

#[test]
fn everything_else_goes_on_with_objects_that_a_scan_has_seen() {
    let rig = rig();
    rig.run(|_| {
        let mark = rig.mark();
        let checked = SlabFlags::CONSISTENCY_CHECKS;
        for (name, flags) in
            [("plain", SlabFlags::NO_MERGE), ("checked", checked), ("all", SlabFlags::DEBUG)]
        {
            let cache = rig.kmem_cache_create(name, 64, 0, flags, None).unwrap();
            let held: Vec<_> =
                (0..100).map(|_| rig.kmem_cache_alloc(&cache, Gfp::KERNEL).unwrap()).collect();
            scan(&rig, &Roots(Vec::new()));
            scan(&rig, &Roots(Vec::new()));
            assert_eq!(rig.audit_objects().unwrap().live, 100);
            rig.kmem_cache_validate(&cache).unwrap();
            assert_eq!(rig.ksize(held[3].as_ptr()), Some(64));
            let error = rig.kmem_cache_destroy(cache).unwrap_err();
            assert_eq!(error.live, 100);
            let cache = error.cache;
            // Half of them while the scan's notes are there, half after.
            let (some, rest) = held.split_at(50);
            // SAFETY: not used after; the second time is refused.
            unsafe {
                rig.kmem_cache_free_bulk(&cache, some).unwrap();
                assert!(rig.kmem_cache_free(&cache, some[0]).is_err());
            }
            rig.set_kmemleak(Some(QUICK)).unwrap();
            // SAFETY: not used after.
            unsafe { rig.kmem_cache_free_bulk(&cache, rest).unwrap() };
            rig.kmem_cache_destroy(cache).unwrap();
        }
        let reports = rig.since(mark);
        // What was asked for: the failed destroys list 16 objects each, and each double free is one.
        assert_eq!(reports.len(), 3 * (17 + 1), "{reports:#?}");
        let large = object(&rig, 50_000);
        scan(&rig, &Roots(Vec::new()));
        free(&rig, large);
        // SAFETY: refused.
        assert!(unsafe { rig.kfree(large.as_ptr()) }.is_err());
    });
}

/// A thread hangs pairs of objects in a table, the second by the first; what is there is never lost, and one is from
/// the beginning.
#[test]
fn a_scan_beside_busy_cpus_reports_nothing_that_is_referred_to() {
    let rig = Rig::new(
        Shape::no_dma(64 * MIB),
        Config {
            kfence: Some(KfenceConfig { objects: 31, sample_interval_ns: 1 }),
            ..Config::default()
        },
    );
    let table: Vec<AtomicUsize> = (0..64).map(|_| AtomicUsize::new(0)).collect();
    let stop = AtomicBool::new(false);
    rig.run(|_| rig.set_kmemleak(Some(QUICK)).unwrap());
    // For objects that were taken off the table and are about to be freed.
    let taken = Mutex::new(());
    thread::scope(|s| {
        let (rig, table, stop, taken) = (&rig, &table, &stop, &taken);
        s.spawn(move || {
            let work = |_: &mut _| {
                let mut n = 0usize;
                while !stop.load(SeqCst) {
                    n += 1;
                    let sizes = [16, 64, 200, 4000, 10_000];
                    if n.is_multiple_of(8) {
                        rig.kfence_toggle();
                    }
                    let first = object(rig, sizes[n % 5]);
                    let second = object(rig, sizes[n / 5 % 5]);
                    point(first, 1, second.addr().get());
                    let _taken = taken.lock().unwrap();
                    let old = table[n * 7 % 64].swap(first.addr().get(), SeqCst);
                    if let Some(old) = NonNull::new(std::ptr::with_exposed_provenance_mut(old)) {
                        // SAFETY: an object of the test's.
                        let next =
                            unsafe { old.cast::<AtomicUsize>().add(1).as_ref() }.load(SeqCst);
                        free(
                            rig,
                            NonNull::new(std::ptr::with_exposed_provenance_mut(next)).unwrap(),
                        );
                        free(rig, old);
                    }
                }
            };
            rig.machine().run_on(Some(1), None, work).unwrap();
        });
        rig.run(|_| {
            let lost = object(rig, 64);
            let range = table.as_ptr_range();
            let roots = range.start.expose_provenance()..range.end.addr();
            for n in 0..60 {
                // SAFETY: the table stays.
                let found = unsafe { rig.kmemleak_scan(std::slice::from_ref(&roots)) }
                    .unwrap()
                    .unreferenced;
                // A pair may have been taken off and not yet been freed when the scan looked.
                assert!(found <= 3 && (n == 0 || found > 0), "{found} in round {n}");
            }
            // Now with the other CPU between its steps.
            let quiet = taken.lock().unwrap();
            let mut now = Vec::new();
            rig.for_each_leak(|leak| now.push(leak.addr)).unwrap();
            drop(quiet);
            stop.store(true, SeqCst);
            assert_eq!(now, addrs(&[lost]), "reported and still in use");
            free(rig, lost);
        });
    });
    rig.run(|_| {
        for old in &table {
            if let Some(old) =
                NonNull::new(std::ptr::with_exposed_provenance_mut::<u8>(old.load(SeqCst)))
            {
                // SAFETY: an object of the test's.
                let next = unsafe { old.cast::<AtomicUsize>().add(1).as_ref() }.load(SeqCst);
                free(&rig, NonNull::new(std::ptr::with_exposed_provenance_mut(next)).unwrap());
                free(&rig, old);
            }
        }
        assert_eq!(rig.kfence_stats().unwrap().bugs, 0);
        rig.set_kmemleak(None).unwrap();
    });
}

#[test]
fn objects_that_a_scan_has_seen_are_moved_all_the_same() {
    unsafe fn moves(from: NonNull<u8>, to: NonNull<u8>, count: usize) -> MoveResult {
        // SAFETY: two objects of 256 bytes, and the test's count.
        unsafe {
            to.copy_from_nonoverlapping(from, 256);
            (*std::ptr::with_exposed_provenance::<AtomicUsize>(count)).fetch_add(1, SeqCst);
        }
        MoveResult::Moved
    }
    let rig = rig();
    rig.run(|_| {
        let cache = rig.kmem_cache_create("moving", 256, 0, SlabFlags::NO_MERGE, None).unwrap();
        let count = AtomicUsize::new(0);
        let private = (&raw const count).expose_provenance();
        // SAFETY: nothing but this test has objects of it, by addresses that it does not use again.
        unsafe { rig.kmem_cache_set_move(&cache, Some(moves), private).unwrap() };
        let held: Vec<_> =
            (0..150).map(|_| rig.kmem_cache_alloc(&cache, Gfp::KERNEL).unwrap()).collect();
        let (few, most): (Vec<_>, Vec<_>) =
            held.into_iter().enumerate().partition(|(i, _)| i % 15 == 7);
        let most: Vec<_> = most.into_iter().map(|(_, at)| at).collect();
        // SAFETY: not used after.
        unsafe { rig.kmem_cache_free_bulk(&cache, &most).unwrap() };
        scan(&rig, &Roots(Vec::new()));
        // One that its user said something about stays where it is.
        let stays = few[4].1;
        rig.kmemleak_not_leak(stays.as_ptr()).unwrap();
        assert!(rig.kmem_cache_shrink(&cache) > 0 && count.load(SeqCst) > 3);
        assert_eq!(rig.kmem_cache_info(&cache).active_objects, 10);
        let mut live = Vec::new();
        // Moved objects are young; after two more scans all but the one are leaks.
        (0..3).for_each(|_| _ = scan(&rig, &Roots(Vec::new())));
        rig.for_each_leak(|leak| live.push(leak.addr)).unwrap();
        assert_eq!(live.len(), 9);
        assert!(!live.contains(&stays.addr().get()));
        for at in live.into_iter().chain([stays.addr().get()]) {
            let at = NonNull::new(std::ptr::with_exposed_provenance_mut(at)).unwrap();
            // SAFETY: an object in use of the cache.
            unsafe { rig.kmem_cache_free(&cache, at).unwrap() };
        }
        rig.kmem_cache_destroy(cache).unwrap();
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]
    /// A random graph: what is reached in the reference is what is not reported.
    #[test]
    fn a_scan_reaches_what_a_search_reaches(
        sizes in prop::collection::vec(0usize..6, 1..60),
        edges in prop::collection::vec((any::<u16>(), any::<u16>(), any::<u16>()), 0..120),
        starts in prop::collection::vec(any::<u16>(), 0..4),
        frees in prop::collection::vec(any::<u16>(), 0..10),
    ) {
        const SIZES: [usize; 6] = [8, 48, 100, 1000, 4096, 20_000];
        let rig = rig();
        rig.run(|_| {
            let objects: Vec<_> = sizes.iter().map(|i| (object(&rig, SIZES[*i]), SIZES[*i])).collect();
            let n = objects.len();
            let mut words: Vec<Vec<Option<usize>>> =
                objects.iter().map(|(_, size)| vec![None; size / 8]).collect();
            for (from, to, at) in edges {
                let (from, to) = (usize::from(from) % n, usize::from(to) % n);
                let word = usize::from(at) % words[from].len();
                words[from][word] = Some(to);
                point(objects[from].0, word, objects[to].0.addr().get() + usize::from(at) % objects[to].1);
            }
            let mut gone = BTreeSet::new();
            leaks(&rig, &Roots(Vec::new()));
            for i in frees {
                let i = usize::from(i) % n;
                if gone.insert(i) {
                    free(&rig, objects[i].0);
                }
            }
            let starts: Vec<_> = starts.iter().map(|i| usize::from(*i) % n).collect();
            let roots = Roots::of(&starts.iter().map(|i| objects[*i].0).collect::<Vec<_>>());
            let mut reached = BTreeSet::new();
            let mut todo: Vec<_> = starts.into_iter().filter(|i| !gone.contains(i)).collect();
            while let Some(i) = todo.pop() {
                if reached.insert(i) {
                    todo.extend(words[i].iter().flatten().filter(|to| !gone.contains(to)));
                }
            }
            let live = (0..n).filter(|i| !gone.contains(i));
            let lost: Vec<_> = live.clone().filter(|i| !reached.contains(i)).map(|i| objects[i].0).collect();
            assert_eq!(leaks(&rig, &roots), addrs(&lost));
            live.for_each(|i| free(&rig, objects[i].0));
            rig.set_kmemleak(None).unwrap();
        });
    }
}
