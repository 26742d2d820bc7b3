//! The report: one HTML page that needs nothing but itself.
//!
//! # Concepts
//! The page is made of what `--json` prints, a [`ReplayResult`], and of nothing else. Style, script, plots
//! and their numbers are inside it, so it can be mailed or kept beside the recording. Text from the recording
//! is escaped.
//!
//! # Implementation
//! [`write()`] makes the whole page first, then a temporary file beside the destination, and renames it: a reader
//! finds the old report or the new one and never a part. It is called with a finished run only.

mod figures;
mod plot;

use super::{
    areas::Done,
    result::{FreeState, INDEX_ORDERS, ReplayResult},
};
use anyhow::Context;
use std::{fmt::Write as _, fs, io::Write as _, path::Path};

/// Writes the report of `r` to `path`.
///
/// # Errors
/// The file cannot be written; what was at `path` before is untouched then.
pub fn write(r: &ReplayResult, path: &Path) -> anyhow::Result<()> {
    let page = page(r)?;
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let failed = || format!("cannot write the report {}", path.display());
    let mut builder = tempfile::Builder::new();
    builder.prefix(".kmem-report-");
    #[cfg(unix)]
    {
        // As any other file: the process's mask says who may read it.
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(fs::Permissions::from_mode(0o666));
    }
    let mut file = builder.tempfile_in(folder).with_context(failed)?;
    file.write_all(page.as_bytes()).with_context(failed)?;
    file.persist(path).with_context(failed)?;
    Ok(())
}

/// Finds out before a long run that its report could not be written.
///
/// # Errors
/// `path` is a folder, or lies in none.
pub fn check(path: &Path) -> anyhow::Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    anyhow::ensure!(
        folder.is_dir(),
        "cannot write the report {}: {} is no folder",
        path.display(),
        folder.display()
    );
    anyhow::ensure!(
        !path.is_dir() && path.file_name().is_some(),
        "cannot write the report {}: this is a folder",
        path.display()
    );
    Ok(())
}

/// Text as HTML.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            _ => out.push(c),
        }
    }
    out
}

/// A number with its thousands set apart.
fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push('\u{202f}');
        }
        out.push(c);
    }
    out
}

/// JSON that cannot end the script element it stands in.
fn script_json(value: &serde_json::Value) -> String {
    value.to_string().replace('<', "\\u003c")
}

