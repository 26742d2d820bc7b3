#![no_std]
#![deny(unsafe_op_in_unsafe_fn)]
//! The Linux kernel's memory allocator as a library.
//!
//! Modules form a ladder; each uses what is below it and nothing above:
//!
//! ```text
//!   types  gfp  platform  context  sync  error  trace  fault  sites  runs  prefetch
//!                                  words everything else speaks
//!   vmstat  page_state             what happened; what frames are used for
//!   memblock                       memory before the page allocator
//!   page  pageblock                what is known of one frame, and of 512
//!   buddy  memmap                  free blocks; the map of all frames
//!   zone                           zones, watermarks, zonelists
//!   kfence                         a pool of pages with guards between them
//!   page_alloc                     per-CPU lists, fast path, slow path
//!   slab                           caches, magazines, kmalloc, and what looks for mistakes with objects
//!   vmalloc                        areas of virtually contiguous memory
//!   percpu                         an instance for each CPU
//!   highmem                        kmap: frames without an address get one for a while
//!   stack                          kernel stacks
//!   reclaim                        shrinkers, kswapd, OOM: behind the slow path, through a trait
//!   proc                           the machine as Linux's /proc texts
//!   kmem                           one machine
//!   alloc                          owners of its memory, allocators without a size
//! ```

pub mod alloc;
mod buddy;
pub mod context;
mod error;
pub mod fault;
pub mod gfp;
pub mod highmem;
pub mod kfence;
mod kmem;
pub mod memblock;
mod memmap;
pub mod page;
pub mod page_alloc;
pub mod page_state;
mod pageblock;
pub mod percpu;
pub mod platform;
mod prefetch;
pub mod proc;
pub mod reclaim;
mod runs;
mod sites;
pub mod slab;
pub mod stack;
pub mod sync;
pub mod trace;
pub mod types;
pub mod vmalloc;
pub mod vmstat;
pub mod zone;

pub use error::{AllocError, Misuse};
pub use gfp::{Gfp, classic::*};
pub use kmem::Kmem;
pub use page::{Page, PageFlags};
pub use page_alloc::{Audit, BringUpError, Config, PageAllocator};
pub use platform::Platform;
pub use types::{MigrateType, Pfn, ZoneType};
