//! Who holds how much: allocation tags by call site (`/proc/allocinfo`) \[D2, T1\].
//!
//! # Concepts
//! While tags are on, every object that is given out is noted with the place in the source that asked for it, and
//! taken off the notes when it is freed; for each place there are the bytes and the objects that are held. What was
//! allocated before is not known, and its free changes nothing.
//!
//! # Implementation
//! An open hash table by address, of as many objects as the caller of the switch wants, in pages of the
//! machine's; behind it one count for each place that `sites` can name. An entry is taken out by moving up what
//! lies behind it, so that nothing is found beyond an empty slot. Objects that find the table full are not noted
//! but counted.
//!
//! # Locking
//! One lock for all, taken with nothing else held. This is for finding leaks, not for production.

use super::{FAILSLAB, INIT_ON_ALLOC, INIT_ON_FREE, switch::DebugError};
use crate::{gfp::Gfp, page_alloc::Reclaim, platform::Platform, sites::PLACES};
use core::{panic::Location, ptr::NonNull, sync::atomic::Ordering::Relaxed};

use super::super::{Objects, order_for};

/// Bit of `Slabs::modes`.
pub(super) const TAGS: u32 = 4;
const _: () = assert!(TAGS & (INIT_ON_ALLOC | INIT_ON_FREE | FAILSLAB) == 0);

/// An object that is held; address 0 is nobody's.
#[derive(Clone, Copy)]
struct Held {
    addr: usize,
    site: u32,
    bytes: u32,
}

/// What a place holds.
#[derive(Clone, Copy)]
struct Count {
    bytes: u64,
    objects: u64,
}

/// The notes.
pub(in super::super) struct Tags {
    held: &'static mut [Held],
    /// By the place's number; 0 is all that cannot be told apart.
    counts: &'static mut [Count],
    nr: usize,
    lost: u64,
    order: u32,
}

impl Tags {
    /// Bytes of the tables.
    const fn bytes(objects: usize) -> usize {
        let counts = (PLACES + 1) * size_of::<Count>();
        objects.saturating_mul(size_of::<Held>()).saturating_add(counts)
    }

    /// # Safety
    /// `at` are zeroed pages of that order, aligned to a page, the caller's until the tags go.
    unsafe fn new(at: NonNull<u8>, order: u32, bytes: usize) -> Tags {
        let objects = (bytes - Tags::bytes(0)) / size_of::<Held>();
        // SAFETY: the tables fit, one behind the other, both of types for which zero is a value and whose
        // alignment divides the other's size.
        unsafe {
            let counts = at.as_ptr().add(objects * size_of::<Held>()).cast();
            Tags {
                held: core::slice::from_raw_parts_mut(at.as_ptr().cast(), objects),
                counts: core::slice::from_raw_parts_mut(counts, PLACES + 1),
                nr: 0,
                lost: 0,
                order,
            }
        }
    }

    fn home(&self, addr: usize) -> usize {
        let mixed = (addr as u64 >> 3).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (mixed >> 32) as usize % self.held.len()
    }

    /// Where an object is noted, or where it would be.
    fn find(&self, addr: usize) -> usize {
        let mut i = self.home(addr);
        // There is an empty slot always.
        while self.held[i].addr != 0 && self.held[i].addr != addr {
            i = (i + 1) % self.held.len();
        }
        i
    }

    fn add(&mut self, addr: usize, site: u32, bytes: u32) {
        // Nobody freed it where that is noted, but it is somebody else's by now.
        self.remove(addr);
        if (self.nr + 1) * 8 > self.held.len() * 7 {
            self.lost += 1;
            return;
        }
        let i = self.find(addr);
        self.held[i] = Held { addr, site, bytes };
        self.nr += 1;
        let count = &mut self.counts[site as usize];
        count.bytes += u64::from(bytes);
        count.objects += 1;
    }

    fn remove(&mut self, addr: usize) {
        let len = self.held.len();
        let mut hole = self.find(addr);
        let Held { addr: there, site, bytes } = self.held[hole];
        if there == 0 {
            return;
        }
        self.nr -= 1;
        let count = &mut self.counts[site as usize];
        count.bytes -= u64::from(bytes);
        count.objects -= 1;
        let mut i = hole;
        loop {
            i = (i + 1) % len;
            let next = self.held[i];
            if next.addr == 0 {
                break;
            }
            // It may move up if the hole is not before its home.
            if (i + len - self.home(next.addr)) % len >= (i + len - hole) % len {
                self.held[hole] = next;
                hole = i;
            }
        }
        self.held[hole].addr = 0;
    }
}

impl<'a, P: Platform, R: Reclaim> Objects<'a, P, R> {
    /// Whether objects are noted.
    pub(crate) fn tagging(&self) -> bool {
        self.slabs.modes.load(Relaxed) & TAGS != 0
    }

    /// Notes an object that is given to the caller.
    #[track_caller]
    pub(in super::super) fn tag(&self, addr: usize, bytes: usize) {
        if self.tagging()
            && let Some(sites) = self.pages.sites()
        {
            let site = sites.number(Location::caller());
            if let Some(tags) = &mut *self.slabs.tags.lock(self.pages.platform()) {
                tags.add(addr, site, bytes as u32);
            }
        }
    }

