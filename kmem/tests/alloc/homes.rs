//! Allocators without a size: two machines in one process, told apart by type.

use kmem::{
    AllocError, Config, Kmem,
    alloc::{Allocator, Home, KBox, KVec, Kmalloc, flags::*},
};
use kmem_hosted::{Hosted, Machine, Shape};
use std::{
    alloc::{GlobalAlloc, Layout},
    sync::OnceLock,
    thread,
};

macro_rules! home {
    ($name:ident) => {
        struct $name;

        impl $name {
            fn machine() -> &'static Machine {
                static MACHINE: OnceLock<Machine> = OnceLock::new();
                MACHINE.get_or_init(|| {
                    Machine::without_kswapd(Shape::no_dma(64 << 20), Config::default()).unwrap()
                })
            }

            fn live() -> u64 {
                Self::machine().audit_objects().unwrap().live
            }
        }

        impl Home for $name {
            type Platform = Hosted;

            fn kmem() -> Option<&'static Kmem<Hosted>> {
                Some($name::machine().kmem())
            }
        }
    };
}

#[test]
fn two_machines_are_two_types() {
    home!(One);
    home!(Other);
    One::machine()
        .run(|process| {
            let hosted = Other::machine().hosted();
            hosted
                .run_nested(process, None, None, |_| {
                    let one = KBox::<_, Kmalloc<One>>::new(1u64, GFP_KERNEL).unwrap();
                    let mut other =
                        KVec::<_, Kmalloc<Other>>::from_elem(2u64, 9, GFP_KERNEL).unwrap();
                    assert_eq!(size_of_val(&one), size_of::<usize>());
                    assert_eq!(size_of_val(&other), 3 * size_of::<usize>());
                    assert_eq!((One::live(), Other::live()), (1, 1));
                    other.push(*one, GFP_KERNEL).unwrap();
                    assert!(One::machine().ksize(other.as_slice().as_ptr().cast()).is_none());
                    drop(one);
                    assert_eq!((One::live(), Other::live()), (0, 1));
                    let raw = KBox::into_raw(KBox::<_, Kmalloc<One>>::new(5, GFP_KERNEL).unwrap());
                    // SAFETY: from `into_raw`, once.
                    assert_eq!(*unsafe { KBox::<i32, Kmalloc<One>>::from_raw(raw) }, 5);
                    let parts = other.into_raw_parts();
                    // SAFETY: from `into_raw_parts`, once.
                    let other = unsafe {
                        KVec::<u64, Kmalloc<Other>>::from_raw_parts(parts.0, parts.1, parts.2)
                    };
                    assert_eq!(other[8..], [2, 1]);
                })
                .unwrap();
        })
        .unwrap();
    assert_eq!((One::live(), Other::live()), (0, 0));
}

kmem::global! {
    /// A machine that comes up late.
    mod late: Hosted
}

#[test]
fn one_machine_in_a_static() {
    assert!(late::machine().is_none());
    assert_eq!(late::KBox::new(1u8, GFP_KERNEL).unwrap_err(), AllocError::NoMemory);
    assert_eq!(late::kmalloc(8, GFP_KERNEL), Err(AllocError::NoMemory));
    // SAFETY: the machine is not up, so a null it is.
    assert!(unsafe { GlobalAlloc::alloc(&late::Kmalloc::new(), Layout::new::<u64>()) }.is_null());
    let bring_up = || {
        let shape = Shape::x86_64(64 << 20);
        let boot = shape.memblock().unwrap();
        Kmem::bring_up(Hosted::new(shape).unwrap(), boot, &Config::default()).unwrap()
    };
    // Several try; one succeeds.
    let wins: usize = thread::scope(|s| {
        let all: Vec<_> = (0..4).map(|_| s.spawn(|| late::init(bring_up()).is_ok())).collect();
        all.into_iter().map(|t| usize::from(t.join().unwrap())).sum()
    });
    assert_eq!(wins, 1);

    let pinned = late::KBox::pin([7u8; 20], GFP_KERNEL).unwrap();
    let mut v = late::KVec::default();
    v.extend_from_slice(&pinned[..], GFP_ATOMIC).unwrap();
    let raw = late::kzalloc(40, GFP_KERNEL).unwrap();
    assert_eq!(late::ksize(raw.as_ptr()), Some(64));
    // SAFETY: from kmalloc, and only the new address is used.
    unsafe {
        let raw = late::krealloc(raw.as_ptr(), 1000, GFP_KERNEL).unwrap();
        assert_eq!(raw.cast::<[u8; 40]>().read(), [0; 40]);
        late::kfree(raw.as_ptr()).unwrap();
        assert!(late::kfree(raw.as_ptr()).is_err());
    }
    drop((pinned, v));
    assert_eq!(late::machine().unwrap().audit_objects().unwrap().live, 0);
}

