//! Interrupts and exceptions.
//!
//! # Concepts
//! Exceptions are fatal: they say what happened and where, and end the machine. Interrupts (the local
//! APIC's timer, an interrupt the CPU sends itself) enter the CPU's context word as hard interrupts
//! and run one hook. So does the *single step*: with the trap flag set the processor raises a debug
//! exception after every instruction, and each that interrupts could have followed is taken for one.
//!
//! # Implementation
//! Every gate is an interrupt gate on an IST stack. The precompiled `core` keeps data in the 128
//! bytes below its stack pointer (the red zone), so no handler may start on the interrupted stack.
//! Gates mask interrupts, hence no IST stack is ever entered twice by interrupts; NMI, double fault
//! and machine check have a stack of their own, as have the other exceptions.
//!
//! The first stacks are part of the image. When kmem is up the CPU gets its interrupt stack, and threads'
//! stacks for the rest, all of them with a guard page below \[K2\].

use crate::{
    apic, exit,
    platform::{self, BareMetal},
    println,
    stack::Stack,
};
use core::{
    arch::{asm, global_asm},
    cell::UnsafeCell,
    ptr,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
};
use kmem::{AllocError, Kmem, context::Section};
use spin::Once;
use x86_64::{
    VirtAddr,
    instructions::tables,
    registers::{
        control::Cr2,
        rflags::RFlags,
        segmentation::{CS, SS, Segment},
    },
    structures::{
        DescriptorTablePointer,
        gdt::{Descriptor, GlobalDescriptorTable},
        tss::TaskStateSegment,
    },
};

global_asm!(include_str!("vectors.s"));

unsafe extern "C" {
    static interrupt_stubs: [[u8; 16]; 256];
}

const IST_BYTES: usize = 64 << 10;
static DEVICE_STACK: Stack<IST_BYTES> = Stack::new();
static EXCEPTION_STACK: Stack<IST_BYTES> = Stack::new();
static NMI_STACK: Stack<IST_BYTES> = Stack::new();
static STEP_STACK: Stack<IST_BYTES> = Stack::new();
/// In the order of the IST, which counts from 1.
const STACKS: [(&str, &Stack<IST_BYTES>); 4] = [
    ("interrupt", &DEVICE_STACK),
    ("exception", &EXCEPTION_STACK),
    ("NMI", &NMI_STACK),
    ("single step", &STEP_STACK),
];

const DEBUG_VECTOR: u8 = 1;

/// The IST slot of a vector.
const fn ist_of(vector: u8) -> u8 {
    match vector {
        DEBUG_VECTOR => 4,
        2 | 8 | 18 => 3,
        0..32 => 2,
        _ => 1,
    }
}

/// What interrupted the CPU.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The local APIC's timer.
    Timer,
    /// The CPU itself, by `Platform::kick`.
    Ipi,
    /// One instruction was executed.
    Step,
}

static HOOK: Once<fn(Source)> = Once::new();
static STEPPING: AtomicBool = AtomicBool::new(false);

/// The gate of one vector.
#[derive(Clone, Copy)]
#[repr(C)]
struct Gate {
    offset_low: u16,
    selector: u16,
    ist: u8,
    /// Present, interrupt gate.
    kind: u8,
    offset_mid: u16,
    offset_high: u32,
    reserved: u32,
}

#[repr(C, align(16))]
struct Gates([Gate; 256]);

struct Tables {
    tss: UnsafeCell<TaskStateSegment>,
    gates: Gates,
}

// SAFETY: the processor reads the task state when an interrupt comes; it is written to with interrupts off, by the one
// CPU.
unsafe impl Sync for Tables {}

/// The stacks from kmem.
struct KernelStacks {
    kmem: &'static Kmem<BareMetal>,
    /// In the order of the IST: where each begins, and its bytes.
    places: [(usize, usize); STACKS.len()],
}

static KERNEL_STACKS: Once<KernelStacks> = Once::new();

