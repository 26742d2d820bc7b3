//! Context: who is running, and what it may do.
//!
//! # Concepts
//! Code runs in *process context* (may sleep), or in some *atomic context*: preemption off, a spin
//! lock held, a softirq, a hard interrupt, interrupts masked, or an NMI. Asking for memory in a way
//! that may sleep is a mistake in every atomic context \[C1\]. kmem shows it twice: the classic calls
//! look at the CPU's context word and refuse; the typed calls take a capability, and the wrong one
//! does not compile \[C2\].
//!
//! # Implementation
//! One word per CPU. Its upper half is laid out as the kernel's `preempt_count`:
//!
//! ```text
//!   63        55..52   51..48    47..40     39..32          31..8     7..0
//!  +---------+--------+---------+----------+---------------+---------+------+
//!  | IRQ_OFF |  NMI   | hardirq | softirq  | preempt depth | machine | path |
//!  +---------+--------+---------+----------+---------------+---------+------+
//! ```
//!
//! The lower half says whose CPU it is, by a number that every machine of the program has for itself, and
//! what part of the allocator runs there. So one comparison tells a fast path that it is on a CPU of its own
//! machine, that nobody owns the CPU's lists, and that the caller may sleep.
//!
//! The word is written by its own CPU only. An interrupt that lands on the CPU restores what it
//! found before it returns, so plain loads and stores suffice; they are `Relaxed` atomics because an
//! interrupt handler is, to the language, another thread.
//!
//! What belongs to the *task* and not to the CPU (scopes such as `memalloc_noio_save`, its cpuset, its
//! memory policy, its temporary mappings while it does not run) is in [`Task`]; interrupts do not inherit it.
//!
//! # Locking
//! None; see above. [`Task`] is written by the task itself, read by others only for reports.

mod held;

pub(crate) use held::{Held, Loaded};

use crate::types::NodeMask;
use core::{
    fmt,
    marker::PhantomData,
    ptr,
    sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering::Relaxed},
};

use held::Magazines;

const PREEMPT_UNIT: u32 = 1;
const SOFTIRQ_UNIT: u32 = 1 << 8;
const HARDIRQ_UNIT: u32 = 1 << 16;
const NMI_UNIT: u32 = 1 << 20;
const PREEMPT_MASK: u32 = 0xff;
/// How deep preemption can be turned off.
pub const MAX_PREEMPT_DEPTH: u32 = PREEMPT_MASK;
const SOFTIRQ_MASK: u32 = 0xff << 8;
const HARDIRQ_MASK: u32 = 0xf << 16;
const NMI_MASK: u32 = 0xf << 20;
const IRQ_OFF: u32 = 1 << 31;

/// The kinds of atomic section a CPU can be in, as units of its context word.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Section {
    /// Preemption is off (spin locks included).
    Preempt = PREEMPT_UNIT,
    /// A softirq runs, or softirqs are disabled.
    Softirq = SOFTIRQ_UNIT,
    /// A hard interrupt handler runs.
    Hardirq = HARDIRQ_UNIT,
    /// A non-maskable interrupt handler runs.
    Nmi = NMI_UNIT,
}

/// A snapshot of a CPU's context word.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Context(u32);

impl Context {
    /// Process context with everything enabled.
    pub const PROCESS: Context = Context(0);

    /// Whether sleeping is allowed.
    #[inline(always)]
    pub const fn may_sleep(self) -> bool {
        self.0 == 0
    }

    /// Whether an NMI handler runs.
    #[inline(always)]
    pub const fn in_nmi(self) -> bool {
        self.0 & NMI_MASK != 0
    }

    /// Whether a hard interrupt handler runs.
    pub const fn in_hardirq(self) -> bool {
        self.0 & HARDIRQ_MASK != 0
    }

    /// Whether a softirq runs or softirqs are disabled.
    pub const fn in_softirq(self) -> bool {
        self.0 & SOFTIRQ_MASK != 0
    }

    /// Whether any interrupt is being served (the kernel's `in_interrupt()`).
    #[inline(always)]
    pub const fn in_interrupt(self) -> bool {
        self.0 & (NMI_MASK | HARDIRQ_MASK | SOFTIRQ_MASK) != 0
    }

