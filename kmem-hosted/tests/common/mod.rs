//! What several tests need.

use std::time::{Duration, Instant};

/// Gives up after this long; everything waited for takes milliseconds.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Spins until `done`, giving the time slice away; panics, saying `what`, when patience ends.
#[track_caller]
pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "gave up waiting: {what}");
        std::thread::yield_now();
    }
}
