//! A mask as text, the way the kernel prints it, and back \[G5\].
//!
//! # Implementation
//! One table of names, largest sums first. Printing takes every name whose bits are all present and
//! not yet printed; what no name covers is printed in hexadecimal. Parsing accepts any name of the
//! table (the textbook's too), joined by `|`, and hexadecimal numbers.

use super::Gfp;
use core::{fmt, str::FromStr};

/// Names in printing order.
const NAMES: &[(&str, Gfp)] = &[
    ("GFP_TRANSHUGE", Gfp::TRANSHUGE),
    ("GFP_TRANSHUGE_LIGHT", Gfp::TRANSHUGE_LIGHT),
    ("GFP_HIGHUSER_MOVABLE", Gfp::HIGHUSER_MOVABLE),
    ("GFP_HIGHUSER", Gfp::HIGHUSER),
    ("GFP_USER", Gfp::USER),
    ("GFP_KERNEL_ACCOUNT", Gfp::KERNEL_ACCOUNT),
    ("GFP_KERNEL", Gfp::KERNEL),
    ("GFP_NOFS", Gfp::NOFS),
    ("GFP_ATOMIC", Gfp::ATOMIC),
    ("GFP_NOIO", Gfp::NOIO),
    ("GFP_NOWAIT", Gfp::NOWAIT),
    ("GFP_DMA", Gfp::DMA),
    ("GFP_DMA32", Gfp::DMA32),
    ("__GFP_RECLAIM", Gfp::RECLAIM),
    ("__GFP_HIGHMEM", Gfp::HIGHMEM),
    ("__GFP_MOVABLE", Gfp::MOVABLE),
    ("__GFP_RECLAIMABLE", Gfp::RECLAIMABLE),
    ("__GFP_HIGH", Gfp::HIGH),
    ("__GFP_IO", Gfp::IO),
    ("__GFP_FS", Gfp::FS),
    ("__GFP_ZERO", Gfp::ZERO),
    ("__GFP_DIRECT_RECLAIM", Gfp::DIRECT_RECLAIM),
    ("__GFP_KSWAPD_RECLAIM", Gfp::KSWAPD_RECLAIM),
    ("__GFP_WRITE", Gfp::WRITE),
    ("__GFP_NOWARN", Gfp::NOWARN),
    ("__GFP_RETRY_MAYFAIL", Gfp::RETRY_MAYFAIL),
    ("__GFP_NOFAIL", Gfp::NOFAIL),
    ("__GFP_NORETRY", Gfp::NORETRY),
    ("__GFP_MEMALLOC", Gfp::MEMALLOC),
    ("__GFP_COMP", Gfp::COMP),
    ("__GFP_NOMEMALLOC", Gfp::NOMEMALLOC),
    ("__GFP_HARDWALL", Gfp::HARDWALL),
    ("__GFP_THISNODE", Gfp::THISNODE),
    ("__GFP_ACCOUNT", Gfp::ACCOUNT),
    ("__GFP_ZEROTAGS", Gfp::ZEROTAGS),
    ("__GFP_COLD", Gfp::COLD),
];

/// Names that parse but are never printed: single bits with a sum's name, and the textbook's.
const ALIASES: &[(&str, Gfp)] = &[
    ("__GFP_DMA", Gfp::DMA_ZONE),
    ("__GFP_DMA32", Gfp::DMA32),
    ("__GFP_WAIT", Gfp::WAIT),
    ("__GFP_REPEAT", Gfp::REPEAT),
    ("none", Gfp::empty()),
];

impl fmt::Display for Gfp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("none");
        }
        let mut left = *self;
        let mut first = true;
        for (name, bits) in NAMES {
            if left.contains(*bits) {
                if !first {
                    f.write_str("|")?;
                }
                first = false;
                f.write_str(name)?;
                left.remove(*bits);
            }
        }
        if !left.is_empty() {
            write!(f, "{}{:#x}", if first { "" } else { "|" }, left.bits())?;
        }
        Ok(())
    }
}

/// A word in a mask's text that is neither a name nor a number of known bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ParseGfpError {
    /// Byte offset of the word in the text.
    pub offset: usize,
}

impl fmt::Display for ParseGfpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "unknown GFP flag at byte {}", self.offset)
    }
}

impl core::error::Error for ParseGfpError {}

impl FromStr for Gfp {
    type Err = ParseGfpError;

    fn from_str(s: &str) -> Result<Gfp, ParseGfpError> {
        let mut mask = Gfp::empty();
        let mut offset = 0;
        for word in s.split('|') {
            let name = word.trim();
            let named = NAMES.iter().chain(ALIASES).find(|(n, _)| *n == name).map(|(_, g)| *g);
            let bits = match named {
                Some(g) => Some(g),
                None => name
                    .strip_prefix("0x")
                    .and_then(|hex| u32::from_str_radix(hex, 16).ok())
                    .and_then(Gfp::from_bits),
            };
            let blanks = word.len() - word.trim_start().len();
            mask |= bits.ok_or(ParseGfpError { offset: offset + blanks })?;
            offset += word.len() + 1;
        }
        Ok(mask)
    }
}
