//! From the firmware's map to boot memory \[B1\].

use crate::{apic, paging, println, pvh::BootInfo};
use kmem::memblock::{Memblock, MemblockError};

unsafe extern "C" {
    static image_start: u8;
    static image_end: u8;
}

const FIRST_MIB: u64 = 1 << 20;

/// Records what is memory, reserves what is in use, and maps what lies beyond 4 GiB.
///
/// # Safety
/// Called once, by the only CPU, before interrupts are on.
pub unsafe fn init(info: &BootInfo) -> Result<Memblock, MemblockError> {
    let mut boot = Memblock::new();
    for region in info.regions().iter().filter(|r| r.is_ram()) {
        boot.add(region.base, region.size, 0)?;
    }
    // Where the map contradicts itself, the careful answer wins.
    for region in info.regions().iter().filter(|r| !r.is_ram()) {
        boot.reserve(region.base, region.size)?;
    }
    boot.reserve(0, FIRST_MIB)?;
    let image = (&raw const image_start).addr() as u64..(&raw const image_end).addr() as u64;
    boot.reserve(image.start, image.end - image.start)?;
    for range in info.own_ranges() {
        boot.reserve(range.start, range.end - range.start)?;
    }

    let end = boot.memory().next_back().map_or(0, |r| r.end());
    let mapped = paging::extend(&mut boot, end);
    if end > mapped {
        let lost = boot.remove(mapped, end - mapped)?;
        println!("memory: {lost:#x} bytes beyond {mapped:#x} are not mapped and stay unused");
    }
    // SAFETY: the firmware keeps the APIC's registers apart from memory.
    unsafe { paging::uncache(apic::base()) };
    println!(
        "memory: {} KiB, {} KiB free; image {:#x}-{:#x}; direct map up to {mapped:#x}",
        boot.total() >> 10,
        boot.free_ranges(0).map(|r| r.end - r.start).sum::<u64>() >> 10,
        image.start,
        image.end,
    );
    Ok(boot)
}
