//! Start states of small machines made up at random: whatever they look like, what the texts count is met exactly, and
//! no frame is what its first event says it was not.

use std::collections::{BTreeMap, HashSet};
use std::fmt::Write;

use kmem_trace::{Kind, Meta, NO_STACK, Recording, Row, StartState};
use proptest::prelude::*;

const ORDERS: u8 = 7;
const PAGEBLOCK_ORDER: u8 = 5;
/// Zones by name, first pfn and one past the last. Blocks of the largest order fit between them.
const ZONES: [(&str, u64, u64); 2] = [("DMA", 1, 256), ("Normal", 256, 1024)];
const KERNEL: std::ops::Range<u64> = 300..340;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Frame {
    Hole,
    Free,
    Used,
}

#[derive(Debug)]
struct Machine {
    frames: Vec<Frame>,
    /// Whether an event touches the block or frame there first.
    touched: Vec<bool>,
    types: Vec<u8>,
}

/// A machine whose frames come in runs of one state.
fn machine() -> impl Strategy<Value = Machine> {
    let state = prop_oneof![1 => Just(Frame::Hole), 6 => Just(Frame::Free), 3 => Just(Frame::Used)];
    let runs = prop::collection::vec((state, 1..90usize), 60);
    let touched = prop::collection::vec(any::<bool>(), 1024);
    let types = prop::collection::vec(0..3u8, 32);
    (runs, touched, types).prop_map(|(runs, touched, types)| {
        let mut frames: Vec<Frame> =
            runs.into_iter().flat_map(|(state, length)| vec![state; length]).collect();
        frames.resize(1024, Frame::Used);
        frames[0] = Frame::Hole;
        for pfn in KERNEL {
            frames[pfn as usize] = Frame::Used;
        }
        Machine { frames, touched, types }
    })
}

impl Machine {
    /// The free blocks a buddy allocator would have.
    fn free_blocks(&self) -> Vec<(u64, u8)> {
        let mut blocks = Vec::new();
        let mut pfn = 0u64;
        while pfn < 1024 {
            let fits = |order: &u8| {
                let size = 1u64 << order;
                pfn.is_multiple_of(size)
                    && (pfn..pfn + size)
                        .all(|pfn| self.frames.get(pfn as usize) == Some(&Frame::Free))
            };
            match (0..ORDERS).rev().find(fits) {
                Some(order) => {
                    blocks.push((pfn, order));
                    pfn += 1 << order;
                }
                None => pfn += 1,
            }
        }
        blocks
    }

    fn count(&self, zone: (&str, u64, u64), state: impl Fn(Frame) -> bool) -> u64 {
        (zone.1..zone.2).filter(|pfn| state(self.frames[*pfn as usize])).count() as u64
    }

    /// Events: some free frames are allocated, some used ones outside the kernel freed.
    fn rows(&self) -> Vec<Row> {
        let mut rows: Vec<Row> = Vec::new();
        let mut ids = 0;
        for pfn in (0..1024u64).filter(|pfn| self.touched[*pfn as usize]) {
            let (kind, id) = match self.frames[pfn as usize] {
                Frame::Free => (Kind::PageAlloc, Some(ids)),
                Frame::Used if !KERNEL.contains(&pfn) && pfn % 3 == 0 => (Kind::PageFree, None),
                _ => continue,
            };
            ids += u32::from(id.is_some());
            rows.push(Row {
                time_ns: pfn,
                address: pfn,
                id,
                bytes_requested: NO_STACK,
                bytes_allocated: 4096,
                gfp: 0xcc0,
                site: 0,
                cache: None,
                cpu: 0,
                kind,
                order: 0,
                migratetype: self.types[pfn as usize >> PAGEBLOCK_ORDER],
                backs_slab: false,
                backs_large_kmalloc: false,
            });
        }
        rows
    }

