//! The page events: what each row asks of an allocator, and the rows that make no sense.

use kmem_trace::pages::Nonsense;
use kmem_trace::{Id, Kind, Meta, NO_STACK, PageOp, Recording, Row};

fn row(kind: Kind, pfn: u64, order: u8, id: impl Into<Option<Id>>) -> Row {
    Row {
        time_ns: 0,
        address: pfn,
        id: id.into(),
        bytes_requested: NO_STACK,
        bytes_allocated: 4096 << order,
        gfp: 0,
        site: 0,
        cache: None,
        cpu: 0,
        kind,
        order,
        migratetype: 1,
        backs_slab: false,
        backs_large_kmalloc: false,
    }
}

fn ops(rows: Vec<Row>) -> Vec<PageOp> {
    Recording { meta: Meta::new("x", "text"), rows }.page_events().map(|event| event.op).collect()
}

#[test]
fn allocations_and_frees_are_tied_by_id() {
    use Kind::{PageAlloc, PageBulkAlloc, PageFree};
    let rows = vec![
        row(PageFree, 8, 1, None),
        row(PageAlloc, 8, 0, 0),
        row(PageBulkAlloc, 9, 0, 1),
        row(PageFree, 8, 0, 0),
        row(PageAlloc, 8, 0, 2),
    ];
    let expected = [
        PageOp::FreePrior,
        PageOp::Alloc { id: 0 },
        PageOp::Alloc { id: 1 },
        PageOp::Free { id: 0 },
        PageOp::Alloc { id: 2 },
    ];
    assert_eq!(ops(rows), expected);
}

#[test]
fn events_that_make_no_sense_are_named_and_change_nothing() {
    use Kind::{PageAlloc, PageFree, Split};
    let rows = vec![
        row(PageAlloc, 8, 1, 0),
        row(PageFree, 9, 0, None),
        row(PageFree, 8, 0, 0),
        row(PageFree, 8, 1, 7),
        row(Split, 8, 2, 0),
        row(PageFree, 8, 1, 0),
        row(PageFree, 8, 1, 0),
        row(PageFree, 8, 1, None),
    ];
    let expected = [
        PageOp::Alloc { id: 0 },
        PageOp::Nonsense(Nonsense::OverlapsLive),
        PageOp::Nonsense(Nonsense::OtherBlock),
        PageOp::Nonsense(Nonsense::NotLive),
        PageOp::Nonsense(Nonsense::OtherBlock),
        PageOp::Free { id: 0 },
        PageOp::Nonsense(Nonsense::NotLive),
        PageOp::Nonsense(Nonsense::NotLive),
    ];
    assert_eq!(ops(rows), expected);
}

#[test]
fn a_block_whose_frames_are_allocated_again_has_vanished() {
    let rows = vec![
        row(Kind::PageAlloc, 8, 0, 0),
        row(Kind::PageAlloc, 9, 0, 1),
        row(Kind::PageAlloc, 8, 1, 2),
    ];
    let expected = [
        PageOp::Alloc { id: 0 },
        PageOp::Alloc { id: 1 },
        PageOp::Vanished { id: 0 },
        PageOp::Vanished { id: 1 },
        PageOp::Alloc { id: 2 },
    ];
    assert_eq!(ops(rows), expected);
}

#[test]
fn a_split_block_is_freed_by_halves() {
    let split = Row { bytes_requested: 1, ..row(Kind::Split, 8, 1, 0) };
    let rows = vec![
        row(Kind::PageAlloc, 8, 1, 0),
        split,
        row(Kind::PageFree, 9, 0, 2),
        row(Kind::PageFree, 8, 0, 1),
    ];
    let expected = [
        PageOp::Alloc { id: 0 },
        PageOp::Split { id: 0, first: 1, second: 2 },
        PageOp::Free { id: 2 },
        PageOp::Free { id: 1 },
    ];
    assert_eq!(ops(rows), expected);
}

/// Four frames are taken, the second put back; the task is moved to CPU 1 before it vacates. One page came from before
/// the recording, one is freed in its new frame before it leaves the old.
#[test]
fn compaction_moves_blocks_and_asks_for_nothing_else() {
    use Kind::{
        CompactionAlloc, CompactionBegin, CompactionEnd, CompactionFree, PageAlloc, PageFree,
    };
    let on = |cpu: u16, row: Row| Row { cpu, ..row };
    let rows = vec![
        row(PageAlloc, 1, 0, 0),
        row(PageAlloc, 2, 0, 1),
        row(CompactionBegin, 0, 0, None),
        row(CompactionAlloc, 100, 0, 2),
        row(CompactionAlloc, 101, 0, 3),
        row(CompactionAlloc, 102, 0, 4),
        row(CompactionAlloc, 103, 0, 5),
        row(PageFree, 103, 0, 5),
        on(1, row(PageFree, 1, 0, 0)),
        on(1, row(PageFree, 50, 0, None)),
        on(1, row(PageFree, 2, 0, 1)),
        on(1, row(CompactionFree, 101, 0, 3)),
        on(1, row(PageFree, 101, 0, None)),
        on(1, row(CompactionEnd, 0, 0, None)),
        row(PageFree, 100, 0, 2),
        row(PageFree, 102, 0, 4),
        row(PageFree, 101, 0, None),
    ];
    let expected = [
        PageOp::Alloc { id: 0 },
        PageOp::Alloc { id: 1 },
        PageOp::Compaction,
        PageOp::Compaction,
        PageOp::Compaction,
        PageOp::Compaction,
        PageOp::Compaction,
        PageOp::Migrate { from: Some(0), to: 2, to_pfn: 100 },
        PageOp::Migrate { from: None, to: 4, to_pfn: 102 },
        PageOp::Free { id: 1 },
        PageOp::Compaction,
        PageOp::Compaction,
        PageOp::Free { id: 2 },
        PageOp::Free { id: 4 },
        PageOp::Nonsense(Nonsense::NotLive),
    ];
    assert_eq!(ops(rows), expected);
}
