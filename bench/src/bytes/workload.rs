//! The loops that byte allocators are measured with.
//!
//! # Concepts
//! All randomness is drawn beforehand, from a fixed seed, the same for every contender. Whatever is allocated is
//! written to, one byte. An allocator that has no memory ends the program: a figure measured over failing
//! calls would be a lie.
//!
//! # Locking
//! [`Exchange`]: a spin lock per place.

use super::Bytes;
use crate::work::{Work, timed};
use std::{hint, hint::black_box, process, sync::Arc, thread, time::Duration};

const SEED: u64 = 0x006b_6d65_6d00_0002;

/// Bytes of the hot pair.
pub const PAIR: usize = 64;
/// Objects that a thread of [`Larson`] keeps.
pub const SLOTS: usize = 4096;
/// Smallest object of [`Larson`].
pub const SMALLEST: usize = 16;
/// Largest object of [`Larson`].
pub const LARGEST: usize = 1024;
/// Operations between two exchanges of slots.
pub const EXCHANGE: u64 = 4096;

/// Replacements that are drawn beforehand.
const SCRIPT: usize = 1 << 16;
/// Looks at a place before the processor is offered to others.
const SPINS: u32 = 1 << 12;

#[cold]
#[inline(never)]
fn exhausted<B>(size: usize) -> ! {
    eprintln!("error: {} has no {size} bytes for a workload", std::any::type_name::<B>());
    process::exit(3)
}

#[inline(always)]
fn take<B: Bytes>(b: &mut B, size: usize) -> *mut u8 {
    let at = b.alloc(size);
    if at.is_null() {
        exhausted::<B>(size);
    }
    // SAFETY: not null, so `size` bytes to be written, and every workload asks for some.
    unsafe { at.write_volatile(1) };
    at
}

/// Objects in use beside [`Pair`]'s at most.
const HELD: usize = 1024;

/// 64 bytes taken and given back, in memory where objects of that size are in use. Before each run there are a few more
/// of those, so that it is at another place: processors confuse places whose addresses end alike, and no contender is to
/// be lucky or unlucky for long.
pub struct Pair<B: Bytes> {
    bytes: B,
    held: Vec<*mut u8>,
    rng: fastrand::Rng,
}

// SAFETY: an allocator's memory may be freed by whatever thread.
unsafe impl<B: Bytes + Send> Send for Pair<B> {}

impl<B: Bytes> Pair<B> {
    /// Takes nothing yet.
    pub fn new(bytes: B) -> Pair<B> {
        let held = Vec::with_capacity(HELD);
        Pair { bytes, held, rng: fastrand::Rng::with_seed(SEED) }
    }

    fn move_on(&mut self) {
        let more = self.rng.usize(1..=HELD / 16);
        if self.held.len() + more > HELD {
            self.let_go();
        }
        self.held.extend((0..more).map(|_| take(&mut self.bytes, PAIR)));
    }

    fn let_go(&mut self) {
        for at in self.held.drain(..) {
            // SAFETY: taken by `move_on`, and not used again.
            unsafe { self.bytes.free(at, PAIR) };
        }
    }
}

impl<B: Bytes + Send> Work for Pair<B> {
    #[inline(never)]
    fn run(&mut self, n: u64) -> Duration {
        self.move_on();
        timed(|| {
            for _ in 0..n {
                let at = take(&mut self.bytes, PAIR);
                // SAFETY: just taken.
                unsafe { self.bytes.free(black_box(at), PAIR) };
            }
        })
    }

    fn end(mut self: Box<Self>) {
        self.let_go();
    }
}

/// An object in use.
#[derive(Clone, Copy)]
struct Slot {
    at: *mut u8,
    size: u32,
}

/// Objects in use.
pub struct Slots(Box<[Slot]>);

// SAFETY: they are the owner's alone, and an allocator's memory may be freed by whatever thread.
unsafe impl Send for Slots {}

/// Where two threads give each other their slots.
#[derive(Default)]
pub struct Exchange {
    places: [spin::Mutex<Option<Slots>>; 2],
}

impl Exchange {
    fn until<T>(mut look: impl FnMut() -> Option<T>) -> T {
        let mut spins = 0;
        loop {
            if let Some(found) = look() {
                return found;
            }
            spins += 1;
            if spins < SPINS {
                hint::spin_loop();
            } else {
                thread::yield_now();
            }
        }
    }

    /// Gives the other thread `slots` and waits for its.
    pub fn swap(&self, thread: usize, slots: Slots) -> Slots {
        let mut mine = Some(slots);
        // What the other has not fetched since the last time is still there.
        Self::until(|| {
            let mut place = self.places[thread].lock();
            if place.is_none() {
                *place = mine.take();
            }
            mine.is_none().then_some(())
        });
        Self::until(|| self.places[1 - thread].lock().take())
    }
}

/// Objects of 16 to 1024 bytes, replaced at random: one operation is a free and an allocation.
pub struct Larson<B: Bytes> {
    bytes: B,
    slots: Slots,
    /// A slot and the size that replaces it, as `slot | size << 16`.
    script: Box<[u32; SCRIPT]>,
    at: usize,
}

