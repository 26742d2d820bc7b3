//! The tests that the image runs on its own machine.
//!
//! Each test gets the allocator, says in a line what it did, and must leave as many frames free as it
//! found: that is checked after every test, once the per-CPU lists are drained, and so is where every
//! frame is. What a test allocates
//! it keeps track of in the allocated memory itself; there is no heap.

mod block;
mod bulk;
mod exhaust;
mod machine;
mod misuse;
mod orders;
mod percpu;
mod random;
mod stacks;
mod storm;
mod vmalloc;

pub use storm::on_interrupt;

use crate::{clock, platform::BareMetal, println};
use fastrand::Rng;
use kmem::{Kmem, page_state::NodeStat};

/// A test failed; the line that says why has been printed.
pub struct Failed;

/// How a test ended.
pub type Verdict = Result<(), Failed>;

/// What a test works with.
pub struct Bench {
    /// The allocator.
    pub kmem: &'static Kmem<BareMetal>,
    /// Random choices, the same for the same seed.
    pub rng: Rng,
    /// How long the interrupt storm lasts.
    pub storm_ns: u64,
}

/// Ends the test with a message.
macro_rules! fail {
    ($($message:tt)+) => {{
        $crate::println!("FAIL: {} ({}:{})", format_args!($($message)+), file!(), line!());
        return Err($crate::selftest::Failed);
    }};
}

/// Ends the test with a message unless the condition holds.
macro_rules! check {
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            $crate::selftest::fail!($($message)+);
        }
    };
}

use {check, fail};

type Test = (&'static str, fn(&mut Bench) -> Verdict);

const TESTS: [Test; 12] = [
    ("machine", machine::run),
    ("orders", orders::run),
    ("bulk", bulk::run),
    ("random", random::run),
    ("percpu", percpu::run),
    ("misuse", misuse::run),
    ("vmalloc", vmalloc::run),
    ("stacks", stacks::run),
    ("exhaustion", exhaust::run),
    ("interrupt storm", storm::timer),
    ("storm under pressure", storm::pressure),
    ("single-step storm", storm::single_step),
];

/// Runs the tests; whether all passed. The first that fails is the last that runs, as nobody knows in
/// what state it left memory.
pub fn run(bench: &mut Bench) -> bool {
    for (passed, (name, test)) in TESTS.into_iter().enumerate() {
        let start = clock::now_ns();
        let verdict = checked(bench, name, test);
        let ms = (clock::now_ns() - start) / 1_000_000;
        if verdict.is_err() {
            println!("test {name}: FAILED, {ms} ms");
            println!("selftest: {passed} of {} tests passed, then one failed", TESTS.len());
            return false;
        }
        println!("test {name}: ok, {ms} ms");
    }
    println!("selftest: all {} tests passed", TESTS.len());
    true
}

/// Runs a test, and checks that it left everything as it was.
fn checked(bench: &mut Bench, name: &str, test: fn(&mut Bench) -> Verdict) -> Verdict {
    let free = drained_free(bench.kmem);
    test(bench)?;
    let after = drained_free(bench.kmem);
    check!(free == after, "{name}: {free} frames free before, {after} after");
    let audit = bench.kmem.audit();
    check!(audit.is_ok(), "{name}: audit: {audit:?}");
    Ok(())
}

/// Frames free once nothing waits in per-CPU lists and magazines, and those that the slab layer and page tables
/// keep.
fn drained_free(kmem: &Kmem<BareMetal>) -> u64 {
    kmem.drop_kept_stacks();
    kmem.vm_unmap_aliases();
    kmem.drop_slab();
    kmem.drain_all_pages();
    let kept = kmem.audit_objects().map_or(0, |objects| objects.slab_frames + objects.own_frames);
    kmem.nr_free_pages() + kept + kmem.global_node_page_state(NodeStat::PageTable)
}
