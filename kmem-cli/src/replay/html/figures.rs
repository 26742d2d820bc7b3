//! Which plots the report has.
//!
//! # Concepts
//! All but one run over the page events of the recording, sampled some hundred times. Linux is known at two
//! moments, the first and the last, and appears as a dot at each end. Small blocks are drawn in warm colours
//! and large ones in cool: fragmentation is the page turning red.

use super::{
    escape, index,
    plot::{Axis, Drawn, Plot, Series, Style, bars, css, order_colour},
    script_json,
};
use crate::replay::result::{FreeState, INDEX_ORDERS, ReplayResult};
use plotters::style::RGBColor;
use std::fmt::Write;

/// Frames per MiB.
const PER_MIB: f64 = 256.0;
const KMEM: RGBColor = RGBColor(0x3a, 0x7d, 0xd8);
const LINUX: RGBColor = RGBColor(0xe0, 0x8a, 0x1e);
const ON_LISTS: RGBColor = RGBColor(0x8e, 0x7c, 0xc3);
const GREY: RGBColor = RGBColor(0x80, 0x80, 0x80);
const ALERT: RGBColor = RGBColor(0xcc, 0x45, 0x4d);

struct Figures<'a> {
    out: &'a mut String,
    axis: Axis,
}

/// Appends all plots.
pub fn write(out: &mut String, r: &ReplayResult) -> anyhow::Result<()> {
    let axis = Axis {
        x: r.samples.iter().map(|s| s.sample.seq as f64).collect(),
        events: r.events as f64,
        phases: r.phases.iter().map(|p| (p.number, p.seq as f64)).collect(),
    };
    let end = at_the_end(r)?;
    let mut figures = Figures { out, axis };
    figures.out.push_str(&end);
    figures.free_memory(r)?;
    figures.blocks(r)?;
    figures.fragmentation(r)?;
    figures.free_frames(r)?;
    figures.crossings(r)?;
    figures.hits(r)?;
    figures.lists(r)?;
    figures.areas(r)
}

