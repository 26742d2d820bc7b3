//! Random allocation and freeing of all orders, with contents checked on every free.

use super::{Bench, Verdict, block::Block, fail};
use crate::println;
use kmem::{gfp::Gfp, types::DEFAULT_MAX_ORDER};

const SLOTS: usize = 512;
const TURNS: u32 = 40_000;
/// One word in each cache line.
const STEP: usize = 8;

const MASKS: [Gfp; 6] = [
    Gfp::KERNEL,
    Gfp::ATOMIC,
    Gfp::HIGHUSER_MOVABLE,
    Gfp::KERNEL.union(Gfp::RECLAIMABLE),
    Gfp::KERNEL.union(Gfp::COMP),
    Gfp::KERNEL.union(Gfp::COLD),
];

/// Keeps up to [`SLOTS`] blocks; each turn fills an empty slot or empties a full one.
pub fn run(bench: &mut Bench) -> Verdict {
    let kmem = bench.kmem;
    let mut slots: [Option<Block>; SLOTS] = [None; SLOTS];
    let mut by_order = [0u32; DEFAULT_MAX_ORDER as usize + 1];
    for _ in 0..TURNS {
        let slot = &mut slots[bench.rng.usize(..SLOTS)];
        match slot.take() {
            Some(block) => {
                block.verify(STEP)?;
                block.free(kmem)?;
            }
            None => {
                // Half of all requests are of order 0, a quarter of order 1, and so on.
                let order = bench.rng.u32(..).trailing_zeros().min(DEFAULT_MAX_ORDER);
                let gfp = MASKS[bench.rng.usize(..MASKS.len())];
                match Block::alloc(kmem, gfp, order, bench.rng.u64(..)) {
                    Ok(block) => {
                        block.fill(STEP);
                        by_order[order as usize] += 1;
                        *slot = Some(block);
                    }
                    Err(error) => fail!("order {order}, {gfp:?}: {error}"),
                }
            }
        }
    }
    for block in slots.into_iter().flatten() {
        block.verify(STEP)?;
        block.free(kmem)?;
    }
    println!("random: {TURNS} turns, allocations by order {by_order:?}");
    Ok(())
}
