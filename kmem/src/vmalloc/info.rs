//! Looking: what is at an address, all areas, and whether everything is as it should be.
//!
//! # Locking
//! A shard of the tree's lock for one area, or for a piece of its frames, at a time; what a live one shows is looked at
//! while its word says so. An audit holds all of the tree's lock throughout.

use super::{
    VmFlags, Vmap,
    area::{Area, State},
};
use crate::{page::Page, page_alloc::Reclaim, platform::Platform, types::Pfn};
use core::{fmt, panic::Location, sync::atomic::Ordering::Relaxed};

/// Frames looked at under the lock at once.
const PIECE: usize = 64;

/// What is known of an area.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VmAreaInfo {
    /// Its address.
    pub start: usize,
    /// Bytes, the guard included.
    pub size: usize,
    /// What it is.
    pub flags: VmFlags,
    /// Frames that it shows.
    pub frames: u32,
    /// Where on the bus it is, for a device's.
    pub phys: Option<u64>,
    /// Who asked for it.
    pub caller: Option<&'static Location<'static>>,
    /// Whether it was freed, and is not purged yet, or was by another CPU and is not in a pool again.
    pub unpurged: bool,
}

/// What an audit counted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct VmallocAudit {
    /// Areas in use, those freed in atomic context and not unmapped yet included.
    pub live: u64,
    /// Frames in areas of vmalloc's own.
    pub frames: u64,
    /// Areas that were freed and are not purged, or were by another CPU and are not in a pool again.
    pub lazy: u64,
    /// Free areas in pools.
    pub pooled: u64,
    /// Bytes of addresses that no area has.
    pub free: usize,
    /// The largest range of them.
    pub largest: usize,
}

/// What an audit found wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum VmAuditError {
    /// The tree: order, balance, or gaps.
    Tree,
    /// What is on the lists is not what the tree says to be there.
    Lists,
    /// An area of vmalloc's own has a frame that is not in use.
    Frame(Pfn),
}

impl fmt::Display for VmAuditError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            VmAuditError::Tree => f.write_str("the tree of areas is damaged"),
            VmAuditError::Lists => f.write_str("free areas are not where they should be"),
            VmAuditError::Frame(pfn) => write!(f, "frame {pfn} of an area is not in use"),
        }
    }
}

impl core::error::Error for VmAuditError {}

impl<'a, P: Platform, R: Reclaim> Vmap<'a, P, R> {
    /// Calls `f` with the live area that an address is in, which nobody frees meanwhile.
    pub(super) fn with_live<T>(
        &self,
        addr: usize,
        f: impl FnOnce(&Area) -> Option<T>,
    ) -> Option<T> {
        let tree = self.tree();
        let area = tree.find(addr)?;
        let _looking = area.look()?;
        f(area)
    }

    /// `vmalloc_to_pfn`.
    pub(crate) fn to_pfn(self, addr: usize) -> Option<Pfn> {
        self.with_live(addr, |area| {
            let offset = addr.checked_sub(area.shown(Self::PAGE))? >> P::PAGE_SHIFT;
            if !area.flags().contains(VmFlags::IOREMAP) {
                return area.frames.get(u32::try_from(offset).ok()?);
            }
            let first = (area.phys.load(Relaxed) >> P::PAGE_SHIFT) as u32;
            (addr < area.end() - Self::PAGE).then(|| Pfn(first + offset as u32))
        })
    }

    /// `vmalloc_to_page`.
    pub(crate) fn to_page(self, addr: usize) -> Option<&'a Page> {
        self.objects.pages.pfn_to_page(self.to_pfn(addr)?)
    }

    /// Bytes that may be used at the beginning of a live area of vmalloc's own.
    pub(crate) fn usable(self, addr: usize) -> Option<usize> {
        self.with_live(addr, |area| {
            let flags = area.flags() & (VmFlags::ALLOC | VmFlags::STACK);
            let own = area.start() == addr && flags == VmFlags::ALLOC;
            own.then(|| area.size - Self::PAGE)
        })
    }

    /// Calls `f` with each area that is in use or not purged, by address. Areas that come or go meanwhile are
    /// seen or not.
    pub(crate) fn each(&self, mut f: impl FnMut(&VmAreaInfo)) {
        let mut from = 0;
        loop {
            let tree = self.tree();
            let Some(area) = tree.next(from) else { return };
            from = area.end();
            let word = area.word();
            let (state, flags) = (word.state(), word.flags());
            let info = VmAreaInfo {
                start: area.start(),
                size: area.size,
                flags,
                frames: area.frames.len(),
                phys: flags.contains(VmFlags::IOREMAP).then(|| area.phys.load(Relaxed)),
                caller: area.caller(),
                unpurged: state == State::Lazy,
            };
            drop(tree);
            // Others' are free, or not made yet.
            if matches!(state, State::Live | State::Kept | State::Dying | State::Lazy) {
                f(&info);
            }
        }
    }

    /// Counts an area's frames by node.
    pub(crate) fn by_node(&self, info: &VmAreaInfo, count: &mut [u32]) {
        let mut at = 0;
        loop {
            let mut piece = [Pfn(0); PIECE];
            let got = self.with_live(info.start, |area| {
                let frames = piece.iter_mut().zip(area.frames.from(at));
                Some(frames.map(|(place, pfn)| *place = pfn).count())
            });
            let Some(got) = got.filter(|got| *got > 0) else { return };
            for pfn in &piece[..got] {
                let zone = self.objects.pages.page_zone(*pfn);
                if let Some(n) = zone.and_then(|zone| count.get_mut(zone.node())) {
                    *n += 1;
                }
            }
            at += got as u32;
        }
    }

    /// Checks everything. For a quiet machine.
    pub(crate) fn audit(&self) -> Result<VmallocAudit, VmAuditError> {
        let mut audit = VmallocAudit::default();
        let Some(range) = self.p().vmalloc_range() else { return Ok(audit) };
        let pages = self.objects.pages;
        let mut tree = self.state.tree.change(self.p());
        tree.open(range.start, range.end);
        if !tree.is_sound(range.start) {
            return Err(VmAuditError::Tree);
        }
        (audit.largest, audit.free) = tree.free();
        let mut from = 0;
        while let Some(area) = tree.next(from) {
            from = area.end();
            match area.state() {
                State::Lazy => audit.lazy += 1,
                State::Pooled => audit.pooled += 1,
                _ => audit.live += 1,
            }
            if !area.flags().contains(VmFlags::ALLOC) {
                continue;
            }
            let mut at = 0;
            while at < area.frames.len() {
                for pfn in area.frames.from(at) {
                    if pages.pfn_to_page(pfn).is_none_or(|page| page.page_count() == 0) {
                        return Err(VmAuditError::Frame(pfn));
                    }
                    at += 1;
                }
            }
            audit.frames += u64::from(at);
        }
        drop(tree);
        let (mut lazy, mut pooled) = (0, 0);
        for shard in &self.state.shards {
            for area in shard.lists.lock(self.p()).areas() {
                match area.state() {
                    State::Lazy => lazy += 1,
                    State::Pooled => pooled += 1,
                    _ => return Err(VmAuditError::Lists),
                }
            }
        }
        if (lazy, pooled) == (audit.lazy, audit.pooled) {
            Ok(audit)
        } else {
            Err(VmAuditError::Lists)
        }
    }
}
