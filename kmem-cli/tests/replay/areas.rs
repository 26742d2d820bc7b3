//! The vmalloc areas and the per-CPU memory of a recording replay on a machine of their own, beside Linux's.

use super::{json, replay, shipped, synthetic::Maker};
use kmem_trace::{Kind, Recording};
use serde_json::Value;

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no number"))
}

/// What a recording's own texts and rows say.
struct Expected {
    /// Allocations and frees of areas, and of them frees from before.
    areas: [u64; 3],
    /// The same of per-CPU memory.
    percpu: [u64; 3],
    /// Areas of Linux, frames in them, at the start.
    linux_start: [u64; 2],
}

fn check(name: &str, expected: &Expected) {
    let r = json(&[&shipped(name), "-q"]);
    let (v, p, linux) = (&r["vmalloc"], &r["percpu"], &r["linux_vmalloc"]);
    for (of, [allocs, frees, prior]) in [(v, expected.areas), (p, expected.percpu)] {
        assert_eq!(number(&of["events"]), allocs + frees);
        let done = [&of["allocs"], &of["frees"], &of["prior_frees"]].map(number);
        assert_eq!(done, [allocs, frees, prior]);
        for none in ["failures", "refused_frees", "skipped", "unmatched_frees"] {
            assert_eq!(of[none], 0, "{none}");
        }
    }
    // Both begin with the same areas, and have the same in use at the peak.
    assert_eq!(number(&linux["start"]["areas"]), expected.linux_start[0]);
    assert_eq!(number(&linux["start"]["pages"]), expected.linux_start[1]);
    for same in ["areas", "bytes", "pages"] {
        assert_eq!(v["start"][same], linux["start"][same], "{same}");
    }
    // Areas from before that are freed are of the same size on both sides.
    let (peak, theirs) = (number(&v["peak"]["bytes"]), number(&linux["peak_bytes"]));
    assert_eq!(peak, theirs);
    let [allocs, frees, _] = expected.areas;
    assert_eq!(number(&v["end"]["areas"]), expected.linux_start[0] + allocs - frees);
    // Addresses: those in use, those that wait, and those that are free.
    let end = &v["end"];
    let taken = number(&end["bytes"]) + number(&end["unpurged_bytes"]);
    assert_eq!(taken + number(&v["free_bytes"]), number(&v["range_bytes"]));
    assert!(number(&v["largest_free_bytes"]) <= number(&v["free_bytes"]));
    let samples =
        |what: &str| -> Vec<u64> { v[what].as_array().unwrap().iter().map(number).collect() };
    let (used, taken) = (samples("samples_bytes"), samples("samples_taken"));
    assert_eq!(used.len(), r["samples"].as_array().unwrap().len());
    assert!(used.iter().zip(&taken).all(|(used, taken)| used <= taken));
    assert!(used.iter().all(|bytes| *bytes <= peak));
    // Per-CPU memory: what is taken is what was asked for, and little beside.
    let [allocs, frees, prior] = expected.percpu;
    assert_eq!(number(&p["end"]["live"]), prior + allocs - frees);
    for when in ["start", "peak", "end"] {
        let (bytes, taken) = (number(&p[when]["bytes"]), number(&p[when]["taken_bytes"]));
        assert!(bytes <= taken && taken <= bytes + bytes / 2 + 64, "{when}: {bytes}, {taken}");
        assert!(number(&p[when]["chunks"]) >= 1);
    }
    assert_eq!(p["linux_start_kib"], 576);
}

#[test]
fn a() {
    let expected = Expected {
        areas: [565, 565, 5],
        percpu: [3445, 3442, 2],
        linux_start: linux_start("linux-6.12-a.kmr"),
    };
    assert_eq!(expected.linux_start[0], 148);
    check("linux-6.12-a.kmr", &expected);
}

#[test]
fn b() {
    let expected = Expected {
        areas: [233, 235, 5],
        percpu: [1530, 1527, 2],
        linux_start: linux_start("linux-6.12-b.kmr"),
    };
    assert_eq!(expected.linux_start[0], 148);
    check("linux-6.12-b.kmr", &expected);
}

