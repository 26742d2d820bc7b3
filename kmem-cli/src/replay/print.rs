//! The result as text.

use super::{
    areas::{Done, LinuxVmalloc, PercpuResult, VmallocResult},
    objects::{CacheUse, LinuxResult, SlabResult},
    result::{FreeState, INDEX_ORDERS, ReplayResult},
};
use std::fmt::Write;

fn row(out: &mut String, label: &str, blocks: &[u64], orders: usize) {
    let _ = write!(out, "  {label:<14}");
    for o in 0..orders {
        let _ = write!(out, " {:>7}", blocks.get(o).copied().unwrap_or(0));
    }
    out.push('\n');
}

/// The result for people.
pub fn text(r: &ReplayResult) -> String {
    let mut out = String::new();
    let w = &mut out;
    let mode = if r.single_thread {
        "one thread, in the recorded order".to_string()
    } else {
        format!(
            "{} threads on {} CPUs, ordered by what a free needs of its allocation and, where memory is short, by the recording",
            r.threads, r.cpus
        )
    };
    let _ = writeln!(w, "recording       {} ({mode})", r.recording);
    if let Some(note) = &r.start.note {
        let _ = writeln!(w, "start           {note}");
    }
    let _ = writeln!(
        w,
        "events          {} ({} allocations, {} frees, {} of compaction)",
        r.events, r.allocs, r.frees, r.compaction_events
    );
    let _ = writeln!(
        w,
        "throughput      {:.0} operations per second ({:.3} s)",
        r.ops_per_second, r.seconds
    );
    for (name, l) in &r.latency_ns {
        let _ = writeln!(
            w,
            "latency {name:<7} p50 {} ns, p90 {} ns, p99 {} ns, p99.9 {} ns, max {} ns",
            l.p50, l.p90, l.p99, l.p999, l.max
        );
    }
    let _ = writeln!(
        w,
        "failures        {} ({} below the watermarks, {} waited for earlier frees)",
        r.failures, r.below_watermark, r.waited_for_memory
    );
    let _ = writeln!(
        w,
        "odd events      {} unmatched frees, {} missing frees, {} refused, {} skipped",
        r.unmatched_frees, r.missing_frees, r.refused_frees, r.skipped
    );
    for odd in &r.odd_events {
        let _ = writeln!(
            w,
            "                row {}: pfn {:#x} order {}: {}",
            odd.row, odd.pfn, odd.order, odd.why
        );
    }
    if r.lost_events > 0 {
        let _ = writeln!(
            w,
            "lost events     {}: the recorder did not keep up, and frees may make no sense",
            r.lost_events
        );
    }
    for (what, lines) in &r.skipped_lines {
        let _ = writeln!(w, "passed over     {lines} of {what}");
    }
    let _ = writeln!(
        w,
        "high water      {} of {} frames in use",
        r.high_water_frames, r.managed_frames
    );
    let orders =
        r.end.free_blocks.len().max(r.linux_end.as_ref().map_or(0, |l| l.free_blocks.len()));
    let _ = write!(w, "\nfree blocks     ");
    for o in 0..orders {
        let _ = write!(w, " {o:>7}");
    }
    w.push('\n');
    row(w, "start, kmem", &r.start.free_blocks, orders);
    if let Some(b) = &r.start.linux_free_blocks {
        row(w, "start, Linux", b, orders);
    }
    row(w, "end, kmem", &r.end.free_blocks, orders);
    if let Some(l) = &r.linux_end {
        row(w, "end, Linux", &l.free_blocks, orders);
    }
    let _ = writeln!(w, "\n                    kmem     Linux");
    let line = |w: &mut String, label: &str, f: &dyn Fn(&FreeState) -> String| {
        let linux = r.linux_end.as_ref().map_or("–".to_string(), f);
        let _ = writeln!(w, "  {label:<14} {:>8} {linux:>9}", f(&r.end));
    };
    line(w, "free frames", &|s| s.free_frames.to_string());
    line(w, "on CPU lists", &|s| s.pcp_frames.to_string());
    line(w, "order-9 blocks", &|s| s.order9_equivalents.to_string());
    for o in INDEX_ORDERS {
        line(w, &format!("unusable, {o}"), &|s| {
            s.unusable_index.get(&o.to_string()).map_or("–".to_string(), |v| format!("{v:.4}"))
        });
    }
    if let Some(slab) = &r.slab {
        objects(w, slab, r.linux_slab.as_ref());
    }
    if let Some(vmalloc) = &r.vmalloc {
        areas(w, vmalloc, r.linux_vmalloc.as_ref());
    }
    if let Some(percpu) = &r.percpu {
        per_cpu(w, percpu);
    }
    out
}

fn done(w: &mut String, what: &str, d: &Done) {
    let _ = writeln!(
        w,
        "\n{what:<15} {} events ({} allocations, {} frees), {:.0} per second ({:.3} s)",
        d.events, d.allocs, d.frees, d.ops_per_second, d.seconds
    );
    let _ = writeln!(
        w,
        "  failures      {} ({} frees refused, {} skipped, {} unmatched, {} from before)",
        d.failures, d.refused_frees, d.skipped, d.unmatched_frees, d.prior_frees
    );
    for odd in &d.odd_frees {
        let _ = writeln!(w, "                row {}: {:#x}: {}", odd.row, odd.address, odd.why);
    }
}

