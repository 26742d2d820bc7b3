//! A whole recording, and opening one of any form.
//!
//! Form is told by content, never by name: the first bytes of a `.kmr`, of a zstd stream and of a `KMT1` header are
//! unlike each other and unlike any text. Two binary files people are likely to pass by mistake (`perf.data`,
//! `trace.dat`) are recognised to say which command turns them into text.
//!
//! Forms that are a single stream of events find what else was saved in a folder of the same name beside them: for
//! `X.kmt.zst`, `X.kmt`, `X.txt` or any other `X.ext` that is the folder `X/` (see docs/RECORDING.md).

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Place, TraceError};
use crate::meta::Meta;
use crate::row::{Kind, Row};
use crate::{kmr, kmt, text};

/// A recording: what happened, in order, and what is known beside it.
#[derive(Clone, Debug, PartialEq)]
pub struct Recording {
    /// Names, `/proc` texts, counts.
    pub meta: Meta,
    /// The events. Their order is the truth, see [`Row`].
    pub rows: Vec<Row>,
}

/// A mark the workload left among the events.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Phase {
    /// The number it gave itself.
    pub number: u64,
    /// Index of the marking row; the phase's own rows follow it.
    pub row: usize,
    /// Time of the mark, in nanoseconds since the recording began.
    pub time_ns: u64,
}

/// First bytes of a zstd frame.
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// First bytes of what `perf record` writes.
const PERF_DATA_MAGIC: &[u8] = b"PERFILE2";
/// First bytes of what `trace-cmd record` writes.
const TRACE_DAT_MAGIC: &[u8] = b"\x17\x08\x44tracing";

impl Recording {
    /// Reads the recording at `path`, of whichever form it is, with what lies beside it.
    ///
    /// # Errors
    /// The file or one beside it cannot be read, is damaged or cut short, or is of no form this crate knows. The
    /// error names the file and the byte or line.
    pub fn open(path: impl AsRef<Path>) -> Result<Recording, TraceError> {
        let path = path.as_ref();
        let bytes = fs::read(path).map_err(|error| TraceError::io(path, "read it", &error))?;
        let file = path.display().to_string();
        if bytes.starts_with(kmr::MAGIC) {
            return kmr::read(&bytes, &file);
        }
        if bytes.starts_with(PERF_DATA_MAGIC) {
            return Err(TraceError::new(
                file,
                Place::Byte(0),
                "this is perf's own form; `perf script` makes text of it",
            ));
        }
        if bytes.starts_with(TRACE_DAT_MAGIC) {
            let what = "this is trace-cmd's own form; `trace-cmd report` makes text of it";
            return Err(TraceError::new(file, Place::Byte(0), what));
        }
        let beside = Beside::of(path);
        if bytes.starts_with(&ZSTD_MAGIC) || bytes.starts_with(kmt::MAGIC) {
            let mut meta = Meta::new(beside.name.clone(), "KMT1");
            if beside.json.is_file() {
                let json = fs::read(&beside.json)
                    .map_err(|error| TraceError::io(&beside.json, "read it", &error))?;
                kmt::read_tables(&json, &beside.json.display().to_string(), &mut meta)?;
            }
            beside.read_folder(&mut meta)?;
            return kmt::read(&bytes, &file, meta);
        }
        let mut meta = Meta::new(beside.name.clone(), "text");
        beside.read_folder(&mut meta)?;
        text::read(&bytes, &file, meta)
    }

    /// Writes the recording to `path` in this crate's own form, [`kmr`].
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<(), TraceError> {
        let path = path.as_ref();
        let bytes = kmr::write(self, kmr::BEST_LEVEL)
            .map_err(|error| TraceError::io(path, "pack it", &error))?;
        fs::write(path, bytes).map_err(|error| TraceError::io(path, "write it", &error))
    }

    /// Number of ids the rows give out: ids are `0..ids()`.
    pub fn ids(&self) -> u64 {
        self.rows
            .iter()
            .map(|row| u64::from(row.kind.gives_id()) + 2 * u64::from(row.kind == Kind::Split))
            .sum()
    }

    /// The marks the workload left, in row order.
    pub fn phases(&self) -> Vec<Phase> {
        let marks = self.rows.iter().enumerate().filter(|(_, row)| row.kind == Kind::Phase);
        marks
            .map(|(index, row)| Phase { number: row.address, row: index, time_ns: row.time_ns })
            .collect()
    }

    /// Time of the latest event, in nanoseconds since the recording began.
    pub fn duration_ns(&self) -> u64 {
        self.rows.iter().map(|row| row.time_ns).max().unwrap_or(0)
    }
}

/// What lies beside a recording that is one stream of events.
struct Beside {
    name: String,
    json: PathBuf,
    folder: PathBuf,
}

impl Beside {
    fn of(path: &Path) -> Beside {
        let file =
            path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let stem = file.strip_suffix(".zst").unwrap_or(&file);
        let name = match stem.rsplit_once('.') {
            Some((name, _)) if !name.is_empty() => name.to_owned(),
            _ => stem.to_owned(),
        };
        let parent = path.parent().unwrap_or(Path::new(""));
        Beside { json: parent.join(format!("{name}.json")), folder: parent.join(&name), name }
    }

    /// Reads every file of the folder, one folder deep, as text.
    fn read_folder(&self, meta: &mut Meta) -> Result<(), TraceError> {
        if !self.folder.is_dir() {
            return Ok(());
        }
        for (name, path, is_folder) in list(&self.folder)? {
            if is_folder {
                for (inner, path, is_folder) in list(&path)? {
                    if !is_folder {
                        meta.files.insert(format!("{name}/{inner}"), read_text(&path)?);
                    }
                }
            } else {
                meta.files.insert(name, read_text(&path)?);
            }
        }
        Ok(())
    }
}

/// The entries of a folder: name, path, and whether the entry is a folder.
fn list(folder: &Path) -> Result<Vec<(String, PathBuf, bool)>, TraceError> {
    let failed = |error| TraceError::io(folder, "list it", &error);
    let mut entries = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let name =
            path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let is_folder = path.is_dir();
        entries.push((name, path, is_folder));
    }
    Ok(entries)
}

fn read_text(path: &Path) -> Result<String, TraceError> {
    let bytes = fs::read(path).map_err(|error| TraceError::io(path, "read it", &error))?;
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to() as u64;
        TraceError::new(path.display().to_string(), Place::Byte(at), "this is not UTF-8 text")
    })
}
