//! The `KMT1` row form: what it says is read, and every field out of range is refused at its byte.

use std::fs;

use kmem_trace::kmt::{self, DIRECT_MAP_BASE, VMALLOC_BASE};
use kmem_trace::{Kind, Meta, Place, Recording, TraceError};

const NONE: u32 = u32::MAX;

/// One row's bytes. The fields the tests do not vary are fixed.
fn row(dt: u32, kind: u8, order: u8, flags: u8, address: u32, id: u32) -> [u8; 32] {
    let mut row = [0; 32];
    row[0..4].copy_from_slice(&dt.to_le_bytes());
    row[4..8].copy_from_slice(&[kind, 1, order, flags]);
    row[8..12].copy_from_slice(&address.to_le_bytes());
    row[12..16].copy_from_slice(&id.to_le_bytes());
    row[16..20].copy_from_slice(&100u32.to_le_bytes());
    row[20..24].copy_from_slice(&128u32.to_le_bytes());
    row[24..28].copy_from_slice(&0xcc0u32.to_le_bytes());
    row[28..30].copy_from_slice(&1u16.to_le_bytes());
    row[30..32].copy_from_slice(&u16::MAX.to_le_bytes());
    row
}

fn stream(rows: &[[u8; 32]], ids: u64) -> Vec<u8> {
    let mut bytes = b"KMT1\0\0\0\0".to_vec();
    bytes.extend(32u32.to_le_bytes());
    bytes.extend(1u32.to_le_bytes());
    bytes.extend((rows.len() as u64).to_le_bytes());
    bytes.extend(ids.to_le_bytes());
    rows.iter().for_each(|row| bytes.extend(row));
    bytes
}

fn good() -> Vec<u8> {
    let rows = [
        row(5, 1, 0, 0, 10, 0),
        row(7, 5, 3, 0x12, 0x1000, 1),
        row(1, 13, 14, 0, 3, 2),
        row(2, 6, 3, 0x12, 0x1000, 1),
        row(9, 2, 0, 0, 99, NONE),
        row(3, 28, 0, 0, 4, NONE),
    ];
    stream(&rows, 3)
}

fn read(bytes: &[u8]) -> Result<Recording, TraceError> {
    kmt::read(bytes, "x.kmt", Meta::new("x", "KMT1"))
}

#[test]
fn rows_are_read() {
    let recording = read(&good()).unwrap();
    let rows = &recording.rows;
    assert_eq!(rows.iter().map(|row| row.time_ns).collect::<Vec<_>>(), [5, 12, 13, 15, 24, 27]);
    assert_eq!(
        (rows[0].kind, rows[0].address, rows[0].id),
        (Kind::Kmalloc, DIRECT_MAP_BASE + 80, Some(0))
    );
    assert_eq!((rows[0].bytes_requested, rows[0].bytes_allocated, rows[0].gfp), (100, 128, 0xcc0));
    assert_eq!((rows[0].cpu, rows[0].site, rows[0].cache), (1, 1, None));
    assert_eq!(
        (rows[1].address, rows[1].order, rows[1].migratetype, rows[1].stack()),
        (0x1000, 3, 2, Some(100))
    );
    assert!(rows[1].backs_slab && rows[1].belongs_to_slab_layer() && !rows[1].backs_large_kmalloc);
    assert_eq!(rows[2].address, VMALLOC_BASE + 3 * 4096);
    assert_eq!((rows[3].kind, rows[3].id), (Kind::PageFree, Some(1)));
    assert_eq!(rows[4].id, None);
    assert_eq!(recording.phases()[0].number, 4);
    assert_eq!((recording.meta.cpus, recording.ids(), recording.duration_ns()), (2, 3, 27));
}

#[test]
fn a_packed_stream_is_the_same() {
    let packed = zstd::bulk::compress(&good(), 3).unwrap();
    assert_eq!(read(&packed).unwrap(), read(&good()).unwrap());
}

