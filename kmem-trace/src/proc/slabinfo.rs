//! `/proc/slabinfo`: objects and slabs of each cache.
//!
//! Two head lines, then one line for each cache: its name, five numbers, and two groups behind `: tunables` and
//! `: slabdata`. Caches that share their slabs have one line between them. Linux counts an object as *active*
//! unless it lies free in a slab on a node's list: free objects of slabs that a CPU has for itself count as active.

use super::{Line, empty};
use crate::error::TraceError;

/// One cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlabCache {
    /// Its name.
    pub name: String,
    /// Objects that are in use, or free in a slab that a CPU has for itself.
    pub active_objects: u64,
    /// All objects.
    pub objects: u64,
    /// Bytes from one object to the next.
    pub size: u32,
    /// Objects of a slab.
    pub objects_per_slab: u32,
    /// Frames of a slab.
    pub frames_per_slab: u32,
    /// Slabs.
    pub slabs: u64,
}

impl SlabCache {
    /// Frames of all its slabs.
    pub fn frames(&self) -> u64 {
        self.slabs.saturating_mul(self.frames_per_slab.into())
    }
}

/// A whole `/proc/slabinfo`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slabinfo {
    /// The caches, in the text's order.
    pub caches: Vec<SlabCache>,
}

impl Slabinfo {
    /// Parses `text`, which errors call `file`.
    ///
    /// # Errors
    /// No version line of version 2, a line of another shape, a cache twice, or an empty text.
    pub fn parse(text: &str, file: &str) -> Result<Self, TraceError> {
        let mut lines = Line::all(text, file);
        let head = lines.next().ok_or_else(|| empty(file))?;
        if !head.text.starts_with("slabinfo - version: 2.") {
            return Err(head.error("this does not begin as slabinfo of version 2 does"));
        }
        let mut caches: Vec<SlabCache> = Vec::new();
        let mut names = std::collections::BTreeSet::new();
        for line in lines.filter(|line| !line.text.starts_with('#')) {
            let cache = cache(&line)?;
            if !names.insert(cache.name.clone()) {
                return Err(line.error(format!("cache {} a second time", cache.name)));
            }
            caches.push(cache);
        }
        if caches.is_empty() { Err(empty(file)) } else { Ok(Slabinfo { caches }) }
    }

    /// Frames of all slabs.
    pub fn frames(&self) -> u64 {
        self.caches.iter().map(SlabCache::frames).fold(0, u64::saturating_add)
    }
}

/// More frames than any machine has.
const MOST_FRAMES: u64 = 1 << 40;

fn cache(line: &Line) -> Result<SlabCache, TraceError> {
    let wrong = || line.error("this is not a cache with its numbers, tunables and slabdata");
    let mut groups = line.text.split(" : ");
    let mut group = |name: Option<&str>| {
        let words = groups.next().map(|group| group.split_whitespace().collect::<Vec<_>>());
        match (words, name) {
            (Some(words), Some(name)) if words.first() == Some(&name) => Ok(words[1..].to_vec()),
            (Some(words), None) => Ok(words),
            _ => Err(wrong()),
        }
    };
    let (numbers, _) = (group(None)?, group(Some("tunables"))?);
    let slabs = group(Some("slabdata"))?;
    let ([name, active, objects, size, per_slab, frames], [_, slabs, _]) =
        (numbers.as_slice(), slabs.as_slice())
    else {
        return Err(wrong());
    };
    let cache = SlabCache {
        name: (*name).to_owned(),
        active_objects: line.number(active)?,
        objects: line.number(objects)?,
        size: line.number(size)?,
        objects_per_slab: line.number(per_slab)?,
        frames_per_slab: line.number(frames)?,
        slabs: line.number(slabs)?,
    };
    if cache.active_objects > cache.objects {
        return Err(line.error(format!("{active} of {objects} objects are active")));
    }
    if cache.frames() > MOST_FRAMES {
        return Err(line.error(format!("{slabs} slabs are more than any machine has")));
    }
    let most = cache.slabs.checked_mul(cache.objects_per_slab.into());
    if most.is_none_or(|most| cache.objects > most) {
        return Err(line.error(format!("{objects} objects do not fit {slabs} slabs")));
    }
    Ok(cache)
}