fn page(r: &ReplayResult) -> anyhow::Result<String> {
    let mut out = String::new();
    let w = &mut out;
    let name = escape(&r.recording);
    writeln!(w, "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">")?;
    writeln!(w, "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">")?;
    writeln!(w, "<title>kmem replay of {name}</title>")?;
    writeln!(w, "<style>\n{}</style>", include_str!("html/style.css"))?;
    writeln!(w, "<h1>{name}, replayed on kmem</h1>")?;
    writeln!(w, "<p class=\"soft\">{}</p>", escape(&subtitle(r)))?;
    warnings(w, r)?;
    tiles(w, r)?;
    latency(w, r)?;
    free_blocks(w, r)?;
    objects(w, r)?;
    areas(w, r)?;
    figures::write(w, r)?;
    odd_events(w, r)?;
    notes(w, r)?;
    let times = serde_json::json!({
        "seq": r.samples.iter().map(|s| s.sample.seq).collect::<Vec<_>>(),
        "ms": r.samples.iter().map(|s| s.sample.ms).collect::<Vec<_>>(),
    });
    writeln!(w, "<script type=\"application/json\" id=\"times\">{}</script>", script_json(&times))?;
    writeln!(w, "<script>\n{}</script>\n</html>", include_str!("html/hover.js"))?;
    Ok(out)
}

fn plural(n: u64, what: &str) -> String {
    format!("{} {what}{}", grouped(n), if n == 1 { "" } else { "s" })
}

fn subtitle(r: &ReplayResult) -> String {
    let nodes = 1 + r.zones.iter().map(|z| z.node).max().unwrap_or(0);
    let zones: Vec<String> = r
        .zones
        .iter()
        .map(|z| {
            let node = if nodes > 1 { format!("node {} ", z.node) } else { String::new() };
            format!("{node}{} {} MiB", z.name, z.managed_frames >> 8)
        })
        .collect();
    let threads = if r.single_thread {
        "one thread in the recorded order".to_owned()
    } else {
        plural(r.threads as u64, "thread")
    };
    let speed = if r.recorded_speed { "at the recorded times" } else { "at full speed" };
    format!(
        "{}, {} MiB of managed memory ({}); replayed by {threads} {speed}.",
        plural(r.cpus as u64, "CPU"),
        r.managed_frames >> 8,
        zones.join(", ")
    )
}

fn warnings(w: &mut String, r: &ReplayResult) -> anyhow::Result<()> {
    if let Some(note) = &r.start.note {
        writeln!(
            w,
            "<p class=\"warn\">This is not the recorded start state: {}. The end is not to be compared with Linux's \
             block by block.</p>",
            escape(note)
        )?;
    }
    if r.lost_events > 0 {
        writeln!(
            w,
            "<p class=\"warn\">The recorder lost {}. From there on the recording does not tell the whole story, and \
             frees may make no sense.</p>",
            plural(r.lost_events, "event")
        )?;
    }
    Ok(())
}

fn tile(w: &mut String, value: &str, class: &str, label: &str) -> anyhow::Result<()> {
    writeln!(w, "<div class=\"tile\"><b class=\"{class}\">{value}</b><span>{label}</span></div>")?;
    Ok(())
}

fn tiles(w: &mut String, r: &ReplayResult) -> anyhow::Result<()> {
    writeln!(w, "<div class=\"tiles\">")?;
    tile(
        w,
        &grouped(r.events as u64),
        "",
        &format!(
            "page events: {} allocations, {} frees, {} of compaction",
            grouped(r.allocs),
            grouped(r.frees),
            grouped(r.compaction_events as u64)
        ),
    )?;
    let rate = format!("{} /s", grouped(r.ops_per_second.round() as u64));
    tile(w, &rate, "", &format!("allocations and frees, over {:.3} s", r.seconds))?;
    let class = if r.failures == 0 { "good" } else { "bad" };
    tile(
        w,
        &grouped(r.failures),
        class,
        &format!(
            "failed allocations; {} below the watermarks, {} waited for earlier frees",
            grouped(r.below_watermark),
            grouped(r.waited_for_memory)
        ),
    )?;
    let odd = r.unmatched_frees as u64 + r.missing_frees as u64 + r.refused_frees;
    tile(
        w,
        &grouped(odd),
        if odd == 0 { "good" } else { "bad" },
        &format!(
            "events that make no sense: {} unmatched frees, {} missing, {} refused",
            grouped(r.unmatched_frees as u64),
            grouped(r.missing_frees as u64),
            grouped(r.refused_frees)
        ),
    )?;
    let all = r.pcp.hits + r.pcp.refills + r.pcp.bypasses;
    if all > 0 {
        tile(
            w,
            &format!("{:.2} %", 100.0 * r.pcp.hits as f64 / all as f64),
            "",
            "of allocations found a frame on a per-CPU list",
        )?;
    }
    tile(
        w,
        &format!("{} MiB", r.high_water_frames >> 8),
        "",
        &format!(
            "most memory in use: {} of {} frames",
            grouped(r.high_water_frames),
            grouped(r.managed_frames)
        ),
    )?;
    writeln!(w, "</div>")?;
    Ok(())
}

fn latency(w: &mut String, r: &ReplayResult) -> anyhow::Result<()> {
    writeln!(w, "<h2>Latency</h2>\n<div class=\"wide\"><table><tr><th>nanoseconds</th>")?;
    for head in ["operations", "median", "90 %", "99 %", "99.9 %", "slowest", "mean"] {
        write!(w, "<th>{head}</th>")?;
    }
    writeln!(w, "</tr>")?;
    for (name, l) in &r.latency_ns {
        write!(w, "<tr><td>{name}</td>")?;
        for n in [l.count, l.p50, l.p90, l.p99, l.p999, l.max] {
            write!(w, "<td>{}</td>", grouped(n))?;
        }
        writeln!(w, "<td>{:.1}</td></tr>", l.mean)?;
    }
    writeln!(w, "</table></div>")?;
    Ok(())
}

fn free_blocks(w: &mut String, r: &ReplayResult) -> anyhow::Result<()> {
    let states: Vec<(&str, &[u64], u64)> = [
        Some(("start, kmem", &r.start.free_blocks[..], r.start.pcp_frames)),
        r.linux_start.as_ref().map(|l| ("start, Linux", &l.free_blocks[..], l.pcp_frames)),
        Some(("end, kmem", &r.end.free_blocks[..], r.end.pcp_frames)),
        r.linux_end.as_ref().map(|l| ("end, Linux", &l.free_blocks[..], l.pcp_frames)),
    ]
    .into_iter()
    .flatten()
    .collect();
    let orders = states.iter().map(|(_, blocks, _)| blocks.len()).max().unwrap_or(0);
    writeln!(w, "<h2>Free blocks by order, kmem beside Linux</h2>\n<div class=\"wide\"><table>")?;
    write!(w, "<tr><th>order</th>")?;
    for order in 0..orders {
        write!(w, "<th>{order}</th>")?;
    }
    writeln!(w, "<th>frames in blocks</th><th>on per-CPU lists</th></tr>")?;
    for (label, blocks, on_lists) in states {
        write!(w, "<tr><td>{label}</td>")?;
        for order in 0..orders {
            write!(w, "<td>{}</td>", grouped(blocks.get(order).copied().unwrap_or(0)))?;
        }
        let frames: u64 = blocks.iter().enumerate().map(|(order, n)| n << order).sum();
        writeln!(w, "<td>{}</td><td>{}</td></tr>", grouped(frames), grouped(on_lists))?;
    }
    writeln!(w, "</table></div>\n<div class=\"wide\"><table>")?;
    writeln!(
        w,
        "<tr><th></th><th></th><th class=\"group\" colspan=\"4\">unusable index</th></tr>"
    )?;
    write!(w, "<tr><th>at the end</th><th>free memory in whole order-9 blocks</th>")?;
    for order in INDEX_ORDERS {
        write!(w, "<th>order {order}</th>")?;
    }
    writeln!(w, "</tr>")?;
    for (label, state) in [("kmem", Some(&r.end)), ("Linux", r.linux_end.as_ref())] {
        let Some(state) = state else { continue };
        write!(w, "<tr><td>{label}</td><td>{}</td>", grouped(state.order9_equivalents))?;
        for order in INDEX_ORDERS {
            write!(w, "<td>{:.4}</td>", index(state, order))?;
        }
        writeln!(w, "</tr>")?;
    }
    writeln!(w, "</table></div>")?;
    writeln!(
        w,
        "<p class=\"soft\">Nothing was drained before counting: frames on per-CPU lists are free but in no block, on \
         either side. The unusable index of an order is the share of free memory in blocks too small for it: 0 is \
         none, 1 is all.</p>"
    )?;
    if r.linux_end.is_none() {
        writeln!(w, "<p class=\"soft\">The recording has no buddyinfo of Linux's end.</p>")?;
    }
    Ok(())
}

/// Caches that are listed.
const LISTED: usize = 40;

fn objects(w: &mut String, r: &ReplayResult) -> anyhow::Result<()> {
    let Some(s) = &r.slab else { return Ok(()) };
    let linux = r.linux_slab.as_ref();
    let or = |n: Option<u64>| n.map_or("–".to_owned(), grouped);
    let kib = |n: u64| n / 1024;
    writeln!(w, "<h2>Objects, kmem beside Linux</h2>")?;
    writeln!(
        w,
        "<p>{} on objects ({} allocations, {} frees, {} failed), {} per second; {} live from before.</p>",
        plural(s.events as u64, "event"),
        grouped(s.allocs),
        grouped(s.frees),
        grouped(s.failures),
        grouped(s.ops_per_second.round() as u64),
        grouped(s.start_objects)
    )?;
    writeln!(
        w,
        "<div class=\"wide\"><table><tr><th>slab layer</th><th>pages, start</th><th>peak</th><th>end</th>"
    )?;
    writeln!(w, "<th>waste, peak, KiB</th><th>waste, end, KiB</th></tr>")?;
    let kmem =
        [s.pages_start, s.pages_peak, s.pages_end, kib(s.waste_bytes_peak), kib(s.waste_bytes_end)];
    let rows = [
        ("kmem", kmem.map(Some)),
        (
            "Linux",
            [
                linux.map(|l| l.pages_start),
                linux.and_then(|l| l.pages_peak),
                linux.and_then(|l| l.pages_end),
                linux.and_then(|l| l.waste_bytes_peak.map(kib)),
                linux.and_then(|l| l.waste_bytes_end.map(kib)),
            ],
        ),
    ];
    for (label, numbers) in rows {
        let cells = numbers.map(|n| format!("<td>{}</td>", or(n))).concat();
        writeln!(w, "<tr><td>{label}</td>{cells}</tr>")?;
    }
    writeln!(w, "</table></div>\n<div class=\"wide\"><table>")?;
    writeln!(
        w,
        "<tr><th></th><th class=\"group\" colspan=\"5\">peak</th><th class=\"group\" colspan=\"5\">end</th></tr>"
    )?;
    let heads = "<th>live</th><th>pages</th><th>Linux</th><th>waste, KiB</th><th>Linux</th>";
    writeln!(w, "<tr><th>the largest caches</th>{heads}{heads}</tr>")?;
    for cache in s.caches.iter().take(LISTED) {
        write!(w, "<tr><td>{}</td>", escape(&cache.name))?;
        let other = linux.and_then(|l| l.caches.iter().find(|c| c.name == cache.name));
        for (kmem, linux) in
            [(cache.peak, other.map(|c| c.peak)), (cache.end, other.map(|c| c.end))]
        {
            let numbers = [
                Some(kmem.live),
                Some(kmem.pages),
                linux.map(|l| l.pages),
                Some(kib(kmem.waste_bytes)),
                linux.map(|l| kib(l.waste_bytes)),
            ];
            write!(w, "{}", numbers.map(|n| format!("<td>{}</td>", or(n))).concat())?;
        }
        writeln!(w, "</tr>")?;
    }
    writeln!(w, "</table></div>")?;
    writeln!(
        w,
        "<p class=\"soft\">Waste is what slabs hold beside live objects. kmem's pages include {} of its own at the end: \
         state of objects, magazines, descriptors and tables. Linux's peak is that of its page events; the caches \
         start with the objects that its slabinfo calls active{}.</p>",
        grouped(s.pages_end_own),
        match linux.map_or(0, |l| l.start_shown_free) {
            0 => String::new(),
            n => format!(", of which the recording shows {} to have been free", grouped(n)),
        }
    )?;
    Ok(())
}

fn areas(w: &mut String, r: &ReplayResult) -> anyhow::Result<()> {
    let or = |n: Option<u64>| n.map_or("–".to_owned(), grouped);
    let kib = |n: u64| n / 1024;
    if let Some(v) = &r.vmalloc {
        let linux = r.linux_vmalloc.as_ref();
        writeln!(w, "<h2>vmalloc areas, kmem beside Linux</h2>")?;
        done(w, &v.done, "areas")?;
        writeln!(
            w,
            "<div class=\"wide\"><table><tr><th>vmalloc</th><th>areas, start</th><th>end</th>"
        )?;
        writeln!(w, "<th>KiB in use, start</th><th>peak</th><th>end</th><th>pages, start</th>")?;
        writeln!(w, "<th>end</th><th>KiB not purged, end</th></tr>")?;
        let (start, end) = (linux.map(|l| l.start), linux.and_then(|l| l.end));
        let kmem = [
            v.start.areas,
            v.end.areas,
            kib(v.start.bytes),
            kib(v.peak.bytes),
            kib(v.end.bytes),
            v.start.pages,
            v.end.pages,
            kib(v.end.unpurged_bytes),
        ];
        let theirs = [
            start.map(|s| s.areas),
            end.map(|s| s.areas),
            start.map(|s| kib(s.bytes)),
            linux.map(|l| kib(l.peak_bytes)),
            end.map(|s| kib(s.bytes)),
            start.map(|s| s.pages),
            end.map(|s| s.pages),
            end.map(|s| kib(s.unpurged_bytes)),
        ];
        for (label, numbers) in [("kmem", kmem.map(Some)), ("Linux", theirs)] {
            let cells = numbers.map(|n| format!("<td>{}</td>", or(n))).concat();
            writeln!(w, "<tr><td>{label}</td>{cells}</tr>")?;
        }
        writeln!(w, "</table></div>")?;
        writeln!(
            w,
            "<p class=\"soft\">Guards are included. Of kmem's {} MiB of addresses {} MiB are free at the end, {} MiB of \
             them in one piece; Linux's text does not tell where its areas lie.</p>",
            v.range_bytes >> 20,
            v.free_bytes >> 20,
            v.largest_free_bytes >> 20
        )?;
    }
    let Some(p) = &r.percpu else { return Ok(()) };
    writeln!(w, "<h2>Per-CPU memory</h2>")?;
    done(w, &p.done, "pieces")?;
    writeln!(w, "<div class=\"wide\"><table><tr><th>kmem</th><th>pieces</th>")?;
    writeln!(w, "<th>bytes of each CPU asked for</th><th>taken</th><th>chunks</th></tr>")?;
    for (label, at) in [("start", p.start), ("peak", p.peak), ("end", p.end)] {
        let numbers = [at.live, at.bytes, at.taken_bytes, at.chunks];
        let cells = numbers.map(|n| format!("<td>{}</td>", grouped(n))).concat();
        writeln!(w, "<tr><td>{label}</td>{cells}</tr>")?;
    }
    writeln!(w, "</table></div>")?;
    writeln!(
        w,
        "<p class=\"soft\">Linux counted {} bytes for all CPUs at the peak, its accounting included. Its chunks had {} KiB \
         before the recording and {} KiB after, with its static variables.</p>",
        grouped(p.linux_peak_bytes),
        or(p.linux_start_kib),
        or(p.linux_end_kib)
    )?;
    Ok(())
}

fn done(w: &mut String, d: &Done, what: &str) -> anyhow::Result<()> {
    writeln!(
        w,
        "<p>{} on {what} ({} allocations, {} frees, {} failed), {} per second; {} of what was there before; {} that make \
         no sense.</p>",
        plural(d.events, "event"),
        grouped(d.allocs),
        grouped(d.frees),
        grouped(d.failures),
        grouped(d.ops_per_second.round() as u64),
        plural(d.prior_frees, "free"),
        plural(d.unmatched_frees, "free")
    )?;
    Ok(())
}

fn index(state: &FreeState, order: usize) -> f64 {
    state.unusable_index.get(&order.to_string()).copied().unwrap_or(0.0)
}

fn odd_events(w: &mut String, r: &ReplayResult) -> anyhow::Result<()> {
    writeln!(w, "<h2>Events that make no sense</h2>")?;
    let all = r.unmatched_frees + r.missing_frees;
    if all == 0 {
        writeln!(w, "<p>None.</p>")?;
        return Ok(());
    }
    writeln!(
        w,
        "<p>{}; none of them was acted upon. The first {}:</p>",
        plural(all as u64, "event"),
        r.odd_events.len()
    )?;
    writeln!(
        w,
        "<div class=\"wide\"><table><tr><th>row</th><th>pfn</th><th>order</th><th></th></tr>"
    )?;
    for odd in &r.odd_events {
        writeln!(
            w,
            "<tr><td>{}</td><td>{:#x}</td><td>{}</td><td class=\"text\">{}</td></tr>",
            grouped(odd.row as u64),
            odd.pfn,
            odd.order,
            escape(odd.why)
        )?;
    }
    writeln!(w, "</table></div>")?;
    Ok(())
}

fn notes(w: &mut String, r: &ReplayResult) -> anyhow::Result<()> {
    writeln!(w, "<h2>How to read this</h2>\n<ul>")?;
    let order = if r.single_thread {
        "Every event ran on one thread, in the recorded order."
    } else {
        "Each recorded CPU has a thread of its own. A free waits for its allocation, and an allocation waits where its \
         thread is further ahead of the others than free memory has room for; beyond that nothing orders the events of \
         different CPUs, and runs differ from each other."
    };
    writeln!(w, "<li>{order}</li>")?;
    writeln!(
        w,
        "<li>Compaction moves memory that somebody holds; nobody asks for anything or gives anything back. A block that \
         Linux moved is known under another name from there on and stays where kmem had put it. Frames that \
         compaction took and returned are {} that ask for nothing.</li>",
        plural(r.compaction_events as u64, "event")
    )?;
    writeln!(
        w,
        "<li>Linux reclaimed memory in the recording; what it freed are frees of the recording, so kmem reclaims \
         nothing. An allocation that finds no memory waits for the events the recording has before it; if there \
         is still none it may go below the watermarks, and is counted; if that fails it is a failure.</li>"
    )?;
    writeln!(
        w,
        "<li>With <code>--memory</code> the machine is an ordinary PC of that size, all of it free but for a stand-in \
         for each block from before the recording. With <code>--cpus</code> threads share fewer CPUs or leave some \
         idle. Either way Linux's numbers remain those of the recorded machine.</li>"
    )?;
    writeln!(
        w,
        "<li>Numbered lines in the plots are the phases the workload marked. The recording lasted {:.3} s; the x axis \
         counts page events, whose order is exact where clocks are not.</li>",
        r.recorded_seconds
    )?;
    for (what, lines) in &r.skipped_lines {
        writeln!(w, "<li>Passed over: {} of {}.</li>", plural(*lines, "line"), escape(what))?;
    }
    writeln!(w, "</ul>")?;
    Ok(())
}
