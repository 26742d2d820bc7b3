//! Where instances are, who may ask for them, and what becomes of mistakes.

use super::{four, free, set, values};
use kmem::{
    AllocError, Config, Gfp, Misuse, context::Task, fault::FaultPlan, gfp::GfpError,
    percpu::PerCpuPtr, sync::preempt_disabled,
};
use kmem_hosted::{Machine, Shape};
use kmem_test_support::{MIB, Rig};
use std::ptr::NonNull;

#[test]
fn small_things_of_one_cpu_are_packed_and_cpus_are_apart() {
    let rig = four();
    let m = rig.machine();
    let things: Vec<PerCpuPtr<u64>> = (0..16).map(|_| m.alloc_percpu().unwrap()).collect();
    for pair in things.windows(2) {
        let [a, b] = [pair[0], pair[1]].map(|p| m.per_cpu_ptr(p, 2).unwrap().addr().get());
        assert_eq!(b - a, 8);
    }
    let a = things[0];
    let at: Vec<usize> = (0..4).map(|cpu| m.per_cpu_ptr(a, cpu).unwrap().addr().get()).collect();
    for pair in at.windows(2) {
        assert_eq!(pair[1] - pair[0], m.per_cpu_stride());
    }
    assert!(m.per_cpu_stride() >= 4096);
    assert!(m.per_cpu_ptr(a, 4).is_none() && m.per_cpu_ptr(a, usize::MAX).is_none());
    (0..4).for_each(|cpu| set(m, a, cpu, cpu as u64 + 1));
    assert_eq!(values(m, a), [1, 2, 3, 4]);
    assert_eq!(values(m, things[1]), [0; 4]);
    free(m, a);
    // The place comes again, zeroed.
    let again = m.alloc_percpu::<u64>().unwrap();
    assert_eq!((again, values(m, again)), (a, vec![0; 4]));
    for at in things {
        free(m, at);
    }
}

#[test]
fn every_size_and_alignment_is_served_or_refused() {
    let rig = four();
    let m = rig.machine();
    let stride = m.per_cpu_stride();
    let sizes = [1, 7, 8, 9, 64, 100, 1000, 4096, stride / 2 + 1, stride - 8, stride];
    for size in sizes {
        for align in [1, 2, 8, 16, 64, 512, 4096] {
            let at = m.__alloc_percpu(size, align).unwrap();
            for cpu in 0..4 {
                let at = m.per_cpu_ptr(at, cpu).unwrap();
                assert!(at.addr().get().is_multiple_of(align));
                // SAFETY: the test's own.
                unsafe { at.write_bytes(0xff, size) };
            }
            free(m, at);
        }
    }
    let refused = |size, align, why| {
        let mark = rig.mark();
        assert_eq!(m.__alloc_percpu(size, align), Err(AllocError::Invalid(why)));
        assert!(rig.one_report(mark).contains("bad allocation request"));
    };
    refused(0, 8, GfpError::BadSize);
    refused(stride + 1, 8, GfpError::BadSize);
    refused(usize::MAX, 8, GfpError::BadSize);
    refused(8, 3, GfpError::BadAlignment);
    refused(8, 0, GfpError::BadAlignment);
    refused(8, 8192, GfpError::BadAlignment);
    refused(8, 1 << 63, GfpError::BadAlignment);
}

#[test]
fn chunks_come_and_go() {
    let rig = four();
    let m = rig.machine();
    let before = (m.nr_free_pages(), m.per_cpu_free());
    let held: Vec<_> = (0..200).map(|_| m.__alloc_percpu(1000, 8).unwrap()).collect();
    assert!(m.nr_free_pages() + 50 < before.0, "{} chunks' frames", before.0 - m.nr_free_pages());
    let percpu = |rig: &Rig| {
        let mut text = String::new();
        rig.machine().write_meminfo(&mut text).unwrap();
        let line = text.lines().find(|l| l.starts_with("Percpu:")).unwrap().to_owned();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
    };
    assert_eq!(percpu(&rig) % 4, 0);
    assert!(percpu(&rig) >= 6 * 4 * 32, "{} KiB", percpu(&rig));
    for at in held {
        free(m, at);
    }
    assert_eq!(percpu(&rig), 0);
    assert_eq!(m.per_cpu_free(), before.1);
}

