//! Random operations on the boot allocator, compared with the obvious implementation: a map of bytes.

use crate::{MIB, state};
use kmem::memblock::{
    DEFAULT_LOW_MARK, Direction, FrameRange, MAX_REGIONS, Memblock, MemblockError, Region, Request,
    Reserved,
};
use proptest::prelude::*;
use std::ops::Range;

/// Bytes of the model's address space: enough to overflow a table with single bytes.
const SPACE: usize = 384;

/// What a byte is reserved as.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Use {
    Free,
    Reserved,
    Permanent,
}

/// The obvious implementation: a map of bytes from `origin`.
#[derive(Clone)]
struct Model {
    origin: u64,
    node: Vec<Option<u32>>,
    used: Vec<Use>,
    low_mark: u64,
}

/// Runs of equal values: first index, length, value.
fn runs<T: PartialEq + Copy>(values: &[T]) -> Vec<(usize, usize, T)> {
    let mut at = 0;
    values
        .chunk_by(|a, b| a == b)
        .map(|run| {
            at += run.len();
            (at - run.len(), run.len(), run[0])
        })
        .collect()
}

impl Model {
    fn new(origin: u64) -> Model {
        Model {
            origin,
            node: vec![None; SPACE],
            used: vec![Use::Free; SPACE],
            low_mark: DEFAULT_LOW_MARK,
        }
    }

    fn addr(&self, i: usize) -> u64 {
        self.origin + i as u64
    }

    fn memory(&self) -> Vec<Region> {
        runs(&self.node)
            .into_iter()
            .filter_map(|(i, n, node)| {
                Some(Region { base: self.addr(i), size: n as u64, node: node? })
            })
            .collect()
    }

    fn reserved(&self) -> Vec<Reserved> {
        runs(&self.used)
            .into_iter()
            .filter(|run| run.2 != Use::Free)
            .map(|(i, n, used)| Reserved {
                base: self.addr(i),
                size: n as u64,
                permanent: used == Use::Permanent,
            })
            .collect()
    }

    /// The node of each byte that is free.
    fn free_bytes(&self) -> Vec<Option<u32>> {
        let bytes = self.node.iter().zip(&self.used);
        bytes.map(|(node, used)| node.filter(|_| *used == Use::Free)).collect()
    }

    fn free_ranges(&self, shift: u32) -> Vec<FrameRange> {
        let free = self.free_bytes();
        let first = self.origin >> shift;
        let last = self.addr(SPACE - 1) >> shift;
        let frames: Vec<Option<u32>> = (first..=last)
            .map(|frame| {
                let mut bytes = (0..1u64 << shift).map(|b| {
                    let i = ((frame << shift) + b).checked_sub(self.origin)?;
                    free.get(usize::try_from(i).ok()?).copied().flatten()
                });
                let node = bytes.next()?;
                node.filter(|_| bytes.all(|b| b == node))
            })
            .collect();
        runs(&frames)
            .into_iter()
            .filter_map(|(i, n, node)| {
                let start = first + i as u64;
                Some(FrameRange { start, end: start + n as u64, node: node? })
            })
            .collect()
    }

    /// The first permanent byte of a range.
    fn permanent(&self, r: &Range<usize>) -> Result<(), MemblockError> {
        match r.clone().find(|i| self.used[*i] == Use::Permanent) {
            Some(i) => Err(MemblockError::Permanent { at: self.addr(i) }),
            None => Ok(()),
        }
    }

    /// Keeps `after` if its tables have room.
    fn settle(&mut self, after: Model, r: &Range<usize>) -> Result<(), MemblockError> {
        if after.memory().len() > MAX_REGIONS || after.reserved().len() > MAX_REGIONS {
            return Err(MemblockError::TableFull {
                base: self.addr(r.start),
                size: r.len() as u64,
            });
        }
        *self = after;
        Ok(())
    }

    fn add(&mut self, r: Range<usize>, node: u32) -> Result<u64, MemblockError> {
        for i in r.clone() {
            if let Some(existing) = self.node[i].filter(|n| *n != node) {
                return Err(MemblockError::Overlap { at: self.addr(i), node, existing });
            }
        }
        let fresh = self.node[r.clone()].iter().filter(|n| n.is_none()).count();
        let mut after = self.clone();
        after.node[r.clone()].fill(Some(node));
        self.settle(after, &r).map(|()| fresh as u64)
    }

    fn remove(&mut self, r: Range<usize>) -> Result<u64, MemblockError> {
        self.permanent(&r)?;
        let gone = self.node[r.clone()].iter().flatten().count();
        let mut after = self.clone();
        after.node[r.clone()].fill(None);
        self.settle(after, &r).map(|()| gone as u64)
    }

