//! Looking at a whole cache.

use super::{Fault, MARKED, Wrong, wrong_when_free, wrong_when_live};
use crate::{error::Misuse, page_alloc::Reclaim, platform::Platform};
use core::sync::atomic::Ordering::Acquire;

use super::super::{
    KmemCache, Objects,
    cache::{Descriptor, List, Lists, Shelf},
    magazine::Object,
    state,
};

/// Mistakes that one look at a shelf finds at most.
const MOST: usize = 8;

impl<'a, P: Platform, R: Reclaim> Objects<'a, P, R> {
    /// `kmem_cache_validate`.
    #[track_caller]
    pub(crate) fn validate(&self, cache: &KmemCache) -> Result<(), Misuse> {
        let d = cache.0;
        let mut result = Ok(());
        if self.own_root(d).is_none() {
            return result;
        }
        for shelf in d.shelves {
            result = result.and(self.validate_shelf(d, shelf));
        }
        result
    }

    #[track_caller]
    fn validate_shelf(&self, d: &'static Descriptor, shelf: &Shelf) -> Result<(), Misuse> {
        let mut found: [Option<(Object, (Fault, Wrong))>; MOST] = [const { None }; MOST];
        let mut counts = None;
        {
            let mut lists = shelf.lists.lock(self.pages.platform());
            let mut nr = 0;
            self.each_slab(&lists, |head| {
                let slab = self.slab(d, head);
                for object in (0..d.layout.nr).map(|i| slab.object(d, i)) {
                    if nr < MOST
                        && let Some(damage) = self.wrong_with(d, &object)
                    {
                        found[nr] = Some((object, damage));
                        nr += 1;
                    }
                }
            });
            for (object, _) in found.iter().flatten() {
                if object.state.get() == state::FREE {
                    self.seclude(d, &mut lists, object);
                }
            }
            // One at a time: it changes the lists.
            let mut bad = None;
            self.each_slab(&lists, |head| {
                let counted = self.pages.map().page_in_map(head).free_objects();
                if counted != self.count(d, head, state::FREE) {
                    bad = Some(head);
                }
            });
            if let Some(head) = bad {
                counts = self.mend(d, &mut lists, head);
            }
        }
        let mut result = match counts {
            Some(what) => Err(self.pages.misuse(what)),
            None => Ok(()),
        };
        for (object, damage) in found.into_iter().flatten() {
            result = result.and(Err(self.damage(d, &object, damage)));
        }
        result
    }

    fn each_slab(&self, lists: &Lists, mut f: impl FnMut(u32)) {
        lists.all().for_each(|list| self.walk(list, &mut f));
    }

    /// What is wrong with an object in its slab. The caller holds the shelf's lock.
    fn wrong_with(&self, d: &Descriptor, object: &Object) -> Option<(Fault, Wrong)> {
        if !d.flags.intersects(MARKED) {
            return None;
        }
        // Acquire pairs with the Release in `publish`: a live object's zones were drawn before.
        let state = object.state.look();
        let damage = match state {
            state::FREE => wrong_when_free(d, &d.bytes(object)),
            state if state::in_use(state) => wrong_when_live(d, &d.bytes(object)),
            _ => None,
        }?;
        // One that is being freed meanwhile is its freer's to look at. It cannot get further without the lock.
        core::sync::atomic::fence(Acquire);
        (object.state.look() == state).then_some(damage)
    }

    /// Takes a free object out of use.
    fn seclude(&self, d: &Descriptor, lists: &mut Lists, object: &Object) {
        let map = self.pages.map();
        let frame = map.frame_at(map.direct_offset(object.at.addr().get()), P::PAGE_SHIFT);
        let head = d.head(frame);
        let free = map.page_in_map(head).free_objects();
        object.state.set(state::QUARANTINED);
        self.change_free(lists, d, head, free, free.saturating_sub(1));
    }

    /// Gives back the slabs of a dying cache in which nothing is but free and quarantined objects.
    pub(in super::super) fn end_quarantine(&self, d: &'static Descriptor) {
        for shelf in d.shelves {
            loop {
                let mut lists = shelf.lists.lock(self.pages.platform());
                let only_kept = |list: &List| {
                    let mut found = None;
                    self.walk(list, |head| {
                        let busy = self.count_used(d, head) + self.count(d, head, state::CACHED);
                        if busy == 0 && self.count(d, head, state::QUARANTINED) > 0 {
                            found = Some(head);
                        }
                    });
                    found
                };
                let Some(head) = lists.in_use().find_map(only_kept) else { break };
                let slab = self.slab(d, head);
                let free = self.pages.map().page_in_map(head).free_objects();
                for object in (0..d.layout.nr).map(|i| slab.object(d, i)) {
                    if object.state.get() == state::QUARANTINED {
                        // What it was kept for was reported.
                        if d.marks() {
                            self.prepare_object(d, &object);
                        }
                        object.state.set(state::FREE);
                    }
                }
                self.change_free(&mut lists, d, head, free, d.layout.nr);
                let emptied = self.pop_empty(d, &mut lists);
                drop(lists);
                if let Some(head) = emptied {
                    self.release(d, head);
                }
            }
        }
    }
}
