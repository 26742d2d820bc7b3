//! Mappings of high memory, as far as they take no call of the host's.

use super::Recorder;
use anyhow::{Result, anyhow};
use kmem::{Config, Gfp};
use kmem_hosted::{Machine, Shape};
use std::hint::black_box;

/// kmap and kunmap of a high page that somebody has mapped, and of a low page; a temporary mapping of a low page.
pub fn run(r: &Recorder, who: &str) -> Result<()> {
    let m = Machine::without_kswapd(Shape::x86_32(1 << 30), Config::default())?;
    m.run_on(Some(0), None, |_process| {
        let kmem = m.kmem();
        let (high, low) = (kmem.alloc_page(Gfp::HIGHUSER)?, kmem.alloc_page(Gfp::KERNEL)?);
        kmem.kmap(high)?;
        for (op, page) in [("kmap-high-pair", high), ("kmap-low-pair", low)] {
            r.twice(op, who, 1, |n| {
                for _ in 0..n {
                    if black_box(kmem.kmap(black_box(page))).is_ok() {
                        // SAFETY: mapped above, and the address is not used.
                        let _ = unsafe { kmem.kunmap(black_box(page)) };
                    }
                }
            })?;
        }
        r.twice("kmap-local-low-pair", who, 1, |n| {
            for _ in 0..n {
                if let Ok(at) = kmem.kmap_local_page(black_box(low)) {
                    // SAFETY: as above.
                    let _ = unsafe { kmem.kunmap_local(black_box(at.as_ptr())) };
                }
            }
        })?;
        // SAFETY: as above.
        unsafe { kmem.kunmap(high) }.map_err(|e| anyhow!("{e}"))?;
        [high, low]
            .into_iter()
            .try_for_each(|page| kmem.__free_page(page).map_err(|e| anyhow!("{e}")))
    })?
}

/// What the loops cost.
pub fn harness(r: &Recorder) -> Result<()> {
    for op in ["kmap-high-pair", "kmap-low-pair", "kmap-local-low-pair"] {
        r.twice(op, "harness", 1, |n| {
            for _ in 0..n {
                black_box(8_usize);
            }
        })?;
    }
    Ok(())
}
