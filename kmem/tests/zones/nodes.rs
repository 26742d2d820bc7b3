//! Nodes: distance, THISNODE, the node −1, cpusets and memory policies \[Z5\].

use super::{QUIET, order_of, order_on, pfn, without_marks};
use kmem::{
    AllocError, Config, Gfp,
    context::{MemPolicy, Task},
    gfp::GfpError,
    types::NodeMask,
    vmstat::VmEvent,
};
use kmem_hosted::Shape;
use kmem_test_support::{MIB, Rig};
use std::sync::{
    Arc, Mutex,
    atomic::{AtomicI32, Ordering::SeqCst},
};

/// Four nodes of 4 MiB in a row, each as far from the next, and a CPU on each.
fn row() -> Rig {
    let config = Config { distance: |a, b| 10 + 10 * a.abs_diff(b) as u32, ..Config::default() };
    let mut shape = Shape::no_dma(4 * MIB);
    for node in 1..4 {
        shape = shape.bank(4 * MIB * node as u64, 4 * MIB, node);
    }
    let rig = Rig::new(shape.cpus(4), config);
    without_marks(&rig);
    rig
}

fn nodes_as(rig: &Rig, cpu: usize, task: &Task, gfp: Gfp) -> Vec<usize> {
    let node = |pfn| rig.page_zone(pfn).unwrap().node();
    order_on(cpu, rig, task, || pfn(rig, rig.alloc_page(gfp | QUIET)), node)
}

fn nodes_asked(rig: &Rig, nid: i32, task: &Task, gfp: Gfp) -> Vec<usize> {
    let node = |pfn| rig.page_zone(pfn).unwrap().node();
    order_of(rig, task, || pfn(rig, rig.alloc_pages_node(nid, gfp | QUIET, 0)), node)
}

#[test]
fn requests_go_to_the_nearest_node_with_memory() {
    let rig = row();
    let task = Task::new();
    for (cpu, order) in [(0, [0, 1, 2, 3]), (1, [1, 2, 0, 3]), (2, [2, 3, 1, 0]), (3, [3, 2, 1, 0])]
    {
        assert_eq!(nodes_as(&rig, cpu, &task, Gfp::KERNEL), order, "from CPU {cpu}");
        assert_eq!(rig.nodes_from(cpu).collect::<Vec<_>>(), order);
    }
}

#[test]
fn a_node_can_be_asked_for() {
    let rig = row();
    let task = Task::new();
    assert_eq!(nodes_asked(&rig, 3, &task, Gfp::KERNEL), [3, 2, 1, 0]);
    assert_eq!(nodes_asked(&rig, 1, &task, Gfp::KERNEL), [1, 2, 0, 3]);
    assert_eq!(nodes_asked(&rig, -1, &task, Gfp::KERNEL), [0, 1, 2, 3], "-1 is the caller's");
    rig.run(|_| {
        for nid in [-2, 4, 63, i32::MIN, i32::MAX] {
            let mark = rig.mark();
            let refused = rig.alloc_pages_node(nid, Gfp::KERNEL, 0).err();
            assert_eq!(refused, Some(AllocError::Invalid(GfpError::NoSuchNode)));
            assert!(rig.one_report(mark).contains("no such node"));
        }
    });
    assert_eq!(nodes_as(&rig, 2, &task, Gfp::KERNEL), [2, 3, 1, 0]);
}

#[test]
fn thisnode_never_leaves_the_node() {
    let rig = row();
    let task = Task::new();
    for gfp in [Gfp::KERNEL, Gfp::ATOMIC, Gfp::KERNEL | Gfp::MEMALLOC] {
        assert_eq!(nodes_as(&rig, 2, &task, gfp | Gfp::THISNODE), [2], "{gfp}");
        assert_eq!(nodes_asked(&rig, 3, &task, gfp | Gfp::THISNODE), [3], "{gfp}");
    }
    rig.run(|_| {
        let held = rig.exhaust(Gfp::KERNEL | Gfp::THISNODE | QUIET, 0);
        assert_eq!(held.len(), 1024);
        for order in [0, 3, 9, 10] {
            let none = rig.take(Gfp::KERNEL | Gfp::THISNODE | QUIET, order);
            assert_eq!(none, Err(AllocError::NoMemory));
        }
        let elsewhere = rig.take(Gfp::KERNEL | QUIET, 0).unwrap();
        assert_eq!(rig.page_zone(elsewhere.0).unwrap().node(), 1);
        rig.release(held.into_iter().chain([elsewhere]));
    });
}

