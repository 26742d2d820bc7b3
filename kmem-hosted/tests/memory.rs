//! Physical memory is real \[X1, H3\]: frames have addresses, aliases alias, holes fault.

use kmem::{
    platform::Platform,
    types::{Pfn, ZoneType},
};
use kmem_hosted::{Hosted, HostedError, MapError, PAGE_SIZE, Shape, ShapeError};
use std::{io::pipe, os::fd::AsRawFd, time::Instant};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

/// The line of `/proc/self/maps` around an address: (file offset of the address, inode, name).
fn mapping_at(address: *const u8) -> Option<(u64, String, String)> {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("maps are readable");
    maps.lines().find_map(|line| {
        let mut fields = line.split_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let start = u64::from_str_radix(start, 16).ok()?;
        let end = u64::from_str_radix(end, 16).ok()?;
        let address = address as u64;
        if !(start..end).contains(&address) {
            return None;
        }
        let offset = u64::from_str_radix(fields.nth(1)?, 16).ok()?;
        let inode = fields.nth(1)?.to_owned();
        let name = fields.collect::<Vec<_>>().join(" ");
        Some((offset + address - start, inode, name))
    })
}

/// Whether the byte at an address can be read; the kernel tries, so nothing faults here.
fn readable(address: *const u8) -> bool {
    let (_reader, writer) = pipe().expect("a pipe");
    // SAFETY: write(2) checks the address itself and fails with EFAULT if it is not readable.
    let n = unsafe { libc::write(writer.as_raw_fd(), address.cast(), 1) };
    if n == -1 {
        let error = std::io::Error::last_os_error();
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT), "{error}");
    }
    n == 1
}

fn read(address: *const u8) -> u8 {
    // SAFETY: the callers pass addresses of mapped frames that no reference points to.
    unsafe { address.read_volatile() }
}

fn write(address: *mut u8, value: u8) {
    // SAFETY: as for `read`.
    unsafe { address.write_volatile(value) }
}

/// Where frame `pfn` would be in the direct map, mapped or not.
fn would_be(machine: &Hosted, pfn: u32) -> *const u8 {
    let zero = machine.direct_map(Pfn(0)).expect("frame 0 is mapped");
    zero.as_ptr().wrapping_add((u64::from(pfn) * PAGE_SIZE) as usize)
}

#[test]
fn one_frame_through_two_addresses() {
    let machine = Hosted::new(Shape::x86_64(64 * MIB)).unwrap();
    let pfn = Pfn(0x1234);
    let direct = machine.direct_map(pfn).unwrap().as_ptr();
    // The wanted frame among others, so that the mapping is not the direct map's shape.
    let mapping = machine.map_frames(&[Pfn(7), pfn, Pfn(3), Pfn(4)]).unwrap();
    let alias = mapping.as_ptr().as_ptr().wrapping_add(PAGE_SIZE as usize);
    assert_ne!(direct, alias);

    let (offset, inode, name) = mapping_at(direct).expect("the direct map is mapped");
    assert_eq!(offset, u64::from(pfn.0) * PAGE_SIZE, "file offset is the physical address");
    assert!(name.contains("memfd:kmem-physical"), "{name}");
    assert_eq!(mapping_at(alias), Some((offset, inode, name)), "the same page of the same file");

    write(direct.wrapping_add(17), 0xa5);
    assert_eq!(read(alias.wrapping_add(17)), 0xa5);
    write(alias.wrapping_add(4095), 0x5a);
    assert_eq!(read(direct.wrapping_add(4095)), 0x5a);

    drop(mapping);
    assert!(mapping_at(alias).is_none_or(|(_, _, name)| !name.contains("kmem-physical")));
    assert_eq!(read(direct.wrapping_add(17)), 0xa5);
}

#[test]
fn the_direct_map_inverts() {
    let machine = Hosted::new(Shape::x86_64(8 * MIB).hole(MIB, MIB)).unwrap();
    for pfn in [0u32, 1, 255, 512, 2047] {
        let address = machine.direct_map(Pfn(pfn)).unwrap();
        assert_eq!(machine.direct_unmap(address.as_ptr()), Some(Pfn(pfn)));
        assert_eq!(machine.direct_unmap(address.as_ptr().wrapping_add(4095)), Some(Pfn(pfn)));
        assert_eq!(address.as_ptr() as u64 % (4 * MIB), u64::from(pfn) * PAGE_SIZE % (4 * MIB));
    }
    for pfn in [256u32, 511, 2048, u32::MAX] {
        assert_eq!(machine.direct_map(Pfn(pfn)), None, "{pfn}");
    }
    assert_eq!(machine.direct_unmap(would_be(&machine, 300)), None);
    assert_eq!(machine.direct_unmap(would_be(&machine, 2048)), None);
    assert_eq!(machine.direct_unmap(std::ptr::null()), None);
    let on_stack = 0u8;
    assert_eq!(machine.direct_unmap(&raw const on_stack), None);
}