#[test]
fn each_bad_field_is_refused_at_its_byte() {
    // Offset of the byte to change, its new value, where the error must be, and a word of it.
    let cases: [(usize, u8, u64, &str); 12] = [
        (8, 16, 8, "rows of 16 bytes"),
        (12, 2, 12, "version 2"),
        (16, 7, 224, "announces 7 rows"),
        (16, 5, 192, "announces 5 rows"),
        (24, 4, 24, "announces 4 ids"),
        (32 + 4, 99, 36, "number 99"),
        (32 + 12, 1, 44, "next in order is 0"),
        (64 + 6, 14, 64, "order 14"),
        (64 + 7, 0x52, 71, "mobility type"),
        (64 + 7, 0x16, 71, "mobility type"),
        (64 + 8, 1, 64, "cannot begin at pfn"),
        (128 + 12, 3, 140, "a free of id 3"),
    ];
    for (at, value, place, what) in cases {
        let mut bytes = good();
        bytes[at] = value;
        let error = read(&bytes).unwrap_err();
        assert_eq!(error.place, Place::Byte(place), "{error}");
        assert!(error.what.contains(what), "{error}");
    }
}

#[test]
fn every_cut_is_refused() {
    let whole = good();
    for length in 8..whole.len() {
        let error = read(&whole[..length]).unwrap_err();
        assert!(matches!(error.place, Place::Byte(at) if at <= length as u64), "{error}");
    }
    let packed = zstd::bulk::compress(&whole, 3).unwrap();
    for length in 4..packed.len() {
        let error = read(&packed[..length]).unwrap_err();
        assert!(
            matches!(error.place, Place::UnpackedByte(at) if at <= whole.len() as u64),
            "{error}"
        );
    }
}

#[test]
fn a_split_gives_two_ids() {
    let mut split = row(1, 40, 1, 1, 8, 0);
    split[16..20].copy_from_slice(&1u32.to_le_bytes());
    let rows = [row(1, 5, 1, 1, 8, 0), split, row(1, 6, 0, 1, 9, 2)];
    let recording = read(&stream(&rows, 3)).unwrap();
    assert_eq!((recording.rows[1].children(), recording.ids()), (Some((1, 2)), 3));
    split[16] = 5;
    let error = read(&stream(&[rows[0], split, rows[2]], 3)).unwrap_err();
    assert_eq!(error.place, Place::Byte(64 + 16));
}

const TABLES: &str = r#"{"rows":6,"ids":3,"lost":2,
"caches":{"7":["dentry",192,192,8,"0x52100",0,21,0]},
"sites":["?","d_alloc"],"stacks":{"100":"a<b"}}"#;

#[test]
fn tables_and_texts_beside_the_rows_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    fs::write(path("x.kmt.zst"), zstd::bulk::compress(&good(), 3).unwrap()).unwrap();
    fs::write(path("x.json"), TABLES).unwrap();
    fs::create_dir_all(path("x/start")).unwrap();
    fs::write(path("x/start/iomem"), "00001000-0009fbff : System RAM\n").unwrap();
    fs::write(path("x/workload.log"), "done\n").unwrap();
    let meta = Recording::open(path("x.kmt.zst")).unwrap().meta;
    assert_eq!((meta.name.as_str(), meta.lost, meta.site(1)), ("x", 2, "d_alloc"));
    assert_eq!((meta.caches[&7].name.as_str(), meta.caches[&7].flags), ("dentry", 0x52100));
    assert_eq!(meta.stacks[&100], "a<b");
    assert_eq!(meta.file("workload.log"), Some("done\n"));
    assert!(meta.file("start/iomem").unwrap().contains("System RAM"));

    fs::write(path("x.json"), TABLES.replace("\"rows\":6", "\"rows\":5")).unwrap();
    let error = Recording::open(path("x.kmt.zst")).unwrap_err();
    assert!(error.what.contains("not of one recording"), "{error}");
    fs::write(path("x.json"), TABLES.replace(":[\"?\",\"d_alloc\"]", ":[\"?\"]")).unwrap();
    let error = Recording::open(path("x.kmt.zst")).unwrap_err();
    assert_eq!(error.place, Place::UnpackedByte(32 + 28), "{error}");
    fs::write(path("x.json"), "{\"rows\":6,\n\"caches\":[}").unwrap();
    let error = Recording::open(path("x.kmt.zst")).unwrap_err();
    assert_eq!((error.file, error.place), (path("x.json").display().to_string(), Place::Line(2)));
}
