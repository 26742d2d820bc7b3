//! Every form of recording replays: the project's own, the recorder's, and the texts of perf and ftrace.

use super::{
    json, replay, sample,
    synthetic::{Zone, small, texts},
};
use kmem_trace::Recording;
use std::{fs, path::Path};

#[test]
fn perf_script() {
    let r = json(&[&sample("perf.txt"), "-q"]);
    // Two allocations freed, one kept, and a block from before the recording.
    assert_eq!((&r["events"], &r["allocs"], &r["frees"]), (&6.into(), &3.into(), &3.into()));
    assert_eq!((&r["failures"], &r["unmatched_frees"]), (&0.into(), &0.into()));
    assert_eq!((&r["threads"], &r["cpus"]), (&2.into(), &2.into()));
    assert!(r["linux_end"].is_null() && r["linux_start"].is_null());
    assert!(r["start"]["note"].as_str().unwrap().contains("no buddyinfo"));
    let passed = "mm_page_free_batched of a frame mm_page_free has freed";
    assert_eq!(r["skipped_lines"][passed], 1);
}

/// Lost events are told; what they make senseless is counted; parts of blocks are freed.
#[test]
fn ftrace_with_lost_events() {
    let r = json(&[&sample("ftrace.txt"), "-q", "--memory", "64M"]);
    assert_eq!((&r["lost_events"], &r["cpus"]), (&35.into(), &4.into()));
    assert_eq!((&r["unmatched_frees"], &r["missing_frees"]), (&1.into(), &1.into()));
    // Three allocations; frees of frames 0x80, 0x82 and of the block whose free was lost.
    assert_eq!((&r["allocs"], &r["frees"]), (&3.into(), &3.into()));
    assert_eq!((&r["failures"], &r["refused_frees"]), (&0.into(), &0.into()));
    assert_eq!(r["skipped_lines"]["mm_page_pcpu_drain"], 1);
    let why: Vec<&str> =
        r["odd_events"].as_array().unwrap().iter().map(|o| o["why"].as_str().unwrap()).collect();
    assert_eq!(why, ["frees a block that is not live", "the block's free is missing"]);

    let folder = tempfile::tempdir().unwrap();
    let ran = replay(folder.path(), &[&sample("ftrace.txt"), "-q"]);
    assert!(ran.out.contains("lost events     35"), "{}", ran.out);
    let page = fs::read_to_string(folder.path().join("kmem-replay.html")).unwrap();
    assert!(page.contains("lost 35 events"));
}

/// A text with the machine's texts beside it starts where the machine did. Frees at frames that the machine
/// does not have make no sense, and nothing waits for them.
#[test]
fn text_with_its_start_state() {
    let folder = tempfile::tempdir().unwrap();
    let zone = Zone { node: 0, name: "DMA32", first: 0x1000, end: 0x4000, used: 1 };
    fs::create_dir_all(folder.path().join("mine/start")).unwrap();
    for (name, text) in texts(&[zone], 10, 2) {
        fs::write(folder.path().join("mine/start").join(name), text).unwrap();
    }
    let event = |cpu: u32, name: &str, pfn: u64, rest: &str| {
        format!("sh 1 [{cpu:03}] 5.{pfn:06}: kmem:{name}: page=0x1 pfn={pfn:#x} order=0{rest}\n")
    };
    let flags = " migratetype=1 gfp_flags=GFP_HIGHUSER_MOVABLE";
    let text = [
        event(0, "mm_page_alloc", 0x2000, flags),
        event(1, "mm_page_free", 0x1003, ""),
        event(1, "mm_page_free", 0x9999, ""),
        event(0, "mm_page_free", 0x2000, ""),
    ];
    fs::write(folder.path().join("mine.txt"), text.concat()).unwrap();
    let r = replay(folder.path(), &["mine.txt", "-q", "--json"]).json();
    assert_eq!(r["start"]["free_blocks"], r["linux_start"]["free_blocks"]);
    assert_eq!((&r["allocs"], &r["frees"]), (&1.into(), &2.into()));
    assert_eq!((&r["unmatched_frees"], &r["failures"]), (&1.into(), &0.into()));
    assert_eq!(r["odd_events"][0]["pfn"], 0x9999);
    assert!(r["linux_end"].is_null());
}

