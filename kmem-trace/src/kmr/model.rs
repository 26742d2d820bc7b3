//! What each field of a row is expected to be, from the rows above it.
//!
//! The file holds, for every field, how it differs from the expectation; where expectations are good the columns are
//! almost all zero and pack to almost nothing. One function, [`Model::row`], walks a row's fields for writing and for
//! reading alike: a [`Coder`] either takes down the number it is shown or replaces it by the one in the file. The two
//! directions can therefore not disagree about an expectation.
//!
//! The expectations follow the allocators themselves. A free repeats what its allocation said, so it need only say
//! which allocation: counted within one slab cache, objects are freed in runs next to each other. A free list is
//! last-in first-out per CPU, so an allocation mostly takes the address freed last there. The rest repeats the
//! last event from the same call site.

use rustc_hash::FxHashMap;

use crate::row::{Kind, Row};

/// The fields of a row that have a column, by number; [`super`] documents the numbers as part of the form.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub(super) enum Field {
    Cpu = 3,
    Time = 4,
    Cache = 5,
    Id = 6,
    FarId = 7,
    Site = 8,
    Order = 9,
    Flags = 10,
    Gfp = 11,
    BytesRequested = 12,
    BytesAllocated = 13,
    Reuse = 14,
    Address = 15,
}

impl Field {
    /// Number of field numbers, for tables indexed by them.
    pub(super) const NUMBERS: usize = 16;
}

/// Writes a value to its column, or reads the column's next in its place.
pub(super) trait Coder {
    /// `value` is what a writer stores; the result is what the column holds.
    fn code(&mut self, kind: Kind, field: Field, value: u64) -> Result<u64, String>;
}

/// The part of a row another row is expected to repeat.
#[derive(Clone, Copy, Default)]
struct Shape {
    address: u64,
    requested: u32,
    allocated: u32,
    site: u16,
    order: u8,
    flags: u8,
}

/// Id number `number` was given in class `class`.
#[derive(Clone, Copy)]
struct Given {
    class: u32,
    number: u32,
}

/// The addresses of one class.
#[derive(Default)]
struct Heap {
    last: u64,
    /// Freed and not taken again, the last one last.
    freed: Vec<u64>,
}

type Class = (u8, Option<u16>);
type AddressClass = (u16, u8, u32);

/// How far back in the freed addresses an allocation is looked for.
const REUSE_REACH: usize = 63;

/// Everything the expectations rest on.
#[derive(Default)]
pub(super) struct Model {
    time_ns: u64,
    cpu: u16,
    made: Vec<Shape>,
    given: Vec<Given>,
    classes: FxHashMap<Class, u32>,
    /// Ids given in each class, in order.
    ids_of: Vec<Vec<u32>>,
    /// Number, within its class, of the id last named, by class and CPU.
    named: FxHashMap<(u32, u16), u64>,
    /// Call site last seen, by kind, cache and CPU.
    site: FxHashMap<(Kind, Option<u16>, u16), u16>,
    /// Shape and gfp last seen, by kind, cache and call site.
    shape: FxHashMap<(Kind, Option<u16>, u16), (Shape, u32)>,
    gfp_of_kind: FxHashMap<Kind, u32>,
    heaps: FxHashMap<AddressClass, Heap>,
}

const MIGRATETYPE_BITS: u8 = 0x0f;
const SLAB_BIT: u8 = 0x10;
const LARGE_KMALLOC_BIT: u8 = 0x20;

fn family(kind: Kind) -> u8 {
    match kind {
        _ if kind.is_slab() => 1,
        _ if kind.is_page() => 2,
        Kind::PerCpuAlloc | Kind::PerCpuFree => 3,
        _ if kind.is_vmap() => 4,
        _ => 0,
    }
}

/// Folds a signed difference so that small ones of either sign are small numbers.
fn fold(difference: u64) -> u64 {
    (difference << 1) ^ (difference as i64 >> 63) as u64
}

fn unfold(folded: u64) -> u64 {
    (folded >> 1) ^ (folded & 1).wrapping_neg()
}

