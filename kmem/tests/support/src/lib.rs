//! What the behaviour tests share.
//!
//! # Concepts
//! [`Rig`] is a hosted machine whose reports are kept and which, when the test ends, checks that every
//! frame is back where it was. [`TestShrinker`] is a source of reclaim that a closure plays. [`Plain`] is a
//! second platform, as small as one can be, with frames of any size.
//!
//! # Locking
//! Mutexes of the host; none is held across a call of the machine.

mod plain;
mod rig;
mod shrinkers;

pub use plain::Plain;
pub use rig::{Held, MIB, Rig};
pub use shrinkers::{OomScript, Scan, TestShrinker};
