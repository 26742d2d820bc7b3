//! Areas against a map of what is where.

use kmem::{AllocError, Config, Gfp, platform::PageProt, vmalloc::VmFlags};
use kmem_hosted::Shape;
use kmem_test_support::{MIB, Rig};
use proptest::prelude::*;
use std::{collections::BTreeMap, ptr::NonNull};

use super::PAGE;

/// Frames' worth of addresses.
const RANGE: u64 = 700;

#[derive(Clone, Debug)]
enum Op {
    /// vmalloc of so many frames.
    Alloc(usize),
    /// vmap of one page so many times.
    Map(usize),
    /// A device's so many frames, at this frame of the hole.
    Io(u64, usize),
    /// 2 MiB in one block.
    Huge,
    /// Frees an area.
    Free(prop::sample::Index),
    /// Tries to free what is a number of bytes behind the beginning of an area.
    FreeWrong(prop::sample::Index, usize),
    /// Asks what is where.
    Look(prop::sample::Index, usize),
    Purge,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (1usize..20).prop_map(Op::Alloc),
        2 => (20usize..300).prop_map(Op::Alloc),
        2 => (1usize..70).prop_map(Op::Map),
        1 => (0u64..200, 1usize..50).prop_map(|(at, n)| Op::Io(at, n)),
        1 => Just(Op::Huge),
        8 => any::<prop::sample::Index>().prop_map(Op::Free),
        1 => (any::<prop::sample::Index>(), 1usize..PAGE * 3).prop_map(|(i, n)| Op::FreeWrong(i, n)),
        2 => (any::<prop::sample::Index>(), 0..PAGE * 300).prop_map(|(i, n)| Op::Look(i, n)),
        1 => Just(Op::Purge),
    ]
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Alloc,
    Map,
    Io(u64),
}

/// What is where: by address, frames without the guard.
type Model = BTreeMap<usize, (usize, Kind, NonNull<u8>)>;

/// Whether an area of so many frames has room between those in use.
fn has_room(model: &Model, start: usize, frames: usize, align: usize) -> bool {
    let end = start + RANGE as usize * PAGE;
    let begins =
        std::iter::once(start).chain(model.iter().map(|(at, (n, ..))| at + (n + 1) * PAGE));
    let ends = model.keys().copied().chain([end]);
    // Alignment is paid for in full, wherever the gap begins.
    begins.zip(ends).any(|(from, to)| from + (frames + 1) * PAGE + align - PAGE <= to)
}

fn free(m: &Rig, at: NonNull<u8>, kind: Kind) {
    // SAFETY: not used after.
    let freed = unsafe {
        match kind {
            Kind::Alloc => m.vfree(at.as_ptr()),
            Kind::Map => m.vunmap(at.as_ptr()),
            Kind::Io(_) => m.iounmap(at.as_ptr()),
        }
    };
    freed.unwrap();
}

