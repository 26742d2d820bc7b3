//! The boot allocator: every error and atomicity here, agreement with a model in `model`.

mod model;

use kmem::memblock::{
    DEFAULT_LOW_MARK, Direction, FrameRange, MAX_REGIONS, Memblock, MemblockError, Region, Request,
    Reserved,
};
use std::ops::Range;

const MIB: u64 = 1 << 20;

/// Everything that can be read from outside.
fn state(m: &Memblock) -> (Vec<Region>, Vec<Reserved>, Vec<FrameRange>) {
    (m.memory().collect(), m.reserved().collect(), m.free_ranges(0).collect())
}

/// Checks that `call` fails with `error` and changes nothing.
fn refused<R: std::fmt::Debug + PartialEq>(
    m: &mut Memblock,
    error: MemblockError,
    call: impl FnOnce(&mut Memblock) -> Result<R, MemblockError>,
) {
    let before = state(m);
    assert_eq!(call(m), Err(error));
    assert_eq!(state(m), before);
}

/// Two nodes of 16 MiB with a hole of 1 MiB between them.
fn two_nodes() -> Memblock {
    let mut m = Memblock::new();
    m.add(0, 16 * MIB, 0).unwrap();
    m.add(17 * MIB, 16 * MIB, 1).unwrap();
    m
}

/// A memblock whose reserved table is full: single bytes at even addresses from 0.
fn full_reserved() -> Memblock {
    let mut m = Memblock::new();
    m.add(0, 64 * MIB, 0).unwrap();
    for i in 0..MAX_REGIONS as u64 {
        m.reserve(2 * i, 1).unwrap();
    }
    m
}

#[test]
fn lives_in_a_static() {
    static BOOT: std::sync::Mutex<Memblock> = std::sync::Mutex::new(Memblock::new());
    let mut m = BOOT.lock().unwrap();
    assert_eq!(m.total(), 0);
    m.add(4096, 4096, 0).unwrap();
    assert_eq!(m.total(), 4096);
}

#[test]
fn add_merges_on_one_node_only() {
    let mut m = Memblock::new();
    assert_eq!(m.add(0x3000, 0x1000, 0), Ok(0x1000));
    assert_eq!(m.add(0x1000, 0x1000, 0), Ok(0x1000));
    assert_eq!(m.add(0x4000, 0x1000, 1), Ok(0x1000));
    assert_eq!(m.memory().len(), 3);
    // Fills the hole and overlaps both sides.
    assert_eq!(m.add(0x1800, 0x2000, 0), Ok(0x1000));
    let expected = [
        Region { base: 0x1000, size: 0x3000, node: 0 },
        Region { base: 0x4000, size: 0x1000, node: 1 },
    ];
    assert!(m.memory().eq(expected));
    assert_eq!(m.memory().next().unwrap().end(), 0x4000);
    assert_eq!(m.add(0x1000, 0x3000, 0), Ok(0));
    assert_eq!(m.total(), 0x4000);
}

#[test]
fn add_refuses_bad_ranges() {
    let mut m = two_nodes();
    refused(&mut m, MemblockError::Empty { base: 5 }, |m| m.add(5, 0, 0));
    let wraps = MemblockError::Wraps { base: u64::MAX, size: 1 };
    refused(&mut m, wraps, |m| m.add(u64::MAX, 1, 0));
    refused(&mut m, MemblockError::BadNode { node: 64 }, |m| m.add(64 * MIB, MIB, 64));
    // From the hole into the other node's memory.
    let overlap = MemblockError::Overlap { at: 17 * MIB, node: 0, existing: 1 };
    refused(&mut m, overlap, |m| m.add(16 * MIB, 2 * MIB, 0));
    assert_eq!(m.add(u64::MAX - 1, 1, 63), Ok(1));
}

#[test]
fn a_full_memory_table_is_reported() {
    let mut m = Memblock::new();
    for i in 0..MAX_REGIONS as u64 {
        m.add(4 * i, 2, 0).unwrap();
    }
    let full = MemblockError::TableFull { base: 5000, size: 1 };
    refused(&mut m, full, |m| m.add(5000, 1, 0));
    // What merges needs no slot; what closes a hole frees one.
    assert_eq!(m.add(2, 1, 0), Ok(1));
    assert_eq!(m.add(3, 1, 0), Ok(1));
    assert_eq!(m.memory().len(), MAX_REGIONS - 1);
    assert_eq!(m.add(5000, 3, 0), Ok(3));
    // Splitting a region needs one as well.
    let full = MemblockError::TableFull { base: 5001, size: 1 };
    refused(&mut m, full, |m| m.remove(5001, 1));
    assert_eq!(m.remove(5002, 1), Ok(1));
}

