//! `KVec` beside std's `Vec`: the same after every step, for values of several shapes, with requests that fail
//! in between, and nothing lost.

use kmem::{
    alloc::{KVec, flags::*},
    fault::FaultPlan,
};
use kmem_test_support::Rig;
use proptest::{collection::vec, prelude::*};
use std::fmt::Debug;

#[derive(Clone, Debug)]
enum Step {
    Push(u8),
    Pop,
    Remove(usize),
    Extend(Vec<u8>),
    With(usize, u8),
    Resize(usize, u8),
    Reserve(usize),
    Truncate(usize),
    Clear,
    /// Through the iterator and back, so many taken from either end.
    Iterate(usize, usize),
    /// The inner allocation so many further on fails.
    Fault(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => any::<u8>().prop_map(Step::Push),
        2 => Just(Step::Pop),
        2 => (0..100usize).prop_map(Step::Remove),
        3 => vec(any::<u8>(), 0..60).prop_map(Step::Extend),
        2 => (0..3000usize, any::<u8>()).prop_map(|(n, v)| Step::With(n, v)),
        2 => (0..6000usize, any::<u8>()).prop_map(|(n, v)| Step::Resize(n, v)),
        1 => (0..10_000usize).prop_map(Step::Reserve),
        2 => (0..200usize).prop_map(Step::Truncate),
        1 => Just(Step::Clear),
        1 => (0..40usize, 0..40usize).prop_map(|(a, b)| Step::Iterate(a, b)),
        3 => (0..4u64).prop_map(Step::Fault),
    ]
}

/// A value of any shape, with a part of its own.
trait Value: Clone + PartialEq + Debug {
    fn of(n: u8) -> Self;
}

impl Value for u8 {
    fn of(n: u8) -> u8 {
        n
    }
}

impl Value for () {
    fn of(_: u8) {}
}

impl Value for [u32; 3] {
    fn of(n: u8) -> [u32; 3] {
        [n.into(), 7, !u32::from(n)]
    }
}

/// Owns memory of its own, so that what is dropped twice or not at all shows.
impl Value for Box<u8> {
    fn of(n: u8) -> Box<u8> {
        Box::new(n)
    }
}

#[derive(Clone, PartialEq, Debug)]
#[repr(align(256))]
struct Wide(u8);

impl Value for Wide {
    fn of(n: u8) -> Wide {
        Wide(n)
    }
}

fn play<T: Value>(rig: &Rig, steps: &[Step]) {
    let mut real = KVec::<T, _>::new_on(rig);
    let mut model = Vec::<T>::new();
    let flags = GFP_KERNEL | __GFP_NOWARN;
    let mut refused = 0;
    for step in steps {
        let injected = rig.faults_injected();
        let done = match step.clone() {
            Step::Push(n) => real.push(T::of(n), flags).map(|()| model.push(T::of(n))),
            Step::Pop => {
                assert_eq!(real.pop(), model.pop());
                Ok(())
            }
            Step::Remove(i) => {
                let expected = (i < model.len()).then(|| model.remove(i));
                assert_eq!(real.remove(i), expected);
                Ok(())
            }
            Step::Extend(values) => {
                let values: Vec<T> = values.into_iter().map(T::of).collect();
                real.extend_from_slice(&values, flags).map(|()| model.extend_from_slice(&values))
            }
            Step::With(n, v) => real
                .extend_with(n, T::of(v), flags)
                .map(|()| model.extend(std::iter::repeat_n(T::of(v), n))),
            Step::Resize(n, v) => {
                real.resize(n, T::of(v), flags).map(|()| model.resize(n, T::of(v)))
            }
            Step::Reserve(n) => {
                real.reserve(n, flags).map(|()| assert!(real.capacity() - real.len() >= n))
            }
            Step::Truncate(n) => {
                real.truncate(n);
                model.truncate(n);
                Ok(())
            }
            Step::Clear => {
                real.clear();
                model.clear();
                Ok(())
            }
            Step::Iterate(front, back) => {
                let mut values = std::mem::replace(&mut real, KVec::new_on(rig)).into_iter();
                let mut expected = std::mem::take(&mut model).into_iter();
                for _ in 0..front {
                    assert_eq!(values.next(), expected.next());
                }
                for _ in 0..back {
                    assert_eq!(values.next_back(), expected.next_back());
                }
                assert_eq!(values.as_slice(), expected.as_slice());
                let left = values.as_slice().to_vec();
                match real.extend_from_slice(&left, flags) {
                    Ok(()) => model = left,
                    Err(_) => assert!(real.is_empty()),
                }
                Ok(())
            }
            Step::Fault(n) => {
                rig.set_fault_plan(FaultPlan::Nth(n));
                Ok(())
            }
        };
        if done.is_err() {
            // The largest block has 4 MiB.
            let large = (real.len() + 10_000) * size_of::<T>() > 4 << 20;
            assert!(large || rig.faults_injected() > injected, "refused for no reason");
            refused += 1;
        }
        assert_eq!(real[..], model[..], "after {step:?}, {refused} refused");
        assert_eq!(real.is_empty(), model.is_empty());
        assert!(real.capacity() >= real.len());
    }
    rig.set_fault_plan(FaultPlan::Off);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn a_vector_is_a_vector(steps in vec(step(), 1..80)) {
        let rig = Rig::flat();
        rig.run(|_| {
            play::<u8>(&rig, &steps);
            play::<()>(&rig, &steps);
            play::<[u32; 3]>(&rig, &steps);
            play::<Box<u8>>(&rig, &steps);
            play::<Wide>(&rig, &steps);
            assert_eq!(rig.audit_objects().unwrap().live, 0);
        });
        // Frames are counted when the rig goes.
    }
}
