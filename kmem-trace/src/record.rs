//! Making a recording: events as they come, one after the other, to rows.
//!
//! # Concepts
//!
//! Whoever watches an allocator sees addresses: a block at a frame, an object at a pointer. A [`Recorder`] gives each
//! allocation the next id and finds for each free what is live there, puts splits in before a part of a block is freed, and
//! numbers the names of call sites and caches. What is freed and was never seen allocated is from before the recording.
//!
//! Events must come in the order in which they happened as far as memory goes: nothing is allocated twice without a free
//! in between. Where that is not so, a free is taken to be missing, as in [`crate::pages`].

use crate::live::Live;
use crate::meta::{CacheShape, Meta};
use crate::recording::Recording;
use crate::row::{Kind, NO_STACK, Row};

/// When and where something happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// Nanoseconds by the clock of whoever watches; the first event's is the recording's beginning.
    pub time_ns: u64,
    /// The CPU.
    pub cpu: u16,
}

/// An object that is allocated or freed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Object<'a> {
    /// Where it is.
    pub address: u64,
    /// The function or place that asked; `None` if nobody says.
    pub site: Option<&'a str>,
    /// Its cache; `None` if nobody says.
    pub cache: Option<&'a str>,
    /// Bytes it takes up; 0 if nobody says.
    pub bytes_allocated: u32,
}

/// A recording under construction.
pub struct Recorder {
    meta: Meta,
    rows: Vec<Row>,
    live: Live,
    /// Time of the first event, from which the others count.
    first_ns: Option<u64>,
}

impl Recorder {
    /// A recording described by `meta`, without events.
    pub fn new(meta: Meta) -> Recorder {
        Recorder { meta, rows: Vec::new(), live: Live::default(), first_ns: None }
    }

    /// What the recording says beside its events.
    pub fn meta(&mut self) -> &mut Meta {
        &mut self.meta
    }

    /// Whether there is no event yet.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The recording.
    pub fn finish(mut self) -> Recording {
        self.meta.count_cpus(&self.rows);
        Recording { meta: self.meta, rows: self.rows }
    }

    /// Counts something that is left out, under `skipped` and what it is.
    pub fn skip(&mut self, what: &str) {
        let count = self.meta.counts.entry(format!("skipped {what}")).or_insert_with(|| 0.into());
        *count = (count.as_u64().unwrap_or(0) + 1).into();
    }

    /// A row of `kind` at that moment.
    fn row(&mut self, at: Moment, kind: Kind, address: u64) -> Row {
        let first_ns = *self.first_ns.get_or_insert(at.time_ns);
        Row {
            time_ns: at.time_ns.saturating_sub(first_ns),
            address,
            id: None,
            bytes_requested: 0,
            bytes_allocated: 0,
            gfp: 0,
            site: 0,
            cache: None,
            cpu: at.cpu,
            kind,
            order: 0,
            migratetype: 0,
            backs_slab: false,
            backs_large_kmalloc: false,
        }
    }

    fn page_bytes(&self, order: u8) -> u32 {
        u32::try_from(1u64 << (self.meta.page_shift + u32::from(order))).unwrap_or(u32::MAX)
    }

    /// A block of 2^`order` frames is allocated, with a gfp mask in the values of Linux 6.12.
    ///
    /// # Errors
    /// No block begins there, no mobility type has that number, or there are more allocations than ids.
    pub fn page_alloc(
        &mut self,
        at: Moment,
        (pfn, order): (u64, u8),
        migratetype: u8,
        gfp: u32,
    ) -> Result<(), String> {
        let mut row = self.row(at, Kind::PageAlloc, pfn);
        (row.order, row.migratetype, row.gfp) = (order, migratetype, gfp);
        if migratetype > 5 {
            return Err(format!("there is no mobility type {migratetype}"));
        }
        row.bytes_requested = NO_STACK;
        row.check()?;
        row.bytes_allocated = self.page_bytes(order);
        row.id = Some(self.live.alloc_block(pfn, order, migratetype)?);
        self.rows.push(row);
        Ok(())
    }

    /// Whether a live block holds this frame.
    pub fn has_frame(&self, pfn: u64) -> bool {
        self.live.has_frame(pfn)
    }

    /// A block of 2^`order` frames is freed, or a part of one.
    ///
    /// # Errors
    /// No block begins there, or there are more splits than ids.
    pub fn page_free(&mut self, at: Moment, (pfn, order): (u64, u8)) -> Result<(), String> {
        let mut row = self.row(at, Kind::PageFree, pfn);
        row.order = order;
        row.check()?;
        row.bytes_allocated = self.page_bytes(order);
        for split in self.live.split_for(pfn, order)? {
            self.rows.push(Row {
                kind: Kind::Split,
                address: split.pfn,
                order: split.order,
                id: Some(split.id),
                bytes_requested: split.first,
                migratetype: split.migratetype,
                bytes_allocated: self.page_bytes(split.order),
                ..row
            });
        }
        if let Some((id, migratetype)) = self.live.free_block(pfn, order) {
            (row.id, row.migratetype) = (Some(id), migratetype);
        }
        self.rows.push(row);
        Ok(())
    }

    /// An object is allocated, as a row of `kind`, for a request of so many bytes.
    ///
    /// # Errors
    /// There are more allocations than ids.
    pub fn object_alloc(
        &mut self,
        at: Moment,
        kind: Kind,
        object: Object<'_>,
        bytes_requested: u32,
        gfp: u32,
    ) -> Result<(), String> {
        let mut row = self.row(at, kind, object.address);
        row.bytes_requested = bytes_requested;
        row.bytes_allocated = object.bytes_allocated;
        row.gfp = gfp;
        row.site = self.site(object.site);
        row.cache = object.cache.and_then(|name| self.cache(name));
        let id = self.live.alloc_object(object.address, bytes_requested, object.bytes_allocated)?;
        row.id = Some(id);
        self.rows.push(row);
        Ok(())
    }

    /// An object is freed, as a row of `kind`.
    pub fn object_free(&mut self, at: Moment, kind: Kind, object: Object<'_>) {
        let mut row = self.row(at, kind, object.address);
        row.bytes_allocated = object.bytes_allocated;
        row.site = self.site(object.site);
        row.cache = object.cache.and_then(|name| self.cache(name));
        if let Some((id, requested, allocated)) = self.live.free_object(object.address) {
            (row.id, row.bytes_requested, row.bytes_allocated) = (Some(id), requested, allocated);
        }
        self.rows.push(row);
    }

    /// The number of a call site, 0 for an unknown one.
    fn site(&mut self, name: Option<&str>) -> u16 {
        name.map_or(0, |name| self.live.site(name, &mut self.meta.sites))
    }

    /// The number that rows use for a cache; a new one's shape is unknown but for its name. `None` if there are too
    /// many.
    pub fn cache(&mut self, name: &str) -> Option<u16> {
        let known = self.live.cache(name)?;
        self.meta.caches.entry(known).or_insert_with(|| CacheShape {
            name: name.to_owned(),
            object_size: 0,
            size: 0,
            align: 0,
            flags: 0,
            constructor: false,
            objects_per_slab: 0,
            order: 0,
        });
        Some(known)
    }
}
