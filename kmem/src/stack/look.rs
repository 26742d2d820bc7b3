//! Looking at stacks: whose address it is, how deep they were used, and whether all are accounted for.
//!
//! # Locking
//! The lock of vmalloc's tree, or that of the direct map's stacks, so that nobody frees what is looked at.

use super::{NonNull, STACK_END_MAGIC, Threads, unused};
use crate::{page_alloc::Reclaim, page_state::NodeStat, platform::Platform};
use core::{fmt, panic::Location, sync::atomic::Ordering::Relaxed};

/// Who uses a stack.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StackUse {
    /// A thread.
    Thread,
    /// The interrupts of a CPU.
    Irq(usize),
    /// Nobody: it was freed, and is kept for the next thread.
    Kept,
}

/// What of a stack an address is in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StackPart {
    /// Behind its low end: where it faults when the stack is too small.
    Guard,
    /// The stack itself.
    Stack,
    /// Above its top, where nothing is mapped either.
    Above,
}

/// What is known of the stack that an address belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StackInfo {
    /// Its lowest address.
    pub low: usize,
    /// Bytes, the guard not included.
    pub size: usize,
    /// Where the address is.
    pub part: StackPart,
    /// Who uses it.
    pub used_by: StackUse,
    /// What [`set_stack_owner`](crate::Kmem::set_stack_owner) named; 0 if nothing.
    pub owner: usize,
    /// Who asked for it, where that is known: not in the direct map.
    pub caller: Option<&'static Location<'static>>,
}

impl fmt::Display for StackInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let part = match self.part {
            StackPart::Guard => "guard page of the ",
            StackPart::Stack => "",
            StackPart::Above => "page above the ",
        };
        write!(f, "{part}kernel stack {:#x}-{:#x} (", self.low, self.low + self.size)?;
        match self.used_by {
            StackUse::Thread => write!(f, "thread, owner {:#x}", self.owner)?,
            StackUse::Irq(cpu) => write!(f, "interrupts of CPU {cpu}")?,
            StackUse::Kept => f.write_str("free")?,
        }
        match self.caller {
            Some(at) => write!(f, ", allocated at {}:{})", at.file(), at.line()),
            None => f.write_str(")"),
        }
    }
}

/// What an audit of stacks counted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct StackAudit {
    /// Stacks that threads have.
    pub threads: u64,
    /// Stacks of interrupts.
    pub irq: u64,
    /// Freed stacks that CPUs keep.
    pub kept: u64,
    /// Frames of all of them.
    pub frames: u64,
}

/// What an audit of stacks found wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StackAuditError {
    /// The free stacks that are there are not those that the CPUs keep.
    Kept,
    /// `KernelStack` is so many KiB, and should be so many.
    Accounted(u64, u64),
}

impl fmt::Display for StackAuditError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StackAuditError::Kept => f.write_str("kept stacks are lost"),
            StackAuditError::Accounted(is, should) => {
                write!(f, "KernelStack is {is} KiB, and the stacks have {should}")
            }
        }
    }
}

impl core::error::Error for StackAuditError {}

impl<P: Platform, R: Reclaim> Threads<'_, P, R> {
    /// Calls `f` with where the stack in use begins that an address is in, and its bytes. Meanwhile nobody frees it.
    pub(super) fn look<T>(
        &self,
        addr: usize,
        f: impl FnOnce(NonNull<u8>, usize) -> T,
    ) -> Option<T> {
        if self.guarded() { self.vmap.look(addr, f) } else { self.look_direct(addr, f) }
    }

    /// `stack_end_corrupted`.
    pub(crate) fn end_corrupted(self, addr: usize) -> Option<bool> {
        self.look(addr, |low, _| self.end(low).magic.load(Relaxed) != STACK_END_MAGIC)
    }

    /// `stack_not_used`.
    pub(crate) fn not_used(self, addr: usize) -> Option<usize> {
        self.look(addr, |low, size| {
            // SAFETY: a stack in use, which nobody frees meanwhile.
            unsafe { unused(low, size) }
        })
    }

    /// Names the owner of the stack that an address is in; `false` if it is in none.
    pub(crate) fn set_owner(self, addr: usize, owner: usize) -> bool {
        self.look(addr, |low, _| self.end(low).owner.store(owner, Relaxed)).is_some()
    }

    /// `stack_of`.
    pub(crate) fn stack_of(self, addr: usize) -> Option<StackInfo> {
        if !self.guarded() {
            return self
                .direct_at(addr, |low, size, used_by| self.info(addr, low, size, used_by, None));
        }
        self.vmap.guarded_at(addr, |at| {
            let used_by = match (at.kept, at.irq) {
                (true, _) => StackUse::Kept,
                (_, true) => self.irq_use(at.low),
                _ => StackUse::Thread,
            };
            self.info(addr, at.low, at.size, used_by, at.caller)
        })
    }

    /// What is told of a stack. The caller has the lock.
    fn info(
        &self,
        addr: usize,
        low: NonNull<u8>,
        size: usize,
        used_by: StackUse,
        caller: Option<&'static Location<'static>>,
    ) -> StackInfo {
        // A kept one may be unmapped at any time.
        let owner = if used_by == StackUse::Kept { 0 } else { self.end(low).owner.load(Relaxed) };
        let low = low.addr().get();
        let part = match addr {
            _ if addr < low => StackPart::Guard,
            _ if addr < low + size => StackPart::Stack,
            _ => StackPart::Above,
        };
        StackInfo { low, size, part, used_by, owner, caller }
    }

    /// Counts all stacks. For a quiet machine.
    pub(crate) fn audit(self) -> Result<StackAudit, StackAuditError> {
        let direct = *self.state.direct.lock(self.p());
        let areas = self.vmap.count_guarded();
        if self.kept() != areas.kept {
            return Err(StackAuditError::Kept);
        }
        let (kept, kept_frames) = areas.kept;
        let threads = areas.live.0 + direct.threads;
        let frames = areas.live.1 + direct.frames;
        let should = (frames - direct.irq_frames) * (Self::PAGE >> 10) as u64;
        let is = self.vmap.objects.pages.global_node_page_state(NodeStat::KernelStack);
        if is == should {
            let irq = areas.irq.0 + direct.irq;
            Ok(StackAudit { threads, irq, kept, frames: frames + areas.irq.1 + kept_frames })
        } else {
            Err(StackAuditError::Accounted(is, should))
        }
    }
}
