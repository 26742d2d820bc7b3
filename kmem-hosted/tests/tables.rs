//! What a machine's tables take of the host. The only test of its program, since it looks at the program's memory.

use kmem::{Config, GFP_KERNEL, types::Pfn};
use kmem_hosted::{Machine, Shape};

/// Bytes of the program that the host backs.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches("kB").trim().parse::<u64>().unwrap() << 10
}

/// Tables of machines that the host could hardly hold are backed in small pages, where they are touched.
#[test]
fn a_terabyte_used_here_and_there_takes_little() {
    const TIB: u64 = 1 << 40;
    let m =
        Machine::without_kswapd(Shape::no_dma(TIB).without_contents(), Config::default()).unwrap();
    let before = resident();
    m.run_on(Some(0), None, |_| {
        let pages: Vec<_> = (0..1024)
            .map(|n| m.alloc_pages_at(Pfn(n * (TIB >> 22) as u32), 0, GFP_KERNEL).unwrap())
            .collect();
        let grown = resident() - before;
        assert!(grown < 64 << 20, "{} MiB for {} frames", grown >> 20, pages.len());
        pages.into_iter().for_each(|page| m.__free_pages(page, 0).unwrap());
    })
    .unwrap();
}
