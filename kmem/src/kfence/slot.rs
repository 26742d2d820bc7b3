//! What is known of one of the pool's objects.

use crate::error::Name;
use core::{
    panic::Location,
    ptr,
    sync::atomic::{
        AtomicPtr, AtomicU8, AtomicU32, AtomicU64,
        Ordering::{AcqRel, Acquire, Relaxed, Release, SeqCst},
    },
};

/// Never given out.
pub(super) const UNUSED: u8 = 0;
pub(super) const ALLOCATED: u8 = 1;
/// Being freed by whoever made it so.
pub(super) const FREEING: u8 = 2;
pub(super) const FREED: u8 = 3;
/// To be freed once its readers are done.
pub(super) const DYING: u8 = 4;

/// No CPU.
pub(super) const NO_CPU: u32 = u32::MAX;

/// A slot's word, taken apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Info {
    pub(super) state: u8,
    /// Number of the object's cache.
    pub(crate) cache: u16,
    /// Where on its page it begins.
    pub(super) offset: u16,
    /// Its bytes.
    pub(crate) size: u16,
}

impl Info {
    fn word(self) -> u64 {
        let Info { state, cache, offset, size } = self;
        u64::from(state) | u64::from(cache) << 16 | u64::from(offset) << 32 | u64::from(size) << 48
    }

    fn of(word: u64) -> Info {
        Info {
            state: word as u8,
            cache: (word >> 16) as u16,
            offset: (word >> 32) as u16,
            size: (word >> 48) as u16,
        }
    }

    /// Whether somebody has it, who may free it.
    pub(crate) fn live(self) -> bool {
        self.state == ALLOCATED
    }

    /// Whether somebody may look at it: it is live, or waits for its readers.
    pub(crate) fn in_use(self) -> bool {
        self.live() || self.state == DYING
    }
}

/// A use of an object: where in the source, on which CPU, when.
pub(super) struct Track {
    site: AtomicPtr<Location<'static>>,
    cpu: AtomicU32,
    when: AtomicU64,
}

impl Track {
    pub(super) fn set(&self, at: Option<&'static Location<'static>>, cpu: u32, when: u64) {
        self.cpu.store(cpu, Relaxed);
        self.when.store(when, Relaxed);
        // Release: who finds the place finds the rest.
        self.site.store(at.map_or(ptr::null_mut(), |at| ptr::from_ref(at).cast_mut()), Release);
    }

    pub(super) fn get(&self) -> Option<(&'static Location<'static>, u32, u64)> {
        // SAFETY: null, or what `set` stored, which is there for ever. Acquire pairs with its Release.
        let site = unsafe { self.site.load(Acquire).as_ref() }?;
        Some((site, self.cpu.load(Relaxed), self.when.load(Relaxed)))
    }
}

/// One object's. All zeros is one that was never given out.
pub(crate) struct Slot {
    word: AtomicU64,
    /// Stands for the state byte of an object in a slab; never that of a live one.
    byte: AtomicU8,
    /// The next free one; under the list's lock.
    pub(super) next: AtomicU32,
    /// The cache's name, which may be gone before the slot is used again.
    name: [AtomicU64; 4],
    /// Those who look at the object's bytes from elsewhere; its page stays while there are any.
    readers: AtomicU32,
    pub(super) allocated: Track,
    pub(super) freed: Track,
}

impl Slot {
    pub(crate) fn info(&self) -> Info {
        // Acquire pairs with the Release in `set`.
        Info::of(self.word.load(Acquire))
    }

    pub(super) fn set(&self, info: Info) {
        // Release: who sees the state sees the name and the uses.
        self.word.store(info.word(), Release);
    }

    /// Changes an object into one being freed; says whether it was that one.
    pub(super) fn begin_free(&self, info: Info) -> bool {
        // SeqCst: what its owner wrote is seen by who frees it; and either this is seen by a reader, or the reader in
        // `wait_for_readers`.
        self.word
            .compare_exchange(info.word(), Info { state: FREEING, ..info }.word(), SeqCst, Relaxed)
            .is_ok()
    }

    /// Changes an allocated object into one that waits for its readers; says whether it was that one.
    pub(super) fn set_dying(&self, info: Info) -> bool {
        let (from, to) = (Info { state: ALLOCATED, ..info }, Info { state: DYING, ..info });
        // AcqRel, as an allocation's `set` and a look at it.
        self.word.compare_exchange(from.word(), to.word(), AcqRel, Relaxed).is_ok()
    }

    /// Waits until nobody looks at an object that is being freed. Readers have interrupts masked.
    pub(super) fn wait_for_readers(&self, relax: impl Fn()) {
        while self.readers.load(SeqCst) != 0 {
            relax();
        }
    }

    /// Calls `f` if the object is in use, while it stays in its page. The caller has masked interrupts.
    pub(super) fn read(&self, f: impl FnOnce(Info)) {
        self.readers.fetch_add(1, SeqCst);
        let info = Info::of(self.word.load(SeqCst));
        if info.in_use() {
            f(info);
        }
        self.readers.fetch_sub(1, SeqCst);
    }

    /// Who allocated the object, and when.
    pub(crate) fn user(&self) -> Option<(&'static Location<'static>, u64)> {
        self.allocated.get().map(|(at, _, when)| (at, when))
    }

    pub(super) fn set_name(&self, name: Name) {
        self.name.iter().zip(name.to_words()).for_each(|(at, word)| at.store(word, Relaxed));
    }

    pub(crate) fn byte(&'static self) -> &'static AtomicU8 {
        &self.byte
    }

    pub(crate) fn name(&self) -> Name {
        Name::from_words(core::array::from_fn(|i| self.name[i].load(Relaxed)))
    }
}
