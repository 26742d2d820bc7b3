//! Watermarks and reserves: computing them, and deciding by them \[Z3, Z4, G2\].
//!
//! # Concepts
//! `min_free_kbytes` is spread over the zones that hold kernel data, in proportion to their size: that
//! is *min*. *low* and *high* are a quarter above each other, or `watermark_scale_factor` ten-thousandths of the
//! zone if that is more. Who may go below min, and how far, is in [`AllocFlags::depth`].
//!
//! # Locking
//! None: single atomics. The marks of the fast path are recomputed by whoever changes what they come from, a setting or the
//! free frames kept for high-order atomic requests, and again if that changed meanwhile; no lock is held then.
//!
//! See [`min_free_kbytes`, `lowmem_reserve_ratio`](https://docs.kernel.org/admin-guide/sysctl/vm.html).

use super::{Watermarks, Zone};
use crate::types::{MAX_NR_ZONES, ZoneType};
use core::{
    array,
    sync::atomic::{
        Ordering::{Relaxed, SeqCst},
        fence,
    },
};

/// What a request may do with watermarks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct AllocFlags {
    /// Which mark to compare with: 0 min, 1 low, 2 high.
    pub(crate) wmark: u8,
    /// `__GFP_HIGH`: half of min.
    pub(crate) min_reserve: bool,
    /// Cannot sleep: with `min_reserve`, another quarter of what is left.
    pub(crate) non_block: bool,
    /// An OOM victim: half of what is left again.
    pub(crate) oom: bool,
    /// May use pageblocks set aside for high-order atomic requests.
    pub(crate) highatomic: bool,
    /// No watermark at all (`__GFP_MEMALLOC`).
    pub(crate) no_watermarks: bool,
    /// Bound by the task's cpuset.
    pub(crate) cpuset: bool,
}

impl AllocFlags {
    pub(crate) const LOW: AllocFlags = AllocFlags {
        wmark: 1,
        min_reserve: false,
        non_block: false,
        oom: false,
        highatomic: false,
        no_watermarks: false,
        cpuset: false,
    };

    /// The number of free frames the request must leave, given the mark it compares with.
    #[inline]
    fn depth(&self, mark: i64) -> i64 {
        let mut min = mark;
        if self.min_reserve {
            min -= min / 2;
            if self.non_block {
                min -= min / 4;
            }
        }
        if self.oom {
            min -= min / 2;
        }
        min
    }

    fn reserves(&self) -> bool {
        self.min_reserve || self.oom || self.highatomic
    }
}

impl Zone {
    /// How many frames a request may take now without going below what its flags allow; zero or less
    /// when none.
    #[inline]
    pub(crate) fn room(&self, highest: usize, flags: AllocFlags) -> i64 {
        let mut free = self.free.load(Relaxed);
        if flags.no_watermarks {
            return free;
        }
        if !flags.reserves() {
            free -= self.free_highatomic.load(Relaxed);
        }
        let mark = self.wmark[usize::from(flags.wmark)].load(Relaxed) as i64;
        free - flags.depth(mark) - self.lowmem_reserve[highest].load(Relaxed) as i64
    }

    /// How many frames an ordinary request may take now without going below the low watermark.
    #[inline(always)]
    pub(crate) fn room_above_low(&self, highest: usize) -> i64 {
        self.free.load(Relaxed) - self.fast_mark[highest & 7].load(Relaxed)
    }

    /// Sets the watermarks; they take effect at once.
    pub(crate) fn set_watermarks(&self, w: Watermarks) {
        for (slot, v) in self.wmark.iter().zip([w.min, w.low, w.high, w.promo]) {
            slot.store(v, Relaxed);
        }
        self.update_fast_marks();
    }

    pub(crate) fn set_lowmem_reserve(&self, reserve: [u64; MAX_NR_ZONES]) {
        for (slot, v) in self.lowmem_reserve.iter().zip(reserve) {
            slot.store(v, Relaxed);
        }
        self.update_fast_marks();
    }