#[test]
fn hits_and_misses_are_counted_where_they_belong() {
    let rig = row();
    rig.run(|_| {
        let count = |node, event| {
            let zone = rig.zone_of(node, kmem::ZoneType::Normal).unwrap();
            rig.zone_numa_event(zone, event)
        };
        let held = rig.exhaust(Gfp::KERNEL | Gfp::THISNODE | QUIET, 0);
        assert_eq!(count(0, VmEvent::NumaHit), 1024);
        let other = rig.take(Gfp::KERNEL | QUIET, 0).unwrap();
        assert_eq!(count(1, VmEvent::NumaMiss), 1);
        assert_eq!(count(0, VmEvent::NumaForeign), 1);
        assert_eq!(count(1, VmEvent::NumaOther), 1);
        rig.release(held.into_iter().chain([other]));
    });
}

#[test]
fn a_cpuset_binds_user_requests_and_bends_for_the_kernel() {
    let rig = row();
    let task = Task::new();
    task.set_mems_allowed(NodeMask(0b1010));
    assert_eq!(task.mems_allowed(), NodeMask(0b1010));
    for gfp in [Gfp::USER, Gfp::HIGHUSER_MOVABLE, Gfp::NOWAIT | Gfp::HARDWALL] {
        assert_eq!(nodes_as(&rig, 0, &task, gfp), [1, 3], "{gfp}");
        assert_eq!(nodes_as(&rig, 3, &task, gfp), [3, 1], "{gfp}");
        assert_eq!(nodes_asked(&rig, 2, &task, gfp), [3, 1], "{gfp}");
    }
    // The kernel's own requests prefer the cpuset, and leave it rather than fail; so do atomic ones.
    for gfp in [Gfp::KERNEL, Gfp::NOFS, Gfp::ATOMIC, Gfp::NOWAIT, Gfp::ATOMIC | Gfp::HARDWALL] {
        assert_eq!(nodes_as(&rig, 0, &task, gfp), [1, 3, 0, 2], "{gfp}");
    }
    // The end of the cpuset is the end of the binding.
    task.set_mems_allowed(NodeMask::ALL);
    assert_eq!(nodes_as(&rig, 0, &task, Gfp::USER), [0, 1, 2, 3]);
}

#[test]
fn reserves_and_victims_are_not_bound_by_a_cpuset() {
    let rig = row();
    let task = Task::new();
    task.set_mems_allowed(NodeMask::single(1));
    assert_eq!(nodes_as(&rig, 0, &task, Gfp::USER), [1]);
    assert_eq!(nodes_as(&rig, 0, &task, Gfp::USER | Gfp::MEMALLOC), [1, 0, 2, 3]);
    task.set_oom_victim(true);
    assert_eq!(nodes_as(&rig, 0, &task, Gfp::USER), [0, 1, 2, 3]);
    task.set_oom_victim(false);
    task.set_mems_allowed(NodeMask(0));
    assert_eq!(nodes_as(&rig, 0, &task, Gfp::USER), []);
    assert_eq!(nodes_as(&rig, 0, &task, Gfp::KERNEL), [0, 1, 2, 3]);
}

#[test]
fn bind_allows_no_other_node() {
    let rig = row();
    let task = Task::new();
    task.set_mempolicy(MemPolicy::Bind(0b1100));
    for gfp in [Gfp::USER, Gfp::KERNEL, Gfp::ATOMIC, Gfp::KERNEL | Gfp::MEMALLOC] {
        assert_eq!(nodes_as(&rig, 0, &task, gfp), [2, 3], "{gfp}");
        assert_eq!(nodes_as(&rig, 3, &task, gfp), [3, 2], "{gfp}");
    }
    let count = |node, event| {
        rig.zone_numa_event(rig.zone_of(node, kmem::ZoneType::Normal).unwrap(), event)
    };
    let hits = count(2, VmEvent::NumaHit);
    rig.run_as(&task, |_| rig.release([rig.take(Gfp::KERNEL, 0).unwrap()]));
    assert_eq!(count(2, VmEvent::NumaHit), hits + 1, "it got the node that it could hope for");
    assert_eq!(count(0, VmEvent::NumaForeign), 0);
    task.set_mempolicy(MemPolicy::Bind(0));
    assert_eq!(nodes_as(&rig, 0, &task, Gfp::KERNEL), []);
    task.set_mempolicy(MemPolicy::Default);
    assert_eq!(nodes_as(&rig, 0, &task, Gfp::KERNEL), [0, 1, 2, 3]);
}

#[test]
fn preferred_is_asked_first() {
    let rig = row();
    let task = Task::new();
    task.set_mempolicy(MemPolicy::Preferred(3));
    assert_eq!(nodes_as(&rig, 0, &task, Gfp::KERNEL), [3, 2, 1, 0]);
    task.set_mempolicy(MemPolicy::Preferred(63));
    assert_eq!(nodes_as(&rig, 1, &task, Gfp::KERNEL), [1, 2, 0, 3], "no such node: the default");
}

