//! Stacks as they should be.

use super::{END, PAGE, free, read, readable, write};
use kmem::{
    AllocError, Config, Gfp,
    alloc::KernelStack,
    gfp::GfpError,
    page_state::{NodeStat, SystemStat},
    stack::{NR_CACHED_STACKS, STACK_END_MAGIC, StackAudit, StackPart, StackUse},
};
use kmem_hosted::Shape;
use kmem_test_support::{MIB, Rig};
use std::ptr::without_provenance;

#[test]
fn a_stack_is_zero_and_lies_between_guards() {
    let m = Rig::pc();
    m.run(|_| {
        for frames in 1..=m.max_stack_frames() {
            let low = m.alloc_thread_stack(frames).unwrap();
            let (start, bytes) = (low.addr().get(), frames * PAGE);
            assert!(start.is_multiple_of(PAGE));
            assert!(!readable(start - 1) && !readable(start - PAGE), "the guard below");
            assert!(!readable(start + bytes), "the guard above");
            assert!((0..frames).all(|i| readable(start + i * PAGE)));
            assert_eq!(read(low, size_of::<usize>()), STACK_END_MAGIC);
            assert!((END..bytes).step_by(8).all(|at| read(low, at) == 0));
            // The frames are behind the stack, and none is behind the guards.
            let pages: Vec<_> = (0..frames)
                .map(|i| m.vmalloc_to_page(without_provenance(start + i * PAGE)).unwrap())
                .collect();
            assert!(pages.iter().all(|page| page.page_count() == 1));
            assert!(m.vmalloc_to_page(without_provenance(start - 1)).is_none());
            assert!(m.vmalloc_to_page(without_provenance(start + bytes)).is_none());
            free(&m, low);
        }
        assert_eq!(m.max_stack_frames(), 4);
    });
}

#[test]
fn how_deep_a_stack_was_used_can_be_read() {
    let m = Rig::pc();
    m.run(|_| {
        let stack = KernelStack::new(&m, 2).unwrap();
        let (low, room) = (stack.as_ptr(), 2 * PAGE - END);
        assert_eq!(m.stack_not_used(low.as_ptr()), Some(room));
        write(low, 2 * PAGE - 8, 1);
        assert_eq!(stack.depth_used(), 8);
        write(low, 5000, 1);
        assert_eq!(stack.depth_used(), 2 * PAGE - 5000);
        // From inside, as a thread asks of itself.
        assert_eq!(m.stack_not_used(low.as_ptr().wrapping_add(7000)), Some(5000 - END));
        write(low, END, 1);
        assert_eq!((stack.depth_used(), stack.end_corrupted()), (room, false));
        // The next user finds nothing of it.
        drop(stack);
        let next = KernelStack::new(&m, 2).unwrap();
        assert_eq!((next.as_ptr(), next.depth_used()), (low, 0));
        assert!((END..2 * PAGE).step_by(8).all(|at| read(low, at) == 0));
    });
}

#[test]
fn addresses_lead_to_their_stack() {
    let m = Rig::pc();
    m.run(|_| {
        let line = line!() + 1;
        let stack = KernelStack::new(&m, 3).unwrap();
        stack.set_owner(0xabc);
        let range = stack.range();
        let of = |addr: usize| m.stack_of(without_provenance(addr));
        for (addr, part) in [
            (range.start - PAGE, StackPart::Guard),
            (range.start - 1, StackPart::Guard),
            (range.start, StackPart::Stack),
            (range.end - 1, StackPart::Stack),
            (range.end, StackPart::Above),
        ] {
            let found = of(addr).unwrap();
            assert_eq!((found.low, found.size, found.part), (range.start, 3 * PAGE, part));
            assert_eq!((found.used_by, found.owner), (StackUse::Thread, 0xabc));
            let at = found.caller.unwrap();
            assert!(at.file().ends_with("stacks/plain.rs") && at.line() == line, "{at}");
        }
        let text = of(range.start - 8).unwrap().to_string();
        let begins = format!("guard page of the kernel stack {:#x}-", range.start);
        assert!(text.starts_with(&begins) && text.contains("owner 0xabc"), "{text}");
        assert!(of(range.start - PAGE - 1).is_none());
        let other = m.vmalloc(PAGE).unwrap();
        assert!(m.stack_of(other.as_ptr()).is_none(), "an area, and no stack");
        // SAFETY: not used after.
        unsafe { m.vfree(other.as_ptr()).unwrap() };
        let low = stack.into_raw();
        free(&m, low);
        assert_eq!(of(range.start).unwrap().used_by, StackUse::Kept);
        assert_eq!(m.stack_end_corrupted(low.as_ptr()), None, "nobody's");
        m.drop_kept_stacks();
        assert!(of(range.start).is_none());
    });
}

