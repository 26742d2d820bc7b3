//! `/proc/vmallocinfo`: the areas of the vmalloc range.
//!
//! One line for each: two addresses, which most kernels show hashed or not at all, the bytes with the guard, who asked,
//! and what the area is. Areas that were freed and not purged yet come last, as `unpurged vm_area`.

use super::{Line, empty};
use crate::error::TraceError;

/// What an area is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AreaKind {
    /// Has frames of its own.
    Vmalloc,
    /// Shows frames of somebody's.
    Vmap,
    /// Shows a device.
    Ioremap,
    /// Was freed, and waits for a purge.
    Unpurged,
    /// Something else.
    Other,
}

/// One area.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VmArea {
    /// Bytes, the guard included.
    pub bytes: u64,
    /// Frames that it is said to have; 0 if none are named.
    pub pages: u64,
    /// What it is.
    pub kind: AreaKind,
}

/// A whole `/proc/vmallocinfo`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Vmallocinfo {
    /// The areas, in the text's order.
    pub areas: Vec<VmArea>,
}

impl Vmallocinfo {
    /// Parses `text`, which errors call `file`.
    ///
    /// # Errors
    /// A line that does not begin with a range of addresses and a number of bytes, or an empty text.
    pub fn parse(text: &str, file: &str) -> Result<Self, TraceError> {
        let areas: Vec<VmArea> =
            Line::all(text, file).map(|line| area(&line)).collect::<Result<_, _>>()?;
        if areas.is_empty() { Err(empty(file)) } else { Ok(Vmallocinfo { areas }) }
    }

    /// The areas that are in use.
    pub fn in_use(&self) -> impl Iterator<Item = &VmArea> {
        self.areas.iter().filter(|area| area.kind != AreaKind::Unpurged)
    }
}

/// More bytes than any processor addresses.
const MOST_BYTES: u64 = 1 << 57;

fn area(line: &Line) -> Result<VmArea, TraceError> {
    let mut words = line.text.split_whitespace();
    let is_range = |text: &str| {
        text.split_once('-')
            .is_some_and(|(from, to)| from.starts_with("0x") && to.starts_with("0x"))
    };
    let range = words.next().filter(|range| is_range(range));
    let Some(bytes) = range.and(words.next()) else {
        return Err(line.error("this does not begin with a range of addresses and its bytes"));
    };
    let bytes = line.number(bytes)?;
    if bytes > MOST_BYTES {
        return Err(line.error(format!("{bytes} bytes are more than there are addresses")));
    }
    let (mut pages, mut kind) = (0, AreaKind::Other);
    for word in words {
        match word {
            "unpurged" => kind = AreaKind::Unpurged,
            "vmalloc" => kind = AreaKind::Vmalloc,
            "vmap" => kind = AreaKind::Vmap,
            "ioremap" => kind = AreaKind::Ioremap,
            _ => {
                if let Some(n) = word.strip_prefix("pages=") {
                    pages = line.number(n)?;
                }
            }
        }
    }
    Ok(VmArea { bytes, pages, kind })
}
