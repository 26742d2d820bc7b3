//! kmalloc and its family.

use super::QUIET;
use kmem::{AllocError, Config, Gfp, slab::ZERO_SIZE_PTR};
use kmem_hosted::Shape;
use kmem_test_support::{MIB, Rig};
use std::ptr;

#[test]
fn every_size_is_large_enough_and_aligned() {
    let rig = Rig::new(Shape::no_dma(128 * MIB), Config::default());
    rig.run(|_| {
        for size in
            (1..=300).chain((301..9000).step_by(61)).chain([8192, 8193, 16384, 100_000, 1 << 20])
        {
            let at = rig.kmalloc(size, Gfp::KERNEL).unwrap();
            let usable = rig.ksize(at.as_ptr()).unwrap();
            assert!(usable >= size);
            if size <= 8192 {
                assert!(usable <= 8.max(2 * size), "{usable} for {size}");
            }
            let natural = if size.is_power_of_two() { size.min(4096) } else { 8 };
            assert!(at.addr().get().is_multiple_of(natural), "{at:?} for {size}");
            // SAFETY: that many bytes are ours; not used after.
            unsafe {
                at.write_bytes(0xa7, usable);
                rig.kfree(at.as_ptr()).unwrap();
            }
        }
        rig.audit_objects().unwrap();
    });
}

#[test]
fn size_classes_have_the_kernels_names() {
    let rig = Rig::flat();
    rig.run(|_| {
        for size in [8, 16, 32, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096, 8192] {
            let at = rig.kmalloc(size, Gfp::KERNEL).unwrap();
            assert_eq!(rig.ksize(at.as_ptr()), Some(size));
            // SAFETY: not used after.
            unsafe { rig.kfree(at.as_ptr()).unwrap() };
        }
        let mut names = Vec::new();
        rig.for_each_cache(|info| {
            if !info.internal {
                names.push((info.name.to_string(), info.object_size));
            }
        });
        let named = |name: &str, size| assert!(names.contains(&(name.into(), size)), "{names:?}");
        named("kmalloc-8", 8);
        named("kmalloc-96", 96);
        named("kmalloc-1k", 1024);
        named("kmalloc-8k", 8192);
        assert_eq!(names.len(), 13);
    });
}

#[test]
fn nothing_is_an_address_that_faults_and_may_be_freed() {
    let rig = Rig::flat();
    rig.run(|_| {
        let at = rig.kmalloc(0, Gfp::KERNEL).unwrap();
        assert_eq!(at, ZERO_SIZE_PTR);
        assert_eq!((rig.ksize(at.as_ptr()), rig.ksize(ptr::null())), (Some(0), Some(0)));
        // SAFETY: there is nothing to use.
        unsafe {
            rig.kfree(at.as_ptr()).unwrap();
            rig.kfree(ptr::null_mut()).unwrap();
        }
    });
}

#[test]
fn arrays_check_for_overflow_and_zeroed_forms_zero() {
    let rig = Rig::flat();
    rig.run(|_| {
        assert_eq!(rig.kmalloc_array(usize::MAX, 2, Gfp::KERNEL), Err(AllocError::NoMemory));
        assert_eq!(rig.kcalloc(1 << 40, 1 << 40, Gfp::KERNEL), Err(AllocError::NoMemory));
        assert_eq!(rig.kmalloc(1 << 40, Gfp::KERNEL | QUIET), Err(AllocError::NoMemory));
        for _ in 0..2 {
            for (at, n) in [
                (rig.kcalloc(10, 12, Gfp::KERNEL).unwrap(), 120),
                (rig.kzalloc(2000, Gfp::KERNEL).unwrap(), 2000),
                (rig.kzalloc(20_000, Gfp::KERNEL).unwrap(), 20_000),
            ] {
                // SAFETY: that many bytes are ours; not used after.
                unsafe {
                    assert!(std::slice::from_raw_parts(at.as_ptr(), n).iter().all(|b| *b == 0));
                    at.write_bytes(0xff, n);
                    rig.kfree(at.as_ptr()).unwrap();
                }
            }
        }
    });
}

