//! Allocating and freeing at random keeps every frame accounted for.
use kmem::{Config, Gfp, Kmem};
use kmem_hosted::{Hosted, Shape};

fn xs(s: &mut u64) -> u64 {
    *s ^= *s << 13;
    *s ^= *s >> 7;
    *s ^= *s << 17;
    *s
}

#[test]
fn random_orders_add_up() {
    for mb in [64u64, 256, 1024] {
        let shape = Shape::x86_64(mb << 20);
        let boot = shape.memblock().unwrap();
        let hosted = Hosted::new(shape).unwrap();
        let kmem = Kmem::bring_up(hosted, boot, &Config::default()).unwrap();
        let before = kmem.audit().unwrap();
        kmem.platform()
            .run(|_p| {
                let mut live = Vec::new();
                let mut s = 0x1234_5678_9abcu64;
                for i in 0..200_000 {
                    let r = xs(&mut s);
                    if r % 100 < 55 {
                        let order = ((r >> 8) % 11).min((r >> 16) % 11).min((r >> 24) % 11) as u32;
                        let gfp =
                            [Gfp::KERNEL, Gfp::HIGHUSER_MOVABLE, Gfp::KERNEL | Gfp::RECLAIMABLE]
                                [((r >> 32) % 3) as usize];
                        if let Ok(p) = kmem.alloc_pages(gfp | Gfp::NOWARN | Gfp::NORETRY, order) {
                            assert!(kmem.page_to_pfn(p).unwrap().is_aligned(order));
                            live.push((p, order));
                        }
                    } else if !live.is_empty() {
                        let (p, o) = live.swap_remove((r >> 8) as usize % live.len());
                        kmem.__free_pages(p, o).unwrap();
                    }
                    if i % 20_000 == 0 {
                        kmem.audit().unwrap();
                    }
                }
                for (p, o) in live {
                    kmem.__free_pages(p, o).unwrap();
                }
                kmem.audit().unwrap();
                kmem.drain_this_cpu();
            })
            .unwrap();
        let after = kmem.audit().unwrap();
        assert_eq!(before, after);
        let mut out = String::new();
        for z in kmem.zones() {
            out += &format!("{} {:?} {:?}\n", z.name(), kmem.nr_free(z), z.watermarks());
        }
        println!("{out}{after:?}");
    }
}
