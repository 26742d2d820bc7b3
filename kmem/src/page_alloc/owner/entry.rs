//! What is noted of a block: six words for each frame, written by one and read by all.
//!
//! # Implementation
//! ```text
//!   word 0:  63..48 round | 47..37 CPU | 36..25 freed at | 24..13 allocated at | 12..9 order | 8 live | 7..0 version
//!   word 1:  gfp (upper half), pid (lower)       word 2, 3:  times of allocation and free       word 4, 5:  name
//! ```
//! A zero-filled entry says nothing: no block is live in it, and its round is nobody's.
//!
//! # Locking
//! Written by whoever has the block to itself: who just took it off the free lists, or is about to put it back. The
//! version is odd meanwhile. A reader that finds an odd one, or something changed under it, tries again a few
//! times and then does without: it may have interrupted the writer.

use crate::{
    context::{COMM_LEN, Comm},
    gfp::Gfp,
    sites::PLACES,
    types::{MAX_CPUS, MAX_MAX_ORDER},
};
use core::sync::atomic::{
    AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
    fence,
};

/// Times that a reader tries.
const TRIES: usize = 8;

const VERSION: u64 = 0xff;
const LIVE: u64 = 1 << 8;
const ORDER_AT: u32 = 9;
const ALLOCATED_AT: u32 = 13;
const FREED_AT: u32 = 25;
const SITE: u64 = (1 << (FREED_AT - ALLOCATED_AT)) - 1;
const CPU_AT: u32 = 37;
const CPU: u64 = (1 << (ROUND_AT - CPU_AT)) - 1;
const ROUND_AT: u32 = 48;

const _: () = assert!(PLACES <= SITE as usize && MAX_CPUS <= CPU as usize);
const _: () = assert!(MAX_MAX_ORDER < 16 && COMM_LEN == 16);

/// A note, taken apart.
#[derive(Clone, Copy)]
pub(super) struct Note {
    /// The block was not freed since.
    pub(super) live: bool,
    pub(super) order: u32,
    /// Numbers of places.
    pub(super) allocated_at: u32,
    pub(super) freed_at: u32,
    /// Where it was allocated; `None` on no CPU.
    pub(super) cpu: Option<usize>,
    /// Which time that owners are noted.
    pub(super) round: u16,
    pub(super) gfp: Gfp,
    pub(super) pid: u32,
    pub(super) allocated_ns: u64,
    pub(super) freed_ns: u64,
    pub(super) comm: Comm,
}

/// The entry of a frame. All zeros is one.
pub(super) struct Entry([AtomicU64; 6]);

impl Entry {
    /// What is noted; `None` if it is being changed.
    pub(super) fn read(&self) -> Option<Note> {
        (0..TRIES).find_map(|_| {
            // Acquire pairs with the Release at the end of `write`.
            let head = self.0[0].load(Acquire);
            let words: [u64; 5] = core::array::from_fn(|i| self.0[i + 1].load(Relaxed));
            // The fence pairs with that in `write`: who saw one of its words sees its version here.
            fence(Acquire);
            // The version goes round; the times do not.
            let same = self.0[0].load(Relaxed) == head
                && self.0[2].load(Relaxed) == words[1]
                && self.0[3].load(Relaxed) == words[2];
            (same && head & 1 == 0).then(|| Note {
                live: head & LIVE != 0,
                order: (head >> ORDER_AT) as u32 & 0xf,
                allocated_at: (head >> ALLOCATED_AT & SITE) as u32,
                freed_at: (head >> FREED_AT & SITE) as u32,
                cpu: Some((head >> CPU_AT & CPU) as usize).filter(|cpu| *cpu < MAX_CPUS),
                round: (head >> ROUND_AT) as u16,
                gfp: Gfp::from_bits_retain((words[0] >> 32) as u32),
                pid: words[0] as u32,
                allocated_ns: words[1],
                freed_ns: words[2],
                comm: Comm::from_words([words[3], words[4]]),
            })
        })
    }

    /// Notes something else. The caller has the block to itself.
    pub(super) fn write(&self, note: &Note) {
        let version = self.0[0].load(Relaxed) & VERSION & !1;
        self.0[0].store(version | 1, Relaxed);
        // Pairs with the fence in `read`.
        fence(Release);
        let comm = note.comm.words();
        let task = u64::from(note.gfp.bits()) << 32 | u64::from(note.pid);
        let words = [task, note.allocated_ns, note.freed_ns, comm[0], comm[1]];
        for (at, word) in self.0[1..].iter().zip(words) {
            at.store(word, Relaxed);
        }
        let head = (version + 2) & VERSION
            | if note.live { LIVE } else { 0 }
            | u64::from(note.order) << ORDER_AT
            | u64::from(note.allocated_at) << ALLOCATED_AT
            | u64::from(note.freed_at) << FREED_AT
            | (note.cpu.unwrap_or(MAX_CPUS) as u64) << CPU_AT
            | u64::from(note.round) << ROUND_AT;
        // Release pairs with the Acquire in `read`.
        self.0[0].store(head, Release);
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;
    use std::thread;

    fn note(n: u64) -> Note {
        Note {
            live: n & 1 != 0,
            order: n as u32 % 16,
            allocated_at: n as u32 % (PLACES as u32 + 1),
            freed_at: (n * 7) as u32 % (PLACES as u32 + 1),
            cpu: Some(n as usize % MAX_CPUS).filter(|n| !n.is_multiple_of(3)),
            round: (n * 5) as u16,
            gfp: Gfp::from_bits_retain(!n as u32),
            pid: n as u32,
            allocated_ns: n,
            freed_ns: n * 3,
            comm: Comm::from_words([n, !n]),
        }
    }

    fn same(a: &Note, n: u64) -> bool {
        let b = note(n);
        let all = |a: &Note| {
            let sites = (a.allocated_at, a.freed_at);
            (a.live, a.order, sites, a.cpu, a.round, a.gfp, a.pid, a.comm.words())
        };
        all(a) == all(&b) && (a.allocated_ns, a.freed_ns) == (b.allocated_ns, b.freed_ns)
    }

    #[test]
    fn readers_find_one_note_or_another_and_never_a_mixture() {
        let entry = Entry([const { AtomicU64::new(0) }; 6]);
        assert!(!entry.read().unwrap().live);
        const LAST: u64 = 200_000;
        thread::scope(|s| {
            s.spawn(|| (1..=LAST).for_each(|n| entry.write(&note(n))));
            let mut last = 0;
            while last < LAST {
                if let Some(found) = entry.read().filter(|found| found.allocated_ns > 0) {
                    assert!(found.allocated_ns >= last && same(&found, found.allocated_ns));
                    last = found.allocated_ns;
                }
            }
        });
    }

    #[test]
    fn who_interrupts_the_writer_does_without() {
        let entry = Entry([const { AtomicU64::new(0) }; 6]);
        entry.write(&note(5));
        entry.0[0].fetch_or(1, Relaxed);
        assert!(entry.read().is_none());
        entry.write(&note(6));
        assert!(same(&entry.read().unwrap(), 6));
    }
}
