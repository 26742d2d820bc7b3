//! High memory: kmap, kmap_atomic, kmap_local \[H1–H3\].

mod local;
mod misuse;
mod model;
mod owners;
mod permanent;
mod sleepers;
mod storm;

use kmem::{Config, Gfp, Kmem, Page, Pfn, ZoneType};
use kmem_hosted::{Hosted, Shape};
use kmem_test_support::{MIB, Rig};
use std::{io::pipe, os::fd::AsRawFd, ptr::NonNull};

/// Bytes of a frame.
const PAGE: usize = 4096;

/// A small machine of which the last 64 MiB are high.
fn shape() -> Shape {
    Shape::x86_32(96 * MIB).zones(&[
        (ZoneType::Dma, 16 * MIB),
        (ZoneType::Normal, 32 * MIB),
        (ZoneType::HighMem, 4096 * MIB),
    ])
}

/// A machine of that shape with so many places for kmap.
fn rig(places: usize) -> Rig {
    Rig::new(shape(), Config { last_pkmap: places, ..Config::default() })
}

/// The same where what is unmapped is taken away at once, and where it stays for a while: then users come and go
/// without a lock.
fn rigs(places: usize) -> [Rig; 2] {
    [true, false].map(|debug_highmem| {
        Rig::new(shape(), Config { last_pkmap: places, debug_highmem, ..Config::default() })
    })
}

/// A high page.
#[track_caller]
fn high(m: &Kmem<Hosted>) -> &Page {
    let page = m.alloc_page(Gfp::HIGHUSER).unwrap();
    let pfn = m.page_to_pfn(page).unwrap();
    assert_eq!(m.page_zone(pfn).unwrap().zone_type(), ZoneType::HighMem);
    page
}

/// A low page.
fn low(m: &Kmem<Hosted>) -> &Page {
    m.alloc_page(Gfp::KERNEL).unwrap()
}

/// Frees pages.
#[track_caller]
fn free<'a>(m: &Kmem<Hosted>, pages: impl IntoIterator<Item = &'a Page>) {
    pages.into_iter().for_each(|page| m.__free_page(page).unwrap());
}

/// Unmaps a page.
#[track_caller]
fn kunmap(m: &Kmem<Hosted>, page: &Page) {
    // SAFETY: the tests use the address after only where they say so, as the host's kernel.
    unsafe { m.kunmap(page).unwrap() };
}

/// Whether the byte at an address can be read; the host's kernel tries, so nothing faults here.
fn readable(address: NonNull<u8>) -> bool {
    let (_reader, writer) = pipe().unwrap();
    // SAFETY: write(2) checks the address itself and fails with EFAULT if it is not readable.
    let n = unsafe { libc::write(writer.as_raw_fd(), address.as_ptr().cast(), 1) };
    if n == -1 {
        let error = std::io::Error::last_os_error();
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT), "{error}");
    }
    n == 1
}

/// Reads through an address.
fn read(address: NonNull<u8>) -> u8 {
    // SAFETY: the callers pass addresses of live mappings, to which there are no references.
    unsafe { address.read_volatile() }
}

/// Writes through an address.
fn write(address: NonNull<u8>, value: u8) {
    // SAFETY: as for `read`.
    unsafe { address.write_volatile(value) }
}

/// What is in a frame, through a mapping of the test's own.
fn peek(m: &Kmem<Hosted>, page: &Page) -> u8 {
    let pfn: Pfn = m.page_to_pfn(page).unwrap();
    let mapping = m.platform().map_frames(&[pfn]).unwrap();
    read(mapping.as_ptr())
}
