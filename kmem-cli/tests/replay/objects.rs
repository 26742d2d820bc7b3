//! The objects of a recording replay on a slab layer of their own, beside Linux's.

use super::{json, replay, sample, shipped, synthetic::small};
use kmem_trace::{CacheShape, Kind, Recording, Row};
use serde_json::Value;

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no number"))
}

/// Everything is replayed; pages and waste of the caches sum up; Linux's numbers are the recording's.
fn check(name: &str, [events, allocs, prior]: [u64; 3], [start, peak, end]: [u64; 3]) {
    let path = shipped(name);
    let r = json(&[&path, "-q"]);
    let (slab, linux) = (&r["slab"], &r["linux_slab"]);
    assert_eq!((number(&slab["events"]), number(&slab["allocs"])), (events, allocs));
    assert_eq!((number(&slab["frees"]), number(&slab["prior_frees"])), (events - allocs, prior));
    for none in ["failures", "refused_frees", "skipped", "unmatched_frees", "by_kmalloc"] {
        assert_eq!(slab[none], 0, "{none}");
    }
    assert_eq!((&linux["pages_start"], &linux["pages_peak"]), (&start.into(), &peak.into()));
    assert_eq!(linux["pages_end"], end);
    let caches = |of: &Value| of["caches"].as_array().unwrap().clone();
    let sum = |of: &Value, when: &str, what: &str| -> u64 {
        caches(of).iter().map(|c| number(&c[when][what])).sum()
    };
    for when in ["peak", "end"] {
        // In no slab, and so no cache's: tables, and the states of objects of a KiB and more.
        let states = number(&slab[format!("pages_states_{when}")]);
        assert!(states > 0);
        let tables = number(&slab["pages_tables"]) + states;
        let (pages, waste) = (format!("pages_{when}"), format!("waste_bytes_{when}"));
        assert_eq!(number(&slab[&pages]), sum(slab, when, "pages") + tables);
        assert_eq!(number(&slab[&waste]), sum(slab, when, "waste_bytes") + tables * 4096);
        assert_eq!(number(&linux[&pages]), sum(linux, when, "pages"));
        assert_eq!(number(&linux[&waste]), sum(linux, when, "waste_bytes"));
    }
    assert!(number(&slab["pages_start"]) <= number(&slab["pages_peak"]));
    assert!(number(&slab["pages_end"]) <= number(&slab["pages_peak"]));
    assert_eq!(sum(slab, "end", "live"), number(&slab["start_objects"]) + 2 * allocs - events);
    // At the end, both sides have the same objects in each cache.
    let theirs = caches(linux);
    for cache in caches(slab).iter().filter(|c| c["internal"] == false) {
        let Some(other) = theirs.iter().find(|c| c["name"] == cache["name"]) else { continue };
        assert_eq!(cache["end"]["live"], other["end"]["live"], "{}", cache["name"]);
        assert_eq!(cache["object_size"], other["object_size"], "{}", cache["name"]);
    }
    // Kept back are only magazines, and descriptors and magazines of kmalloc, which stays.
    assert!(
        number(&slab["pages_left"]) <= number(&slab["pages_end_own"]),
        "{}",
        slab["pages_left"]
    );
    let known = &slab["known_free"];
    assert!(number(&known["start"]) < number(&slab["pages_start"]));
    assert!(number(&known["peak"]) < number(&slab["pages_peak"]));
}

#[test]
fn a() {
    check("linux-6.12-a.kmr", [1_278_309, 640_030, 154], [2226, 5339, 2883]);
}

#[test]
fn b() {
    check("linux-6.12-b.kmr", [1_249_083, 625_288, 163], [2220, 5006, 3002]);
}

/// One thread in the recorded order comes to the same each time, however the pages were replayed.
#[test]
fn objects_repeat() {
    let path = shipped("linux-6.12-b.kmr");
    let held = |options: &[&str]| {
        let r = json(&[&[&path[..], "-q"], options].concat());
        (r["slab"]["pages_peak"].clone(), r["slab"]["caches"].clone())
    };
    assert_eq!(held(&[]), held(&["--single-thread"]));
}

#[test]
fn pages_only_leaves_them_out() {
    let path = shipped("linux-6.12-a.kmr");
    let r = json(&[&path, "-q", "--pages-only"]);
    assert!(r["slab"].is_null() && r["linux_slab"].is_null());
    assert_eq!(r["failures"], 0);
}

#[test]
fn text_has_a_table() {
    let folder = tempfile::tempdir().unwrap();
    let ran = replay(folder.path(), &[&shipped("linux-6.12-a.kmr"), "-q"]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    let lines: Vec<String> = ran.out.lines().map(words).collect();
    let has =
        |start: &str, end: &str| lines.iter().any(|l| l.starts_with(start) && l.ends_with(end));
    for (start, end) in [
        ("objects 1278309 events (640030 allocations, 638279 frees)", " s)"),
        ("failures 0 (0 frees refused", ""),
        ("start ", " 2226"),
        ("peak ", " 5339"),
        ("end ", " 2883"),
        ("buffer_head 51453 ", ""),
    ] {
        assert!(has(start, end), "{start:?} is not in\n{}", ran.out);
    }
    let page = std::fs::read_to_string(folder.path().join("kmem-replay.html")).unwrap();
    assert!(page.contains("<h2>Objects, kmem beside Linux</h2>"));
    assert!(page.contains("<td>ext4_inode_cache</td>"));
}

/// A recording without objects tells so; texts of kmalloc name no caches and replay all the same.
#[test]
fn without_slabinfo() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("small.kmr");
    small("small", 30).write(&path).unwrap();
    let r = json(&[path.to_str().unwrap(), "-q"]);
    assert!(r["slab"].is_null() && r["linux_slab"].is_null());

    let r = json(&[&sample("perf.txt"), "-q"]);
    let slab = &r["slab"];
    assert!(number(&slab["events"]) > 0 && r["linux_slab"].is_null());
    assert_eq!((&slab["failures"], &slab["refused_frees"]), (&0.into(), &0.into()));
    let cache = slab["caches"].as_array().unwrap().iter().find(|c| c["name"] == "kmalloc-32");
    assert_eq!(cache.unwrap()["object_size"], 32);
}