fn areas(w: &mut String, v: &VmallocResult, linux: Option<&LinuxVmalloc>) {
    done(w, "vmalloc areas", &v.done);
    let or = |n: Option<u64>| n.map_or("–".to_string(), |n| n.to_string());
    let kib = |n: u64| n / 1024;
    let start = linux.map(|l| l.start);
    let end = linux.and_then(|l| l.end);
    let _ = writeln!(w, "\nareas               kmem     Linux");
    for (label, kmem, linux) in [
        ("start", v.start.areas, start.map(|s| s.areas)),
        ("end", v.end.areas, end.map(|s| s.areas)),
        ("start, KiB", kib(v.start.bytes), start.map(|s| kib(s.bytes))),
        ("peak, KiB", kib(v.peak.bytes), linux.map(|l| kib(l.peak_bytes))),
        ("end, KiB", kib(v.end.bytes), end.map(|s| kib(s.bytes))),
        ("pages, start", v.start.pages, start.map(|s| s.pages)),
        ("pages, end", v.end.pages, end.map(|s| s.pages)),
        ("unpurged, KiB", kib(v.end.unpurged_bytes), end.map(|s| kib(s.unpurged_bytes))),
    ] {
        let _ = writeln!(w, "  {label:<14} {kmem:>8} {:>9}", or(linux));
    }
    let _ = writeln!(
        w,
        "  kmem has {} MiB of addresses free at the end, {} MiB in one piece (fragmentation {:.4})",
        v.free_bytes >> 20,
        v.largest_free_bytes >> 20,
        v.fragmentation
    );
}

fn per_cpu(w: &mut String, p: &PercpuResult) {
    done(w, "per-CPU memory", &p.done);
    for (label, at) in [("start", p.start), ("peak", p.peak), ("end", p.end)] {
        let _ = writeln!(
            w,
            "  {label:<13} {} pieces, {} bytes of each CPU asked for, {} taken; {} chunk{}",
            at.live,
            at.bytes,
            at.taken_bytes,
            at.chunks,
            if at.chunks == 1 { "" } else { "s" }
        );
    }
    let kib = |n: Option<u64>| n.map_or("–".to_string(), |n| n.to_string());
    let _ = writeln!(
        w,
        "  Linux         {} bytes for all CPUs at the peak; {} KiB of chunks before, {} after",
        p.linux_peak_bytes,
        kib(p.linux_start_kib),
        kib(p.linux_end_kib)
    );
}

/// Caches that are listed.
const LISTED: usize = 12;

fn objects(w: &mut String, s: &SlabResult, linux: Option<&LinuxResult>) {
    let _ = writeln!(
        w,
        "\nobjects         {} events ({} allocations, {} frees), {:.0} per second ({:.3} s)",
        s.events, s.allocs, s.frees, s.ops_per_second, s.seconds
    );
    let _ = writeln!(
        w,
        "  failures      {} ({} frees refused, {} skipped, {} unmatched)",
        s.failures, s.refused_frees, s.skipped, s.unmatched_frees
    );
    let _ = writeln!(
        w,
        "  start         {} live objects; {} of them are freed by the recording",
        s.start_objects, s.prior_frees
    );
    if let Some(l) = linux.filter(|l| l.start_shown_free > 0) {
        let _ = writeln!(
            w,
            "                Linux calls {} of them active that the recording shows to be free",
            l.start_shown_free
        );
    }
    let or = |n: Option<u64>| n.map_or("–".to_string(), |n| n.to_string());
    let kib = |n: u64| n / 1024;
    let _ = writeln!(w, "\nslab pages          kmem     Linux");
    for (label, kmem, linux) in [
        ("start", s.pages_start, linux.map(|l| l.pages_start)),
        ("peak", s.pages_peak, linux.and_then(|l| l.pages_peak)),
        ("end", s.pages_end, linux.and_then(|l| l.pages_end)),
        ("waste, peak", kib(s.waste_bytes_peak), linux.and_then(|l| l.waste_bytes_peak.map(kib))),
        ("waste, end", kib(s.waste_bytes_end), linux.and_then(|l| l.waste_bytes_end.map(kib))),
    ] {
        let unit = if label.starts_with("waste") { " KiB" } else { "" };
        let _ = writeln!(w, "  {label:<14} {kmem:>8} {:>9}{unit}", or(linux));
    }
    if let Some(p) = &s.known_free {
        let _ = writeln!(
            w,
            "  kmem without the objects shown to be free: {} at the start, {} at the peak, {} at the end",
            p.start, p.peak, p.end
        );
    }
    let _ = writeln!(
        w,
        "  of kmem's at the end {} are its own (state, magazines, tables) and {} in empty slabs",
        s.pages_end_own, s.pages_end_empty
    );
    let _ = writeln!(
        w,
        "\nlargest caches         peak: live   pages    Linux   waste    Linux   end: pages    Linux   waste    Linux  KiB"
    );
    for cache in s.caches.iter().take(LISTED) {
        let linux = linux.and_then(|l| l.caches.iter().find(|c| c.name == cache.name));
        let pages = |of: &dyn Fn(&CacheUse) -> u64| or(linux.map(of));
        let _ = writeln!(
            w,
            "  {:<22} {:>10} {:>7} {:>8} {:>7} {:>8} {:>12} {:>8} {:>7} {:>8}",
            cache.name,
            cache.peak.live,
            cache.peak.pages,
            pages(&|c| c.peak.pages),
            kib(cache.peak.waste_bytes),
            pages(&|c| kib(c.peak.waste_bytes)),
            cache.end.pages,
            pages(&|c| c.end.pages),
            kib(cache.end.waste_bytes),
            pages(&|c| kib(c.end.waste_bytes)),
        );
    }
}