impl Figures<'_> {
    fn add(&mut self, title: &str, caption: &str, dots: bool, plot: &Plot) -> anyhow::Result<()> {
        let Drawn { svg, data } = plot.draw(&self.axis)?;
        let w = &mut *self.out;
        writeln!(w, "<h2>{}</h2>", escape(title))?;
        writeln!(w, "<figure class=\"plot\"><figcaption>{caption}</figcaption>")?;
        let names = plot.series.iter().map(|s| (&s.name[..], s.colour, ""));
        let dots = (dots && !plot.points.is_empty()).then_some((
            "Linux at the first and the last event",
            GREY,
            "dot",
        ));
        let levels = plot.levels.iter().map(|l| (l.1, GREY, "dashes"));
        legend(w, names.chain(levels).chain(dots))?;
        let svg = svg.replacen("<svg ", &format!("<svg aria-label=\"{}\" ", escape(title)), 1);
        writeln!(w, "{svg}<div class=\"readout\"></div>")?;
        writeln!(w, "<script type=\"application/json\">{}</script></figure>", script_json(&data))?;
        Ok(())
    }

    /// Linux's two values, where it recorded them.
    fn linux(&self, r: &ReplayResult, of: impl Fn(&FreeState) -> f64) -> Vec<(f64, f64)> {
        let at = [(0.0, &r.linux_start), (self.axis.events, &r.linux_end)];
        at.into_iter().filter_map(|(x, s)| Some((x, of(s.as_ref()?)))).collect()
    }

    fn free_memory(&mut self, r: &ReplayResult) -> anyhow::Result<()> {
        let orders = r.end.free_blocks.len();
        let mut series: Vec<Series> = (0..orders)
            .rev()
            .map(|order| Series {
                name: format!("order {order}"),
                colour: order_colour(order, orders),
                values: values(r, |b, _| mib(b.get(order).copied().unwrap_or(0) << order)),
            })
            .collect();
        series.push(Series {
            name: "on per-CPU lists".into(),
            colour: ON_LISTS,
            values: values(r, |_, on_lists| mib(on_lists)),
        });
        self.add(
            "Free memory by the size of its blocks",
            "How much memory is free, and in blocks of which order. Large blocks lie at the bottom. Numbered lines are \
             the phases that the recorded workload marked.",
            false,
            &Plot {
                unit: "MiB free",
                style: Style::Stacked,
                series,
                points: Vec::new(),
                levels: Vec::new(),
                range: None,
            },
        )
    }

    fn blocks(&mut self, r: &ReplayResult) -> anyhow::Result<()> {
        let orders = r.end.free_blocks.len();
        let mut points = Vec::new();
        for order in 0..orders {
            let linux = self.linux(r, |s| s.free_blocks.get(order).copied().unwrap_or(0) as f64);
            let colour = order_colour(order, orders);
            points.extend(linux.into_iter().map(|(x, y)| (x, y.max(0.5), colour)));
        }
        let series = (0..orders)
            .map(|order| Series {
                name: format!("order {order}"),
                colour: order_colour(order, orders),
                values: values(r, |b, _| b.get(order).copied().unwrap_or(0) as f64),
            })
            .collect();
        self.add(
            "Free blocks per order",
            "The same, counted in blocks, on a logarithmic scale; the bottom edge is none.",
            true,
            &Plot {
                unit: "free blocks",
                style: Style::LogLines,
                series,
                points,
                levels: Vec::new(),
                range: None,
            },
        )
    }

    fn fragmentation(&mut self, r: &ReplayResult) -> anyhow::Result<()> {
        let mut points = Vec::new();
        let mut series = Vec::new();
        for (i, order) in INDEX_ORDERS.into_iter().enumerate() {
            let colour = order_colour(i, INDEX_ORDERS.len());
            let linux = self.linux(r, |s| index(s, order));
            points.extend(linux.into_iter().map(|(x, y)| (x, y, colour)));
            let at = order.to_string();
            series.push(Series {
                name: format!("order {order}"),
                colour,
                values: r
                    .samples
                    .iter()
                    .map(|s| s.unusable_index.get(&at).copied().unwrap_or(0.0))
                    .collect(),
            });
        }
        self.add(
            "Fragmentation: the unusable index",
            "The share of free memory in blocks too small for a request of the order. 0 is none of it, 1 all.",
            true,
            &Plot {
                unit: "share of free memory",
                style: Style::Lines,
                series,
                points,
                levels: Vec::new(),
                range: Some((0.0, 1.05)),
            },
        )
    }

    fn free_frames(&mut self, r: &ReplayResult) -> anyhow::Result<()> {
        let series = vec![Series {
            name: "kmem, in blocks".into(),
            colour: KMEM,
            values: values(r, |b, _| mib(frames(b))),
        }];
        let linux = self.linux(r, |s| mib(s.free_frames));
        let sum = |of: fn(&crate::replay::result::ZoneResult) -> u64| -> f64 {
            mib(r.zones.iter().map(of).sum())
        };
        self.add(
            "Free frames",
            "Memory on the free lists of all zones, beside the sum of their watermarks.",
            true,
            &Plot {
                unit: "MiB free",
                style: Style::Lines,
                series,
                points: linux.into_iter().map(|(x, y)| (x, y, LINUX)).collect(),
                levels: vec![(sum(|z| z.low), "low watermark")],
                range: None,
            },
        )
    }

    fn crossings(&mut self, r: &ReplayResult) -> anyhow::Result<()> {
        let series = vec![
            Series {
                name: "below every low watermark".into(),
                colour: LINUX,
                values: r.samples.iter().map(|s| s.sample.low_crossings as f64).collect(),
            },
            Series {
                name: "below every min watermark".into(),
                colour: ALERT,
                values: r.samples.iter().map(|s| s.sample.min_crossings as f64).collect(),
            },
        ];
        let last = r.samples.last();
        let none = last.is_none_or(|s| s.sample.low_crossings + s.sample.min_crossings == 0);
        let caption = if none {
            "Requests that found every zone they may use below the watermark, so far: none in this run."
        } else {
            "Requests that found every zone they may use below the watermark, so far. Steep is memory short."
        };
        self.add(
            "Watermark crossings",
            caption,
            false,
            &Plot {
                unit: "requests so far",
                style: Style::Lines,
                series,
                points: Vec::new(),
                levels: Vec::new(),
                range: none.then_some((0.0, 10.0)),
            },
        )
    }

    fn hits(&mut self, r: &ReplayResult) -> anyhow::Result<()> {
        let hits: Vec<f64> = r.samples.iter().map(|s| s.sample.pcp_hit_percent).collect();
        // The first requests find empty lists; the axis is for those that follow.
        let settled = hits.iter().skip(hits.len() / 20).copied().fold(100.0, f64::min);
        let least = (settled / 5.0).floor() * 5.0;
        let hits = hits.into_iter().map(|h| h.max(least)).collect();
        self.add(
            "Per-CPU list hits",
            "Allocations answered from a per-CPU list without touching a free list, in hundredths of all so far.",
            false,
            &Plot {
                unit: "hits, %",
                style: Style::Lines,
                series: vec![Series { name: "hits so far".into(), colour: KMEM, values: hits }],
                points: Vec::new(),
                levels: Vec::new(),
                range: Some((least, 100.0)),
            },
        )
    }

    fn lists(&mut self, r: &ReplayResult) -> anyhow::Result<()> {
        let series = vec![Series {
            name: "kmem".into(),
            colour: ON_LISTS,
            values: values(r, |_, on_lists| on_lists as f64),
        }];
        let linux = self.linux(r, |s| s.pcp_frames as f64);
        self.add(
            "Frames on per-CPU lists",
            "Free frames that are in no block because a CPU keeps them for its next request.",
            true,
            &Plot {
                unit: "frames",
                style: Style::Lines,
                series,
                points: linux.into_iter().map(|(x, y)| (x, y, LINUX)).collect(),
                levels: Vec::new(),
                range: None,
            },
        )
    }
}