fn play(ops: Vec<Op>) {
    let shape = Shape::x86_64(32 * MIB).hole(8 * MIB, 2 * MIB).vmalloc(RANGE * PAGE as u64);
    let m = Rig::new(shape.without_page_tables(), Config::default());
    m.run(|_| {
        let start = kmem::Platform::vmalloc_range(m.platform()).unwrap().start;
        let page = m.alloc_page(Gfp::KERNEL).unwrap();
        let mut model = Model::new();
        for op in ops {
            let nth = |i: prop::sample::Index| {
                (!model.is_empty()).then(|| *model.keys().nth(i.index(model.len())).unwrap())
            };
            let (got, frames, align, kind) = match op {
                Op::Alloc(n) => {
                    (m.__vmalloc(n * PAGE, Gfp::KERNEL | Gfp::NOWARN), n, PAGE, Kind::Alloc)
                }
                Op::Huge => {
                    let huge = m.vmalloc_huge(2 << 20, Gfp::KERNEL | Gfp::NOWARN);
                    (huge, 512, 2 << 20, Kind::Alloc)
                }
                Op::Map(n) => {
                    let pages = vec![page; n];
                    let map = m.vmap(&pages, VmFlags::empty(), PageProt::KERNEL);
                    (map, n, PAGE, Kind::Map)
                }
                Op::Io(at, n) => {
                    let phys = 8 * MIB + at * PAGE as u64;
                    (m.ioremap(phys, n * PAGE), n, PAGE, Kind::Io(phys))
                }
                Op::Free(i) => {
                    if let Some((_, kind, at)) = nth(i).and_then(|at| model.remove(&at)) {
                        free(&m, at, kind);
                    }
                    continue;
                }
                Op::FreeWrong(i, bytes) => {
                    if let Some(at) = nth(i) {
                        // SAFETY: nothing begins there.
                        let wrong = |at| unsafe { m.vfree(std::ptr::without_provenance(at)) };
                        let there = model.contains_key(&(at + bytes));
                        assert!(there || wrong(at + bytes).is_err());
                    }
                    continue;
                }
                Op::Look(i, bytes) => {
                    let addr = nth(i).unwrap_or(start) + bytes;
                    let there = model.range(..=addr).next_back();
                    let there = there.filter(|(at, (n, ..))| addr < *at + n * PAGE);
                    let pfn = m.vmalloc_to_pfn(std::ptr::without_provenance(addr));
                    assert_eq!(pfn.is_some(), there.is_some(), "{addr:#x}");
                    match there {
                        Some((_, (_, Kind::Map, _))) => assert_eq!(pfn, m.page_to_pfn(page)),
                        Some((at, (_, Kind::Io(phys), _))) => {
                            let frame = (phys / PAGE as u64) as usize + (addr - at) / PAGE;
                            assert_eq!(pfn.unwrap().0 as usize, frame);
                        }
                        _ => {}
                    }
                    continue;
                }
                Op::Purge => {
                    m.vm_unmap_aliases();
                    let audit = m.audit_vmalloc().unwrap();
                    let used: usize = model.values().map(|(n, ..)| (n + 1) * PAGE).sum();
                    assert_eq!((audit.lazy, audit.pooled), (0, 0));
                    assert_eq!(audit.free, RANGE as usize * PAGE - used);
                    continue;
                }
            };
            match got {
                Ok(at) => {
                    let addr = at.as_ptr().addr();
                    let end = addr + (frames + 1) * PAGE;
                    assert!(addr >= start && end <= start + RANGE as usize * PAGE);
                    assert!(addr.is_multiple_of(PAGE));
                    let below = model.range(..end).next_back();
                    assert!(
                        below.is_none_or(|(at, (n, ..))| at + (n + 1) * PAGE <= addr),
                        "overlap"
                    );
                    model.insert(addr, (frames, kind, at));
                }
                Err(e) => {
                    assert_eq!(e, AllocError::NoMemory);
                    let frames_left = m.nr_free_pages() > 2 * frames as u64 + 2000;
                    let room = has_room(&model, start, frames, align);
                    assert!(
                        !room || !frames_left,
                        "{frames} frames have room: {model:x?}",
                        model = model.keys()
                    );
                }
            }
            assert_eq!(m.audit_vmalloc().unwrap().live, model.len() as u64);
        }
        for (_, kind, at) in model.into_values() {
            free(&m, at, kind);
        }
        m.put_page(page).unwrap();
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn areas_lie_where_a_map_says(ops in prop::collection::vec(op(), 1..120)) {
        play(ops);
    }
}

/// Many areas at once, in an order that makes the tree work.
#[test]
fn a_thousand_areas_come_and_go() {
    let m = Rig::new(Shape::no_dma(64 * MIB).without_page_tables(), Config::default());
    m.run(|_| {
        let mut areas: Vec<_> = (0..3000).map(|i| m.vmalloc((1 + i % 3) * PAGE).unwrap()).collect();
        for step in [7, 5, 3, 2, 1] {
            let (gone, kept): (Vec<_>, Vec<_>) = areas
                .into_iter()
                .enumerate()
                .partition(|(i, _)| (i * 2_654_435_761) >> 7 & 1 == 0 || step == 1);
            gone.into_iter().for_each(|(_, area)| super::vfree(&m, area));
            m.vm_unmap_aliases();
            areas = kept.into_iter().map(|(_, area)| area).collect();
            areas.extend((0..step * 50 - 50).map(|i| m.vmalloc((1 + i % 30) * PAGE).unwrap()));
            assert_eq!(m.audit_vmalloc().unwrap().live, areas.len() as u64);
        }
        assert!(areas.is_empty());
    });
}