    fn reserve(&mut self, r: Range<usize>) -> Result<u64, MemblockError> {
        self.permanent(&r)?;
        let fresh = self.used[r.clone()].iter().filter(|u| **u == Use::Free).count();
        let mut after = self.clone();
        after.used[r.clone()].fill(Use::Reserved);
        self.settle(after, &r).map(|()| fresh as u64)
    }

    fn free(&mut self, r: Range<usize>) -> Result<(), MemblockError> {
        self.permanent(&r)?;
        if let Some(i) = r.clone().find(|i| self.used[*i] == Use::Free) {
            return Err(MemblockError::NotReserved { at: self.addr(i) });
        }
        let mut after = self.clone();
        after.used[r.clone()].fill(Use::Free);
        self.settle(after, &r)
    }

    /// Tries every address.
    fn alloc(&mut self, request: &Request) -> Result<u64, MemblockError> {
        let free = self.free_bytes();
        let size = request.size as usize;
        let fits = |i: &usize| {
            let Some(bytes) = free.get(*i..*i + size) else {
                return false;
            };
            let base = self.addr(*i);
            base != 0
                && base.is_multiple_of(request.align)
                && request.range.start <= base
                && base + request.size <= request.range.end
                && bytes[0].is_some_and(|n| request.node.is_none_or(|wanted| wanted == n))
                && bytes.iter().all(|b| *b == bytes[0])
        };
        let place = match request.direction {
            Direction::BottomUp => (0..SPACE).find(fits),
            Direction::TopDown => (0..SPACE).rev().find(fits),
        };
        let Some(i) = place else {
            return Err(MemblockError::NoMemory {
                size: request.size,
                align: request.align,
                start: request.range.start,
                end: request.range.end,
                node: request.node,
            });
        };
        self.reserve(i..i + size)?;
        Ok(self.addr(i))
    }

    fn device_init(&mut self, take: i64) -> Result<Range<u64>, MemblockError> {
        let free = self.free_bytes();
        let start = (0..SPACE).find(|i| {
            let a = self.addr(*i);
            a != 0 && a >= self.low_mark && a.is_multiple_of(16) && free[*i].is_some()
        });
        let Some(start) = start else {
            return Err(MemblockError::NoMemory {
                size: 1,
                align: 16,
                start: self.low_mark,
                end: u64::MAX,
                node: None,
            });
        };
        let mut one = self.clone();
        one.used[start] = Use::Permanent;
        self.clone().settle(one, &(start..start + 1))?;
        let given = self.addr(start);
        let returned = given.saturating_add_signed(take);
        if returned < given {
            return Err(MemblockError::HookReturnedLower { given, returned });
        }
        let stretch = free[start..].iter().take_while(|b| **b == free[start]).count();
        let taken = (returned - given) as usize;
        if taken > stretch {
            let limit = self.addr(start + stretch);
            return Err(MemblockError::HookReturnedBeyond { given, returned, limit });
        }
        self.used[start..start + taken].fill(Use::Permanent);
        Ok(given..returned)
    }
}

#[derive(Clone, Debug)]
enum Op {
    Add(Range<usize>, u32),
    Remove(Range<usize>),
    Reserve(Range<usize>),
    Free(Range<usize>),
    Alloc {
        size: u64,
        align: u64,
        range: Option<Range<usize>>,
        node: Option<u32>,
        up: bool,
    },
    /// How far the hook moves the pointer.
    Device(i64),
    LowMark(usize),
    /// Every other byte of a range, one call each.
    AddComb(Range<usize>, u32),
    ReserveComb(Range<usize>),
}

fn range() -> impl Strategy<Value = Range<usize>> {
    (0..SPACE, prop_oneof![3 => 1..24usize, 2 => 24..128usize, 1 => 128..=SPACE])
        .prop_map(|(start, len)| start..(start + len).min(SPACE))
}

fn op() -> impl Strategy<Value = Op> {
    let alloc = (
        1..40u64,
        0..6u32,
        proptest::option::of(range()),
        proptest::option::of(0..3u32),
        any::<bool>(),
    );
    prop_oneof![
        6 => (range(), 0..3u32).prop_map(|(r, n)| Op::Add(r, n)),
        2 => range().prop_map(Op::Remove),
        4 => range().prop_map(Op::Reserve),
        6 => range().prop_map(Op::Free),
        10 => alloc.prop_map(|(size, shift, range, node, up)| Op::Alloc {
            size,
            align: 1 << shift,
            range,
            node,
            up,
        }),
        2 => (-2..40i64).prop_map(Op::Device),
        1 => (0..SPACE).prop_map(Op::LowMark),
        1 => (range(), 0..3u32).prop_map(|(r, n)| Op::AddComb(r, n)),
        1 => range().prop_map(Op::ReserveComb),
    ]
}

