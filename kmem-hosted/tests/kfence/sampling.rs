//! Which allocations are samples.

use super::{free, rig, sample, sampled};
use kmem::{Config, Gfp, kfence::KfenceConfig, kfence::KfenceError};
use kmem_hosted::{Machine, MachineError, Shape};
use kmem_test_support::{MIB, Rig};
use std::time::{Duration, Instant};

/// Makes magazines for a size, so that its traffic stays in them.
fn warm(rig: &Rig, size: usize) {
    rig.set_kfence(0).unwrap();
    let held: Vec<_> = (0..20).map(|_| rig.kmalloc(size, Gfp::KERNEL).unwrap()).collect();
    held.into_iter().for_each(|at| free(rig, at).unwrap());
    rig.set_kfence(1).unwrap();
}

/// Allocates and frees; says whether it was a sample.
fn pair(rig: &Rig) -> bool {
    let at = rig.kmalloc(64, Gfp::KERNEL).unwrap();
    let hit = sampled(rig, at);
    free(rig, at).unwrap();
    hit
}

#[test]
fn traffic_within_a_magazine_is_sampled_when_it_is_asked_for() {
    let rig = rig(7);
    rig.run(|_| {
        warm(&rig, 64);
        let pair = || pair(&rig);
        // The fast path does not look.
        assert!((0..1000).all(|_| !pair()));
        for _ in 0..50 {
            rig.kfence_toggle();
            assert!(pair(), "the allocation after it is the sample");
            // The free was one of the slow path; this is none of its any more.
            assert!((0..10).all(|_| !pair()), "and only that");
        }
        assert_eq!(rig.kfence_stats().unwrap().allocations, 50);
    });
}

#[test]
fn what_comes_before_the_allocation_does_not_use_the_sample_up() {
    let rig = rig(7);
    rig.run(|_| {
        warm(&rig, 64);
        let held = rig.kmalloc(64, Gfp::KERNEL).unwrap();
        rig.kfence_toggle();
        let block = rig.take(Gfp::KERNEL, 0).unwrap();
        free(&rig, held).unwrap();
        rig.release([block]);
        let at = rig.kmalloc(64, Gfp::KERNEL).unwrap();
        assert!(sampled(&rig, at));
        free(&rig, at).unwrap();
        // A CPU that allocates nothing is left alone when the time comes again.
        rig.kfence_toggle();
        rig.kfence_toggle();
        let at = rig.kmalloc(64, Gfp::KERNEL).unwrap();
        free(&rig, at).unwrap();
        assert!((0..100).all(|_| !pair(&rig)));
    });
}

#[test]
fn a_cpu_that_was_asked_for_a_sample_takes_the_fast_paths_again_when_there_are_none() {
    let rig = rig(7);
    rig.run(|_| {
        warm(&rig, 64);
        let pair = || pair(&rig);
        rig.kfence_toggle();
        rig.set_kfence(0).unwrap();
        assert!((0..3).all(|_| !pair()));
        rig.set_kfence(1).unwrap();
        // On a slow path the first one were a sample.
        assert!((0..100).all(|_| !pair()));
    });
}

#[test]
fn samples_are_apart_in_time() {
    let rig = rig(7);
    rig.run(|_| {
        rig.set_kfence(3_600_000_000_000).unwrap();
        let held: Vec<_> = (0..500).map(|_| rig.kmalloc(64, Gfp::KERNEL).unwrap()).collect();
        let hits = held.iter().filter(|at| sampled(&rig, **at)).count();
        assert_eq!(hits, 1, "the first one, and none within the hour");
        rig.kfence_toggle();
        let at = rig.kmalloc(64, Gfp::KERNEL).unwrap();
        assert!(!sampled(&rig, at));
        rig.set_kfence(0).unwrap();
        rig.kfence_toggle();
        let none = rig.kmalloc(3000, Gfp::KERNEL).unwrap();
        assert!(!sampled(&rig, none));
        let all = held.into_iter().chain([at, none]);
        all.for_each(|at| free(&rig, at).unwrap());
    });
}