/// Areas in use and their frames, counted by hand.
fn linux_start(name: &str) -> [u64; 2] {
    let recording = Recording::open(shipped(name)).unwrap();
    let text = recording.meta.file("start/vmallocinfo").unwrap();
    let lines: Vec<&str> = text.lines().filter(|line| !line.contains("unpurged")).collect();
    let pages = lines.iter().filter_map(|line| line.split_once("pages=")?.1.split(' ').next());
    [lines.len() as u64, pages.map(|n| n.parse::<u64>().unwrap()).sum()]
}

/// Areas and per-CPU memory of a recording that has no texts; frees that make no sense are listed.
#[test]
fn frees_without_an_allocation_are_told() {
    let folder = tempfile::tempdir().unwrap();
    let mut maker = Maker::new("areas");
    let block = maker.alloc(0, 0, (64, 0));
    maker.free(1, 0, (64, 0), Some(block));
    let area = maker.other(Kind::VmapAlloc, 0xffff_c900_0000_4000, (20480, 14), None);
    maker.other(Kind::VmapFree, 0xffff_c900_0000_4000, (0, 0), Some(area));
    // From before: there are no areas at the start that it could be.
    maker.other(Kind::VmapFree, 0xffff_c900_0001_0000, (0, 0), None);
    let memory = maker.other(Kind::PerCpuAlloc, 0x100, (24, 3), None);
    maker.other(Kind::PerCpuFree, 0x100, (0, 0), Some(memory));
    maker.other(Kind::PerCpuFree, 0x200, (0, 0), None);
    let left = maker.other(Kind::PerCpuAlloc, 0x300, (4000, 6), None);
    assert!(left > memory);
    let path = folder.path().join("areas.kmr");
    maker.done().write(&path).unwrap();
    let path = path.to_str().unwrap();
    let r = json(&[path, "-q"]);
    let (v, p) = (&r["vmalloc"], &r["percpu"]);
    assert_eq!(
        (&v["allocs"], &v["frees"], &v["unmatched_frees"]),
        (&1.into(), &1.into(), &1.into())
    );
    assert_eq!(v["odd_frees"][0]["row"], 4);
    assert_eq!(v["odd_frees"][0]["address"], 0xffff_c900_0001_0000_u64);
    assert_eq!((&v["peak"]["bytes"], &v["end"]["bytes"]), (&20480.into(), &0.into()));
    assert_eq!((&p["allocs"], &p["frees"], &p["prior_frees"]), (&2.into(), &2.into(), &1.into()));
    assert_eq!((&p["end"]["live"], &p["end"]["bytes"]), (&1.into(), &4000.into()));
    assert_eq!(r["linux_vmalloc"], Value::Null);
    let text = replay(folder.path(), &[path, "-q"]);
    assert_eq!(text.code, 0, "{}", text.err);
    for line in [
        "vmalloc areas   3 events",
        "per-CPU memory  4 events",
        "row 4: 0xffffc90000010000: no area",
    ] {
        assert!(text.out.contains(line), "{line:?} in {}", text.out);
    }
    let page = std::fs::read_to_string(folder.path().join("kmem-replay.html")).unwrap();
    for part in [
        "<h2>vmalloc areas, kmem beside Linux</h2>",
        "<h2>Per-CPU memory</h2>",
        "<h2>Addresses of vmalloc areas</h2>",
    ] {
        assert!(page.contains(part), "{part}");
    }
    let none = json(&[path, "-q", "--pages-only"]);
    assert_eq!((&none["vmalloc"], &none["percpu"]), (&Value::Null, &Value::Null));
}

/// A text that cannot be parsed is an error that names its line.
#[test]
fn a_damaged_vmallocinfo_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let mut maker = Maker::new("damaged");
    maker.alloc(0, 0, (64, 0));
    maker.other(Kind::VmapAlloc, 0xffff_c900_0000_4000, (20480, 14), None);
    let mut recording = maker.done();
    recording.meta.files.insert("start/vmallocinfo".into(), "0x1-0x2 8192 vmap\nhello\n".into());
    let path = folder.path().join("damaged.kmr");
    recording.write(&path).unwrap();
    let ran = replay(folder.path(), &[path.to_str().unwrap(), "-q", "--no-report"]);
    assert_eq!((ran.code, ran.out.as_str()), (1, ""));
    assert!(ran.err.contains("start/vmallocinfo") && ran.err.contains("line 2"), "{}", ran.err);
}
