//! The pool beside a reference: random allocations, frees and accesses, each of which faults or does not.
//!
//! # Concepts
//! The reference knows the objects in use, the pages of those that are not, and which pages were opened by a fault. Of each
//! access it says whether there is a report, and of which kind.

use super::{free, read, rig, sampled, write};
use kmem::{Gfp, Misuse};
use kmem_test_support::Rig;
use proptest::prelude::*;
use std::{collections::BTreeSet, ptr::NonNull};

const SIZES: [usize; 8] = [1, 8, 60, 64, 100, 512, 2000, 4096];
const OBJECTS: usize = 7;

struct Object {
    at: NonNull<u8>,
    size: usize,
    stamp: u8,
}

struct Game<'r> {
    rig: &'r Rig,
    live: Vec<Object>,
    plain: Vec<NonNull<u8>>,
    /// Pages of objects that were freed.
    dead: Vec<NonNull<u8>>,
    opened: BTreeSet<usize>,
}

fn page(at: usize) -> usize {
    at / 4096
}

impl Game<'_> {
    fn alloc(&mut self, size: usize, stamp: u8) {
        self.rig.kfence_toggle();
        // Callers that differ, so that one alone does not leave pages free.
        let at = match stamp % 3 {
            0 => self.rig.kmalloc(size, Gfp::KERNEL),
            1 => self.rig.kzalloc(size, Gfp::KERNEL),
            _ => self.rig.kmalloc(size, Gfp::ATOMIC),
        };
        let at = at.unwrap();
        let room = self.live.len() < OBJECTS;
        if !sampled(self.rig, at) {
            assert!(!room || self.live.len() * 4 > OBJECTS * 3, "there was room");
            return self.plain.push(at);
        }
        assert!(room);
        let first = at.addr().get();
        assert!(self.live.iter().all(|o| page(o.at.addr().get()) != page(first)));
        assert_eq!(page(first), page(first + size - 1), "on one page");
        self.dead.retain(|d| page(d.addr().get()) != page(first));
        self.opened.remove(&page(first));
        // SAFETY: ours.
        unsafe { at.write_bytes(stamp, size) };
        self.live.push(Object { at, size, stamp });
    }

    fn free(&mut self, i: usize, spoil: bool) {
        if self.live.is_empty() {
            return;
        }
        let Object { at, size, stamp } = self.live.swap_remove(i % self.live.len());
        // SAFETY: ours.
        let bytes = unsafe { NonNull::slice_from_raw_parts(at, size).as_ref() };
        assert!(bytes.iter().all(|b| *b == stamp), "somebody wrote to it");
        let behind = at.addr().get() + size;
        // Only a byte of its own page is found so late.
        let spoils = spoil && !behind.is_multiple_of(4096);
        if spoils {
            let at = at.as_ptr().wrapping_add(size);
            write(at, !read(at));
        }
        match free(self.rig, at) {
            Ok(()) => assert!(!spoils),
            Err(e) => assert!(spoils && matches!(e, Misuse::Overrun { .. }), "{e:?}"),
        }
        let page = page(at.addr().get());
        (page - 1..=page + 1).for_each(|page| _ = self.opened.remove(&page));
        assert!(matches!(free(self.rig, at), Err(Misuse::ObjectFree { .. })));
        self.dead.push(at);
    }

    /// An access somewhere around an object, in use or freed.
    fn access(&mut self, i: usize, far: isize, writes: bool) {
        let all: Vec<_> = self.live.iter().map(|o| o.at).chain(self.dead.iter().copied()).collect();
        let Some(at) = all.get(i % all.len().max(1)) else { return };
        let at = at.as_ptr().wrapping_offset(far);
        let addr = at.addr();
        let (of, used) =
            (|a: NonNull<u8>| page(a.addr().get()), |o: &Object| page(o.at.addr().get()));
        let expected = if self.live.iter().any(|o| used(o) == page(addr))
            || self.opened.contains(&page(addr))
        {
            None
        } else if self.dead.iter().any(|d| of(*d) == page(addr)) {
            Some("use-after-free")
        } else if self.live.iter().any(|o| used(o).abs_diff(page(addr)) == 1) {
            Some("out-of-bounds")
        } else {
            Some("invalid")
        };
        if self.live.iter().any(|o| used(o) == page(addr)) {
            // Its contents matter.
            return;
        }
        let mark = self.rig.mark();
        if writes {
            write(at, 0x99)
        } else {
            _ = read(at)
        }
        match expected {
            None => assert_eq!(self.rig.mark(), mark),
            Some(kind) => {
                let what = if writes { "write" } else { "read" };
                let report = self.rig.one_report(mark);
                assert!(
                    report.starts_with(&format!("BUG: KFENCE: {kind} {what} in 0x")),
                    "{report}"
                );
                self.opened.insert(page(addr));
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]
    #[test]
    fn the_pool_does_what_the_reference_says(steps in prop::collection::vec(any::<[u8; 4]>(), 1..50)) {
        let rig = rig(OBJECTS as u32);
        rig.run(|_| {
            let mut game = Game {
                rig: &rig,
                live: Vec::new(),
                plain: Vec::new(),
                dead: Vec::new(),
                opened: BTreeSet::new(),
            };
            for [what, a, b, c] in steps {
                match what % 8 {
                    0..3 => game.alloc(SIZES[usize::from(a) % SIZES.len()], b),
                    3 | 4 => game.free(a.into(), b % 4 == 0),
                    _ => {
                        let far = isize::from(c) * 16 * if b % 2 == 0 { 1 } else { -1 };
                        game.access(a.into(), far, b & 2 == 0);
                    }
                }
                let stats = rig.kfence_stats().unwrap();
                assert_eq!(stats.live, game.live.len() as u64);
                let audit = rig.audit_objects().unwrap();
                assert_eq!(audit.live, (game.live.len() + game.plain.len()) as u64);
            }
            while !game.live.is_empty() {
                game.free(0, false);
            }
            game.plain.into_iter().for_each(|at| free(&rig, at).unwrap());
        });
    }
}
