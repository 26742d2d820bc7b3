//! The numbers in the texts against the machine's, under load, on two nodes.

use crate::{MIB, text, texts};
use kmem::{Config, Gfp, MigrateType, Page, Pfn, vmstat::VmEvent};
use kmem_hosted::{Machine, Shape};
use proptest::prelude::*;
use std::collections::HashMap;

/// Numbers of a line after its label.
fn numbers(line: &str) -> Vec<u64> {
    line.split_whitespace().map_while(|word| word.parse().ok()).collect()
}

/// `buddyinfo` as a program reads it: free blocks by order, by node and zone.
fn buddyinfo(text: &str) -> HashMap<(usize, String), Vec<u64>> {
    text.lines()
        .map(|line| {
            let rest = line.strip_prefix("Node ").unwrap();
            let (node, rest) = rest.split_once(", zone ").unwrap();
            let (zone, counts) = rest.trim_start().split_once(' ').unwrap();
            ((node.parse().unwrap(), zone.to_owned()), numbers(counts))
        })
        .collect()
}

/// The two tables of `pagetypeinfo`: free blocks by order, by node, zone and mobility; and pageblocks
/// by mobility, by node and zone.
type Free = HashMap<(usize, String, String), Vec<u64>>;
type Blocks = HashMap<(usize, String), Vec<u64>>;

fn pagetypeinfo(text: &str) -> (Free, Blocks) {
    let (mut free, mut blocks) = (Free::new(), Blocks::new());
    for line in text.lines().filter_map(|line| line.strip_prefix("Node ")) {
        let (node, rest) = line.split_once(", zone ").unwrap();
        let node = node.trim().parse().unwrap();
        if let Some((zone, rest)) = rest.split_once(", type ") {
            let (mt, counts) = rest.trim_start().split_once(' ').unwrap();
            free.insert((node, zone.trim().to_owned(), mt.to_owned()), numbers(counts));
        } else {
            let (zone, counts) = rest.trim_start().split_once(' ').unwrap();
            blocks.insert((node, zone.to_owned()), numbers(counts));
        }
    }
    (free, blocks)
}

/// The part of `zoneinfo` about one populated zone.
fn zone_part<'a>(zoneinfo: &'a str, node: usize, name: &str) -> &'a str {
    let start = zoneinfo.find(&format!("Node {node}, zone {name:>8}\n")).unwrap();
    let part = &zoneinfo[start + 5..];
    part.find("\nNode ").map_or(part, |end| &part[..end])
}

/// The numbers of all lines of `text` that begin with `label`.
fn all(text: &str, label: &str) -> Vec<u64> {
    text.lines().filter_map(|line| numbers(line.trim().strip_prefix(label)?).pop()).collect()
}

