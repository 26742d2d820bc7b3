//! What Linux's own slab layer held: what a replay of the objects starts from and is compared with.
//!
//! # Concepts
//! `slabinfo` says what each cache held before and after. Between the two, page rows that back slabs
//! ([`crate::Row::backs_slab`]) tell when a slab came and went, and so what was held at the peak. Such a row does not
//! name its cache; the first object seen in its frames does.
//!
//! An allocation and its free are tied by the id. A free without one is of an object from before; each such row is
//! another object. The start therefore is, for each cache, as many live objects as `slabinfo` calls active, or as
//! many as are freed without an id if those are more.
//!
//! # What is not known
//! Linux counts free objects of slabs that a CPU has for itself as active. Where the first event at an address in a
//! slab from before is an allocation, the object was free: [`LinuxSlab::shown_free`] counts those that `slabinfo`
//! called active all the same, [`LinuxCache::shown_free`] by cache. Objects without any event may have been free as
//! well.

use std::collections::BTreeMap;

use rustc_hash::{FxHashMap, FxHashSet};

use crate::error::TraceError;
use crate::proc::Slabinfo;
use crate::recording::Recording;
use crate::row::{Id, Kind, Row};

/// What a cache held at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Frames of its slabs.
    pub frames: u64,
    /// Live objects.
    pub live: u64,
}

/// One cache of the recorded machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LinuxCache {
    /// Its name.
    pub name: String,
    /// Bytes of an object that its user may touch; where nothing tells, from one object to the next.
    pub object_size: u32,
    /// Whether it was there when the recording began.
    pub at_start: bool,
    /// When the recording began.
    pub start: Held,
    /// When all caches together held most; zeros if that is not known.
    pub peak: Held,
    /// After the recording.
    pub end: Held,
    /// Objects that `slabinfo` called active at the start and the recording shows to have been free.
    pub shown_free: u64,
}

/// The slab layer of the recorded machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LinuxSlab {
    /// The caches: those of `slabinfo` in its order, then those that came later.
    pub caches: Vec<LinuxCache>,
    /// Frames of all slabs when the recording began.
    pub frames_start: u64,
    /// Most frames at any time and the row that brought them; `None` if no page row says that it backs a slab.
    pub peak: Option<(u64, usize)>,
    /// Frames at the last row, by the same count.
    pub frames_last_row: Option<u64>,
    /// Frames by the `slabinfo` of the end, which was read after the last row.
    pub frames_end: Option<u64>,
}

impl LinuxSlab {
    /// Objects of all caches that `slabinfo` called active at the start and the recording shows to have been free.
    pub fn shown_free(&self) -> u64 {
        self.caches.iter().map(|cache| cache.shown_free).sum()
    }
}

/// Where the kernel's direct map of physical memory begins on x86-64.
const DIRECT_MAP: u64 = 0xffff_8880_0000_0000;

/// The frame of an object, if it lies in the direct map.
fn frame_of(row: &Row, page_shift: u32) -> Option<u64> {
    row.address.checked_sub(DIRECT_MAP).map(|offset| offset >> page_shift)
}

/// A slab that came or went during the recording.
struct Slab {
    frames: u64,
    cache: Option<u16>,
    /// Row it came with; `None`: it was there before.
    from: Option<usize>,
    /// Row it went with.
    to: Option<usize>,
}

impl Slab {
    /// What it adds to the frames held at the start, at a row.
    fn at(&self, row: usize) -> i64 {
        let came = self.from.is_some_and(|from| from <= row);
        let gone = self.to.is_some_and(|to| to <= row);
        (i64::from(came) - i64::from(gone)) * self.frames as i64
    }
}

/// What the rows tell.
#[derive(Default)]
struct Seen {
    slabs: Vec<Slab>,
    /// The slab of a page row, by the row's id.
    by_id: FxHashMap<Id, usize>,
    /// The slab that a frame is in, of those that came with a row.
    of_frame: FxHashMap<u64, usize>,
    /// The cache of a frame from before.
    before: FxHashMap<u64, u16>,
    /// Addresses of objects in slabs from before.
    touched: FxHashSet<u64>,
    /// By cache: objects from before whose first event is an allocation.
    first_allocated: FxHashMap<u16, u64>,
}

