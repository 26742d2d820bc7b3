//! The tracepoints of objects \[T2\]: each fires with its fields, in the kernel's words, and none while they are off.

use crate::stage::Machine;
use kmem::{
    Config, Gfp,
    context::Task,
    fault::FaultPlan,
    slab::{KmemCache, SlabFlags, ZERO_SIZE_PTR},
    trace::{Event, TraceSink},
};
use kmem_hosted::Shape;
use kmem_test_support::{MIB, Rig};
use std::{
    collections::HashMap,
    ptr::{self, NonNull},
    sync::Mutex,
};

type M = Machine<12>;

/// Keeps the events of objects.
#[derive(Default)]
struct Log(Mutex<Vec<Event>>);

impl TraceSink for Log {
    fn event(&self, _cpu: Option<usize>, event: &Event) {
        if !event.name().starts_with("mm_") {
            self.0.lock().unwrap().push(*event);
        }
    }
}

impl Log {
    fn leaked() -> &'static Log {
        Box::leak(Box::default())
    }

    fn take(&self) -> Vec<Event> {
        std::mem::take(&mut self.0.lock().unwrap())
    }

    /// The events so far, as the kernel prints them.
    fn texts(&self) -> Vec<String> {
        self.take().iter().map(|event| format!("{}: {event}", event.name())).collect()
    }
}

fn traced() -> (M, &'static Log) {
    let m = M::new(&[4], Config::default());
    let log = Log::leaked();
    m.set_tracer(Some(log));
    m.set_trace_objects(true).unwrap();
    (m, log)
}

fn cache(m: &M, flags: SlabFlags) -> KmemCache {
    m.kmem_cache_create("traced", 72, 16, flags | SlabFlags::NO_MERGE, None).unwrap()
}

#[test]
fn each_fires_with_its_fields() {
    let (m, log) = traced();
    let c = cache(&m, SlabFlags::empty());
    let line = line!() + 1;
    let object = m.kmem_cache_alloc(&c, Gfp::KERNEL).unwrap();
    let small = m.kmalloc(100, Gfp::KERNEL | Gfp::ZERO).unwrap();
    let near = m.kmalloc_node(8, Gfp::NOWAIT, 0).unwrap();
    let large = m.kmalloc(20_000, Gfp::KERNEL).unwrap();
    let file = file!();
    let at = |at: NonNull<u8>| at.addr();
    assert_eq!(
        log.texts(),
        [
            format!(
                "kmem_cache_alloc: call_site={file}:{line}:20 ptr={:#x} name=traced bytes_req=72 bytes_alloc=80 gfp_flags=GFP_KERNEL node=-1 accounted=false",
                at(object)
            ),
            format!(
                "kmalloc: call_site={file}:{}:19 ptr={:#x} bytes_req=100 bytes_alloc=128 gfp_flags=GFP_KERNEL|__GFP_ZERO node=-1 accounted=false",
                line + 1,
                at(small)
            ),
            format!(
                "kmalloc: call_site={file}:{}:18 ptr={:#x} bytes_req=8 bytes_alloc=8 gfp_flags=GFP_NOWAIT node=0 accounted=false",
                line + 2,
                at(near)
            ),
            format!(
                "kmalloc: call_site={file}:{}:19 ptr={:#x} bytes_req=20000 bytes_alloc=32768 gfp_flags=GFP_KERNEL node=-1 accounted=false",
                line + 3,
                at(large)
            ),
        ]
    );
    let line = line!() + 3;
    // SAFETY: not used after.
    unsafe {
        m.kmem_cache_free(&c, object).unwrap();
        m.kfree(small.as_ptr()).unwrap();
        m.kfree(near.as_ptr()).unwrap();
    }
    assert_eq!(
        log.texts(),
        [
            format!(
                "kmem_cache_free: call_site={file}:{line}:11 ptr={:#x} name=traced",
                at(object)
            ),
            format!("kfree: call_site={file}:{}:11 ptr={:#x}", line + 1, at(small)),
            format!("kfree: call_site={file}:{}:11 ptr={:#x}", line + 2, at(near)),
        ]
    );
    // SAFETY: not used after.
    unsafe { m.kfree(large.as_ptr()).unwrap() };
    let [Event::Kfree { cache: None, bytes_alloc: 32_768, .. }] = log.take()[..] else { panic!() };
    m.kmem_cache_destroy(c).unwrap();
}

