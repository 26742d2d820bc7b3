//! Owners: memory that is freed by going out of scope, and cannot be freed wrongly \[O1, O3\].
//!
//! # Concepts
//! What C leaves to discipline an owner knows: [`Pages`] its order, [`Slot`] its cache, [`KBox`] that it is the only
//! one. Freeing to the wrong cache, with the wrong order or twice cannot be written down. Every owner borrows its
//! machine, so none outlives it; making one takes flags and may fail, with a value.
//!
//! # Implementation
//! Owners are thin: the address and what it takes to free. The classic calls' checks stay beneath them: memory
//! that C code freed under an owner is found out when the owner goes.
//!
//! *Context.* Owners may be dropped wherever freeing is allowed: anywhere but in an NMI. The `_in` forms take a
//! capability \[C2\], so that a request that sleeps does not compile where sleeping is not allowed.
//!
//! # Locking
//! None of their own.

mod cache;
mod kbox;
mod pages;

pub use cache::{Cache, Slot};
pub use kbox::KBox;
pub use pages::Pages;
