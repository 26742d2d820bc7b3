//! No memory left, and memory given back. In children, which have the machine for themselves.

use crate::{HEAP, MEMORY, child, threads::work};
use std::{
    alloc::{Layout, alloc, alloc_zeroed, dealloc, realloc},
    hint::black_box,
    sync::atomic::{
        AtomicBool, AtomicU64,
        Ordering::{Acquire, Relaxed, Release},
    },
    thread,
    time::Duration,
};

/// Takes blocks, linked through themselves, until there are no more; returns the last and the number.
fn fill(layout: Layout) -> (*mut u8, usize) {
    let (mut last, mut count, mut refused) = (std::ptr::null_mut::<u8>(), 0, 0);
    loop {
        // SAFETY: a layout with a size.
        let at = unsafe { alloc(layout) };
        if at.is_null() {
            // A refused request may leave a page of the slab layer's own behind.
            refused += 1;
            if refused == 10 {
                return (last, count);
            }
            continue;
        }
        // SAFETY: at least a word, aligned to one.
        unsafe { at.cast::<*mut u8>().write(last) };
        last = at;
        count += 1;
    }
}

fn empty(mut last: *mut u8, layout: Layout) {
    while !last.is_null() {
        // SAFETY: from `fill`, linked, freed once.
        unsafe {
            let next = last.cast::<*mut u8>().read();
            dealloc(last, layout);
            last = next;
        }
    }
}

#[test]
fn exhaustion_is_null() {
    for size in [64, 1000, 8192, 100_000, 4 << 20] {
        child::run(|| {
            let layout = Layout::from_size_align(size, 8).unwrap();
            let kept = vec![5u8; 5000];
            let before = child::audit()?.0;
            let (last, count) = fill(layout);
            let bytes = count * if size == 100_000 { 1 << 17 } else { size };
            // All but what the tables, the reserve, the harness and rounding take.
            let all = bytes * 10 > MEMORY * 8;
            // SAFETY: a layout with a size.
            let zeroed = black_box(unsafe { alloc_zeroed(layout) });
            let huge = Layout::from_size_align(6 << 20, 8).unwrap();
            // SAFETY: as above. Mappings are the host's, so they are still to be had.
            let mapped = black_box(unsafe { alloc(huge) });
            // A block that cannot grow is unharmed; there may be room where others were.
            // SAFETY: the last block's word, and its layout; what it moved to is freed with its own.
            let next = unsafe {
                let next = last.cast::<*mut u8>().read();
                let grown = realloc(last, layout, size * 4);
                let kept = if grown.is_null() { last } else { grown };
                let bytes = if grown.is_null() { size } else { size * 4 };
                let same = kept.cast::<*mut u8>().read() == next;
                dealloc(kept, Layout::from_size_align(bytes, 8).unwrap());
                child::check(same, || format!("{size} bytes grown or not"))?;
                next
            };
            empty(next, layout);
            let free = HEAP.with(|kmem| kmem.audit().map_or(0, |a| a.free));
            child::check(all, || {
                format!("{count} blocks of {size} are {bytes} bytes; {free:?} free")
            })?;
            child::check(zeroed.is_null(), || format!("zeroed {size}"))?;
            child::check(!mapped.is_null(), || "mapping".into())?;
            // SAFETY: taken above.
            unsafe { dealloc(mapped, huge) };
            child::check(kept.iter().all(|b| *b == 5), || "not kept".into())?;
            let (last, again) = fill(layout);
            empty(last, layout);
            child::check(again + 10 >= count, || format!("{count} blocks, then {again}"))?;
            drop(kept);
            let after = child::audit()?.0;
            child::check(after <= before, || format!("{before} objects, then {after}"))
        });
    }
}

/// What lies on the seats of threads that do something else is found when it is needed.
#[test]
fn memory_on_other_seats_is_found() {
    child::run(|| {
        const IDLE: u64 = 8;
        /// Threads that have freed what they had.
        static IDLING: AtomicU64 = AtomicU64::new(0);
        static END: AtomicBool = AtomicBool::new(false);
        let layout = Layout::from_size_align(4096, 8).unwrap();
        let threads = child::Threads::start(IDLE, |_| {
            let blocks: Vec<_> = (0..200).map(|_| Box::new([1u8; 4096])).collect();
            drop(blocks);
            IDLING.fetch_add(1, Release);
            while !END.load(Relaxed) {
                thread::sleep(Duration::from_millis(1));
            }
        });
        while IDLING.load(Acquire) < IDLE {
            thread::sleep(Duration::from_millis(1));
        }
        let cached = || HEAP.with(|kmem| kmem.audit_objects().map_or(1000, |a| a.cached));
        let before = cached();
        let (last, _) = fill(layout);
        let left = cached();
        empty(last, layout);
        END.store(true, Relaxed);
        threads.join();
        child::check(before.is_some_and(|n| n >= IDLE), || format!("{before:?} objects on seats"))?;
        child::check(left == Some(0), || format!("{left:?} objects left on seats"))?;
        child::check(work(1, 500), || "memory is not kept".into())
    });
}

/// Pages of the process in host memory, private ones.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:")).unwrap_or("0");
    line.trim().trim_end_matches(" kB").trim().parse::<usize>().unwrap_or(0) << 10
}

#[test]
fn free_memory_goes_back_to_the_host() {
    child::run(|| {
        const BYTES: usize = 48 << 20;
        let before = resident();
        let blocks: Vec<_> = (0..BYTES / 512).map(|_| Box::new([1u8; 512])).collect();
        let full = resident();
        drop(blocks);
        let trimmed = HEAP.trim();
        let after = resident();
        let text =
            || format!("{before} bytes, {full} full, {after} after {trimmed} were given back");
        child::check(full >= before + BYTES / 10 * 9 && trimmed >= BYTES / 2, text)?;
        child::check(after <= before + BYTES / 3, text)?;
        child::audit()?;
        // Large blocks go back by themselves.
        let large = black_box(vec![1u8; 3 << 20]);
        let full = resident();
        drop(large);
        let after = resident();
        child::check(after + (2 << 20) <= full, || format!("{full} bytes, then {after}"))
    });
}
