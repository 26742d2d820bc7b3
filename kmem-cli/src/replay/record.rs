//! `--record`: what kmem itself did during a replay, as a recording that can be replayed again.
//!
//! # Concepts
//! A [`Tape`] is the sink of a machine's events while the operations run, no longer: what is done to reach the start
//! state, and what is freed after the end, is not on it. The texts of `/proc` at both ends are the machine's own. Pages and
//! objects are replayed on machines of their own, and so the recording has all events of pages before those of
//! objects; the pages that the objects' machine asks for itself are left out, as a replay has slabs of its own.
//!
//! Requests that failed are no rows, nor are frees that were refused: a replay of the recording does what was done.
//!
//! # Implementation
//! A sink may be called in an interrupt that landed in the host's own allocator, so the tape has room for all events from
//! the start; what finds none is counted as lost. It is kept in memory until the end.
//!
//! # Locking
//! A spin lock that masks the machine's interrupts, for the moment that it takes to note an event. The order in which
//! it is taken is the order of the rows.

use anyhow::{Context, anyhow, ensure};
use kmem::{
    Platform,
    context::Atomic,
    slab::{CacheInfo, SlabFlags},
    sync::SpinLock,
    trace::{Event, TraceSink},
};
use kmem_hosted::{Hosted, Machine};
use kmem_trace::{
    CacheShape, Kind, Meta, kmr,
    record::{Moment, Object, Recorder},
};
use std::{
    collections::BTreeMap,
    fmt::{self, Write},
    path::Path,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

/// The zstd level of the file: written at once, not kept for long.
const LEVEL: i32 = 3;

/// `SLAB_RECLAIM_ACCOUNT` in Linux 6.12, the flag that a replay looks at.
const RECLAIM_ACCOUNT: u64 = 1 << 16;

/// What a tape is for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Of {
    Pages,
    Objects,
}

/// One event.
#[derive(Clone, Copy)]
struct Entry {
    moment: Moment,
    event: Event,
}

struct Sink {
    platform: Hosted,
    of: Of,
    entries: SpinLock<Vec<Entry>>,
    lost: AtomicU64,
    /// By `FAILED`.
    failed: [AtomicU64; FAILED.len()],
}

/// Events whose requests may fail.
const FAILED: [&str; 3] = ["mm_page_alloc", "kmalloc", "kmem_cache_alloc"];

impl Sink {
    fn failed(&self, which: usize) {
        self.failed[which].fetch_add(1, Relaxed);
    }
}

impl TraceSink for Sink {
    fn event(&self, cpu: Option<usize>, event: &Event) {
        let of = match event {
            // Counted only: nothing says how many requests will fail.
            Event::PageAlloc { pfn: None, .. } => return self.failed(0),
            Event::KmallocAlloc { ptr: 0, .. } => return self.failed(1),
            Event::KmemCacheAlloc { ptr: 0, .. } => return self.failed(2),
            Event::PageAlloc { .. } | Event::PageFree { .. } => Of::Pages,
            Event::KmallocAlloc { .. }
            | Event::Kfree { .. }
            | Event::KmemCacheAlloc { .. }
            | Event::KmemCacheFree { .. } => Of::Objects,
            _ => return,
        };
        if of != self.of {
            return;
        }
        let cpu = cpu.map_or(0, |cpu| cpu as u16);
        Atomic::interrupt(|atomic| {
            self.entries.with_atomic(&self.platform, atomic, |_, entries| {
                // No room is made here: see the module.
                if entries.len() < entries.capacity() {
                    let moment = Moment { time_ns: self.platform.now_ns(), cpu };
                    entries.push(Entry { moment, event: *event });
                } else {
                    self.lost.fetch_add(1, Relaxed);
                }
            });
        });
    }
}

/// What a machine does, from [`Tape::pages`] or [`Tape::objects`] on until [`Tape::stop`].
pub struct Tape<'a> {
    machine: &'a Machine,
    sink: &'static Sink,
    files: BTreeMap<String, String>,
}

/// What a tape took.
pub struct Taken {
    entries: Vec<Entry>,
    lost: u64,
    failed: [u64; FAILED.len()],
    cpus: usize,
    files: BTreeMap<String, String>,
    caches: Vec<CacheInfo>,
}

