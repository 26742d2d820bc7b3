//! Fault injection \[D1\]: the first, the second, the third… inner allocation of each operation fails, until there is
//! none left to fail; after each everything is as it was, and the operation works.

use super::PAGE;
use kmem::{AllocError, Config, Gfp, Page, fault::FaultPlan, platform::PageProt, vmalloc::VmFlags};
use kmem_hosted::Shape;
use kmem_test_support::{MIB, Rig};

/// What of a machine must be the same before and after.
fn counts(m: &Rig) -> (u64, u64, u64) {
    m.vm_unmap_aliases();
    m.drop_slab();
    let objects = m.audit_objects().unwrap();
    let areas = m.audit_vmalloc().unwrap();
    let frames = m.settle().allocated - objects.slab_frames - objects.own_frames;
    (objects.live, frames, areas.live)
}

/// Lets every `step`-th inner allocation of `op` fail in turn; each, on a new machine each time, if that is 1. `op`
/// gives back whatever it gets and says whether it got it. Returns how many there were, rounded up to a step.
fn each_fails(name: &str, step: u64, op: impl Fn(&Rig, &[&Page]) -> Result<(), AllocError>) -> u64 {
    let fresh = step == 1;
    let make = || Rig::new(Shape::no_dma(32 * MIB), Config::default());
    let mut m = make();
    for n in (0..).step_by(step as usize) {
        if fresh && n > 0 {
            m = make();
        }
        let fired = m.run(|_| {
            let pages: Vec<_> = (0..40).map(|_| m.alloc_page(Gfp::KERNEL).unwrap()).collect();
            let before = (!fresh || n > 0).then(|| counts(&m));
            let fired = m.faults_injected();
            m.set_fault_plan(FaultPlan::Nth(n));
            let done = op(&m, &pages);
            m.set_fault_plan(FaultPlan::Off);
            let fired = m.faults_injected() - fired;
            assert!(done.is_ok() || done == Err(AllocError::NoMemory), "{name}: {done:?}");
            assert!(done.is_ok() || fired > 0, "{name} fails by itself");
            assert!(
                pages.iter().all(|page| page.page_count() == 1),
                "{name}: pages after fault {n}"
            );
            let after = counts(&m);
            assert!(before.is_none_or(|before| before == after), "{name}: {before:?}, {after:?}");
            op(&m, &pages).unwrap();
            pages.iter().for_each(|page| m.put_page(page).unwrap());
            fired
        });
        if fired == 0 {
            return n;
        }
    }
    unreachable!("a fault plan beyond all inner allocations fires none")
}

/// No reports of failures.
const QUIET: Gfp = Gfp::KERNEL.union(Gfp::NOWARN);

#[test]
fn vmalloc_fails_whole() {
    for (frames, least, step) in [(1, 4, 1), (16, 16, 1), (17, 17, 1), (1100, 1100, 29)] {
        let op = |m: &Rig, _: &[&Page]| {
            let area = m.__vmalloc(frames * PAGE, QUIET)?;
            super::vfree(m, area);
            Ok(())
        };
        let failed = each_fails("vmalloc", step, op);
        assert!(failed >= least, "{failed} inner allocations for {frames} frames");
    }
    let huge = |m: &Rig, _: &[&Page]| {
        let area = m.vmalloc_huge((2 << 20) + 3 * PAGE, QUIET)?;
        super::vfree(m, area);
        Ok(())
    };
    assert!(each_fails("vmalloc_huge", 1, huge) >= 5);
    let surely = |m: &Rig, _: &[&Page]| {
        let area = m.__vmalloc(20 * PAGE, QUIET | Gfp::NOFAIL);
        assert!(area.is_ok(), "NOFAIL");
        super::vfree(m, area?);
        Ok(())
    };
    assert!(each_fails("__GFP_NOFAIL", 1, surely) >= 20);
}

#[test]
fn mappings_fail_whole() {
    for n in [1, 16, 40] {
        let map = |m: &Rig, pages: &[&Page]| {
            let area = m.vmap(&pages[..n], VmFlags::empty(), PageProt::KERNEL)?;
            // SAFETY: not used after.
            unsafe { m.vunmap(area.as_ptr()).unwrap() };
            Ok(())
        };
        assert!(each_fails("vmap", 1, map) >= 3);
        let put = |m: &Rig, pages: &[&Page]| {
            let area = m.vmap(&pages[..n], VmFlags::MAP_PUT_PAGES, PageProt::KERNEL)?;
            pages[..n].iter().for_each(|page| m.get_page(page).unwrap());
            super::vfree(m, area);
            Ok(())
        };
        assert!(each_fails("vmap, pages put", 1, put) >= 3);
        let sparse = |m: &Rig, pages: &[&Page]| {
            let area = m.get_vm_area(n * PAGE)?;
            m.vm_map_pages(area, &pages[..n], PageProt::KERNEL).unwrap();
            // SAFETY: not used after.
            unsafe { m.vunmap(area.as_ptr()).unwrap() };
            Ok(())
        };
        assert!(each_fails("get_vm_area", 1, sparse) >= 3);
    }
    let device = |m: &Rig, _: &[&Page]| {
        // Behind memory, where the file has nothing: this much is refused by the host.
        assert!(m.ioremap(64 * MIB, PAGE).is_err());
        Ok(())
    };
    each_fails("ioremap", 1, device);
}

#[test]
fn kvmalloc_falls_back_and_fails_whole() {
    for bytes in [100, 5 * PAGE, 4 << 20, (4 << 20) + 1] {
        let op = |m: &Rig, _: &[&Page]| {
            let block = m.kvzalloc(bytes, QUIET)?;
            // SAFETY: that many bytes, ours; not used after.
            unsafe {
                block.write_bytes(1, bytes);
                let block = m.kvrealloc(block.as_ptr(), bytes + PAGE, QUIET).inspect_err(|_| {
                    m.kvfree(block.as_ptr()).unwrap();
                })?;
                m.kvfree(block.as_ptr()).unwrap();
            }
            Ok(())
        };
        let failed = each_fails("kvmalloc", if bytes < 1 << 20 { 1 } else { 101 }, op);
        // A block each where there is one, and the other way where that fails.
        assert!(failed >= 2, "{failed} inner allocations for {bytes} bytes");
    }
}
