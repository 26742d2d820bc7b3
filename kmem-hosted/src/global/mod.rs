//! A program's global allocator \[O2\].
//!
//! # Concepts
//! 1. A process has one *global machine*: a [`Kmem`] over private anonymous memory, as large as the host's memory
//!    or as [`KmemGlobal::with_memory`] says. It takes host memory as it is touched. Nobody interrupts it: no
//!    signals, no kswapd; requests do not sleep, and fail when nothing is left.
//! 2. Threads come to it by themselves ([`seats`]): the first time one allocates it takes a *seat*, one of the
//!    machine's CPUs, and keeps it until it ends. When all are taken, further threads share a few seats, and
//!    hold one for the length of a call. A thread that ends gives its seat up after its own destructors have
//!    run; what allocates later still shares.
//! 3. A fork waits until no thread is inside a call ([`gate`]), so parent and child both go on with whole
//!    tables; the memory is private, so each has its own from then on.
//! 4. Blocks larger than the machine's largest ([`LARGEST`]) are mappings of their own ([`huge`]), as long as
//!    kmem has no vmalloc.
//!
//! # Implementation
//! Bring-up asks for no heap memory, so it cannot come back here: the first caller does it, others wait.
//! Layout alone says where memory is from, so a free looks nothing up but the object.
//!
//! A fast call is: the thread's seat, one count up, a look at the gate, kmalloc or kfree, the count down.
//!
//! # Limits
//! **Signal handlers** must not allocate, as with any allocator: the handler may have landed on a thread that
//! holds a lock of the machine, and nothing masks it.
//!
//! **Fork** is `fork()`. A child made by a bare `clone` system call must not allocate before it runs another
//! program, since nobody waited for the other threads.
//!
//! **Memory that is free stays the process's**, but for blocks of [`GIVE_BACK`] bytes and more, and for
//! [`KmemGlobal::trim`].
//!
//! # Locking
//! See [`gate`] and [`seats`].

mod bringup;
mod gate;
mod huge;
mod platform;
mod seats;

pub use platform::GlobalPlatform;

use core::{
    alloc::{GlobalAlloc, Layout},
    ptr::{self, NonNull},
};
use kmem::{Gfp, Kmem};
use rustix::mm::{self, Advice};

/// The machine's MAX_ORDER.
const MAX_ORDER: u32 = 10;
/// Bytes of the largest block of the machine; also its largest alignment.
pub(crate) const LARGEST: usize = 4096 << MAX_ORDER;
/// Freed blocks from this size on give their contents back to the host, and zeroed ones get them from it.
pub(crate) const GIVE_BACK: usize = 1 << 20;

/// Nobody reclaims in the background, nobody waits, and a refusal is the program's to report.
const FLAGS: Gfp = Gfp::NOWARN;

/// kmem as a program's global allocator.
///
/// ```
/// use kmem_hosted::KmemGlobal;
///
/// #[global_allocator]
/// static HEAP: KmemGlobal = KmemGlobal::new();
///
/// let words: Vec<String> = (0..1000).map(|n| n.to_string()).collect();
/// let objects = HEAP.with(|kmem| kmem.audit_objects().unwrap().live);
/// assert!(objects.unwrap() >= 1000);
/// # assert_eq!(words[999], "999");
/// ```
///
/// All values are handles to the same machine; the one used first says how large it is. Context: any thread,
/// at any time of its life, but no signal handler. Without memory the result is null.
pub struct KmemGlobal {
    memory: usize,
}

impl Default for KmemGlobal {
    fn default() -> Self {
        KmemGlobal::new()
    }
}

impl KmemGlobal {
    /// A machine as large as the host's memory.
    pub const fn new() -> KmemGlobal {
        KmemGlobal { memory: 0 }
    }

    /// A machine of `bytes`, rounded up to 2 MiB and at least 16 MiB. Blocks larger than 4 MiB are not taken from
    /// it.
    pub const fn with_memory(bytes: usize) -> KmemGlobal {
        KmemGlobal { memory: bytes }
    }