static TABLES: Once<Tables> = Once::new();
static GDT: Once<GlobalDescriptorTable> = Once::new();

fn gates(selector: u16) -> Gates {
    let stubs = (&raw const interrupt_stubs).addr() as u64;
    Gates(core::array::from_fn(|vector| {
        let offset = stubs + 16 * vector as u64;
        Gate {
            offset_low: offset as u16,
            selector,
            ist: ist_of(vector as u8),
            kind: 0x8e,
            offset_mid: (offset >> 16) as u16,
            offset_high: (offset >> 32) as u32,
            reserved: 0,
        }
    }))
}

/// Loads segments, task state and gates. `hook` runs for every interrupt, in hard interrupt context.
pub fn init(hook: fn(Source)) {
    HOOK.call_once(|| hook);
    let tables = TABLES.call_once(|| {
        let mut tss = TaskStateSegment::new();
        for (slot, (_, stack)) in STACKS.iter().enumerate() {
            stack.paint();
            tss.interrupt_stack_table[slot] = VirtAddr::new(stack.top());
        }
        // The code segment is the GDT's first entry, at offset 8.
        Tables { tss: UnsafeCell::new(tss), gates: gates(8) }
    });
    let mut segments = GlobalDescriptorTable::new();
    let code = segments.append(Descriptor::kernel_code_segment());
    let data = segments.append(Descriptor::kernel_data_segment());
    // SAFETY: it is a task state that lives for ever.
    let task = segments.append(unsafe { Descriptor::tss_segment_unchecked(tables.tss.get()) });
    GDT.call_once(|| segments).load();
    let idt = DescriptorTablePointer {
        limit: (size_of::<Gates>() - 1) as u16,
        base: VirtAddr::from_ptr(&tables.gates),
    };
    // SAFETY: the selectors are the table's just loaded; gates and task state live for ever, the
    // stubs follow the processor's conventions, and each IST slot used has a stack.
    unsafe {
        CS::set_reg(code);
        SS::set_reg(data);
        tables::load_tss(task);
        tables::lidt(&idt);
    }
}

/// Frames of the interrupt stack. The self-test's handlers, when they meet an empty machine, use one to its last bytes.
const IRQ_FRAMES: usize = 2;
/// Frames of the stacks that are not for interrupts.
const EXCEPTION_FRAMES: usize = 4;

/// Lets interrupts and exceptions run on stacks of kmem's from now on. Called once, with interrupts off.
pub fn use_kernel_stacks(kmem: &'static Kmem<BareMetal>) -> Result<(), AllocError> {
    kmem.alloc_irq_stacks(IRQ_FRAMES)?;
    let irq = kmem.irq_stack(0).ok_or(AllocError::NoMemory)?;
    let mut stacks = [(irq.start, irq.len()); STACKS.len()];
    for stack in &mut stacks[1..] {
        let low = kmem.alloc_thread_stack(EXCEPTION_FRAMES)?;
        *stack = (low.addr().get(), EXCEPTION_FRAMES * kmem.page_size());
    }
    let Some(tables) = TABLES.get() else { return Ok(()) };
    for (slot, (low, size)) in stacks.iter().enumerate() {
        // SAFETY: the task state is there for ever, and nothing but an NMI reads it now, which finds the old or the new
        // address, both good. The stacks are never given back.
        unsafe {
            let place = &raw mut (*tables.tss.get()).interrupt_stack_table[slot];
            place.write(VirtAddr::new((low + size) as u64));
        }
    }
    KERNEL_STACKS.call_once(|| KernelStacks { kmem, places: stacks });
    Ok(())
}

