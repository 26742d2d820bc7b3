//! What lies in and around an object of a cache that looks for mistakes: zones, poison, users.
//!
//! # Implementation
//! Red zones hold 0xbb while the object is free and 0xcc while it is somebody's. Of kmalloc's caches what is
//! left of the object behind the bytes asked for is a zone as well. A free object's bytes are 0x6b, the last one
//! 0xa5; one that was just given out is 0xa5 all over.
//!
//! All of it is memory that others may write to by mistake at any moment, so it is read and written as
//! atomics, and whatever is read is taken for a number that may be any.
//!
//! # Locking
//! An object's bytes are changed by whoever owns it: while it is CACHED, its allocator or freer.

use super::super::layout::{Areas, TRACK, ZONE};
use core::{
    ops::Range,
    ptr::NonNull,
    sync::atomic::{
        AtomicU8, AtomicU32, AtomicU64,
        Ordering::{Acquire, Relaxed, Release},
    },
};

/// A free object's bytes, and the last of them.
pub(super) const POISON_FREE: u8 = 0x6b;
pub(super) const POISON_END: u8 = 0xa5;
/// Bytes of an object that was just given out.
pub(super) const POISON_FRESH: u8 = 0xa5;
/// Red zones of a free object, and of one in use.
pub(super) const ZONE_FREE: u8 = 0xbb;
pub(super) const ZONE_LIVE: u8 = 0xcc;

/// One use of an object.
#[derive(Clone, Copy)]
pub(super) struct Track {
    /// Number of the place in the source that called.
    pub(super) site: u32,
    pub(super) cpu: u32,
    /// When, in nanoseconds of the platform's clock.
    pub(super) when: u64,
}

const _: () = assert!(size_of::<Track>() == TRACK as usize);

/// Which use.
#[derive(Clone, Copy)]
pub(super) enum Use {
    Alloc,
    Free,
}

/// A byte that is not what it should be.
#[derive(Clone, Copy)]
pub(super) struct Wrong {
    /// Bytes from the object's beginning.
    pub(super) offset: i32,
    pub(super) found: u8,
}

/// An object and what lies around it.
#[derive(Clone, Copy)]
pub(super) struct Bytes<'a> {
    at: NonNull<u8>,
    areas: &'a Areas,
}

