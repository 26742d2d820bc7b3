//! Reports of wrong frees tell who allocated the block and who freed it.

use crate::noting;
use kmem::{
    Gfp, Misuse, Pfn,
    context::{Comm, Task},
};
use kmem_test_support::Rig;

/// What a report says of a line of this file.
fn at(line: u32) -> String {
    format!("at {}:{line}:", file!())
}

#[test]
fn a_double_free_tells_both_and_itself() {
    let rig = noting();
    let task = Task::new();
    task.set_pid(77);
    task.set_comm(Comm::new("driver"));
    rig.run_as(&task, |_| {
        let page = rig.alloc_pages(Gfp::KERNEL, 2).unwrap();
        let allocated = line!() - 1;
        let pfn = rig.page_to_pfn(page).unwrap();
        rig.__free_pages(page, 2).unwrap();
        let freed = line!() - 1;
        let mark = rig.mark();
        assert_eq!(rig.__free_pages(page, 2), Err(Misuse::DoubleFree { pfn }));
        let again = line!() - 1;
        let report = rig.one_report(mark);
        let mut lines = report.lines();
        let first = lines.next().unwrap();
        assert!(
            first.starts_with("BUG: Bad page state: pfn:") && first.ends_with(&again.to_string())
        );
        let second = lines.next().unwrap();
        let head = format!("  pfn:{pfn}, order 2, allocated {}", at(allocated));
        assert!(second.starts_with(&head), "{second}");
        assert!(second.contains(", by pid 77 (driver), on CPU 0, at "), "{second}");
        assert!(lines.next().unwrap().starts_with(&format!("  freed {}", at(freed))), "{report}");
        assert_eq!(lines.next(), None);
        // A frame that was within the block has the same story.
        let mark = rig.mark();
        let tail = Pfn(pfn.0 + 3);
        rig.__free_page(rig.pfn_to_page(tail).unwrap()).unwrap_err();
        let report = rig.one_report(mark);
        assert!(report.contains(&head) && report.contains(&at(freed)), "{report}");
    });
}

#[test]
fn wrong_orders_and_tails_tell_who_holds_the_block() {
    let rig = noting();
    rig.run(|_| {
        let page = rig.alloc_pages(Gfp::KERNEL, 3).unwrap();
        let allocated = line!() - 1;
        let pfn = rig.page_to_pfn(page).unwrap();
        let told = |rig: &Rig, free: &dyn Fn() -> Result<(), Misuse>| {
            let mark = rig.mark();
            free().unwrap_err();
            let report = rig.one_report(mark);
            let head = format!("\n  pfn:{pfn}, order 3, allocated {}", at(allocated));
            assert!(report.contains(&head) && !report.contains("freed at"), "{report}");
        };
        told(&rig, &|| rig.__free_pages(page, 2));
        told(&rig, &|| rig.__free_page(rig.pfn_to_page(Pfn(pfn.0 + 1)).unwrap()));
        page.inc_mapcount();
        told(&rig, &|| rig.__free_pages(page, 3));
        page.dec_mapcount();
        rig.get_page(page).unwrap();
        told(&rig, &|| rig.split_page(page, 3));
        rig.put_page(page).unwrap();
        rig.__free_pages(page, 3).unwrap();
    });
}

#[test]
fn off_reports_are_one_line() {
    let rig = noting();
    rig.run(|_| {
        let page = rig.alloc_page(Gfp::KERNEL).unwrap();
        rig.__free_page(page).unwrap();
        rig.set_page_owner(false);
        let mark = rig.mark();
        rig.__free_page(page).unwrap_err();
        assert_eq!(rig.one_report(mark).lines().count(), 1);
    });
}
