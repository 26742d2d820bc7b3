//! The recordings of `data/`: they are whole, their events are explained, and their start states are consistent.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;
use std::path::Path;
use std::sync::OnceLock;

use kmem_trace::proc::{Buddyinfo, Pagetypeinfo, Zoneinfo};
use kmem_trace::slab::LinuxCache;
use kmem_trace::start::ZoneStart;
use kmem_trace::{Kind, PageOp, Recording, StartState, kmr};

struct Machine {
    recording: Recording,
    start: StartState,
}

fn load(name: &str) -> Machine {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../data").join(name);
    let recording = Recording::open(path).expect("the recording opens");
    let start = StartState::build(&recording).expect("its start state can be worked out");
    Machine { recording, start }
}

fn a() -> &'static Machine {
    static MACHINE: OnceLock<Machine> = OnceLock::new();
    MACHINE.get_or_init(|| load("linux-6.12-a.kmr"))
}

fn b() -> &'static Machine {
    static MACHINE: OnceLock<Machine> = OnceLock::new();
    MACHINE.get_or_init(|| load("linux-6.12-b.kmr"))
}

fn count(ranges: &[Range<u64>]) -> u64 {
    ranges.iter().map(|range| range.end - range.start).sum()
}

#[test]
fn rows_are_those_the_recorder_counted() {
    for (machine, rows, ids) in [(a(), 1_783_674, 893_591), (b(), 1_831_959, 916_699)] {
        let recording = &machine.recording;
        assert_eq!((recording.rows.len(), recording.ids()), (rows, ids));
        let mut kinds = [0u64; 41];
        recording.rows.iter().for_each(|row| kinds[usize::from(row.kind.number())] += 1);
        let told: Vec<u64> = recording.meta.counts["out_kinds"]
            .as_array()
            .unwrap()
            .iter()
            .map(|n| n.as_u64().unwrap())
            .collect();
        assert_eq!(kinds[..], told[..]);
        assert_eq!(recording.meta.cpus, 2);
        assert_eq!(recording.meta.lost, 0);
        assert_eq!(recording.phases().len() as u64, kinds[28]);
        let given = recording.rows.iter().filter(|row| row.kind.gives_id()).map(|row| row.id);
        assert!(given.eq((0..ids as u32).map(Some)));
    }
}

/// The container holds any first part of a real recording exactly.
#[test]
fn an_excerpt_survives_the_container() {
    for machine in [a(), b()] {
        let rows = machine.recording.rows[..20_000].to_vec();
        let excerpt = Recording { meta: machine.recording.meta.clone(), rows };
        let bytes = kmr::write(&excerpt, 1).unwrap();
        assert_eq!(kmr::read(&bytes, "excerpt").unwrap(), excerpt);
    }
}

/// Every page event is explained: nothing makes no sense, and each compaction move is found.
#[test]
fn every_page_event_makes_sense() {
    for (machine, prior, moves) in [(a(), 72, 0), (b(), 1521, 1684)] {
        let mut ops: BTreeMap<&str, u64> = BTreeMap::new();
        let mut live: HashSet<u32> = HashSet::new();
        for event in machine.recording.page_events() {
            let name = match event.op {
                PageOp::Alloc { id } => {
                    assert!(live.insert(id));
                    "alloc"
                }
                PageOp::Free { id } => {
                    assert!(live.remove(&id), "{event:?}");
                    "free"
                }
                PageOp::Migrate { from, to, .. } => {
                    from.inspect(|from| assert!(live.remove(from)));
                    assert!(live.insert(to));
                    if from.is_none() { "migrate prior" } else { "migrate" }
                }
                PageOp::FreePrior => "prior",
                PageOp::Compaction => "compaction",
                other => panic!("{other:?}"),
            };
            *ops.entry(name).or_default() += 1;
        }
        let count = |name| ops.get(name).copied().unwrap_or(0);
        assert_eq!(count("prior") + count("migrate prior"), prior);
        assert_eq!(count("migrate") + count("migrate prior"), moves);
        let blocks = machine.recording.meta.counts["live_at_end"]["page_blocks"].as_u64().unwrap();
        assert_eq!(live.len() as u64, blocks);
    }
}

#[test]
fn free_blocks_equal_buddyinfo() {
    for machine in [a(), b()] {
        let text = machine.recording.meta.file("buddyinfo.traced_start").unwrap();
        let buddyinfo = Buddyinfo::parse(text, "buddyinfo").unwrap();
        assert_eq!(buddyinfo.zones.len(), machine.start.zones.len());
        for zone in &machine.start.zones {
            assert_eq!(zone.free_by_order(), buddyinfo.zone(zone.node, &zone.name).unwrap().blocks);
        }
    }
}

