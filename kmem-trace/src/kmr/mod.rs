//! The `.kmr` container, form 1: this crate's own way to keep a recording.
//!
//! A file begins with a text that explains the form to whoever opens it (it is [`HEAD`], and it is the format's
//! documentation), and goes on in sections: the JSON of the [`Meta`], the kinds of all rows, then one column for each
//! field and kind. A column holds differences from what the rows above lead one to expect (see the model below),
//! as byte planes packed with zstd. Each section carries a checksum of its header and one of its packed bytes, and the
//! last one counts the rows, so that damage anywhere is noticed and located, a cut included.
//!
//! Writing and reading return exactly what went in: every field of every row, every byte of every text.

mod column;
mod model;

use std::io;

use self::column::Section;
use self::model::{Coder, Field, Model};
use crate::error::{Place, TraceError};
use crate::meta::Meta;
use crate::recording::Recording;
use crate::row::{Kind, Row};

/// The text every file of form 1 begins with, without the zero byte that ends it.
pub const HEAD: &str = include_str!("head.txt");
/// What a file of any version of the form begins with.
pub const MAGIC: &[u8] = b"KMR ";
/// The zstd level of files kept for long. Level 3 is some 10 times faster to write and some 15 % larger.
pub const BEST_LEVEL: i32 = 19;

/// Frame sizes that exist: from 1 KiB to 256 KiB.
const PAGE_SHIFTS: std::ops::RangeInclusive<u32> = 10..=18;

const FIELD_END: u8 = 0;
const FIELD_META: u8 = 1;
const FIELD_KIND: u8 = 2;

/// Packs `recording`, with zstd at `level` (1 to 22).
///
/// # Errors
/// zstd runs out of memory, or an id breaks the rule that allocations are numbered in row order: such a recording
/// cannot be written, and the error names the row.
pub fn write(recording: &Recording, level: i32) -> io::Result<Vec<u8>> {
    let mut out = HEAD.as_bytes().to_vec();
    out.push(0);
    let meta = serde_json::to_vec(&recording.meta)?;
    column::put(&mut out, (FIELD_META, 0), 1, meta.len() as u64, &meta, level)?;
    let kinds: Vec<u8> = recording.rows.iter().map(|row| row.kind.number()).collect();
    column::put(&mut out, (FIELD_KIND, 0), 1, kinds.len() as u64, &kinds, level)?;

    let mut columns = Writer { columns: vec![Vec::new(); COLUMNS] };
    let mut model = Model::default();
    for (index, row) in recording.rows.iter().enumerate() {
        let mut coded = *row;
        let result = model.row(&mut coded, &mut columns);
        let result = result.and_then(|()| {
            if coded == *row { row.check() } else { Err("its id is not the next one".to_owned()) }
        });
        result.map_err(|what| io::Error::other(format!("row {index}, {row:?}: {what}")))?;
    }
    if let Some(index) = model.stray_id(&recording.rows) {
        return Err(io::Error::other(format!("row {index} names an id no row gives")));
    }
    for (index, numbers) in columns.columns.iter().enumerate() {
        column::put_numbers(&mut out, ((index / 256) as u8, (index % 256) as u8), numbers, level)?;
    }
    column::put(&mut out, (FIELD_END, 0), 0, kinds.len() as u64, &[], level)?;
    Ok(out)
}

/// Reads a packed recording. `file` names it in errors.
///
/// # Errors
/// The file is of another version, damaged or cut short; the error names the byte.
pub fn read(bytes: &[u8], file: &str) -> Result<Recording, TraceError> {
    let error = |at: usize, what: &str| TraceError::new(file, Place::Byte(at as u64), what);
    let mut at = check_head(bytes, file)?;

    let mut next = |field: u8, what: &str| -> Result<Section, TraceError> {
        let (section, after) = Section::read(bytes, at, file)?;
        if (section.field, section.kind, section.width) != (field, 0, 1) {
            return Err(error(at, what));
        }
        at = after;
        Ok(section)
    };
    let meta = next(FIELD_META, "the first section is not the meta section")?;
    let kinds = next(FIELD_KIND, "the second section is not the kinds of the rows")?;
    let meta_at = meta.at;
    let meta: Meta = serde_json::from_slice(&meta.bytes).map_err(|cause| {
        error(meta_at, &format!("the meta section cannot be understood: {cause}"))
    })?;

    if !PAGE_SHIFTS.contains(&meta.page_shift) {
        return Err(error(meta_at, &format!("frames of 2^{} bytes", meta.page_shift)));
    }
    let mut reader = Reader { columns: (0..COLUMNS).map(|_| None).collect(), last_at: 0 };
    let end = loop {
        let (section, after) = Section::read(bytes, at, file)?;
        at = after;
        if section.field == FIELD_END {
            break section;
        }
        reader.add(section, kinds.values).map_err(|(at, what)| error(at, &what))?;
    };
    if at != bytes.len() {
        return Err(error(at, "bytes follow the last section"));
    }
    if end.values != kinds.values {
        return Err(error(
            end.at,
            &format!("{} rows announced, {} held", end.values, kinds.values),
        ));
    }

    let mut rows = Vec::with_capacity(kinds.bytes.len());
    let mut model = Model::default();
    for (index, number) in kinds.bytes.iter().enumerate() {
        let kind = Kind::from_number(*number).ok_or_else(|| {
            error(kinds.at, &format!("row {index}: no kind of event has the number {number}"))
        })?;
        let mut row = blank(kind);
        let result = model.row(&mut row, &mut reader).and_then(|()| row.check());
        result.map_err(|what| error(reader.last_at, &format!("row {index}: {what}")))?;
        rows.push(row);
    }
    if let Some(index) = model.stray_id(&rows) {
        return Err(error(kinds.at, &format!("row {index} names an id no row gives")));
    }
    if let Some(column) =
        reader.columns.iter().flatten().find(|column| column.next != column.numbers.len())
    {
        let left = column.numbers.len() - column.next;
        return Err(error(column.at, &format!("{left} values of this section belong to no row")));
    }
    Ok(Recording { meta, rows })
}

