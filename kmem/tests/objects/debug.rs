//! Caches that look for mistakes: each kind is found, and its report names the object and who had it \[S5, S6, S7,
//! S9, D2\].

use super::{
    QUIET,
    stage::{Machine, be},
};
use kmem::{
    BringUpError, Config, Gfp, Kmem, Misuse,
    memblock::Memblock,
    slab::{DebugError, KmemCache, SlabFlags},
};
use kmem_test_support::{Plain, Rig};
use proptest::prelude::*;
use std::{
    collections::HashSet,
    panic::Location,
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    thread,
};

type M = Machine<12>;

const ALL: SlabFlags = SlabFlags::DEBUG;

fn machine(slab_debug: Option<&'static str>) -> M {
    M::new(&[8], Config { slab_debug, ..Config::default() })
}

fn cache<const S: u32>(m: &Machine<S>, name: &str, size: usize, flags: SlabFlags) -> KmemCache {
    m.kmem_cache_create(name, size, 0, flags, None).unwrap()
}

fn bytes(at: NonNull<u8>, n: usize) -> Vec<u8> {
    // SAFETY: callers name memory of the machine's, which stays mapped; nobody else uses it.
    unsafe { std::slice::from_raw_parts(at.as_ptr(), n) }.to_vec()
}

/// Writes where one may not.
fn poke(at: NonNull<u8>, offset: isize, byte: u8) {
    // SAFETY: memory of the machine's. What it does to the machine is what the tests are about.
    unsafe { at.offset(offset).write(byte) };
}

/// The line of the call, as reports name it.
#[track_caller]
fn here() -> String {
    let at = Location::caller();
    format!("{}:{}:", at.file(), at.line())
}

/// The one report since the last look, which names the object.
#[track_caller]
fn report(m: &M, at: NonNull<u8>) -> String {
    let reports = m.stage().take_reports();
    assert_eq!(reports.len(), 1, "{reports:?}");
    assert!(reports[0].contains(&format!("{:#x}", at.addr())), "{}", reports[0]);
    reports[0].clone()
}

/// Ends a test's cache: nothing but its quarantine is lost, and that goes with it.
#[track_caller]
fn end(m: &M, cache: KmemCache, quarantined: u64) {
    let audit = m.audit_objects().unwrap();
    assert_eq!((audit.live, audit.quarantined), (0, quarantined));
    m.kmem_cache_destroy(cache).unwrap();
    assert_eq!(m.audit_objects().unwrap().quarantined, 0);
}

#[test]
fn an_overrun_by_one_byte_is_found_when_the_object_is_freed() {
    for size in [1, 8, 13, 64, 100, 1000, 4096, 8192] {
        let m = machine(None);
        let c = cache(&m, "over", size, ALL);
        let (at, allocated) = (m.kmem_cache_alloc(&c, Gfp::KERNEL).unwrap(), here());
        poke(at, size as isize, 0x42);
        // SAFETY: not used after.
        let (refused, freed) = (unsafe { m.kmem_cache_free(&c, at) }, here());
        let addr = at.addr().get();
        assert!(
            matches!(refused, Err(Misuse::Overrun { addr: a, offset, found: 0x42, .. })
                if a == addr && offset == size as i32),
            "{refused:?}"
        );
        let text = report(&m, at);
        assert!(text.starts_with("BUG: Bad object: ") && text.contains("of over"), "{text}");
        assert!(text.contains(&format!("allocated at {allocated}")), "{text}");
        assert!(text.contains(&format!("freed at {freed}")), "{text}");
        assert!(text.contains(", on CPU 0, at 0.000000 s") && text.contains(" 42 "), "{text}");
        // It is not freed again, and nobody is given it.
        // SAFETY: it is found out.
        let again = unsafe { m.kmem_cache_free(&c, at) };
        assert!(matches!(again, Err(Misuse::ObjectFree { .. })), "{again:?}");
        let others: Vec<_> =
            (0..40).map(|_| m.kmem_cache_alloc(&c, Gfp::KERNEL).unwrap()).collect();
        assert!(!others.contains(&at));
        // SAFETY: not used after.
        unsafe { m.kmem_cache_free_bulk(&c, &others).unwrap() };
        end(&m, c, 1);
    }
}

