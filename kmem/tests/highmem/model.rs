//! Random calls against a model of places and counts.

use super::{PAGE, free, high, kunmap, peek, read, shape, write};
use kmem::{Config, Misuse, Page};
use kmem_test_support::Rig;
use proptest::prelude::*;
use std::{collections::HashMap, ptr::NonNull};

const PLACES: usize = 6;
const PAGES: usize = 10;

#[derive(Clone, Copy, Debug)]
enum Step {
    Map(usize),
    Unmap(usize),
    Write(usize, u8),
    Local(usize),
    LocalEnd,
    LocalEndAt(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..PAGES).prop_map(Step::Map),
        4 => (0..PAGES).prop_map(Step::Unmap),
        2 => (0..PAGES, any::<u8>()).prop_map(|(page, value)| Step::Write(page, value)),
        2 => (0..PAGES).prop_map(Step::Local),
        2 => Just(Step::LocalEnd),
        1 => (0..20usize).prop_map(Step::LocalEndAt),
    ]
}

struct Play<'a> {
    rig: &'a Rig,
    pages: Vec<&'a Page>,
    users: [u32; PAGES],
    at: HashMap<usize, NonNull<u8>>,
    contents: [u8; PAGES],
    local: Vec<(usize, NonNull<u8>)>,
}

impl Play<'_> {
    fn mapped(&self) -> usize {
        self.users.iter().filter(|n| **n > 0).count()
    }

    fn check(&self) {
        let audit = self.rig.audit_highmem().unwrap();
        assert_eq!(audit.mapped, self.mapped());
        assert_eq!(audit.users, self.users.iter().map(|n| u64::from(*n)).sum::<u64>());
        assert_eq!(audit.clean + audit.stale + audit.mapped, PLACES);
        assert_eq!((audit.local, audit.held, audit.slept), (self.local.len(), 0, 0));
    }

    fn play(&mut self, step: Step) {
        match step {
            // All places taken: it would sleep.
            Step::Map(n) if self.users[n] == 0 && self.mapped() == PLACES => {}
            Step::Map(n) => {
                let at = self.rig.kmap(self.pages[n]).unwrap();
                if self.users[n] > 0 {
                    assert_eq!(self.at[&n], at);
                } else {
                    assert!(self.at.iter().all(|(m, other)| self.users[*m] == 0 || *other != at));
                }
                assert!(at.addr().get().is_multiple_of(PAGE));
                assert_eq!(read(at), self.contents[n]);
                self.at.insert(n, at);
                self.users[n] += 1;
            }
            Step::Unmap(n) if self.users[n] == 0 => {
                let pfn = self.rig.page_to_pfn(self.pages[n]).unwrap();
                // SAFETY: refused.
                let refused = unsafe { self.rig.kunmap(self.pages[n]) };
                assert_eq!(refused, Err(Misuse::NotKmapped { pfn }));
            }
            Step::Unmap(n) => {
                kunmap(self.rig, self.pages[n]);
                self.users[n] -= 1;
                let address = (self.users[n] > 0).then(|| self.at[&n]);
                assert_eq!(self.rig.page_address(self.pages[n]), address);
            }
            Step::Write(n, value) => {
                let local = self.local.iter().find(|(m, _)| *m == n).map(|(_, at)| *at);
                if let Some(at) = (self.users[n] > 0).then(|| self.at[&n]).or(local) {
                    write(at, value);
                    self.contents[n] = value;
                }
            }
            Step::Local(n) => match self.rig.kmap_local_page(self.pages[n]) {
                Ok(at) => {
                    assert_eq!(read(at), self.contents[n]);
                    self.local.push((n, at));
                }
                Err(what) => {
                    assert_eq!(what, Misuse::LocalDepth { cpu: 0 });
                    assert_eq!(self.local.len(), 16);
                }
            },
            Step::LocalEnd => {
                if let Some((n, at)) = self.local.pop() {
                    assert_eq!(read(at), self.contents[n]);
                    // SAFETY: not used after.
                    unsafe { self.rig.kunmap_local(at.as_ptr()).unwrap() };
                }
            }
            Step::LocalEndAt(i) => {
                if i + 1 < self.local.len() {
                    let (addr, last) = (self.local[i].1, self.local.last().unwrap().1);
                    let (addr, last) = (addr.addr().get(), last.addr().get());
                    // SAFETY: refused.
                    let refused = unsafe { self.rig.kunmap_local(self.local[i].1.as_ptr()) };
                    assert_eq!(refused, Err(Misuse::LocalOrder { addr, last }));
                }
            }
        }
        self.check();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn places_counts_and_contents(
        steps in prop::collection::vec(step(), 1..150),
        debug_highmem: bool,
    ) {
        let config = Config { last_pkmap: PLACES, debug_highmem, ..Config::default() };
        let rig = Rig::new(shape(), config);
        rig.run(|_| {
            let pages: Vec<_> = (0..PAGES).map(|_| high(&rig)).collect();
            // SAFETY: the pages are the test's.
            pages.iter().for_each(|page| unsafe { rig.clear_highpage(page).unwrap() });
            let mut play = Play {
                rig: &rig,
                pages,
                users: [0; PAGES],
                at: HashMap::new(),
                contents: [0; PAGES],
                local: Vec::new(),
            };
            steps.into_iter().for_each(|step| play.play(step));
            while !play.local.is_empty() {
                play.play(Step::LocalEnd);
            }
            for n in 0..PAGES {
                (0..play.users[n]).for_each(|_| play.play(Step::Unmap(n)));
                assert_eq!(peek(&rig, play.pages[n]), play.contents[n]);
            }
            free(&rig, play.pages);
        });
    }
}
