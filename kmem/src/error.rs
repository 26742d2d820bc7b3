//! What can go wrong, as values.
//!
//! # Concepts
//! Exhaustion and refusal are [`AllocError`]; a mistake in giving memory back is [`Misuse`]. Both are
//! returned; a misuse is also reported, with what was misused and where, and leaves memory intact \[P5\].

use crate::{gfp::GfpError, page::PageFlags, types::Pfn};
use core::{
    fmt,
    ptr::{self, NonNull},
};

/// Why there is no memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AllocError {
    /// None left after the retries that the flags allow.
    NoMemory,
    /// The flags or the order contradict themselves \[G3\].
    Invalid(GfpError),
    /// The request may sleep and its context may not, or it comes from an NMI \[C1\].
    Context,
}

impl fmt::Display for AllocError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AllocError::NoMemory => f.write_str("out of memory"),
            AllocError::Invalid(e) => write!(f, "invalid request: {e}"),
            AllocError::Context => {
                f.write_str("sleeping allocation in a context that cannot sleep")
            }
        }
    }
}

impl core::error::Error for AllocError {}

/// The result of an allocation in one register: its address or, instead of one of the lowest, which are nobody's, the
/// number of an error. What the slow paths return to the fast ones, where it is looked at once.
#[derive(Clone, Copy)]
pub(crate) struct Answer(*mut u8);

impl Answer {
    const NO_MEMORY: usize = GfpError::ALL.len();
    const CONTEXT: usize = GfpError::ALL.len() + 1;
    /// Addresses from here on are addresses.
    const FIRST: usize = 16;

    /// That it was given.
    #[inline(always)]
    pub(crate) fn given(at: NonNull<u8>) -> Answer {
        debug_assert!(at.addr().get() >= Answer::FIRST);
        Answer(at.as_ptr())
    }

    #[inline(always)]
    pub(crate) fn result(self) -> Result<NonNull<u8>, AllocError> {
        match NonNull::new(self.0) {
            Some(at) if at.addr().get() >= Answer::FIRST => Ok(at),
            _ => Err(Answer::error(self.0.addr())),
        }
    }

    #[cold]
    #[inline(never)]
    fn error(number: usize) -> AllocError {
        match (number, GfpError::ALL.get(number)) {
            (_, Some(e)) => AllocError::Invalid(*e),
            (Answer::CONTEXT, _) => AllocError::Context,
            _ => AllocError::NoMemory,
        }
    }
}

impl From<Result<NonNull<u8>, AllocError>> for Answer {
    fn from(result: Result<NonNull<u8>, AllocError>) -> Answer {
        let number = match result {
            Ok(at) => return Answer::given(at),
            Err(AllocError::Invalid(e)) => e as usize,
            Err(AllocError::NoMemory) => Answer::NO_MEMORY,
            Err(AllocError::Context) => Answer::CONTEXT,
        };
        Answer(ptr::without_provenance_mut(number))
    }
}

const _: () = assert!(Answer::CONTEXT < Answer::FIRST);

impl From<GfpError> for AllocError {
    fn from(e: GfpError) -> Self {
        AllocError::Invalid(e)
    }
}

