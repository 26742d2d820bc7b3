//! The HTML report is whole, stands alone, and comes only from a whole run.

use super::{
    list, replay,
    synthetic::{Zone, small},
};
use std::fs;

fn write_small(folder: &std::path::Path, name: &str) -> String {
    let mut recording = small(name, 30);
    let zone = Zone { node: 0, name: "DMA32", first: 0x1000, end: 0x5000, used: 0 };
    for (file, text) in super::synthetic::texts(&[zone], 10, 2) {
        recording.meta.files.insert(format!("start/{file}"), text.clone());
        recording.meta.files.insert(format!("end/{file}"), text);
    }
    recording.write(folder.join("small.kmr")).unwrap();
    "small.kmr".to_owned()
}

#[test]
fn the_page_is_whole_and_needs_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let recording = write_small(folder.path(), "a <b> & \"c\"");
    let ran = replay(folder.path(), &[&recording, "-q"]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert_eq!(ran.err, "report: kmem-replay.html\n");
    assert_eq!(list(folder.path()), ["kmem-replay.html", "small.kmr"]);
    let page = fs::read_to_string(folder.path().join("kmem-replay.html")).unwrap();
    assert!(page.starts_with("<!doctype html>") && page.ends_with("</html>\n"));
    assert!(page.len() < 1 << 20, "{} bytes", page.len());
    assert!(page.contains("<h1>a &lt;b&gt; &amp; &quot;c&quot;, replayed on kmem</h1>"));
    for outside in ["src=", "href=", "url(", "@import", "fetch("] {
        assert!(!page.contains(outside), "{outside}");
    }
    let plots = [
        "Where the free memory lies at the end",
        "Free memory by the size of its blocks",
        "Free blocks per order",
        "Fragmentation: the unusable index",
        "Free frames",
        "Watermark crossings",
        "Per-CPU list hits",
        "Frames on per-CPU lists",
    ];
    for plot in plots {
        assert!(page.contains(&format!("<h2>{plot}</h2>")), "{plot}");
    }
    assert_eq!(page.matches("<svg ").count(), plots.len());
    assert_eq!(page.matches("</svg>").count(), plots.len());
    for text in ["page events of the recording so far", "MiB free", "free blocks", "hits, %"] {
        assert!(page.contains(text), "{text}");
    }
    assert!(!page.contains("NaN") && !page.contains("inf\""));
}

/// The numbers under the pointer are those of the samples.
#[test]
fn each_plot_carries_its_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let recording = write_small(folder.path(), "small");
    let ran = replay(folder.path(), &[&recording, "-q", "--json", "--report", "r.html"]);
    let samples = ran.json()["samples"].as_array().unwrap().len();
    let page = fs::read_to_string(folder.path().join("r.html")).unwrap();
    let mut found = 0;
    for part in page.split("<script type=\"application/json\">").skip(1) {
        let data: serde_json::Value =
            serde_json::from_str(part.split("</script>").next().unwrap()).unwrap();
        for series in data["series"].as_array().unwrap() {
            assert_eq!(series["values"].as_array().unwrap().len(), samples, "{}", series["name"]);
            found += 1;
        }
    }
    assert_eq!(found, 12 + 11 + 4 + 1 + 2 + 1 + 1);
}

#[test]
fn no_report_writes_none() {
    let folder = tempfile::tempdir().unwrap();
    let recording = write_small(folder.path(), "small");
    let ran = replay(folder.path(), &[&recording, "-q", "--no-report"]);
    assert_eq!((ran.code, &ran.err[..]), (0, ""));
    assert_eq!(list(folder.path()), ["small.kmr"]);
}

/// A report that cannot be written is found out before the run.
#[test]
fn a_place_that_cannot_be_is_refused_first() {
    let folder = tempfile::tempdir().unwrap();
    let recording = write_small(folder.path(), "small");
    for place in ["nowhere/r.html", "."] {
        let ran = replay(folder.path(), &[&recording, "-q", "--report", place]);
        assert_eq!((ran.code, &ran.out[..]), (1, ""), "{place}");
        assert!(ran.err.contains("cannot write the report"), "{}", ran.err);
    }
    assert_eq!(list(folder.path()), ["small.kmr"]);
}

#[test]
fn an_older_report_is_replaced() {
    let folder = tempfile::tempdir().unwrap();
    let recording = write_small(folder.path(), "small");
    fs::write(folder.path().join("kmem-replay.html"), "old").unwrap();
    assert_eq!(replay(folder.path(), &[&recording, "-q"]).code, 0);
    let page = fs::read_to_string(folder.path().join("kmem-replay.html")).unwrap();
    assert!(page.contains("small, replayed on kmem"));
}