#[test]
fn remove_counts_what_was_there() {
    let mut m = two_nodes();
    assert_eq!(m.remove(15 * MIB, 3 * MIB), Ok(2 * MIB));
    assert_eq!(m.remove(15 * MIB, 3 * MIB), Ok(0));
    assert_eq!(m.total(), 30 * MIB);
    // A reservation outlives the memory under it, and holds when the memory is back.
    m.reserve(MIB, MIB).unwrap();
    assert_eq!(m.remove(0, 4 * MIB), Ok(4 * MIB));
    assert_eq!(m.reserved_total(), MIB);
    m.add(0, 4 * MIB, 0).unwrap();
    let inside = Request::new(1).range(MIB..2 * MIB);
    assert!(matches!(m.alloc(inside), Err(MemblockError::NoMemory { .. })));
    refused(&mut m, MemblockError::Empty { base: 1 }, |m| m.remove(1, 0));
    let wraps = MemblockError::Wraps { base: 2, size: u64::MAX };
    refused(&mut m, wraps, |m| m.remove(2, u64::MAX));
}

#[test]
fn reserve_and_free() {
    let mut m = two_nodes();
    assert_eq!(m.reserve(0x1000, 0x1000), Ok(0x1000));
    assert_eq!(m.reserve(0x1800, 0x1000), Ok(0x800));
    assert_eq!(m.reserved_total(), 0x1800);
    refused(&mut m, MemblockError::NotReserved { at: 0x2800 }, |m| m.free(0x1000, 0x1801));
    refused(&mut m, MemblockError::NotReserved { at: 0xfff }, |m| m.free(0xfff, 2));
    refused(&mut m, MemblockError::Empty { base: 0x1000 }, |m| m.free(0x1000, 0));
    refused(&mut m, MemblockError::Empty { base: 0x1000 }, |m| m.reserve(0x1000, 0));
    let wraps = MemblockError::Wraps { base: u64::MAX - 1, size: 2 };
    refused(&mut m, wraps, |m| m.reserve(u64::MAX - 1, 2));
    refused(&mut m, wraps, |m| m.free(u64::MAX - 1, 2));
    assert_eq!(m.free(0x1400, 0x800), Ok(()));
    let left = [(0x1000, 0x400), (0x1c00, 0xc00)].map(|(base, size)| Reserved {
        base,
        size,
        permanent: false,
    });
    assert!(m.reserved().eq(left));
    assert_eq!(m.reserved().last().unwrap().end(), 0x2800);
}

#[test]
fn a_full_reserved_table_is_reported() {
    let mut m = full_reserved();
    let full = |base, size| MemblockError::TableFull { base, size };
    refused(&mut m, full(MIB, 1), |m| m.reserve(MIB, 1));
    refused(&mut m, full(64 * MIB - 64, 10), |m| m.alloc(Request::new(10)));
    // The hook must not run when there is no slot for what it takes.
    refused(&mut m, full(MIB, 1), |m| m.device_init(|_| panic!("the hook ran")));
    // Room for a longer range, then no slot for splitting it.
    m.free(0, 1).unwrap();
    m.reserve(MIB, 3).unwrap();
    refused(&mut m, full(MIB + 1, 1), |m| m.free(MIB + 1, 1));
    assert_eq!(m.free(MIB, 3), Ok(()));
}

#[test]
fn alloc_obeys_the_request() {
    let mut m = two_nodes();
    assert_eq!(m.alloc(Request::new(100)), Ok(33 * MIB - 128));
    let up = |size| Request::new(size).direction(Direction::BottomUp);
    assert_eq!(m.alloc(up(1)), Ok(64));
    assert_eq!(m.alloc(up(1).align(1)), Ok(1));
    assert_eq!(m.alloc(up(MIB).align(MIB)), Ok(MIB));
    assert_eq!(m.alloc(up(1).node(1)), Ok(17 * MIB));
    assert_eq!(m.alloc(Request::new(4096).node(0)), Ok(16 * MIB - 4096));
    let window = 5 * MIB + 1..6 * MIB;
    assert_eq!(m.alloc(up(10).range(window.clone())), Ok(5 * MIB + 64));
    assert_eq!(m.alloc(Request::new(64).range(window)), Ok(6 * MIB - 64));
    assert_eq!(m.alloc(Request::new(64).range(MIB / 2..MIB / 2 + 64)), Ok(MIB / 2));
}