#[test]
fn an_underrun_is_found_when_the_object_is_freed() {
    let m = machine(None);
    // Aligned so that the first object of a slab begins a line behind the slab.
    let c = m.kmem_cache_create("under", 100, 64, SlabFlags::RED_ZONE, None).unwrap();
    for by in 1..=8 {
        let at = m.kmem_cache_alloc(&c, Gfp::KERNEL).unwrap();
        poke(at, -by, 0);
        // SAFETY: not used after.
        let refused = unsafe { m.kmem_cache_free(&c, at) };
        assert!(
            matches!(refused, Err(Misuse::Underrun { offset, found: 0, .. }) if offset == -by as i32),
            "{by}: {refused:?}"
        );
        assert!(report(&m, at).contains("was underrun"));
    }
    end(&m, c, 8);
}

#[test]
fn a_write_after_free_is_found_when_the_object_comes_again() {
    let m = machine(None);
    let c = cache(&m, "after", 40, ALL);
    let anchor = m.kmem_cache_alloc(&c, Gfp::KERNEL).unwrap();
    let (at, allocated) = (m.kmem_cache_alloc(&c, Gfp::KERNEL).unwrap(), here());
    // SAFETY: used after, which is the point.
    let freed = unsafe {
        m.kmem_cache_free(&c, at).unwrap();
        here()
    };
    poke(at, 17, b'W');
    let per_slab = m.kmem_cache_info(&c).objects_per_slab;
    let held: Vec<_> =
        (0..per_slab).map(|_| m.kmem_cache_alloc(&c, Gfp::KERNEL).unwrap()).collect();
    assert!(!held.contains(&at), "it is not given out");
    let text = report(&m, at);
    assert!(text.contains("was written to after it was freed: 0x57 at byte 17"), "{text}");
    assert!(text.contains(&format!("allocated at {allocated}")), "{text}");
    // One line above: the call.
    let line: u32 = freed.trim_end_matches(':').rsplit(':').next().unwrap().parse().unwrap();
    assert!(text.contains(&format!("freed at {}:{}:", file!(), line - 1)), "{text}");
    assert!(text.contains("6b 57 6b") && text.contains("kWk"), "{text}");
    // SAFETY: not used after.
    unsafe {
        m.kmem_cache_free_bulk(&c, &held).unwrap();
        m.kmem_cache_free(&c, anchor).unwrap();
    }
    end(&m, c, 1);
}

#[test]
fn a_look_at_the_cache_finds_them_at_once() {
    let m = machine(None);
    let c = cache(&m, "looked", 64, ALL);
    let held: Vec<_> = (0..100).map(|_| m.kmem_cache_alloc(&c, Gfp::KERNEL).unwrap()).collect();
    let (live, freed) = (held[0], held[1]);
    // SAFETY: used after, which is the point.
    unsafe { m.kmem_cache_free(&c, freed).unwrap() };
    m.kmem_cache_validate(&c).unwrap();
    assert!(m.stage().take_reports().is_empty());
    poke(freed, 63, 0);
    let refused = m.kmem_cache_validate(&c);
    assert!(matches!(refused, Err(Misuse::WrittenAfterFree { offset: 63, .. })), "{refused:?}");
    report(&m, freed);
    assert_eq!(m.audit_objects().unwrap().quarantined, 1);
    m.kmem_cache_validate(&c).unwrap();
    // That of an object in use is its owner's to give back.
    poke(live, 66, 0);
    for _ in 0..2 {
        let refused = m.kmem_cache_validate(&c);
        assert!(matches!(refused, Err(Misuse::Overrun { offset: 66, .. })), "{refused:?}");
        report(&m, live);
    }
    assert_eq!(m.audit_objects().unwrap().quarantined, 1);
    // SAFETY: not used after.
    unsafe {
        assert!(m.kmem_cache_free(&c, live).is_err());
        m.kmem_cache_free_bulk(&c, &held[2..]).unwrap();
    }
    end(&m, c, 2);
}

#[test]
fn a_slab_that_is_given_back_is_looked_at() {
    let m = machine(None);
    let c = cache(&m, "leaving", 64, SlabFlags::POISON);
    let at = m.kmem_cache_alloc(&c, Gfp::KERNEL).unwrap();
    // SAFETY: used after, which is the point.
    unsafe { m.kmem_cache_free(&c, at).unwrap() };
    assert_eq!(m.kmem_cache_info(&c).slabs, 1, "some empty slabs stay for that");
    poke(at, 0, 0);
    assert_eq!(m.kmem_cache_shrink(&c), 1);
    assert!(report(&m, at).contains("at byte 0"));
    end(&m, c, 0);
}

