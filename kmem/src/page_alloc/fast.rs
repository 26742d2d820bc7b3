//! The fast path: a block of the CPU's own list, for requests with nothing unusual about them.
//!
//! # Concepts
//! Two steps. [`alloc_pages`](PageAllocator::alloc_pages) itself is inlined and does nothing but take a
//! block off a list that has one: it calls nothing before it leaves for a slower path, so it saves no registers.
//! `alloc_medium` does the same for
//! a list that must be refilled and for orders without lists; what it cannot answer goes the general
//! path.
//!
//! What is unusual is decided by one mask test on the flags and one comparison for context, gate and
//! ownership flag. Everything the specification asks of a request is still true of those that pass:
//! the mask is free of contradictions (one table look-up), the context may do what the flags say, the
//! zone is above its low watermark, the frame's state is checked and set, the events are counted.
//!
//! # Locking
//! Ownership of the CPU's lists; an area's lock during a refill.

use super::{
    Idle, PageAllocator,
    pcp::{ListId, PCP_MAX_SMALL, Pcp, Row},
    slow::Reclaim,
};
use crate::{
    context::{Cpu, Path},
    error::{AllocError, Answer},
    gfp::Gfp,
    page::{Page, PageFlags, PageState},
    platform::Platform,
    prefetch::prefetch,
    types::{MigrateType, PAGEBLOCK_ORDER, Pfn},
    vmstat::VmEvent,
    zone::Zone,
};
use core::{marker::PhantomData, ptr::NonNull};

/// Flags that need the general path.
const UNUSUAL: u32 = Gfp::ZERO.union(Gfp::COLD).union(Gfp::THISNODE).union(Gfp::NOFAIL).bits();

const BAD: u8 = u8::MAX;

/// Highest zone (low nibble) and mobility (high nibble) by the low five bits of a mask: zone modifiers
/// and mobility flags. [`BAD`] for contradictions.
const KEYS: [u8; 32] = {
    let mut t = [BAD; 32];
    let mut i = 0;
    while i < 32 {
        let gfp = Gfp::from_bits_retain(i as u32);
        if gfp.check(0).is_ok()
            && let Some(zone) = gfp.zone_index()
        {
            t[i] = zone as u8 | (gfp.migratetype() as u8) << 4;
        }
        i += 1;
    }
    t
};

/// What a CPU needs for plain requests with a given highest zone: the zone it prefers, and its lists there.
#[derive(Clone, Copy)]
pub(super) struct Preferred<'a> {
    pub(super) zone: &'a Zone,
    /// Those of `pcp`, a look nearer.
    pub(super) row: Row,
    pub(super) pcp: &'a Pcp,
}

/// A plain request, decided.
pub(super) struct Plain<'c> {
    idle: Idle<'c>,
    pub(super) to: Preferred<'static>,
    pub(super) mt: usize,
    /// Frames it may take from the zone.
    room: i64,
}

/// The result of a slower path, in one register.
struct Given<'a>(Answer, PhantomData<&'a Page>);

impl<'a> Given<'a> {
    #[inline(always)]
    fn result(self) -> Result<&'a Page, AllocError> {
        // SAFETY: made of such a result, so it is the address of a page for as long.
        self.0.result().map(|page| unsafe { page.cast::<Page>().as_ref() })
    }
}

impl<'a> From<Result<&'a Page, AllocError>> for Given<'a> {
    #[inline(always)]
    fn from(result: Result<&'a Page, AllocError>) -> Given<'a> {
        Given(result.map(|page| NonNull::from(page).cast()).into(), PhantomData)
    }
}

impl<P: Platform, R: Reclaim> PageAllocator<P, R> {
    /// `alloc_pages`: 2^`order` contiguous frames, naturally aligned, with one reference \[P1\].
    ///
    /// Context: may sleep if `gfp` has `__GFP_DIRECT_RECLAIM`; never from an NMI. The pages come from the
    /// caller's node, or as its memory policy says.
    ///
    /// # Errors
    /// [`AllocError::NoMemory`] after the retries that the flags allow;
    /// `Invalid` and `Context` when the request itself is wrong.
    ///
    /// See [`alloc_pages`](https://docs.kernel.org/core-api/mm-api.html#c.alloc_pages).
    #[inline]
    #[track_caller]
    pub fn alloc_pages(&self, gfp: Gfp, order: u32) -> Result<&Page, AllocError> {
        self.alloc_hot(gfp, order)
    }

    /// `alloc_page`: one frame \[P1\]. As [`alloc_pages`](Self::alloc_pages) with order 0, inlined: with
    /// constant flags most of the checks are done at compile time.
    ///
    /// # Errors
    /// As [`alloc_pages`](Self::alloc_pages).
    #[inline(always)]
    #[track_caller]
    pub fn alloc_page(&self, gfp: Gfp) -> Result<&Page, AllocError> {
        self.alloc_hot(gfp, 0)
    }

    /// The fast path. Slower ones are called on ways out only, and their answer is in a register.
    #[inline(always)]
    #[track_caller]
    fn alloc_hot(&self, gfp: Gfp, order: u32) -> Result<&Page, AllocError> {
        let Some(cpu) = self.p.get_cpu_fast() else {
            return self.alloc_medium(gfp, order).result();
        };
        let taken = self.take_hot(cpu, gfp, order);
        self.p.put_cpu(cpu);
        let Some(page) = taken else { return self.alloc_medium(gfp, order).result() };
        if page.state() != PageState::FREE {
            return self.alloc_doubtful(page, gfp, order).result();
        }
        page.set_allocated(Self::plain_state(gfp, order));
        Ok(page)
    }

