//! Threads side by side.
//!
//! # Concepts
//! Threads that are measured together start together, each bound to a processor of the host. If the host ran
//! them one after the other all the same, which shows in when each began and ended, or took one off its
//! processor, the measurement is made again, and the best counts; if they never overlapped there is no figure.
//!
//! # Locking
//! [`Start`] is a barrier that spins.

use anyhow::Result;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use std::{
    hint,
    sync::atomic::{AtomicUsize, Ordering::SeqCst},
    time::{Duration, Instant},
};

/// Measurements that were not side by side are made this often at most.
const ATTEMPTS: usize = 6;
/// The overlap, times the share on a processor, that is taken for side by side.
const OVERLAP: f64 = 0.85;
/// Below this there is no figure.
const LEAST_OVERLAP: f64 = 0.4;

/// Binds the thread to the host's `thread`-th processor, if it may use that many.
pub fn bind(thread: usize) {
    let Ok(allowed) = sched_getaffinity(None) else { return };
    if let Some(cpu) = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)).nth(thread) {
        let mut one = CpuSet::new();
        one.set(cpu);
        // Where it is not allowed to bind, the overlap tells whether that mattered.
        let _ = sched_setaffinity(None, &one);
    }
}

/// Where threads wait for each other.
#[derive(Debug)]
pub struct Start(AtomicUsize);

impl Start {
    /// For so many threads.
    pub const fn new(threads: usize) -> Start {
        Start(AtomicUsize::new(threads))
    }

    /// A thread is ready, or will never be.
    pub fn ready(&self) {
        self.0.fetch_sub(1, SeqCst);
    }

    /// Waits until all are ready.
    pub fn wait(&self) {
        while self.0.load(SeqCst) != 0 {
            hint::spin_loop();
        }
    }
}

/// What a thread saw.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    /// Processor time of what was measured.
    pub spent: Duration,
    /// Processor time between beginning and end, with what was not measured.
    pub ran: Duration,
    /// When that began.
    pub began: Instant,
    /// When it ended.
    pub ended: Instant,
}

/// A measurement of several threads.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Together {
    /// Mean time per operation.
    pub ns: f64,
    /// Share of the time that all threads were at work, of the time that any was.
    pub overlap: f64,
    /// Share of its own time that the thread least on a processor was there. A spin lock whose holder is off
    /// it costs the other far more than a lock does.
    pub on: f64,
}

impl Together {
    /// From what each thread saw of `ops` operations of its own.
    pub fn new(seen: &[Seen], ops: u64) -> Together {
        let spent: f64 = seen.iter().map(|s| s.spent.as_nanos() as f64).sum();
        let times = || (seen.iter().map(|s| s.began), seen.iter().map(|s| s.ended));
        let overlap = match (times().0.max(), times().1.min(), times().0.min(), times().1.max()) {
            (Some(all), Some(until), Some(any), Some(end)) => {
                until.saturating_duration_since(all).as_secs_f64() / (end - any).as_secs_f64()
            }
            _ => 0.0,
        };
        let on = |s: &Seen| s.ran.as_secs_f64() / (s.ended - s.began).as_secs_f64();
        let on = seen.iter().map(on).fold(1.0, f64::min);
        Together { ns: spent / (ops * seen.len() as u64) as f64, overlap, on }
    }
}

/// The figure of the best of several measurements; NaN if the threads were never side by side.
///
/// # Errors
/// The first of `measure`.
pub fn settled(mut measure: impl FnMut() -> Result<Together>) -> Result<f64> {
    let mut best: Option<Together> = None;
    let worth = |t: &Together| t.overlap * t.on;
    for _ in 0..ATTEMPTS {
        let seen = measure()?;
        if seen.overlap > LEAST_OVERLAP && best.is_none_or(|best| worth(&seen) > worth(&best)) {
            best = Some(seen);
        }
        if best.is_some_and(|best| worth(&best) >= OVERLAP) {
            break;
        }
    }
    Ok(best.map_or(f64::NAN, |best| best.ns))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_overlap_counts() {
        let tries = |overlaps: &'static [f64]| {
            let mut at = overlaps.iter().enumerate();
            let next = || {
                let (i, overlap) = at.next().unwrap();
                Ok(Together { ns: i as f64, overlap: *overlap, on: 1.0 })
            };
            settled(next).unwrap()
        };
        assert_eq!(tries(&[0.5, 0.9]), 1.0);
        assert_eq!(tries(&[0.3, 0.5, 0.7, 0.1, 0.6, 0.2]), 2.0);
        assert!(tries(&[0.1; ATTEMPTS]).is_nan());
    }

    #[test]
    fn overlap_is_time_in_common() {
        let zero = Instant::now();
        let ms = Duration::from_millis;
        let seen = |from, to, ran| Seen {
            spent: ms(2),
            ran: ms(ran),
            began: zero + ms(from),
            ended: zero + ms(to),
        };
        let together = Together::new(&[seen(0, 6, 6), seen(4, 8, 4)], 1000);
        assert_eq!(together, Together { ns: 2000.0, overlap: 0.25, on: 1.0 });
        let together = Together::new(&[seen(0, 4, 2), seen(0, 4, 4)], 1000);
        assert_eq!(together, Together { ns: 2000.0, overlap: 1.0, on: 0.5 });
    }
}
