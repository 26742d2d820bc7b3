//! `/proc/vmallocinfo`, to the letter \[V4, T1\].

use super::{PAGE, vfree};
use kmem::{Config, Gfp, platform::PageProt, vmalloc::VmFlags};
use kmem_hosted::Shape;
use kmem_test_support::{MIB, Rig};

#[test]
fn areas_are_listed_with_their_callers() {
    let m = Rig::new(Shape::numa(2, 16 * MIB).hole(4 * MIB, MIB), Config::default());
    m.run(|_| {
        let text = || {
            let mut text = String::new();
            m.write_vmallocinfo(&mut text).unwrap();
            text
        };
        assert_eq!(text(), "");
        let line = line!();
        let first = m.vmalloc_node(5 * PAGE, 0).unwrap();
        let second = m.vmalloc_node(3 * PAGE, 1).unwrap();
        let third = m.vmalloc_user(100 * PAGE).unwrap();
        let pages = [0, 1, 1].map(|node| m.alloc_pages_node(node, Gfp::KERNEL, 0).unwrap());
        let map = m.vmap(&pages, VmFlags::empty(), PageProt::KERNEL).unwrap();
        let sparse = m.get_vm_area(PAGE).unwrap();
        let device = m.ioremap(4 * MIB, PAGE).unwrap();
        let expected: String = [
            (first, 6, 1, " pages=5", " vmalloc", " N0=5"),
            (second, 4, 2, " pages=3", " vmalloc", " N1=3"),
            (third, 101, 3, " pages=100", " vmalloc user", " N0=100"),
            (map, 4, 5, " pages=3", " vmap", " N0=1 N1=2"),
            (sparse, 2, 6, "", " sparse vmap", ""),
            (device, 2, 7, " phys=0x0000000000400000", " ioremap", ""),
        ]
        .into_iter()
        .map(|(area, frames, by, shown, kind, nodes)| {
            let (start, size) = (area.as_ptr().addr(), frames * PAGE);
            let (end, at) = (start + size, line + by);
            let file = file!();
            format!("0x{start:016x}-0x{end:016x} {size:7} {file}:{at}{shown}{kind}{nodes}\n")
        })
        .collect();
        assert_eq!(text(), expected);
        vfree(&m, second);
        let start = second.as_ptr().addr();
        let lazy = format!("0x{start:016x}-0x{:016x}   16384 unpurged vm_area\n", start + 4 * PAGE);
        assert!(text().ends_with(&lazy), "{}", text());
        assert_eq!(text().lines().count(), 6);
        m.vm_unmap_aliases();
        assert_eq!(text().lines().count(), 5);
        // SAFETY: not used after.
        unsafe {
            m.vunmap(map.as_ptr()).unwrap();
            m.vunmap(sparse.as_ptr()).unwrap();
            m.iounmap(device.as_ptr()).unwrap();
        }
        [first, third].iter().for_each(|area| vfree(&m, *area));
        pages.iter().for_each(|page| m.put_page(page).unwrap());
    });
}