    /// Whether interrupts are masked.
    pub const fn irqs_off(self) -> bool {
        self.0 & IRQ_OFF != 0
    }

    /// How deep preemption is disabled, spin locks included.
    pub const fn preempt_depth(self) -> u32 {
        self.0 & PREEMPT_MASK
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "in_atomic(): {}, irqs_disabled(): {}, nmi: {}, hardirq: {}, softirq: {}, preempt_count: {}",
            u8::from(self.0 & !IRQ_OFF != 0),
            u8::from(self.irqs_off()),
            u8::from(self.in_nmi()),
            u8::from(self.in_hardirq()),
            u8::from(self.in_softirq()),
            self.preempt_depth(),
        )
    }
}

/// The parts of the allocator an interrupt can land in \[C3\]. A CPU's current one is in
/// [`Cpu::path`]; from [`Path::PcpAlloc`] on, the CPU's own lists are being worked on and a nested
/// caller must take the locked path.
#[derive(Clone, Copy, PartialEq, Eq, Debug, PartialOrd, Ord)]
#[repr(u8)]
pub enum Path {
    /// Not in the allocator.
    Idle = 0,
    /// The slow path: watermarks, retries, choosing a zone.
    Slow = 1,
    /// Taking blocks straight from the buddy, under its lock.
    BuddyAlloc = 2,
    /// Giving a block straight to the buddy, under its lock.
    BuddyFree = 3,
    /// Taking an area of the vmalloc range, or making one of free addresses.
    VmAlloc = 4,
    /// Looking an area up and retiring it.
    VmFree = 5,
    /// The table of `kmap`'s places.
    Kmap = 6,
    /// A temporary mapping of the CPU's own.
    KmapLocal = 7,
    /// Taking a place of the per-CPU space.
    PercpuAlloc = 8,
    /// Giving one back.
    PercpuFree = 9,
    /// Taking a block from the CPU's own lists.
    PcpAlloc = 10,
    /// Putting a block on the CPU's own lists.
    PcpFree = 11,
    /// Refilling the CPU's own lists from the buddy.
    Refill = 12,
    /// Giving blocks of the CPU's own lists back to the buddy.
    Drain = 13,
    /// Several pages at once, through the CPU's own lists.
    Bulk = 14,
    /// Taking an object from the CPU's own magazines.
    ObjAlloc = 15,
    /// Putting an object in the CPU's own magazines.
    ObjFree = 16,
    /// Exchanging or filling a magazine of the CPU's own.
    ObjRefill = 17,
    /// Exchanging or emptying magazines of the CPU's own.
    ObjFlush = 18,
}

/// Number of [`Path`]s.
pub const NR_PATHS: usize = 19;

impl Path {
    /// All paths, in numeric order.
    pub const ALL: [Path; NR_PATHS] = [
        Path::Idle,
        Path::Slow,
        Path::BuddyAlloc,
        Path::BuddyFree,
        Path::VmAlloc,
        Path::VmFree,
        Path::Kmap,
        Path::KmapLocal,
        Path::PercpuAlloc,
        Path::PercpuFree,
        Path::PcpAlloc,
        Path::PcpFree,
        Path::Refill,
        Path::Drain,
        Path::Bulk,
        Path::ObjAlloc,
        Path::ObjFree,
        Path::ObjRefill,
        Path::ObjFlush,
    ];

    /// First path that owns the CPU's lists.
    pub(crate) const FIRST_OWNER: u8 = Path::PcpAlloc as u8;
}

/// Set in a CPU's path while an NMI handler runs, on top of what it interrupted: to the fast paths its
/// lists are owned, so they need not look for NMIs.
const NMI_PATH: u64 = 0x80;
const _: () = assert!(NR_PATHS <= NMI_PATH as usize);

/// The bits of a CPU's word that hold its path.
const PATH: u64 = 0xff;
/// Where in a CPU's word the context begins.
const CONTEXT_SHIFT: u32 = 32;

/// What the word of a machine's CPU holds while nobody owns its lists and the context is empty: the number of
/// the machine in its place.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct IdleWord(u64);

