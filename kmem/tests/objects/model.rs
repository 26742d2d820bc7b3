//! Random lists of steps, played beside a reference \[S1–S9, C3\]; those that fail shrink.

use super::play::{play, play_with};
use kmem::Config;
use proptest::prelude::*;

fn steps(most: usize) -> impl Strategy<Value = Vec<[u8; 4]>> {
    prop::collection::vec(any::<[u8; 4]>(), 1..most)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, max_shrink_iters: 1_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn one_node(steps in steps(150)) {
        play::<12>(&[4], &steps);
    }

    #[test]
    fn two_nodes(steps in steps(150)) {
        play::<12>(&[3, 3], &steps);
    }

    #[test]
    fn all_caches_look_for_mistakes(steps in steps(100)) {
        let config = Config { slab_debug: Some(""), slab_random: Some(5), ..Config::default() };
        play_with::<12>(&[3, 3], config, &steps);
    }

    #[test]
    fn a_node_without_memory(steps in steps(100)) {
        play::<12>(&[4, 0], &steps);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 30, max_shrink_iters: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn large_frames(steps in steps(150)) {
        play::<16>(&[2], &steps);
    }

    #[test]
    fn many_steps(steps in steps(1500)) {
        play::<12>(&[4], &steps);
    }
}
