//! Objects in use: all of them, and the one at an address.

use super::{
    super::{
        Objects,
        cache::Descriptor,
        magazine::Object,
        node::number,
        sampled::SAMPLED,
        state::{State, in_use},
    },
    table::{Range, Table},
};
use crate::{
    error::Name,
    page::Page,
    page_alloc::Reclaim,
    platform::Platform,
    types::{PAGEBLOCK_FRAMES, Pfn},
};
use core::{
    panic::Location,
    sync::atomic::{
        AtomicU8,
        Ordering::{AcqRel, Acquire, Relaxed, Release},
        fence,
    },
};

/// Where notes on an object are.
pub(super) trait Notes {
    /// Changes them; 0 is none. Returns what they were, or `None` if the object is not in use or `f` wants no change.
    fn note(&self, f: &mut dyn FnMut(u8) -> Option<u8>) -> Option<u8>;
}

impl Notes for State {
    fn note(&self, f: &mut dyn FnMut(u8) -> Option<u8>) -> Option<u8> {
        State::note(*self, f)
    }
}

impl Notes for Page {
    fn note(&self, f: &mut dyn FnMut(u8) -> Option<u8>) -> Option<u8> {
        Page::note(self, f)
    }
}

impl Notes for Range {
    fn note(&self, f: &mut dyn FnMut(u8) -> Option<u8>) -> Option<u8> {
        Table::note(self, f)
    }
}

/// Those of an object in KFENCE's pool, which has no state that they could stand for.
struct Sampled(&'static AtomicU8);

impl Notes for Sampled {
    fn note(&self, f: &mut dyn FnMut(u8) -> Option<u8>) -> Option<u8> {
        // AcqRel: as for an object's state.
        self.0.fetch_update(AcqRel, Relaxed, |n| f(n).map(tagged)).ok()
    }
}

/// Notes as a byte that is no state of an object.
fn tagged(notes: u8) -> u8 {
    if notes == 0 { 0 } else { notes | super::super::state::NOTED }
}

/// An object in use, or foreign memory.
pub(super) struct Thing<'a> {
    pub(super) addr: usize,
    pub(super) size: usize,
    pub(super) notes: &'a dyn Notes,
    pub(super) of: Of,
}

/// What it is of.
#[derive(Clone, Copy)]
pub(super) enum Of {
    Cache(&'static Descriptor, Object),
    Pool(Name, Option<(&'static Location<'static>, u64)>),
    Large,
    Foreign,
}

impl<'a, P: Platform, R: Reclaim> Objects<'a, P, R> {
    /// Calls `f` with everything in use. A shelf's or the table's lock is held meanwhile.
    pub(super) fn walk_things(&self, f: &mut dyn FnMut(&Thing<'_>)) {
        let p = self.pages.platform();
        self.each(|_, d| {
            for shelf in d.shelves.iter().filter(|_| d.largest.is_some()) {
                let lists = shelf.lists.lock(p);
                for list in lists.in_use() {
                    self.walk(list, |head| {
                        self.each_live(d, head, |object| f(&Self::object_thing(d, &object)));
                    });
                }
            }
        });
        if let Some(pool) = self.slabs.kfence.pool() {
            pool.each_live(|addr, _| {
                if let Some((addr, size, slot)) = pool.object_around(addr) {
                    let of = Of::Pool(slot.name(), slot.user());
                    f(&Thing { addr, size, notes: &Sampled(slot.byte()), of });
                }
            });
        }
        self.walk_large(f);
        if let Some(table) = self.slabs.leaks.table.lock(p).as_ref() {
            table.foreign().iter().for_each(|range| f(&Self::foreign_thing(range)));
        }
    }

    fn walk_large(&self, f: &mut dyn FnMut(&Thing<'_>)) {
        let map = self.pages.map();
        for block in map.pageblocks().filter(|b| map.flags_of(*b).zone_slot().is_some()) {
            for pfn in block..block + PAGEBLOCK_FRAMES {
                self.large_thing(pfn).inspect(|thing| f(thing));
            }
        }
    }

    fn object_thing<'o>(d: &'static Descriptor, object: &'o Object) -> Thing<'o> {
        let (addr, size) = (object.at.addr().get(), d.size as usize);
        Thing { addr, size, notes: &object.state, of: Of::Cache(d, *object) }
    }

    fn foreign_thing(range: &Range) -> Thing<'_> {
        Thing { addr: range.start, size: range.len, notes: range, of: Of::Foreign }
    }

    /// The large object whose first frame that is.
    fn large_thing(&self, pfn: u32) -> Option<Thing<'static>> {
        let map = self.pages.map();
        let page = map.page_in_map(pfn);
        if !self.is_large(Pfn(pfn)) {
            return None;
        }
        let size = (1 << P::PAGE_SHIFT) << page.state().order();
        Some(Thing {
            addr: map.direct_address(pfn, P::PAGE_SHIFT),
            size,
            notes: page,
            of: Of::Large,
        })
    }

    /// Calls `f` with what is in use at an address, wherever in it that is.
    pub(super) fn thing_at<T>(&self, addr: usize, f: impl FnOnce(&Thing<'_>) -> T) -> Option<T> {
        let p = self.pages.platform();
        let map = self.pages.map();
        let offset = map.direct_offset(addr);
        match map.owner_at(offset, P::PAGE_SHIFT) {
            SAMPLED => {
                let (addr, size, slot) = self.pool_at(addr)?.object_around(addr)?;
                let of = Of::Pool(slot.name(), slot.user());
                Some(f(&Thing { addr, size, notes: &Sampled(slot.byte()), of }))
            }
            0 => match p.direct_unmap(core::ptr::without_provenance(addr)) {
                Some(pfn) => {
                    let page = self.pages.pfn_to_page(pfn)?;
                    let Pfn(head) = self.pages.page_to_pfn(self.pages.compound_head(page))?;
                    let thing = self.large_thing(head)?;
                    (addr - thing.addr < thing.size).then(|| f(&thing))
                }
                None => {
                    let table = self.slabs.leaks.table.lock(p);
                    table.as_ref()?.around(addr).map(|range| f(&Self::foreign_thing(range)))
                }
            },
            owner => {
                let d = self.pin(self.root()?, number(owner))?;
                let found = self.object_in(d, owner, offset, addr, f);
                // Release pairs with the Acquire of the destroyer.
                d.pins.fetch_sub(1, Release);
                found
            }
        }
    }

    fn object_in<T>(
        &self,
        d: &'static Descriptor,
        owner: u16,
        offset: usize,
        addr: usize,
        f: impl FnOnce(&Thing<'_>) -> T,
    ) -> Option<T> {
        // The layer's own objects are nobody's to leak.
        d.largest?;
        let map = self.pages.map();
        let pfn = map.frame_at(offset, P::PAGE_SHIFT);
        let head = d.head(pfn);
        let shelf = || {
            let named = map.owner_at(offset, P::PAGE_SHIFT) == owner;
            // Acquire pairs with the Release in `grow`: whoever sees a slab's owner sees its shelf.
            fence(Acquire);
            named.then(|| self.shelf_with(d, head))
        };
        let at = shelf()?;
        let _lists = d.shelves.get(at)?.lists.lock(self.pages.platform());
        // Under the lock it stays the cache's, and on that shelf: one that went and came again meanwhile shows where it is.
        if shelf() != Some(at) {
            return None;
        }
        let object = self.slab(d, pfn).object_around(d, addr)?;
        in_use(object.state.get()).then(|| f(&Self::object_thing(d, &object)))
    }
}
