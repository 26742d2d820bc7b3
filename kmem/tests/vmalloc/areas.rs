//! Areas: what is mapped there, of what frames, and where they end.

use super::{PAGE, at, read, readable, vfree, write};
use kmem::{
    AllocError, Config, Gfp, Page, ZoneType,
    alloc::{Allocator, VmallocOn},
    page_state::SystemStat,
    platform::PageProt,
    vmalloc::VmFlags,
};
use kmem_hosted::Shape;
use kmem_test_support::{MIB, Rig};
use std::{
    alloc::Layout,
    panic::{AssertUnwindSafe, catch_unwind},
};

const GIB: u64 = 1 << 30;

#[test]
fn areas_alias_their_frames_and_end_at_a_guard() {
    let m = Rig::pc();
    m.run(|_| {
        for size in [1, PAGE, PAGE + 1, 16 * PAGE, 17 * PAGE, 5 * PAGE - 1, 300 * PAGE, 1500 * PAGE]
        {
            let frames = size.div_ceil(PAGE);
            let area = m.vmalloc(size).unwrap();
            assert!(m.is_vmalloc_addr(area.as_ptr()));
            assert!(area.as_ptr().addr().is_multiple_of(PAGE));
            for i in 0..frames {
                let here = at(area, i * PAGE + 17);
                let page = m.vmalloc_to_page(here).unwrap();
                let pfn = m.vmalloc_to_pfn(here).unwrap();
                assert_eq!(m.page_to_pfn(page), Some(pfn));
                assert_eq!(page.page_count(), 1);
                write(here, i as u8 ^ 0x5a);
                let direct = m.page_address(page).unwrap().as_ptr().wrapping_add(17);
                assert_eq!(read(direct), i as u8 ^ 0x5a, "through the direct map");
                write(direct, 7);
                assert_eq!(read(here), 7, "through the area");
            }
            let guard = at(area, frames * PAGE);
            assert!(readable(guard.wrapping_sub(1)) && !readable(guard), "a guard behind");
            assert!(!readable(guard.wrapping_add(PAGE - 1)));
            assert!(m.vmalloc_to_page(guard).is_none(), "nothing at the guard");
            assert_eq!(m.system_state(SystemStat::VmallocUsed), frames as u64);
            vfree(&m, area);
            assert!(!readable(area.as_ptr()), "gone at once");
            assert!(m.vmalloc_to_page(area.as_ptr()).is_none());
            assert_eq!(m.system_state(SystemStat::VmallocUsed), 0);
        }
    });
    let total = m.hosted().shape().vmalloc_bytes() / PAGE as u64;
    assert_eq!(m.system_state(SystemStat::VmallocTotal), total);
}

#[test]
fn sizes_that_cannot_be_fail() {
    let m = Rig::new(Shape::x86_64(64 * MIB).vmalloc(32 * MIB), Config::default());
    m.run(|_| {
        for size in
            [0, usize::MAX, usize::MAX - PAGE, 1 << 63, 1 << 47, 1 << 44, 65 << 20, 33 << 20]
        {
            let mark = m.mark();
            assert_eq!(m.vmalloc(size), Err(AllocError::NoMemory), "{size:#x}");
            assert!(m.one_report(mark).starts_with(&format!("vmalloc error: size {size}, ")));
            assert_eq!(m.__vmalloc(size, Gfp::KERNEL | Gfp::NOWARN), Err(AllocError::NoMemory));
            assert_eq!(m.since(mark).len(), 1, "NOWARN is quiet");
            // It could never be served, so it does not try for ever.
            let surely = Gfp::KERNEL | Gfp::NOFAIL | Gfp::NOWARN;
            assert_eq!(m.__vmalloc(size, surely), Err(AllocError::NoMemory));
        }
        // The guard has to fit too.
        assert_eq!(m.__vmalloc(32 << 20, Gfp::NOWAIT), Err(AllocError::NoMemory));
        let most = m.vmalloc((32 << 20) - PAGE).unwrap();
        assert_eq!(m.__vmalloc(1, Gfp::NOWAIT), Err(AllocError::NoMemory), "no address left");
        vfree(&m, most);
        let one = m.vmalloc(1).unwrap();
        vfree(&m, one);
        assert!(m.vmap(&[], VmFlags::empty(), PageProt::KERNEL).is_err());
        assert!(m.get_vm_area(0).is_err() && m.get_vm_area(usize::MAX).is_err());
        assert!(m.ioremap(1 << 40, (16 << 40) - (2 << 40)).is_err(), "and soon");
        let both = Gfp::KERNEL | Gfp::DMA | Gfp::HIGHMEM;
        assert!(matches!(m.__vmalloc(1, both), Err(AllocError::Invalid(_))));
    });
}

