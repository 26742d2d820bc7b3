//! What cannot be read is refused, at its byte or line, and leaves nothing that looks like a result.

use super::{list, replay, sample, synthetic::small};
use kmem_trace::{NO_STACK, Recording, kmr};
use std::{fs, path::Path};

/// Replays `bytes`, which must be refused, and returns what was said. An older report stays as it was.
fn refused(name: &str, bytes: &[u8]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let old = folder.path().join("kmem-replay.html");
    fs::write(folder.path().join(name), bytes).unwrap();
    fs::write(&old, "old").unwrap();
    for options in [&["-q"][..], &["-q", "--json"]] {
        let ran = replay(folder.path(), &[&[name], options].concat());
        assert_eq!((ran.code, &ran.out[..]), (1, ""), "{}", ran.err);
        assert_eq!(ran.err.lines().count(), 1, "{}", ran.err);
        assert!(ran.err.contains(name), "{}", ran.err);
    }
    let said = replay(folder.path(), &[name, "-q"]).err;
    assert_eq!(fs::read_to_string(old).unwrap(), "old");
    assert_eq!(list(folder.path()).len(), 2);
    said
}

fn bytes() -> Vec<u8> {
    kmr::write(&small("small", 30), 1).unwrap()
}

#[test]
fn truncated() {
    let whole = bytes();
    for length in [10, 2000, whole.len() / 2, whole.len() - 1] {
        let said = refused("cut.kmr", &whole[..length]);
        assert!(said.contains("byte "), "{length}: {said}");
    }
}

#[test]
fn one_byte_changed() {
    let whole = bytes();
    for at in [5, whole.len() / 2, whole.len() * 3 / 4, whole.len() - 3] {
        let mut damaged = whole.clone();
        damaged[at] ^= 0x10;
        let said = refused("flipped.kmr", &damaged);
        assert!(said.contains("byte "), "byte {at}: {said}");
    }
}

#[test]
fn something_appended() {
    let said = refused("long.kmr", &[&bytes()[..], b"more"].concat());
    assert!(said.contains("byte "), "{said}");
}

#[test]
fn foreign_files() {
    let png = [0x89, b'P', b'N', b'G', 0x0d, 0x0a, 0x1a, 0x0a, 0, 0, 0, 13, 0xff, 0xfe];
    let said = refused("picture.kmr", &png);
    assert!(said.contains("line 1") || said.contains("byte 0"), "{said}");
    let said = refused("perf.data", b"PERFILE2\x68\0\0\0\0\0\0\0");
    assert!(said.contains("byte 0") && said.contains("perf script"), "{said}");
    let said = refused("letter.txt", b"Dear kernel,\nhow are you?\n");
    assert!(said.contains("line 1"), "{said}");
    let zstd = zstd::bulk::compress(b"not rows at all, but packed well", 3).unwrap();
    let said = refused("x.kmt.zst", &zstd);
    assert!(said.contains("byte 0"), "{said}");
}

#[test]
fn an_empty_file() {
    let said = refused("empty.kmr", b"");
    assert!(said.contains("empty"), "{said}");
}

#[test]
fn a_broken_line() {
    let text = fs::read_to_string(sample("perf.txt")).unwrap();
    let broken = text.replace("pfn=0x2000 order=3 migratetype", "pfn=0x20zz order=3 migratetype");
    let said = refused("broken.txt", broken.as_bytes());
    assert!(said.contains("line 6: ") && said.contains("0x20zz"), "{said}");
    let said = refused("cut.txt", text.trim_end().as_bytes());
    assert!(said.contains("line 13: ") && said.contains("cut short"), "{said}");
}

#[test]
fn a_file_that_is_not_there() {
    let folder = tempfile::tempdir().unwrap();
    let ran = replay(folder.path(), &["nothing.kmr"]);
    assert_eq!((ran.code, &ran.out[..]), (1, ""));
    assert!(ran.err.contains("nothing.kmr"), "{}", ran.err);
    assert!(list(folder.path()).is_empty());
}