/// Checks every number that another source has too.
fn check(m: &Machine) {
    let texts: HashMap<_, _> = texts::<_, _>(m.kmem()).into_iter().collect();
    let buddy = buddyinfo(&texts["buddyinfo"]);
    let (free, blocks) = pagetypeinfo(&texts["pagetypeinfo"]);
    let orders = m.max_order() as usize + 1;
    assert_eq!(buddy.len(), m.zones().len());
    let mut total_free = 0;
    for zone in m.zones() {
        let key = (zone.node(), zone.name().to_owned());
        let counts = &buddy[&key];
        assert_eq!(counts[..], m.nr_free(zone)[..orders]);
        let frames: u64 = counts.iter().enumerate().map(|(order, n)| n << order).sum();
        assert_eq!(frames, zone.free_frames());
        total_free += frames;

        let mut sum = vec![0; orders];
        for mt in MigrateType::ALL {
            let row = &free[&(key.0, key.1.clone(), mt.name().to_owned())];
            sum.iter_mut().zip(row).for_each(|(sum, n)| *sum += n);
        }
        assert_eq!(&sum, counts, "free blocks by mobility add up");
        let mut by_type = [0; 6];
        for pfn in (zone.spanned().start..zone.spanned().end).step_by(512) {
            if m.page_zone(Pfn(pfn)).is_some_and(|z| std::ptr::eq(z, zone)) {
                by_type[m.pageblock_migratetype(Pfn(pfn)).unwrap() as usize] += 1;
            }
        }
        assert_eq!(blocks[&key], by_type);

        let part = zone_part(&texts["zoneinfo"], key.0, &key.1);
        let marks = zone.watermarks();
        assert_eq!(all(part, "pages free "), [frames]);
        assert_eq!(all(part, "nr_free_pages "), [frames]);
        assert_eq!(all(part, "min "), [marks.min]);
        assert_eq!(all(part, "low "), [marks.low]);
        assert_eq!(all(part, "high "), [marks.high]);
        assert_eq!(all(part, "managed "), [zone.managed_frames()]);
        assert_eq!(all(part, "present "), [zone.present_frames()]);
        assert_eq!(all(part, "start_pfn: "), [u64::from(zone.start_pfn())]);
        assert_eq!(all(part, "count: "), m.pcp_frames(zone).collect::<Vec<_>>());
        let batches: Vec<u64> = (0..4).map(|cpu| m.pcp_limits(zone, cpu).0.into()).collect();
        assert_eq!(all(part, "batch: "), batches);
        for (count, high) in all(part, "count: ").into_iter().zip(all(part, "high:  ")) {
            assert!(count <= high, "a list holds {count} of {high}");
        }
    }
    let vmstat = &texts["vmstat"];
    assert_eq!(all(vmstat, "nr_free_pages "), [total_free]);
    assert_eq!(all(&texts["meminfo"], "MemFree: "), [total_free * 4]);
    assert_eq!(all(&texts["meminfo"], "MemTotal: "), [m.totalram_pages() * 4]);
    for event in VmEvent::ALL.into_iter().filter(|e| !e.name().ends_with("_high")) {
        let movable = ["_movable", "_device"].iter().any(|end| event.name().ends_with(end));
        if !movable {
            let shown = all(vmstat, &format!("{} ", event.name()));
            assert_eq!(shown, [m.vm_event(event)], "{event:?}");
        }
    }
    for event in ["numa_hit", "numa_miss", "numa_local", "numa_other"] {
        let zones: u64 = all(&texts["zoneinfo"], event).into_iter().sum();
        assert_eq!(all(vmstat, event), [zones]);
    }
}

fn two_nodes() -> Machine {
    let shape = Shape::numa(2, 64 * MIB);
    Machine::without_kswapd(shape, Config::default()).unwrap()
}

#[test]
fn an_idle_machine_adds_up() {
    let m = two_nodes();
    check(&m);
    let zoneinfo = text(|w| m.write_zoneinfo(w));
    assert_eq!(zoneinfo.matches("per-node stats").count(), 2);
    let heads: Vec<_> = zoneinfo.lines().filter(|line| line.starts_with("Node")).collect();
    let expected: Vec<String> = [(0, "DMA"), (0, "DMA32"), (0, "Normal"), (0, "Movable")]
        .into_iter()
        .chain([(1, "DMA"), (1, "DMA32"), (1, "Normal"), (1, "Movable")])
        .map(|(node, zone)| format!("Node {node}, zone {zone:>8}"))
        .collect();
    assert_eq!(heads, expected);
    assert_eq!(text(|w| m.write_pagetypeinfo(w)).matches("Page block order: 9\n").count(), 2);
}

#[test]
fn cpus_that_are_offline_have_no_lines() {
    let m = two_nodes();
    m.cpu_down(2).unwrap();
    let zoneinfo = text(|w| m.write_zoneinfo(w));
    let part = zone_part(&zoneinfo, 0, "DMA32");
    assert_eq!(all(part, "cpu: "), [0, 1, 3]);
    m.cpu_up(2).unwrap();
    check(&m);
}

#[test]
fn a_writer_that_fails_ends_the_text() {
    struct Full(usize);
    impl std::fmt::Write for Full {
        fn write_str(&mut self, s: &str) -> std::fmt::Result {
            self.0 = self.0.checked_sub(s.len()).ok_or(std::fmt::Error)?;
            Ok(())
        }
    }
    let m = two_nodes();
    type Write<'a> = &'a dyn Fn(&mut dyn std::fmt::Write) -> std::fmt::Result;
    let writes: [Write<'_>; 5] = [
        &|w| m.write_buddyinfo(w),
        &|w| m.write_zoneinfo(w),
        &|w| m.write_pagetypeinfo(w),
        &|w| m.write_meminfo(w),
        &|w| m.write_vmstat(w),
    ];
    for write in writes {
        let whole = text(|w| write(w)).len();
        for room in [0, 1, whole / 2, whole - 1] {
            assert!(write(&mut Full(room)).is_err(), "{room} of {whole}");
        }
        assert!(write(&mut Full(whole)).is_ok());
    }
}

