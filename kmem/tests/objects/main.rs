//! The slab layer and kmalloc \[S1–S9\].

mod attack;
mod caches;
mod debug;
mod faults;
mod kmalloc;
mod misuse;
mod model;
mod moving;
mod play;
mod rcu;
mod sharing;
mod stage;
mod trace;

use kmem::Gfp;

/// No reports of failures.
const QUIET: Gfp = Gfp::NOWARN;
