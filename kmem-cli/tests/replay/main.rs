//! `kmem replay`, run as its users run it.

mod areas;
mod damage;
mod data;
mod forms;
mod objects;
mod record;
mod report;
mod shapes;
mod synthetic;

use serde_json::Value;
use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// What a run of the command left.
struct Ran {
    code: i32,
    out: String,
    err: String,
}

impl Ran {
    /// The object on standard output, of a run that succeeded.
    fn json(&self) -> Value {
        assert_eq!(self.code, 0, "{}", self.err);
        serde_json::from_str(&self.out).expect("one JSON object on standard output")
    }
}

/// Runs `kmem replay` in `folder`, which is where its report goes.
fn replay(folder: &Path, args: &[&str]) -> Ran {
    let (out, err) = (folder.join("stdout"), folder.join("stderr"));
    let file = |path: &Path| Stdio::from(std::fs::File::create(path).unwrap());
    let mut child = Command::new(env!("CARGO_BIN_EXE_kmem"))
        .arg("replay")
        .args(args)
        .current_dir(folder)
        .stdin(Stdio::null())
        .stdout(file(&out))
        .stderr(file(&err))
        .spawn()
        .unwrap();
    let began = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if began.elapsed() > Duration::from_secs(300) {
            child.kill().unwrap();
            child.wait().unwrap();
            let said = std::fs::read_to_string(&err).unwrap();
            panic!("kmem replay {args:?} hangs; it said {said:?}");
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    let text = |path: &Path| {
        let text = std::fs::read_to_string(path).unwrap();
        std::fs::remove_file(path).unwrap();
        text
    };
    Ran { code: status.code().expect("an exit code"), out: text(&out), err: text(&err) }
}

/// Runs `kmem replay --json` without a report.
fn json(args: &[&str]) -> Value {
    let folder = tempfile::tempdir().unwrap();
    replay(folder.path(), &[args, &["--json", "--no-report"]].concat()).json()
}

/// A recording that comes with the project.
fn shipped(name: &str) -> String {
    path_of(Path::new(env!("CARGO_MANIFEST_DIR")).join("../data").join(name))
}

/// A small text recording.
fn sample(name: &str) -> String {
    path_of(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name))
}

fn path_of(path: PathBuf) -> String {
    path.into_os_string().into_string().unwrap()
}

/// Names of what lies in `folder`.
fn list(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<String> =
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
