//! Code on a machine's stacks: it runs there, and where a stack ends it faults \[K1\].
#![cfg(target_arch = "x86_64")]

use kmem::{
    Config, Gfp, Kmem,
    alloc::KernelStack,
    context::Task,
    stack::{StackPart, StackUse},
};
use kmem_hosted::{Hosted, Machine, ReportLog, Shape, StackError, call_on_stack};
use std::{
    fmt::Write as _,
    hint::black_box,
    io::{Read, pipe},
    os::fd::AsRawFd,
    panic::{AssertUnwindSafe, catch_unwind},
    ptr::{self, without_provenance},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicI32, AtomicPtr, AtomicU64, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

const PAGE: usize = 4096;

fn machine() -> Machine {
    Machine::without_kswapd(Shape::no_dma(64 << 20), Config::default()).unwrap()
}

/// Uses some bytes of stack for each level, and returns the lowest address of them.
#[inline(never)]
fn descend(levels: usize) -> usize {
    let room = black_box([levels as u8 + 1; 256]);
    let here = (&raw const room).addr();
    if levels == 0 { here } else { black_box(descend(levels - 1)).min(here) }
}

#[test]
fn code_runs_there_and_may_do_what_its_caller_may() {
    let m = machine();
    m.run_on(Some(0), Some(&Task::new()), |process| {
        let mut stack = KernelStack::new(&m, 4).unwrap();
        let range = stack.range();
        let lowest = call_on_stack(&mut stack, || descend(8)).unwrap();
        assert!(range.contains(&lowest), "{lowest:#x} in {range:x?}");
        let shallow = stack.depth_used();
        assert!(shallow >= range.end - lowest && shallow < range.len(), "{shallow}");
        // Deeper, with a value of the caller's, and with the machine.
        let mut sum = 0;
        let deep = call_on_stack(&mut stack, || {
            let page = m.alloc_page(Gfp::KERNEL).unwrap();
            m.hosted().cond_resched(process);
            m.put_page(page).unwrap();
            sum += 5;
            descend(20)
        });
        assert!(range.contains(&deep.unwrap()) && sum == 5);
        assert!(stack.depth_used() > shallow + 12 * 256, "{} after {shallow}", stack.depth_used());
        assert!(!stack.end_corrupted());
        // Stacks nest, and a panic comes through.
        let mut inner = KernelStack::new(&m, 4).unwrap();
        let caught = catch_unwind(AssertUnwindSafe(|| {
            call_on_stack(&mut stack, || {
                call_on_stack::<_, ()>(&mut inner, || std::panic::resume_unwind(Box::new(7u32)))
                    .unwrap();
            })
        }));
        assert_eq!(caught.unwrap_err().downcast_ref::<u32>(), Some(&7));
        assert_eq!(call_on_stack(&mut stack, || 3), Ok(3));
    })
    .unwrap();
    assert_eq!(m.audit_stacks().unwrap().threads, 0);
}

#[test]
fn interrupts_land_in_code_on_a_stack() {
    let m = machine();
    let (seen, depth) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let place: Arc<OnceLock<usize>> = Arc::new(OnceLock::new());
    place.set(ptr::from_ref(m.kmem()).expose_provenance()).unwrap();
    let (count, deepest) = (Arc::clone(&seen), Arc::clone(&depth));
    m.hosted().set_timer_handler(Arc::new(move |_atomic, _cpu| {
        let at = ptr::with_exposed_provenance::<Kmem<Hosted>>(*place.get().unwrap());
        // SAFETY: the machine lives until after the storm.
        let kmem = unsafe { &*at };
        if let Ok(block) = kmem.kmalloc(100, Gfp::ATOMIC) {
            // SAFETY: ours, and not used after.
            let _ = unsafe { kmem.kfree(block.as_ptr()) };
        }
        deepest.fetch_max(descend(2) as u64, SeqCst);
        count.fetch_add(1, SeqCst);
    }));
    m.run_on(Some(0), Some(&Task::new()), |_| {
        let mut stack = KernelStack::new(&m, 2).unwrap();
        let range = stack.range();
        assert!(m.hosted().start_storm(0, 20_000));
        call_on_stack(&mut stack, || {
            let end = Instant::now() + Duration::from_millis(100);
            while Instant::now() < end && seen.load(SeqCst) < 1000 {
                descend(5);
            }
        })
        .unwrap();
        assert!(m.hosted().stop_storm(0));
        // Handlers have a stack of their own: a processor's state alone may be more than this one has.
        assert!(!range.contains(&(depth.load(SeqCst) as usize)));
        assert!(!stack.end_corrupted());
    })
    .unwrap();
    assert!(seen.load(SeqCst) > 10, "{} interrupts", seen.load(SeqCst));
}

#[test]
fn without_a_guard_nothing_runs() {
    let direct = Shape::no_dma(32 << 20).vmalloc(0);
    let m = Machine::without_kswapd(direct, Config::default()).unwrap();
    let mut stack = KernelStack::new(&m, 4).unwrap();
    let ran = call_on_stack(&mut stack, || unreachable!("it has no guard"));
    assert_eq!(ran, Err::<(), _>(StackError::NoGuard));
}

/// Where the handler of the child below finds the machine, and writes to.
static KMEM: AtomicPtr<Kmem<Hosted>> = AtomicPtr::new(ptr::null_mut());
static TO: AtomicI32 = AtomicI32::new(-1);

/// A line without a heap.
struct Line([u8; 256], usize);

impl std::fmt::Write for Line {
    fn write_str(&mut self, s: &str) -> std::fmt::Result {
        let room = self.0.get_mut(self.1..self.1 + s.len()).ok_or(std::fmt::Error)?;
        room.copy_from_slice(s.as_bytes());
        self.1 += s.len();
        Ok(())
    }
}

/// What a kernel's handler of page faults does: asks whose guard it was, says so, and ends it.
extern "C" fn on_fault(_: libc::c_int, info: *const libc::siginfo_t, _: *const libc::c_void) {
    // SAFETY: the kernel gave a valid siginfo_t of a fault; the machine is there as long as the child.
    let (addr, kmem) = unsafe { ((*info).si_addr(), &*KMEM.load(SeqCst)) };
    let mut line = Line([0; 256], 0);
    let _ = match kmem.stack_of(addr.cast()) {
        Some(stack) => write!(line, "{:#x} {stack}", addr.addr()),
        None => write!(line, "{:#x} is no stack's", addr.addr()),
    };
    // SAFETY: so many bytes; both calls are async-signal-safe.
    unsafe {
        libc::write(TO.load(SeqCst), line.0.as_ptr().cast(), line.1);
        libc::_exit(42);
    }
}

/// Comes back from nowhere near.
#[inline(never)]
fn fall(levels: u64) -> u64 {
    let room = black_box([levels; 40]);
    if levels == 1 << 40 {
        return 0;
    }
    black_box(fall(levels + 1)) + room[(levels % 40) as usize]
}

#[test]
fn an_overflow_faults_at_once_and_is_named() {
    let m = machine();
    let log = Arc::new(ReportLog::new());
    let sink = Arc::clone(&log);
    m.hosted().set_report_sink(Arc::new(move |level, text: &str| sink.push(level, text)));
    m.run_on(Some(0), Some(&Task::new()), |_| {
        let below = m.vmalloc(PAGE).unwrap();
        let mut stacks: Vec<_> = (0..3).map(|_| KernelStack::new(&m, 2).unwrap()).collect();
        stacks.iter().enumerate().for_each(|(i, stack)| stack.set_owner(0x1000 + i));
        // Neighbours, with all they have written to but the ends.
        let others = [stacks[0].range(), stacks[2].range()];
        let ends = [(below.addr().get(), PAGE)]
            .into_iter()
            .chain(others.iter().map(|range| (range.start + 16, range.len() - 16)));
        let pieces: Vec<_> = ends.collect();
        for &(at, len) in &pieces {
            // SAFETY: the test's own, live, and nobody runs there.
            unsafe { ptr::with_exposed_provenance_mut::<u8>(at).write_bytes(0x5a, len) };
        }
        let (mut reader, writer) = pipe().unwrap();
        TO.store(writer.as_raw_fd(), SeqCst);
        KMEM.store(ptr::from_ref(m.kmem()).cast_mut(), SeqCst);
        // SAFETY: the child runs nothing but the fall and the handler, which need neither locks nor a heap of the
        // process. Memory of the machine is shared with the parent, who waits meanwhile.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: sigaction is plain data; the handler has the signature that SA_SIGINFO promises, and runs on the
            // alternate stack that the thread has as one of the machine's.
            unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = on_fault as *const () as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
                libc::sigaction(libc::SIGSEGV, &raw const action, ptr::null_mut());
            }
            let _ = call_on_stack(&mut stacks[1], || fall(1));
            // SAFETY: ends the child.
            unsafe { libc::_exit(1) };
        }
        assert!(child > 0);
        drop(writer);
        let mut said = String::new();
        reader.read_to_string(&mut said).unwrap();
        let mut status = 0;
        // SAFETY: the child is ours, the status a place for it.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 42, "{status:#x} {said}");
        let range = stacks[1].range();
        let (addr, text) = said.split_once(' ').unwrap();
        let addr = usize::from_str_radix(addr.trim_start_matches("0x"), 16).unwrap();
        assert!((range.start - PAGE..range.start).contains(&addr), "{said}");
        let name = format!("guard page of the kernel stack {:#x}-{:#x} ", range.start, range.end);
        assert!(text.starts_with(&name) && text.contains("owner 0x1001"), "{said}");
        let found = m.stack_of(without_provenance(addr)).unwrap();
        assert_eq!((found.part, found.used_by), (StackPart::Guard, StackUse::Thread));
        // The fall used all of it, and nothing of anybody else's.
        assert!(stacks[1].depth_used() > range.len() - 600, "{}", stacks[1].depth_used());
        for &(at, len) in &pieces {
            // SAFETY: as above.
            let piece =
                unsafe { std::slice::from_raw_parts(ptr::with_exposed_provenance::<u8>(at), len) };
            assert!(piece.iter().all(|byte| *byte == 0x5a), "{at:#x} was written to");
        }
        assert!(!stacks[0].end_corrupted() && !stacks[2].end_corrupted());
        let overrun = stacks[1].end_corrupted();
        let mark = log.count();
        drop(stacks);
        let reports = log.since(mark);
        assert_eq!(reports.len(), usize::from(overrun), "{reports:?}");
        // SAFETY: not used after.
        unsafe { m.vfree(below.as_ptr()).unwrap() };
    })
    .unwrap();
    m.drop_kept_stacks();
    assert_eq!(m.audit_stacks().unwrap(), kmem::stack::StackAudit::default());
}
