//! kmem through its public calls, with all they check.
//!
//! # Concepts
//! `alloc_pages(GFP_KERNEL, order)` and `__free_pages`, by a thread that runs on a CPU of a hosted machine.
//!
//! # Locking
//! kmem's own.

use crate::frames::{BULK, Frames};
use anyhow::Result;
use kmem::{Config, GFP_KERNEL, Kmem, Page};
use kmem_hosted::{Hosted, Machine, Shape};

/// A machine for measurements: the given memory without contents, one zone as the peers have, two CPUs,
/// nobody reclaiming in the background.
pub fn machine(bytes: u64) -> Result<Machine> {
    Ok(Machine::without_kswapd(numbers_only(bytes), Config::default())?)
}

/// As [`machine`], with every frame taken and given back once: the peers write their tables when they are made, kmem when
/// a frame is first used, and what the host does then for a page of its own is nobody's speed.
///
/// # Errors
/// As of [`machine`].
pub fn used_machine(bytes: u64) -> Result<Machine> {
    let m = machine(bytes)?;
    m.run_on(Some(0), None, |_process| {
        let mut f = KmemFrames(&m);
        let blocks: Vec<_> = std::iter::from_fn(|| f.alloc(0)).collect();
        blocks.into_iter().for_each(|block| f.free(block, 0));
    })?;
    Ok(m)
}

/// The shape of such a machine.
pub fn numbers_only(bytes: u64) -> Shape {
    Shape::no_dma(bytes).without_contents()
}

/// kmem as a contender for single pages, through the calls that know their order.
#[derive(Clone, Copy)]
pub struct KmemPages<'a>(pub &'a Kmem<Hosted>);

impl<'a> Frames for KmemPages<'a> {
    type Block = &'a Page;

    #[inline(always)]
    fn alloc(&mut self, order: u32) -> Option<&'a Page> {
        debug_assert_eq!(order, 0);
        self.0.alloc_page(GFP_KERNEL).ok()
    }

    #[inline(always)]
    fn free(&mut self, block: &'a Page, order: u32) {
        debug_assert_eq!(order, 0);
        if let Err(e) = self.0.__free_page(block) {
            refused("__free_page", &e);
        }
    }
}

/// kmem as a contender.
#[derive(Clone, Copy)]
pub struct KmemFrames<'a>(pub &'a Kmem<Hosted>);

/// A figure measured over failing calls would be a lie.
#[cold]
#[inline(never)]
pub(crate) fn refused(call: &str, error: &dyn std::fmt::Display) -> ! {
    eprintln!("error: kmem refused {call} of a workload: {error}");
    std::process::exit(3)
}

impl<'a> Frames for KmemFrames<'a> {
    type Block = &'a Page;

    #[inline(always)]
    fn alloc(&mut self, order: u32) -> Option<&'a Page> {
        self.0.alloc_pages(GFP_KERNEL, order).ok()
    }

    #[inline(always)]
    fn free(&mut self, block: &'a Page, order: u32) {
        if let Err(e) = self.0.__free_pages(block, order) {
            refused("__free_pages", &e);
        }
    }

    #[inline]
    fn alloc_bulk(&mut self, blocks: &mut [Option<&'a Page>; BULK]) {
        if let Err(e) = self.0.alloc_pages_bulk(GFP_KERNEL, blocks) {
            refused("alloc_pages_bulk", &e);
        }
    }

    #[inline]
    fn free_bulk(&mut self, blocks: &mut [Option<&'a Page>; BULK]) {
        if let Err(e) = self.0.free_pages_bulk(blocks) {
            refused("free_pages_bulk", &e);
        }
    }
}