impl IdleWord {
    /// One that no CPU's word is equal to but those of whoever calls. There are 2^24 - 2 of them; who comes
    /// later gets one that no CPU has, and his callers all take the slower paths.
    pub(crate) fn unique() -> IdleWord {
        static USED: AtomicU32 = AtomicU32::new(0);
        const MOST: u32 = (1 << 24) - 2;
        let before = USED.fetch_update(Relaxed, Relaxed, |n| (n < MOST).then_some(n + 1));
        IdleWord(before.map_or(NOBODYS, |n| u64::from(n + 1) << 8))
    }

    /// The word with the context of a caller that [`Platform::get_cpu`](crate::platform::Platform::get_cpu)
    /// pinned in process context.
    #[inline(always)]
    pub(crate) const fn pinned(self, preemptible: bool) -> u64 {
        self.0 | ((preemptible as u64) << CONTEXT_SHIFT)
    }
}

/// What the fast paths of a machine compare a CPU's word with that are to be shut now and then: its [`IdleWord`], or
/// one that no CPU's word is equal to.
pub(crate) struct Gated(AtomicU64);

impl Gated {
    pub(crate) fn open(idle: IdleWord) -> Gated {
        Gated(AtomicU64::new(idle.0))
    }

    pub(crate) fn set(&self, idle: IdleWord, open: bool) {
        self.0.store(if open { idle.0 } else { NOBODYS }, Relaxed);
    }

    #[inline(always)]
    pub(crate) fn get(&self) -> IdleWord {
        IdleWord(self.0.load(Relaxed))
    }
}

/// In place of a machine's number: it is to stay unknown. No machine has it.
const FORGOTTEN: u64 = ((1 << 24) - 1) << 8;

/// A path that no CPU is in.
const NOBODYS: u64 = NR_PATHS as u64;

/// Work that others leave for a CPU to do when it is out of the allocator.
pub(crate) const DEFER_DRAIN: u32 = 1;
/// As `DEFER_DRAIN`, for the magazines of objects.
pub(crate) const DEFER_OBJECTS: u32 = 2;
/// The CPU is at it. A request made meanwhile is one for another time round: what it is about may come too
/// late for this one.
pub(crate) const DEFER_OBJECTS_BUSY: u32 = 4;
/// The CPU is to forget its machine until it allocates an object (see `kfence`).
pub(crate) const DEFER_SAMPLE: u32 = 16;
/// It is to note its machine again, whatever came before.
pub(crate) const DEFER_RECALL: u32 = 32;
/// As `DEFER_DRAIN`, for what rests on the lists alone.
pub(crate) const DEFER_REST: u32 = 64;
/// A misuse is to panic once the CPU's lists are let go. Set by the CPU itself.
pub(crate) const DEFER_PANIC: u32 = 8;

/// Caches of objects that a machine can have, those for kmalloc and the slab layer's own included.
pub(crate) const MAX_CACHES: usize = 512;

/// A CPU's word before it went on to a path.
#[derive(Clone, Copy)]
#[must_use = "to be restored"]
pub(crate) struct Before(u64);

/// What the core keeps for one CPU, some 24 KiB. The platform owns one per possible CPU and says which one the
/// caller is on.
#[repr(C, align(64))]
pub struct Cpu {
    /// The loaded magazines of the slab layer's caches, by number. Here, so that they are found without a
    /// further look.
    loaded: Magazines,
    /// Context, machine and [`Path`]; from `Path::FIRST_OWNER` on that is the ownership flag of the CPU's
    /// lists. Own CPU only.
    word: AtomicU64,
    /// `DEFER_*` bits; set by anyone, cleared by the CPU.
    pub(crate) deferred: AtomicU32,
    id: u32,
    node: u32,
    task: AtomicPtr<Task>,
    /// The allocator's data for this CPU.
    data: AtomicPtr<()>,
    online: AtomicBool,
    /// Whether `loaded` says anything.
    equipped: AtomicBool,
    /// What else it has of each cache.
    sides: [AtomicPtr<()>; MAX_CACHES],
}