    /// Notes that an object is freed.
    pub(in super::super) fn untag(&self, addr: usize) {
        if self.tagging()
            && let Some(tags) = &mut *self.slabs.tags.lock(self.pages.platform())
        {
            tags.remove(addr);
        }
    }

    /// Who allocated the object at an address, while that is noted.
    pub(in super::super) fn tag_of(&self, addr: usize) -> Option<&'static Location<'static>> {
        let tags = self.slabs.tags.lock(self.pages.platform());
        let held = tags.as_ref().map(|tags| tags.held[tags.find(addr)])?;
        (held.addr == addr).then(|| self.pages.sites()?.place(held.site))?
    }

    /// `set_alloc_tags`.
    pub(crate) fn set_tags(&self, objects: Option<usize>) -> Result<(), DebugError> {
        let p = self.pages.platform();
        self.set_mode(TAGS, false)?;
        let old = self.slabs.tags.lock(p).take();
        old.into_iter().for_each(|tags| self.free_tags(tags));
        let Some(objects) = objects else { return Ok(()) };
        let root = self.make_root(Gfp::KERNEL).ok_or(DebugError::NoMemory)?;
        self.make_sites(root, Gfp::KERNEL).ok_or(DebugError::NoMemory)?;
        // One eighth stays empty.
        let bytes = Tags::bytes(objects.max(8).saturating_add(objects / 7 + 1));
        let largest = (1usize << P::PAGE_SHIFT) << self.pages.max_order();
        if bytes > largest {
            return Err(DebugError::NoMemory);
        }
        let order = order_for(bytes, P::PAGE_SHIFT);
        let at = self.own_pages(Gfp::KERNEL, order).ok_or(DebugError::NoMemory)?;
        root.frames.fetch_add(1 << order, Relaxed);
        // SAFETY: zeroed pages of that order, ours until `free_tags`.
        let tags = unsafe { Tags::new(at, order, (1 << P::PAGE_SHIFT) << order) };
        let raced = self.slabs.tags.lock(p).replace(tags);
        raced.into_iter().for_each(|tags| self.free_tags(tags));
        let on = self.set_mode(TAGS, true);
        if on.is_err() {
            let unused = self.slabs.tags.lock(p).take();
            unused.into_iter().for_each(|tags| self.free_tags(tags));
        }
        on
    }

    fn free_tags(&self, tags: Tags) {
        if let (Some(root), Some(at)) = (self.root(), NonNull::new(tags.held.as_mut_ptr())) {
            root.frames.fetch_sub(1 << tags.order, Relaxed);
            self.free_own_pages(at.cast(), tags.order);
        }
    }

    /// Objects that were not noted for want of room since tags were switched on; 0 while they are off.
    pub(crate) fn tags_lost(&self) -> u64 {
        self.slabs.tags.lock(self.pages.platform()).as_ref().map_or(0, |tags| tags.lost)
    }

    /// Calls `f` with each place that holds objects, its bytes and its objects; `None` is all the places
    /// that cannot be told apart.
    pub(crate) fn each_tag(&self, mut f: impl FnMut(Option<&'static Location<'static>>, u64, u64)) {
        let p = self.pages.platform();
        for site in 0..=PLACES {
            let count = self.slabs.tags.lock(p).as_ref().map(|tags| tags.counts[site]);
            if let Some(Count { bytes, objects }) = count.filter(|c| c.objects > 0) {
                let at = self.pages.sites().and_then(|sites| sites.place(site as u32));
                f(at, bytes, objects);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;
    use std::{boxed::Box, collections::HashMap, vec};

    #[test]
    fn the_table_holds_what_a_map_holds() {
        let none = Held { addr: 0, site: 0, bytes: 0 };
        let zero = Count { bytes: 0, objects: 0 };
        let mut tags = Tags {
            held: Box::leak(vec![none; 61].into_boxed_slice()),
            counts: Box::leak(vec![zero; PLACES + 1].into_boxed_slice()),
            nr: 0,
            lost: 0,
            order: 0,
        };
        let mut map = HashMap::new();
        let (mut x, mut lost) = (1u64, 0);
        for _ in 0..20_000 {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let (addr, site) = (8 * ((x >> 40) % 90 + 1) as usize, (x >> 20) as u32 % 3);
            map.remove(&addr);
            if x >> 63 == 0 {
                tags.remove(addr);
            } else {
                tags.add(addr, site, addr as u32);
                if (map.len() + 1) * 8 > 61 * 7 {
                    lost += 1;
                } else {
                    map.insert(addr, site);
                }
            }
            assert_eq!((tags.nr, tags.lost), (map.len(), lost));
            for site in 0..3 {
                let held = || map.iter().filter(|(_, s)| **s == site).map(|(addr, _)| *addr as u64);
                let Count { bytes, objects } = tags.counts[site as usize];
                assert_eq!((bytes, objects), (held().sum(), held().count() as u64));
            }
        }
        assert!(lost > 0);
        assert!(map.keys().all(|addr| tags.held[tags.find(*addr)].addr == *addr));
    }
}
