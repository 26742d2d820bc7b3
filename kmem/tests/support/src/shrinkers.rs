//! Sources of reclaim that closures play.

use crate::Rig;
use kmem::{
    Gfp,
    page_alloc::ReclaimRequest,
    reclaim::{OomHandler, ShrinkControl, Shrinker, ShrinkerId},
};
use kmem_hosted::Machine;
use std::sync::{
    Arc, Mutex, Weak,
    atomic::{AtomicU32, AtomicU64, Ordering::SeqCst},
};

/// What a scan does: is given the machine, the demand and the number of the call, from 1.
pub type Scan = dyn Fn(&Machine, &ShrinkControl, u64) -> Option<u64> + Send + Sync;

/// A shrinker that says it has a number of objects, and whose scans a closure plays.
pub struct TestShrinker {
    /// Objects that it says it has.
    pub objects: AtomicU64,
    needs: Gfp,
    numa: bool,
    scan: Box<Scan>,
    machine: Weak<Machine>,
    scans: AtomicU64,
    scanned: AtomicU64,
    seen: Mutex<Vec<ShrinkControl>>,
}

impl TestShrinker {
    /// Registers one with `objects` objects that costs no flag.
    pub fn register(
        rig: &Rig,
        objects: u64,
        scan: impl Fn(&Machine, &ShrinkControl, u64) -> Option<u64> + Send + Sync + 'static,
    ) -> (&'static TestShrinker, ShrinkerId) {
        TestShrinker::needing(rig, Gfp::empty(), objects, scan)
    }

    /// Registers one that is not to be called without the flags `needs`.
    pub fn needing(
        rig: &Rig,
        needs: Gfp,
        objects: u64,
        scan: impl Fn(&Machine, &ShrinkControl, u64) -> Option<u64> + Send + Sync + 'static,
    ) -> (&'static TestShrinker, ShrinkerId) {
        TestShrinker::made(rig, needs, false, objects, Box::new(scan))
    }

    /// Registers one that keeps its objects by node.
    pub fn by_node(
        rig: &Rig,
        objects: u64,
        scan: impl Fn(&Machine, &ShrinkControl, u64) -> Option<u64> + Send + Sync + 'static,
    ) -> (&'static TestShrinker, ShrinkerId) {
        TestShrinker::made(rig, Gfp::empty(), true, objects, Box::new(scan))
    }

    fn made(
        rig: &Rig,
        needs: Gfp,
        numa: bool,
        objects: u64,
        scan: Box<Scan>,
    ) -> (&'static TestShrinker, ShrinkerId) {
        let shrinker: &'static TestShrinker = Box::leak(Box::new(TestShrinker {
            objects: AtomicU64::new(objects),
            needs,
            numa,
            scan,
            machine: Arc::downgrade(rig.machine()),
            scans: AtomicU64::new(0),
            scanned: AtomicU64::new(0),
            seen: Mutex::new(Vec::new()),
        }));
        let id = rig.register_shrinker(shrinker).unwrap();
        (shrinker, id)
    }

    /// Scans so far.
    pub fn scans(&self) -> u64 {
        self.scans.load(SeqCst)
    }

    /// Objects it was asked to look at so far.
    pub fn scanned(&self) -> u64 {
        self.scanned.load(SeqCst)
    }

    /// The scans' demands.
    pub fn seen(&self) -> Vec<ShrinkControl> {
        self.seen.lock().unwrap().clone()
    }
}

impl Shrinker for TestShrinker {
    fn count_objects(&self, _sc: &ShrinkControl) -> u64 {
        self.objects.load(SeqCst)
    }

    fn scan_objects(&self, sc: &ShrinkControl) -> Option<u64> {
        let n = self.scans.fetch_add(1, SeqCst) + 1;
        self.scanned.fetch_add(sc.nr_to_scan, SeqCst);
        self.seen.lock().unwrap().push(*sc);
        (self.scan)(&*self.machine.upgrade()?, sc, n)
    }

    fn needs(&self) -> Gfp {
        self.needs
    }

    fn numa_aware(&self) -> bool {
        self.numa
    }
}

type Play = dyn Fn(&Machine, &ReclaimRequest) -> bool + Send + Sync;

/// An OOM handler that a closure plays.
pub struct OomScript {
    play: Box<Play>,
    machine: Weak<Machine>,
    calls: AtomicU32,
}

impl OomScript {
    /// Puts one in place.
    pub fn install(
        rig: &Rig,
        play: impl Fn(&Machine, &ReclaimRequest) -> bool + Send + Sync + 'static,
    ) -> &'static OomScript {
        let script: &'static OomScript = Box::leak(Box::new(OomScript {
            play: Box::new(play),
            machine: Arc::downgrade(rig.machine()),
            calls: AtomicU32::new(0),
        }));
        rig.set_oom_handler(Some(script));
        script
    }

    /// Calls so far.
    pub fn calls(&self) -> u32 {
        self.calls.load(SeqCst)
    }
}

impl OomHandler for OomScript {
    fn out_of_memory(&self, request: &ReclaimRequest) -> bool {
        self.calls.fetch_add(1, SeqCst);
        self.machine.upgrade().is_some_and(|machine| (self.play)(&machine, request))
    }
}