impl Cpu {
    /// CPU `id` on node `node`, offline, in process context, running no task.
    pub const fn new(id: u32, node: u32) -> Cpu {
        Cpu {
            loaded: Magazines::new(),
            word: AtomicU64::new(0),
            deferred: AtomicU32::new(0),
            id,
            node,
            task: AtomicPtr::new((&raw const NO_TASK).cast_mut()),
            data: AtomicPtr::new(ptr::null_mut()),
            online: AtomicBool::new(false),
            equipped: AtomicBool::new(false),
            sides: [const { AtomicPtr::new(ptr::null_mut()) }; MAX_CACHES],
        }
    }

    /// The CPU's number, dense from 0 (`smp_processor_id()`).
    #[inline(always)]
    pub fn id(&self) -> usize {
        self.id as usize
    }

    /// The node the CPU belongs to.
    #[inline(always)]
    pub fn node(&self) -> usize {
        self.node as usize
    }

    /// Whether the CPU is online.
    pub fn online(&self) -> bool {
        self.online.load(Relaxed)
    }

    /// Marks the CPU on- or offline. Called by the platform's bring-up and by
    /// `Kmem::cpu_online`/`cpu_offline`.
    pub(crate) fn set_online(&self, on: bool) {
        self.online.store(on, Relaxed);
    }

    /// The context word now. Meaningful on the CPU itself.
    #[inline(always)]
    pub fn context(&self) -> Context {
        Context((self.word() >> CONTEXT_SHIFT) as u32)
    }

    #[inline(always)]
    fn word(&self) -> u64 {
        self.word.load(Relaxed)
    }

    #[inline(always)]
    fn set_word(&self, word: u64) {
        self.word.store(word, Relaxed);
    }

    /// Enters an atomic section. Called on the CPU itself; every entry needs its [`Cpu::leave`].
    #[inline(always)]
    pub fn enter(&self, section: Section) {
        self.set_word(self.word().wrapping_add(u64::from(section as u32) << CONTEXT_SHIFT));
        if section as u32 == NMI_UNIT {
            self.set_word(self.word() | NMI_PATH);
        }
    }

    /// Leaves an atomic section entered on the same CPU.
    #[inline(always)]
    pub fn leave(&self, section: Section) {
        self.set_word(self.word().wrapping_sub(u64::from(section as u32) << CONTEXT_SHIFT));
        if section as u32 == NMI_UNIT && !self.context().in_nmi() {
            self.set_word(self.word() & !NMI_PATH);
        }
    }

    /// Masks interrupts in the context word and says whether they were masked before. For platforms
    /// whose interrupt mask is this bit; hardware that has a mask of its own sets both.
    #[inline(always)]
    pub fn mask_irqs(&self) -> bool {
        let w = self.word();
        self.set_word(w | u64::from(IRQ_OFF) << CONTEXT_SHIFT);
        w >> CONTEXT_SHIFT & u64::from(IRQ_OFF) != 0
    }

    /// Unmasks interrupts in the context word.
    #[inline(always)]
    pub fn unmask_irqs(&self) {
        self.set_word(self.word() & !(u64::from(IRQ_OFF) << CONTEXT_SHIFT));
    }

    /// The allocator path that runs on the CPU now.
    pub fn path(&self) -> Path {
        Path::ALL[(u64::from(self.path_raw()) & !NMI_PATH) as usize % NR_PATHS]
    }

    #[inline(always)]
    pub(crate) fn path_raw(&self) -> u8 {
        self.word() as u8
    }

    /// Goes on to another path, and returns what to [`restore`](Self::restore) at its end.
    #[inline(always)]
    pub(crate) fn set_path(&self, path: Path) -> Before {
        let word = self.word();
        self.set_word(word & !PATH | path as u64);
        Before(word)
    }

    /// Takes up what a path left. The sections that were entered meanwhile were left.
    #[inline(always)]
    pub(crate) fn restore(&self, Before(word): Before) {
        debug_assert_eq!(word >> CONTEXT_SHIFT, self.word() >> CONTEXT_SHIFT);
        self.set_word(word);
    }

    /// Notes whose CPU this is, if nobody has and it is in no path: who went on to one brings the word back as it was.
    /// Says whether that is news.
    #[inline(always)]
    pub(crate) fn set_machine(&self, idle: IdleWord) -> bool {
        self.word() as u32 == 0 && self.note_machine(idle)
    }

