//! Mistakes: each is refused and reported, and memory stays as it was.

use super::{Bench, Verdict, block::Block, check, fail};
use crate::{platform, println, serial};
use kmem::{
    AllocError, Misuse,
    context::Section,
    gfp::Gfp,
    platform::Level,
    types::{DEFAULT_MAX_ORDER, Pfn},
};

/// Frees wrongly in every way there is, and asks for what the context does not allow.
pub fn run(bench: &mut Bench) -> Verdict {
    let kmem = bench.kmem;
    let reports = serial::reports(Level::Bug) + serial::reports(Level::Warning);
    let block = match Block::alloc(kmem, Gfp::KERNEL, 2, bench.rng.u64(..)) {
        Ok(block) => block,
        Err(error) => fail!("order 2: {error}"),
    };
    block.fill(1);
    let (page, pfn) = (block.page(), block.pfn());
    let free = kmem.nr_free_pages();

    for given in [0, 1, 3] {
        let wrong = kmem.__free_pages(page, given);
        check!(
            wrong == Err(Misuse::WrongOrder { pfn, given, actual: 2 }),
            "freeing an order-2 block with order {given}: {wrong:?}"
        );
    }
    let Some(tail) = kmem.pfn_to_page(Pfn(pfn.0 + 1)) else { fail!("pfn {pfn} + 1 has no page") };
    let wrong = kmem.__free_pages(tail, 0);
    check!(wrong.is_err(), "freeing the second frame of a block: {wrong:?}");
    let wrong = kmem.__free_pages(page, DEFAULT_MAX_ORDER + 1);
    check!(wrong.is_err(), "freeing with an order that does not exist: {wrong:?}");
    check!(kmem.nr_free_pages() == free, "a refused free changed the number of free frames");
    block.verify(1)?;

    block.free(kmem)?;
    let twice = kmem.__free_pages(page, 2);
    check!(twice == Err(Misuse::DoubleFree { pfn }), "freeing twice: {twice:?}");
    let Some(image) = kmem.pfn_to_page(Pfn(0x100)) else { fail!("the image has no page") };
    let wrong = kmem.__free_pages(image, 0);
    check!(
        wrong == Err(Misuse::NeverAllocated { pfn: Pfn(0x100) }),
        "freeing the image: {wrong:?}"
    );

    let refused = kmem.alloc_pages(Gfp::KERNEL, DEFAULT_MAX_ORDER + 1).map(|_| ());
    check!(matches!(refused, Err(AllocError::Invalid(_))), "order above MAX_ORDER: {refused:?}");
    for (section, gfp) in [
        (Section::Preempt, Gfp::KERNEL),
        (Section::Softirq, Gfp::KERNEL),
        (Section::Hardirq, Gfp::KERNEL),
        (Section::Nmi, Gfp::ATOMIC),
    ] {
        platform::CPU.enter(section);
        let refused = kmem.alloc_pages(gfp, 0).map(|_| ());
        platform::CPU.leave(section);
        check!(refused == Err(AllocError::Context), "{gfp:?} in {section:?}: {refused:?}");
    }
    let reports = serial::reports(Level::Bug) + serial::reports(Level::Warning) - reports;
    check!(reports >= 10, "only {reports} reports for 12 mistakes");
    println!("misuse: 12 mistakes refused, {reports} reports");
    Ok(())
}
