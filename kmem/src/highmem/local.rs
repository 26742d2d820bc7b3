//! Temporary mappings: the CPU's own, nested, never waiting.

use super::{Maps, Where, kmtype::KmType, pointer};
use crate::{
    context::{Cpu, KM_MAX_IDX, MAX_PREEMPT_DEPTH, Path, Section},
    error::Misuse,
    page::Page,
    page_alloc::Reclaim,
    platform::Platform,
    types::Pfn,
};
use core::{
    ptr::NonNull,
    sync::atomic::{
        AtomicBool, AtomicU32, AtomicU64,
        Ordering::{Relaxed, SeqCst},
        compiler_fence,
    },
};

/// What a temporary mapping was made by, beside its frame.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// `kmap_local_page`.
    Local,
    /// `kmap_atomic`, without a purpose.
    Atomic,
}

impl Kind {
    const ATOMIC: u64 = 1 << 32;

    fn entry(self, pfn: Pfn) -> u64 {
        u64::from(pfn.0) | if self == Kind::Atomic { Kind::ATOMIC } else { 0 }
    }

    fn of(entry: u64) -> Kind {
        if entry & Kind::ATOMIC != 0 { Kind::Atomic } else { Kind::Local }
    }

    const fn map(self) -> &'static str {
        match self {
            Kind::Local => "kmap_local_page",
            Kind::Atomic => "kmap_atomic",
        }
    }

    const fn unmap(self) -> &'static str {
        match self {
            Kind::Local => "kunmap_local",
            Kind::Atomic => "kunmap_atomic",
        }
    }
}

/// A CPU's temporary mappings. The CPU's own; interrupts leave it as they find it. Zero is empty.
pub(super) struct Stack {
    depth: AtomicU32,
    /// Frame and kind of those below the depth.
    entries: [AtomicU64; KM_MAX_IDX],
    /// Purposes in use.
    typed: [AtomicBool; KmType::COUNT],
}

impl Stack {
    pub(super) fn depth(&self) -> usize {
        (self.depth.load(Relaxed) as usize).min(KM_MAX_IDX)
    }

    pub(super) fn purposes(&self) -> usize {
        self.typed.iter().filter(|used| used.load(Relaxed)).count()
    }

    fn set_depth(&self, depth: usize) {
        // What interrupts do is above: the depth changes before a place is set, and after it is cleared.
        compiler_fence(SeqCst);
        self.depth.store(depth as u32, Relaxed);
        compiler_fence(SeqCst);
    }
}