#[test]
fn holes_fault() {
    let machine = Hosted::new(Shape::x86_64(4 * GIB).hole(640 << 10, 384 << 10)).unwrap();
    let frame = |address: u64| (address / PAGE_SIZE) as u32;
    for mapped in [0, (640 << 10) - 1, MIB, 3 * GIB - 1, 4 * GIB, 5 * GIB - 1] {
        assert!(machine.direct_map(Pfn(frame(mapped))).is_some(), "{mapped:#x}");
        assert!(readable(would_be(&machine, frame(mapped))), "{mapped:#x}");
    }
    for hole in [640 << 10, MIB - 1, 3 * GIB, 4 * GIB - 1] {
        assert_eq!(machine.direct_map(Pfn(frame(hole))), None, "{hole:#x}");
        assert!(!readable(would_be(&machine, frame(hole))), "{hole:#x}");
    }
    assert_eq!(machine.direct_map(Pfn(frame(5 * GIB))), None);
}

#[test]
fn high_memory_has_no_address() {
    for shape in [Shape::x86_32(GIB), Shape::x86_32_pae(8 * GIB)] {
        let last = shape.banks.last().unwrap().end() / PAGE_SIZE - 1;
        let machine = Hosted::new(shape).unwrap();
        let border = (896 * MIB / PAGE_SIZE) as u32;
        assert!(machine.direct_map(Pfn(border - 1)).is_some());
        assert!(readable(would_be(&machine, border - 1)));
        for high in [border, last as u32] {
            assert_eq!(machine.direct_map(Pfn(high)), None);
            assert_eq!(machine.direct_unmap(would_be(&machine, high)), None);
        }
        assert!(!readable(would_be(&machine, border)));
        // It exists all the same: mapped, it holds what is written.
        let mapping = machine.map_frames(&[Pfn(last as u32), Pfn(border)]).unwrap();
        assert_eq!(mapping.len() as u64, 2 * PAGE_SIZE);
        write(mapping.as_ptr().as_ptr(), 9);
        let again = machine.map_frames(&[Pfn(last as u32)]).unwrap();
        assert_eq!(read(again.as_ptr().as_ptr()), 9);
    }
}

#[test]
fn zeroing_reaches_low_and_high_frames() {
    let machine = Hosted::new(Shape::x86_32(GIB)).unwrap();
    let border = (896 * MIB / PAGE_SIZE) as u32;
    // Two low ones, two high ones; their neighbours keep their contents.
    let frames: Vec<Pfn> = (border - 3..border + 3).map(Pfn).collect();
    let mapping = machine.map_frames(&frames).unwrap();
    let first = mapping.as_ptr().as_ptr();
    let bytes = |frame: usize| (0..4096).map(move |i| first.wrapping_add(frame * 4096 + i));
    (0..6).flat_map(bytes).for_each(|b| write(b, 0xff));
    machine.zero_frames(Pfn(border - 2), 4);
    for frame in 0..6 {
        let expected = if (1..5).contains(&frame) { 0 } else { 0xff };
        assert!(bytes(frame).all(|b| read(b) == expected), "frame {frame}");
    }
    // Frames that do not exist are left out.
    machine.zero_frames(Pfn(u32::MAX), 7);
}

#[test]
fn released_frames_go_back_to_the_host() {
    let machine = Hosted::new(Shape::x86_64(256 * MIB)).unwrap();
    let start = 0x1000u32;
    let base = machine.direct_map(Pfn(start)).unwrap().as_ptr();
    let pages = 1024;
    let resident = || {
        let mut seen = vec![0u8; pages];
        // SAFETY: the range is mapped, and `seen` has a byte for each of its pages.
        let rc = unsafe { libc::mincore(base.cast(), pages * 4096, seen.as_mut_ptr()) };
        assert_eq!(rc, 0);
        seen.iter().filter(|&&p| p & 1 != 0).count()
    };
    assert_eq!(resident(), 0, "contents are absent until touched");
    (0..pages).for_each(|p| write(base.wrapping_add(p * 4096), 1));
    assert_eq!(resident(), pages);
    machine.release_frames(Pfn(start), pages as u32 / 2);
    assert_eq!(resident(), pages / 2);
    assert_eq!(read(base), 0);
    assert_eq!(read(base.wrapping_add((pages - 1) * 4096)), 1);
}

