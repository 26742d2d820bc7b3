//! The local APIC: a one-shot timer and interrupts to oneself.
//!
//! The old 8259 pair is masked. The timer is armed for one interrupt at a time, and its handler arms
//! it again, so the interval may differ from one interrupt to the next: a fixed beat could fall in
//! step with the code it interrupts and keep missing the same instructions.

use crate::clock;
use core::{
    ptr,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};
use x86_64::{instructions::port::Port, registers::model_specific::ApicBase};

/// Vector of the timer.
pub const TIMER_VECTOR: u8 = 0x40;
/// Vector of an interrupt that the CPU sends itself.
pub const IPI_VECTOR: u8 = 0x41;
/// Vector for interrupts withdrawn before they were delivered; wants no end-of-interrupt.
pub const SPURIOUS_VECTOR: u8 = 0xff;

const EOI: usize = 0xb0;
const SPURIOUS: usize = 0xf0;
const COMMAND_LOW: usize = 0x300;
const LVT_TIMER: usize = 0x320;
const INITIAL_COUNT: usize = 0x380;
const CURRENT_COUNT: usize = 0x390;
const DIVIDE: usize = 0x3e0;

const MASKED: u32 = 1 << 16;
const ENABLED: u32 = 1 << 8;
const TO_SELF: u32 = 1 << 18;
const DIVIDE_BY_1: u32 = 0b1011;

/// Physical address of the registers; zero until [`init`].
static REGISTERS: AtomicU64 = AtomicU64::new(0);
static TIMER_HZ: AtomicU64 = AtomicU64::new(0);

fn register(offset: usize) -> *mut u32 {
    ptr::with_exposed_provenance_mut(REGISTERS.load(Relaxed) as usize + offset)
}

fn write(offset: usize, value: u32) {
    // SAFETY: `init` found the registers in the identity map, uncached; offsets are the manual's.
    unsafe { register(offset).write_volatile(value) };
}

fn read(offset: usize) -> u32 {
    // SAFETY: as in `write`.
    unsafe { register(offset).read_volatile() }
}

/// Where the firmware put the registers: one frame that must be mapped uncached.
pub fn base() -> u64 {
    ApicBase::read().0.start_address().as_u64()
}

/// Masks the 8259s, switches the local APIC on and measures the timer. Interrupts are masked.
pub fn init() {
    // SAFETY: the data ports of the two 8259s; all lines masked.
    unsafe {
        Port::<u8>::new(0x21).write(0xff);
        Port::<u8>::new(0xa1).write(0xff);
    }
    REGISTERS.store(base(), Relaxed);
    write(SPURIOUS, ENABLED | u32::from(SPURIOUS_VECTOR));
    write(DIVIDE, DIVIDE_BY_1);
    write(LVT_TIMER, MASKED | u32::from(TIMER_VECTOR));
    write(INITIAL_COUNT, u32::MAX);
    let hz = clock::calibrate(|| u64::from(u32::MAX - read(CURRENT_COUNT)));
    TIMER_HZ.store(hz, Relaxed);
    write(INITIAL_COUNT, 0);
    write(LVT_TIMER, u32::from(TIMER_VECTOR));
}

/// Rate of the timer in MHz, for people.
pub fn timer_mhz() -> u64 {
    TIMER_HZ.load(Relaxed) / 1_000_000
}

/// Asks for one timer interrupt in `ns` nanoseconds, in place of the one asked for before.
pub fn arm(ns: u64) {
    let ticks = u128::from(ns) * u128::from(TIMER_HZ.load(Relaxed)) / 1_000_000_000;
    write(INITIAL_COUNT, ticks.clamp(1, u128::from(u32::MAX)) as u32);
}

/// Interrupts this CPU with [`IPI_VECTOR`] as soon as interrupts are unmasked.
pub fn interrupt_self() {
    write(COMMAND_LOW, TO_SELF | u32::from(IPI_VECTOR));
}

/// Tells the APIC that the interrupt was served.
pub fn end_of_interrupt() {
    write(EOI, 0);
}
