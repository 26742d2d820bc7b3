//! Areas with a guard before them too, which may be kept after they were freed: kernel stacks are made of them.
//!
//! # Locking
//! A shard of the tree's lock while an address is looked up. LIVE to KEPT by compare-and-exchange, as LIVE to DYING: of
//! two that free an area one succeeds. A KEPT area has one owner, whoever has its [`Guarded`].

use super::{
    By, VmFlags, Vmap, Wanted,
    area::{Area, State},
};
use crate::{
    error::{AllocError, Misuse},
    gfp::Gfp,
    page_alloc::Reclaim,
    platform::Platform,
};
use core::{
    panic::Location,
    ptr::{self, NonNull},
    sync::atomic::{
        AtomicPtr,
        Ordering::{Acquire, Relaxed, Release},
    },
};

/// A guarded area whose owner is whoever has this: one that was just made, or is KEPT.
pub(crate) struct Guarded(&'static Area);

/// A place for one that is kept, or for none. A machine's zeroed memory is one for none.
pub(crate) struct Shelf(AtomicPtr<Area>);

/// Where an address is in a guarded area, and what is known of that.
pub(crate) struct GuardedAt {
    /// Where its frames begin.
    pub(crate) low: NonNull<u8>,
    /// Bytes of them.
    pub(crate) size: usize,
    /// Whether interrupts run on it.
    pub(crate) irq: bool,
    /// Whether it was freed, and is kept.
    pub(crate) kept: bool,
    /// Who asked for it.
    pub(crate) caller: Option<&'static Location<'static>>,
}

/// How many guarded areas there are, and their frames.
#[derive(Clone, Copy, Default)]
pub(crate) struct GuardedCount {
    /// In use.
    pub(crate) live: (u64, u64),
    /// In use for interrupts.
    pub(crate) irq: (u64, u64),
    /// Freed and kept.
    pub(crate) kept: (u64, u64),
}

impl Guarded {
    /// What a shelf notes of it: its descriptor, and in the bits that are free there its frames, less one.
    fn tagged(frames: u32, area: *mut Area) -> *mut Area {
        area.map_addr(|addr| addr | tag(frames))
    }

    /// Frames of its own.
    pub(crate) fn frames(&self) -> u32 {
        self.0.frames.len()
    }
}

const TAGS: usize = align_of::<Area>() - 1;

/// A number of frames as a shelf notes it.
fn tag(frames: u32) -> usize {
    frames.wrapping_sub(1) as usize & TAGS
}

impl Shelf {
    /// Frames of the largest area that a shelf takes.
    pub(crate) const LARGEST: u32 = TAGS as u32 + 1;

    /// A place for none.
    pub(crate) const fn new() -> Shelf {
        Shelf(AtomicPtr::new(ptr::null_mut()))
    }

    /// Puts one there that is KEPT, or gives it back if the place is taken.
    pub(crate) fn put(&self, kept: Guarded) -> Result<(), Guarded> {
        let frames = kept.frames();
        if frames == 0 || frames > Self::LARGEST {
            return Err(kept);
        }
        let noted = Guarded::tagged(frames, ptr::from_ref(kept.0).cast_mut());
        // Release pairs with the Acquire in `take`: who takes it finds it as its last owner left it.
        let put = self.0.compare_exchange(ptr::null_mut(), noted, Release, Relaxed);
        put.map(drop).map_err(|_| kept)
    }

    /// Takes the one that is there, if it has so many frames; any for `None`.
    pub(crate) fn take(&self, frames: Option<u32>) -> Option<Guarded> {
        loop {
            let noted = self.0.load(Relaxed);
            let fits = frames.is_none_or(|frames| noted.addr() & TAGS == tag(frames));
            if noted.is_null() || !fits {
                return None;
            }
            // Acquire pairs with the Release in `put`. One that went and came back has the same size.
            if self.0.compare_exchange(noted, ptr::null_mut(), Acquire, Relaxed).is_ok() {
                // SAFETY: a shelf notes areas that are KEPT, whose descriptors stay; who takes one off is its owner.
                return Some(Guarded(unsafe { &*noted.map_addr(|addr| addr & !TAGS) }));
            }
        }
    }

    /// Frames of the one that is there, if there is one.
    pub(crate) fn frames(&self) -> Option<u32> {
        let noted = self.0.load(Relaxed);
        (!noted.is_null()).then(|| (noted.addr() & TAGS) as u32 + 1)
    }
}

impl<P: Platform, R: Reclaim> Vmap<'_, P, R> {
    /// Makes one, LIVE, that only the caller knows of.
    #[track_caller]
    pub(crate) fn make_guarded(
        self,
        frames: u32,
        gfp: Gfp,
        node: i32,
        irq: bool,
    ) -> Result<Guarded, AllocError> {
        let irq = if irq { VmFlags::IRQ_STACK } else { VmFlags::empty() };
        let flags = VmFlags::ALLOC | VmFlags::STACK | irq;
        let size = frames as usize * Self::PAGE;
        let wanted = Wanted { flags, node, ..Wanted::new(size, gfp) };
        self.check_mapped(&wanted)?;
        self.make(wanted).map(Guarded)
    }

    /// Where the frames of one begin.
    pub(crate) fn low(self, of: &Guarded) -> NonNull<u8> {
        Self::address(of.0)
    }

    /// Calls `f` with the node of each of its frames.
    pub(crate) fn nodes_of(self, of: &Guarded, mut f: impl FnMut(usize)) {
        for pfn in (0..of.frames()).filter_map(|i| of.0.frames.get(i)) {
            f(self.objects.pages.page_zone(pfn).map_or(0, |zone| zone.node()));
        }
    }

    /// Takes the one at an address from LIVE to KEPT.
    #[inline]
    #[track_caller]
    pub(crate) fn keep(self, addr: usize, by: By) -> Result<Guarded, Misuse> {
        self.claim(addr, by, State::Kept).map(Guarded)
    }

    /// Gives one that was kept, or just made (which is KEPT too), to a user.
    pub(crate) fn issue(self, kept: Guarded, to: &'static Location<'static>) -> NonNull<u8> {
        kept.0.set_caller(to);
        kept.0.set_state(State::Live);
        Self::address(kept.0)
    }

    /// Gives one that was kept back: at once, or when the context allows it.
    #[track_caller]
    pub(crate) fn discard(self, kept: Guarded) -> Result<(), Misuse> {
        kept.0.set_state(State::Dying);
        self.finish(kept.0)
    }

    /// Calls `f` with where the frames of the live one begin that an address is in, and how many bytes they are.
    /// Meanwhile nobody frees it.
    pub(crate) fn look<T>(self, addr: usize, f: impl FnOnce(NonNull<u8>, usize) -> T) -> Option<T> {
        self.with_live(addr, |area| {
            let stack = area.flags().contains(VmFlags::STACK);
            stack.then(|| f(Self::address(area), area.frames.len() as usize * Self::PAGE))
        })
    }

    /// Counts them. For a quiet machine.
    pub(crate) fn count_guarded(self) -> GuardedCount {
        let mut count = GuardedCount::default();
        let tree = self.tree();
        let mut from = 0;
        while let Some(area) = tree.next(from) {
            from = area.end();
            let word = area.word();
            let flags = word.flags();
            let of = match word.state() {
                State::Kept => &mut count.kept,
                State::Live if flags.contains(VmFlags::IRQ_STACK) => &mut count.irq,
                State::Live if flags.contains(VmFlags::STACK) => &mut count.live,
                _ => continue,
            };
            *of = (of.0 + 1, of.1 + u64::from(area.frames.len()));
        }
        count
    }

    /// Calls `f` with what guarded area an address is in, its guards included. One that is LIVE nobody frees meanwhile; one
    /// that is KEPT may go, but for its descriptor. For callers who may have the tree's lock themselves: `None` then.
    pub(crate) fn guarded_at<T>(self, addr: usize, f: impl FnOnce(GuardedAt) -> T) -> Option<T> {
        let tree = self.tree_patiently()?;
        let area = tree.find(addr)?;
        let looking = area.look();
        let word = area.word();
        let (flags, kept) = (word.flags(), word.state() == State::Kept);
        let there = looking.is_some() || kept;
        let at = GuardedAt {
            low: Self::address(area),
            size: area.frames.len() as usize * Self::PAGE,
            irq: flags.contains(VmFlags::IRQ_STACK),
            kept,
            caller: area.caller(),
        };
        (there && flags.contains(VmFlags::STACK)).then(|| f(at))
    }
}