    /// As [`set_machine`](Self::set_machine), where nobody has.
    #[cold]
    #[inline(never)]
    fn note_machine(&self, idle: IdleWord) -> bool {
        let news = idle.0 & PATH == 0;
        if news {
            self.set_word(self.word() | idle.0);
        }
        news
    }

    /// Has the CPU forget whose it is, so that everything takes the slower paths, until
    /// [`remember`](Self::remember). One that still has, from the last time, may note it again instead. Of a path
    /// beneath the caller it brings the word back as it was: then nothing comes of it.
    pub(crate) fn forget_machine(&self) {
        let word = self.word();
        if word & PATH == 0 {
            let forgets = if self.forgetful() { 0 } else { FORGOTTEN };
            self.set_word(word >> CONTEXT_SHIFT << CONTEXT_SHIFT | forgets);
        }
    }

    /// Whether the CPU has forgotten whose it is and is to stay so.
    fn forgetful(&self) -> bool {
        self.word() as u32 == FORGOTTEN as u32
    }

    /// Ends what [`forget_machine`](Self::forget_machine) began.
    pub(crate) fn remember(&self, idle: IdleWord) {
        if self.forgetful() {
            self.set_word(self.word() >> CONTEXT_SHIFT << CONTEXT_SHIFT);
        }
        self.set_machine(idle);
    }

    /// The word, if the CPU is the machine's that `idle` is of, nobody owns its lists, and (if
    /// `process` says so) its context is as it is in `pinned` process context. Never in an NMI handler.
    #[inline(always)]
    pub(crate) fn idle(&self, idle: &IdleWord, process: bool, preemptible: bool) -> Option<Before> {
        // Before the other, so that it is the one kept in a register.
        let word = self.word();
        let pinned = idle.pinned(preemptible);
        let is = if process { word == pinned } else { word as u32 == pinned as u32 };
        is.then_some(Before(word))
    }

    /// Takes the CPU's lists. In `process` context the machine's number is left out for the time.
    #[inline(always)]
    pub(crate) fn leave_idle(
        &self,
        Before(word): Before,
        path: Path,
        process: bool,
        preemptible: bool,
    ) {
        let context = u64::from(preemptible) << CONTEXT_SHIFT;
        self.set_word(if process { context } else { word } + path as u64);
    }

    /// Ties the CPU, on which nothing runs but maybe the caller, to one allocator's data for it; `false` if it is
    /// tied already. Whose it was before is forgotten.
    pub(crate) fn claim(&self, data: *const ()) -> bool {
        let claimed =
            self.data.compare_exchange(ptr::null_mut(), data.cast_mut(), Relaxed, Relaxed).is_ok();
        if claimed {
            self.set_word(self.word() >> CONTEXT_SHIFT << CONTEXT_SHIFT);
        }
        claimed
    }

    /// Unties the CPU, if it is tied to `data`.
    pub(crate) fn disclaim(&self, data: *const ()) {
        let _ = self.data.compare_exchange(data.cast_mut(), ptr::null_mut(), Relaxed, Relaxed);
    }

    /// What the CPU is tied to; null for nothing.
    #[inline(always)]
    pub(crate) fn data(&self) -> *const () {
        self.data.load(Relaxed)
    }

    /// Where the last object of a cache's loaded magazine ends; [`Held::loaded`] has more to say.
    pub(crate) fn loaded_top(&self, id: u16) -> usize {
        self.loaded.top(id)
    }

    /// Where the slab layer keeps what else the CPU has of a cache.
    #[inline(always)]
    pub(crate) fn side(&self, id: u16) -> &AtomicPtr<()> {
        &self.sides[usize::from(id) % MAX_CACHES]
    }

    /// Whether the CPU ever had something of a cache.
    pub(crate) fn equipped(&self) -> bool {
        self.equipped.load(Relaxed)
    }

    pub(crate) fn set_equipped(&self, equipped: bool) {
        self.equipped.store(equipped, Relaxed);
    }

