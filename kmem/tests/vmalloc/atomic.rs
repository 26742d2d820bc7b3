//! Atomic context: nothing is made there, and what is freed there comes back later \[V2, C1, C3\].

use super::{PAGE, readable, vfree};
use kmem::{
    AllocError, Gfp, Misuse,
    context::Section,
    platform::{PageProt, Platform},
    sync::{irqs_disabled, preempt_disabled},
    vmalloc::VmFlags,
};
use kmem_test_support::Rig;
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    ptr::NonNull,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

#[test]
fn nothing_is_made_in_atomic_context() {
    let m = Rig::pc();
    let hosted = m.hosted().clone();
    m.run(|process| {
        let page = m.alloc_page(Gfp::KERNEL).unwrap();
        let refused = |what: &str| {
            let tries: [(&str, Result<NonNull<u8>, AllocError>); 6] = [
                ("vmalloc", m.vmalloc(PAGE)),
                ("GFP_ATOMIC", m.__vmalloc(PAGE, Gfp::ATOMIC)),
                ("vmap", m.vmap(&[page], VmFlags::empty(), PageProt::KERNEL)),
                ("ioremap", m.ioremap(1 << 40, PAGE)),
                ("get_vm_area", m.get_vm_area(PAGE)),
                ("kvmalloc", m.kvmalloc(6 << 20, Gfp::KERNEL)),
            ];
            for (name, got) in tries {
                assert!(got.is_err(), "{name} {what}");
                assert!(
                    name == "kvmalloc" || got == Err(AllocError::Context),
                    "{name} {what}: {got:?}"
                );
            }
        };
        let mark = m.mark();
        preempt_disabled(&hosted, process, |_| refused("without preemption"));
        irqs_disabled(&hosted, process, |_| refused("without interrupts"));
        let cpu = m.hosted().this_cpu().unwrap();
        for section in [Section::Softirq, Section::Hardirq] {
            cpu.enter(section);
            refused("in an interrupt");
            cpu.leave(section);
        }
        let reports = m.since(mark);
        assert!(reports.len() >= 4 * 5);
        for (_, report) in reports {
            let known =
                report.starts_with("BUG: sleeping function called from invalid context at ");
            assert!(known && report.contains("vmalloc/atomic.rs:"), "{report}");
        }
        cpu.enter(Section::Nmi);
        let area = m.vmalloc(PAGE);
        // SAFETY: refused.
        let free = unsafe { m.vfree(std::ptr::without_provenance(PAGE)) };
        cpu.leave(Section::Nmi);
        assert_eq!((area, free), (Err(AllocError::Context), Err(Misuse::InNmi)));
        // What kmalloc has may be asked for in any context.
        preempt_disabled(&hosted, process, |_| {
            let small = m.kvmalloc(64, Gfp::ATOMIC).unwrap();
            // SAFETY: not used after.
            unsafe { m.kvfree(small.as_ptr()).unwrap() };
        });
        m.put_page(page).unwrap();
    });
}

#[test]
fn what_is_freed_in_atomic_context_comes_back_later() {
    let m = Rig::pc();
    let hosted = m.hosted().clone();
    m.run(|process| {
        let pages: Vec<_> = (0..4).map(|_| m.alloc_page(Gfp::KERNEL).unwrap()).collect();
        let put = m.vmap(&pages[..2], VmFlags::MAP_PUT_PAGES, PageProt::KERNEL).unwrap();
        let keep = m.vmap(&pages[2..], VmFlags::MAP_PUT_PAGES, PageProt::KERNEL).unwrap();
        let areas: Vec<_> = (1..40).map(|n| m.vmalloc(n * PAGE).unwrap()).collect();
        let frame = m.vmalloc_to_page(areas[3].as_ptr()).unwrap();
        irqs_disabled(&hosted, process, |_| {
            areas.iter().for_each(|area| vfree(&m, *area));
            vfree(&m, put);
            // SAFETY: not used after.
            unsafe { m.vunmap(keep.as_ptr()).unwrap() };
            // SAFETY: refused.
            let twice = unsafe { m.vfree(areas[3].as_ptr()) };
            assert!(matches!(twice, Err(Misuse::AreaFree { .. })), "dead from then on: {twice:?}");
        });
        assert!(m.vmalloc_to_page(areas[3].as_ptr()).is_none());
        assert_eq!(frame.page_count(), 1, "not back yet");
        let next = m.vmalloc(1).unwrap();
        assert_eq!(frame.page_count(), 0, "the next call brings them back");
        assert!(!readable(areas[3].as_ptr()));
        assert_eq!(pages.iter().map(|p| p.page_count()).collect::<Vec<_>>(), [0, 0, 1, 1]);
        vfree(&m, next);
        pages[2..].iter().for_each(|page| m.put_page(page).unwrap());
    });
}

