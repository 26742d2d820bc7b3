//! One section: a column of numbers, split into byte planes, packed, and guarded by two checksums.
//!
//! The header is checked before its lengths are believed, the packed bytes before they are unpacked, and unpacking
//! stops at the length the header promised, so that no damage is read as data and none makes the reader allocate
//! more than the file can justify. Planes (all lowest bytes, then all second bytes) suit the data: what varies
//! wildly sits in the lowest byte and does not disturb the packing of the others.

use std::io::{self, Read};

use crate::error::{Place, TraceError};

/// Bytes of a section's header.
pub(super) const HEADER_BYTES: usize = 28;

/// A section as found in a file: unpacked, and where it began.
pub(super) struct Section {
    pub field: u8,
    pub kind: u8,
    pub width: u8,
    pub values: u64,
    pub bytes: Vec<u8>,
    /// Offset of the header in the file.
    pub at: usize,
}

/// Appends a section holding `bytes`, `values` values of `width` bytes each.
pub(super) fn put(
    out: &mut Vec<u8>,
    tag: (u8, u8),
    width: u8,
    values: u64,
    bytes: &[u8],
    level: i32,
) -> io::Result<()> {
    let packed = if bytes.is_empty() { Vec::new() } else { zstd::bulk::compress(bytes, level)? };
    let mut header = Vec::with_capacity(HEADER_BYTES);
    header.extend([tag.0, tag.1, width, 0]);
    header.extend(crc32fast::hash(&packed).to_le_bytes());
    header.extend(values.to_le_bytes());
    header.extend((packed.len() as u64).to_le_bytes());
    header.extend(crc32fast::hash(&header).to_le_bytes());
    out.extend(header);
    out.extend(packed);
    Ok(())
}

/// Appends a column of numbers as a section; nothing, if all are zero.
pub(super) fn put_numbers(
    out: &mut Vec<u8>,
    tag: (u8, u8),
    numbers: &[u64],
    level: i32,
) -> io::Result<()> {
    let widest = numbers.iter().fold(0, |all, number| all | number);
    let width = (8 - widest.leading_zeros() / 8) as u8;
    if width == 0 {
        return Ok(());
    }
    let planes = (0..width)
        .flat_map(|plane| numbers.iter().map(move |number| (number >> (8 * plane)) as u8));
    put(out, tag, width, numbers.len() as u64, &planes.collect::<Vec<u8>>(), level)
}

impl Section {
    /// Reads the section at offset `at` of `file_bytes` and returns it with the offset after it.
    pub(super) fn read(
        file_bytes: &[u8],
        at: usize,
        file: &str,
    ) -> Result<(Section, usize), TraceError> {
        let error = |at: usize, what: String| TraceError::new(file, Place::Byte(at as u64), what);
        let rest = &file_bytes[at..];
        let Some((header, rest)) = rest.split_at_checked(HEADER_BYTES) else {
            return Err(error(
                file_bytes.len(),
                format!("the file ends inside the section header at byte {at}"),
            ));
        };
        let number = |from: usize| {
            header[from..from + 8]
                .iter()
                .rev()
                .fold(0u64, |number, byte| number << 8 | u64::from(*byte))
        };
        let crc = |from: usize| number(from - 4) >> 32;
        if u64::from(crc32fast::hash(&header[..24])) != crc(24) {
            return Err(error(
                at,
                "this section's header is damaged: its checksum does not match".into(),
            ));
        }
        let (field, kind, width) = (header[0], header[1], header[2]);
        let (values, packed_bytes) = (number(8), number(16));
        if width > 8 || header[3] != 0 {
            return Err(error(at + 2, format!("a section of {width}-byte values")));
        }
        let body = at + HEADER_BYTES;
        let Some(packed) = usize::try_from(packed_bytes).ok().and_then(|bytes| rest.get(..bytes))
        else {
            let what = format!(
                "the file ends inside the {packed_bytes} packed bytes of the section at byte {at}"
            );
            return Err(error(file_bytes.len(), what));
        };
        if u64::from(crc32fast::hash(packed)) != crc(4) {
            let what = format!(
                "the {packed_bytes} packed bytes from here are damaged: their checksum does not match"
            );
            return Err(error(body, what));
        }
        let whole = u64::from(width).checked_mul(values).ok_or_else(|| {
            error(at + 8, format!("a section of {values} values of {width} bytes"))
        })?;
        let mut bytes = Vec::new();
        if !packed.is_empty() {
            zstd::Decoder::with_buffer(packed)
                .and_then(|decoder| decoder.take(whole.saturating_add(1)).read_to_end(&mut bytes))
                .map_err(|cause| error(body, format!("the packed bytes do not unpack: {cause}")))?;
        }
        if bytes.len() as u64 != whole {
            let what =
                format!("the packed bytes unpack to {} bytes or more, not {whole}", bytes.len());
            return Err(error(body, what));
        }
        Ok((Section { field, kind, width, values, bytes, at }, body + packed.len()))
    }

    /// The numbers of a column. The caller has bounded [`Section::values`] where the width is 0.
    pub(super) fn numbers(&self) -> Vec<u64> {
        let values = self.values as usize;
        let mut numbers = vec![0u64; values];
        for plane in 0..usize::from(self.width) {
            let bytes = &self.bytes[plane * values..(plane + 1) * values];
            for (number, byte) in numbers.iter_mut().zip(bytes) {
                *number |= u64::from(*byte) << (8 * plane);
            }
        }
        numbers
    }
}