#[test]
fn metadata_is_zero_and_sparse() {
    let machine = Hosted::new(Shape::x86_64(64 * MIB)).unwrap();
    let mut boot = machine.shape().memblock().unwrap();
    let plain = machine.metadata(&mut boot, 10_000).unwrap().as_ptr();
    assert_eq!(plain as usize % 4096, 0);
    assert!((0..10_000).all(|i| read(plain.wrapping_add(i)) == 0));
    write(plain.wrapping_add(9_999), 1);

    let used = [0..100usize, 8192..8193];
    let sparse =
        machine.sparse_metadata(&mut boot, 1 << 40, &mut used.iter().cloned()).unwrap().as_ptr();
    assert_eq!(read(sparse), 0);
    assert_eq!(read(sparse.wrapping_add(8192)), 0);
    write(sparse.wrapping_add(4095), 1);
    assert_eq!(read(sparse.wrapping_add(4096)), 0, "a hole in the table reads as zeros");
    assert_eq!(read(sparse.wrapping_add(1 << 39)), 0);
    assert_eq!(machine.metadata(&mut boot, usize::MAX), None);
}

#[test]
fn huge_machines_come_up_at_once() {
    let start = Instant::now();
    let one = Hosted::new(Shape::x86_64(TIB).without_contents()).unwrap();
    let four = Hosted::new(Shape::numa(4, TIB).without_contents()).unwrap();
    let with = Hosted::new(Shape::x86_64(TIB)).unwrap();
    let elapsed = start.elapsed();
    assert!(elapsed.as_millis() < 500, "three machines took {elapsed:?}");

    for machine in [&one, &four] {
        assert_eq!(machine.direct_map(Pfn(0)), None, "no contents, no address");
        machine.zero_frames(Pfn(0), 1);
        assert_eq!(machine.map_frames(&[Pfn(0)]).err(), Some(MapError::NoContents));
    }
    assert_eq!(one.shape().memblock().unwrap().total(), TIB);
    assert_eq!(four.shape().memblock().unwrap().total(), 4 * TIB);
    // A terabyte with contents: absent until touched.
    let last = with.shape().banks[1].end() / PAGE_SIZE - 1;
    let address = with.direct_map(Pfn(last as u32)).unwrap();
    write(address.as_ptr(), 3);
    assert_eq!(read(address.as_ptr()), 3);
}

#[test]
fn mapping_mistakes_are_errors() {
    let machine = Hosted::new(Shape::x86_64(MIB)).unwrap();
    assert_eq!(machine.map_frames(&[]).err(), Some(MapError::NoFrames));
    assert_eq!(machine.map_frames(&[Pfn(1), Pfn(256)]).err(), Some(MapError::NoFrame(Pfn(256))));
}

#[test]
fn bad_shapes_are_refused() {
    let refused = |shape: Shape| match Hosted::new(shape) {
        Err(HostedError::Shape(error)) => error,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("accepted"),
    };
    let good = || Shape::x86_64(16 * MIB);
    assert_eq!(refused(good().hole(0, TIB)), ShapeError::NoMemory);
    assert_eq!(refused(good().cpus(0)), ShapeError::CpuCount(0));
    assert_eq!(refused(good().cpus(1025)), ShapeError::CpuCount(1025));
    assert_eq!(refused(good().bank(GIB, 4097, 0)), ShapeError::Unaligned(1, GIB, 4097));
    assert_eq!(refused(good().bank(8 * MIB, 16 * MIB, 0)), ShapeError::Overlap(0, 1));
    assert_eq!(refused(good().bank(GIB, MIB, 64)), ShapeError::BadNode("bank", 64));
    assert_eq!(refused(good().zones(&[(ZoneType::Dma, MIB)])), ShapeError::NoZone(0, 16 * MIB));
    assert_eq!(
        refused(good().zones(&[(ZoneType::Normal, GIB), (ZoneType::Dma, TIB)])),
        ShapeError::ZoneOrder(ZoneType::Dma, ZoneType::Normal)
    );
    assert!(matches!(refused(Shape::x86_32(5 * GIB)), ShapeError::TooHigh(0, ..)));
    assert!(matches!(refused(Shape::x86_64(17 * TIB)), ShapeError::TooHigh(1, ..)));
    assert!(matches!(refused(good().bank(!0xfff, 8192, 0)), ShapeError::TooHigh(1, ..)));
}

#[test]
fn shapes_say_what_they_are() {
    assert_eq!(Shape::x86_64(8 * GIB).bytes(), 8 * GIB);
    assert_eq!(Shape::x86_64(8 * GIB).highmem_from(), None);
    assert_eq!(Shape::x86_32(GIB).highmem_from(), Some(896 * MIB));
    assert_eq!(Shape::x86_32_pae(8 * GIB).highmem_from(), Some(896 * MIB));
    assert_eq!(Shape::no_dma(GIB).zones.len(), 1);
    let numa = Shape::numa(3, GIB);
    assert_eq!((numa.nr_nodes(), numa.bytes()), (3, 3 * GIB));
    assert_eq!(numa.cpus, [0, 0, 1, 1, 2, 2]);
    assert_eq!(numa.clone().cpus(5).cpus, [0, 0, 1, 1, 2]);
    assert_eq!(numa.check(), Ok(()));
}