#[test]
fn who_cannot_sleep_lives_off_the_reserve_or_what_there_is() {
    let rig = four();
    let m = rig.machine();
    rig.run(|process| {
        // All of it but what is kept for those who cannot wait.
        let mut held: Vec<_> = Vec::new();
        let first = m.per_cpu_free();
        while m.per_cpu_free() <= first {
            held.push(m.__alloc_percpu(512, 8).unwrap());
        }
        assert!(m.per_cpu_free() * 8 >= m.per_cpu_stride() as u64, "the reserve is there");
        let pages = rig.exhaust(Gfp::KERNEL | Gfp::NOWARN | Gfp::NORETRY, 0);
        let mark = rig.mark();
        preempt_disabled(m.platform(), process, |_| {
            // No frame is left, and still:
            held.push(m.__alloc_percpu_gfp(512, 8, Gfp::NOWAIT).unwrap());
            assert!(rig.since(mark).is_empty());
            assert_eq!(m.__alloc_percpu(8, 8), Err(AllocError::Context));
            let report = rig.one_report(mark);
            assert!(report.contains("sleeping function called from invalid context"), "{report}");
            assert!(report.contains("places.rs"), "{report}");
        });
        while let Ok(at) = m.__alloc_percpu_gfp(512, 8, Gfp::NOWAIT) {
            held.push(at);
        }
        rig.release(pages);
        preempt_disabled(m.platform(), process, |_| {
            // And a new chunk where there are frames.
            held.push(m.__alloc_percpu_gfp(512, 8, Gfp::ATOMIC).unwrap());
        });
        for at in held {
            free(m, at);
        }
    });
}

#[test]
fn mistakes_are_found_out() {
    let rig = four();
    let m = rig.machine();
    let a = m.__alloc_percpu(24, 8).unwrap();
    let b = m.__alloc_percpu(24, 8).unwrap();
    // Some in pages too.
    let big: Vec<_> =
        (0..3).map(|_| m.__alloc_percpu(m.per_cpu_stride() / 2 + 8, 8).unwrap()).collect();
    let addr = |p: PerCpuPtr<u8>| p.into_raw().addr().get();
    let at = |addr: usize| {
        PerCpuPtr::from_raw(
            NonNull::new(std::ptr::with_exposed_provenance_mut::<u8>(addr)).unwrap(),
        )
    };
    let wrong = |at: PerCpuPtr<u8>, what: Misuse| {
        let mark = rig.mark();
        // SAFETY: that a wrong address does no harm is what is tested.
        assert_eq!(unsafe { m.free_percpu(at) }, Err(what));
        assert!(rig.one_report(mark).contains("Bad per-CPU address"));
    };
    for p in [a, big[2]] {
        wrong(at(addr(p) + 8), Misuse::InsidePerCpu { addr: addr(p) + 8 });
        wrong(at(addr(p) + 1), Misuse::InsidePerCpu { addr: addr(p) + 1 });
    }
    // The instance of another CPU is not the per-CPU address.
    let other = m.per_cpu_ptr(big[2], 1).unwrap().addr().get();
    wrong(at(other), Misuse::NotPerCpu { addr: other });
    let object = m.kmalloc(64, Gfp::KERNEL).unwrap();
    for addr in [object.addr().get(), 8, 0xdead_beef_0000, usize::MAX & !7] {
        wrong(at(addr), Misuse::NotPerCpu { addr });
    }
    free(m, a);
    wrong(a, Misuse::PerCpuFree { addr: addr(a) });
    free(m, big[0]);
    wrong(big[0], Misuse::PerCpuFree { addr: addr(big[0]) });
    // Neither kfree nor free_pages takes one.
    let inside = m.per_cpu_ptr(big[2], 0).unwrap();
    // SAFETY: as above.
    let freed = unsafe { m.kfree(inside.as_ptr()) };
    assert_eq!(freed, Err(Misuse::NotAnObject { addr: addr(big[2]) }));
    assert_eq!(m.ksize(inside.as_ptr()), None);
    // SAFETY: as above.
    unsafe { m.kfree(object.as_ptr()) }.unwrap();
    free(m, b);
    free(m, big[1]);
    free(m, big[2]);
    wrong(big[2], Misuse::NotPerCpu { addr: addr(big[2]) });
}

#[test]
fn each_inner_failure_is_survived() {
    let mut failed = 0;
    for n in 0.. {
        let rig = four();
        let m = rig.machine();
        let half = m.per_cpu_stride() / 2 + 8;
        m.set_fault_plan(FaultPlan::Nth(n));
        let got: Vec<_> = (0..3).map(|_| m.__alloc_percpu_gfp(half, 8, Gfp::NOWAIT)).collect();
        m.set_fault_plan(FaultPlan::Off);
        let fired = m.faults_injected();
        let errors = got.iter().filter(|g| g.is_err()).count() as u64;
        // The page allocator gets over some by itself.
        assert!(errors <= fired);
        failed += errors;
        let more = m.__alloc_percpu(half, 8).unwrap();
        for at in got.into_iter().flatten().chain([more]) {
            free(m, at);
        }
        if fired == 0 {
            assert!(failed >= 4, "{failed} failed: two chunks of two parts each");
            break;
        }
    }
}

