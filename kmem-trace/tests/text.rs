//! Texts of `perf script`, `trace-cmd report` and ftrace are read; what is not understood is refused at its line.

use proptest::prelude::*;

use kmem_trace::{Kind, Meta, NO_STACK, PageOp, Place, Recording, TraceError, text};

fn read(text: &str) -> Result<Recording, TraceError> {
    text::read(text.as_bytes(), "x.txt", Meta::new("x", "text"))
}

const PERF: &str = "\
 sh   812 [001]   100.000001:     kmem:mm_page_alloc: page=0xffffea0000048d00 pfn=0x1234 order=0 migratetype=1 gfp_flags=GFP_HIGHUSER_MOVABLE|__GFP_COMP
        ffffffff81234567 __alloc_pages_noprof+0x1 ([kernel.kallsyms])
        ffffffff81234999 do_anonymous_page+0x1 ([kernel.kallsyms])

 a [0] b   812 [000]   100.000003:           kmem:kmalloc: call_site=single_open+0x2a/0xb0 ptr=0xffff888003c21a80 bytes_req=32 bytes_alloc=32 gfp_flags=GFP_KERNEL_ACCOUNT|__GFP_ZERO node=-1 accounted=true
 sh   812 [001]   100.000002:             kmem:kfree: call_site=seq_release+0x1 ptr=0xffff888003c21a80
 sh   812 [001]   100.000900:   kmem:kmem_cache_free: call_site=putname+0x4f/0x60 ptr=0xffff888001234000 name=names_cache
 sh   812 [001]   101.000001:      kmem:mm_page_free: page=0xffffea0000048d00 pfn=0x1234 order=0
 sh   812 [001]   101.000002: kmem:mm_page_free_batched: page=0xffffea0000048d00 pfn=0x1234 order=0
";

#[test]
fn perf_script_is_read() {
    let recording = read(PERF).unwrap();
    let rows = &recording.rows;
    let kinds: Vec<Kind> = rows.iter().map(|row| row.kind).collect();
    assert_eq!(
        kinds,
        [Kind::PageAlloc, Kind::Kmalloc, Kind::Kfree, Kind::CacheFree, Kind::PageFree]
    );
    assert_eq!(
        rows.iter().map(|row| row.time_ns).collect::<Vec<_>>(),
        [0, 2000, 1000, 899_000, 1_000_000_000]
    );
    assert_eq!(
        rows.iter().map(|row| row.id).collect::<Vec<_>>(),
        [Some(0), Some(1), Some(1), None, Some(0)]
    );
    assert_eq!((rows[0].address, rows[0].migratetype, rows[0].gfp), (0x1234, 1, 0x140cca));
    assert_eq!(
        (rows[0].bytes_allocated, rows[0].bytes_requested, rows[0].stack()),
        (4096, NO_STACK, None)
    );
    assert_eq!((rows[1].cpu, rows[1].bytes_requested, rows[1].gfp), (0, 32, 0x0040_0dc0));
    assert_eq!(recording.meta.site(rows[1].site), "single_open");
    assert_eq!(recording.meta.caches[&rows[3].cache.unwrap()].name, "names_cache");
    assert_eq!(
        recording.meta.counts["skipped mm_page_free_batched of a frame mm_page_free has freed"],
        1
    );
    assert_eq!(recording.meta.cpus, 2);
}

const FTRACE: &str = "\
# tracer: nop
#
#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION
           <...>-77      [003] d..2. 17.5: mm_page_alloc: page=00000000d2a1b7c4 pfn=0x80 order=2 migratetype=0 gfp_flags=GFP_KERNEL|0x1000000
 kworker/u4:1-9 ( 9)     [000] ..... 17.600000001: mm_page_pcpu_drain: page=00000000d2a1b7c4 pfn=0x90 order=0 migratetype=0
              cat-77     [003] ..... 17.700000: mm_page_free: page=00000000d2a1b7c4 pfn=0x82 order=0
 => __free_pages
CPU:1 [LOST 35 EVENTS]
              cat-77     [003] ..... 17.800000: mm_page_free_batched: page=00000000d2a1b7c4 pfn=0x81 order=0
              cat-77     [003] ..... 17.900000: mm_page_alloc: page=(nil) pfn=0xffffffffffffffff order=9 migratetype=1 gfp_flags=GFP_TRANSHUGE_LIGHT
              cat-77     [003] ..... 17.900000: kmalloc: call_site=f+0x1/0x2 ptr=  (null) bytes_req=8 bytes_alloc=8 gfp_flags=none node=0 accounted=false
";

/// Frames of a larger block freed one by one: the block is split until the frame has a block of its own.
#[test]
fn ftrace_is_read_and_blocks_are_split_where_a_part_is_freed() {
    let recording = read(FTRACE).unwrap();
    let ops: Vec<(u64, u8, PageOp)> =
        recording.page_events().map(|e| (e.pfn, e.order, e.op)).collect();
    assert_eq!(
        ops,
        [
            (0x80, 2, PageOp::Alloc { id: 0 }),
            (0x80, 2, PageOp::Split { id: 0, first: 1, second: 2 }),
            (0x82, 1, PageOp::Split { id: 2, first: 3, second: 4 }),
            (0x82, 0, PageOp::Free { id: 3 }),
            (0x80, 1, PageOp::Split { id: 1, first: 5, second: 6 }),
            (0x81, 0, PageOp::Free { id: 6 }),
        ]
    );
    assert_eq!(recording.rows[0].gfp, 0x0100_0cc0);
    assert_eq!((recording.meta.lost, recording.meta.cpus, recording.ids()), (35, 4, 7));
    for skipped in ["mm_page_pcpu_drain", "mm_page_alloc that failed", "kmalloc that failed"] {
        assert_eq!(recording.meta.counts[&format!("skipped {skipped}")], 1, "{skipped}");
    }
}