#[test]
fn alloc_refuses_what_cannot_be() {
    let mut m = two_nodes();
    refused(&mut m, MemblockError::EmptyRequest, |m| m.alloc(Request::new(0)));
    for align in [0, 3, u64::MAX] {
        refused(&mut m, MemblockError::BadAlign { align }, |m| {
            m.alloc(Request::new(1).align(align))
        });
    }
    let requests = [
        Request::new(17 * MIB),
        Request::new(u64::MAX),
        Request::new(1).node(2),
        Request::new(1).align(1 << 63),
        Request::new(2).range(100..101).align(1),
        Request::new(1).range(16 * MIB..17 * MIB),
        Request::new(1).range(0..1).align(1),
        // An inverted range holds nothing.
        Request::new(1).range(Range { start: 200, end: 100 }),
    ];
    for r in requests {
        for direction in [Direction::TopDown, Direction::BottomUp] {
            let r = r.clone().direction(direction);
            let error = MemblockError::NoMemory {
                size: r.size,
                align: r.align,
                start: r.range.start,
                end: r.range.end,
                node: r.node,
            };
            refused(&mut m, error, |m| m.alloc(r));
        }
    }
}

#[test]
fn an_allocation_never_spans_nodes() {
    let mut m = Memblock::new();
    m.add(MIB, MIB, 0).unwrap();
    m.add(2 * MIB, MIB, 1).unwrap();
    assert!(matches!(m.alloc(Request::new(MIB + 1)), Err(MemblockError::NoMemory { .. })));
    assert_eq!(m.alloc(Request::new(MIB)), Ok(2 * MIB));
}

#[test]
fn free_ranges_are_whole_frames() {
    let mut m = Memblock::new();
    m.add(0x800, 0x5000, 0).unwrap(); // Whole frames 1..=4.
    m.add(0x5800, 0x2800, 1).unwrap(); // Frame 5 is on both nodes.
    m.reserve(0x3fff, 1).unwrap();
    let frames = |start, end, node| FrameRange { start, end, node };
    assert!(m.free_ranges(12).eq([frames(1, 3, 0), frames(4, 5, 0), frames(6, 8, 1)]));
    assert!(m.free_ranges(13).eq([frames(3, 4, 1)]));
    assert_eq!(m.free_ranges(63).next(), None);
    assert_eq!(m.free_ranges(64).next(), None);
    assert_eq!(m.free_ranges(u32::MAX).next(), None);
}

#[test]
fn frame_zero_and_the_top_of_the_address_space() {
    let mut m = Memblock::new();
    m.add(0, u64::MAX, 0).unwrap();
    let last = (1 << 52) - 1; // Its last byte cannot be memory.
    assert!(m.free_ranges(12).eq([FrameRange { start: 0, end: last, node: 0 }]));
    assert!(m.free_ranges(63).eq([FrameRange { start: 0, end: 1, node: 0 }]));
    m.reserve(u64::MAX - 4097, 4097).unwrap();
    assert!(m.free_ranges(12).eq([FrameRange { start: 0, end: last - 1, node: 0 }]));
}

#[test]
fn devices_get_successive_memory() {
    let mut m = two_nodes();
    assert_eq!(m.device_init(|p| p + 100), Ok(MIB..MIB + 100));
    assert_eq!(m.device_init(|p| p), Ok(MIB + 112..MIB + 112));
    assert_eq!(m.device_init(|p| p + 16), Ok(MIB + 112..MIB + 128));
    assert_eq!(m.device_init(|p| p + 8), Ok(MIB + 128..MIB + 136));
    assert_eq!(m.reserved_total(), 124);
    assert!(m.reserved().all(|r| r.permanent));
    m.set_low_mark(8 * MIB + 1);
    assert_eq!(m.low_mark(), 8 * MIB + 1);
    m.reserve(8 * MIB, MIB).unwrap();
    assert_eq!(m.device_init(|_| 16 * MIB), Ok(9 * MIB..16 * MIB), "to the last byte");
    assert_eq!(m.device_init(|p| p), Ok(17 * MIB..17 * MIB));
    m.set_low_mark(0);
    assert_eq!(m.device_init(|p| p + 1), Ok(16..17), "address 0 is not used");
}

#[test]
fn device_hooks_are_checked() {
    let mut m = two_nodes();
    assert_eq!(m.low_mark(), DEFAULT_LOW_MARK);
    let lower = MemblockError::HookReturnedLower { given: MIB, returned: MIB - 1 };
    refused(&mut m, lower, |m| m.device_init(|p| p - 1));
    let beyond =
        MemblockError::HookReturnedBeyond { given: MIB, returned: 16 * MIB + 1, limit: 16 * MIB };
    refused(&mut m, beyond, |m| m.device_init(|_| 16 * MIB + 1));
    m.reserve(2 * MIB, 1).unwrap();
    let beyond =
        MemblockError::HookReturnedBeyond { given: MIB, returned: u64::MAX, limit: 2 * MIB };
    refused(&mut m, beyond, |m| m.device_init(|_| u64::MAX));
    m.set_low_mark(33 * MIB);
    let none =
        MemblockError::NoMemory { size: 1, align: 16, start: 33 * MIB, end: u64::MAX, node: None };
    refused(&mut m, none, |m| m.device_init(|_| panic!("the hook ran")));
}

