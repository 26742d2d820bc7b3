//! Allocations against a model: no two overlap on any CPU, each keeps what was written to it, and all come back.

use super::{four, free};
use kmem::{Gfp, percpu::PerCpuPtr};
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Op {
    Alloc { size: usize, align: u32, atomic: bool },
    Free(prop::sample::Index),
}

fn op() -> impl Strategy<Value = Op> {
    let size = prop_oneof![6 => 1usize..200, 2 => 200usize..5000, 1 => 5000usize..33000];
    prop_oneof![
        3 => (size, 0u32..13, any::<bool>())
            .prop_map(|(size, align, atomic)| Op::Alloc { size, align, atomic }),
        2 => any::<prop::sample::Index>().prop_map(Op::Free),
    ]
}

struct Live {
    at: PerCpuPtr<u8>,
    size: usize,
    mark: u8,
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn instances_are_nobody_elses(ops in prop::collection::vec(op(), 1..150)) {
        let rig = four();
        let m = rig.machine();
        let before = m.per_cpu_free();
        let mut live: Vec<Live> = Vec::new();
        let bytes = |l: &Live, cpu: usize| {
            let at = m.per_cpu_ptr(l.at, cpu).unwrap();
            // SAFETY: live, and written by this thread only.
            unsafe { std::slice::from_raw_parts_mut(at.as_ptr(), l.size) }
        };
        for (i, op) in ops.into_iter().enumerate() {
            match op {
                Op::Alloc { size, align, atomic } => {
                    let gfp = if atomic { Gfp::ATOMIC } else { Gfp::KERNEL };
                    let size = size.min(m.per_cpu_stride());
                    let at = m.__alloc_percpu_gfp(size, 1 << align, gfp).unwrap();
                    let new = Live { at, size, mark: i as u8 | 1 };
                    for cpu in 0..4 {
                        let bytes = bytes(&new, cpu);
                        prop_assert!(bytes.iter().all(|b| *b == 0));
                        prop_assert!(bytes.as_ptr().addr().is_multiple_of(1 << align));
                        bytes.fill(new.mark.wrapping_add(cpu as u8 * 2));
                    }
                    live.push(new);
                }
                Op::Free(which) if !live.is_empty() => {
                    let gone = live.swap_remove(which.index(live.len()));
                    for cpu in 0..4 {
                        let mark = gone.mark.wrapping_add(cpu as u8 * 2);
                        prop_assert!(bytes(&gone, cpu).iter().all(|b| *b == mark));
                    }
                    free(m, gone.at);
                }
                Op::Free(_) => {}
            }
        }
        for l in live {
            let marked = (0..4).all(|cpu| {
                bytes(&l, cpu).iter().all(|b| *b == l.mark.wrapping_add(cpu as u8 * 2))
            });
            prop_assert!(marked);
            free(m, l.at);
        }
        prop_assert_eq!(m.per_cpu_free(), before);
    }
}
