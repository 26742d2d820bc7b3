//! kswapd: one task per node that keeps free frames between the low and the high watermark \[R2\].
//!
//! # Concepts
//! The allocator wakes it when a request finds every zone below low. It shrinks with rising pressure until
//! some zone the request could use is above its high watermark, then sleeps. After sixteen runs without any
//! effect it sleeps through wake-ups, until direct reclaim has found something to free.
//!
//! # Implementation
//! The platform runs [`PageAllocator::kswapd_run`] on a task of its own per node. Sleeping is a wait on a
//! word that every wake-up changes.
//!
//! # Locking
//! Single atomics.

use super::{DEF_PRIORITY, Vmscan};
use crate::{
    context::{PF_KSWAPD, PF_MEMALLOC},
    gfp::Gfp,
    page_alloc::PageAllocator,
    platform::Platform,
    types::ZoneType,
    vmstat::VmEvent,
    zone::AllocFlags,
};
use core::sync::atomic::{
    AtomicBool, AtomicU32,
    Ordering::{Acquire, Relaxed, SeqCst},
};

/// Runs without effect after which kswapd sleeps through wake-ups.
const MAX_FAILURES: u32 = 16;
/// It looks whether it is to stop at least this often, in nanoseconds.
const NAP_NS: u64 = 100_000_000;

/// What a node's kswapd knows.
pub(super) struct NodeState {
    /// Changes with every wake-up.
    bell: AtomicU32,
    /// Whether kswapd waits for the bell, so that ringing it without need costs no call.
    asleep: AtomicBool,
    order: AtomicU32,
    highest: AtomicU32,
    failures: AtomicU32,
}

impl NodeState {
    pub(super) const fn new() -> NodeState {
        NodeState {
            bell: AtomicU32::new(0),
            asleep: AtomicBool::new(false),
            order: AtomicU32::new(0),
            highest: AtomicU32::new(0),
            failures: AtomicU32::new(0),
        }
    }

    pub(super) fn wake<P: Platform>(&self, p: &P, order: u32, highest: ZoneType) {
        if self.gave_up() {
            return;
        }
        self.order.fetch_max(order, Relaxed);
        self.highest.fetch_max(highest as u32, Relaxed);
        // SeqCst, here and in `kswapd_run`: either this sees kswapd asleep, or kswapd, about to sleep, sees
        // the bell changed. Order and highest are seen with the bell.
        self.bell.fetch_add(1, SeqCst);
        if self.asleep.load(SeqCst) {
            p.wake(&self.bell);
        }
    }

    /// Whether kswapd sleeps through wake-ups.
    pub(super) fn gave_up(&self) -> bool {
        self.failures.load(Relaxed) >= MAX_FAILURES
    }

    /// Reclaim has had an effect somewhere.
    pub(super) fn encourage(&self) {
        if self.failures.load(Relaxed) != 0 {
            self.failures.store(0, Relaxed);
        }
    }
}

impl<P: Platform> PageAllocator<P, Vmscan> {
    /// kswapd of a node, until `stop` is set: to be run on a task of its own, in process context. Reacts
    /// to `stop` within a tenth of a second.
    pub fn kswapd_run(&self, node: usize, stop: &AtomicBool) {
        let Some(state) = self.reclaim().nodes.get(node) else { return };
        self.mark_current(PF_KSWAPD | PF_MEMALLOC, true);
        let mut heard = 0;
        while !stop.load(Acquire) {
            let bell = state.bell.load(SeqCst);
            if bell == heard {
                state.asleep.store(true, SeqCst);
                // The wait returns at once if the bell has changed since.
                self.platform().wait(&state.bell, bell, NAP_NS);
                state.asleep.store(false, SeqCst);
                continue;
            }
            heard = bell;
            let order = state.order.swap(0, Relaxed);
            let highest = state.highest.swap(0, Relaxed) as usize;
            self.balance_node(state, node, order, highest, stop);
        }
        self.mark_current(PF_KSWAPD | PF_MEMALLOC, false);
    }

    /// Wakes kswapd of every node, so that it looks at its `stop` at once.
    pub fn nudge_kswapd(&self) {
        for state in self.reclaim().nodes.iter().take(self.nr_nodes()) {
            state.wake(self.platform(), 0, ZoneType::Dma);
        }
    }

    fn mark_current(&self, bits: u32, on: bool) {
        if let Some(task) = self.platform().this_cpu().and_then(|cpu| cpu.current()) {
            task.mark(bits, on);
        }
    }

    /// Whether some zone of the node that the request could use is above its high watermark.
    fn node_balanced(&self, node: usize, order: u32, highest: usize) -> bool {
        let high = AllocFlags { wmark: 2, ..AllocFlags::default() };
        let mut zones = self
            .zones()
            .iter()
            .filter(|z| z.node() == node && z.zone_type() as usize <= highest)
            .filter(|z| z.managed_frames() > 0)
            .peekable();
        zones.peek().is_none()
            || zones.any(|z| z.room(highest, high) >= (1 << order) - 1 && z.room(highest, high) > 0)
    }

    fn balance_node(
        &self,
        state: &NodeState,
        node: usize,
        order: u32,
        highest: usize,
        stop: &AtomicBool,
    ) {
        self.count(VmEvent::PageOutRun, 1);
        let mut freed = 0;
        for priority in (1..=DEF_PRIORITY).rev() {
            if self.node_balanced(node, order, highest) {
                if freed == 0 {
                    self.count(VmEvent::KswapdHighWmarkHitQuickly, 1);
                }
                self.relieve_node(node);
                return;
            }
            if stop.load(Acquire) {
                return;
            }
            freed += self.reclaim().shrink_node(self, node, Gfp::KERNEL, priority);
            self.drain_this_cpu();
        }
        if freed == 0 {
            state.failures.fetch_add(1, Relaxed);
        } else {
            state.failures.store(0, Relaxed);
        }
    }

    fn relieve_node(&self, node: usize) {
        for z in self.zones().iter().filter(|z| z.node() == node) {
            z.pressed.store(0, Relaxed);
        }
    }
}