/// Codes `value` as 0 if it is the expected one, and as one more than itself if not.
fn code_or<C: Coder>(
    coder: &mut C,
    kind: Kind,
    field: Field,
    value: u64,
    expected: u64,
    largest: u64,
) -> Result<u64, String> {
    let code = coder.code(kind, field, if value == expected { 0 } else { value + 1 })?;
    match code {
        0 => Ok(expected),
        _ if code - 1 <= largest => Ok(code - 1),
        _ => Err(format!("{field:?} {} is more than {largest}", code - 1)),
    }
}

impl Model {
    /// Codes one row of kind `row.kind`. A reader passes any row of that kind and finds it filled in.
    pub(super) fn row<C: Coder>(&mut self, row: &mut Row, coder: &mut C) -> Result<(), String> {
        let kind = row.kind;
        let u16_max = u64::from(u16::MAX);
        row.cpu =
            code_or(coder, kind, Field::Cpu, row.cpu.into(), self.cpu.into(), u16_max)? as u16;
        self.cpu = row.cpu;

        let difference =
            coder.code(kind, Field::Time, fold(row.time_ns.wrapping_sub(self.time_ns)))?;
        row.time_ns = self.time_ns.wrapping_add(unfold(difference));
        self.time_ns = row.time_ns;

        row.cache = match coder.code(
            kind,
            Field::Cache,
            row.cache.map_or(0, |cache| u64::from(cache) + 1),
        )? {
            0 => None,
            code => Some(
                u16::try_from(code - 1)
                    .map_err(|_| format!("Cache {} is more than 65535", code - 1))?,
            ),
        };
        let class = (family(kind), row.cache);
        row.id =
            if kind.gives_id() { Some(self.next_id()?) } else { self.named_id(row, class, coder)? };
        let made =
            row.id.filter(|_| !kind.gives_id()).and_then(|id| self.made.get(id as usize).copied());

        let here = (kind, row.cache, row.cpu);
        let last_site = self.site.entry(here).or_default();
        let expected = made.filter(|_| kind == Kind::PageFree).map_or(*last_site, |made| made.site);
        row.site =
            code_or(coder, kind, Field::Site, row.site.into(), expected.into(), u16_max)? as u16;
        *last_site = row.site;

        let shape = self.shape(row, made, coder)?;
        self.address(row, made, coder)?;
        let shape = Shape { address: row.address, ..shape };
        if kind.gives_id() {
            self.give(class, shape);
        } else if kind == Kind::Split {
            // Both halves are expected to look like the block they were; the rows that free them say how they differ.
            self.give(class, shape);
            self.give(class, shape);
        }
        Ok(())
    }

    /// The first of `rows` that names an id none of them gives.
    pub(super) fn stray_id(&self, rows: &[Row]) -> Option<usize> {
        rows.iter().position(|row| row.id.is_some_and(|id| id as usize >= self.made.len()))
    }

    fn next_id(&self) -> Result<u32, String> {
        u32::try_from(self.made.len()).map_err(|_| "more ids than 32 bits can number".to_owned())
    }

    fn give(&mut self, class: Class, shape: Shape) {
        let classes = self.ids_of.len() as u32;
        let class = *self.classes.entry(class).or_insert(classes);
        if class == classes {
            self.ids_of.push(Vec::new());
        }
        let ids = &mut self.ids_of[class as usize];
        self.given.push(Given { class, number: ids.len() as u32 });
        ids.push(self.made.len() as u32);
        self.made.push(shape);
    }

    fn named_id<C: Coder>(
        &mut self,
        row: &Row,
        class: Class,
        coder: &mut C,
    ) -> Result<Option<u32>, String> {
        let class = self.classes.get(&class).copied();
        let last = class.and_then(|class| self.named.get(&(class, row.cpu)).copied()).unwrap_or(0);
        let near = row
            .id
            .and_then(|id| self.given.get(id as usize))
            .filter(|given| Some(given.class) == class);
        let value = match (row.id, near) {
            (None, _) => 0,
            (Some(_), None) => 1,
            (Some(_), Some(given)) => fold(u64::from(given.number).wrapping_sub(last)) + 2,
        };
        match coder.code(row.kind, Field::Id, value)? {
            0 => Ok(None),
            1 => {
                let far = coder.code(row.kind, Field::FarId, row.id.map_or(0, u64::from))?;
                u32::try_from(far)
                    .map(Some)
                    .map_err(|_| format!("id {far} is more than 32 bits can number"))
            }
            code => {
                let number = last.wrapping_add(unfold(code - 2));
                let ids = class.map(|class| (class, &self.ids_of[class as usize]));
                let found = usize::try_from(number)
                    .ok()
                    .and_then(|number| Some((ids?.0, *ids?.1.get(number)?)));
                let (class, id) = found
                    .ok_or_else(|| format!("no id of this kind and cache has number {number}"))?;
                self.named.insert((class, row.cpu), number);
                Ok(Some(id))
            }
        }
    }