impl Seen {
    /// Takes a page row that backs a slab; returns by how many frames more are held.
    fn page(&mut self, at: usize, row: &Row) -> i64 {
        let frames = row.frames();
        let block = row.address..row.address + frames;
        match row.kind {
            Kind::PageAlloc | Kind::PageBulkAlloc => {
                let slab = self.slabs.len();
                self.slabs.push(Slab { frames, cache: None, from: Some(at), to: None });
                self.by_id.extend(row.id.map(|id| (id, slab)));
                self.of_frame.extend(block.map(|pfn| (pfn, slab)));
                frames as i64
            }
            Kind::PageFree => {
                let slab = row.id.and_then(|id| self.by_id.remove(&id));
                if let Some(slab) = slab {
                    self.slabs[slab].to = Some(at);
                    block.for_each(|pfn| {
                        self.of_frame.remove(&pfn);
                    });
                } else {
                    let cache = block.clone().find_map(|pfn| self.before.get(&pfn).copied());
                    self.slabs.push(Slab { frames, cache, from: None, to: Some(at) });
                }
                -(frames as i64)
            }
            _ => 0,
        }
    }

    fn object(&mut self, row: &Row, cache: u16, page_shift: u32) {
        let Some(pfn) = frame_of(row, page_shift) else { return };
        if let Some(slab) = self.of_frame.get(&pfn) {
            self.slabs[*slab].cache.get_or_insert(cache);
            return;
        }
        self.before.insert(pfn, cache);
        if self.touched.insert(row.address) && row.kind.gives_id() {
            *self.first_allocated.entry(cache).or_default() += 1;
        }
    }
}

impl Recording {
    /// The slab cache of each object row, and the row's index and the row. A free whose row does not name the cache
    /// is of that of its allocation.
    pub fn object_rows(&self) -> impl Iterator<Item = (usize, &Row, Option<u16>)> {
        let mut caches: FxHashMap<Id, u16> = FxHashMap::default();
        let rows = self.rows.iter().enumerate().filter(|(_, row)| row.kind.is_slab());
        rows.map(move |(at, row)| {
            let known = row.id.and_then(|id| caches.get(&id).copied());
            let cache = row.cache.or(known);
            if let (Some(id), Some(cache), true) = (row.id, cache, row.kind.gives_id()) {
                caches.insert(id, cache);
            }
            (at, row, cache)
        })
    }

    /// What Linux's slab layer held over the recording. `None` if there is no `start/slabinfo`.
    ///
    /// # Errors
    /// A `slabinfo` is there and cannot be parsed; the error names it and the line.
    pub fn linux_slab(&self) -> Result<Option<LinuxSlab>, TraceError> {
        let meta = &self.meta;
        let parse = |names: &[&str]| {
            let found = names.iter().find_map(|name| Some((*name, meta.file(name)?)));
            found.map(|(name, text)| Slabinfo::parse(text, name)).transpose()
        };
        let Some(start) = parse(&["slabinfo.traced_start", "start/slabinfo"])? else {
            return Ok(None);
        };
        let end = parse(&["slabinfo.traced_end", "end/slabinfo"])?;
        let mut seen = Seen::default();
        let mut frames = start.frames() as i64;
        let mut peak: Option<(u64, usize)> = None;
        let mut objects = self.object_rows().peekable();
        for (at, row) in self.rows.iter().enumerate() {
            if let Some((_, _, Some(cache))) = objects.next_if(|(object, ..)| *object == at) {
                seen.object(row, cache, meta.page_shift);
            } else if row.backs_slab {
                frames = frames.saturating_add(seen.page(at, row));
                let now = frames.max(0) as u64;
                if peak.is_none_or(|(most, _)| now > most) {
                    peak = Some((now, at));
                }
            }
        }
        if let Some((most, at)) = &mut peak
            && *most < start.frames()
        {
            (*most, *at) = (start.frames(), 0);
        }
        let mut by_name = ByName::new(&start, end.as_ref());
        by_name.sizes(self);
        by_name.live(self, peak);
        by_name.frames(self, &seen, peak);
        by_name.shown_free(self, &start, &seen);
        Ok(Some(LinuxSlab {
            caches: by_name.caches,
            frames_start: start.frames(),
            peak,
            frames_last_row: peak.map(|_| frames.max(0) as u64),
            frames_end: end.as_ref().map(Slabinfo::frames),
        }))
    }
}