    /// Runs `f` on the machine, on the caller's CPU; `None` if there is no memory for a machine.
    ///
    /// A fork waits for `f`, so it should not wait for others. It may allocate.
    pub fn with<R>(&self, f: impl FnOnce(&Kmem<GlobalPlatform>) -> R) -> Option<R> {
        let _stay = seats::enter_any(self.memory)?;
        bringup::machine().map(f)
    }

    /// Gives the contents of free memory back to the host, as far as it lies in blocks of the largest size,
    /// and returns their bytes; 4 MiB a block, touched or not. Stops all threads that allocate meanwhile.
    pub fn trim(&self) -> usize {
        let mut bytes = 0;
        self.stopped(|kmem| {
            // The blocks taken are linked by frame number, as their contents go.
            let mut taken = 0;
            while let Ok(page) = kmem.alloc_pages(FLAGS, MAX_ORDER) {
                let Some(pfn) = kmem.page_to_pfn(page) else { break };
                if let Some(at) = kmem.page_address(page) {
                    // SAFETY: the block was just given to us.
                    bytes += if unsafe { give_back(at, LARGEST) } { LARGEST } else { 0 };
                }
                page.set_private(taken);
                // Frame 0 ends the list.
                taken = pfn.0 + 1;
            }
            while let Some(pfn) = taken.checked_sub(1) {
                let Some(page) = kmem.pfn_to_page(kmem::Pfn(pfn)) else { break };
                taken = page.private();
                page.set_private(0);
                let _ = kmem.__free_pages(page, MAX_ORDER);
            }
        });
        bytes
    }

    /// Runs `f` while no other thread is on the machine, with everything that lies on lists of CPUs given back.
    fn stopped(&self, f: impl FnOnce(&Kmem<GlobalPlatform>)) {
        let Some(_stay) = seats::enter_any(self.memory) else { return };
        let Some(kmem) = bringup::machine() else { return };
        let _closed = gate::close();
        kmem.drop_slab();
        kmem.drain_all_pages();
        f(kmem);
    }

    #[inline(always)]
    fn take(&self, layout: Layout, flags: Gfp) -> *mut u8 {
        if let Some(_stay) = seats::enter()
            && let Some(kmem) = bringup::machine()
            && let Ok(at) = kmem.kmalloc_layout(layout, flags)
        {
            return at.as_ptr();
        }
        self.take_any(layout, flags)
    }

    #[cold]
    #[inline(never)]
    fn take_any(&self, layout: Layout, flags: Gfp) -> *mut u8 {
        let at = self.with(|kmem| kmem.kmalloc_layout(layout, flags).ok()).flatten();
        at.map_or_else(|| self.take_hard(layout, flags), NonNull::as_ptr)
    }

    /// What is not to be had at first may be after others have given up what they keep for later.
    fn take_hard(&self, layout: Layout, flags: Gfp) -> *mut u8 {
        let mut at = ptr::null_mut();
        self.stopped(|kmem| {
            at = kmem.kmalloc_layout(layout, flags).map_or(ptr::null_mut(), NonNull::as_ptr);
        });
        at
    }

    /// # Safety
    /// `at` is the machine's, and nobody uses it any more.
    #[inline(always)]
    unsafe fn free(&self, at: *mut u8) {
        if let Some(_stay) = seats::enter()
            && let Some(kmem) = bringup::machine()
        {
            // A misuse is reported by the callee.
            // SAFETY: the caller's.
            let _ = unsafe { kmem.kfree(at) };
            return;
        }
        // SAFETY: the caller's.
        unsafe { self.free_any(at) };
    }

    /// # Safety
    /// As [`free`](Self::free).
    #[cold]
    #[inline(never)]
    unsafe fn free_any(&self, at: *mut u8) {
        // SAFETY: the caller's.
        self.with(|kmem| unsafe { kmem.kfree(at) });
    }

    /// Moves what is at `at` to memory for another layout.
    ///
    /// # Safety
    /// As `GlobalAlloc::realloc`.
    unsafe fn move_to(&self, at: *mut u8, old: Layout, layout: Layout) -> *mut u8 {
        // SAFETY: a layout with a size, as both have by the caller's contract.
        let new = unsafe { self.alloc(layout) };
        if !new.is_null() {
            // SAFETY: so many bytes are at both, the new ones nobody else's; the old ones are the caller's, who no
            // longer uses them.
            unsafe {
                new.copy_from_nonoverlapping(at, old.size().min(layout.size()));
                self.dealloc(at, old);
            }
        }
        new
    }
}