/// Where each interrupt stack is from, what it is for, its deepest use in bytes, and its size.
pub fn stack_use() -> impl Iterator<Item = (&'static str, &'static str, usize, usize)> {
    let first = STACKS.iter().map(|(name, stack)| ("image", *name, stack.high_water(), IST_BYTES));
    let kernel = KERNEL_STACKS.get().into_iter().flat_map(|of| {
        STACKS.iter().zip(&of.places).map(|((name, _), (low, size))| {
            let low = ptr::without_provenance(*low);
            // The two words at the end are not for use.
            let unused = of.kmem.stack_not_used(low).map_or(0, |unused| unused + 16);
            let overrun = of.kmem.stack_end_corrupted(low).unwrap_or(true);
            ("kmem", *name, if overrun { *size } else { size - unused }, *size)
        })
    });
    first.chain(kernel)
}

/// Runs `f` with an interrupt after every instruction that leaves interrupts unmasked.
pub fn single_stepped<R>(f: impl FnOnce() -> R) -> R {
    STEPPING.store(true, Relaxed);
    // SAFETY: sets the trap flag; vector 1 is prepared for it. Own code has no red zone to spoil.
    unsafe { asm!("pushfq", "or qword ptr [rsp], 0x100", "popfq") };
    let result = f();
    // SAFETY: clears the trap flag.
    unsafe { asm!("pushfq", "and qword ptr [rsp], ~0x100", "popfq") };
    STEPPING.store(false, Relaxed);
    result
}

/// What the stubs leave on the stack.
#[repr(C)]
pub struct Frame {
    general: [u64; 15],
    vector: u64,
    error: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

#[unsafe(no_mangle)]
extern "C" fn interrupt_entry(frame: &Frame) {
    match frame.vector as u8 {
        apic::TIMER_VECTOR => serve(Source::Timer),
        apic::IPI_VECTOR => serve(Source::Ipi),
        apic::SPURIOUS_VECTOR => {}
        DEBUG_VECTOR if STEPPING.load(Relaxed) => {
            if frame.rflags & RFlags::INTERRUPT_FLAG.bits() != 0 {
                hard_interrupt(Source::Step);
            }
        }
        vector => fatal(vector, frame),
    }
}

fn serve(source: Source) {
    hard_interrupt(source);
    apic::end_of_interrupt();
}

/// Runs the hook as a hard interrupt; the context word ends as it was found.
fn hard_interrupt(source: Source) {
    let cpu = &platform::CPU;
    cpu.enter(Section::Hardirq);
    let masked = cpu.mask_irqs();
    if let Some(hook) = HOOK.get() {
        hook(source);
    }
    if !masked {
        cpu.unmask_irqs();
    }
    cpu.leave(Section::Hardirq);
}

#[cold]
#[inline(never)]
fn fatal(vector: u8, frame: &Frame) -> ! {
    let name = match vector {
        0 => "divide error",
        1 => "debug",
        2 => "NMI",
        3 => "breakpoint",
        6 => "invalid opcode",
        8 => "double fault",
        12 => "stack fault",
        13 => "general protection",
        14 => "page fault",
        18 => "machine check",
        _ => "unexpected interrupt",
    };
    println!(
        "EXCEPTION {vector} ({name}) error={:#x} rip={:#x} cs={:#x} rflags={:#x} rsp={:#x} cr2={:#x}",
        frame.error,
        frame.rip,
        frame.cs,
        frame.rflags,
        frame.rsp,
        Cr2::read_raw(),
    );
    let faulted = ptr::without_provenance(Cr2::read_raw() as usize);
    if let Some(stack) = KERNEL_STACKS.get().and_then(|of| of.kmem.stack_of(faulted)) {
        println!("  {stack}");
    }
    println!("  {:?}, path {:?}", platform::CPU.context(), platform::CPU.path());
    for (name, value) in REGISTERS.iter().zip(frame.general) {
        println!("  {name}={value:#018x}");
    }
    exit::exit(exit::Status::Crash)
}

/// The general registers in the order the stubs leave them.
const REGISTERS: [&str; 15] = [
    "r15", "r14", "r13", "r12", "r11", "r10", "r9", "r8", "rbp", "rdi", "rsi", "rdx", "rcx", "rbx",
    "rax",
];
