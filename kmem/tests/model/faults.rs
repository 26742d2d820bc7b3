//! Fault injection \[D1\]: the first, the second, the third… inner allocation of every public operation
//! fails, until there is none left to fail; after each, the free counts are what they were, every frame
//! is accounted for, and the operation works.

use crate::small::{Machine, Small};
use kmem::{
    AllocError, BringUpError, Config, Gfp, Page, Pfn, ZoneType,
    fault::FaultPlan,
    memblock::Memblock,
    zone::{Layout, ZoneLimit},
};

const MIB: u64 = 1 << 20;

fn boot() -> Memblock {
    let mut boot = Memblock::new();
    boot.add(0, 30 * MIB, 0).unwrap();
    boot.add(32 * MIB, 300 * MIB, 0).unwrap();
    boot.reserve(5 * MIB, 0x3000).unwrap();
    boot
}

fn config() -> Config {
    let limits =
        [(ZoneType::Dma, 16 * MIB), (ZoneType::Normal, 300 * MIB), (ZoneType::HighMem, u64::MAX)];
    let limits = limits.map(|(zone, end)| ZoneLimit { zone, end });
    Config { layout: Layout::new(&limits).unwrap(), ..Config::default() }
}

/// Where high memory begins, in frames.
const HIGH_FROM: u32 = ((300 * MIB) >> 12) as u32;

fn machine() -> Machine {
    Machine::new(Small::new([0, 0], HIGH_FROM), boot(), &config()).unwrap()
}

/// Free frames by zone, wherever they lie.
fn counts(m: &Machine) -> Vec<u64> {
    m.zones().iter().map(|z| z.free_frames() + m.pcp_frames(z).sum::<u64>()).collect()
}

/// Lets each inner allocation of `op` fail in turn. `op` gives back whatever it gets and says whether it
/// got it all. Returns how many there were.
fn each_fails(m: &Machine, name: &str, survives: bool, op: impl Fn(&Machine) -> bool) -> u64 {
    let before = counts(m);
    for n in 0.. {
        // From empty lists, so that refills are among what fails.
        m.drain_everything();
        let failed = m.faults_injected();
        m.set_fault_plan(FaultPlan::Nth(n));
        let done = op(m);
        m.set_fault_plan(FaultPlan::Off);
        let fired = m.faults_injected() - failed;
        assert_eq!(counts(m), before, "{name}: frames after fault {n}");
        let audit = m.audit().unwrap();
        assert_eq!(audit.allocated, 0, "{name}: {audit:?} after fault {n}");
        assert!(done || fired > 0, "{name} fails by itself");
        assert!(done || !survives, "{name} fails with fault {n}");
        assert!(op(m), "{name} does not work after fault {n}");
        assert_eq!(counts(m), before, "{name}: frames after fault {n} and another try");
        if fired == 0 {
            return n;
        }
        assert_eq!(fired, 1);
    }
    unreachable!("a fault plan beyond all inner allocations fires none")
}

#[test]
fn alloc_pages_at_every_order() {
    let m = machine();
    let gfps = [
        Gfp::KERNEL,
        Gfp::ATOMIC,
        Gfp::NOWAIT,
        Gfp::HIGHUSER_MOVABLE,
        Gfp::KERNEL | Gfp::RECLAIMABLE,
        Gfp::KERNEL | Gfp::COMP | Gfp::ZERO,
        Gfp::KERNEL | Gfp::COLD,
        Gfp::KERNEL | Gfp::NORETRY,
        Gfp::KERNEL | Gfp::RETRY_MAYFAIL,
        Gfp::KERNEL | Gfp::THISNODE,
        Gfp::NOWAIT | Gfp::MEMALLOC,
        Gfp::KERNEL | Gfp::DMA,
    ];
    for order in [0, 1, 2, 3, 4, 8, 9, 10] {
        for gfp in gfps {
            let failed = each_fails(&m, &format!("alloc_pages({gfp}, {order})"), false, |m| {
                let got = m.alloc_pages(gfp, order);
                got.is_ok_and(|page| m.__free_pages(page, order).is_ok())
            });
            assert!(failed >= 2, "{gfp} order {order}: {failed} inner allocations");
        }
    }
}

#[test]
fn a_failure_is_an_error_and_a_report() {
    let m = machine();
    m.set_fault_plan(FaultPlan::From(0));
    assert_eq!(m.alloc_page(Gfp::KERNEL).map(|_| ()), Err(AllocError::NoMemory));
    let reports = m.small().take_reports();
    assert!(
        reports.iter().any(|r| r.starts_with("page allocation failure: order:0")),
        "{reports:?}"
    );
    m.set_fault_plan(FaultPlan::Off);
    let page = m.alloc_page(Gfp::KERNEL).unwrap();
    m.__free_page(page).unwrap();
}

#[test]
fn what_cannot_fail_survives_every_fault() {
    let m = machine();
    for order in [0, 1] {
        let gfp = Gfp::KERNEL | Gfp::NOFAIL;
        let failed = each_fails(&m, &format!("{gfp} order {order}"), true, |m| {
            let got = m.alloc_pages(gfp, order);
            got.is_ok_and(|page| m.__free_pages(page, order).is_ok())
        });
        assert!(failed >= 2);
    }
    m.set_fault_plan(FaultPlan::OneIn { n: 2, seed: 99 });
    for _ in 0..500 {
        let page = m.alloc_page(Gfp::KERNEL | Gfp::NOFAIL).expect("it cannot fail");
        m.__free_page(page).unwrap();
    }
    assert!(m.faults_injected() > 100);
    m.set_fault_plan(FaultPlan::Off);
    assert_eq!(m.audit().unwrap().allocated, 0);
}