    /// Whether the task on the CPU has a scope, a cpuset, a policy or another speciality.
    #[inline(always)]
    pub(crate) fn task_is_special(&self) -> bool {
        // SAFETY: as in `current`; the pointer is never null.
        unsafe { (*self.task.load(Relaxed)).flags() != 0 }
    }

    /// The task that runs on the CPU.
    #[inline(always)]
    pub fn current(&self) -> Option<&Task> {
        let task = self.task.load(Relaxed).cast_const();
        if ptr::eq(task, &raw const NO_TASK) {
            return None;
        }
        // SAFETY: `set_current` is unsafe and demands that the task outlives its stay on the CPU;
        // this CPU's current task is running this very code.
        unsafe { task.as_ref() }
    }

    /// Names the task that runs on the CPU from now on.
    ///
    /// # Safety
    /// `task`, if not null, stays valid until another task is named, and the call is made on this CPU
    /// or while nothing runs on it.
    pub unsafe fn set_current(&self, task: *const Task) {
        let task = if task.is_null() { &raw const NO_TASK } else { task };
        self.task.store(task.cast_mut(), Relaxed);
    }
}

/// Stands for no task, so that the fast path need not ask whether there is one. Nobody is given a
/// reference to it, so its flags stay clear.
static NO_TASK: Task = Task::new();

/// Task flags that change what an allocation may do.
pub(crate) const PF_MEMALLOC: u32 = 1 << 0;
pub(crate) const PF_MEMALLOC_NOIO: u32 = 1 << 1;
pub(crate) const PF_MEMALLOC_NOFS: u32 = 1 << 2;
pub(crate) const PF_OOM_VICTIM: u32 = 1 << 3;
pub(crate) const PF_KSWAPD: u32 = 1 << 4;
/// The task's cpuset is not every node.
pub(crate) const PF_CPUSET: u32 = 1 << 5;
/// The task's memory policy is not the default.
pub(crate) const PF_POLICY: u32 = 1 << 6;

/// How a task spreads its allocations over nodes \[Z5\].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum MemPolicy {
    /// The CPU's own node first.
    #[default]
    Default,
    /// Only the nodes of the mask, nearest first.
    Bind(u64),
    /// The nodes of the mask in turn.
    Interleave(u64),
    /// One node first, then the others by distance.
    Preferred(u8),
}

/// Bytes of a task's name, as many as the kernel's (`TASK_COMM_LEN`), a zero byte at its end.
pub(crate) const COMM_LEN: usize = 16;

/// A task's name (`comm`): at most 15 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Comm([u8; COMM_LEN]);

impl Comm {
    /// As much of a name as there is room for. Control characters become question marks.
    pub fn new(name: &str) -> Comm {
        let mut comm = [0; COMM_LEN];
        let mut at = 0;
        for c in name.chars().map(|c| if c.is_control() { '?' } else { c }) {
            let Some(room) = comm[..COMM_LEN - 1].get_mut(at..at + c.len_utf8()) else { break };
            at += c.encode_utf8(room).len();
        }
        Comm(comm)
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        let len = self.0.iter().position(|byte| *byte == 0).unwrap_or(COMM_LEN);
        core::str::from_utf8(&self.0[..len]).unwrap_or("?")
    }

    pub(crate) fn words(self) -> [u64; 2] {
        let (low, high) = self.0.split_at(COMM_LEN / 2);
        [low, high].map(|half| half.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte)))
    }

    pub(crate) fn from_words(words: [u64; 2]) -> Comm {
        Comm(core::array::from_fn(|i| words[i / 8].to_le_bytes()[i % 8]))
    }
}

impl fmt::Display for Comm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for Comm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

/// Temporary mappings that a CPU can have at once (`KM_MAX_IDX`), a task's and those of what interrupted it together
/// \[H2\].
pub const KM_MAX_IDX: usize = 16;

/// What the allocator knows of a task: its number and name, scopes, cpuset, memory policy, and what it had mapped when
/// it went to sleep.
pub struct Task {
    flags: AtomicU32,
    interleave: AtomicU32,
    mems_allowed: AtomicU64,
    policy_mode: AtomicU32,
    policy_nodes: AtomicU64,
    pid: AtomicU32,
    comm: [AtomicU64; 2],
    /// Temporary mappings while the task does not run, and the CPU that has their places.
    kmaps: AtomicU32,
    kmap_cpu: AtomicU32,
    kmap: [AtomicU64; KM_MAX_IDX],
}