#[test]
fn an_area_for_pages_may_be_longer_than_memory_and_its_table_not() {
    // Its table alone would be 64 MiB.
    let m = Rig::new(Shape::no_dma(32 * MIB).vmalloc(128 * GIB), Config::default());
    m.run(|_| {
        let before = m.stalls();
        assert_eq!(m.get_vm_area(64 << 30), Err(AllocError::NoMemory));
        assert_eq!(m.stalls(), before, "without effort");
        let area = m.get_vm_area(64 << 20).unwrap();
        // SAFETY: not used after.
        unsafe { m.vunmap(area.as_ptr()).unwrap() };
    });
}

#[test]
fn a_machine_without_addresses_has_none() {
    for shape in [Shape::x86_64(64 * MIB).without_contents(), Shape::x86_64(64 * MIB).vmalloc(0)] {
        let m = Rig::new(shape, Config::default());
        m.run(|_| assert_eq!(m.vmalloc(1), Err(AllocError::NoMemory)));
        assert_eq!(m.system_state(SystemStat::VmallocTotal), 0);
    }
}

#[test]
fn frames_come_from_high_memory_unless_they_must_not() {
    let m = Rig::new(Shape::x86_32(GIB), Config::default());
    m.run(|_| {
        let zone = |at| {
            let page = m.vmalloc_to_page(at).unwrap();
            m.place(page).1
        };
        let area = m.vzalloc(8 * PAGE).unwrap();
        let user = m.vmalloc_user(8 * PAGE).unwrap();
        for i in 0..8 {
            assert_eq!(zone(at(area, i * PAGE)), ZoneType::HighMem);
            assert!((0..PAGE).all(|b| read(at(area, i * PAGE + b)) == 0), "zeroed");
            assert!((0..PAGE).all(|b| read(at(user, i * PAGE + b)) == 0), "zeroed");
            write(at(area, i * PAGE), 1);
        }
        let dma = m.__vmalloc(8 * PAGE, Gfp::DMA).unwrap();
        assert_eq!(zone(dma.as_ptr()), ZoneType::Dma);
        [area, user, dma].iter().for_each(|area| vfree(&m, *area));
    });
    let m = Rig::new(Shape::x86_64(6 * GIB), Config::default());
    m.run(|_| {
        let high = m.vmalloc(PAGE).unwrap();
        assert!(m.vmalloc_to_pfn(high.as_ptr()).unwrap().0 >= 1 << 20);
        let low = m.vmalloc_32(64 * PAGE).unwrap();
        let below = |i| m.vmalloc_to_pfn(at(low, i * PAGE)).unwrap().0 < 1 << 20;
        assert!((0..64).all(below), "below 4 GiB");
        [high, low].iter().for_each(|area| vfree(&m, *area));
    });
}

#[test]
fn nodes_are_chosen() {
    let m = Rig::new(Shape::numa(2, 64 * MIB), Config::default());
    m.run(|_| {
        for node in [0, 1] {
            let area = m.vmalloc_node(8 * PAGE, node).unwrap();
            let zeroed = m.vzalloc_node(8 * PAGE, node).unwrap();
            for i in 0..8 {
                for area in [area, zeroed] {
                    let pfn = m.vmalloc_to_pfn(at(area, i * PAGE)).unwrap();
                    assert_eq!(m.page_zone(pfn).unwrap().node(), node as usize);
                }
                assert_eq!(read(at(zeroed, i * PAGE + 9)), 0);
            }
            [area, zeroed].iter().for_each(|area| vfree(&m, *area));
        }
    });
}

