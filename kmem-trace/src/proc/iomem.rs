//! `/proc/iomem`: what lies where in the physical address space.
//!
//! One range a line, `first-last : name` in hexadecimal, indented below the range it is part of. RAM is `System RAM`;
//! the kernel's own image is named inside it. To anybody but root the kernel shows all addresses as zero, which is an
//! error here: it would make a machine without memory.

use std::ops::Range;

use super::{Line, empty};
use crate::error::TraceError;

/// One range of the physical address space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resource {
    /// First byte.
    pub first: u64,
    /// Last byte, included.
    pub last: u64,
    /// How deep it is nested, 0 at the top.
    pub depth: usize,
    /// What it is.
    pub name: String,
}

/// A whole `/proc/iomem`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Iomem {
    /// All ranges, in the text's order.
    pub resources: Vec<Resource>,
}

/// The parts of the kernel's image.
const KERNEL: [&str; 4] = ["Kernel code", "Kernel rodata", "Kernel data", "Kernel bss"];

impl Iomem {
    /// Parses `text`, which errors call `file`.
    ///
    /// # Errors
    /// A line that is no range and name, a range that ends before it begins, addresses hidden from the reader, or an
    /// empty text.
    pub fn parse(text: &str, file: &str) -> Result<Self, TraceError> {
        let mut resources = Vec::new();
        for line in Line::all(text, file) {
            let indent = line.text.len() - line.text.trim_start().len();
            let parts = line
                .text
                .split_once(" : ")
                .and_then(|(range, name)| Some((range.trim().split_once('-')?, name)));
            let ((first, last), name) =
                parts.ok_or_else(|| line.error("this is no range with a name"))?;
            let number = |text| {
                u64::from_str_radix(text, 16)
                    .map_err(|_| line.error(format!("{text:?} is not a hexadecimal address")))
            };
            let (first, last) = (number(first)?, number(last)?);
            if last < first {
                return Err(line.error("the range ends before it begins"));
            }
            resources.push(Resource {
                first,
                last,
                depth: indent / 2,
                name: name.trim().to_owned(),
            });
        }
        if resources.is_empty() {
            return Err(empty(file));
        }
        if resources.iter().all(|resource| resource.last == 0) {
            return Err(TraceError::line(
                file,
                1,
                "all addresses are zero: the text was not read as root",
            ));
        }
        Ok(Iomem { resources })
    }

    /// The whole frames of `1 << page_shift` bytes inside RAM, as ascending pfn ranges.
    pub fn ram(&self, page_shift: u32) -> Vec<Range<u64>> {
        let ram = self.resources.iter().filter(|resource| resource.name == "System RAM");
        // Whole frames only: the first byte rounds up, the end down.
        let frames = ram.map(|ram| {
            (ram.first.div_ceil(1 << page_shift), (u128::from(ram.last) + 1) >> page_shift)
        });
        sorted(frames.map(|(first, end)| first..u64::try_from(end).unwrap_or(u64::MAX)).collect())
    }

    /// The frames the kernel's image touches, as ascending pfn ranges.
    pub fn kernel(&self, page_shift: u32) -> Vec<Range<u64>> {
        let kernel =
            self.resources.iter().filter(|resource| KERNEL.contains(&resource.name.as_str()));
        sorted(kernel.map(|part| part.first >> page_shift..(part.last >> page_shift) + 1).collect())
    }
}

/// Sorts ranges, joins those that touch, drops empty ones.
fn sorted(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.retain(|range| !range.is_empty());
    ranges.sort_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}