#[test]
fn wrong_frees_tell_the_objects_story() {
    let m = machine(None);
    let (a, b) = (cache(&m, "mine", 64, ALL), cache(&m, "yours", 64, ALL));
    let (at, allocated) = (m.kmem_cache_alloc(&a, Gfp::KERNEL).unwrap(), here());
    // SAFETY: it is found out.
    let refused = unsafe { m.kmem_cache_free(&b, at) };
    assert!(matches!(refused, Err(Misuse::WrongCache { .. })), "{refused:?}");
    let text = report(&m, at);
    assert!(text.contains("of mine freed to yours"), "{text}");
    assert!(text.contains(&format!("allocated at {allocated}")) && !text.contains("freed at"));
    be(1);
    // SAFETY: not used after.
    let (freed, first) = (unsafe { m.kmem_cache_free(&a, at) }, here());
    freed.unwrap();
    be(0);
    // SAFETY: it is found out.
    let refused = unsafe { m.kmem_cache_free(&a, at) };
    assert!(matches!(refused, Err(Misuse::ObjectFree { .. })), "{refused:?}");
    let text = report(&m, at);
    assert!(text.contains(&format!("freed at {first}")) && text.contains("on CPU 1"), "{text}");
    // SAFETY: it is found out.
    let refused = unsafe { m.kmem_cache_free(&a, at.add(8)) };
    assert!(matches!(refused, Err(Misuse::InsideObject { .. })), "{refused:?}");
    end(&m, a, 0);
    end(&m, b, 0);
}

#[test]
fn what_was_not_written_yet_and_what_was_freed_can_be_told_apart() {
    let m = machine(None);
    let c = cache(&m, "poisoned", 24, SlabFlags::POISON);
    let at = m.kmem_cache_alloc(&c, Gfp::KERNEL).unwrap();
    assert_eq!(bytes(at, 24), [0xa5; 24]);
    let zeroed = m.kmem_cache_zalloc(&c, Gfp::KERNEL).unwrap();
    assert_eq!(bytes(zeroed, 24), [0; 24]);
    poke(at, 3, 3);
    // SAFETY: looked at after, which is the point.
    unsafe { m.kmem_cache_free(&c, at).unwrap() };
    let mut free = [0x6b; 24];
    free[23] = 0xa5;
    assert_eq!(bytes(at, 24), free);
    // SAFETY: not used after.
    unsafe { m.kmem_cache_free(&c, zeroed).unwrap() };
    end(&m, c, 0);
}

static MADE: AtomicU64 = AtomicU64::new(0);

fn make(at: *mut u8) {
    MADE.fetch_add(1, Relaxed);
    // SAFETY: an object of 16 bytes, being made.
    unsafe { at.write_bytes(7, 16) };
}

#[test]
fn constructors_run_again_where_there_is_poison() {
    let m = machine(None);
    let c = m.kmem_cache_create("made", 16, 0, SlabFlags::POISON, Some(make)).unwrap();
    let anchor = m.kmem_cache_alloc(&c, Gfp::KERNEL).unwrap();
    let before = MADE.load(Relaxed);
    for n in 1..=5 {
        let at = m.kmem_cache_alloc(&c, Gfp::KERNEL).unwrap();
        assert_eq!((bytes(at, 16), MADE.load(Relaxed)), (vec![7; 16], before + n));
        poke(at, 5, 0);
        // SAFETY: looked at after, which is the point.
        unsafe { m.kmem_cache_free(&c, at).unwrap() };
        assert_eq!(bytes(at, 2), [0x6b; 2]);
    }
    // SAFETY: not used after.
    unsafe { m.kmem_cache_free(&c, anchor).unwrap() };
    end(&m, c, 0);
}

