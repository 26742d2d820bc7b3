//! Tracepoints of objects \[T2\].
//!
//! # Implementation
//! While they are on, CPUs have no magazines, so that every request and every free takes the slow paths, which
//! look here. An allocation is told after it was answered, a free before the object can be given out again: so
//! whoever keeps events in the order in which they come finds each object free before it is allocated.
//!
//! # Locking
//! The tracer's, for a moment; the sink is called with nothing held.

use super::super::{Objects, cache::Descriptor};
use super::{FAILSLAB, INIT_ON_ALLOC, INIT_ON_FREE, tags::TAGS};
use crate::{
    error::{AllocError, Name},
    gfp::Gfp,
    page_alloc::Reclaim,
    platform::Platform,
    trace::Event,
};
use core::{panic::Location, ptr::NonNull, sync::atomic::Ordering::Relaxed};

/// Bit of `Slabs::modes`.
pub(crate) const TRACE: u32 = 16;
const _: () = assert!(TRACE & (INIT_ON_ALLOC | INIT_ON_FREE | FAILSLAB | TAGS) == 0);

/// What an allocation asked for.
#[derive(Clone, Copy)]
pub(in super::super) struct Asked {
    pub(in super::super) bytes: usize,
    pub(in super::super) gfp: Gfp,
    pub(in super::super) node: Option<usize>,
}

impl<'a, P: Platform, R: Reclaim> Objects<'a, P, R> {
    pub(in super::super) fn tracing(&self) -> bool {
        self.slabs.modes.load(Relaxed) & TRACE != 0
    }

    /// `kmalloc`, of a cache or of `bytes_alloc` bytes of pages.
    #[track_caller]
    pub(in super::super) fn trace_kmalloc(
        &self,
        cache: Option<&Descriptor>,
        bytes_alloc: usize,
        asked: Asked,
        got: Result<NonNull<u8>, AllocError>,
    ) {
        if let Some(ptr) = self.told(got) {
            self.pages.trace(&Event::KmallocAlloc {
                call_site: Location::caller(),
                ptr,
                cache: cache.map(|d| d.name),
                bytes_req: asked.bytes,
                bytes_alloc,
                gfp: asked.gfp,
                node: node_number(asked.node),
            });
        }
    }

    /// `kmem_cache_alloc`.
    #[track_caller]
    pub(in super::super) fn trace_cache_alloc(
        &self,
        d: &Descriptor,
        gfp: Gfp,
        node: Option<usize>,
        got: Result<NonNull<u8>, AllocError>,
    ) {
        if let Some(ptr) = self.told(got) {
            self.pages.trace(&Event::KmemCacheAlloc {
                call_site: Location::caller(),
                ptr,
                cache: d.name,
                bytes_req: d.size as usize,
                bytes_alloc: d.layout.stride as usize,
                gfp,
                node: node_number(node),
            });
        }
    }

    /// The address to tell of an allocation, 0 where there was no memory; `None` for nothing to be told, also
    /// of a request that was wrong.
    fn told(&self, got: Result<NonNull<u8>, AllocError>) -> Option<usize> {
        let ptr = match got {
            Ok(at) => at.addr().get(),
            Err(AllocError::NoMemory) => 0,
            Err(_) => return None,
        };
        self.tracing().then_some(ptr)
    }

    /// `kmem_cache_free` where the caller named the cache, else `kfree`, of an object or of `bytes_alloc`
    /// bytes of pages.
    #[track_caller]
    pub(in super::super) fn trace_free(
        &self,
        ptr: usize,
        cache: Option<Name>,
        bytes_alloc: usize,
        named: bool,
    ) {
        if self.tracing() {
            let call_site = Location::caller();
            self.pages.trace(&match cache.filter(|_| named) {
                Some(cache) => Event::KmemCacheFree { call_site, ptr, cache },
                None => Event::Kfree { call_site, ptr, cache, bytes_alloc },
            });
        }
    }
}

/// A node as the kernel prints it: −1 is any.
fn node_number(node: Option<usize>) -> i32 {
    node.map_or(-1, |node| node as i32)
}
