//! What a recording tells of Linux's slab layer.

use kmem_trace::slab::{Held, LinuxSlab};
use kmem_trace::{CacheShape, Id, Kind, Meta, Place, Recording, Row};

const DIRECT_MAP: u64 = 0xffff_8880_0000_0000;

fn row(kind: Kind, address: u64, id: impl Into<Option<Id>>, cache: impl Into<Option<u16>>) -> Row {
    Row {
        time_ns: 0,
        address,
        id: id.into(),
        bytes_requested: 64,
        bytes_allocated: 64,
        gfp: 0xcc0,
        site: 0,
        cache: cache.into(),
        cpu: 0,
        kind,
        order: 0,
        migratetype: 0,
        backs_slab: kind.is_page(),
        backs_large_kmalloc: false,
    }
}

fn object(kind: Kind, pfn: u64, at: u64, id: impl Into<Option<Id>>) -> Row {
    let cache = (kind != Kind::Kfree).then_some(7);
    row(kind, DIRECT_MAP + (pfn << 12) + at * 64, id, cache)
}

fn slabinfo(lines: &[(&str, u64, u64)]) -> String {
    let mut text = "slabinfo - version: 2.1\n# name\n".to_owned();
    for (name, active, slabs) in lines {
        let objects = slabs * 64;
        text += &format!(
            "{name} {active} {objects} 64 64 1 : tunables 0 0 0 : slabdata {slabs} {slabs} 0\n"
        );
    }
    text
}

fn recording(rows: Vec<Row>, start: &str, end: &str) -> Recording {
    let mut meta = Meta::new("x", "KMT1");
    meta.caches.insert(
        7,
        CacheShape {
            name: "seven".to_owned(),
            object_size: 60,
            size: 64,
            align: 8,
            flags: 0,
            constructor: false,
            objects_per_slab: 64,
            order: 0,
        },
    );
    meta.files.insert("start/slabinfo".to_owned(), start.to_owned());
    meta.files.insert("end/slabinfo".to_owned(), end.to_owned());
    Recording { meta, rows }
}

fn told(rows: Vec<Row>, active: u64) -> LinuxSlab {
    let start = slabinfo(&[("seven", active, 2), ("other", 64, 1)]);
    let end = slabinfo(&[("seven", active, 2), ("other", 64, 1), ("late", 1, 1)]);
    recording(rows, &start, &end).linux_slab().unwrap().unwrap()
}

/// The first object in a slab's frames says whose it is; the peak lies where most slabs are there at once.
#[test]
fn slabs_come_and_go() {
    use Kind::{CacheAlloc, Kfree, PageAlloc, PageFree};
    let rows = vec![
        row(PageAlloc, 0x100, 0, None),
        object(CacheAlloc, 0x100, 0, 1),
        row(PageAlloc, 0x101, 2, None),
        object(CacheAlloc, 0x101, 5, 3),
        // The row does not say of which cache; its allocation does.
        object(Kfree, 0x100, 0, 1),
        row(PageFree, 0x100, 0, None),
        // A slab from before, known by an object in it.
        object(CacheAlloc, 0x80, 1, 4),
        object(Kfree, 0x80, 1, 4),
        row(PageFree, 0x80, None, None),
    ];
    let slab = told(rows, 100);
    assert_eq!((slab.frames_start, slab.peak), (3, Some((5, 2))));
    assert_eq!((slab.frames_last_row, slab.frames_end), (Some(3), Some(4)));
    let seven = &slab.caches[0];
    assert_eq!((&seven.name[..], seven.object_size, seven.at_start), ("seven", 60, true));
    assert_eq!(seven.start, Held { frames: 2, live: 100 });
    assert_eq!(seven.peak, Held { frames: 4, live: 101 });
    assert_eq!(seven.end, Held { frames: 2, live: 101 });
    assert_eq!(slab.caches[1].peak, Held { frames: 1, live: 64 });
    let late = &slab.caches[2];
    assert_eq!((&late.name[..], late.at_start, late.end.frames), ("late", false, 1));
}

/// More objects from before are freed than `slabinfo` calls active: they were there all the same.
#[test]
fn frees_of_objects_from_before_are_of_live_ones() {
    let free = |at: u64| row(Kind::CacheFree, DIRECT_MAP + (0x80 << 12) + at * 64, None, 7);
    let slab = told(vec![free(0), free(1), free(2)], 2);
    assert_eq!((slab.caches[0].start.live, slab.caches[0].end.live), (3, 0));
    assert_eq!((slab.peak, slab.frames_last_row), (None, None));
    assert_eq!(slab.caches[0].peak, Held::default());
}

/// 28 objects are free by `slabinfo`; 30 more turn out to be, each told by its first event alone.
#[test]
fn objects_shown_to_be_free() {
    let mut rows = Vec::new();
    for at in 0..58 {
        rows.push(object(Kind::CacheAlloc, 0x80, at, at as u32));
        rows.push(object(Kind::CacheFree, 0x80, at, at as u32));
    }
    rows.push(object(Kind::CacheAlloc, 0x80, 0, 58));
    let freed_first = row(Kind::CacheFree, DIRECT_MAP + (0x81 << 12), None, 7);
    rows.extend([freed_first, object(Kind::CacheAlloc, 0x81, 0, 59)]);
    let slab = told(rows, 100);
    assert_eq!((slab.shown_free(), slab.caches[0].shown_free), (30, 30));
}

#[test]
fn a_text_that_cannot_be_read_is_named() {
    let start = slabinfo(&[("seven", 1, 1)]);
    for (file, text) in [("start/slabinfo", "slabinfo - version: 1.1\n"), ("end/slabinfo", "")] {
        let mut recording = recording(Vec::new(), &start, &start);
        recording.meta.files.insert(file.to_owned(), text.to_owned());
        let error = recording.linux_slab().unwrap_err();
        assert_eq!((&error.file[..], error.place), (file, Place::Line(1)));
    }
    let mut without = recording(Vec::new(), &start, &start);
    without.meta.files.clear();
    assert_eq!(without.linux_slab(), Ok(None));
}
