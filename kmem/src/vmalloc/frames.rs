//! Which frames an area shows.
//!
//! # Concepts
//! A table of frame numbers. Up to sixteen are in the descriptor itself; up to a thousand in one object; more in a
//! tree of objects of 4 KiB, so that the largest area needs no large block for its table.
//!
//! # Locking
//! The area's: one owner at a time, others only look.

use crate::{
    error::AllocError, gfp::Gfp, page_alloc::Reclaim, platform::Platform, slab::Objects, types::Pfn,
};
use core::{
    ptr::{self, NonNull},
    slice,
    sync::atomic::{AtomicPtr, AtomicU32, Ordering::Relaxed},
};

/// Frames in the descriptor.
const INLINE: usize = 16;
/// Frames in an object of the lowest level, as a power of two.
const LEAF_BITS: u32 = 10;
/// Objects below one of a higher level, as a power of two.
const FAN_BITS: u32 = 9;
/// Bytes of an object.
const OBJECT: usize = 4096;

const _: () = assert!(
    size_of::<AtomicU32>() << LEAF_BITS == OBJECT
        && size_of::<AtomicPtr<u8>>() << FAN_BITS <= OBJECT
);

/// An object of a higher level.
type Fan = [AtomicPtr<()>; 1 << FAN_BITS];

/// The table.
#[derive(Default)]
pub(super) struct Frames {
    /// Frames that it has places for.
    nr: AtomicU32,
    /// Frames that are in it, from the first on.
    filled: AtomicU32,
    inline: [AtomicU32; INLINE],
    root: AtomicPtr<()>,
}

/// Levels above the lowest, for so many frames.
const fn levels(nr: u32) -> u32 {
    let mut levels = 0;
    while (nr as u64) > 1 << (LEAF_BITS + levels * FAN_BITS) {
        levels += 1;
    }
    levels
}

impl Frames {
    /// Frames that are in the table.
    #[inline]
    pub(super) fn len(&self) -> u32 {
        self.filled.load(Relaxed)
    }

    /// Forgets all frames but the first `nr`.
    pub(super) fn truncate(&self, nr: u32) {
        self.filled.fetch_min(nr, Relaxed);
    }

    /// Makes places for `nr` frames. What it got of them at a failure is for [`clear`](Self::clear).
    pub(super) fn make<P: Platform, R: Reclaim>(
        &self,
        objects: &Objects<'_, P, R>,
        nr: u32,
        gfp: Gfp,
    ) -> Result<(), AllocError> {
        self.nr.store(nr, Relaxed);
        self.filled.store(0, Relaxed);
        if nr as usize <= INLINE {
            return Ok(());
        }
        let levels = levels(nr);
        if levels == 0 {
            let bytes = nr as usize * size_of::<AtomicU32>();
            let at = objects.kmalloc(bytes, gfp | Gfp::ZERO)?;
            self.root.store(at.as_ptr().cast(), Relaxed);
            return Ok(());
        }
        Self::make_below(objects, &self.root, levels, nr.div_ceil(1 << LEAF_BITS), gfp)
    }

    /// Makes an object at a place and, below it, so many of the lowest level.
    fn make_below<P: Platform, R: Reclaim>(
        objects: &Objects<'_, P, R>,
        place: &AtomicPtr<()>,
        level: u32,
        leaves: u32,
        gfp: Gfp,
    ) -> Result<(), AllocError> {
        let at = objects.kmalloc(OBJECT, gfp | Gfp::ZERO)?;
        place.store(at.as_ptr().cast(), Relaxed);
        if level == 0 {
            return Ok(());
        }
        // SAFETY: an object of that size, zeroed, ours: null pointers.
        let fan = unsafe { at.cast::<Fan>().as_ref() };
        let each = 1 << ((level - 1) * FAN_BITS);
        for (i, place) in (0..leaves.div_ceil(each)).zip(fan) {
            Self::make_below(objects, place, level - 1, each.min(leaves - i * each), gfp)?;
        }
        Ok(())
    }

    /// Gives the table back; its frames are not touched.
    #[inline]
    pub(super) fn clear<P: Platform, R: Reclaim>(&self, objects: &Objects<'_, P, R>) {
        let nr = self.nr.swap(0, Relaxed);
        self.filled.store(0, Relaxed);
        if nr as usize > INLINE {
            Self::clear_below(objects, &self.root, levels(nr));
        }
    }

    fn clear_below<P: Platform, R: Reclaim>(
        objects: &Objects<'_, P, R>,
        place: &AtomicPtr<()>,
        level: u32,
    ) {
        let Some(at) = NonNull::new(place.swap(ptr::null_mut(), Relaxed)) else { return };
        if level > 0 {
            // SAFETY: an object that `make_below` made at that level, zeroed before it was filled.
            let fan = unsafe { at.cast::<Fan>().as_ref() };
            fan.iter().for_each(|place| Self::clear_below(objects, place, level - 1));
        }
        // It is from kmalloc, and nobody else's.
        let _ = objects.kfree(at.as_ptr().cast());
    }

