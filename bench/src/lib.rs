//! What kmem costs, beside other allocators.
//!
//! # Concepts
//! A *contender* is a page allocator behind the [`Frames`] trait, or a byte allocator behind
//! [`bytes::Bytes`]; a *workload* is a loop over that trait, compiled once per contender, so nothing is called
//! through a pointer. The contenders [`Null`] and [`bytes::Same`] hand out a constant: what a workload costs
//! with them is the harness's own share.
//!
//! [`program`] is something else: programs that others wrote, as a whole, each time with another global allocator.
//!
//! Four programs use the rest: `kmem-instr` runs workloads for callgrind to count instructions in, which is exact,
//! and `kmem-bench`, `kmem-bench-bytes` and `kmem-bench-mappings` take times, which is not: they compare contenders
//! inside one run only, in many short turns taken in rotation, so that what disturbs the machine disturbs all of them alike.
//!
//! # Locking
//! A contender with one lock around it is [`Locked`]; kmem brings its own.

pub mod bytes;
pub mod contest;
pub mod crew;
mod frames;
mod kmem_frames;
pub mod options;
mod peers;
pub mod plan;
pub mod program;
pub mod report;
pub mod side;
pub mod work;
pub mod workload;

pub use frames::{BULK, Frames, Locked, Null};
pub use kmem_frames::{KmemFrames, KmemPages, machine, numbers_only, used_machine};
pub use peers::{Bitmap, BuddyAllocFrames, BuddySlab, BuddySystem};

/// Bytes per frame, for every contender.
pub const PAGE_SIZE: u64 = kmem_hosted::PAGE_SIZE;
