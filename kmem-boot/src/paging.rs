//! The direct map, physical memory at its own address, and sparse tables.
//!
//! # Concepts
//! `boot.s` maps 4 GiB with 2 MiB pages. Where the firmware's map shows memory beyond, more page
//! directories are added here, one for each GiB, up to the 512 GiB that the first top-level entry
//! holds. The second top-level entry holds tables that are indexed by frame number and have holes
//! where memory has: address space for all of a table, frames for the parts in use, and one frame of
//! zeros, mapped read-only all over the rest \[F5\]. The third is vmalloc's, and changes while the machine runs
//! (`vmalloc`).
//!
//! # Locking
//! None: everything here happens before interrupts are on, on the only CPU.

use core::{
    ops::Range,
    ptr::{self, NonNull},
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};
use kmem::memblock::{Memblock, Request};
use x86_64::instructions::tlb;

pub(crate) const FRAME: u64 = 4096;
const LARGE_PAGE: u64 = 2 << 20;
const DIRECTORY_SPAN: u64 = 1 << 30;
pub(crate) const ENTRIES: u64 = 512;

pub(crate) const PRESENT: u64 = 1;
pub(crate) const WRITABLE: u64 = 1 << 1;
pub(crate) const WRITE_THROUGH: u64 = 1 << 3;
pub(crate) const NO_CACHE: u64 = 1 << 4;
pub(crate) const LARGE: u64 = 1 << 7;
pub(crate) const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// What `boot.s` maps.
const BOOT_SPAN: u64 = 4 << 30;
/// What a top-level entry maps.
pub(crate) const TOP_SPAN: u64 = ENTRIES * DIRECTORY_SPAN;

/// Where the next sparse table goes.
static NEXT_SPARSE: AtomicU64 = AtomicU64::new(TOP_SPAN);

unsafe extern "C" {
    static mut boot_pml4: [u64; ENTRIES as usize];
    static mut boot_pdpt: [u64; ENTRIES as usize];
    static mut boot_pd: [u64; 4 * ENTRIES as usize];
}

/// Entry `index` of the page table at physical address `table`.
pub(crate) fn entry(table: u64, index: u64) -> *mut u64 {
    ptr::with_exposed_provenance_mut::<u64>(table as usize).wrapping_add((index % ENTRIES) as usize)
}

/// The top-level page table.
pub(crate) fn top_table() -> u64 {
    (&raw const boot_pml4).addr() as u64
}

/// A zero-filled frame that every stage of the map reaches, for a page table.
fn new_table(boot: &mut Memblock) -> Option<u64> {
    let request = Request::new(FRAME).align(FRAME).range(FRAME..BOOT_SPAN);
    let table = boot.alloc(request).ok()?;
    // SAFETY: just allocated, and mapped since boot.s.
    unsafe { entry(table, 0).cast::<u8>().write_bytes(0, FRAME as usize) };
    Some(table)
}

/// The table that entry `index` of `table` leads to, made if there is none.
fn next_table(boot: &mut Memblock, table: u64, index: u64) -> Option<u64> {
    let entry = entry(table, index);
    // SAFETY: `table` is a page table in mapped memory; nobody else changes it.
    unsafe {
        if entry.read_volatile() & PRESENT == 0 {
            entry.write_volatile(new_table(boot)? | PRESENT | WRITABLE);
        }
        Some(entry.read_volatile() & ADDRESS)
    }
}

/// Maps everything below `end` to itself, at most 512 GiB, and returns where the map ends: earlier if
/// there are no frames for page tables.
pub fn extend(boot: &mut Memblock, end: u64) -> u64 {
    let end = end.min(TOP_SPAN);
    let top = (&raw const boot_pdpt).addr() as u64;
    let mut mapped = BOOT_SPAN;
    while mapped < end {
        let Some(directory) = next_table(boot, top, mapped / DIRECTORY_SPAN) else { break };
        for i in 0..ENTRIES {
            let page = mapped + i * LARGE_PAGE;
            // SAFETY: a new table, so no translation of its entries is cached.
            unsafe { entry(directory, i).write_volatile(page | PRESENT | WRITABLE | LARGE) };
        }
        mapped += DIRECTORY_SPAN;
    }
    mapped
}

