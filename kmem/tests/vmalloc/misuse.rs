//! What is wrong is found out, reported, and changes nothing \[V2\].

use super::{PAGE, at, vfree};
use kmem::{Gfp, Misuse, platform::PageProt, vmalloc::VmFlags};
use kmem_test_support::Rig;

#[test]
fn wrong_addresses_are_reported() {
    let m = Rig::pc();
    m.run(|_| {
        let area = m.vmalloc(3 * PAGE).unwrap();
        let addr = area.as_ptr().addr();
        let free = |addr: usize| {
            let mark = m.mark();
            // SAFETY: nothing is freed by it.
            let wrong = unsafe { m.vfree(std::ptr::without_provenance(addr)) }.unwrap_err();
            (wrong, m.one_report(mark))
        };
        for inside in [1, PAGE, 3 * PAGE - 1, 3 * PAGE] {
            let (wrong, report) = free(addr + inside);
            assert_eq!(wrong, Misuse::InsideArea { addr: addr + inside, start: addr });
            assert!(report.starts_with("BUG: Bad vmalloc address: "), "{report}");
            assert!(report.contains("vmalloc/misuse.rs:"), "{report}");
            assert!(report.contains("\n  allocated at "), "{report}");
        }
        for never in [addr + 400 * PAGE, 8, usize::MAX, usize::MAX & !(PAGE - 1)] {
            assert_eq!(free(never).0, Misuse::NoArea { addr: never });
        }
        assert_eq!(m.audit_vmalloc().unwrap().live, 1);
        vfree(&m, area);
        let (wrong, report) = free(addr);
        assert_eq!(wrong, Misuse::AreaFree { addr });
        assert!(report.contains("\n  freed at "), "{report}");
        m.vm_unmap_aliases();
        assert_eq!(free(addr).0, Misuse::NoArea { addr }, "nobody knows of it any more");
        // SAFETY: null is nothing.
        unsafe { m.vfree(std::ptr::null()).unwrap() };
    });
}

#[test]
fn areas_are_freed_by_the_right_call() {
    let m = Rig::pc();
    m.run(|_| {
        let page = m.alloc_page(Gfp::KERNEL).unwrap();
        let area = m.vmalloc(PAGE).unwrap();
        let map = m.vmap(&[page], VmFlags::empty(), PageProt::KERNEL).unwrap();
        // SAFETY: refused, all of them.
        let wrong = unsafe {
            [
                m.vunmap(area.as_ptr()),
                m.iounmap(area.as_ptr()),
                m.vfree(map.as_ptr()),
                m.iounmap(map.as_ptr()),
            ]
        };
        for (i, wrong) in wrong.into_iter().enumerate() {
            let right = if i < 2 { "vfree" } else { "vunmap" };
            let Misuse::WrongArea { given, right: told, .. } = wrong.unwrap_err() else { panic!() };
            assert_eq!((given, told), (["vunmap", "iounmap", "vfree", "iounmap"][i], right));
        }
        assert!(m.vm_map_pages(area, &[page], PageProt::KERNEL).is_err(), "not for that");
        vfree(&m, area);
        // SAFETY: not used after.
        unsafe { m.vunmap(map.as_ptr()).unwrap() };
        m.put_page(page).unwrap();
    });
}

#[test]
fn the_direct_map_refuses_them() {
    let m = Rig::pc();
    m.run(|_| {
        let area = m.vmalloc(PAGE).unwrap();
        let here = at(area, 8);
        let what = Misuse::VmallocAddress { addr: here.addr() };
        let mark = m.mark();
        assert!(m.virt_to_page(here).is_none());
        assert!(m.one_report(mark).contains("is in the vmalloc range"));
        let mark = m.mark();
        assert_eq!(m.virt_to_phys(here), None);
        m.one_report(mark);
        // SAFETY: refused.
        assert_eq!(unsafe { m.kfree(here) }, Err(what));
        assert_eq!(m.free_pages(here, 0), Err(what));
        assert_eq!(m.ksize(here), None);
        vfree(&m, area);
        // Others are merely not in it, and have a physical address if they are.
        let mark = m.mark();
        let here = 0u8;
        assert!(
            m.virt_to_page(std::ptr::null()).is_none() && m.virt_to_page(&raw const here).is_none()
        );
        assert_eq!(m.virt_to_phys(&raw const here), None);
        assert_eq!(m.since(mark), []);
        let page = m.alloc_page(Gfp::KERNEL).unwrap();
        let phys = u64::from(m.page_to_pfn(page).unwrap().0) * PAGE as u64;
        let direct = m.page_address(page).unwrap().as_ptr().wrapping_add(9);
        assert_eq!(m.virt_to_phys(direct), Some(phys + 9));
        m.put_page(page).unwrap();
    });
}

#[test]
fn a_frame_freed_by_somebody_else_is_found_out() {
    let m = Rig::pc();
    m.run(|_| {
        let area = m.vmalloc(4 * PAGE).unwrap();
        let page = m.vmalloc_to_page(at(area, PAGE)).unwrap();
        m.__free_pages(page, 0).unwrap();
        assert!(m.audit_vmalloc().is_err());
        // SAFETY: not used after.
        let wrong = unsafe { m.vfree(area.as_ptr()) };
        assert!(matches!(wrong, Err(Misuse::DoubleFree { .. })), "{wrong:?}");
        assert_eq!(m.audit_vmalloc().unwrap().live, 0, "the rest is freed");
    });
}
