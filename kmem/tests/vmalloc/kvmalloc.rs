//! kvmalloc: kmalloc where it is easy, vmalloc where it is not \[S8\].

use super::{PAGE, at, read, write};
use kmem::{AllocError, Config, Gfp, Misuse};
use kmem_hosted::Shape;
use kmem_test_support::{MIB, Rig};
use std::ptr::NonNull;

#[track_caller]
fn kvfree(m: &Rig, block: NonNull<u8>) {
    // SAFETY: the tests do not use it after.
    unsafe { m.kvfree(block.as_ptr()).unwrap() };
}

/// Leaves a machine with single frames only.
fn fragment(m: &Rig) -> Vec<(kmem::Pfn, u32)> {
    // The slab layer takes blocks for itself at its first use.
    let first = m.vmalloc(64 * PAGE).unwrap();
    kvfree(m, first);
    let all = m.exhaust(Gfp::KERNEL | Gfp::MEMALLOC | Gfp::NOWARN, 0);
    let (keep, back): (Vec<_>, Vec<_>) =
        all.into_iter().partition(|(pfn, _)| pfn.0.is_multiple_of(2));
    m.release(back);
    keep
}

#[test]
fn small_and_easy_requests_are_contiguous() {
    let m = Rig::pc();
    m.run(|_| {
        for size in [0, 1, 100, PAGE, 3 * PAGE, 1 << 20] {
            let block = m.kvmalloc(size, Gfp::KERNEL).unwrap();
            assert!(!m.is_vmalloc_addr(block.as_ptr()), "{size}");
            assert_eq!(m.kvsize(block.as_ptr()), m.ksize(block.as_ptr()));
            kvfree(&m, block);
        }
        // Beyond the largest block there is vmalloc only.
        let block = m.kvzalloc((5 << 20) + 1, Gfp::KERNEL).unwrap();
        assert!(m.is_vmalloc_addr(block.as_ptr()));
        assert_eq!(m.kvsize(block.as_ptr()), Some((5 << 20) + PAGE));
        assert_eq!(m.kvsize(at(block, 1)), None, "not its beginning");
        assert_eq!(read(at(block, 5 << 20)), 0);
        kvfree(&m, block);
        // SAFETY: null is nothing.
        unsafe { m.kvfree(std::ptr::null_mut()).unwrap() };
        let block = m.vmalloc(PAGE).unwrap();
        kvfree(&m, block);
        // SAFETY: refused.
        let twice = unsafe { m.kvfree(block.as_ptr()) };
        assert!(matches!(twice, Err(Misuse::AreaFree { .. })), "{twice:?}");
    });
}

#[test]
fn what_has_no_block_is_mapped() {
    let m = Rig::new(Shape::no_dma(16 * MIB), Config::default());
    m.run(|_| {
        let keep = fragment(&m);
        let mark = m.mark();
        let block = m.kvmalloc(64 * PAGE, Gfp::KERNEL).unwrap();
        assert!(m.is_vmalloc_addr(block.as_ptr()));
        let node = m.kvmalloc_node(64 * PAGE, Gfp::KERNEL, 0).unwrap();
        assert!(m.is_vmalloc_addr(node.as_ptr()));
        let array = m.kvcalloc(64, PAGE, Gfp::KERNEL).unwrap();
        assert!((0..64).all(|i| read(at(array, i * PAGE)) == 0));
        let surely = m.kvmalloc(16 * PAGE, Gfp::KERNEL | Gfp::NOFAIL).unwrap();
        assert_eq!(m.since(mark), [], "that kmalloc fails is no news");
        // What may not sleep cannot be mapped.
        assert_eq!(m.kvmalloc(64 * PAGE, Gfp::NOWAIT), Err(AllocError::NoMemory));
        assert_eq!(m.kvmalloc_array(1 << 40, 1 << 40, Gfp::KERNEL), Err(AllocError::NoMemory));
        for block in [block, node, array, surely] {
            kvfree(&m, block);
        }
        m.release(keep);
    });
}

#[test]
fn contents_move_from_one_to_the_other() {
    let m = Rig::pc();
    m.run(|_| {
        let gfp = Gfp::KERNEL | Gfp::ZERO;
        // SAFETY: each address is used until the next is there.
        let grow = |block: Option<NonNull<u8>>, size| unsafe {
            m.kvrealloc(block.map_or(std::ptr::null_mut(), NonNull::as_ptr), size, gfp).unwrap()
        };
        let mut block = grow(None, 100);
        let mut size = 100;
        for next in [200, 5000, 6 << 20, 7 << 20, 3 << 20, 8 << 20, 50] {
            (0..size).step_by(97).for_each(|i| write(at(block, i), i as u8));
            let was = block;
            block = grow(Some(block), next);
            assert!((0..size.min(next)).step_by(97).all(|i| read(at(block, i)) == i as u8));
            assert!((size..next).all(|i| read(at(block, i)) == 0), "zeros from {size} to {next}");
            assert!(next > size || block == was, "in place");
            size = next;
        }
        assert_eq!(grow(Some(block), 0), kmem::slab::ZERO_SIZE_PTR);
        let mark = m.mark();
        // SAFETY: refused.
        let wrong = unsafe { m.kvrealloc(at(block, 1), 10, gfp) };
        assert_eq!(wrong, Err(AllocError::NoMemory));
        m.one_report(mark);
    });
}
