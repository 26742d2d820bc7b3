//! The `KMT1` row form: what the recorder in the kernel wrote.
//!
//! A 32-byte header and 32-byte rows, little endian, usually packed with zstd, with string tables in a JSON file
//! beside it:
//!
//! ```text
//! header   0  "KMT1\0\0\0\0"        8  u32 bytes of a row, 32   12  u32 version, 1   16  u64 rows   24  u64 ids
//! row      0  u32 ns since the previous row    4 u8 kind   5 u8 CPU   6 u8 order   7 u8 mobility and flags
//!          8  u32 address   12  u32 id   16  u32 bytes requested   20  u32 bytes allocated   24  u32 gfp
//!         28  u16 call site   30  u16 cache
//! ```
//!
//! Addresses are scaled to fit 32 bits: slab objects in units of 8 bytes from the direct map's base, vmap areas in
//! frames from the vmalloc base; a [`Row`] holds the address itself.
//!
//! Every field with a limited range is checked against it, the row count against the header's, and the ids: each
//! allocation must bear the next number, and no free may name a number the header says was never given. Whether
//! what a free names is still live is a question about the recorded machine, not about the file, and left to the
//! reader of the events.

use std::collections::BTreeMap;
use std::io::Read;

use serde::Deserialize;

use crate::error::{Place, TraceError};
use crate::meta::{CacheShape, Meta};
use crate::recording::Recording;
use crate::row::{Kind, Row};

/// First bytes of the unpacked form.
pub const MAGIC: &[u8] = b"KMT1\0\0\0\0";
/// The version of the form this module reads.
pub const VERSION: u32 = 1;
/// Where the direct map begins on x86-64: what slab addresses count from.
pub const DIRECT_MAP_BASE: u64 = 0xffff_8880_0000_0000;
/// Where the vmalloc area begins on x86-64: what vmap addresses count from.
pub const VMALLOC_BASE: u64 = 0xffff_c900_0000_0000;

const HEADER_BYTES: usize = 32;
const ROW_BYTES: usize = 32;
const NO_ID: u32 = u32::MAX;
const NO_CACHE: u16 = u16::MAX;
const MIGRATETYPE_MASK: u8 = 0x0f;
const BACKS_SLAB: u8 = 0x10;
const BACKS_LARGE_KMALLOC: u8 = 0x20;
/// Mobility types Linux has at most: unmovable, movable, reclaimable, highatomic, CMA, isolate.
const MIGRATETYPES: u8 = 6;

/// Reads a `KMT1` stream, packed or not, into a recording described by `meta`. `file` names it in errors.
///
/// # Errors
/// See the module: the error names the byte of the file, or of the unpacked stream.
pub fn read(bytes: &[u8], file: &str, meta: Meta) -> Result<Recording, TraceError> {
    if bytes.starts_with(MAGIC) {
        return Reader { file, packed: false }.read(bytes, meta);
    }
    let reader = Reader { file, packed: true };
    let mut rows = Vec::new();
    let unpacked = zstd::Decoder::with_buffer(bytes).and_then(|mut decoder| {
        decoder.by_ref().take(HEADER_BYTES as u64).read_to_end(&mut rows)?;
        // No more is unpacked than the header announces and a byte, lest a small file fill all memory.
        let announced = if rows.len() == HEADER_BYTES { u64_at(&rows, 16) } else { 0 };
        decoder
            .take(announced.saturating_mul(ROW_BYTES as u64).saturating_add(1))
            .read_to_end(&mut rows)
    });
    match unpacked {
        Ok(_) => reader.read(&rows, meta),
        Err(error) => {
            Err(reader
                .error(rows.len(), format!("the zstd stream is damaged or cut short: {error}")))
        }
    }
}

struct Reader<'a> {
    file: &'a str,
    packed: bool,
}