impl Figures<'_> {
    fn areas(&mut self, r: &ReplayResult) -> anyhow::Result<()> {
        let Some(v) = &r.vmalloc else { return Ok(()) };
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let series = |name: &str, colour, values: &[u64]| Series {
            name: name.into(),
            colour,
            values: values.iter().map(|bytes| mib(*bytes)).collect(),
        };
        let linux = r.linux_vmalloc.as_ref();
        let ends = [(0.0, linux.map(|l| l.start)), (self.axis.events, linux.and_then(|l| l.end))];
        let ends: Vec<_> = ends.into_iter().filter_map(|(x, state)| Some((x, state?))).collect();
        let used = ends.iter().map(|(x, s)| (*x, mib(s.bytes), KMEM));
        let taken = ends.iter().map(|(x, s)| (*x, mib(s.bytes + s.unpurged_bytes), ON_LISTS));
        self.add(
            "Addresses of vmalloc areas",
            "What areas in use take of the vmalloc range, guards included, and what no other area can have, since it waits \
             for a purge or for the next area of its size.",
            true,
            &Plot {
                unit: "MiB of addresses",
                style: Style::Lines,
                series: vec![
                    series("in use", KMEM, &v.samples_bytes),
                    series("in use, not purged or pooled", ON_LISTS, &v.samples_taken),
                ],
                points: used.chain(taken).collect(),
                levels: Vec::new(),
                range: None,
            },
        )
    }
}

/// Where the free memory lies at the end, kmem beside Linux.
fn at_the_end(r: &ReplayResult) -> anyhow::Result<String> {
    let Some(linux) = &r.linux_end else {
        return Ok(String::new());
    };
    let orders = r.end.free_blocks.len().max(linux.free_blocks.len());
    let mut names: Vec<String> = (0..orders).map(|o| format!("order {o}")).collect();
    names.push("CPU lists".into());
    let of = |name: &str, colour, state: &FreeState| {
        let block = |o: usize| state.free_blocks.get(o).copied().unwrap_or(0) << o;
        let mut values: Vec<f64> = (0..orders).map(|o| mib(block(o))).collect();
        values.push(mib(state.pcp_frames));
        Series { name: name.into(), colour, values }
    };
    let series = [of("kmem", KMEM, &r.end), of("Linux", LINUX, linux)];
    let mut out = String::new();
    let w = &mut out;
    writeln!(w, "<h2>Where the free memory lies at the end</h2>")?;
    writeln!(
        w,
        "<figure><figcaption>Memory in free blocks of each order. Further right is better.</figcaption>"
    )?;
    legend(w, series.iter().map(|s| (&s.name[..], s.colour, "")))?;
    writeln!(w, "{}</figure>", bars(&names, &series, "MiB free")?)?;
    Ok(out)
}

fn legend<'a>(
    w: &mut String,
    entries: impl Iterator<Item = (&'a str, RGBColor, &'a str)>,
) -> anyhow::Result<()> {
    writeln!(w, "<ul class=\"legend\">")?;
    for (name, colour, class) in entries {
        let colour = css(colour);
        let name = escape(name);
        writeln!(w, "<li><i class=\"{class}\" style=\"background:{colour}\"></i>{name}</li>")?;
    }
    writeln!(w, "</ul>")?;
    Ok(())
}

/// A value for each sample, of its free blocks and its frames on per-CPU lists.
fn values(r: &ReplayResult, of: impl Fn(&[u64], u64) -> f64) -> Vec<f64> {
    r.samples.iter().map(|s| of(&s.sample.free_blocks, s.sample.pcp_frames)).collect()
}

fn frames(blocks: &[u64]) -> u64 {
    blocks.iter().enumerate().map(|(o, n)| n << o).sum()
}

fn mib(frames: u64) -> f64 {
    frames as f64 / PER_MIB
}