/// No block's buddy is free entirely: a buddy allocator would have merged the two.
#[test]
fn free_blocks_are_maximal() {
    for machine in [a(), b()] {
        for zone in &machine.start.zones {
            let free: HashSet<u64> =
                zone.free.iter().flat_map(|b| b.pfn..b.pfn + (1 << b.order)).collect();
            assert_eq!(free.len() as u64, zone.free.iter().map(|b| 1u64 << b.order).sum::<u64>());
            for block in zone.free.iter().filter(|block| block.order < machine.start.max_order) {
                let buddy = block.pfn ^ (1 << block.order);
                assert!(
                    !(buddy..buddy + (1 << block.order)).all(|pfn| free.contains(&pfn)),
                    "{block:?}"
                );
            }
            assert!(zone.free.iter().all(|block| block.pfn % (1 << block.order) == 0));
        }
    }
}

fn parts(zone: &ZoneStart) -> HashMap<u64, &'static str> {
    let mut parts = HashMap::new();
    let mut add =
        |name, pfn| assert_eq!(parts.insert(pfn, name), None, "frame {pfn} is {name} too");
    zone.free.iter().flat_map(|b| b.pfn..b.pfn + (1 << b.order)).for_each(|pfn| add("free", pfn));
    zone.in_use
        .iter()
        .flat_map(|b| b.pfn..b.pfn + (1 << b.order))
        .for_each(|pfn| add("in use", pfn));
    zone.unaccounted.iter().for_each(|pfn| add("unaccounted", *pfn));
    zone.reserved.iter().cloned().flatten().for_each(|pfn| add("reserved", pfn));
    zone.held.iter().cloned().flatten().for_each(|pfn| add("held", pfn));
    parts
}

/// The parts of a zone are disjoint and cover what is present, and agree with the first event on every frame.
#[test]
fn frames_are_what_their_first_event_says() {
    for machine in [a(), b()] {
        let mut parts_of_all = HashMap::new();
        for zone in &machine.start.zones {
            let parts = parts(zone);
            let present: HashSet<u64> = zone.present.iter().cloned().flatten().collect();
            assert_eq!(parts.len(), present.len());
            assert!(parts.keys().all(|pfn| present.contains(pfn)));
            assert_eq!(count(&zone.reserved), present.len() as u64 - zone.managed);
            parts_of_all.extend(parts);
        }
        let mut seen = HashSet::new();
        for event in machine.recording.page_events() {
            for pfn in event.pfn..event.pfn + (1 << event.order) {
                if seen.insert(pfn) {
                    let expected: &[&str] = match event.op {
                        PageOp::FreePrior | PageOp::Migrate { .. } => &["in use"],
                        PageOp::Alloc { .. } | PageOp::Compaction => &["free", "unaccounted"],
                        other => panic!("{other:?}"),
                    };
                    assert!(
                        expected.contains(&parts_of_all[&pfn]),
                        "{event:?}: {}",
                        parts_of_all[&pfn]
                    );
                }
            }
        }
    }
}

#[test]
fn every_prior_free_has_its_block_in_use_once() {
    for machine in [a(), b()] {
        let prior = machine.recording.page_events().filter(|event| {
            matches!(event.op, PageOp::FreePrior | PageOp::Migrate { from: None, .. })
        });
        let mut prior: Vec<(u64, u8)> = prior.map(|event| (event.pfn, event.order)).collect();
        let in_use = machine.start.zones.iter().flat_map(|zone| &zone.in_use);
        let mut in_use: Vec<(u64, u8)> = in_use.map(|block| (block.pfn, block.order)).collect();
        prior.sort_unstable();
        in_use.sort_unstable();
        assert_eq!(prior, in_use);
        assert!(machine.start.strays.is_empty());
    }
}

#[test]
fn zones_have_the_recorded_size_and_watermarks() {
    for machine in [a(), b()] {
        let text = machine.recording.meta.file("zoneinfo.traced_start").unwrap();
        let zoneinfo = Zoneinfo::parse(text, "zoneinfo").unwrap();
        for zone in &machine.start.zones {
            let recorded = zoneinfo.zone(zone.node, &zone.name).unwrap();
            assert_eq!(count(&zone.present), recorded.present);
            assert_eq!(
                (zone.managed, zone.min, zone.low, zone.high),
                (recorded.managed, recorded.min, recorded.low, recorded.high)
            );
            let free: u64 = zone.free.iter().map(|block| 1u64 << block.order).sum();
            // The two texts were read one after the other, and the counter lags by up to a batch per CPU.
            assert!(free.abs_diff(recorded.free) < 128, "{free} {}", recorded.free);
        }
    }
}

