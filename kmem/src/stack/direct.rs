//! Stacks where there is no vmalloc range: blocks of the direct map, without a guard.
//!
//! # Implementation
//! The owner of their frames, a number that no cache has, tells that they are a stack's; the pages' `private` tells how
//! many frames it has and which of them this is.
//!
//! # Locking
//! One `IrqLock` a machine, while the frames are named or are looked at.

use super::{End, STACK_END_MAGIC, StackUse, Threads};
use crate::{
    error::{AllocError, Misuse},
    gfp::Gfp,
    memmap::{OWNER_IRQ_STACK, OWNER_STACK},
    page_alloc::Reclaim,
    page_state::NodeStat,
    platform::Platform,
    types::Pfn,
};
use core::{ptr::NonNull, sync::atomic::Ordering::Relaxed};

/// How many stacks there are, and their frames.
#[derive(Clone, Copy)]
pub(super) struct Count {
    pub(super) threads: u64,
    pub(super) irq: u64,
    pub(super) frames: u64,
    pub(super) irq_frames: u64,
}

impl Count {
    pub(super) const NONE: Count = Count { threads: 0, irq: 0, frames: 0, irq_frames: 0 };

    fn change(&mut self, irq: bool, frames: u32, made: bool) {
        let frames = u64::from(frames);
        let (stacks, of_irq) = if irq { (&mut self.irq, frames) } else { (&mut self.threads, 0) };
        let change = |n: &mut u64, by| *n = if made { *n + by } else { n.saturating_sub(by) };
        change(stacks, 1);
        change(&mut self.frames, frames);
        change(&mut self.irq_frames, of_irq);
    }
}

/// Where frames are told apart in `private`.
const INDEX_SHIFT: u32 = 8;

/// A stack in the direct map.
pub(super) struct Block {
    first: u32,
    frames: u32,
    pub(super) irq: bool,
}

impl<P: Platform, R: Reclaim> Threads<'_, P, R> {
    /// A block with everything that a stack has.
    #[track_caller]
    pub(super) fn alloc_direct(
        &self,
        frames: u32,
        node: i32,
        irq: bool,
    ) -> Result<NonNull<u8>, AllocError> {
        let pages = self.vmap.objects.pages;
        let size = frames as usize * Self::PAGE;
        let low = pages.alloc_pages_exact_nid(node, size, Gfp::KERNEL | Gfp::ZERO)?;
        let Some(pfn) = self.p().direct_unmap(low.as_ptr()) else {
            // It was mapped there a moment ago.
            let _ = pages.free_pages_exact(low.as_ptr(), size);
            return Err(AllocError::NoMemory);
        };
        let _ = low.as_ptr().expose_provenance();
        self.end(low).magic.store(STACK_END_MAGIC, Relaxed);
        let mut count = self.state.direct.lock(self.p());
        for i in 0..frames {
            let owner = if irq { OWNER_IRQ_STACK } else { OWNER_STACK };
            pages.map().page_in_map(pfn.0 + i).set_private(i << INDEX_SHIFT | frames);
            pages.map().set_owner(pfn.0 + i, 1, owner);
        }
        count.change(irq, frames, true);
        drop(count);
        self.account_direct(&Block { first: pfn.0, frames, irq }, 1);
        Ok(low)
    }

    /// The stack that an address is in. The caller has the lock.
    pub(super) fn block_at(&self, addr: usize) -> Option<(Block, NonNull<u8>)> {
        let pages = self.vmap.objects.pages;
        let map = pages.map();
        let offset = map.direct_offset(addr);
        let irq = match map.owner_at(offset, P::PAGE_SHIFT) {
            OWNER_STACK => false,
            OWNER_IRQ_STACK => true,
            _ => return None,
        };
        let pfn = map.frame_at(offset, P::PAGE_SHIFT);
        let private = map.page(Pfn(pfn))?.private();
        let (index, frames) = (private >> INDEX_SHIFT, private % (1 << INDEX_SHIFT));
        // Else the frame is not named as a stack's are.
        let first = pfn.checked_sub(index).filter(|_| index < frames)?;
        Some((Block { first, frames, irq }, self.p().direct_map(Pfn(first))?))
    }

    /// Frees the stack that begins at an address.
    #[track_caller]
    pub(super) fn free_direct(&self, addr: usize, irq: bool) -> Result<(), Misuse> {
        let pages = self.vmap.objects.pages;
        let mut count = self.state.direct.lock(self.p());
        let found = self.block_at(addr);
        let Some((block, low)) = found.filter(|(b, low)| b.irq == irq && low.addr().get() == addr)
        else {
            drop(count);
            return Err(pages.misuse(Misuse::NotAStack { addr }));
        };
        for pfn in block.first..block.first + block.frames {
            pages.map().set_owner(pfn, 1, 0);
            pages.map().page_in_map(pfn).set_private(0);
        }
        count.change(irq, block.frames, false);
        drop(count);
        self.account_direct(&block, -1);
        let magic = self.end(low).magic.load(Relaxed);
        pages.free_pages_exact(low.as_ptr(), block.frames as usize * Self::PAGE)?;
        if magic == STACK_END_MAGIC {
            return Ok(());
        }
        Err(pages.misuse(Misuse::StackOverrun { addr, found: magic }))
    }

    fn account_direct(&self, block: &Block, sign: i64) {
        let pages = self.vmap.objects.pages;
        let node = pages.page_zone(Pfn(block.first)).map_or(0, |zone| zone.node());
        if !block.irq {
            let kib = i64::from(block.frames) * (Self::PAGE >> 10) as i64;
            pages.mod_node_page_state(node, NodeStat::KernelStack, sign * kib);
        }
    }

    /// Calls `f` with where the stack begins that an address is in, and its bytes. Meanwhile nobody frees it.
    pub(super) fn look_direct<T>(
        &self,
        addr: usize,
        f: impl FnOnce(NonNull<u8>, usize) -> T,
    ) -> Option<T> {
        let _count = self.state.direct.lock(self.p());
        let (block, low) = self.block_at(addr)?;
        Some(f(low, block.frames as usize * Self::PAGE))
    }

    /// Calls `f` with the stack that an address is in. For callers who may have the lock themselves: `None` then.
    pub(super) fn direct_at<T>(
        &self,
        addr: usize,
        f: impl FnOnce(NonNull<u8>, usize, StackUse) -> T,
    ) -> Option<T> {
        let _count = self.state.direct.lock_patiently(self.p())?;
        let (block, low) = self.block_at(addr)?;
        let used = if block.irq { self.irq_use(low) } else { StackUse::Thread };
        Some(f(low, block.frames as usize * Self::PAGE, used))
    }
}

const _: () = assert!(size_of::<End>() <= 16);
