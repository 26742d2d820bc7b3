//! The byte allocators that kmem is compared with.
//!
//! # Concepts
//! Those written in C are used through their own functions, next to the host's malloc, which stays glibc's. The
//! others manage address space that takes host memory when touched.
//!
//! # Locking
//! Those in C and buddy-slab-allocator's bring their own; the others are behind [`Locked`](crate::Locked).

use super::Bytes;
use crate::{PAGE_SIZE, peers::Area};
use anyhow::{Context, Result, anyhow, bail};
use ax_sync::interface::{AcquireResult, ContextState, LockMetadata, SpinOps};
use buddy_slab_allocator::{
    GlobalAllocator, PerCpuSlab, SlabPoolTrait, StaticSlabPool, interface::BuddySlabIf,
};
use std::{
    alloc::Layout,
    cell::Cell,
    hint,
    panic::Location,
    ptr::{self, NonNull},
    slice,
    sync::{
        OnceLock,
        atomic::{
            AtomicBool,
            Ordering::{Acquire, Relaxed, Release},
        },
    },
};
use talc::{DefaultBinning, base::Talc, source::Manual};

const PAGE: usize = PAGE_SIZE as usize;

/// CPUs of buddy-slab-allocator's pool.
const CPUS: usize = 2;

/// Layout of a request: aligned for any word, as malloc's is.
#[inline(always)]
fn layout(size: usize) -> Option<Layout> {
    Layout::from_size_align(size, 8).ok()
}

fn or_null(at: Option<NonNull<u8>>) -> *mut u8 {
    at.map_or(ptr::null_mut(), NonNull::as_ptr)
}

/// An allocator written in C.
macro_rules! in_c {
    ($(#[$doc:meta])* $name:ident, $alloc:path, $free:path) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug)]
        pub struct $name;

        // SAFETY: as C's malloc, any thread may free.
        unsafe impl Bytes for $name {
            #[inline(always)]
            fn alloc(&mut self, size: usize) -> *mut u8 {
                // SAFETY: any size may be asked for.
                unsafe { $alloc(size) }.cast()
            }

            #[inline(always)]
            unsafe fn free(&mut self, at: *mut u8, _size: usize) {
                // SAFETY: the caller's.
                unsafe { $free(at.cast()) };
            }
        }
    };
}

in_c!(
    /// The host's malloc.
    Glibc, libc::malloc, libc::free
);
in_c!(
    /// jemalloc.
    Jemalloc, tikv_jemalloc_sys::malloc, tikv_jemalloc_sys::free
);
in_c!(
    /// mimalloc.
    Mimalloc, libmimalloc_sys::mi_malloc, libmimalloc_sys::mi_free
);
in_c!(
    /// rpmalloc, for threads that have a [`Presence`].
    Rpmalloc, rpmalloc_sys::rpmalloc, rpmalloc_sys::rpfree
);

thread_local! {
    /// The thread's number, as buddy-slab-allocator's CPU.
    static CPU: Cell<usize> = const { Cell::new(0) };
}

fn this_cpu() -> usize {
    CPU.get()
}

/// A thread's presence with the allocators that must know of it.
#[derive(Debug)]
pub struct Presence(());

impl Presence {
    /// Announces the calling thread as number `thread`, which no other has.
    ///
    /// # Errors
    /// There are too many threads, or rpmalloc has no memory.
    pub fn new(thread: usize) -> Result<Presence> {
        if thread >= CPUS {
            bail!("thread {thread} of {CPUS}");
        }
        static RPMALLOC: OnceLock<i32> = OnceLock::new();
        // SAFETY: called once in the process.
        if *RPMALLOC.get_or_init(|| unsafe { rpmalloc_sys::rpmalloc_initialize() }) != 0 {
            bail!("rpmalloc cannot start");
        }
        // SAFETY: rpmalloc has started, and takes this for a thread that has it already.
        unsafe { rpmalloc_sys::rpmalloc_thread_initialize() };
        CPU.set(thread);
        Ok(Presence(()))
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        // SAFETY: the thread was announced; what it allocated lives on.
        unsafe { rpmalloc_sys::rpmalloc_thread_finalize() };
    }
}

static POOL: StaticSlabPool<PAGE, CPUS> =
    StaticSlabPool::new([PerCpuSlab::new(0), PerCpuSlab::new(1)], this_cpu);

/// What buddy-slab-allocator asks of the kernel around it: addresses, CPUs, and spin locks, which are plain
/// ones here, as the other peers have around them.
struct Platform;

#[ax_crate_interface::impl_interface]
impl BuddySlabIf for Platform {
    fn virt_to_phys(vaddr: usize) -> usize {
        vaddr
    }

    fn slab_pool() -> &'static dyn SlabPoolTrait {
        &POOL
    }
}

