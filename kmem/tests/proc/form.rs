//! The form of every line against the recorded kernel's: labels, order, white space.

use crate::{recorded, text};
use kmem::{Gfp, page_state::SystemStat, slab::SlabFlags, vmstat::VmEvent};

/// How numbers are printed.
#[derive(Clone, Copy)]
enum Align {
    /// As wide as they are.
    Left,
    /// Filled up with spaces on the left.
    Right,
}

/// A line with its numbers taken out: `#`, or the width of the column.
fn form(line: &str, align: Align) -> String {
    let mut out = String::new();
    let mut rest = line;
    while let Some(start) = rest.find([' ', '(']) {
        let (before, from) = rest.split_at(start);
        let pad = from.find(|c| c != ' ' && c != '(').unwrap_or(from.len());
        let digits = from[pad..].find(|c: char| !c.is_ascii_digit()).unwrap_or(from[pad..].len());
        out += before;
        let ends = from[pad + digits..].chars().next().is_none_or(|c| " ,)".contains(c));
        match align {
            _ if digits == 0 || !ends => out += &from[..pad],
            Align::Left => out += &format!("{}#", &from[..pad]),
            Align::Right => out += &format!("<{}>", pad + digits),
        }
        rest = &from[pad + if ends { digits } else { 0 }..];
    }
    out + rest
}

#[track_caller]
fn same_form<'a>(
    ours: impl Iterator<Item = &'a str>,
    real: impl Iterator<Item = &'a str>,
    align: Align,
) {
    let ours: Vec<_> = ours.map(|line| form(line, align)).collect();
    let real: Vec<_> = real.map(|line| form(line, align)).collect();
    for (ours, real) in ours.iter().zip(&real) {
        assert_eq!(ours, real);
    }
    assert_eq!(ours.len(), real.len());
}

#[test]
fn form_sees_white_space_labels_and_digits_in_names() {
    assert_eq!(
        form("Node 0, zone    DMA32     10      2 ", Align::Right),
        "Node<2>, zone    DMA32<7><7> "
    );
    assert_eq!(form("  protection: (0, 440)", Align::Left), "  protection: (#, #)");
    assert_eq!(form("MemFree:          16 kB", Align::Right), "MemFree:<12> kB");
    assert_ne!(form("a  1", Align::Left), form("a 1", Align::Left));
    assert_ne!(form("a  1", Align::Right), form("a 1", Align::Right));
}

#[test]
fn buddyinfo_has_linux_form() {
    let m = recorded();
    let ours = text(|w| m.write_buddyinfo(w));
    same_form(ours.lines(), include_str!("golden/buddyinfo.txt").lines(), Align::Right);
    assert!(ours.ends_with(" \n"));
}

#[test]
fn zoneinfo_has_linux_form() {
    let m = recorded();
    let ours = text(|w| m.write_zoneinfo(w));
    same_form(ours.lines(), include_str!("golden/zoneinfo.txt").lines(), Align::Left);
    assert!(ours.ends_with(")\n"));
}

#[test]
fn pagetypeinfo_has_linux_form_with_cma() {
    let m = recorded();
    let ours = text(|w| m.write_pagetypeinfo(w));
    // The recorded kernel has no CMA: its rows, and its column after four of 13 characters each.
    let blocks = ours.find("Number of blocks").unwrap();
    let (free, blocks) = ours.split_at(blocks);
    let free = free.lines().filter(|line| !line.contains("type          CMA "));
    let cut: Vec<String> = blocks
        .lines()
        .map(|line| {
            // The head begins with 23 characters, as Linux has it, a row with 22.
            let at = if line.starts_with("Node") { 74 } else { 75 };
            let (cma, rest) = (&line[at..at + 13], &line[at + 13..]);
            assert!(cma == "         CMA " || cma == "           0 ", "{cma:?}");
            format!("{}{rest}", &line[..at])
        })
        .collect();
    let real = include_str!("golden/pagetypeinfo.txt");
    same_form(free.chain(cut.iter().map(String::as_str)), real.lines(), Align::Right);
    assert_eq!(ours.matches("type          CMA ").count(), 2);
}

