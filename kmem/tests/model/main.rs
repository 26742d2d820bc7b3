//! The page allocator beside a reference allocator \[P1–P6, C3, D1\]: random steps on small machines,
//! interrupts and faults at random places among them, every frame accounted for after each.

mod faults;
mod play;
mod reference;
mod small;

use play::{Game, Op, SHAPES};
use proptest::prelude::*;

fn play(shape: usize, steps: &[Op], audit_every: usize) {
    let mut game = Game::new(SHAPES[shape]);
    for (n, step) in steps.iter().enumerate() {
        game.play(*step);
        if n % audit_every == audit_every - 1 {
            game.audit();
        }
    }
    game.finish();
}

fn steps(most: usize) -> impl Strategy<Value = Vec<Op>> {
    prop::collection::vec(any::<[u8; 4]>().prop_map(Op::decode), 1..most)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, max_shrink_iters: 20_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_machine_without_lists(shape in 0..4usize, steps in steps(200)) {
        play(shape, &steps, 50);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, max_shrink_iters: 20_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_machine_with_lists_of_single_pages(steps in steps(400)) {
        play(4, &steps, 100);
    }

    #[test]
    fn blocks_no_larger_than_a_pageblock(steps in steps(200)) {
        play(6, &steps, 50);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, max_shrink_iters: 2_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_machine_with_lists_of_all_orders(steps in steps(1200)) {
        play(5, &steps, 600);
    }
}
