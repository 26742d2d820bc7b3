//! Owners over vmalloc and kvmalloc \[O1\].

use super::{PAGE, at, read, write};
use kmem::{
    AllocError, Gfp,
    alloc::{KBox, KVec, KVmallocOn, VmArea, VmallocOn, flags::*},
    fault::FaultPlan,
    platform::PageProt,
    sync::irqs_disabled,
};
use kmem_hosted::Shape;
use kmem_test_support::Rig;

kmem::global! {
    /// This test's machine.
    mod mem: kmem_hosted::Hosted
}

#[test]
fn boxes_and_vectors_lie_where_their_allocator_says() {
    let m = Rig::pc();
    m.run(|_| {
        let (v, kv) = (VmallocOn(m.machine().kmem()), KVmallocOn(m.machine().kmem()));
        let boxed = KBox::new_with(v, [7u64; 100], GFP_KERNEL).unwrap();
        assert!(m.is_vmalloc_addr((&raw const *boxed).cast()));
        let small = KBox::new_with(kv, 7u64, GFP_KERNEL).unwrap();
        assert!(!m.is_vmalloc_addr((&raw const *small).cast()));
        // Alignment beyond a frame.
        #[repr(align(16384))]
        struct Wide(#[expect(dead_code, reason = "only its place matters")] u8);
        let wide = KBox::new_with(v, Wide(1), GFP_KERNEL).unwrap();
        assert!((&raw const *wide).addr().is_multiple_of(16384));
        let nothing = KBox::new_with(v, (), GFP_KERNEL).unwrap();

        let (mut vvec, mut kvvec) = (KVec::new_with(v), KVec::new_with(kv));
        let mut model = Vec::new();
        for i in 0..600_000u64 {
            vvec.push(i, GFP_KERNEL).unwrap();
            kvvec.push(i, GFP_KERNEL).unwrap();
            model.push(i);
        }
        assert_eq!((&vvec[..], &kvvec[..]), (&model[..], &model[..]));
        assert!(m.is_vmalloc_addr(vvec.as_ptr().cast()));
        assert!(m.is_vmalloc_addr(kvvec.as_ptr().cast()), "5 MiB are in no block");
        drop((boxed, small, wide, nothing, vvec, kvvec));
        assert_eq!(m.audit_vmalloc().unwrap().live, 0);
    });
}

#[test]
fn owners_without_a_size() {
    assert!(mem::VBox::new(1u8, GFP_KERNEL).is_err(), "no machine yet");
    let kmem = kmem::Kmem::bring_up(
        kmem_hosted::Hosted::new(Shape::x86_64(64 << 20)).unwrap(),
        Shape::x86_64(64 << 20).memblock().unwrap(),
        &kmem::Config { layout: kmem::zone::Layout::x86_64(), ..kmem::Config::default() },
    );
    let kmem = mem::init(kmem.unwrap()).ok().unwrap();
    let a = mem::VBox::new([1u8; 5000], GFP_KERNEL).unwrap();
    let b = mem::KVBox::new(2u8, GFP_KERNEL).unwrap();
    assert_eq!(size_of_val(&a), size_of::<usize>());
    let mut c = mem::VVec::with_capacity(10, GFP_KERNEL).unwrap();
    c.push(3u8, GFP_KERNEL).unwrap();
    let mut d = mem::KVVec::new();
    d.extend_from_slice(&[4u8; 100], GFP_KERNEL).unwrap();
    assert_eq!((a[4999], *b, c[0], d[99]), (1, 2, 3, 4));
    assert_eq!(kmem.audit_vmalloc().unwrap().live, 2);
    drop((a, b, c, d));
    kmem.vm_unmap_aliases();
    assert_eq!((kmem.audit_vmalloc().unwrap().live, kmem.audit_objects().unwrap().live), (0, 0));
}

#[test]
fn areas_own_their_frames() {
    let m = Rig::pc();
    let hosted = m.hosted().clone();
    m.run(|process| {
        let kmem = m.machine().kmem();
        let mut area = VmArea::new(kmem, 3 * PAGE - 7, Gfp::KERNEL | Gfp::ZERO).unwrap();
        assert_eq!(area.len(), 3 * PAGE);
        area.bytes_mut().unwrap()[2 * PAGE].write(9);
        assert_eq!(read(at(area.as_ptr(), 2 * PAGE)), 9);
        let page = area.page(2 * PAGE + 5).unwrap();
        assert!(area.page(3 * PAGE).is_none());
        // Shown a second time; the frames live as long as somebody shows them.
        let mut other = VmArea::map(kmem, &[page, page], PageProt::KERNEL).unwrap();
        assert!(other.bytes_mut().is_none());
        write(at(other.as_ptr(), PAGE + 1), 5);
        assert_eq!((read(at(other.as_ptr(), 1)), read(at(area.as_ptr(), 2 * PAGE + 1))), (5, 5));
        assert_eq!(page.page_count(), 3);
        irqs_disabled(&hosted, process, |_| drop(area));
        m.vm_unmap_aliases();
        assert_eq!((page.page_count(), read(at(other.as_ptr(), PAGE + 1))), (2, 5));
        let raw = other.into_raw();
        super::vfree(&m, raw);
        assert_eq!(page.page_count(), 0);
        let mark = m.mark();
        assert!(VmArea::map(kmem, &[page], PageProt::KERNEL).is_err(), "a free page");
        m.one_report(mark);
    });
}

#[test]
fn nothing_is_lost_where_memory_is() {
    let m = Rig::pc();
    m.run(|_| {
        let kmem = m.machine().kmem();
        let page = m.alloc_page(Gfp::KERNEL).unwrap();
        for n in 0.. {
            m.set_fault_plan(FaultPlan::Nth(n));
            let before = m.faults_injected();
            let made = || -> Result<(), AllocError> {
                let flags = GFP_KERNEL | __GFP_NOWARN;
                let mut vec = KVec::new_with(VmallocOn(kmem));
                vec.extend_from_slice(&[1u8; 10_000], flags)?;
                vec.extend_from_slice(&[1u8; 100_000], flags)?;
                let _area = VmArea::map(kmem, &[page; 20], PageProt::KERNEL)?;
                Ok(())
            }();
            m.set_fault_plan(FaultPlan::Off);
            assert_eq!((m.audit_vmalloc().unwrap().live, page.page_count()), (0, 1));
            if m.faults_injected() == before {
                made.unwrap();
                break;
            }
        }
        m.put_page(page).unwrap();
    });
}
