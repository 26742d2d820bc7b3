//! The object events as one list of operations.

use kmem::{Gfp, slab::SlabFlags};
use kmem_trace::{CacheShape, Kind, Recording, slab::LinuxSlab};
use std::collections::{BTreeMap, BTreeSet};

/// Linux's names of the kmalloc caches, up to the size, and the flag that leads to kmem's.
const KMALLOC: [(&str, Gfp); 4] = [
    ("kmalloc-cg-", Gfp::empty()),
    ("kmalloc-rcl-", Gfp::RECLAIMABLE),
    ("dma-kmalloc-", Gfp::DMA_ZONE),
    ("kmalloc-", Gfp::empty()),
];

/// Linux's caches of what it keeps for caches, and one of kmem's.
const OWN: [&str; 3] = ["kmem_cache", "kmem_cache_node", "kmem_cache_cpu"];

/// Whether a cache is one for what the recorded slab layer keeps for caches: Linux's, or kmem's in a recording of a
/// replay.
pub fn is_own(name: &str) -> bool {
    OWN.contains(&name) || name.starts_with("kmem_magazine_")
}

/// `SLAB_RECLAIM_ACCOUNT` in Linux 6.12.
const RECLAIM_ACCOUNT: u64 = 1 << 16;

/// Where a recorded cache's objects come from.
pub enum Source {
    /// A cache of that name.
    Cache {
        /// Flags beside `NO_MERGE`.
        flags: SlabFlags,
        /// Whether Linux's has a constructor.
        constructor: bool,
    },
    /// kmalloc, with further flags.
    Kmalloc(Gfp),
    /// Nowhere: the slab layer makes its own.
    Nowhere,
}

/// A cache of the recording.
pub struct Cache {
    /// Linux's name.
    pub name: String,
    /// Bytes of an object.
    pub size: u32,
    /// Alignment, 0 for any.
    pub align: u32,
    /// What stands for it.
    pub source: Source,
    /// Whether it is there from the start.
    pub at_start: bool,
    /// Objects live when the recording began.
    pub live: u64,
    /// By the order of their addresses, the handles of those that the recording frees.
    pub freed: Vec<u32>,
}

/// What an operation does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum What {
    /// `kmalloc`.
    Kmalloc,
    /// `kmem_cache_alloc`.
    CacheAlloc,
    /// `kfree`.
    Kfree,
    /// `kmem_cache_free`.
    CacheFree,
}

/// One operation.
#[derive(Clone, Copy, Debug)]
pub struct Op {
    /// Row in the recording.
    pub row: u32,
    /// The object.
    pub handle: u32,
    /// Bytes asked for.
    pub bytes: u32,
    /// Linux's flags of the request.
    pub gfp: u32,
    /// Index into [`Plan::caches`].
    pub cache: u32,
    /// The recorded CPU.
    pub cpu: u16,
    /// What to do.
    pub what: What,
}

/// All objects of a recording.
pub struct Plan {
    /// The caches.
    pub caches: Vec<Cache>,
    /// The operations, in the recorded order.
    pub ops: Vec<Op>,
    /// Handles: the recording's ids, then objects from before.
    pub handles: usize,
    /// Events of Linux's own caches, left out.
    pub own_events: u64,
    /// Frees of objects from before whose cache nobody knows, left out.
    pub unmatched_frees: u64,
    /// Objects from before that are freed.
    pub prior_frees: u64,
}

/// Bytes that a name's size stands for: `64`, `1k`.
fn named_size(text: &str) -> Option<u32> {
    match text.strip_suffix('k') {
        Some(k) => k.parse::<u32>().ok()?.checked_mul(1024),
        None => text.parse().ok(),
    }
}

/// What kmalloc's cache for `size` bytes is called.
fn kmalloc_name(size: u32) -> String {
    if size >= 1024 && size.is_multiple_of(1024) {
        format!("kmalloc-{}k", size / 1024)
    } else {
        format!("kmalloc-{size}")
    }
}

/// kmem's name of Linux's cache: without accounting, `kmalloc-cg-64` is `kmalloc-64`.
pub fn own_name(name: &str) -> String {
    match name.strip_prefix("kmalloc-cg-") {
        Some(size) => format!("kmalloc-{size}"),
        None => name.to_owned(),
    }
}

impl Cache {
    fn new(name: &str, shape: Option<&CacheShape>) -> Cache {
        let kmalloc = KMALLOC.iter().find_map(|(prefix, gfp)| {
            let size = named_size(name.strip_prefix(prefix)?)?;
            Some((size, *gfp))
        });
        let shape = shape.filter(|s| s.object_size > 0);
        let (size, source) = match kmalloc {
            Some((size, gfp)) => (size, Source::Kmalloc(gfp)),
            None if is_own(name) => (0, Source::Nowhere),
            None => {
                let reclaim = shape.is_some_and(|s| s.flags & RECLAIM_ACCOUNT != 0);
                let flags = if reclaim { SlabFlags::RECLAIM_ACCOUNT } else { SlabFlags::empty() };
                let constructor = shape.is_some_and(|s| s.constructor);
                (shape.map_or(0, |s| s.object_size), Source::Cache { flags, constructor })
            }
        };
        Cache {
            name: name.to_owned(),
            size,
            align: shape.map_or(0, |s| s.align),
            source,
            at_start: false,
            live: 0,
            freed: Vec::new(),
        }
    }
}

