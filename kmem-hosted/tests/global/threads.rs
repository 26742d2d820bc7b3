//! Threads: more than there are seats, many one after the other, and what they allocate at their end.

use crate::{HEAP, child, is_kmem};
use kmem::{fault::FaultPlan, platform::Platform, slab::SlabFlags};
use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap},
    hint::black_box,
    sync::{
        Barrier,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed},
        mpsc,
    },
    thread,
    time::Duration,
};

fn seats() -> usize {
    HEAP.with(|kmem| kmem.platform().nr_cpu_ids()).unwrap()
}

/// Allocates and frees in many sizes, and says whether all was as it was written.
pub fn work(seed: u64, rounds: u64) -> bool {
    let mut live: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
    let mut random = seed | 1;
    for n in 0..rounds {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let len = if random.is_multiple_of(50) { 3000 } else { random % 60 };
        live.insert(n, vec![n ^ seed; len as usize]);
        if live.len() > 100
            && let Some((key, values)) = live.pop_first()
            && values.iter().any(|v| *v != key ^ seed)
        {
            return false;
        }
    }
    live.iter().all(|(key, values)| values.iter().all(|v| *v == key ^ seed))
}

#[test]
fn more_threads_than_seats() {
    let count = seats() + 20;
    let all_here = Barrier::new(count);
    thread::scope(|s| {
        let threads: Vec<_> = (0..count)
            .map(|n| {
                let all_here = &all_here;
                s.spawn(move || {
                    let mine = vec![n; 10];
                    all_here.wait();
                    let right = work(n as u64, 3000);
                    all_here.wait();
                    right && mine == [n; 10]
                })
            })
            .collect();
        assert!(threads.into_iter().all(|t| t.join().unwrap()));
    });
}

#[test]
fn objects_freed_by_others() {
    let (to, from) = mpsc::channel::<HashMap<u64, String>>();
    thread::scope(|s| {
        for n in 0..3 {
            let to = to.clone();
            s.spawn(move || {
                for round in 0..100u64 {
                    to.send((0..50).map(|k| (k, format!("{n} {round} {k}"))).collect()).unwrap();
                }
            });
        }
        drop(to);
        let mut count = 0;
        for map in from {
            count += map.len();
            assert!(map.iter().all(|(k, text)| text.ends_with(&format!(" {k}"))));
        }
        assert_eq!(count, 3 * 100 * 50);
    });
}

/// Allocates when it goes, and says what it found.
struct Late(Vec<u8>);

static LATE: AtomicU64 = AtomicU64::new(0);

fn allocate_late() {
    let text = String::from("late").repeat(50);
    let right = is_kmem(text.as_ptr()) && work(7, 300);
    LATE.fetch_add(u64::from(right), Relaxed);
}

impl Drop for Late {
    fn drop(&mut self) {
        assert_eq!(self.0, [1, 2, 3]);
        allocate_late();
    }
}

extern "C" fn last(_: *mut libc::c_void) {
    allocate_late();
}

/// Threads end, and their seats go to the next; destructors allocate to the very end. In a child, so that it can be
/// told that nothing piles up.
#[test]
fn threads_end() {
    thread_local! {
        static AT_END: RefCell<Option<Late>> = const { RefCell::new(None) };
    }
    child::run(|| {
        static KEY: AtomicU32 = AtomicU32::new(0);
        let mut key = 0;
        // SAFETY: a place for the key, and a function. The key is younger than kmem's, so its destructor comes after.
        unsafe { libc::pthread_key_create(&raw mut key, Some(last)) };
        KEY.store(key, Relaxed);
        let end = |_| {
            // SAFETY: the key was made above.
            unsafe { libc::pthread_setspecific(KEY.load(Relaxed), (&raw const LATE).cast()) };
            AT_END.set(Some(Late(vec![1, 2, 3])));
        };
        let one_by_one = |threads: u64| {
            (0..threads).for_each(|_| child::Threads::start(1, end).join());
        };
        one_by_one(50);
        let before = child::audit()?;
        one_by_one(400);
        let after = child::audit()?;
        child::check(LATE.load(Relaxed) == 900, || format!("{LATE:?} late allocations"))?;
        child::check(after.0 <= before.0 + 10, || format!("objects: {before:?}, {after:?}"))?;
        child::check(after.1 + 100 >= before.1, || format!("frames: {before:?}, {after:?}"))
    });
}

/// Threads that stay on the fast paths, and threads that do nothing at all, give their magazines up when somebody wants
/// them.
#[test]
fn busy_and_idle_threads_answer() {
    child::run(|| {
        const OTHERS: u64 = 4;
        static READY: AtomicU64 = AtomicU64::new(0);
        static END: AtomicBool = AtomicBool::new(false);
        let threads = child::Threads::start(OTHERS, |n| {
            drop(black_box(Box::new([n; 8])));
            READY.fetch_add(1, Relaxed);
            while !END.load(Relaxed) {
                if n.is_multiple_of(2) {
                    drop(black_box(Box::new([n; 8])));
                } else {
                    thread::sleep(Duration::from_millis(1));
                }
            }
        });
        while READY.load(Relaxed) < OTHERS {
            thread::yield_now();
        }
        let switch = |round: u32| {
            HEAP.with(|kmem| {
                let flags = SlabFlags::NO_MERGE;
                let cache = kmem
                    .kmem_cache_create("ours", 48, 0, flags, None)
                    .map_err(|e| format!("round {round}: {e}"))?;
                for flags in [SlabFlags::CONSISTENCY_CHECKS, SlabFlags::empty()] {
                    kmem.kmem_cache_set_debug(&cache, flags)
                        .map_err(|e| format!("round {round}: {flags:?}: {e}"))?;
                }
                kmem.kmem_cache_shrink(&cache);
                kmem.set_failslab(FaultPlan::Nth(u64::MAX), None)
                    .and_then(|()| kmem.set_failslab(FaultPlan::Off, None))
                    .map_err(|e| format!("round {round}: failslab: {e}"))?;
                kmem.kmem_cache_destroy(cache).map_err(|e| format!("round {round}: {e}"))
            })
            .unwrap_or(Err("no machine".into()))
        };
        let result = (0..20).try_for_each(switch);
        END.store(true, Relaxed);
        threads.join();
        result?;
        child::audit().map(|_| ())
    });
}
