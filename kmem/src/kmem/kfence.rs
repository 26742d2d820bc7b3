//! Calls about sampled objects on pages of their own \[D2\].

use super::Kmem;
use crate::{
    kfence::{KfenceError, KfenceStats},
    platform::Platform,
};
use core::sync::atomic::{
    AtomicBool,
    Ordering::{Acquire, Relaxed},
};

/// How long [`Kmem::kfence_run`] sleeps while there is nothing to do.
const NAP_NS: u64 = 100_000_000;

impl<P: Platform> Kmem<P> {
    /// Sets how many nanoseconds there are from one sample to the next at least, or 0 for no samples
    /// (`kfence.sample_interval`) \[D2\]. What is in the pool stays there until it is freed.
    ///
    /// Context: any but NMI.
    ///
    /// # Errors
    /// [`KfenceError::NoPool`] without [`Config::kfence`](crate::Config::kfence).
    ///
    /// See [KFENCE](https://docs.kernel.org/dev-tools/kfence.html).
    pub fn set_kfence(&self, sample_interval_ns: u64) -> Result<(), KfenceError> {
        self.objects().set_kfence(sample_interval_ns)
    }

    /// If a sample is due, has every CPU take the slower paths until it allocates an object, which is the sample
    /// then. To be called about as often as samples are wanted, from anywhere: a timer's interrupt on one CPU will do.
    /// Without it only those allocations are sampled that come to a slow path by themselves.
    ///
    /// Context: any but NMI.
    pub fn kfence_toggle(&self) {
        self.objects().kfence_toggle();
    }

    /// Calls [`kfence_toggle`](Self::kfence_toggle) at each sample interval until `stop` is set: to be run on a task
    /// of its own. Reacts to `stop` within a tenth of a second.
    ///
    /// Context: process context; sleeps.
    pub fn kfence_run(&self, stop: &AtomicBool) {
        let kfence = &self.objects().slabs.kfence;
        while !stop.load(Acquire) {
            let bell = kfence.bell.load(Relaxed);
            let nap = match kfence.interval_ns() {
                0 => NAP_NS,
                // No more often than a clock ticks.
                ns => ns.clamp(1_000_000, NAP_NS),
            };
            // Returns at once if the bell has changed since; then the interval is another one.
            self.platform().wait(&kfence.bell, bell, nap);
            self.kfence_toggle();
        }
    }

    /// Wakes [`kfence_run`](Self::kfence_run), so that it looks at its `stop` at once.
    pub fn nudge_kfence(&self) {
        self.objects().nudge_kfence();
    }

    /// What a page fault's handler asks about an address that is not mapped: whether it is in the pool. If so, the
    /// mistake is reported, and the page is opened: the access may be tried again. `ip` is the instruction's address,
    /// or 0.
    ///
    /// `false` if the fault is somebody else's, or if
    /// [misuses are fatal](crate::PageAllocator::set_panic_on_misuse): then the access must not be tried again.
    ///
    /// Context: any; takes no lock but what [`Platform::report`] takes.
    pub fn kfence_handle_page_fault(&self, addr: usize, is_write: bool, ip: usize) -> bool {
        self.objects().kfence_fault(addr, is_write, ip)
    }

    /// Whether an address is in the pool, be it an object's or not (`is_kfence_address`).
    ///
    /// Context: any.
    pub fn is_kfence_address(&self, addr: *const u8) -> bool {
        self.objects().is_kfence_address(addr.addr())
    }

    /// What became of the samples; `None` without a pool.
    ///
    /// Context: any.
    pub fn kfence_stats(&self) -> Option<KfenceStats> {
        self.objects().kfence_stats()
    }
}
