//! Temporary mappings of pages that have no address, and of those that have; permanent ones.
//!
//! # Concepts
//! `kmap` of a page that the thread mapped a moment ago, each its own, calls the host for nothing.
//! A high page is shown by a call of the host's and written to; beside it are the two calls that it takes, alone.
//!
//! # Locking
//! None.

use crate::{Run, THREADS, each, failed, on_cpus};
use anyhow::{Result, anyhow};
use kmem::{Config, Gfp, Kmem, Page};
use kmem_bench::report::KMEM;
use kmem_hosted::{Hosted, Machine, Shape};
use rustix::{
    fs::{MemfdFlags, ftruncate, memfd_create},
    mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap},
};
use std::{hint::black_box, ptr};

const PAGE: usize = kmem_bench::PAGE_SIZE as usize;
const BYTES: u64 = 1 << 30;

/// One row each for a low and a high page; kmap on one thread and on two.
pub fn run(run: &mut Run) -> Result<()> {
    permanent(run)?;
    let (low, high) = ([("kmap_local of a low page", 1)], [("kmap_local of a high page", 1)]);
    if !run.wants(&low) && !run.wants(&high) {
        return Ok(());
    }
    let machine = Machine::without_kswapd(Shape::x86_32(BYTES), Config::default())?;
    let m = machine.kmem();
    for (rows, gfp) in [(&low, Gfp::KERNEL), (&high, Gfp::HIGHUSER)] {
        if !run.wants(rows) {
            continue;
        }
        let page = machine.run(|_| m.alloc_page(gfp))??;
        on_cpus(&machine, 1, |crew| {
            let kmem = move || local(m, page);
            let mut all = vec![run.contender(crew, rows, KMEM, |_| each(kmem))];
            if gfp == Gfp::HIGHUSER {
                let file = memfd_create("page", MemfdFlags::CLOEXEC)?;
                ftruncate(&file, PAGE as u64)?;
                let place = reserve()?;
                let show = move || {
                    let at: *mut std::ffi::c_void = ptr::with_exposed_provenance_mut(place);
                    let prot = ProtFlags::READ | ProtFlags::WRITE;
                    let flags = MapFlags::SHARED | MapFlags::FIXED;
                    // SAFETY: the place is a mapping of our own, of which nobody holds a reference.
                    let shown = unsafe { mmap(at, PAGE, prot, flags, &file, 0) };
                    if let Err(e) = &shown {
                        failed("mmap", e);
                    }
                    // SAFETY: mapped, and nobody else knows the page.
                    unsafe { at.cast::<u8>().write_volatile(1) };
                    let (none, flags) = (ProtFlags::empty(), MapFlags::PRIVATE | MapFlags::FIXED);
                    // SAFETY: as above.
                    let hidden = unsafe { mmap_anonymous(at, PAGE, none, flags) };
                    if let Err(e) = hidden {
                        failed("mmap", &e);
                    }
                };
                let mut show = Some(show);
                all.push(run.contender(crew, rows, "mmap over mmap", |_| match show.take() {
                    Some(show) => each(show),
                    None => failed("a contest", &"one thread"),
                }));
                let done = run.contest(rows, BYTES, all);
                // SAFETY: reserved above; nobody uses it any more.
                unsafe { munmap(ptr::with_exposed_provenance_mut(place), PAGE) }?;
                return done;
            }
            run.contest(rows, BYTES, all)
        })?;
        machine.run(|_| m.__free_page(page))?.map_err(|e| anyhow!("{e}"))?;
    }
    Ok(())
}

fn permanent(run: &mut Run) -> Result<()> {
    let rows = [("kmap of a high page", 1), ("kmap of a high page, 2 threads", 2)];
    if !run.wants(&rows) {
        return Ok(());
    }
    let machine = Machine::without_kswapd(Shape::x86_32(BYTES).cpus(THREADS), Config::default())?;
    let m = machine.kmem();
    let pages = machine.run(|_| [0; THREADS].map(|_| m.alloc_page(Gfp::HIGHUSER)))?;
    let pages: Vec<&Page> = pages.into_iter().collect::<Result<_, _>>()?;
    on_cpus(&machine, THREADS, |crew| {
        let kmem = |thread: usize| {
            let page = pages[thread];
            each(move || match m.kmap(black_box(page)) {
                Ok(at) => {
                    black_box(at);
                    // SAFETY: mapped just now, and the address is not used after.
                    if let Err(e) = unsafe { m.kunmap(page) } {
                        failed("kunmap", &e);
                    }
                }
                Err(e) => failed("kmap", &e),
            })
        };
        run.contest(&rows, BYTES, vec![run.contender(crew, &rows, KMEM, kmem)])
    })?;
    let freed = machine.run(|_| pages.iter().try_for_each(|page| m.__free_page(page)))?;
    freed.map_err(|e| anyhow!("{e}"))
}

fn local(m: &Kmem<Hosted>, page: &Page) {
    match m.kmap_local_page(black_box(page)) {
        Ok(at) => {
            // SAFETY: mapped, and nobody else knows the page.
            unsafe { at.as_ptr().write_volatile(1) };
            // SAFETY: mapped just now, and the address is not used after.
            if let Err(e) = unsafe { m.kunmap_local(black_box(at.as_ptr())) } {
                failed("kunmap_local", &e);
            }
        }
        Err(e) => failed("kmap_local", &e),
    }
}

/// A page's worth of addresses.
fn reserve() -> Result<usize> {
    // SAFETY: a fresh private mapping at an address of the host's choice.
    let at =
        unsafe { mmap_anonymous(ptr::null_mut(), PAGE, ProtFlags::empty(), MapFlags::PRIVATE) }?;
    Ok(at.expose_provenance())
}
