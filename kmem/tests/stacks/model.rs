//! Stacks against a list of who has which, and of what each CPU keeps.

use super::{END, PAGE, free, read, write};
use kmem::{
    Config, Misuse,
    context::Task,
    page_state::NodeStat,
    stack::{NR_CACHED_STACKS, StackAudit, StackPart, StackUse},
};
use kmem_hosted::Shape;
use kmem_test_support::{MIB, Rig};
use proptest::prelude::*;
use std::{
    collections::BTreeMap,
    ptr::{NonNull, without_provenance},
};

const CPUS: usize = 3;

#[derive(Clone, Debug)]
enum Op {
    Alloc(usize),
    Free(prop::sample::Index),
    /// Frees one a second time, or what is none.
    FreeWrong(prop::sample::Index, usize),
    /// Uses one, down to a place.
    Use(prop::sample::Index, prop::sample::Index),
    /// Overwrites the end of one.
    Overrun(prop::sample::Index),
    /// Asks whose an address is, so many bytes from the low end of one.
    Look(prop::sample::Index, isize),
    Drop,
    /// Off and on.
    Offline(usize),
}

fn op() -> impl Strategy<Value = (usize, Op)> {
    use prop::sample::Index;
    let op = prop_oneof![
        8 => (1usize..=4).prop_map(Op::Alloc),
        8 => any::<Index>().prop_map(Op::Free),
        1 => (any::<Index>(), 0usize..3 * PAGE).prop_map(|(i, n)| Op::FreeWrong(i, n)),
        4 => any::<(Index, Index)>().prop_map(|(i, at)| Op::Use(i, at)),
        1 => any::<Index>().prop_map(Op::Overrun),
        3 => (any::<Index>(), -(PAGE as isize)..5 * PAGE as isize).prop_map(|(i, n)| Op::Look(i, n)),
        1 => Just(Op::Drop),
        1 => (0..CPUS).prop_map(Op::Offline),
    ];
    (0..CPUS, op)
}

/// A stack in use.
struct Live {
    low: NonNull<u8>,
    frames: usize,
    /// The deepest place it was used at.
    used: usize,
    overrun: bool,
}

/// What each CPU keeps: by address, frames.
type Kept = [Vec<(usize, usize)>; CPUS];

/// The address of one of those in use.
fn nth(live: &BTreeMap<usize, Live>, i: prop::sample::Index) -> Option<usize> {
    (!live.is_empty()).then(|| *live.keys().nth(i.index(live.len())).unwrap())
}

