//! Switching on and off while the machine runs.
//!
//! # Implementation
//! A switch is a word that says that caches have to do without magazines. It is set first, and then every CPU is
//! asked to empty its magazines, the protocol that a dying cache uses: a CPU that equips itself
//! meanwhile looks at the word after it owns its lists, and one that did so before answers the request.
//! When it falls, CPUs equip themselves at their next miss.
//!
//! # Locking
//! The registry's, to keep a cache in place.

use super::super::{
    KmemCache, Objects, SlabFlags,
    cache::{Descriptor, Root},
};
use super::FAILSLAB;
use crate::{
    fault::{FaultPlan, FaultSite},
    gfp::Gfp,
    page_alloc::Reclaim,
    platform::Platform,
};
use core::{
    fmt,
    panic::Location,
    sync::atomic::{
        AtomicU32,
        Ordering::{AcqRel, Relaxed},
    },
};

/// Why something was not switched.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DebugError {
    /// Flags that a cache can be given at its creation only, since its objects need room or contents for it.
    Layout(SlabFlags),
    /// The cache is another machine's.
    ForeignCache,
    /// No memory for it.
    NoMemory,
    /// A CPU did not give its magazines up in time, or the context may not wait for it.
    Busy,
}

impl fmt::Display for DebugError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DebugError::Layout(flags) => write!(f, "{flags:?} only when a cache is created"),
            DebugError::ForeignCache => f.write_str("a cache of another machine"),
            DebugError::NoMemory => f.write_str("out of memory"),
            DebugError::Busy => f.write_str("a CPU is busy with its magazines"),
        }
    }
}

impl core::error::Error for DebugError {}

impl<'a, P: Platform, R: Reclaim> Objects<'a, P, R> {
    /// `kmem_cache_set_debug`.
    pub(crate) fn set_debug(&self, cache: &KmemCache, flags: SlabFlags) -> Result<(), DebugError> {
        let d = cache.0;
        let Some(root) = self.own_root(d) else { return Err(DebugError::ForeignCache) };
        let fixed = (flags ^ d.flags) & !SlabFlags::CONSISTENCY_CHECKS;
        let fixed = fixed & (flags | SlabFlags::DEBUG);
        if !fixed.is_empty() {
            return Err(DebugError::Layout(fixed));
        }
        let watched = flags & SlabFlags::DEBUG;
        self.switch(&d.watched, SlabFlags::DEBUG.bits(), watched.bits())?;
        self.empty_cache(root, d);
        Ok(())
    }

    /// Sets the machine's modes that are in `mask`.
    pub(crate) fn set_mode(&self, mask: u32, on: bool) -> Result<(), DebugError> {
        self.switch(&self.slabs.modes, mask, if on { mask } else { 0 })?;
        if on {
            self.each(|root, d| self.empty_cache(root, d));
        }
        Ok(())
    }

    /// `failslab`: allocations of objects that fail by plan.
    pub(crate) fn set_failslab(
        &self,
        plan: FaultPlan,
        site: Option<FaultSite>,
    ) -> Result<(), DebugError> {
        // Off while it changes.
        self.slabs.failslab.set(FaultPlan::Off);
        self.set_mode(FAILSLAB, plan != FaultPlan::Off)?;
        *self.slabs.failslab_site.lock(self.pages.platform()) = site;
        self.slabs.failslab.set(plan);
        Ok(())
    }

    /// Whether an allocation from `at` is to fail.
    pub(crate) fn fails(&self, gfp: Gfp, at: &Location<'_>) -> bool {
        if self.slabs.modes.load(Relaxed) & FAILSLAB == 0 || gfp.contains(Gfp::NOFAIL) {
            return false;
        }
        let site = *self.slabs.failslab_site.lock(self.pages.platform());
        site.is_none_or(|site| site.is(at)) && self.slabs.failslab.strikes()
    }

    /// What the order of objects is drawn from.
    pub(crate) fn set_random(&self, seed: Option<u64>) {
        self.slabs.random.store(super::super::seed_word(seed), Relaxed);
    }

    /// Sets bits of a word that keeps caches from having magazines.
    fn switch(&self, word: &AtomicU32, mask: u32, bits: u32) -> Result<(), DebugError> {
        let set = |bits| word.fetch_update(AcqRel, Relaxed, |w| Some(w & !mask | bits));
        // It is never refused.
        let before = set(bits).unwrap_or_default() & mask;
        if bits & !before != 0 && self.root().is_some() && !self.flush_all() {
            let _ = set(before);
            return Err(DebugError::Busy);
        }
        Ok(())
    }

    /// Gives back what depots have of a cache that has to do without.
    fn empty_cache(&self, root: &'static Root, d: &'static Descriptor) {
        if self.bare(d) {
            (0..d.shelves.len()).for_each(|shelf| self.trim(root, d, shelf));
        }
    }
}
