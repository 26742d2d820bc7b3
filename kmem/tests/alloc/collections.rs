//! Collections that others wrote, in kmalloc memory \[O2\].

use allocator_api2::{boxed::Box as Box2, vec::Vec as Vec2};
use hashbrown::{DefaultHashBuilder, HashMap};
use kmem::{Kmem, fault::FaultPlan};
use kmem_hosted::Hosted;
use kmem_test_support::Rig;
use std::thread;

#[test]
fn a_vector_of_allocator_api2() {
    let rig = Rig::flat();
    rig.run(|_| {
        let kmem: &Kmem<Hosted> = &rig;
        let mut v = Vec2::new_in(kmem);
        for n in 0..10_000u64 {
            v.push(Box2::new_in(n, kmem));
        }
        assert_eq!(rig.audit_objects().unwrap().live, 10_000);
        assert!(v.iter().map(|b| **b).eq(0..10_000));
        v.truncate(10);
        v.shrink_to_fit();
        assert!(v.try_reserve(1 << 40).is_err());
        rig.set_fault_plan(FaultPlan::From(0));
        assert!(v.try_reserve(100_000).is_err());
        rig.set_fault_plan(FaultPlan::Off);
        assert!(v.iter().map(|b| **b).eq(0..10));
        drop(v);
        assert_eq!(rig.audit_objects().unwrap().live, 0);
    });
}

#[test]
fn a_table_of_hashbrown() {
    let rig = Rig::flat();
    let kmem: &Kmem<Hosted> = &rig;
    let table = rig.run(|_| {
        let mut table = HashMap::with_hasher_in(DefaultHashBuilder::default(), kmem);
        for n in 0..20_000u32 {
            table.insert(n, [n; 3]);
        }
        for n in (0..20_000).step_by(3) {
            assert_eq!(table.remove(&n), Some([n; 3]));
        }
        table
    });
    // It may be used, and go, on a thread that is on no CPU.
    thread::scope(|s| {
        s.spawn(move || {
            let mut table = table;
            assert!((0..20_000).all(|n| table.contains_key(&n) != n.is_multiple_of(3)));
            assert!(table.try_reserve(1 << 40).is_err());
            table.shrink_to_fit();
            assert_eq!(table.len(), 13_333);
        });
    });
    assert_eq!(rig.audit_objects().unwrap().live, 0);
}
