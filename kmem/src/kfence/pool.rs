//! The pool: pages, slots, and what is done with them.

use super::{
    KfenceError,
    slot::{ALLOCATED, DYING, FREED, FREEING, Info, NO_CPU, Slot, UNUSED},
};
use crate::{context::Cpu, error::Name, platform::Platform, sync::IrqLock, types::Pfn};
use core::{
    panic::Location,
    ptr::{self, NonNull},
    sync::atomic::{
        AtomicU8, AtomicU64, AtomicUsize,
        Ordering::{AcqRel, Relaxed, Release},
    },
};

/// No slot.
const NONE: u32 = u32::MAX;

/// Free slots, the one that was freed first in front.
struct Free {
    first: u32,
    last: u32,
    used: u32,
    /// Draws sides.
    random: u64,
}

/// A machine's pool. Slot `i`'s page is the one with number `2 i + 2`; all others are guards.
pub(crate) struct Pool {
    /// Where the first page is, and its frame.
    base: usize,
    pfn: u32,
    page_shift: u32,
    slots: &'static [Slot],
    /// By page: whether a guard or a freed object's page was opened after a fault.
    opened: &'static [AtomicU8],
    free: IrqLock<Free>,
    /// Frames, those of its tables included.
    pub(crate) frames: u64,
    pub(crate) allocations: AtomicU64,
    pub(crate) frees: AtomicU64,
    pub(crate) bugs: AtomicU64,
    pub(crate) full: AtomicU64,
}

/// What an allocation asks for.
pub(crate) struct Ask {
    /// Number and name of the cache.
    pub(crate) cache: u16,
    pub(crate) name: Name,
    /// Bytes; at most a page.
    pub(crate) size: u32,
    pub(crate) align: u32,
    pub(crate) at: &'static Location<'static>,
}

/// Why an address is not freed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum FreeError {
    /// There was an object, which is free.
    Free,
    /// It is an object of another cache.
    WrongCache,
    /// It is in an object, behind its beginning.
    Inside,
    /// It is in none.
    NoObject,
    /// The object is freed; what is around it was written to.
    Damaged(Damage),
}

/// Bytes that a report shows.
pub(super) const DUMP: usize = 16;

/// Bytes around an object that were written to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Damage {
    /// Where the first of them is, from the object's beginning.
    pub(crate) offset: i32,
    /// It and those behind it, and whether each was written to.
    pub(super) bytes: [(u8, bool); DUMP],
    pub(super) nr: usize,
}

impl Damage {
    /// The first byte.
    pub(crate) fn found(&self) -> u8 {
        self.bytes[0].0
    }
}

/// What a fault is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Fault {
    /// The access came too late, or the page was opened already: nothing to report, try again.
    Stale,
    /// Beyond this slot's object.
    OutOfBounds(usize),
    /// This slot's object is free.
    UseAfterFree(usize),
    /// Near no object.
    Invalid,
}

/// What a byte holds beside an object.
fn canary(addr: usize) -> u8 {
    0xaa ^ (addr as u8 & 7)
}

/// Alignment of the tables behind the pool.
const TABLE_ALIGN: usize = 16;

impl Pool {
    /// Bytes of the tables of a pool of so many pages.
    pub(crate) fn table_bytes(pages: usize) -> usize {
        let slots = (pages / 2 - 1) * size_of::<Slot>();
        size_of::<Pool>().next_multiple_of(TABLE_ALIGN)
            + slots.next_multiple_of(TABLE_ALIGN)
            + pages
    }