#[test]
fn what_kmalloc_rounds_up_is_nobodys() {
    let m = machine(Some("Z,kmalloc-*"));
    let at = m.kmalloc(13, Gfp::KERNEL).unwrap();
    assert!(at.addr().get().is_multiple_of(16));
    assert_eq!(m.ksize(at.as_ptr()), Some(13));
    poke(at, 12, 1);
    poke(at, 13, 1);
    // SAFETY: not used after.
    let refused = unsafe { m.kfree(at.as_ptr()) };
    assert!(matches!(refused, Err(Misuse::Overrun { offset: 13, .. })), "{refused:?}");
    assert!(report(&m, at).contains("kmalloc-16"));
    let at = m.kzalloc(100, Gfp::KERNEL).unwrap();
    assert_eq!((bytes(at, 100), m.ksize(at.as_ptr())), (vec![0; 100], Some(100)));
    // SAFETY: ours; not used after it was freed.
    unsafe {
        at.write_bytes(9, 100);
        let grown = m.krealloc(at.as_ptr(), 120, Gfp::KERNEL | Gfp::ZERO).unwrap();
        assert_eq!((bytes(grown, 100), m.ksize(grown.as_ptr())), (vec![9; 100], Some(120)));
        assert_eq!(bytes(grown.add(100), 20), [0; 20]);
        let shrunk = m.krealloc(grown.as_ptr(), 50, Gfp::KERNEL).unwrap();
        m.kfree_sensitive(shrunk.as_ptr()).unwrap();
        let on_node = m.kmalloc_node(20, Gfp::KERNEL | Gfp::ZERO, 0).unwrap();
        assert_eq!(m.ksize(on_node.as_ptr()), Some(20));
        m.kfree(on_node.as_ptr()).unwrap();
    }
    for size in [1, 8, 9, 64, 97, 129, 1024, 4096, 8192] {
        let at = m.kmalloc(size, Gfp::KERNEL).unwrap();
        let align = if size.is_power_of_two() { size.min(4096) } else { 8 };
        assert!(at.addr().get().is_multiple_of(align), "{size}");
        // SAFETY: `size` bytes, ours; not used after.
        unsafe {
            at.write_bytes(0xff, size);
            m.kfree(at.as_ptr()).unwrap();
        }
    }
    let audit = m.audit_objects().unwrap();
    assert_eq!((audit.live, audit.quarantined), (0, 1));
}

#[test]
fn leaks_are_listed_with_who_allocated_them() {
    let m = machine(None);
    let c = cache(&m, "leaky", 32, SlabFlags::STORE_USER);
    let (first, one) = (m.kmem_cache_alloc(&c, Gfp::KERNEL).unwrap(), here());
    let (second, two) = (m.kmem_cache_alloc(&c, Gfp::KERNEL).unwrap(), here());
    let refused = m.kmem_cache_destroy(c).unwrap_err();
    assert_eq!(refused.live, 2);
    let reports = m.stage().take_reports();
    assert_eq!(reports.len(), 3, "{reports:?}");
    assert!(reports[0].contains("BUG leaky: 2 objects remaining"), "{reports:?}");
    for (at, line) in [(first, one), (second, two)] {
        let about = |r: &&String| r.starts_with(&format!("Object {:#x} of leaky", at.addr()));
        let text = reports.iter().find(about).unwrap();
        assert!(text.contains(&format!("allocated at {line}")), "{text}");
    }
    // SAFETY: not used after.
    unsafe { m.kmem_cache_free_bulk(&refused.cache, &[first, second]).unwrap() };
    end(&m, refused.cache, 0);
}

#[test]
fn states_that_somebody_wrote_over_are_counted_anew() {
    let m = machine(None);
    let c = cache(&m, "counted", 64, SlabFlags::CONSISTENCY_CHECKS);
    let at = m.kmem_cache_alloc(&c, Gfp::KERNEL).unwrap();
    let info = m.kmem_cache_info(&c);
    // The state bytes follow the last object, which is free.
    let base = NonNull::new(at.as_ptr().map_addr(|a| a & !4095)).unwrap();
    let nr = info.objects_per_slab as usize;
    poke(base, (nr * 64 + nr - 1) as isize, 0x77);
    let other = m.kmem_cache_alloc(&c, Gfp::KERNEL).unwrap();
    let reports = m.stage().take_reports();
    let nr = info.objects_per_slab;
    let text = format!("{} free objects counted, {} found", nr - 1, nr - 2);
    assert!(reports.len() == 1 && reports[0].contains(&text), "{reports:?}");
    assert!(reports[0].starts_with("BUG: Bad slab: "), "{reports:?}");
    m.kmem_cache_validate(&c).unwrap();
    // SAFETY: not used after.
    unsafe { m.kmem_cache_free_bulk(&c, &[at, other]).unwrap() };
    end(&m, c, 1);
}

#[test]
fn patterns_choose_caches_by_name() {
    let m = machine(Some("PU,file*;Z,exact;F"));
    let flags = |name| {
        let c = m.kmem_cache_create(name, 96, 0, SlabFlags::empty(), None).unwrap();
        let flags = m.kmem_cache_info(&c).flags;
        m.kmem_cache_destroy(c).unwrap();
        flags
    };
    assert_eq!(flags("filp"), SlabFlags::CONSISTENCY_CHECKS);
    assert_eq!(flags("files"), SlabFlags::POISON | SlabFlags::STORE_USER);
    assert_eq!(flags("file"), SlabFlags::POISON | SlabFlags::STORE_USER);
    assert_eq!(flags("exact"), SlabFlags::RED_ZONE);
    // Those that watch share with nobody, on either side.
    let m = machine(Some("F,second"));
    let make = |name| m.kmem_cache_create(name, 96, 0, SlabFlags::empty(), None).unwrap();
    let caches = [make("first"), make("second"), make("third"), make("second")];
    let names: Vec<_> = caches.iter().map(|c| c.name().as_str().to_owned()).collect();
    assert_eq!(names, ["first", "second", "first", "second"]);
    assert!(caches.iter().all(|c| m.kmem_cache_info(c).users == if c.name().as_str() == "first" { 2 } else { 1 }));
    caches.into_iter().for_each(|c| m.kmem_cache_destroy(c).unwrap());
}

