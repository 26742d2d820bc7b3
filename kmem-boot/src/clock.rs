//! Time: the time-stamp counter, measured against the one clock every PC has.
//!
//! Channel 2 of the 8254 counts at 1.193182 MHz and can be gated and read without interrupts. One
//! 10 ms measurement gives the rates of the TSC and of the local APIC's timer.

use core::{
    arch::x86_64::_rdtsc,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};
use x86_64::instructions::port::Port;

const PIT_HZ: u64 = 1_193_182;
const MEASURE_TICKS: u16 = 11_932;

static TSC_START: AtomicU64 = AtomicU64::new(0);
/// TSC ticks in a millisecond; zero until measured.
static TSC_PER_MS: AtomicU64 = AtomicU64::new(0);

fn tsc() -> u64 {
    // SAFETY: every x86-64 processor has the counter, and ring 0 may always read it.
    unsafe { _rdtsc() }
}

/// Measures the TSC, and with it `other`, a counter that runs upwards; returns the latter's rate in Hz.
pub fn calibrate(mut other: impl FnMut() -> u64) -> u64 {
    let mut gate = Port::<u8>::new(0x61);
    let mut command = Port::<u8>::new(0x43);
    let mut channel2 = Port::<u8>::new(0x42);
    // SAFETY: the ports are the PC's timer and its gate; nothing else uses channel 2.
    unsafe {
        let keep = gate.read() & 0xfc;
        gate.write(keep | 1); // count, speaker off
        command.write(0b1011_0000); // channel 2, both bytes, mode 0: output rises at zero
        channel2.write(MEASURE_TICKS as u8);
        channel2.write((MEASURE_TICKS >> 8) as u8);
        let (tsc0, other0) = (tsc(), other());
        while gate.read() & 0x20 == 0 {
            core::hint::spin_loop();
        }
        let (tsc1, other1) = (tsc(), other());
        gate.write(keep);
        let per_ms = |ticks: u64| ticks * PIT_HZ / u64::from(MEASURE_TICKS) / 1000;
        TSC_START.store(tsc0, Relaxed);
        TSC_PER_MS.store(per_ms(tsc1 - tsc0).max(1), Relaxed);
        per_ms(other1 - other0) * 1000
    }
}

/// Nanoseconds since the clock was measured; zero before.
pub fn now_ns() -> u64 {
    match TSC_PER_MS.load(Relaxed) {
        0 => 0,
        per_ms => {
            let ticks = tsc().saturating_sub(TSC_START.load(Relaxed));
            (u128::from(ticks) * 1_000_000 / u128::from(per_ms)) as u64
        }
    }
}

/// TSC rate in MHz, for people.
pub fn mhz() -> u64 {
    TSC_PER_MS.load(Relaxed) / 1000
}