#[test]
fn lost_events_are_counted_in_every_tools_words() {
    let event = "cat-1 [001] 1.0: kfree: call_site=f ptr=0x1\n";
    for (line, lost) in [
        ("CPU:1 [LOST 35 EVENTS]", 35),
        ("CPU:11 [7 EVENTS DROPPED]", 7),
        ("CPU:0 [EVENTS DROPPED]", 1),
        (" cat 1 [001] 1.0: PERF_RECORD_LOST lost 12", 12),
    ] {
        assert_eq!(read(&format!("{event}{line}\n{event}")).unwrap().meta.lost, lost, "{line}");
    }
}

#[test]
fn a_split_recording_survives_the_container() {
    let recording = read(FTRACE).unwrap();
    let bytes = kmem_trace::kmr::write(&recording, 1).unwrap();
    assert_eq!(kmem_trace::kmr::read(&bytes, "x.kmr").unwrap(), recording);
}

#[test]
fn a_line_that_is_not_understood_is_named() {
    let cases = [
        ("cat-1 [001] 1.0: kfree: call_site=f\n", "no ptr"),
        ("cat-1 [001] 1.0: kfree: call_site=f ptr=(____ptrval____)\n", "not a pointer"),
        ("cat-1 [001] 1.0: mm_page_free: page=1 pfn=zz order=0\n", "pfn=zz"),
        ("cat-1 [001] 1.0: mm_page_free: page=1 pfn=0x11 order=4\n", "cannot begin at pfn 0x11"),
        ("cat-1 [001] 1.0: mm_page_free: page=1 pfn=0x0 order=60\n", "order 60"),
        (
            "cat-1 [001] 1.0: mm_page_alloc: page=1 pfn=1 order=0 migratetype=9 gfp_flags=GFP_KERNEL\n",
            "mobility type 9",
        ),
        (
            "cat-1 [001] 1.0: mm_page_alloc: page=1 pfn=1 order=0 migratetype=1 gfp_flags=GFP_MAGIC\n",
            "GFP_MAGIC",
        ),
        ("cat 1 1.0: kmem:kfree: call_site=f ptr=0x1\n", "needs -a"),
        ("once upon a time\n", "no event"),
        ("cat-1 [001] 1.0: kfree: call_site=f ptr=0x5", "cut short"),
    ];
    for (line, what) in cases {
        let error = read(&format!("# comment\n\n{line}")).unwrap_err();
        assert_eq!(error.place, Place::Line(3), "{error}");
        assert!(error.what.contains(what), "{error}");
    }
    assert!(read("# nothing but comments\n").unwrap_err().what.contains("no kmem event"));
    assert!(read("").unwrap_err().what.contains("empty"));
    let error = text::read(b"# x\n\xff\xfe", "x", Meta::new("x", "text")).unwrap_err();
    assert_eq!(error.place, Place::Line(2));
}

#[test]
fn binary_forms_of_the_tools_are_told_by_name() {
    let folder = tempfile::tempdir().unwrap();
    for (bytes, command) in
        [(&b"PERFILE2\0\0"[..], "perf script"), (b"\x17\x08\x44tracing", "trace-cmd report")]
    {
        let path = folder.path().join("x");
        std::fs::write(&path, bytes).unwrap();
        assert!(Recording::open(&path).unwrap_err().what.contains(command));
    }
    assert_eq!(Recording::open(folder.path().join("none")).unwrap_err().place, Place::File);
}

#[test]
fn texts_beside_a_text_recording_are_read() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(folder.path().join("mine/start")).unwrap();
    std::fs::write(folder.path().join("mine/start/buddyinfo"), "Node 0, zone DMA 1\n").unwrap();
    std::fs::write(folder.path().join("mine.txt"), PERF).unwrap();
    let recording = Recording::open(folder.path().join("mine.txt")).unwrap();
    assert_eq!(recording.meta.name, "mine");
    assert_eq!(recording.meta.file("start/buddyinfo"), Some("Node 0, zone DMA 1\n"));
}

proptest! {
    /// Whatever the words of a line are, the reader returns, and any error names a line there is.
    #[test]
    fn any_text_is_read_or_refused(
        lines in prop::collection::vec(
            prop::collection::vec(
                prop::sample::select(vec![
                    "cat-1", "[001]", "[", "]", "1.5:", "99999999999999999999.1:", "mm_page_alloc:", "kmem:mm_page_free:",
                    "kmalloc:", "kfree:", "kmem_cache_free:", "name=x", "page=(nil)", "page=1", "pfn=0x8", "pfn=-1",
                    "pfn=0xfffffffffffffff8", "order=3", "order=0", "order=255", "migratetype=1", "gfp_flags=GFP_KERNEL",
                    "ptr=0x10", "ptr=", "bytes_req=8", "bytes_alloc=8", "bytes_alloc=99999999999", "call_site=f+0x1", "#",
                    "LOST", "CPU:1", "\u{e9}", "=>",
                ]),
                0..14,
            ),
            0..12,
        )
    ) {
        let text: String = lines.iter().map(|words| words.join(" ") + "\n").collect();
        match read(&text) {
            Ok(recording) => prop_assert!(recording.page_events().count() >= recording.rows.iter().filter(|row| row.kind.is_page()).count()),
            Err(error) => prop_assert!(matches!(error.place, Place::Line(line) if line <= lines.len().max(1) as u64)),
        }
    }
}