#[test]
fn krealloc_keeps_what_fits() {
    let rig = Rig::flat();
    rig.run(|_| {
        // SAFETY: each address is used only until it is given back.
        unsafe {
            let mut at = rig.krealloc(ptr::null_mut(), 10, Gfp::KERNEL).unwrap();
            at.as_ptr().copy_from(b"0123456789".as_ptr(), 10);
            assert_eq!(rig.krealloc(at.as_ptr(), 16, Gfp::KERNEL).unwrap(), at, "it fits in place");
            for size in [17, 100, 5000, 9000, 50_000] {
                at = rig.krealloc(at.as_ptr(), size, Gfp::KERNEL).unwrap();
                assert_eq!(std::slice::from_raw_parts(at.as_ptr(), 10), b"0123456789");
            }
            let refused = rig.krealloc(at.as_ptr(), 1 << 40, Gfp::KERNEL | QUIET);
            assert_eq!(refused, Err(AllocError::NoMemory));
            assert_eq!(std::slice::from_raw_parts(at.as_ptr(), 10), b"0123456789");
            assert_eq!(rig.krealloc(at.as_ptr(), 0, Gfp::KERNEL).unwrap(), ZERO_SIZE_PTR);
        }
        assert_eq!(rig.audit_objects().unwrap().live, 0);
    });
}

#[test]
fn copies_and_forgetting() {
    let rig = Rig::flat();
    rig.run(|_| {
        let copy = rig.kmemdup(&[1, 2, 3], Gfp::KERNEL).unwrap();
        let text = rig.kstrdup("zone", Gfp::KERNEL).unwrap();
        // SAFETY: that many bytes are ours; not used after they are freed but to see that they are gone,
        // in memory that nobody else was given.
        unsafe {
            assert_eq!(std::slice::from_raw_parts(copy.as_ptr(), 3), [1, 2, 3]);
            assert_eq!(std::slice::from_raw_parts(text.as_ptr(), 5), b"zone\0");
            rig.kfree_sensitive(text.as_ptr()).unwrap();
            assert_eq!(text.as_ptr().cast::<u32>().read_volatile(), 0);
            rig.kfree(copy.as_ptr()).unwrap();
        }
    });
}

#[test]
fn zones_and_nodes_are_as_asked_for() {
    let rig = Rig::new(Shape::numa(2, 64 * MIB), Config::default());
    rig.run(|_| {
        let dma = rig.kmalloc(100, Gfp::KERNEL | Gfp::DMA).unwrap();
        assert_eq!(rig.place(rig.virt_to_page(dma.as_ptr()).unwrap()).1, kmem::ZoneType::Dma);
        for node in [0, 1] {
            for size in [100, 10_000] {
                let at = rig.kmalloc_node(size, Gfp::KERNEL, node).unwrap();
                let (pfn, _) = rig.place(rig.virt_to_page(at.as_ptr()).unwrap());
                assert_eq!(rig.page_zone(pfn).unwrap().node(), node as usize, "{size}");
                // SAFETY: not used after.
                unsafe { rig.kfree(at.as_ptr()).unwrap() };
            }
        }
        assert!(rig.kmalloc_node(8, Gfp::KERNEL, 2).is_err());
        // SAFETY: not used after.
        unsafe { rig.kfree(dma.as_ptr()).unwrap() };
    });
    let refused = rig.run(|_| rig.kmalloc(8, Gfp::KERNEL | Gfp::HIGHMEM));
    assert!(matches!(refused, Err(AllocError::Invalid(_))), "{refused:?}");
}

#[test]
fn the_first_use_may_be_in_atomic_context() {
    let rig = Rig::flat();
    rig.run(|process| {
        let lock = kmem::sync::SpinLock::new(());
        lock.with(rig.platform(), process, |_, ()| {
            let at = rig.kmalloc(64, Gfp::ATOMIC).unwrap();
            assert_eq!(rig.kmalloc(64, Gfp::KERNEL), Err(AllocError::Context));
            // SAFETY: not used after.
            unsafe { rig.kfree(at.as_ptr()).unwrap() };
        });
    });
}