/// Compares the head byte for byte; returns the offset of the first section.
fn check_head(bytes: &[u8], file: &str) -> Result<usize, TraceError> {
    let error = |at: usize, what: String| TraceError::new(file, Place::Byte(at as u64), what);
    let first_line =
        |text: &[u8]| text.iter().position(|byte| *byte == b':').unwrap_or(text.len().min(16));
    let version = &HEAD.as_bytes()[..first_line(HEAD.as_bytes())];
    if !bytes.starts_with(version) {
        let found = String::from_utf8_lossy(&bytes[..first_line(bytes)]).into_owned();
        let known = String::from_utf8_lossy(version).into_owned();
        return Err(error(0, format!("this begins with {found:?}; known is {known:?}")));
    }
    let head = || HEAD.bytes().chain([0]);
    match head().zip(bytes).position(|(want, have)| want != *have) {
        Some(at) => Err(error(at, "the head's text is damaged".into())),
        None if bytes.len() <= HEAD.len() => {
            Err(error(bytes.len(), "the file ends inside its head".into()))
        }
        None => Ok(HEAD.len() + 1),
    }
}

fn blank(kind: Kind) -> Row {
    Row {
        time_ns: 0,
        address: 0,
        id: None,
        bytes_requested: 0,
        bytes_allocated: 0,
        gfp: 0,
        site: 0,
        cache: None,
        cpu: 0,
        kind,
        order: 0,
        migratetype: 0,
        backs_slab: false,
        backs_large_kmalloc: false,
    }
}

/// Fields times kinds.
const COLUMNS: usize = Field::NUMBERS * 256;

/// Where the column of a field and kind is in a table of [`COLUMNS`].
fn column_index(field: u8, kind: u8) -> usize {
    usize::from(field) * 256 + usize::from(kind)
}

/// Takes the model's numbers down, by field and kind.
struct Writer {
    columns: Vec<Vec<u64>>,
}

impl Coder for Writer {
    fn code(&mut self, kind: Kind, field: Field, value: u64) -> Result<u64, String> {
        self.columns[column_index(field as u8, kind.number())].push(value);
        Ok(value)
    }
}

/// A column on its way to the rows.
struct Column {
    numbers: Vec<u64>,
    next: usize,
    at: usize,
}

/// Gives the model the numbers of a file.
struct Reader {
    columns: Vec<Option<Column>>,
    /// Where the section last read from lies in the file, to name in errors.
    last_at: usize,
}

impl Reader {
    fn add(&mut self, section: Section, rows: u64) -> Result<(), (usize, String)> {
        let fields = Field::Cpu as u8..Field::NUMBERS as u8;
        if !fields.contains(&section.field)
            || Kind::from_number(section.kind).is_none()
            || section.values > rows
        {
            let (field, kind, values) = (section.field, section.kind, section.values);
            return Err((
                section.at,
                format!("field {field} of kind {kind} with {values} values, in {rows} rows"),
            ));
        }
        let column = Column { numbers: section.numbers(), next: 0, at: section.at };
        match self.columns[column_index(section.field, section.kind)].replace(column) {
            None => Ok(()),
            Some(_) => Err((
                section.at,
                format!("a second section of field {}, kind {}", section.field, section.kind),
            )),
        }
    }
}

impl Coder for Reader {
    fn code(&mut self, kind: Kind, field: Field, _: u64) -> Result<u64, String> {
        let Some(column) = &mut self.columns[column_index(field as u8, kind.number())] else {
            return Ok(0);
        };
        self.last_at = column.at;
        let number = column.numbers.get(column.next).copied();
        column.next += 1;
        number.ok_or_else(|| format!("the section of field {} ends too early", field as u8))
    }
}