#[test]
fn pages_come_again_in_the_order_of_their_frees() {
    let rig = rig(3);
    rig.run(|_| {
        let page = |size| {
            let at = sample(&rig, size);
            free(&rig, at).unwrap();
            at.addr().get() / 4096
        };
        let round: Vec<_> = (0..3).map(|_| page(64)).collect();
        assert!(round.iter().enumerate().all(|(i, p)| !round[..i].contains(p)));
        for _ in 0..3 {
            assert_eq!((0..3).map(|_| page(100)).collect::<Vec<_>>(), round);
        }
    });
}

#[test]
fn a_full_pool_leaves_allocations_to_the_slabs() {
    let rig = rig(7);
    rig.run(|_| {
        // By several callers: of one alone some pages are kept free.
        let mut held = Vec::new();
        for _ in 0..5 {
            held.push(sample(&rig, 32));
        }
        held.extend([sample(&rig, 64)]);
        rig.kfence_toggle();
        let same: Vec<_> = (0..2)
            .map(|_| {
                rig.kfence_toggle();
                rig.kmalloc(32, Gfp::KERNEL).unwrap()
            })
            .collect();
        assert!(sampled(&rig, same[0]), "a caller that has none there");
        assert!(!sampled(&rig, same[1]), "no page left");
        let stats = rig.kfence_stats().unwrap();
        assert_eq!((stats.objects, stats.live), (7, 7));
        assert!(stats.skipped_capacity > 0);
        held.into_iter().chain(same).for_each(|at| free(&rig, at).unwrap());
    });
}

#[test]
fn one_caller_does_not_fill_the_pool() {
    let rig = rig(15);
    rig.run(|_| {
        let held: Vec<_> = (0..30)
            .map(|_| {
                rig.kfence_toggle();
                rig.kmalloc(32, Gfp::KERNEL).unwrap()
            })
            .collect();
        assert_eq!(held.iter().filter(|at| sampled(&rig, **at)).count(), 12);
        let other = sample(&rig, 32);
        held.into_iter().chain([other]).for_each(|at| free(&rig, at).unwrap());
    });
}

#[test]
fn a_thread_of_the_machines_keeps_the_time() {
    let kfence = Some(KfenceConfig { objects: 7, sample_interval_ns: 1_000_000 });
    let config = Config { kfence, ..Config::default() };
    let rig = Rig::of(Machine::with_config(Shape::no_dma(64 * MIB), config).unwrap());
    rig.set_stat_interval(0);
    let start = Instant::now();
    // On one CPU all the while: the other one is the thread's.
    rig.run(|_| {
        warm(&rig, 64);
        rig.set_kfence(1_000_000).unwrap();
        while rig.kfence_stats().unwrap().allocations < 10 {
            assert!(start.elapsed() < Duration::from_secs(20), "nobody keeps the time");
            let at = rig.kmalloc(64, Gfp::KERNEL).unwrap();
            free(&rig, at).unwrap();
        }
    });
    let text = rig.kfence_stats().unwrap().to_string();
    assert!(text.starts_with("enabled: 1\ncurrently allocated: 0\ntotal allocations: "), "{text}");
    assert!(text.contains("\ntotal bugs: 0\n"), "{text}");
}

#[test]
fn a_machine_without_a_pool_says_so() {
    let rig = Rig::flat();
    assert_eq!(rig.set_kfence(1), Err(KfenceError::NoPool));
    assert_eq!(rig.kfence_stats(), None);
    assert!(!rig.kfence_handle_page_fault(0x1000, false, 0));
    rig.kfence_toggle();
    let with = |objects| {
        let kfence = Some(KfenceConfig { objects, ..KfenceConfig::default() });
        let shape = Shape::no_dma(8 * MIB);
        match Machine::without_kswapd(shape, Config { kfence, ..Config::default() }) {
            Ok(machine) => Ok(machine.kfence_stats().unwrap().objects),
            Err(MachineError::BringUp(kmem::BringUpError::Kfence(e))) => Err(e),
            Err(e) => panic!("{e}"),
        }
    };
    assert_eq!(with(0), Err(KfenceError::Objects(0)));
    assert_eq!(with(512), Err(KfenceError::Objects(512)));
    assert_eq!(with(u32::MAX), Err(KfenceError::Objects(u32::MAX)));
    assert_eq!(with(1), Ok(1));
    assert_eq!(with(2), Ok(3));
    assert_eq!(with(255), Ok(255));
}
