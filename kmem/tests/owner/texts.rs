//! The texts: `page_owner` to the letter and as the kernel's own tool reads it, and the pages of `allocinfo`.

use crate::noting;
use kmem::{
    Config, Gfp, Kmem, MigrateType, Pfn,
    context::{Comm, Task},
    memblock::Memblock,
    platform::Platform,
    zone::Layout,
};
use kmem_hosted::Machine;
use kmem_test_support::Plain;
use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::Ordering::SeqCst,
};

/// A small machine whose time stands still; its pages are to be found in `page_owner`.
fn small() -> Kmem<Plain<12>> {
    let mut boot = Memblock::new();
    boot.add(0, 8 << 20, 0).unwrap();
    let config = Config { page_owner: true, layout: Layout::flat(), ..Config::default() };
    let m = Kmem::bring_up(Plain::new(2048, 2), boot, &config).unwrap();
    (0..2).for_each(|cpu| m.cpu_online(cpu));
    m
}

#[test]
fn page_owner_to_the_letter() {
    let m = small();
    Plain::<12>::be_cpu(1);
    let cpu = m.platform().this_cpu().unwrap();
    let task = Task::new();
    task.set_pid(1234);
    task.set_comm(Comm::new("cp (2)"));
    m.set_pageblock_migratetype(Pfn(1024), MigrateType::Unmovable);
    m.platform().now_ns.store(20_000_000_123, SeqCst);
    m.alloc_pages_at(Pfn(0x400), 4, Gfp::KERNEL | Gfp::COMP).unwrap();
    let first = line!() - 1;
    // SAFETY: the task stays until it is taken off below.
    unsafe { cpu.set_current(&task) };
    m.platform().now_ns.store(20_000_500_000, SeqCst);
    let user = m.alloc_pages_at(Pfn(0x7f3), 0, Gfp::HIGHUSER_MOVABLE).unwrap();
    let second = line!() - 1;
    user.set_flags(
        kmem::PageFlags::DIRTY | kmem::PageFlags::UPTODATE | kmem::PageFlags::SWAPBACKED,
    );
    // SAFETY: as above.
    unsafe { cpu.set_current(std::ptr::null()) };
    let mut text = String::new();
    m.write_page_owner(&mut text).unwrap();
    let file = file!();
    assert_eq!(
        text,
        format!(
            "\
Page allocated via order 4, mask 0x40cc0(GFP_KERNEL|__GFP_COMP), pid 0, tgid 0 (swapper/1), ts 20000000123 ns
PFN 0x400 type Unmovable Block 2 type Unmovable Flags 0x10000000000040(head|node=0|zone=2)
 {file}:{first}:7

Page allocated via order 0, mask 0x100cca(GFP_HIGHUSER_MOVABLE), pid 1234, tgid 1234 (cp (2)), ts 20000500000 ns
PFN 0x7f3 type Movable Block 3 type Movable Flags 0x10000000020018(uptodate|dirty|swapbacked|node=0|zone=2)
 {file}:{second}:18

"
        )
    );
}

/// The kernel's `page_owner_sort`, built from the distribution's kernel source where that is installed.
fn page_owner_sort(dir: &Path) -> Option<PathBuf> {
    let sources = fs::read_dir("/usr/src").into_iter().flatten().flatten().map(|e| e.path());
    let is_source = |p: &PathBuf| {
        let name = p.file_name().unwrap_or_default().to_string_lossy().into_owned();
        name.starts_with("linux-source-") && name.ends_with(".tar.xz")
    };
    let Some(source) = sources.into_iter().find(is_source) else {
        eprintln!(
            "SKIPPED: page_owner_sort on our text: no kernel source (package linux-source-6.12)"
        );
        return None;
    };
    let member = "tools/mm/page_owner_sort.c";
    let mut tar = Command::new("tar");
    tar.arg("-C").arg(dir).args(["--wildcards", "--strip-components=3", "--occurrence", "-xJf"]);
    let unpacked = tar.arg(&source).arg(format!("*/{member}")).output().unwrap();
    assert!(unpacked.status.success(), "{}", String::from_utf8_lossy(&unpacked.stderr));
    let tool = dir.join("page_owner_sort");
    let mut compiler = Command::new("cc");
    compiler.args(["-O1", "-w", "-o"]).arg(&tool).arg(dir.join("page_owner_sort.c"));
    match compiler.output() {
        Ok(out) if out.status.success() => Some(tool),
        Ok(out) => panic!("{}", String::from_utf8_lossy(&out.stderr)),
        Err(e) => {
            eprintln!("SKIPPED: page_owner_sort on our text: no C compiler ({e})");
            None
        }
    }
}

