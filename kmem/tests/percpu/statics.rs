//! Static variables: which machine they belong to, and what `this_cpu_*` does to them.

use super::{four, free};
use core::sync::atomic::{
    AtomicI8, AtomicI64, AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering::Relaxed,
};
use kmem::{AllocError, Gfp, context::Task, percpu::ThisCpu};
use kmem_test_support::Rig;

#[repr(align(64))]
struct Line {
    name: &'static str,
    hits: AtomicU64,
}

kmem::define_per_cpu! {
    /// Begins with a value of its own.
    static COUNTER: AtomicU64 = AtomicU64::new(40);
    static LINE: Line = Line { name: "line", hits: AtomicU64::new(7) };
    pub(crate) static BYTE: AtomicU8 = AtomicU8::new(250);
}

fn sum(rig: &Rig) -> u64 {
    let m = rig.machine();
    (0..m.nr_cpu_ids()).map(|cpu| m.per_cpu(&COUNTER, cpu).unwrap().load(Relaxed)).sum()
}

#[test]
fn each_machine_has_its_own_instances() {
    let (one, other) = (four(), Rig::flat());
    assert_eq!((sum(&one), sum(&other)), (160, 80));
    one.on(2, &Task::new(), |_| {
        assert_eq!(one.machine().this_cpu_inc(&COUNTER), Some(()));
        // This thread is on no CPU of the other machine.
        assert_eq!(other.machine().this_cpu_inc(&COUNTER), None);
    });
    assert_eq!((sum(&one), sum(&other)), (161, 80));
    assert_eq!(one.machine().per_cpu(&COUNTER, 2).unwrap().load(Relaxed), 41);
    assert!(other.machine().per_cpu(&COUNTER, 2).is_none());
    // A machine made later begins anew.
    assert_eq!(sum(&Rig::flat()), 80);
    let line = one.machine().per_cpu(&LINE, 3).unwrap();
    assert_eq!((line.name, line.hits.load(Relaxed)), ("line", 7));
    assert!(core::ptr::from_ref(line).addr().is_multiple_of(64));
}

#[test]
fn a_static_variable_cannot_be_freed() {
    let rig = four();
    let m = rig.machine();
    rig.on(0, &Task::new(), |_| {
        let var = m.get_cpu_var(&COUNTER).unwrap();
        let at = kmem::percpu::PerCpuPtr::from_raw(core::ptr::NonNull::from_ref(&*var));
        let mark = rig.mark();
        // SAFETY: that it does no harm is what is tested.
        assert!(unsafe { m.free_percpu(at) }.is_err());
        assert!(rig.one_report(mark).contains("no per-CPU address"));
    });
}

#[test]
fn get_cpu_var_takes_both_kinds() {
    let rig = four();
    let m = rig.machine();
    let a = m.alloc_percpu::<AtomicU32>().unwrap();
    rig.on(1, &Task::new(), |process| {
        // SAFETY: live until it is freed below; zeros are an AtomicU32.
        let a = unsafe { a.live() };
        let (var, static_var) = (m.get_cpu_var(a).unwrap(), m.get_cpu_var(&BYTE).unwrap());
        assert_eq!((var.cpu(), static_var.load(Relaxed)), (1, 250));
        var.store(9, Relaxed);
        // Preemption is off as long as either is held.
        m.put_cpu_var(static_var);
        assert_eq!(m.kmalloc(8, Gfp::KERNEL), Err(AllocError::Context));
        m.put_cpu_var(var);
        assert_eq!(m.this_cpu_read(a), Some(9));
        let before = m.with_cpu_var(process, a, |_atomic, v| v.swap(5, Relaxed));
        assert_eq!((before, m.this_cpu_read(a)), (Some(9), Some(5)));
        assert_eq!(m.per_cpu(a, 0).unwrap().load(Relaxed), 0);
    });
    free(m, a);
}

/// Plays every operation on a variable beside plain arithmetic.
fn play<T: ThisCpu>(
    rig: &Rig,
    values: &[T::Int],
    add: fn(T::Int, T::Int) -> T::Int,
    or: fn(T::Int, T::Int) -> T::Int,
    and: fn(T::Int, T::Int) -> T::Int,
) where
    T::Int: core::fmt::Debug,
{
    let m = rig.machine();
    let a = m.alloc_percpu::<T>().unwrap();
    let _next = m.alloc_percpu::<u64>().unwrap();
    rig.on(1, &Task::new(), |_| {
        // SAFETY: live until it is freed below; zeros are an atomic integer.
        let a = unsafe { a.live() };
        for &x in values {
            for &y in values {
                m.this_cpu_write(a, x).unwrap();
                m.this_cpu_add(a, y).unwrap();
                assert_eq!(m.this_cpu_read(a), Some(add(x, y)));
                assert_eq!(m.this_cpu_add_return(a, y), Some(add(add(x, y), y)));
                m.this_cpu_write(a, x).unwrap();
                m.this_cpu_or(a, y).unwrap();
                assert_eq!(m.this_cpu_read(a), Some(or(x, y)));
                m.this_cpu_write(a, x).unwrap();
                m.this_cpu_and(a, y).unwrap();
                assert_eq!(m.this_cpu_xchg(a, x), Some(and(x, y)));
                assert_eq!(m.this_cpu_cmpxchg(a, y, y), Some(x));
                assert_eq!(m.this_cpu_cmpxchg(a, x, y), Some(x));
                m.this_cpu_inc(a).unwrap();
                m.this_cpu_dec(a).unwrap();
                assert_eq!(m.this_cpu_read(a), Some(y));
            }
        }
    });
    // What lies beside it, on the same CPU and on others, is untouched.
    for cpu in 0..4 {
        // SAFETY: the test's own.
        assert_eq!(unsafe { m.per_cpu_ptr(_next, cpu).unwrap().read() }, 0);
    }
    free(m, a);
    free(m, _next);
}

#[test]
fn this_cpu_operations_are_those_of_arithmetic() {
    let rig = four();
    macro_rules! play {
        ($($atomic:ty, $int:ty;)*) => {$(
            play::<$atomic>(
                &rig,
                &[0, 1, 5, <$int>::MAX, <$int>::MIN, <$int>::MAX / 3],
                <$int>::wrapping_add,
                |a, b| a | b,
                |a, b| a & b,
            );
        )*};
    }
    play! {
        AtomicU8, u8; AtomicI8, i8; AtomicU16, u16; AtomicU32, u32; AtomicU64, u64; AtomicI64, i64;
    }
}
