//! Reclaim: what stands behind the page allocator's slow path \[R1–R5, G4\].
//!
//! # Concepts
//! Memory comes back from *sources*: shrinkers, caches that can count and give up objects; and the slab layer,
//! whose depots are only kept for speed; stacks that CPUs keep; chunks of per-CPU
//! data that they keep; and vmalloc, where areas wait that were freed in atomic
//! context. (LRU lists, swap and page cache join as further sources of `Vmscan::shrink_node`.) Two callers ask: *kswapd*,
//! one task per node, woken at the low watermark and working up to the high one; and *direct reclaim*, a
//! request that would fail otherwise. When neither gets anywhere, the OOM handler decides.
//!
//! # Implementation
//! Pressure is a *priority* from 12 down to 0: a source is asked for 1/2^priority of what it has, so
//! the first rounds are gentle. `__GFP_IO` and `__GFP_FS` are kept by not asking a shrinker whose
//! [`needs`](Shrinker::needs) the request lacks; what it would have scanned is owed and asked for later.
//!
//! # Locking
//! The registry's lock is held while a shrinker is looked up, never while it runs.
//!
//! See [shrinkers](https://docs.kernel.org/core-api/mm-api.html) and
//! [concepts](https://docs.kernel.org/admin-guide/mm/concepts.html).

mod kswapd;
mod oom;
mod shrinker;

pub use oom::OomHandler;
pub use shrinker::{ShrinkControl, Shrinker, ShrinkerError, ShrinkerId};

use crate::{
    context::Cpu,
    gfp::Gfp,
    page_alloc::{Config, PageAllocator, Reclaim, ReclaimRequest},
    percpu::{Chunks, Space},
    platform::Platform,
    slab::{Objects, Slabs},
    stack::{Stacks, Threads},
    sync::IrqLock,
    types::{MAX_NODES, ZoneType},
    vmalloc::{Vmalloc, Vmap},
};
use kswapd::NodeState;
use shrinker::Registry;

/// Where the pressure starts.
const DEF_PRIORITY: u32 = 12;
/// Objects a direct reclaimer is content with.
const SWAP_CLUSTER_MAX: u64 = 32;

/// The reclaim of one machine.
pub struct Vmscan {
    shrinkers: Registry,
    nodes: [NodeState; MAX_NODES],
    oom: IrqLock<Option<&'static dyn OomHandler>>,
    slabs: Slabs,
    vmalloc: Vmalloc,
    stacks: Stacks,
    percpu: Option<Space>,
}

impl Default for Vmscan {
    fn default() -> Self {
        Vmscan::new()
    }
}

impl Vmscan {
    /// No shrinkers, no kswapd, no OOM handler.
    pub const fn new() -> Vmscan {
        Vmscan {
            shrinkers: Registry::new(),
            nodes: [const { NodeState::new() }; MAX_NODES],
            oom: IrqLock::new(None),
            slabs: Slabs::new(),
            vmalloc: Vmalloc::new(),
            stacks: Stacks::new(),
            percpu: None,
        }
    }

    /// As a machine's settings say, before its bring-up.
    pub(crate) fn configured(config: &Config, percpu: &Space) -> Vmscan {
        let mut made = Vmscan::new();
        made.stacks.attach(percpu);
        made.percpu = Some(*percpu);
        made.slabs.configure(config);
        made
    }

    /// Asks every source of a node for its share at this priority; returns the objects freed.
    fn shrink_node<P: Platform>(
        &self,
        pages: &PageAllocator<P, Self>,
        node: usize,
        gfp: Gfp,
        priority: u32,
    ) -> u64 {
        // Depots cost nothing to give up, whatever the pressure, and what shrinkers free lies there.
        let freed = self.shrinkers.shrink(pages, node, gfp, priority);
        let freed = freed + self.objects(pages).shrink_node(node);
        let freed = freed + self.threads(pages).shrink();
        let freed = freed + self.chunks(pages).map_or(0, |chunks| chunks.shrink());
        freed + self.vmap(pages).shrink(priority)
    }