/// Zero-filled memory of `bytes` bytes, of which only the byte ranges in `used` may be written and have
/// frames of their own.
pub fn sparse(
    boot: &mut Memblock,
    bytes: usize,
    used: &mut dyn Iterator<Item = Range<usize>>,
) -> Option<NonNull<u8>> {
    let len = (bytes as u64).next_multiple_of(FRAME);
    // A frame's gap, so that running off a table's end faults.
    let base = NEXT_SPARSE.fetch_add(len + FRAME, Relaxed);
    if base.checked_add(len)? > 2 * TOP_SPAN {
        return None;
    }
    let top = (&raw const boot_pml4).addr() as u64;
    for range in used {
        let first = (base + range.start as u64) / FRAME;
        let last = (base + range.end as u64).div_ceil(FRAME);
        for page in first..last {
            let mut table = top;
            for shift in [27, 18, 9] {
                table = next_table(boot, table, page >> shift)?;
            }
            let leaf = entry(table, page);
            // SAFETY: a page table's entry; where two ranges share a page it is present already. A
            // new one is not in any cache.
            unsafe {
                if leaf.read_volatile() & PRESENT == 0 {
                    leaf.write_volatile(new_frame(boot)? | PRESENT | WRITABLE);
                }
            }
        }
    }
    let zeros = Zeros::new(boot)?;
    zeros.fill(boot, top, 3, base / FRAME..(base + len) / FRAME)?;
    NonNull::new(ptr::with_exposed_provenance_mut(base as usize))
}

/// What stands in for the parts of a sparse table that nothing writes: for each level of the page tables
/// an entry behind which there is nothing but the frame of zeros.
struct Zeros([u64; 3]);

impl Zeros {
    fn new(boot: &mut Memblock) -> Option<Zeros> {
        let mut entries = [new_frame(boot)? | PRESENT; 3];
        for level in 1..3 {
            let table = new_table(boot)?;
            for i in 0..ENTRIES {
                // SAFETY: a new table that nothing leads to.
                unsafe { entry(table, i).write_volatile(entries[level - 1]) };
            }
            entries[level] = table | PRESENT;
        }
        Some(Zeros(entries))
    }

    /// Maps the frame of zeros wherever nothing is mapped in `pages`, below a `table` of `level` (3 for
    /// the top).
    fn fill(&self, boot: &mut Memblock, table: u64, level: usize, pages: Range<u64>) -> Option<()> {
        let shift = 9 * level as u32;
        let mut page = pages.start;
        while page < pages.end {
            let next = ((page >> shift) + 1) << shift;
            let part = page..next.min(pages.end);
            let at = entry(table, page >> shift);
            // SAFETY: an entry of a page table in mapped memory; nobody else changes it.
            let present = unsafe { at.read_volatile() } & PRESENT != 0;
            if !present && level < 3 && part.end - part.start == 1 << shift {
                // SAFETY: as above; one that is not present is not in any cache.
                unsafe { at.write_volatile(self.0[level]) };
            } else if level > 0 {
                let below = next_table(boot, table, page >> shift)?;
                self.fill(boot, below, level - 1, part)?;
            }
            page = next;
        }
        Some(())
    }
}

/// A zero-filled frame.
fn new_frame(boot: &mut Memblock) -> Option<u64> {
    let frame = boot.alloc(Request::new(FRAME).align(FRAME)).ok()?;
    // SAFETY: just allocated, so nobody else's, and mapped like all memory.
    unsafe { entry(frame, 0).cast::<u8>().write_bytes(0, FRAME as usize) };
    Some(frame)
}

/// Switches caching off for the 2 MiB page around a device's registers, below 4 GiB.
///
/// # Safety
/// The page holds no ordinary memory that is in use.
pub unsafe fn uncache(address: u64) {
    assert!(address < BOOT_SPAN, "device at {address:#x} beyond the boot page tables");
    let first = (&raw const boot_pd).addr() as u64;
    let leaf = entry(first + address / DIRECTORY_SPAN * FRAME, address / LARGE_PAGE);
    // SAFETY: one of boot.s's page directories, which lie one after the other; one CPU runs.
    unsafe { leaf.write_volatile(leaf.read_volatile() | WRITE_THROUGH | NO_CACHE) };
    tlb::flush_all();
}
