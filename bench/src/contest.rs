//! Taking times fairly.
//!
//! # Concepts
//! The contestants of a workload take turns, some milliseconds each, in an order that rotates from round
//! to round. Whatever slows the machine for longer than a turn slows all of them. Time is the
//! thread's processor time, so that a turn does not pay for other programs that run meanwhile; what it
//! cannot leave out is what they do to caches and clock speed, hence the medians.
//!
//! A workload that walks through a lot of memory once splits the walk into *legs*, one per turn: a figure
//! is the mean over the legs of the median over the walks.
//!
//! # Locking
//! None; a turn may start threads of its own.

use rustix::time::{ClockId, clock_gettime};
use std::{convert::Infallible, time::Duration};

/// Processor time that the calling thread has used.
pub fn thread_time() -> Duration {
    let t = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(t.tv_sec as u64, t.tv_nsec as u32)
}

/// Nanoseconds of processor time per operation of `f`, which does `ops` of them.
pub fn ns_per_op(ops: u64, f: impl FnOnce()) -> f64 {
    let start = thread_time();
    f();
    (thread_time() - start).as_nanos() as f64 / ops as f64
}

/// How many operations take about `target`: found by doing them.
pub fn calibrate(target: Duration, mut f: impl FnMut(u64)) -> u64 {
    let found = try_calibrate(target, |n| {
        let start = thread_time();
        f(n);
        Ok::<_, Infallible>(thread_time() - start)
    });
    match found {
        Ok(n) => n,
        Err(never) => match never {},
    }
}

/// As [`calibrate`], where `spent` does the operations and says how long they took.
///
/// # Errors
/// Those of `spent`.
pub fn try_calibrate<E>(
    target: Duration,
    mut spent: impl FnMut(u64) -> Result<Duration, E>,
) -> Result<u64, E> {
    let mut n = 1;
    loop {
        let mut took = spent(n)?;
        // Once more: a few operations that the host interrupted look like many.
        if took >= target / 4 {
            took = took.min(spent(n)?);
        }
        if took >= target / 4 || n >= 1 << 40 {
            let per_op = (took.as_nanos().max(1) as f64) / n as f64;
            return Ok(((target.as_nanos() as f64 / per_op) as u64).max(1));
        }
        n *= 2;
    }
}

/// One turn: a figure for each row of the contest.
pub type Turn<'a> = Box<dyn FnMut() -> anyhow::Result<Vec<f64>> + 'a>;

/// Who takes part, or why not.
pub struct Contestant<'a> {
    /// Name.
    pub name: &'static str,
    /// Its turns; the error says why it takes none.
    pub turn: anyhow::Result<Turn<'a>>,
}

/// One contestant's samples: by row, then by turn.
pub struct Samples {
    /// Name.
    pub name: &'static str,
    /// By row, then by turn; or why there are none.
    pub rows: Result<Vec<Vec<f64>>, String>,
    /// Turns per walk.
    legs: usize,
}

/// Runs `walks` walks of `legs` turns for each contestant, in rotation, after a walk that does not
/// count (if `warm`). Calls `tick` after each turn.
///
/// # Errors
/// That of the first turn that fails.
pub fn run(
    contestants: Vec<Contestant<'_>>,
    legs: usize,
    walks: usize,
    warm: bool,
    tick: impl Fn(),
) -> anyhow::Result<Vec<Samples>> {
    let mut turns = Vec::new();
    let mut samples = Vec::new();
    for c in contestants {
        let rows = match c.turn {
            Ok(turn) => {
                turns.push((samples.len(), turn));
                Ok(Vec::new())
            }
            Err(e) => Err(format!("{e:#}")),
        };
        samples.push(Samples { name: c.name, rows, legs });
    }
    let skip = if warm { legs } else { 0 };
    for round in 0..skip + walks * legs {
        let n = turns.len();
        for i in 0..n {
            let (at, turn) = &mut turns[(i + round) % n];
            let figures = turn()?;
            tick();
            if round < skip {
                continue;
            }
            if let Ok(rows) = &mut samples[*at].rows {
                rows.resize_with(figures.len(), Vec::new);
                rows.iter_mut().zip(figures).for_each(|(row, figure)| row.push(figure));
            }
        }
    }
    Ok(samples)
}

/// The median of those that are numbers; NaN if none is.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.retain(|v| !v.is_nan());
    values.sort_unstable_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[n / 2],
        n => (values[n / 2 - 1] + values[n / 2]) / 2.0,
    }
}

