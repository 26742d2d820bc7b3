//! Who holds each page (`page_owner`) \[D2, T1\].
//!
//! # Concepts
//! While owners are noted, every block that is given out is noted with the place in the source that asked for it,
//! the task, the time, the CPU and the flags; when it is freed, with the place that freed it. Reports of wrong
//! frees tell both, and [`write_page_owner`](PageAllocator::write_page_owner) lists all blocks that are held.
//!
//! A machine that was brought up with [`Config::page_owner`](super::Config::page_owner) has room for that, 48 bytes a
//! frame, and notes from then on; it may be switched off and on again. What was given out while it was off is nobody's.
//!
//! # Implementation
//! A sparse table beside the memory map with an entry for each frame (`entry`), of which that of a block's first frame is
//! used: an allocation writes one entry, whatever its order. A split copies it to each piece. Places are numbers of
//! the machine's table of them (`sites`).
//!
//! A bit of the gate leads every request and every free to the general path, which notes; off it costs nothing. Each time it
//! is switched on is a *round* of its own: what an entry says of an earlier one is not believed, since
//! the block may have changed hands unseen.
//!
//! # Locking
//! None for notes: an entry is written by whoever has the block to itself. A leaf for those who switch.
//!
//! See [page owner](https://docs.kernel.org/mm/page_owner.html).

mod entry;

use super::{GATE_OWNER, PageAllocator, slow::Reclaim};
use crate::{
    context::{Comm, Cpu},
    gfp::Gfp,
    page::Page,
    platform::Platform,
    sites::{PLACES, Sites},
    sync::IrqLock,
    types::{PAGEBLOCK_FRAMES, Pfn},
};
use core::{
    fmt,
    panic::Location,
    ptr::NonNull,
    sync::atomic::{
        AtomicU32,
        Ordering::{AcqRel, Acquire, Relaxed, Release},
    },
};
use entry::{Entry, Note};

/// The notes of a machine.
pub(super) struct Owners {
    /// By frame, from the map's first on.
    entries: &'static [Entry],
    base: u32,
    round: AtomicU32,
    /// Taken to switch.
    switch: IrqLock<()>,
}

impl Owners {
    /// Bytes for each frame.
    pub(super) const PER_FRAME: usize = size_of::<Entry>();

    /// Notes of `frames` frames from `base` on.
    ///
    /// # Safety
    /// `at` is zero-filled, of [`PER_FRAME`](Self::PER_FRAME) bytes for each of them, aligned to a page, nobody else's,
    /// and stays until the machine goes. Bytes of frames that do not exist are only read.
    pub(super) unsafe fn new(base: u32, frames: u32, at: NonNull<u8>) -> Owners {
        // SAFETY: the caller's; an entry is atomics, for which zero is a value.
        let entries = unsafe { core::slice::from_raw_parts(at.as_ptr().cast(), frames as usize) };
        Owners { entries, base, round: AtomicU32::new(0), switch: IrqLock::new(()) }
    }

    fn entry(&self, pfn: u32) -> Option<&'static Entry> {
        self.entries.get(pfn.wrapping_sub(self.base) as usize)
    }

    fn round(&self) -> u16 {
        self.round.load(Acquire) as u16
    }

    /// What is noted of the block whose first frame is, or was, this one, if it is of the present round.
    fn read(&self, pfn: u32) -> Option<Note> {
        self.entry(pfn)?.read().filter(|note| note.round == self.round())
    }
}

/// What is known of who allocated a block, and of who freed it.
#[derive(Clone, Copy)]
pub struct PageOwner {
    /// First frame of the block.
    pub pfn: Pfn,
    /// Its order.
    pub order: u32,
    /// Flags of the request, as scopes left them.
    pub gfp: Gfp,
    /// The task that ran on the CPU; 0 for none.
    pub pid: u32,
    /// The task's name.
    pub comm: Comm,
    /// The CPU; `None` for a caller on none.
    pub cpu: Option<usize>,
    /// When it was allocated, in [`Platform::now_ns`].
    pub allocated_ns: u64,
    /// Who asked; `None` if there are too many places to tell apart.
    pub allocated_at: Option<&'static Location<'static>>,
    /// When it was freed, and by whom; `None` while it is held.
    pub freed: Option<(u64, Option<&'static Location<'static>>)>,
}

/// An owner in a report. Its lines each begin with a line break: they follow the line that says what is wrong.
struct Story(Option<PageOwner>);