impl<'a, P: Platform, R: Reclaim> Maps<'a, P, R> {
    fn stack(&self, cpu: &Cpu) -> Option<&'a Stack> {
        self.state.stacks.get(cpu.id())
    }

    /// Frame and, if the direct map has one, address of a page.
    #[track_caller]
    fn look(&self, page: &Page) -> Result<(Pfn, Option<NonNull<u8>>), Misuse> {
        let pfn = self.pfn_of(page)?;
        Ok((pfn, self.p().direct_map(pfn)))
    }

    /// The stack of the CPU that the caller is pinned to.
    #[track_caller]
    fn stack_for(&self, cpu: Option<&Cpu>, pfn: Pfn) -> Result<(usize, &'a Stack), Misuse> {
        let Some(cpu) = cpu else { return Err(self.pages.misuse(Misuse::NoCpu)) };
        match self.stack(cpu) {
            Some(stack) => Ok((cpu.id(), stack)),
            None => Err(self.pages.misuse(Misuse::NoAddress { pfn })),
        }
    }

    /// Maps a high page on top of the CPU's stack.
    #[track_caller]
    fn push(&self, cpu: Option<&Cpu>, pfn: Pfn, kind: Kind) -> Result<NonNull<u8>, Misuse> {
        let (cpu, stack) = self.stack_for(cpu, pfn)?;
        let place = stack.depth();
        if place == KM_MAX_IDX {
            return Err(self.pages.misuse(Misuse::LocalDepth { cpu }));
        }
        let _mark = self.pages.mark(Path::KmapLocal);
        stack.set_depth(place + 1);
        stack.entries[place].store(kind.entry(pfn), Relaxed);
        let at = self.local_at(cpu, place);
        // SAFETY: the place is this CPU's, and the caller's since the depth says so; the frame has a page.
        unsafe { self.p().kmap_set(at, pfn) };
        Ok(pointer(at))
    }

    /// Undoes the mapping on top of the CPU's stack, which must be the one at `addr`.
    #[track_caller]
    fn pop(&self, cpu: Option<&Cpu>, addr: usize, kind: Kind) -> Result<(), Misuse> {
        let Some(Where::Local(on, place)) = self.place_at(addr) else {
            return Err(self.pages.misuse(Misuse::NotLocalMap { addr }));
        };
        let Some((cpu, stack)) = cpu.and_then(|cpu| Some((cpu.id(), self.stack(cpu)?))) else {
            return Err(self.pages.misuse(Misuse::NoCpu));
        };
        let depth = stack.depth();
        if on == cpu
            && let Some(purpose) = place.checked_sub(KM_MAX_IDX)
            && stack.typed[purpose].load(Relaxed)
        {
            let (given, right) = (KmType::ALL[purpose].name(), "kunmap_atomic_type");
            return Err(self.pages.misuse(Misuse::WrongUnmap { addr, given, right }));
        }
        if on != cpu || place >= depth {
            return Err(self.pages.misuse(Misuse::NotLocalMap { addr }));
        }
        let made = Kind::of(stack.entries[place].load(Relaxed));
        if made != kind {
            let (given, right) = (made.map(), made.unmap());
            return Err(self.pages.misuse(Misuse::WrongUnmap { addr, given, right }));
        }
        if place + 1 != depth {
            let last = self.local_at(cpu, depth - 1);
            return Err(self.pages.misuse(Misuse::LocalOrder { addr, last }));
        }
        let _mark = self.pages.mark(Path::KmapLocal);
        self.clear(cpu, place);
        stack.set_depth(place);
        Ok(())
    }

    fn clear(&self, cpu: usize, place: usize) {
        // SAFETY: the place is the running CPU's, and whoever had what it shows is done with it.
        unsafe { self.p().kmap_clear(self.local_at(cpu, place)) };
    }

    /// `kmap_local_page`.
    #[inline]
    #[track_caller]
    pub(crate) fn kmap_local(&self, page: &Page) -> Result<NonNull<u8>, Misuse> {
        let (pfn, low) = self.look(page)?;
        match low {
            Some(at) => Ok(at),
            None => self.kmap_local_high(pfn),
        }
    }

    #[track_caller]
    fn kmap_local_high(&self, pfn: Pfn) -> Result<NonNull<u8>, Misuse> {
        // Not to be taken to another CPU in between.
        let cpu = self.p().get_cpu();
        let done = self.push(cpu, pfn, Kind::Local);
        if let Some(cpu) = cpu {
            self.p().put_cpu(cpu);
        }
        done
    }

    /// `kunmap_local`.
    #[inline]
    #[track_caller]
    pub(crate) fn kunmap_local(&self, addr: usize) -> Result<(), Misuse> {
        if self.is_low(addr) { Ok(()) } else { self.kunmap_local_high(addr) }
    }

    #[track_caller]
    fn kunmap_local_high(&self, addr: usize) -> Result<(), Misuse> {
        let cpu = self.p().get_cpu();
        let done = self.pop(cpu, addr, Kind::Local);
        if let Some(cpu) = cpu {
            self.p().put_cpu(cpu);
        }
        done
    }

    /// Whether an address is one of the direct map.
    #[inline(always)]
    fn is_low(&self, addr: usize) -> bool {
        self.p().direct_unmap(core::ptr::without_provenance(addr)).is_some()
    }

    /// Turns preemption off, if that can be counted once more.
    #[inline(always)]
    #[track_caller]
    fn begin(&self) -> Result<Option<&'a Cpu>, Misuse> {
        let Some(cpu) = self.p().get_cpu() else { return Ok(None) };
        if cpu.context().preempt_depth() == MAX_PREEMPT_DEPTH {
            self.p().put_cpu(cpu);
            return Err(self.pages.misuse(Misuse::LocalDepth { cpu: cpu.id() }));
        }
        cpu.enter(Section::Preempt);
        Ok(Some(cpu))
    }

    /// Turns preemption on again.
    #[inline(always)]
    fn end(&self, cpu: Option<&Cpu>) {
        if let Some(cpu) = cpu {
            cpu.leave(Section::Preempt);
            self.p().put_cpu(cpu);
        }
    }

    /// As [`end`](Self::end), for the mapping that was at `addr`.
    #[inline(always)]
    #[track_caller]
    fn end_of(&self, cpu: Option<&Cpu>, addr: usize) -> Result<(), Misuse> {
        if cpu.is_some_and(|cpu| cpu.context().preempt_depth() == 0) {
            // The section was left by force, with a report.
            return Err(self.pages.misuse(Misuse::SectionOver { addr }));
        }
        self.end(cpu);
        Ok(())
    }

    /// `kmap_atomic`.
    #[inline]
    #[track_caller]
    pub(crate) fn kmap_atomic(&self, page: &Page) -> Result<NonNull<u8>, Misuse> {
        let (pfn, low) = self.look(page)?;
        let cpu = self.begin()?;
        match low {
            Some(at) => Ok(at),
            None => self.push(cpu, pfn, Kind::Atomic).inspect_err(|_| self.end(cpu)),
        }
    }

    /// `kunmap_atomic`.
    #[inline]
    #[track_caller]
    pub(crate) fn kunmap_atomic(&self, addr: usize) -> Result<(), Misuse> {
        // Whoever mapped is pinned.
        let cpu = self.p().this_cpu();
        if !self.is_low(addr) {
            self.pop(cpu, addr, Kind::Atomic)?;
        }
        self.end_of(cpu, addr)
    }

    /// `kmap_atomic` in the textbook's form: the purpose's place on the CPU.
    #[track_caller]
    pub(crate) fn kmap_atomic_type(
        &self,
        page: &Page,
        purpose: KmType,
    ) -> Result<NonNull<u8>, Misuse> {
        let (pfn, low) = self.look(page)?;
        let cpu = self.begin()?;
        match low {
            Some(at) => Ok(at),
            None => self.set_typed(cpu, pfn, purpose).inspect_err(|_| self.end(cpu)),
        }
    }

    #[track_caller]
    fn set_typed(
        &self,
        cpu: Option<&Cpu>,
        pfn: Pfn,
        purpose: KmType,
    ) -> Result<NonNull<u8>, Misuse> {
        let (cpu, stack) = self.stack_for(cpu, pfn)?;
        // An interrupt in between takes the purpose and gives it back.
        if stack.typed[purpose as usize].load(Relaxed) {
            let purpose = purpose.name();
            return Err(self.pages.misuse(Misuse::KmTypeInUse { purpose, cpu }));
        }
        let _mark = self.pages.mark(Path::KmapLocal);
        stack.typed[purpose as usize].store(true, Relaxed);
        compiler_fence(SeqCst);
        let at = self.local_at(cpu, KM_MAX_IDX + purpose as usize);
        // SAFETY: as in `push`: the purpose's place is the caller's.
        unsafe { self.p().kmap_set(at, pfn) };
        Ok(pointer(at))
    }

    /// Undoes [`kmap_atomic_type`](Self::kmap_atomic_type).
    #[track_caller]
    pub(crate) fn kunmap_atomic_type(&self, addr: usize, purpose: KmType) -> Result<(), Misuse> {
        let cpu = self.p().this_cpu();
        if !self.is_low(addr) {
            self.clear_typed(cpu, addr, purpose)?;
        }
        self.end_of(cpu, addr)
    }

    #[track_caller]
    fn clear_typed(&self, cpu: Option<&Cpu>, addr: usize, purpose: KmType) -> Result<(), Misuse> {
        let misuse = Misuse::NotLocalMap { addr };
        let Some((cpu, stack)) = cpu.and_then(|cpu| Some((cpu.id(), self.stack(cpu)?))) else {
            return Err(self.pages.misuse(Misuse::NoCpu));
        };
        let used = &stack.typed[purpose as usize];
        match self.place_at(addr) {
            Some(Where::Local(on, place))
                if on == cpu && place == KM_MAX_IDX + purpose as usize && used.load(Relaxed) =>
            {
                let _mark = self.pages.mark(Path::KmapLocal);
                self.clear(cpu, place);
                compiler_fence(SeqCst);
                used.store(false, Relaxed);
                Ok(())
            }
            _ => Err(self.pages.misuse(misuse)),
        }
    }

    /// The running task is to leave the CPU: its mappings go with it.
    #[track_caller]
    pub(crate) fn sched_out(&self) {
        let Some((cpu, stack)) = self.here() else { return };
        let (depth, purposes) = (stack.depth(), stack.purposes());
        let left = match cpu.current() {
            _ if depth + purposes == 0 => return,
            Some(task) => {
                task.keep_maps(cpu.id(), stack.entries[..depth].iter().map(|e| e.load(Relaxed)));
                // Those that have a purpose end with their section.
                purposes
            }
            None => depth + purposes,
        };
        self.empty(cpu, stack);
        if left > 0 {
            self.tell(Misuse::LocalMapsLeft { cpu: cpu.id(), maps: left });
        }
    }

    /// The running task has come to a CPU: what it had mapped is there again.
    #[track_caller]
    pub(crate) fn sched_in(&self) {
        let Some((cpu, stack)) = self.here() else { return };
        let Some(task) = cpu.current() else { return };
        if task.local_maps() == 0 {
            return;
        }
        let (from, maps) = task.take_maps();
        let to = cpu.id();
        if from != to {
            self.tell(Misuse::LocalMapsMoved { from, to });
            return;
        }
        stack.set_depth(maps.len());
        for (place, entry) in maps.enumerate() {
            stack.entries[place].store(entry, Relaxed);
            // SAFETY: as in `push`; the place was this task's before it slept, and is again.
            unsafe { self.p().kmap_set(self.local_at(to, place), Pfn(entry as u32)) };
        }
    }

    /// The running task ends: it ought to have no mappings.
    #[track_caller]
    pub(crate) fn task_ends(&self) {
        let Some((cpu, stack)) = self.here() else { return };
        let maps = stack.depth() + stack.purposes();
        if maps > 0 {
            self.empty(cpu, stack);
            self.tell(Misuse::LocalMapsLeft { cpu: cpu.id(), maps });
        }
    }

    /// Reports; the scheduler's calls do not unwind.
    #[track_caller]
    fn tell(&self, what: Misuse) {
        self.pages.tell(what, format_args!(""));
    }

    fn here(&self) -> Option<(&'a Cpu, &'a Stack)> {
        let cpu = self.p().this_cpu()?;
        Some((cpu, self.stack(cpu)?))
    }

    /// Clears the CPU's places, the last first, and those by purpose.
    fn empty(&self, cpu: &Cpu, stack: &Stack) {
        for place in (0..stack.depth()).rev() {
            self.clear(cpu.id(), place);
        }
        stack.set_depth(0);
        for (purpose, used) in stack.typed.iter().enumerate() {
            if used.load(Relaxed) {
                self.clear(cpu.id(), KM_MAX_IDX + purpose);
                compiler_fence(SeqCst);
                used.store(false, Relaxed);
            }
        }
    }
}
