//! Atomic context: no stack is made there, and every one can be freed.

use super::{free, readable, write};
use kmem::{
    AllocError, Misuse,
    context::{Section, Task},
    platform::Platform,
    stack::NR_CACHED_STACKS,
    sync::{irqs_disabled, preempt_disabled},
};
use kmem_test_support::Rig;
use std::{
    ptr::with_exposed_provenance,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

#[test]
fn no_stack_is_made_in_atomic_context() {
    let m = Rig::pc();
    let hosted = m.hosted().clone();
    m.run(|process| {
        // One is kept, which would cost nothing: refused all the same.
        let low = m.alloc_thread_stack(1).unwrap();
        free(&m, low);
        let refused = || {
            let mark = m.mark();
            assert_eq!(m.alloc_thread_stack(1), Err(AllocError::Context));
            let report = m.one_report(mark);
            assert!(report.starts_with("BUG: sleeping function called"), "{report}");
            assert!(report.contains("stacks/atomic.rs:"), "{report}");
            assert_eq!(m.alloc_irq_stacks(1), Err(AllocError::Context));
        };
        preempt_disabled(&hosted, process, |_| refused());
        irqs_disabled(&hosted, process, |_| refused());
        let cpu = m.hosted().this_cpu().unwrap();
        cpu.enter(Section::Hardirq);
        refused();
        cpu.leave(Section::Hardirq);
        let low = m.alloc_thread_stack(1).unwrap();
        cpu.enter(Section::Nmi);
        // SAFETY: refused.
        let freed = unsafe { m.free_thread_stack(low.as_ptr()) };
        cpu.leave(Section::Nmi);
        assert_eq!(freed, Err(Misuse::InNmi));
        free(&m, low);
    });
}

#[test]
fn what_is_freed_in_atomic_context_is_kept_or_comes_back_later() {
    let m = Rig::pc();
    let hosted = m.hosted().clone();
    m.run(|process| {
        let stacks: Vec<_> = (0..5).map(|_| m.alloc_thread_stack(4).unwrap()).collect();
        let frame = m.vmalloc_to_page(stacks[4].as_ptr()).unwrap();
        irqs_disabled(&hosted, process, |_| stacks.iter().for_each(|low| free(&m, *low)));
        assert_eq!(m.audit_stacks().unwrap().kept, NR_CACHED_STACKS as u64);
        assert_eq!(frame.page_count(), 1, "not back yet");
        let next = m.vmalloc(1).unwrap();
        assert_eq!(frame.page_count(), 0, "the next call brings it back");
        assert!(!readable(stacks[4].addr().get()));
        // SAFETY: not used after.
        unsafe { m.vfree(next.as_ptr()).unwrap() };
    });
}

/// Where the handlers get stacks to free from.
#[derive(Default)]
struct Mail {
    places: [AtomicUsize; 8],
    freed: AtomicU64,
    wrong: AtomicU64,
    made: AtomicU64,
}

impl Mail {
    fn free(&self, m: &kmem::Kmem<kmem_hosted::Hosted>, addr: usize) {
        if addr != 0 {
            // SAFETY: whoever put it there does not use it any more.
            let freed = unsafe { m.free_thread_stack(with_exposed_provenance(addr)) };
            self.freed.fetch_add(1, SeqCst);
            self.wrong.fetch_add(u64::from(freed.is_err()), SeqCst);
        }
    }
}

/// Interrupts free what the tasks made, in the midst of whatever these do; CPUs give up what they keep, too.
#[test]
fn interrupts_free_stacks_in_a_storm() {
    let m = Rig::pc();
    let mail = Arc::new(Mail::default());
    let (state, to): (_, Weak<kmem_hosted::Machine>) =
        (Arc::clone(&mail), Arc::downgrade(m.machine()));
    assert!(m.hosted().set_timer_handler(Arc::new(move |_atomic, cpu| {
        // The test keeps the machine until no handler runs, so this is never the last handle.
        if let Some(m) = to.upgrade() {
            let n = state.freed.load(SeqCst) as usize;
            state.free(&m, state.places[(4 * cpu + n) % 8].swap(0, SeqCst));
            let _ = m.stack_of(with_exposed_provenance(state.places[n % 8].load(SeqCst)));
        }
    })));
    let end = Instant::now() + Duration::from_millis(400);
    std::thread::scope(|s| {
        for cpu in 0..2 {
            let (m, mail) = (&m, &mail);
            s.spawn(move || {
                assert!(m.hosted().start_storm(cpu, 20_000));
                m.on(cpu, &Task::new(), |_| {
                    let mut n = cpu;
                    while Instant::now() < end {
                        n = n.wrapping_mul(0x2545_f491_4f6c_dd1d).wrapping_add(11);
                        let frames = 1 + (n >> 33) % 4;
                        let low = m.alloc_thread_stack(frames).unwrap();
                        mail.made.fetch_add(1, SeqCst);
                        assert_eq!(m.stack_not_used(low.as_ptr()), Some(frames * 4096 - 16));
                        write(low, frames * 4096 - 8 * (1 + (n >> 40) % 500), n);
                        let addr = low.as_ptr().expose_provenance();
                        mail.free(m, mail.places[(n >> 50) % 8].swap(addr, SeqCst));
                        if n >> 58 == 0 {
                            m.drop_kept_stacks();
                        }
                    }
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