    /// The places from number `i` on that lie in one piece; empty behind the last.
    #[inline]
    fn piece(&self, i: u32) -> &[AtomicU32] {
        let nr = self.nr.load(Relaxed) as usize;
        if nr <= INLINE {
            return self.inline[..nr].get(i as usize..).unwrap_or(&[]);
        }
        self.piece_below(i)
    }

    /// The same of a table that is elsewhere.
    fn piece_below(&self, i: u32) -> &[AtomicU32] {
        let nr = self.nr.load(Relaxed);
        if i >= nr {
            return &[];
        }
        let mut at = self.root.load(Relaxed);
        for level in (0..levels(nr)).rev() {
            let below = (i >> (LEAF_BITS + level * FAN_BITS)) as usize % (1 << FAN_BITS);
            // SAFETY: `make` succeeded for `nr` frames, or nothing would be in the table, so there is an object on
            // every level of the way to a number below `nr`.
            at = unsafe { (*at.cast::<Fan>())[below].load(Relaxed) };
        }
        let first = i % (1 << LEAF_BITS);
        let len = (1 << LEAF_BITS).min(nr - (i - first));
        // SAFETY: an object of the lowest level, zeroed when it was made, which holds the numbers from `i - first`
        // on, `len` of them; it is kept until the area is cleared, by its only owner.
        let leaf = unsafe { slice::from_raw_parts(at.cast::<AtomicU32>(), len as usize) };
        &leaf[first as usize..]
    }

    /// Puts `n` frames behind those that are there. There are places for them.
    #[inline(always)]
    pub(super) fn push(&self, n: usize, frame: impl Fn(usize) -> Pfn) {
        let first = self.len();
        let mut done = 0;
        while done < n {
            let places = self.piece(first + done as u32);
            let here = places.len().min(n - done);
            for (i, place) in places[..here].iter().enumerate() {
                place.store(frame(done + i).0, Relaxed);
            }
            if here == 0 {
                break;
            }
            done += here;
        }
        self.filled.store(first + done as u32, Relaxed);
    }

    /// Has `n` places at the most behind the frames that are there filled; `f` says how many it did.
    #[inline(always)]
    pub(super) fn fill<E>(
        &self,
        n: usize,
        f: impl FnOnce(&[AtomicU32]) -> (usize, Result<(), E>),
    ) -> Result<(), E> {
        let first = self.len();
        let places = self.piece(first);
        let (done, result) = f(&places[..n.min(places.len())]);
        self.filled.store(first + done as u32, Relaxed);
        result
    }

    /// Calls `f` with all frames, the last ones first, by pieces.
    #[inline(always)]
    pub(super) fn pieces_from_the_end(&self, mut f: impl FnMut(&[AtomicU32])) {
        let mut end = self.len();
        while end > 0 {
            let start = (end - 1) >> LEAF_BITS << LEAF_BITS;
            let piece = self.piece(start);
            f(&piece[..((end - start) as usize).min(piece.len())]);
            end = start;
        }
    }

    /// The frames from number `i` on that lie in one piece.
    #[inline]
    pub(super) fn from(&self, i: u32) -> impl Iterator<Item = Pfn> + '_ {
        let left = self.len().saturating_sub(i) as usize;
        let piece = self.piece(i);
        piece[..left.min(piece.len())].iter().map(|pfn| Pfn(pfn.load(Relaxed)))
    }

    /// The frame with number `i`.
    #[inline]
    pub(super) fn get(&self, i: u32) -> Option<Pfn> {
        self.from(i).next()
    }

    /// Calls `f` for runs of frames with consecutive numbers, from place `from` on: with the first one's place and
    /// frame, and how many they are. A run ends with the piece that it lies in. Stops at the first failure.
    #[inline(always)]
    pub(super) fn runs<E>(
        &self,
        from: u32,
        mut f: impl FnMut(u32, Pfn, u32) -> Result<(), E>,
    ) -> Result<(), E> {
        let (mut at, end) = (from, self.len());
        while at < end {
            let piece = self.piece(at);
            let mut left = &piece[..piece.len().min((end - at) as usize)];
            if left.is_empty() {
                break;
            }
            while let Some((first, rest)) = left.split_first() {
                let first = first.load(Relaxed);
                let mut next = first.wrapping_add(1);
                let mut n = 1;
                for frame in rest {
                    if frame.load(Relaxed) != next {
                        break;
                    }
                    next = next.wrapping_add(1);
                    n += 1;
                }
                f(at, Pfn(first), n)?;
                at += n;
                left = &left[n as usize..];
            }
        }
        Ok(())
    }
}