#[test]
fn pageblock_types_number_what_pagetypeinfo_says() {
    for machine in [a(), b()] {
        let info = Pagetypeinfo::parse(
            machine.recording.meta.file("start/pagetypeinfo").unwrap(),
            "pagetypeinfo",
        )
        .unwrap();
        assert_eq!(machine.start.migratetypes, info.types);
        for zone in &machine.start.zones {
            let mut counts = vec![0; info.types.len()];
            zone.pageblock_types
                .iter()
                .for_each(|(_, migratetype)| counts[usize::from(*migratetype)] += 1);
            assert_eq!(counts, info.zone(zone.node, &zone.name).unwrap());
            for block in &zone.free {
                let pageblock = block.pfn >> 9 << 9;
                assert!(zone.pageblock_types.contains(&(pageblock, block.migratetype)));
            }
        }
    }
}

/// The kernel's image lies at 16 MiB on these machines. Linux gives a part of what `iomem` calls its bss to the page
/// allocator, as the events show; no other frame of it may be free.
#[test]
fn the_kernel_image_is_never_free() {
    for machine in [a(), b()] {
        let text = machine.recording.meta.file("start/iomem").unwrap();
        let kernel = kmem_trace::proc::Iomem::parse(text, "iomem").unwrap().kernel(12);
        assert_eq!(kernel.first().unwrap().start, 0x1000);
        let frames = |pfn: u64, order: u8| pfn..pfn + (1 << order);
        let touched: HashSet<u64> =
            machine.recording.page_events().flat_map(|e| frames(e.pfn, e.order)).collect();
        let free = machine.start.zones.iter().flat_map(|zone| &zone.free);
        for pfn in free
            .flat_map(|block| frames(block.pfn, block.order))
            .filter(|pfn| !touched.contains(pfn))
        {
            assert!(kernel.iter().all(|kernel| !kernel.contains(&pfn)), "{pfn:#x}");
        }
    }
}

#[test]
fn where_linux_ended() {
    let end = a().recording.linux_end().unwrap().unwrap();
    assert_eq!(end.total, [363, 446, 356, 230, 146, 87, 77, 39, 20, 9, 76]);
    let zoneinfo =
        Zoneinfo::parse(a().recording.meta.file("zoneinfo.traced_end").unwrap(), "zoneinfo")
            .unwrap();
    assert_eq!(end.pcp_frames(), zoneinfo.zones.iter().map(|zone| zone.pcp_count()).sum::<u64>());
    assert_eq!(end.free_frames(), end.zones.iter().map(|zone| zone.frames()).sum::<u64>());
}

#[test]
fn rows_of_slabs_are_marked() {
    for machine in [a(), b()] {
        let marked = machine.recording.page_events().filter(|event| event.belongs_to_slab_layer);
        let allocs = marked.filter(|event| matches!(event.op, PageOp::Alloc { .. })).count() as u64;
        assert_eq!(allocs, machine.recording.meta.counts["page_allocs_for_slab"].as_u64().unwrap());
        let slabs = machine
            .recording
            .rows
            .iter()
            .filter(|row| row.kind == Kind::PageAlloc && row.backs_slab);
        assert!(
            slabs.into_iter().all(|row| machine
                .recording
                .meta
                .caches
                .contains_key(&row.cache.unwrap()))
        );
    }
}

/// `slabinfo` before and after, and the page rows between that back slabs, tell the same.
#[test]
fn slabs_add_up() {
    for (machine, start, peak, end, last, freed) in
        [(a(), 2226, 5339, 2883, 2880, 154), (b(), 2220, 5006, 3002, 2998, 163)]
    {
        let recording = &machine.recording;
        let slab = recording.linux_slab().unwrap().unwrap();
        let frames = |of: fn(&LinuxCache) -> u64| slab.caches.iter().map(of).sum::<u64>();
        assert_eq!((slab.frames_start, frames(|c| c.start.frames)), (start, start));
        assert_eq!((slab.peak.unwrap().0, frames(|c| c.peak.frames)), (peak, peak));
        assert_eq!((slab.frames_end, frames(|c| c.end.frames)), (Some(end), end));
        assert_eq!(slab.frames_last_row, Some(last));
        assert!(slab.caches.iter().all(|c| c.name != "?"), "slabs without an object");
        // No cache has more in its slabs than fits, once those are left out that were free at the start.
        for cache in &slab.caches {
            let size = u64::from(cache.object_size);
            for held in [cache.start, cache.peak, cache.end] {
                let live = held.live - cache.shown_free;
                assert!(live * size <= held.frames << 12, "{cache:?}");
            }
            assert!(cache.shown_free <= cache.start.live, "{cache:?}");
        }
        let rows = recording.object_rows();
        let prior = rows.filter(|(_, row, _)| !row.kind.gives_id() && row.id.is_none()).count();
        assert_eq!(prior, freed);
    }
}