#[test]
fn a_misuse_that_is_fatal_leaves_the_others_to_come_back() {
    let m = Rig::pc();
    let hosted = m.hosted().clone();
    m.run(|process| {
        let areas: Vec<_> = (0..3).map(|_| m.vmalloc(PAGE).unwrap()).collect();
        let frames: Vec<_> =
            areas.iter().map(|area| m.vmalloc_to_page(area.as_ptr()).unwrap()).collect();
        // Somebody frees the frame of the one in the middle.
        m.put_page(frames[1]).unwrap();
        irqs_disabled(&hosted, process, |_| areas.iter().for_each(|area| vfree(&m, *area)));
        m.set_panic_on_misuse(true);
        let found = catch_unwind(AssertUnwindSafe(|| m.vm_unmap_aliases()));
        m.set_panic_on_misuse(false);
        found.unwrap_err();
        assert_eq!(frames.iter().filter(|page| page.page_count() == 1).count(), 1, "one waits");
        m.vm_unmap_aliases();
        assert!(frames.iter().all(|page| page.page_count() == 0));
    });
}

#[test]
fn reclaim_brings_them_back() {
    let m = Rig::flat();
    let hosted = m.hosted().clone();
    m.run(|process| {
        let mut areas = Vec::new();
        while let Ok(area) = m.__vmalloc(1 << 20, Gfp::KERNEL | Gfp::NOWARN) {
            areas.push(area);
        }
        irqs_disabled(&hosted, process, |_| areas.iter().for_each(|area| vfree(&m, *area)));
        let block = m.take(Gfp::KERNEL | Gfp::NOWARN, 8).expect("what waits is found by reclaim");
        m.release([block]);
    });
}

/// Where the handlers get areas to free from.
#[derive(Default)]
struct Mail {
    places: [AtomicUsize; 16],
    freed: AtomicU64,
    wrong: AtomicU64,
    made: AtomicU64,
}

impl Mail {
    fn free(&self, m: &kmem::Kmem<kmem_hosted::Hosted>, addr: usize) {
        if addr != 0 {
            // SAFETY: whoever put it there does not use it any more.
            let freed = unsafe { m.vfree(std::ptr::with_exposed_provenance(addr)) };
            self.freed.fetch_add(1, SeqCst);
            self.wrong.fetch_add(u64::from(freed.is_err()), SeqCst);
        }
    }
}

/// Interrupts free what the tasks made, in the midst of whatever these do.
#[test]
fn interrupts_free_areas_in_a_storm() {
    let m = Rig::pc();
    let mail = Arc::new(Mail::default());
    let (state, to): (_, Weak<kmem_hosted::Machine>) =
        (Arc::clone(&mail), Arc::downgrade(m.machine()));
    assert!(m.hosted().set_timer_handler(Arc::new(move |_atomic, cpu| {
        // The test keeps the machine until no handler runs, so this is never the last handle.
        if let Some(m) = to.upgrade() {
            let n = state.freed.load(SeqCst) as usize;
            for i in 0..2 {
                state.free(&m, state.places[(8 * cpu + n + i) % 16].swap(0, SeqCst));
            }
            let _ = m.vmalloc_to_pfn(std::ptr::without_provenance(n));
        }
    })));
    let end = Instant::now() + Duration::from_millis(400);
    std::thread::scope(|s| {
        for cpu in 0..2 {
            let (m, mail) = (&m, &mail);
            s.spawn(move || {
                assert!(m.hosted().start_storm(cpu, 20_000));
                m.on(cpu, &kmem::context::Task::new(), |_| {
                    let mut n = cpu;
                    let mut held = Vec::new();
                    while Instant::now() < end {
                        n = n.wrapping_mul(0x2545_f491_4f6c_dd1d).wrapping_add(11);
                        let pages = 1 + (n >> 33) % if n >> 60 == 0 { 300 } else { 20 };
                        if let Ok(area) = m.__vmalloc(pages * PAGE, Gfp::KERNEL | Gfp::NOWARN) {
                            mail.made.fetch_add(1, SeqCst);
                            super::write(area.as_ptr(), 1);
                            let addr = area.as_ptr().expose_provenance();
                            let was = mail.places[(n >> 40) % 16].swap(addr, SeqCst);
                            held.extend((was != 0).then_some(was));
                        }
                        if held.len() > 8 {
                            let (made, freed) = (held.swap_remove((n >> 50) % 8), held.pop());
                            mail.free(m, made);
                            mail.free(m, freed.unwrap_or(0));
                        }
                        if n >> 59 == 0 {
                            m.vm_unmap_aliases();
                        }
                    }
                    held.into_iter().for_each(|addr| mail.free(m, addr));
                });
                assert!(m.hosted().stop_storm(cpu));
            });
        }
    });
    for place in &mail.places {
        mail.free(&m, place.swap(0, SeqCst));
    }
    let (made, freed) = (mail.made.load(SeqCst), mail.freed.load(SeqCst));
    assert_eq!((mail.wrong.load(SeqCst), freed), (0, made));
    assert!(made > 100, "{made}");
    let ticks: u64 = (0..2).map(|cpu| m.hosted().stats(cpu).unwrap().ticks).sum();
    assert!(ticks > 100, "{ticks} interrupts");
}