impl fmt::Display for Story {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(owner) = self.0 else { return Ok(()) };
        let place = |f: &mut fmt::Formatter<'_>, at: Option<&Location<'_>>| match at {
            Some(at) => write!(f, "at {}:{}:{}", at.file(), at.line(), at.column()),
            None => f.write_str("somewhere"),
        };
        let time = |f: &mut fmt::Formatter<'_>, ns: u64| {
            write!(f, ", at {}.{:06} s", ns / 1_000_000_000, ns / 1000 % 1_000_000)
        };
        write!(f, "\n  pfn:{}, order {}, allocated ", owner.pfn, owner.order)?;
        place(f, owner.allocated_at)?;
        write!(f, ", by pid {} ({}), ", owner.pid, owner.comm)?;
        match owner.cpu {
            Some(cpu) => write!(f, "on CPU {cpu}")?,
            None => f.write_str("on no CPU")?,
        }
        time(f, owner.allocated_ns)?;
        let Some((ns, at)) = owner.freed else { return Ok(()) };
        f.write_str("\n  freed ")?;
        place(f, at)?;
        time(f, ns)
    }
}

impl<P: Platform, R: Reclaim> PageAllocator<P, R> {
    /// Whether owners of pages are noted from now on \[D2\]. What was noted before a switch is forgotten. `false` if
    /// that cannot be: the machine was brought up without [`Config::page_owner`](super::Config::page_owner).
    ///
    /// Context: any but NMI.
    ///
    /// See [page owner](https://docs.kernel.org/mm/page_owner.html).
    pub fn set_page_owner(&self, on: bool) -> bool {
        let Some(owners) = &self.owners else { return !on };
        // One at a time: a round begins while it is off.
        let _switch = owners.switch.lock(&self.p);
        if on && !self.notes_owners() {
            // Round 0 is what empty entries say.
            let next = owners.round.load(Relaxed) as u16 as u32 % u32::from(u16::MAX) + 1;
            // Release pairs with the Acquire in `note_alloc`.
            owners.round.store(next, Release);
        }
        self.gate_set(GATE_OWNER, on);
        true
    }

    /// Whether owners of pages are noted.
    pub fn notes_owners(&self) -> bool {
        self.gate.load(Relaxed) & GATE_OWNER != 0
    }

    fn noting(&self) -> Option<&Owners> {
        self.owners.as_ref().filter(|_| self.notes_owners())
    }

    /// Notes who was given a block.
    #[inline]
    pub(super) fn note_alloc(
        &self,
        page: &Page,
        order: u32,
        gfp: Gfp,
        at: &'static Location<'static>,
    ) {
        let Some(owners) = &self.owners else { return };
        // Before the look at the gate (Acquire pairs with the Release in `set_page_owner`): owners are noted in that round,
        // not in one before it. It may end until the entry is written; then nobody believes that.
        let round = owners.round();
        if self.notes_owners()
            && let Some(pfn) = self.map.pfn(page)
            && let Some(entry) = owners.entry(pfn)
        {
            let cpu = self.p.this_cpu();
            let (pid, comm) = cpu
                .and_then(Cpu::current)
                .map_or((0, Comm::default()), |task| (task.pid(), task.comm()));
            entry.write(&Note {
                live: true,
                order,
                allocated_at: self.site(at),
                freed_at: 0,
                cpu: cpu.map(Cpu::id),
                round,
                gfp,
                pid,
                allocated_ns: self.p.now_ns(),
                freed_ns: 0,
                comm,
            });
        }
    }

    /// Notes that the caller frees a block, which is on no list yet.
    #[inline]
    #[track_caller]
    pub(super) fn note_free(&self, pfn: u32) {
        if let Some(owners) = self.noting()
            && let Some(entry) = owners.entry(pfn)
            && let Some(note) = entry.read()
        {
            let freed_at = self.site(Location::caller());
            entry.write(&Note { live: false, freed_at, freed_ns: self.p.now_ns(), ..note });
        }
    }

    /// Notes that a block became blocks of a smaller order, each of the same owner.
    pub(super) fn note_split(&self, pfn: u32, order: u32, to: u32) {
        let Some(owners) = self.noting() else { return };
        let Some(note) = owners.entry(pfn).and_then(Entry::read) else { return };
        for n in 0..1 << (order - to) {
            if let Some(entry) = owners.entry(pfn + (n << to)) {
                entry.write(&Note { order: to, ..note });
            }
        }
    }

    fn site(&self, at: &'static Location<'static>) -> u32 {
        self.sites().map_or(0, |sites| sites.number(at))
    }

