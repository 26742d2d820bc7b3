//! The calls for kernel stacks \[K1, K2\].

use super::Kmem;
use crate::{
    error::{AllocError, Misuse},
    gfp::typed::Capability,
    platform::Platform,
    reclaim::Vmscan,
    stack::{StackAudit, StackAuditError, StackInfo, Threads},
};
use core::{ops::Range, ptr::NonNull};

impl<P: Platform> Kmem<P> {
    #[inline(always)]
    fn threads(&self) -> Threads<'_, P, Vmscan> {
        self.pages.reclaim().threads(&self.pages)
    }

    /// Frames of the largest stack: as many as 16 KiB have, or one.
    pub const fn max_stack_frames(&self) -> usize {
        Threads::<P, Vmscan>::LARGEST
    }

    /// Whether the frame below a stack has no mapping, so that running off its end faults: wherever there is a vmalloc
    /// range.
    pub fn stacks_are_guarded(&self) -> bool {
        self.threads().guarded()
    }

    /// `alloc_thread_stack`: a stack of `frames` frames, 1 to [`max_stack_frames`](Self::max_stack_frames), and its
    /// lowest address; the stack pointer starts so many frames above. All of it is zero but the two words at its low
    /// end, which are not to be written to: an owner ([`set_stack_owner`](Self::set_stack_owner)) and
    /// [`STACK_END_MAGIC`](crate::stack::STACK_END_MAGIC). Free it with [`free_thread_stack`](Self::free_thread_stack)
    /// \[K1\].
    ///
    /// It is not of the direct map, nor are its frames contiguous, unless the platform has no vmalloc range.
    ///
    /// Context: process context; may sleep.
    ///
    /// # Errors
    /// `NoMemory`, also where areas [are not mapped](Platform::vmalloc_is_mapped); `Invalid`, after a report, for a
    /// number of frames out of range; `Context`, after a report, where sleeping is not allowed.
    ///
    /// See [VMAP_STACK](https://docs.kernel.org/mm/vmalloced-kernel-stacks.html).
    #[inline]
    #[track_caller]
    pub fn alloc_thread_stack(&self, frames: usize) -> Result<NonNull<u8>, AllocError> {
        self.threads().alloc(frames, -1)
    }

    /// `alloc_thread_stack_node`: as [`alloc_thread_stack`](Self::alloc_thread_stack), from node `node` if that has
    /// memory; −1 is the caller's. A stack that the CPU keeps is taken whatever its node, as in Linux.
    ///
    /// # Errors
    /// As [`alloc_thread_stack`](Self::alloc_thread_stack); `Invalid` for a node that does not exist.
    #[track_caller]
    pub fn alloc_thread_stack_node(
        &self,
        frames: usize,
        node: i32,
    ) -> Result<NonNull<u8>, AllocError> {
        self.threads().alloc(frames, node)
    }

    /// As [`alloc_thread_stack`](Self::alloc_thread_stack), with a capability \[C2\].
    ///
    /// # Errors
    /// As [`alloc_thread_stack`](Self::alloc_thread_stack).
    #[track_caller]
    pub fn alloc_thread_stack_in(
        &self,
        _capability: impl Capability<true>,
        frames: usize,
    ) -> Result<NonNull<u8>, AllocError> {
        self.alloc_thread_stack(frames)
    }

    /// `free_thread_stack`: frees the stack that begins at an address. The running CPU may keep it for the next
    /// thread.
    ///
    /// Context: any but NMI. In atomic context the frames may come back later, as with [`vfree`](Self::vfree).
    ///
    /// # Safety
    /// Nobody runs on it, nor uses it otherwise, any more. A wrong address does no harm: it is found out.
    ///
    /// # Errors
    /// [`Misuse`], reported as well, and nothing changed; save that a stack whose end was overwritten
    /// ([`Misuse::StackOverrun`]) is freed all the same.
    #[inline]
    #[track_caller]
    pub unsafe fn free_thread_stack(&self, low: *const u8) -> Result<(), Misuse> {
        self.threads().free(low.addr())
    }

    /// `task_stack_end_corrupted`: whether the magic number at the low end of the stack that `addr` is in was
    /// overwritten; `None` if there is no stack in use.
    ///
    /// Context: any but NMI.
    pub fn stack_end_corrupted(&self, addr: *const u8) -> Option<bool> {
        self.threads().end_corrupted(addr.addr())
    }

    /// `stack_not_used`: bytes of the stack that `addr` is in which were never written to, above the two words at its
    /// low end; `None` if there is no stack in use. What was written there may have been zeros: those at the
    /// edge count as not used \[K2\].
    ///
    /// Context: any but NMI. Interrupts are masked while it looks, for some microseconds.
    pub fn stack_not_used(&self, addr: *const u8) -> Option<usize> {
        self.threads().not_used(addr.addr())
    }

    /// Names the owner of the stack that `addr` is in, by a number of the kernel's own, as the address of its task:
    /// [`stack_of`](Self::stack_of) tells it. `false` if there is no stack in use.
    ///
    /// Context: any but NMI.
    pub fn set_stack_owner(&self, addr: *const u8, owner: usize) -> bool {
        self.threads().set_owner(addr.addr(), owner)
    }

    /// What stack an address belongs to, guards included: a handler of page faults asks it of the address that
    /// faulted, to tell an overflow from other mistakes \[K1\]. `None` if it is no stack's; also if what the handler
    /// interrupted is in vmalloc itself, with the lock that this needs.
    ///
    /// Context: any.
    pub fn stack_of(&self, addr: *const u8) -> Option<StackInfo> {
        self.threads().stack_of(addr.addr())
    }

    /// Gives each possible CPU a stack for its interrupts, of `frames` frames: one, in the textbook. CPUs that have one
    /// keep it; those that were given one before a failure too, so that another call goes on from there \[K2\].
    ///
    /// Context: process context; may sleep.
    ///
    /// # Errors
    /// As [`alloc_thread_stack`](Self::alloc_thread_stack).
    #[track_caller]
    pub fn alloc_irq_stacks(&self, frames: usize) -> Result<(), AllocError> {
        self.threads().alloc_irq(frames)
    }

    /// The stack for a CPU's interrupts, as a range of addresses; `None` for a CPU that has none. As with
    /// [`alloc_thread_stack`](Self::alloc_thread_stack), two words at its low end are not to be written to.
    ///
    /// Context: any but NMI.
    pub fn irq_stack(&self, cpu: usize) -> Option<Range<usize>> {
        let (low, size) = self.threads().irq_stack(cpu)?;
        Some(low.addr().get()..low.addr().get() + size)
    }

    /// Takes the stacks for interrupts from all CPUs.
    ///
    /// Context: any but NMI, and none of those interrupts.
    ///
    /// # Safety
    /// Interrupts run on none of them any more.
    ///
    /// # Errors
    /// The first [`Misuse`]; all stacks are freed all the same.
    #[track_caller]
    pub unsafe fn free_irq_stacks(&self) -> Result<(), Misuse> {
        self.threads().free_irq()
    }

    /// Gives back the freed stacks that CPUs keep; returns how many frames. Reclaim does so by itself.
    ///
    /// Context: any but NMI; in atomic context the frames come back later.
    pub fn drop_kept_stacks(&self) -> u64 {
        self.threads().drop_all()
    }

    /// Counts stacks and compares them with what is accounted for. For a quiet machine.
    ///
    /// # Errors
    /// [`StackAuditError`].
    pub fn audit_stacks(&self) -> Result<StackAudit, StackAuditError> {
        self.threads().audit()
    }
}
