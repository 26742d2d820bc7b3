//! Kernel stacks: a few frames each, with a guard below \[K1, K2\].
//!
//! # Concepts
//! Every thread of a kernel has a stack of its own, of one to four frames and at most 16 KiB, which does not grow.
//! Who needs more runs off its low end. That shows three times: the frame below is a *guard*, so the first access
//! there faults, before anything of a neighbour's is touched; at the low end is `STACK_END_MAGIC`, which whoever
//! comes near the end overwrites, and which is looked at when the stack is freed; and a stack is zeroed when it is
//! given out, so that the lowest word that is not zero tells how deep it was used at least.
//!
//! *Interrupt stacks* are the same, one for each possible CPU, of one frame if nobody wants more: with them a thread's
//! stack needs no room for handlers.
//!
//! # Implementation
//! ```text
//!   ... | guard | owner | magic | free, zero                    <── used | guard | ...
//!               ^ lowest address: `low`                                  ^ top
//! ```
//! A stack is an area of the vmalloc range (`VM_ALLOC`, from frames that need not be contiguous), a frame longer than
//! it, the first of which has no mapping. The two words at the low end are what a `thread_info` is: a word of the
//! kernel's that says whose the stack is, and the magic number.
//!
//! *Freed stacks are kept*, two by each CPU (`NR_CACHED_STACKS`), in static per-CPU data: a stack from there costs
//! neither page tables nor a flush. A kept stack is zeroed again before it is given out. Stacks go back when memory is
//! short, and when their CPU goes offline. As in Linux, `KernelStack` of `/proc/meminfo` counts those that threads
//! have, and `VmallocUsed` also those that are kept.
//!
//! *Without a vmalloc range* stacks are blocks of the direct map, aligned to their size rounded up to a power of two.
//! They have everything but the guard, and are not kept, as the page allocator keeps blocks anyway.
//!
//! Memory for stacks is asked for in process context. They may be freed in any context but NMI: in atomic context they
//! are kept, or handed to vmalloc, which gives the frames back later.
//!
//! # Locking
//! The places for kept stacks are changed by compare-and-exchange, from any CPU. What belongs to a stack in use is
//! looked at under the lock of vmalloc's tree. Blocks of the direct map have a lock of their own, a leaf.
//!
//! See [VMAP_STACK](https://docs.kernel.org/mm/vmalloced-kernel-stacks.html) and
//! [kernel stacks](https://docs.kernel.org/arch/x86/kernel-stacks.html).

mod cache;
mod direct;
mod irq;
mod look;

pub use look::{StackAudit, StackAuditError, StackInfo, StackPart, StackUse};

use crate::{
    error::{AllocError, Misuse},
    gfp::{Gfp, GfpError},
    page_alloc::Reclaim,
    page_state::NodeStat,
    percpu::Space,
    platform::Platform,
    sync::IrqLock,
    vmalloc::{By, Guarded, Shelf, Vmap},
};
use cache::CpuStacks;
use core::{
    panic::Location,
    ptr::NonNull,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

/// What is at the low end of every stack, above the word that names its owner.
pub const STACK_END_MAGIC: usize = 0x57ac_6e9d;

/// Freed stacks that a CPU keeps.
pub const NR_CACHED_STACKS: usize = 2;

/// Bytes of the largest stack, where a frame is not larger.
const MAX_BYTES: usize = 16 << 10;

const _: () = assert!(MAX_BYTES >> 12 <= Shelf::LARGEST as usize);

/// What lies at the low end of a stack.
#[repr(C)]
struct End {
    owner: AtomicUsize,
    magic: AtomicUsize,
}

/// The stacks of one machine.
pub(crate) struct Stacks {
    /// Of CPU 0, and how much further each next one's is.
    cpus: Option<NonNull<CpuStacks>>,
    stride: usize,
    nr_cpus: usize,
    /// Stacks in the direct map.
    direct: IrqLock<direct::Count>,
}

// SAFETY: the pointer is to the machine's per-CPU data, which is kept as long as it and made of atomics.
unsafe impl Send for Stacks {}
// SAFETY: as above.
unsafe impl Sync for Stacks {}

impl Stacks {
    /// No stacks, and no CPUs that could keep any.
    pub(crate) const fn new() -> Stacks {
        Stacks { cpus: None, stride: 0, nr_cpus: 0, direct: IrqLock::new(direct::Count::NONE) }
    }

    /// Says where the CPUs' places are.
    pub(crate) fn attach(&mut self, percpu: &Space) {
        self.cpus = cache::first(percpu);
        self.stride = percpu.stride();
        self.nr_cpus = percpu.cpus();
    }
}

/// The stacks at work, with what they are made of.
pub(crate) struct Threads<'a, P: Platform, R: Reclaim> {
    pub(crate) vmap: Vmap<'a, P, R>,
    pub(crate) state: &'a Stacks,
}