#[test]
fn patterns_that_make_no_sense_keep_a_machine_from_coming_up() {
    for (pattern, at) in [("PX,a", 1), ("P,a;,b*c", 6), ("P,", 2)] {
        let mut boot = Memblock::new();
        boot.add(0, 8 << 20, 0).unwrap();
        let config = Config { slab_debug: Some(pattern), ..Config::default() };
        let refused = Kmem::bring_up(Plain::<12>::new(2048, 1), boot, &config).err();
        assert!(
            matches!(refused, Some(BringUpError::SlabDebug(i, _)) if i == at),
            "{pattern}: {refused:?}"
        );
        let text = refused.unwrap().to_string();
        assert!(text.starts_with(&format!("slab_debug at byte {at}: ")), "{text}");
    }
}

#[test]
fn what_needs_no_room_is_switched_while_the_cache_is_used() {
    let m = machine(None);
    let c = cache(&m, "switched", 64, SlabFlags::NO_MERGE);
    let held: Vec<_> = (0..20).map(|_| m.kmem_cache_alloc(&c, Gfp::KERNEL).unwrap()).collect();
    // SAFETY: not used after.
    unsafe { m.kmem_cache_free_bulk(&c, &held[10..]).unwrap() };
    assert!(m.kmem_cache_info(&c).cached_objects > 0);
    for round in 0..3 {
        m.kmem_cache_set_debug(&c, SlabFlags::CONSISTENCY_CHECKS).unwrap();
        let info = m.kmem_cache_info(&c);
        assert_eq!((info.cached_objects, info.active_objects), (0, 10), "round {round}");
        assert!(info.flags.contains(SlabFlags::CONSISTENCY_CHECKS));
        // One at a time from the slab and back.
        let at = m.kmem_cache_alloc(&c, Gfp::KERNEL).unwrap();
        // SAFETY: not used after.
        unsafe { m.kmem_cache_free(&c, at).unwrap() };
        assert_eq!(m.kmem_cache_info(&c).cached_objects, 0);
        m.kmem_cache_set_debug(&c, SlabFlags::empty()).unwrap();
        for cpu in [1, 0] {
            be(cpu);
            let at = m.kmem_cache_alloc(&c, Gfp::KERNEL).unwrap();
            // SAFETY: not used after.
            unsafe { m.kmem_cache_free(&c, at).unwrap() };
        }
        assert!(m.kmem_cache_info(&c).cached_objects > 0, "magazines again");
        m.audit_objects().unwrap();
    }
    let refused = m.kmem_cache_set_debug(&c, SlabFlags::DEBUG).unwrap_err();
    assert_eq!(refused, DebugError::Layout(SlabFlags::DEBUG - SlabFlags::CONSISTENCY_CHECKS));
    let zoned = cache(&m, "zoned", 64, SlabFlags::RED_ZONE);
    m.kmem_cache_set_debug(&zoned, SlabFlags::RED_ZONE | SlabFlags::CONSISTENCY_CHECKS).unwrap();
    let refused = m.kmem_cache_set_debug(&zoned, SlabFlags::empty());
    assert_eq!(refused, Err(DebugError::Layout(SlabFlags::RED_ZONE)));
    // SAFETY: not used after.
    unsafe { m.kmem_cache_free_bulk(&c, &held[..10]).unwrap() };
    end(&m, c, 0);
    end(&m, zoned, 0);
}

