//! What is noted of a block on each way that it is given out, split and freed.

use crate::{held, line, noting};
use kmem::{
    Gfp, Pfn, Platform,
    context::{Comm, Task},
};
use kmem_test_support::Rig;

#[test]
fn a_block_is_noted_with_all_that_is_known() {
    let rig = noting();
    let task = Task::new();
    task.set_pid(4711);
    task.set_comm(Comm::new("kworker/u8:1-events"));
    let gfp = Gfp::KERNEL | Gfp::RECLAIMABLE;
    let before = rig.hosted().now_ns();
    let pfn = rig.on(1, &task, |_| rig.take(gfp, 3).unwrap().0);
    let owner = rig.page_owner(Pfn(pfn.0 + 5)).unwrap();
    assert_eq!((owner.pfn, owner.order, owner.gfp), (pfn, 3, gfp));
    assert_eq!((owner.pid, owner.comm.as_str(), owner.cpu), (4711, "kworker/u8:1-ev", Some(1)));
    assert!((before..=rig.hosted().now_ns()).contains(&owner.allocated_ns));
    // `Rig::take` asked, who does not pass its caller on.
    assert!(owner.allocated_at.unwrap().file().ends_with("rig.rs"));
    assert!(owner.freed.is_none());
    let page = rig.pfn_to_page(pfn).unwrap();
    let freed_at = line!() + 1;
    rig.__free_pages(page, 3).unwrap();
    for n in 0..8 {
        let owner = rig.page_owner(Pfn(pfn.0 + n)).unwrap();
        let (when, at) = owner.freed.unwrap();
        assert_eq!((owner.pfn, at.unwrap().line()), (pfn, freed_at));
        assert!(when >= owner.allocated_ns);
    }
    assert!(held(&rig).is_empty());
}

/// The frame at an address.
fn at(rig: &Rig, addr: *const u8) -> Pfn {
    rig.page_to_pfn(rig.virt_to_page(addr).unwrap()).unwrap()
}

#[test]
fn every_way_to_ask_tells_the_place() {
    let rig = noting();
    rig.run(|_| {
        let first = line!() + 1;
        let page = rig.alloc_page(Gfp::KERNEL).unwrap();
        let pages = rig.alloc_pages(Gfp::KERNEL, 1).unwrap();
        let cold = rig.alloc_page(Gfp::KERNEL | Gfp::COLD).unwrap();
        let large = rig.alloc_pages(Gfp::KERNEL, 9).unwrap();
        let node = rig.alloc_pages_node(0, Gfp::KERNEL, 1).unwrap();
        let zeroed = rig.get_zeroed_page(Gfp::KERNEL).unwrap();
        let free = rig.__get_free_pages(Gfp::KERNEL, 2).unwrap();
        let chosen = rig.alloc_pages_at(Pfn(0x3000), 4, Gfp::KERNEL).unwrap();
        let given = [page, pages, cold, large, node].map(|page| rig.page_to_pfn(page).unwrap());
        let given = given.into_iter().chain([at(&rig, zeroed.as_ptr()), at(&rig, free.as_ptr())]);
        let lines: Vec<_> = given.map(|pfn| line(&rig, pfn)).collect();
        assert_eq!(lines, (first..first + 7).collect::<Vec<_>>());
        assert_eq!(line(&rig, Pfn(0x3000)), first + 7);
        let noted: u64 = held(&rig).iter().map(|owner| 1 << owner.order).sum();
        assert_eq!(noted, 1 + 2 + 1 + 512 + 2 + 1 + 4 + 16);
        for (page, order) in [(page, 0), (pages, 1), (cold, 0), (large, 9), (node, 1), (chosen, 4)]
        {
            rig.__free_pages(page, order).unwrap();
        }
        rig.free_page(zeroed.as_ptr()).unwrap();
        rig.free_pages(free.as_ptr(), 2).unwrap();
    });
    assert!(held(&rig).is_empty());
}

#[test]
fn a_frame_that_a_cpus_list_gives_again_is_the_next_ones() {
    let rig = noting();
    rig.run(|_| {
        let mut frames = [Pfn(0); 2];
        for (i, frame) in frames.iter_mut().enumerate() {
            let (page, at) = if i == 0 {
                (rig.alloc_page(Gfp::KERNEL).unwrap(), line!())
            } else {
                (rig.alloc_page(Gfp::KERNEL).unwrap(), line!())
            };
            *frame = rig.page_to_pfn(page).unwrap();
            assert_eq!(line(&rig, *frame), at);
            rig.put_page(page).unwrap();
            let freed = line!() - 1;
            let (_, at) = rig.page_owner(*frame).unwrap().freed.unwrap();
            assert_eq!(at.unwrap().line(), freed);
        }
        assert_eq!(frames[0], frames[1], "the list's hot end");
    });
}

