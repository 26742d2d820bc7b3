//! Watermarks: computed as Linux computes them, settable at run time, effective at once \[Z3, Z4\].

use kmem::{AllocError, Config, Gfp, ZoneType, vmstat::VmEvent, zone::Watermarks};
use kmem_hosted::{Machine, Shape};
use kmem_test_support::{MIB, Rig};

const GIB: u64 = 1 << 30;
const QUIET: Gfp = Gfp::KERNEL.union(Gfp::NOWARN).union(Gfp::NORETRY);

fn marks(machine: &Machine, kind: ZoneType) -> (u64, u64, u64, u64) {
    let w = machine.zone_of(0, kind).unwrap().watermarks();
    (w.min, w.low, w.high, w.promo)
}

fn empty(shape: Shape, config: Config) -> Machine {
    Machine::without_kswapd(shape.without_contents(), config).unwrap()
}

#[test]
fn min_free_kbytes_is_the_root_of_sixteen_times_low_memory() {
    for (mib, kbytes) in [(1, 128), (16, 512), (64, 1024), (512, 2896), (1024, 4096), (3072, 7094)]
    {
        let machine = empty(Shape::no_dma(mib * MIB), Config::default());
        assert_eq!(machine.min_free_kbytes(), kbytes, "{mib} MiB");
    }
    // Between 128 kB and 256 MiB.
    let tiny = empty(Shape::no_dma(MIB / 4), Config::default());
    assert_eq!(tiny.min_free_kbytes(), 128);
    let huge = empty(Shape::no_dma(8192 * GIB), Config::default());
    assert_eq!(huge.min_free_kbytes(), 262_144);
    // High memory does not count.
    let high = empty(Shape::x86_32(3 * GIB), Config::default());
    assert_eq!(high.min_free_kbytes(), ((896 * 1024 * 16) as f64).sqrt() as u64);
}

#[test]
fn min_is_spread_over_low_memory_and_low_and_high_are_a_quarter_apart() {
    // 1024 kB are 256 frames: a quarter of the machine is DMA.
    let machine = empty(Shape::x86_64(64 * MIB), Config::default());
    assert_eq!(marks(&machine, ZoneType::Dma), (64, 80, 96, 112));
    assert_eq!(marks(&machine, ZoneType::Dma32), (192, 240, 288, 336));
}

#[test]
fn a_large_zone_goes_by_the_scale_factor() {
    // 16384 kB of 16 GiB are 4096 frames; ten ten-thousandths of a zone are more than a quarter of that.
    let machine = empty(Shape::no_dma(16 * GIB), Config::default());
    assert_eq!(marks(&machine, ZoneType::Normal), (4096, 8290, 12484, 16678));
    machine.set_watermark_scale_factor(1000);
    let step = 4 * MIB / 10;
    assert_eq!(
        marks(&machine, ZoneType::Normal),
        (4096, 4096 + step, 4096 + 2 * step, 4096 + 3 * step)
    );
    // At most three tenths of a zone.
    machine.set_watermark_scale_factor(u64::MAX);
    assert_eq!(marks(&machine, ZoneType::Normal).1, 4096 + 4 * MIB * 3 / 10);
}

#[test]
fn high_memory_keeps_a_little_whatever_its_size() {
    let machine = empty(Shape::x86_32(900 * MIB), Config::default());
    assert_eq!(marks(&machine, ZoneType::HighMem).0, 32);
    let machine = empty(Shape::x86_32(1152 * MIB), Config::default());
    assert_eq!(marks(&machine, ZoneType::HighMem).0, 64);
    let machine = empty(Shape::x86_32_pae(8 * GIB), Config::default());
    assert_eq!(marks(&machine, ZoneType::HighMem).0, 128);
    let (dma, normal) = (marks(&machine, ZoneType::Dma).0, marks(&machine, ZoneType::Normal).0);
    let pages = machine.min_free_kbytes() / 4;
    assert!((pages - 1..=pages).contains(&(dma + normal)), "the rest is low memory's");
}