/// Whether a block is a mapping of its own.
#[inline(always)]
const fn is_huge(layout: Layout) -> bool {
    layout.size() > LARGEST || layout.align() > LARGEST
}

/// Gives the contents of whole pages back to the host; they read as zeros. `false`, and nothing changed, if the host
/// does not take them, as where the process has locked its memory.
///
/// # Safety
/// The memory is the machine's, and nobody uses it.
unsafe fn give_back(at: NonNull<u8>, bytes: usize) -> bool {
    // SAFETY: private anonymous memory, of which nobody needs the contents.
    unsafe { mm::madvise(at.as_ptr().cast(), bytes, Advice::LinuxDontNeed) }.is_ok()
}

// SAFETY: kmalloc's memory and mappings are as large as asked and aligned as the layout says, and nobody else's
// until they are freed. Nothing unwinds: requests have no handlers that could.
unsafe impl GlobalAlloc for KmemGlobal {
    #[inline]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if is_huge(layout) {
            return huge::map(layout);
        }
        self.take(layout, FLAGS)
    }

    #[inline]
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        if layout.size() >= GIVE_BACK || is_huge(layout) {
            // SAFETY: the caller's.
            return unsafe { self.dealloc_large(at, layout) };
        }
        // SAFETY: the caller's.
        unsafe { self.free(at) };
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if is_huge(layout) {
            return huge::map(layout);
        }
        if layout.size() < GIVE_BACK {
            return self.take(layout, FLAGS | Gfp::ZERO);
        }
        let at = self.take(layout, FLAGS);
        if let Some(block) = NonNull::new(at) {
            // SAFETY: just given to us, whole pages of a block of its own.
            unsafe {
                if !give_back(block, layout.size().next_multiple_of(4096)) {
                    block.write_bytes(0, layout.size());
                }
            }
        }
        at
    }

    #[inline]
    unsafe fn realloc(&self, at: *mut u8, old: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller sees to it that this is a layout.
        let layout = unsafe { Layout::from_size_align_unchecked(size, old.align()) };
        match (is_huge(old), is_huge(layout)) {
            // SAFETY: the caller's; the block is a mapping.
            (true, true) => unsafe { huge::remap(at, old, size) },
            (false, false) => {
                // SAFETY: the caller's; both are the machine's.
                unsafe { self.realloc_inside(at, old, layout) }
            }
            // SAFETY: the caller's.
            _ => unsafe { self.move_to(at, old, layout) },
        }
    }
}

impl KmemGlobal {
    /// # Safety
    /// As `dealloc`.
    #[cold]
    #[inline(never)]
    unsafe fn dealloc_large(&self, at: *mut u8, layout: Layout) {
        if is_huge(layout) {
            // SAFETY: the caller's; the block is a mapping.
            return unsafe { huge::unmap(at, layout) };
        }
        if let Some(block) = NonNull::new(at) {
            // SAFETY: a block of its own that the caller no longer uses.
            unsafe { give_back(block, layout.size().next_multiple_of(4096)) };
        }
        // SAFETY: the caller's.
        unsafe { self.free_any(at) };
    }

    /// # Safety
    /// As `realloc`, and neither layout is huge.
    unsafe fn realloc_inside(&self, at: *mut u8, old: Layout, layout: Layout) -> *mut u8 {
        let room = match seats::enter() {
            Some(_stay) => bringup::machine().and_then(|kmem| kmem.ksize(at)),
            None => self.with(|kmem| kmem.ksize(at)).flatten(),
        };
        let size = layout.size();
        match room {
            // It fits and wastes less than half.
            Some(room) if size <= room && (size > room / 2 || size >= old.size()) => at,
            Some(_) => {
                // SAFETY: the caller's.
                let new = unsafe { self.move_to(at, old, layout) };
                if new.is_null() && size <= old.size() { at } else { new }
            }
            // Not ours: the machine reports it when it is freed.
            None => ptr::null_mut(),
        }
    }
}