/// A recording without one page event is no success.
#[test]
fn nothing_to_replay() {
    let folder = tempfile::tempdir().unwrap();
    let mut recording = small("small", 30);
    recording.rows.retain(|row| !row.kind.is_page());
    recording.write(folder.path().join("phases.kmr")).unwrap();
    let ran = replay(folder.path(), &["phases.kmr", "-q"]);
    assert_eq!((ran.code, &ran.out[..]), (1, ""));
    assert!(ran.err.contains("no page events"), "{}", ran.err);
}

#[test]
fn more_cpus_than_machines_have() {
    let mut recording = small("small", 30);
    recording.rows.iter_mut().for_each(|row| row.cpu *= 40_000);
    let said = refused("wide.kmr", &kmr::write(&recording, 1).unwrap());
    assert!(said.contains("CPU 40000") && said.contains("at most 1024"), "{said}");
}

/// A damaged text inside a whole recording is named with its line.
#[test]
fn start_texts_are_checked() {
    let mut recording = small("small", 30);
    let text = "Node 0, zone DMA32 1 2 x\n".to_owned();
    recording.meta.files.insert("start/buddyinfo".into(), text);
    let said = refused("texts.kmr", &kmr::write(&recording, 1).unwrap());
    assert!(said.contains("start/buddyinfo: line 1: "), "{said}");
    recording.meta.files.insert("start/buddyinfo".into(), "Node 0, zone DMA32 1 2 3\n".into());
    let said = refused("texts.kmr", &kmr::write(&recording, 1).unwrap());
    assert!(said.contains("no zoneinfo of its start"), "{said}");
}

#[test]
fn a_wrong_command_line() {
    let cases: [(&[&str], &str); 8] = [
        (&["--no-such-option"], "--no-such-option"),
        (&["x.kmr", "y.kmr"], "y.kmr"),
        (&["--speed", "ludicrous"], "ludicrous"),
        (&["--cpus", "0"], "--cpus"),
        (&["--memory", "lots"], "lots"),
        (&["--memory", "3X"], "unknown unit"),
        (&["--memory", "18446744073709551615"], "--memory"),
        (&["--no-report", "--report", "r.html"], "cannot be used with"),
    ];
    let folder = tempfile::tempdir().unwrap();
    for (args, part) in cases {
        let ran = replay(folder.path(), args);
        assert_eq!((ran.code, &ran.out[..]), (2, ""), "{args:?}");
        assert!(ran.err.contains(part), "{args:?}: {}", ran.err);
    }
    let help = replay(folder.path(), &["--help"]);
    assert_eq!(help.code, 0);
    assert!(help.out.contains("Examples:") && help.out.contains("docs/RECORDING.md"));
    assert!(list(folder.path()).is_empty());
}

/// Frees that make no sense are counted and listed, and the run goes on.
#[test]
fn nonsense_is_counted_and_listed() {
    let mut recording = small("small", 30);
    let free = recording.rows.iter().rfind(|r| r.kind == kmem_trace::Kind::PageFree);
    let twice = *free.unwrap();
    assert_ne!(twice.bytes_requested, NO_STACK);
    recording.rows.extend([twice; 3]);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("odd.kmr");
    write(&recording, &path);
    let ran = replay(folder.path(), &["odd.kmr", "-q", "--json"]);
    let r = ran.json();
    assert_eq!((&r["unmatched_frees"], &r["failures"]), (&3.into(), &0.into()));
    let odd = r["odd_events"].as_array().unwrap();
    assert_eq!(odd.len(), 3);
    assert_eq!(odd[0]["row"].as_u64(), Some(recording.rows.len() as u64 - 3));
    let page = fs::read_to_string(folder.path().join("kmem-replay.html")).unwrap();
    assert!(page.contains("frees a block that is not live"));
    let text = replay(folder.path(), &["odd.kmr", "-q", "--no-report"]).out;
    assert!(text.contains("3 unmatched frees") && text.contains("frees a block that is not live"));
}

fn write(recording: &Recording, path: &Path) {
    fs::write(path, kmr::write(recording, 1).unwrap()).unwrap();
}
