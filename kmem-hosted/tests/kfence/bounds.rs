//! Accesses that fault.

use super::{assert_has, free, read, rig, sample, sample_at, write};

#[test]
fn a_read_behind_an_object_is_reported_and_goes_on() {
    let rig = rig(7);
    rig.run(|_| {
        let at = sample_at(&rig, 64, true);
        let behind = at.as_ptr().wrapping_add(64);
        let mark = rig.mark();
        read(behind);
        let report = rig.one_report(mark);
        let first = at.addr().get();
        assert_has(
            &report,
            &[
                "BUG: KFENCE: out-of-bounds read in 0x",
                &format!("Out-of-bounds read at {:#x} (1B right of kfence-#", first + 64),
                &format!("{first:#x}-{:#x}, size=64, cache=kmalloc-64", first + 63),
                "\n\nallocated on cpu 0 at ",
                "bounds.rs:",
            ],
        );
        assert!(!report.contains("freed"));
        // The page is there until the object is freed, and then no more.
        let mark = rig.mark();
        write(behind, 1);
        assert_eq!(rig.mark(), mark);
        free(&rig, at).unwrap();
        write(behind, 1);
        assert_has(
            &rig.one_report(mark),
            &["BUG: KFENCE: invalid write in 0x", "Invalid write at"],
        );
        assert_eq!(rig.kfence_stats().unwrap().bugs, 2);
    });
}

#[test]
fn a_write_before_an_object_is_reported() {
    let rig = rig(7);
    rig.run(|_| {
        let at = sample_at(&rig, 100, false);
        let mark = rig.mark();
        write(at.as_ptr().wrapping_sub(3), 7);
        assert_has(
            &rig.one_report(mark),
            &["BUG: KFENCE: out-of-bounds write in 0x", "(3B left of kfence-#", "size=100"],
        );
        // What was written there is gone with the page.
        free(&rig, at).unwrap();
        assert_eq!(read(at.as_ptr().wrapping_sub(3)), 0);
    });
}

#[test]
fn of_two_neighbours_the_nearer_is_named() {
    let rig = rig(3);
    rig.run(|_| {
        let mut held: Vec<_> = (0..3).map(|_| sample(&rig, 4096)).collect();
        held.sort();
        let (low, high) = (held[0], held[1]);
        assert_eq!(high.addr().get() - low.addr().get(), 8192, "a guard lies between them");
        let mark = rig.mark();
        read(high.as_ptr().wrapping_sub(10));
        assert_has(&rig.one_report(mark), &["(10B left of kfence-#1)"]);
        held.into_iter().for_each(|at| free(&rig, at).unwrap());
        let held: Vec<_> = (0..3).map(|_| sample(&rig, 4096)).collect();
        let mark = rig.mark();
        read(low.as_ptr().wrapping_add(4096 + 10));
        assert_has(&rig.one_report(mark), &["(11B right of kfence-#0)"]);
        held.into_iter().for_each(|at| free(&rig, at).unwrap());
    });
}

#[test]
fn a_use_after_free_is_reported_with_both_users() {
    let rig = rig(7);
    rig.run(|_| {
        let at = sample(&rig, 200);
        free(&rig, at).unwrap();
        let mark = rig.mark();
        write(at.as_ptr().wrapping_add(5), 1);
        assert_has(
            &rig.one_report(mark),
            &[
                "BUG: KFENCE: use-after-free write in 0x",
                &format!("Use-after-free write at {:#x} (in kfence-#", at.addr().get() + 5),
                "size=200, cache=kmalloc-256",
                "\n\nallocated on cpu 0 at ",
                "\n\nfreed on cpu 0 at ",
            ],
        );
        // The page's next object is none the worse for it.
        let mark = rig.mark();
        let mut held: Vec<_> = (0..6).map(|_| sample(&rig, 200)).collect();
        held.push(sample(&rig, 200));
        assert!(held.iter().any(|next| next.addr().get() / 4096 == at.addr().get() / 4096));
        held.into_iter().for_each(|at| free(&rig, at).unwrap());
        assert_eq!(rig.mark(), mark);
        // And faults again once it is free.
        read(at.as_ptr());
        assert_has(&rig.one_report(mark), &["BUG: KFENCE: use-after-free read in 0x"]);
    });
}

#[test]
fn pages_that_were_never_used_are_nobodys() {
    let rig = rig(7);
    rig.run(|_| {
        let at = sample(&rig, 8);
        free(&rig, at).unwrap();
        let mark = rig.mark();
        // The first object's page is the third; the last page is a guard.
        let page = |n: usize| at.as_ptr().map_addr(|a| a / 4096 * 4096).wrapping_add(n * 4096);
        read(page(6));
        read(page(5));
        let reports = rig.since(mark);
        assert_eq!(reports.len(), 2);
        reports.iter().for_each(|(_, r)| assert_has(r, &["BUG: KFENCE: invalid read in 0x"]));
    });
}

/// How a forked child that does `f` ends.
fn ends_by(f: impl FnOnce()) -> i32 {
    // SAFETY: the child does what `f` does and ends.
    let pid = unsafe { libc::fork() };
    if pid == 0 {
        f();
        // SAFETY: ends the process.
        unsafe { libc::_exit(0) }
    }
    let mut status = 0;
    // SAFETY: the child's number, and a place for its status.
    while unsafe { libc::waitpid(pid, &raw mut status, 0) } == -1 {}
    if libc::WIFSIGNALED(status) { libc::WTERMSIG(status) } else { 0 }
}

#[test]
fn other_faults_have_their_usual_end() {
    let rig = rig(3);
    let nowhere = std::ptr::without_provenance::<u8>(8);
    assert_eq!(ends_by(|| _ = read(nowhere)), libc::SIGSEGV);
    // A hole of the machine's direct map, which is not the pool's.
    let last = kmem::Pfn((64 * kmem_test_support::MIB / 4096 - 1) as u32);
    let page = kmem::platform::Platform::direct_map(rig.hosted(), last).unwrap();
    let beyond = page.as_ptr().wrapping_add(4096 * 16);
    assert_eq!(ends_by(|| _ = read(beyond)), libc::SIGSEGV);
}

#[test]
fn where_misuses_are_fatal_the_access_does_not_go_on() {
    let rig = rig(3);
    let at = rig.run(|_| {
        let at = sample(&rig, 32);
        free(&rig, at).unwrap();
        at
    });
    rig.set_panic_on_misuse(true);
    assert_eq!(ends_by(|| _ = read(at.as_ptr())), libc::SIGSEGV);
    rig.set_panic_on_misuse(false);
}
