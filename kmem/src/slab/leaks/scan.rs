//! The scan: from the roots through all that is reached.
//!
//! # Implementation
//! 1. All notes of the last scan are taken off; objects too young to be reported, and those that never are, count as
//!    reached.
//! 2. Roots are looked at, and then what was reached, until there is nothing more.
//! 3. Where objects are left over, everything reached and the roots are looked at once more.
//!
//! Objects that are given out meanwhile have no notes: a walk that meets one counts it as reached.
//!
//! # Locking
//! None while contents are looked at, save for a sampled object's page and foreign memory, which are kept in place for
//! a few words at a time.

use super::{
    super::Objects, AGE, AREAS, DONE, LeakError, LeakScan, MARKED, NO_SCAN, NOT_LEAK, OLD, USERS,
    leaked, walk::Thing,
};
use crate::{gfp::Gfp, page_alloc::Reclaim, platform::Platform};
use core::{
    ops::Range,
    ptr,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

/// Frames of the stack, as a power of two.
const STACK_ORDER: u32 = 2;

/// Words that are looked at at a time.
const CHUNK: usize = 64;

const WORD: usize = size_of::<usize>();

/// An object to be looked at.
#[derive(Clone, Copy)]
struct Todo {
    addr: usize,
    size: usize,
    /// Whether only its areas are.
    areas: bool,
}

/// Objects reached and not looked at yet.
struct Stack<'s> {
    todo: &'s mut [Todo],
    nr: usize,
    /// Some found no room; they are MARKED and not DONE.
    over: bool,
}

impl Stack<'_> {
    /// Marks an object, if `from` its notes it is to be, and notes that it is to be looked at.
    fn reach(&mut self, thing: &Thing<'_>, from: impl Fn(u8) -> bool) {
        let room = self.nr < self.todo.len();
        let done = if room { DONE } else { 0 };
        let mark = &mut |n| (n & DONE == 0 && from(n)).then_some(n | MARKED | done);
        let Some(before) = thing.notes.note(mark) else { return };
        if !room {
            self.over = true;
        } else if before & NO_SCAN == 0 {
            let Thing { addr, size, .. } = *thing;
            self.todo[self.nr] = Todo { addr, size, areas: before & AREAS != 0 };
            self.nr += 1;
        }
    }

    fn pop(&mut self) -> Option<Todo> {
        self.nr = self.nr.checked_sub(1)?;
        Some(self.todo[self.nr])
    }
}

impl<'a, P: Platform, R: Reclaim> Objects<'a, P, R> {
    /// `kmemleak_scan`.
    ///
    /// # Safety
    /// The roots can be read as words until this returns.
    pub(crate) unsafe fn kmemleak_scan(
        &self,
        roots: &[Range<usize>],
    ) -> Result<LeakScan, LeakError> {
        let _busy = self.begin()?;
        self.leaks_on()?;
        let at = self.own_pages(Gfp::KERNEL, STACK_ORDER).ok_or(LeakError::NoMemory)?;
        let room = ((1 << P::PAGE_SHIFT) << STACK_ORDER) / size_of::<Todo>();
        // SAFETY: zeroed pages, ours until they are freed below; any bytes but those of the flag are values of a Todo,
        // and zero is one of that.
        let todo = unsafe { core::slice::from_raw_parts_mut(at.as_ptr().cast(), room) };
        let mut stack = Stack { todo, nr: 0, over: false };
        let mut found = self.prepare_scan();
        // SAFETY: the caller's.
        unsafe { self.spread(roots, &mut stack) };
        self.count_leaks(&mut found);
        if found.unreferenced > 0 {
            self.walk_things(&mut |thing| {
                thing.notes.note(&mut |n| (n & DONE != 0).then_some(n & !DONE));
            });
            // SAFETY: the caller's.
            unsafe { self.spread(roots, &mut stack) };
            self.count_leaks(&mut found);
        }
        self.free_own_pages(at, STACK_ORDER);
        Ok(found)
    }

