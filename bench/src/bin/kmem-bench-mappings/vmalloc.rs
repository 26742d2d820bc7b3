//! 64 KiB of scattered frames, mapped, beside the host's mmap of as many fresh ones; and the same, and one frame and
//! 256, where the machine has no page tables, which is kmem's own share.
//!
//! # Locking
//! None.

use crate::{Rows, Run, THREADS, each, failed, on_cpus};
use anyhow::Result;
use kmem::Config;
use kmem_bench::report::KMEM;
use kmem_hosted::{Machine, Shape};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use std::{hint::black_box, ptr};

const SIZE: usize = 64 << 10;
const BYTES: u64 = 256 << 20;

/// mmap with pages, and munmap.
pub fn map_and_unmap(size: usize) {
    let flags = MapFlags::PRIVATE | MapFlags::POPULATE;
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a fresh private mapping at an address of the host's choice.
    match unsafe { mmap_anonymous(ptr::null_mut(), size, prot, flags) } {
        Ok(at) => {
            // SAFETY: the mapping just made, of which nobody knows.
            if let Err(e) = unsafe { munmap(black_box(at), size) } {
                failed("munmap", &e);
            }
        }
        Err(e) => failed("mmap", &e),
    }
}

/// On one thread and on two, with page tables and without.
pub fn run(run: &mut Run) -> Result<()> {
    let own = [
        (4 << 10, [("vmalloc 4 KiB, own code", 1), ("vmalloc 4 KiB, own code, 2 threads", 2)]),
        (SIZE, [("vmalloc 64 KiB, own code", 1), ("vmalloc 64 KiB, own code, 2 threads", 2)]),
        (1 << 20, [("vmalloc 1 MiB, own code", 1), ("vmalloc 1 MiB, own code, 2 threads", 2)]),
    ];
    for (size, rows) in own {
        pairs(run, &rows, Shape::x86_64(BYTES).without_page_tables(), size, false)?;
    }
    let mapped = [
        ("vmalloc 64 KiB, with page tables", 1),
        ("vmalloc 64 KiB, 2 threads, with page tables", 2),
    ];
    pairs(run, &mapped, Shape::x86_64(BYTES), SIZE, true)
}

fn pairs(run: &mut Run, rows: Rows<'_>, shape: Shape, size: usize, mapped: bool) -> Result<()> {
    if !run.wants(rows) {
        return Ok(());
    }
    let machine = Machine::without_kswapd(shape.cpus(THREADS), Config::default())?;
    on_cpus(&machine, THREADS, |crew| {
        let m = machine.kmem();
        let kmem = move || match m.vmalloc(black_box(size)) {
            Ok(at) => {
                // SAFETY: it is not used after.
                if let Err(e) = unsafe { m.vfree(black_box(at.as_ptr())) } {
                    failed("vfree", &e);
                }
            }
            Err(e) => failed("vmalloc", &e),
        };
        let mut all = vec![run.contender(crew, rows, KMEM, |_| each(kmem))];
        if mapped {
            all.push(
                run.contender(crew, rows, "mmap + munmap", |_| each(move || map_and_unmap(size))),
            );
        }
        run.contest(rows, BYTES, all)
    })
}
