//! Recordings as text: what `perf script`, `trace-cmd report` and ftrace's `trace` file print of the kmem events.
//!
//! All three print an event as one line: the task, the CPU in brackets, a time in seconds, the event's name, and its
//! fields as `name=value`:
//!
//! ```text
//!  cat  1234 [001]  5678.123456: kmem:mm_page_alloc: page=0xffffea0000048d00 pfn=0x1234 order=0 migratetype=1 gfp_flags=GFP_KERNEL
//!  cat-1234  [001] d..1.  5678.123456: mm_page_alloc: page=00000000abcd1234 pfn=0x1234 order=0 migratetype=1 gfp_flags=GFP_KERNEL
//! ```
//!
//! Such texts have no ids: an allocation gets the next number, and a free the number of what is live at its frame or
//! pointer (a hashed pointer serves as well as a real one). Freeing part of a larger block, as the kernel does after
//! `split_page`, which has no event, is told by [`Kind::Split`] rows put in before the free.
//!
//! Read are `mm_page_alloc`, `mm_page_free`, `mm_page_free_batched`, `kmalloc`, `kfree`, `kmem_cache_alloc`,
//! `kmem_cache_free` and the `_node` forms of older kernels. Linux emits `mm_page_free` for a batched free too; so
//! `mm_page_free_batched` only counts as a free if the frame is still live. Comments, blank lines and the lines of call
//! stacks are passed over; other events are skipped, and counted in [`Meta::counts`] as `skipped NAME`, as are
//! allocations that failed. Any other line is an error, and so is a last line without its end, the mark of a file cut
//! short. "Lost events" lines add to [`Meta::lost`].

mod line;
mod live;

use crate::error::{Place, TraceError};
use crate::gfp;
use crate::meta::{CacheShape, Meta};
use crate::recording::Recording;
use crate::row::{Kind, NO_STACK, Row};

use self::line::{Event, Text};
use self::live::Live;

/// Reads a text recording into one described by `meta`. `file` names it in errors.
///
/// # Errors
/// A line that is not understood, or no kmem event at all; the error names the line.
pub fn read(bytes: &[u8], file: &str, meta: Meta) -> Result<Recording, TraceError> {
    let lines = bytes.iter().filter(|byte| **byte == b'\n').count();
    let text = std::str::from_utf8(bytes).map_err(|error| {
        let at = error.valid_up_to();
        let line = bytes[..at].iter().filter(|byte| **byte == b'\n').count() + 1;
        TraceError::line(
            file,
            line,
            format!("neither a known binary form nor text: byte {at} is not UTF-8"),
        )
    })?;
    if text.is_empty() {
        return Err(TraceError::new(file, Place::Line(1), "the file is empty"));
    }
    let mut reader = Reader { meta, rows: Vec::new(), live: Live::default(), first_ns: None };
    for (index, line) in text.lines().enumerate() {
        reader.line(line).map_err(|what| TraceError::line(file, index + 1, what))?;
    }
    if !text.ends_with('\n') {
        return Err(TraceError::line(
            file,
            lines + 1,
            "the last line has no end: the file is cut short",
        ));
    }
    if reader.rows.is_empty() {
        return Err(TraceError::line(file, lines, format!("no kmem event in {lines} lines")));
    }
    reader.meta.count_cpus(&reader.rows);
    Ok(Recording { meta: reader.meta, rows: reader.rows })
}

struct Reader {
    meta: Meta,
    rows: Vec<Row>,
    live: Live,
    /// Time of the first event, from which the others count.
    first_ns: Option<u64>,
}

impl Reader {
    fn line(&mut self, line: &str) -> Result<(), String> {
        match line::split(line)? {
            Text::Nothing => Ok(()),
            Text::Lost(events) => {
                self.meta.lost = self.meta.lost.saturating_add(events);
                Ok(())
            }
            Text::Event(event) => self.event(&event),
        }
    }

    fn event(&mut self, event: &Event) -> Result<(), String> {
        match event.name {
            "mm_page_alloc" => self.page_alloc(event),
            "mm_page_free" => self.page_free(event, event.number("order")?, false),
            "mm_page_free_batched" => self.page_free(event, 0, true),
            "kmalloc" | "kmalloc_node" => self.object_alloc(event, Kind::Kmalloc),
            "kmem_cache_alloc" | "kmem_cache_alloc_node" => {
                self.object_alloc(event, Kind::CacheAlloc)
            }
            "kfree" => self.object_free(event, Kind::Kfree),
            "kmem_cache_free" => self.object_free(event, Kind::CacheFree),
            _ => {
                self.skip(event.name);
                Ok(())
            }
        }
    }

