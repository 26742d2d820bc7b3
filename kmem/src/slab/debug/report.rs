//! What a report says about an object beyond what is wrong with it.

use super::areas::{Bytes, Track, Use};
use crate::{error::Name, sites::Sites, types::Pfn};
use core::fmt::{self, Write};

/// Bytes of a line, and lines before and behind the one with the byte in question.
const LINE: i32 = 16;
const BEFORE: i32 = 1;
const BEHIND: i32 = 2;

/// An object's story. Its lines each begin with a line break: they follow the line that says what is wrong.
pub(super) struct Story<'a> {
    pub(super) cache: Name,
    pub(super) addr: usize,
    pub(super) size: u32,
    /// First frame of its slab, objects of that, and how many of them are free.
    pub(super) slab: (Pfn, u32, u32),
    pub(super) bytes: Bytes<'a>,
    pub(super) sites: Option<&'static Sites>,
    /// The byte in question.
    pub(super) offset: Option<i32>,
}

impl Story<'_> {
    fn user(&self, f: &mut fmt::Formatter<'_>, what: &str, track: Option<Track>) -> fmt::Result {
        let Some(Track { site, cpu, when }) = track else { return Ok(()) };
        write!(f, "\n  {what} ")?;
        match self.sites.and_then(|sites| sites.place(site)) {
            Some(at) => write!(f, "at {}:{}:{}", at.file(), at.line(), at.column())?,
            None => f.write_str("somewhere")?,
        }
        match cpu {
            super::NO_CPU => f.write_str(", on no CPU")?,
            cpu => write!(f, ", on CPU {cpu}")?,
        }
        write!(f, ", at {}.{:06} s", when / 1_000_000_000, when / 1000 % 1_000_000)
    }

    fn line(&self, f: &mut fmt::Formatter<'_>, start: i32) -> fmt::Result {
        let sign = if start < 0 { '-' } else { '+' };
        write!(f, "\n  {sign}{:#06x}:", start.unsigned_abs())?;
        let bytes = || (start..start + LINE).map(|i| self.bytes.get(i));
        for byte in bytes() {
            match byte {
                Some(byte) => write!(f, " {byte:02x}")?,
                None => f.write_str("   ")?,
            }
        }
        f.write_str("  ")?;
        for byte in bytes() {
            f.write_char(match byte {
                Some(byte @ b' '..0x7f) => char::from(byte),
                Some(_) => '.',
                None => ' ',
            })?;
        }
        Ok(())
    }
}

impl fmt::Display for Story<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (pfn, nr, free) = self.slab;
        write!(f, "\n  object {:#x} of {} ({} bytes), ", self.addr, self.cache, self.size)?;
        write!(f, "slab pfn:{pfn} with {free} of {nr} objects free")?;
        self.user(f, "allocated", self.bytes.track(Use::Alloc))?;
        self.user(f, "freed", self.bytes.track(Use::Free))?;
        let Some(offset) = self.offset else { return Ok(()) };
        let reach = self.bytes.reach();
        let middle = offset.div_euclid(LINE);
        for line in middle - BEFORE..=middle + BEHIND {
            let start = line * LINE;
            if start + LINE > reach.start && start < reach.end {
                self.line(f, start)?;
            }
        }
        Ok(())
    }
}
