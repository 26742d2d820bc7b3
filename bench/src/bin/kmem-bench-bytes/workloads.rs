//! Workloads: how to make a thread's work out of a handle.
//!
//! # Concepts
//! Larson's benchmark is one contest with a row for one thread and one for two, so that the two can be compared
//! turn by turn.
//!
//! # Locking
//! None.

use kmem_bench::{
    bytes::{
        Bytes,
        workload::{self, EXCHANGE, Exchange},
    },
    crew::Making,
    work::Work,
};
use std::sync::Arc;

/// A workload.
pub trait Workload {
    /// What a contender's threads share besides the allocator.
    type Between: Default;

    /// Its rows: the name, and how many threads run at once.
    fn rows(&self) -> Vec<(&'static str, usize)>;

    /// Operations that the work counts as one.
    fn ops(&self) -> u64 {
        1
    }

    /// How a thread makes its work.
    fn work<'a, B: Bytes + Send + 'a>(
        &self,
        thread: usize,
        bytes: B,
        between: &Self::Between,
    ) -> Making<'a>;
}

/// 64 bytes and back.
pub struct Hot;

impl Workload for Hot {
    type Between = ();

    fn rows(&self) -> Vec<(&'static str, usize)> {
        vec![("64 B pair", 1)]
    }

    fn work<'a, B: Bytes + Send + 'a>(&self, _: usize, bytes: B, (): &()) -> Making<'a> {
        Box::new(|| Box::new(workload::Pair::new(bytes)))
    }
}

/// Objects replaced at random, each thread its own.
pub struct Larson;

impl Workload for Larson {
    type Between = ();

    fn rows(&self) -> Vec<(&'static str, usize)> {
        vec![("larson, 1 thread", 1), ("larson, 2 threads", 2)]
    }

    fn work<'a, B: Bytes + Send + 'a>(&self, thread: usize, bytes: B, (): &()) -> Making<'a> {
        Box::new(move || Box::new(workload::Larson::new(bytes, thread)))
    }
}

/// Objects replaced at random by two threads that free each other's.
pub struct Swapped;

impl Workload for Swapped {
    type Between = Arc<Exchange>;

    fn rows(&self) -> Vec<(&'static str, usize)> {
        vec![("larson, swapped", 2)]
    }

    fn ops(&self) -> u64 {
        EXCHANGE
    }

    fn work<'a, B: Bytes + Send + 'a>(
        &self,
        thread: usize,
        bytes: B,
        between: &Arc<Exchange>,
    ) -> Making<'a> {
        let exchange = between.clone();
        Box::new(move || -> Box<dyn Work + 'a> {
            Box::new(workload::Swapped::new(bytes, thread, exchange))
        })
    }
}
