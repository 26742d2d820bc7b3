//! What there is of high memory's mappings, counted.

use super::Maps;
use crate::{page_alloc::Reclaim, platform::Platform};
use core::fmt;

/// Mappings of a machine. What is mapped, stale or used is exact on a quiet machine: users come and go without the
/// table's lock.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct HighmemAudit {
    /// Places for permanent mappings.
    pub places: usize,
    /// Those that can be used at once.
    pub clean: usize,
    /// Those that nobody uses and that are to be flushed first.
    pub stale: usize,
    /// Those that show a page to somebody.
    pub mapped: usize,
    /// Those that somebody flushes, or was given and did not use yet.
    pub held: usize,
    /// Calls of `kmap` whose `kunmap` is to come.
    pub users: u64,
    /// Tasks that sleep for a place.
    pub sleepers: usize,
    /// How many slept since bring-up.
    pub slept: u64,
    /// Flushes of all stale places since bring-up.
    pub flushes: u64,
    /// Temporary mappings of all CPUs; exact on a quiet machine. Those of sleeping tasks are left out.
    pub local: usize,
}

/// What does not agree.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HighmemAuditError(&'static str);

impl fmt::Display for HighmemAuditError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl core::error::Error for HighmemAuditError {}

impl<P: Platform, R: Reclaim> Maps<'_, P, R> {
    /// Counts, and checks.
    pub(crate) fn audit(&self) -> Result<HighmemAudit, HighmemAuditError> {
        let table = self.lock();
        let counts = table.counts().map_err(HighmemAuditError)?;
        Ok(HighmemAudit {
            places: table.len(),
            clean: counts.clean,
            stale: counts.stale,
            mapped: counts.mapped,
            held: counts.held,
            users: counts.users,
            sleepers: table.sleepers,
            slept: table.slept,
            flushes: table.flushes,
            local: self.state.stacks.iter().map(|s| s.depth() + s.purposes()).sum(),
        })
    }
}
