//! Tracepoints of the page allocator and the slab layer, with the kernel's names and fields \[T2\].
//!
//! # Concepts
//! A [`TraceSink`] is given every event. While none is attached the fast paths do not know that tracing
//! exists: attaching one closes the machine's gate, and the gate is tested anyway. Events of objects have a switch
//! of their own ([`set_trace_objects`](crate::Kmem::set_trace_objects)), since CPUs do without magazines meanwhile.
//!
//! An allocation is told after it was answered, a free before the memory can be given out again. A sink that keeps
//! the order in which it is called therefore never sees memory allocated that it has not seen freed.
//!
//! Where the kernel prints a symbol (`call_site`) there is the place in the source. Nothing is accounted to
//! anybody, so `accounted` is always `false`.
//!
//! # Locking
//! The sink is called in the context of the operation, interrupts included, sometimes with interrupts
//! masked and an area's lock held; it must not allocate from the machine it traces.
//!
//! See [`events-kmem`](https://docs.kernel.org/trace/events-kmem.html).

use crate::{
    error::Name,
    gfp::Gfp,
    types::{MigrateType, PAGEBLOCK_ORDER, Pfn},
};
use core::panic::Location;

/// An event.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// `mm_page_alloc`: a request was answered; `pfn` is `None` if it failed.
    PageAlloc {
        /// First frame.
        pfn: Option<Pfn>,
        /// Order.
        order: u32,
        /// Flags of the request.
        gfp: Gfp,
        /// Mobility of the request.
        migratetype: MigrateType,
    },
    /// `mm_page_free`: a block was freed.
    PageFree {
        /// First frame.
        pfn: Pfn,
        /// Order.
        order: u32,
    },
    /// `mm_page_free_batched`: a page was freed as one of several.
    PageFreeBatched {
        /// The frame.
        pfn: Pfn,
    },
    /// `mm_page_alloc_zone_locked`: a block was taken from the buddy.
    PageAllocZoneLocked {
        /// First frame.
        pfn: Pfn,
        /// Order.
        order: u32,
        /// Mobility of the request.
        migratetype: MigrateType,
        /// Whether it refills a per-CPU list.
        percpu_refill: bool,
    },
    /// `mm_page_pcpu_drain`: a block went from a per-CPU list back to the buddy.
    PagePcpuDrain {
        /// First frame.
        pfn: Pfn,
        /// Order.
        order: u32,
        /// Mobility of the block's pageblock.
        migratetype: MigrateType,
    },
    /// `mm_page_alloc_extfrag`: a block was stolen from another mobility.
    PageAllocExtfrag {
        /// First frame.
        pfn: Pfn,
        /// Order of the request.
        alloc_order: u32,
        /// Order of the free block that was taken from.
        fallback_order: u32,
        /// Mobility of the request.
        alloc_migratetype: MigrateType,
        /// Mobility of the pageblock before.
        fallback_migratetype: MigrateType,
        /// Whether the pageblock changed its mobility.
        change_ownership: bool,
    },
    /// `kmalloc`: a request was answered.
    KmallocAlloc {
        /// Who asked.
        call_site: &'static Location<'static>,
        /// Its address; 0 if there was no memory.
        ptr: usize,
        /// The cache it is from; `None` for a block of pages. Not a field of the kernel's.
        cache: Option<Name>,
        /// Bytes asked for.
        bytes_req: usize,
        /// Bytes given.
        bytes_alloc: usize,
        /// Flags of the request.
        gfp: Gfp,
        /// The node asked for; −1 for any.
        node: i32,
    },
    /// `kfree`: an object from kmalloc, or of a cache that the caller did not name, is freed.
    Kfree {
        /// Who frees it.
        call_site: &'static Location<'static>,
        /// Its address.
        ptr: usize,
        /// The cache it is from; `None` for a block of pages. Not a field of the kernel's.
        cache: Option<Name>,
        /// Bytes it takes up. Not a field of the kernel's.
        bytes_alloc: usize,
    },
    /// `kmem_cache_alloc`: a request was answered.
    KmemCacheAlloc {
        /// Who asked.
        call_site: &'static Location<'static>,
        /// The object's address; 0 if there was no memory.
        ptr: usize,
        /// The cache.
        cache: Name,
        /// Bytes of an object.
        bytes_req: usize,
        /// Bytes from one object to the next.
        bytes_alloc: usize,
        /// Flags of the request.
        gfp: Gfp,
        /// The node asked for; −1 for any.
        node: i32,
    },
    /// `kmem_cache_free`: an object is freed.
    KmemCacheFree {
        /// Who frees it.
        call_site: &'static Location<'static>,
        /// Its address.
        ptr: usize,
        /// The cache.
        cache: Name,
    },
}

