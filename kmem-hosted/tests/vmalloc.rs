//! vmalloc on the host's page tables: runs of frames in one mapping, guards that kill, and an end of mappings that
//! is an error like any other \[V1, V2, V4\]. One test a process: the last one uses all mappings there are.

use kmem::{AllocError, Config, Gfp, Page};
use kmem_hosted::{Machine, Shape};

const PAGE: usize = 4096;

/// Mappings of this process that show frames of a machine in a range.
fn mappings(from: usize, to: usize) -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let inside = |line: &&str| {
        let start = line.split_once('-').and_then(|(s, _)| usize::from_str_radix(s, 16).ok());
        line.contains("kmem-physical") && start.is_some_and(|s| (from..to).contains(&s))
    };
    maps.lines().filter(inside).count()
}

/// Whether a child that reads an address is killed for it.
fn kills(address: *const u8) -> bool {
    // SAFETY: the child calls nothing but _exit, after one read that it may die of.
    unsafe {
        let child = libc::fork();
        assert!(child >= 0, "fork");
        if child == 0 {
            libc::signal(libc::SIGSEGV, libc::SIG_DFL);
            let _ = address.read_volatile();
            libc::_exit(0);
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
        libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGSEGV
    }
}

#[test]
fn mappings_are_real_and_run_out_cleanly() {
    let shape = Shape::x86_64(1 << 30).vmalloc(4 << 30);
    let m = Machine::without_kswapd(shape, Config::default()).unwrap();
    m.run(|_| {
        // A block of 2 MiB is one mapping.
        let huge = m.vmalloc_huge(4 << 20, Gfp::KERNEL).unwrap();
        let start = huge.as_ptr().addr();
        assert!(mappings(start, start + (4 << 20)) <= 2);
        let end = huge.as_ptr().wrapping_add(4 << 20);
        assert!(!kills(end.wrapping_sub(1)) && kills(end), "the guard");
        // SAFETY: not used after.
        unsafe { m.vfree(huge.as_ptr()).unwrap() };
        assert!(kills(huge.as_ptr()), "freed");
        assert_eq!(mappings(start, start + (4 << 20)), 0);

        // Frames that lie apart take a mapping each, until the host has no more.
        let frames: Vec<&Page> = (0..60_000).map(|_| m.alloc_page(Gfp::KERNEL).unwrap()).collect();
        let (even, odd): (Vec<&Page>, Vec<&Page>) =
            frames.into_iter().partition(|page| m.page_to_pfn(page).unwrap().0.is_multiple_of(2));
        odd.iter().for_each(|page| m.put_page(page).unwrap());
        let before = m.nr_free_pages();
        let mut areas = Vec::new();
        let mut refused = false;
        while areas.len() < 8 && !refused {
            match m.vmap(&even, kmem::vmalloc::VmFlags::empty(), kmem::platform::PageProt::KERNEL) {
                Ok(area) => areas.push(area),
                Err(e) => {
                    assert_eq!(e, AllocError::NoMemory);
                    refused = true;
                }
            }
        }
        assert!(refused, "{} areas of {} mappings", areas.len(), even.len());
        let live = m.audit_vmalloc().unwrap().live;
        assert_eq!(live, areas.len() as u64, "the one that failed is gone");
        // The others are as they were.
        for area in &areas {
            // SAFETY: live, mapped.
            unsafe { area.write_volatile(1) };
        }
        for area in areas {
            // SAFETY: not used after.
            unsafe { m.vunmap(area.as_ptr()).unwrap() };
        }
        let again = m.vmalloc(100 * PAGE).unwrap();
        // SAFETY: live; not used after it is freed.
        unsafe {
            again.add(99 * PAGE).write_volatile(1);
            m.vfree(again.as_ptr()).unwrap();
        }
        even.iter().for_each(|page| m.put_page(page).unwrap());
        m.vm_unmap_aliases();
        m.drop_slab();
        m.drain_all_pages();
        assert!(m.nr_free_pages() > before);
        assert_eq!(m.audit_objects().unwrap().live, 0);
        assert_eq!(m.audit_vmalloc().unwrap().live, 0);
    })
    .unwrap();
}
