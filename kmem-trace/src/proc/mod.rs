//! The kernel's own texts about its memory: `/proc/buddyinfo`, `pagetypeinfo`, `zoneinfo`, `slabinfo`,
//! `vmallocinfo` and `iomem`.
//!
//! Each parser takes the whole text and the name it goes by in errors, checks every line, and names the first line
//! it does not understand. Lines such a file may gain with a new kernel, a counter more in `zoneinfo` for instance,
//! are recognised by their shape and passed over; a line of no known shape is an error, since what follows it could
//! belong to anything.

mod buddyinfo;
mod iomem;
mod pagetypeinfo;
mod slabinfo;
mod vmallocinfo;
mod zoneinfo;

pub use buddyinfo::{Buddyinfo, ZoneBlocks};
pub use iomem::{Iomem, Resource};
pub use pagetypeinfo::{Pagetypeinfo, TypeBlocks, TypedFree};
pub use slabinfo::{SlabCache, Slabinfo};
pub use vmallocinfo::{AreaKind, VmArea, Vmallocinfo};
pub use zoneinfo::{PageSet, Zone, Zoneinfo};

use crate::error::TraceError;

/// One line of a text, its number, and the name of the text.
#[derive(Clone, Copy)]
struct Line<'a> {
    file: &'a str,
    number: usize,
    text: &'a str,
}

impl<'a> Line<'a> {
    /// The lines of `text` that are not blank.
    fn all(text: &'a str, file: &'a str) -> impl Iterator<Item = Line<'a>> {
        let lines = text.lines().enumerate();
        lines
            .map(move |(index, text)| Line { file, number: index + 1, text })
            .filter(|line| !line.text.trim().is_empty())
    }

    fn error(&self, what: impl Into<String>) -> TraceError {
        TraceError::line(self.file, self.number, what)
    }

    fn number<T: std::str::FromStr>(&self, text: &str) -> Result<T, TraceError> {
        text.parse().map_err(|_| self.error(format!("{text:?} is not a number in range")))
    }

    /// Splits a line that begins `Node N, zone NAME` into node, zone and the rest.
    fn node_and_zone(&self) -> Result<(u32, &'a str, &'a str), TraceError> {
        let split = || {
            let (node, rest) = self.text.trim_start().strip_prefix("Node")?.split_once(',')?;
            let rest = rest.trim_start().strip_prefix("zone")?.trim_start();
            let end = rest.find([' ', ',']).unwrap_or(rest.len());
            Some((node.trim(), &rest[..end], &rest[end..]))
        };
        let (node, zone, rest) =
            split().ok_or_else(|| self.error("this does not begin with a node and a zone"))?;
        if zone.is_empty() {
            return Err(self.error("the zone has no name"));
        }
        Ok((self.number(node)?, zone, rest))
    }

    fn numbers<T: std::str::FromStr>(&self, text: &str) -> Result<Vec<T>, TraceError> {
        text.split_whitespace().map(|word| self.number(word)).collect()
    }
}

/// The error for a text that ends before it said anything.
fn empty(file: &str) -> TraceError {
    TraceError::line(file, 1, "the text is empty")
}