#[test]
fn pieces_of_a_split_block_keep_its_owner() {
    let rig = noting();
    rig.run(|_| {
        let page = rig.alloc_pages(Gfp::USER, 4).unwrap();
        let at = line!() - 1;
        let first = rig.page_to_pfn(page).unwrap();
        let told = |n: u32| rig.page_owner(Pfn(first.0 + n)).unwrap();
        rig.split_page_to(page, 4, 2).unwrap();
        assert_eq!(held(&rig).len(), 4);
        let quarter = rig.pfn_to_page(Pfn(first.0 + 4)).unwrap();
        rig.split_page(quarter, 2).unwrap();
        for n in 0..16 {
            let (owner, single) = (told(n), (4..8).contains(&n));
            let head = if single { n } else { n & !3 };
            assert_eq!((owner.pfn.0, owner.order), (first.0 + head, if single { 0 } else { 2 }));
            assert_eq!((owner.allocated_at.unwrap().line(), owner.gfp), (at, Gfp::USER));
        }
        rig.__free_page(rig.pfn_to_page(Pfn(first.0 + 5)).unwrap()).unwrap();
        let freed: Vec<u32> = (0..16).filter(|n| told(*n).freed.is_some()).collect();
        assert_eq!(freed, [5]);
        rig.release([0, 8, 12].map(|n| (Pfn(first.0 + n), 2)));
        rig.release([4, 6, 7].map(|n| (Pfn(first.0 + n), 0)));
        assert!((0..16).all(|n| told(n).freed.is_some()));
    });
}

#[test]
fn exact_sizes_and_many_at_once() {
    let rig = noting();
    rig.run(|_| {
        let start = rig.alloc_pages_exact(5 * 4096, Gfp::KERNEL).unwrap();
        let exact = line!() - 1;
        let mut pages = [None; 40];
        assert_eq!(rig.alloc_pages_bulk(Gfp::KERNEL, &mut pages).unwrap(), 40);
        let bulk = line!() - 1;
        let lines = || {
            let lines = held(&rig).into_iter().map(|o| (o.order, o.allocated_at.unwrap().line()));
            let mut lines: Vec<_> = lines.collect();
            lines.sort_unstable();
            lines
        };
        assert_eq!(lines(), [vec![(0, exact); 5], vec![(0, bulk); 40]].concat());
        rig.free_pages_bulk(&mut pages).unwrap();
        assert_eq!(lines(), vec![(0, exact); 5]);
        rig.free_pages_exact(start.as_ptr(), 5 * 4096).unwrap();
        assert_eq!(lines(), []);
    });
}

#[test]
fn what_is_given_out_while_it_is_off_is_nobodys() {
    let rig = noting();
    rig.run(|_| {
        let early = rig.alloc_page(Gfp::KERNEL).unwrap();
        let frame = |page| rig.page_to_pfn(page).unwrap();
        assert!(rig.notes_owners() && rig.page_owner(frame(early)).is_some());
        assert!(rig.set_page_owner(false) && !rig.notes_owners());
        let unseen = rig.alloc_pages(Gfp::KERNEL, 1).unwrap();
        assert!(held(&rig).is_empty() && rig.page_owner(frame(early)).is_none());
        assert!(rig.set_page_owner(true));
        // Those of before are forgotten: they may have changed hands.
        let late = rig.alloc_page(Gfp::KERNEL).unwrap();
        assert_eq!(held(&rig).iter().map(|owner| owner.pfn).collect::<Vec<_>>(), [frame(late)]);
        for (page, order) in [(early, 0), (unseen, 1), (late, 0)] {
            rig.__free_pages(page, order).unwrap();
        }
        // To switch on what is on forgets nothing.
        let kept = rig.alloc_page(Gfp::KERNEL).unwrap();
        assert!(rig.set_page_owner(true) && held(&rig).len() == 1);
        rig.__free_page(kept).unwrap();
    });
}

#[test]
fn without_room_there_is_nothing_to_switch_on() {
    let rig = Rig::flat();
    assert!(!rig.set_page_owner(true) && !rig.notes_owners());
    assert!(rig.set_page_owner(false));
    rig.run(|_| {
        let page = rig.alloc_page(Gfp::KERNEL).unwrap();
        assert!(rig.page_owner(rig.page_to_pfn(page).unwrap()).is_none());
        rig.__free_page(page).unwrap();
    });
    let mut text = String::new();
    rig.write_page_owner(&mut text).unwrap();
    assert_eq!(text, "");
}

#[test]
fn names_are_cut_where_a_character_ends() {
    for (name, kept) in [
        ("", ""),
        ("kswapd0", "kswapd0"),
        ("fifteen letters", "fifteen letters"),
        ("sixteen letters!", "sixteen letters"),
        ("fourteen lettß", "fourteen lettß"),
        ("fourteen letteß", "fourteen lette"),
        ("two\nlines", "two?lines"),
    ] {
        assert_eq!(Comm::new(name).as_str(), kept);
    }
}
