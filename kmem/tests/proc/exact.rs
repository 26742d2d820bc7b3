//! Exact texts: a small machine's, and those of the recorded machine, rebuilt frame by frame.

use crate::text;
use kmem::{
    Config, Gfp, Kmem, MigrateType, Pfn, ZoneType,
    page_state::{NodeStat, SystemStat, ZoneStat},
    zone::{Layout, Watermarks},
};
use kmem_hosted::{Bank, Hosted, Machine, Shape};

const KIB: u64 = 1024;
const PAGE: u64 = 4 * KIB;

#[test]
fn a_small_machine_to_the_letter() {
    let m = Machine::without_kswapd(Shape::no_dma(8 << 20), Config::default()).unwrap();
    assert!(m.set_pageblock_migratetype(Pfn(512), MigrateType::Unmovable));
    assert!(m.set_pageblock_migratetype(Pfn(1536), MigrateType::Cma));
    m.alloc_pages_at(Pfn(512), 0, Gfp::KERNEL).unwrap();
    m.alloc_pages_at(Pfn(1024 + 256), 4, Gfp::KERNEL).unwrap();
    m.alloc_pages_at(Pfn(1536), 8, Gfp::KERNEL).unwrap();
    assert_eq!(
        text(|w| m.write_buddyinfo(w)),
        "Node 0, zone   Normal      1      1      1      1      2      2      2      2      3      1      0 \n"
    );
    let expected = "\
Page block order: 9
Pages per block:  512

Free pages count per migrate type at order       0      1      2      3      4      5      6      7      8      9     10 
Node    0, zone   Normal, type    Unmovable      1      1      1      1      1      1      1      1      1      0      0 
Node    0, zone   Normal, type      Movable      0      0      0      0      1      1      1      1      1      1      0 
Node    0, zone   Normal, type  Reclaimable      0      0      0      0      0      0      0      0      0      0      0 
Node    0, zone   Normal, type   HighAtomic      0      0      0      0      0      0      0      0      0      0      0 
Node    0, zone   Normal, type          CMA      0      0      0      0      0      0      0      0      1      0      0 
Node    0, zone   Normal, type      Isolate      0      0      0      0      0      0      0      0      0      0      0 

Number of blocks type     Unmovable      Movable  Reclaimable   HighAtomic          CMA      Isolate 
Node 0, zone   Normal            1            2            0            0            1            0 
";
    assert_eq!(text(|w| m.write_pagetypeinfo(w)), expected);
    let zoneinfo = text(|w| m.write_zoneinfo(w));
    let line = |label: &str| zoneinfo.lines().find(|line| line.contains(label));
    assert_eq!(line(" cma "), Some("        cma      512"));
    assert_eq!(line("nr_free_cma"), Some("      nr_free_cma  256"));
    let meminfo = text(|w| m.write_meminfo(w));
    assert!(meminfo.contains("\nCmaTotal:           2048 kB\nCmaFree:            1024 kB\n"));
    assert!(!meminfo.contains("HighTotal"));
}

/// The number at the end of a line of `text` that begins with `label`, spaces aside.
fn value(text: &str, label: &str) -> u64 {
    let line = text.lines().map(str::trim_start).find(|line| line.split(' ').next() == Some(label));
    let line = line.unwrap_or_else(|| panic!("no line {label}"));
    let number = line.split_whitespace().nth(1).unwrap();
    number.parse().unwrap()
}

const MEMINFO: &str = include_str!("golden/meminfo.txt");
const VMSTAT: &str = include_str!("golden/vmstat.txt");
const ZONEINFO: &str = include_str!("golden/zoneinfo.txt");

/// The recorded machine: same banks, zones, reservations, marks, free frames and uses of frames.
fn rebuilt() -> Kmem<Hosted> {
    let mut shape = Shape::x86_64(512 << 20);
    shape.banks = vec![
        Bank { base: PAGE, size: 158 * PAGE, node: 0 },
        Bank { base: 1 << 20, size: 511 << 20, node: 0 },
    ];
    let mut boot = shape.memblock().unwrap();
    boot.reserve(PAGE, 158 * PAGE).unwrap();
    boot.reserve(256 << 20, (126_976 - 114_990) * PAGE).unwrap();
    let config = Config {
        layout: Layout::x86_64(),
        lowmem_reserve_ratio: [261, 256, 32, 0, 0, 0],
        ..Config::default()
    };
    let m = Kmem::bring_up(Hosted::new(shape).unwrap(), boot, &config).unwrap();
    (0..2).for_each(|cpu| m.cpu_online(cpu));
    let marks = [(190, 237, 284, 331), (5699, 7123, 8547, 9971)];
    let free = [3808, 106_996];
    for (zone, ((min, low, high, promo), free)) in m.zones().iter().zip(marks.into_iter().zip(free))
    {
        m.set_watermarks(zone, Watermarks { min, low, high, promo });
        for pfn in zone.spanned().start..zone.spanned().end {
            if zone.free_frames() == free {
                break;
            }
            // Frames that are reserved are not there to take.
            let _ = m.alloc_pages_at(Pfn(pfn), 0, Gfp::KERNEL);
        }
    }
    m
}

