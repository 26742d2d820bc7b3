//! A CPU's list against a queue with two ends \[P3\].

use super::press;
use kmem::{Config, Gfp, Pfn, ZoneType, vmstat::VmEvent};
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
    /// At once.
    FreeBulk(u8),
    Take(u8),
    TakeCold(u8),
    /// The CPU's housekeeping.
    Update,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (1..80_u8).prop_map(Op::Free),
        3 => (1..80_u8).prop_map(Op::FreeBulk),
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
                Op::FreeBulk(n) => {
                    let blocks = held.split_off(held.len().saturating_sub(n.into()));
                    let mut pages: Vec<_> =
                        blocks.iter().map(|(pfn, _)| rig.pfn_to_page(*pfn)).collect();
                    for (i, block) in blocks.iter().enumerate() {
                        if queue.len() == high as usize {
                            // Room for those that are to come as well.
                            let more = blocks.len() - i - 1;
                            queue.drain(..more.max(batch as usize).min(queue.len()));
                        }
                        queue.push_back(*block);
                    }
                    prop_assert_eq!(rig.free_pages_bulk(&mut pages), Ok(()));
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

/// Who asks for one page after the other is given neighbours, lowest first, as far as a refill goes.
#[test]
fn a_refill_is_handed_out_in_order() {
    let rig = Rig::new(Shape::no_dma(512 * MIB).cpus(1), Config::default());
    rig.run(|_| {
        let (batch, _) = rig.pcp_limits(rig.zone(ZoneType::Normal), 0);
        assert!(batch > 1);
        let held: Vec<_> = (0..batch).map(|_| rig.take(MOVABLE, 0).unwrap()).collect();
        let Pfn(first) = held[0].0;
        assert_eq!(held, (first..first + batch).map(|pfn| (Pfn(pfn), 0)).collect::<Vec<_>>());
        rig.release(held);
    });
    rig.assert_conserved();
}

/// Whichever way pages go through a list, `/proc/vmstat` counts each once.
#[test]
fn what_goes_through_a_list_is_counted() {
    let rig = Rig::new(Shape::no_dma(512 * MIB).cpus(1), Config::default());
    rig.run(|_| {
        let counts = || {
            let alloc = VmEvent::pgalloc(ZoneType::Normal);
            [alloc, VmEvent::PgFree].map(|event| rig.vm_event(event))
        };
        let counted = |frames: u64, what: &str, f: &mut dyn FnMut()| {
            let before = counts();
            f();
            assert_eq!(counts(), before.map(|n| n + frames), "{what}");
        };
        for order in 0..=10 {
            for gfp in [MOVABLE, MOVABLE | Gfp::COLD, Gfp::ATOMIC] {
                counted(1 << order, &format!("order {order}, {gfp:?}"), &mut || {
                    rig.release([rig.take(gfp, order).unwrap()]);
                });
            }
        }
        // More than a list holds.
        let mut pages = [None; 300];
        counted(300, "bulk", &mut || {
            assert_eq!(rig.alloc_pages_bulk(MOVABLE, &mut pages), Ok(300));
            rig.free_pages_bulk(&mut pages).unwrap();
        });
        counted(300, "one by one", &mut || {
            let held: Vec<_> = (0..300).map(|_| rig.take(MOVABLE, 0).unwrap()).collect();
            rig.release(held);
        });
        // The frames of an area are as many, and what it is described by may take some more.
        let before = counts();
        let area = rig.vmalloc(200 << 12).unwrap();
        // SAFETY: nobody uses it.
        unsafe { rig.vfree(area.as_ptr()) }.unwrap();
        let more =
            counts().iter().zip(before).map(|(now, before)| now - before).collect::<Vec<_>>();
        assert!(more.iter().all(|n| (200..210).contains(n)), "{more:?} of 200");
    });
    rig.assert_conserved();
}

/// A list that grew is as short as any in a zone under pressure from the next free on that finds it full.
#[test]
fn pressure_shortens_a_list_that_grew() {
    let rig = Rig::new(Shape::no_dma(512 * MIB).cpus(1), Config::default());
    rig.run(|_| {
        let zone = rig.zone(ZoneType::Normal);
        let limits = || rig.pcp_limits(zone, 0);
        let (batch, least) = limits();
        // Traffic that swings wider than the list.
        let take = |n| (0..n).map(|_| rig.take(MOVABLE, 0).unwrap()).collect::<Vec<_>>();
        while limits().1 < least + 2 * batch {
            rig.release(take(8 * batch));
        }
        let mut held = take(16 * batch);
        rig.drain_this_cpu();
        let (_, grown) = limits();
        rig.release(held.drain(..grown as usize));
        assert_eq!(rig.audit().unwrap().pcp, u64::from(grown), "full");
        let marks = press(&rig, zone);
        rig.release(held.pop());
        let (_, pressed) = limits();
        assert!(pressed < least, "{pressed} of {least}");
        assert_eq!(rig.audit().unwrap().pcp, u64::from(pressed));
        rig.set_watermarks(zone, marks);
        rig.release(held);
    });
    rig.assert_conserved();
}