impl<B: Bytes> Larson<B> {
    /// Fills the slots. Each thread draws from a seed of its own.
    pub fn new(mut bytes: B, thread: usize) -> Larson<B> {
        let mut rng = fastrand::Rng::with_seed(SEED + thread as u64);
        let mut size = || rng.u32(SMALLEST as u32..=LARGEST as u32);
        let slots = (0..SLOTS).map(|_| {
            let size = size();
            Slot { at: take(&mut bytes, size as usize), size }
        });
        let slots = Slots(slots.collect());
        let mut script = Box::new([0; SCRIPT]);
        script.iter_mut().for_each(|step| *step = size() << 16);
        script.iter_mut().for_each(|step| *step |= rng.u32(..SLOTS as u32));
        Larson { bytes, slots, script, at: 0 }
    }

    #[inline(never)]
    fn replace(&mut self, n: u64) {
        for _ in 0..n {
            let step = self.script[self.at % SCRIPT];
            self.at += 1;
            let slot = &mut self.slots.0[(step & 0xffff) as usize % SLOTS];
            // SAFETY: in use, and not after this.
            unsafe { self.bytes.free(slot.at, slot.size as usize) };
            let size = step >> 16;
            *slot = Slot { at: take(&mut self.bytes, size as usize), size };
        }
    }
}

impl<B: Bytes + Send> Work for Larson<B> {
    fn run(&mut self, n: u64) -> Duration {
        timed(|| self.replace(n))
    }

    fn end(mut self: Box<Self>) {
        for slot in &self.slots.0 {
            // SAFETY: in use, and not after this.
            unsafe { self.bytes.free(slot.at, slot.size as usize) };
        }
    }
}

/// [`Larson`] by two threads that exchange their slots every [`EXCHANGE`] operations, which count as one
/// here. The time does not include waiting for each other.
pub struct Swapped<B: Bytes> {
    larson: Larson<B>,
    exchange: Arc<Exchange>,
    thread: usize,
}

impl<B: Bytes> Swapped<B> {
    /// Fills the slots of one of the threads 0 and 1.
    pub fn new(bytes: B, thread: usize, exchange: Arc<Exchange>) -> Swapped<B> {
        Swapped { larson: Larson::new(bytes, thread), exchange, thread }
    }
}

impl<B: Bytes + Send> Work for Swapped<B> {
    fn run(&mut self, n: u64) -> Duration {
        let mut spent = Duration::ZERO;
        for _ in 0..n {
            spent += timed(|| self.larson.replace(EXCHANGE));
            let slots = std::mem::replace(&mut self.larson.slots, Slots(Box::new([])));
            self.larson.slots = self.exchange.swap(self.thread, slots);
        }
        spent
    }

    fn end(self: Box<Self>) {
        Box::new(self.larson).end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::Glibc;
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    /// Counts what is in use.
    struct Counted<'a>(&'a AtomicUsize);

    // SAFETY: glibc's promise.
    unsafe impl Bytes for Counted<'_> {
        fn alloc(&mut self, size: usize) -> *mut u8 {
            self.0.fetch_add(size, SeqCst);
            Glibc.alloc(size)
        }

        unsafe fn free(&mut self, at: *mut u8, size: usize) {
            self.0.fetch_sub(size, SeqCst);
            // SAFETY: the caller's.
            unsafe { Glibc.free(at, size) };
        }
    }

    #[test]
    fn larson_keeps_its_slots_full_and_gives_them_back() {
        let used = AtomicUsize::new(0);
        let mut larson = Box::new(Larson::new(Counted(&used), 0));
        larson.run(3 * SCRIPT as u64 / 2);
        let held: usize = larson.slots.0.iter().map(|s| s.size as usize).sum();
        assert_eq!(used.load(SeqCst), held);
        assert!(larson.slots.0.iter().all(|s| (SMALLEST..=LARGEST).contains(&(s.size as usize))));
        larson.end();
        assert_eq!(used.load(SeqCst), 0);
    }

    fn array(w: &Swapped<Counted<'_>>) -> usize {
        w.larson.slots.0.as_ptr().addr()
    }

    #[test]
    fn two_threads_exchange_their_slots() {
        let used = AtomicUsize::new(0);
        let exchange = Arc::new(Exchange::default());
        let works: Vec<_> =
            (0..2).map(|i| Box::new(Swapped::new(Counted(&used), i, exchange.clone()))).collect();
        let before: Vec<usize> = works.iter().map(|w| array(w)).collect();
        let after: Vec<usize> = thread::scope(|scope| {
            let run = |mut w: Box<Swapped<Counted<'_>>>| {
                w.run(3);
                let at = array(&w);
                w.end();
                at
            };
            let threads: Vec<_> = works.into_iter().map(|w| scope.spawn(move || run(w))).collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        assert_eq!(after, [before[1], before[0]]);
        assert_eq!(used.load(SeqCst), 0);
    }
}