impl<'a> Tape<'a> {
    /// Takes up to `room` allocations and frees of pages.
    pub fn pages(machine: &'a Machine, room: usize) -> anyhow::Result<Tape<'a>> {
        Tape::start(machine, Of::Pages, room)
    }

    /// Takes up to `room` allocations and frees of objects. The caller is on a CPU of the machine.
    pub fn objects(machine: &'a Machine, room: usize) -> anyhow::Result<Tape<'a>> {
        // First, so that slabinfo finds no objects in magazines, which it would call active.
        machine.set_trace_objects(true).map_err(|e| anyhow!("cannot record objects: {e}"))?;
        Tape::start(machine, Of::Objects, room)
    }

    fn start(machine: &'a Machine, of: Of, room: usize) -> anyhow::Result<Tape<'a>> {
        let sink = Sink {
            platform: machine.hosted().clone(),
            of,
            entries: SpinLock::new(Vec::with_capacity(room)),
            lost: AtomicU64::new(0),
            failed: Default::default(),
        };
        // Sinks are for ever; this one gives its entries away in the end.
        let tape = Tape { machine, sink: Box::leak(Box::new(sink)), files: BTreeMap::new() };
        let files = tape.texts("start")?;
        machine.set_tracer(Some(tape.sink));
        Ok(Tape { files, ..tape })
    }

    /// Ends it. Nobody uses the machine meanwhile; the caller is on a CPU of it where objects were recorded.
    pub fn stop(mut self) -> anyhow::Result<Taken> {
        self.machine.set_tracer(None);
        let mut caches = Vec::new();
        if self.sink.of == Of::Objects {
            self.machine
                .set_trace_objects(false)
                .map_err(|e| anyhow!("cannot end the recording of objects: {e}"))?;
            self.machine.for_each_cache(|info| caches.push(*info));
        }
        self.files.extend(self.texts("end")?);
        let entries = Atomic::interrupt(|atomic| {
            self.sink.entries.with_atomic(&self.sink.platform, atomic, |_, e| std::mem::take(e))
        });
        let cpus = self.machine.hosted().shape().cpus.len();
        let lost = self.sink.lost.load(Relaxed);
        let failed = self.sink.failed.each_ref().map(|n| n.load(Relaxed));
        Ok(Taken { entries, lost, failed, cpus, files: self.files, caches })
    }

    /// The texts of the machine as it is now, by the names that they have in a recording.
    fn texts(&self, when: &str) -> Result<BTreeMap<String, String>, fmt::Error> {
        let m = self.machine;
        let mut texts = BTreeMap::new();
        let mut add = |name: &str, write: &dyn Fn(&mut String) -> fmt::Result| {
            let mut text = String::new();
            write(&mut text)?;
            texts.insert(format!("{when}/{name}"), text);
            Ok(())
        };
        match self.sink.of {
            Of::Pages => {
                add("buddyinfo", &|w| m.write_buddyinfo(w))?;
                add("zoneinfo", &|w| m.write_zoneinfo(w))?;
                add("pagetypeinfo", &|w| m.write_pagetypeinfo(w))?;
                add("iomem", &|w| write_iomem(m, w))?;
            }
            Of::Objects => add("slabinfo", &|w| m.write_slabinfo(w))?,
        }
        Ok(texts)
    }
}

/// `/proc/iomem` of a machine, as far as memory goes.
fn write_iomem(machine: &Machine, w: &mut String) -> fmt::Result {
    let mut banks = machine.hosted().shape().banks.clone();
    banks.sort_by_key(|bank| bank.base);
    for bank in banks {
        writeln!(w, "{:08x}-{:08x} : System RAM", bank.base, bank.base + bank.size - 1)?;
    }
    Ok(())
}

/// Says early what would keep the recording of a replay of `input` from being written.
pub fn check(path: &Path, input: &Path) -> anyhow::Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let what = format!("cannot write the recording {}", path.display());
    ensure!(folder.is_dir(), "{what}: {} is no folder", folder.display());
    ensure!(!path.is_dir() && path.file_name().is_some(), "{what}: this is a folder");
    let real = |path: &Path| std::fs::canonicalize(path).ok();
    ensure!(
        real(path).is_none() || real(path) != real(input),
        "{what}: this is the one that is replayed"
    );
    Ok(())
}

/// Writes what was taken to a file. `constructor` tells of a cache whether it has one.
pub fn write(
    path: &Path,
    pages: Taken,
    objects: Option<Taken>,
    constructor: impl Fn(&str) -> bool,
) -> anyhow::Result<()> {
    let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let mut recorder = Recorder::new(Meta::new(name, "kmem"));
    for taken in [Some(pages), objects].into_iter().flatten() {
        for info in taken.caches.iter().filter(|info| !info.internal) {
            let shape = shape_of(info, constructor(info.name.as_str()));
            if let Some(number) = recorder.cache(&shape.name) {
                recorder.meta().caches.insert(number, shape);
            }
        }
        for entry in &taken.entries {
            add(&mut recorder, entry).map_err(|e| anyhow!("cannot record {}: {e}", entry.event))?;
        }
        for (name, n) in FAILED.iter().zip(taken.failed) {
            (0..n).for_each(|_| recorder.skip(&format!("{name} that failed")));
        }
        let meta = recorder.meta();
        meta.files.extend(taken.files);
        meta.lost += taken.lost;
        meta.cpus = meta.cpus.max(taken.cpus as u32);
    }
    let bytes = kmr::write(&recorder.finish(), LEVEL)?;
    std::fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))
}