    /// Makes a pool and takes its pages out of the direct map.
    ///
    /// # Safety
    /// `at` and `tables` are zeroed pages of the direct map, aligned to a page, the pool's until the machine goes:
    /// `pages` from frame `pfn` on, an even number and 4 at least, and `table_bytes(pages)`. Their provenance is
    /// exposed.
    pub(crate) unsafe fn new<P: Platform>(
        p: &P,
        (at, pfn, pages): (NonNull<u8>, u32, u32),
        tables: NonNull<u8>,
        frames: u64,
    ) -> Result<&'static Pool, KfenceError> {
        if !p.set_direct_map(Pfn(pfn), pages, false) {
            return Err(KfenceError::Unsupported);
        }
        let nr = pages as usize / 2 - 1;
        let slots_at = size_of::<Pool>().next_multiple_of(TABLE_ALIGN);
        let opened_at = slots_at + (nr * size_of::<Slot>()).next_multiple_of(TABLE_ALIGN);
        // SAFETY: by the contract there is room for the pool, its slots and a byte for each page, one behind the
        // other; slots and bytes are atomics, for which zero is a value.
        unsafe {
            let first = tables.as_ptr();
            let slots: &'static [Slot] =
                core::slice::from_raw_parts(first.add(slots_at).cast(), nr);
            let opened = core::slice::from_raw_parts(first.add(opened_at).cast(), pages as usize);
            for (i, slot) in slots.iter().enumerate() {
                slot.next.store(if i + 1 < nr { i as u32 + 1 } else { NONE }, Relaxed);
            }
            let free = Free { first: 0, last: nr as u32 - 1, used: 0, random: p.now_ns() | 1 };
            let pool = first.cast::<Pool>();
            pool.write(Pool {
                base: at.as_ptr().expose_provenance(),
                pfn,
                page_shift: P::PAGE_SHIFT,
                slots,
                opened,
                free: IrqLock::new(free),
                frames,
                allocations: AtomicU64::new(0),
                frees: AtomicU64::new(0),
                bugs: AtomicU64::new(0),
                full: AtomicU64::new(0),
            });
            Ok(&*pool)
        }
    }

    fn page_size(&self) -> usize {
        1 << self.page_shift
    }

    /// First frame and number of frames of the pages.
    pub(crate) fn pages(&self) -> (u32, u32) {
        (self.pfn, self.opened.len() as u32)
    }

    pub(crate) fn slots(&self) -> &'static [Slot] {
        self.slots
    }

    #[inline]
    pub(crate) fn contains(&self, addr: usize) -> bool {
        addr.wrapping_sub(self.base) < self.opened.len() << self.page_shift
    }

    /// The page that an address of the pool's is in.
    fn page_of(&self, addr: usize) -> usize {
        addr.wrapping_sub(self.base) >> self.page_shift
    }

    /// The slot whose page that is; `None` for guards.
    fn slot_of(&self, page: usize) -> Option<usize> {
        let i = (page / 2).checked_sub(1)?;
        (page.is_multiple_of(2) && i < self.slots.len()).then_some(i)
    }

    fn page(i: usize) -> usize {
        2 * i + 2
    }

    /// Where a slot's object begins, or began.
    pub(crate) fn address(&self, i: usize, info: Info) -> usize {
        self.base + (Self::page(i) << self.page_shift) + usize::from(info.offset)
    }

    /// The object in use that begins at an address, if one does.
    pub(crate) fn object_at(&self, addr: usize) -> Option<Info> {
        let i = self.slot_of(self.page_of(addr))?;
        let info = self.slots[i].info();
        (info.live() && self.address(i, info) == addr).then_some(info)
    }

    /// Whether the object that begins at an address waits for its readers.
    pub(crate) fn is_dying(&self, addr: usize) -> bool {
        self.slot_at(addr).is_some_and(|(i, slot)| {
            let info = slot.info();
            info.in_use() && !info.live() && self.address(i, info) == addr
        })
    }

    /// Makes the object that begins at an address wait for its readers, so that nobody else frees it; says whether it
    /// did.
    pub(crate) fn set_dying(&self, addr: usize) -> bool {
        self.slot_at(addr).is_some_and(|(i, slot)| {
            let info = slot.info();
            self.address(i, info) == addr && slot.set_dying(info)
        })
    }

    /// Calls `f` with the address of each object in use and what is known of it.
    pub(crate) fn each_live(&self, mut f: impl FnMut(usize, Info)) {
        for (i, slot) in self.slots.iter().enumerate() {
            let info = slot.info();
            if info.in_use() {
                f(self.address(i, info), info);
            }
        }
    }

    fn valid<P: Platform>(&self, p: &P, page: usize, valid: bool) -> bool {
        p.set_direct_map(Pfn(self.pfn + page as u32), 1, valid)
    }

    /// The bytes of a page, while it is in the direct map, from one offset to another.
    fn bytes(&self, page: usize, from: usize, to: usize) -> impl Iterator<Item = *mut u8> {
        let first = self.base + (page << self.page_shift);
        (first + from..first + to).map(ptr::with_exposed_provenance_mut)
    }

    /// Copies words from an address on, as far as they are the object's there; returns how many.
    pub(crate) fn copy<P: Platform>(&self, p: &P, addr: usize, words: &mut [usize]) -> usize {
        let Some((i, slot)) = self.slot_at(addr) else { return 0 };
        let mut nr = 0;
        let irq = p.local_irq_save();
        slot.read(|info| {
            let begin = self.address(i, info);
            let end = begin + usize::from(info.size);
            if addr >= begin && addr < end {
                nr = words.len().min((end - addr) / size_of::<usize>());
                for (i, word) in words[..nr].iter_mut().enumerate() {
                    let at = ptr::with_exposed_provenance_mut::<usize>(addr).wrapping_add(i);
                    // SAFETY: a word of an object whose page stays while it is read; its owner may write to it.
                    *word = unsafe { AtomicUsize::from_ptr(at) }.load(Relaxed);
                }
            }
        });
        p.local_irq_restore(irq);
        nr
    }

    /// Whether most slots are in use and one of them by that caller.
    fn covered(&self, used: u32, at: &'static Location<'static>) -> bool {
        used as usize * 4 > self.slots.len() * 3
            && self.slots.iter().any(|slot| {
                slot.info().live()
                    && slot.allocated.get().is_some_and(|(site, ..)| ptr::eq(site, at))
            })
    }

    /// Takes a slot off the list; the second says whether the object goes to the end of its page.
    fn pop<P: Platform>(&self, p: &P, ask: &Ask) -> Option<(usize, bool)> {
        let used = self.free.lock(p).used;
        if self.covered(used, ask.at) {
            return None;
        }
        let mut free = self.free.lock(p);
        let i = free.first as usize;
        let slot = self.slots.get(i)?;
        free.first = slot.next.load(Relaxed);
        if free.first == NONE {
            free.last = NONE;
        }
        free.used += 1;
        free.random = free.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        Some((i, free.random >> 63 == 1))
    }

    fn push<P: Platform>(&self, p: &P, i: usize) {
        let mut free = self.free.lock(p);
        self.slots[i].next.store(NONE, Relaxed);
        match self.slots.get(free.last as usize) {
            Some(last) => last.next.store(i as u32, Relaxed),
            None => free.first = i as u32,
        }
        free.last = i as u32;
        free.used -= 1;
    }

    /// Takes an object; its address, and the place of a state byte that never says that it is live. Its
    /// contents are anything.
    pub(crate) fn alloc<P: Platform>(
        &self,
        p: &P,
        ask: &Ask,
    ) -> Option<(NonNull<u8>, &'static AtomicU8)> {
        let full = || _ = self.full.fetch_add(1, Relaxed);
        let Some((i, right)) = self.pop(p, ask) else {
            full();
            return None;
        };
        let (page, slot) = (Self::page(i), &self.slots[i]);
        if !self.valid(p, page, true) {
            self.push(p, i);
            full();
            return None;
        }
        self.opened[page].store(0, Relaxed);
        slot.byte().store(0, Relaxed);
        let size = ask.size as usize;
        let align = (ask.align as usize).max(1);
        let offset = if right { (self.page_size() - size) & !(align - 1) } else { 0 };
        let before = self.bytes(page, 0, offset);
        for at in before.chain(self.bytes(page, offset + size, self.page_size())) {
            // SAFETY: a byte of a page that is in the direct map and nobody else's.
            unsafe { at.write(canary(at.addr())) };
        }
        slot.set_name(ask.name);
        slot.allocated.set(Some(ask.at), cpu_of(p), p.now_ns());
        slot.freed.set(None, NO_CPU, 0);
        let info =
            Info { state: ALLOCATED, cache: ask.cache, offset: offset as u16, size: size as u16 };
        slot.set(info);
        self.allocations.fetch_add(1, Relaxed);
        let at = NonNull::new(ptr::with_exposed_provenance_mut(self.address(i, info)))?;
        Some((at, slot.byte()))
    }

    /// Address, size and slot of the object in use that an address is in.
    pub(crate) fn object_around(&self, addr: usize) -> Option<(usize, usize, &'static Slot)> {
        let (i, slot) = self.slot_at(addr)?;
        let info = slot.info();
        let (begin, size) = (self.address(i, info), usize::from(info.size));
        (info.in_use() && (begin..begin + size).contains(&addr)).then_some((begin, size, slot))
    }

    /// The slot that an address is in the page of.
    pub(crate) fn slot_at(&self, addr: usize) -> Option<(usize, &'static Slot)> {
        let i = self.slot_of(self.page_of(addr))?;
        Some((i, &self.slots[i]))
    }

    /// Frees the object that begins at an address, to `cache` if the caller named one: one in use, or one that `waited`
    /// for its readers. `last` is called with the object before its page is taken away, unless it is refused.
    pub(crate) fn free<P: Platform>(
        &self,
        p: &P,
        addr: usize,
        (cache, waited): (Option<u16>, bool),
        at: &'static Location<'static>,
        last: impl FnOnce(NonNull<u8>, Info),
    ) -> Result<(), FreeError> {
        let (i, slot) = self.slot_at(addr).ok_or(FreeError::NoObject)?;
        let info = slot.info();
        let begin = self.address(i, info);
        if info.state == UNUSED || !(begin..begin + usize::from(info.size)).contains(&addr) {
            return Err(FreeError::NoObject);
        }
        if info.state != if waited { DYING } else { ALLOCATED } {
            return Err(FreeError::Free);
        }
        if cache.is_some_and(|id| id != info.cache) {
            return Err(FreeError::WrongCache);
        }
        if begin != addr {
            return Err(FreeError::Inside);
        }
        if !slot.begin_free(info) {
            return Err(FreeError::Free);
        }
        slot.wait_for_readers(|| p.relax());
        let damage = self.damage(i, info);
        if let Some(object) = NonNull::new(ptr::with_exposed_provenance_mut(addr)) {
            last(object, info);
        }
        slot.freed.set(Some(at), cpu_of(p), p.now_ns());
        let page = Self::page(i);
        // Where the platform fails, accesses after this one are not found out.
        self.valid(p, page, false);
        self.opened[page].store(0, Relaxed);
        [page - 1, page + 1].into_iter().for_each(|guard| self.close(p, guard));
        slot.set(Info { state: FREED, ..info });
        self.frees.fetch_add(1, Relaxed);
        self.push(p, i);
        damage.map_or(Ok(()), |damage| Err(FreeError::Damaged(damage)))
    }

    /// Closes a guard that was opened after a fault.
    fn close<P: Platform>(&self, p: &P, guard: usize) {
        if self.opened[guard].swap(0, AcqRel) != 0 {
            // Whoever marked it may not have come to it yet.
            if self.valid(p, guard, true) {
                p.zero_frames(Pfn(self.pfn + guard as u32), 1);
            }
            self.valid(p, guard, false);
        }
    }

    /// What is around an object from the first byte on that is not a canary.
    fn damage(&self, i: usize, info: Info) -> Option<Damage> {
        let page = Self::page(i);
        let begin = usize::from(info.offset);
        let end = begin + usize::from(info.size);
        let around = self.bytes(page, 0, begin).chain(self.bytes(page, end, self.page_size()));
        // SAFETY: a byte of a page that is in the direct map while the object is being freed.
        let read = |at: *mut u8| (at.addr(), unsafe { at.read() });
        let mut around = around.map(read).skip_while(|(addr, found)| *found == canary(*addr));
        let (addr, found) = around.next()?;
        let mut damage = Damage {
            offset: addr.wrapping_sub(self.address(i, info)) as i32,
            bytes: [(found, true); DUMP],
            nr: 1,
        };
        for (next, found) in around.take(DUMP - 1) {
            // What is on the other side of the object is another matter.
            if next != addr + damage.nr {
                break;
            }
            damage.bytes[damage.nr] = (found, found != canary(next));
            damage.nr += 1;
        }
        Some(damage)
    }

    /// What a fault at an address of the pool's is about. The page is marked as opened: whoever is told so opens
    /// it. Takes no lock.
    pub(crate) fn fault(&self, addr: usize) -> Fault {
        let page = self.page_of(addr);
        if self.opened[page].swap(1, AcqRel) != 0 {
            return Fault::Stale;
        }
        if let Some(i) = self.slot_of(page) {
            // Whatever it is by now, the page was not there a moment ago.
            return match self.slots[i].info().state {
                UNUSED => Fault::Invalid,
                _ => Fault::UseAfterFree(i),
            };
        }
        let used = |page: usize| {
            let i = self.slot_of(page)?;
            let info = self.slots[i].info();
            let begin = self.address(i, info);
            let far = match addr < begin {
                true => begin - addr,
                false => addr - (begin + usize::from(info.size)) + 1,
            };
            matches!(info.state, ALLOCATED | FREEING | DYING).then_some((far, i))
        };
        let left = page.checked_sub(1).and_then(used);
        let near = left.into_iter().chain(used(page + 1)).min();
        near.map_or(Fault::Invalid, |(_, i)| Fault::OutOfBounds(i))
    }

    /// Opens the page that an address is in, so that an access goes on; says whether the platform did so.
    pub(crate) fn open<P: Platform>(&self, p: &P, addr: usize) -> bool {
        let page = self.page_of(addr);
        let open = self.valid(p, page, true);
        // Again: whoever closed it since the fault was noted has to come back for it.
        self.opened[page].store(1, Release);
        open
    }
}

fn cpu_of<P: Platform>(p: &P) -> u32 {
    p.this_cpu().map_or(NO_CPU, |cpu: &Cpu| cpu.id() as u32)
}
