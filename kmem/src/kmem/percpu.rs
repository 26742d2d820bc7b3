//! The calls for per-CPU data \[U1–U3\].

use super::Kmem;
use crate::{
    context::{Atomic, Context, Cpu, Process},
    error::{AllocError, Misuse},
    gfp::{
        Gfp,
        typed::{Capability, TypedGfp},
    },
    percpu::{
        Chunks, CpuGuard, CpuPtr, CpuPtrGuard, CpuVar, PerCpuPlace, PerCpuPtr, Statics, ThisCpu,
    },
    platform::Platform,
    reclaim::Vmscan,
    sync::preempt_disabled,
};
use core::ptr::NonNull;

impl<P: Platform> Kmem<P> {
    fn chunks(&self) -> Chunks<'_, P, Vmscan> {
        Chunks { space: &self.percpu, pages: &self.pages }
    }

    pub(crate) fn statics(&self) -> Statics {
        self.percpu.statics()
    }

    /// Possible CPUs; their numbers are `0..nr_cpu_ids()`.
    pub fn nr_cpu_ids(&self) -> usize {
        self.percpu.cpus()
    }

    /// Bytes from the instance of one CPU to that of the next.
    pub fn per_cpu_stride(&self) -> usize {
        self.percpu.stride()
    }

    /// Bytes of each CPU that are free for [`alloc_percpu`](Self::alloc_percpu) without further memory.
    pub fn per_cpu_free(&self) -> u64 {
        self.chunks().stats().0
    }

    /// Gives back the chunks that are kept for CPUs that allocate at once; returns how many frames. Reclaim does so by
    /// itself.
    ///
    /// Context: any but NMI.
    pub fn drop_kept_percpu(&self) -> u64 {
        self.chunks().shrink()
    }

    /// `alloc_percpu`: an instance of `T` for each possible CPU, zeroed \[U2\].
    ///
    /// Context: process context; may sleep.
    ///
    /// # Errors
    /// [`AllocError`]; `Invalid` for a `T` without a size, beyond [the stride](Self::per_cpu_stride), or aligned
    /// beyond a frame.
    ///
    /// See [`alloc_percpu`](https://docs.kernel.org/core-api/mm-api.html#c.pcpu_alloc_noprof).
    #[inline]
    #[track_caller]
    pub fn alloc_percpu<T>(&self) -> Result<PerCpuPtr<T>, AllocError> {
        self.alloc_percpu_gfp(Gfp::KERNEL)
    }

    /// `alloc_percpu_gfp`: as [`alloc_percpu`](Self::alloc_percpu), with flags. Those that say what may be done for
    /// memory count; others are left out.
    ///
    /// Context: may sleep if `gfp` has `__GFP_DIRECT_RECLAIM`; never from an NMI.
    ///
    /// # Errors
    /// As [`alloc_percpu`](Self::alloc_percpu).
    #[inline]
    #[track_caller]
    pub fn alloc_percpu_gfp<T>(&self, gfp: Gfp) -> Result<PerCpuPtr<T>, AllocError> {
        let at = self.__alloc_percpu_gfp(size_of::<T>(), align_of::<T>(), gfp)?;
        Ok(at.cast())
    }

    /// As [`alloc_percpu_gfp`](Self::alloc_percpu_gfp), with a capability \[C2\].
    ///
    /// # Errors
    /// As [`alloc_percpu`](Self::alloc_percpu).
    #[inline]
    #[track_caller]
    pub fn alloc_percpu_in<T, const BLOCK: bool, const ZONE: u8>(
        &self,
        _capability: impl Capability<BLOCK>,
        gfp: TypedGfp<BLOCK, ZONE>,
    ) -> Result<PerCpuPtr<T>, AllocError> {
        self.alloc_percpu_gfp(gfp.gfp())
    }

    /// `__alloc_percpu`: `size` bytes for each possible CPU, aligned to `align`, zeroed.
    ///
    /// Context: process context; may sleep.
    ///
    /// # Errors
    /// As [`alloc_percpu`](Self::alloc_percpu).
    #[inline]
    #[track_caller]
    pub fn __alloc_percpu(&self, size: usize, align: usize) -> Result<PerCpuPtr<u8>, AllocError> {
        self.__alloc_percpu_gfp(size, align, Gfp::KERNEL)
    }

    /// `__alloc_percpu_gfp`: as [`__alloc_percpu`](Self::__alloc_percpu), with flags.
    ///
    /// # Errors
    /// As [`alloc_percpu`](Self::alloc_percpu).
    #[inline]
    #[track_caller]
    pub fn __alloc_percpu_gfp(
        &self,
        size: usize,
        align: usize,
        gfp: Gfp,
    ) -> Result<PerCpuPtr<u8>, AllocError> {
        self.chunks().alloc(size, align, gfp)
    }

    /// `free_percpu`: frees all instances at once.
    ///
    /// Context: any but NMI.
    ///
    /// # Safety
    /// Nobody uses any instance any more. An address that is none, or was freed before, does no harm: it is found
    /// out.
    ///
    /// # Errors
    /// [`Misuse`], reported as well, and nothing changed.
    #[track_caller]
    pub unsafe fn free_percpu<T>(&self, at: PerCpuPtr<T>) -> Result<(), Misuse> {
        self.chunks().free(at.cast())
    }

    #[inline(always)]
    fn instance<'a, T>(&self, var: impl PerCpuPlace<'a, T>, cpu: usize) -> Option<NonNull<T>> {
        let first = var.place(self.percpu.statics())?;
        let distance =
            cpu.checked_mul(self.percpu.stride()).filter(|_| cpu < self.percpu.cpus())?;
        // SAFETY: each CPU's instance is a stride further, in one block with CPU 0's.
        Some(unsafe { first.byte_add(distance) })
    }

    /// `per_cpu`: a CPU's instance of a variable; `None` for a CPU that is not possible. Whoever is not on that CPU
    /// reads what it was some time ago.
    #[inline]
    pub fn per_cpu<'a, T: Sync + 'a>(
        &'a self,
        var: impl PerCpuPlace<'a, T>,
        cpu: usize,
    ) -> Option<&'a T> {
        // SAFETY: the instances are there for 'a, and shared only.
        self.instance(var, cpu).map(|at| unsafe { at.as_ref() })
    }

    /// `per_cpu_ptr`: the address of a CPU's instance; `None` for a CPU that is not possible.
    #[inline]
    pub fn per_cpu_ptr<T>(&self, at: PerCpuPtr<T>, cpu: usize) -> Option<NonNull<T>> {
        let distance =
            cpu.checked_mul(self.percpu.stride()).filter(|_| cpu < self.percpu.cpus())?;
        NonNull::new(at.into_raw().as_ptr().wrapping_byte_add(distance))
    }

    /// `get_cpu`: turns preemption off and says on which CPU; `put_cpu` is the guard's end. `None` for a caller on no
    /// CPU, and where preemption is off [as deep](crate::context::MAX_PREEMPT_DEPTH) as can be counted.
    #[inline]
    pub fn get_cpu(&self) -> Option<CpuGuard<'_, P>> {
        CpuGuard::new(self.platform())
    }

    /// `put_cpu`: ends what [`get_cpu`](Self::get_cpu) began, as dropping the guard does.
    pub fn put_cpu(&self, guard: CpuGuard<'_, P>) {
        drop(guard);
    }

    /// `smp_processor_id`: the running CPU's number; `None` for a caller on no CPU. In builds with debug assertions
    /// a caller who could find itself on another CPU the next moment is reported.
    #[track_caller]
    pub fn smp_processor_id(&self) -> Option<usize> {
        let cpu = self.platform().this_cpu()?;
        if cfg!(debug_assertions) && cpu.context() == Context::PROCESS {
            let _ = self.pages.misuse(Misuse::Preemptible);
        }
        Some(cpu.id())
    }

    /// `raw_smp_processor_id`: the same, unasked.
    #[inline(always)]
    pub fn raw_smp_processor_id(&self) -> Option<usize> {
        self.platform().this_cpu().map(Cpu::id)
    }

    /// `get_cpu_var`: the running CPU's instance of a variable; preemption is off until the guard goes. `None` for a
    /// caller on no CPU. An [`alloc_percpu`](Self::alloc_percpu) address is a variable when it is
    /// [known to be live](PerCpuPtr::live).
    ///
    /// ```
    /// # use kmem_hosted::{Machine, Shape};
    /// # use core::sync::atomic::{AtomicU32, Ordering::Relaxed};
    /// kmem::define_per_cpu! { static DEPTH: AtomicU32 = AtomicU32::new(1); }
    /// # let machine = Machine::new(Shape::x86_64(64 << 20)).unwrap();
    /// machine.run(|_| {
    ///     let depth = machine.get_cpu_var(&DEPTH).unwrap();
    ///     depth.store(depth.load(Relaxed) + 1, Relaxed);
    ///     machine.put_cpu_var(depth);
    /// }).unwrap();
    /// ```
    #[inline]
    pub fn get_cpu_var<'k, T: Sync + 'k>(
        &'k self,
        var: impl PerCpuPlace<'k, T>,
    ) -> Option<CpuVar<'k, P, T>> {
        let guard = self.get_cpu()?;
        let at = self.instance(var, guard.id())?;
        // SAFETY: the instances are there for 'k, which the guard does not outlive, and shared only.
        Some(unsafe { CpuVar::new(guard, at) })
    }

    /// `put_cpu_var`: ends what [`get_cpu_var`](Self::get_cpu_var) began, as dropping the guard does.
    pub fn put_cpu_var<T: Sync>(&self, var: CpuVar<'_, P, T>) {
        drop(var);
    }

    /// As [`get_cpu_var`](Self::get_cpu_var), with the capability: what runs inside cannot sleep \[C2\].
    pub fn with_cpu_var<'k, T: Sync + 'k, R>(
        &'k self,
        process: &mut Process,
        var: impl PerCpuPlace<'k, T>,
        f: impl FnOnce(Atomic<'_>, &T) -> R,
    ) -> Option<R> {
        preempt_disabled(self.platform(), process, |atomic| {
            let var = self.get_cpu_var(var)?;
            Some(f(atomic, &var))
        })
    }

    /// `get_cpu_ptr`: the address of the running CPU's instance; preemption is off until the guard goes.
    #[inline]
    pub fn get_cpu_ptr<T>(&self, at: PerCpuPtr<T>) -> Option<CpuPtrGuard<'_, P, T>> {
        let guard = self.get_cpu()?;
        let at = self.per_cpu_ptr(at, guard.id())?;
        Some(CpuPtrGuard::new(guard, at))
    }

    /// `put_cpu_ptr`: ends what [`get_cpu_ptr`](Self::get_cpu_ptr) began, as dropping the guard does.
    pub fn put_cpu_ptr<T>(&self, at: CpuPtrGuard<'_, P, T>) {
        drop(at);
    }

    /// `this_cpu_ptr`: the address of the running CPU's instance, which is found out when it is used on another CPU.
    /// `None` for a caller on no CPU.
    pub fn this_cpu_ptr<T>(&self, at: PerCpuPtr<T>) -> Option<CpuPtr<'_, P, Vmscan, T>> {
        let cpu = self.raw_smp_processor_id()?;
        Some(CpuPtr::new(&self.pages, self.per_cpu_ptr(at, cpu)?, cpu))
    }

    /// Runs one step on the running CPU's instance, which is at the address, or there from the GS base on.
    #[inline(always)]
    fn step<'a, T: ThisCpu, R>(
        &self,
        var: impl PerCpuPlace<'a, T>,
        segment: impl FnOnce(*mut T) -> R,
        direct: impl FnOnce(*mut T) -> R,
    ) -> Option<R> {
        let first = var.place(self.percpu.statics())?.as_ptr();
        if P::PER_CPU_SEGMENT {
            return Some(segment(first));
        }
        let p = self.platform();
        let cpu = p.get_cpu()?;
        let done = direct(first.wrapping_byte_add(cpu.id() * self.percpu.stride()));
        p.put_cpu(cpu);
        Some(done)
    }
}

