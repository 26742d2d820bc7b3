//! The result as text.

use super::result::{FreeState, INDEX_ORDERS, ReplayResult};
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
    out
}
