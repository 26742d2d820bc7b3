//! What is noted against a reference, one step after the other; and whole notes while CPUs work.

use crate::{held, noting};
use kmem::{Gfp, Pfn};
use proptest::prelude::*;
use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
};

#[derive(Clone, Copy, Debug)]
enum Step {
    Take { order: u32, here: bool, gfp: Gfp },
    Free { which: usize },
    Split { which: usize, to: u32 },
    Switch { on: bool },
}

fn step() -> impl Strategy<Value = Step> {
    let gfp = prop::sample::select(vec![
        Gfp::KERNEL,
        Gfp::ATOMIC,
        Gfp::USER | Gfp::ZERO,
        Gfp::KERNEL | Gfp::MOVABLE | Gfp::COLD,
    ]);
    prop_oneof![
        6 => (0u32..=6, any::<bool>(), gfp).prop_map(|(order, here, gfp)| Step::Take { order, here, gfp }),
        5 => any::<usize>().prop_map(|which| Step::Free { which }),
        2 => (any::<usize>(), 0u32..6).prop_map(|(which, to)| Step::Split { which, to }),
        1 => any::<bool>().prop_map(|on| Step::Switch { on }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, max_shrink_iters: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_noted_is_what_is_held(steps in prop::collection::vec(step(), 1..120)) {
        let rig = noting();
        // By first frame: order, and line and flags if they are known.
        let mut blocks: BTreeMap<Pfn, (u32, Option<(u32, Gfp)>)> = BTreeMap::new();
        let mut on = true;
        rig.run(|_| {
            for step in steps {
                let pick = |which: usize| {
                    blocks.iter().nth(which % blocks.len().max(1)).map(|(p, b)| (*p, *b))
                };
                match step {
                    Step::Take { order, here, gfp } => {
                        let (page, at) = if here {
                            (rig.alloc_pages(gfp, order).unwrap(), line!())
                        } else {
                            (rig.alloc_pages(gfp, order).unwrap(), line!())
                        };
                        let pfn = rig.page_to_pfn(page).unwrap();
                        blocks.insert(pfn, (order, on.then_some((at, gfp))));
                    }
                    Step::Free { which } => {
                        if let Some((pfn, (order, _))) = pick(which) {
                            blocks.remove(&pfn);
                            rig.release([(pfn, order)]);
                        }
                    }
                    Step::Split { which, to } => {
                        if let Some((pfn, (order, owner))) = pick(which).filter(|b| b.1.0 >= to) {
                            rig.split_page_to(rig.pfn_to_page(pfn).unwrap(), order, to).unwrap();
                            for n in 0..1 << (order - to) {
                                blocks.insert(Pfn(pfn.0 + (n << to)), (to, owner));
                            }
                        }
                    }
                    Step::Switch { on: wanted } => {
                        assert!(rig.set_page_owner(wanted));
                        if wanted != on {
                            blocks.values_mut().for_each(|block| block.1 = None);
                        }
                        on = wanted;
                    }
                }
                let known: Vec<_> = blocks
                    .iter()
                    .filter_map(|(pfn, (order, owner))| owner.map(|(line, gfp)| (*pfn, *order, line, gfp)))
                    .collect();
                let noted: Vec<_> = held(&rig)
                    .iter()
                    .map(|o| (o.pfn, o.order, o.allocated_at.unwrap().line(), o.gfp))
                    .collect();
                assert_eq!(noted, known);
            }
            rig.release(std::mem::take(&mut blocks).into_iter().map(|(pfn, (order, _))| (pfn, order)));
        });
        prop_assert!(held(&rig).is_empty());
    }
}

#[test]
fn notes_are_whole_while_cpus_work_and_it_is_switched() {
    let rig = noting();
    let stop = AtomicBool::new(false);
    std::thread::scope(|s| {
        for cpu in 0..2 {
            let (rig, stop) = (&rig, &stop);
            s.spawn(move || {
                let gfp = [Gfp::KERNEL, Gfp::KERNEL | Gfp::RECLAIMABLE][cpu];
                rig.on(cpu, &kmem::context::Task::new(), |process| {
                    for round in 0..3000u32 {
                        let order = round % 4;
                        let page = rig.alloc_pages(gfp, order).unwrap();
                        rig.__free_pages(page, order).unwrap();
                        if round % 100 == 0 {
                            rig.hosted().cond_resched(process);
                        }
                    }
                });
                stop.store(true, Relaxed);
            });
        }
        let mut seen = 0u64;
        while !stop.load(Relaxed) || seen == 0 {
            rig.each_page_owner(|owner| {
                let place = owner.allocated_at.unwrap();
                assert!(place.file().ends_with("random.rs") && owner.freed.is_none());
                let cpu = owner.cpu.unwrap();
                let gfp = [Gfp::KERNEL, Gfp::KERNEL | Gfp::RECLAIMABLE][cpu];
                assert_eq!(owner.gfp, gfp);
                assert!(owner.pfn.is_aligned(owner.order));
            });
            seen += 1;
            assert!(rig.set_page_owner(!seen.is_multiple_of(3)));
        }
    });
    rig.set_page_owner(true);
    assert!(held(&rig).is_empty());
}