macro_rules! this_cpu {
    ($($(#[$doc:meta])* $name:ident, $op:ident($($arg:ident),*) -> $out:ty;)*) => {
        impl<P: Platform> Kmem<P> {$(
            $(#[$doc])*
            ///
            /// One step: no interrupt on the CPU sees half of it. `None` for a caller on no CPU. Any context.
            #[inline]
            pub fn $name<'a, T: ThisCpu>(
                &self,
                var: impl PerCpuPlace<'a, T>,
                $($arg: T::Int,)*
            ) -> Option<$out> {
                self.step(
                    var,
                    // SAFETY: CPU 0's instance is there, and the segment's base leads to the running CPU's.
                    |at| unsafe { T::$op::<true>(at, $($arg),*) },
                    // SAFETY: the running CPU's instance, and the caller stays on the CPU for the step.
                    |at| unsafe { T::$op::<false>(at, $($arg),*) },
                )
            }
        )*}
    };
}

this_cpu! {
    /// `this_cpu_read`: the running CPU's value of a variable.
    this_cpu_read, read() -> T::Int;
    /// `this_cpu_write`: sets the running CPU's value.
    this_cpu_write, write(value) -> ();
    /// `this_cpu_add`: adds to the running CPU's value, wrapping.
    this_cpu_add, add(value) -> ();
    /// `this_cpu_and`.
    this_cpu_and, and(value) -> ();
    /// `this_cpu_or`.
    this_cpu_or, or(value) -> ();
    /// `this_cpu_add_return`: adds to the running CPU's value, wrapping, and returns the sum.
    this_cpu_add_return, add_return(value) -> T::Int;
    /// `this_cpu_cmpxchg`: sets the running CPU's value to `new` if it is `old`; returns what it was.
    this_cpu_cmpxchg, cmpxchg(old, new) -> T::Int;
}

impl<P: Platform> Kmem<P> {
    /// `this_cpu_inc`: adds one to the running CPU's value; as [`this_cpu_add`](Self::this_cpu_add).
    #[inline]
    pub fn this_cpu_inc<'a, T: ThisCpu>(&self, var: impl PerCpuPlace<'a, T>) -> Option<()> {
        self.this_cpu_add(var, T::ONE)
    }

    /// `this_cpu_dec`: takes one from the running CPU's value; as [`this_cpu_add`](Self::this_cpu_add).
    #[inline]
    pub fn this_cpu_dec<'a, T: ThisCpu>(&self, var: impl PerCpuPlace<'a, T>) -> Option<()> {
        self.this_cpu_add(var, T::MINUS_ONE)
    }

    /// `this_cpu_xchg`: sets the running CPU's value and returns what it was; as
    /// [`this_cpu_cmpxchg`](Self::this_cpu_cmpxchg).
    pub fn this_cpu_xchg<'a, T: ThisCpu>(
        &self,
        var: impl PerCpuPlace<'a, T>,
        value: T::Int,
    ) -> Option<T::Int> {
        let mut old = self.this_cpu_read(var)?;
        loop {
            let seen = self.this_cpu_cmpxchg(var, old, value)?;
            if seen == old {
                return Some(old);
            }
            old = seen;
        }
    }
}
