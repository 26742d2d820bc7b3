//! Machines without a vmalloc range: stacks from the direct map, without guards.

use super::{END, PAGE, free, read, write};
use kmem::{
    Config, Gfp, Kmem, Misuse,
    alloc::KernelStack,
    memblock::Memblock,
    page_state::NodeStat,
    slab::RCU_HEAD,
    stack::{STACK_END_MAGIC, StackAudit, StackPart, StackUse},
    zone::Layout,
};
use kmem_hosted::Shape;
use kmem_test_support::{MIB, Plain, Rig};
use std::{ptr::without_provenance, sync::mpsc, thread};

#[test]
fn stacks_come_from_the_direct_map() {
    let m = Rig::new(Shape::no_dma(64 * MIB).vmalloc(0), Config::default());
    m.run(|_| {
        for frames in 1..=4 {
            let stack = KernelStack::new(&m, frames).unwrap();
            let range = stack.range();
            assert!(range.start.is_multiple_of(frames.next_power_of_two() * PAGE), "aligned");
            assert!(!stack.is_guarded());
            let low = stack.as_ptr();
            assert!(m.virt_to_page(low.as_ptr()).is_some());
            assert_eq!(read(low, 8), STACK_END_MAGIC);
            assert_eq!(stack.depth_used(), 0);
            write(low, frames * PAGE - 64, 1);
            assert_eq!(stack.depth_used(), 64);
            stack.set_owner(7);
            let inside = m.stack_of(without_provenance(range.end - 1)).unwrap();
            assert_eq!((inside.low, inside.size), (range.start, frames * PAGE));
            let found = (inside.part, inside.used_by, inside.owner);
            assert_eq!(found, (StackPart::Stack, StackUse::Thread, 7));
            let kib = m.global_node_page_state(NodeStat::KernelStack);
            assert_eq!(kib, 4 * frames as u64);
            let all = StackAudit { threads: 1, irq: 0, kept: 0, frames: frames as u64 };
            assert_eq!(m.audit_stacks(), Ok(all));
        }
        m.alloc_irq_stacks(1).unwrap();
        let irq = m.irq_stack(1).unwrap();
        let found = m.stack_of(without_provenance(irq.start + 9)).unwrap();
        assert_eq!(found.used_by, StackUse::Irq(1));
        // SAFETY: refused; and no interrupts run on them.
        unsafe {
            let wrong = m.free_thread_stack(without_provenance(irq.start));
            assert_eq!(wrong, Err(Misuse::NotAStack { addr: irq.start }));
            m.free_irq_stacks().unwrap();
        }
    });
}

#[test]
fn mistakes_are_found_there_too() {
    let m = Rig::new(Shape::no_dma(64 * MIB).vmalloc(0), Config::default());
    m.run(|_| {
        let low = m.alloc_thread_stack(3).unwrap();
        let addr = low.addr().get();
        let page = m.__get_free_page(kmem::Gfp::KERNEL).unwrap();
        for wrong in [addr + PAGE, addr + 8, page.addr().get(), 0, usize::MAX] {
            // SAFETY: refused.
            let found = unsafe { m.free_thread_stack(without_provenance(wrong)) };
            assert_eq!(found, Err(Misuse::NotAStack { addr: wrong }));
        }
        free(&m, low);
        // SAFETY: refused.
        let twice = unsafe { m.free_thread_stack(low.as_ptr()) };
        assert_eq!(twice, Err(Misuse::NotAStack { addr }));
        m.free_page(page.as_ptr()).unwrap();
        let low = m.alloc_thread_stack(1).unwrap();
        write(low, 8, 5);
        let addr = low.addr().get();
        // SAFETY: not used after.
        let found = unsafe { m.free_thread_stack(low.as_ptr()) };
        assert_eq!(found, Err(Misuse::StackOverrun { addr, found: 5 }));
    });
}

#[test]
fn what_waits_for_readers_is_no_stack() {
    let m = Rig::new(Shape::no_dma(64 * MIB).vmalloc(0), Config::default());
    let (begun, began) = mpsc::channel::<()>();
    let (end, ended) = mpsc::channel::<()>();
    thread::scope(|s| {
        // Goes with a failure, too: then the reader ends.
        let end = end;
        s.spawn(|| {
            m.machine()
                .run_on(Some(1), None, |_| {
                    m.hosted().rcu_read(move || {
                        begun.send(()).unwrap();
                        _ = ended.recv();
                    })
                })
                .unwrap()
                .unwrap();
        });
        began.recv().unwrap();
        m.run(|_| {
            for size in [4096, 8192, 40_000] {
                let at = m.kmalloc(size, Gfp::KERNEL).unwrap().as_ptr();
                // SAFETY: ours, and not used after.
                unsafe { m.kfree_rcu(at, size - RCU_HEAD) }.unwrap();
                for page in (0..size).step_by(PAGE) {
                    let inside = at.wrapping_add(page);
                    assert_eq!(m.stack_of(inside), None);
                    assert_eq!(m.stack_not_used(inside), None);
                    let addr = inside.addr();
                    // SAFETY: refused.
                    let found = unsafe { m.free_thread_stack(inside) };
                    assert_eq!(found, Err(Misuse::NotAStack { addr }));
                }
            }
        });
        end.send(()).unwrap();
    });
    assert!(m.run(|_| m.rcu_barrier()));
    assert_eq!(m.machine().audit_stacks(), Ok(StackAudit::default()));
}

#[test]
fn frames_of_64_kib_make_stacks_of_one() {
    let mut boot = Memblock::new();
    boot.add(0, 512 << 16, 0).unwrap();
    let plain = Plain::<16>::new(512, 1);
    let config = Config { layout: Layout::flat(), ..Config::default() };
    let m = Kmem::bring_up(plain, boot, &config).unwrap();
    assert_eq!(m.max_stack_frames(), 1);
    let low = m.alloc_thread_stack(1).unwrap();
    assert_eq!(m.stack_not_used(low.as_ptr()), Some((1 << 16) - END));
    assert_eq!(m.global_node_page_state(NodeStat::KernelStack), 64);
    assert!(m.alloc_thread_stack(2).is_err());
    free(&m, low);
    assert_eq!(m.audit_stacks(), Ok(StackAudit::default()));
}