#[ax_crate_interface::impl_interface]
impl SpinOps for Platform {
    fn acquire(
        locked: &AtomicBool,
        _metadata: &LockMetadata,
        _lock_addr: usize,
        _context: u8,
        _subclass: u32,
        _caller: &'static Location<'static>,
    ) -> ContextState {
        while locked.compare_exchange_weak(false, true, Acquire, Relaxed).is_err() {
            while locked.load(Relaxed) {
                hint::spin_loop();
            }
        }
        ContextState::new(0, 0)
    }

    fn try_acquire(
        locked: &AtomicBool,
        _metadata: &LockMetadata,
        _lock_addr: usize,
        _context: u8,
        _subclass: u32,
        _caller: &'static Location<'static>,
    ) -> AcquireResult {
        let acquired = locked.compare_exchange(false, true, Acquire, Relaxed).is_ok();
        AcquireResult::new(acquired, ContextState::new(0, 0))
    }

    fn release(locked: &AtomicBool, _lock_addr: usize, _context: u8, _state: ContextState) {
        locked.store(false, Release);
    }

    fn force_release(locked: &AtomicBool, _lock_addr: usize, _context: u8) {
        locked.store(false, Release);
    }

    fn is_locked(locked: &AtomicBool) -> bool {
        locked.load(Relaxed)
    }
}

