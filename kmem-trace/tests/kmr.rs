//! The `.kmr` container returns what went in, and notices and locates damage.

use kmem_trace::{Id, Kind, Meta, NO_STACK, Place, Recording, Row, kmr};
use proptest::prelude::*;

/// Rows of any kind, with fields of any value; ids follow the rule that allocations are numbered in order.
fn rows() -> impl Strategy<Value = Vec<Row>> {
    let numbers = (any::<u64>(), any::<u64>(), any::<u32>(), any::<u32>(), any::<u32>());
    let small =
        (0..4u16, prop::option::of(0..3u16), 0..2u16, 0..4u8, 0..6u8, any::<bool>(), any::<bool>());
    let row = (
        0..Kind::ALL.len(),
        numbers,
        small,
        prop::option::of(any::<prop::sample::Index>()),
        any::<bool>(),
    );
    prop::collection::vec(row, 0..120).prop_map(|drafts| {
        let gives =
            |kind: Kind| usize::from(kind.gives_id()) + 2 * usize::from(kind == Kind::Split);
        let ids: usize = drafts.iter().map(|(kind, ..)| gives(Kind::ALL[*kind])).sum();
        let mut next: Id = 0;
        let mut rows = Vec::new();
        for (kind, (time_ns, address, requested, allocated, gfp), small, named, wild) in drafts {
            let kind = Kind::ALL[kind];
            let (site, cache, cpu, order, migratetype, backs_slab, backs_large_kmalloc) = small;
            // Half of the rows repeat each other in what the container expects to repeat.
            let pick = |wild_value: u32, tame: u32| if wild { wild_value } else { tame };
            let id = if kind.gives_id() {
                Some(next)
            } else if kind.ends_id() && ids > 0 {
                named.map(|index| index.index(ids) as Id)
            } else {
                None
            };
            let address = if wild { address } else { address % 64 };
            rows.push(Row {
                time_ns: if wild { time_ns } else { time_ns % 1000 },
                address: if kind.is_page() { (address >> 16) >> order << order } else { address },
                id,
                bytes_requested: if kind == Kind::Split { next } else { pick(requested, NO_STACK) },
                bytes_allocated: pick(allocated, 64),
                gfp: pick(gfp, 0xcc0),
                site: if wild { site * 16_000 } else { site },
                cache: if wild { cache.map(|cache| cache * 30_000) } else { cache },
                cpu: if wild { cpu * 65_535 } else { cpu },
                kind,
                order,
                migratetype,
                backs_slab,
                backs_large_kmalloc,
            });
            next += gives(kind) as Id;
        }
        rows
    })
}

fn recording(rows: Vec<Row>) -> Recording {
    let mut meta = Meta::new("generated", "text");
    meta.files.insert("start/buddyinfo".into(), "Node 0, zone DMA 1 2 3\n\u{1f9e0}\0".into());
    meta.counts.insert("rows".into(), rows.len().into());
    Recording { meta, rows }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn what_went_in_comes_out(rows in rows()) {
        let recording = recording(rows);
        let bytes = kmr::write(&recording, 1).unwrap();
        prop_assert_eq!(kmr::read(&bytes, "x.kmr").unwrap(), recording);
    }

    #[test]
    fn any_flipped_bit_is_noticed(rows in rows(), at in any::<prop::sample::Index>(), bit in 0..8u8) {
        let mut bytes = kmr::write(&recording(rows), 1).unwrap();
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        let error = kmr::read(&bytes, "x.kmr").unwrap_err();
        prop_assert_eq!(error.file, "x.kmr");
        // The damage lies in the section whose start, or whose packed bytes' start, the error names.
        prop_assert!(matches!(error.place, Place::Byte(place) if place <= at as u64), "{:?} {}", error.place, at);
    }

    #[test]
    fn any_cut_is_noticed(rows in rows(), at in any::<prop::sample::Index>()) {
        let bytes = kmr::write(&recording(rows), 1).unwrap();
        let cut = &bytes[..at.index(bytes.len())];
        let error = kmr::read(cut, "x.kmr").unwrap_err();
        prop_assert!(matches!(error.place, Place::Byte(place) if place <= cut.len() as u64));
    }
}

#[test]
fn the_file_begins_with_its_own_documentation() {
    let bytes = kmr::write(&recording(Vec::new()), 1).unwrap();
    assert!(bytes.starts_with(b"KMR 1: a recording of kernel memory events\n"));
    assert!(bytes.starts_with(kmr::HEAD.as_bytes()));
    assert_eq!(bytes[kmr::HEAD.len()], 0);
    for number in Kind::ALL.map(Kind::number) {
        let documented = kmr::HEAD
            .split(|letter: char| !letter.is_ascii_digit())
            .any(|word| word == number.to_string());
        assert!(documented, "kind {number}");
    }
}

#[test]
fn another_version_is_refused_by_name() {
    let mut bytes = kmr::write(&recording(Vec::new()), 1).unwrap();
    bytes[4] = b'2';
    let error = kmr::read(&bytes, "x.kmr").unwrap_err();
    assert_eq!(error.to_string(), "x.kmr: byte 0: this begins with \"KMR 2\"; known is \"KMR 1\"");
}

#[test]
fn frames_of_absurd_size_are_refused() {
    let mut recording = recording(Vec::new());
    recording.meta.page_shift = 64;
    let error = kmr::read(&kmr::write(&recording, 1).unwrap(), "x.kmr").unwrap_err();
    assert_eq!(error.place, Place::Byte(kmr::HEAD.len() as u64 + 1), "{error}");
}

#[test]
fn bytes_behind_the_end_are_refused() {
    let mut bytes = kmr::write(&recording(Vec::new()), 1).unwrap();
    let end = bytes.len() as u64;
    bytes.push(0);
    let error = kmr::read(&bytes, "x.kmr").unwrap_err();
    assert_eq!(error.place, Place::Byte(end));
}

#[test]
fn ids_out_of_order_cannot_be_written() {
    let mut recording = recording(Vec::new());
    recording.rows.push(Row {
        time_ns: 0,
        address: 0,
        id: Some(7),
        bytes_requested: 8,
        bytes_allocated: 8,
        gfp: 0,
        site: 0,
        cache: None,
        cpu: 0,
        kind: Kind::Kmalloc,
        order: 0,
        migratetype: 0,
        backs_slab: false,
        backs_large_kmalloc: false,
    });
    assert!(kmr::write(&recording, 1).unwrap_err().to_string().starts_with("row 0"));
    recording.rows[0].kind = Kind::Kfree;
    assert!(
        kmr::write(&recording, 1).unwrap_err().to_string().contains("names an id no row gives")
    );
}

#[test]
fn a_written_file_opens() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.kmr");
    let recording = recording(Vec::new());
    recording.write(&path).unwrap();
    assert_eq!(Recording::open(&path).unwrap(), recording);
}