/// The caches under construction.
struct ByName {
    caches: Vec<LinuxCache>,
    at: BTreeMap<String, usize>,
}

impl ByName {
    fn new(start: &Slabinfo, end: Option<&Slabinfo>) -> ByName {
        let mut new = ByName { caches: Vec::new(), at: BTreeMap::new() };
        for cache in &start.caches {
            let own = new.get(&cache.name);
            own.object_size = cache.size;
            own.at_start = true;
            own.start = Held { frames: cache.frames(), live: cache.active_objects };
        }
        for cache in end.iter().flat_map(|end| &end.caches) {
            let own = new.get(&cache.name);
            own.object_size = cache.size;
            own.end.frames = cache.frames();
        }
        new
    }

    fn get(&mut self, name: &str) -> &mut LinuxCache {
        let next = self.caches.len();
        let at = *self.at.entry(name.to_owned()).or_insert(next);
        if at == next {
            self.caches.push(LinuxCache { name: name.to_owned(), ..LinuxCache::default() });
        }
        &mut self.caches[at]
    }

    /// Takes the sizes that users may touch from the recording's table.
    fn sizes(&mut self, recording: &Recording) {
        for shape in recording.meta.caches.values().filter(|shape| shape.object_size > 0) {
            self.get(&shape.name).object_size = shape.object_size;
        }
    }

    /// Counts live objects.
    fn live(&mut self, recording: &Recording, peak: Option<(u64, usize)>) {
        // By cache: frees of objects from before, and how many more are live at the peak and at the end.
        let mut counts: FxHashMap<u16, (u64, i64, i64)> = FxHashMap::default();
        for (at, row, cache) in recording.object_rows() {
            let Some(cache) = cache else { continue };
            let (prior, at_peak, at_end) = counts.entry(cache).or_default();
            let more = if row.kind.gives_id() { 1 } else { -1 };
            *prior += u64::from(more < 0 && row.id.is_none());
            *at_end += more;
            if peak.is_some_and(|(_, peak)| at <= peak) {
                *at_peak += more;
            }
        }
        let mut counts: Vec<_> = counts.into_iter().collect();
        counts.sort_unstable();
        let mut sums: BTreeMap<&str, (u64, i64, i64)> = BTreeMap::new();
        for (cache, (prior, at_peak, at_end)) in counts {
            let Some(shape) = recording.meta.caches.get(&cache) else { continue };
            let sum = sums.entry(&shape.name).or_default();
            *sum = (sum.0 + prior, sum.1 + at_peak, sum.2 + at_end);
        }
        for cache in &mut self.caches {
            let (prior, at_peak, at_end) =
                sums.get(cache.name.as_str()).copied().unwrap_or_default();
            cache.start.live = cache.start.live.max(prior);
            cache.end.live = cache.start.live.saturating_add_signed(at_end);
            if peak.is_some() {
                cache.peak.live = cache.start.live.saturating_add_signed(at_peak);
            }
        }
    }

    /// Counts frames at the peak.
    fn frames(&mut self, recording: &Recording, seen: &Seen, peak: Option<(u64, usize)>) {
        let Some((_, at)) = peak else { return };
        self.caches.iter_mut().for_each(|cache| cache.peak.frames = cache.start.frames);
        for slab in &seen.slabs {
            let shape = slab.cache.and_then(|cache| recording.meta.caches.get(&cache));
            let cache = self.get(shape.map_or("?", |shape| &shape.name));
            cache.peak.frames = cache.peak.frames.saturating_add_signed(slab.at(at));
        }
    }

    /// Counts objects called active that were free at the start.
    fn shown_free(&mut self, recording: &Recording, start: &Slabinfo, seen: &Seen) {
        let mut shown: BTreeMap<&str, u64> = BTreeMap::new();
        for (cache, n) in &seen.first_allocated {
            let shape = recording.meta.caches.get(cache);
            *shown.entry(shape.map_or("?", |shape| &shape.name)).or_default() += n;
        }
        for cache in &start.caches {
            let shown = shown.get(cache.name.as_str()).copied().unwrap_or(0);
            // Those that slabinfo knows to be free are taken to be among them.
            let unknown = shown.saturating_sub(cache.objects - cache.active_objects);
            self.get(&cache.name).shown_free = unknown.min(cache.active_objects);
        }
    }
}