/// The form the recorder in the kernel writes, with its tables and texts beside it.
#[test]
fn recorders_own_form() {
    let folder = tempfile::tempdir().unwrap();
    let recording = small("x", 30);
    let zone = Zone { node: 0, name: "DMA32", first: 0x1000, end: 0x4000, used: 0 };
    write_kmt(&recording, folder.path());
    fs::create_dir_all(folder.path().join("x/start")).unwrap();
    for (name, text) in texts(&[zone], 10, 2) {
        fs::write(folder.path().join("x/start").join(name), &text).unwrap();
        fs::write(folder.path().join(format!("x/{name}.traced_end")), text).unwrap();
    }
    let packed = replay(folder.path(), &["x.kmt.zst", "-q", "--json", "--single-thread"]).json();
    assert_eq!((&packed["events"], &packed["allocs"]), (&400.into(), &300.into()));
    assert_eq!((&packed["failures"], &packed["unmatched_frees"]), (&0.into(), &0.into()));
    assert_eq!(packed["lost_events"], 2);
    assert_eq!(packed["linux_end"]["free_frames"], 0x3000);

    // The same recording in the project's form comes to the same end.
    let reread = Recording::open(folder.path().join("x.kmt.zst")).unwrap();
    reread.write(folder.path().join("x.kmr")).unwrap();
    let own = replay(folder.path(), &["x.kmr", "-q", "--json", "--single-thread"]).json();
    for key in ["events", "start", "end", "linux_end", "phases", "lost_events"] {
        assert_eq!(packed[key], own[key], "{key}");
    }
}

fn write_kmt(recording: &Recording, folder: &Path) {
    let mut bytes = b"KMT1\0\0\0\0".to_vec();
    bytes.extend(32u32.to_le_bytes());
    bytes.extend(1u32.to_le_bytes());
    bytes.extend((recording.rows.len() as u64).to_le_bytes());
    bytes.extend(recording.ids().to_le_bytes());
    let mut last = 0;
    for row in &recording.rows {
        bytes.extend((row.time_ns.wrapping_sub(last) as u32).to_le_bytes());
        last = row.time_ns;
        bytes.extend([row.kind.number(), row.cpu as u8, row.order, row.migratetype]);
        bytes.extend((row.address as u32).to_le_bytes());
        bytes.extend(row.id.unwrap_or(u32::MAX).to_le_bytes());
        bytes.extend(row.bytes_requested.to_le_bytes());
        bytes.extend(row.bytes_allocated.to_le_bytes());
        bytes.extend(row.gfp.to_le_bytes());
        bytes.extend(row.site.to_le_bytes());
        bytes.extend(u16::MAX.to_le_bytes());
    }
    let tables = format!(
        r#"{{"rows":{},"ids":{},"lost":2,"caches":{{}},"sites":["?"],"stacks":{{}}}}"#,
        recording.rows.len(),
        recording.ids()
    );
    fs::write(folder.join("x.kmt.zst"), zstd::bulk::compress(&bytes, 3).unwrap()).unwrap();
    fs::write(folder.join("x.json"), tables).unwrap();
}

/// `--speed recorded` takes as long as the recording did, on threads and on one.
#[test]
fn the_recorded_speed() {
    let folder = tempfile::tempdir().unwrap();
    small("slow", 400).write(folder.path().join("slow.kmr")).unwrap();
    for options in [&["--speed", "recorded"][..], &["--speed", "recorded", "--single-thread"]] {
        let r = replay(folder.path(), &[&["slow.kmr", "-q", "--json"], options].concat()).json();
        let seconds = r["seconds"].as_f64().unwrap();
        assert!((0.39..20.0).contains(&seconds), "{seconds} s");
        assert_eq!((&r["recorded_speed"], &r["allocs"]), (&true.into(), &300.into()));
    }
    let r = replay(folder.path(), &["slow.kmr", "-q", "--json", "--speed", "max"]).json();
    assert!(r["seconds"].as_f64().unwrap() < 0.39);
}
