//! `kmap` and `kunmap`.

use super::{PAGE, free, high, kunmap, low, peek, read, readable, rig, rigs, shape, write};
use kmem::{Config, Gfp};
use kmem_hosted::Shape;
use kmem_test_support::{MIB, Rig};
use std::sync::Barrier;

#[test]
fn a_high_frame_has_no_address_until_it_is_mapped() {
    for shape in [Shape::x86_32(1024 * MIB), Shape::x86_32_pae(5 << 30)] {
        let rig = Rig::new(shape, Config::default());
        rig.run(|_| {
            let page = high(&rig);
            let pfn = rig.page_to_pfn(page).unwrap();
            assert!(pfn.0 as u64 * PAGE as u64 >= 896 * MIB);
            assert_eq!(rig.page_address(page), None);
            let at = rig.kmap(page).unwrap();
            assert!(rig.platform().direct_unmap_is_none(at.as_ptr()));
            write(at, 42);
            assert_eq!(peek(&rig, page), 42);
            assert_eq!(rig.page_address(page), Some(at));
            kunmap(&rig, page);
            assert_eq!(rig.page_address(page), None);
            free(&rig, [page]);
        });
    }
}

trait Direct {
    fn direct_unmap_is_none(&self, at: *const u8) -> bool;
}

impl<P: kmem::Platform> Direct for P {
    fn direct_unmap_is_none(&self, at: *const u8) -> bool {
        self.direct_unmap(at).is_none()
    }
}

#[test]
fn a_low_page_has_its_address_and_takes_no_place() {
    let rig = rig(4);
    rig.run(|_| {
        let page = low(&rig);
        let at = rig.page_address(page).unwrap();
        assert_eq!(rig.kmap(page), Ok(at));
        assert_eq!(rig.kmap_local_page(page), Ok(at));
        assert_eq!(rig.audit_highmem().unwrap().mapped, 0);
        // SAFETY: the address stays good: it is the direct map's.
        unsafe { rig.kunmap_local(at.as_ptr()).unwrap() };
        kunmap(&rig, page);
        assert!(readable(at));
        free(&rig, [page]);
    });
}

#[test]
fn a_page_mapped_twice_has_one_address_until_the_last_kunmap() {
    let rig = rig(4);
    rig.run(|_| {
        let page = high(&rig);
        let at = rig.kmap(page).unwrap();
        assert_eq!(rig.kmap(page), Ok(at));
        let audit = rig.audit_highmem().unwrap();
        assert_eq!((audit.mapped, audit.users), (1, 2));
        kunmap(&rig, page);
        assert_eq!(rig.page_address(page), Some(at));
        assert!(readable(at));
        kunmap(&rig, page);
        assert_eq!(rig.page_address(page), None);
        free(&rig, [page]);
    });
}

#[test]
fn what_is_unmapped_faults_at_once_with_debug_highmem() {
    let config = Config { debug_highmem: true, ..Config::default() };
    let rig = Rig::new(shape(), config);
    rig.run(|_| {
        let page = high(&rig);
        let at = rig.kmap(page).unwrap();
        assert!(readable(at));
        kunmap(&rig, page);
        assert!(!readable(at));
        // The page gets its place back.
        assert_eq!(rig.kmap(page), Ok(at));
        assert!(readable(at));
        kunmap(&rig, page);
        free(&rig, [page]);
    });
}

#[test]
fn places_are_flushed_when_all_were_used() {
    for debug_highmem in [false, true] {
        let config = Config { last_pkmap: 4, debug_highmem, ..Config::default() };
        let rig = Rig::new(shape(), config);
        rig.run(|_| {
            let pages: Vec<_> = (0..5).map(|_| high(&rig)).collect();
            let mut addresses = Vec::new();
            for (n, page) in pages[..4].iter().enumerate() {
                let at = rig.kmap(page).unwrap();
                write(at, n as u8);
                kunmap(&rig, page);
                addresses.push(at);
            }
            let audit = rig.audit_highmem().unwrap();
            assert_eq!((audit.clean, audit.stale, audit.flushes), (0, 4, 0));
            // Stale ones are their pages' still.
            assert_eq!(rig.kmap(pages[2]), Ok(addresses[2]));
            // A fifth page: three are flushed at once.
            let at = rig.kmap(pages[4]).unwrap();
            assert!(addresses.contains(&at) && at != addresses[2]);
            write(at, 4);
            let audit = rig.audit_highmem().unwrap();
            assert_eq!((audit.clean, audit.stale, audit.mapped, audit.flushes), (2, 0, 2, 1));
            for other in addresses.iter().filter(|a| **a != at && **a != addresses[2]) {
                assert!(!readable(*other));
            }
            assert_eq!(read(addresses[2]), 2);
            kunmap(&rig, pages[2]);
            kunmap(&rig, pages[4]);
            for (n, page) in pages.iter().enumerate() {
                assert_eq!(peek(&rig, page), n as u8);
            }
            free(&rig, pages);
        });
    }
}

#[test]
fn cpus_share_a_mapping() {
    rigs(2).into_iter().for_each(share);
}

fn share(rig: Rig) {
    let page = high(&rig);
    let together = Barrier::new(2);
    std::thread::scope(|s| {
        for cpu in 0..2 {
            let (rig, together) = (&rig, &together);
            s.spawn(move || {
                rig.on(cpu, &kmem::context::Task::new(), |_| {
                    for round in 0..200_u8 {
                        let at = rig.kmap(page).unwrap().as_ptr();
                        // SAFETY: mapped, and each CPU writes a byte of its own.
                        unsafe { at.add(cpu).write_volatile(round) };
                        assert_eq!(
                            rig.virt_to_page(at).map(core::ptr::from_ref),
                            Some(core::ptr::from_ref(page))
                        );
                        // SAFETY: as above.
                        assert_eq!(unsafe { at.add(cpu).read_volatile() }, round);
                        kunmap(rig, page);
                    }
                });
                together.wait();
            });
        }
    });
    let audit = rig.audit_highmem().unwrap();
    assert_eq!((audit.mapped, audit.slept), (0, 0));
    free(&rig, [page]);
}

#[test]
fn x86_32_has_1024_places_and_512_with_pae() {
    let places = |shape| Rig::new(shape, Config::default()).audit_highmem().unwrap().places;
    assert_eq!(places(Shape::x86_32(1024 * MIB)), 1024);
    assert_eq!(places(Shape::x86_32_pae(1024 * MIB)), 512);
    // No high memory, no places.
    assert_eq!(places(Shape::x86_32(512 * MIB)), 0);
}

#[test]
fn the_mapped_page_is_found_by_its_address() {
    let rig = rig(4);
    rig.run(|_| {
        let page = high(&rig);
        let at = rig.kmap(page).unwrap();
        let same = |found: Option<&kmem::Page>| found.is_some_and(|f| core::ptr::eq(f, page));
        assert!(same(rig.kmap_to_page(at.as_ptr())));
        assert!(same(rig.virt_to_page(at.as_ptr().wrapping_add(PAGE - 1))));
        kunmap(&rig, page);
        assert!(rig.kmap_to_page(at.as_ptr()).is_none());
        let own = rig.alloc_page(Gfp::KERNEL).unwrap();
        let low = rig.page_address(own).unwrap();
        assert!(rig.kmap_to_page(low.as_ptr()).is_some_and(|f| core::ptr::eq(f, own)));
        free(&rig, [page, own]);
    });
}
