#![no_std]
//! `core`, with atomics before each access of which a model checker may let something else happen.
//!
//! # Concepts
//! kmem is built against this in place of `core`, so what is checked is kmem's own code, all of it. The
//! atomics are the real ones in size, in layout and in what all-zero bytes mean; each access calls
//! the hook first.
//!
//! # Limits
//! Accesses happen in one order that all threads see: what weaker memory orders allow beyond that is
//! not explored.

pub use ::core::*;

/// As `core::sync`.
pub mod sync {
    pub use ::core::sync::*;

    /// As `core::sync::atomic`, with the hook.
    pub mod atomic {
        use ::core::sync::atomic as real;
        pub use ::core::sync::atomic::{Ordering, compiler_fence, fence};

        static HOOK: real::AtomicPtr<()> = real::AtomicPtr::new(::core::ptr::null_mut());

        /// Sets what happens before each access.
        pub fn set_hook(hook: fn()) {
            HOOK.store(hook as *mut (), Ordering::SeqCst);
        }

        fn point() {
            let hook = HOOK.load(Ordering::SeqCst);
            if !hook.is_null() {
                // SAFETY: only `set_hook` stores anything but null, and that is a `fn()`.
                unsafe { ::core::mem::transmute::<*mut (), fn()>(hook)() }
            }
        }

        macro_rules! atomic {
            ($name:ident $(<$g:ident>)?, $value:ty, [$($arithmetic:ident)*]) => {
                /// The real one, with the hook.
                #[repr(transparent)]
                pub struct $name $(<$g>)? (real::$name $(<$g>)?);

                impl $(<$g>)? Default for $name $(<$g>)? {
                    fn default() -> Self {
                        Self(Default::default())
                    }
                }

                impl $(<$g>)? $name $(<$g>)? {
                    /// As the real one.
                    pub const fn new(v: $value) -> Self {
                        Self(real::$name::new(v))
                    }
                    /// As the real one.
                    ///
                    /// # Safety
                    /// As the real one's.
                    pub const unsafe fn from_ptr<'a>(at: *mut $value) -> &'a Self {
                        // SAFETY: the caller's; the type is the real one but for its name.
                        unsafe { &*at.cast::<Self>() }
                    }
                    /// As the real one.
                    pub fn get_mut(&mut self) -> &mut $value {
                        self.0.get_mut()
                    }
                    /// As the real one.
                    pub fn load(&self, order: Ordering) -> $value {
                        point();
                        self.0.load(order)
                    }
                    /// As the real one.
                    pub fn store(&self, v: $value, order: Ordering) {
                        point();
                        self.0.store(v, order);
                    }
                    /// As the real one.
                    pub fn swap(&self, v: $value, order: Ordering) -> $value {
                        point();
                        self.0.swap(v, order)
                    }
                    /// As the real one.
                    pub fn compare_exchange(
                        &self,
                        old: $value,
                        new: $value,
                        success: Ordering,
                        failure: Ordering,
                    ) -> Result<$value, $value> {
                        point();
                        self.0.compare_exchange(old, new, success, failure)
                    }
                    /// As the real one.
                    pub fn compare_exchange_weak(
                        &self,
                        old: $value,
                        new: $value,
                        success: Ordering,
                        failure: Ordering,
                    ) -> Result<$value, $value> {
                        self.compare_exchange(old, new, success, failure)
                    }
                    /// As the real one: a load and exchanges, each of them an access.
                    pub fn fetch_update(
                        &self,
                        success: Ordering,
                        failure: Ordering,
                        mut f: impl FnMut($value) -> Option<$value>,
                    ) -> Result<$value, $value> {
                        let mut old = self.load(failure);
                        while let Some(new) = f(old) {
                            match self.compare_exchange(old, new, success, failure) {
                                Ok(v) => return Ok(v),
                                Err(v) => old = v,
                            }
                        }
                        Err(old)
                    }
                    $(
                        /// As the real one.
                        pub fn $arithmetic(&self, v: $value, order: Ordering) -> $value {
                            point();
                            self.0.$arithmetic(v, order)
                        }
                    )*
                }
            };
        }

        macro_rules! integers {
            ($($name:ident: $value:ty),* $(,)?) => {$(
                atomic!($name, $value, [fetch_add fetch_sub fetch_or fetch_and fetch_max fetch_min]);
            )*};
        }

        atomic!(AtomicBool, bool, [fetch_or fetch_and]);
        atomic!(AtomicPtr<T>, *mut T, []);
        integers!(
            AtomicU8: u8,
            AtomicU16: u16,
            AtomicU32: u32,
            AtomicU64: u64,
            AtomicUsize: usize,
            AtomicI8: i8,
            AtomicI16: i16,
            AtomicI32: i32,
            AtomicI64: i64,
            AtomicIsize: isize,
        );
    }
}