/// A mistake in giving memory back, or in using it \[P5, S9\]. Where a call returns it nothing was changed, unless
/// the variant says otherwise.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Misuse {
    /// The block has another order.
    WrongOrder {
        /// First frame of the block.
        pfn: Pfn,
        /// The order the caller gave.
        given: u32,
        /// The order it was allocated with.
        actual: u32,
    },
    /// The frame is inside a live block.
    TailPage {
        /// The frame.
        pfn: Pfn,
        /// First frame of the block.
        head: Pfn,
        /// Order of the block.
        order: u32,
    },
    /// The block is free already: freed twice, or its reference count would underflow.
    DoubleFree {
        /// First frame of the block.
        pfn: Pfn,
    },
    /// The frame was never the allocator's to hand out.
    NeverAllocated {
        /// The frame.
        pfn: Pfn,
    },
    /// The page is still mapped.
    StillMapped {
        /// First frame of the block.
        pfn: Pfn,
        /// Mappings.
        mapcount: u32,
    },
    /// The page still belongs to an address space.
    StillInMapping {
        /// First frame of the block.
        pfn: Pfn,
        /// Handle of the address space.
        mapping: u32,
    },
    /// Flags say that the page is in use.
    StillInUse {
        /// First frame of the block.
        pfn: Pfn,
        /// Those flags.
        flags: PageFlags,
    },
    /// The page is not in this machine's memory map.
    NotAPage,
    /// The address is not in the direct map, or not at the start of a frame.
    BadAddress {
        /// The address.
        addr: usize,
    },
    /// The order is above the machine's MAX_ORDER.
    BadOrder {
        /// The order.
        order: u32,
    },
    /// A reference was taken on, or a split asked for, a page that is not allocated.
    NotAllocated {
        /// The frame.
        pfn: Pfn,
    },
    /// The page is shared where an exclusive one is needed.
    Shared {
        /// The frame.
        pfn: Pfn,
        /// References held.
        count: u32,
    },
    /// An NMI handler tried to free memory.
    InNmi,
    /// The object is free already, in its slab or in a magazine \[S9\].
    ObjectFree {
        /// Its address.
        addr: usize,
        /// Its cache.
        cache: Name,
    },
    /// There is an object at the address, of another cache than the one it is freed to \[S9\].
    WrongCache {
        /// The address.
        addr: usize,
        /// The cache the caller named.
        given: Name,
        /// The cache the object is from.
        actual: Name,
    },
    /// The address is inside a slab and not the beginning of an object \[S9\].
    InsideObject {
        /// The address.
        addr: usize,
        /// The cache whose slab it is.
        cache: Name,
    },
    /// Somebody wrote behind an object \[S9\]. Found when it is freed, it is freed and kept from use (one of KFENCE's
    /// pool until its turn comes again);
    /// found while it is in use, it stays its owner's.
    Overrun {
        /// The object's address.
        addr: usize,
        /// Its cache.
        cache: Name,
        /// The first byte that was written to, from the object's beginning.
        offset: i32,
        /// What is there.
        found: u8,
    },
    /// Somebody wrote before an object \[S9\]; else as [`Overrun`](Misuse::Overrun).
    Underrun {
        /// The object's address.
        addr: usize,
        /// Its cache.
        cache: Name,
        /// The last byte that was written to, from the object's beginning.
        offset: i32,
        /// What is there.
        found: u8,
    },
    /// Somebody wrote to an object after it was freed \[S9\]. It is kept from use.
    WrittenAfterFree {
        /// The object's address.
        addr: usize,
        /// Its cache.
        cache: Name,
        /// The first byte that was written to, from the object's beginning.
        offset: i32,
        /// What is there.
        found: u8,
    },
    /// What is counted of a slab's free objects is not what their states say; the count was made to agree.
    SlabDamaged {
        /// Its cache.
        cache: Name,
        /// Its first frame.
        pfn: Pfn,
        /// Free objects as counted.
        counted: u32,
        /// Free objects by their states.
        found: u32,
    },
    /// Nothing that the slab layer gave out begins at the address \[S9\].
    NotAnObject {
        /// The address.
        addr: usize,
    },
    /// The object waits for its readers already (`kfree_rcu`).
    FreedLater {
        /// Its address.
        addr: usize,
    },
    /// What `kfree_rcu` needs of an object is not in it, or not aligned to a word.
    BadRcuHead {
        /// The object's address.
        addr: usize,
        /// The offset that was named.
        head: usize,
    },
    /// The platform has no grace periods to wait for.
    NoGracePeriods,
    /// The call sleeps, and its context may not \[C1\].
    AtomicContext,
    /// Nothing is allocated at the per-CPU address; it may have been freed before.
    PerCpuFree {
        /// The address.
        addr: usize,
    },
    /// The per-CPU address is inside of what was allocated at another one.
    InsidePerCpu {
        /// The address.
        addr: usize,
    },
    /// The address is no per-CPU address that was given out.
    NotPerCpu {
        /// The address.
        addr: usize,
    },
    /// The address of one CPU's instance was used on another one \[U3\].
    Migrated {
        /// The CPU whose instance it is.
        from: usize,
        /// The CPU it was used on, if any.
        to: Option<usize>,
    },
    /// The number of the running CPU was asked for where the caller can come to another one at any time
    /// \[U3\].
    Preemptible,
    /// The address is in the vmalloc range, where one of the direct map is needed \[V2\].
    VmallocAddress {
        /// The address.
        addr: usize,
    },
    /// No area of the vmalloc range is at the address \[V1\].
    NoArea {
        /// The address.
        addr: usize,
    },
    /// The address is inside an area, or its guard, and not the beginning.
    InsideArea {
        /// The address.
        addr: usize,
        /// Where the area begins.
        start: usize,
    },
    /// The area was freed already.
    AreaFree {
        /// Its address.
        addr: usize,
    },
    /// Memory was taken for a device.
    IoremapOfMemory {
        /// The frame.
        pfn: Pfn,
    },
    /// The area is freed by another call.
    WrongArea {
        /// Its address.
        addr: usize,
        /// The call that was made.
        given: &'static str,
        /// The call that frees it.
        right: &'static str,
    },
    /// The high page is not mapped by kmap: unmapped twice, or never mapped \[H1\].
    NotKmapped {
        /// The frame.
        pfn: Pfn,
    },
    /// The platform has no address for the frame and no way to map it.
    NoAddress {
        /// The frame.
        pfn: Pfn,
    },
    /// A temporary mapping was asked for by a caller on no CPU.
    NoCpu,
    /// The CPU's places for temporary mappings are all used: they are nested too deeply \[H2\].
    LocalDepth {
        /// The CPU.
        cpu: usize,
    },
    /// The purpose has its temporary mapping on the CPU already \[H2\].
    KmTypeInUse {
        /// The purpose.
        purpose: &'static str,
        /// The CPU.
        cpu: usize,
    },
    /// No temporary mapping of the running CPU is at the address.
    NotLocalMap {
        /// The address.
        addr: usize,
    },
    /// A temporary mapping is undone before those that were made after it \[H2\].
    LocalOrder {
        /// The address.
        addr: usize,
        /// The one that is to be undone first.
        last: usize,
    },
    /// The mapping is undone by another call.
    WrongUnmap {
        /// Its address.
        addr: usize,
        /// The call that was made.
        given: &'static str,
        /// The call that undoes it.
        right: &'static str,
    },
    /// A temporary mapping that keeps its holder on the CPU was undone after preemption was on again.
    SectionOver {
        /// The address.
        addr: usize,
    },
    /// Code without a task slept with temporary mappings, or a task ended with some. They are gone.
    LocalMapsLeft {
        /// The CPU.
        cpu: usize,
        /// Mappings.
        maps: usize,
    },
    /// A task with temporary mappings came to another CPU. They are gone.
    LocalMapsMoved {
        /// Where they were made.
        from: usize,
        /// Where the task is.
        to: usize,
    },
    /// A temporary mapping's address was taken for one that leads to its page on any CPU.
    LocalAddress {
        /// The address.
        addr: usize,
    },
    /// A block has no such frame.
    OutsideBlock {
        /// The block's first frame.
        pfn: Pfn,
        /// Its order.
        order: u32,
        /// Where the frame would begin, in bytes.
        offset: usize,
    },
    /// A page has no such bytes.
    OutsidePage {
        /// The first byte.
        offset: usize,
        /// How many.
        len: usize,
    },
    /// The end of a kernel stack was overwritten: it was too small \[K1\]. Found when it is freed, it is freed all the
    /// same.
    StackOverrun {
        /// Its lowest address.
        addr: usize,
        /// What is where `STACK_END_MAGIC` should be.
        found: usize,
    },
    /// No kernel stack begins at the address \[K1\]; it may have been freed before.
    NotAStack {
        /// The address.
        addr: usize,
    },
}

