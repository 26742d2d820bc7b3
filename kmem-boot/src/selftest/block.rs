//! Allocated blocks whose contents prove who owns them.
//!
//! Every word of a block holds a value made from its own address and a tag; a block that overlaps
//! another, or that anybody wrote to, no longer matches. Blocks can be strung together through their
//! first two words, so that a test may hold all of memory.

use super::{Failed, Verdict, check, fail};
use crate::platform::BareMetal;
use core::ptr::{self, NonNull};
use kmem::{AllocError, Kmem, gfp::Gfp, page::Page, types::Pfn};

/// Bytes of a frame.
pub const FRAME: usize = 4096;

/// An allocated block; freed by [`Block::free`] alone.
#[derive(Clone, Copy)]
pub struct Block {
    page: &'static Page,
    address: NonNull<u64>,
    /// Order it was allocated with.
    pub order: u32,
    tag: u64,
}

// SAFETY: a block owns its memory, wherever it is looked at from; there is one CPU.
unsafe impl Send for Block {}

impl Block {
    /// Allocates a block; its address is the frame's in the direct map.
    pub fn alloc(
        kmem: &'static Kmem<BareMetal>,
        gfp: Gfp,
        order: u32,
        tag: u64,
    ) -> Result<Block, AllocError> {
        let page = kmem.alloc_pages(gfp, order)?;
        Block::of(kmem, page, order, tag).ok_or(AllocError::NoMemory)
    }

    /// The block that `page` heads; `None` if it has no address.
    pub fn of(kmem: &Kmem<BareMetal>, page: &'static Page, order: u32, tag: u64) -> Option<Block> {
        Some(Block { page, address: kmem.page_address(page)?.cast(), order, tag })
    }

    /// The descriptor of the first frame.
    pub fn page(&self) -> &'static Page {
        self.page
    }

    /// Number of the first frame.
    pub fn pfn(&self) -> Pfn {
        Pfn((self.address.addr().get() / FRAME) as u32)
    }

    fn words(&self) -> usize {
        (FRAME << self.order) / size_of::<u64>()
    }

    fn word(&self, index: usize) -> *mut u64 {
        // SAFETY: every caller's index is below `words`.
        unsafe { self.address.as_ptr().add(index) }
    }

    fn expected(&self, index: usize) -> u64 {
        let address = self.address.addr().get() as u64 + 8 * index as u64;
        (address ^ self.tag).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }

    /// Writes every `step`-th word, the first and the last included.
    pub fn fill(&self, step: usize) {
        for i in (0..self.words()).step_by(step).chain([self.words() - 1]) {
            // SAFETY: the block is allocated to the caller and the index within it.
            unsafe { self.word(i).write_volatile(self.expected(i)) };
        }
    }

    /// Checks what [`Block::fill`] wrote with the same step.
    pub fn verify(&self, step: usize) -> Verdict {
        self.verify_from(0, step)
    }

    fn verify_from(&self, first: usize, step: usize) -> Verdict {
        for i in (first..self.words()).step_by(step).chain([self.words() - 1]) {
            // SAFETY: as in `fill`.
            let found = unsafe { self.word(i).read_volatile() };
            check!(
                found == self.expected(i),
                "order-{} block at pfn {}: word {i} is {found:#x}, not {:#x}",
                self.order,
                self.pfn(),
                self.expected(i)
            );
        }
        Ok(())
    }

    /// Checks that every byte is zero.
    pub fn verify_zero(&self) -> Verdict {
        for i in 0..self.words() {
            // SAFETY: as in `fill`.
            let found = unsafe { self.word(i).read_volatile() };
            check!(found == 0, "pfn {}: word {i} is {found:#x}, not 0", self.pfn());
        }
        Ok(())
    }

    /// Gives the block back.
    pub fn free(self, kmem: &Kmem<BareMetal>) -> Verdict {
        let freed = kmem.__free_pages(self.page, self.order);
        check!(freed.is_ok(), "freeing pfn {}: {freed:?}", self.pfn());
        Ok(())
    }
}

/// Any number of blocks, strung together through their own memory.
pub struct Chain {
    head: Option<Block>,
    tag: u64,
    /// Frames in all blocks.
    pub frames: u64,
}

/// Words of a block that the chain uses: where the next block is, and its order.
const LINK_WORDS: usize = 2;

impl Chain {
    /// An empty chain; its blocks are tagged with `tag`.
    pub const fn new(tag: u64) -> Chain {
        Chain { head: None, tag, frames: 0 }
    }

    /// Fills every `step`-th word of a block and adds it.
    pub fn push(&mut self, mut block: Block, step: usize) {
        block.tag = self.tag;
        block.fill(step);
        let (next, order) = match &self.head {
            Some(next) => (next.address.as_ptr().expose_provenance() as u64, next.order),
            None => (0, 0),
        };
        // SAFETY: the block belongs to the chain now and has more than two words.
        unsafe {
            block.word(0).write_volatile(next);
            block.word(1).write_volatile(u64::from(order));
        }
        self.frames += 1 << block.order;
        self.head = Some(block);
    }

    /// Takes the block that was added last, and checks what was written with the same step.
    pub fn pop(
        &mut self,
        kmem: &'static Kmem<BareMetal>,
        step: usize,
    ) -> Result<Option<Block>, Failed> {
        let Some(block) = self.head.take() else { return Ok(None) };
        // The words that hold the link are not part of the pattern.
        block.verify_from(LINK_WORDS.next_multiple_of(step), step)?;
        // SAFETY: the chain owns the block and wrote both words.
        let (next, order) =
            unsafe { (block.word(0).read_volatile(), block.word(1).read_volatile()) };
        self.frames -= 1 << block.order;
        if next != 0 {
            let address = NonNull::new(ptr::with_exposed_provenance_mut::<u64>(next as usize));
            let page = kmem.pfn_to_page(Pfn((next as usize / FRAME) as u32));
            let (Some(page), Some(address)) = (page, address) else {
                fail!("pfn {}: link to {next:#x}, which is no page", block.pfn());
            };
            self.head = Some(Block { page, address, order: order as u32, tag: self.tag });
        }
        Ok(Some(block))
    }

    /// Checks and frees everything.
    pub fn free_all(&mut self, kmem: &'static Kmem<BareMetal>, step: usize) -> Verdict {
        while let Some(block) = self.pop(kmem, step)? {
            block.free(kmem)?;
        }
        Ok(())
    }
}
