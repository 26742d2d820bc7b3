//! What was found.

use super::{
    super::{Objects, magazine::Object},
    LeakError, NOT_LEAK, leaked,
    walk::{Of, Thing},
};
use crate::{error::Name, page_alloc::Reclaim, platform::Platform};
use core::{
    fmt::{self, Write},
    panic::Location,
};

/// Bytes of an object that are shown.
const DUMP: usize = 32;
const LINE: usize = 16;
const WORD: usize = size_of::<usize>();

/// Leaks that one walk finds.
const BATCH: usize = 16;

/// An object that nothing refers to \[D2\]. Its text is that of Linux's `/sys/kernel/debug/kmemleak`. There are no tasks
/// with names here: they are shown as `?` and 0. Nor are there backtraces: the caller is shown, where it is known, by
/// [allocation tags](crate::Kmem::set_alloc_tags), by
/// [`STORE_USER`](crate::slab::SlabFlags::STORE_USER) or by KFENCE.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Leak {
    /// Its address.
    pub addr: usize,
    /// Its bytes.
    pub size: usize,
    /// Its cache; `None` for blocks of pages and foreign memory.
    pub cache: Option<Name>,
    /// Who allocated it, if that is known.
    pub site: Option<&'static Location<'static>>,
    /// When, in nanoseconds of the platform's clock, if that is known.
    pub when_ns: Option<u64>,
    /// Its first bytes.
    bytes: [u8; DUMP],
    nr_bytes: usize,
}

impl Leak {
    /// Its first bytes, at most 32 and whole words.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.nr_bytes]
    }
}

impl fmt::Display for Leak {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "unreferenced object {:#018x} (size {}):", self.addr, self.size)?;
        // Jiffies of a millisecond.
        let jiffies = self.when_ns.unwrap_or(0) / 1_000_000;
        writeln!(f, "  comm \"?\", pid 0, jiffies {jiffies}")?;
        writeln!(f, "  hex dump (first {} bytes):", self.nr_bytes)?;
        for line in self.bytes().chunks(LINE) {
            f.write_str("   ")?;
            for byte in line {
                write!(f, " {byte:02x}")?;
            }
            (line.len()..LINE).try_for_each(|_| f.write_str("   "))?;
            f.write_str("  ")?;
            for byte in line {
                f.write_char(match byte {
                    b' '..0x7f => char::from(*byte),
                    _ => '.',
                })?;
            }
            f.write_char('\n')?;
        }
        f.write_str("  backtrace:\n")?;
        match self.site {
            Some(site) => writeln!(f, "    {site}"),
            None => f.write_str("    ?\n"),
        }
    }
}

impl<'a, P: Platform, R: Reclaim> Objects<'a, P, R> {
    /// Calls `f` with each object that the last scan found unreferenced, by address.
    pub(crate) fn each_leak(&self, mut f: impl FnMut(&Leak)) -> Result<(), LeakError> {
        let _busy = self.begin()?;
        self.leaks_on()?;
        let mut from = 0;
        loop {
            let mut batch = [const { None::<Leak> }; BATCH];
            self.walk_things(&mut |thing| {
                let is = thing.addr >= from && is_leak(thing);
                let last = batch[BATCH - 1].as_ref();
                if is && last.is_none_or(|last| thing.addr < last.addr) {
                    let at = batch.iter().position(|b| b.is_none_or(|b| thing.addr < b.addr));
                    let at = at.unwrap_or(BATCH - 1);
                    batch[at..].rotate_right(1);
                    batch[at] = Some(self.leak_of(thing));
                }
            });
            for leak in batch.iter_mut().flatten() {
                self.complete(leak);
                f(leak);
                from = leak.addr + 1;
            }
            if batch[BATCH - 1].is_none() {
                return Ok(());
            }
        }
    }

    /// What is known of an object while it stays.
    fn leak_of(&self, thing: &Thing<'_>) -> Leak {
        let (cache, user) = match thing.of {
            Of::Cache(d, object) => (Some(d.name), self.user_of(d, &Object { ..object })),
            Of::Pool(name, user) => (Some(name), user.map(|(at, when)| (Some(at), when))),
            Of::Large | Of::Foreign => (None, None),
        };
        let (site, when) = user.unzip();
        let (site, bytes) = (site.flatten(), [0; DUMP]);
        let (addr, size) = (thing.addr, thing.size);
        Leak { addr, size, cache, site, when_ns: when, bytes, nr_bytes: 0 }
    }

    /// What is found out with no lock held.
    fn complete(&self, leak: &mut Leak) {
        leak.site = leak.site.or_else(|| self.tag_of(leak.addr));
        let mut words = [0; DUMP / WORD];
        let want = words.len().min(leak.size / WORD);
        let aligned = leak.addr.is_multiple_of(WORD);
        let got = if aligned { self.copy_words(leak.addr, &mut words[..want]) } else { 0 };
        for (to, word) in leak.bytes.chunks_mut(WORD).zip(&words[..got]) {
            to.copy_from_slice(&word.to_ne_bytes());
        }
        leak.nr_bytes = got * WORD;
    }

    /// `echo clear >/sys/kernel/debug/kmemleak`: what the last scan found is never reported again.
    pub(crate) fn kmemleak_clear(&self) -> Result<(), LeakError> {
        let _busy = self.begin()?;
        self.leaks_on()?;
        self.walk_things(&mut |thing| {
            thing.notes.note(&mut |n| leaked(n).then_some(n | NOT_LEAK));
        });
        Ok(())
    }
}

fn is_leak(thing: &Thing<'_>) -> bool {
    let mut is = false;
    // Looked at only.
    thing.notes.note(&mut |n| {
        is = leaked(n);
        None
    });
    is
}