#[test]
fn caches_are_switched_and_looked_at_while_cpus_work() {
    let rig = Rig::flat();
    let plain =
        rig.run(|_| rig.kmem_cache_create("busy", 72, 0, SlabFlags::NO_MERGE, None).unwrap());
    let watched = rig.run(|_| rig.kmem_cache_create("watched", 72, 0, ALL, None).unwrap());
    let mark = rig.mark();
    thread::scope(|s| {
        let worker = || {
            for n in 0..400u32 {
                let work = |_: &mut kmem::context::Process| {
                    for c in [&plain, &watched] {
                        let held: Vec<_> = (0..12)
                            .map(|_| rig.kmem_cache_alloc(c, Gfp::KERNEL).unwrap())
                            .collect();
                        for at in held {
                            // SAFETY: 72 bytes, ours; not used after.
                            unsafe {
                                at.write_bytes(n as u8, 72);
                                rig.kmem_cache_free(c, at).unwrap();
                            }
                        }
                    }
                };
                rig.machine().run_on(Some(1), None, work).unwrap();
            }
        };
        let busy = s.spawn(worker);
        let mut on = false;
        while !busy.is_finished() {
            on = !on;
            let flags = if on { SlabFlags::CONSISTENCY_CHECKS } else { SlabFlags::empty() };
            let look = |_: &mut kmem::context::Process| {
                let switched = rig.kmem_cache_set_debug(&plain, flags);
                assert!(matches!(switched, Ok(()) | Err(DebugError::Busy)), "{switched:?}");
                rig.set_init_on_free(on).unwrap_or(());
                rig.kmem_cache_info(&plain);
                rig.kmem_cache_validate(&watched).unwrap();
                let at = rig.kmem_cache_alloc(&plain, Gfp::KERNEL).unwrap();
                // SAFETY: not used after.
                unsafe { rig.kmem_cache_free(&plain, at).unwrap() };
            };
            rig.machine().run_on(Some(0), None, look).unwrap();
        }
        busy.join().unwrap();
    });
    assert!(rig.since(mark).is_empty(), "{:?}", rig.since(mark));
    rig.run(|_| {
        rig.set_init_on_free(false).unwrap();
        let audit = rig.audit_objects().unwrap();
        assert_eq!((audit.live, audit.quarantined), (0, 0));
        rig.kmem_cache_destroy(plain).unwrap();
        rig.kmem_cache_destroy(watched).unwrap();
    });
}

#[test]
fn everything_is_zeroed_when_it_is_given_out_or_freed() {
    let zero = |m: &M, at: NonNull<u8>, n: usize| {
        let zeros = bytes(at, n).iter().all(|b| *b == 0);
        // SAFETY: the caller's.
        unsafe { at.write_bytes(0xee, n) };
        assert!(zeros, "{n} bytes, {} objects", m.audit_objects().unwrap().live);
    };
    for at_run_time in [false, true] {
        let on = !at_run_time;
        let m = M::new(&[8], Config { init_on_alloc: on, ..Config::default() });
        let c = cache(&m, "zeroed", 200, SlabFlags::NO_MERGE);
        if at_run_time {
            // What magazines have is not zeroed.
            let at = m.kmem_cache_alloc(&c, Gfp::KERNEL).unwrap();
            // SAFETY: 200 bytes, ours; not used after.
            unsafe {
                at.write_bytes(1, 200);
                m.kmem_cache_free(&c, at).unwrap();
            }
            m.set_init_on_alloc(true).unwrap();
            assert_eq!(m.kmem_cache_info(&c).cached_objects, 0);
        }
        for _ in 0..3 {
            let object = m.kmem_cache_alloc(&c, Gfp::KERNEL).unwrap();
            let small = m.kmalloc(60, Gfp::KERNEL).unwrap();
            let large = m.kmalloc(20_000, Gfp::KERNEL).unwrap();
            let page = m.alloc_pages(Gfp::KERNEL, 1).unwrap();
            let mut several = [None; 4];
            m.alloc_pages_bulk(Gfp::KERNEL, &mut several).unwrap();
            zero(&m, object, 200);
            zero(&m, small, 64);
            zero(&m, large, 20_000);
            zero(&m, m.page_address(page).unwrap(), 8192);
            for page in several.into_iter().flatten() {
                zero(&m, m.page_address(page).unwrap(), 4096);
                m.__free_page(page).unwrap();
            }
            m.__free_pages(page, 1).unwrap();
            // SAFETY: not used after.
            unsafe {
                m.kmem_cache_free(&c, object).unwrap();
                m.kfree(small.as_ptr()).unwrap();
                m.kfree(large.as_ptr()).unwrap();
            }
        }
        m.set_init_on_alloc(false).unwrap();
        end(&m, c, 0);
    }
    let m = M::new(&[8], Config { init_on_free: true, ..Config::default() });
    let c = cache(&m, "wiped", 200, SlabFlags::NO_MERGE);
    let anchor = m.kmem_cache_alloc(&c, Gfp::KERNEL).unwrap();
    let object = m.kmem_cache_alloc(&c, Gfp::KERNEL).unwrap();
    let page = m.alloc_pages(Gfp::KERNEL, 2).unwrap();
    let held = m.alloc_page(Gfp::KERNEL).unwrap();
    let places = [
        (object, 200),
        (m.page_address(page).unwrap(), 16384),
        (m.page_address(held).unwrap(), 4096),
    ];
    // SAFETY: ours; looked at after it was freed, which is the point.
    unsafe {
        places.iter().for_each(|(at, n)| at.write_bytes(0x55, *n));
        m.kmem_cache_free(&c, object).unwrap();
    }
    m.__free_pages(page, 2).unwrap();
    m.put_page(held).unwrap();
    for (at, n) in places {
        assert!(bytes(at, n).iter().all(|b| *b == 0), "{n} bytes");
    }
    // SAFETY: not used after.
    unsafe { m.kmem_cache_free(&c, anchor).unwrap() };
    end(&m, c, 0);
}