#[test]
fn huge_blocks_where_asked_for() {
    let m = Rig::new(Shape::x86_64(256 * MIB), Config::default());
    m.run(|_| {
        let huge = 2 << 20;
        let area = m.vmalloc_huge(2 * huge + 3 * PAGE, Gfp::KERNEL).unwrap();
        assert!(area.as_ptr().addr().is_multiple_of(huge), "aligned");
        let pfn = |i: usize| m.vmalloc_to_pfn(at(area, i * PAGE)).unwrap().0;
        for first in [0, 512] {
            assert!(pfn(first).is_multiple_of(512), "an aligned block");
            assert!((0..512).all(|i| pfn(first + i) == pfn(first) + i as u32));
        }
        assert!(readable(at(area, 2 * huge + 3 * PAGE - 1)));
        assert!(!readable(at(area, 2 * huge + 3 * PAGE)));
        // Each frame is one of its own.
        assert_eq!(m.vmalloc_to_page(at(area, PAGE)).unwrap().page_count(), 1);
        let small = m.vmalloc_huge(huge - PAGE, Gfp::KERNEL).unwrap();
        [area, small].iter().for_each(|area| vfree(&m, *area));
    });
    // So do addresses without an aligned place.
    let m = Rig::new(Shape::x86_64(64 * MIB).vmalloc(3 * MIB), Config::default());
    m.run(|_| {
        let area = m.vmalloc_huge(2 << 20, Gfp::KERNEL).unwrap();
        assert!(readable(at(area, (2 << 20) - 1)));
        vfree(&m, area);
    });
    // Memory without a whole block serves it all the same.
    let m = Rig::new(Shape::no_dma(16 * MIB), Config::default());
    m.run(|_| {
        let all = m.exhaust(Gfp::KERNEL | Gfp::NOWARN, 0);
        let (mut keep, mut back) = (Vec::new(), Vec::new());
        for block in all {
            let to = if block.0.0.is_multiple_of(4) { &mut keep } else { &mut back };
            to.push(block);
        }
        m.release(back);
        let area = m.vmalloc_huge(2 << 20, Gfp::KERNEL).unwrap();
        assert!(readable(at(area, (2 << 20) - 1)));
        vfree(&m, area);
        m.release(keep);
    });
}

#[test]
fn what_no_place_is_aligned_for_is_not_tried_for_ever() {
    let m = Rig::new(Shape::x86_64(64 * MIB).vmalloc(3 * MIB), Config::default());
    m.run(|_| {
        let v = VmallocOn(m.machine().kmem());
        let layout = |align| Layout::from_size_align(2 << 20, align).unwrap();
        let flags = Gfp::KERNEL | Gfp::NOFAIL | Gfp::NOWARN;
        assert_eq!(v.alloc(layout(2 << 20), flags).err(), Some(AllocError::NoMemory));
        let area = v.alloc(layout(1 << 19), flags).unwrap();
        assert!(area.addr().get().is_multiple_of(1 << 19));
        vfree(&m, area.cast());
    });
}

fn pages(m: &Rig, n: usize) -> Vec<&Page> {
    (0..n).map(|_| m.machine().alloc_page(Gfp::HIGHUSER).unwrap()).collect()
}

#[test]
fn vmap_shows_the_callers_pages() {
    let m = Rig::pc();
    m.run(|_| {
        let mut given = pages(&m, 20);
        given.push(given[3]);
        let area = m.vmap(&given, VmFlags::empty(), PageProt::KERNEL).unwrap();
        write(at(area, 3 * PAGE + 5), 0xaa);
        assert_eq!(read(at(area, 20 * PAGE + 5)), 0xaa, "one page twice");
        assert!(core::ptr::eq(m.vmalloc_to_page(at(area, 7 * PAGE)).unwrap(), given[7]));
        let ro = m.vmap(&given[..4], VmFlags::empty(), PageProt::KERNEL_RO).unwrap();
        assert_eq!(read(at(ro, 3 * PAGE + 5)), 0xaa);
        assert!(!writable(ro.as_ptr()) && writable(area.as_ptr()), "as the protection says");
        // SAFETY: not used after.
        unsafe {
            m.vunmap(area.as_ptr()).unwrap();
            m.vunmap(ro.as_ptr()).unwrap();
            m.vunmap(std::ptr::null()).unwrap();
        }
        assert!(!readable(area.as_ptr()));
        given.pop();
        assert!(given.iter().all(|page| page.page_count() == 1), "still the caller's");
        // Given up to the area.
        let area = m.vmap(&given, VmFlags::MAP_PUT_PAGES, PageProt::KERNEL).unwrap();
        m.get_page(given[0]).unwrap();
        vfree(&m, area);
        assert_eq!((given[0].page_count(), given[1].page_count()), (1, 0));
        // vunmap leaves them even so.
        let area = m.vmap(&given[..1], VmFlags::MAP_PUT_PAGES, PageProt::KERNEL).unwrap();
        // SAFETY: not used after.
        unsafe { m.vunmap(area.as_ptr()).unwrap() };
        m.put_page(given[0]).unwrap();
    });
}