/// `GlobalAlloc` as a collection or a kernel's `alloc` crate calls it.
#[test]
fn as_a_global_allocator() {
    home!(Heap);
    let heap = Kmalloc::<Heap>::new();
    Heap::machine()
        .run(|_| {
            for (size, align) in [(1, 1), (24, 8), (80, 16), (100, 64), (5000, 4096), (9000, 32768)]
            {
                let layout = Layout::from_size_align(size, align).unwrap();
                // SAFETY: layouts with a size; each address is used until it is reallocated or freed.
                unsafe {
                    let at = GlobalAlloc::alloc_zeroed(&heap, layout);
                    assert!(!at.is_null() && at.addr().is_multiple_of(align), "{layout:?}");
                    assert!((0..size).all(|i| at.add(i).read() == 0));
                    at.write_bytes(9, size);
                    let at = GlobalAlloc::realloc(&heap, at, layout, size * 5);
                    assert!(at.addr().is_multiple_of(align), "{layout:?}");
                    assert!((0..size).all(|i| at.add(i).read() == 9));
                    let more = Layout::from_size_align(size * 5, align).unwrap();
                    let at = GlobalAlloc::realloc(&heap, at, more, size.div_ceil(2));
                    assert!((0..size.div_ceil(2)).all(|i| at.add(i).read() == 9));
                    let less = Layout::from_size_align(size.div_ceil(2), align).unwrap();
                    GlobalAlloc::dealloc(&heap, at, less);
                    assert!(
                        GlobalAlloc::alloc(&heap, Layout::from_size_align(1 << 40, 8).unwrap())
                            .is_null()
                    );
                }
            }
        })
        .unwrap();
    assert_eq!(Heap::live(), 0);
}

/// What has no flags is served where sleeping is not allowed.
#[test]
fn flags_follow_the_context() {
    home!(Anywhere);
    let machine = Anywhere::machine();
    machine
        .run(|process| {
            assert_eq!(machine.flags_here(), GFP_KERNEL);
            kmem::sync::preempt_disabled(machine.hosted(), process, |_| {
                assert_eq!(machine.flags_here(), GFP_ATOMIC);
                let layout = Layout::new::<[u8; 300]>();
                // SAFETY: a layout with a size; freed once.
                unsafe {
                    let at = GlobalAlloc::alloc(&Kmalloc::<Anywhere>::new(), layout);
                    assert!(!at.is_null());
                    GlobalAlloc::dealloc(&Kmalloc::<Anywhere>::new(), at, layout);
                }
            });
        })
        .unwrap();
    assert_eq!(Anywhere::live(), 0);
}

/// What is aligned more strictly than before moves; what has no size takes none.
#[test]
fn reallocation_between_layouts() {
    home!(Place);
    Place::machine()
        .run(|_| {
            let kmalloc = Kmalloc::<Place>::new();
            let nothing = Layout::from_size_align(0, 64).unwrap();
            let small = Layout::from_size_align(24, 8).unwrap();
            let line = Layout::from_size_align(24, 64).unwrap();
            // SAFETY: each address is used with its layout until it is reallocated or freed.
            unsafe {
                let at = kmalloc.alloc(nothing, GFP_KERNEL).unwrap().cast::<u8>();
                assert_eq!((at.addr().get(), Place::live()), (64, 0));
                let at = kmalloc.realloc(at, small, nothing, GFP_KERNEL).unwrap().cast::<u8>();
                at.write_bytes(5, 24);
                let at = kmalloc.realloc(at, line, small, GFP_KERNEL).unwrap().cast::<u8>();
                assert!(at.addr().get().is_multiple_of(64));
                assert_eq!((at.cast::<[u8; 24]>().read(), Place::live()), ([5; 24], 1));
                let at = kmalloc.realloc(at, nothing, line, GFP_KERNEL).unwrap().cast::<u8>();
                assert_eq!(Place::live(), 0);
                kmalloc.free(at, nothing);
            }
        })
        .unwrap();
}
