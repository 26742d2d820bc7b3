//! Sizes, alignments, reallocation.

use crate::{HEAP, is_kmem};
use std::{
    alloc::{GlobalAlloc, Layout, alloc, alloc_zeroed, dealloc, realloc},
    hint::black_box,
};

const MIB: usize = 1 << 20;

fn layout(size: usize, align: usize) -> Layout {
    Layout::from_size_align(size, align).unwrap()
}

#[test]
fn collections_are_in_kmem() {
    let v: Vec<u64> = (0..1000).collect();
    assert!(is_kmem(v.as_ptr()) && is_kmem(&raw const *Box::new(1u8)));
    assert!(is_kmem(std::sync::Arc::new(String::from("text")).as_ptr()));
    // A call within a call.
    let text = HEAP.with(|kmem| {
        let mut text = String::new();
        kmem.for_each_cache(|info| text.push_str(info.name.as_str()));
        text
    });
    assert!(text.unwrap().contains("kmalloc-8k"));
}

/// Every size and alignment: aligned, kept, zeroed where asked.
#[test]
fn sizes_and_alignments() {
    let sizes = [
        1,
        7,
        24,
        100,
        700,
        4096,
        8193,
        50_000,
        MIB - 1,
        MIB,
        3 * MIB,
        4 * MIB,
        4 * MIB + 1,
        20 * MIB,
    ];
    for size in sizes {
        for align in [1, 8, 16, 64, 4096, 8192, 2 * MIB, 4 * MIB, 16 * MIB] {
            let l = layout(size, align);
            // SAFETY: layouts with a size; used until freed.
            unsafe {
                let at = alloc(l);
                assert!(!at.is_null() && at.addr().is_multiple_of(align), "{l:?}");
                at.write_bytes(0x5a, size);
                // A second time, where the first was: dirty.
                dealloc(at, l);
                let at = alloc_zeroed(l);
                assert!(!at.is_null() && at.addr().is_multiple_of(align), "{l:?}");
                let bytes = std::slice::from_raw_parts(at, size);
                assert!(bytes.iter().all(|b| *b == 0), "{l:?}");
                assert_eq!(is_kmem(at), size <= 4 * MIB && align <= 4 * MIB, "{l:?}");
                dealloc(at, l);
            }
        }
    }
}

/// Through all sizes up and down, nothing is lost, and what fits stays.
#[test]
fn reallocation() {
    let steps = [10, 13, 16, 100, 127, 5000, 9000, 16_000, 70_000, MIB, 3 * MIB, 5 * MIB, 30 * MIB];
    for align in [1, 64, 8192, 8 * MIB] {
        // SAFETY: layouts with a size; each address is used until it is reallocated or freed.
        unsafe {
            let mut size = 1;
            let mut at = alloc(layout(size, align));
            at.write(1);
            for new in steps.into_iter().chain(steps.into_iter().rev()) {
                let moved = realloc(at, layout(size, align), new);
                assert!(!moved.is_null() && moved.addr().is_multiple_of(align), "{size} to {new}");
                let kept = std::slice::from_raw_parts(moved, size.min(new));
                assert!(
                    kept.iter().enumerate().all(|(i, b)| *b == (i % 251) as u8 + 1),
                    "{size} to {new}"
                );
                let all = std::slice::from_raw_parts_mut(moved, new);
                all.iter_mut().enumerate().for_each(|(i, b)| *b = (i % 251) as u8 + 1);
                (at, size) = (moved, new);
            }
            dealloc(at, layout(size, align));

            let at = alloc(layout(70, 8));
            assert_eq!(realloc(at, layout(70, 8), 96), at, "96 bytes fit");
            assert_eq!(realloc(at, layout(96, 8), 50), at, "50 of 96 are not worth a move");
            let moved = realloc(at, layout(50, 8), 20);
            assert_ne!(moved, at, "20 of 96 are");
            dealloc(moved, layout(20, 8));
        }
    }
    // Not a heap of its own but a handle: another value has the same machine.
    let other = kmem_hosted::KmemGlobal::new();
    // SAFETY: a layout with a size, freed once.
    unsafe {
        let at = other.alloc(layout(100, 8));
        assert!(is_kmem(at));
        HEAP.dealloc(at, layout(100, 8));
    }
}

#[test]
fn what_no_host_has_is_null() {
    for size in [1 << 46, isize::MAX as usize - 4095] {
        // SAFETY: layouts with a size.
        unsafe {
            // The compiler takes allocations that nobody uses away, as if they had succeeded.
            assert!(black_box(alloc(layout(size, 1))).is_null());
            assert!(black_box(alloc_zeroed(layout(size, 8))).is_null());
            let at = alloc(layout(100, 8));
            at.write(7);
            assert!(realloc(at, layout(100, 8), size).is_null());
            assert_eq!(at.read(), 7);
            dealloc(at, layout(100, 8));
        }
    }
    assert!(Vec::<u8>::new().try_reserve(1 << 46).is_err());
}