/// `buddy-slab-allocator`'s `GlobalAllocator`, for threads that have a [`Presence`].
#[derive(Clone, Copy)]
pub struct GlobalSlab(&'static GlobalAllocator<PAGE>);

/// The one there can be, of `bytes`. It stays: its slabs are in a static pool.
///
/// # Errors
/// It was made before, there is no address space, or the allocator refuses it.
pub fn global_slab(bytes: u64) -> Result<GlobalSlab> {
    static ONE: GlobalAllocator<PAGE> = GlobalAllocator::new();
    let area = Area::new(bytes)?;
    // SAFETY: the range is mapped, zero-filled, used by nobody else, and not unmapped if it is taken.
    let made = unsafe { ONE.init(slice::from_raw_parts_mut(area.start.cast(), area.bytes)) };
    made.map_err(|e| anyhow!("buddy-slab-allocator refuses {bytes} bytes: {e:?}"))?;
    std::mem::forget(area);
    Ok(GlobalSlab(&ONE))
}

// SAFETY: what the allocator hands out is memory of the area; it takes frees from any thread.
unsafe impl Bytes for GlobalSlab {
    #[inline]
    fn alloc(&mut self, size: usize) -> *mut u8 {
        or_null(layout(size).and_then(|layout| self.0.alloc(layout).ok()))
    }

    #[inline]
    unsafe fn free(&mut self, at: *mut u8, size: usize) {
        if let (Some(at), Some(layout)) = (NonNull::new(at), layout(size)) {
            // SAFETY: the caller's; the layout is the one it was allocated with.
            unsafe { self.0.dealloc(at, layout) };
        }
    }
}

/// `slab_allocator_rs`: a list per power of two, each with an eighth of the memory.
pub struct SlabHeap {
    heap: slab_allocator_rs::Heap,
    _area: Area,
}

// SAFETY: the heap's pointers lead into the area, which moves along with it.
unsafe impl Send for SlabHeap {}

impl SlabHeap {
    /// An allocator of `bytes`.
    pub fn new(bytes: u64) -> Result<SlabHeap> {
        let area = Area::new(bytes)?;
        // SAFETY: the range is mapped and used by nobody else while the value lives.
        let heap =
            unsafe { slab_allocator_rs::Heap::new(area.start.expose_provenance(), area.bytes) };
        Ok(SlabHeap { heap, _area: area })
    }
}

// SAFETY: what the heap hands out is memory of the area.
unsafe impl Bytes for SlabHeap {
    #[inline]
    fn alloc(&mut self, size: usize) -> *mut u8 {
        or_null(layout(size).and_then(|layout| self.heap.allocate(layout).ok()))
    }

    #[inline]
    unsafe fn free(&mut self, at: *mut u8, size: usize) {
        if let (Some(at), Some(layout)) = (NonNull::new(at), layout(size)) {
            // SAFETY: the caller's; the layout is the one it was allocated with.
            unsafe { self.heap.deallocate(at, layout) };
        }
    }
}

/// `buddy_system_allocator`'s `Heap`.
pub struct BuddyHeap {
    heap: buddy_system_allocator::Heap<33>,
    _area: Area,
}

// SAFETY: the heap's pointers lead into the area, which moves along with it.
unsafe impl Send for BuddyHeap {}

impl BuddyHeap {
    /// An allocator of `bytes`.
    pub fn new(bytes: u64) -> Result<BuddyHeap> {
        let area = Area::new(bytes)?;
        let mut heap = buddy_system_allocator::Heap::new();
        // SAFETY: the range is mapped and used by nobody else while the value lives.
        unsafe { heap.init(area.start.expose_provenance(), area.bytes) };
        Ok(BuddyHeap { heap, _area: area })
    }
}

// SAFETY: what the heap hands out is memory of the area.
unsafe impl Bytes for BuddyHeap {
    #[inline]
    fn alloc(&mut self, size: usize) -> *mut u8 {
        or_null(layout(size).and_then(|layout| self.heap.alloc(layout).ok()))
    }

    #[inline]
    unsafe fn free(&mut self, at: *mut u8, size: usize) {
        if let (Some(at), Some(layout)) = (NonNull::new(at), layout(size)) {
            // SAFETY: the caller's; the layout is the one it was allocated with.
            unsafe { self.heap.dealloc(at, layout) };
        }
    }
}

/// `talc`: bins of free chunks with boundary tags.
pub struct TalcHeap {
    talc: Talc<Manual, DefaultBinning>,
    _area: Area,
}

// SAFETY: the heap's pointers lead into the area, which moves along with it.
unsafe impl Send for TalcHeap {}

impl TalcHeap {
    /// An allocator of `bytes`.
    pub fn new(bytes: u64) -> Result<TalcHeap> {
        let area = Area::new(bytes)?;
        let mut talc = Talc::new(Manual);
        // SAFETY: the range is mapped and used by nobody else while the value lives; the source allows heaps
        // to be given by hand.
        let heap = unsafe { talc.claim(area.start.cast(), area.bytes) };
        heap.with_context(|| format!("talc refuses {bytes} bytes"))?;
        Ok(TalcHeap { talc, _area: area })
    }
}

// SAFETY: what the heap hands out is memory of the area.
unsafe impl Bytes for TalcHeap {
    #[inline]
    fn alloc(&mut self, size: usize) -> *mut u8 {
        match layout(size) {
            // SAFETY: the size is not zero.
            Some(layout) if size != 0 => or_null(unsafe { self.talc.allocate(layout) }),
            _ => ptr::null_mut(),
        }
    }

    #[inline]
    unsafe fn free(&mut self, at: *mut u8, size: usize) {
        if let Some(layout) = layout(size) {
            // SAFETY: the caller's; the layout is the one it was allocated with.
            unsafe { self.talc.deallocate(at, layout) };
        }
    }
}

/// `rlsf`: two levels of segregated fits, up to 512 MiB at once.
pub struct Rlsf {
    tlsf: rlsf::Tlsf<'static, u32, u32, 24, 32>,
    _area: Area,
}

impl Rlsf {
    /// An allocator of `bytes`.
    pub fn new(bytes: u64) -> Result<Rlsf> {
        let area = Area::new(bytes)?;
        let mut tlsf = rlsf::Tlsf::new();
        let start = NonNull::new(area.start.cast()).context("mapped at null")?;
        let block = NonNull::slice_from_raw_parts(start, area.bytes);
        // SAFETY: the range is mapped, used by nobody else, and unmapped after the allocator's last use.
        let taken = unsafe { tlsf.insert_free_block_ptr(block) };
        taken.with_context(|| format!("rlsf refuses {bytes} bytes"))?;
        Ok(Rlsf { tlsf, _area: area })
    }
}

// SAFETY: what the allocator hands out is memory of the area.
unsafe impl Bytes for Rlsf {
    #[inline]
    fn alloc(&mut self, size: usize) -> *mut u8 {
        or_null(layout(size).and_then(|layout| self.tlsf.allocate(layout)))
    }

    #[inline]
    unsafe fn free(&mut self, at: *mut u8, size: usize) {
        if let (Some(at), Some(layout)) = (NonNull::new(at), layout(size)) {
            // SAFETY: the caller's; the alignment is the one it was allocated with.
            unsafe { self.tlsf.deallocate(at, layout.align()) };
        }
    }
}
