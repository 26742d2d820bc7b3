//! Fuzzes the slab layer: the first byte chooses machine and settings, every further four are a step. The
//! reference of the property tests plays along, with interrupts in the midst of the steps, and everything is
//! audited and freed at the end. Every million
//! operations (objects given out, freed, and frees in vain) it says how many there were.
//!
//! ```text
//! RUSTC_BOOTSTRAP=1 cargo fuzz run objects -- -max_total_time=600 -max_len=4096
//! ```

#![no_main]

#[path = "../../kmem/tests/objects/play.rs"]
mod play;
#[expect(dead_code, reason = "the tests use all of it")]
#[path = "../../kmem/tests/objects/stage.rs"]
mod stage;

use kmem::Config;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Operations so far.
static DONE: AtomicU64 = AtomicU64::new(0);
const TELL: u64 = 1_000_000;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Some((choice, steps)) = data.split_first() else { return };
    let steps = steps.as_chunks().0;
    if steps.is_empty() {
        return;
    }
    let watching = Config { slab_debug: Some(""), slab_random: Some(5), ..Config::default() };
    let done = match choice % 4 {
        0 => play::play_with::<12>(&[3, 3], Config::default(), steps),
        1 => play::play_with::<12>(&[3, 3], watching, steps),
        2 => play::play::<16>(&[2], steps),
        _ => play::play::<12>(&[4], steps),
    };
    let before = DONE.fetch_add(done, Relaxed);
    if before / TELL != (before + done) / TELL {
        eprintln!("objects: {} operations", before + done);
    }
});
