//! Who holds each page, and whose requests fail \[D1, D2, T1\].

mod faults;
mod notes;
mod random;
mod reports;
mod texts;

use kmem::{Config, Pfn, page_alloc::PageOwner};
use kmem_hosted::{Machine, Shape};
use kmem_test_support::{MIB, Rig};

/// A machine of one zone that notes owners.
fn noting() -> Rig {
    Rig::new(Shape::no_dma(64 * MIB), Config { page_owner: true, ..Config::default() })
}

/// The line of this test's file that holds a frame.
#[track_caller]
fn line(m: &Machine, pfn: Pfn) -> u32 {
    m.page_owner(pfn).unwrap().allocated_at.unwrap().line()
}

/// All blocks that are held.
fn held(m: &Machine) -> Vec<PageOwner> {
    let mut all = Vec::new();
    m.each_page_owner(|owner| all.push(*owner));
    all
}