impl Reader<'_> {
    fn error(&self, at: usize, what: impl Into<String>) -> TraceError {
        let at = at as u64;
        TraceError::new(
            self.file,
            if self.packed { Place::UnpackedByte(at) } else { Place::Byte(at) },
            what,
        )
    }

    fn read(&self, bytes: &[u8], mut meta: Meta) -> Result<Recording, TraceError> {
        if !bytes.starts_with(MAGIC) {
            return Err(self.error(0, "the stream does not begin with KMT1"));
        }
        if bytes.len() < HEADER_BYTES {
            return Err(self.error(bytes.len(), "the stream ends inside its 32-byte header"));
        }
        let row_bytes = u32_at(bytes, 8);
        if row_bytes as usize != ROW_BYTES {
            return Err(self.error(
                8,
                format!("rows of {row_bytes} bytes; this form has rows of {ROW_BYTES}"),
            ));
        }
        let version = u32_at(bytes, 12);
        if version != VERSION {
            return Err(self
                .error(12, format!("version {version} of the form; known is version {VERSION}")));
        }
        let (rows, ids) = (u64_at(bytes, 16), u64_at(bytes, 24));
        let body = &bytes[HEADER_BYTES..];
        let whole = body.len() / ROW_BYTES;
        if rows != whole as u64 || !body.len().is_multiple_of(ROW_BYTES) {
            let at = if rows < whole as u64 {
                HEADER_BYTES + rows as usize * ROW_BYTES
            } else {
                bytes.len()
            };
            return Err(self.error(
                at,
                format!("the header announces {rows} rows, the stream holds {whole}{}", {
                    let rest = body.len() % ROW_BYTES;
                    if rest == 0 { String::new() } else { format!(" and {rest} bytes of another") }
                }),
            ));
        }
        self.check_counts(&meta, rows, ids)?;

        let mut recording = Vec::with_capacity(whole);
        let mut state = State {
            time_ns: 0,
            next_id: 0,
            ids,
            sites: meta.sites.len(),
            tables: meta.counts.contains_key("rows"),
        };
        for (index, bytes) in body.chunks_exact(ROW_BYTES).enumerate() {
            let row = self.row(bytes, HEADER_BYTES + index * ROW_BYTES, &mut state)?;
            recording.push(row);
        }
        if state.next_id != ids {
            let what = format!("the header announces {ids} ids, the rows give {}", state.next_id);
            return Err(self.error(24, what));
        }
        meta.count_cpus(&recording);
        Ok(Recording { meta, rows: recording })
    }

    /// The JSON beside the rows tells their number too; a pair that does not belong together shows here.
    fn check_counts(&self, meta: &Meta, rows: u64, ids: u64) -> Result<(), TraceError> {
        for (name, at, have) in [("rows", 16, rows), ("ids", 24, ids)] {
            if let Some(told) = meta.counts.get(name).and_then(serde_json::Value::as_u64)
                && told != have
            {
                let what = format!(
                    "the header announces {have} {name}, the JSON beside it {told}: not of one recording"
                );
                return Err(self.error(at, what));
            }
        }
        Ok(())
    }

    fn row(&self, bytes: &[u8], at: usize, state: &mut State) -> Result<Row, TraceError> {
        let kind = Kind::from_number(bytes[4]).ok_or_else(|| {
            self.error(at + 4, format!("no kind of event has the number {}", bytes[4]))
        })?;
        let (order, raw) = (bytes[6], u32_at(bytes, 8));
        let flags = bytes[7] & !MIGRATETYPE_MASK;
        if flags & !(BACKS_SLAB | BACKS_LARGE_KMALLOC) != 0
            || bytes[7] & MIGRATETYPE_MASK >= MIGRATETYPES
        {
            return Err(self.error(
                at + 7,
                format!("no mobility type and flags are written {:#04x}", bytes[7]),
            ));
        }
        let id = self.id(kind, u32_at(bytes, 12), u32_at(bytes, 16), at, state)?;
        let site = u16_at(bytes, 28);
        if state.tables && usize::from(site) >= state.sites {
            return Err(
                self.error(at + 28, format!("call site {site} of {} known ones", state.sites))
            );
        }
        state.time_ns += u64::from(u32_at(bytes, 0));
        let cache = u16_at(bytes, 30);
        let row = Row {
            time_ns: state.time_ns,
            address: if kind.is_slab() {
                DIRECT_MAP_BASE + u64::from(raw) * 8
            } else if kind.is_vmap() {
                VMALLOC_BASE + (u64::from(raw) << 12)
            } else {
                u64::from(raw)
            },
            id,
            bytes_requested: u32_at(bytes, 16),
            bytes_allocated: u32_at(bytes, 20),
            gfp: u32_at(bytes, 24),
            site,
            cache: (cache != NO_CACHE).then_some(cache),
            cpu: u16::from(bytes[5]),
            kind,
            order,
            migratetype: bytes[7] & MIGRATETYPE_MASK,
            backs_slab: flags & BACKS_SLAB != 0,
            backs_large_kmalloc: flags & BACKS_LARGE_KMALLOC != 0,
        };
        row.check().map_err(|what| self.error(at, what))?;
        Ok(row)
    }

    fn id(
        &self,
        kind: Kind,
        id: u32,
        child: u32,
        at: usize,
        state: &mut State,
    ) -> Result<Option<u32>, TraceError> {
        if kind.gives_id() {
            if u64::from(id) != state.next_id {
                let what =
                    format!("an allocation bears id {id}; the next in order is {}", state.next_id);
                return Err(self.error(at + 12, what));
            }
            state.next_id += 1;
            return Ok(Some(id));
        }
        if kind == Kind::Split {
            if u64::from(child) != state.next_id {
                let what = format!(
                    "a split's first half bears id {child}; the next in order is {}",
                    state.next_id
                );
                return Err(self.error(at + 16, what));
            }
            state.next_id += 2;
        }
        if id == NO_ID {
            return Ok(None);
        }
        if !kind.ends_id() {
            return Err(
                self.error(at + 12, format!("id {id} on an event that concerns no allocation"))
            );
        }
        if u64::from(id) >= state.ids {
            return Err(self.error(
                at + 12,
                format!("a free of id {id}; the header announces {} ids", state.ids),
            ));
        }
        Ok(Some(id))
    }
}

