//! Finding areas by address.
//!
//! # Concepts
//! What is freed is most often what the CPU was given last, so each shard has a *hint* of that, which is asked before
//! the tree: then a free walks through nothing.
//!
//! # Implementation
//! A hint is set by whoever makes something of an area, so before it is LIVE. It is taken back when the area leaves the
//! tree. So it leads to an area of the tree, whatever became of that meanwhile.
//!
//! # Locking
//! Who finds has a shard of the tree's lock; a hint is taken back under all of it.

use super::{
    Vmap,
    area::{Area, Link},
    pool::SHARDS,
    tree::Tree,
};
use crate::{page_alloc::Reclaim, platform::Platform, sync::LookGuard};
use core::{
    ops::Deref,
    ptr,
    sync::atomic::{AtomicPtr, Ordering::Relaxed},
};

/// Which area was given out last, if it is still one.
pub(super) struct Hint(AtomicPtr<Area>);

impl Hint {
    pub(super) const fn new() -> Hint {
        Hint(AtomicPtr::new(ptr::null_mut()))
    }

    /// Notes an area of the tree. The caller owns it, so it stays in the tree meanwhile.
    #[inline]
    pub(super) fn set(&self, area: &'static Area) {
        // Relaxed: who loads it has a shard of the tree's lock, which was changed when the area came into it.
        self.0.store(ptr::from_ref(area).cast_mut(), Relaxed);
    }

    /// Forgets an area, if that is the one. The caller has all of the tree's lock, and took the area out of the tree.
    pub(super) fn forget(&self, area: &Area) {
        let forgotten = ptr::from_ref(area).cast_mut();
        let _ = self.0.compare_exchange(forgotten, ptr::null_mut(), Relaxed, Relaxed);
    }
}

/// The tree, to look at.
pub(super) struct Look<'a, P: Platform> {
    tree: LookGuard<'a, Tree, P, SHARDS>,
    hint: &'a Hint,
}

impl<P: Platform> Look<'_, P> {
    /// The area that an address is in, its guard included.
    #[inline(always)]
    pub(super) fn find(&self, addr: usize) -> Link {
        // SAFETY: null, or an area of the tree: it cannot leave that while we have a shard of the lock, and when it does,
        // the hint goes first.
        let hint: Link = unsafe { self.hint.0.load(Relaxed).as_ref() };
        match hint {
            Some(area) if addr.wrapping_sub(area.start()) < area.size => hint,
            _ => self.tree.find(addr),
        }
    }
}

impl<P: Platform> Deref for Look<'_, P> {
    type Target = Tree;
    fn deref(&self) -> &Tree {
        &self.tree
    }
}

impl<P: Platform, R: Reclaim> Vmap<'_, P, R> {
    /// The tree, to look at.
    #[inline(always)]
    pub(super) fn tree(&self) -> Look<'_, P> {
        let shard = self.shard();
        Look { tree: self.state.tree.look(self.p(), shard), hint: &self.state.shards[shard].hint }
    }

    /// The same for who may have interrupted somebody with the lock: `None` then.
    pub(super) fn tree_patiently(&self) -> Option<Look<'_, P>> {
        let shard = self.shard();
        let tree = self.state.tree.look_patiently(self.p(), shard)?;
        Some(Look { tree, hint: &self.state.shards[shard].hint })
    }
}
