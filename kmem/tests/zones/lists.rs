//! A CPU's list against a queue with two ends \[P3\].

use kmem::{Config, Gfp, Pfn, ZoneType};
use kmem_hosted::Shape;
use kmem_test_support::{MIB, Rig};
use proptest::{collection::vec, prelude::*};
use std::collections::VecDeque;

const MOVABLE: Gfp = Gfp::KERNEL.union(Gfp::MOVABLE);

/// Pages to free.
const SUPPLY: usize = 4096;

#[derive(Clone, Copy, Debug)]
enum Op {
    Free(u8),
    Take(u8),
    TakeCold(u8),
    /// The CPU's housekeeping.
    Update,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (1..80_u8).prop_map(Op::Free),
        3 => (1..40_u8).prop_map(Op::Take),
        2 => (1..20_u8).prop_map(Op::TakeCold),
        1 => Just(Op::Update),
    ]
}

/// Plays on the list of movable pages, which never runs empty, and says what it finds.
fn play(ops: &[Op]) -> Result<(), TestCaseError> {
    let rig = Rig::new(Shape::no_dma(512 * MIB).cpus(1), Config::default());
    rig.run(|_| {
        let zone = rig.zone(ZoneType::Normal);
        let mut held: Vec<_> = (0..SUPPLY).map(|_| rig.take(MOVABLE, 0).unwrap()).collect();
        rig.drain_this_cpu();
        rig.vmstat_update();
        let (batch, high) = rig.pcp_limits(zone, 0);
        let mut queue: VecDeque<(Pfn, u32)> = VecDeque::new();
        let mut taken = 0;
        for op in ops {
            match *op {
                Op::Free(n) => {
                    for _ in 0..n {
                        let Some(block) = held.pop() else { break };
                        if queue.len() == high as usize {
                            queue.drain(..batch as usize);
                        }
                        queue.push_back(block);
                        rig.release([block]);
                    }
                }
                Op::Take(n) => {
                    for _ in 0..n {
                        let Some(hottest) = queue.pop_back() else { break };
                        prop_assert_eq!(rig.take(MOVABLE, 0), Ok(hottest));
                        held.push(hottest);
                        taken += 1;
                    }
                }
                Op::TakeCold(n) => {
                    for _ in 0..n {
                        let Some(coldest) = queue.pop_front() else { break };
                        prop_assert_eq!(rig.take(MOVABLE | Gfp::COLD, 0), Ok(coldest));
                        held.push(coldest);
                    }
                }
                Op::Update => {
                    let rests = queue.len().saturating_sub(taken);
                    prop_assert_eq!(rig.vmstat_update(), rests as u64);
                    queue.drain(..rests);
                    taken = 0;
                }
            }
            prop_assert_eq!(rig.audit().unwrap().pcp, queue.len() as u64);
            prop_assert_eq!(rig.pcp_limits(zone, 0), (batch, high));
        }
        rig.release(held);
        Ok(())
    })?;
    rig.assert_conserved();
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn a_list_is_a_queue_with_two_ends(ops in vec(op(), 1..60)) {
        play(&ops)?;
    }
}
