//! A machine for [`kmem`] inside a Linux process \[X1\].
//!
//! # Concepts
//! What the core takes for hardware is real here: physical memory is a memfd, and its direct map and
//! every further mapping of a frame are mappings of that file, so two addresses of one frame alias and
//! a hole faults (`memory`); a CPU is a slot that a thread holds while it runs (`slot`, `queue`);
//! an interrupt is a signal that lands between two instructions of the thread on the CPU (`irq`). A
//! process may have any number of machines.
//!
//! [`KmemGlobal`] makes kmem the global allocator of a program. Its machine is one of another kind, over private
//! memory, whose CPUs threads take by themselves (`global`).
//!
//! ```
//! use kmem::platform::Platform;
//! use kmem_hosted::{Hosted, Shape};
//!
//! let machine = Hosted::new(Shape::x86_64(64 << 20))?;
//! let cpu = machine.run(|_process| machine.this_cpu().map(|cpu| cpu.id()))?;
//! assert!(cpu.is_some());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Implementation
//! From the bottom up: `sys` (system calls), `shape`, `memory`, `vmalloc`, `report`, `stats`, `queue` (who may
//! run where), `protocol` (who is on a slot and what is pending for it), `slot` (the thread-local side),
//! `irq` (signal handlers), [`Hosted`], which ties them together, `platform` (what the core sees of it), and `stack`
//! (code that runs on the machine's stacks; x86-64).
//!
//! # Limits
//! **Linux, 64 bits.** A machine's memory has to fit into the address space several times.
//!
//! **Fork.** The memory is `MAP_SHARED`: a forked child would share every frame with its parent while each
//! has its own copy of the tables that say who owns it. A process with machines must not use one in a
//! forked child; starting another program (`std::process::Command`) is fine. [`KmemGlobal`] goes on in a child.
//!
//! **Signals.** Two real-time signals of the process are taken, and, for machines with a KFENCE pool, SIGSEGV: faults
//! that are no machine's go to the handler that was there before. System calls of threads that run on a
//! machine are interrupted; those that Linux does not restart return `EINTR`.
//!
//! # Locking
//! Each module says its own.

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
compile_error!("hosted machines need 64-bit Linux");

mod fault;
mod global;
mod highmem;
mod hosted;
mod irq;
mod machine;
mod memory;
mod platform;
mod protocol;
mod queue;
mod rcu;
mod report;
mod shape;
mod slot;
#[cfg(target_arch = "x86_64")]
mod stack;
mod stats;
mod sys;
mod vmalloc;

pub use global::{GlobalPlatform, KmemGlobal};
pub use hosted::{
    AttachError, Hosted, HostedError, IrqHandler, SoftirqHandler, Switch, SwitchHook,
};
pub use machine::{CpuError, Machine, MachineError};
pub use memory::{FrameMapping, MapError};
pub use queue::OfflineError;
pub use report::{REPORT_MAX, ReportLog, Sink};
pub use shape::{Bank, PAGE_SHIFT, PAGE_SIZE, Shape, ShapeError, ZoneLimit};
#[cfg(target_arch = "x86_64")]
pub use stack::{StackError, call_on_stack};
pub use stats::CpuStats;