    /// Recomputes what the fast path compares with: the low watermark, the reserve, and the frames
    /// that only high-order atomic requests may have.
    pub(crate) fn update_fast_marks(&self) {
        loop {
            // Two that change what the marks come from compute them at once, and the one that looked first may store
            // last. The fences pair with each other: it then finds the other's change here, and does it again.
            fence(SeqCst);
            let seen = self.fast_mark_terms();
            let (low, reserves) = seen;
            for (mark, reserve) in self.fast_mark.iter().zip(reserves) {
                mark.store(low + reserve as i64, Relaxed);
            }
            fence(SeqCst);
            if self.fast_mark_terms() == seen {
                return;
            }
        }
    }

    /// Whether the marks are what they come from, once nobody changes that.
    pub(crate) fn fast_marks_agree(&self) -> bool {
        let (low, reserves) = self.fast_mark_terms();
        let mut marks = self.fast_mark.iter().zip(reserves);
        marks.all(|(mark, reserve)| mark.load(Relaxed) == low + reserve as i64)
    }

    fn fast_mark_terms(&self) -> (i64, [u64; MAX_NR_ZONES]) {
        let low = self.wmark[1].load(Relaxed) as i64 + self.free_highatomic.load(Relaxed);
        (low, array::from_fn(|i| self.lowmem_reserve[i].load(Relaxed)))
    }

    /// Notes that frames came free in pageblocks kept for high-order atomic requests, or were taken there.
    #[cold]
    pub(super) fn add_free_highatomic(&self, frames: i64) {
        self.free_highatomic.fetch_add(frames, Relaxed);
        self.update_fast_marks();
    }
}

/// `min_free_kbytes` for a machine with this many kilobytes of low memory: the square root of sixteen
/// times as many, between 128 and 262144.
pub(crate) fn min_free_kbytes_for(lowmem_kbytes: u64) -> u64 {
    (lowmem_kbytes.saturating_mul(16)).isqrt().clamp(128, 262_144)
}

/// Watermarks of every zone for a `min_free_kbytes` and a scale factor (in ten-thousandths).
pub(crate) fn distribute(zones: &[Zone], page_shift: u32, min_free_kbytes: u64, scale: u64) {
    let pages_min = min_free_kbytes >> (page_shift - 10);
    let holds_kernel_data = |z: &Zone| z.zone_type() <= ZoneType::Normal;
    let lowmem: u64 =
        zones.iter().filter(|z| holds_kernel_data(z)).map(|z| z.managed_frames()).sum();
    for z in zones {
        let managed = z.managed_frames();
        let share = if lowmem == 0 {
            0
        } else {
            (u128::from(pages_min) * u128::from(managed) / u128::from(lowmem)) as u64
        };
        let min = if holds_kernel_data(z) { share } else { (managed / 1024).clamp(32, 128) };
        let step = (share / 4).max((u128::from(managed) * u128::from(scale) / 10_000) as u64);
        z.set_watermarks(Watermarks {
            min,
            low: min + step,
            high: min + 2 * step,
            promo: min + 3 * step,
        });
    }
}

/// The reserve of every zone against requests that could have gone higher: the managed frames of the
/// higher zones of its node, divided by the zone's ratio.
pub(crate) fn reserve(zones: &[Zone], ratio: &[u32; MAX_NR_ZONES]) {
    for z in zones {
        let mut keep = [0; MAX_NR_ZONES];
        let mut above = 0;
        for higher in ZoneType::ALL.iter().skip(z.zone_type() as usize + 1) {
            above += zones
                .iter()
                .filter(|o| o.node() == z.node() && o.zone_type() == *higher)
                .map(|o| o.managed_frames())
                .sum::<u64>();
            let r = u64::from(ratio[z.zone_type() as usize]);
            keep[*higher as usize] = u64::checked_div(above, r).unwrap_or(0);
        }
        z.set_lowmem_reserve(keep);
    }
}
