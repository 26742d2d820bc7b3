//! What a recording says beside its rows.
//!
//! Rows are numbers; the names behind the numbers (slab caches, call sites, stacks) and the texts of `/proc` taken
//! around the recording are kept once, here. The texts are kept as they were read, under the name they had in the
//! recording's folder (`start/pagetypeinfo`, `buddyinfo.traced_start`), and parsed only when somebody asks: a
//! recording whose `zoneinfo` cannot be parsed can still be listed.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::proc::Zoneinfo;
use crate::row::Row;

/// The shape of one slab cache of the recorded machine. Text recordings know the name alone; the rest is 0 there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheShape {
    /// Its name, as in `/proc/slabinfo`.
    pub name: String,
    /// Bytes of an object that its user may touch.
    pub object_size: u32,
    /// Bytes from one object to the next.
    pub size: u32,
    /// Alignment of an object in bytes.
    pub align: u32,
    /// The cache's `SLAB_*` flags, in Linux 6.12 bit values.
    pub flags: u64,
    /// Whether the cache has a constructor.
    pub constructor: bool,
    /// Objects in one slab.
    pub objects_per_slab: u32,
    /// log2 of the frames of one slab.
    pub order: u8,
}

/// Everything of a recording but its rows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Meta {
    /// The recording's name: its file's name without its extensions.
    pub name: String,
    /// The form the events were first read from: `KMT1`, `text`.
    pub source: String,
    /// log2 of a frame's bytes.
    pub page_shift: u32,
    /// Number of CPUs of the recorded machine.
    pub cpus: u32,
    /// Events the recorder says it lost. More than 0: the rows do not tell the whole story.
    pub lost: u64,
    /// The slab caches, by the number rows use ([`crate::Row::cache`]).
    pub caches: BTreeMap<u16, CacheShape>,
    /// The call sites, by the number rows use ([`crate::Row::site`]). Number 0 is `?`, the unknown one.
    pub sites: Vec<String>,
    /// The call stacks of page allocations, by [`crate::Row::stack`]: functions, innermost first, joined by `<`.
    pub stacks: BTreeMap<u32, String>,
    /// `/proc` texts and logs taken around the recording, by name relative to its folder.
    pub files: BTreeMap<String, String>,
    /// What else the recorder or the reader noted: event counts, anomalies, lines skipped.
    pub counts: BTreeMap<String, serde_json::Value>,
}

impl Meta {
    /// An empty description of a recording called `name`, read from `source`: 4 KiB frames, one CPU.
    pub fn new(name: impl Into<String>, source: impl Into<String>) -> Self {
        Meta {
            name: name.into(),
            source: source.into(),
            page_shift: 12,
            cpus: 1,
            lost: 0,
            caches: BTreeMap::new(),
            sites: vec!["?".to_owned()],
            stacks: BTreeMap::new(),
            files: BTreeMap::new(),
            counts: BTreeMap::new(),
        }
    }

    /// Raises the number of CPUs to what the rows and the `zoneinfo` of the start speak of.
    pub(crate) fn count_cpus(&mut self, rows: &[Row]) {
        let in_rows = rows.iter().map(|row| u32::from(row.cpu) + 1).max().unwrap_or(0);
        let zoneinfo = self.first_file(&["zoneinfo.traced_start", "start/zoneinfo"]);
        // A text that cannot be parsed is an error for whoever needs what it says, not for the rows.
        let parsed = zoneinfo.and_then(|(name, text)| Zoneinfo::parse(text, name).ok());
        self.cpus = self.cpus.max(in_rows).max(parsed.map_or(0, |zoneinfo| zoneinfo.cpus()));
    }

    /// The text called `name` in the recording's folder.
    pub fn file(&self, name: &str) -> Option<&str> {
        self.files.get(name).map(String::as_str)
    }

    /// The first of `names` the recording has, with its text.
    pub fn first_file<'a>(&'a self, names: &[&'a str]) -> Option<(&'a str, &'a str)> {
        names.iter().find_map(|name| Some((*name, self.file(name)?)))
    }

    /// The name of call site `site`, `?` when it has none.
    pub fn site(&self, site: u16) -> &str {
        self.sites.get(usize::from(site)).map_or("?", String::as_str)
    }
}
