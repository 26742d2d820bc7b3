//! GFP masks as values \[G1, G3, G5\]: numbers, compositions, contradictions, text.

use kmem::{
    Gfp, MigrateType, ZoneType,
    gfp::{GfpError, ParseGfpError},
};
use proptest::prelude::*;

/// Every single bit under its kernel name, with Linux 6.12's value.
const BITS: [(&str, Gfp, u32); 23] = [
    ("__GFP_DMA", kmem::__GFP_DMA, 0x01),
    ("__GFP_HIGHMEM", kmem::__GFP_HIGHMEM, 0x02),
    ("__GFP_DMA32", kmem::__GFP_DMA32, 0x04),
    ("__GFP_MOVABLE", kmem::__GFP_MOVABLE, 0x08),
    ("__GFP_RECLAIMABLE", kmem::__GFP_RECLAIMABLE, 0x10),
    ("__GFP_HIGH", kmem::__GFP_HIGH, 0x20),
    ("__GFP_IO", kmem::__GFP_IO, 0x40),
    ("__GFP_FS", kmem::__GFP_FS, 0x80),
    ("__GFP_ZERO", kmem::__GFP_ZERO, 0x100),
    ("__GFP_DIRECT_RECLAIM", kmem::__GFP_DIRECT_RECLAIM, 0x400),
    ("__GFP_KSWAPD_RECLAIM", kmem::__GFP_KSWAPD_RECLAIM, 0x800),
    ("__GFP_WRITE", kmem::__GFP_WRITE, 0x1000),
    ("__GFP_NOWARN", kmem::__GFP_NOWARN, 0x2000),
    ("__GFP_RETRY_MAYFAIL", kmem::__GFP_RETRY_MAYFAIL, 0x4000),
    ("__GFP_NOFAIL", kmem::__GFP_NOFAIL, 0x8000),
    ("__GFP_NORETRY", kmem::__GFP_NORETRY, 0x1_0000),
    ("__GFP_MEMALLOC", kmem::__GFP_MEMALLOC, 0x2_0000),
    ("__GFP_COMP", kmem::__GFP_COMP, 0x4_0000),
    ("__GFP_NOMEMALLOC", kmem::__GFP_NOMEMALLOC, 0x8_0000),
    ("__GFP_HARDWALL", kmem::__GFP_HARDWALL, 0x10_0000),
    ("__GFP_THISNODE", kmem::__GFP_THISNODE, 0x20_0000),
    ("__GFP_ACCOUNT", kmem::__GFP_ACCOUNT, 0x40_0000),
    ("__GFP_ZEROTAGS", Gfp::ZEROTAGS, 0x80_0000),
];

/// The sums under their kernel names, with Linux 6.12's values.
const TYPES: [(&str, Gfp, u32); 13] = [
    ("GFP_ATOMIC", kmem::GFP_ATOMIC, 0x820),
    ("GFP_KERNEL", kmem::GFP_KERNEL, 0xcc0),
    ("GFP_KERNEL_ACCOUNT", kmem::GFP_KERNEL_ACCOUNT, 0x40_0cc0),
    ("GFP_NOWAIT", kmem::GFP_NOWAIT, 0x2800),
    ("GFP_NOIO", kmem::GFP_NOIO, 0xc00),
    ("GFP_NOFS", kmem::GFP_NOFS, 0xc40),
    ("GFP_USER", kmem::GFP_USER, 0x10_0cc0),
    ("GFP_DMA", kmem::GFP_DMA, 0x1),
    ("GFP_DMA32", kmem::GFP_DMA32, 0x4),
    ("GFP_HIGHUSER", kmem::GFP_HIGHUSER, 0x10_0cc2),
    ("GFP_HIGHUSER_MOVABLE", kmem::GFP_HIGHUSER_MOVABLE, 0x10_0cca),
    ("GFP_TRANSHUGE_LIGHT", kmem::GFP_TRANSHUGE_LIGHT, 0x1c_20ca),
    ("GFP_TRANSHUGE", kmem::GFP_TRANSHUGE, 0x1c_24ca),
];

#[test]
fn values_are_those_of_linux_6_12() {
    for (name, gfp, value) in BITS.into_iter().chain(TYPES) {
        assert_eq!(gfp.to_linux(), value, "{name}");
        assert_eq!(Gfp::from_linux(value), (gfp, 0), "{name}");
    }
    let all = BITS.iter().fold(0, |sum, (_, _, value)| sum | value);
    assert_eq!(Gfp::all().to_linux(), all, "no bit without a name");
}

