//! The distribution's `free`, `vmstat -s` and `slabtop -o` on a machine's texts, put in the place of the kernel's in a mount
//! namespace of their own.

use crate::{recorded, text};
use kmem::{
    Gfp,
    page_state::{NodeStat, SystemStat},
};
use kmem_hosted::Machine;
use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

const MOUNT_AND_RUN: &str = r#"
for text in "$1"/*; do mount --bind "$text" "/proc/${text##*/}" || exit 99; done
shift
exec "$@"
"#;

/// Whether a test can run: mount namespaces are allowed and the tool exists. Says so aloud if not.
fn possible(tool: &str) -> bool {
    let ran = |command: &mut Command| command.output().is_ok_and(|out| out.status.success());
    if !ran(Command::new("unshare").args(["-rm", "true"])) {
        eprintln!("SKIPPED: {tool} on our /proc texts: mount namespaces are not allowed here");
        return false;
    }
    if !ran(Command::new(tool).arg("--version")) {
        eprintln!("SKIPPED: {tool} on our /proc texts: it is not installed (package procps)");
        return false;
    }
    true
}

/// A directory of one test's own.
fn directory(test: &str) -> PathBuf {
    let dir =
        Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("proc-{test}-{}", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    dir
}

/// Runs a tool on the machine's `meminfo` and `vmstat` and returns what it prints.
fn run(m: &Machine, test: &str, command: &[&str]) -> String {
    let dir = directory(test);
    fs::write(dir.join("meminfo"), text(|w| m.write_meminfo(w))).unwrap();
    fs::write(dir.join("vmstat"), text(|w| m.write_vmstat(w))).unwrap();
    if Path::new("/proc/slabinfo").exists() {
        fs::write(dir.join("slabinfo"), text(|w| m.write_slabinfo(w))).unwrap();
    }
    let out = Command::new("unshare")
        .args(["-rm", "sh", "-c", MOUNT_AND_RUN, "sh"])
        .arg(&dir)
        .args(command)
        .env("LC_ALL", "C")
        .output()
        .unwrap();
    fs::remove_dir_all(&dir).unwrap();
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success() && stderr.is_empty(), "{command:?}: {}: {stderr}", out.status);
    String::from_utf8(out.stdout).unwrap()
}

/// A machine with something in every column: frames in kB as given.
fn busy() -> Machine {
    let m = recorded();
    let kb = |n: i64| n / 4;
    m.mod_system_state(SystemStat::Buffers, kb(1236));
    m.mod_system_state(SystemStat::SwapTotal, kb(200_000));
    m.mod_system_state(SystemStat::SwapFree, kb(150_004));
    for (stat, n) in [
        (NodeStat::FilePages, 52_348),
        (NodeStat::Shmem, 7_112),
        (NodeStat::Swapcache, 512),
        (NodeStat::SlabReclaimable, 9_004),
        (NodeStat::SlabUnreclaimable, 3_000),
        (NodeStat::ActiveAnon, 11_000),
        (NodeStat::ActiveFile, 20_008),
        (NodeStat::InactiveAnon, 5_000),
        (NodeStat::InactiveFile, 25_228),
    ] {
        assert!(m.mod_node_page_state(0, stat, kb(n)));
    }
    // Blocks of every kind, and enough of them for all those uses.
    for order in [0, 3, 7, 9].into_iter().chain([10; 24]) {
        m.run(|_| m.alloc_pages(Gfp::KERNEL, order).map(|_| ())).unwrap().unwrap();
    }
    m
}

/// The rows of `free`, without their labels.
fn rows(out: &str) -> Vec<Vec<u64>> {
    let mut lines = out.lines();
    assert_eq!(
        lines.next().unwrap().split_whitespace().collect::<Vec<_>>(),
        ["total", "used", "free", "shared", "buff/cache", "available"]
    );
    lines
        .zip(["Mem:", "Swap:"])
        .map(|(line, label)| {
            let row = line.strip_prefix(label).unwrap_or_else(|| panic!("{line}"));
            row.split_whitespace().map(|n| n.parse().unwrap()).collect()
        })
        .collect()
}

/// What `free` should say, in kB.
fn expected(m: &Machine) -> Vec<Vec<u64>> {
    let (total, free) = (m.totalram_pages() * 4, m.nr_free_pages() * 4);
    let available = m.si_mem_available() * 4;
    let cached = 52_348 - 1_236 - 512;
    let mem = vec![total, total - available, free, 7_112, 1_236 + cached + 9_004, available];
    vec![mem, vec![200_000, 200_000 - 150_004, 150_004]]
}