/// A recording with some events on objects of one cache.
fn with_cache(name: &str, size: u32, prior: u32) -> Recording {
    let mut recording = small("small", 30);
    let first = recording.ids() as u32;
    recording.meta.caches.insert(
        3,
        CacheShape {
            name: name.to_owned(),
            object_size: size,
            size,
            align: 8,
            flags: 0,
            constructor: true,
            objects_per_slab: 0,
            order: 0,
        },
    );
    let row = |kind, at: u32, id| Row {
        time_ns: 30_000_000,
        address: 0xffff_8880_0100_0000 + u64::from(at) * 0x4000,
        id,
        bytes_requested: size,
        bytes_allocated: size,
        gfp: 0xcc0,
        site: 0,
        cache: Some(3),
        cpu: (at % 2) as u16,
        kind,
        order: 0,
        migratetype: 0,
        backs_slab: false,
        backs_large_kmalloc: false,
    };
    for i in 0..100 {
        recording.rows.push(row(Kind::CacheAlloc, 1000 + i, Some(first + i)));
    }
    for i in 0..50 {
        recording.rows.push(row(Kind::CacheFree, 1000 + i, Some(first + i)));
    }
    (0..prior).for_each(|i| recording.rows.push(row(Kind::CacheFree, i, None)));
    recording
}

fn slab_of(recording: &Recording) -> Value {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.kmr");
    recording.write(&path).unwrap();
    json(&[path.to_str().unwrap(), "-q"])
}

/// Objects from before are there to be freed, with `slabinfo` and without.
#[test]
fn objects_from_before() {
    let mut recording = with_cache("some", 200, 30);
    for (active, objects) in [(None, 30), (Some(10), 30), (Some(70), 70)] {
        if let Some(active) = active {
            let text = format!(
                "slabinfo - version: 2.1\n# name\n\
                 some {active} 80 200 20 1 : tunables 0 0 0 : slabdata 4 4 0\n\
                 kmalloc-cg-1k 3 16 1024 16 4 : tunables 0 0 0 : slabdata 1 1 0\n"
            );
            recording.meta.files.insert("start/slabinfo".to_owned(), text);
        }
        let r = slab_of(&recording);
        let (slab, linux) = (&r["slab"], &r["linux_slab"]);
        let kmalloc = if active.is_some() { 3 } else { 0 };
        assert_eq!(slab["start_objects"], objects + kmalloc);
        assert_eq!((&slab["allocs"], &slab["frees"]), (&100.into(), &80.into()));
        let caches = slab["caches"].as_array().unwrap();
        let some = caches.iter().find(|c| c["name"] == "some").unwrap();
        assert_eq!(
            (&some["object_size"], &some["end"]["live"]),
            (&200.into(), &(objects + 20).into())
        );
        if active.is_some() {
            let k = caches.iter().find(|c| c["name"] == "kmalloc-1k").unwrap();
            assert_eq!(k["end"]["live"], 3);
            assert_eq!(linux["pages_start"], 8);
            assert!(linux["pages_peak"].is_null() && linux["pages_end"].is_null());
        } else {
            assert!(linux.is_null());
        }
    }
}

/// kmalloc stands in for caches that kmem refuses.
#[test]
fn caches_that_cannot_be() {
    for (name, size) in
        [("two words", 64), ("a_name_that_is_longer_than_31_bytes_allow", 64), ("big", 9000)]
    {
        let r = slab_of(&with_cache(name, size, 2));
        let slab = &r["slab"];
        assert_eq!((&slab["by_kmalloc"], &slab["allocs"]), (&1.into(), &100.into()), "{name}");
        assert_eq!((&slab["failures"], &slab["refused_frees"]), (&0.into(), &0.into()), "{name}");
    }
}

/// A `slabinfo` that cannot be read is an error that names it and the line.
#[test]
fn slabinfo_that_cannot_be_read() {
    let folder = tempfile::tempdir().unwrap();
    let mut recording = with_cache("some", 200, 0);
    let text = "slabinfo - version: 2.1\n# name\nsome 1 2 3\n".to_owned();
    recording.meta.files.insert("start/slabinfo".to_owned(), text);
    recording.write(folder.path().join("x.kmr")).unwrap();
    let ran = replay(folder.path(), &["x.kmr", "-q", "--no-report"]);
    assert_eq!((ran.code, &ran.out[..]), (1, ""), "{}", ran.err);
    assert!(ran.err.contains("start/slabinfo: line 3"), "{}", ran.err);
}
