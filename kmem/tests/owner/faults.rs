//! `fail_page_alloc`: requests for pages fail by plan, all of them or those of some lines.

use kmem::{
    AllocError, Gfp, Pfn,
    fault::{FaultPlan, FaultSite},
};
use kmem_test_support::Rig;

const QUIET: Gfp = Gfp::KERNEL.union(Gfp::NOWARN);

#[test]
fn a_plan_strikes_requests_and_not_those_that_must_not_fail() {
    let rig = Rig::flat();
    rig.run(|_| {
        rig.set_fail_page_alloc(FaultPlan::Nth(2), None);
        let took: Vec<_> = (0..5).map(|n| rig.take(QUIET, n % 3).ok()).collect();
        assert_eq!(
            took.iter().map(Option::is_some).collect::<Vec<_>>(),
            [true, true, false, true, true]
        );
        rig.set_fail_page_alloc(FaultPlan::From(0), None);
        assert_eq!(rig.alloc_page(QUIET).err(), Some(AllocError::NoMemory));
        assert_eq!(rig.alloc_pages_at(Pfn(0x3000), 0, QUIET).err(), Some(AllocError::NoMemory));
        assert_eq!(rig.alloc_pages_bulk(QUIET, &mut [None; 4]).unwrap(), 0);
        assert!(rig.kmalloc(100_000, QUIET).is_err());
        let sure = rig.take(Gfp::KERNEL | Gfp::NOFAIL, 0).unwrap();
        // Four just now and the third above; the one that must not fail was not asked about.
        assert_eq!(rig.fail_page_alloc_injected(), 5);
        rig.set_fail_page_alloc(FaultPlan::Off, None);
        rig.release(took.into_iter().flatten().chain([sure, rig.take(QUIET, 0).unwrap()]));
        assert_eq!(rig.fail_page_alloc_injected(), 5);
    });
}

#[test]
fn only_the_lines_that_are_meant_fail() {
    let rig = Rig::flat();
    rig.run(|_| {
        let mine = FaultSite { file: "owner/faults.rs", lines: (line!() + 3, line!() + 4) };
        rig.set_fail_page_alloc(FaultPlan::From(0), Some(mine));
        let above = rig.alloc_page(QUIET).unwrap();
        assert!(rig.alloc_page(QUIET).is_err());
        assert!(rig.__get_free_pages(QUIET, 1).is_err());
        let below = rig.alloc_page(QUIET).unwrap();
        // What the slab layer asks for is asked for elsewhere.
        let object = rig.kmalloc(64, QUIET).unwrap();
        let other = FaultSite { file: "elsewhere.rs", ..mine };
        rig.set_fail_page_alloc(FaultPlan::From(0), Some(other));
        let free = rig.alloc_page(QUIET).unwrap();
        rig.set_fail_page_alloc(FaultPlan::Off, None);
        assert_eq!(rig.fail_page_alloc_injected(), 2);
        [above, below, free].iter().for_each(|page| rig.__free_page(page).unwrap());
        // SAFETY: not used after.
        unsafe { rig.kfree(object.as_ptr()).unwrap() };
    });
}

#[test]
fn a_failure_is_reported_as_one() {
    let rig = Rig::flat();
    rig.run(|_| {
        rig.set_fail_page_alloc(FaultPlan::From(0), None);
        let mark = rig.mark();
        rig.alloc_pages(Gfp::KERNEL, 1).unwrap_err();
        let report = rig.one_report(mark);
        assert!(report.starts_with("page allocation failure: order:1, "), "{report}");
    });
}
