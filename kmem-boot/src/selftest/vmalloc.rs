//! vmalloc over real page tables: areas alias their frames, guards are not mapped, large entries are used, and no
//! translation outlives its area.

use super::{Bench, Failed, Verdict, check, fail};
use crate::{platform::BareMetal, println, vmalloc};
use core::ptr::NonNull;
use kmem::{Gfp, Kmem, Misuse, platform::PageProt, vmalloc::VmFlags};

const FRAME: usize = 4096;

/// A word of an area.
fn word(area: NonNull<u8>, frame: usize) -> *mut usize {
    area.as_ptr().wrapping_add(frame * FRAME).cast()
}

fn vmalloc(kmem: &Kmem<BareMetal>, frames: usize) -> Result<NonNull<u8>, Failed> {
    match kmem.vmalloc(frames * FRAME) {
        Ok(area) => Ok(area),
        Err(error) => fail!("vmalloc of {frames} frames: {error}"),
    }
}

fn vfree(kmem: &Kmem<BareMetal>, area: NonNull<u8>) -> Verdict {
    // SAFETY: the callers do not use it after.
    let freed = unsafe { kmem.vfree(area.as_ptr()) };
    check!(freed.is_ok(), "vfree: {freed:?}");
    Ok(())
}

/// Writes through the area, looks through the direct map.
fn aliases(kmem: &Kmem<BareMetal>, area: NonNull<u8>, frames: usize, stamp: usize) -> Verdict {
    for i in 0..frames {
        let at = word(area, i);
        // SAFETY: a live area's word, which nobody else uses.
        unsafe { at.write_volatile(stamp ^ i) };
        let page = kmem.vmalloc_to_page(at.cast());
        let Some(direct) = page.and_then(|page| kmem.page_address(page)) else {
            fail!("frame {i} of an area has no page");
        };
        // SAFETY: the same word through the direct map.
        let found = unsafe { direct.cast::<usize>().read_volatile() };
        check!(found == stamp ^ i, "frame {i}: wrote {:#x}, found {found:#x}", stamp ^ i);
        let mapped = vmalloc::translate(at.addr()).map(|(frame, _)| frame as usize * FRAME);
        check!(mapped == Some(direct.addr().get()), "frame {i} is mapped to {mapped:x?}");
    }
    let guard = area.addr().get() + frames * FRAME;
    check!(vmalloc::translate(guard).is_none(), "something is mapped at the guard {guard:#x}");
    Ok(())
}

/// Areas of many sizes at once, freed in another order.
fn sizes(bench: &mut Bench) -> Verdict {
    let kmem = bench.kmem;
    let mut areas = [None; 24];
    for turn in 0..400 {
        let place = &mut areas[bench.rng.usize(0..24)];
        match place.take() {
            Some((area, frames, stamp)) => {
                aliases(kmem, area, frames, stamp)?;
                vfree(kmem, area)?;
                let left = vmalloc::translate(area.addr().get());
                check!(left.is_none(), "still mapped after vfree: {left:x?}");
            }
            None => {
                let frames = bench.rng.usize(1..60);
                let area = vmalloc(kmem, frames)?;
                aliases(kmem, area, frames, turn << 20)?;
                *place = Some((area, frames, turn << 20));
            }
        }
    }
    areas.iter().flatten().try_for_each(|(area, ..)| vfree(kmem, *area))
}

/// An address that comes again shows its new frames: the processor forgot the old ones.
fn flushed(bench: &mut Bench) -> Verdict {
    let kmem = bench.kmem;
    let (mut again, mut last) = (0, 0);
    for turn in 1..200 {
        let area = vmalloc(kmem, 3)?;
        // Keeps the frame that was used before from being used next.
        let page = kmem.alloc_page(Gfp::KERNEL);
        aliases(kmem, area, 3, turn << 8)?;
        again += u32::from(area.addr().get() == last);
        last = area.addr().get();
        vfree(kmem, area)?;
        kmem.vm_unmap_aliases();
        if let Ok(page) = page {
            let freed = kmem.__free_page(page);
            check!(freed.is_ok(), "{freed:?}");
        }
    }
    check!(again > 100, "an address came again only {again} times");
    println!("vmalloc: one address came again {again} times");
    Ok(())
}

/// Large entries where the blocks are there.
fn huge(bench: &mut Bench) -> Verdict {
    let kmem = bench.kmem;
    let bytes = (4 << 20) + FRAME;
    // Further up than anything was mapped so far (purges come after 32 MiB): where small pages were there is a table,
    // which stays.
    let Ok(below) = kmem.get_vm_area(64 << 20) else { fail!("no 64 MiB of addresses") };
    let area = match kmem.vmalloc_huge(bytes, Gfp::KERNEL) {
        Ok(area) => area,
        Err(error) => fail!("vmalloc_huge: {error}"),
    };
    aliases(kmem, area, bytes / FRAME, 0x5500_0000)?;
    let by = |frame| vmalloc::translate(word(area, frame).addr()).map_or(0, |(_, frames)| frames);
    check!([by(0), by(1023), by(1024)] == [512, 512, 1], "entries of {} frames", by(0));
    // SAFETY: nobody used it.
    let unmapped = unsafe { kmem.vunmap(below.as_ptr()) };
    check!(unmapped.is_ok(), "vunmap: {unmapped:?}");
    vfree(kmem, area)
}

/// Pages of others, and a misuse.
fn mapped(bench: &mut Bench) -> Verdict {
    let kmem = bench.kmem;
    let (Ok(a), Ok(b)) = (kmem.alloc_page(Gfp::KERNEL), kmem.alloc_page(Gfp::KERNEL)) else {
        fail!("no two pages");
    };
    let area = match kmem.vmap(&[a, b, a], VmFlags::empty(), PageProt::KERNEL) {
        Ok(area) => area,
        Err(error) => fail!("vmap: {error}"),
    };
    // SAFETY: words of the pages just allocated.
    let seen = unsafe {
        word(area, 0).write_volatile(11);
        word(area, 1).write_volatile(22);
        word(area, 2).read_volatile()
    };
    check!(seen == 11, "a page shown twice shows {seen} the second time");
    // SAFETY: the area is not used after.
    let (unmapped, twice) = unsafe { (kmem.vunmap(area.as_ptr()), kmem.vunmap(area.as_ptr())) };
    check!(unmapped.is_ok(), "{unmapped:?}");
    check!(matches!(twice, Err(Misuse::AreaFree { .. })), "freed twice: {twice:?}");
    for page in [a, b] {
        let freed = kmem.__free_page(page);
        check!(freed.is_ok(), "{freed:?}");
    }
    Ok(())
}

/// Runs them all.
pub fn run(bench: &mut Bench) -> Verdict {
    let before = bench.kmem.audit_vmalloc().map_or(0, |areas| areas.live);
    for part in [sizes, flushed, huge, mapped] {
        part(bench)?;
    }
    let areas = bench.kmem.audit_vmalloc();
    check!(areas.is_ok_and(|areas| areas.live == before), "areas: {areas:?}, {before} before");
    Ok(())
}