    /// What the request comes to, if there is nothing unusual about it, its caller or the machine.
    #[inline(always)]
    pub(super) fn plain<'c>(&self, cpu: &'c Cpu, gfp: Gfp, order: u32) -> Option<Plain<'c>> {
        if gfp.bits() & UNUSUAL != 0 {
            return None;
        }
        let idle = self.idle_plain(cpu, gfp.may_block())?;
        if cpu.task_is_special() {
            return None;
        }
        let key = usize::from(KEYS[(gfp.bits() & 0x1f) as usize]);
        let to = self.data_of(&idle).preferred[key & 0x7]?;
        let room = to.zone.room_above_low(key & 0x7) - (1 << order);
        // A contradictory mask has a key whose mobility has no list.
        (room > 0).then_some(Plain { idle, to, mt: key >> 4, room })
    }

    /// Takes a block of a plain request off its list.
    #[inline(always)]
    fn take_hot(&self, cpu: &Cpu, gfp: Gfp, order: u32) -> Option<&'static Page> {
        if order > PCP_MAX_SMALL {
            return None;
        }
        let r = self.plain(cpu, gfp, order)?;
        let list = ListId::small(order, r.mt)?;
        let owned = self.own_idle(r.idle, Path::PcpAlloc, gfp.may_block());
        let page = r.to.row.pop_hot(list);
        if page.is_some() {
            r.to.row.count_allocs(list, 1);
        }
        self.disown_idle(owned);
        page
    }

    #[inline(always)]
    pub(super) fn plain_state(gfp: Gfp, order: u32) -> PageState {
        let head = gfp.contains(Gfp::COMP) && order > 0;
        PageState::allocated(order, if head { PageFlags::HEAD } else { PageFlags::empty() })
    }

    /// The end of a plain request that was given a frame whose state says that it is not free.
    #[cold]
    #[inline(never)]
    #[track_caller]
    fn alloc_doubtful(&self, page: &Page, gfp: Gfp, order: u32) -> Given<'_> {
        self.bad_page(page);
        self.alloc_medium(gfp, order)
    }

    #[inline(never)]
    #[track_caller]
    fn alloc_medium(&self, gfp: Gfp, order: u32) -> Given<'_> {
        if order <= self.max_order
            && let Some(cpu) = self.p.get_cpu()
        {
            let plain = match self.plain(cpu, gfp, order) {
                None if cpu.set_machine(self.idle) => self.plain(cpu, gfp, order),
                plain => plain,
            };
            let page = plain.and_then(|r| self.alloc_plain(cpu, r, gfp, order));
            self.p.put_cpu(cpu);
            if let Some(page) = page {
                return Ok(page).into();
            }
        }
        self.alloc_general(gfp, order, None).into()
    }

    /// A plain request that the list's blocks at hand do not answer.
    fn alloc_plain(&self, cpu: &Cpu, r: Plain<'_>, gfp: Gfp, order: u32) -> Option<&Page> {
        let Preferred { zone, pcp, .. } = r.to;
        if let Some(list) = ListId::of(order, r.mt)
            && pcp.high(list) > 0
        {
            let owned = self.own(cpu, Path::PcpAlloc)?;
            let page = match pcp.pop_hot(list) {
                Some(page) => Some(page),
                None => self.refill(cpu, zone, pcp, list, r.room, 1),
            };
            pcp.count_allocs(list, u64::from(page.is_some()));
            self.disown(owned);
            return self.dress(page?, Self::plain_state(gfp, order));
        }
        let mt = *MigrateType::ALL.get(r.mt)?;
        let counters = self.counters_of(cpu);
        let before = cpu.set_path(Path::BuddyAlloc);
        let first = Self::first_area(zone, pcp);
        let page = zone.areas_from(first).find_map(|n| {
            zone.with_area(&self.p, &self.map, n, |area| {
                let pfn = if order >= PAGEBLOCK_ORDER {
                    area.take_whole(order, mt)?
                } else {
                    area.take(order, mt)?
                };
                let page = self.map.page_in_map(pfn);
                prefetch(page);
                // Interrupts are masked here, so nobody else counts on this CPU.
                counters.owned(VmEvent::pgalloc(zone.zone_type()), 1 << order);
                pcp.count_direct();
                pcp.note_area(first, n);
                Some(page)
            })
        });
        cpu.restore(before);
        self.dress(page?, Self::plain_state(gfp, order))
    }

    /// Turns a frame taken off a list into the head of a live block. `None`, after a report, if the
    /// frame's state says that it was not free: it is then left alone for ever.
    #[inline(always)]
    pub(super) fn dress(&self, page: &'static Page, state: PageState) -> Option<&'static Page> {
        if page.state() != PageState::FREE {
            self.bad_page(page);
            return None;
        }
        page.set_allocated(state);
        Some(page)
    }

    #[cold]
    #[inline(never)]
    pub(super) fn bad_page(&self, page: &Page) {
        let pfn = self.map.frame_of(page);
        let owner = self.owner_story(Some(Pfn(pfn)));
        self.p.report(
            crate::platform::Level::Bug,
            format_args!("BUG: Bad page state in free list: pfn:{pfn:#x} {page:?}{owner}"),
        );
        self.count(VmEvent::Misuse, 1);
    }
}
