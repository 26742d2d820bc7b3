//! Many single pages in one call.

use super::{Bench, Verdict, block::Block, check, fail};
use crate::println;
use kmem::{gfp::Gfp, page::Page};

const PAGES: usize = 256;

/// Fills an array that has a few places taken, proves the pages distinct, and frees all of them.
pub fn run(bench: &mut Bench) -> Verdict {
    let kmem = bench.kmem;
    let mut pages: [Option<&'static Page>; PAGES] = [None; PAGES];
    for _ in 0..2 {
        for place in pages.iter_mut().step_by(50) {
            match kmem.alloc_pages(Gfp::KERNEL, 0) {
                Ok(page) => *place = Some(page),
                Err(error) => fail!("order 0: {error}"),
            }
        }
        let filled = kmem.alloc_pages_bulk(Gfp::KERNEL | Gfp::ZERO, &mut pages);
        check!(filled == Ok(PAGES), "{PAGES} pages wanted, {filled:?} filled");
        let tag = bench.rng.u64(..);
        let blocks = || pages.iter().flatten().filter_map(|page| Block::of(kmem, page, 0, tag));
        check!(blocks().count() == PAGES, "a page without an address");
        for (i, block) in blocks().enumerate() {
            if i % 50 != 0 {
                block.verify_zero()?;
            }
            block.fill(1);
        }
        for block in blocks() {
            block.verify(1)?;
        }
        let freed = kmem.free_pages_bulk(&mut pages);
        check!(freed.is_ok(), "freeing {PAGES} pages: {freed:?}");
        check!(pages.iter().all(Option::is_none), "a freed page is still in the array");
    }
    println!("bulk: twice {PAGES} pages, distinct and zero-filled");
    Ok(())
}
