//! `KVec`: what it does, value by value.

use kmem::{
    AllocError, Config,
    alloc::{KVec, flags::*},
};
use kmem_hosted::Shape;
use kmem_test_support::{MIB, Rig};
use std::{
    cell::Cell,
    panic::{AssertUnwindSafe, catch_unwind},
};

/// Counts its drops, and panics in the one it is told to.
#[derive(Clone)]
struct Counted<'a>(&'a Cell<u32>, u32);

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() + 1);
        assert_ne!(self.1, 666, "as asked");
    }
}

#[test]
fn every_value_is_dropped_once() {
    let rig = Rig::flat();
    rig.run(|_| {
        let drops = Cell::new(0);
        let mut v = KVec::new_on(&rig);
        for n in 0..100 {
            v.push(Counted(&drops, n), GFP_KERNEL).unwrap();
        }
        assert!(drops.get() == 0 && rig.audit_objects().unwrap().live > 0);
        drop(v.pop());
        assert_eq!(v.remove(0).unwrap().1, 0);
        assert_eq!((drops.get(), v.len(), v[0].1), (2, 98, 1));
        v.truncate(50);
        assert_eq!(drops.get(), 50);
        assert!(v.remove(50).is_none());
        let mut values = v.into_iter();
        assert_eq!((values.next().unwrap().1, values.next_back().unwrap().1), (1, 50));
        assert_eq!((values.len(), values.as_slice()[0].1), (48, 2));
        drop(values);
        assert_eq!((drops.get(), rig.audit_objects().unwrap().live), (100, 0));
    });
}

#[test]
fn memory_is_freed_when_a_drop_panics() {
    let rig = Rig::flat();
    rig.run(|_| {
        let drops = Cell::new(0);
        let mut v = KVec::new_on(&rig);
        for n in [1, 666, 2] {
            v.push(Counted(&drops, n), GFP_KERNEL).unwrap();
        }
        assert!(catch_unwind(AssertUnwindSafe(|| drop(v))).is_err());
        assert_eq!((drops.get(), rig.audit_objects().unwrap().live), (3, 0));
    });
}

#[test]
fn growing_doubles_and_takes_less_where_that_is_refused() {
    let rig = Rig::flat();
    rig.run(|_| {
        let mut v = KVec::new_on(&rig);
        let (mut moves, mut at) = (0, v.as_slice().as_ptr());
        for n in 0..100_000u32 {
            v.push(n, GFP_KERNEL).unwrap();
            moves += u32::from(v.as_slice().as_ptr() != at);
            at = v.as_slice().as_ptr();
        }
        assert!(v.iter().copied().eq(0..100_000) && moves < 20, "{moves} moves");
        // The largest block has 4 MiB: twice 3 MiB are refused, a byte more is not.
        let mut v = KVec::with_capacity_on(&rig, 3 << 20, GFP_KERNEL).unwrap();
        v.extend_with(3 << 20, 1u8, GFP_KERNEL).unwrap();
        let mark = rig.mark();
        v.push(2, GFP_KERNEL).unwrap();
        assert_eq!((v.capacity(), v.len()), ((3 << 20) + 1, (3 << 20) + 1));
        v.reserve((1 << 20) - 1, GFP_KERNEL).unwrap();
        assert_eq!(v.capacity(), 4 << 20);
        v.resize(4 << 20, 2, GFP_KERNEL).unwrap();
        assert_eq!(v.push(3, GFP_KERNEL), Err(AllocError::NoMemory));
        assert!(v[..3 << 20].iter().all(|b| *b == 1) && v[3 << 20..].iter().all(|b| *b == 2));
        assert_eq!((v.len(), rig.since(mark).len()), (4 << 20, 0));
    });
}