#[test]
fn free_says_what_the_machine_says() {
    if !possible("free") {
        return;
    }
    let m = busy();
    for (option, scale) in [("-b", |kb| kb * 1024), ("-k", |kb| kb), ("-m", |kb: u64| kb / 1024)]
        as [(&str, fn(u64) -> u64); 3]
    {
        let want: Vec<Vec<u64>> =
            expected(&m).into_iter().map(|row| row.into_iter().map(scale).collect()).collect();
        assert_eq!(rows(&run(&m, "free", &["free", option])), want, "free {option}");
    }
}

#[test]
fn free_sees_allocations() {
    if !possible("free") {
        return;
    }
    let m = busy();
    let before = rows(&run(&m, "before", &["free", "-k"]));
    for _ in 0..16 {
        m.run(|_| m.alloc_pages(Gfp::KERNEL, 10).map(|_| ())).unwrap().unwrap();
    }
    let after = rows(&run(&m, "after", &["free", "-k"]));
    let taken = 16 * 4096;
    assert_eq!(after[0][1], before[0][1] + taken, "used");
    assert_eq!(after[0][2], before[0][2] - taken, "free");
    assert_eq!(after[0][5], before[0][5] - taken, "available");
    assert_eq!(after[0][0], before[0][0], "total");
}

#[test]
fn vmstat_s_says_what_the_machine_says() {
    if !possible("vmstat") {
        return;
    }
    let m = busy();
    let out = run(&m, "vmstat", &["vmstat", "-s"]);
    let shown: HashMap<&str, u64> = out
        .lines()
        .map(|line| {
            let (n, label) = line.trim_start().split_once(' ').unwrap();
            (label, n.parse().unwrap())
        })
        .collect();
    let mem = &expected(&m)[0];
    for (label, kb) in [
        ("K total memory", mem[0]),
        ("K used memory", mem[1]),
        ("K active memory", 11_000 + 20_008),
        ("K inactive memory", 5_000 + 25_228),
        ("K free memory", mem[2]),
        ("K buffer memory", 1_236),
        ("K swap cache", 52_348 - 1_236 - 512 + 9_004),
        ("K total swap", 200_000),
        ("K used swap", 200_000 - 150_004),
        ("K free swap", 150_004),
        // The host's are not zero.
        ("K paged in", 0),
        ("K paged out", 0),
        ("pages swapped in", 0),
        ("pages swapped out", 0),
    ] {
        assert_eq!(shown.get(label), Some(&kb), "{label}: {out}");
    }
    // From the kernel's own `stat`, which is left in place.
    assert!(shown["boot time"] > 0 && shown["forks"] > 0);
}

#[test]
fn slabtop_says_what_the_machine_says() {
    if !possible("slabtop") {
        return;
    }
    if !Path::new("/proc/slabinfo").exists() {
        eprintln!("SKIPPED: slabtop on our /proc texts: this kernel has no slabinfo");
        return;
    }
    let m = busy();
    m.run(|_| {
        let held: Vec<_> = (0..5000).map(|_| m.kmalloc(192, Gfp::KERNEL).unwrap()).collect();
        let out = run(&m, "slabtop", &["slabtop", "-o", "-s", "c"]);
        let row = out
            .lines()
            .find(|line| line.trim_end().ends_with(" kmalloc-192"))
            .unwrap_or_else(|| panic!("{out}"));
        let row: Vec<_> = row.split_whitespace().collect();
        let mut info = None;
        m.for_each_cache(|i| {
            if i.name.as_str() == "kmalloc-192" {
                info = Some(*i);
            }
        });
        let info = info.unwrap();
        // OBJS ACTIVE USE OBJ SIZE SLABS OBJ/SLAB CACHE SIZE NAME
        assert_eq!(row[0], info.objects.to_string(), "{out}");
        assert_eq!(row[1], info.active_objects.to_string(), "{out}");
        assert_eq!((row[3], row[4]), ("0.19K", info.slabs.to_string().as_str()), "{out}");
        assert_eq!(row[5], info.objects_per_slab.to_string(), "{out}");
        assert_eq!(row[6], format!("{}K", info.slabs * 4), "{out}");
        for at in held {
            // SAFETY: not used after.
            unsafe { m.kfree(at.as_ptr()).unwrap() };
        }
    })
    .unwrap();
}