#[test]
fn meminfo_has_linux_form_with_cma() {
    let m = recorded();
    // The one number that is wider than its column; the machine has fewer addresses of its own.
    let own = m.system_state(SystemStat::VmallocTotal) as i64;
    m.mod_system_state(SystemStat::VmallocTotal, 34_359_738_364 / 4 - own);
    let ours = text(|w| m.write_meminfo(w));
    let cma: Vec<_> = ours.lines().filter(|line| line.starts_with("Cma")).collect();
    assert_eq!(cma, ["CmaTotal:              0 kB", "CmaFree:               0 kB"]);
    let after = ours.lines().skip_while(|line| !line.starts_with("FilePmdMapped:")).nth(1);
    assert_eq!(after, Some(cma[0]));
    let real = include_str!("golden/meminfo.txt").lines();
    same_form(
        ours.lines().filter(|line| !line.starts_with("Cma")),
        // An architecture's own lines.
        real.filter(|line| !line.starts_with("DirectMap")),
        Align::Right,
    );
}

#[test]
fn vmstat_has_linux_form_and_ends_with_our_own() {
    let m = recorded();
    let ours = text(|w| m.write_vmstat(w));
    let (linux, own) = ours.split_at(ours.find("nr_unstable 0\n").unwrap() + 14);
    let cma: Vec<_> = linux.lines().filter(|line| line.starts_with("cma_")).collect();
    assert_eq!(cma, ["cma_alloc_success 0", "cma_alloc_fail 0"]);
    let real = include_str!("golden/vmstat.txt");
    same_form(linux.lines().filter(|line| !line.starts_with("cma_")), real.lines(), Align::Left);
    let names = |text: &'static str| text.lines().map(|line| line.split(' ').next().unwrap());
    let own: Vec<_> = own.lines().map(|line| line.split(' ').next().unwrap()).collect();
    assert!(own.contains(&"pcp_refill"), "{own:?}");
    assert!(own.iter().all(|name| names(real).all(|linux| linux != *name)), "{own:?}");
    assert!(!own.contains(&"pgalloc_high"), "a zone that the machine does not have: {own:?}");
    // Every event we count is somewhere, once, but for those of zones the machine does not have.
    for event in VmEvent::ALL {
        let lines = ours.lines().filter(|line| line.split(' ').next() == Some(event.name()));
        assert_eq!(lines.count(), usize::from(!event.name().ends_with("_high")), "{event:?}");
    }
}

#[test]
fn slabinfo_has_linux_form() {
    let m = recorded();
    m.run(|_| {
        let long = "ext4_allocation_context";
        let cache = m.kmem_cache_create(long, 168, 0, SlabFlags::NO_MERGE, None).unwrap();
        let held: Vec<_> =
            (0..100).map(|_| m.kmem_cache_alloc(&cache, Gfp::KERNEL).unwrap()).collect();
        let small = m.kmalloc(64, Gfp::KERNEL).unwrap();
        let ours = text(|w| m.write_slabinfo(w));
        let real = include_str!("golden/slabinfo.txt");
        let head = |text: &str| text.lines().take(2).map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(head(&ours), head(real));
        // Columns: as wide in each line, names that are too long pushing the others.
        for name in [long, "kmalloc-64", "kmem_cache"] {
            let line = |text: &str| {
                let starts = |l: &&str| l.starts_with(name) && l.as_bytes()[name.len()] == b' ';
                form(text.lines().find(starts).unwrap(), Align::Right)
            };
            assert_eq!(line(&ours), line(real), "{ours}");
        }
        // The youngest first.
        let order: Vec<_> = ours.lines().skip(2).filter_map(|l| l.split(' ').next()).collect();
        assert_eq!(order[..2], [long, "kmalloc-64"]);
        assert_eq!(order.last(), Some(&"kmem_cache"));
        let row: Vec<_> = ours.lines().nth(2).unwrap().split_whitespace().collect();
        let info = m.kmem_cache_info(&cache);
        assert_eq!(row[1], info.active_objects.to_string());
        assert!(info.active_objects >= 100);
        assert_eq!((row[2], row[3]), (info.objects.to_string().as_str(), "168"));
        for at in held.into_iter().chain([small]) {
            // SAFETY: not used after.
            unsafe { m.kfree(at.as_ptr()).unwrap() };
        }
        m.kmem_cache_destroy(cache).unwrap();
    })
    .unwrap();
}