    /// The machine's table of places, if there is one.
    pub(crate) fn sites(&self) -> Option<&'static Sites> {
        // SAFETY: null or a table, which is kept until the machine goes. Acquire pairs with the AcqRel that
        // published it.
        unsafe { self.sites.load(Acquire).as_ref() }
    }

    /// Makes memory the machine's table of places, unless it has one; says whether it did.
    ///
    /// # Safety
    /// `at` is zero-filled, of the size and alignment of a table, and nobody else's until the machine goes, if this
    /// says so.
    pub(crate) unsafe fn take_sites(&self, at: NonNull<Sites>) -> bool {
        let none = core::ptr::null_mut();
        // AcqRel: whoever finds it sees zeros, which are an empty table.
        self.sites.compare_exchange(none, at.as_ptr(), AcqRel, Acquire).is_ok()
    }

    fn owner_from(&self, pfn: u32, note: &Note) -> PageOwner {
        let place = |number| self.sites().and_then(|sites| sites.place(number));
        PageOwner {
            pfn: Pfn(pfn),
            order: note.order,
            gfp: note.gfp,
            pid: note.pid,
            comm: note.comm,
            cpu: note.cpu,
            allocated_ns: note.allocated_ns,
            allocated_at: place(note.allocated_at),
            freed: (!note.live).then(|| (note.freed_ns, place(note.freed_at))),
        }
    }

    /// Who holds the block that the frame is in, or who freed the last one it was in \[D2\]. `None` if that is not
    /// known: owners are not noted, or were not when it was given out, or it is changing hands right now.
    ///
    /// Context: any.
    pub fn page_owner(&self, pfn: Pfn) -> Option<PageOwner> {
        let owners = self.noting()?;
        let page = self.map.page(pfn)?;
        let live = if page.state().is_allocated() {
            Some(pfn.0)
        } else {
            self.head_of(pfn.0).map(|(head, _)| head)
        };
        if let Some(head) = live {
            let note = owners.read(head).filter(|note| note.live)?;
            return Some(self.owner_from(head, &note));
        }
        // Of the blocks that it was in, each with its own first frame, the one freed last.
        let was = |order| {
            let head = pfn.align_down(order).0;
            let note = owners.read(head)?;
            let was_in = !note.live && pfn.0 - head < 1 << note.order;
            was_in.then_some((head, note))
        };
        let last = (0..=self.max_order).filter_map(was).max_by_key(|(_, note)| note.freed_ns)?;
        Some(self.owner_from(last.0, &last.1))
    }

    /// What a report says about the owner of the frame in question.
    pub(super) fn owner_story(&self, pfn: Option<Pfn>) -> impl fmt::Display + use<P, R> {
        Story(pfn.and_then(|pfn| self.page_owner(pfn)))
    }

    /// Calls `f` with each block that is held and whose owner is known, by ascending frames. Each is right for some
    /// moment, not all for the same.
    ///
    /// Context: any. Looks at every frame of the machine.
    pub fn each_page_owner(&self, mut f: impl FnMut(&PageOwner)) {
        self.each_note(|pfn, note| f(&self.owner_from(pfn, note)));
    }

    fn each_note(&self, mut f: impl FnMut(u32, &Note)) {
        let Some(owners) = self.noting() else { return };
        let (start, end) = self.map.span();
        let mut pfn = start;
        while pfn < end {
            let Some(page) = self.map.page(Pfn(pfn)) else {
                pfn = (pfn / PAGEBLOCK_FRAMES + 1) * PAGEBLOCK_FRAMES;
                continue;
            };
            let state = page.state();
            if !state.is_allocated() {
                pfn += 1;
                continue;
            }
            if let Some(note) = owners.read(pfn).filter(|n| n.live && n.order == state.order()) {
                f(pfn, &note);
            }
            pfn = pfn.saturating_add(1 << state.order());
        }
    }

    /// Calls `f` with each place that holds pages, its bytes and its blocks; `None` is all the places that cannot
    /// be told apart. Blocks that do not `count` are left out.
    pub(crate) fn each_page_tag(
        &self,
        count: impl Fn(Pfn) -> bool,
        mut f: impl FnMut(Option<&'static Location<'static>>, u64, u64),
    ) {
        /// Places that are counted in one walk.
        const AT_ONCE: usize = 64;
        let place = |number: usize| self.sites().and_then(|sites| sites.place(number as u32));
        for first in (0..=PLACES).step_by(AT_ONCE) {
            let places = first..(first + AT_ONCE).min(PLACES + 1);
            if places.clone().all(|n| n != 0 && place(n).is_none()) {
                continue;
            }
            let mut counts = [(0u64, 0u64); AT_ONCE];
            self.each_note(|pfn, note| {
                let number = note.allocated_at as usize;
                if places.contains(&number) && count(Pfn(pfn)) {
                    let (bytes, blocks) = &mut counts[number - first];
                    *bytes += 1 << (P::PAGE_SHIFT + note.order);
                    *blocks += 1;
                }
            });
            for (number, (bytes, blocks)) in places.zip(counts).filter(|(_, c)| c.1 > 0) {
                f(place(number), bytes, blocks);
            }
        }
    }
}
