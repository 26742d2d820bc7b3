//! A freestanding x86-64 image that boots kmem and tests it on a machine of its own \[X2\].
//!
//! `boot.s` enters [`kmain`] in 64-bit mode with the first 4 GiB mapped to themselves. From there:
//! the loader's memory map becomes boot memory, boot memory becomes zones, the tests run, and the
//! verdict is QEMU's exit status.

#![no_std]
#![no_main]

mod apic;
mod clock;
mod exit;
mod freestanding;
mod interrupts;
mod memory;
mod paging;
mod platform;
mod pvh;
mod selftest;
mod serial;
mod stack;
mod vmalloc;

use core::{arch::global_asm, fmt};
use exit::{Status, exit};
use fastrand::Rng;
use kmem::{Config, Kmem, zone::Layout};
use platform::BareMetal;
use pvh::BootInfo;
use selftest::Bench;
use serial::Serial;
use spin::Once;
use stack::Stack;
use x86_64::instructions::interrupts as irq;

const BOOT_STACK_BYTES: usize = 256 << 10;

#[unsafe(no_mangle)]
static BOOT_STACK: Stack<BOOT_STACK_BYTES> = Stack::new();

global_asm!(include_str!("boot.s"), stack_bytes = const BOOT_STACK_BYTES);

/// The allocator. A static, as interrupt handlers use it too.
static KMEM: Once<Kmem<BareMetal>> = Once::new();

/// Called by `boot.s` with the loader's start info.
#[unsafe(no_mangle)]
extern "C" fn kmain(start_info: u64) -> ! {
    serial::init();
    BOOT_STACK.paint_unused();
    println!("kmem-boot {}", env!("CARGO_PKG_VERSION"));
    // SAFETY: as passed by the loader; boot.s mapped 4 GiB, and memory not handed out stays as it is.
    let info = match unsafe { BootInfo::read(start_info) } {
        Ok(info) => info,
        Err(error) => fail(format_args!("{error}")),
    };
    for region in info.regions() {
        println!("map: {region}");
    }
    // SAFETY: the only call, with interrupts off.
    let boot = match unsafe { memory::init(&info) } {
        Ok(boot) => boot,
        Err(error) => fail(format_args!("boot memory: {error}")),
    };
    interrupts::init(selftest::on_interrupt);
    apic::init();
    println!("clock: TSC {} MHz, APIC timer {} MHz", clock::mhz(), apic::timer_mhz());

    // SAFETY: memory::init mapped all of it; gates, timer and clock are ready; one CPU was started.
    let platform = unsafe { BareMetal::new(&boot) };
    let config = Config { layout: Layout::x86_64(), ..Config::default() };
    let start = clock::now_ns();
    let kmem = match Kmem::bring_up(platform, boot, &config) {
        Ok(kmem) => KMEM.call_once(|| kmem),
        Err(error) => fail(format_args!("bring-up: {error}")),
    };
    println!(
        "kmem: up in {} us, {} KiB free, {} bytes a page",
        (clock::now_ns() - start) / 1000,
        kmem.nr_free_pages() * 4,
        size_of::<kmem::page::Page>(),
    );
    kmem.cpu_online(0);
    if let Err(error) = interrupts::use_kernel_stacks(kmem) {
        fail(format_args!("stacks: {error}"));
    }
    apic::arm(1);
    irq::enable();
    buddyinfo(kmem);

    let mut bench = Bench {
        kmem,
        rng: Rng::with_seed(info.option("seed").unwrap_or(1)),
        storm_ns: info.option("storm").unwrap_or(2).saturating_mul(1_000_000_000),
    };
    let passed = selftest::run(&mut bench);
    buddyinfo(kmem);
    if info.option("zoneinfo") == Some(1) && kmem.write_zoneinfo(&mut Serial).is_err() {
        fail(format_args!("no serial port to write zoneinfo to"));
    }
    let intact = stacks_intact();
    exit(if passed && intact { Status::Pass } else { Status::Fail })
}

/// Prints what `/proc/buddyinfo` would show.
fn buddyinfo(kmem: &Kmem<BareMetal>) {
    if kmem.write_buddyinfo(&mut Serial).is_err() {
        fail(format_args!("no serial port to write buddyinfo to"));
    }
}

/// Prints how deep each stack was used; whether none overflowed.
fn stacks_intact() -> bool {
    let boot = [("image", "boot", BOOT_STACK.high_water(), BOOT_STACK_BYTES)];
    let mut intact = true;
    for (origin, name, used, size) in boot.into_iter().chain(interrupts::stack_use()) {
        println!("stack {name} ({origin}): {used} of {size} bytes used");
        if used == size {
            println!("FAIL: stack {name} overflowed");
            intact = false;
        }
    }
    intact
}

fn fail(why: fmt::Arguments<'_>) -> ! {
    println!("FAIL: {why}");
    exit(Status::Fail)
}