fn play(ops: Vec<(usize, Op)>) {
    let m = Rig::new(Shape::no_dma(32 * MIB).cpus(CPUS), Config::default());
    let mut live: BTreeMap<usize, Live> = BTreeMap::new();
    let mut kept = Kept::default();
    for (cpu, op) in ops {
        if let Op::Offline(which) = op {
            m.cpu_down(which).unwrap();
            kept[which].clear();
            m.cpu_up(which).unwrap();
        }
        m.on(cpu, &Task::new(), |_| match op {
            Op::Alloc(frames) => {
                let low = m.alloc_thread_stack(frames).unwrap();
                let addr = low.addr().get();
                let here = kept[cpu].iter().position(|(_, n)| *n == frames);
                if here.is_some() {
                    let this = kept[cpu].iter().position(|stack| *stack == (addr, frames));
                    kept[cpu].remove(this.expect("one that the CPU keeps"));
                }
                assert!((END..frames * PAGE).step_by(8).all(|at| read(low, at) == 0));
                let end = addr + (frames + 1) * PAGE;
                assert!(
                    live.range(addr - 5 * PAGE..end)
                        .all(|(at, other)| { at + (other.frames + 1) * PAGE <= addr - PAGE })
                );
                m.set_stack_owner(low.as_ptr(), addr ^ 1);
                let used = frames * PAGE;
                live.insert(addr, Live { low, frames, used, overrun: false });
            }
            Op::Free(i) => {
                let Some((addr, stack)) = nth(&live, i).and_then(|at| live.remove_entry(&at))
                else {
                    return;
                };
                // SAFETY: not used after.
                let freed = unsafe { m.free_thread_stack(stack.low.as_ptr()) };
                let expected = if stack.overrun {
                    Err(Misuse::StackOverrun { addr, found: 1 })
                } else {
                    Ok(())
                };
                assert_eq!(freed, expected);
                if !stack.overrun && kept[cpu].len() < NR_CACHED_STACKS {
                    kept[cpu].push((addr, stack.frames));
                }
            }
            Op::FreeWrong(i, bytes) => {
                let addr = nth(&live, i).map_or(0, |at| at + bytes);
                if !live.contains_key(&addr) {
                    // SAFETY: no stack in use begins there.
                    let wrong = unsafe { m.free_thread_stack(without_provenance(addr)) };
                    assert!(wrong.is_err());
                }
                let twice = kept[cpu].first().map_or(0, |(addr, _)| *addr);
                // SAFETY: as above.
                assert!(unsafe { m.free_thread_stack(without_provenance(twice)) }.is_err());
            }
            Op::Use(i, at) => {
                let Some(stack) = nth(&live, i).and_then(|addr| live.get_mut(&addr)) else {
                    return;
                };
                let at = END + 8 * at.index((stack.frames * PAGE - END) / 8);
                write(stack.low, at, 1);
                stack.used = stack.used.min(at);
                let unused = m.stack_not_used(stack.low.as_ptr());
                assert_eq!(unused, Some(stack.used - END));
            }
            Op::Overrun(i) => {
                let Some(stack) = nth(&live, i).and_then(|addr| live.get_mut(&addr)) else {
                    return;
                };
                write(stack.low, 8, 1);
                stack.overrun = true;
                assert_eq!(m.stack_end_corrupted(stack.low.as_ptr()), Some(true));
            }
            Op::Look(i, bytes) => {
                let Some(at) = nth(&live, i) else { return };
                let addr = at.wrapping_add_signed(bytes);
                let found = m.stack_of(without_provenance(addr));
                // Stacks are whole frames' distances apart, each with its guards.
                let below = live.range(..=addr + PAGE).next_back();
                let its = below.filter(|(at, s)| addr < *at + (s.frames + 1) * PAGE);
                match found.filter(|found| found.used_by != StackUse::Kept) {
                    Some(found) => {
                        let (low, stack) = its.expect("a stack in use");
                        let size = stack.frames * PAGE;
                        let part = match addr {
                            _ if addr < *low => StackPart::Guard,
                            _ if addr < low + size => StackPart::Stack,
                            _ => StackPart::Above,
                        };
                        assert_eq!((found.low, found.size, found.part), (*low, size, part));
                        assert_eq!(found.owner, low ^ 1);
                    }
                    None => assert!(its.is_none(), "{addr:#x} is not found"),
                }
            }
            Op::Drop => {
                let frames: usize = kept.iter().flatten().map(|(_, frames)| frames).sum();
                assert_eq!(m.drop_kept_stacks(), frames as u64);
                kept = Kept::default();
            }
            Op::Offline(_) => {}
        });
        let (threads, of_kept) = (live.len() as u64, kept.iter().flatten().count() as u64);
        let in_use: usize = live.values().map(|stack| stack.frames).sum();
        let frames = in_use + kept.iter().flatten().map(|(_, frames)| frames).sum::<usize>();
        let expected = StackAudit { threads, irq: 0, kept: of_kept, frames: frames as u64 };
        assert_eq!(m.audit_stacks(), Ok(expected));
        assert_eq!(m.global_node_page_state(NodeStat::KernelStack), 4 * in_use as u64);
    }
    m.run(|_| {
        for stack in live.into_values() {
            if stack.overrun {
                // SAFETY: not used after.
                assert!(unsafe { m.free_thread_stack(stack.low.as_ptr()) }.is_err());
            } else {
                free(&m, stack.low);
            }
        }
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn stacks_are_where_a_list_says(ops in prop::collection::vec(op(), 1..100)) {
        play(ops);
    }
}