/// Whether the byte at an address can be written to; the host's kernel tries.
fn writable(address: *mut u8) -> bool {
    let (reader, mut writer) = std::io::pipe().unwrap();
    std::io::Write::write_all(&mut writer, &[0]).unwrap();
    // SAFETY: read(2) checks the address itself.
    let n = unsafe { libc::read(std::os::fd::AsRawFd::as_raw_fd(&reader), address.cast(), 1) };
    n == 1
}

#[test]
fn pages_are_mapped_into_an_area_bit_by_bit() {
    let (m, other) = (Rig::pc(), Rig::flat());
    m.run(|_| {
        let given = pages(&m, 8);
        let area = m.get_vm_area(6 * PAGE).unwrap();
        assert!(!readable(area.as_ptr()));
        m.vm_map_pages(area, &given[..2], PageProt::KERNEL).unwrap();
        m.vm_map_pages(area, &given[2..5], PageProt::KERNEL).unwrap();
        assert!(m.vm_map_pages(area, &given[5..7], PageProt::KERNEL).is_err(), "no room for two");
        for (i, page) in given[..5].iter().enumerate() {
            assert!(core::ptr::eq(m.vmalloc_to_page(at(area, i * PAGE)).unwrap(), *page));
            assert!(readable(at(area, i * PAGE)));
        }
        assert!(!readable(at(area, 5 * PAGE)));
        // A page of nobody's, where misuses are fatal: nothing is left half done.
        let stranger = pages(&other, 1);
        m.set_panic_on_misuse(true);
        let fatal = |f: &dyn Fn()| {
            let panic = catch_unwind(AssertUnwindSafe(f)).unwrap_err();
            assert!(panic.downcast_ref::<String>().is_some_and(|text| text.contains("page")));
        };
        fatal(&|| _ = m.vm_map_pages(area, &stranger, PageProt::KERNEL));
        fatal(&|| _ = m.vmap(&stranger, VmFlags::empty(), PageProt::KERNEL));
        m.set_panic_on_misuse(false);
        m.vm_map_pages(area, &given[5..6], PageProt::KERNEL).unwrap();
        assert_eq!(m.audit_vmalloc().unwrap().live, 1);
        stranger.iter().for_each(|page| other.put_page(page).unwrap());
        // SAFETY: not used after.
        unsafe { m.vunmap(area.as_ptr()).unwrap() };
        given.iter().for_each(|page| m.put_page(page).unwrap());
    });
}

#[test]
fn devices_are_mapped_and_memory_is_not_taken_for_one() {
    // Registers in the hole of a PC.
    let shape = Shape::x86_64(16 * MIB).hole(4 * MIB, MIB);
    let m = Rig::new(shape, Config::default());
    m.run(|_| {
        let phys = 4 * MIB + 0x123;
        let area = m.ioremap(phys, 2 * PAGE).unwrap();
        assert_eq!(area.as_ptr().addr() % PAGE, 0x123);
        let again = m.ioremap_prot(4 * MIB, PAGE, PageProt::KERNEL).unwrap();
        write(area.as_ptr(), 0x77);
        assert_eq!(read(at(again, 0x123)), 0x77, "the same register");
        let pfn = m.vmalloc_to_pfn(at(area, PAGE)).unwrap();
        assert_eq!(u64::from(pfn.0), 4 * MIB / PAGE as u64 + 1);
        // SAFETY: not used after.
        unsafe {
            m.iounmap(area.as_ptr()).unwrap();
            m.iounmap(again.as_ptr()).unwrap();
        }
        let mark = m.mark();
        assert!(m.ioremap(5 * MIB - PAGE as u64, 2 * PAGE).is_err());
        assert!(m.one_report(mark).contains("ioremap on RAM: pfn:0x500"));
        for (phys, size) in [(4 * MIB, 0), (u64::MAX - 5, 100), (1 << 50, PAGE), (1 << 40, PAGE)] {
            assert!(m.ioremap(phys, size).is_err(), "{phys:#x}");
        }
    });
}

#[test]
fn frames_run_out_and_nothing_is_lost() {
    let m = Rig::flat();
    m.run(|_| {
        let mut areas = Vec::new();
        while let Ok(area) = m.__vmalloc(MIB as usize, Gfp::KERNEL | Gfp::NOWARN) {
            areas.push(area);
        }
        assert!(areas.len() > 40, "{}", areas.len());
        let held = m.audit_vmalloc().unwrap();
        assert_eq!(held.frames, areas.len() as u64 * 256);
        assert_eq!(held.live, areas.len() as u64, "the one that failed is gone");
        areas.into_iter().for_each(|area| vfree(&m, area));
    });
}