#[test]
fn the_kernels_page_owner_sort_reads_it() {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("owner-{}", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    if let Some(tool) = page_owner_sort(&dir) {
        let rig = noting();
        let tasks = [(10, "ten"), (20, "twenty")].map(|(pid, name)| {
            let task = Task::new();
            task.set_pid(pid);
            task.set_comm(Comm::new(name));
            task
        });
        let mut blocks = Vec::new();
        rig.run_as(&tasks[0], |_| blocks.extend((0..6).map(|_| rig.take(Gfp::KERNEL, 1).unwrap())));
        rig.run_as(&tasks[1], |_| blocks.push(rig.take(Gfp::USER, 5).unwrap()));
        let mut text = String::new();
        rig.write_page_owner(&mut text).unwrap();
        fs::write(dir.join("in"), &text).unwrap();
        let sorted = |args: &[&str]| {
            let run =
                Command::new(&tool).args(args).arg(dir.join("in")).arg(dir.join("out")).output();
            let run = run.unwrap();
            assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
            fs::read_to_string(dir.join("out")).unwrap()
        };
        // Culled by process, most memory first.
        let culled = sorted(&["-m", "--cull", "pid,name"]);
        let heads: Vec<_> = culled.lines().filter(|l| l.contains(" times, ")).collect();
        assert!(
            heads[0].starts_with("1 times, 32 pages") && heads[0].contains("PID 20"),
            "{culled}"
        );
        assert!(
            heads[1].starts_with("6 times, 12 pages") && heads[1].contains("PID 10"),
            "{culled}"
        );
        assert_eq!(heads.len(), 2);
        // Only one task's.
        let ten = sorted(&["--name", "ten"]);
        assert!(ten.contains("(ten)") && !ten.contains("(twenty)"));
        rig.run(|_| rig.release(blocks));
    }
    fs::remove_dir_all(&dir).unwrap();
}

/// The lines of allocinfo: bytes, calls, file, line.
fn tags(m: &Machine) -> Vec<(u64, u64, String, u32)> {
    let mut text = String::new();
    m.write_allocinfo(&mut text).unwrap();
    let of = |line: &str| {
        let mut words = line.split_whitespace();
        let (bytes, calls) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        let (file, line) = words.next()?.rsplit_once(':')?;
        Some((bytes, calls, file.to_owned(), line.parse().ok()?))
    };
    text.lines().skip(2).map(|line| of(line).unwrap()).collect()
}

#[test]
fn allocinfo_counts_pages_by_call_site_and_a_large_object_once() {
    let rig = noting();
    rig.run(|_| {
        rig.set_alloc_tags(Some(100)).unwrap();
        let many: Vec<_> = (0..5).map(|_| rig.alloc_pages(Gfp::KERNEL, 2).unwrap()).collect();
        let pages = line!() - 1;
        let large = rig.kmalloc(20_000, Gfp::KERNEL).unwrap();
        let object = line!() - 1;
        let small = rig.kmalloc(100, Gfp::KERNEL).unwrap();
        let mine = || {
            let mine = tags(&rig).into_iter().filter(|tag| tag.2.ends_with("owner/texts.rs"));
            let mut mine: Vec<_> =
                mine.map(|(bytes, calls, _, line)| (line, bytes, calls)).collect();
            mine.sort_unstable();
            mine
        };
        let small_at = (object + 2, 128, 1);
        assert_eq!(mine(), [(pages, 5 * 16384, 5), (object, 32_768, 1), small_at]);
        // Slabs are the slab layer's, and everything is counted.
        let slabs: u64 = tags(&rig).iter().filter(|t| t.2.contains("src/slab/")).map(|t| t.0).sum();
        let owned: u64 = held_bytes(&rig);
        assert_eq!(slabs + 5 * 16384 + 32_768, owned);
        rig.split_page(many[0], 2).unwrap();
        assert_eq!(mine()[0], (pages, 5 * 16384, 8));
        let first = rig.page_to_pfn(many[0]).unwrap();
        rig.release((0..4).map(|n| (Pfn(first.0 + n), 0)));
        assert_eq!(mine()[0], (pages, 4 * 16384, 4));
        many[1..].iter().for_each(|page| rig.__free_pages(page, 2).unwrap());
        // SAFETY: not used after.
        unsafe { rig.kfree(large.as_ptr()).unwrap() };
        assert_eq!(mine(), [small_at]);
        rig.set_alloc_tags(None).unwrap();
        assert_eq!(tags(&rig), []);
        // SAFETY: not used after.
        unsafe { rig.kfree(small.as_ptr()).unwrap() };
    });
}

fn held_bytes(m: &Machine) -> u64 {
    crate::held(m).iter().map(|owner| 4096 << owner.order).sum()
}
