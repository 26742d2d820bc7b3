//! Several CPUs free one block: one of them does, and the others are told.

use kmem::{Gfp, Misuse, context::Task};
use kmem_hosted::Shape;
use kmem_test_support::{MIB, Rig};
use std::{
    sync::{
        Barrier,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    thread,
};

#[test]
fn of_two_frees_at_once_one_succeeds() {
    let rig = Rig::new(Shape::no_dma(64 * MIB).cpus(3), kmem::Config::default());
    const ROUNDS: usize = 300;
    let barrier = Barrier::new(3);
    let blocks = rig.run(|_| {
        (0..ROUNDS).map(|i| rig.take(Gfp::KERNEL, [0, 3, 5][i % 3]).unwrap()).collect::<Vec<_>>()
    });
    let results: Vec<Vec<Result<(), Misuse>>> = thread::scope(|s| {
        let free = |cpu| {
            let (rig, barrier, blocks) = (&rig, &barrier, &blocks);
            s.spawn(move || {
                rig.on(cpu, &Task::new(), |_| {
                    barrier.wait();
                    let free = |(pfn, order): &(kmem::Pfn, u32)| {
                        rig.__free_pages(rig.pfn_to_page(*pfn).unwrap(), *order)
                    };
                    blocks.iter().map(free).collect()
                })
            })
        };
        [0, 1, 2].map(free).map(|t| t.join().unwrap()).into()
    });
    for (i, (pfn, _)) in blocks.iter().enumerate() {
        let freed = results.iter().filter(|r| r[i].is_ok()).count();
        assert_eq!(freed, 1, "{pfn}");
        let others = results.iter().filter(|r| r[i] == Err(Misuse::DoubleFree { pfn: *pfn }));
        // A neighbour that merged meanwhile makes it no less a double free.
        assert_eq!(
            others.count(),
            2,
            "{pfn}: {:?}",
            results.iter().map(|r| r[i]).collect::<Vec<_>>()
        );
    }
}

#[test]
fn references_from_everywhere_add_up() {
    let rig = Rig::new(Shape::no_dma(64 * MIB).cpus(4), kmem::Config::default());
    let page = rig.run(|_| rig.alloc_pages(Gfp::KERNEL | Gfp::COMP, 2).unwrap());
    thread::scope(|s| {
        for cpu in 0..4 {
            let rig = &rig;
            s.spawn(move || {
                rig.on(cpu, &Task::new(), |_| {
                    for _ in 0..2000 {
                        rig.get_page(page).unwrap();
                        assert!(rig.get_page_unless_zero(page));
                        rig.put_page(page).unwrap();
                        rig.__free_pages(page, 2).unwrap();
                    }
                })
            });
        }
    });
    assert_eq!(page.page_count(), 1);
    rig.run(|_| rig.put_page(page).unwrap());
    assert_eq!(page.page_count(), 0);
}

#[test]
fn two_frees_in_the_same_moment() {
    let rig = Rig::flat();
    // Whether the two really run side by side is up to the host, so they get several chances.
    (0..4).for_each(|_| free_everything_twice(&rig));
}

fn free_everything_twice(rig: &Rig) {
    const ROUNDS: usize = 1500;
    let blocks: Vec<_> =
        rig.run(|_| (0..ROUNDS).map(|_| rig.take(Gfp::KERNEL, 0).unwrap().0).collect());
    // Both wait for each other before every block, spinning, to be as close together as can be.
    let arrived = AtomicUsize::new(0);
    let meet = |round: usize| {
        arrived.fetch_add(1, SeqCst);
        let mut spins = 0u32;
        while arrived.load(SeqCst) < 2 * (round + 1) {
            spins += 1;
            if spins.is_multiple_of(1000) {
                thread::yield_now();
            }
            std::hint::spin_loop();
        }
    };
    let freed: usize = thread::scope(|s| {
        let free = |cpu| {
            let (blocks, meet) = (&blocks, &meet);
            s.spawn(move || {
                rig.on(cpu, &Task::new(), |_| {
                    let one = |(round, pfn): (usize, &kmem::Pfn)| {
                        let page = rig.pfn_to_page(*pfn).unwrap();
                        meet(round);
                        rig.__free_page(page).is_ok()
                    };
                    blocks.iter().enumerate().map(one).filter(|freed| *freed).count()
                })
            })
        };
        [0, 1].map(free).map(|t| t.join().unwrap()).into_iter().sum()
    });
    assert_eq!(freed, ROUNDS);
}