#[test]
fn numa_events_are_the_zones_own() {
    let m = two_nodes();
    let node1 = |m: &Machine, event| {
        m.zones().iter().filter(|z| z.node() == 1).map(|z| m.zone_numa_event(z, event)).sum::<u64>()
    };
    m.run_on(Some(0), None, |_| {
        let before = m.vm_event(VmEvent::NumaHit);
        // Ten through the fast path, ten through the general one.
        for i in 0..20 {
            let gfp = if i < 10 { Gfp::KERNEL } else { Gfp::KERNEL | Gfp::ZERO };
            m.alloc_page(gfp).unwrap();
        }
        assert_eq!(m.vm_event(VmEvent::NumaHit) - before, 20);
        assert_eq!(m.vm_event(VmEvent::NumaLocal), m.vm_event(VmEvent::NumaHit));
        assert_eq!(node1(&m, VmEvent::NumaHit), 0);
        for _ in 0..7 {
            m.alloc_pages_node(1, Gfp::KERNEL, 0).unwrap();
        }
        assert_eq!(node1(&m, VmEvent::NumaHit), 7);
        assert_eq!(node1(&m, VmEvent::NumaOther), 7);
        // Node 0 runs out: node 1 serves, a miss there and foreign to node 0.
        while node1(&m, VmEvent::NumaMiss) == 0 {
            m.alloc_pages(Gfp::KERNEL, 5).unwrap();
        }
        let foreign = m.zones().iter().filter(|z| z.node() == 0);
        let foreign: u64 = foreign.map(|z| m.zone_numa_event(z, VmEvent::NumaForeign)).sum();
        assert_eq!(foreign, node1(&m, VmEvent::NumaMiss));
    })
    .unwrap();
    check(&m);
}

/// A step of the load.
#[derive(Clone, Copy, Debug)]
enum Step {
    Alloc { cpu: usize, order: u32, gfp: Gfp },
    Free(usize),
    Mobility(u32, MigrateType),
    Drain,
}

fn step() -> impl Strategy<Value = Step> {
    let gfp = prop_oneof![
        Just(Gfp::KERNEL),
        Just(Gfp::KERNEL | Gfp::ZERO),
        Just(Gfp::HIGHUSER_MOVABLE),
        Just(Gfp::KERNEL | Gfp::RECLAIMABLE),
        Just(Gfp::ATOMIC),
    ];
    let mt = (0..6usize).prop_map(|i| MigrateType::ALL[i]);
    prop_oneof![
        8 => (0..4usize, 0..11u32, gfp)
            .prop_map(|(cpu, order, gfp)| Step::Alloc { cpu, order, gfp }),
        6 => any::<usize>().prop_map(Step::Free),
        1 => (0..32u32, mt).prop_map(|(block, mt)| Step::Mobility(block * 512, mt)),
        1 => Just(Step::Drain),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn texts_agree_with_the_machine_under_load(steps in prop::collection::vec(step(), 1..120)) {
        let m = two_nodes();
        let mut live: Vec<(&Page, u32)> = Vec::new();
        for step in steps {
            match step {
                Step::Alloc { cpu, order, gfp } => {
                    let gfp = gfp | Gfp::NOWARN | Gfp::NORETRY;
                    let page = m.run_on(Some(cpu), None, |_| m.alloc_pages(gfp, order)).unwrap();
                    live.extend(page.ok().map(|page| (page, order)));
                }
                Step::Free(i) if !live.is_empty() => {
                    let (page, order) = live.swap_remove(i % live.len());
                    m.run(|_| m.__free_pages(page, order)).unwrap().unwrap();
                }
                Step::Free(_) => {}
                Step::Mobility(pfn, mt) => {
                    m.set_pageblock_migratetype(Pfn(pfn), mt);
                }
                Step::Drain => m.drain_all_pages(),
            }
        }
        check(&m);
    }
}
