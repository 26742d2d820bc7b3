//! Recordings made up for the tests.

use kmem_trace::{Kind, Meta, NO_STACK, Recording, Row};
use std::fmt::Write;

/// Everything but the highest zone's flags: a movable user page.
const MOVABLE: u32 = 0x10_0cca;

/// A recording under construction.
pub struct Maker {
    recording: Recording,
    ids: u32,
}

impl Maker {
    /// A recording without a start state.
    pub fn new(name: &str) -> Maker {
        Maker { recording: Recording { meta: Meta::new(name, "KMT1"), rows: Vec::new() }, ids: 0 }
    }

    /// The recording.
    pub fn done(self) -> Recording {
        self.recording
    }

    fn push(&mut self, kind: Kind, ms: u64, cpu: u16, (pfn, order): (u64, u8), id: Option<u32>) {
        self.recording.rows.push(Row {
            time_ns: ms * 1_000_000,
            address: pfn,
            id,
            bytes_requested: if kind == Kind::PageAlloc { NO_STACK } else { 0 },
            bytes_allocated: 4096 << order,
            gfp: if kind == Kind::PageAlloc { MOVABLE } else { 0 },
            site: 0,
            cache: None,
            cpu,
            kind,
            order,
            migratetype: u8::from(kind.is_page()),
            backs_slab: false,
            backs_large_kmalloc: false,
        });
        let cpus = self.recording.meta.cpus;
        self.recording.meta.cpus = cpus.max(u32::from(cpu) + 1);
    }

    /// An allocation; returns its id.
    pub fn alloc(&mut self, ms: u64, cpu: u16, block: (u64, u8)) -> u32 {
        let id = self.ids;
        self.ids += 1;
        self.push(Kind::PageAlloc, ms, cpu, block, Some(id));
        id
    }

    /// A free; without an id, of a block from before.
    pub fn free(&mut self, ms: u64, cpu: u16, block: (u64, u8), id: Option<u32>) {
        self.push(Kind::PageFree, ms, cpu, block, id);
    }

    /// An event of another kind on CPU 0: at an address, of so many bytes and an alignment's log2. An allocation is given
    /// an id, which is returned; a free ends the one it is given.
    pub fn other(
        &mut self,
        kind: Kind,
        address: u64,
        (bytes, align): (u32, u8),
        id: Option<u32>,
    ) -> u32 {
        let id = if kind.gives_id() { Some(self.ids) } else { id };
        self.ids += u32::from(kind.gives_id());
        self.push(kind, 2, 0, (address, 0), id);
        let Some(row) = self.recording.rows.last_mut() else { unreachable!("just pushed") };
        (row.bytes_requested, row.bytes_allocated, row.order) = (bytes, bytes, align);
        row.gfp = 0xcc0;
        id.unwrap_or(u32::MAX)
    }

    /// A phase mark.
    pub fn phase(&mut self, ms: u64, number: u64) {
        self.push(Kind::Phase, ms, 0, (number, 0), None);
    }

    /// The texts of a machine with `cpus` CPUs at both ends of the recording.
    pub fn texts(&mut self, zones: &[Zone], max_order: u8, cpus: u32) {
        for (name, text) in texts(zones, max_order, cpus) {
            self.recording.meta.files.insert(format!("start/{name}"), text.clone());
            self.recording.meta.files.insert(format!("end/{name}"), text);
        }
    }
}

/// A zone whose frames are free but for `used` blocks of order 9 at its beginning.
#[derive(Clone, Copy)]
pub struct Zone {
    pub node: u32,
    pub name: &'static str,
    pub first: u64,
    pub end: u64,
    pub used: u64,
}

/// `/proc` texts of a machine with these zones.
pub fn texts(zones: &[Zone], max_order: u8, cpus: u32) -> [(&'static str, String); 4] {
    let (mut buddyinfo, mut zoneinfo, mut iomem) = (String::new(), String::new(), String::new());
    let mut types = "Page block order: 9\nPages per block:  512\n\n\
                     Number of blocks type  Unmovable  Movable  Reclaimable  HighAtomic  Isolate\n"
        .to_owned();
    for z in zones {
        let head = format!("Node {}, zone {:>8}", z.node, z.name);
        let counts: Vec<String> = free_blocks(*z, max_order).iter().map(u64::to_string).collect();
        writeln!(buddyinfo, "{head} {}", counts.join(" ")).unwrap();
        let frames = z.end - z.first;
        writeln!(zoneinfo, "{head}\n  pages free {}", frames - z.used * 512).unwrap();
        writeln!(zoneinfo, "        min 16\n        low 20\n        high 24").unwrap();
        writeln!(zoneinfo, "        spanned {frames}\n        present {frames}").unwrap();
        writeln!(zoneinfo, "        managed {frames}\n  pagesets").unwrap();
        for cpu in 0..cpus {
            writeln!(zoneinfo, "    cpu: {cpu}\n              count: 0").unwrap();
            writeln!(zoneinfo, "              high: 60\n              batch: 7").unwrap();
        }
        writeln!(zoneinfo, "  start_pfn: {}", z.first).unwrap();
        writeln!(types, "{head} 0 {} 0 0 0", frames / 512).unwrap();
        writeln!(iomem, "{:08x}-{:08x} : System RAM", z.first << 12, (z.end << 12) - 1).unwrap();
    }
    [("buddyinfo", buddyinfo), ("zoneinfo", zoneinfo), ("pagetypeinfo", types), ("iomem", iomem)]
}

/// The free blocks of a zone by order.
pub fn free_blocks(z: Zone, max_order: u8) -> Vec<u64> {
    let mut blocks = vec![0; usize::from(max_order) + 1];
    let mut pfn = z.first + z.used * 512;
    while pfn < z.end {
        let order = pfn.trailing_zeros().min((z.end - pfn).ilog2()).min(max_order.into());
        blocks[order as usize] += 1;
        pfn += 1 << order;
    }
    blocks
}

/// Two CPUs that allocate and free some hundred blocks over `ms` milliseconds, in two phases.
pub fn small(name: &str, ms: u64) -> Recording {
    let mut maker = Maker::new(name);
    let mut live = Vec::new();
    for i in 0..300u64 {
        if i % 150 == 0 {
            maker.phase(ms * i / 300, i / 150 + 1);
        }
        let cpu = (i % 2) as u16;
        let block = (0x1000 + i * 16, (i % 4) as u8);
        live.push((block, maker.alloc(ms * i / 300, cpu, block)));
        if i % 3 == 2 {
            let (block, id) = live.remove(live.len() / 2);
            maker.free(ms * (i + 1) / 300, 1 - cpu, block, Some(id));
        }
    }
    maker.done()
}