    /// Takes the marks of the last scan off, and raises ages if that was long enough ago.
    fn prepare_scan(&self) -> LeakScan {
        let leaks = &self.slabs.leaks;
        let now = self.pages.platform().now_ns();
        let since = now.saturating_sub(leaks.aged_at.load(Relaxed));
        let ages = !leaks.aged.swap(true, Relaxed) || since >= leaks.min_age_ns.load(Relaxed);
        if ages {
            leaks.aged_at.store(now, Relaxed);
        }
        let mut found = LeakScan::default();
        self.walk_things(&mut |thing| {
            let mut old = false;
            let before = thing.notes.note(&mut |n| {
                let age = if ages { (n & AGE) + 1 } else { n & AGE }.min(OLD);
                old = age == OLD;
                let gray = !old || n & NOT_LEAK != 0;
                Some(n & USERS | age | if gray { MARKED } else { 0 } | super::super::state::NOTED)
            });
            if before.is_some() {
                found.objects += 1;
                found.old += u64::from(old);
            }
        });
        found
    }

    fn count_leaks(&self, found: &mut LeakScan) {
        found.unreferenced = 0;
        self.walk_things(&mut |thing| {
            // Looked at only.
            thing.notes.note(&mut |n| {
                found.unreferenced += u64::from(leaked(n));
                None
            });
        });
    }

    /// Looks at the roots and at all that is reached.
    ///
    /// # Safety
    /// As [`kmemleak_scan`](Self::kmemleak_scan).
    unsafe fn spread(&self, roots: &[Range<usize>], stack: &mut Stack<'_>) {
        for root in roots {
            let first = root.start.next_multiple_of(WORD);
            for addr in (first..root.end.saturating_sub(WORD - 1)).step_by(WORD) {
                // SAFETY: the caller's; its owner may write to it.
                let word = unsafe { AtomicUsize::from_ptr(ptr::with_exposed_provenance_mut(addr)) };
                self.look_at(word.load(Relaxed), stack);
                if stack.nr > stack.todo.len() / 2 {
                    self.drain_stack(stack);
                }
            }
        }
        self.drain_stack(stack);
        loop {
            stack.over = false;
            // Those that counted as reached from the beginning, that found no room, or that are new.
            self.walk_things(&mut |thing| stack.reach(thing, |n| n == 0 || n & MARKED != 0));
            self.drain_stack(stack);
            if !stack.over {
                return;
            }
        }
    }

    fn drain_stack(&self, stack: &mut Stack<'_>) {
        while let Some(Todo { addr, size, areas }) = stack.pop() {
            if !areas {
                self.look_into(addr, size, stack);
                continue;
            }
            for i in 0.. {
                let area = {
                    let table = self.slabs.leaks.table.lock(self.pages.platform());
                    table.as_ref().and_then(|t| t.areas(addr).get(i).map(|r| (r.start, r.len)))
                };
                let Some((start, len)) = area else { break };
                self.look_into(start, len, stack);
            }
        }
    }

    /// Looks at the words of something that was in use a moment ago.
    fn look_into(&self, addr: usize, size: usize, stack: &mut Stack<'_>) {
        let mut words = [0; CHUNK];
        let end = addr + size;
        let mut at = addr.next_multiple_of(WORD);
        while at + WORD <= end {
            let want = CHUNK.min((end - at) / WORD);
            let got = self.copy_words(at, &mut words[..want]);
            words[..got].iter().for_each(|word| self.look_at(*word, stack));
            if got < want {
                return;
            }
            at += want * WORD;
        }
    }

    /// Copies words of something that was in use a moment ago; fewer if it is gone.
    pub(super) fn copy_words(&self, at: usize, words: &mut [usize]) -> usize {
        let p = self.pages.platform();
        if let Some(pool) = self.pool_at(at) {
            return pool.copy(p, at, words);
        }
        let copy = |words: &mut [usize]| {
            for (i, word) in words.iter_mut().enumerate() {
                let from = ptr::with_exposed_provenance_mut::<usize>(at).wrapping_add(i);
                // SAFETY: in the direct map, whose frames stay mapped, or in foreign memory that is kept; whoever
                // has it may write to it.
                *word = unsafe { AtomicUsize::from_ptr(from) }.load(Relaxed);
            }
            words.len()
        };
        if p.direct_unmap(ptr::without_provenance(at)).is_some() {
            return copy(words);
        }
        let table = self.slabs.leaks.table.lock(p);
        let Some(range) = table.as_ref().and_then(|table| table.around(at)) else { return 0 };
        let there = (range.start + range.len - at) / WORD;
        let nr = words.len().min(there);
        copy(&mut words[..nr])
    }

    /// Marks what a word leads to.
    fn look_at(&self, word: usize, stack: &mut Stack<'_>) {
        self.thing_at(word, |thing| stack.reach(thing, |n| n & MARKED == 0));
    }
}
