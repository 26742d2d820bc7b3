//! What `kmem-instr` tells whoever runs it under callgrind.
//!
//! # Concepts
//! The program calls [`MEASURED`] once per measurement; callgrind counts inside that function only, and writes
//! one dump each time it returns. The program prints one [`Step`] per call, in the same order, so the n-th
//! dump belongs to the n-th step.
//!
//! # Locking
//! Plain values.

use serde::{Deserialize, Serialize};

/// Symbol of the function that callgrind counts in.
pub const MEASURED: &str = "kmem_instr_measured";

/// One call of [`MEASURED`]: adds `ops` operations to an operation's count. Two steps of one operation
/// and contender with different counts give the cost per operation free of any constant part: their
/// difference.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Step {
    /// The operation's name.
    pub op: String,
    /// Whose.
    pub contender: String,
    /// How often the operation ran.
    pub ops: u64,
}