#[test]
fn interleave_takes_turns() {
    let rig = row();
    let task = Task::new();
    task.set_mempolicy(MemPolicy::Interleave(0b1101));
    assert_eq!(task.mempolicy(), MemPolicy::Interleave(0b1101));
    rig.run_as(&task, |_| {
        for order in [0, 2] {
            let held: Vec<_> = (0..9).map(|_| rig.take(Gfp::KERNEL, order).unwrap()).collect();
            let nodes: Vec<_> =
                held.iter().map(|(pfn, _)| rig.page_zone(*pfn).unwrap().node()).collect();
            assert_eq!(nodes, [0, 2, 3, 0, 2, 3, 0, 2, 3]);
            rig.release(held);
        }
    });
    assert_eq!(rig.vm_event(VmEvent::NumaInterleave), 18);
    // A full node is no reason to fail.
    assert_eq!(nodes_as(&rig, 0, &task, Gfp::KERNEL).into_iter().max(), Some(3));
    task.set_mempolicy(MemPolicy::Interleave(0));
    assert_eq!(nodes_as(&rig, 1, &task, Gfp::KERNEL), [1, 2, 0, 3]);
}

#[test]
fn bulk_requests_interleave_too() {
    // Nodes that are large enough for per-CPU lists.
    let shape = Shape::no_dma(64 * MIB).bank(64 * MIB, 64 * MIB, 1).cpus(2);
    let rig = Rig::new(shape, Config::default());
    let task = Task::new();
    task.set_mempolicy(MemPolicy::Interleave(0b11));
    rig.run_as(&task, |_| {
        let mut pages = [None; 8];
        assert_eq!(rig.alloc_pages_bulk(Gfp::KERNEL, &mut pages), Ok(8));
        let mut by_node = [0; 2];
        for page in pages.iter().flatten() {
            by_node[rig.page_zone(rig.page_to_pfn(page).unwrap()).unwrap().node()] += 1;
        }
        assert_eq!(by_node, [4; 2]);
        rig.free_pages_bulk(&mut pages).unwrap();
    });
}

#[test]
fn a_policy_is_the_tasks_and_gives_way_to_what_the_caller_says() {
    let rig = row();
    let task = Task::new();
    task.set_mempolicy(MemPolicy::Bind(0b1000));
    assert_eq!(nodes_asked(&rig, 1, &task, Gfp::KERNEL), [1, 2, 0, 3]);
    assert_eq!(nodes_as(&rig, 0, &task, Gfp::KERNEL | Gfp::THISNODE), [0]);
    let node = Arc::new(AtomicI32::new(-1));
    let (seen, machine) = (Arc::clone(&node), Mutex::new(Arc::downgrade(rig.machine())));
    rig.hosted().set_softirq_handler(Arc::new(move |_atomic, _cpu, _bits| {
        let Some(m) = machine.try_lock().ok().and_then(|m| m.upgrade()) else { return };
        if let Ok(page) = m.alloc_page(Gfp::ATOMIC) {
            let pfn = m.page_to_pfn(page).unwrap_or_default();
            seen.store(m.page_zone(pfn).map_or(-2, |z| z.node() as i32), SeqCst);
            let _ = m.__free_page(page);
        }
    }));
    rig.run_as(&task, |_| assert!(rig.hosted().raise_softirq(1)));
    assert_eq!(node.load(SeqCst), 0, "an interrupt is nobody's");
}

#[test]
fn cpus_on_nodes_without_memory_use_the_nearest() {
    let config = Config { distance: |a, b| 10 + 10 * a.abs_diff(b) as u32, ..Config::default() };
    let mut shape = Shape::no_dma(4 * MIB).bank(8 * MIB, 4 * MIB, 2);
    shape.cpus = vec![0, 1, 2, 3, 5];
    let rig = Rig::new(shape, config);
    without_marks(&rig);
    let task = Task::new();
    for (cpu, order) in [(0, [0, 2]), (1, [2, 0]), (2, [2, 0]), (3, [2, 0]), (4, [2, 0])] {
        assert_eq!(nodes_as(&rig, cpu, &task, Gfp::KERNEL), order, "from CPU {cpu}");
    }
    for cpu in [1, 3, 4] {
        let none = rig.on(cpu, &task, |_| rig.take(Gfp::KERNEL | Gfp::THISNODE | QUIET, 0));
        assert_eq!(none, Err(AllocError::NoMemory), "CPU {cpu}'s node has none");
    }
    assert_eq!(nodes_asked(&rig, 1, &task, Gfp::KERNEL), [2, 0]);
}