impl Default for Task {
    fn default() -> Self {
        Task::new()
    }
}

impl Task {
    /// A task without scopes, allowed on every node, with the default policy.
    pub const fn new() -> Task {
        Task {
            flags: AtomicU32::new(0),
            interleave: AtomicU32::new(0),
            mems_allowed: AtomicU64::new(u64::MAX),
            policy_mode: AtomicU32::new(0),
            policy_nodes: AtomicU64::new(0),
            pid: AtomicU32::new(0),
            comm: [const { AtomicU64::new(0) }; 2],
            kmaps: AtomicU32::new(0),
            kmap_cpu: AtomicU32::new(0),
            kmap: [const { AtomicU64::new(0) }; KM_MAX_IDX],
        }
    }

    /// Temporary mappings that the task keeps while it does not run: with any it must come back on the CPU that it left
    /// \[H2\]. 0 while it runs.
    pub fn local_maps(&self) -> usize {
        self.kmaps.load(Relaxed) as usize
    }

    /// Keeps mappings that a CPU's places had.
    pub(crate) fn keep_maps(&self, cpu: usize, maps: impl Iterator<Item = u64>) {
        let mut n = 0;
        for (place, map) in self.kmap.iter().zip(maps) {
            place.store(map, Relaxed);
            n += 1;
        }
        self.kmap_cpu.store(cpu as u32, Relaxed);
        self.kmaps.store(n, Relaxed);
    }

    /// Gives the mappings back, with the CPU whose places they were in.
    pub(crate) fn take_maps(&self) -> (usize, impl ExactSizeIterator<Item = u64> + '_) {
        let n = (self.kmaps.swap(0, Relaxed) as usize).min(KM_MAX_IDX);
        let cpu = self.kmap_cpu.load(Relaxed) as usize;
        (cpu, self.kmap[..n].iter().map(|map| map.load(Relaxed)))
    }

    #[inline(always)]
    pub(crate) fn flags(&self) -> u32 {
        self.flags.load(Relaxed)
    }

    /// The task's number, as page_owner tells it; 0 until it has one.
    pub fn pid(&self) -> u32 {
        self.pid.load(Relaxed)
    }

    /// Gives the task a number.
    pub fn set_pid(&self, pid: u32) {
        self.pid.store(pid, Relaxed);
    }

    /// The task's name, as page_owner tells it; empty until it has one.
    pub fn comm(&self) -> Comm {
        Comm::from_words([self.comm[0].load(Relaxed), self.comm[1].load(Relaxed)])
    }

    /// Names the task (`set_task_comm`). To be called by the task itself, or while it does not run.
    pub fn set_comm(&self, comm: Comm) {
        for (at, word) in self.comm.iter().zip(comm.words()) {
            at.store(word, Relaxed);
        }
    }

    fn save(&self, bit: u32) -> Saved {
        let old = self.flags.fetch_or(bit, Relaxed);
        Saved { had: old & bit, bit }
    }

    /// Opens a scope in which no allocation of the task starts block I/O \[G4\]
    /// ([GFP masks from FS/IO context](https://docs.kernel.org/core-api/gfp_mask-from-fs-io.html)).
    pub fn memalloc_noio_save(&self) -> Saved {
        self.save(PF_MEMALLOC_NOIO)
    }

    /// Opens a scope in which no allocation of the task calls into a file system \[G4\].
    pub fn memalloc_nofs_save(&self) -> Saved {
        self.save(PF_MEMALLOC_NOFS)
    }

    /// Opens a scope in which the task may use the reserves and does not reclaim \[C4\].
    pub fn memalloc_noreclaim_save(&self) -> Saved {
        self.save(PF_MEMALLOC)
    }

    /// Closes a scope. Scopes nest; close them in the reverse order of opening.
    pub fn memalloc_restore(&self, saved: Saved) {
        if saved.had == 0 {
            self.flags.fetch_and(!saved.bit, Relaxed);
        }
    }

