//! What the loader hands over: the PVH start info and the firmware's memory map.
//!
//! Nothing in it is believed before it was checked: the magic number, the version, the addresses (the
//! identity map reaches 4 GiB), the number of entries, and every entry for wrap-around. An error
//! names the entry and its address; no entry is dropped without a word.

use core::{fmt, ops::Range, ptr};

const MAGIC: u32 = 0x336e_c578;
const START_INFO_BYTES: u64 = 56;
const ENTRY_BYTES: u64 = 24;
/// What the boot page tables map.
const MAPPED: u64 = 1 << 32;
/// Firmware maps have a dozen entries; more than this is a broken map.
const MAX_REGIONS: usize = 64;
const MAX_COMMAND_LINE: usize = 1024;

/// Type number of usable memory.
const RAM: u32 = 1;

/// One line of the firmware's map.
#[derive(Clone, Copy, Default)]
pub struct Region {
    /// First byte.
    pub base: u64,
    /// Bytes; never zero, and `base + size` does not wrap.
    pub size: u64,
    /// The firmware's type number (E820).
    pub kind: u32,
}

impl Region {
    /// Whether the region is usable memory.
    pub fn is_ram(&self) -> bool {
        self.kind == RAM
    }

    /// One past the last byte.
    pub fn end(&self) -> u64 {
        self.base + self.size
    }
}

impl fmt::Display for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            RAM => "usable",
            2 => "reserved",
            3 => "ACPI data",
            4 => "ACPI NVS",
            5 => "unusable",
            _ => "other",
        };
        write!(f, "[mem {:#018x}-{:#018x}] {kind}", self.base, self.end() - 1)
    }
}

/// Why the loader's data was refused.
#[derive(Debug)]
pub enum PvhError {
    /// The first word is not the PVH magic number.
    Magic(u32),
    /// Version 0 has no memory map.
    Version(u32),
    /// Something lies where the boot page tables do not reach.
    Unmapped(&'static str, u64),
    /// The map is empty or longer than any firmware's.
    Entries(u32),
    /// Entry number, base, size: it runs past the end of the address space.
    Wraps(usize, u64, u64),
}

impl fmt::Display for PvhError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PvhError::Magic(m) => write!(f, "start info: magic {m:#x}, not {MAGIC:#x}"),
            PvhError::Version(v) => write!(f, "start info: version {v} has no memory map"),
            PvhError::Unmapped(what, at) => write!(f, "{what} at {at:#x} is not below 4 GiB"),
            PvhError::Entries(n) => {
                write!(f, "memory map: {n} entries, not 1 to {MAX_REGIONS}")
            }
            PvhError::Wraps(i, base, size) => write!(
                f,
                "memory map: entry {i}: {base:#x} + {size:#x} runs past the address space"
            ),
        }
    }
}

/// The start info, checked and copied.
pub struct BootInfo {
    regions: [Region; MAX_REGIONS],
    len: usize,
    command_line: Option<&'static str>,
    own: [Range<u64>; 3],
}

impl BootInfo {
    /// Reads the start info at `address`.
    ///
    /// # Safety
    /// `address` is what the loader passed, the first 4 GiB are mapped to themselves, and what the
    /// loader left in memory is still there and stays for the command line's sake.
    pub unsafe fn read(address: u64) -> Result<BootInfo, PvhError> {
        check("start info", address, START_INFO_BYTES)?;
        // SAFETY: `check` saw to it that each field below is in the identity map; the fields are the
        // PVH interface's, at their offsets.
        let field32 = |offset: u64| unsafe { load::<u32>(address + offset) };
        // SAFETY: as above.
        let field64 = |offset: u64| unsafe { load::<u64>(address + offset) };
        match (field32(0), field32(4)) {
            (MAGIC, 0) => return Err(PvhError::Version(0)),
            (MAGIC, _) => {}
            (other, _) => return Err(PvhError::Magic(other)),
        }
        let (map, entries) = (field64(40), field32(48));
        if entries == 0 || entries as usize > MAX_REGIONS {
            return Err(PvhError::Entries(entries));
        }
        let map_bytes = u64::from(entries) * ENTRY_BYTES;
        check("memory map", map, map_bytes)?;
        let mut info = BootInfo {
            regions: [Region::default(); MAX_REGIONS],
            len: 0,
            command_line: None,
            own: [address..address + START_INFO_BYTES, map..map + map_bytes, 0..0],
        };
        for i in 0..entries as usize {
            let at = map + i as u64 * ENTRY_BYTES;
            // SAFETY: `check` covered the whole table.
            let (base, size, kind) =
                unsafe { (load::<u64>(at), load::<u64>(at + 8), load::<u32>(at + 16)) };
            if base.checked_add(size).is_none() {
                return Err(PvhError::Wraps(i, base, size));
            }
            if size > 0 {
                info.regions[info.len] = Region { base, size, kind };
                info.len += 1;
            }
        }
        let line = field64(24);
        if line != 0 {
            check("command line", line, MAX_COMMAND_LINE as u64)?;
            // SAFETY: mapped, by `check`, and left alone, by this function's contract.
            let bytes = unsafe {
                core::slice::from_raw_parts(
                    ptr::with_exposed_provenance::<u8>(line as usize),
                    MAX_COMMAND_LINE,
                )
            };
            let text = bytes.split(|&b| b == 0).next().unwrap_or_default();
            info.command_line = core::str::from_utf8(text).ok();
            info.own[2] = line..line + text.len() as u64 + 1;
        }
        Ok(info)
    }

    /// The firmware's map, in its own order.
    pub fn regions(&self) -> &[Region] {
        &self.regions[..self.len]
    }

    /// The value of `name=value` on the command line, as a number.
    pub fn option(&self, name: &str) -> Option<u64> {
        let words = self.command_line?.split_ascii_whitespace();
        words.filter_map(|w| w.split_once('=')).find(|(n, _)| *n == name)?.1.parse().ok()
    }

    /// The byte ranges the loader's own data occupies.
    pub fn own_ranges(&self) -> impl Iterator<Item = Range<u64>> {
        self.own.iter().filter(|r| !r.is_empty()).cloned()
    }
}

/// Whether `bytes` from `at` are mapped and not at address zero.
fn check(what: &'static str, at: u64, bytes: u64) -> Result<(), PvhError> {
    if at != 0 && at.checked_add(bytes).is_some_and(|end| end <= MAPPED) {
        Ok(())
    } else {
        Err(PvhError::Unmapped(what, at))
    }
}

/// # Safety
/// A `T` of plain integers can be read at physical address `at`, which is mapped to itself.
unsafe fn load<T: Copy>(at: u64) -> T {
    // SAFETY: by contract; unaligned, as nothing promises alignment.
    unsafe { ptr::with_exposed_provenance::<T>(at as usize).read_unaligned() }
}