#[test]
fn fresh_objects_come_in_an_order_that_the_seed_decides() {
    let order = |seed: Option<u64>| {
        let m = M::new(&[8], Config { slab_random: seed, ..Config::default() });
        let c = cache(&m, "shuffled", 64, SlabFlags::NO_MERGE);
        let nr = 60;
        let held: Vec<_> = (0..nr).map(|_| m.kmem_cache_alloc(&c, Gfp::KERNEL).unwrap()).collect();
        let places: Vec<_> = held.iter().map(|at| at.addr().get() & 4095).collect();
        assert_eq!(held.iter().collect::<HashSet<_>>().len(), nr);
        // SAFETY: not used after.
        unsafe { m.kmem_cache_free_bulk(&c, &held).unwrap() };
        end(&m, c, 0);
        places
    };
    let neighbours =
        |places: &[usize]| places.windows(2).filter(|w| w[0].abs_diff(w[1]) == 64).count();
    let (plain, one, two) = (order(None), order(Some(1)), order(Some(2)));
    assert!(neighbours(&plain) > 40, "{plain:?}");
    assert!(neighbours(&one) < 15 && neighbours(&two) < 15, "{one:?} {two:?}");
    assert_ne!(one, two);
    let m = machine(None);
    m.set_slab_random(Some(9));
    let at = m.kmalloc(64, Gfp::KERNEL).unwrap();
    m.set_slab_random(None);
    // SAFETY: not used after.
    unsafe { m.kfree(at.as_ptr()).unwrap() };
}

/// The lines of allocinfo about this file: bytes, objects, line.
fn tags(m: &M) -> Vec<(u64, u64, u32)> {
    let mut text = String::new();
    m.write_allocinfo(&mut text).unwrap();
    let mut lines = text.lines();
    assert_eq!(lines.next(), Some("allocinfo - version: 1.0"));
    assert_eq!(lines.next(), Some("#     <size>  <calls> <tag info>"));
    let of = |line: &str| {
        let (bytes, rest) = (line[..12].trim().parse().unwrap(), &line[13..]);
        let (objects, place) = (rest[..8].trim().parse().unwrap(), &rest[9..]);
        let place = place.strip_suffix(" func:?").unwrap().strip_prefix(file!()).unwrap();
        (bytes, objects, place[1..].parse().unwrap())
    };
    lines.map(of).collect()
}

#[test]
fn who_holds_how_much_is_told_by_call_site() {
    let m = machine(None);
    let c = cache(&m, "tagged", 72, SlabFlags::NO_MERGE);
    let early = m.kmem_cache_alloc(&c, Gfp::KERNEL).unwrap();
    assert_eq!(tags(&m), []);
    m.set_alloc_tags(Some(1000)).unwrap();
    let line = line!() + 1;
    let held: Vec<_> = (0..50).map(|_| m.kmem_cache_alloc(&c, Gfp::KERNEL).unwrap()).collect();
    let small = m.kmalloc(100, Gfp::KERNEL).unwrap();
    let large = m.kmalloc(20_000, Gfp::KERNEL).unwrap();
    let mut expected = vec![(50 * 72, 50, line), (128, 1, line + 1), (32_768, 1, line + 2)];
    let sorted = || {
        let mut tags = tags(&m);
        tags.sort_unstable_by_key(|(.., line)| *line);
        tags
    };
    assert_eq!(sorted(), expected);
    // SAFETY: not used after.
    unsafe {
        m.kfree(small.as_ptr()).unwrap();
        m.kfree(large.as_ptr()).unwrap();
        m.kmem_cache_free(&c, early).unwrap();
        m.kmem_cache_free_bulk(&c, &held[..20]).unwrap();
    }
    expected = vec![(30 * 72, 30, line)];
    assert_eq!(sorted(), expected);
    // SAFETY: not used after.
    unsafe { m.kmem_cache_free_bulk(&c, &held[20..]).unwrap() };
    assert_eq!((tags(&m), m.alloc_tags_lost()), (vec![], 0));
    // Whoever finds no room is counted.
    m.set_alloc_tags(Some(1)).unwrap();
    let many: Vec<_> = (0..4000).map(|_| m.kmalloc(8, Gfp::KERNEL).unwrap()).collect();
    let noted: u64 = tags(&m).iter().map(|(_, objects, _)| objects).sum();
    assert!(noted > 0 && m.alloc_tags_lost() > 0);
    assert_eq!(noted + m.alloc_tags_lost(), 4000);
    for at in many {
        // SAFETY: not used after.
        unsafe { m.kfree(at.as_ptr()).unwrap() };
    }
    assert_eq!(tags(&m), []);
    assert_eq!(m.set_alloc_tags(Some(usize::MAX)), Err(DebugError::NoMemory));
    m.set_alloc_tags(None).unwrap();
    end(&m, c, 0);
}