#[test]
fn meminfo_of_the_recorded_machine() {
    let m = rebuilt();
    for stat in NodeStat::ALL {
        let huge = if stat.in_huge_pages() { 512 } else { 1 };
        m.mod_node_page_state(0, stat, value(VMSTAT, stat.name()) as i64 * huge);
    }
    // This changed between the reading of the two files.
    m.mod_node_page_state(0, NodeStat::ActiveAnon, 1440 - 1453);
    for stat in &SystemStat::ALL[..=SystemStat::HardwareCorrupted as usize] {
        let label = format!("{}:", stat.name());
        // The machine has addresses for vmalloc of its own.
        let own = m.system_state(*stat) as i64;
        m.mod_system_state(*stat, (value(MEMINFO, &label) / 4) as i64 - own);
    }
    let ours = text(|w| m.write_meminfo(w));
    let ours: Vec<_> = ours.lines().filter(|line| !line.starts_with("Cma")).collect();
    let real = MEMINFO.replace("34359738367 kB", "34359738364 kB");
    let real: Vec<_> = real.lines().filter(|line| !line.starts_with("DirectMap")).collect();
    assert_eq!(ours, real);
}

#[test]
fn vmstat_of_the_recorded_machine() {
    let m = rebuilt();
    for stat in NodeStat::ALL {
        m.mod_node_page_state(0, stat, value(VMSTAT, stat.name()) as i64);
    }
    for stat in ZoneStat::ALL {
        // Some in each zone: the text shows the sum.
        let n = value(VMSTAT, stat.name()) as i64;
        m.mod_zone_page_state(&m.zones()[0], stat, n / 3);
        m.mod_zone_page_state(&m.zones()[1], stat, n - n / 3);
    }
    for stat in [SystemStat::DirtyThreshold, SystemStat::DirtyBackgroundThreshold] {
        m.mod_system_state(stat, value(VMSTAT, stat.name()) as i64);
    }
    let ours = text(|w| m.write_vmstat(w));
    let counts = |line: &&str| !line.starts_with("numa_");
    let states = |text: &'static str| {
        text.lines().take_while(|line| !line.starts_with("nr_memmap_boot")).filter(counts)
    };
    let real: Vec<_> = states(VMSTAT).collect();
    assert_eq!(ours.lines().filter(counts).take(real.len()).collect::<Vec<_>>(), real);
    assert!(real.len() > 60);
    // Half of Linux's: 32 bytes for a frame, not 64.
    assert_eq!(value(&ours, "nr_memmap_boot_pages"), value(VMSTAT, "nr_memmap_boot_pages") / 2);
}

#[test]
fn zoneinfo_of_the_recorded_machine() {
    let m = rebuilt();
    for stat in NodeStat::ALL {
        m.mod_node_page_state(0, stat, value(ZONEINFO, stat.name()) as i64);
    }
    for stat in [ZoneStat::ActiveAnon, ZoneStat::InactiveFile] {
        let text = &ZONEINFO[ZONEINFO.find("zone    DMA32").unwrap()..];
        m.mod_zone_page_state(&m.zones()[1], stat, value(text, stat.name()) as i64);
    }
    let ours = text(|w| m.write_zoneinfo(w));
    let mut zone = "";
    let mut same = 0;
    for (ours, real) in ours.lines().zip(ZONEINFO.lines()) {
        if let Some(name) = real.strip_prefix("Node 0, zone ") {
            zone = name.trim();
        }
        let label = real.trim_start().split([' ', ':']).next().unwrap();
        // What CPUs did, what their lists hold, and the marks that Linux gives even an empty zone.
        let differs = label.starts_with("numa_")
            || ["count", "high", "batch", "vm"].contains(&label)
            || zone == "Movable" && ["min", "low", "promo"].contains(&label);
        if !differs || zone.starts_with("DMA") && real.starts_with("        high ") {
            assert_eq!(ours, real, "zone {zone}");
            same += 1;
        }
    }
    assert_eq!(ours.lines().count(), ZONEINFO.lines().count());
    assert!(same > 130, "{same}");
}

#[test]
fn a_machine_with_high_memory_has_its_lines() {
    let m = Machine::without_kswapd(Shape::x86_32(1 << 30), Config::default()).unwrap();
    let meminfo = text(|w| m.write_meminfo(w));
    let high = m.zones().iter().find(|z| z.zone_type() == ZoneType::HighMem).unwrap();
    assert_eq!(value(&meminfo, "HighTotal:"), 128 * KIB);
    assert_eq!(value(&meminfo, "LowTotal:"), 896 * KIB);
    let before = value(&meminfo, "HighFree:");
    m.alloc_pages_at(Pfn(high.start_pfn()), 3, Gfp::HIGHUSER).unwrap();
    let meminfo = text(|w| m.write_meminfo(w));
    assert_eq!(value(&meminfo, "HighFree:"), before - 32);
    assert_eq!(value(&meminfo, "LowFree:"), 896 * KIB);
    let vmstat = text(|w| m.write_vmstat(w));
    assert_eq!(value(&vmstat, "pgalloc_high"), 8);
    let zones: Vec<_> = vmstat.lines().filter_map(|l| l.strip_prefix("pgskip_")).collect();
    assert_eq!(zones, ["dma 0", "normal 0", "high 0", "movable 0"]);
}
