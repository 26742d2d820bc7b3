//! The first serial port: everything the image says.
//!
//! There is no lock: a report from an interrupt handler may cut a line of the main flow in two, but
//! can never wait for it. The device holds all state, so a driver value is made for each message.

use core::{
    fmt::{self, Write},
    sync::atomic::{AtomicU32, Ordering::Relaxed},
};
use kmem::platform::Level;
use uart_16550::{Config, Uart16550, backend::PioBackend};

const COM1: u16 = 0x3f8;

/// The port as a [`Write`]r; line feeds go out as they are.
pub struct Serial;

fn uart() -> Option<Uart16550<PioBackend>> {
    // SAFETY: COM1's eight ports are the UART's on every PC, and this file alone uses them.
    unsafe { Uart16550::new_port(COM1) }.ok()
}

/// Sets speed and framing. Without a port, what is printed goes nowhere.
pub fn init() {
    if let Some(mut uart) = uart() {
        let _ = uart.init(Config::default());
    }
}

impl Write for Serial {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        uart().ok_or(fmt::Error)?.send_bytes_exact(s.as_bytes());
        Ok(())
    }
}

/// Prints; there is nowhere to report a failure to.
pub fn print(message: fmt::Arguments<'_>) {
    let _ = Serial.write_fmt(message);
}

/// Reports so far, by level.
static REPORTS: [AtomicU32; 3] = [const { AtomicU32::new(0) }; 3];

/// Prints a report of the allocator's and counts it.
pub fn report(level: Level, message: fmt::Arguments<'_>) {
    REPORTS[level as usize].fetch_add(1, Relaxed);
    print(format_args!("{message}\n"));
}

/// Reports of a level so far.
pub fn reports(level: Level) -> u32 {
    REPORTS[level as usize].load(Relaxed)
}

/// Prints a line on the serial port.
#[macro_export]
macro_rules! println {
    ($($arg:tt)*) => {
        $crate::serial::print(format_args!("{}\n", format_args!($($arg)*)))
    };
}
