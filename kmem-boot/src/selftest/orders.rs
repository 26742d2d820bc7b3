//! Every order: alignment, contents, zero-filling, the zone asked for.

use super::{Bench, Verdict, block::Block, check, fail};
use crate::println;
use kmem::{gfp::Gfp, types::DEFAULT_MAX_ORDER};

const ORDERS: usize = DEFAULT_MAX_ORDER as usize + 1;

/// Holds one block of every order at once, then one zero-filled block of every order after the other.
pub fn run(bench: &mut Bench) -> Verdict {
    let kmem = bench.kmem;
    let mut held: [Option<Block>; ORDERS] = [None; ORDERS];
    for (order, slot) in held.iter_mut().enumerate() {
        let block = allocated(bench, Gfp::KERNEL, order as u32)?;
        block.fill(1);
        *slot = Some(block);
    }
    for block in held.into_iter().flatten() {
        block.verify(1)?;
        block.free(kmem)?;
    }
    for order in 0..=DEFAULT_MAX_ORDER {
        // What was just freed is dirty, so a block that is not zeroed shows.
        let block = allocated(bench, Gfp::KERNEL | Gfp::ZERO, order)?;
        block.verify_zero()?;
        block.fill(1);
        block.free(kmem)?;
    }
    for (gfp, limit) in [(Gfp::DMA, 16 << 20), (Gfp::KERNEL | Gfp::DMA32, 4 << 30)] {
        for order in 0..=DEFAULT_MAX_ORDER - 1 {
            let block = allocated(bench, gfp, order)?;
            let end = (u64::from(block.pfn().0) + (1 << order)) << 12;
            check!(end <= limit, "{gfp:?}, order {order}: ends at {end:#x}, above {limit:#x}");
            block.free(kmem)?;
        }
    }
    println!("orders: 0 to {DEFAULT_MAX_ORDER} aligned, distinct, zero-filled, in their zones");
    Ok(())
}

fn allocated(bench: &mut Bench, gfp: Gfp, order: u32) -> Result<Block, super::Failed> {
    let block = match Block::alloc(bench.kmem, gfp, order, bench.rng.u64(..)) {
        Ok(block) => block,
        Err(error) => fail!("order {order}, {gfp:?}: {error}"),
    };
    check!(block.pfn().is_aligned(order), "order {order}: pfn {} is not aligned", block.pfn());
    let pfn = bench.kmem.page_to_pfn(block.page());
    check!(pfn == Some(block.pfn()), "page_to_pfn is {pfn:?}, the address says {}", block.pfn());
    let count = block.page().page_count();
    check!(count == 1, "order {order}: page_count is {count}");
    Ok(block)
}