#[test]
fn lowmem_reserve_is_what_lies_above_divided_by_the_ratio() {
    let machine = empty(Shape::x86_64(8 * GIB), Config::default());
    let managed = |z| machine.zone_of(0, z).unwrap().managed_frames();
    let reserve = |z, highest| machine.zone_of(0, z).unwrap().lowmem_reserve(highest);
    let (dma, dma32, normal) = (ZoneType::Dma, ZoneType::Dma32, ZoneType::Normal);
    assert_eq!([managed(dma), managed(dma32), managed(normal)], [4096, 782_336, 1_310_720]);
    assert_eq!([dma, dma32, normal].map(|z| reserve(dma, z)), [0, 3056, 8176]);
    assert_eq!([dma, dma32, normal].map(|z| reserve(dma32, z)), [0, 0, 5120]);
    assert_eq!([dma, dma32, normal].map(|z| reserve(normal, z)), [0, 0, 0]);
    // Another node's memory is no reason to keep this one's.
    let two = empty(Shape::numa(2, 64 * MIB), Config::default());
    let reserve = |z| two.zone_of(0, z).unwrap().lowmem_reserve(normal);
    assert_eq!((reserve(dma), reserve(dma32)), (48, 0));
    assert_eq!(two.zone_of(1, normal).unwrap().managed_frames(), 16_384);
    let ratio = [1000, 0, 32, 0, 0, 0];
    let machine =
        empty(Shape::x86_64(8 * GIB), Config { lowmem_reserve_ratio: ratio, ..Config::default() });
    let reserve = |z| machine.zone_of(0, z).unwrap().lowmem_reserve(normal);
    assert_eq!((reserve(dma), reserve(dma32)), (2093, 0), "a ratio of 0 reserves nothing");
}

#[test]
fn min_free_kbytes_takes_effect_at_once() {
    let rig = Rig::flat();
    let zone = rig.zone(ZoneType::Normal);
    rig.run(|_| {
        let mut held = rig.exhaust(QUIET, 0);
        for kbytes in [512, 64, 0] {
            rig.set_min_free_kbytes(kbytes);
            assert_eq!(rig.min_free_kbytes(), kbytes);
            assert_eq!(zone.watermarks().min, kbytes / 4);
            let more = rig.exhaust(QUIET, 0);
            assert!(!more.is_empty());
            held.extend(more);
            assert_eq!(zone.free_frames(), kbytes / 4);
        }
        rig.release(held);
        rig.drain_this_cpu();
        // Up again: as much is kept.
        rig.set_min_free_kbytes(8192);
        let held = rig.exhaust(QUIET, 0);
        assert_eq!(zone.free_frames(), 2048);
        rig.release(held);
        // More than there is: nothing for ordinary requests, and not a frame lost.
        rig.set_min_free_kbytes(u64::MAX);
        assert_eq!(rig.alloc_page(QUIET).err(), Some(AllocError::NoMemory));
        rig.set_min_free_kbytes(1024);
        rig.release([rig.take(QUIET, 0).unwrap()]);
    });
}

#[test]
fn configured_values_are_used_from_the_start() {
    let config =
        Config { min_free_kbytes: Some(400), watermark_scale_factor: 200, ..Config::default() };
    let machine = empty(Shape::no_dma(64 * MIB), config);
    assert_eq!(marks(&machine, ZoneType::Normal), (100, 427, 754, 1081));
}

#[test]
fn one_zones_marks_can_be_set() {
    let rig = Rig::pc();
    let zone = rig.zone(ZoneType::Dma32);
    rig.run(|_| {
        // With everything below its marks, requests go to the zone beneath.
        let none = Watermarks { min: 1 << 20, low: 1 << 20, high: 1 << 20, promo: 1 << 20 };
        rig.set_watermarks(zone, none);
        assert_eq!(zone.watermarks(), none);
        let page = rig.alloc_page(QUIET).unwrap();
        assert_eq!(rig.place(page).1, ZoneType::Dma);
        rig.__free_page(page).unwrap();
        rig.set_watermarks(zone, Watermarks::default());
        let held = rig.exhaust(QUIET, 0);
        assert_eq!(zone.free_frames(), 0, "no mark, no reserve");
        rig.release(held);
    });
}

#[test]
fn the_low_mark_sends_requests_the_slow_way() {
    let rig = Rig::flat();
    let zone = rig.zone(ZoneType::Normal);
    rig.run(|_| {
        let crossed = || rig.vm_event(VmEvent::WmarkLow);
        let take = |order| rig.release([rig.take(Gfp::KERNEL, order).unwrap()]);
        let free = zone.free_frames();
        let marks = |low| Watermarks { min: 100, low, high: free, promo: free };
        for order in [0, 3, 6] {
            rig.drain_this_cpu();
            // As much as the request leaves, to the frame.
            rig.set_watermarks(zone, marks(free - (1 << order)));
            take(order);
            assert_eq!(crossed(), 0, "order {order}");
        }
        rig.set_watermarks(zone, marks(free));
        take(0);
        assert_eq!(crossed(), 1);
    });
}