/// Runs one operation on both and compares what they say.
fn step(m: &mut Memblock, model: &mut Model, op: Op) {
    let args = |r: &Range<usize>| (model.origin + r.start as u64, r.len() as u64);
    match op {
        Op::Add(r, node) => {
            let (base, size) = args(&r);
            assert_eq!(m.add(base, size, node), model.add(r, node));
        }
        Op::Remove(r) => {
            let (base, size) = args(&r);
            assert_eq!(m.remove(base, size), model.remove(r));
        }
        Op::Reserve(r) => {
            let (base, size) = args(&r);
            assert_eq!(m.reserve(base, size), model.reserve(r));
        }
        Op::Free(r) => {
            let (base, size) = args(&r);
            assert_eq!(m.free(base, size), model.free(r));
        }
        Op::Alloc { size, align, range, node, up } => {
            let mut request = Request::new(size).align(align);
            request.node = node;
            if up {
                request = request.direction(Direction::BottomUp);
            }
            if let Some(r) = range {
                let (base, size) = args(&r);
                request = request.range(base..base + size);
            }
            assert_eq!(m.alloc(request.clone()), model.alloc(&request));
        }
        Op::Device(take) => {
            let got = m.device_init(|p| p.saturating_add_signed(take));
            assert_eq!(got, model.device_init(take));
        }
        Op::LowMark(i) => {
            model.low_mark = model.origin + i as u64;
            m.set_low_mark(model.low_mark);
        }
        Op::AddComb(r, node) => {
            for i in r.step_by(2) {
                step(m, model, Op::Add(i..i + 1, node));
            }
        }
        Op::ReserveComb(r) => {
            for i in r.step_by(2) {
                step(m, model, Op::Reserve(i..i + 1));
            }
        }
    }
}

/// Checks that both describe the same machine, and the table's own promises.
fn compare(m: &Memblock, model: &Model, shift: u32) {
    let memory: Vec<Region> = m.memory().collect();
    let reserved: Vec<Reserved> = m.reserved().collect();
    assert_eq!(memory, model.memory());
    assert_eq!(reserved, model.reserved());
    for pair in memory.windows(2) {
        let (a, b) = (pair[0], pair[1]);
        assert!(a.end() < b.base || a.end() == b.base && a.node != b.node);
    }
    for pair in reserved.windows(2) {
        let (a, b) = (pair[0], pair[1]);
        assert!(a.end() < b.base || a.end() == b.base && a.permanent != b.permanent);
    }
    assert_eq!(m.total(), memory.iter().map(|r| r.size).sum::<u64>());
    assert_eq!(m.reserved_total(), reserved.iter().map(|r| r.size).sum::<u64>());
    for shift in [0, shift] {
        assert_eq!(m.free_ranges(shift).collect::<Vec<_>>(), model.free_ranges(shift));
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 2000,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn agrees_with_a_map_of_bytes(
        origin in prop_oneof![Just(0), Just(MIB - 40), Just(u64::MAX - SPACE as u64)],
        ops in proptest::collection::vec(op(), 1..30),
        shift in 1..7u32,
    ) {
        let mut m = Memblock::new();
        let mut model = Model::new(origin);
        for op in ops {
            step(&mut m, &mut model, op);
            compare(&m, &model, shift);
        }
    }

    #[test]
    fn no_argument_panics(
        values in proptest::collection::vec(
            prop_oneof![any::<u64>(), 0..4u64, (0..4u64).prop_map(|n| u64::MAX - n)],
            8,
        ),
        ops in proptest::collection::vec((0..6u8, 0..7usize), 1..20),
        shift in any::<u32>(),
    ) {
        let mut m = Memblock::new();
        for (op, i) in ops {
            let (a, b) = (values[i], values[i + 1]);
            // Any outcome will do, as long as failure changes nothing.
            let before = state(&m);
            let failed = match op {
                0 => m.add(a, b, (a % 66) as u32).is_err(),
                1 => m.remove(a, b).is_err(),
                2 => m.reserve(a, b).is_err(),
                3 => m.free(a, b).is_err(),
                4 => m.alloc(Request::new(a).align(1 << (b % 64)).range(b..a)).is_err(),
                _ => {
                    m.set_low_mark(a);
                    m.device_init(|_| b).is_err()
                }
            };
            prop_assert!(!failed || state(&m) == before);
            prop_assert!(m.free_ranges(shift).all(|r| r.start < r.end));
        }
    }
}
