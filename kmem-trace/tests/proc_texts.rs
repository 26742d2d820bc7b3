//! The parsers of `/proc` texts: what they read, and which line they refuse.

use kmem_trace::end::unusable_index;
use kmem_trace::proc::{
    AreaKind, Buddyinfo, Iomem, PageSet, Pagetypeinfo, SlabCache, Slabinfo, VmArea, Vmallocinfo,
    Zoneinfo,
};
use kmem_trace::{Meta, Place, Recording, gfp};

const BUDDYINFO: &str =
    "Node 0, zone      DMA      1      0      2 \nNode 1, zone   Normal      4      5      6 \n";

#[test]
fn buddyinfo() {
    let info = Buddyinfo::parse(BUDDYINFO, "buddyinfo").unwrap();
    assert_eq!(info.zone(0, "DMA").unwrap().blocks, [1, 0, 2]);
    assert_eq!(info.zone(0, "DMA").unwrap().frames(), 9);
    assert_eq!(info.zone(1, "DMA"), None);
    assert_eq!(info.total(), [5, 5, 8]);
    for (text, line) in [
        ("", 1),
        ("Node 0, zone DMA 1 2\nNode 0, zone DMA32 1\n", 2),
        ("Node 0, zone DMA 1 2\nNode 0, zone DMA 1 2\n", 2),
        ("Node 0, zone DMA 1 x\n", 1),
        ("Node 0, zone DMA\n", 1),
        ("Node 0, zone DMA 1 2\n\nhello\n", 3),
        ("Node 0, zone DMA 1 -2\n", 1),
    ] {
        assert_eq!(
            Buddyinfo::parse(text, "buddyinfo").unwrap_err().place,
            Place::Line(line),
            "{text:?}"
        );
    }
}

const ZONEINFO: &str = "\
Node 0, zone    DMA32
  per-node stats
      nr_inactive_anon 7
  pages free     100
        boost    1
        min      2
        low      3
        high     4
        promo    5
        spanned  60
        present  50
        managed  40
        cma      0
        protection: (0, 440, 441)
      nr_free_pages 100
  pagesets
    cpu: 0
              count: 8
              high:  9
              batch: 10
  vm stats threshold: 4
    cpu: 3
              count: 11
              high:  12
              batch: 13
  node_unreclaimable:  0
  start_pfn:           4096
Node 0, zone   Normal
  pages free     0
        min      32
";

#[test]
fn zoneinfo() {
    let info = Zoneinfo::parse(ZONEINFO, "zoneinfo").unwrap();
    let zone = info.zone(0, "DMA32").unwrap();
    assert_eq!(
        (zone.free, zone.boost, zone.min, zone.low, zone.high, zone.promo),
        (100, 1, 2, 3, 4, 5)
    );
    assert_eq!((zone.spanned, zone.present, zone.managed, zone.start_pfn), (60, 50, 40, 4096));
    assert_eq!(zone.protection, [0, 440, 441]);
    assert_eq!(zone.pagesets[1], PageSet { cpu: 3, count: 11, high: 12, batch: 13 });
    assert_eq!((zone.pcp_count(), info.cpus()), (19, 4));
    assert_eq!(info.zone(0, "Normal").unwrap().spanned, 0);
    for (text, line) in [
        ("", 1),
        ("  pages free 1\n", 1),
        ("Node 0, zone DMA\n  min x\n", 2),
        ("Node 0, zone DMA\n  count: 3\n", 2),
        ("Node 0, zone DMA\n  protection: 0, 1\n", 2),
        ("Node 0, zone DMA\n  garbage\n", 2),
        ("Node 0, zone DMA 5\n", 1),
    ] {
        assert_eq!(
            Zoneinfo::parse(text, "zoneinfo").unwrap_err().place,
            Place::Line(line),
            "{text:?}"
        );
    }
}

const PAGETYPEINFO: &str = "\
Page block order: 9
Pages per block:  512

Free pages count per migrate type at order       0      1
Node    0, zone      DMA, type    Unmovable      3      4
Node    0, zone      DMA, type      Movable      5 >100000

Number of blocks type     Unmovable      Movable
Node 0, zone      DMA            1            7
";

