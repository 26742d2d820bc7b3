//! The machine under the allocator: time passes, waiting ends, kicks arrive, holes are empty.

use super::{Bench, Verdict, check, storm};
use crate::println;
use core::sync::atomic::{AtomicU32, Ordering::Relaxed};
use kmem::{
    platform::Platform,
    types::{PAGEBLOCK_FRAMES, Pfn},
};
use x86_64::instructions::interrupts;

const MS: u64 = 1_000_000;

/// Waits in vain, waits for what is there already, and interrupts itself.
pub fn run(bench: &mut Bench) -> Verdict {
    let platform = bench.kmem.platform();
    let word = AtomicU32::new(7);
    let start = platform.now_ns();
    platform.wait(&word, 7, 5 * MS);
    let waited = platform.now_ns() - start;
    check!((5 * MS..1000 * MS).contains(&waited), "a wait of 5 ms took {waited} ns");
    platform.wait(&word, 8, 1_000_000 * MS);
    let at_once = platform.now_ns() - start - waited;
    check!(at_once < 1000 * MS, "waiting for a word that differs took {at_once} ns");

    // A wait that the change of its word by an interrupt ends, not the clock.
    let before = storm::TICKS.load(Relaxed);
    platform.wait(&storm::TICKS, before, 1_000_000 * MS);
    check!(storm::TICKS.load(Relaxed) != before, "a wait ended before its word changed");

    let kicks = storm::KICKS.load(Relaxed);
    let masked = platform.local_irq_save();
    let nested = platform.local_irq_save();
    platform.kick(0);
    platform.local_irq_restore(nested);
    check!(!interrupts::are_enabled(), "the inner restore unmasked interrupts");
    check!(storm::KICKS.load(Relaxed) == kicks, "an interrupt came through the mask");
    platform.local_irq_restore(masked);
    let end = platform.now_ns() + 1000 * MS;
    while storm::KICKS.load(Relaxed) == kicks && platform.now_ns() < end {
        platform.relax();
    }
    let served = storm::KICKS.load(Relaxed) - kicks;
    check!(served == 1, "one kick, {served} served");
    println!("machine: waited {} us for 5 ms, kick served", waited / 1000);
    holes(bench)
}

/// Asks about a frame of every pageblock from the first of the machine to the last: in holes there are
/// none, and asking is all the same.
fn holes(bench: &Bench) -> Verdict {
    let zones = || bench.kmem.zones().iter().map(|zone| zone.spanned());
    let (start, end) = zones().fold((u32::MAX, 0), |(s, e), r| (s.min(r.start), e.max(r.end)));
    let (mut populated, mut holes) = (0u64, 0u64);
    for pfn in (start..end).step_by(PAGEBLOCK_FRAMES as usize) {
        let there = bench.kmem.pfn_to_page(Pfn(pfn)).is_some();
        populated += u64::from(there);
        holes += u64::from(!there);
    }
    let present: u64 = bench.kmem.zones().iter().map(|zone| zone.present_frames()).sum();
    let most = present.div_ceil(u64::from(PAGEBLOCK_FRAMES)) + zones().count() as u64;
    check!(populated <= most, "{populated} pageblocks for {present} frames");
    println!("machine: {populated} pageblocks, {holes} in holes");
    Ok(())
}