struct State {
    time_ns: u64,
    next_id: u64,
    ids: u64,
    sites: usize,
    tables: bool,
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

/// Name, object size, size, alignment, flags in hexadecimal, constructor, objects per slab, order.
type CacheFields = (String, u32, u32, u32, String, u8, u32, u8);

/// The part of the JSON that has a fixed form; the rest are counts and notes.
#[derive(Deserialize)]
struct Tables {
    #[serde(default)]
    caches: BTreeMap<u16, CacheFields>,
    #[serde(default)]
    sites: Vec<String>,
    #[serde(default)]
    stacks: BTreeMap<u32, String>,
    #[serde(default)]
    lost: u64,
    #[serde(flatten)]
    counts: BTreeMap<String, serde_json::Value>,
}

/// Reads the JSON tables beside a stream of rows into `meta`.
///
/// # Errors
/// The JSON is malformed (the error names the line) or a cache's flags are no hexadecimal number.
pub fn read_tables(json: &[u8], file: &str, meta: &mut Meta) -> Result<(), TraceError> {
    let tables: Tables = serde_json::from_slice(json).map_err(|error| {
        TraceError::line(file, error.line().max(1), format!("the tables cannot be read: {error}"))
    })?;
    for (key, (name, object_size, size, align, flags, constructor, objects_per_slab, order)) in
        tables.caches
    {
        let flags = flags.strip_prefix("0x").and_then(|hex| u64::from_str_radix(hex, 16).ok());
        let flags = flags.ok_or_else(|| {
            TraceError::file(
                file,
                format!("cache {key} ({name}): its flags are no hexadecimal number"),
            )
        })?;
        let constructor = constructor != 0;
        let shape = CacheShape {
            name,
            object_size,
            size,
            align,
            flags,
            constructor,
            objects_per_slab,
            order,
        };
        meta.caches.insert(key, shape);
    }
    meta.sites = tables.sites;
    meta.stacks = tables.stacks;
    meta.lost = tables.lost;
    meta.counts = tables.counts;
    Ok(())
}