#[test]
fn the_textbooks_names_are_todays_bits() {
    assert_eq!(kmem::__GFP_WAIT, kmem::__GFP_DIRECT_RECLAIM | kmem::__GFP_KSWAPD_RECLAIM);
    assert_eq!(kmem::__GFP_RECLAIM, kmem::__GFP_WAIT);
    assert_eq!(kmem::__GFP_REPEAT, kmem::__GFP_RETRY_MAYFAIL);
    // COLD is gone from Linux: a bit of its own, in nobody's sum, and in no number.
    let cold = kmem::__GFP_COLD;
    assert_eq!(cold.bits().count_ones(), 1);
    assert!(BITS.into_iter().chain(TYPES).all(|(_, gfp, _)| !gfp.intersects(cold)));
    assert_eq!((cold | Gfp::KERNEL).to_linux(), Gfp::KERNEL.to_linux());
    assert_eq!(Gfp::from_linux(cold.bits()), (Gfp::empty(), cold.bits()));
}

/// The modifiers that the textbook's table 12.6 is made of, as it would read them off a mask: a mask that
/// may not sleep has no `__GFP_WAIT`, whatever it says of kswapd.
fn as_in_table_12_6(gfp: Gfp) -> Vec<&'static str> {
    let modifiers = [
        ("__GFP_WAIT", kmem::__GFP_WAIT),
        ("__GFP_HIGH", kmem::__GFP_HIGH),
        ("__GFP_IO", kmem::__GFP_IO),
        ("__GFP_FS", kmem::__GFP_FS),
        ("__GFP_HIGHMEM", kmem::__GFP_HIGHMEM),
        ("__GFP_DMA", kmem::__GFP_DMA),
    ];
    modifiers.into_iter().filter(|(_, bits)| gfp.contains(*bits)).map(|(name, _)| name).collect()
}

#[test]
fn types_equal_table_12_6() {
    // NOWAIT's NOWARN is today's addition; HARDWALL in USER and HIGHUSER the table leaves out.
    let table: [(Gfp, &[&str]); 8] = [
        (kmem::GFP_ATOMIC, &["__GFP_HIGH"]),
        (kmem::GFP_NOWAIT, &[]),
        (kmem::GFP_NOIO, &["__GFP_WAIT"]),
        (kmem::GFP_NOFS, &["__GFP_WAIT", "__GFP_IO"]),
        (kmem::GFP_KERNEL, &["__GFP_WAIT", "__GFP_IO", "__GFP_FS"]),
        (kmem::GFP_USER, &["__GFP_WAIT", "__GFP_IO", "__GFP_FS"]),
        (kmem::GFP_HIGHUSER, &["__GFP_WAIT", "__GFP_IO", "__GFP_FS", "__GFP_HIGHMEM"]),
        (kmem::GFP_DMA, &["__GFP_DMA"]),
    ];
    for (gfp, modifiers) in table {
        assert_eq!(as_in_table_12_6(gfp), modifiers, "{gfp}");
    }
}

#[test]
fn zone_modifiers_name_one_zone_or_are_refused() {
    let zones = Gfp::DMA | Gfp::DMA32 | Gfp::HIGHMEM | Gfp::MOVABLE;
    for bits in 0..16 {
        let gfp = Gfp::from_bits_retain(bits);
        let named = (gfp & (zones - Gfp::MOVABLE)).bits().count_ones();
        let movable = gfp.contains(Gfp::MOVABLE);
        let expected = match () {
            () if named > 1 => Err(GfpError::TwoZones),
            () if gfp.contains(Gfp::DMA) => Ok(ZoneType::Dma),
            () if gfp.contains(Gfp::DMA32) => Ok(ZoneType::Dma32),
            () if gfp.contains(Gfp::HIGHMEM) && movable => Ok(ZoneType::Movable),
            () if gfp.contains(Gfp::HIGHMEM) => Ok(ZoneType::HighMem),
            () => Ok(ZoneType::Normal),
        };
        assert_eq!(gfp.zone(), expected, "{gfp}");
        assert_eq!(gfp.check(0).err(), expected.err(), "{gfp}");
    }
}

#[test]
fn mobility_flags_choose_the_mobility() {
    assert_eq!(Gfp::KERNEL.migratetype(), MigrateType::Unmovable);
    assert_eq!((Gfp::KERNEL | Gfp::MOVABLE).migratetype(), MigrateType::Movable);
    assert_eq!((Gfp::KERNEL | Gfp::RECLAIMABLE).migratetype(), MigrateType::Reclaimable);
    let both = Gfp::KERNEL | Gfp::MOVABLE | Gfp::RECLAIMABLE;
    assert_eq!(both.check(0), Err(GfpError::TwoMobilities));
}

#[test]
fn nofail_must_be_able_to_wait_and_small() {
    let nofail = Gfp::KERNEL | Gfp::NOFAIL;
    assert_eq!([0, 1].map(|order| nofail.check(order)), [Ok(()); 2]);
    assert_eq!(nofail.check(2), Err(GfpError::NofailOrder));
    for cannot_wait in [Gfp::ATOMIC, Gfp::NOWAIT, Gfp::KERNEL - Gfp::DIRECT_RECLAIM] {
        assert_eq!((cannot_wait | Gfp::NOFAIL).check(0), Err(GfpError::NofailCannotWait));
    }
}

