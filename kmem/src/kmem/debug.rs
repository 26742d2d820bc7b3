//! Calls that look for mistakes, and that switch looking for them on and off \[S9, D2\].

use super::Kmem;
use crate::{
    error::Misuse,
    fault::{FaultPlan, FaultSite},
    platform::Platform,
    slab::{DebugError, INIT_ON_ALLOC, INIT_ON_FREE, KmemCache, SlabFlags, TRACE},
};

impl<P: Platform> Kmem<P> {
    /// `validate_slab_cache`: looks at every object of a cache that has red zones or poison, and at the counts
    /// of a cache with consistency checks \[S9\]. Each mistake is reported, up to eight for a node; free objects that
    /// were written to are kept from use.
    ///
    /// Context: any but NMI. Interrupts are masked while a node's slabs are looked at.
    ///
    /// # Errors
    /// The first [`Misuse`] that was found.
    ///
    /// See [SLUB debugging](https://docs.kernel.org/mm/slab.html).
    #[track_caller]
    pub fn kmem_cache_validate(&self, cache: &KmemCache) -> Result<(), Misuse> {
        self.objects().validate(cache)
    }

    /// Sets which of [`SlabFlags::DEBUG`] are on for a cache. Consistency checks may be switched at any time.
    /// Red zones, poison and users need room around the objects, or known contents of those that are free: a
    /// cache has them from its creation on or never. A cache that was merged is switched for all of its users.
    ///
    /// Context: process context: other CPUs are waited for until they gave their magazines up.
    ///
    /// # Errors
    /// [`DebugError`]; nothing was switched.
    pub fn kmem_cache_set_debug(
        &self,
        cache: &KmemCache,
        flags: SlabFlags,
    ) -> Result<(), DebugError> {
        self.objects().set_debug(cache, flags)
    }

    /// Whether all pages and objects are zeroed when they are given out (`init_on_alloc`) \[D2\]. Objects with
    /// constructor or poison are not. What lies in magazines goes back to its slabs first, and while this is on
    /// CPUs have none.
    ///
    /// Context: process context: other CPUs are waited for until they gave their magazines up.
    ///
    /// # Errors
    /// [`DebugError::Busy`]; nothing was switched.
    pub fn set_init_on_alloc(&self, on: bool) -> Result<(), DebugError> {
        self.objects().set_mode(INIT_ON_ALLOC, on)?;
        self.pages.set_init_pages_on_alloc(on);
        Ok(())
    }

    /// Whether all pages and objects are zeroed when they are freed (`init_on_free`) \[D2\]; else as
    /// [`set_init_on_alloc`](Self::set_init_on_alloc). What was freed before stays as it is.
    ///
    /// # Errors
    /// As [`set_init_on_alloc`](Self::set_init_on_alloc).
    pub fn set_init_on_free(&self, on: bool) -> Result<(), DebugError> {
        self.objects().set_mode(INIT_ON_FREE, on)?;
        self.pages.set_init_pages_on_free(on);
        Ok(())
    }

    /// What the order in which a slab's objects are given out is drawn from; `None` for ascending addresses
    /// \[D2\]. Takes effect with the next object that is taken out of a slab.
    ///
    /// Context: any.
    pub fn set_slab_random(&self, seed: Option<u64>) {
        self.objects().set_random(seed);
    }

    /// Has allocations of objects fail by plan (`failslab`), all of them or those of the callers in some lines of a
    /// file \[D1\]: they find no memory. Requests with `__GFP_NOFAIL` do not. While this is on CPUs have no magazines.
    ///
    /// Context: process context; may sleep.
    ///
    /// # Errors
    /// [`DebugError::Busy`]; nothing fails then.
    ///
    /// See [fault injection](https://docs.kernel.org/fault-injection/fault-injection.html).
    pub fn set_failslab(&self, plan: FaultPlan, site: Option<FaultSite>) -> Result<(), DebugError> {
        self.objects().set_failslab(plan, site)
    }

    /// How many allocations of objects were made to fail by [`set_failslab`](Self::set_failslab).
    pub fn failslab_injected(&self) -> u64 {
        self.objects().slabs.failslab_count()
    }

    /// Notes who holds how much of what the slab layer gives out, for
    /// [`write_allocinfo`](crate::PageAllocator::write_allocinfo): up to so many `objects`, or nothing. What is
    /// noted is forgotten at each call. While this is on CPUs have no magazines.
    ///
    /// Context: process context; may sleep.
    ///
    /// # Errors
    /// [`DebugError::NoMemory`] and [`DebugError::Busy`]; nothing is noted then.
    ///
    /// See [allocation profiling](https://docs.kernel.org/mm/allocation-profiling.html).
    pub fn set_alloc_tags(&self, objects: Option<usize>) -> Result<(), DebugError> {
        self.objects().set_tags(objects)
    }

    /// Whether events of objects (`kmalloc`, `kfree`, `kmem_cache_alloc`, `kmem_cache_free`) go to the sink that
    /// [`set_tracer`](crate::PageAllocator::set_tracer) named \[T2\]. Objects of the slab layer itself have none, nor
    /// have frees of null. While this is on CPUs have no magazines, and no object is moved.
    ///
    /// Context: process context; may sleep.
    ///
    /// # Errors
    /// [`DebugError::Busy`]; nothing was switched.
    ///
    /// See [`events-kmem`](https://docs.kernel.org/trace/events-kmem.html).
    pub fn set_trace_objects(&self, on: bool) -> Result<(), DebugError> {
        self.objects().set_mode(TRACE, on)
    }

    /// Objects that were not noted for want of room since tags were switched on; 0 while they are off.
    pub fn alloc_tags_lost(&self) -> u64 {
        self.objects().tags_lost()
    }
}
