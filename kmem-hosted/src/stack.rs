//! Running code on a stack of the machine's \[K1\].
//!
//! # Implementation
//! A few instructions change the stack pointer, call, and change it back. They keep the old one in the frame pointer and
//! say so to the unwinder, so that a backtrace from the new stack goes on at the old one. A panic is caught on the
//! new stack and goes on on the old one.
//!
//! Signal handlers of machines run on the thread's alternate stack, not here: the processor's state alone may be larger
//! than a stack of one frame. That is also why a hosted machine does not use stacks of kmem's for its interrupts.
//!
//! # Locking
//! None.

use crate::Hosted;
use core::{arch::global_asm, ffi::c_void};
use kmem::alloc::KernelStack;
use std::{
    panic::{self, AssertUnwindSafe},
    thread,
};
use thiserror::Error;

/// Why code cannot run on a stack.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum StackError {
    /// There is no vmalloc range, so an overflow would go on into somebody's memory.
    #[error("the machine's stacks have no guard")]
    NoGuard,
}

global_asm!(
    ".text",
    ".p2align 4",
    // Generic callers are compiled into other crates.
    ".globl __kmem_hosted_call_on",
    ".hidden __kmem_hosted_call_on",
    ".type __kmem_hosted_call_on, @function",
    "__kmem_hosted_call_on:",
    ".cfi_startproc",
    "push rbp",
    ".cfi_def_cfa_offset 16",
    ".cfi_offset rbp, -16",
    "mov rbp, rsp",
    ".cfi_def_cfa_register rbp",
    "mov rsp, rsi",
    "call rdx",
    "mov rsp, rbp",
    "pop rbp",
    ".cfi_def_cfa rsp, 8",
    "ret",
    ".cfi_endproc",
    ".size __kmem_hosted_call_on, . - __kmem_hosted_call_on",
);

unsafe extern "C" {
    /// Calls `enter(call)` with the stack pointer at `top`, a multiple of 16.
    fn __kmem_hosted_call_on(
        call: *mut c_void,
        top: usize,
        enter: unsafe extern "C" fn(*mut c_void),
    );
}

/// A call, and what came of it.
struct Call<F, R> {
    f: Option<F>,
    result: Option<thread::Result<R>>,
}

/// Makes the call that is at `call`.
///
/// # Safety
/// It is a `Call<F, R>` that nobody else uses meanwhile.
unsafe extern "C" fn enter<F: FnOnce() -> R, R>(call: *mut c_void) {
    // SAFETY: the caller's.
    let call = unsafe { &mut *call.cast::<Call<F, R>>() };
    if let Some(f) = call.f.take() {
        call.result = Some(panic::catch_unwind(AssertUnwindSafe(f)));
    }
}

/// Runs `f` on a stack of the machine's: on the calling thread, in its context, until it returns. It may do whatever
/// the caller may. A panic goes through.
///
/// Whoever runs off the stack's end touches its guard, which is a segmentation fault: its handler, on an alternate
/// stack, learns from [`stack_of`](kmem::Kmem::stack_of) what happened. A signal handler that is installed without
/// `SA_ONSTACK` runs on the stack too.
///
/// ```
/// # use kmem_hosted::{Machine, Shape, call_on_stack};
/// use kmem::alloc::KernelStack;
/// # let machine = Machine::new(Shape::x86_64(64 << 20)).unwrap();
/// let mut stack = KernelStack::new(&machine, 4)?;
/// let range = stack.range();
/// let here = call_on_stack(&mut stack, || {
///     let local = 0u8;
///     range.contains(&(&raw const local).addr())
/// });
/// assert_eq!(here, Ok(true));
/// assert!(stack.depth_used() > 0);
/// # Ok::<(), kmem::AllocError>(())
/// ```
///
/// # Errors
/// [`StackError`]; `f` did not run then.
pub fn call_on_stack<F: FnOnce() -> R, R>(
    stack: &mut KernelStack<'_, Hosted>,
    f: F,
) -> Result<R, StackError> {
    if !stack.is_guarded() {
        return Err(StackError::NoGuard);
    }
    let mut call = Call { f: Some(f), result: None };
    // SAFETY: the stack is mapped, ours alone for the time, as it is borrowed mutably, and has a guard below; its top is
    // aligned to a frame. `call` is what `enter` takes, lives until it returned, and it does not unwind.
    unsafe {
        __kmem_hosted_call_on((&raw mut call).cast(), stack.range().end, enter::<F, R>);
    }
    match call.result {
        Some(Ok(result)) => Ok(result),
        Some(Err(payload)) => panic::resume_unwind(payload),
        None => unreachable!("the call was made"),
    }
}