impl<'a> Bytes<'a> {
    /// # Safety
    /// `at` is an object of a slab with these areas, which stays mapped.
    pub(super) unsafe fn new(at: NonNull<u8>, areas: &'a Areas) -> Bytes<'a> {
        Bytes { at, areas }
    }

    /// From the zone before the object, or from the object, to where the next one's begins.
    pub(super) fn reach(&self) -> Range<i32> {
        let before = if self.areas.zones() { ZONE as i32 } else { 0 };
        -before..self.areas.stride as i32 - before
    }

    fn byte(&self, offset: i32) -> &AtomicU8 {
        debug_assert!(self.reach().contains(&offset));
        // SAFETY: within the object's reach, which is mapped by `new`'s contract; callers pass offsets that
        // `areas` gives or that they found to be within reach.
        unsafe { AtomicU8::from_ptr(self.at.offset(offset as isize).as_ptr()) }
    }

    /// The byte at an offset; `None` where it is none of the object's.
    pub(super) fn get(&self, offset: i32) -> Option<u8> {
        self.reach().contains(&offset).then(|| self.byte(offset).load(Relaxed))
    }

    fn fill(&self, range: Range<i32>, byte: u8) {
        range.for_each(|i| self.byte(i).store(byte, Relaxed));
    }

    fn first_wrong(&self, mut range: Range<i32>, byte: u8) -> Option<Wrong> {
        range.find_map(|offset| {
            let found = self.byte(offset).load(Relaxed);
            (found != byte).then_some(Wrong { offset, found })
        })
    }

    fn size(&self) -> i32 {
        self.areas.size as i32
    }

    /// Fills the object itself.
    pub(super) fn fill_object(&self, byte: u8) {
        self.fill(0..self.size(), byte);
    }

    /// Makes the object one that nobody may write to.
    pub(super) fn poison(&self) {
        self.fill(0..self.size() - 1, POISON_FREE);
        self.byte(self.size() - 1).store(POISON_END, Relaxed);
    }

    /// The first byte that was written to since.
    pub(super) fn written_after_free(&self) -> Option<Wrong> {
        let end = self.size() - 1;
        let body = self.first_wrong(0..end, POISON_FREE);
        body.or_else(|| self.first_wrong(end..end + 1, POISON_END))
    }

    /// Fills the zones.
    pub(super) fn draw_zones(&self, byte: u8) {
        if self.areas.zones() {
            self.fill(-(ZONE as i32)..0, byte);
            self.fill(self.size()..self.areas.zone_end as i32, byte);
        }
    }

    /// The byte of the zone before the object that is nearest to it of those that are wrong.
    pub(super) fn underrun(&self, byte: u8) -> Option<Wrong> {
        let before = if self.areas.zones() { ZONE as i32 } else { 0 };
        (-before..0).rev().find_map(|offset| self.first_wrong(offset..offset + 1, byte))
    }

    /// The first wrong byte behind the object, or, while it is in use, behind what was asked for of it.
    pub(super) fn overrun(&self, byte: u8, live: bool) -> Option<Wrong> {
        let from = if live { self.asked() as i32 } else { self.size() };
        let slack = self.first_wrong(from..self.size(), ZONE_LIVE);
        slack.or_else(|| self.first_wrong(self.size()..self.areas.zone_end as i32, byte))
    }

    fn asked_cell(&self) -> Option<&AtomicU32> {
        let at = self.areas.asked_at;
        // SAFETY: eight bytes within reach, at a multiple of eight from the object, which is aligned to that.
        (at != 0).then(|| unsafe { AtomicU32::from_ptr(self.at.add(at as usize).as_ptr().cast()) })
    }

    /// Bytes of the object that may be used.
    pub(super) fn asked(&self) -> u32 {
        // Acquire pairs with the Release in `ask`: the zone behind was drawn before.
        self.asked_cell().map_or(self.areas.size, |cell| cell.load(Acquire).min(self.areas.size))
    }

    /// Notes that so many bytes may be used, of an object that may be used as a whole.
    pub(super) fn ask(&self, bytes: u32) {
        if let Some(cell) = self.asked_cell() {
            self.fill(bytes.min(self.areas.size) as i32..self.size(), ZONE_LIVE);
            cell.store(bytes, Release);
        }
    }

    fn track_words(&self, of: Use) -> Option<(&AtomicU64, &AtomicU64)> {
        let at = self.areas.tracks_at;
        if at == 0 {
            return None;
        }
        let at = at + TRACK * of as u32;
        // SAFETY: two words within reach, at a multiple of eight from the object, which is aligned to that.
        unsafe {
            let first = self.at.add(at as usize).as_ptr().cast::<u64>();
            Some((AtomicU64::from_ptr(first), AtomicU64::from_ptr(first.add(1))))
        }
    }

    /// Notes a use.
    pub(super) fn set_track(&self, of: Use, track: Track) {
        if let Some((who, when)) = self.track_words(of) {
            who.store(u64::from(track.site) << 32 | u64::from(track.cpu), Relaxed);
            when.store(track.when, Relaxed);
        }
    }

    /// The last such use; `None` if there was none or nobody notes it.
    pub(super) fn track(&self, of: Use) -> Option<Track> {
        let (who, when) = self.track_words(of)?;
        let who = who.load(Relaxed);
        let track = Track { site: (who >> 32) as u32, cpu: who as u32, when: when.load(Relaxed) };
        (track.cpu != NEVER).then_some(track)
    }
}

/// The CPU of a use that never was.
const NEVER: u32 = u32::MAX;

impl Track {
    pub(super) const NONE: Track = Track { site: 0, cpu: NEVER, when: 0 };
}