#[test]
fn every_way_to_ask_and_to_free_tells() {
    let (m, log) = traced();
    let c = cache(&m, SlabFlags::empty());
    let names = || log.take().iter().map(Event::name).collect::<Vec<_>>();
    let mut many = [NonNull::dangling(); 5];
    m.kmem_cache_alloc_bulk(&c, Gfp::KERNEL, &mut many).unwrap();
    assert_eq!(names(), ["kmem_cache_alloc"; 5]);
    // SAFETY: not used after.
    unsafe { m.kmem_cache_free_bulk(&c, &many).unwrap() };
    assert_eq!(names(), ["kmem_cache_free"; 5]);
    let at = m.kmem_cache_alloc_node(&c, Gfp::KERNEL, 0).unwrap();
    // SAFETY: not used after.
    unsafe { m.kfree(at.as_ptr()).unwrap() };
    let events = log.take();
    assert!(
        matches!(events[1], Event::Kfree { cache: Some(name), .. } if name.as_str() == "traced")
    );
    let at = m.kmalloc(10, Gfp::KERNEL).unwrap();
    // SAFETY: not used after.
    let at = unsafe { m.krealloc(at.as_ptr(), 1000, Gfp::KERNEL).unwrap() };
    assert_eq!(names(), ["kmalloc", "kmalloc", "kfree"]);
    // SAFETY: not used after.
    unsafe { m.kfree_sensitive(at.as_ptr()).unwrap() };
    assert_eq!(names(), ["kfree"]);
    // Nothing was allocated, and nothing is freed.
    assert_eq!(m.kmalloc(0, Gfp::KERNEL).unwrap(), ZERO_SIZE_PTR);
    // SAFETY: neither is memory.
    unsafe {
        m.kfree(ptr::null_mut()).unwrap();
        m.kfree(ZERO_SIZE_PTR.as_ptr()).unwrap();
    }
    assert_eq!(names(), [""; 0]);
    m.kmem_cache_destroy(c).unwrap();
}

#[test]
fn what_fails_has_no_address_and_what_is_refused_is_not_told() {
    let (m, log) = traced();
    let c = cache(&m, SlabFlags::empty());
    let quiet = Gfp::KERNEL | Gfp::NOWARN;
    let object = m.kmem_cache_alloc(&c, quiet).unwrap();
    log.take();
    m.set_failslab(FaultPlan::From(0), None).unwrap();
    m.kmem_cache_alloc(&c, quiet).unwrap_err();
    m.kmalloc(64, quiet).unwrap_err();
    m.set_failslab(FaultPlan::Off, None).unwrap();
    let null = |event: &Event| {
        matches!(event, Event::KmemCacheAlloc { ptr: 0, .. } | Event::KmallocAlloc { ptr: 0, .. })
    };
    let events = log.take();
    assert!(events.len() == 2 && events.iter().all(null), "{events:?}");
    assert!(events[1].to_string().contains(" ptr=(null) "));
    m.kmem_cache_alloc(&c, quiet | Gfp::HIGHMEM).unwrap_err();
    // SAFETY: found out.
    unsafe { m.kfree(object.as_ptr().wrapping_add(8)).unwrap_err() };
    assert!(log.take().is_empty());
    // SAFETY: not used after; the second is found out.
    unsafe {
        m.kmem_cache_free(&c, object).unwrap();
        m.kmem_cache_free(&c, object).unwrap_err();
    }
    assert_eq!(log.take().len(), 1);
    m.kmem_cache_destroy(c).unwrap();
}

#[test]
fn it_is_switched_while_objects_lie_in_magazines() {
    let m = M::new(&[4], Config::default());
    let log = Log::leaked();
    m.set_tracer(Some(log));
    let pair = || {
        let at = m.kmalloc(64, Gfp::KERNEL).unwrap();
        // SAFETY: not used after.
        unsafe { m.kfree(at.as_ptr()).unwrap() };
    };
    pair();
    m.set_trace_objects(true).unwrap();
    assert_eq!(m.audit_objects().unwrap().cached, 0);
    pair();
    assert_eq!(log.take().len(), 2);
    m.set_trace_objects(false).unwrap();
    (0..3).for_each(|_| pair());
    assert!(log.take().is_empty() && m.audit_objects().unwrap().cached > 0);
    // On, but with nobody to tell.
    m.set_trace_objects(true).unwrap();
    m.set_tracer(None);
    pair();
    assert!(log.take().is_empty());
}

/// Whoever keeps the order of calls finds every object freed before it is allocated again, whichever CPU does either.
#[test]
fn no_object_is_allocated_before_it_was_seen_freed() {
    let rig = Rig::new(Shape::no_dma(64 * MIB), Config::default());
    let log = Log::leaked();
    rig.set_tracer(Some(log));
    rig.set_trace_objects(true).unwrap();
    let (to_one, from_zero) = std::sync::mpsc::sync_channel::<usize>(64);
    std::thread::scope(|s| {
        let rig = &rig;
        s.spawn(move || {
            rig.on(1, &Task::new(), |process| {
                while let Ok(at) = from_zero.recv() {
                    // SAFETY: the other thread's object, given away.
                    unsafe { rig.kfree(ptr::with_exposed_provenance_mut(at)).unwrap() };
                    let own = rig.kmalloc(96, Gfp::ATOMIC).unwrap();
                    // SAFETY: not used after.
                    unsafe { rig.kfree(own.as_ptr()).unwrap() };
                    rig.hosted().cond_resched(process);
                }
            });
        });
        rig.on(0, &Task::new(), |_| {
            for _ in 0..3000 {
                let at = rig.kmalloc(96, Gfp::ATOMIC).unwrap();
                to_one.send(at.as_ptr().expose_provenance()).unwrap();
            }
            drop(to_one);
        });
    });
    rig.set_trace_objects(false).unwrap();
    rig.set_tracer(None);
    let mut live = HashMap::new();
    let events = log.take();
    assert_eq!(events.len(), 4 * 3000);
    for event in events {
        match event {
            Event::KmallocAlloc { ptr, .. } => assert_eq!(live.insert(ptr, ()), None, "{ptr:#x}"),
            Event::Kfree { ptr, .. } => assert_eq!(live.remove(&ptr), Some(())),
            other => panic!("{other:?}"),
        }
    }
    assert!(live.is_empty());
}
