//! All contenders.
//!
//! # Concepts
//! Allocators are made once and serve all contests: those of the process cannot be made anew. What a contest
//! leaves in use is given back by the threads that have it.
//!
//! # Locking
//! Spin locks around those that have none of their own.

use crate::{BYTES, Run, workloads::Workload};
use anyhow::Result;
use kmem_bench::{
    Locked,
    bytes::{
        BuddyHeap, Bytes, Glibc, GlobalSlab, Jemalloc, KmemBytes, Mimalloc, Rlsf, Rpmalloc, Same,
        SlabHeap, TalcHeap, global_slab, workload::LARGEST,
    },
    contest::{self, Contestant, Turn},
    crew::{self, Crew},
    report::{HARNESS, JEMALLOC, KMEM},
};
use kmem_hosted::Machine;

/// The allocators that are values.
pub struct Heaps<'a> {
    machine: &'a Machine,
    global: GlobalSlab,
    slab: spin::Mutex<SlabHeap>,
    talc: spin::Mutex<TalcHeap>,
    rlsf: spin::Mutex<Rlsf>,
    buddy: spin::Mutex<BuddyHeap>,
}

impl<'a> Heaps<'a> {
    /// Gives each [`BYTES`].
    pub fn new(machine: &'a Machine) -> Result<Heaps<'a>> {
        Ok(Heaps {
            machine,
            global: global_slab(BYTES)?,
            slab: spin::Mutex::new(SlabHeap::new(BYTES)?),
            talc: spin::Mutex::new(TalcHeap::new(BYTES)?),
            rlsf: spin::Mutex::new(Rlsf::new(BYTES)?),
            buddy: spin::Mutex::new(BuddyHeap::new(BYTES)?),
        })
    }
}

/// The turns of a contender whose handles `handle` makes: time per operation of each row.
fn turn<'c, 'a: 'c, W: Workload, B: Bytes + Send + 'a>(
    run: &Run,
    crew: &'c Crew<'a>,
    w: &W,
    handle: impl Fn() -> B,
) -> Result<Turn<'c>> {
    let between = W::Between::default();
    let rows = w.rows().into_iter().map(|(_, threads)| threads);
    crew::turns(crew, run.turn, rows, w.ops(), |thread| w.work(thread, handle(), &between))
}

/// Runs a workload for everyone.
pub fn contest<'c, 'a: 'c, W: Workload>(
    run: &mut Run,
    crew: &'c Crew<'a>,
    heaps: &'a Heaps<'a>,
    w: &W,
) -> Result<()> {
    let rows = w.rows();
    if !rows.iter().any(|(name, _)| run.wants(name)) {
        return Ok(());
    }
    run.bar.set_message(rows[0].0);
    let contestants = vec![
        Contestant { name: KMEM, turn: turn(run, crew, w, || KmemBytes(heaps.machine)) },
        Contestant { name: JEMALLOC, turn: turn(run, crew, w, || Jemalloc) },
        Contestant { name: "mimalloc", turn: turn(run, crew, w, || Mimalloc) },
        Contestant { name: "rpmalloc", turn: turn(run, crew, w, || Rpmalloc) },
        Contestant { name: "glibc", turn: turn(run, crew, w, || Glibc) },
        Contestant {
            name: "slab_allocator_rs + spin",
            turn: turn(run, crew, w, || Locked(&heaps.slab)),
        },
        Contestant { name: "talc + spin", turn: turn(run, crew, w, || Locked(&heaps.talc)) },
        Contestant { name: "rlsf + spin", turn: turn(run, crew, w, || Locked(&heaps.rlsf)) },
        Contestant {
            name: "buddy-slab GlobalAllocator",
            turn: turn(run, crew, w, || heaps.global),
        },
        Contestant {
            name: "buddy_system Heap + spin",
            turn: turn(run, crew, w, || Locked(&heaps.buddy)),
        },
        Contestant { name: HARNESS, turn: turn(run, crew, w, || Same::new(LARGEST)) },
    ];
    let samples = contest::run(contestants, 1, run.rounds, true, || run.bar.inc(1))?;
    run.report.add_contest(&rows, BYTES, samples);
    Ok(())
}