    pub(crate) fn mark(&self, bit: u32, on: bool) {
        if on {
            self.flags.fetch_or(bit, Relaxed);
        } else {
            self.flags.fetch_and(!bit, Relaxed);
        }
    }

    /// Opens the reserves to the task because the OOM handler chose it, or closes them \[R3\].
    pub fn set_oom_victim(&self, victim: bool) {
        self.mark(PF_OOM_VICTIM, victim);
    }

    /// Whether the OOM handler chose the task.
    pub fn is_oom_victim(&self) -> bool {
        self.flags() & PF_OOM_VICTIM != 0
    }

    /// The nodes of the task's cpuset.
    #[inline(always)]
    pub fn mems_allowed(&self) -> NodeMask {
        NodeMask(self.mems_allowed.load(Relaxed))
    }

    /// Sets the nodes of the task's cpuset. An empty mask allows nothing to `__GFP_HARDWALL` requests.
    pub fn set_mems_allowed(&self, nodes: NodeMask) {
        self.mems_allowed.store(nodes.0, Relaxed);
        self.mark(PF_CPUSET, nodes != NodeMask::ALL);
    }

    /// The task's memory policy.
    pub fn mempolicy(&self) -> MemPolicy {
        let nodes = self.policy_nodes.load(Relaxed);
        match self.policy_mode.load(Relaxed) {
            1 => MemPolicy::Bind(nodes),
            2 => MemPolicy::Interleave(nodes),
            3 => MemPolicy::Preferred(nodes as u8),
            _ => MemPolicy::Default,
        }
    }

    /// Sets the task's memory policy. To be called by the task itself, or while it does not run.
    pub fn set_mempolicy(&self, policy: MemPolicy) {
        let (mode, nodes) = match policy {
            MemPolicy::Default => (0, 0),
            MemPolicy::Bind(n) => (1, n),
            MemPolicy::Interleave(n) => (2, n),
            MemPolicy::Preferred(n) => (3, u64::from(n)),
        };
        self.policy_nodes.store(nodes, Relaxed);
        self.policy_mode.store(mode, Relaxed);
        self.mark(PF_POLICY, mode != 0);
    }

    /// The next node of an interleave mask; `None` when the mask is empty.
    pub(crate) fn next_interleave(&self, nodes: u64) -> Option<usize> {
        let n = nodes.count_ones();
        if n == 0 {
            return None;
        }
        let turn = self.interleave.fetch_add(1, Relaxed) % n;
        let mut mask = nodes;
        for _ in 0..turn {
            mask &= mask - 1;
        }
        Some(mask.trailing_zeros() as usize)
    }
}

/// What a scope found when it opened; give it back to [`Task::memalloc_restore`].
#[must_use = "the scope stays open until it is restored"]
#[derive(Debug)]
pub struct Saved {
    had: u32,
    bit: u32,
}

/// The capability to sleep: process context with nothing held \[C2\].
///
/// A blocking allocation takes `&Process`. Entering an atomic section takes `&mut Process` and hands
/// the closure an [`Atomic`] instead, so nothing inside can reach the `Process`. It is neither `Send`
/// nor `Sync`: context belongs to the thread of execution.
pub struct Process {
    _not_send: PhantomData<*mut ()>,
}

impl Process {
    /// Claims process context.
    ///
    /// # Safety
    /// The caller runs in process context, holds no spin lock, and no other `Process` exists on this
    /// thread of execution for as long as this one does.
    pub const unsafe fn new() -> Process {
        Process { _not_send: PhantomData }
    }
}

/// The capability of an atomic section: may allocate, may not sleep.
///
/// Interrupt handlers are given one of their own.
#[derive(Clone, Copy)]
pub struct Atomic<'a> {
    _section: PhantomData<(&'a (), *mut ())>,
}

impl Atomic<'_> {
    /// An atomic capability. Claiming less than one may do is always sound.
    pub(crate) const fn new() -> Self {
        Atomic { _section: PhantomData }
    }

    /// The capability of an interrupt handler, for platforms to hand to handlers. Claiming that one
    /// may not sleep is always sound.
    pub fn interrupt<R>(f: impl FnOnce(Atomic<'_>) -> R) -> R {
        f(Atomic::new())
    }
}
