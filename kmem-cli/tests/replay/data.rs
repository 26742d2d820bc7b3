//! The recordings that come with the project replay as the report promises.

use super::{json, replay, shipped};
use serde_json::Value;

const A: &str = "linux-6.12-a.kmr";
const B: &str = "linux-6.12-b.kmr";

/// Nothing fails, the start is Linux's, and the end is no more fragmented than Linux's. `runs` is 1, or 5 where
/// threads come to another end each time: then the middle one counts for each order.
fn check(name: &str, events: u64, options: &[&str], runs: usize) {
    let results: Vec<Value> = (0..runs).map(|_| check_once(name, events, options)).collect();
    for order in ["3", "5", "7", "9"] {
        let index = |state: &Value| state["unusable_index"][order].as_f64().unwrap();
        let mut kmem: Vec<f64> = results.iter().map(|r| index(&r["end"])).collect();
        kmem.sort_by(f64::total_cmp);
        let (kmem, linux) = (kmem[runs / 2], index(&results[0]["linux_end"]));
        assert!(kmem <= linux, "unusable index of order {order}: {kmem}, Linux {linux}");
    }
}

fn check_once(name: &str, events: u64, options: &[&str]) -> Value {
    let path = shipped(name);
    let r = json(&[&[&path[..], "-q"], options].concat());
    assert_eq!(r["events"], events);
    assert_eq!(r["failures"], 0);
    assert_eq!((&r["unmatched_frees"], &r["missing_frees"]), (&0.into(), &0.into()));
    assert_eq!((&r["refused_frees"], &r["skipped"]), (&0.into(), &0.into()));
    assert_eq!(r["lost_events"], 0);
    assert!(r["ops_per_second"].as_f64().unwrap() > 0.0);
    assert_eq!(r["allocs"].as_u64(), r["latency_ns"]["alloc"]["count"].as_u64());

    assert_eq!(r["start"]["free_blocks"], r["start"]["linux_free_blocks"]);
    assert_eq!(r["start"]["free_blocks"], r["linux_start"]["free_blocks"]);
    assert_eq!(r["start"]["note"], Value::Null);
    let (kmem, linux) = (&r["end"], &r["linux_end"]);
    for state in [kmem, linux, &r["linux_start"]] {
        assert_eq!(state["free_blocks"].as_array().unwrap().len(), 11);
        let mut keys: Vec<&String> = state["unusable_index"].as_object().unwrap().keys().collect();
        keys.sort();
        assert_eq!(keys, ["3", "5", "7", "9"]);
    }
    let whole = |state: &Value| state["order9_equivalents"].as_u64().unwrap();
    assert!(whole(kmem) >= whole(linux), "{} blocks, Linux {}", whole(kmem), whole(linux));
    r
}

#[test]
fn a_on_threads() {
    check(A, 497_328, &[], 5);
}

#[test]
fn a_in_order() {
    check(A, 497_328, &["--single-thread"], 1);
}

#[test]
fn b_on_threads() {
    check(B, 577_373, &[], 5);
}

#[test]
fn b_in_order() {
    check(B, 577_373, &["--single-thread"], 1);
}

/// One thread in the recorded order comes to the same end each time.
#[test]
fn the_recorded_order_repeats() {
    let path = shipped(B);
    let end = || json(&[&path, "-q", "--single-thread"])["end"].clone();
    assert_eq!(end(), end());
}

#[test]
fn other_numbers_of_cpus_will_do() {
    let path = shipped(A);
    for (cpus, threads) in [("1", 2), ("4", 2)] {
        let r = json(&[&path, "-q", "--cpus", cpus]);
        assert_eq!(r["cpus"].to_string(), cpus);
        assert_eq!(r["threads"], threads);
        assert_eq!((&r["failures"], &r["unmatched_frees"]), (&0.into(), &0.into()));
        assert_eq!(r["start"]["free_blocks"], r["linux_start"]["free_blocks"]);
    }
}

#[test]
fn other_memory_will_do_and_is_told() {
    let path = shipped(A);
    let r = json(&[&path, "-q", "--memory", "1G"]);
    assert_eq!((&r["failures"], &r["unmatched_frees"]), (&0.into(), &0.into()));
    assert!(r["managed_frames"].as_u64().unwrap() > 200_000);
    assert!(r["start"]["note"].as_str().unwrap().contains("command line"), "{}", r["start"]);
    assert_eq!(r["start"]["linux_free_blocks"], Value::Null);
    assert!(r["linux_start"]["free_blocks"].is_array(), "Linux's start is known all the same");
}

/// Less memory than the recording holds live: failures are counted and the run still ends.
#[test]
fn too_little_memory_fails_allocations_and_no_more() {
    let path = shipped(A);
    let r = json(&[&path, "-q", "--memory", "64M"]);
    let (failures, skipped) = (r["failures"].as_u64().unwrap(), r["skipped"].as_u64().unwrap());
    assert!(failures > 0 && skipped > 0, "{failures} failures, {skipped} skipped");
    assert_eq!(r["refused_frees"], 0);
}

/// Samples tell the state over time, in order, fragmentation included.
#[test]
fn samples_and_phases_lie_within_the_run() {
    let path = shipped(A);
    let r = json(&[&path, "-q"]);
    let samples = r["samples"].as_array().unwrap();
    assert!(samples.len() > 300, "{} samples", samples.len());
    let seqs: Vec<u64> = samples.iter().map(|s| s["seq"].as_u64().unwrap()).collect();
    assert!(seqs.is_sorted() && seqs.last() == r["events"].as_u64().as_ref());
    assert!(samples.iter().all(|s| s["unusable_index"]["9"].as_f64().unwrap() <= 1.0));
    assert_eq!(samples.last().unwrap()["unusable_index"], r["end"]["unusable_index"]);
    let phases = r["phases"].as_array().unwrap();
    assert_eq!(phases.len(), 16);
    assert_eq!((&phases[0]["seq"], &phases[15]["seq"]), (&1659.into(), &496_471.into()));
}

/// Without `--json` the same is told as text, kmem beside Linux.
#[test]
fn text_has_kmem_beside_linux() {
    let folder = tempfile::tempdir().unwrap();
    let ran = replay(folder.path(), &[&shipped(B), "-q", "--no-report", "--single-thread"]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    let lines: Vec<String> = ran.out.lines().map(words).collect();
    for start in [
        "events 577373 (287894 allocations, 285904 frees, 1891 of compaction)",
        "latency alloc p50 ",
        "latency free p50 ",
        "failures 0 ",
        "start, kmem 2 1 1 6 6 7 4 6 5 4 10",
        "start, Linux 2 1 1 6 6 7 4 6 5 4 10",
        "end, Linux 304 901 849 419 139 29 4 1 0 0 0",
    ] {
        assert!(lines.iter().any(|l| l.starts_with(start)), "{start:?} is not in\n{}", ran.out);
    }
    let on_lists = lines.iter().find(|l| l.starts_with("on CPU lists ")).unwrap();
    assert!(on_lists.ends_with(" 513"), "{on_lists}");
    assert!(ran.err.is_empty(), "{}", ran.err);
}
