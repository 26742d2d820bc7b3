//! The `/proc` texts \[T1, R5\]: their form against a real Linux 6.12, their numbers against the machine,
//! and the distribution's `free`, `vmstat` and `slabtop` on them.
//!
//! `golden/` holds what Linux 6.12 showed on a PC with 512 MiB and two CPUs, built without CMA.

mod exact;
mod form;
mod numbers;
mod tools;

use kmem::{Config, PageAllocator, Platform, ZoneType, page_alloc::Reclaim};
use kmem_hosted::{Machine, Shape};
use std::fmt;

const MIB: u64 = 1 << 20;

/// The machine of the golden texts.
fn recorded() -> Machine {
    let mut shape = Shape::x86_64(512 * MIB);
    let end = shape.zones.last().unwrap().end;
    for zone in [ZoneType::Movable, ZoneType::Device] {
        shape.zones.push(kmem_hosted::ZoneLimit { zone, end });
    }
    Machine::without_kswapd(shape, Config::default()).unwrap()
}

/// A text of a machine, from one of the `write_` calls.
fn text(write: impl FnOnce(&mut dyn fmt::Write) -> fmt::Result) -> String {
    let mut text = String::new();
    write(&mut text).unwrap();
    text
}

/// All the texts of a machine, by name.
fn texts<P: Platform, R: Reclaim>(m: &PageAllocator<P, R>) -> [(&'static str, String); 5] {
    [
        ("buddyinfo", text(|w| m.write_buddyinfo(w))),
        ("zoneinfo", text(|w| m.write_zoneinfo(w))),
        ("pagetypeinfo", text(|w| m.write_pagetypeinfo(w))),
        ("meminfo", text(|w| m.write_meminfo(w))),
        ("vmstat", text(|w| m.write_vmstat(w))),
    ]
}