#[test]
fn many_pages_at_once() {
    let m = machine();
    for gfp in
        [Gfp::KERNEL, Gfp::ATOMIC, Gfp::KERNEL | Gfp::ZERO, Gfp::HIGHUSER_MOVABLE | Gfp::COLD]
    {
        for places in [1usize, 5, 40] {
            let failed = each_fails(&m, &format!("bulk {gfp} of {places}"), false, |m| {
                let mut pages: Vec<Option<&Page>> = vec![None; places];
                let n = m.alloc_pages_bulk(gfp, &mut pages).unwrap();
                assert_eq!(pages.iter().flatten().count(), n);
                assert_eq!(m.free_pages_bulk(&mut pages), Ok(()));
                n == places
            });
            assert!(failed >= 1, "{gfp}: {failed}");
        }
    }
}

#[test]
fn calls_that_deal_in_addresses() {
    let m = machine();
    type Get = fn(&Machine) -> Result<std::ptr::NonNull<u8>, AllocError>;
    let gets: [(&str, Get, u32); 6] = [
        ("__get_free_pages", |m| m.__get_free_pages(Gfp::KERNEL, 2), 2),
        ("__get_free_page", |m| m.__get_free_page(Gfp::ATOMIC), 0),
        ("get_zeroed_page", |m| m.get_zeroed_page(Gfp::KERNEL), 0),
        ("get_free_page", |m| m.get_free_page(Gfp::KERNEL), 0),
        ("__get_dma_pages", |m| m.__get_dma_pages(Gfp::KERNEL, 5), 5),
        ("__get_free_pages, order 10", |m| m.__get_free_pages(Gfp::NOFS, 10), 10),
    ];
    for (name, get, order) in gets {
        let failed = each_fails(&m, name, false, |m| {
            get(m).is_ok_and(|address| m.free_pages(address.as_ptr(), order).is_ok())
        });
        assert!(failed >= 2, "{name}: {failed}");
    }
    for size in [1usize, 5000, 9 << 12, 100 << 12, 1 << 22] {
        let failed = each_fails(&m, &format!("alloc_pages_exact({size})"), false, |m| {
            let got = m.alloc_pages_exact(size, Gfp::KERNEL);
            got.is_ok_and(|address| m.free_pages_exact(address.as_ptr(), size).is_ok())
        });
        assert!(failed >= 2);
    }
}

#[test]
fn blocks_by_node_and_by_place() {
    let m = machine();
    let failed = each_fails(&m, "alloc_pages_node", false, |m| {
        let got = m.alloc_pages_node(0, Gfp::KERNEL, 3);
        got.is_ok_and(|page| m.__free_pages(page, 3).is_ok())
    });
    assert!(failed >= 2);
    for order in [0, 4, 9, 10] {
        let failed = each_fails(&m, "alloc_pages_at", false, |m| {
            m.drain_everything();
            let got = m.alloc_pages_at(Pfn(40 << 10), order, Gfp::KERNEL);
            got.is_ok_and(|page| m.__free_pages(page, order).is_ok())
        });
        assert_eq!(failed, 1);
    }
}

/// Splitting, references, draining and changes of mobility allocate nothing, so they cannot fail for
/// want of memory; what allocates around them can.
#[test]
fn splits_and_references() {
    let m = machine();
    let failed = each_fails(&m, "split and put", false, |m| {
        let Ok(page) = m.alloc_pages(Gfp::KERNEL, 4) else { return false };
        let pfn = m.page_to_pfn(page).unwrap().0;
        m.split_page_to(page, 4, 1).unwrap();
        let other = m.alloc_page(Gfp::KERNEL);
        for n in 0..8 {
            let part = m.pfn_to_page(Pfn(pfn + 2 * n)).unwrap();
            m.get_page(part).unwrap();
            m.__free_pages(part, 1).unwrap();
            m.put_page(part).unwrap();
        }
        m.drain_all_pages();
        other.is_ok_and(|page| m.__free_page(page).is_ok())
    });
    assert!(failed >= 4);
}

#[test]
fn a_soak_of_random_faults_loses_nothing() {
    let m = machine();
    let before = counts(&m);
    for n in [2, 3, 7, 20] {
        m.set_fault_plan(FaultPlan::OneIn { n, seed: n });
        let mut live = Vec::new();
        for i in 0..3000u32 {
            let order = i.wrapping_mul(2_654_435_761) >> 29;
            m.small().run_on((i % 2) as usize);
            if let Ok(page) = m.alloc_pages(Gfp::KERNEL | Gfp::NOWARN, order) {
                live.push((page, order));
            }
            if i % 3 == 0 && !live.is_empty() {
                let (page, order) = live.swap_remove(i as usize % live.len());
                m.__free_pages(page, order).unwrap();
            }
        }
        m.set_fault_plan(FaultPlan::Off);
        for (page, order) in live {
            m.__free_pages(page, order).unwrap();
        }
        m.audit().unwrap();
        assert_eq!(counts(&m), before);
    }
    assert!(m.faults_injected() > 1000);
}

/// Bring-up with the boot allocator failing at the n-th request: an error each time, until it does not
/// fail, and then a machine that works.
#[test]
fn bring_up_fails_cleanly_at_every_table() {
    for n in 0.. {
        let mut boot = boot();
        boot.fail_after(Some(n));
        match Machine::new(Small::new([0, 0], HIGH_FROM).tables_from_boot(), boot, &config()) {
            Err(e) => {
                assert!(matches!(e, BringUpError::NoMetadata(_) | BringUpError::Boot(_)), "{e}")
            }
            Ok(m) => {
                assert!(n >= 5, "only {n} tables");
                m.audit().unwrap();
                let page = m.alloc_pages(Gfp::KERNEL, 10).unwrap();
                m.__free_pages(page, 10).unwrap();
                return;
            }
        }
    }
}
