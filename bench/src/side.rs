//! Threads side by side.
//!
//! # Concepts
//! Threads that are measured together start together, each bound to a processor of the host. If the host ran
//! them one after the other all the same, which shows in when each began and ended and in the processor
//! time each had, the measurement is made again; if it never ran them side by side there is no figure.
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
/// The overlap that is taken for side by side.
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
    /// Share of the time that all threads were at work, of the time that any was, times the share of its
    /// own time that the one least on a processor was there: a spin lock whose holder is off it costs the
    /// other far more than a lock does.
    pub overlap: f64,
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
        let overlap = seen.iter().map(on).fold(1.0, f64::min) * overlap;
        Together { ns: spent / (ops * seen.len() as u64) as f64, overlap }
    }
}

/// The figure of the best of several measurements; NaN if the threads were never side by side.
///
/// # Errors
/// The first of `measure`.
pub fn settled(mut measure: impl FnMut() -> Result<Together>) -> Result<f64> {
    let mut best = Together { ns: f64::NAN, overlap: LEAST_OVERLAP };
    for _ in 0..ATTEMPTS {
        let seen = measure()?;
        if seen.overlap > best.overlap {
            best = seen;
        }
        if best.overlap >= OVERLAP {
            break;
        }
    }
    Ok(best.ns)
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
                Ok(Together { ns: i as f64, overlap: *overlap })
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
        assert_eq!(together, Together { ns: 2000.0, overlap: 0.25 });
        let together = Together::new(&[seen(0, 4, 2), seen(0, 4, 4)], 1000);
        assert_eq!(together, Together { ns: 2000.0, overlap: 0.5 });
    }
}
