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

use crate::error::{Place, TraceError};
use crate::gfp;
use crate::meta::Meta;
use crate::record::{Moment, Object, Recorder};
use crate::recording::Recording;
use crate::row::Kind;

use self::line::{Event, Text};

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
    let mut reader = Reader(Recorder::new(meta));
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
    if reader.0.is_empty() {
        return Err(TraceError::line(file, lines, format!("no kmem event in {lines} lines")));
    }
    Ok(reader.0.finish())
}

struct Reader(Recorder);

impl Reader {
    fn line(&mut self, line: &str) -> Result<(), String> {
        match line::split(line)? {
            Text::Nothing => Ok(()),
            Text::Lost(events) => {
                let meta = self.0.meta();
                meta.lost = meta.lost.saturating_add(events);
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
                self.0.skip(event.name);
                Ok(())
            }
        }
    }

    fn gfp(event: &Event) -> Result<u32, String> {
        let text = event.field("gfp_flags")?;
        gfp::parse(text).ok_or_else(|| format!("{text:?} is no set of gfp flags"))
    }

    fn page_alloc(&mut self, event: &Event) -> Result<(), String> {
        let pfn: u64 = event.number("pfn")?;
        if pfn == u64::MAX || pfn == 0 && line::is_null(event.field("page")?) {
            self.0.skip("mm_page_alloc that failed");
            return Ok(());
        }
        let (order, migratetype) = (event.number("order")?, event.number("migratetype")?);
        self.0.page_alloc(event.moment(), (pfn, order), migratetype, Self::gfp(event)?)
    }

    fn page_free(&mut self, event: &Event, order: u8, batched: bool) -> Result<(), String> {
        let pfn: u64 = event.number("pfn")?;
        if batched && !self.0.has_frame(pfn) {
            self.0.skip("mm_page_free_batched of a frame mm_page_free has freed");
            return Ok(());
        }
        self.0.page_free(event.moment(), (pfn, order))
    }

    fn object_alloc(&mut self, event: &Event, kind: Kind) -> Result<(), String> {
        let Some(address) = event.pointer("ptr")? else {
            self.0.skip(&format!("{} that failed", event.name));
            return Ok(());
        };
        let bytes_requested = event.number("bytes_req")?;
        let object =
            Object { bytes_allocated: event.number("bytes_alloc")?, ..event.object(address) };
        self.0.object_alloc(event.moment(), kind, object, bytes_requested, Self::gfp(event)?)
    }

    fn object_free(&mut self, event: &Event, kind: Kind) -> Result<(), String> {
        match event.pointer("ptr")? {
            Some(address) => self.0.object_free(event.moment(), kind, event.object(address)),
            None => self.0.skip(&format!("{} of NULL", event.name)),
        }
        Ok(())
    }
}

impl<'a> Event<'a> {
    fn moment(&self) -> Moment {
        Moment { time_ns: self.time_ns, cpu: self.cpu }
    }

    /// The object that an event at `address` is about: the call site is the function's name, without the offset in it.
    fn object(&self, address: u64) -> Object<'a> {
        let site = self.field("call_site").ok();
        Object {
            address,
            site: site.map(|site| site.split_once("+0x").map_or(site, |(name, _)| name)),
            cache: self.field("name").ok(),
            bytes_allocated: 0,
        }
    }
}
