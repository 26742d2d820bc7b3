//! The slab layer and kmalloc \[S1–S9\].

mod caches;
mod kmalloc;
mod misuse;
mod sharing;

use kmem::Gfp;

/// No reports of failures.
const QUIET: Gfp = Gfp::NOWARN;
