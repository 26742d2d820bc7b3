//! Exhaustion: every zone is emptied, contents are checked, and everything comes back.

use super::{
    Bench, Verdict,
    block::{Block, Chain},
    check, fail,
};
use crate::println;
use kmem::{AllocError, gfp::Gfp, types::DEFAULT_MAX_ORDER};

/// One word in each cache line.
const STEP: usize = 8;

/// No sleeping, no reports; failure is expected.
const QUIET: Gfp = Gfp::NOWARN.union(Gfp::NORETRY);

/// Takes all that DMA, DMA32 and Normal give to ordinary requests; then all there is, reserves
/// included; then frees it and takes the largest blocks again.
pub fn run(bench: &mut Bench) -> Verdict {
    let kmem = bench.kmem;
    for (name, gfp) in [
        ("DMA", Gfp::DMA | QUIET),
        ("DMA32", Gfp::DMA32 | QUIET),
        ("Normal and below", QUIET),
        ("all, reserves included", Gfp::MEMALLOC | QUIET),
    ] {
        let before = kmem.nr_free_pages();
        let mut chain = Chain::new(bench.rng.u64(..));
        let mut largest = 0;
        for order in (0..=DEFAULT_MAX_ORDER).rev() {
            let blocks = take_all(bench, gfp, order, &mut chain)?;
            if order == DEFAULT_MAX_ORDER {
                largest = blocks;
            }
        }
        kmem.drain_all_pages();
        let left = kmem.nr_free_pages();
        println!(
            "exhaustion: {name}: {} of {before} frames taken, {largest} blocks of order \
             {DEFAULT_MAX_ORDER}, {left} left",
            chain.frames
        );
        check!(chain.frames + left == before, "{} + {left} is not {before}", chain.frames);
        if gfp.contains(Gfp::MEMALLOC) {
            check!(left == 0, "{left} frames left after a request that may take all");
            let refused = kmem.alloc_pages(Gfp::KERNEL | Gfp::NOWARN, 0).map(|_| ());
            check!(
                refused == Err(AllocError::NoMemory),
                "a blocking request with nothing to reclaim: {refused:?}"
            );
        } else {
            check!(left > 0, "an ordinary request emptied the reserves");
        }
        chain.free_all(kmem, STEP)?;

        // Everything merged again: the same number of largest blocks, and no other way.
        kmem.drain_all_pages();
        let again = take_all(bench, gfp, DEFAULT_MAX_ORDER, &mut chain)?;
        check!(again == largest, "{name}: {again} blocks of the largest order, {largest} before");
        chain.free_all(kmem, STEP)?;
        kmem.drain_all_pages();
        let after = kmem.nr_free_pages();
        check!(after >= before, "{name}: {before} frames free before, {after} after");
    }
    Ok(())
}

/// Allocates blocks of one order until there are none; how many.
fn take_all(bench: &Bench, gfp: Gfp, order: u32, chain: &mut Chain) -> Result<u32, super::Failed> {
    let mut blocks = 0;
    loop {
        match Block::alloc(bench.kmem, gfp, order, 0) {
            Ok(block) => {
                chain.push(block, STEP);
                blocks += 1;
            }
            Err(AllocError::NoMemory) => return Ok(blocks),
            Err(error) => fail!("order {order}, {gfp:?}: {error}"),
        }
    }
}