#[test]
fn sizes_that_are_no_sizes() {
    let rig = Rig::flat();
    rig.run(|_| {
        let mut v = KVec::<u64, _>::with_capacity_on(&rig, 2, GFP_KERNEL).unwrap();
        v.extend_from_slice(&[1, 2], GFP_KERNEL).unwrap();
        for n in [usize::MAX, usize::MAX - 2, usize::MAX / 8, usize::MAX / 16, 1 << 40] {
            assert_eq!(v.reserve(n, GFP_KERNEL), Err(AllocError::NoMemory), "{n}");
            assert!(KVec::<u64, _>::with_capacity_on(&rig, n, GFP_KERNEL).is_err(), "{n}");
            assert_eq!(v.extend_with(n, 7, GFP_KERNEL), Err(AllocError::NoMemory), "{n}");
            assert_eq!(v.resize(n, 7, GFP_KERNEL), Err(AllocError::NoMemory), "{n}");
        }
        assert_eq!(v[..], [1, 2]);
        drop(v);
        let mut v = KVec::new_on(&rig);
        v.reserve(usize::MAX, GFP_KERNEL).unwrap();
        // SAFETY: values without a size are there once they are counted.
        unsafe { v.inc_len(usize::MAX) };
        assert_eq!((v.len(), v.capacity()), (usize::MAX, usize::MAX));
        assert_eq!(v.push((), GFP_KERNEL), Err(AllocError::NoMemory));
        assert_eq!(v.push_within_capacity(()), Err(()));
        v.truncate(3);
        assert_eq!(v.into_iter().count(), 3);
        assert_eq!(rig.audit_objects().unwrap().live, 0);
    });
}

#[test]
fn alignments() {
    #[derive(Clone, PartialEq, Debug)]
    #[repr(align(64))]
    struct Line(u8);
    #[derive(Clone, PartialEq, Debug)]
    #[repr(align(16384))]
    struct Wide(u32);
    let rig = Rig::flat();
    rig.run(|_| {
        let mut lines = KVec::new_on(&rig);
        let mut wide = KVec::new_on(&rig);
        for n in 0..100 {
            lines.push(Line(n as u8), GFP_KERNEL).unwrap();
            wide.push(Wide(n), GFP_KERNEL).unwrap();
            assert!(lines.as_slice().as_ptr().addr().is_multiple_of(64));
            assert!(wide.as_slice().as_ptr().addr().is_multiple_of(16384));
        }
        assert!(lines.iter().map(|l| l.0).eq(0..100) && wide.iter().map(|w| w.0).eq(0..100));
    });
}

#[test]
fn nothing_asks_for_memory_but_what_takes_flags() {
    let rig = Rig::new(Shape::no_dma(16 * MIB), Config::default());
    rig.run(|_| {
        let mut v = KVec::with_capacity_on(&rig, 4, GFP_KERNEL).unwrap();
        v.extend_from_slice(&[1u64, 2, 3], GFP_KERNEL).unwrap();
        let held = rig.exhaust(GFP_KERNEL | kmem::Gfp::MEMALLOC | __GFP_NOWARN, 0);
        assert_eq!(v.push_within_capacity(4), Ok(()));
        assert_eq!(v.push_within_capacity(5), Err(5));
        // Another size class, and its slab is not to be had.
        assert_eq!(v.reserve(2000, GFP_NOWAIT), Err(AllocError::NoMemory));
        assert_eq!(v[..], [1, 2, 3, 4]);
        assert!(v.spare_capacity_mut().is_empty());
        let raw = v.into_raw_parts();
        // SAFETY: from `into_raw_parts`, on this machine, once.
        let v = unsafe { KVec::from_raw_parts_on(&rig, raw.0, raw.1, raw.2) };
        assert_eq!(v.into_iter().rev().collect::<Vec<_>>(), [4, 3, 2, 1]);
        rig.release(held);
    });
}

#[test]
fn values_written_to_the_spare_memory_count_when_told() {
    let rig = Rig::flat();
    rig.run(|_| {
        let mut v = KVec::with_capacity_on(&rig, 8, GFP_KERNEL).unwrap();
        v.push(1u16, GFP_KERNEL).unwrap();
        let spare = v.spare_capacity_mut();
        assert_eq!(spare.len(), 7);
        spare[0].write(2);
        spare[1].write(3);
        // SAFETY: two values were written.
        unsafe { v.inc_len(2) };
        for n in &mut v {
            *n *= 10;
        }
        let mut other = KVec::new_on(&rig);
        other.extend_from_slice(&[10, 20, 30], GFP_KERNEL).unwrap();
        assert_eq!(v, other);
        assert_eq!(format!("{v:?}"), "[10, 20, 30]");
    });
}