/// The name of a cache, at most 31 bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Name {
    bytes: [u8; 31],
    len: u8,
}

impl Name {
    /// `None` for an empty name, one that is too long, and one with blanks or control characters: tools
    /// take a name to be one word.
    pub(crate) const fn new(name: &str) -> Option<Name> {
        let from = name.as_bytes();
        let mut bytes = [0; 31];
        if from.is_empty() || from.len() > bytes.len() {
            return None;
        }
        let mut i = 0;
        while i < from.len() {
            if from[i] <= b' ' || from[i] == 0x7f {
                return None;
            }
            bytes[i] = from[i];
            i += 1;
        }
        Some(Name { bytes, len: from.len() as u8 })
    }

    /// As words, for those who keep it in atomics.
    pub(crate) fn to_words(self) -> [u64; 4] {
        core::array::from_fn(|i| {
            let byte = |n| self.bytes.get(n).copied().unwrap_or(self.len);
            u64::from_le_bytes(core::array::from_fn(|j| byte(8 * i + j)))
        })
    }

    /// What [`to_words`](Self::to_words) gave; of other words a name of some kind.
    pub(crate) fn from_words(words: [u64; 4]) -> Name {
        let byte = |n: usize| words[n / 8].to_le_bytes()[n % 8];
        Name { bytes: core::array::from_fn(byte), len: byte(31) }
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        let bytes = self.bytes.get(..usize::from(self.len)).unwrap_or_default();
        core::str::from_utf8(bytes).unwrap_or_default()
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

impl Misuse {
    /// The frame that a mistake with pages is about.
    pub(crate) const fn frame(&self) -> Option<Pfn> {
        match *self {
            Misuse::WrongOrder { pfn, .. }
            | Misuse::TailPage { pfn, .. }
            | Misuse::DoubleFree { pfn }
            | Misuse::NeverAllocated { pfn }
            | Misuse::StillMapped { pfn, .. }
            | Misuse::StillInMapping { pfn, .. }
            | Misuse::StillInUse { pfn, .. }
            | Misuse::NotAllocated { pfn }
            | Misuse::Shared { pfn, .. }
            | Misuse::NotKmapped { pfn }
            | Misuse::NoAddress { pfn }
            | Misuse::OutsideBlock { pfn, .. } => Some(pfn),
            _ => None,
        }
    }

    /// What is wrong with it, as the kernel's reports begin.
    pub(crate) const fn subject(&self) -> &'static str {
        match self {
            Misuse::ObjectFree { .. }
            | Misuse::WrongCache { .. }
            | Misuse::InsideObject { .. }
            | Misuse::Overrun { .. }
            | Misuse::Underrun { .. }
            | Misuse::WrittenAfterFree { .. }
            | Misuse::FreedLater { .. }
            | Misuse::BadRcuHead { .. }
            | Misuse::NoGracePeriods
            | Misuse::NotAnObject { .. } => "Bad object",
            Misuse::SlabDamaged { .. } => "Bad slab",
            Misuse::PerCpuFree { .. }
            | Misuse::InsidePerCpu { .. }
            | Misuse::NotPerCpu { .. }
            | Misuse::Migrated { .. } => "Bad per-CPU address",
            Misuse::Preemptible | Misuse::AtomicContext => "Bad context",
            Misuse::VmallocAddress { .. }
            | Misuse::NoArea { .. }
            | Misuse::InsideArea { .. }
            | Misuse::AreaFree { .. }
            | Misuse::IoremapOfMemory { .. }
            | Misuse::WrongArea { .. } => "Bad vmalloc address",
            Misuse::NotKmapped { .. }
            | Misuse::NoAddress { .. }
            | Misuse::NoCpu
            | Misuse::LocalDepth { .. }
            | Misuse::KmTypeInUse { .. }
            | Misuse::NotLocalMap { .. }
            | Misuse::LocalOrder { .. }
            | Misuse::WrongUnmap { .. }
            | Misuse::SectionOver { .. }
            | Misuse::LocalMapsLeft { .. }
            | Misuse::LocalMapsMoved { .. }
            | Misuse::LocalAddress { .. }
            | Misuse::OutsideBlock { .. }
            | Misuse::OutsidePage { .. } => "Bad kmap",
            Misuse::StackOverrun { .. } => "corrupted stack end detected",
            Misuse::NotAStack { .. } => "Bad kernel stack",
            _ => "Bad page state",
        }
    }
}

impl fmt::Display for Misuse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Misuse::WrongOrder { pfn, given, actual } => {
                write!(f, "pfn:{pfn} freed with order {given}, allocated with order {actual}")
            }
            Misuse::TailPage { pfn, head, order } => {
                write!(f, "pfn:{pfn} is a tail page of the order-{order} block at pfn:{head}")
            }
            Misuse::DoubleFree { pfn } => write!(f, "pfn:{pfn} is free already (double free)"),
            Misuse::NeverAllocated { pfn } => write!(f, "pfn:{pfn} was never allocated"),
            Misuse::StillMapped { pfn, mapcount } => {
                write!(f, "pfn:{pfn} is still mapped (mapcount:{mapcount})")
            }
            Misuse::StillInMapping { pfn, mapping } => {
                write!(f, "pfn:{pfn} still belongs to mapping {mapping:#x}")
            }
            Misuse::StillInUse { pfn, flags } => write!(f, "pfn:{pfn} is still in use: {flags:?}"),
            Misuse::NotAPage => f.write_str("not a page of this machine"),
            Misuse::BadAddress { addr } => write!(f, "address {addr:#x} is not that of a page"),
            Misuse::BadOrder { order } => write!(f, "order {order} does not exist"),
            Misuse::NotAllocated { pfn } => write!(f, "pfn:{pfn} is not allocated"),
            Misuse::Shared { pfn, count } => write!(f, "pfn:{pfn} has {count} references"),
            Misuse::InNmi => f.write_str("memory freed in an NMI handler"),
            Misuse::ObjectFree { addr, cache } => {
                write!(f, "object {addr:#x} of {cache} is free already (double free)")
            }
            Misuse::WrongCache { addr, given, actual } => {
                write!(f, "object {addr:#x} of {actual} freed to {given}")
            }
            Misuse::InsideObject { addr, cache } => {
                write!(f, "address {addr:#x} is inside an object of {cache}")
            }
            Misuse::Overrun { addr, cache, offset, found } => {
                write!(f, "object {addr:#x} of {cache} was overrun: {found:#04x} at byte {offset}")
            }
            Misuse::Underrun { addr, cache, offset, found } => {
                write!(f, "object {addr:#x} of {cache} was underrun: {found:#04x} at byte {offset}")
            }
            Misuse::WrittenAfterFree { addr, cache, offset, found } => {
                write!(f, "object {addr:#x} of {cache} was written to after it was freed: ")?;
                write!(f, "{found:#04x} at byte {offset}")
            }
            Misuse::SlabDamaged { cache, pfn, counted, found } => {
                write!(
                    f,
                    "slab pfn:{pfn} of {cache}: {counted} free objects counted, {found} found"
                )
            }
            Misuse::NotAnObject { addr } => write!(f, "address {addr:#x} is not that of an object"),
            Misuse::FreedLater { addr } => {
                write!(f, "object {addr:#x} waits for its readers already (double free)")
            }
            Misuse::BadRcuHead { addr, head } => {
                write!(f, "object {addr:#x} has no room for an rcu_head at byte {head}")
            }
            Misuse::AtomicContext => f.write_str("a call that sleeps in atomic context"),
            Misuse::NoGracePeriods => f.write_str("the platform has no grace periods"),
            Misuse::PerCpuFree { addr } => {
                write!(f, "nothing is allocated at per-CPU address {addr:#x} (double free?)")
            }
            Misuse::InsidePerCpu { addr } => {
                write!(f, "per-CPU address {addr:#x} is inside of what begins elsewhere")
            }
            Misuse::NotPerCpu { addr } => write!(f, "address {addr:#x} is no per-CPU address"),
            Misuse::Migrated { from, to: Some(to) } => {
                write!(f, "the instance of CPU {from} was used on CPU {to}")
            }
            Misuse::Migrated { from, to: None } => {
                write!(f, "the instance of CPU {from} was used on no CPU")
            }
            Misuse::Preemptible => f.write_str("using smp_processor_id() in preemptible code"),
            Misuse::VmallocAddress { addr } => {
                write!(f, "address {addr:#x} is in the vmalloc range, not in the direct map")
            }
            Misuse::NoArea { addr } => write!(f, "there is no area at {addr:#x}"),
            Misuse::InsideArea { addr, start } => {
                write!(f, "address {addr:#x} is inside the area at {start:#x}")
            }
            Misuse::AreaFree { addr } => {
                write!(f, "the area at {addr:#x} is free already (double free)")
            }
            Misuse::IoremapOfMemory { pfn } => write!(f, "ioremap on RAM: pfn:{pfn} is memory"),
            Misuse::WrongArea { addr, given, right } => {
                write!(f, "the area at {addr:#x} was given to {given} and is freed by {right}")
            }
            Misuse::NotKmapped { pfn } => write!(f, "pfn:{pfn} is not mapped (kunmap twice?)"),
            Misuse::NoAddress { pfn } => write!(f, "pfn:{pfn} cannot be mapped on this platform"),
            Misuse::NoCpu => f.write_str("a temporary mapping on no CPU"),
            Misuse::LocalDepth { cpu } => {
                write!(f, "all temporary mappings of CPU {cpu} are used")
            }
            Misuse::KmTypeInUse { purpose, cpu } => {
                write!(f, "{purpose} is in use on CPU {cpu} already")
            }
            Misuse::NotLocalMap { addr } => {
                write!(f, "no temporary mapping of this CPU is at {addr:#x}")
            }
            Misuse::LocalOrder { addr, last } => {
                write!(f, "the mapping at {addr:#x} is undone before the later one at {last:#x}")
            }
            Misuse::WrongUnmap { addr, given, right } => {
                write!(f, "the mapping at {addr:#x} was given to {given} and is undone by {right}")
            }
            Misuse::SectionOver { addr } => {
                write!(f, "the atomic mapping at {addr:#x} outlived its section")
            }
            Misuse::LocalMapsLeft { cpu, maps } => {
                write!(f, "{maps} temporary mappings were left behind on CPU {cpu}")
            }
            Misuse::LocalMapsMoved { from, to } => {
                write!(f, "a task with temporary mappings on CPU {from} came to CPU {to}")
            }
            Misuse::LocalAddress { addr } => {
                write!(f, "address {addr:#x} is a temporary mapping's, of one CPU only")
            }
            Misuse::OutsideBlock { pfn, order, offset } => {
                write!(f, "the order-{order} block at pfn:{pfn} has no frame at byte {offset}")
            }
            Misuse::OutsidePage { offset, len } => {
                write!(f, "{len} bytes from {offset} on are not inside of a page")
            }
            Misuse::StackOverrun { addr, found } => {
                write!(f, "the stack at {addr:#x} was overrun: {found:#x} at its end")
            }
            Misuse::NotAStack { addr } => {
                write!(f, "no kernel stack begins at {addr:#x} (double free?)")
            }
        }
    }
}

impl core::error::Error for Misuse {}