    fn recording(&self) -> Recording {
        let mut buddyinfo = String::new();
        let mut zoneinfo = String::new();
        let mut iomem = String::new();
        let size = 1 << PAGEBLOCK_ORDER;
        let mut pagetypeinfo = format!(
            "Page block order: {PAGEBLOCK_ORDER}\nPages per block: {size}\n\nNumber of blocks type Unmovable Movable Reclaimable\n"
        );
        for zone @ (name, first, end) in ZONES {
            if self.count(zone, |state| state != Frame::Hole) == 0 {
                continue;
            }
            let mut counts = [0; ORDERS as usize];
            let blocks = self.free_blocks();
            blocks
                .iter()
                .filter(|(pfn, _)| (first..end).contains(pfn))
                .for_each(|(_, order)| counts[usize::from(*order)] += 1);
            let counts: Vec<String> = counts.iter().map(u64::to_string).collect();
            writeln!(buddyinfo, "Node 0, zone {name:>8} {}", counts.join(" ")).unwrap();
            let present = self.count(zone, |state| state != Frame::Hole);
            writeln!(zoneinfo, "Node 0, zone {name:>8}\n  pages free 0\n        min 1").unwrap();
            writeln!(zoneinfo, "        spanned {}\n        present {present}", end - first)
                .unwrap();
            writeln!(zoneinfo, "        managed {}\n  start_pfn: {first}", self.managed(zone))
                .unwrap();
            let mut types = [0; 3];
            for pageblock in (first / size * size..end).step_by(size as usize) {
                let inside = pageblock.max(first)..(pageblock + size).min(end);
                if inside.clone().any(|pfn| self.frames[pfn as usize] != Frame::Hole) {
                    types[usize::from(self.types[(pageblock / size) as usize])] += 1;
                }
            }
            writeln!(pagetypeinfo, "Node 0, zone {name:>8} {} {} {}", types[0], types[1], types[2])
                .unwrap();
        }
        for pfn in (0..1024u64).filter(|pfn| self.frames[*pfn as usize] != Frame::Hole) {
            writeln!(iomem, "{:08x}-{:08x} : System RAM", pfn << 12, (pfn << 12) + 0xfff).unwrap();
        }
        writeln!(
            iomem,
            "  {:08x}-{:08x} : Kernel code",
            KERNEL.start << 12,
            (KERNEL.end << 12) - 1
        )
        .unwrap();
        let mut meta = Meta::new("synthetic", "text");
        let files = [
            ("buddyinfo", buddyinfo),
            ("zoneinfo", zoneinfo),
            ("iomem", iomem),
            ("pagetypeinfo", pagetypeinfo),
        ];
        meta.files = files.map(|(name, text)| (format!("start/{name}"), text)).into();
        Recording { meta, rows: self.rows() }
    }

    /// Frames of a zone the allocator was given: all but half of those used and never freed.
    fn managed(&self, zone: (&str, u64, u64)) -> u64 {
        let freed = self
            .rows()
            .iter()
            .filter(|row| row.id.is_none() && (zone.1..zone.2).contains(&row.address))
            .count();
        let used = self.count(zone, |state| state == Frame::Used) - freed as u64;
        self.count(zone, |state| state != Frame::Hole) - used / 2
    }
}