#[test]
fn a_cpu_keeps_two_for_the_next() {
    let m = Rig::pc();
    m.run(|_| {
        let made: Vec<_> = (0..4).map(|_| m.alloc_thread_stack(4).unwrap()).collect();
        assert_eq!(m.audit_stacks(), Ok(StackAudit { threads: 4, irq: 0, kept: 0, frames: 16 }));
        made.iter().for_each(|low| free(&m, *low));
        let kept = NR_CACHED_STACKS as u64;
        let audit = StackAudit { threads: 0, irq: 0, kept, frames: 4 * kept };
        assert_eq!(m.audit_stacks(), Ok(audit));
        // Another size passes them by.
        let other = m.alloc_thread_stack(1).unwrap();
        assert!(!made.contains(&other));
        let free_frames = m.nr_free_pages();
        let again: Vec<_> = (0..2).map(|_| m.alloc_thread_stack(4).unwrap()).collect();
        assert!(again.iter().all(|low| made[..2].contains(low)), "{made:?}, {again:?}");
        assert_eq!(m.nr_free_pages(), free_frames, "nothing was asked for");
        assert_eq!(m.audit_stacks().unwrap().kept, 0);
        again.into_iter().chain([other]).for_each(|low| free(&m, low));
    });
    // They are the CPU's; the other one has none, and when the first goes they go.
    assert_eq!(m.audit_stacks().unwrap().kept, 2);
    m.on(1, &kmem::context::Task::new(), |_| {
        let low = m.alloc_thread_stack(4).unwrap();
        assert_eq!(m.audit_stacks().unwrap().kept, 2);
        free(&m, low);
    });
    assert_eq!(m.audit_stacks().unwrap().kept, 3);
    m.cpu_down(0).unwrap();
    assert_eq!(m.audit_stacks().unwrap(), StackAudit { kept: 1, frames: 4, ..Default::default() });
    m.cpu_up(0).unwrap();
}

#[test]
fn kept_stacks_go_when_memory_is_short() {
    let m = Rig::flat();
    m.run(|_| {
        let made: Vec<_> = (0..2).map(|_| m.alloc_thread_stack(4).unwrap()).collect();
        made.iter().for_each(|low| free(&m, *low));
        assert_eq!(m.audit_stacks().unwrap().kept, 2);
        let held = m.exhaust(Gfp::KERNEL | Gfp::NOWARN, 0);
        assert_eq!(m.audit_stacks().unwrap().kept, 0);
        assert_eq!(m.alloc_thread_stack(4), Err(AllocError::NoMemory));
        m.release(held);
    });
}

#[test]
fn what_threads_have_is_accounted_for_by_node() {
    let m = Rig::new(Shape::numa(2, 32 * MIB), Config::default());
    let kib = |node| m.node_page_state(node, NodeStat::KernelStack);
    m.run(|_| {
        let here = m.alloc_thread_stack(2).unwrap();
        let there = m.alloc_thread_stack_node(4, 1).unwrap();
        assert_eq!((kib(0), kib(1)), (8, 16));
        let mut text = String::new();
        m.write_meminfo(&mut text).unwrap();
        assert!(text.contains("KernelStack:          24 kB\n"), "{text}");
        assert_eq!(m.system_state(SystemStat::VmallocUsed), 6);
        free(&m, here);
        free(&m, there);
        assert_eq!((kib(0), kib(1)), (0, 0), "those that are kept are nobody's");
        assert_eq!(m.system_state(SystemStat::VmallocUsed), 6, "but they are there");
        // One that is kept is taken whatever its node.
        assert_eq!(m.alloc_thread_stack_node(4, 0), Ok(there));
        assert_eq!((kib(0), kib(1)), (0, 16));
        free(&m, there);
        // Unless there is no such node.
        for node in [2, 7, -2, i32::MAX, i32::MIN] {
            let mark = m.mark();
            let refused = Err(AllocError::Invalid(GfpError::NoSuchNode));
            assert_eq!(m.alloc_thread_stack_node(4, node), refused, "{node}");
            m.one_report(mark);
        }
    });
}

#[test]
fn each_cpu_has_a_stack_for_interrupts() {
    let m = Rig::new(Shape::no_dma(64 * MIB).cpus(3), Config::default());
    m.run(|_| {
        assert_eq!(m.irq_stack(0), None);
        m.alloc_irq_stacks(1).unwrap();
        let stacks: Vec<_> = (0..3).map(|cpu| m.irq_stack(cpu).unwrap()).collect();
        assert_eq!(m.irq_stack(3), None);
        for (cpu, range) in stacks.iter().enumerate() {
            assert_eq!(range.len(), PAGE);
            assert!(!readable(range.start - 1) && readable(range.start) && !readable(range.end));
            let guard = m.stack_of(without_provenance(range.start - 8)).unwrap();
            assert_eq!((guard.used_by, guard.part), (StackUse::Irq(cpu), StackPart::Guard));
            assert!(guard.to_string().contains(&format!("interrupts of CPU {cpu}")), "{guard}");
            assert_eq!(m.stack_not_used(without_provenance(range.start)), Some(PAGE - END));
        }
        let audit = StackAudit { irq: 3, frames: 3, ..StackAudit::default() };
        assert_eq!(m.audit_stacks(), Ok(audit));
        // Who has one keeps it.
        m.alloc_irq_stacks(4).unwrap();
        assert_eq!(m.irq_stack(1).as_ref(), Some(&stacks[1]));
        // SAFETY: no interrupts run on them.
        unsafe { m.free_irq_stacks().unwrap() };
        assert_eq!((m.irq_stack(1), m.audit_stacks()), (None, Ok(StackAudit::default())));
    });
}
