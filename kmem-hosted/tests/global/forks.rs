//! Forks while other threads allocate.

use crate::{child, threads::work};
use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    thread,
};

/// The child has the parent's memory and its own from then on; its machine is whole, whatever the other threads were at.
#[test]
fn children_go_on() {
    let stop = AtomicBool::new(false);
    thread::scope(|s| {
        for n in 0..3 {
            let stop = &stop;
            s.spawn(move || {
                while !stop.load(Relaxed) {
                    assert!(work(n, 500));
                }
            });
        }
        // Threads that come and go.
        s.spawn(|| {
            while !stop.load(Relaxed) {
                thread::scope(|s| s.spawn(|| assert!(work(9, 50))).join().unwrap());
            }
        });
        let mut shared = vec![1u64; 1000];
        for round in 0..60 {
            shared[0] = round;
            let pid = child::start(|| {
                child::check(shared[0] == round && shared[999] == 1, || "not the parent's".into())?;
                shared.iter_mut().for_each(|v| *v = 77);
                child::audit()?;
                child::check(work(round, 1000), || "memory is not kept".into())?;
                // It may have threads of its own, and children.
                static RIGHT: AtomicU64 = AtomicU64::new(0);
                child::Threads::start(3, |n| {
                    RIGHT.fetch_add(u64::from(work(n, 500)), Relaxed);
                })
                .join();
                child::check(RIGHT.load(Relaxed) == 3, || "threads of a child".into())?;
                if round % 20 == 0 {
                    child::run(|| {
                        child::check(shared[5] == 77 && work(3, 100), || "a grandchild".into())
                    });
                }
                drop(std::mem::take(&mut shared));
                child::audit().map(|_| ())
            });
            // Meanwhile the parent's is its own.
            assert!(shared[1..].iter().all(|v| *v == 1) && work(round, 100));
            child::join(pid);
        }
        stop.store(true, Relaxed);
    });
}

/// Several threads fork at once.
#[test]
fn forks_at_once() {
    thread::scope(|s| {
        for n in 0..4 {
            s.spawn(move || {
                for _ in 0..20 {
                    child::run(|| child::check(work(n, 100), || "memory is not kept".into()));
                    assert!(work(n, 100));
                }
            });
        }
    });
}

#[test]
fn other_programs_are_started() {
    let output = std::process::Command::new("/bin/echo").arg("started").output().unwrap();
    assert_eq!(output.stdout, b"started\n");
}