proptest! {
    #[test]
    fn the_texts_are_met_and_no_event_contradicted(machine in machine()) {
        let recording = machine.recording();
        prop_assume!(!recording.meta.files["start/buddyinfo"].is_empty());
        let start = StartState::build(&recording).unwrap();
        let mut wanted = BTreeMap::new();
        machine.free_blocks().into_iter().for_each(|(_, order)| *wanted.entry(order).or_insert(0) += 1);
        let mut have = BTreeMap::new();
        let mut free = HashSet::new();
        let mut held = HashSet::new();
        let mut in_use = Vec::new();
        for zone in &start.zones {
            for block in &zone.free {
                *have.entry(block.order).or_insert(0) += 1;
                prop_assert_eq!(block.pfn % (1 << block.order), 0);
                prop_assert!(block.pfn >= zone.start_pfn && block.pfn + (1 << block.order) <= zone.start_pfn + zone.spanned);
                free.extend(block.pfn..block.pfn + (1 << block.order));
            }
            held.extend(zone.held.iter().chain(&zone.reserved).cloned().flatten());
            in_use.extend(zone.in_use.iter().map(|block| block.pfn));
            let reserved: u64 = zone.reserved.iter().map(|range| range.end - range.start).sum();
            let present: u64 = zone.present.iter().map(|range| range.end - range.start).sum();
            prop_assert!(reserved <= present - zone.managed);
            let all: u64 = zone.free.iter().map(|block| 1u64 << block.order).sum::<u64>()
                + zone.in_use.len() as u64
                + zone.unaccounted.len() as u64
                + reserved
                + zone.held.iter().map(|range| range.end - range.start).sum::<u64>();
            prop_assert_eq!(all, present);
            prop_assert!(zone.unaccounted.iter().all(|pfn| machine.frames[*pfn as usize] == Frame::Free));
        }
        prop_assert_eq!(wanted, have);
        for zone in &start.zones {
            for block in zone.free.iter().filter(|block| block.order < ORDERS - 1) {
                let buddy = block.pfn ^ (1 << block.order);
                prop_assert!(!(buddy..buddy + (1 << block.order)).all(|pfn| free.contains(&pfn)));
            }
        }
        let freed: Vec<u64> = recording.rows.iter().filter(|row| row.id.is_none()).map(|row| row.address).collect();
        in_use.sort_unstable();
        prop_assert_eq!(&freed, &in_use);
        prop_assert!(freed.iter().all(|pfn| !free.contains(pfn)));
        prop_assert!(KERNEL.clone().all(|pfn| held.contains(&pfn)));
        for row in recording.rows.iter().filter(|row| row.id.is_some()) {
            prop_assert!(!held.contains(&row.address));
        }
    }

    #[test]
    fn pageblocks_number_what_the_text_says(machine in machine()) {
        let recording = machine.recording();
        prop_assume!(!recording.meta.files["start/buddyinfo"].is_empty());
        let start = StartState::build(&recording).unwrap();
        let text = kmem_trace::proc::Pagetypeinfo::parse(&recording.meta.files["start/pagetypeinfo"], "pagetypeinfo").unwrap();
        for zone in &start.zones {
            let mut counts = [0; 3];
            zone.pageblock_types.iter().for_each(|(_, migratetype)| counts[usize::from(*migratetype)] += 1);
            prop_assert_eq!(&counts[..], text.zone(0, &zone.name).unwrap());
        }
    }
}

#[test]
fn an_impossible_count_names_zone_and_order() {
    let machine =
        Machine { frames: vec![Frame::Used; 1024], touched: vec![true; 1024], types: vec![1; 32] };
    let mut recording = machine.recording();
    let text = recording.meta.files["start/buddyinfo"].replacen("Normal 0 0", "Normal 0 9999", 1);
    recording.meta.files.insert("start/buddyinfo".into(), text);
    let error = StartState::build(&recording).unwrap_err();
    assert_eq!(error.file, "start/buddyinfo");
    assert!(
        error.what.starts_with("zone Normal of node 0: 9999 free blocks of order 1 are recorded"),
        "{error}"
    );
}

#[test]
fn a_missing_text_is_named() {
    let machine =
        Machine { frames: vec![Frame::Used; 1024], touched: vec![false; 1024], types: vec![1; 32] };
    for name in ["buddyinfo", "zoneinfo", "pagetypeinfo", "iomem"] {
        let mut recording = machine.recording();
        recording.meta.files.remove(&format!("start/{name}"));
        let error = StartState::build(&recording).unwrap_err();
        assert!(error.what.contains(&format!("no {name} of its start")), "{error}");
    }
}

#[test]
fn a_zone_beyond_all_memory_is_refused() {
    let machine =
        Machine { frames: vec![Frame::Used; 1024], touched: vec![false; 1024], types: vec![1; 32] };
    for (from, to) in [
        ("start_pfn: 256", "start_pfn: 18446744073709551610"),
        ("spanned 768", "spanned 99999999999"),
    ] {
        let mut recording = machine.recording();
        let text = recording.meta.files["start/zoneinfo"].replace(from, to);
        assert!(text.contains(to));
        recording.meta.files.insert("start/zoneinfo".into(), text);
        let error = StartState::build(&recording).unwrap_err();
        assert!(error.what.starts_with("zone Normal spans"), "{error}");
    }
}
