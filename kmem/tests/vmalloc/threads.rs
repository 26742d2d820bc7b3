//! Several CPUs at once \[V3\].

use super::{PAGE, at, read, vfree, write};
use kmem::{Config, Gfp, Misuse, context::Task};
use kmem_hosted::Shape;
use kmem_test_support::{MIB, Rig};
use std::{
    os::fd::AsRawFd,
    ptr::NonNull,
    sync::{
        Barrier,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst},
    },
};

/// Every area holds its own stamp until it is freed, whatever others do, in a range so small that purges never end.
#[test]
fn areas_are_nobody_elses() {
    let shape = Shape::x86_64(64 * MIB).cpus(4).vmalloc(4 * MIB);
    let m = Rig::new(shape, Config::default());
    let served = AtomicU64::new(0);
    std::thread::scope(|s| {
        for cpu in 0..4usize {
            let (m, served) = (&m, &served);
            s.spawn(move || {
                m.on(cpu, &Task::new(), |_| {
                    let mut n = cpu + 1;
                    let mut held: Vec<(NonNull<u8>, usize, u8)> = Vec::new();
                    for turn in 0..1500 {
                        n = n.wrapping_mul(0x2545_f491_4f6c_dd1d).wrapping_add(7);
                        let pages = 1 + (n >> 40) % 40;
                        let stamp = (turn * 4 + cpu) as u8;
                        if let Ok(area) = m.__vmalloc(pages * PAGE, Gfp::KERNEL | Gfp::NOWARN) {
                            (0..pages).for_each(|i| write(at(area, i * PAGE), stamp));
                            held.push((area, pages, stamp));
                            served.fetch_add(1, SeqCst);
                        }
                        if held.len() > 12 || n >> 62 == 0 && !held.is_empty() {
                            let (area, pages, stamp) = held.swap_remove((n >> 20) % held.len());
                            assert!((0..pages).all(|i| read(at(area, i * PAGE)) == stamp));
                            vfree(m, area);
                        }
                    }
                    held.into_iter().for_each(|(area, ..)| vfree(m, area));
                });
            });
        }
    });
    assert!(served.into_inner() > 3000);
}

#[test]
fn of_two_that_free_an_area_one_succeeds() {
    let m = Rig::pc();
    let barrier = Barrier::new(2);
    let place = AtomicUsize::new(0);
    let freed = AtomicU64::new(0);
    std::thread::scope(|s| {
        for cpu in 0..2 {
            let (m, barrier, place, freed) = (&m, &barrier, &place, &freed);
            s.spawn(move || {
                for _ in 0..200 {
                    m.on(cpu, &Task::new(), |_| {
                        if cpu == 0 {
                            let area = m.vmalloc(3 * PAGE).unwrap();
                            place.store(area.as_ptr().expose_provenance(), SeqCst);
                        }
                    });
                    barrier.wait();
                    m.on(cpu, &Task::new(), |_| {
                        let addr = place.load(SeqCst);
                        // SAFETY: nobody uses it.
                        match unsafe { m.vfree(std::ptr::with_exposed_provenance(addr)) } {
                            Ok(()) => _ = freed.fetch_add(1, SeqCst),
                            Err(Misuse::AreaFree { .. } | Misuse::NoArea { .. }) => {}
                            Err(e) => panic!("{e}"),
                        }
                    });
                    barrier.wait();
                }
            });
        }
    });
    assert_eq!(freed.into_inner(), 200);
}

/// One CPU reads through addresses that another frees and gets again: it finds nothing there, or what an area's user
/// wrote, and never what the next owner of a frame writes to it.
#[test]
fn old_addresses_lead_nowhere() {
    let m = Rig::pc();
    let (addr, done) = (AtomicUsize::new(0), AtomicBool::new(false));
    let faults = AtomicU64::new(0);
    std::thread::scope(|s| {
        let (m, addr, done, faults) = (&m, &addr, &done, &faults);
        s.spawn(move || {
            let (reader, writer) = std::io::pipe().unwrap();
            while !done.load(SeqCst) {
                let here = addr.load(SeqCst);
                let at: *const u8 = std::ptr::with_exposed_provenance(here);
                // SAFETY: write(2) checks the address itself.
                let n = unsafe { libc::write(writer.as_raw_fd(), at.cast(), 2) };
                if n == 2 {
                    let mut bytes = [0u8; 2];
                    std::io::Read::read_exact(&mut &reader, &mut bytes).unwrap();
                    assert!(bytes.iter().all(|b| ![1, 2].contains(b)), "others' data: {bytes:?}");
                } else {
                    faults.fetch_add(1, SeqCst);
                }
            }
        });
        m.run(|_| {
            for turn in 0..3000usize {
                let area = m.vzalloc(2 * PAGE).unwrap();
                let stamp = 3 + (turn % 200) as u8;
                write(area.as_ptr(), stamp);
                addr.store(area.as_ptr().expose_provenance(), SeqCst);
                assert_eq!((read(area.as_ptr()), read(at(area, 1))), (stamp, 0));
                if turn % 16 == 0 {
                    std::thread::yield_now();
                }
                vfree(m, area);
                // The frame's next owner: what the old address must not show.
                let next = m.alloc_page(Gfp::KERNEL).unwrap();
                let direct = m.page_address(next).unwrap().as_ptr();
                write(direct, 1);
                write(direct.wrapping_add(1), 2);
                assert!(turn % 64 != 0 || !super::readable(area.as_ptr()), "still mapped");
                m.put_page(next).unwrap();
            }
        });
        done.store(true, SeqCst);
    });
    assert!(faults.into_inner() > 0, "the reader never came late");
}

/// What a purge on one CPU makes free is another's again whose it was, and nobody's when all is given back.
#[test]
fn purged_areas_go_back_to_their_cpus() {
    let m = Rig::new(Shape::no_dma(64 * MIB).cpus(2), Config::default());
    let task = Task::new();
    let purges = || {
        for _ in 0..3 {
            // Three times 16 MiB is more than a CPU's share of what may wait.
            let area = m.get_vm_area(16 << 20).unwrap();
            // SAFETY: nobody uses it.
            unsafe { m.vunmap(area.as_ptr()).unwrap() };
        }
    };
    let area = m.on(1, &task, |_| {
        let area = m.vmalloc(PAGE).unwrap();
        vfree(&m, area);
        let other = m.vmalloc(PAGE).unwrap();
        assert_ne!(other, area, "used again before a purge");
        vfree(&m, other);
        [area, other]
    });
    m.on(0, &task, |_| {
        // Twice: what waits for the other CPU is in the way of the second.
        purges();
        purges();
        let mine = m.vmalloc(PAGE).unwrap();
        assert!(!area.contains(&mine), "another shard's");
        vfree(&m, mine);
    });
    m.on(1, &task, |_| {
        let again = [(); 2].map(|()| m.vmalloc(PAGE).unwrap());
        assert!(area.iter().all(|at| again.contains(at)), "{again:?} for {area:?}");
        again.into_iter().for_each(|at| vfree(&m, at));
    });
    m.on(0, &task, |_| {
        purges();
        let before = m.audit_vmalloc().unwrap();
        assert!(before.live == 0 && before.lazy + before.pooled > 0, "{before:?}");
        assert_eq!(m.vm_unmap_aliases(), before.lazy + before.pooled);
        let after = m.audit_vmalloc().unwrap();
        assert_eq!((after.lazy, after.pooled, after.free), (0, 0, after.largest), "{after:?}");
    });
}
