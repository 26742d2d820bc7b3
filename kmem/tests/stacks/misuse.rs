//! Mistakes with stacks are reported, and nothing is damaged.

use super::{PAGE, free, write};
use kmem::{AllocError, Misuse, alloc::KernelStack, gfp::GfpError, stack::StackAudit};
use kmem_test_support::Rig;
use std::ptr::{NonNull, without_provenance};

#[track_caller]
fn refused(m: &Rig, addr: *const u8) -> (Misuse, String) {
    let mark = m.mark();
    // SAFETY: the tests pass what is refused.
    let misuse = unsafe { m.free_thread_stack(addr) }.unwrap_err();
    (misuse, m.one_report(mark))
}

#[test]
fn an_overwritten_end_is_found_and_the_stack_is_freed() {
    let m = Rig::pc();
    m.run(|_| {
        let low = m.alloc_thread_stack(1).unwrap();
        assert_eq!(m.stack_end_corrupted(low.as_ptr()), Some(false));
        write(low, size_of::<usize>(), 0xbad);
        assert_eq!(m.stack_end_corrupted(low.as_ptr()), Some(true));
        let addr = low.addr().get();
        let (misuse, report) = refused(&m, low.as_ptr());
        assert_eq!(misuse, Misuse::StackOverrun { addr, found: 0xbad });
        let begins =
            format!("BUG: corrupted stack end detected: the stack at {addr:#x} was overrun");
        assert!(report.starts_with(&begins) && report.contains("stacks/misuse.rs:"), "{report}");
        assert_eq!(m.audit_stacks(), Ok(StackAudit::default()), "freed, and not kept");
        // An owner's end is looked at, too.
        let stack = KernelStack::new(&m, 1).unwrap();
        write(stack.as_ptr(), size_of::<usize>(), 0);
        assert!(stack.end_corrupted());
        let mark = m.mark();
        drop(stack);
        assert!(m.one_report(mark).contains("overrun: 0x0 at its end"));
    });
}

#[test]
fn a_second_free_is_found() {
    let m = Rig::pc();
    m.run(|_| {
        let stacks: Vec<_> = (0..3).map(|_| m.alloc_thread_stack(2).unwrap()).collect();
        stacks.iter().for_each(|low| free(&m, *low));
        // Two are kept, one went back.
        for low in &stacks {
            let addr = low.addr().get();
            let (misuse, report) = refused(&m, low.as_ptr());
            assert_eq!(misuse, Misuse::AreaFree { addr });
            assert!(report.contains("double free") && report.contains("freed at"), "{report}");
        }
        let next = m.alloc_thread_stack(2).unwrap();
        assert!(stacks.contains(&next));
        free(&m, next);
    });
}

#[test]
fn foreign_addresses_are_found() {
    let m = Rig::pc();
    m.run(|_| {
        let low = m.alloc_thread_stack(2).unwrap();
        let addr = low.addr().get();
        for inside in [addr - PAGE, addr - 8, addr + 8, addr + PAGE, addr + 2 * PAGE] {
            let (misuse, _) = refused(&m, without_provenance(inside));
            assert_eq!(misuse, Misuse::InsideArea { addr: inside, start: addr });
        }
        let area = m.vmalloc(PAGE).unwrap();
        let (misuse, report) = refused(&m, area.as_ptr());
        assert!(matches!(misuse, Misuse::WrongArea { right: "vfree", .. }), "{misuse:?}");
        assert!(report.contains("given to free_thread_stack and is freed by vfree"), "{report}");
        // And the other way.
        let mark = m.mark();
        // SAFETY: refused.
        let wrong = unsafe { m.vfree(low.as_ptr()) };
        assert!(matches!(wrong, Err(Misuse::WrongArea { given: "vfree", .. })), "{wrong:?}");
        assert!(m.one_report(mark).contains("is freed by free_thread_stack"));
        for addr in [0, PAGE, usize::MAX - PAGE + 1] {
            assert_eq!(refused(&m, without_provenance(addr)).0, Misuse::NoArea { addr });
        }
        m.alloc_irq_stacks(1).unwrap();
        let (misuse, _) = refused(&m, without_provenance(m.irq_stack(0).unwrap().start));
        assert!(matches!(misuse, Misuse::WrongArea { right: "free_irq_stacks", .. }));
        // SAFETY: no interrupts run on them; the area is not used after.
        unsafe {
            m.free_irq_stacks().unwrap();
            m.vfree(area.as_ptr()).unwrap();
        }
        free(&m, low);
    });
}

#[test]
fn sizes_out_of_range_are_refused() {
    let m = Rig::pc();
    m.run(|_| {
        for frames in [0, 5, 1 << 20, usize::MAX] {
            let mark = m.mark();
            let bad: Result<NonNull<u8>, _> = m.alloc_thread_stack(frames);
            assert_eq!(bad, Err(AllocError::Invalid(GfpError::BadSize)));
            assert!(m.one_report(mark).contains("illegal size"));
            assert!(m.alloc_irq_stacks(frames).is_err());
        }
    });
}
