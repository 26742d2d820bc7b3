//! Every inner allocation of every fallible call fails once: the owner is as it was, and nothing is lost.

use kmem::{
    AllocError,
    alloc::{KBox, KVec, flags::*},
    fault::FaultPlan,
};
use kmem_test_support::Rig;

/// Lets each inner allocation of `op` fail in turn, each time on a machine of its own. Returns how many there
/// were, and how often `op` was refused.
fn each_fails(op: impl Fn(&Rig) -> Result<(), AllocError>) -> (u64, u32) {
    let mut refused = 0;
    for n in 0.. {
        let rig = Rig::flat();
        let done = rig.run(|_| {
            rig.set_fault_plan(FaultPlan::Nth(n));
            let result = op(&rig);
            rig.set_fault_plan(FaultPlan::Off);
            assert_eq!(rig.audit_objects().unwrap().live, 0, "objects after fault {n}");
            assert!(result.is_ok() || rig.faults_injected() == 1);
            assert!(op(&rig).is_ok(), "after fault {n}");
            refused += u32::from(result.is_err());
            rig.faults_injected() == 0
        });
        // Frames are counted here.
        drop(rig);
        if done {
            return (n, refused);
        }
    }
    unreachable!("a fault plan beyond all inner allocations fires none")
}

const FLAGS: kmem::alloc::Flags = GFP_NOWAIT.union(__GFP_NOWARN);

#[test]
fn boxes() {
    assert!(each_fails(|rig| KBox::new_on(rig, [1u8; 100], FLAGS).map(drop)).1 >= 3);
    assert!(each_fails(|rig| KBox::new_on(rig, [1u8; 10_000], FLAGS).map(drop)).1 >= 1);
    let gives_back = |rig: &Rig| match KBox::try_new_on(rig, String::from("kept"), FLAGS) {
        Ok(boxed) => {
            assert_eq!(KBox::into_inner(boxed), "kept");
            Ok(())
        }
        Err((e, value)) => {
            assert_eq!(value, "kept");
            Err(e)
        }
    };
    assert!(each_fails(gives_back).1 >= 3);
}

#[test]
fn vectors_that_grow() {
    let pushes = |rig: &Rig| {
        let mut v = KVec::new_on(rig);
        let mut result = Ok(());
        for n in 0..3000u64 {
            let pushed = v.push(n, FLAGS);
            if pushed.is_err() {
                assert!(v.iter().copied().eq(0..n), "a refused push changed something");
                // The next one finds memory again.
                v.push(n, FLAGS).unwrap();
                result = pushed;
            }
        }
        assert!(v.iter().copied().eq(0..3000));
        result
    };
    // Each size class costs a few. Where twice as much is refused, the vector takes less: only refusals of
    // that show.
    let (inner, refused) = each_fails(pushes);
    assert!(inner >= 20 && u64::from(refused) < inner / 2, "{inner} {refused}");
    let fills = |rig: &Rig| {
        let mut v = KVec::with_capacity_on(rig, 3, FLAGS)?;
        v.extend_from_slice(&[1, 2, 3], FLAGS)?;
        v.extend_with(100, 4u32, FLAGS)?;
        v.resize(9000, 5, FLAGS)?;
        assert_eq!((v[2], v[102], v[103], v.len()), (3, 4, 5, 9000));
        Ok(())
    };
    assert!(each_fails(fills).1 >= 5);
}
