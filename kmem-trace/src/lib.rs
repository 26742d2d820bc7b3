//! Recordings of what a kernel asked of its memory allocators, and the state it asked from.
//!
//! # Concepts
//!
//! A [`Recording`] is a list of [`Row`]s, one per event, and a [`Meta`]: string tables the rows refer to, and the
//! texts of `/proc` that say what the machine looked like before and after. Three forms of it can be read, and
//! [`Recording::open`] tells them apart by their first bytes:
//!
//! | form | what it is | module |
//! |---|---|---|
//! | `.kmr` | this crate's own container, versioned and documenting itself; the only one it writes | [`kmr`] |
//! | `.kmt.zst`, `.kmt` | 32-byte rows, string tables in `X.json` and `/proc` texts in `X/` beside it | [`kmt`] |
//! | text | what `perf script`, `trace-cmd report` or ftrace's `trace` file print | [`text`] |
//!
//! What a replay needs beside the events is where they start: [`start`] works out from the `/proc` texts and from
//! the events which frames were free, in blocks of which order, and which were in use. [`end`] reads where Linux
//! itself ended, to compare with. [`pages`] turns the page rows into a stream in which compaction is explained;
//! [`slab`] tells what Linux's own slab layer held. [`record`] makes a recording of events as they come.
//!
//! # Errors
//!
//! All readers are total: whatever the bytes, they return a whole recording or a [`TraceError`] that names the byte
//! or the line. Events that make no sense (a free of something not live) are not errors of the file; they are
//! rows like any other, and [`pages`] names them.
//!
//! # Locking
//!
//! None. Everything here is plain data, built once and then only read.

pub mod end;
mod error;
pub mod gfp;
pub mod kmr;
pub mod kmt;
mod live;
mod meta;
pub mod pages;
pub mod proc;
pub mod record;
mod recording;
mod row;
pub mod slab;
pub mod start;
pub mod text;

pub use error::{Place, TraceError};
pub use meta::{CacheShape, Meta};
pub use pages::{PageEvent, PageOp};
pub use recording::{Phase, Recording};
pub use row::{Id, Kind, NO_STACK, Row};
pub use start::StartState;