#[test]
fn cpus_come_and_go_under_live_instances() {
    let rig = four();
    let m = rig.machine();
    let a = m.alloc_percpu::<u64>().unwrap();
    (0..4).for_each(|cpu| set(m, a, cpu, 10 + cpu as u64));
    m.cpu_down(2).unwrap();
    assert_eq!(values(m, a), [10, 11, 12, 13]);
    // One is made while the CPU is away: it has an instance all the same.
    let b = m.alloc_percpu::<u64>().unwrap();
    assert_eq!(values(m, b), [0; 4]);
    m.cpu_up(2).unwrap();
    rig.on(2, &Task::new(), |_| {
        let at = m.get_cpu_ptr(a).unwrap();
        assert_eq!(at.cpu(), 2);
        // SAFETY: live, and nobody else uses it.
        assert_eq!(unsafe { at.as_ptr().read() }, 12);
        m.put_cpu_ptr(at);
    });
    free(m, a);
    free(m, b);
}

#[test]
fn an_address_used_after_a_migration_is_found_out() {
    let rig = four();
    let m = rig.machine();
    let a = m.alloc_percpu::<u64>().unwrap();
    let here = rig.on(1, &Task::new(), |_| {
        let here = m.this_cpu_ptr(a).unwrap();
        assert_eq!(here.get(), Ok(m.per_cpu_ptr(a, 1).unwrap()));
        here
    });
    let mark = rig.mark();
    rig.on(3, &Task::new(), |_| {
        assert_eq!(here.get(), Err(Misuse::Migrated { from: 1, to: Some(3) }));
    });
    let report = rig.one_report(mark);
    assert!(report.contains("the instance of CPU 1 was used on CPU 3"), "{report}");
    // On no CPU at all there is no instance.
    assert!(m.this_cpu_ptr(a).is_none() && m.get_cpu().is_none());
    assert_eq!(here.get(), Err(Misuse::Migrated { from: 1, to: None }));
    free(m, a);
}

#[test]
fn get_cpu_keeps_its_holder_there() {
    let rig = four();
    let m = rig.machine();
    rig.on(3, &Task::new(), |_| {
        let mark = rig.mark();
        let cpu = m.get_cpu().unwrap();
        assert_eq!((cpu.id(), m.smp_processor_id()), (3, Some(3)));
        assert!(rig.since(mark).is_empty());
        assert_eq!(m.alloc_pages(Gfp::KERNEL, 0).err(), Some(AllocError::Context));
        let inner = m.get_cpu().unwrap();
        m.put_cpu(cpu);
        assert_eq!(m.alloc_pages(Gfp::KERNEL, 0).err(), Some(AllocError::Context), "still one");
        m.put_cpu(inner);
        m.__free_pages(m.alloc_pages(Gfp::KERNEL, 0).unwrap(), 0).unwrap();
        let mark = rig.mark();
        assert_eq!(m.smp_processor_id(), Some(3));
        if cfg!(debug_assertions) {
            let report = rig.one_report(mark);
            assert!(report.contains("using smp_processor_id() in preemptible code"), "{report}");
        }
        assert_eq!(m.raw_smp_processor_id(), Some(3));
    });
    assert_eq!(m.raw_smp_processor_id(), None);
}

#[test]
fn a_guard_that_outlives_its_section_does_no_harm() {
    let rig = four();
    let m = rig.machine();
    let mark = rig.mark();
    let guard = rig.on(1, &Task::new(), |_| m.get_cpu().unwrap());
    assert!(rig.one_report(mark).contains("scheduling while atomic"));
    let mark = rig.mark();
    drop(guard);
    assert!(rig.one_report(mark).contains("a guard of CPU 1 outlived its section"));
    rig.on(1, &Task::new(), |_| {
        m.__free_pages(m.alloc_pages(Gfp::KERNEL, 0).unwrap(), 0).unwrap();
    });
}

#[test]
fn exhaustion_is_an_error_and_nothing_is_lost() {
    let rig = Rig::new(Shape::no_dma(8 * MIB).cpus(2), Config::default());
    let m = rig.machine();
    let mut held = Vec::new();
    let error = loop {
        match m.__alloc_percpu_gfp(4000, 8, Gfp::KERNEL | Gfp::NOWARN) {
            Ok(at) => held.push(at),
            Err(e) => break e,
        }
    };
    assert_eq!(error, AllocError::NoMemory);
    assert!(held.len() > 500, "{}", held.len());
    for at in held {
        free(m, at);
    }
}

#[test]
fn a_machine_without_contents_has_its_first_chunk() {
    let machine =
        Machine::without_kswapd(Shape::no_dma(64 * MIB).without_contents(), Config::default())
            .unwrap();
    let a = machine.alloc_percpu::<u64>().unwrap();
    free(&machine, a);
    let most = machine.per_cpu_free() as usize;
    let stride = machine.per_cpu_stride();
    let all = machine.__alloc_percpu(most, 8).unwrap();
    assert_eq!(
        machine.__alloc_percpu_gfp(stride, 8, Gfp::KERNEL | Gfp::NOWARN),
        Err(AllocError::NoMemory)
    );
    free(&machine, all);
}