#[test]
fn pagetypeinfo() {
    let info = Pagetypeinfo::parse(PAGETYPEINFO, "pagetypeinfo").unwrap();
    assert_eq!(
        (info.pageblock_order, info.types.clone()),
        (9, vec!["Unmovable".to_owned(), "Movable".to_owned()])
    );
    assert_eq!(info.zone(0, "DMA").unwrap(), [1, 7]);
    assert_eq!(info.free_of(0, "DMA", 1).unwrap(), [5, 100_000]);
    assert_eq!(info.free_of(0, "DMA", 2), None);
    for (from, to, line) in [
        ("order: 9", "order: 99", 1),
        ("512", "511", 2),
        ("      3      4", "      3      z", 5),
        ("            7", "", 9),
        ("Node 0, zone      DMA            1            7\n", "", 8),
        ("Node    0, zone      DMA, type    Unmovable", "Node    0, zone      DMA, kind", 5),
    ] {
        let error =
            Pagetypeinfo::parse(&PAGETYPEINFO.replacen(from, to, 1), "pagetypeinfo").unwrap_err();
        assert_eq!(error.place, Place::Line(line), "{from:?}: {error}");
    }
}

#[test]
fn iomem() {
    let text = "\
00000000-00000fff : Reserved
00001000-0009fbff : System RAM
00100000-1fffffff : System RAM
  01000000-01ffffff : Kernel code
  02c00000-02e70f7f : Kernel data
fc000000-fcffffff : 0000:00:02.0
";
    let iomem = Iomem::parse(text, "iomem").unwrap();
    assert_eq!(iomem.ram(12), [0x1..0x9f, 0x100..0x20000]);
    assert_eq!(iomem.kernel(12), [0x1000..0x2000, 0x2c00..0x2e71]);
    assert_eq!(iomem.resources[3].depth, 1);
    for (text, line) in [
        ("", 1),
        ("00000000-00000000 : System RAM\n  00000000-00000000 : Kernel code\n", 1),
        ("00001000-00000fff : x\n", 1),
        ("00001000-00001fff : x\nnonsense\n", 2),
        ("0000g000-00001fff : x\n", 1),
    ] {
        assert_eq!(Iomem::parse(text, "iomem").unwrap_err().place, Place::Line(line), "{text:?}");
    }
}

#[test]
fn gfp_names() {
    assert_eq!(gfp::parse("GFP_KERNEL|__GFP_ZERO"), Some(0xdc0));
    assert_eq!(gfp::parse("GFP_HIGHUSER_MOVABLE|__GFP_COMP"), Some(0x140cca));
    assert_eq!(gfp::parse("GFP_ATOMIC|__GFP_NOWARN"), Some(0x2820));
    assert_eq!(gfp::parse("GFP_NOWAIT"), Some(0x2800));
    assert_eq!(gfp::parse("GFP_TRANSHUGE_LIGHT"), Some(0x1c20ca));
    assert_eq!(gfp::parse("0xcc0|256"), Some(0xdc0));
    assert_eq!(gfp::parse("none"), Some(0));
    assert_eq!(gfp::parse("GFP_KERNEL|GFP_ZERO"), Some(0xdc0));
    assert_eq!(gfp::parse("GFP_KERNEL|"), None);
    assert_eq!(gfp::parse("GFP_SOMETHING"), None);
}

#[test]
fn unusable_index_is_the_share_in_smaller_blocks() {
    assert_eq!(unusable_index(&[4, 0, 1, 1], 0), 0.0);
    assert_eq!(unusable_index(&[4, 0, 1, 1], 1), 0.25);
    assert_eq!(unusable_index(&[4, 0, 1, 1], 3), 0.5);
    assert_eq!(unusable_index(&[4, 0, 1, 1], 4), 1.0);
    assert_eq!(unusable_index(&[0, 0], 1), 0.0);
}

#[test]
fn the_end_is_read_where_there_is_one() {
    let mut recording = Recording { meta: Meta::new("x", "text"), rows: Vec::new() };
    assert_eq!(recording.linux_end().unwrap(), None);
    recording.meta.files.insert("end/buddyinfo".into(), BUDDYINFO.into());
    recording.meta.files.insert("end/zoneinfo".into(), ZONEINFO.into());
    let end = recording.linux_end().unwrap().unwrap();
    assert_eq!((end.total.clone(), end.free_frames(), end.pcp_frames()), (vec![5, 5, 8], 47, 19));
    recording.meta.files.insert("buddyinfo.traced_end".into(), "damaged\n".into());
    let error = recording.linux_end().unwrap_err();
    assert_eq!((error.file.as_str(), error.place), ("buddyinfo.traced_end", Place::Line(1)));
}