#[test]
fn device_memory_is_for_ever() {
    let mut m = two_nodes();
    m.device_init(|p| p + 4096).unwrap();
    m.reserve(MIB - 4096, 4096).unwrap();
    m.reserve(MIB + 4096, 4096).unwrap();
    // Neighbours are kept apart from it, so they alone can be freed.
    assert_eq!(m.reserved().len(), 3);
    let permanent = |at| MemblockError::Permanent { at };
    refused(&mut m, permanent(MIB), |m| m.free(MIB - 4096, 3 * 4096));
    refused(&mut m, permanent(MIB + 4095), |m| m.free(MIB + 4095, 1));
    refused(&mut m, permanent(MIB + 1), |m| m.reserve(MIB + 1, 1));
    refused(&mut m, permanent(MIB), |m| m.remove(0, 16 * MIB));
    assert_eq!(m.free(MIB - 4096, 4096), Ok(()));
    assert_eq!(m.free(MIB + 4096, 4096), Ok(()));
    assert_eq!(m.remove(0, MIB), Ok(MIB));
    assert_eq!(m.reserved_total(), 4096);
}

#[test]
fn nothing_changes_after_hand_over() {
    let mut m = two_nodes();
    m.reserve(0, 4096).unwrap();
    assert!(!m.handed_over());
    m.hand_over().unwrap();
    assert!(m.handed_over());
    let over = MemblockError::HandedOver;
    refused(&mut m, over, |m| m.add(64 * MIB, MIB, 0));
    refused(&mut m, over, |m| m.remove(0, MIB));
    refused(&mut m, over, |m| m.reserve(MIB, MIB));
    refused(&mut m, over, |m| m.free(0, 4096));
    refused(&mut m, over, |m| m.alloc(Request::new(1)));
    refused(&mut m, over, |m| m.device_init(|_| panic!("the hook ran")));
    refused(&mut m, over, Memblock::hand_over);
    assert_eq!(m.total(), 32 * MIB);
    assert_eq!(m.reserved_total(), 4096);
    assert_eq!(m.free_ranges(12).next().unwrap().start, 1);
}

/// A bring-up in miniature: every operation that counts for fault injection, six of them.
fn bring_up(m: &mut Memblock) -> Result<(), MemblockError> {
    m.add(0, 16 * MIB, 0)?;
    m.reserve(0, 4096)?;
    m.alloc(Request::new(4096))?;
    m.device_init(|p| p + 64)?;
    m.free(16, 16)?; // Splits.
    m.remove(8 * MIB, MIB)?; // Splits.
    m.free(0, 16)?; // Shrinks: not counted.
    Ok(())
}

#[test]
fn injected_failures_strike_once() {
    for n in 0..6 {
        let mut m = Memblock::new();
        m.fail_after(Some(n));
        assert_eq!(m.fault_pending(), Some(n));
        assert_eq!(bring_up(&mut m), Err(MemblockError::Injected), "{n}");
        assert_eq!(m.fault_pending(), None);
        let before = state(&m);
        assert!(m.alloc(Request::new(1)).is_ok() == (n > 0));
        assert_eq!(state(&m) == before, n == 0);
    }
    let mut m = Memblock::new();
    m.fail_after(Some(6));
    assert_eq!(bring_up(&mut m), Ok(()));
    assert_eq!(m.fault_pending(), Some(0));
    refused(&mut m, MemblockError::Injected, |m| m.reserve(MIB / 2, 1));
    m.fail_after(Some(0));
    refused(&mut m, MemblockError::Injected, |m| m.device_init(|_| panic!("the hook ran")));
    m.fail_after(Some(0));
    m.fail_after(None);
    assert_eq!(m.reserve(MIB / 2, 1), Ok(1));
}

#[test]
fn errors_name_the_addresses() {
    let mut m = two_nodes();
    let text = |e: MemblockError| {
        let e: Box<dyn std::error::Error> = Box::new(e);
        e.to_string()
    };
    let e = m.add(16 * MIB, 2 * MIB, 0).unwrap_err();
    assert_eq!(text(e), "address 0x1100000 cannot be on node 0, it is on node 1");
    let e = m.alloc(Request::new(4096).node(3).range(0..8192)).unwrap_err();
    assert_eq!(text(e), "no 0x1000 free bytes aligned to 0x40 in 0x0..0x2000 on node 3");
    let e = m.device_init(|_| u64::MAX).unwrap_err();
    assert_eq!(
        text(e),
        "start-up hook was given 0x100000 and returned 0xffffffffffffffff, free memory ends at 0x1000000"
    );
    let e = full_reserved().reserve(0x5000, 0x10).unwrap_err();
    assert_eq!(text(e), "no slot left for 0x10 bytes at 0x5000, the table holds 128 regions");
}
