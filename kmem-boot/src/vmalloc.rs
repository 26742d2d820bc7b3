//! The vmalloc range: page tables that change while the machine runs \[V1, V4\].
//!
//! # Concepts
//! The third top-level entry, 512 GiB, is for vmalloc. Tables below it are made where something is first mapped and
//! stay for ever; large entries of 2 MiB are used where addresses and frames are aligned for them and the request
//! says so. What is unmapped leaves the tables at once, and the processor's translations at the flush.
//!
//! # Implementation
//! A table is asked for with the lock let go, since who gives it may sleep; then somebody else may have put one
//! there first, and the spare one is kept for the next who needs one, on a list through the spares' first words.
//!
//! # Locking
//! One lock for the tables of the range, taken in process context only.

use crate::paging::{
    ADDRESS, ENTRIES, FRAME, LARGE, NO_CACHE, PRESENT, TOP_SPAN, WRITABLE, WRITE_THROUGH, entry,
    top_table,
};
use core::ops::Range;
use kmem::{
    platform::{MapFailed, PageProt},
    types::Pfn,
};
use spin::Mutex;
use x86_64::{VirtAddr, instructions::tlb};

/// Pages beyond which everything is flushed.
const FLUSH_ALL_FROM: u64 = 64;

/// Frames that a large entry maps.
const LARGE_FRAMES: u64 = ENTRIES;

/// The lock, and the first spare table; 0 for none.
static SPARES: Mutex<u64> = Mutex::new(0);

/// The addresses.
pub fn range() -> Range<usize> {
    2 * TOP_SPAN as usize..3 * TOP_SPAN as usize
}

fn read(table: u64, index: u64) -> u64 {
    // SAFETY: a page table of the range, or the top one, mapped like all memory; entries are read whole.
    unsafe { entry(table, index).read_volatile() }
}

fn write(table: u64, index: u64, value: u64) {
    // SAFETY: as for `read`; the caller holds the lock, and what was there before is flushed before the address is
    // used again.
    unsafe { entry(table, index).write_volatile(value) };
}

/// Takes a spare table off the list.
fn pop(spares: &mut u64) -> Option<u64> {
    let table = Some(*spares).filter(|table| *table != 0)?;
    *spares = read(table, 0);
    // All of it is zeros then.
    write(table, 0, 0);
    Some(table)
}

fn push(spares: &mut u64, table: u64) {
    write(table, 0, *spares);
    *spares = table;
}

/// The table that an entry leads to, made of a spare one if there is none; `None` without a spare one.
fn below(spares: &mut u64, table: u64, index: u64) -> Option<u64> {
    if read(table, index) & PRESENT == 0 {
        write(table, index, pop(spares)? | PRESENT | WRITABLE);
    }
    Some(read(table, index) & ADDRESS)
}

/// Maps `count` frames from `pfn` on at `addr`.
pub fn map(
    addr: usize,
    pfn: Pfn,
    count: u32,
    prot: PageProt,
    tables: &mut dyn FnMut() -> Option<Pfn>,
) -> Result<(), MapFailed> {
    let mut flags = PRESENT;
    for (of, bits) in [(PageProt::WRITE, WRITABLE), (PageProt::NO_CACHE, WRITE_THROUGH | NO_CACHE)]
    {
        if prot.contains(of) {
            flags |= bits;
        }
    }
    let (page, frame, count) = (addr as u64 / FRAME, u64::from(pfn.0), u64::from(count));
    let mut done = 0;
    loop {
        while done < count {
            let mut spares = SPARES.lock();
            let large = prot.contains(PageProt::HUGE) && count - done >= LARGE_FRAMES;
            match map_one(&mut spares, page + done, frame + done, flags, large) {
                Some(frames) => done += frames,
                None => break,
            }
        }
        if done == count {
            return Ok(());
        }
        let table = tables().ok_or(MapFailed)?;
        push(&mut SPARES.lock(), u64::from(table.0) * FRAME);
    }
}

/// Maps a page, or a large one if it `may` be and is aligned; returns its frames, or `None` where a table is missing.
fn map_one(spares: &mut u64, page: u64, frame: u64, flags: u64, may: bool) -> Option<u64> {
    let upper = below(spares, top_table(), page >> 27)?;
    let directory = below(spares, upper, page >> 18)?;
    let aligned = page.is_multiple_of(LARGE_FRAMES) && frame.is_multiple_of(LARGE_FRAMES);
    if may && aligned {
        let before = read(directory, page >> 9);
        write(directory, page >> 9, (frame * FRAME) | flags | LARGE);
        if before & PRESENT != 0 {
            // Small pages were there once: their table, of which nothing is mapped now, is one for others.
            tlb::flush(VirtAddr::new_truncate(page * FRAME));
            push(spares, before & ADDRESS);
        }
        return Some(LARGE_FRAMES);
    }
    let table = below(spares, directory, page >> 9)?;
    write(table, page, (frame * FRAME) | flags);
    Some(1)
}

/// The entry that maps a page, as table and index, and the frames it maps; else how many pages around it have no table.
fn leaf(page: u64) -> Result<(u64, u64, u64), u64> {
    let mut table = top_table();
    for shift in [27, 18, 9] {
        let entry = read(table, page >> shift);
        if entry & PRESENT == 0 {
            return Err(1 << shift);
        }
        if entry & LARGE != 0 {
            return Ok((table, page >> shift, 1 << shift));
        }
        table = entry & ADDRESS;
    }
    Ok((table, page, 1))
}

/// Takes the mappings in a range away.
pub fn unmap(range: Range<usize>) {
    let _lock = SPARES.lock();
    let (mut page, end) = (range.start as u64 / FRAME, range.end as u64 / FRAME);
    while page < end {
        let span = match leaf(page) {
            Ok((table, index, frames)) => {
                write(table, index, 0);
                frames
            }
            Err(pages) => pages,
        };
        page = (page / span + 1) * span;
    }
}

/// Makes the processor forget what was in a range.
pub fn flush(range: Range<usize>) {
    let (first, end) = (range.start as u64 / FRAME, range.end as u64 / FRAME);
    if end - first > FLUSH_ALL_FROM {
        return tlb::flush_all();
    }
    (first..end).for_each(|page| tlb::flush(VirtAddr::new_truncate(page * FRAME)));
}

/// Where a page is mapped to, and by how large an entry in frames.
pub fn translate(addr: usize) -> Option<(u64, u64)> {
    let _lock = SPARES.lock();
    let page = addr as u64 / FRAME;
    let (table, index, frames) = leaf(page).ok()?;
    let entry = read(table, index);
    let first = (entry & ADDRESS) / FRAME;
    (entry & PRESENT != 0).then_some((first + page % frames, frames))
}