const SLABINFO: &str = "\
slabinfo - version: 2.1
# name            <active_objs> <num_objs> <objsize> <objperslab> <pagesperslab> : tunables <limit> <batchcount>
dentry              1323   1344    192   21    1 : tunables    0    0    0 : slabdata     64     64      0
task_struct           70     75   6208    5    8 : tunables    0    0    0 : slabdata     15     15      0
";

#[test]
fn slabinfo() {
    let info = Slabinfo::parse(SLABINFO, "slabinfo").unwrap();
    let dentry = SlabCache {
        name: "dentry".to_owned(),
        active_objects: 1323,
        objects: 1344,
        size: 192,
        objects_per_slab: 21,
        frames_per_slab: 1,
        slabs: 64,
    };
    assert_eq!((info.caches.len(), &info.caches[0]), (2, &dentry));
    assert_eq!((info.caches[1].frames(), info.frames()), (120, 184));
    let head = "slabinfo - version: 2.1\n# name\n";
    let line = |numbers: &str, slabs: &str| {
        format!("{head}x {numbers} : tunables 0 0 0 : slabdata {slabs}\n")
    };
    let cases = [
        (String::new(), 1),
        ("slabinfo - version: 3.0\n".to_owned(), 1),
        (head.to_owned(), 1),
        (line("1 2 8 512", "1 1 0"), 3),
        (line("1 2 8 512 1", "1 1"), 3),
        (line("1 2 8 512 1", "1 x 0"), 3),
        (line("-1 2 8 512 1", "1 1 0"), 3),
        (line("3 2 8 512 1", "1 1 0"), 3),
        (line("1 600 8 512 1", "1 1 0"), 3),
        (line("1 2 8 512 1", "1 18446744073709551615 0"), 3),
        (line("1 2 8 512 1024", "1 1073741825 0"), 3),
        (line("1 2 8 512 1", "1 1 0").replace("tunables", "tuna"), 3),
        (
            format!(
                "{}x 0 0 8 512 1 : tunables 0 0 0 : slabdata 0 0 0\n",
                line("1 2 8 512 1", "1 1 0")
            ),
            4,
        ),
        (SLABINFO.replace("task", "\n\ntask").replace("8 : t", "8 t"), 6),
    ];
    for (text, line) in cases {
        let place = Slabinfo::parse(&text, "slabinfo").unwrap_err().place;
        assert_eq!(place, Place::Line(line), "{text:?}");
    }
}

#[test]
fn vmallocinfo() {
    let text = "\
0x(____ptrval____)-0x(____ptrval____)   20480 kernel_clone+0xc2/0x430 pages=4 vmalloc N0=4
0xffffc90000008000-0xffffc9000000a000    8192 hpet_enable+0x9e/0x500 phys=0x00000000fed00000 ioremap
0x00000000554b6d44-0x000000002d6b20a3   12288 unpurged vm_area
0x00000000554b6d44-0x000000002d6b20a3   16384 vm_map_ram
";
    let info = Vmallocinfo::parse(text, "vmallocinfo").unwrap();
    let expected = [
        (20480, 4, AreaKind::Vmalloc),
        (8192, 0, AreaKind::Ioremap),
        (12288, 0, AreaKind::Unpurged),
        (16384, 0, AreaKind::Other),
    ];
    let expected = expected.map(|(bytes, pages, kind)| VmArea { bytes, pages, kind });
    assert_eq!(info.areas, expected);
    assert_eq!(info.in_use().count(), 3);
    for (text, line) in [
        ("", 1),
        ("0x1-0x2\n", 1),
        ("0x1-0x2 20480 vmalloc\n1-2 20480\n", 2),
        ("0x1-0x2 many\n", 1),
        ("0x1-0x2 8192 pages=x vmalloc\n", 1),
        ("0x1-0x2 18446744073709551615 vmalloc\n", 1),
    ] {
        let error = Vmallocinfo::parse(text, "vmallocinfo").unwrap_err();
        assert_eq!(error.place, Place::Line(line), "{text:?}");
    }
}
