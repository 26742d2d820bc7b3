//! The calls that wait for readers \[S5\].

use super::Kmem;
use crate::{error::Misuse, gfp::Gfp, platform::Platform};

impl<P: Platform> Kmem<P> {
    /// `kfree_rcu`: frees what kmalloc or a cache returned once all readers are done that may look at it now. `head` is
    /// where in the object [`RCU_HEAD`](crate::slab::RCU_HEAD) bytes are, aligned to a word, that readers do not look
    /// at (`struct rcu_head`), nor the callback of a cache that [moves](Self::kmem_cache_set_move) it just then. Null is left alone. Until then the object cannot be freed again.
    ///
    /// Context: any but NMI.
    ///
    /// # Safety
    /// Nobody but those readers uses the object any more, they do not write to it, and nobody uses the bytes at
    /// `head`. An address that is not that of a live object does no harm: it is found out.
    ///
    /// # Errors
    /// [`Misuse`], reported as well, and nothing changed; `NoGracePeriods` on a platform without.
    ///
    /// See [`kfree_rcu`](https://docs.kernel.org/core-api/kernel-api.html#c.kfree_rcu).
    #[track_caller]
    pub unsafe fn kfree_rcu(&self, at: *mut u8, head: usize) -> Result<(), Misuse> {
        self.objects().free_later(at, head)
    }

    /// `kfree_rcu_mightsleep`: waits for the readers and frees the object, which needs no room for that.
    ///
    /// Context: process context; sleeps.
    ///
    /// # Safety
    /// Nobody but readers that are at it now uses the object any more.
    ///
    /// # Errors
    /// As [`kfree`](Self::kfree), and `NoGracePeriods` on a platform without; `AtomicContext` for a caller that
    /// cannot sleep, after a report.
    #[track_caller]
    pub unsafe fn kfree_rcu_mightsleep(&self, at: *mut u8) -> Result<(), Misuse> {
        if self.pages.check_context(Gfp::KERNEL).is_err() {
            return Err(Misuse::AtomicContext);
        }
        if !self.objects().synchronize_rcu() {
            return Err(self.pages.misuse(Misuse::NoGracePeriods));
        }
        self.objects().kfree(at)
    }

    /// `synchronize_rcu`: waits until all readers are done that are at it now; `false` if the platform has none, or the
    /// caller cannot sleep, which is reported.
    ///
    /// Context: process context; sleeps.
    #[track_caller]
    pub fn synchronize_rcu(&self) -> bool {
        self.pages.check_context(Gfp::KERNEL).is_ok() && self.objects().synchronize_rcu()
    }

    /// `rcu_barrier`: waits until all is freed that waits for readers: objects of [`kfree_rcu`](Self::kfree_rcu) and
    /// slabs of type-safe caches. `false` if the caller cannot sleep, which is reported.
    ///
    /// Context: process context; sleeps.
    #[track_caller]
    pub fn rcu_barrier(&self) -> bool {
        let may = self.pages.check_context(Gfp::KERNEL).is_ok();
        if may {
            self.objects().rcu_barrier();
        }
        may
    }
}