/// Mean over the legs of the median over the walks.
fn figure(samples: &[f64], legs: usize) -> f64 {
    let leg = |leg: usize| median(samples.iter().skip(leg).step_by(legs).copied().collect());
    (0..legs).map(leg).sum::<f64>() / legs as f64
}

fn number(value: f64) -> Option<f64> {
    if value.is_nan() { None } else { Some(value) }
}

impl Samples {
    /// Samples of walks of one leg, by row.
    pub fn new(name: &'static str, rows: Vec<Vec<f64>>) -> Samples {
        Samples { name, rows: Ok(rows), legs: 1 }
    }

    /// The median over the turns of one row's figure divided by another's in the same turn.
    pub fn between(&self, row: usize, other: usize) -> Option<f64> {
        let rows = self.rows.as_ref().ok()?;
        let (a, b) = (rows.get(row)?, rows.get(other)?);
        number(median(a.iter().zip(b).map(|(a, b)| a / b).collect()))
    }

    /// Takes each row's given share off its samples, which may leave less than nothing.
    pub fn less(&mut self, shares: &[Option<f64>]) {
        let Ok(rows) = &mut self.rows else { return };
        for (row, share) in rows.iter_mut().zip(shares) {
            row.iter_mut().for_each(|sample| *sample -= share.unwrap_or(0.0));
        }
    }

    /// The row's figure; `None` if the contestant took no turn.
    pub fn figure(&self, row: usize) -> Option<f64> {
        let samples = self.rows.as_ref().ok()?.get(row)?;
        number(figure(samples, self.legs))
    }

    /// How many times `other`'s figure this one's is. With one leg the median of the rounds' ratios, each
    /// taken within one round; else the ratio of the figures.
    pub fn ratio(&self, other: &Samples, row: usize) -> Option<f64> {
        if self.legs > 1 {
            return number(self.figure(row)? / other.figure(row)?);
        }
        let (a, b) = (self.rows.as_ref().ok()?.get(row)?, other.rows.as_ref().ok()?.get(row)?);
        number(median(a.iter().zip(b).map(|(a, b)| a / b).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    #[test]
    fn contestants_rotate_and_the_warm_up_does_not_count() {
        let log = RefCell::new(String::new());
        let one = |name: &'static str, figures: &'static [f64]| {
            let (log, mut at) = (&log, 0);
            let turn: Turn<'_> = Box::new(move || {
                log.borrow_mut().push_str(name);
                at += 1;
                Ok(vec![figures[at - 1]])
            });
            Contestant { name, turn: Ok(turn) }
        };
        let none = Contestant { name: "c", turn: Err(anyhow::anyhow!("too big")) };
        let all = vec![one("a", &[99.0, 1.0, 3.0, 8.0]), one("b", &[99.0, 2.0, 2.0, 2.0]), none];
        let samples = run(all, 1, 3, true, || {}).unwrap();
        assert_eq!(log.borrow().as_str(), "abbaabba");
        assert_eq!(samples[0].figure(0), Some(3.0));
        assert_eq!(samples[0].ratio(&samples[1], 0), Some(1.5));
        assert_eq!(samples[2].rows.as_ref().err().map(String::as_str), Some("too big"));
        assert_eq!(samples[2].figure(0), None);
    }

    #[test]
    fn what_the_harness_costs_comes_off() {
        let mut samples = Samples::new("a", vec![vec![5.0, 7.0], vec![9.0, 9.0]]);
        samples.less(&[Some(2.0), None]);
        assert_eq!((samples.figure(0), samples.figure(1)), (Some(4.0), Some(9.0)));
    }

    #[test]
    fn operations_are_counted_until_they_take_long_enough() {
        let spent = |n: u64| Ok::<_, ()>(Duration::from_micros(n));
        assert_eq!(try_calibrate(Duration::from_micros(100), spent), Ok(100));
        assert_eq!(try_calibrate(Duration::from_micros(100), |_| Err(())), Err(()));
        let mut calls = 0;
        let interrupted = |n: u64| {
            calls += 1;
            Ok::<_, ()>(Duration::from_micros(if calls == 1 { 500 } else { n }))
        };
        assert_eq!(try_calibrate(Duration::from_micros(100), interrupted), Ok(100));
    }

    #[test]
    fn a_walk_of_legs_is_the_mean_of_their_medians() {
        assert_eq!(figure(&[1.0, 10.0, 2.0, 20.0, 9.0, 30.0], 2), (2.0 + 20.0) / 2.0);
    }
}
