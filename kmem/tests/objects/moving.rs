//! Objects that their user can move: what a burst leaves is pulled together \[S10\].

use kmem::{
    Gfp, Kmem, Misuse,
    slab::{KmemCache, MoveResult, RCU_HEAD, SlabFlags},
};
use kmem_hosted::Hosted;
use kmem_test_support::Rig;
use proptest::prelude::*;
use std::{
    collections::BTreeMap,
    ptr::NonNull,
    sync::{
        Mutex,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
};

const SIZE: usize = 96;

/// A user who knows its objects by a number in them.
#[derive(Default)]
struct User {
    at: Mutex<BTreeMap<u64, usize>>,
    /// Numbers of objects that may not move, that are freed while they are moved, and that nobody needs.
    pinned: Vec<u64>,
    freed: Vec<u64>,
    unneeded: Vec<u64>,
    /// Of those that are freed once their readers are done, which is after the move, or before it is over.
    later: Vec<u64>,
    waited: Vec<u64>,
    /// Moves left during which the cache begins to look for mistakes, and another object of the slab is freed.
    watches: AtomicU32,
    machine: usize,
    cache: usize,
}

fn number(at: NonNull<u8>) -> u64 {
    // SAFETY: an object of the user's, which begins with its number.
    unsafe { at.cast::<u64>().read() }
}

unsafe fn move_object(from: NonNull<u8>, to: NonNull<u8>, private: usize) -> MoveResult {
    // SAFETY: the test's user outlives the shrinking.
    let user = unsafe { &*std::ptr::with_exposed_provenance::<User>(private) };
    let id = number(from);
    let mut at = user.at.lock().unwrap();
    assert_eq!(at.get(&id), Some(&from.addr().get()), "the user knows it there");
    if user.pinned.contains(&id) {
        return MoveResult::Refused;
    }
    if user.freed.contains(&id) {
        at.remove(&id);
        drop(at);
        // SAFETY: both outlive the shrinking; the object is not used after.
        unsafe {
            let m = &*std::ptr::with_exposed_provenance::<Kmem<Hosted>>(user.machine);
            let cache = &*std::ptr::with_exposed_provenance::<KmemCache>(user.cache);
            m.kmem_cache_free(cache, from).unwrap();
            m.kmem_cache_free(cache, from).unwrap_err();
        }
        return MoveResult::Refused;
    }
    if user.unneeded.contains(&id) {
        at.remove(&id);
        return MoveResult::Unneeded;
    }
    if user.later.contains(&id) || user.waited.contains(&id) {
        at.remove(&id);
        drop(at);
        // SAFETY: as above; its last bytes are nobody's.
        let m = unsafe { &*std::ptr::with_exposed_provenance::<Kmem<Hosted>>(user.machine) };
        let head = SIZE - RCU_HEAD;
        let (again, addr) = (from.as_ptr(), from.addr().get());
        m.platform()
            .rcu_read(|| {
                // SAFETY: as above; the second and the third time are refused.
                unsafe {
                    m.kfree_rcu(from.as_ptr(), head).unwrap();
                    assert_eq!(m.kfree_rcu(again, head), Err(Misuse::FreedLater { addr }));
                    m.kfree(again).unwrap_err();
                }
            })
            .unwrap();
        if user.waited.contains(&id) {
            assert!(m.rcu_barrier());
            // SAFETY: refused, too: it is free, but not back.
            unsafe { m.kfree(again).unwrap_err() };
        }
        assert_eq!((number(from), m.ksize(from.as_ptr())), (id, None), "its memory stays");
        return MoveResult::Refused;
    }
    let slab = |addr: usize| addr >> 12;
    let beside = at
        .iter()
        .map(|(id, addr)| (*id, *addr))
        .find(|(other, addr)| *other != id && slab(*addr) == slab(from.addr().get()));
    if user.watches.load(Relaxed) > 0
        && let Some((other, addr)) = beside
    {
        user.watches.fetch_sub(1, Relaxed);
        at.remove(&other);
        let object = NonNull::new(std::ptr::with_exposed_provenance_mut(addr)).unwrap();
        // SAFETY: both outlive the shrinking; the object is not used after.
        unsafe {
            let m = &*std::ptr::with_exposed_provenance::<Kmem<Hosted>>(user.machine);
            let cache = &*std::ptr::with_exposed_provenance::<KmemCache>(user.cache);
            m.kmem_cache_set_debug(cache, SlabFlags::CONSISTENCY_CHECKS).unwrap();
            m.kmem_cache_free(cache, object).unwrap();
            m.kmem_cache_validate(cache).unwrap();
            m.kmem_cache_set_debug(cache, SlabFlags::empty()).unwrap();
        }
    }
    // SAFETY: two objects of the size.
    unsafe { to.copy_from_nonoverlapping(from, SIZE) };
    at.insert(id, to.addr().get());
    MoveResult::Moved
}

/// Allocates `n` objects and frees all that `keep` does not name.
fn burst(m: &Kmem<Hosted>, cache: &KmemCache, user: &User, n: u64, keep: impl Fn(u64) -> bool) {
    let objects: Vec<NonNull<u8>> = (0..n)
        .map(|id| {
            let at = m.kmem_cache_alloc(cache, Gfp::KERNEL).unwrap();
            // SAFETY: an object of ours.
            unsafe {
                at.write_bytes(id as u8, SIZE);
                at.cast::<u64>().write(id);
            }
            at
        })
        .collect();
    for (id, at) in (0..n).zip(objects) {
        if keep(id) {
            user.at.lock().unwrap().insert(id, at.expose_provenance().get());
        } else {
            // SAFETY: not used after.
            unsafe { m.kmem_cache_free(cache, at).unwrap() };
        }
    }
}

/// Looks at every object the user knows, frees them, and ends the cache.
fn end(m: &Kmem<Hosted>, cache: KmemCache, user: &User) {
    for (id, at) in user.at.lock().unwrap().iter() {
        let at = NonNull::new(std::ptr::with_exposed_provenance_mut::<u8>(*at)).unwrap();
        assert_eq!(number(at), *id);
        // SAFETY: an object of ours.
        let rest = unsafe { std::slice::from_raw_parts(at.as_ptr().add(8), SIZE - 8) };
        assert!(rest.iter().all(|byte| *byte == *id as u8), "its content came along");
        // SAFETY: not used after.
        unsafe { m.kmem_cache_free(&cache, at).unwrap() };
    }
    m.kmem_cache_destroy(cache).unwrap();
}

fn with_user(mut user: User, n: u64, keep: impl Fn(u64) -> bool, check: impl Fn(u64, u64)) {
    let rig = Rig::flat();
    rig.run(|_| {
        let m: &Kmem<Hosted> = &rig;
        let cache = m.kmem_cache_create("moved", SIZE, 0, SlabFlags::NO_MERGE, None).unwrap();
        user.machine = std::ptr::from_ref(m).expose_provenance();
        user.cache = (&raw const cache).expose_provenance();
        let user = &user;
        burst(m, &cache, user, n, keep);
        let mark = rig.mark();
        let private = std::ptr::from_ref(user).expose_provenance();
        // SAFETY: the callback keeps the contract.
        unsafe { m.kmem_cache_set_move(&cache, Some(move_object), private).unwrap() };
        let known = user.at.lock().unwrap().len() as u64;
        let before = m.kmem_cache_info(&cache).slabs;
        m.kmem_cache_shrink(&cache);
        assert!(m.rcu_barrier());
        m.kmem_cache_shrink(&cache);
        let info = m.kmem_cache_info(&cache);
        let left = user.at.lock().unwrap().len() as u64;
        assert_eq!(info.active_objects, left);
        assert!(left <= known);
        let perfect = left.div_ceil(info.objects_per_slab.into());
        check(before - info.slabs, before - perfect);
        // SAFETY: as above.
        unsafe { m.kmem_cache_set_move(&cache, None, 0).unwrap() };
        end(m, cache, user);
        assert_eq!(user.watches.load(Relaxed), 0);
        // Only what the callback does on purpose is a misuse.
        if user.freed.is_empty() && user.later.is_empty() && user.waited.is_empty() {
            assert_eq!(rig.since(mark), []);
        }
    });
}

/// Of a burst a scattered hundredth stays: what perfect packing would free comes free, save a twentieth.
#[test]
fn a_scattered_hundredth_is_pulled_together() {
    with_user(
        User::default(),
        20_000,
        |id| id % 100 == 37,
        |freed, possible| {
            assert!(freed * 100 >= possible * 95, "{freed} slabs of {possible}");
        },
    );
}

/// Objects that refuse, that are freed while they are moved, and that nobody needs.
#[test]
fn objects_that_do_not_move() {
    let user = User {
        pinned: vec![90],
        freed: vec![30, 1530, 3000],
        unneeded: vec![60, 2010],
        ..User::default()
    };
    with_user(
        user,
        6000,
        |id| id % 30 == 0,
        |freed, possible| {
            assert!(freed + 8 >= possible, "{freed} slabs of {possible}");
        },
    );
}

/// Objects that are freed for later while they are moved: nobody is given their memory before either is over.
#[test]
fn objects_that_are_freed_later_while_they_move() {
    let user = User { later: vec![30, 1530], waited: vec![60, 3000], ..User::default() };
    with_user(
        user,
        6000,
        |id| id % 30 == 0,
        |freed, possible| {
            assert!(freed + 8 >= possible, "{freed} slabs of {possible}");
        },
    );
}

/// A cache that begins to look for mistakes while its objects move takes none of them for damaged.
#[test]
fn consistency_checks_begin_while_objects_move() {
    let user = User { watches: 5.into(), ..User::default() };
    with_user(
        user,
        6000,
        |id| id % 10 == 0,
        |freed, possible| {
            assert!(freed + 8 >= possible, "{freed} slabs of {possible}");
        },
    );
}

/// A cache that others may share has no callback.
#[test]
fn shared_caches_are_not_moved() {
    let rig = Rig::flat();
    rig.run(|_| {
        let cache = rig.kmem_cache_create("shared", SIZE, 0, SlabFlags::empty(), None).unwrap();
        // SAFETY: it is refused.
        unsafe { rig.kmem_cache_set_move(&cache, Some(move_object), 0).unwrap_err() };
        rig.kmem_cache_destroy(cache).unwrap();
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever stays, it is packed.
    #[test]
    fn what_stays_is_packed(n in 1_u64..4000, seed in any::<u64>(), of in 1_u64..200) {
        let keep = |id: u64| (id ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32 & 0xffff < 0xffff / of;
        with_user(User::default(), n, keep, |freed, possible| {
            assert!(freed * 100 >= possible * 95 || freed + 1 >= possible, "{freed} slabs of {possible}");
        });
    }
}