#[test]
fn high_memory_has_no_address() {
    let refused = Err(GfpError::HighMemNeedsPage);
    assert_eq!(Gfp::HIGHUSER.check_addressed(0), refused);
    assert_eq!(Gfp::HIGHUSER_MOVABLE.check_addressed(0), refused);
    assert_eq!(Gfp::KERNEL.check_addressed(0), Ok(()));
    assert_eq!((Gfp::DMA | Gfp::DMA32).check_addressed(0), Err(GfpError::TwoZones));
}

#[test]
fn only_direct_reclaim_sleeps() {
    for gfp in [Gfp::KERNEL, Gfp::NOFS, Gfp::NOIO, Gfp::USER, Gfp::DIRECT_RECLAIM] {
        assert!(gfp.may_block(), "{gfp}");
    }
    for gfp in [Gfp::ATOMIC, Gfp::NOWAIT, Gfp::empty(), Gfp::all() - Gfp::DIRECT_RECLAIM] {
        assert!(!gfp.may_block(), "{gfp}");
    }
}

#[test]
fn masks_print_as_the_kernel_prints_them() {
    for (name, gfp, _) in TYPES {
        assert_eq!(gfp.to_string(), name);
        assert_eq!(name.parse(), Ok(gfp));
    }
    for (name, gfp, _) in BITS {
        assert_eq!(name.parse(), Ok(gfp));
        // These bits alone are also a sum, and go by its name.
        let printed = match name {
            "__GFP_DMA" => "GFP_DMA",
            "__GFP_DMA32" => "GFP_DMA32",
            name => name,
        };
        assert_eq!(gfp.to_string(), printed);
    }
    let sums = [
        (Gfp::KERNEL | Gfp::ZERO, "GFP_KERNEL|__GFP_ZERO"),
        (Gfp::KERNEL | Gfp::NOWARN | Gfp::NORETRY, "GFP_KERNEL|__GFP_NOWARN|__GFP_NORETRY"),
        (Gfp::USER | Gfp::COMP, "GFP_USER|__GFP_COMP"),
        (Gfp::ATOMIC | Gfp::NOMEMALLOC, "GFP_ATOMIC|__GFP_NOMEMALLOC"),
        (Gfp::COLD, "__GFP_COLD"),
        (Gfp::empty(), "none"),
        (Gfp::from_bits_retain(0x0100_0000), "0x1000000"),
        (Gfp::KERNEL | Gfp::from_bits_retain(0x200), "GFP_KERNEL|0x200"),
    ];
    for (gfp, text) in sums {
        assert_eq!(gfp.to_string(), text);
        assert_eq!(format!("{gfp:?}"), text);
    }
}

#[test]
fn text_that_is_no_mask_is_refused_with_its_place() {
    let wrong = [
        ("", 0),
        ("GFP_KERNEL|", 11),
        ("GFP_KERNEL|__GFP_SHINY|__GFP_ZERO", 11),
        ("gfp_kernel", 0),
        ("GFP_KERNEL | 0xzz", 13),
        ("0x200", 0),
        ("0x1ffffffff", 0),
    ];
    for (text, offset) in wrong {
        assert_eq!(text.parse::<Gfp>(), Err(ParseGfpError { offset }), "{text:?}");
    }
    assert_eq!(" GFP_KERNEL | 0x100 ".parse(), Ok(Gfp::KERNEL | Gfp::ZERO));
    assert_eq!("__GFP_WAIT|__GFP_REPEAT".parse(), Ok(Gfp::RECLAIM | Gfp::RETRY_MAYFAIL));
}

proptest! {
    #[test]
    fn text_and_back(bits: u32) {
        let gfp = Gfp::from_bits_truncate(bits);
        prop_assert_eq!(gfp.to_string().parse::<Gfp>(), Ok(gfp));
    }

    #[test]
    fn numbers_and_back(raw: u32) {
        let (gfp, unknown) = Gfp::from_linux(raw);
        prop_assert_eq!(gfp.to_linux() | unknown, raw);
        prop_assert_eq!(gfp.to_linux() & unknown, 0);
        prop_assert!(Gfp::all().contains(gfp));
    }

    #[test]
    fn parsing_never_panics(text in "\\PC*") {
        let _ = text.parse::<Gfp>();
    }

    #[test]
    fn a_mask_is_refused_exactly_when_it_contradicts_itself(bits: u32, order in 0u32..16) {
        let gfp = Gfp::from_bits_truncate(bits);
        let zones = (gfp & (Gfp::DMA | Gfp::DMA32 | Gfp::HIGHMEM)).bits().count_ones();
        let mobilities = Gfp::MOVABLE | Gfp::RECLAIMABLE;
        let nofail = gfp.contains(Gfp::NOFAIL);
        let wrong = zones > 1
            || gfp.contains(mobilities)
            || nofail && (order > 1 || !gfp.contains(Gfp::DIRECT_RECLAIM));
        prop_assert_eq!(gfp.check(order).is_err(), wrong);
    }
}
