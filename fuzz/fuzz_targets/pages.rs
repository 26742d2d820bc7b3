//! Fuzzes the page allocator: the first byte chooses a small machine, every further four are a step. The
//! reference allocator of the property tests plays along, and everything is audited and freed at the
//! end.
//!
//! ```text
//! RUSTC_BOOTSTRAP=1 cargo fuzz run pages -- -max_total_time=600 -max_len=2048
//! ```

#![no_main]

#[path = "../../kmem/tests/model/play.rs"]
mod play;
#[path = "../../kmem/tests/model/reference.rs"]
mod reference;
#[path = "../../kmem/tests/model/small.rs"]
mod small;

use play::{Game, Op, SHAPES};

/// Shapes beyond these take too long to bring up for every input.
const FAST_SHAPES: usize = 5;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Some((shape, steps)) = data.split_first() else { return };
    let mut game = Game::new(SHAPES[usize::from(*shape) % FAST_SHAPES]);
    for (n, step) in steps.as_chunks().0.iter().enumerate() {
        game.play(Op::decode(*step));
        if n % 64 == 63 {
            game.audit();
        }
    }
    game.finish();
});
