//! Owners: memory that is freed by going out of scope, and cannot be freed wrongly \[O1, O3\].
//!
//! # Concepts
//! What C leaves to discipline an owner knows: [`Pages`] its order, [`Slot`] its cache, [`VmArea`] its address, [`KBox`] and [`KVec`] that
//! they are the only ones. Freeing to the wrong cache, with the wrong order or twice cannot be written down. An
//! owner either borrows its machine, so that it cannot outlive it, or has it in its type ([`Kmalloc`]); making one
//! takes [`Flags`] and may fail, with a value.
//!
//! Collections that others wrote get their memory through `allocator_api2` (a feature) or, as a kernel's global
//! allocator, through [`GlobalAlloc`](core::alloc::GlobalAlloc): both are implemented for [`Kmalloc`].
//!
//! # Implementation
//! Owners are thin: the address, and what it takes to free. The classic calls' checks stay beneath them: memory
//! that C code freed under an owner is found out when the owner goes.
//!
//! [`KBox`] and [`KVec`] are generic over an [`Allocator`], a small value: a reference to a machine, or nothing.
//! What is made with a machine at hand is made by the `_on` forms.
//!
//! *Context.* Owners may be dropped wherever freeing is allowed: anywhere but in an NMI. The `_in` forms take a
//! capability \[C2\], so that a request that sleeps does not compile where sleeping is not allowed.
//!
//! # Locking
//! None of their own.

mod allocator;
mod cache;
pub mod flags;
mod foreign;
mod home;
mod kbox;
mod kmap;
mod kvec;
mod pages;
mod percpu;
mod stack;
mod vm_area;
mod vmalloc;

pub use crate::{error::AllocError, gfp::Gfp as Flags};
pub use allocator::Allocator;
pub use cache::{Cache, Slot};
pub use home::{Home, Kmalloc, Seat};
pub use kbox::KBox;
pub use kmap::{Kmap, KmapAtomic, KmapLocal, KmapMut, MappedPage};
pub use kvec::{IntoIter, KVec};
pub use pages::Pages;
pub use percpu::PerCpu;
pub use stack::KernelStack;
pub use vm_area::VmArea;
pub use vmalloc::{KVBox, KVVec, KVmalloc, KVmallocOn, VBox, VVec, Vmalloc, VmallocOn};