    /// Per-CPU data on these pages.
    fn chunks<'a, P: Platform>(
        &'a self,
        pages: &'a PageAllocator<P, Self>,
    ) -> Option<Chunks<'a, P, Self>> {
        self.percpu.as_ref().map(|space| Chunks { space, pages })
    }

    /// Kernel stacks on these pages.
    #[inline(always)]
    pub(crate) fn threads<'a, P: Platform>(
        &'a self,
        pages: &'a PageAllocator<P, Self>,
    ) -> Threads<'a, P, Self> {
        Threads { vmap: self.vmap(pages), state: &self.stacks }
    }

    /// vmalloc on these pages.
    #[inline(always)]
    pub(crate) fn vmap<'a, P: Platform>(
        &'a self,
        pages: &'a PageAllocator<P, Self>,
    ) -> Vmap<'a, P, Self> {
        Vmap { objects: self.objects(pages), state: &self.vmalloc }
    }

    /// The slab layer on these pages.
    #[inline(always)]
    pub(crate) fn objects<'a, P: Platform>(
        &'a self,
        pages: &'a PageAllocator<P, Self>,
    ) -> Objects<'a, P, Self> {
        Objects { pages, slabs: &self.slabs }
    }
}

impl Reclaim for Vmscan {
    fn wake_kswapd<P: Platform>(
        &self,
        pages: &PageAllocator<P, Self>,
        node: usize,
        order: u32,
        highest: ZoneType,
    ) {
        if let Some(n) = self.nodes.get(node) {
            n.wake(pages.platform(), order, highest);
        }
    }

    fn try_to_free_pages<P: Platform>(
        &self,
        pages: &PageAllocator<P, Self>,
        r: &ReclaimRequest,
    ) -> u64 {
        let target = SWAP_CLUSTER_MAX.max(1 << r.order);
        let mut freed = 0;
        for priority in (0..=DEF_PRIORITY).rev() {
            for node in pages.nodes_from(r.node).filter(|n| r.nodes >> n & 1 == 1) {
                freed += self.shrink_node(pages, node, r.gfp, priority);
            }
            if freed >= target {
                break;
            }
        }
        if freed > 0 {
            // kswapd that had given up may find something now.
            for n in &self.nodes {
                n.encourage();
            }
        }
        freed
    }

    fn reclaimable<P: Platform>(&self, pages: &PageAllocator<P, Self>, node: usize) -> u64 {
        self.shrinkers.count(pages, node)
    }

    fn run_deferred<P: Platform>(&self, pages: &PageAllocator<P, Self>, cpu: &Cpu) {
        self.objects(pages).run_deferred(cpu);
    }

    fn cpu_offline<P: Platform>(&self, pages: &PageAllocator<P, Self>, cpu: usize) {
        self.threads(pages).drop_cpu(cpu);
    }

    fn unreclaimable(&self, node: usize) -> bool {
        self.nodes.get(node).is_some_and(NodeState::gave_up)
    }

    fn out_of_memory<P: Platform>(
        &self,
        pages: &PageAllocator<P, Self>,
        r: &ReclaimRequest,
    ) -> bool {
        oom::call(self, pages, r)
    }
}

impl Vmscan {
    pub(crate) fn register<P: Platform>(
        &self,
        pages: &PageAllocator<P, Self>,
        s: &'static dyn Shrinker,
    ) -> Result<ShrinkerId, ShrinkerError> {
        self.shrinkers.register(pages.platform(), s)
    }

    pub(crate) fn unregister<P: Platform>(
        &self,
        pages: &PageAllocator<P, Self>,
        id: ShrinkerId,
    ) -> Result<(), ShrinkerError> {
        self.shrinkers.unregister(pages.platform(), id)
    }

    pub(crate) fn set_oom_handler<P: Platform>(
        &self,
        pages: &PageAllocator<P, Self>,
        handler: Option<&'static dyn OomHandler>,
    ) {
        *self.oom.lock(pages.platform()) = handler;
    }
}