impl<P: Platform, R: Reclaim> Clone for Threads<'_, P, R> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<P: Platform, R: Reclaim> Copy for Threads<'_, P, R> {}

impl<'a, P: Platform, R: Reclaim> Threads<'a, P, R> {
    const PAGE: usize = 1 << P::PAGE_SHIFT;
    /// Frames of the largest stack.
    pub(crate) const LARGEST: usize =
        if MAX_BYTES > Self::PAGE { MAX_BYTES / Self::PAGE } else { 1 };

    fn p(&self) -> &'a P {
        self.vmap.objects.pages.platform()
    }

    /// Whether stacks have a guard.
    pub(crate) fn guarded(&self) -> bool {
        self.p().vmalloc_range().is_some()
    }

    /// Refuses what cannot be served, wherever from. Node −1 is the caller's.
    #[track_caller]
    fn check(&self, frames: usize, node: i32) -> Result<u32, AllocError> {
        let pages = self.vmap.objects.pages;
        pages.check_context(Gfp::KERNEL)?;
        if node != -1 && usize::try_from(node).map_or(true, |node| node >= pages.nr_nodes()) {
            return Err(pages.refuse(Gfp::KERNEL, 0, GfpError::NoSuchNode));
        }
        match u32::try_from(frames) {
            Ok(n) if (1..=Self::LARGEST).contains(&frames) => Ok(n),
            _ => Err(pages.refuse(Gfp::KERNEL, 0, GfpError::BadSize)),
        }
    }

    /// `alloc_thread_stack_node`.
    #[inline]
    #[track_caller]
    pub(crate) fn alloc(self, frames: usize, node: i32) -> Result<NonNull<u8>, AllocError> {
        let nr = self.check(frames, node)?;
        if !self.guarded() {
            return self.alloc_direct(nr, node, false);
        }
        let (stack, low) = match self.take_kept(nr) {
            Some(stack) => {
                let low = self.vmap.low(&stack);
                // SAFETY: so many bytes, mapped, and nobody's but ours while it is kept.
                unsafe { low.write_bytes(0, frames * Self::PAGE) };
                (stack, low)
            }
            None => {
                let stack = self.vmap.make_guarded(nr, Gfp::KERNEL | Gfp::ZERO, node, false)?;
                let low = self.vmap.low(&stack);
                (stack, low)
            }
        };
        self.end(low).magic.store(STACK_END_MAGIC, Relaxed);
        self.account(&stack, 1);
        Ok(self.vmap.issue(stack, Location::caller()))
    }

    /// `free_thread_stack`.
    #[inline]
    #[track_caller]
    pub(crate) fn free(self, addr: usize) -> Result<(), Misuse> {
        let pages = self.vmap.objects.pages;
        if pages.context().in_nmi() {
            return Err(pages.misuse(Misuse::InNmi));
        }
        if !self.guarded() {
            return self.free_direct(addr, false);
        }
        let stack = self.vmap.keep(addr, By::FreeThreadStack)?;
        self.account(&stack, -1);
        let found = self.end(self.vmap.low(&stack)).magic.load(Relaxed);
        if found == STACK_END_MAGIC {
            return match self.put_kept(stack) {
                Ok(()) => Ok(()),
                Err(stack) => self.vmap.discard(stack),
            };
        }
        self.vmap.discard(stack)?;
        Err(pages.misuse(Misuse::StackOverrun { addr, found }))
    }

    /// The low end of a stack.
    fn end(&self, low: NonNull<u8>) -> &'a End {
        // SAFETY: the callers pass where a stack begins: mapped, aligned to a frame, nobody's but theirs or looked at
        // under the lock that keeps it; the words are atomics.
        unsafe { low.cast::<End>().as_ref() }
    }

    /// Counts a stack as a thread's, or no longer, in KiB.
    fn account(&self, stack: &Guarded, sign: i64) {
        let pages = self.vmap.objects.pages;
        let kib = sign * (Self::PAGE >> 10) as i64;
        if pages.nr_nodes() == 1 {
            pages.mod_node_page_state(0, NodeStat::KernelStack, kib * i64::from(stack.frames()));
        } else {
            self.vmap.nodes_of(stack, |node| {
                pages.mod_node_page_state(node, NodeStat::KernelStack, kib);
            });
        }
    }
}

/// Bytes above the low end's two words that were never written to, of a stack that begins at `low`.
///
/// # Safety
/// So many bytes are mapped there and stay so. Whoever runs on the stack may write to it.
unsafe fn unused(low: NonNull<u8>, size: usize) -> usize {
    let words = size / size_of::<usize>();
    let first = size_of::<End>() / size_of::<usize>();
    let zero = |i: &usize| {
        // SAFETY: a word of the stack; volatile, as somebody may be writing to it.
        unsafe { low.cast::<usize>().add(*i).read_volatile() == 0 }
    };
    (first..words).take_while(zero).count() * size_of::<usize>()
}
