//! Machines whose areas have addresses and nothing there: who touches them is refused, who does not is served.

use super::{PAGE, at, vfree};
use kmem::{
    AllocError, Config, Gfp,
    alloc::{KBox, KVec, KVmallocOn, KernelStack, VmArea, VmallocOn, flags::*},
    platform::PageProt,
    stack::StackAudit,
};
use kmem_hosted::Shape;
use kmem_test_support::{MIB, Rig};

#[test]
fn only_who_touches_nothing_is_served() {
    let m = Rig::new(Shape::no_dma(64 * MIB).without_page_tables(), Config::default());
    m.run(|_| {
        let kmem = m.machine().kmem();
        let area = m.vmalloc(3 * PAGE).unwrap();
        assert!(!super::readable(area.as_ptr()));
        let page = m.vmalloc_to_page(at(area, PAGE)).unwrap();
        const NONE: Option<AllocError> = Some(AllocError::NoMemory);

        let v = VmallocOn(kmem);
        assert_eq!(KBox::new_with(v, 1u8, GFP_KERNEL).err(), NONE);
        let mut vec = KVec::new_with(v);
        assert!(vec.push(1u8, GFP_KERNEL).is_err());
        let forever = GFP_KERNEL | __GFP_NOFAIL | __GFP_NOWARN;
        assert_eq!(KBox::new_with(v, 1u8, forever).err(), NONE, "at once");
        assert_eq!(VmArea::new(kmem, PAGE, Gfp::KERNEL).err(), NONE);
        assert_eq!(VmArea::map(kmem, &[page], PageProt::KERNEL).err(), NONE);
        assert_eq!(page.page_count(), 1);
        let mark = m.mark();
        assert_eq!(KernelStack::new(kmem, 2).err(), NONE);
        assert!(m.one_report(mark).contains("areas are not mapped here"));
        assert_eq!(m.alloc_irq_stacks(1), Err(AllocError::NoMemory));

        // kmalloc has what it has; the rest has no memory.
        let kv = KVmallocOn(kmem);
        let mut small = KVec::new_with(kv);
        small.extend_from_slice(&[7u8; 5000], GFP_KERNEL).unwrap();
        assert!(!m.is_vmalloc_addr(small.as_ptr()));
        assert!(small.reserve(8 << 20, GFP_KERNEL).is_err());
        assert!(small.iter().all(|byte| *byte == 7));
        assert_eq!(m.kvmalloc(8 << 20, Gfp::KERNEL), Err(AllocError::NoMemory));
        let block = m.kvmalloc(PAGE, Gfp::KERNEL).unwrap();
        // SAFETY: ours; refused, so it is used after.
        let grown = unsafe { m.kvrealloc(block.as_ptr(), 8 << 20, Gfp::KERNEL) };
        assert_eq!(grown, Err(AllocError::NoMemory));
        // SAFETY: not used after.
        unsafe { m.kvfree(block.as_ptr()).unwrap() };
        drop(small);
        vfree(&m, area);
        assert_eq!(m.audit_vmalloc().unwrap().live, 0);
        assert_eq!(m.audit_stacks(), Ok(StackAudit::default()));
    });
}
