//! What kmem did during a replay is recorded, and replays as it was done.

use super::{json, replay, shipped, synthetic};
use kmem_trace::{Kind, Recording};
use serde_json::Value;
use std::{collections::BTreeMap, path::Path};

/// Replays `recording` and records that in `folder`.
fn record(folder: &Path, recording: &str, name: &str, options: &[&str]) -> (Value, String) {
    let path = folder.join(name).into_os_string().into_string().unwrap();
    let args =
        [&[recording, "-q", "--json", "--no-report", "--record", &path[..]], options].concat();
    let ran = replay(folder, &args);
    assert!(ran.err.contains("recording: "), "{}", ran.err);
    (ran.json(), path)
}

/// How many rows of each kind a recording has.
fn kinds(recording: &Recording) -> BTreeMap<Kind, usize> {
    let mut kinds = BTreeMap::new();
    recording.rows.iter().for_each(|row| *kinds.entry(row.kind).or_default() += 1);
    kinds
}

/// What is to be the same in each generation.
fn counts(r: &Value) -> Vec<&Value> {
    let pages = ["allocs", "frees"].map(|key| &r[key]);
    let objects = ["events", "allocs", "frees", "prior_frees", "start_objects"];
    pages.into_iter().chain(objects.map(|key| &r["slab"][key])).collect()
}

fn nothing_odd(r: &Value) {
    for none in
        ["failures", "unmatched_frees", "missing_frees", "lost_events", "refused_frees", "skipped"]
    {
        assert_eq!(r[none], 0, "{none}");
    }
    for none in ["failures", "unmatched_frees", "refused_frees", "skipped"] {
        assert_eq!(r["slab"][none], 0, "slab's {none}");
    }
    assert_eq!(r["start"]["note"], Value::Null);
    assert_eq!(r["start"]["free_blocks"], r["linux_start"]["free_blocks"]);
}

/// A recording of a recording of a recording: everything is in it, and nothing that makes no sense.
#[test]
fn generations_have_the_same_events() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let (first, one) = record(folder, &shipped("linux-6.12-b.kmr"), "one.kmr", &[]);
    let (second, two) = record(folder, &one, "two.kmr", &[]);
    let third = json(&[&two, "-q"]);
    for r in [&first, &second, &third] {
        nothing_odd(r);
        assert_eq!(counts(r), counts(&first));
    }
    // What the recording says of its end is where the machine ended.
    assert_eq!(second["linux_end"]["free_blocks"], first["end"]["free_blocks"]);
    assert_eq!(second["linux_end"]["pcp_frames"], first["end"]["pcp_frames"]);
    let [one, two] = [one, two].map(|path| Recording::open(path).unwrap());
    assert_eq!(kinds(&one), kinds(&two));
    let ended = |kind| kinds(&one)[&kind];
    assert_eq!(ended(Kind::PageAlloc) as u64, first["allocs"].as_u64().unwrap());
    assert_eq!(ended(Kind::PageFree) as u64, first["frees"].as_u64().unwrap());
    assert_eq!((one.meta.source.as_str(), one.meta.name.as_str()), ("kmem", "one"));
    assert!(
        one.meta.sites.iter().any(|site| site.contains("objects/run.rs:")),
        "{:?}",
        one.meta.sites
    );
    for text in ["buddyinfo", "zoneinfo", "pagetypeinfo", "iomem", "slabinfo"] {
        assert!(
            ["start", "end"].iter().all(|at| one.meta.file(&format!("{at}/{text}")).is_some()),
            "{text}"
        );
    }
    // Caches are told with the shapes that they have.
    let original = Recording::open(shipped("linux-6.12-b.kmr")).unwrap();
    let size = |name: &str| {
        let shape = original.meta.caches.values().find(|shape| shape.name == name);
        shape.map(|shape| shape.object_size)
    };
    let caches = one.meta.caches.values().map(|own| (&own.name, own.object_size, size(&own.name)));
    let known: Vec<_> = caches.filter(|(.., theirs)| theirs.is_some()).collect();
    assert!(
        known.len() > 50 && known.iter().all(|(_, own, theirs)| Some(*own) == *theirs),
        "{known:?}"
    );
}

/// The recorded order on one thread: the same machine in the same state does the same.
#[test]
fn a_replay_in_order_records_the_same_each_time() {
    let folder = tempfile::tempdir().unwrap();
    let options = ["--single-thread", "--pages-only"];
    let rows = |name| {
        let (_, path) = record(folder.path(), &shipped("linux-6.12-b.kmr"), name, &options);
        let rows = Recording::open(path).unwrap().rows;
        rows.into_iter()
            .map(|row| (row.kind, row.address, row.id, row.gfp, row.order))
            .collect::<Vec<_>>()
    };
    assert!(rows("x.kmr") == rows("y.kmr"));
}

/// Without a start state, and on a machine of the user's: the recording has one all the same.
#[test]
fn what_had_no_start_state_gets_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("small.kmr");
    synthetic::small("small", 30).write(&path).unwrap();
    let small = path.to_str().unwrap();
    let (first, own) = record(folder.path(), small, "own.kmr", &["--memory", "64M"]);
    assert!(first["start"]["note"].is_string() && first["slab"].is_null());
    let again = json(&[&own, "-q"]);
    assert_eq!((&again["allocs"], &again["frees"]), (&first["allocs"], &first["frees"]));
    assert_eq!((&again["unmatched_frees"], &again["start"]["note"]), (&0.into(), &Value::Null));
    assert_eq!(again["managed_frames"], first["managed_frames"]);
    assert_eq!(again["linux_end"]["free_blocks"], first["end"]["free_blocks"]);
}

#[test]
fn places_that_cannot_be_written_to_are_told_first() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("small.kmr");
    synthetic::small("small", 30).write(&path).unwrap();
    let before = std::fs::read(&path).unwrap();
    let small = path.to_str().unwrap();
    for (to, why) in [
        ("nowhere/x.kmr", "nowhere is no folder"),
        (".", "this is a folder"),
        (small, "this is the one that is replayed"),
    ] {
        let ran = replay(folder.path(), &[small, "-q", "--no-report", "--record", to]);
        assert_eq!((ran.code, ran.out.as_str()), (1, ""));
        assert!(
            ran.err.contains("cannot write the recording") && ran.err.contains(why),
            "{}",
            ran.err
        );
    }
    assert_eq!(std::fs::read(&path).unwrap(), before);
}
