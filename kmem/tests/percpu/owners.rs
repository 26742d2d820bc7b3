//! `PerCpu<T>`: values that are dropped with their owner, once each.

use super::four;
use kmem::{AllocError, Gfp, alloc::PerCpu, context::Task};
use kmem_test_support::Rig;
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::atomic::{AtomicU32, Ordering::Relaxed},
};

struct Counted<'a>(&'a AtomicU32, usize);

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_add(1, Relaxed);
    }
}

#[test]
fn values_are_made_and_dropped_once_each() {
    let rig = four();
    let drops = AtomicU32::new(0);
    let free = rig.machine().per_cpu_free();
    let mut owner =
        PerCpu::new(rig.machine().kmem(), Gfp::KERNEL, |cpu| Counted(&drops, cpu)).unwrap();
    assert!(owner.iter().map(|c| c.1).eq(0..4));
    owner.get_mut(2).unwrap().1 = 20;
    assert_eq!((owner.get(2).unwrap().1, owner.get(4).map(|c| c.1)), (20, None));
    rig.on(2, &Task::new(), |_| {
        assert_eq!(rig.machine().get_cpu_var(&owner).unwrap().1, 20);
    });
    drop(owner);
    assert_eq!((drops.load(Relaxed), rig.machine().per_cpu_free()), (4, free));
}

#[test]
fn a_panic_while_they_are_made_drops_what_there_is() {
    let rig = four();
    let drops = AtomicU32::new(0);
    let free = rig.machine().per_cpu_free();
    let made = catch_unwind(AssertUnwindSafe(|| {
        PerCpu::new(rig.machine().kmem(), Gfp::KERNEL, |cpu| {
            assert!(cpu < 2, "enough");
            Counted(&drops, cpu)
        })
    }));
    assert!(made.is_err());
    assert_eq!((drops.load(Relaxed), rig.machine().per_cpu_free()), (2, free));
}

#[test]
fn an_owner_means_nothing_to_another_machine() {
    let (rig, other) = (Rig::flat(), four());
    let owner = PerCpu::new(rig.machine().kmem(), Gfp::KERNEL, |_| AtomicU32::new(1)).unwrap();
    // It has more CPUs than the owner's.
    assert!(other.machine().per_cpu(&owner, 3).is_none());
    other.on(3, &Task::new(), |_| {
        assert!(other.machine().get_cpu_var(&owner).is_none());
        assert_eq!(other.machine().this_cpu_inc(&owner), None);
        // The guard of the attempt is gone.
        assert!(
            other
                .machine()
                .kmalloc(8, Gfp::KERNEL)
                .map(|at| {
                    // SAFETY: the test's own.
                    unsafe { other.machine().kfree(at.as_ptr()) }.unwrap();
                })
                .is_ok()
        );
    });
}

#[test]
fn a_capability_decides_what_may_sleep() {
    use kmem::gfp::typed::{ATOMIC, KERNEL};
    let rig = four();
    let kmem = rig.machine().kmem();
    rig.run(|process| {
        let owner = PerCpu::new_in(kmem, &*process, KERNEL, |_| 1u8).unwrap();
        let inner = kmem::sync::preempt_disabled(kmem.platform(), process, |atomic| {
            PerCpu::new_in(kmem, atomic, ATOMIC, |_| 2u8).unwrap()
        });
        assert_eq!(owner.iter().chain(inner.iter()).map(|n| u32::from(*n)).sum::<u32>(), 12);
        let classic = kmem.alloc_percpu_in::<u32, true, 0>(&*process, KERNEL).unwrap();
        super::free(kmem, classic);
        assert_eq!(
            kmem.__alloc_percpu(0, 1).err(),
            Some(AllocError::Invalid(kmem::gfp::GfpError::BadSize))
        );
    });
}
