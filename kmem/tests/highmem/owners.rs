//! Guards.

use super::{free, high, low, peek, readable, rig};
use kmem::{
    AllocError, Gfp,
    alloc::{Kmap, Pages},
    gfp::typed::{ATOMIC, KERNEL},
    platform::Platform,
};

#[test]
fn a_page_is_mapped_as_long_as_its_guard_is_there() {
    let rig = rig(4);
    rig.run(|process| {
        let page = high(&rig);
        let map = Kmap::new(&rig, process, page).unwrap();
        let at = map.as_ptr();
        // SAFETY: the page is the test's.
        unsafe {
            map.copy_from(0, &[1, 2, 3]).unwrap();
            map.zero(1, 1).unwrap();
            let mut bytes = [9; 3];
            map.copy_to(0, &mut bytes).unwrap();
            assert_eq!(bytes, [1, 0, 3]);
            assert!(map.copy_from(4095, &[1, 2]).is_err());
        }
        assert_eq!(rig.page_address(page), Some(at));
        drop(map);
        assert_eq!(rig.page_address(page), None);
        rig.with_kmap(process, page, |map| assert_eq!(map.as_ptr(), at)).unwrap();
        free(&rig, [page]);
    });
}

#[test]
fn sections_end_with_their_mappings() {
    let rig = rig(4);
    rig.run(|process| {
        for page in [high(&rig), low(&rig)] {
            let inner = rig
                .with_kmap_atomic(process, page, |atomic, map| {
                    // SAFETY: the page is the test's.
                    unsafe { map.copy_from(0, &[8]).unwrap() };
                    free(&rig, [rig.alloc_pages_in(atomic, ATOMIC, 0).unwrap()]);
                    rig.with_kmap_atomic_in(atomic, page, |_, inner| inner.as_ptr()).unwrap()
                })
                .unwrap();
            assert!(rig.platform().this_cpu().unwrap().context().may_sleep());
            assert_eq!(peek(&rig, page), 8);
            assert_eq!(readable(inner), rig.page_address(page).is_some());
            rig.with_kmap_local(page, |map| {
                free(&rig, [rig.alloc_pages_in(&*process, KERNEL, 0).unwrap()]);
                // SAFETY: as above.
                unsafe { map.zero(0, 4096).unwrap() };
            })
            .unwrap();
            assert_eq!(peek(&rig, page), 0);
            free(&rig, [page]);
        }
    });
}

#[test]
fn a_panic_undoes_mappings_in_order() {
    let rig = rig(4);
    let pages = [high(&rig), high(&rig), high(&rig)];
    let caught = rig.run(|process| {
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            rig.with_kmap_local(pages[0], |_| {
                rig.with_kmap(process, pages[1], |_| {
                    rig.with_kmap_local(pages[2], |_| panic!("in the midst")).unwrap()
                })
                .unwrap()
            })
            .unwrap()
        }))
    });
    assert!(caught.is_err());
    let audit = rig.audit_highmem().unwrap();
    assert_eq!((audit.local, audit.mapped), (0, 0));
    free(&rig, pages);
}

#[test]
fn an_owner_sees_what_is_in_each_of_its_frames() {
    let rig = rig(4);
    rig.run(|process| {
        let mut block = Pages::new(&rig, Gfp::HIGHUSER, 2).unwrap();
        assert_eq!(block.address(), None);
        for frame in 0..4 {
            block.kmap(process, frame).unwrap().fill(frame as u8 + 1);
        }
        for frame in 0..4 {
            let bytes = block.kmap(process, frame).unwrap();
            assert!(bytes.len() == 4096 && bytes.iter().all(|b| *b == frame as u8 + 1));
        }
        let mark = rig.mark();
        assert_eq!(block.kmap(process, 4).err(), Some(AllocError::NoMemory));
        assert!(rig.one_report(mark).contains("has no frame"));
        let mut low = Pages::new(&rig, Gfp::KERNEL, 0).unwrap();
        low.kmap(process, 0).unwrap()[0] = 1;
    });
}
