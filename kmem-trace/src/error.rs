//! What a reader says when it cannot go on.
//!
//! A recording is evidence. A reader that skipped what it does not understand would turn a damaged file into a
//! plausible report about something that never happened, so every reader of this crate stops at the first thing it
//! cannot explain and says where that is: the file, and in it the byte (of the file, or of the stream a compressed
//! file unpacks to) or the line. Nothing read so far is handed out.

use std::fmt;
use std::path::Path;

/// Where in a file an error lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Offset in the file itself, in bytes from its start.
    Byte(u64),
    /// Offset in the stream the (zstd) file unpacks to, in bytes from its start.
    UnpackedByte(u64),
    /// Line of a text, counted from 1.
    Line(u64),
    /// The file as a whole: it cannot be opened, or something is missing from it.
    File,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Byte(at) => write!(f, "byte {at}: "),
            Place::UnpackedByte(at) => write!(f, "byte {at} of the unpacked stream: "),
            Place::Line(line) => write!(f, "line {line}: "),
            Place::File => Ok(()),
        }
    }
}

/// A recording, or a text beside it, that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{file}: {place}{what}")]
pub struct TraceError {
    /// The file as the caller named it, or the name of a text inside a recording (`start/iomem`).
    pub file: String,
    /// Where in it.
    pub place: Place,
    /// What is wrong there, in a sentence.
    pub what: String,
}

impl TraceError {
    /// An error at `place` of `file`.
    pub fn new(file: impl Into<String>, place: Place, what: impl Into<String>) -> Self {
        TraceError { file: file.into(), place, what: what.into() }
    }

    /// An error at the 1-based `line` of `file`.
    pub fn line(file: impl Into<String>, line: usize, what: impl Into<String>) -> Self {
        Self::new(file, Place::Line(line as u64), what)
    }

    /// An error about `file` as a whole.
    pub fn file(file: impl Into<String>, what: impl Into<String>) -> Self {
        Self::new(file, Place::File, what)
    }

    pub(crate) fn io(path: &Path, doing: &str, error: &std::io::Error) -> Self {
        Self::file(path.display().to_string(), format!("cannot {doing}: {error}"))
    }
}
