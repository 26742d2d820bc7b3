//! The recording as lists of operations, one per recorded CPU.
//!
//! # Concepts
//! Page events become [`Op`]s of 24 bytes. A block is named by a *handle*: the id of its allocation in the
//! recording. Blocks from before the recording get handles of their own after those, one per
//! block, so that a machine that cannot have them at their pfns may have stand-ins elsewhere.

use kmem_trace::{PageOp, Recording, pages::Nonsense};

/// What an operation does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum What {
    /// Allocate `handle`.
    Alloc,
    /// Free `handle`.
    Free,
    /// `handle` ends, `other` and `other + 1` are its halves.
    Split,
    /// `handle` is called `other` from here on.
    Rename,
}

/// One operation.
#[derive(Clone, Copy, Debug)]
pub struct Op {
    /// Position among the page events.
    pub seq: u32,
    /// The block.
    pub handle: u32,
    /// See [`What`].
    pub other: u32,
    /// Linux's flags of the request.
    pub gfp: u32,
    /// What to do.
    pub what: What,
    /// Order of the block.
    pub order: u8,
}

/// A block from before the recording.
#[derive(Clone, Copy, Debug)]
pub struct Prior {
    /// Its first frame on the recorded machine.
    pub pfn: u64,
    /// Its order.
    pub order: u8,
    /// Its handle.
    pub handle: u32,
}

/// What an event that makes no sense was.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Odd {
    /// Row in the recording.
    pub row: usize,
    /// Frame on the recorded machine.
    pub pfn: u64,
    /// Order.
    pub order: u8,
    /// What is odd about it.
    pub why: &'static str,
}

/// All operations of a recording.
pub struct Plan {
    /// Operations by recorded CPU.
    pub cpus: Vec<Vec<Op>>,
    /// Time of each operation, in nanoseconds from the start, in the same shape.
    pub times: Vec<Vec<u64>>,
    /// Blocks from before the recording.
    pub prior: Vec<Prior>,
    /// Handles in all.
    pub handles: usize,
    /// Page events, those of compaction included.
    pub events: usize,
    /// Page events of compaction, which ask for nothing.
    pub compaction_events: usize,
    /// Frees that make no sense.
    pub unmatched_frees: usize,
    /// The first of them.
    pub odd: Vec<Odd>,
}

/// How many odd events are listed.
const LISTED: usize = 20;

impl Plan {
    /// The operations of a recording.
    pub fn new(recording: &Recording) -> Plan {
        let mut plan = Plan {
            cpus: Vec::new(),
            times: Vec::new(),
            prior: Vec::new(),
            handles: recording.ids() as usize,
            events: 0,
            compaction_events: 0,
            unmatched_frees: 0,
            odd: Vec::new(),
        };
        for e in recording.page_events() {
            let seq = plan.events as u32;
            plan.events += 1;
            let op =
                |what, handle, other| Op { seq, handle, other, gfp: e.gfp, what, order: e.order };
            let op = match e.op {
                PageOp::Alloc { id } => op(What::Alloc, id, 0),
                PageOp::Free { id } => op(What::Free, id, 0),
                PageOp::Vanished { id } => {
                    plan.odd(e.row, e.pfn, e.order, "the block's free is missing");
                    op(What::Free, id, 0)
                }
                PageOp::FreePrior => {
                    let handle = plan.add_prior(e.pfn, e.order);
                    op(What::Free, handle, 0)
                }
                PageOp::Split { id, first, second } => {
                    debug_assert_eq!(second, first + 1);
                    op(What::Split, id, first)
                }
                PageOp::Migrate { from: Some(from), to, .. } => op(What::Rename, from, to),
                PageOp::Migrate { from: None, to, .. } => {
                    let handle = plan.add_prior(e.pfn, e.order);
                    op(What::Rename, handle, to)
                }
                PageOp::Compaction => {
                    plan.compaction_events += 1;
                    continue;
                }
                PageOp::Nonsense(why) => {
                    plan.unmatched_frees += 1;
                    let why = match why {
                        Nonsense::NotLive => "frees a block that is not live",
                        Nonsense::OtherBlock => "names a block that begins elsewhere",
                        Nonsense::OverlapsLive => "frees frames of a live block",
                    };
                    plan.odd(e.row, e.pfn, e.order, why);
                    continue;
                }
            };
            let cpu = usize::from(e.cpu);
            while plan.cpus.len() <= cpu {
                plan.cpus.push(Vec::new());
                plan.times.push(Vec::new());
            }
            plan.cpus[cpu].push(op);
            plan.times[cpu].push(e.time_ns);
        }
        plan
    }

    fn add_prior(&mut self, pfn: u64, order: u8) -> u32 {
        let handle = self.handles as u32;
        self.handles += 1;
        self.prior.push(Prior { pfn, order, handle });
        handle
    }

    fn odd(&mut self, row: usize, pfn: u64, order: u8, why: &'static str) {
        if self.odd.len() < LISTED {
            self.odd.push(Odd { row, pfn, order, why });
        }
    }

    /// The largest order of any operation.
    pub fn largest_order(&self) -> u32 {
        self.cpus.iter().flatten().map(|op| u32::from(op.order)).max().unwrap_or(0)
    }

    /// Recorded CPUs.
    pub fn nr_cpus(&self) -> usize {
        self.cpus.len()
    }
}
