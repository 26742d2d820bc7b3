//! `/proc/zoneinfo`: the size, watermarks and per-CPU lists of each zone.
//!
//! A zone's part begins with `Node N, zone NAME`; the watermarks stand under `pages free`, per-CPU lists under
//! `pagesets`, and between them counters in lines of a name and a number. Zones without frames are listed too,
//! without `pagesets` and `start_pfn`.

use super::{Line, empty};
use crate::error::TraceError;

/// The per-CPU lists of one CPU in one zone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageSet {
    /// The CPU.
    pub cpu: u32,
    /// Frames on its lists.
    pub count: u64,
    /// Frames at which the lists are trimmed.
    pub high: u64,
    /// Frames moved to or from the free lists at once.
    pub batch: u64,
}

/// One zone. All sizes are in frames.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Zone {
    /// The zone's NUMA node.
    pub node: u32,
    /// The zone's name.
    pub name: String,
    /// Free frames on the free lists.
    pub free: u64,
    /// What fragmentation has raised the watermarks by for now.
    pub boost: u64,
    /// Watermark below which ordinary requests must reclaim.
    pub min: u64,
    /// Watermark below which kswapd wakes.
    pub low: u64,
    /// Watermark at which kswapd sleeps.
    pub high: u64,
    /// Watermark for promotion between memory tiers.
    pub promo: u64,
    /// Frames from the zone's first to its last, holes included.
    pub spanned: u64,
    /// Frames that exist.
    pub present: u64,
    /// Frames the page allocator was given: present ones less those the kernel reserved at boot.
    pub managed: u64,
    /// Frames of the contiguous memory allocator.
    pub cma: u64,
    /// Frames kept back from requests that could have used a higher zone, by that zone (`lowmem_reserve`).
    pub protection: Vec<u64>,
    /// The per-CPU lists.
    pub pagesets: Vec<PageSet>,
    /// The zone's first pfn; 0 in a zone without frames.
    pub start_pfn: u64,
}

impl Zone {
    /// Frames on the zone's per-CPU lists together.
    pub fn pcp_count(&self) -> u64 {
        self.pagesets.iter().fold(0, |sum, set| sum.saturating_add(set.count))
    }
}

/// A whole `/proc/zoneinfo`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Zoneinfo {
    /// All zones, those without frames included, in the text's order.
    pub zones: Vec<Zone>,
}

impl Zoneinfo {
    /// Parses `text`, which errors call `file`.
    ///
    /// # Errors
    /// A line of no known shape, one outside any zone, or an empty text.
    pub fn parse(text: &str, file: &str) -> Result<Self, TraceError> {
        let mut zones: Vec<Zone> = Vec::new();
        for line in Line::all(text, file) {
            if line.text.starts_with("Node") {
                let (node, name, rest) = line.node_and_zone()?;
                if !rest.trim().is_empty() {
                    return Err(line.error("nothing belongs behind the zone's name"));
                }
                zones.push(Zone { node, name: name.to_owned(), ..Zone::default() });
                continue;
            }
            let zone =
                zones.last_mut().ok_or_else(|| line.error("this stands before the first zone"))?;
            zone.line(line)?;
        }
        if zones.is_empty() { Err(empty(file)) } else { Ok(Zoneinfo { zones }) }
    }

    /// Zone `name` of `node`.
    pub fn zone(&self, node: u32, name: &str) -> Option<&Zone> {
        self.zones.iter().find(|zone| zone.node == node && zone.name == name)
    }

    /// Number of CPUs the per-CPU lists speak of.
    pub fn cpus(&self) -> u32 {
        let sets = self.zones.iter().flat_map(|zone| &zone.pagesets);
        sets.map(|set| set.cpu.saturating_add(1)).max().unwrap_or(0)
    }
}

impl Zone {
    fn line(&mut self, line: Line) -> Result<(), TraceError> {
        let text = line.text.trim();
        if matches!(text, "per-node stats" | "pagesets") {
            return Ok(());
        }
        if let Some(list) = text.strip_prefix("protection:") {
            let list = list.trim().strip_prefix('(').and_then(|list| list.strip_suffix(')'));
            let list =
                list.ok_or_else(|| line.error("the protection is not a list in parentheses"))?;
            self.protection = list
                .split(',')
                .map(|number| line.number(number.trim()))
                .collect::<Result<_, _>>()?;
            return Ok(());
        }
        let (name, number) = text.rsplit_once(char::is_whitespace).ok_or_else(|| {
            line.error(format!("{text:?} is neither a name with a number nor a known heading"))
        })?;
        let (name, number): (_, u64) = (name.trim_end(), line.number(number)?);
        let Some(name) = name.strip_suffix(':') else {
            if let Some(field) = self.field(name) {
                *field = number;
            }
            return Ok(());
        };
        match (name, self.pagesets.last_mut()) {
            ("cpu", _) => {
                let cpu = u32::try_from(number).map_err(|_| line.error(format!("CPU {number}")))?;
                self.pagesets.push(PageSet { cpu, ..PageSet::default() });
            }
            ("start_pfn", _) => self.start_pfn = number,
            ("count", Some(set)) => set.count = number,
            ("high", Some(set)) => set.high = number,
            ("batch", Some(set)) => set.batch = number,
            ("count" | "high" | "batch", None) => {
                return Err(line.error("this stands outside any CPU's page set"));
            }
            _ => {}
        }
        Ok(())
    }

    /// The field a plain line of that name fills, if it is one of those kept.
    fn field(&mut self, name: &str) -> Option<&mut u64> {
        Some(match name {
            "pages free" => &mut self.free,
            "boost" => &mut self.boost,
            "min" => &mut self.min,
            "low" => &mut self.low,
            "high" => &mut self.high,
            "promo" => &mut self.promo,
            "spanned" => &mut self.spanned,
            "present" => &mut self.present,
            "managed" => &mut self.managed,
            "cma" => &mut self.cma,
            _ => return None,
        })
    }
}