fn shape_of(info: &CacheInfo, constructor: bool) -> CacheShape {
    let reclaim = info.flags.contains(SlabFlags::RECLAIM_ACCOUNT);
    CacheShape {
        name: info.name.as_str().to_owned(),
        object_size: info.object_size,
        size: info.stride,
        align: info.align,
        flags: if reclaim { RECLAIM_ACCOUNT } else { 0 },
        constructor,
        objects_per_slab: info.objects_per_slab,
        order: info.frames_per_slab.max(1).ilog2() as u8,
    }
}

/// Adds an event's row, if it has one.
fn add(recorder: &mut Recorder, Entry { moment, event }: &Entry) -> Result<(), String> {
    let bytes = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    match event {
        Event::PageAlloc { pfn: Some(pfn), order, gfp, migratetype } => {
            let block = (u64::from(pfn.0), *order as u8);
            recorder.page_alloc(*moment, block, *migratetype as u8, gfp.to_linux())
        }
        Event::PageFree { pfn, order } => {
            recorder.page_free(*moment, (u64::from(pfn.0), *order as u8))
        }
        Event::KmallocAlloc { call_site, ptr, cache, bytes_req, bytes_alloc, gfp, .. } => {
            let site = call_site.to_string();
            let cache = cache.as_ref().map(|name| name.as_str());
            let object = object(*ptr, &site, cache, bytes(*bytes_alloc));
            recorder.object_alloc(*moment, Kind::Kmalloc, object, bytes(*bytes_req), gfp.to_linux())
        }
        Event::KmemCacheAlloc { call_site, ptr, cache, bytes_req, bytes_alloc, gfp, .. } => {
            let site = call_site.to_string();
            let object = object(*ptr, &site, Some(cache.as_str()), bytes(*bytes_alloc));
            let kind = Kind::CacheAlloc;
            recorder.object_alloc(*moment, kind, object, bytes(*bytes_req), gfp.to_linux())
        }
        Event::Kfree { call_site, ptr, cache, bytes_alloc } => {
            let site = call_site.to_string();
            let cache = cache.as_ref().map(|name| name.as_str());
            recorder.object_free(
                *moment,
                Kind::Kfree,
                object(*ptr, &site, cache, bytes(*bytes_alloc)),
            );
            Ok(())
        }
        Event::KmemCacheFree { call_site, ptr, cache } => {
            let site = call_site.to_string();
            let object = object(*ptr, &site, Some(cache.as_str()), 0);
            recorder.object_free(*moment, Kind::CacheFree, object);
            Ok(())
        }
        _ => Ok(()),
    }
}

fn object<'a>(ptr: usize, site: &'a str, cache: Option<&'a str>, bytes: u32) -> Object<'a> {
    Object { address: ptr as u64, site: Some(site), cache, bytes_allocated: bytes }
}