    fn shape<C: Coder>(
        &mut self,
        row: &mut Row,
        made: Option<Shape>,
        coder: &mut C,
    ) -> Result<Shape, String> {
        let kind = row.kind;
        let here = (kind, row.cache, row.site);
        let last = self.shape.entry(here).or_default();
        let gfp_of_kind = self.gfp_of_kind.entry(kind).or_default();
        let (expected, gfp) = made.map_or(*last, |made| (made, *gfp_of_kind));
        let flags = row.migratetype & MIGRATETYPE_BITS
            | if row.backs_slab { SLAB_BIT } else { 0 }
            | if row.backs_large_kmalloc { LARGE_KMALLOC_BIT } else { 0 };

        let u32_max = u64::from(u32::MAX);
        row.order =
            code_or(coder, kind, Field::Order, row.order.into(), expected.order.into(), 0xff)?
                as u8;
        let flags =
            code_or(coder, kind, Field::Flags, flags.into(), expected.flags.into(), 0x3f)? as u8;
        row.migratetype = flags & MIGRATETYPE_BITS;
        row.backs_slab = flags & SLAB_BIT != 0;
        row.backs_large_kmalloc = flags & LARGE_KMALLOC_BIT != 0;
        row.gfp = code_or(coder, kind, Field::Gfp, row.gfp.into(), gfp.into(), u32_max)? as u32;
        let (requested, allocated) =
            (u64::from(row.bytes_requested), u64::from(row.bytes_allocated));
        row.bytes_requested = code_or(
            coder,
            kind,
            Field::BytesRequested,
            requested,
            expected.requested.into(),
            u32_max,
        )? as u32;
        row.bytes_allocated = code_or(
            coder,
            kind,
            Field::BytesAllocated,
            allocated,
            expected.allocated.into(),
            u32_max,
        )? as u32;

        let shape = Shape {
            address: 0,
            requested: row.bytes_requested,
            allocated: row.bytes_allocated,
            site: row.site,
            order: row.order,
            flags,
        };
        *gfp_of_kind = row.gfp;
        *last = (shape, row.gfp);
        Ok(shape)
    }

    fn address<C: Coder>(
        &mut self,
        row: &mut Row,
        made: Option<Shape>,
        coder: &mut C,
    ) -> Result<(), String> {
        let kind = row.kind;
        let detail = match family(kind) {
            1 => row.cache.map_or(0, |cache| u32::from(cache) + 1),
            2 => row.order.into(),
            _ => 0,
        };
        let class = (row.cpu, family(kind), detail);
        let heap = self.heaps.entry(class).or_default();
        if kind.gives_id() {
            let freed = &mut heap.freed;
            let known =
                freed.iter().rev().take(REUSE_REACH).position(|address| *address == row.address);
            let reuse = coder.code(kind, Field::Reuse, known.map_or(0, |back| back as u64 + 1))?;
            if reuse > 0 {
                let back = usize::try_from(reuse)
                    .ok()
                    .filter(|back| *back <= freed.len().min(REUSE_REACH));
                let back = back
                    .ok_or_else(|| format!("the {reuse}th last freed address is out of reach"))?;
                row.address = freed.remove(freed.len() - back);
                heap.last = row.address;
                return Ok(());
            }
        }
        let expected = made.map_or(heap.last, |made| made.address);
        let difference =
            coder.code(kind, Field::Address, fold(row.address.wrapping_sub(expected)))?;
        row.address = expected.wrapping_add(unfold(difference));
        heap.last = row.address;
        if kind.ends_id() && kind != Kind::Split {
            heap.freed.push(row.address);
        }
        Ok(())
    }
}
