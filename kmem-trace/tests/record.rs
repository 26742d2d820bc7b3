//! Events as they come become a recording.

use kmem_trace::{
    Kind, Meta, PageOp, Recording, kmr,
    record::{Moment, Object, Recorder},
};

fn at(time_ns: u64, cpu: u16) -> Moment {
    Moment { time_ns, cpu }
}

fn object(address: u64) -> Object<'static> {
    Object { address, site: Some("a.rs:1:2"), cache: Some("dentry"), bytes_allocated: 192 }
}

fn made() -> Recording {
    let mut r = Recorder::new(Meta::new("x", "test"));
    r.page_free(at(1000, 1), (0x40, 3)).unwrap();
    r.page_alloc(at(1500, 0), (0x80, 2), 1, 0xcc0).unwrap();
    r.object_alloc(at(1600, 0), Kind::CacheAlloc, object(0x7f00), 190, 0xcc0).unwrap();
    r.page_free(at(1700, 1), (0x83, 0)).unwrap();
    r.object_free(at(1800, 1), Kind::CacheFree, Object { bytes_allocated: 0, ..object(0x7f00) });
    r.object_free(at(1900, 1), Kind::Kfree, object(0x9000));
    r.skip("something");
    r.finish()
}

#[test]
fn ids_are_found_by_address() {
    let recording = made();
    let rows: Vec<_> = recording.rows.iter().map(|r| (r.kind, r.time_ns, r.cpu, r.id)).collect();
    assert_eq!(
        rows,
        [
            (Kind::PageFree, 0, 1, None),
            (Kind::PageAlloc, 500, 0, Some(0)),
            (Kind::CacheAlloc, 600, 0, Some(1)),
            (Kind::Split, 700, 1, Some(0)),
            (Kind::Split, 700, 1, Some(3)),
            (Kind::PageFree, 700, 1, Some(5)),
            (Kind::CacheFree, 800, 1, Some(1)),
            (Kind::Kfree, 900, 1, None),
        ]
    );
    let ops: Vec<_> = recording.page_events().map(|e| e.op).collect();
    assert_eq!(ops[0], PageOp::FreePrior);
    assert_eq!(ops[4], PageOp::Free { id: 5 });
    let freed = &recording.rows[6];
    assert_eq!((freed.bytes_requested, freed.bytes_allocated), (190, 192));
    assert_eq!((recording.rows[7].bytes_allocated, recording.rows[7].cache), (192, Some(0)));
    assert_eq!(recording.meta.site(freed.site), "a.rs:1:2");
    assert_eq!(recording.meta.caches[&0].name, "dentry");
    assert_eq!((recording.meta.cpus, recording.ids()), (2, 6));
    assert_eq!(recording.meta.counts["skipped something"], 1);
}

#[test]
fn it_survives_the_container() {
    let recording = made();
    assert_eq!(kmr::read(&kmr::write(&recording, 1).unwrap(), "x.kmr").unwrap(), recording);
}

#[test]
fn blocks_that_are_none_are_refused() {
    let mut r = Recorder::new(Meta::new("x", "test"));
    assert!(r.page_alloc(at(0, 0), (0x81, 1), 0, 0).unwrap_err().contains("0x81"));
    assert!(r.page_alloc(at(0, 0), (0x80, 1), 6, 0).unwrap_err().contains("mobility type 6"));
    assert!(r.page_free(at(0, 0), (0, 40)).unwrap_err().contains("order 40"));
    assert!(r.is_empty());
}
