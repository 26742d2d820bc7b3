//! Machines unlike those of the shipped recordings: other zones, nodes, orders.

use super::{
    replay,
    synthetic::{Maker, Zone, free_blocks},
};
use serde_json::{Value, json};

/// Replays what four CPUs do to `zones`, whose first frames are in use.
fn run(zones: &[Zone], max_order: u8) -> Value {
    let mut maker = Maker::new("shape");
    maker.texts(zones, max_order, 4);
    let mut live = Vec::new();
    let (mut small, mut large) = (vec![0; zones.len()], vec![0; zones.len()]);
    for i in 0..200u64 {
        let at = i as usize % zones.len();
        let zone = zones[at];
        // Small blocks from the bottom, huge pages from the top.
        let block = if i % 50 == 0 {
            large[at] += 1;
            (zone.end - large[at] * 512, 9)
        } else {
            small[at] += 1;
            (zone.first + zone.used * 512 + small[at] * 16, (i % 5) as u8)
        };
        live.push((block, maker.alloc(i, (i % 4) as u16, block)));
        if i % 2 == 0 {
            let (block, id) = live.swap_remove(live.len() / 2);
            maker.free(i, (i % 3) as u16, block, Some(id));
        }
    }
    for zone in zones.iter().filter(|z| z.used > 1) {
        maker.free(500, 3, (zone.first, 9), None);
    }
    for (block, id) in live {
        maker.free(600, 1, block, Some(id));
    }
    let folder = tempfile::tempdir().unwrap();
    maker.done().write(folder.path().join("shape.kmr")).unwrap();
    let r = replay(folder.path(), &["shape.kmr", "-q", "--json"]).json();
    assert_eq!((&r["failures"], &r["unmatched_frees"]), (&0.into(), &0.into()));
    assert_eq!((&r["refused_frees"], &r["skipped"]), (&0.into(), &0.into()));
    assert_eq!((&r["threads"], &r["cpus"]), (&4.into(), &4.into()));
    let mut want = vec![0; usize::from(max_order) + 1];
    for zone in zones {
        want.iter_mut().zip(free_blocks(*zone, max_order)).for_each(|(w, n)| *w += n);
    }
    assert_eq!(r["start"]["free_blocks"], json!(want));
    assert_eq!(r["linux_start"]["free_blocks"], json!(want));
    // All that was allocated was freed again, and so was what some zones had in use.
    let freed: u64 = zones.iter().filter(|z| z.used > 1).map(|_| 512).sum();
    let start: u64 = want.iter().enumerate().map(|(order, n)| n << order).sum();
    let end = &r["end"];
    assert_eq!(
        end["free_frames"].as_u64().unwrap() + end["pcp_frames"].as_u64().unwrap(),
        start + freed
    );
    r
}

#[test]
fn two_nodes_with_memory_above_four_gigabytes() {
    let zones = [
        Zone { node: 0, name: "DMA", first: 0x400, end: 0x1000, used: 0 },
        Zone { node: 0, name: "DMA32", first: 0x1000, end: 0x4000, used: 2 },
        Zone { node: 0, name: "Normal", first: 0x10_0000, end: 0x10_4000, used: 1 },
        Zone { node: 1, name: "Normal", first: 0x20_0000, end: 0x20_4000, used: 3 },
    ];
    let r = run(&zones, 10);
    let have: Vec<(u64, &str, u64)> = r["zones"]
        .as_array()
        .unwrap()
        .iter()
        .map(|z| {
            let number = |key: &str| z[key].as_u64().unwrap();
            (number("node"), z["name"].as_str().unwrap(), number("managed_frames"))
        })
        .collect();
    assert_eq!(
        have,
        [(0, "DMA", 0xc00), (0, "DMA32", 0x3000), (0, "Normal", 0x4000), (1, "Normal", 0x4000)]
    );
    assert!(r["zones"].as_array().unwrap().iter().all(|z| z["min"] == 16 && z["low"] == 20));
}

#[test]
fn x86_32_with_high_memory() {
    run(
        &[
            Zone { node: 0, name: "DMA", first: 0x400, end: 0x1000, used: 0 },
            Zone { node: 0, name: "Normal", first: 0x1000, end: 0x3_8000, used: 2 },
            Zone { node: 0, name: "HighMem", first: 0x3_8000, end: 0x4_0000, used: 0 },
        ],
        10,
    );
}

#[test]
fn larger_and_smaller_largest_orders() {
    for max_order in [9, 11, 12] {
        run(&[Zone { node: 0, name: "DMA32", first: 0x1000, end: 0x9000, used: 2 }], max_order);
    }
}

/// Who waits for a block holds nobody back: what gives it one may be further on in the recording than threads
/// otherwise come apart.
#[test]
fn a_block_that_comes_free_later_is_waited_for() {
    const PAIRS: u64 = 100;
    let folder = tempfile::tempdir().unwrap();
    let run = |maker: Maker| {
        maker.done().write(folder.path().join("late.kmr")).unwrap();
        let args = ["late.kmr", "-q", "--json", "--no-report", "--pages-only", "--memory", "64M"];
        let r = replay(folder.path(), &args).json();
        assert_eq!(r["failures"], 0);
        r
    };
    let block = |i: u64| (0x10_0000 + i * 1024, 10);
    let mut empty = Maker::new("late");
    empty.alloc(0, 0, block(0));
    let largest = run(empty)["start"]["free_blocks"][10].as_u64().unwrap();

    // CPU 0 wants a block of the largest order more than there are; CPU 1 frees one, but only after much else.
    let before = largest.checked_sub(8).filter(|n| *n > 0).unwrap();
    let mut maker = Maker::new("late");
    // Breaks one of them.
    maker.alloc(0, 0, (block(largest).0, 0));
    (before..largest).for_each(|i| _ = maker.alloc(0, 0, block(i)));
    for _ in 0..PAIRS {
        let frame = (block(largest + 1).0, 0);
        let id = maker.alloc(1, 1, frame);
        maker.free(1, 1, frame, Some(id));
    }
    (0..before).for_each(|i| maker.free(2, 1, block(i), None));
    let r = run(maker);
    assert_eq!((&r["start"]["free_blocks"][10], &r["allocs"]), (&8.into(), &(9 + PAIRS).into()));
    assert!(r["below_watermark"].as_u64() > Some(0), "nothing had to wait: {r}");
}

/// Zones that no machine here has are named.
#[test]
fn an_unknown_zone_is_refused() {
    let mut maker = Maker::new("shape");
    let zone = Zone { node: 0, name: "Hyper", first: 0x1000, end: 0x2000, used: 0 };
    maker.texts(&[zone], 10, 1);
    maker.alloc(0, 0, (0x1000, 0));
    let folder = tempfile::tempdir().unwrap();
    maker.done().write(folder.path().join("shape.kmr")).unwrap();
    let ran = replay(folder.path(), &["shape.kmr", "-q"]);
    assert_eq!((ran.code, &ran.out[..]), (1, ""));
    assert!(ran.err.contains("Hyper"), "{}", ran.err);
}