impl Event {
    /// The kernel's name of the tracepoint.
    pub const fn name(&self) -> &'static str {
        match self {
            Event::PageAlloc { .. } => "mm_page_alloc",
            Event::PageFree { .. } => "mm_page_free",
            Event::PageFreeBatched { .. } => "mm_page_free_batched",
            Event::PageAllocZoneLocked { .. } => "mm_page_alloc_zone_locked",
            Event::PagePcpuDrain { .. } => "mm_page_pcpu_drain",
            Event::PageAllocExtfrag { .. } => "mm_page_alloc_extfrag",
            Event::KmallocAlloc { .. } => "kmalloc",
            Event::Kfree { .. } => "kfree",
            Event::KmemCacheAlloc { .. } => "kmem_cache_alloc",
            Event::KmemCacheFree { .. } => "kmem_cache_free",
        }
    }
}

impl core::fmt::Display for Event {
    /// The fields as the kernel prints them after the event's name.
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match *self {
            Event::PageAlloc { pfn: Some(pfn), order, gfp, migratetype } => write!(
                f,
                "page={} pfn={pfn} order={order} migratetype={} gfp_flags={gfp}",
                PageId(pfn),
                migratetype as u8
            ),
            Event::PageAlloc { pfn: None, order, gfp, migratetype } => write!(
                f,
                "page={:016x} pfn=0x0 order={order} migratetype={} gfp_flags={gfp}",
                0, migratetype as u8
            ),
            Event::PageFree { pfn, order } => {
                write!(f, "page={} pfn={pfn} order={order}", PageId(pfn))
            }
            Event::PageFreeBatched { pfn } => {
                write!(f, "page={} pfn={pfn} order=0", PageId(pfn))
            }
            Event::PageAllocZoneLocked { pfn, order, migratetype, percpu_refill } => write!(
                f,
                "page={} pfn={pfn} order={order} migratetype={} percpu_refill={}",
                PageId(pfn),
                migratetype as u8,
                u8::from(percpu_refill)
            ),
            Event::PagePcpuDrain { pfn, order, migratetype } => write!(
                f,
                "page={} pfn={pfn} order={order} migratetype={}",
                PageId(pfn),
                migratetype as u8
            ),
            Event::PageAllocExtfrag {
                pfn,
                alloc_order,
                fallback_order,
                alloc_migratetype,
                fallback_migratetype,
                change_ownership,
            } => write!(
                f,
                "page={} pfn={pfn} alloc_order={alloc_order} fallback_order={fallback_order} \
                 pageblock_order={PAGEBLOCK_ORDER} alloc_migratetype={} fallback_migratetype={} \
                 fragmenting={} change_ownership={}",
                PageId(pfn),
                alloc_migratetype as u8,
                fallback_migratetype as u8,
                u8::from(fallback_order < PAGEBLOCK_ORDER),
                u8::from(change_ownership)
            ),
            Event::KmallocAlloc { call_site, ptr, bytes_req, bytes_alloc, gfp, node, .. } => {
                write!(
                    f,
                    "call_site={call_site} ptr={} bytes_req={bytes_req} bytes_alloc={bytes_alloc} \
                 gfp_flags={gfp} node={node} accounted=false",
                    Pointer(ptr)
                )
            }
            Event::Kfree { call_site, ptr, .. } => {
                write!(f, "call_site={call_site} ptr={}", Pointer(ptr))
            }
            Event::KmemCacheAlloc { call_site, ptr, cache, bytes_req, bytes_alloc, gfp, node } => {
                write!(
                    f,
                    "call_site={call_site} ptr={} name={cache} bytes_req={bytes_req} \
                 bytes_alloc={bytes_alloc} gfp_flags={gfp} node={node} accounted=false",
                    Pointer(ptr)
                )
            }
            Event::KmemCacheFree { call_site, ptr, cache } => {
                write!(f, "call_site={call_site} ptr={} name={cache}", Pointer(ptr))
            }
        }
    }
}

/// What stands for the address of a frame's page, where the kernel prints it hashed: another number for
/// each frame, and never null.
struct PageId(Pfn);

impl core::fmt::Display for PageId {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{:016x}", 1 << 32 | u64::from(self.0.0))
    }
}

/// An address, as the kernel prints it where it does not hash it.
struct Pointer(usize);

impl core::fmt::Display for Pointer {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self.0 {
            0 => f.write_str("(null)"),
            at => write!(f, "{at:#x}"),
        }
    }
}

/// Who is told.
pub trait TraceSink: Sync {
    /// An event on CPU `cpu` (`None`: on a thread that runs on none).
    ///
    /// Context: that of the operation, often with the CPU's lists owned, interrupts masked or a lock held. It
    /// must not sleep, by [`Platform::wait`](crate::platform::Platform::wait) or otherwise, whatever the context says,
    /// must not unwind, and must not allocate from the machine or free to it.
    fn event(&self, cpu: Option<usize>, event: &Event);
}
