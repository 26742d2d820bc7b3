//! Right and wrong operations at random against a model that knows who holds what.

use kmem::{Gfp, Misuse, Page, Pfn};
use kmem_test_support::Rig;
use proptest::prelude::*;
use std::collections::BTreeMap;

#[derive(Clone, Debug)]
enum Op {
    Alloc {
        order: u32,
        comp: bool,
    },
    /// Frees a held block with its order changed by `off`.
    Free {
        which: usize,
        off: u32,
    },
    /// Frees any frame with any order.
    FreeAny {
        pfn: u32,
        order: u32,
    },
    Get {
        which: usize,
    },
    Put {
        which: usize,
    },
    Split {
        which: usize,
    },
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (0u32..6, any::<bool>()).prop_map(|(order, comp)| Op::Alloc { order, comp }),
        3 => (any::<usize>(), prop_oneof![3 => Just(0u32), 1 => 1u32..11])
            .prop_map(|(which, off)| Op::Free { which, off }),
        2 => (0u32..2048, 0u32..12).prop_map(|(pfn, order)| Op::FreeAny { pfn, order }),
        1 => any::<usize>().prop_map(|which| Op::Get { which }),
        1 => any::<usize>().prop_map(|which| Op::Put { which }),
        1 => any::<usize>().prop_map(|which| Op::Split { which }),
    ]
}

/// A live block as the model knows it.
#[derive(Clone, Copy)]
struct Live {
    order: u32,
    comp: bool,
    count: u32,
}

fn nth(live: &BTreeMap<u32, Live>, which: usize) -> Option<(u32, Live)> {
    let n = live.len().checked_sub(1)?;
    live.iter().nth(which % (n + 1)).map(|(pfn, l)| (*pfn, *l))
}

/// What the model expects of freeing `pfn` with `order`.
fn free(live: &mut BTreeMap<u32, Live>, pfn: u32, order: u32) -> Result<(), Misuse> {
    if order > 10 {
        return Err(Misuse::BadOrder { order });
    }
    let around = live.range(..=pfn).next_back().map(|(p, l)| (*p, *l));
    match around {
        Some((head, l)) if head == pfn && l.order != order => {
            Err(Misuse::WrongOrder { pfn: Pfn(pfn), given: order, actual: l.order })
        }
        Some((head, l)) if head == pfn => {
            if l.count == 1 {
                live.remove(&pfn);
            } else {
                live.insert(pfn, Live { count: l.count - 1, ..l });
            }
            Ok(())
        }
        Some((head, l)) if pfn < head + (1 << l.order) => {
            Err(Misuse::TailPage { pfn: Pfn(pfn), head: Pfn(head), order: l.order })
        }
        _ => Err(Misuse::DoubleFree { pfn: Pfn(pfn) }),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn nothing_wrong_is_done_and_nothing_right_refused(ops in prop::collection::vec(op(), 1..120)) {
        let rig = Rig::new(kmem_hosted::Shape::no_dma(8 << 20), kmem::Config::default());
        let page = |pfn: u32| -> &Page { rig.pfn_to_page(Pfn(pfn)).unwrap() };
        let mut live: BTreeMap<u32, Live> = BTreeMap::new();
        rig.run(|_| {
            for op in ops {
                match op {
                    Op::Alloc { order, comp } => {
                        let gfp = Gfp::KERNEL | Gfp::NOWARN;
                        let gfp = if comp { gfp | Gfp::COMP } else { gfp };
                        if let Ok((pfn, order)) = rig.take(gfp, order) {
                            let end = pfn.0 + (1 << order);
                            let below = live.range(..end).next_back();
                            let apart = below.is_none_or(|(p, l)| p + (1 << l.order) <= pfn.0);
                            prop_assert!(apart, "two owners");
                            live.insert(pfn.0, Live { order, comp: comp && order > 0, count: 1 });
                        }
                    }
                    Op::Free { which, off } => {
                        if let Some((pfn, l)) = nth(&live, which) {
                            let order = (l.order + off) % 11;
                            let got = rig.__free_pages(page(pfn), order);
                            prop_assert_eq!(got, free(&mut live, pfn, order));
                        }
                    }
                    Op::FreeAny { pfn, order } => {
                        let got = rig.__free_pages(page(pfn), order);
                        prop_assert_eq!(got, free(&mut live, pfn, order));
                    }
                    Op::Get { which } => {
                        if let Some((pfn, l)) = nth(&live, which) {
                            prop_assert_eq!(rig.get_page(page(pfn)), Ok(()));
                            live.insert(pfn, Live { count: l.count + 1, ..l });
                        }
                    }
                    Op::Put { which } => {
                        if let Some((pfn, l)) = nth(&live, which) {
                            prop_assert_eq!(rig.put_page(page(pfn)), Ok(()));
                            prop_assert_eq!(free(&mut live, pfn, l.order), Ok(()));
                        }
                    }
                    Op::Split { which } => {
                        if let Some((pfn, l)) = nth(&live, which) {
                            let got = rig.split_page(page(pfn), l.order);
                            prop_assert_eq!(got.is_ok(), !l.comp && l.count == 1);
                            if got.is_ok() {
                                for n in 0..1 << l.order {
                                    live.insert(pfn + n, Live { order: 0, comp: false, count: 1 });
                                }
                            }
                        }
                    }
                }
                for (pfn, l) in &live {
                    prop_assert_eq!(page(*pfn).page_count(), l.count);
                }
            }
            let frames: u64 = live.values().map(|l| 1 << l.order).sum();
            prop_assert_eq!(rig.audit().unwrap().allocated, frames);
            for (pfn, l) in live {
                for _ in 0..l.count {
                    prop_assert_eq!(rig.put_page(page(pfn)), Ok(()));
                }
            }
            Ok(())
        })?;
    }
}
