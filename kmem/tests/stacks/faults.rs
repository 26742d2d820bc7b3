//! Fault injection \[D1\]: the first, the second, the third… inner allocation fails, until there is none left to fail;
//! after each everything is as it was, and the operation works.

use super::free;
use kmem::{AllocError, Config, fault::FaultPlan};
use kmem_hosted::Shape;
use kmem_test_support::{MIB, Rig};

/// Lets every inner allocation of `op` fail in turn, on a new machine each time, in which nothing is made yet. Returns
/// how many there were. The machine's end checks that nothing was lost.
fn each_fails(shape: Shape, op: impl Fn(&Rig) -> Result<(), AllocError>) -> u64 {
    for n in 0.. {
        let m = Rig::new(shape.clone(), Config::default());
        let fired = m.run(|_| {
            m.set_fault_plan(FaultPlan::Nth(n));
            let done = op(&m);
            m.set_fault_plan(FaultPlan::Off);
            let fired = m.faults_injected();
            assert!(done.is_ok() || (fired > 0 && done == Err(AllocError::NoMemory)), "{done:?}");
            let frames = m.audit_stacks().unwrap().threads;
            assert_eq!(frames, 0, "after fault {n}");
            op(&m).unwrap();
            fired
        });
        if fired == 0 {
            return n;
        }
    }
    unreachable!("a fault plan beyond all inner allocations fires none")
}

#[test]
fn a_stack_is_made_whole_or_not_at_all() {
    for frames in 1..=4 {
        let op = |m: &Rig| {
            let low = m.alloc_thread_stack(frames)?;
            free(m, low);
            Ok(())
        };
        let inner = each_fails(Shape::no_dma(32 * MIB), op);
        assert!(inner > frames as u64, "{inner} inner allocations for {frames} frames");
        let direct = each_fails(Shape::no_dma(32 * MIB).vmalloc(0), op);
        assert!(direct >= 1, "{direct}");
    }
}

#[test]
fn stacks_for_interrupts_are_made_whole_or_made_later() {
    let op = |m: &Rig| {
        let made = m.alloc_irq_stacks(2);
        if made.is_err() {
            // What was made stays, and the rest comes with the next call.
            assert!(m.irq_stack(2).is_none());
            m.alloc_irq_stacks(2).unwrap();
        }
        assert!((0..3).all(|cpu| m.irq_stack(cpu).is_some()));
        // SAFETY: no interrupts run on them.
        unsafe { m.free_irq_stacks().unwrap() };
        made
    };
    assert!(each_fails(Shape::no_dma(32 * MIB).cpus(3), op) >= 9);
}
