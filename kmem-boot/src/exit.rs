//! Ending the machine with a status, through QEMU's isa-debug-exit device.
//!
//! QEMU exits with `(value << 1) | 1`. The values are chosen so that no status is one QEMU uses for
//! its own troubles (1) or for a reset with -no-reboot (0).

use x86_64::instructions::{hlt, interrupts, port::Port};

/// The device's port, as `cargo xtask boot` puts it on QEMU's command line.
const PORT: u16 = 0xf4;

/// How the run ended.
#[derive(Clone, Copy)]
#[repr(u32)]
pub enum Status {
    /// Every test passed: QEMU exits with 33.
    Pass = 0x10,
    /// A test failed, or the machine could not be brought up: 35.
    Fail = 0x11,
    /// A panic or an exception: 37.
    Crash = 0x12,
}

/// Ends the machine.
pub fn exit(status: Status) -> ! {
    interrupts::disable();
    // SAFETY: the port belongs to isa-debug-exit, or to nothing on a machine without it.
    unsafe { Port::new(PORT).write(status as u32) };
    loop {
        hlt();
    }
}