    fn skip(&mut self, what: &str) {
        let count = self.meta.counts.entry(format!("skipped {what}")).or_insert_with(|| 0.into());
        *count = (count.as_u64().unwrap_or(0) + 1).into();
    }

    /// A row of `kind` at the event's CPU and time.
    fn row(&mut self, event: &Event, kind: Kind, address: u64) -> Row {
        let first_ns = *self.first_ns.get_or_insert(event.time_ns);
        Row {
            time_ns: event.time_ns.saturating_sub(first_ns),
            address,
            id: None,
            bytes_requested: 0,
            bytes_allocated: 0,
            gfp: 0,
            site: 0,
            cache: None,
            cpu: event.cpu,
            kind,
            order: 0,
            migratetype: 0,
            backs_slab: false,
            backs_large_kmalloc: false,
        }
    }

    fn gfp(&self, event: &Event) -> Result<u32, String> {
        let text = event.field("gfp_flags")?;
        gfp::parse(text).ok_or_else(|| format!("{text:?} is no set of gfp flags"))
    }

    fn page_bytes(&self, order: u8) -> u32 {
        u32::try_from(1u64 << (self.meta.page_shift + u32::from(order))).unwrap_or(u32::MAX)
    }

    fn page_alloc(&mut self, event: &Event) -> Result<(), String> {
        let pfn: u64 = event.number("pfn")?;
        if pfn == u64::MAX || pfn == 0 && line::is_null(event.field("page")?) {
            self.skip("mm_page_alloc that failed");
            return Ok(());
        }
        let mut row = self.row(event, Kind::PageAlloc, pfn);
        row.order = event.number("order")?;
        row.migratetype = event.number("migratetype")?;
        if row.migratetype > 5 {
            return Err(format!("there is no mobility type {}", row.migratetype));
        }
        row.gfp = self.gfp(event)?;
        row.bytes_requested = NO_STACK;
        row.check()?;
        row.bytes_allocated = self.page_bytes(row.order);
        row.id = Some(self.live.alloc_block(pfn, row.order, row.migratetype)?);
        self.rows.push(row);
        Ok(())
    }

    fn page_free(&mut self, event: &Event, order: u8, batched: bool) -> Result<(), String> {
        let pfn: u64 = event.number("pfn")?;
        let mut row = self.row(event, Kind::PageFree, pfn);
        row.order = order;
        row.check()?;
        if batched && !self.live.has_frame(pfn) {
            self.skip("mm_page_free_batched of a frame mm_page_free has freed");
            return Ok(());
        }
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

    fn object_alloc(&mut self, event: &Event, kind: Kind) -> Result<(), String> {
        let Some(address) = event.pointer("ptr")? else {
            self.skip(&format!("{} that failed", event.name));
            return Ok(());
        };
        let mut row = self.row(event, kind, address);
        row.bytes_requested = event.number("bytes_req")?;
        row.bytes_allocated = event.number("bytes_alloc")?;
        row.gfp = self.gfp(event)?;
        row.site = self.site(event);
        row.cache = self.cache(event);
        row.id = Some(self.live.alloc_object(address, row.bytes_requested, row.bytes_allocated)?);
        self.rows.push(row);
        Ok(())
    }

    fn object_free(&mut self, event: &Event, kind: Kind) -> Result<(), String> {
        let Some(address) = event.pointer("ptr")? else {
            self.skip(&format!("{} of NULL", event.name));
            return Ok(());
        };
        let mut row = self.row(event, kind, address);
        row.site = self.site(event);
        row.cache = self.cache(event);
        if let Some((id, requested, allocated)) = self.live.free_object(address) {
            (row.id, row.bytes_requested, row.bytes_allocated) = (Some(id), requested, allocated);
        }
        self.rows.push(row);
        Ok(())
    }

    /// The number of the event's call site: the function's name, without the offset in it.
    fn site(&mut self, event: &Event) -> u16 {
        let Ok(site) = event.field("call_site") else {
            return 0;
        };
        let name = site.split_once("+0x").map_or(site, |(name, _)| name);
        self.live.site(name, &mut self.meta.sites)
    }

    /// The number of the event's cache, where the event names one. Of its shape the event says nothing.
    fn cache(&mut self, event: &Event) -> Option<u16> {
        let name = event.field("name").ok()?;
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
