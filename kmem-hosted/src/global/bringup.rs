//! Bringing the global machine up: at the first use, once, without a heap.
//!
//! # Concepts
//! Whoever comes first brings the machine up, others wait. Nothing on the way asks for heap memory: memory is mapped,
//! CPUs are a static, and the core's bring-up has no heap by nature. What the C library may allocate when a
//! key is made or handlers are registered is its own business, and comes from its own allocator.
//!
//! # Locking
//! `STATE`, a futex word.

use super::{GlobalPlatform, MAX_ORDER, gate, huge, platform, seats};
use crate::{report, sys};
use core::sync::atomic::{
    AtomicU32,
    Ordering::{Acquire, Relaxed, Release},
};
use kmem::{
    Config, Kmem, ZoneType,
    alloc::Seat,
    memblock::Memblock,
    platform::Level,
    zone::{Layout, ZoneLimit},
};

const DOWN: u32 = 0;
const STARTING: u32 = 1;
const UP: u32 = 2;
/// The host refused memory, for good.
const FAILED: u32 = 3;

static STATE: AtomicU32 = AtomicU32::new(DOWN);
static MACHINE: Seat<GlobalPlatform> = Seat::new();

/// Bytes of a pageblock, of which the machine has a whole number.
const PAGEBLOCK: usize = 2 << 20;
/// The smallest machine worth its tables.
const LEAST: usize = 16 << 20;
/// Alignment of the direct map: that of the largest block.
const ALIGN: usize = super::LARGEST;

/// The machine; `None` before it is up.
#[inline(always)]
pub(super) fn machine() -> Option<&'static Kmem<GlobalPlatform>> {
    MACHINE.get()
}

/// Sees to it that the machine is up; `false` if that is not possible.
#[cold]
pub(super) fn ensure(memory: usize) -> bool {
    loop {
        // Acquire pairs with the Release below.
        match STATE.load(Acquire) {
            UP => return true,
            FAILED => return false,
            STARTING => sys::futex_wait(&STATE, STARTING, None),
            _ => {
                if STATE.compare_exchange(DOWN, STARTING, Relaxed, Relaxed).is_err() {
                    continue;
                }
                let state = if start(memory).is_some() { UP } else { FAILED };
                // Release pairs with the Acquire above.
                STATE.store(state, Release);
                sys::futex_wake(&raw const STATE, u32::MAX);
            }
        }
    }
}

/// Waits until nobody is bringing the machine up: a fork in the middle of that would leave the child without.
pub(super) fn settle() {
    while STATE.load(Acquire) == STARTING {
        sys::futex_wait(&STATE, STARTING, None);
    }
}

fn start(memory: usize) -> Option<()> {
    let wanted = if memory == 0 { sys::host_memory() } else { memory };
    let mut bytes = wanted.max(LEAST).checked_next_multiple_of(PAGEBLOCK)?;
    // A host that does not overcommit may have no room for so much at once.
    let base = loop {
        match huge::reserve(bytes, ALIGN) {
            Some(base) => break base,
            None if bytes / 2 < LEAST => return None,
            None => bytes = (bytes / 2).next_multiple_of(PAGEBLOCK),
        }
    };
    platform::set_memory(base, bytes);
    let mut boot = Memblock::new();
    boot.add(0, bytes as u64, 0).ok()?;
    let limits = [ZoneLimit { zone: ZoneType::Normal, end: u64::MAX }];
    let config = Config {
        layout: Layout::new(&limits).ok()?,
        max_order: MAX_ORDER,
        // One lock for each CPU of the host that may want one at a time.
        areas: Some(sys::host_cpus()),
        ..Config::default()
    };
    seats::prepare()?;
    match Kmem::bring_up(GlobalPlatform, boot, &config) {
        Ok(kmem) => {
            gate::prepare();
            MACHINE.set(kmem).ok().map(|_| ())
        }
        Err(e) => {
            report::print(Level::Bug, format_args!("the global machine does not come up: {e}"));
            None
        }
    }
}