/// The caches by name.
#[derive(Default)]
struct Caches {
    list: Vec<Cache>,
    by_name: BTreeMap<String, u32>,
}

impl Caches {
    fn add(&mut self, name: &str, shape: Option<&CacheShape>) -> u32 {
        if let Some(known) = self.by_name.get(name) {
            return *known;
        }
        let new = self.list.len() as u32;
        self.list.push(Cache::new(name, shape));
        self.by_name.insert(name.to_owned(), new);
        new
    }

    fn get(&mut self, cache: u32) -> &mut Cache {
        &mut self.list[cache as usize]
    }
}

impl Plan {
    /// The operations of a recording. With `known_free` the start is without the objects that Linux calls active
    /// and the recording shows to be free.
    pub fn new(recording: &Recording, linux: Option<&LinuxSlab>, known_free: bool) -> Plan {
        let mut caches = Caches::default();
        let mut by_number = BTreeMap::new();
        for (number, shape) in &recording.meta.caches {
            by_number.insert(*number, caches.add(&shape.name, Some(shape)));
        }
        let linux = linux.iter().flat_map(|linux| &linux.caches);
        for cache in linux.filter(|cache| cache.at_start) {
            let known = caches.add(&cache.name, None);
            let own = caches.get(known);
            if own.size == 0 {
                own.size = cache.object_size;
            }
            own.live = cache.start.live - if known_free { cache.shown_free } else { 0 };
            own.at_start = true;
        }
        let mut plan = Plan {
            caches: Vec::new(),
            ops: Vec::new(),
            handles: recording.ids() as usize,
            own_events: 0,
            unmatched_frees: 0,
            prior_frees: 0,
        };
        plan.operations(recording, &by_number, &mut caches);
        plan.caches = caches.list;
        plan.forget_unknown();
        plan
    }

    /// Caches whose objects have a constructor.
    pub fn constructors(&self) -> BTreeSet<String> {
        let made = |c: &&Cache| matches!(c.source, Source::Cache { constructor: true, .. });
        self.caches.iter().filter(made).map(|cache| cache.name.clone()).collect()
    }

    fn operations(
        &mut self,
        recording: &Recording,
        by_number: &BTreeMap<u16, u32>,
        caches: &mut Caches,
    ) {
        let mut freed: BTreeMap<u32, Vec<(u64, u32)>> = BTreeMap::new();
        let mut allocated: Vec<bool> = vec![false; self.handles];
        for (at, row, cache) in recording.object_rows() {
            let what = match row.kind {
                Kind::Kmalloc => What::Kmalloc,
                Kind::Kfree => What::Kfree,
                Kind::CacheAlloc | Kind::BulkAlloc => What::CacheAlloc,
                _ => What::CacheFree,
            };
            let mut cache = cache.and_then(|cache| by_number.get(&cache).copied());
            // The text of kmalloc names no cache.
            if row.bytes_allocated > 0 && matches!(what, What::Kmalloc | What::Kfree) {
                cache =
                    cache.or_else(|| Some(caches.add(&kmalloc_name(row.bytes_allocated), None)));
            }
            let Some(cache) = cache else {
                self.unmatched_frees += 1;
                continue;
            };
            let own = caches.get(cache);
            if matches!(own.source, Source::Nowhere) {
                self.own_events += 1;
                continue;
            }
            if own.size == 0 {
                own.size = row.bytes_allocated;
            }
            let handle = match row.id {
                Some(id) if row.kind.gives_id() => {
                    allocated[id as usize] = true;
                    id
                }
                Some(id) if allocated.get(id as usize) == Some(&true) => id,
                Some(_) => {
                    self.unmatched_frees += 1;
                    continue;
                }
                None => {
                    let handle = self.handles as u32;
                    self.handles += 1;
                    self.prior_frees += 1;
                    freed.entry(cache).or_default().push((row.address, handle));
                    handle
                }
            };
            self.ops.push(Op {
                row: at as u32,
                handle,
                bytes: row.bytes_requested,
                gfp: row.gfp,
                cache,
                cpu: row.cpu,
                what,
            });
        }
        for (cache, mut freed) in freed {
            freed.sort_unstable();
            let own = caches.get(cache);
            own.freed = freed.into_iter().map(|(_, handle)| handle).collect();
            own.live = own.live.max(own.freed.len() as u64);
        }
    }

    /// Leaves out what is of caches whose size nothing tells: only frees from before speak of them.
    fn forget_unknown(&mut self) {
        let caches = &mut self.caches;
        let before = self.ops.len();
        self.ops.retain(|op| caches[op.cache as usize].size > 0);
        self.unmatched_frees += (before - self.ops.len()) as u64;
        for cache in caches.iter_mut().filter(|cache| cache.size == 0) {
            self.prior_frees -= cache.freed.len() as u64;
            cache.freed.clear();
            (cache.live, cache.source) = (0, Source::Nowhere);
        }
    }
}
