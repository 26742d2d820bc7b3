//! One machine's memory manager.
//!
//! # Concepts
//! [`Kmem`] puts the layers together. A kernel has one in a static; a hosted process can have twenty.
//! It dereferences to its page allocator, whose calls are the classic ones.
//!
//! # Locking
//! None of its own.

mod debug;
mod highmem;
mod kfence;
mod kmemleak;
mod kvmalloc;
mod objects;
mod percpu;
mod rcu;
mod stack;
mod vmalloc;

use crate::{
    highmem::Highmem,
    memblock::Memblock,
    page_alloc::{BringUpError, Config, PageAllocator},
    page_state::SystemStat,
    percpu::Space,
    platform::Platform,
    reclaim::{OomHandler, Shrinker, ShrinkerError, ShrinkerId, Vmscan},
    slab::pattern,
};
use core::ops::Deref;

/// The memory manager of one machine.
pub struct Kmem<P: Platform> {
    pages: PageAllocator<P, Vmscan>,
    percpu: Space,
    highmem: Highmem,
}

impl<P: Platform> Kmem<P> {
    /// Brings a machine up: takes what the boot allocator has left and ends its use \[B1\].
    ///
    /// # Errors
    /// [`BringUpError`].
    pub fn bring_up(
        platform: P,
        mut boot: Memblock,
        config: &Config,
    ) -> Result<Kmem<P>, BringUpError> {
        if let Some(Err((at, why))) = config.slab_debug.map(pattern::check) {
            return Err(BringUpError::SlabDebug(at, why));
        }
        let percpu = Space::bring_up(&platform, &mut boot, config.max_order)?;
        let highmem = Highmem::bring_up(&platform, &mut boot, config)?;
        let reclaim = Vmscan::configured(config, &percpu);
        let pages = PageAllocator::bring_up(platform, boot, config, reclaim)?;
        pages.reclaim().objects(&pages).attach_cpus();
        let kmem = Kmem { pages, percpu, highmem };
        if let Some(range) = kmem.pages.platform().vmalloc_range() {
            let frames = (range.len() >> P::PAGE_SHIFT) as i64;
            kmem.pages.mod_system_state(SystemStat::VmallocTotal, frames);
        }
        if let Some(wanted) = config.kfence {
            kmem.objects().make_pool(wanted).map_err(BringUpError::Kfence)?;
        }
        // Nobody has magazines yet who could refuse.
        let _ = kmem.set_init_on_alloc(config.init_on_alloc);
        let _ = kmem.set_init_on_free(config.init_on_free);
        Ok(kmem)
    }

    /// The layer of pages alone.
    pub(crate) fn pages(&self) -> &PageAllocator<P, Vmscan> {
        &self.pages
    }

    /// Registers a shrinker \[R1\].
    ///
    /// # Errors
    /// [`ShrinkerError::Full`].
    pub fn register_shrinker(&self, s: &'static dyn Shrinker) -> Result<ShrinkerId, ShrinkerError> {
        self.pages.reclaim().register(&self.pages, s)
    }

    /// Unregisters a shrinker and waits until it no longer runs. May sleep.
    ///
    /// # Errors
    /// [`ShrinkerError::Unknown`].
    pub fn unregister_shrinker(&self, id: ShrinkerId) -> Result<(), ShrinkerError> {
        self.pages.reclaim().unregister(&self.pages, id)
    }

    /// Names the OOM handler, or none \[R3\].
    pub fn set_oom_handler(&self, handler: Option<&'static dyn OomHandler>) {
        self.pages.reclaim().set_oom_handler(&self.pages, handler);
    }
}

impl<P: Platform> Deref for Kmem<P> {
    type Target = PageAllocator<P, Vmscan>;

    #[inline(always)]
    fn deref(&self) -> &Self::Target {
        &self.pages
    }
}