#[test]
fn memory_runs_out_for_them_as_for_others() {
    let m = M::new(&[2], Config { slab_debug: Some(""), ..Config::default() });
    let c = cache(&m, "all", 500, SlabFlags::empty());
    let mut held = Vec::new();
    while let Ok(at) = m.kmem_cache_alloc(&c, Gfp::KERNEL | QUIET) {
        held.push(at);
    }
    assert!(held.len() > 4000, "{}", held.len());
    // SAFETY: not used after.
    unsafe { m.kmem_cache_free_bulk(&c, &held).unwrap() };
    end(&m, c, 0);
}

/// One request of the property test: what to allocate, or which to free.
#[derive(Clone, Debug)]
enum Step {
    Alloc,
    Zalloc,
    Free(prop::sample::Index),
    Look,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => Just(Step::Alloc),
        1 => Just(Step::Zalloc),
        4 => any::<prop::sample::Index>().prop_map(Step::Free),
        1 => Just(Step::Look),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, max_shrink_iters: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_size_alignment_and_flags_keep_what_is_written(
        size in prop_oneof![1usize..300, 300usize..8193],
        shift in 0u32..13,
        debug in 0u32..16,
        random in any::<Option<u64>>(),
        steps in prop::collection::vec(step(), 1..120),
    ) {
        let m = M::new(&[8], Config { slab_random: random, ..Config::default() });
        let flags = SlabFlags::from_bits_retain(debug * SlabFlags::POISON.bits());
        let align = if shift == 0 { 0 } else { 1 << shift };
        let c = m.kmem_cache_create("any", size, align, flags, None).unwrap();
        prop_assert_eq!(m.kmem_cache_info(&c).flags, flags);
        let mut held: Vec<(NonNull<u8>, u8)> = Vec::new();
        for (n, step) in steps.into_iter().enumerate() {
            match step {
                Step::Alloc | Step::Zalloc => {
                    let zero = matches!(step, Step::Zalloc);
                    let gfp = if zero { Gfp::KERNEL | Gfp::ZERO } else { Gfp::KERNEL };
                    let at = m.kmem_cache_alloc(&c, gfp).unwrap();
                    prop_assert!(at.addr().get().is_multiple_of(align.max(8)));
                    let fresh = bytes(at, size);
                    if zero {
                        prop_assert!(fresh.iter().all(|b| *b == 0));
                    } else if flags.contains(SlabFlags::POISON) {
                        prop_assert!(fresh.iter().all(|b| *b == 0xa5));
                    }
                    // SAFETY: an object of `size` bytes, ours.
                    unsafe { at.write_bytes(n as u8, size) };
                    held.push((at, n as u8));
                }
                Step::Free(which) if !held.is_empty() => {
                    let (at, byte) = held.swap_remove(which.index(held.len()));
                    prop_assert!(bytes(at, size).iter().all(|b| *b == byte));
                    // SAFETY: not used after.
                    unsafe { m.kmem_cache_free(&c, at).unwrap() };
                }
                Step::Free(_) => {}
                Step::Look => m.kmem_cache_validate(&c).unwrap(),
            }
        }
        for (at, byte) in held {
            prop_assert!(bytes(at, size).iter().all(|b| *b == byte));
            // SAFETY: not used after.
            unsafe { m.kmem_cache_free(&c, at).unwrap() };
        }
        prop_assert!(m.stage().take_reports().is_empty());
        end(&m, c, 0);
    }
}
